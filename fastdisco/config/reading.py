"""Reading a configuration: a YAML file and `block.key=value` overrides in, one Config out.

Every mistake is told in one sentence."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular
from fastdisco.config.config import Config
from fastdisco.config.merge import flatten, overlay
from fastdisco.config.recipes import RECIPES

# Bounds of what is read: bytes of a file, values in it, levels of nesting, and characters of it in a
# sentence.
LARGEST, ITEMS, DEEPEST, SHOWN = 1 << 20, 100_000, 64, 300
# What JSON escapes other characters by; YAML reads two of them, of which no file can be written.
SURROGATE = re.compile("[\ud800-\udfff]")
# How many mistakes are told at once.
MISTAKES = 4


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The Config of a YAML file with `block.key=value` overrides laid over it.

    A value is YAML: `1e-3` is a number, `null` is none.  The file's key `base` names another file,
    relative to this one, that this one is laid over.  A base has no base itself, so that two files
    tell all.

    Raises UserError naming the file or override, the key, what is wrong with it and, for an unknown
    key, the nearest known one."""
    path = Path(path)
    raw = _read(path)
    if "base" in raw:
        raw = _over_base(raw, path)
    for item in overrides:
        _override(raw, item)
    return validate(raw, path)


def validate(raw: dict[str, Any], source: Path | str) -> Config:
    """The Config of nested dicts.  Raises UserError, which names `source`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        # The views are missing only where the method is wrong, which would have brought them; that
        # is the mistake to tell.
        errors = [err for err in e.errors() if (err["loc"], err["type"]) != (("views",), "missing")]
        # With a hundred mistakes, the first few are enough.
        told = "; ".join(_one_line(_sentence(err)) for err in errors[:MISTAKES])
        raise UserError(f"{source}: {told}") from None


def dump(cfg: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back to an equal
    Config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


# ---- files and overrides


def _over_base(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    base = raw.pop("base")
    if not isinstance(base, str):
        raise UserError(
            f"{path}: base: the name of a YAML file beside it is expected (found {_shown(base)})"
        )
    below = _read(path.parent / base, f"correct `base` in {path}")
    if "base" in below:
        raise UserError(
            f"{path.parent / base}: is the base of {path} and names one itself; write what it "
            "needs into one of the two"
        )
    return overlay(below, raw)


def _read(path: Path, remedy: str = "give --config an existing YAML file") -> dict[str, Any]:
    try:
        with _opened(path) as f:
            content = f.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path}: is larger than {LARGEST} bytes, no configuration; {remedy}")
        raw, text = _parsed(content.decode("utf-8"))
    except (OSError, ValueError) as e:
        if isinstance(e, UnicodeDecodeError):
            raise UserError(f"{path}: is no text in UTF-8; {remedy}") from None
        why = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"{path}: cannot be read ({why}); {remedy}") from None
    except _WrittenTwice as e:
        raise UserError(f"{path}: {e}; join the two") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {_one_line(str(e))}") from None
    raw = raw or {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no blocks; start from one of the files in configs/")
    return _with_texts(raw, text, [Config])


def _opened(path: Path) -> BinaryIO:
    """Raises OSError also for a pipe, but for the shell's own, as in --config <(...): only that has
    surely somebody who writes to it."""
    if path.is_absolute() and path.parts[1] in ("dev", "proc"):
        return path.open("rb")
    return open_regular(path)


def _override(raw: dict[str, Any], item: str) -> None:
    """Sets one `block.key=value` in the nested dicts, in place."""
    key, eq, value = item.partition("=")
    if not eq or not key:
        raise UserError(
            f"override '{_one_line(item)}': expected block.key=value, for example optim.lr=0.06"
        )
    try:
        found, text = _parsed(value)
    except _WrittenTwice as e:
        raise UserError(f"override '{_one_line(item)}': {e}; keep one") from None
    except yaml.YAMLError as e:
        why = _one_line(str(e))
        raise UserError(f"override '{_one_line(item)}': not valid YAML: {why}") from None
    *blocks, last = key.split(".")
    models: list[type[BaseModel]] = [Config]
    node = raw
    for block in blocks:
        # Absent, or null as in `teacher: null`.
        if not isinstance(node.get(block), dict):
            node[block] = {}
        node = node[block]
        models = _blocks_at(models, block)
    node |= _with_texts({last: found}, {last: text}, models)


def _parsed(document: str) -> tuple[Any, Any]:
    """A YAML document, and the same with every value read as text.

    Raises yaml.YAMLError, also for what PyYAML trips over: `2001-13-45`, `!!float x`, 5,000 digits,
    and for what it would unfold or nest without end."""
    try:
        read, text = (yaml.load(document, Loader=x) for x in (_Loader, _Texts))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise yaml.YAMLError(f"a value is not what it looks like or is marked as ({e})") from None
    return read, text


def _one_line(text: str) -> str:
    """The text in one line that a terminal can show, and not a long one."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _shown(value: Any) -> str:
    """What was found, for a sentence."""
    try:
        return _one_line(repr(value))
    except ValueError:
        # Of a whole number with more than 4300 digits.
        return "more digits than can be printed"


class _WrittenTwice(yaml.YAMLError):
    """A mapping has a key twice, of which YAML would keep the last alone."""


def _refuse_unfolding(node: yaml.Node) -> None:
    """Raises yaml.YAMLError for a document that is nested too deep, holds itself, or has more than
    ITEMS values once its anchors are put in: nine anchors of nine others make 9^9 of nine."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise yaml.YAMLError("an anchor holds itself")
        if len(above) > DEEPEST:
            raise yaml.YAMLError("it is nested too deep")
        if id(node) not in sizes:
            if isinstance(node, yaml.ScalarNode) and SURROGATE.search(node.value):
                raise yaml.YAMLError("a text has half a character (\\ud800 to \\udfff)")
            inside = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                inside = [part for pair in inside for part in pair]
            above = (*above, id(node))
            sizes[id(node)] = 1 + sum(size(part, above) for part in inside)
        return sizes[id(node)]

    if size(node, ()) > ITEMS:
        raise yaml.YAMLError(f"its anchors unfold to more than {ITEMS} values; write them out")


class _Texts(yaml.BaseLoader):
    """Reads every value as text."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _refuse_unfolding(node)
        return node


class _Loader(yaml.SafeLoader):
    """PyYAML reads 1e-3 as text, by YAML 1.1; here it is a number.  A key may be written once."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _refuse_unfolding(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here rather than where the dict is made: by then, merged keys (<<) stand beside their own.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if first := lines.get(key.value):
                raise _WrittenTwice(
                    f"the key {key.value} is written twice, in lines {first} and {line}"
                )
            lines[key.value] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


# ---- names that YAML takes for numbers


def _with_texts(raw: Any, text: Any, models: list[type[BaseModel]]) -> Any:
    """`raw` with the text as it was written where a key takes text: a run named 007 or 20241125
    would else be a number.

    text    the same document, of which every value is read as text
    models  the blocks that may stand here"""
    if isinstance(raw, list) and isinstance(text, list):
        return [_with_texts(x, t, models) for x, t in zip(raw, text)]
    if not (isinstance(raw, dict) and isinstance(text, dict)):
        return raw
    read = {}
    for key, value in raw.items():
        # Merged keys (<<) and keys that are no text are not in `text`.
        written = text.get(key)
        if isinstance(value, dict | list):
            read[key] = _with_texts(value, written, _blocks_at(models, key))
        else:
            named = value is not None and isinstance(written, str) and _takes_text(models, key)
            read[key] = written if named else value
    return read


def _blocks_at(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    """The blocks that may stand at a key of these."""
    fields = (model.model_fields.get(key) for model in models)
    return [block for field in fields if field for block in _models_of(field)]


def _takes_text(models: list[type[BaseModel]], key: str) -> bool:
    """Whether a key is a name or a path, and nothing else but null."""
    fields = (model.model_fields.get(key) for model in models)
    kinds = {kind for field in fields if field for kind in _kinds_of(field)}
    return bool(kinds) and kinds <= {str, Path, type(None)}


# ---- one sentence for each of pydantic's errors


def _sentence(err: Mapping[str, Any]) -> str:
    """pydantic's error as a sentence that names the key as the user writes it."""
    loc, method = [str(part) for part in err["loc"]], None
    # Within the block `method` pydantic names the method beside the key, as in method.moco.temp.
    if loc[:1] == ["method"] and len(loc) > 1:
        method = loc.pop(1)
    where = ".".join(loc)
    if err["type"] == "extra_forbidden":
        return _unknown_key(loc, method)
    if err["type"] == "union_tag_invalid":
        return _unknown_method(where, err["ctx"]["tag"])
    if err["type"] == "missing":
        return f"{where} is required"
    says = err["msg"].removeprefix("Value error, ")
    # Our own checks name the key themselves.
    if not where or says.startswith(f"{loc[0]}."):
        return says
    return f"{where}: {says} (found {_shown(err['input'])})"


def _unknown_key(loc: list[str], method: str | None) -> str:
    *blocks, key = loc
    where, known = ".".join(loc), _keys_at(blocks, method)
    if blocks == ["method"]:
        others = [name for name in RECIPES if key in _keys_at(blocks, name)]
        if others:
            return (
                f"unknown key {where} for method {method}, which is one of {' and '.join(others)}; "
                f"known here: {', '.join(known)}"
            )
    # The right key in the wrong block, or else a similar one in this block.
    near = [name for name in flatten(_tree(Config)) if name.split(".")[-1] == key]
    if not near:
        near = [".".join([*blocks, k]) for k in difflib.get_close_matches(key, known, 1, 0.5)]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {where}; {hint}"


def _unknown_method(where: str, name: str) -> str:
    near = difflib.get_close_matches(name, RECIPES, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(RECIPES)}"
    return f"{where}.name: no method is called {name!r}; {hint}"


def _keys_at(loc: Sequence[str], method: str | None) -> list[str]:
    """The keys of the block at `loc`; `method` says which of the method blocks is meant."""
    model: type[BaseModel] = Config
    for part in loc:
        # A number is the position in a list of blocks, whose model is already at hand.
        if not part.isdigit():
            found = _models_of(model.model_fields[part])
            if part == "method":
                found = [m for m in found if m.model_fields["name"].default == method]
            model = found[0]
    return list(model.model_fields)


def _models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The blocks that a field may hold: those of `Teacher | None`, of `tuple[Crops, ...]`."""
    kinds = _kinds_of(field)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _kinds_of(field: FieldInfo) -> tuple[Any, ...]:
    """The types of `Teacher | None`, of `tuple[Crops, ...]`, of `str`."""
    return getattr(field.annotation, "__args__", None) or (field.annotation,)


def _tree(model: type[BaseModel]) -> dict[str, Any]:
    """All keys of a block and of those in it, as nested dicts; None for a value."""
    tree: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        blocks = _models_of(field)
        tree[name] = {k: v for block in blocks for k, v in _tree(block).items()} or None
    return tree
