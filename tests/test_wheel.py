"""The wheel that pip makes: what it holds beside Python files is enough to write a report, anywhere
but in a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import reports
from conftest import ROOT

# What a wheel is built of; the checkout itself would get build/ and *.egg-info.
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGES = ("fastdisco", "kernels")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel installs, and nothing else."""
    root = tmp_path_factory.mktemp("wheel")
    source, target = root / "source", root / "site"
    unbuilt = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=unbuilt)
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", root, source], check=True, timeout=300)
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as whole:
        whole.extractall(target)
    return target


def test_it_holds_every_file_of_the_packages(installed):
    """A file that package_data forgets is missing only at users, never in a checkout."""
    homes = {"fastdisco": "fastdisco", "kernels": "fastdisco/kernels"}
    own = {
        f"{home}/{path.relative_to(ROOT / package).as_posix()}"
        for package, home in homes.items()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    assert own <= there


def test_it_writes_a_report_with_style_script_and_chart(installed, tmp_path):
    run = reports.run(reports.images(tmp_path / "data"), "alone")
    reports.trained(run)
    command = [sys.executable, "-m", "fastdisco.cli", "report", str(run), "--images", "0"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    begun = "import fastdisco.report; print(fastdisco.report.__file__)"
    told = subprocess.run(
        [sys.executable, "-c", begun],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.startswith(str(installed))
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    page = (tmp_path / "report.html").read_text(encoding="ascii")
    templates = installed / "fastdisco/report/templates"
    for name in ("page.css", "page.js", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"):
        assert (templates / name).read_text(encoding="utf-8").strip()[:200] in page, name
