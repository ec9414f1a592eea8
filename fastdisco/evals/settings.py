"""What an evaluation can be told beside the configuration of a run, as `block.key=value`.  Imports
no torch, so that a mistyped key is answered at once."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fastdisco.common.errors import UserError
from fastdisco.config.block import Block
from fastdisco.config.merge import overlay
from fastdisco.evals import protocols
from fastdisco.evals.protocols import Protocol

# Neighbours that vote, and temperatures of their votes.
KS, TEMPS = (1, 5, 10, 20, 100, 200), (0.07,)
# Answers among which retrieval looks.
RECALLS = (1, 5, 10)
# Penalties of ridge regression, as multiples of the mean eigenvalue of the features' scatter matrix.
STRENGTHS = tuple(10 ** (-6 + 7 * i / 19) for i in range(20))
# Inverse penalties of logistic regression, weak to strong fit: each starts from the one before it.
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Of L-BFGS for each, as many as scikit-learn's.
ITERATIONS = 100


def _listed(value: Any) -> Any:
    """One value stands for a list of it."""
    return (value,) if isinstance(value, int | float | str | Path) else value


# Lists of numbers that make sense: an empty one, or a number out of its range, would end in an error
# of Python's or in a value that says nothing.
_Several = Field(min_length=1)
_Listed = BeforeValidator(_listed)
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], _Several, _Listed]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
From0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[tuple[Above0, ...], _Several, _Listed]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], _Several, _Listed]
Kind = Literal["ridge", "logistic", "sgd"]


class Knn(Block):
    k: Counts | None = None  # null: 1, 5, 10, 20, 100, 200, as the bank allows, and eval.k
    temp: Positive | None = None  # null: eval.temp


class Trained(Block):
    """A linear evaluation.  Keys of its protocol (lr, epochs, batch, size ...) are laid over those
    of the preset."""

    called: ClassVar[str] = "linear"
    preset: str = "disco"
    # A grid beside the preset's own.
    lrs: Annotated[tuple[Above0, ...], _Listed] = ()
    weight_decays: Annotated[tuple[From0, ...], _Listed] = ()
    # Share of the training images on which one of several is chosen; 0: none, no choice.
    held: float = Field(0.01, ge=0, lt=1)
    # Of weights, order, crops and images held out.  Not run.seed: runs that differ in their seed
    # are compared by the same evaluation.
    seed: int = Field(0, ge=0, lt=2**32)
    protocol: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _of_the_protocol(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        theirs = {k: v for k, v in raw.items() if k in Protocol.model_fields}
        rest = {k: v for k, v in raw.items() if k not in theirs}
        return rest | {"protocol": rest.get("protocol", {}) | theirs}


class Semi(Trained):
    called: ClassVar[str] = "semi"
    preset: str = "semi"
    lists: Annotated[tuple[Path, ...], _Listed] = ()  # SimCLR's 1percent.txt and 10percent.txt
    shares: Shares = (0.01, 0.1)  # drawn by seed and class where there are no lists
    tries: int = Field(1, ge=1)  # draws of each share
    # Train the whole network by SwAV's settings instead: presets finetune-1 and finetune-10.
    finetune: bool = False

    @model_validator(mode="after")
    def _one_choice(self) -> "Semi":
        if self.lists and self.tries > 1:
            raise ValueError("lists are not drawn, so there is one try; leave tries or lists out")
        return self

    def tuning(self, share: float) -> str:
        """The preset of fine-tuning on this share of the labels."""
        if self.preset == type(self).model_fields["preset"].default:
            # Each published setting is for its share.
            return "finetune-1" if share <= 0.05 else "finetune-10"
        if protocols.preset(self.preset).trunk_lr is None:
            raise UserError(
                f"semi.preset: {self.preset} is no fine-tuning; give finetune-1 or finetune-10"
            )
        return self.preset


class Transfer(Trained):
    called: ClassVar[str] = "transfer"
    preset: str = "cifar"
    # Another data set: as data.train takes it, or CIFAR's python archive, which has both parts.
    train: Path | None = None
    val: Path | None = None


class Probe(Block):
    held: float = Field(0.01, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)
    strengths: Annotated[tuple[From0, ...], _Several, _Listed] = STRENGTHS  # of ridge regression
    cs: Positive = CS
    iterations: int = Field(ITERATIONS, ge=1)  # of L-BFGS, for each C
    kinds: Annotated[tuple[Kind, ...], _Several, _Listed] = ("ridge", "logistic", "sgd")
    # Of SGD on the standardised features.
    lrs: Positive = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    epochs: int = Field(30, ge=1)
    batch: int = Field(256, ge=1)


class Retrieve(Block):
    k: Counts = RECALLS


class Tsne(Block):
    # Names, or positions in the list of classes; none: the paper's, at the positions 5 to 14.
    classes: Annotated[tuple[int | str, ...], _Listed] = ()
    drawn: int | None = Field(None, ge=2)  # classes drawn by the seed instead
    images: int = Field(50, ge=1)  # of each class, the first ones
    seed: int = Field(0, ge=0, lt=2**32)
    method: Literal["tsne", "opentsne", "umap"] = "tsne"
    perplexity: float | None = Field(None, ge=1)  # null: 30, less for few images
    neighbours: int = Field(15, ge=2)  # of UMAP
    k: int = Field(10, ge=1)  # neighbours by which a map is judged
    titles: Annotated[tuple[str, ...], _Listed] = ()  # in place of the networks' names

    @model_validator(mode="after")
    def _one_choice(self) -> "Tsne":
        if self.classes and self.drawn:
            raise ValueError("classes and drawn are two ways to choose; give one of them")
        return self


class Embed(Block):
    data: Path | None = None  # a data set, with or without classes; null: data.val
    out: Path | None = None  # null: embed-HASH/ beside the results
    format: Literal["npy", "parquet"] = "npy"


class Health(Block):
    teacher: Path | None = None  # null: that of the run
    alone: Path | None = None  # a run of the same student without distillation
    k: int = Field(20, ge=1)


class Settings(Block):
    knn: Knn = Knn()
    linear: Trained = Trained()
    semi: Semi = Semi()
    transfer: Transfer = Transfer()
    probe: Probe = Probe()
    retrieve: Retrieve = Retrieve()
    tsne: Tsne = Tsne()
    embed: Embed = Embed()
    health: Health = Health()


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those of a run's configuration, those of `Settings`)"""
    ours = [o for o in overrides if o.partition(".")[0] in Settings.model_fields]
    return [o for o in overrides if o not in ours], ours


def load(overrides: Sequence[str]) -> Settings:
    """Raises UserError naming the override, what is wrong and, for an unknown key, the nearest."""
    raw: dict[str, Any] = {}
    for item in overrides:
        raw = overlay(raw, nested(item))
    try:
        return Settings.model_validate(raw)
    except ValidationError as e:
        raise UserError("; ".join(_sentence(err) for err in e.errors())) from None


def nested(item: str) -> dict[str, Any]:
    """'a.b=1' -> {'a': {'b': 1}}"""
    key, eq, value = item.partition("=")
    found: Any = None
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        eq = ""
    if not eq or "." not in key:
        raise UserError(f"override '{item}': expected block.key=value, for example knn.k=[20, 200]")
    for part in reversed(key.split(".")):
        found = {part: found}
    return found


def check(given: Settings, size: int, resize: int) -> None:
    """Raises UserError where the protocol of a linear evaluation or a fine-tuning cannot be: `all` would
    come to it last."""
    for block in (given.linear, given.transfer):
        protocol(block, size, resize)
    for share in (0.01, 0.1):
        protocol(
            given.semi, size, resize, given.semi.tuning(share) if given.semi.finetune else None
        )


def protocol(block: Trained, size: int, resize: int, name: str | None = None) -> Protocol:
    """The preset with the block's own keys laid over it.

    name          of a preset in place of the block's
    size, resize  of the data's evaluation: where they are not ImageNet's 224 and 256, crops are
    of that size unless the block says one"""
    try:
        preset = protocols.preset(name or block.preset)
    except UserError as e:
        raise UserError(f"{block.called}.{e}") from None
    given = dict(block.protocol)
    if (size, resize) != (224, 256):
        given = {"size": size, "resize": resize} | given
    try:
        return Protocol.model_validate(preset.model_dump() | given)
    except ValidationError as e:
        # What two keys together do not allow begins with one of them.
        said = (f"{block.called}.{_sentence(err)}" for err in e.errors())
        raise UserError("; ".join(said)) from None


def _sentence(err: Any) -> str:
    loc = [str(p) for p in err["loc"]]
    where = ".".join(loc)
    if err["type"] == "extra_forbidden":
        block = Settings.model_fields[loc[0]].annotation if len(loc) > 1 else Settings
        known = list(getattr(block, "model_fields", {}))
        if isinstance(block, type) and issubclass(block, Trained):
            known += Protocol.model_fields
        near = difflib.get_close_matches(loc[-1], known, 1, 0.5)
        return f"unknown key {where}; " + (
            f"did you mean {'.'.join([*loc[:-1], near[0]])}?"
            if near
            else f"known: {', '.join(known)}"
        )
    said = err["msg"].removeprefix("Value error, ")
    # A user writes lists.
    said = said.replace("Tuple", "List").replace("tuple", "list")
    return f"{where}: {said} (found {err['input']!r})" if where else said
