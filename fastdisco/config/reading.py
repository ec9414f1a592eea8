"""YAML files and `block.key=value` overrides in, one validated Config out; every mistake told in
one sentence."""

import difflib
import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from fastdisco.common.errors import UserError
from fastdisco.config.blocks import Config
from fastdisco.config.merge import flatten, overlay
from fastdisco.config.recipes import RECIPES


def load(path: Path | str, overrides: list[str] = ()) -> Config:
    """Config of a YAML file with `block.key=value` overrides laid over it; value is YAML (`1e-3` is
    a number, `null` is none).

    A key `base` names a file, relative to this one, that the file itself is laid over; one level,
    so that two files tell all. Raises UserError naming the file or override, the key, what is wrong
    and, for an unknown key, the nearest right one."""
    path = Path(path)
    raw = _read(path)
    if "base" in raw:
        if not isinstance(base := raw.pop("base"), str):
            raise UserError(
                f"{path}: base: the name of a YAML file beside it is expected (found {base!r})"
            )
        below = _read(path.parent / base, f"correct `base` in {path}")
        if "base" in below:
            raise UserError(
                f"{path.parent / base}: is the base of {path} and names one itself; write what it "
                "needs into one of the two"
            )
        raw = overlay(below, raw)
    for item in overrides:
        _override(raw, item)
    return validate(raw, path)


def validate(raw: dict, source: Path | str) -> Config:
    """Config of nested dicts; `source` is named in the error."""
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        # The method would have brought them.
        errors = [err for err in e.errors() if (err["loc"], err["type"]) != (("views",), "missing")]
        raise UserError(f"{source}: " + "; ".join(map(_sentence, errors))) from None


def dump(cfg: Config) -> str:
    """The whole resolved configuration as YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def _read(path: Path, remedy: str = "give --config an existing YAML file") -> dict:
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader) or {}
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {remedy}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no blocks; start from one of the files in configs/")
    return raw


def _override(raw: dict, item: str):
    key, eq, value = item.partition("=")
    if not eq or not key:
        raise UserError(f"override '{item}': expected block.key=value, for example optim.lr=0.06")
    *blocks, last = key.split(".")
    node = raw
    for b in blocks:
        if not isinstance(node.get(b), dict):  # absent, or null as in `teacher: null`
            node[b] = {}
        node = node[b]
    try:
        node[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override '{item}': the value is not valid YAML") from None


def _sentence(err: dict) -> str:
    loc, name = [str(p) for p in err["loc"]], ""
    if loc[:1] == ["method"] and len(loc) > 1:  # pydantic puts the method's name into the way
        name = f" for method {loc.pop(1)}"
    where = ".".join(loc)
    if err["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1], name.split()[-1:])
        if (
            loc[0] == "method"
            and (others := [m for m in RECIPES if loc[-1] in _keys_at(["method"], [m])])
            and len(loc) == 2
        ):
            return f"unknown key {where}{name}, which is one of {' and '.join(others)}; known here: {', '.join(known)}"
        # The right key in the wrong block.
        near = [k for k in flatten(_tree(Config)) if k.split(".")[-1] == loc[-1]]
        near = near or [
            ".".join(loc[:-1] + [k]) for k in difflib.get_close_matches(loc[-1], known, 1, 0.5)
        ]
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if err["type"] == "union_tag_invalid":
        near = difflib.get_close_matches(err["ctx"]["tag"], RECIPES, 1, 0.5)
        return f"{where}.name: no method is called {err['ctx']['tag']!r}; " + (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(RECIPES)}"
        )
    msg = err["msg"].removeprefix("Value error, ")
    if err["type"] == "missing":
        return f"{where} is required"
    return (
        f"{where}: {msg} (found {err['input']!r})"
        if where and not msg.startswith(f"{loc[0]}.")
        else msg
    )


def _models_of(field) -> list[type[BaseModel]]:
    kinds = getattr(field.annotation, "__args__", None) or (field.annotation,)
    return [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]


def _keys_at(loc: list[str], method: list[str] = ()) -> list[str]:
    model = Config
    for part in loc:
        if not part.isdigit():  # an item of a list
            model = next(
                m
                for m in _models_of(model.model_fields[part])
                if part != "method" or [m.model_fields["name"].default] == list(method)
            )
    return list(model.model_fields)


def _tree(model: type[BaseModel]) -> dict:
    return {
        k: {n: t for m in found for n, t in _tree(m).items()} if (found := _models_of(f)) else None
        for k, f in model.model_fields.items()
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
