"""Fuzzing: inputs of every kind, mutated.  Each ends in one clean sentence or in a right result, within
bounds of time and memory.

`make test` tries a few hundred inputs, always the same.  `make fuzz` tries FASTDISCO_FUZZ of them
(10,000), others each time; what fails is kept in tests/fuzz/ and tried first from then on.  Inputs
that failed once stand here as examples."""

import io
import json
import os
import resource
import shutil
import tarfile
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from conftest import ROOT, TESTS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from layouts import small_swav
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from fastdisco import config, data, models
from fastdisco.config import UserError
from fastdisco.data import pack, tar_index
from fastdisco.run import checkpoint
from fastdisco.teacher import cache_files, formats

pytestmark = pytest.mark.fuzz
COUNT = int(os.environ.get("FASTDISCO_FUZZ", "400"))
SECONDS, BYTES = 30, 2 << 30
WHOLE = "run: {name: x}\ndata: {train: /t, batch: 64}\nteacher: {file: /t.pth}\noptim: {lr: 0.1}\n"


def inputs(share):
    """Settings of a test that tries this share of all inputs."""
    kept = dict(derandomize=True, database=None)
    if "FASTDISCO_FUZZ" in os.environ:
        kept = dict(database=DirectoryBasedExampleDatabase(TESTS / "fuzz"), print_blob=True)
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=max(5, int(share * COUNT)), deadline=None, suppress_health_check=slow, **kept
    )


@contextmanager
def clean():
    """What happens inside ends well, or by a UserError of one sentence, soon and in little memory."""
    # Of the processor: another process may take most of the time.
    begin, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except UserError as e:
        told = str(e)
        assert told and "\n" not in told and len(told) < 4000, told
    assert time.process_time() - begin < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) << 10 < BYTES


# ---- mutations

TOKENS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\n",
        b"\t",
        b"[" * 300,
        b"{a: " * 300,
        b"9" * 5000,
        b"-1",
        b"1e999",
        b"NaN",
    ),
    *(
        b"null",
        b"true",
        b"!!float x",
        b"2001-13-45",
        b"&a [*a]",
        b'"\\ud800"',
        b"../",
        b"$(id)",
        b"\x1b[31m",
    ),
)


@st.composite
def mutated(draw, whole):
    """Bytes with one to four changes: flipped, cut out, doubled, put in, cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        n = draw(st.sampled_from([1, 1, 2, 8, 64, 512, 4096]))
        kind = draw(st.sampled_from(["flip", "flip", "zero", "cut", "double", "token", "end"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "zero":
            content[at : at + n] = bytes(len(content[at : at + n]))
        elif kind == "cut":
            del content[at : at + n]
        elif kind == "double":
            content[at:at] = content[at : at + n]
        elif kind == "token":
            content[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == "end":
            del content[at:]
    return bytes(content)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from(
        [0.1, 1e-3, 5e-324, 1e308, "auto", "off", "fp16", "resnet18", "cosine", "load"]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def changed(draw, tree):
    """A JSON value with one to three of its parts replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            inside = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not inside:
                break
            key = draw(st.sampled_from(inside))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            if draw(st.booleans()):
                node[key] = draw(VALUES)
            else:
                del node[key]
            break
        if isinstance(node, dict) and draw(st.booleans()):
            node[draw(st.text(max_size=8))] = draw(VALUES)
    return tree


# ---- configurations

SHIPPED = [p.read_bytes() for p in sorted((ROOT / "configs").rglob("*.yaml"))[:6]]
KEYS = sorted(config.flatten(config.validate(yaml.safe_load(WHOLE), "x").model_dump(mode="json")))


def read_config(tmp_path, content, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with clean():
        cfg = config.load(path, overrides)
        assert config.validate(yaml.safe_load(config.dump(cfg)), "dumped") == cfg
        path.write_text(config.dump(cfg))
        assert config.load(path) == cfg
        assert len(config.crops(cfg)) <= 1024 * len(cfg.views) and config.students(cfg)
        config.micro_batch(cfg, 2)
        config.refuse_beyond(cfg, 2, 1 << 40)


@inputs(0.2)
@given(st.sampled_from([WHOLE.encode(), *SHIPPED]).flatmap(mutated))
@example(b"run: {name: \xff}")
@example(b"run: {name: x}\ndata: {train: /t}\noptim: {lr: !!float x}")
@example(b"run: {name: x, seed: 2001-13-45}\ndata: {train: /t}")
def test_configurations_as_bytes(tmp_path_factory, content):
    read_config(tmp_path_factory.mktemp("c", numbered=True), content)


@inputs(0.25)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
@example([("method.prototypes", 2**63 - 1)])
@example([("student.kwargs", {"a": float("nan")})])
@example([("run.name", "a\nb")])
@example([("teacher.kwargs", {"\U00018618": None})])
def test_configurations_as_overrides(tmp_path_factory, pairs):
    overrides = [f"{key}={json.dumps(value)}" for key, value in pairs]
    read_config(tmp_path_factory.mktemp("c", numbered=True), WHOLE.encode(), overrides)


@inputs(0.1)
@given(
    changed(yaml.safe_load(WHOLE) | {"views": [{"count": 2, "scale": [0.1, 1]}], "students": []})
)
def test_configurations_as_trees(tmp_path_factory, tree):
    content = json.dumps(tree, ensure_ascii=True).encode()
    read_config(tmp_path_factory.mktemp("c", numbered=True), content)


# ---- data sets


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    """12 images in two tars of ours."""
    root = tmp_path_factory.mktemp("fuzz") / "tars"
    pack.pack(folder / "val", root, shard_mb=12 / 1024)
    return root


@contextmanager
def replaced(path, content):
    """The file has another content meanwhile."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def check_listing(root, same_as=None):
    with clean():
        found = data.listing(root)
        assert same_as is None or found.fingerprint == same_as
        for i in range(len(found.files)):
            assert len(found.read(i)) == found.places.size[i]


@inputs(0.08)
@given(data=st.data())
def test_indices_and_manifests(tars, data):
    """Our own are whole or refused."""
    from fastdisco.data import listing

    name = data.draw(st.sampled_from(["000000.index", "manifest.json"]))
    right = listing(tars).fingerprint
    whole = (tars / name).read_bytes()
    with replaced(tars / name, data.draw(mutated(whole))):
        check_listing(tars, right)


@inputs(0.05)
@given(data=st.data())
def test_manifests_as_trees(tars, data):
    manifest = json.loads((tars / "manifest.json").read_text())
    if data.draw(st.booleans()):
        # As older versions wrote it.
        del manifest["checksum"]
    tree = data.draw(changed(manifest))
    with replaced(tars / "manifest.json", json.dumps(tree).encode()):
        check_listing(tars)


def small_tar():
    out, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    with tarfile.open(fileobj=out, mode="w") as t:
        for i in range(3):
            for name, content in ((f"{i}.jpg", image.getvalue()), (f"{i}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    return out.getvalue()


TAR = small_tar()


@inputs(0.1)
@given(mutated(TAR), st.booleans())
def test_tars_of_others(tmp_path_factory, content, indexed):
    root = tmp_path_factory.mktemp("t", numbered=True)
    if indexed:
        (root / "0.tar").write_bytes(TAR)
        data.listing(root)
    (root / "0.tar").write_bytes(content)
    check_listing(root)
    shutil.rmtree(root)


@inputs(0.05)
@given(data=st.data())
def test_indices_of_tars_of_others(tmp_path_factory, data):
    from fastdisco.data import listing

    root = tmp_path_factory.mktemp("t", numbered=True)
    (root / "0.tar").write_bytes(TAR)
    right = listing(root).fingerprint
    path = tar_index.path_of(root / "0.tar")
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    check_listing(root, right)
    shutil.rmtree(root)


@inputs(0.05)
@given(st.sampled_from([b"a/0.jpg 0\nb/1.jpg 1\n# no\n", b"a/0.jpg\treason\n"]).flatmap(mutated))
def test_list_files_and_quarantines(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("l", numbered=True)
    (root / "list.txt").write_bytes(content)
    with clean():
        found = data.listing(root / "list.txt", "list.txt")
        assert len(found.files) == len(set(found.files)) == len(found.labels)


# ---- weights


def legacy(found):
    out = io.BytesIO()
    torch.save(found, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def zipped(found):
    out = io.BytesIO()
    torch.save(found, out)
    return out.getvalue()


STATE = {"step": 3, "meta": {"data": "x"}, "student": {"a": torch.arange(64.0)}, "data": 3}
FILES = {
    "state.pt": zipped(STATE),
    "legacy.pth": legacy(STATE),
    "t.safetensors": safetensors_bytes(STATE["student"]),
}


@inputs(0.12)
@given(st.sampled_from(sorted(FILES)).flatmap(lambda n: st.tuples(st.just(n), mutated(FILES[n]))))
@example(("legacy.pth", b"\x80\x02c" + b"9" * 5000 + b"\nx\n."))
def test_checkpoints_as_bytes(tmp_path_factory, name_and_content):
    name, content = name_and_content
    path = tmp_path_factory.mktemp("w", numbered=True) / name
    path.write_bytes(content)
    with clean():
        found = models.read(path)
        assert isinstance(found, dict)
        if name == "state.pt" and "student" in found:
            # Zip files have checksums, so what is read is what was written.
            assert torch.equal(found["student"]["a"], STATE["student"]["a"])
    path.unlink()


@inputs(0.05)
@given(st.one_of(mutated(b"step_00000003"), st.binary(max_size=40)))
@example(b"\x80")
@example(b"../..")
def test_the_name_of_the_last_checkpoint(tmp_path_factory, content):
    run = tmp_path_factory.mktemp("r", numbered=True)
    (run / "checkpoints/step_00000003").mkdir(parents=True)
    (run / "checkpoints/step_00000003/state.pt").write_bytes(FILES["state.pt"])
    (run / "checkpoints/last").write_bytes(content)
    with clean():
        found = checkpoint.last(run)
        assert found is None or found.is_dir()
    shutil.rmtree(run)


@pytest.fixture(scope="module")
def swav():
    return small_swav()[0]


@inputs(0.0125)
@given(data=st.data())
def test_teachers(swav, tmp_path_factory, data):
    found = dict(swav)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(found)))
        x = found.pop(name)
        if not isinstance(x, torch.Tensor):
            continue
        other = {
            "gone": {},
            "renamed": {data.draw(st.text(max_size=8)): x},
            "other shape": {name: x.reshape(-1)[:3]},
            "other kind": {name: x.to(torch.int8)},
            "no number": {name: torch.full_like(x.float(), float("nan"))},
            "no tensor": {name: data.draw(SCALARS)},
            "complex": {name: x.to(torch.complex64)},
        }
        found |= other[data.draw(st.sampled_from(sorted(other)))]
    path = tmp_path_factory.mktemp("w", numbered=True) / "t.pth"
    torch.save(found, path)
    with clean():
        source = formats.read(path)
        assert all(x.isfinite().all() for x in source.net.state_dict().values())
    path.unlink()


# ---- recorded embeddings

HEADER = {
    "version": 1,
    "teacher": "0" * 64,
    "precision": "float32",
    "dim": 8,
    "data": "1" * 64,
    "views": {"0": {"size": 32}},
    "rounds": 2,
    "block": 1024,
}


def read_header(folder, content):
    (folder / "cache.json").write_bytes(content)
    with clean():
        found = cache_files.header(folder)
        counts = found["rounds"], found.get("block", 1)
        assert all(type(n) is int and n > 0 for n in counts)
        files = cache_files.Files(folder, slots=1024, row=(2, 8))
        files.refuse_cut_short(min(found["rounds"], 1 << 20))


@inputs(0.05)
@given(mutated(json.dumps(HEADER, indent=1).encode()))
def test_headers_of_recorded_embeddings(tmp_path_factory, content):
    read_header(tmp_path_factory.mktemp("h", numbered=True), content)


@inputs(0.05)
@given(changed(HEADER))
@example(HEADER | {"rounds": "2"})
@example(HEADER | {"block": 0})
@example(HEADER | {"rounds": True})
def test_headers_as_trees(tmp_path_factory, tree):
    read_header(tmp_path_factory.mktemp("h", numbered=True), json.dumps(tree).encode())
