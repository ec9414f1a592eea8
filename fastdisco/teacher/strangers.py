"""Layouts that are known and not read: what such a file is, and what to do with it.

Most are of libraries whose heads take many forms (with other activations, with batch norm or without)
that names and shapes do not tell apart."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastdisco.teacher.layouts import has, unwrapped

_RENAME = (
    "which is not read, since names and shapes do not tell what lies between the head's layers; if "
    "you know it, rename the weights as docs/teachers.md shows (Other layouts)"
)
_OTHER_NETWORK = (
    "which is another network than timm's (other padding and constants) and cannot be read; take "
    "another teacher, or one of SEED's ResNets"
)


class Stranger(NamedTuple):
    """A kind of checkpoint that is not read."""

    name: str
    # From the file's contents, and from its weights without wrappers.
    detect: Callable[[dict, Mapping[str, Any]], bool]
    # Follows "is <name>, ".
    remedy: str = _RENAME


def told(found: dict) -> str | None:
    """'is <what>, <what to do>' for a file that is known and not read; None for any other."""
    state = unwrapped(found)
    row = next((s for s in _STRANGERS if s.detect(found, state)), None)
    return f"is {row.name}, {row.remedy}" if row else None


def _names(*prefixes: str) -> Callable[[dict, Mapping[str, Any]], bool]:
    # encoder_q.* is MoCo's, whatever else is there.
    return lambda _, state: has(state, *prefixes) and not has(state, "encoder_q.")


_STRANGERS = (
    Stranger(
        "a VISSL checkpoint (trunk and heads in classy_state_dict)",
        lambda found, _: "classy_state_dict" in found,
    ),
    Stranger(
        "a SEED checkpoint whose student is SEED's own EfficientNet",
        _names("student._conv_stem."),
        _OTHER_NETWORK,
    ),
    Stranger(
        "a SEED checkpoint whose student is SEED's own MobileNetV3",
        _names("student.features.", "student.classifier."),
        _OTHER_NETWORK,
    ),
    Stranger("a checkpoint of MMSelfSup 1 or MMPretrain (neck.*)", _names("backbone.", "neck.")),
    Stranger(
        "a checkpoint of lightly (backbone.* and projection_head.*)",
        _names("backbone.", "projection_head."),
    ),
    Stranger(
        "a checkpoint of solo-learn, Barlow Twins or VICReg (backbone.* and projector.*)",
        _names("backbone.", "projector."),
    ),
    Stranger(
        "a checkpoint of an early solo-learn (encoder.* and projector.*)",
        _names("encoder.", "projector."),
    ),
    Stranger("a SimSiam checkpoint (encoder.* and predictor.*)", _names("encoder.", "predictor.")),
)
