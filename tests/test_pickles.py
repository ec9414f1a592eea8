"""What a checkpoint's pickle may ask for: plain values in every spelling of theirs, and nothing that
could run code; and the command that rewrites what is refused."""

import argparse
import codecs
import collections
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from fastdisco import models
from fastdisco.config import UserError
from fastdisco.models import pickles

VALUES = {
    "lr": np.float64(0.3),
    "single": np.float32(1 / 3),
    "half": np.float16(0.5),
    "epoch": np.int64(-7),
    "byte": np.uint8(255),
    "flag": np.bool_(True),
    "complex": np.complex64(1 + 2j),
    "arch": np.str_("vit_\N{GREEK SMALL LETTER PI}"),
    "bytes": np.bytes_(b"ab"),
    "big": np.float64(0.3).astype(">f8"),
}


def spelled(**names):
    """A pickle module that writes modules by other names, as other versions of numpy, torch or
    Python do."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            name = name or obj.__qualname__
            module = f"{obj.__module__}.{name}"
            module = next((new for old, new in names.items() if old in module), module)
            self.write(pickle.GLOBAL + "\n".join((*module.rsplit(".", 1), "")).encode())
            self.memoize(obj)

        dispatch = pickle._Pickler.dispatch | {
            types.FunctionType: save_global,
            type: save_global,
        }

    return module_of(Pickler)


def module_of(pickler):
    """As torch.save takes it."""
    shim = types.ModuleType("pickle")
    shim.Pickler, shim.dumps, shim.dump = pickler, pickle.dumps, pickle.dump
    return shim


def asking(name, *args):
    """A pickle module that calls `name` with args in MARK's place: by hand, as no object here would."""
    module, _, attribute = name.rpartition(".")

    class Pickler(pickle._Pickler):
        def save(self, obj, save_persistent_id=True):
            if obj is not MARK:
                return super().save(obj, save_persistent_id)
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
            super().save(args)
            self.write(pickle.REDUCE)

    return module_of(Pickler)


MARK = object()


def write(file, found, shim=pickle, protocol=2, zipped=True):
    torch.save(
        found,
        file,
        pickle_module=shim,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    return file


def refusal(file):
    with pytest.raises(UserError) as e:
        models.read(file)
    text = str(e.value)
    assert text.startswith(f"{file}: ") and "\n" not in text, text
    return text


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("core", ["numpy.core.", "numpy._core."])
def test_numbers_of_numpy_are_read_in_each_spelling(tmp_path, core, zipped):
    scalar = f"{core}multiarray.scalar"
    shim = spelled(scalar=scalar)
    file = write(tmp_path / "x.pth", {"w": torch.ones(2), **VALUES}, shim, zipped=zipped)
    # The test's file has the spelling that it is to have.
    assert scalar.replace(".scalar", "\nscalar").encode() in file.read_bytes()
    found = models.read(file)
    assert found.pop("w").tolist() == [1, 1]
    assert found == {k: v.item() for k, v in VALUES.items()}
    assert {type(x) for x in found.values()} == {float, int, bool, complex, str, bytes}


def test_values_of_other_kinds_are_read_without_what_made_them(tmp_path):
    lists = collections.defaultdict(list, {1: [2]})
    nested = collections.defaultdict(collections.OrderedDict, {"a": collections.OrderedDict(b=1)})
    found = {
        "lists": lists,
        "nested": nested,
        "count": collections.Counter("aab"),
        "args": argparse.Namespace(out=pathlib.PosixPath("/a/b"), lr=np.float64(2)),
        "rng": np.random.RandomState(0).get_state(),
    }
    got = models.read(write(tmp_path / "x.pth", found))
    assert got["lists"] == {1: [2]} and type(got["lists"]) is dict
    assert got["nested"] == {"a": {"b": 1}} and got["count"] == {"a": 2, "b": 1}
    # A path that no method of can reach a disk.
    assert type(got["args"].out) is pathlib.PurePosixPath and got["args"].lr == 2
    assert got["rng"][0] == "MT19937" and not isinstance(got["rng"][1], np.ndarray)
    for module in ("pathlib._local", "pathlib"):
        shim = spelled(PosixPath=f"{module}.PosixPath")
        got = models.read(write(tmp_path / "x.pth", {"p": pathlib.PosixPath("/a/b")}, shim))
        assert got == {"p": pathlib.PurePosixPath("/a/b")}


def test_dinos_and_swavs_optimizer_state_is_read(tmp_path):
    """Their schedules are arrays, and so the groups hold numpy's numbers."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1, 5)[2]
    file = write(tmp_path / "x.pth", {"optimizer": optimizer.state_dict()})
    assert b"scalar" in file.read_bytes()
    assert models.read(file)["optimizer"]["param_groups"][0]["lr"] == 0.5


HOSTILE = [
    ("builtins.eval", "print(1)"),
    ("builtins.exec", "print(1)"),
    ("builtins.getattr", "a", "upper"),
    ("builtins.__import__", "os"),
    ("builtins.open", "x"),
    ("builtins.type", "x"),
    ("builtins.map", "x"),
    ("os.system", "true"),
    ("posix.system", "true"),
    ("subprocess.Popen", "true"),
    ("functools.partial", "x"),
    ("operator.attrgetter", "x"),
    ("importlib.import_module", "os"),
    ("numpy.load", "x.npy"),
    ("numpy.fromfile", "x"),
    ("numpy.core.multiarray.fromfile", "x"),
    ("numpy._core.multiarray.frombuffer", "x"),
    ("numpy.f2py.crackfortran.myeval", "1"),
    ("numpy.testing._private.utils.runstring", "1", {}),
    ("collections.namedtuple", "a", "b"),
    ("collections.UserDict",),
    ("argparse.ArgumentParser",),
    ("argparse.FileType", "w"),
    ("pathlib.Path", "/"),
    ("pathlib.PosixPath.touch", "/x"),
    ("torch.load", "x"),
    ("torch.hub.load", "x", "y"),
    ("fastdisco.models.pickles.scalar", "x"),
    ("types.SimpleNamespace",),
]


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_else_passes(tmp_path, zipped):
    for name, *args in HOSTILE:
        text = refusal(write(tmp_path / "x.pth", {"a": MARK}, asking(name, *args), zipped=zipped))
        asked = name.removeprefix("builtins.")
        assert f"asks for {asked}, and building" in text, text

    # As the factory of a dict, where nothing is called yet.
    class Factory(pickle._Pickler):
        def save(self, obj, save_persistent_id=True):
            if obj is not MARK:
                return super().save(obj, save_persistent_id)
            self.write(
                b"ccollections\ndefaultdict\ncbuiltins\neval\n" + pickle.TUPLE1 + pickle.REDUCE
            )

    shim = module_of(Factory)
    assert "asks for eval" in refusal(write(tmp_path / "x.pth", {"a": MARK}, shim, zipped=zipped))


@pytest.mark.parametrize(
    "code, raw, says",
    [
        ("O8", b"\0" * 8, "asks for numpy.dtype('O8')"),
        ("V8", b"\0" * 8, "asks for numpy.dtype('V8')"),
        ("M8", b"\0" * 8, "asks for numpy.dtype('M8')"),
        ("f16", b"\0" * 16, "asks for numpy.dtype('f16')"),
        ("f8", b"\0" * 7, "not a readable torch checkpoint"),
        ("f8", b"\0" * 9, "not a readable torch checkpoint"),
        (8, b"\0" * 8, "not a readable torch checkpoint"),
    ],
)
def test_a_type_of_numpy_that_is_no_number_is_refused(tmp_path, code, raw, says):
    class Lie:
        def __reduce__(self):
            return np.float64(0).__reduce__()[0], (Type(), raw)

    class Type:
        def __reduce__(self):
            # As numpy would have to believe: a struct of an object at any address.
            fields = {"x": (code, 0)}
            return np.dtype, (code, False, True), (3, "|", None, ("x",), fields, 8, 1, 0)

    assert says in refusal(write(tmp_path / "x.pth", {"a": Lie()}))


def test_no_function_of_numpy_runs_on_what_a_file_holds():
    """Its dtype.__setstate__ believes a file's offsets and flags: a way to any address in memory."""
    for entry in pickles.HARMLESS:
        call = entry[0] if isinstance(entry, tuple) else entry
        assert not (call.__module__ or "").startswith("numpy"), call
    # What torch itself lets through for bytes only encodes: a codec's name reaches no other module.
    with pytest.raises(LookupError):
        codecs.encode("a", "os.path")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols_are_read_or_told(tmp_path, protocol, zipped, recwarn):
    file = write(tmp_path / "x.pth", {"a": np.float64(1)}, protocol=protocol, zipped=zipped)
    text = refusal(file)
    assert f"its pickle is of protocol {protocol}" in text and "python -c" in text
    file = write(tmp_path / "y.pth", {"a": torch.ones(1)}, protocol=protocol, zipped=zipped)
    if protocol == 3:
        assert models.read(file)["a"] == 1
    else:
        assert f"its pickle is of protocol {protocol}" in refusal(file)
    assert not recwarn.list


NETWORK = """
import torch

class Pretrained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_q = torch.nn.Linear(2, 3)
        self.queue = torch.nn.Buffer(torch.ones(2))
"""


def run(text, folder):
    """Runs, in the folder, the command that an error names; [names of the files it made]."""
    command = text[
        text.index("python -c ") : text.index(" weights.pth.tar") + len(" weights.pth.tar")
    ]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "INJECTED" not in done.stdout
    return sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")


@pytest.mark.parametrize(
    "name",
    ["plain.pth", "x'+str(print('INJECTED'))+'.pth", "a b;$(touch INJECTED)`touch INJECTED`.pth"],
)
def test_the_command_for_a_pickled_network_works(tmp_path, monkeypatch, name):
    (tmp_path / "network_of_others.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    import network_of_others

    net = network_of_others.Pretrained()
    whole = name == "plain.pth"
    # The network itself, or it and others in a dict.
    found = net if whole else {"model": net, "args": types.SimpleNamespace(lr=1), "epoch": 3}
    file = write(tmp_path / name, found)
    text = refusal(file)
    assert "asks for network_of_others.Pretrained" in text and "throw-away container" in text
    del sys.modules["network_of_others"]
    assert run(text, tmp_path) == sorted([name, "network_of_others.py", "weights.pth.tar"])
    got = models.read(tmp_path / "weights.pth.tar")
    got = got if whole else got["model"]
    assert set(got) == {"encoder_q.weight", "encoder_q.bias", "queue"}
    assert torch.equal(got["encoder_q.weight"], net.encoder_q.weight)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_torchscript_archive_is_told_and_its_command_works(tmp_path):
    file = tmp_path / "script.pth"
    torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2)).save(str(file))
    text = refusal(file)
    assert "TorchScript archive" in text
    assert "weights.pth.tar" in run(text, tmp_path)
    assert set(models.read(tmp_path / "weights.pth.tar")) == {"weight", "bias"}


def test_the_command_has_the_files_name_as_an_argument_alone(tmp_path):
    name = "x'; print('INJECTED') #.pth"
    file = write(tmp_path / name, {"a": types.SimpleNamespace()})
    command = re.search(r"python -c .*weights\.pth\.tar", refusal(file))[0]
    python, option, code, argument, out = shlex.split(command)
    assert (python, option, argument, out) == ("python", "-c", str(file), "weights.pth.tar")
    assert "INJECTED" not in code
