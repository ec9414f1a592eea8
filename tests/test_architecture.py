"""The tree keeps its shape: import levels, one owner for each heavy dependency, no names that break
`deepspeed fastdisco/train.py`."""

import ast
import importlib
import inspect
import sys

import pytest
from conftest import ROOT

LEVELS = [
    {"kernels", "common", "config"},
    {"data", "models", "engine"},
    {"teacher", "methods", "evals"},
    {"run", "export", "doctor", "report"},
    {"cli", "train", "commands"},
]
OWNERS = {
    "nvidia": {"data"},
    "deepspeed": {"engine"},
    "timm.optim": {"engine"},
    "timm": {"models", "engine"},
    "triton": {"kernels"},
    "sklearn": {"evals"},
    "openTSNE": {"evals"},
    "umap": {"evals"},
    "pyarrow": {"evals"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "boto3": {"data"},
    "botocore": {"data"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "wandb": {"run"},
    "mlflow": {"run"},
}
FILES = sorted([*(ROOT / "fastdisco").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def unit(path):
    """fastdisco/data/folder.py -> data, kernels/chunked.py -> kernels"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imports(path):
    """Dotted names of everything a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    if (here := unit(path)) == "__init__":
        return
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    assert here in level, f"{path.name}: give it a level"
    for name in imports(path):
        if (
            name.startswith("fastdisco.")
            and (other := name.split(".")[1]) in level
            and other != here
        ):
            down = level[other] < level[here]
            # The foundations may use each other, and so may the entry points.
            beside = level[other] == level[here] and level[here] in (0, len(LEVELS) - 1)
            assert down or beside, (
                f"{here} (level {level[here]}) imports {other} (level {level[other]})"
            )
        for heavy, owners in OWNERS.items():
            if name == heavy or name.startswith(heavy + "."):
                assert here in owners, f"{name} is imported by {here}; only {owners} may"


def test_only_its_command_imports_the_loop():
    assert {
        p.name for p in FILES for name in imports(p) if name.startswith("fastdisco.train.")
    } == {"train.py"}
    assert not [p for p in FILES for name in imports(p) if name.startswith("fastdisco.cli")]


def test_no_file_shadows_the_standard_library():
    names = {p.stem for p in (ROOT / "fastdisco").glob("*.py")} | {
        p.name for p in (ROOT / "fastdisco").iterdir() if p.is_dir()
    }
    assert not names & set(sys.stdlib_module_names)


USERS = sorted([*(ROOT / "tests").glob("*.py"), *(ROOT / "bench").rglob("*.py")])


@pytest.mark.parametrize("path", USERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_tests_and_benches_take_from_our_modules_exists(path):
    """In code for a GPU, too, which no test here runs: a name that has moved would show only
    there."""
    assert missing(path.read_text()) == []


def test_a_name_that_has_moved_is_found():
    assert missing("from fastdisco import teacher\nteacher.load, teacher.How()") == ["teacher.How"]
    assert missing("from fastdisco import data\ndef f(data): data.nothing") == []
    inside = "def f():\n    from fastdisco.data import nothing\n    from fastdisco.evals import knn"
    assert missing(inside) == ["fastdisco.data.nothing"]


def missing(text):
    """Names that a file takes from our modules and that are not there."""
    nodes = list(ast.walk(ast.parse(text)))
    # By their names here; two functions may import two of one name.
    modules, gone = {}, []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdisco"):
            for a in node.names:
                try:
                    found = taken_from(node.module, a.name)
                except (ImportError, AttributeError):
                    gone.append(f"{node.module}.{a.name}")
                    continue
                modules.setdefault(a.asname or a.name, []).append(found)
    modules = {name: some for name, some in modules.items() if all(map(inspect.ismodule, some))}
    # A variable of the same name may be anything.
    taken = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    taken |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    return gone + [
        f"{n.value.id}.{n.attr}"
        for n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        if n.value.id in modules.keys() - taken
        if not any(hasattr(m, n.attr) for m in modules[n.value.id])
    ]


def taken_from(module, name):
    """What `from module import name` gives."""
    found = importlib.import_module(module)
    try:
        return getattr(found, name)
    except AttributeError:
        return importlib.import_module(f"{module}.{name}")
