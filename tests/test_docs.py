"""The pages agree with the project: every link leads somewhere, every command parses, every
configuration key, file and environment variable that they name exists."""

import argparse
import ast
import collections
import contextlib
import importlib.util
import io
import itertools
import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT

import fastdisco
from fastdisco import cli, config
from fastdisco.commands import arguments, train
from fastdisco.evals import settings
from fastdisco.evals.protocols import Protocol

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# A fenced block: its fence, language and body.
FENCE = re.compile(r"^(`{3,}|~{3,})(\w*)[^\n]*\n(.*?)^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
# Code within a line; it may go on in the next line, but not in the next paragraph.
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^()\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
DEFINITION = re.compile(r"^\[[^\]]+\]:\s+<?(\S+?)>?\s*$", re.MULTILINE)
BARE_URL = re.compile(r"https?://[^\s)>|\]`\"]+")
# Tables made by bench/report.py: the commands there are those of the commit that they name.
GENERATED = re.compile(r"<!-- bench:(\w+).*?<!-- /bench:\1 -->", re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def text_of(page):
    return GENERATED.sub("", page.read_text())


def spans(text):
    """The inline code of a page, each on one line."""
    found = SPAN.finditer(FENCE.sub("", text))
    return [" ".join(m[2].split()).replace("\\|", "|") for m in found]


# ---- links


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    text, seen = FENCE.sub("", page.read_text()), collections.Counter()
    found = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def broken(page, target):
    """Why a link leads nowhere, or None.  Other hosts are not asked."""
    url = urlsplit(target)
    if url.scheme == "mailto":
        return None if re.fullmatch(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", url.path) else "no address"
    if url.scheme or url.netloc:
        whole = url.scheme in ("http", "https") and re.fullmatch(
            r"[\w-]+(\.[\w-]+)+", url.hostname or ""
        )
        return None if whole else "no URL"
    path = (page.parent / unquote(url.path)).resolve() if url.path else page
    if not path.exists() or not path.is_relative_to(ROOT):
        return "no such file"
    if url.fragment and path.suffix == ".md" and url.fragment not in anchors(path):
        return f"no such heading; {path.name} has {', '.join(sorted(anchors(path)))}"
    return None


@each_page
def test_every_link_leads_somewhere(page):
    text = FENCE.sub("", page.read_text())
    prose = SPAN.sub("code", text)
    targets = [*LINK.findall(prose), *DEFINITION.findall(prose), *BARE_URL.findall(text)]
    assert [f"{t}: {why}" for t in targets if (why := broken(page, t))] == []


def test_headings_have_githubs_anchors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# `train.py`: what it does & why\n## A [link](x.md) - or two_words\n## Twice\n"
        "```\n# no heading\n```\n## Twice ##\n"
    )
    assert anchors(page) == {
        "trainpy-what-it-does--why",
        "a-link---or-two_words",
        "twice",
        "twice-1",
    }


def test_the_index_names_every_page():
    index = ROOT / "docs/index.md"
    linked = {(index.parent / t.partition("#")[0]).resolve() for t in LINK.findall(text_of(index))}
    assert {*PAGES} - {index} <= linked


# ---- commands


class Refused(Exception):
    pass


def commands(page):
    """(words, whole) of every command of a page.  One in a fenced block is whole; one in a sentence
    may leave out what the sentence does not speak of."""
    for span in spans(text_of(page)):
        yield from ((words, False) for words in simple(span))
    for _, language, body in FENCE.findall(text_of(page)):
        if language in ("", "sh", "bash", "shell", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                yield from ((words, True) for words in simple(line.removeprefix("$ ")))


def simple(line):
    """The commands of a shell line, as words; `a|b` in a word stands for either, and brackets
    around an option say that it may be left out."""
    try:
        words = shlex.split(re.sub(r"\[(-[^\[\]]*)\]", r"\1", line), comments=True)
    except ValueError:  # a sentence with an apostrophe, a formula
        return
    for end, part in itertools.groupby(words, lambda w: w in ("&&", "||", ";", "|", "&")):
        part = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, part))
        if not end and part:
            either = [w.split("|") if re.fullmatch(r"\w+(\|\w+)+", w) else [w] for w in part]
            yield from map(list, itertools.product(*either))


TRAIN = ("train.py", "fastdisco/train.py", "fastdisco.train")


def check(words, whole, base):
    """Raises Refused where a command of ours would not be understood."""
    if "..." in words:
        words, whole = [w for w in words if w != "..."], False
    tool, *rest = words
    if tool == "docker" and rest[:1] == ["run"] and "fastdisco" in rest:
        # What the container of the image `fastdisco` runs.
        tool, *rest = rest[rest.index("fastdisco") + 1 :] or [""]
    if re.fullmatch(r"(\S+/)?python3?", tool) and rest:
        tool, *rest = rest[1:] if rest[0] == "-m" and rest[1:] else rest
    elif tool in LAUNCHERS:
        tool, rest = launched(tool, rest)
    if tool == "make":
        check_make(rest)
    elif tool in ("fastdisco", "fastdisco.cli"):
        check_config(parse(cli._parser(rest), rest, whole, arguments.parse), base)
    elif tool in TRAIN and (tool != words[0] or (rest[:1] and rest[0].startswith("-"))):
        parser = argparse.ArgumentParser(prog="train.py")
        train.add(parser)
        intermixed = argparse.ArgumentParser.parse_intermixed_args
        check_config(parse(parser, rest, whole, intermixed), base)
    elif re.fullmatch(r"bench/\w+\.py", tool):
        if not (ROOT / tool).is_file():
            raise Refused("no such bench")
        intermixed = argparse.ArgumentParser.parse_intermixed_args
        parse(bench_parser(ROOT / tool), rest, whole, intermixed)
    elif tool != words[0] and tool.endswith(".py") and not (ROOT / tool).is_file():
        raise Refused(f"no file {tool}")


def parse(parser, words, whole, by):
    if not whole:
        relax(parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return by(parser, words)
    except SystemExit as e:
        # --help and --version end with 0.
        if e.code:
            raise Refused(said.getvalue().splitlines()[-1]) from None
        return argparse.Namespace()


def relax(parser):
    """Lets a parser take a command that is only mentioned: nothing is required, and an option may
    stand without its value."""
    fewer = {None: "?", "+": "*"}
    for action in parser._actions:
        action.required = False
        if isinstance(action, argparse._SubParsersAction):
            for each in set(action.choices.values()):
                relax(each)
        else:
            action.nargs = fewer.get(action.nargs, action.nargs)


def bench_parser(path):
    """A bench's parser, made from the add_argument calls in its source and in the files of bench/
    that it imports: running it would import torch first."""
    parser, todo, seen = argparse.ArgumentParser(path.name), [path], set()
    while todo:
        if (file := todo.pop()) in seen:
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                files = [file.parent / f"{n.rpartition('.')[2]}.py" for n in names]
                todo += [f for f in files if f.is_file()]
            # Some give the method a short name: add = options.add_argument.
            called = getattr(node, "func", None)
            if "add_argument" in (
                getattr(called, "attr", ""),
                getattr(called, "id", "") + "_argument",
            ):
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if not names or not all(isinstance(n, str) for n in names):
                    continue
                how = {
                    k.arg: k.value.value
                    for k in node.keywords
                    if k.arg in ("nargs", "action", "required")
                    and isinstance(k.value, ast.Constant)
                }
                with contextlib.suppress(argparse.ArgumentError):  # two benches have the same
                    parser.add_argument(*names, **how)
    return parser


# Programs that start ours, and where they declare their options.
LAUNCHERS = {
    "deepspeed": ("deepspeed", "launcher/runner.py"),
    "torchrun": ("torch", "distributed/run.py"),
}


def launched(tool, words):
    """What a launcher starts, and with which arguments; its own options must be known to it."""
    package, file = LAUNCHERS[tool]
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    source = Path(folder, file).read_text()
    for i, word in enumerate(words):
        if word.endswith(".py") or word in ("fastdisco.train", "fastdisco.cli"):
            return word, words[i + 1 :]
        name = word.partition("=")[0]
        known = {name, name.replace("_", "-"), name.replace("-", "_").replace("__", "--", 1)}
        if name.startswith("--") and not any(f'"{n}"' in source for n in known):
            raise Refused(f"{tool} has no option {name}")
    return tool, []


def check_make(words):
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.-]+)(?:\s[\w.-]+)*:(?!=)", text, re.MULTILINE))
    for word in [w for w in words if w[0] != "-"]:
        name, eq, value = word.partition("=")
        if not eq and name not in targets and not name.isupper():
            raise Refused(f"no target {name}")
        if eq and not re.search(rf"\$\({name}\)|^{name} *\??=", text, re.MULTILINE):
            raise Refused(f"the Makefile reads no {name}")
        if name == "PART" and value != "..." and not value.isupper():
            parts = re.search(r"^PARTS := (.*)", text, re.MULTILINE)[1].split()
            if value not in parts:
                raise Refused(f"no part {value}")


@each_page
def test_every_command_parses(page, base):
    wrong = []
    for words, whole in commands(page):
        try:
            check(words, whole, base)
        except Refused as e:
            wrong.append(f"{shlex.join(words)}: {e}")
    assert wrong == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_command_in_a_configuration_file_parses(path, base):
    for comment in re.findall(r"^ *# *(?:Command: )?(.*)", path.read_text(), re.MULTILINE):
        for words in simple(comment):
            check(words, False, base)


@pytest.mark.parametrize(
    "line, why",
    [
        ("fastdisco data pakc a b", "invalid choice: 'pakc'"),
        ("fastdisco data check a --quick", "unrecognized arguments: --quick"),
        ("fastdisco data pack a", "required: dst"),
        ("fastdisco train --config configs/mobv3.yaml optim.rl=1", "unknown key optim.rl"),
        ("deepspeed fastdisco/train.py --config configs/none.yaml", "cannot be read"),
        ("deepspeed --gpus 2 fastdisco/train.py --config x", "deepspeed has no option --gpus"),
        ("torchrun --ranks 2 -m fastdisco.train --config x", "torchrun has no option --ranks"),
        ("python bench/report.py --chek", "unrecognized arguments: --chek"),
        ("python bench/nothing.py", "no such bench"),
        ("python docker/nothing.py", "no file docker/nothing.py"),
        ("cd x && make tests", "no target tests"),
        ("make gpu PART=kernel", "no part kernel"),
    ],
)
def test_a_wrong_command_is_found(line, why, base):
    with pytest.raises(Refused, match=re.escape(why)):
        check_all(simple(line), base)


def check_all(found, base):
    for words in found:
        check(words, True, base)


# ---- configuration


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration that has what every override may need, to lay one over."""
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text("{run: {name: x}, data: {train: a, val: b}, teacher: {file: t}}")
    return path


def check_config(args, base):
    """The configuration of a parsed command, and what is laid over it."""
    file, overrides = getattr(args, "config", None), getattr(args, "overrides", None) or []
    if file and (ROOT / file).parts[len(ROOT.parts)] in ("configs", "tests"):
        if "<" not in file:
            load(ROOT / file, overrides)
    else:
        load_by_some_method(base, overrides)


def load(path, overrides):
    theirs, ours = settings.split(overrides)
    try:
        settings.load(ours)
        config.load(path, theirs)
    except config.UserError as e:
        raise Refused(str(e)) from None


def load_by_some_method(path, overrides):
    """Which method a sentence is about, its configuration keys do not say."""
    errors = []
    for first in ([], *([f"method.name={name}"] for name in config.RECIPES)):
        try:
            return load(path, [*first, *overrides])
        except Refused as e:
            errors.append(e)
    raise errors[0]


def overrides_of(span):
    """The `block.key=value` words of an inline code, or those of a YAML line `block.key: value`;
    [] where it is none."""
    line = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*): (\S.*)", span)
    words = [f"{line[1]}={line[2]}"] if line else split(span)
    key = re.compile(r"([a-z_]+)(?:\.[a-z_]+)*=.")
    blocks = config.Config.model_fields | settings.Settings.model_fields
    ours = [bool(m := key.match(w)) and m[1] in blocks for w in words]
    return words if all(ours) and "..." not in span else []


def split(text):
    """At the spaces outside of brackets."""
    words, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == " " and not depth:
            words.append("")
        else:
            words[-1] += c
    return [w for w in words if w]


# A value that stands for any: bn.groups=N, teacher.file=RUN, teacher.file=<file>.
PLACEHOLDER = re.compile(r"=(\w|[A-Z_]+|.*<.*)$")
# Blocks whose keys are another library's.
FREE = re.compile(r"engine\.deepspeed\.|(student|teacher)\.kwargs\.")


def known_keys():
    """Every key of the configuration by its whole name, and every block."""
    from fastdisco.config.reading import _tree

    keys = [*config.flatten(_tree(config.Config)), *settings_keys()]
    return {".".join(k.split(".")[: n + 1]) for k in keys for n in range(len(k.split(".")))}


def settings_keys():
    """Those of evaluations; the linear ones take the keys of their protocol too."""
    for name, field in settings.Settings.model_fields.items():
        block = field.annotation
        more = Protocol.model_fields if issubclass(block, settings.Trained) else ()
        yield from (f"{name}.{key}" for key in (*block.model_fields, *more))


@each_page
def test_every_configuration_key_exists(page, base):
    """And every value is one that it can have."""
    keys, wrong = known_keys(), []
    code = "\n".join(p.read_text() for p in (ROOT / "fastdisco").rglob("*.py"))
    for span in spans(text_of(page)):
        overrides = overrides_of(span)
        if unknown := [k for w in overrides if (k := w.partition("=")[0]) not in keys]:
            wrong.append(f"{span}: no key {unknown[0]}")
        elif overrides and not any(PLACEHOLDER.search(w) for w in overrides):
            try:
                load_by_some_method(base, overrides)
            except Refused as e:
                wrong.append(f"{span}: {e}")
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span) and not FREE.match(span):
            if span in keys:
                continue
            first, last = span.split(".")[0], span.split(".")[-1]
            # Packages and blocks share names: data.train is a key, data.listing a function.
            names = rf"^ *(?:def|class) {last}\b|^    {last}: |\.{last}\("
            file = last in ("md", "py", "txt", "json", "yaml", "pt")
            in_code = file or re.search(names, code, re.MULTILINE)
            blocks = config.Config.model_fields | settings.Settings.model_fields
            if first in blocks and not in_code:
                wrong.append(f"{span}: neither a key nor a function")
    assert wrong == []


@each_page
def test_every_yaml_block_is_a_configuration(page):
    for _, language, body in FENCE.findall(text_of(page)):
        raw = yaml.safe_load(body) if language in ("yaml", "yml") else None
        if isinstance(raw, dict) and raw.keys() <= config.Config.model_fields.keys():
            needed = {"run": {"name": "x"}, "data": {"train": "a", "val": "b"}}
            config.validate(needed | raw, page.name)


# ---- files


# Its files are yet to be written.
PLANNED = re.compile(r"^## Where the next features go$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@each_page
def test_every_file_exists(page):
    top = {p.name for p in ROOT.iterdir()} - {"out"}
    wrong = []
    for span in spans(PLANNED.sub("", text_of(page))):
        name = span.split()[0].rstrip(",:")
        inside = "/" in name and not re.search(r"[<>{}$()=]|\.\.\.|^/|::|\bNAME\b", name)
        first = name.split("/")[0]
        room = name.endswith(".py") and (ROOT / "fastdisco" / first).is_dir()
        if inside and (first in top or room):
            places = (ROOT, ROOT / "fastdisco", page.parent)
            if not any([*place.glob(name.strip("/"))] for place in places):
                wrong.append(name)
    assert wrong == []


# ---- environment variables

NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
CODE = ("fastdisco", "kernels", "bench", "docker", "tests")


def in_python(path):
    """Names of environment variables in a file: literal arguments of os.environ and getenv, and
    keys of the dictionaries that are made for a process: all in capitals, and one has a `_`, which
    no constant of a Triton kernel has."""
    name = lambda node: getattr(node, "attr", getattr(node, "id", ""))
    for node in ast.walk(ast.parse(path.read_text())):
        keys, asked = [], []
        if isinstance(node, ast.Dict):
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
        elif isinstance(node, ast.Subscript) and name(node.value) == "environ":
            asked = [node.slice]
        elif isinstance(node, ast.Call):
            called, of = name(node.func), name(getattr(node.func, "value", None))
            if called in ("getenv", "setenv", "delenv") or of == "environ":
                asked = node.args[:1]
            if called == "dict" or of == "environ":
                keys = [k.arg for k in node.keywords]
        capitals = all(isinstance(k, str) and NAME.fullmatch(k) for k in keys)
        if capitals and any("_" in k for k in keys):
            yield from keys
        yield from [a.value for a in asked if isinstance(a, ast.Constant)]


def variables():
    """Every environment variable that the project reads or sets: {name: files}."""
    found = collections.defaultdict(set)
    for path in [p for part in CODE for p in (ROOT / part).rglob("*.py")] + [ROOT / "setup.py"]:
        for name in in_python(path):
            found[name].add(path)
    others = {
        "Dockerfile": r"\b([A-Z][A-Z_]+)=|^ARG (\w+)",
        "Makefile": r"^(\w+) \?=|^export (\w+)|^\t@?([A-Z_]+)=",
        ".ci/run": r"^\s*(?:export )?([A-Z_]+)=|\$\{([A-Z_]+):-",
    } | {
        f"deploy/{path.name}": r"\$\{?([A-Z_]+)|^export (\w+)="
        for path in (ROOT / "deploy").iterdir()
    }
    for name, pattern in others.items():
        for groups in re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE):
            found["".join(groups)].add(ROOT / name)
    return found


def test_the_page_of_the_environment_names_every_variable_and_no_other():
    text = (ROOT / "docs/environment.md").read_text()
    ours, _, foreign = text.partition("\n## Variables of the libraries")
    assert foreign, "the section of what only libraries read is gone"
    rows = re.findall(r"^\|((?: `[A-Z0-9_]+`,?)+) \|(.*)\|$", ours, re.MULTILINE)
    named = {name: rest for names, rest in rows for name in re.findall(r"`(\w+)`", names)}
    found = variables()
    assert {n: [*map(str, f)] for n, f in found.items() if n not in named} == {}
    assert named.keys() - found.keys() == set()
    for name, rest in named.items():
        where = SPAN.findall(rest.rsplit("|", 1)[-1])
        assert where, f"{name}: in which file?"
        for _, file in where:
            assert name in (ROOT / file).read_text(), f"{file} has no {name}"


# ---- what the host of the repository reads


def test_the_workflow_runs_ci_on_every_python():
    raw = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = raw["jobs"].values()
    declared = re.search(r"python_requires=\">=(.+?)\"", (ROOT / "setup.py").read_text())[1]
    versions = job["strategy"]["matrix"]["python"]
    assert versions[0] == declared and versions == ["3.10", "3.11", "3.12"]
    assert [s for s in job["steps"] if s.get("run") == ".ci/run"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_the_forms_ask_for_the_environment(name):
    raw = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert raw["name"] and raw["description"]
    fields = {field["id"]: field for field in raw["body"] if field["type"] != "markdown"}
    assert "env.json" in fields["environment"]["attributes"]["description"]


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastdisco.__version__
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2104.09124" in str(paper["identifiers"]) and len(paper["authors"]) == 7
    changes = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert fastdisco.__version__ in changes
