"""Carries out the Dockerfile without Docker, on a throw-away overlay over this machine's files,
then trains two steps as a foreign user.

    python docker/rehearse.py [nvidia] [slim]

runs by the Python of the project's .venv and needs Linux and root, for the overlay and for changing
users.  It rehearses both bases unless one is named:

nvidia  is no NVIDIA image.  It is made to look like one where that matters to docker/install.py: this
        .venv, with torch, torchvision and triton labelled as NVIDIA labels its builds (26.04's), DALI
        as an older one (26.07's), a constraint file that pins all of it, and without fastdisco,
        deepspeed, timm and scikit-image.
slim    is this .venv as PyPI made it, without the same four packages, and without the C compiler.

Not rehearsed: what a real base holds, its entry point, GPUs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
NVIDIA = {
    "torch": "2.12.0a0+0291f960b6.nv26.4.48445190",
    "torchvision": "0.26.0a0+48956e05.nv26.4.48445190",
    "triton": "3.6.0+git5d72932f.nv26.3",
}
OLD = {"nvidia-dali-cuda130": "2.2.0"}
ABSENT = ["fastdisco", "deepspeed", "timm", "scikit-image"]
# For tests alone, so in no image: when imported, one makes folders in the user's home.
UNLIKE = ["mlflow-skinny", "wandb"]
COMMIT = "0123abc"
USER = "12345:12345"  # in no password file
# What the user of the image runs.
TRY = [
    # No folder is left that the build has closed to others.
    "! find $HOME -type d ! -perm -777 | grep .",
    "python3 docker/check.py",
    "fastdisco data demo /tmp/demo",
    "deepspeed --num_accelerators 2 fastdisco/train.py --config tests/tiny.yaml "
    "data.train=/tmp/demo/train run.max_steps=2",
]


def main(names: list[str]) -> int:
    """Rehearses each base in a mount name space of its own: its mounts end with it, so nothing here
    can ever delete through one."""
    for name in names or BASES:
        with tempfile.TemporaryDirectory() as folder:
            command = ["unshare", "--mount", sys.executable, __file__, name, folder]
            if code := subprocess.run(command).returncode:
                return code
    return 0


def rehearse(name: str, folder: Path) -> None:
    """Builds the image on a base, in `folder`, and uses it."""
    root = overlay(folder)
    env, workdir = build(root, BASES[name](root), dict(COMMIT=COMMIT))
    for command in TRY:
        print(f"--- {name}, as user {USER}: {command}", flush=True)
        # Behind the image's entry point.
        run(root, f"python3 docker/init.py sh -c {shlex.quote(command)}", env, USER, workdir)
    found = json.loads((root / workdir[1:] / "out/tiny/env.json").read_text())
    own = NVIDIA if name == "nvidia" else {}
    assert found["commit"] == COMMIT and own.items() <= found["versions"].items(), found
    for file in ("sbom.cdx.json", "licences.txt"):
        assert "deepspeed" in (root / workdir[1:] / file).read_text(), file
    print(f"rehearsed on {name}: {found['versions']}")


def overlay(folder: Path) -> Path:
    """This machine's file system, of which every change is kept apart in memory."""
    mount = lambda *args: subprocess.run(["mount", "--no-mtab", *map(str, args)], check=True)
    mount("-t", "tmpfs", "tmpfs", folder)
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(mode=0o755)
    folder.chmod(0o755)
    root = folder / "root"
    layers = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
    mount("-t", "overlay", "overlay", "-o", layers, root)
    mount("-t", "proc", "proc", root / "proc")
    mount("--rbind", "/dev", root / "dev")
    mount("--bind", "/sys", root / "sys")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp")
    return root


def slim(root: Path) -> dict[str, str]:
    """Turns the overlay's copy of this .venv into an image with PyPI's torch and no compiler.
    Returns its environment."""
    env = bare(root)
    run(root, "apt-get remove -qq -y gcc gcc-$(gcc -dumpversion)", env)
    return env


def nvidia(root: Path) -> dict[str, str]:
    """Turns the overlay's copy of this .venv into what docker/install.py meets in an NVIDIA image.
    Returns its environment."""
    env, venv = bare(root), Path(sys.prefix).resolve()
    for name, version in (NVIDIA | OLD).items():
        relabel(root / str(venv)[1:], name, version)
    constraint = root / "etc/pip/constraint.txt"
    constraint.parent.mkdir(parents=True, exist_ok=True)
    constraint.write_text(run(root, "python3 -m pip freeze", env, capture=True))
    return env | dict(PIP_CONSTRAINT="/etc/pip/constraint.txt")


BASES = {"nvidia": nvidia, "slim": slim}


def bare(root: Path) -> dict[str, str]:
    """Takes fastdisco and three of its dependencies out of the overlay's copy of this .venv.
    Returns its environment."""
    venv = Path(sys.prefix).resolve()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= dict(PATH=f"{venv}/bin:{os.environ['PATH']}", HOME="/root")
    # A Python under /root, as pyenv installs it, is closed to other users.
    for path in (Path(sys.executable).resolve(), venv / "bin"):
        for parent in path.parents:
            (root / str(parent)[1:]).chmod(0o755)
    run(root, f"python3 -m pip uninstall -q -y {' '.join(ABSENT + UNLIKE)}", env)
    return env


def relabel(venv: Path, name: str, version: str) -> None:
    """Gives an installed package another version, and removes the dependencies that tie it to its
    true one."""
    stem = name.replace("-", "_")
    (old,) = venv.glob(f"lib/python*/site-packages/{stem}-*.dist-info")
    new = old.with_name(f"{stem}-{version}.dist-info")
    # A copy, since a folder of the overlay's lower layer cannot be renamed.
    shutil.copytree(old, new)
    shutil.rmtree(old)
    metadata = (new / "METADATA").read_text()
    metadata = re.sub(r"(?m)^Version: .*", f"Version: {version}", metadata, count=1)
    if name in NVIDIA:
        metadata = re.sub(r"(?m)^Requires-Dist: (torch|triton|nvidia|cuda).*\n", "", metadata)
    (new / "METADATA").write_text(metadata)
    (new / "RECORD").write_text((new / "RECORD").read_text().replace(old.name, new.name))


def build(root: Path, env: dict[str, str], args: dict[str, str]) -> tuple[dict[str, str], str]:
    """Carries out each instruction in turn.  Returns the image's environment and working
    directory."""
    env, user, workdir = dict(env), "0:0", "/"
    for word, rest in instructions((CHECKOUT / "Dockerfile").read_text()):
        print(f"--- {word} {rest}", flush=True)
        if word in ("ARG", "ENV"):
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                env[key] = expand(value, env)
                if word == "ARG" and key in args:
                    env[key] = args[key]
        elif word == "WORKDIR":
            workdir = rest
            (root / workdir[1:]).mkdir(parents=True)
        elif word == "COPY":
            copy(rest.split(), root / workdir[1:])
        elif word == "USER":
            user = f"{rest}:{rest}"
        elif word == "RUN":
            run(root, rest, env, user, workdir)
        else:
            known = word in ("FROM", "LABEL", "CMD", "ENTRYPOINT", "HEALTHCHECK")
            assert known, f"{word}: teach docker/rehearse.py what it does"
    return env, workdir


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction of a Dockerfile, without comments and with continued lines
    joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = re.split(r"\s+", line, maxsplit=1)
        found.append((word, rest))
    return found


def expand(value: str, env: dict[str, str]) -> str:
    """Replaces ${NAME} by its value."""
    return re.sub(r"\$\{(\w+)\}", lambda m: env[m[1]], value)


def copy(words: list[str], workdir: Path) -> None:
    """COPY a b folder/, and COPY . . : what .dockerignore lets through.  Fails, as Docker does,
    where that is nothing."""
    *sources, target = words
    every = context()
    for source in sources:
        inside = lambda f, source=Path(source): f == source or source in f.parents
        files = [f for f in every if source == "." or inside(f)]
        assert files, f"COPY {source}: not in the build context, see .dockerignore"
        for f in files:
            to = workdir / target / (f.name if f == Path(source) else f.relative_to(source))
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / f, to)
            # A checkout may be closed to others.
            to.chmod(0o600)


def context() -> list[Path]:
    """The files of the checkout that .dockerignore lets through: of the patterns that match a file
    or a folder above it, the last decides."""
    rules = []
    for line in (CHECKOUT / ".dockerignore").read_text().splitlines():
        if line and line[0] != "#":
            rules.append((pattern(line.lstrip("!")), line.startswith("!")))
            # A pattern that lets a part of a folder in could not be found by the walk below, which
            # skips folders that are left out.
            assert not (line.startswith("!") and "/" in line), line

    def kept(path: Path) -> bool:
        names = [str(path), *map(str, path.parents)][:-1]
        for rule, keep in reversed(rules):
            if any(rule.fullmatch(name) for name in names):
                return keep
        return True

    found, todo = [], [Path()]
    while todo:
        for path in sorted((CHECKOUT / todo.pop()).iterdir()):
            relative = path.relative_to(CHECKOUT)
            if kept(relative):
                is_folder = path.is_dir() and not path.is_symlink()
                (todo if is_folder else found).append(relative)
    return found


def pattern(text: str) -> re.Pattern[str]:
    """A pattern of .dockerignore: `**/` is any folders, `*` anything within a name."""
    escaped = re.escape(text)
    return re.compile(escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*"))


def run(
    root: Path,
    command: str,
    env: dict[str, str],
    user: str = "0:0",
    workdir: str = "/",
    capture: bool = False,
) -> str | None:
    """Runs a command in the overlay, by sh as Docker does.  capture: return what it printed."""
    script = ["/bin/sh", "-c", f"cd {workdir} && {command}"]
    enter = ["chroot", f"--userspec={user}", "--groups=", root, *script]
    stdout = subprocess.PIPE if capture else None
    return subprocess.run(enter, env=env, text=True, check=True, stdout=stdout).stdout


if __name__ == "__main__":
    # In the name space: a base and the folder for the overlay.
    if len(sys.argv) == 3 and sys.argv[2] not in BASES:
        sys.exit(rehearse(sys.argv[1], Path(sys.argv[2])))
    sys.exit(main(sys.argv[1:]))
