"""The image without Docker: lint, what gets into it, and that the install leaves alone what a base
built for itself (real pip, made-up packages).

docker/rehearse.py, which .ci/run starts, carries out the Dockerfile itself."""

import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run

from fastdisco.data import operators
from fastdisco.run import environment

sys.path.insert(0, str(ROOT / "docker"))
import bill
import check
import install
import rehearse

Requirement = install.Requirement
STEPS = rehearse.instructions((ROOT / "Dockerfile").read_text())
NV = "nv26.8.63802676"
WANTED = [
    "torch>=2.11,<2.16",
    "torchvision>=0.26,<0.31",
    "deepspeed>=0.19.6",
    "numpy",
    "nvidia-dali-cuda130>=2.4,<3",
]
# {name: (version, requirements)}: as an NVIDIA image, with alphas of the oldest releases that will
# do.
BASE = {
    "torch": (f"2.11.0a0+a6c236b9fd.{NV}", ["numpy"]),
    "torchvision": (f"0.26.0a0+48956e05.{NV}", ["numpy", "torch"]),
    "numpy": ("2.1.0", []),
    "nvidia-dali-cuda130": ("2.3.0", ["numpy", "nvidia-nvimgcodec-cu13<0.9"]),
    "nvidia-nvimgcodec-cu13": ("0.8.0", []),
    "flash-attn": ("2.7+x", ["torch"]),
}
INDEX = [  # what pip finds beside it
    ("torch", "2.14.1", ["numpy>=2.2"]),
    ("torchvision", "0.29.1", ["torch==2.14.1"]),
    ("numpy", "2.4.0", []),
    ("deepspeed", "0.19.8", ["torch>=2"]),
    ("nvidia-dali-cuda130", "2.4.0", ["numpy", "nvidia-nvimgcodec-cu13>=0.9"]),
    ("nvidia-nvimgcodec-cu13", "0.9.0", []),
]


# --- the Dockerfile


def test_the_dockerfile_passes_the_linter():
    run(Path(sys.prefix) / "bin/hadolint", "--failure-threshold", "info", "Dockerfile")


def test_what_the_linter_does_not_know():
    words = [word for word, _ in STEPS]
    assert (
        STEPS[0][0] == "ARG"
        and re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", STEPS[0][1])
        and STEPS[1] == ("FROM", "${BASE}")
    )
    # NVIDIA's own entry point comes behind it: docker/init.py.
    assert ("ENTRYPOINT", '["python3", "/workspace/fastdisco/docker/init.py"]') in STEPS
    assert [rest for word, rest in STEPS if word == "USER"] == ["10001"] and words.index(
        "USER"
    ) < max(i for i, w in enumerate(words) if w == "RUN")
    dependencies = next(
        i for i, (word, rest) in enumerate(STEPS) if word == "RUN" and "docker/install.py" in rest
    )
    # A changed source does not install them again.
    assert dependencies < STEPS.index(("COPY", ". ."))
    assert not [
        rest
        for word, rest in STEPS[:dependencies]
        if word == "COPY" and set(rest.split()[:-1]) & {"fastdisco", "README.md", "docker", "."}
    ]


def test_the_build_context_is_the_source_alone(tmp_path, monkeypatch):
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    wanted = [
        "setup.py",
        "README.md",
        "LICENSE",
        "fastdisco/data/loader.py",
        "kernels/chunked.py",
        "configs/demo/student.yaml",
        "docker/check.py",
    ]
    stray = [
        ".git/config",
        ".env",
        ".venv/bin/python",
        "out/mobv3/config.yaml",
        "teacher.pth.tar",
        "notes/configs/a.yaml",
        "shared/data/a.npz",
        "fastdisco/__pycache__/train.cpython-312.pyc",
        "fastdisco/data/__pycache__/x.pyc",
        "fastdisco.egg-info/PKG-INFO",
        "setup.py.orig",
    ]
    for name in wanted + stray:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(rehearse, "CHECKOUT", tmp_path)
    assert sorted(map(str, rehearse.context())) == sorted(wanted)


def test_the_build_context_has_every_tracked_source():
    here = set(map(str, rehearse.context()))
    tracked = run(
        "git",
        "ls-files",
        "fastdisco",
        "kernels",
        "configs",
        "bench",
        "tests",
        "docker",
        "docs",
        "setup.py",
        "pyproject.toml",
        "Makefile",
    ).split()
    assert len(tracked) > 20 and set(tracked) <= here


# --- docker/install.py: the plan


def plan(base, given=(), wanted=WANTED):
    versions = {name: version for name, (version, _) in base.items()}
    depends = {
        name: [Requirement(r).name for r in requires] for name, (_, requires) in base.items()
    }
    return install.plan([Requirement(r) for r in wanted], versions, depends, list(given))


def test_an_alpha_of_the_base_counts_as_its_release():
    missing, constraints = plan(BASE)
    assert [Requirement(r).name for r in missing] == ["deepspeed", "nvidia-dali-cuda130"]
    assert constraints == [
        "flash-attn==2.7+x",
        f"torch==2.11.0a0+a6c236b9fd.{NV}",
        f"torchvision==0.26.0a0+48956e05.{NV}",
    ]


@pytest.mark.parametrize(
    "name, version",
    [
        ("torch", "2.10.0a0+b4e4ee81d3.nv25.12"),
        ("torch", "2.16.0a0+x"),
        ("torchvision", "0.25.0a0+x"),
    ],
)
def test_a_build_of_the_base_that_does_not_serve_is_named(name, version):
    with pytest.raises(
        SystemExit,
        match=rf"^{name}: the base has its own build {re.escape(version)}, fastdisco needs .*--build-arg BASE",
    ):
        plan(BASE | {name: (version, [])})


def test_constraints_of_the_base_stay_but_for_what_must_change():
    given = [
        "# NVIDIA",
        "",
        "numpy==2.1.0",
        "torch==9 # wrong",
        "nvidia_dali_cuda130==2.3.0",
        "nvidia-nvimgcodec-cu13==0.8.0",
        "Pillow==12.0.0",
        "deepspeed==0.19.7",
    ]
    _, constraints = plan(BASE, given, [r for r in WANTED if "dali" not in r])
    assert set(given) - set(constraints) == {"torch==9 # wrong"}
    _, constraints = plan(BASE, given)
    assert set(given) - set(constraints) == {
        "torch==9 # wrong",
        "numpy==2.1.0",
        "nvidia_dali_cuda130==2.3.0",
        "nvidia-nvimgcodec-cu13==0.8.0",
    }


def test_a_base_without_torch_gets_everything():
    assert plan({}) == ([f"{r.name}{r.specifier}" for r in map(Requirement, WANTED)], [])
    assert install.cuda({}) == "13"


# --- docker/install.py: with pip


def metadata(name, version, requires):
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {r}\n" for r in requires
    )


def files(name, version, requires):
    """{path: content} of a package that is nothing but its name, as a wheel holds it."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    content = {
        f"{module}/__init__.py": "class version: cuda = '13.4'\n",
        f"{info}/METADATA": metadata(name, version, requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digest = lambda text: (
        base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
    )
    record = "".join(
        f"{path},sha256={digest(text)},{len(text)}\n" for path, text in content.items()
    )
    return content | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}


@pytest.fixture
def base(tmp_path):
    """A Python with the packages of BASE and pip, which finds INDEX and no network: (python,
    environment)."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    import pip

    (site / "pip").symlink_to(Path(pip.__file__).parent)
    for name, (version, requires) in BASE.items():
        for path, text in files(name, version, requires).items():
            (site / path).parent.mkdir(exist_ok=True)
            (site / path).write_text(text)
    (tmp_path / "index").mkdir()
    for name, version, requires in INDEX:
        with zipfile.ZipFile(
            tmp_path / f"index/{name.replace('-', '_')}-{version}-py3-none-any.whl", "w"
        ) as wheel:
            for path, text in files(name, version, requires).items():
                wheel.writestr(path, text)
    return tmp_path / "venv/bin/python", dict(
        PIP_CONFIG_FILE="/dev/null",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path / "index"),
        PYTHONPATH="",
    )


def started(base, given, code=0):
    """docker/install.py with WANTED in place of what setup.py declares, for which pip would need
    setuptools; what it printed."""
    python, env = base
    constraint = python.parent / "constraint.txt"
    constraint.write_text(given)
    wanted = f"[install.Requirement(r) for r in {WANTED}]"
    main = f"import install; install.requirements = lambda cuda: {wanted}; install.main()"
    return run(
        python,
        "-c",
        main,
        env=env | dict(PIP_CONSTRAINT=str(constraint), PYTHONPATH=str(ROOT / "docker")),
        code=code,
    )


def versions(base):
    return dict(
        line.split("==") for line in run(base[0], "-m", "pip", "freeze", env=base[1]).split()
    )


def test_a_plain_install_takes_another_torch(base):
    """The reason for docker/install.py: without it pip leaves neither torch nor what was compiled
    against it."""
    said = run(base[0], "-m", "pip", "install", "--dry-run", *WANTED, env=base[1])
    assert re.search(r"Would install .*torch-2\.14\.1 torchvision-0\.29\.1", said)


@pytest.mark.parametrize(
    "given",
    [
        "",
        f"torch==2.11.0a0+a6c236b9fd.{NV}\nnumpy==2.1.0\nnvidia-dali-cuda130==2.3.0\nnvidia-nvimgcodec-cu13==0.8.0\n",
    ],
    ids=["empty constraint file", "all pinned"],
)
def test_the_install_leaves_torch_alone_and_renews_dali(base, given):
    before = versions(base)
    said = started(base, given)
    renewed = {"nvidia-dali-cuda130": "2.4.0", "nvidia-nvimgcodec-cu13": "0.9.0"}
    assert versions(base) == before | renewed | {"deepspeed": "0.19.8"}
    assert (
        f"kept      flash-attn 2.7+x, torch 2.11.0a0+a6c236b9fd.{NV}" in said
        and "2.3.0 -> 2.4.0" in said
        and "added     deepspeed 0.19.8" in said
    )
    assert "to install" not in started(base, given)  # nothing is left to do


def test_what_pip_cannot_solve_ends_the_build(base):
    before = versions(base)
    said = started(base, "deepspeed==0.1\n", code=1)
    assert (
        "ResolutionImpossible" in said
        and said.strip().endswith("take another base (--build-arg BASE=...)")
        and versions(base) == before
    )


def test_a_changed_build_of_the_base_ends_the_build():
    with pytest.raises(SystemExit, match=r"torch 2\.11\.0a0\+x -> 2\.14\.1"):
        install.verify([], {"torch": "2.11.0a0+x"}, {"torch": "2.14.1"})
    with pytest.raises(SystemExit, match=r"timm>=1 \(found None\)"):
        install.verify([Requirement("timm>=1")], {}, {})


# --- docker/bill.py


def test_the_bill_names_each_package_with_its_licences():
    components = [
        {"name": "torch", "version": "2", "licenses": [{"license": {"id": "BSD-3-Clause"}}]},
        {"name": "B", "version": "1", "licenses": [{"expression": "MIT OR Apache-2.0"}]},
        {
            "name": "a",
            "version": "3",
            "licenses": [
                {"license": {"name": "License :: OSI Approved :: BSD License"}},
                {"license": {"name": "BSD License"}},
            ],
        },
        {"name": "z", "version": "4"},
    ]
    assert bill.table(components) == [
        "a 3: BSD License",
        "B 1: MIT OR Apache-2.0",
        "torch 2: BSD-3-Clause",
        "z 4: not declared",
    ]


# --- docker/check.py, and the commit


def test_the_check_looks_at_everything_and_counts_what_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(operators, "OPERATORS", {"GPU": {"Resize", "NoSuchOperator"}})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/triton")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert check.main() == 5
    said = capsys.readouterr().out
    assert (
        "ok    torch" in said
        and "ok    apex" in said
        and "failed: triton, dali, deepspeed, fastdisco, folders" in said
    )
    assert (
        "no GPU operators ['NoSuchOperator']" in said
        and "no C compiler: install gcc" in said
        and "/proc/triton" in said
    )


def test_an_image_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastdisco/run/environment.py"))
    monkeypatch.delenv("FASTDISCO_COMMIT", raising=False)
    assert environment.environment()["commit"] is None
    monkeypatch.setenv("FASTDISCO_COMMIT", "abc1234")
    assert environment.environment()["commit"] == "abc1234"
    # Another checkout mounted over the image's: the image's commit is not its commit.
    (tmp_path / ".git").mkdir()
    assert environment.environment()["commit"] is None
