"""How published trainings lay out their checkpoints: under which names the backbone lies, under which
the head, and what is neither.

A new format is a row of FORMATS, at the end."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdisco.teacher.head_kinds import (
    DINO,
    DINO_BN,
    LINEAR,
    MLP,
    MLP_BN,
    MOCO_V3,
    MOCO_V3_VIT,
    Head,
)


class Parts(NamedTuple):
    """A file's contents, sorted."""

    # backbone.* and head.*; what is neither keeps a name that fits no network.
    weights: dict[str, Tensor]
    # Why -> names in the file that are no part of the network.
    ignored: dict[str, list[str]]


class Rule(NamedTuple):
    """What names with this prefix are."""

    prefix: str
    # What takes the prefix's place; None: no part of the network.
    to: str | None
    # Why it is none.
    why: str = ""


class Format(NamedTuple):
    """A kind of checkpoint."""

    name: str
    # Whether what the file holds is of this format.
    detect: Callable[[dict], bool]
    split: Callable[[dict], Parts]
    # Those that it can have, and under which keys.
    heads: tuple[Head, ...]
    head_keys: str
    # Architecture -> arguments of timm's, where its training had others and no shape tells.
    kwargs: Mapping[str, Mapping[str, Any]] = {}


# Keys under which trainings save the weights, and parts of names that wrappers add to the network's:
# DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_KEYS = ("state_dict", "model", "model_state_dict")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(found: dict) -> dict[str, Any]:
    """The weights of a dict that holds them under a key, as trainings save them, or that is them;
    without wrappers' names, of which there may be any number in any place."""
    while nested := [found[key] for key in _KEYS if isinstance(found.get(key), dict)]:
        found = nested[0]
    state = {}
    for key, x in found.items():
        name = ".".join(part for part in str(key).split(".") if part not in _WRAPPERS)
        state[_unused(name, str(key), state)] = x
    return state


def has(state: Mapping[str, Any], *prefixes: str) -> bool:
    """Whether there are names with each of the prefixes."""
    return all(any(k.startswith(p) for k in state) for p in prefixes)


def _unused(name: str, key: str, taken: Mapping[str, Any]) -> str:
    # A name that fits no network, so that loading refuses it.
    return f"{key} (twice)" if name in taken else name


def _sort(state: Mapping[str, Any], rules: tuple[Rule, ...], whose: str = "") -> Parts:
    """The first rule whose prefix a name has tells what it is; whose: says what all others are not
    part of."""
    weights, ignored = {}, {}
    for key, x in state.items():
        rule = next((r for r in rules if key.startswith(r.prefix)), None)
        if rule is None:
            # No network has such a name, either.
            weights[f"{key} (not of {whose})"] = x
        elif rule.to is None:
            ignored.setdefault(rule.why, []).append(key)
        else:
            weights[_unused(rule.to + key.removeprefix(rule.prefix), key, weights)] = x
    return Parts(weights, ignored)


_QUEUE = Rule("queue", None, "negatives of its training")

# The head lies where ResNets, and others, keep the classifier.
_MOCO = (
    _QUEUE,
    Rule("encoder_k.", None, "momentum encoder"),
    Rule("teacher_encoder_q.", None, "teacher of its training by DisCo"),
    Rule("teacher_encoder_k.", None, "teacher of its training by DisCo"),
    Rule("encoder_q.fc.", "head."),
    Rule("encoder_q.classifier.", "head."),
    Rule("encoder_q.", "backbone."),
)


def _is_moco(found: dict) -> bool:
    return has(unwrapped(found), "encoder_q.")


def _from_moco(found: dict) -> Parts:
    return _sort(unwrapped(found), _MOCO, "encoder_q")


_MMSELFSUP = (
    _QUEUE,
    Rule("encoder_k.", None, "momentum encoder"),
    Rule("encoder_q.0.", "backbone."),
    Rule("encoder_q.1.mlp.", "head."),
    Rule("encoder_q.1.fc.", "head."),
)


def _is_mmselfsup(found: dict) -> bool:
    return has(unwrapped(found), "encoder_q.0.", "encoder_q.1.")


def _from_mmselfsup(found: dict) -> Parts:
    state = unwrapped(found)
    # Its class has the backbone under a second name.
    again = [k for k, x in state.items() if k.startswith("backbone.") and _same(x, state, k)]
    parts = _sort(
        {k: x for k, x in state.items() if k not in set(again)},
        _MMSELFSUP,
        "encoder_q.0 or encoder_q.1",
    )
    if again:
        parts.ignored["encoder_q.0 once more"] = again
    return parts


def _same(x: Any, state: Mapping[str, Any], key: str) -> bool:
    other = state.get(key.replace("backbone.", "encoder_q.0.", 1))
    both = isinstance(x, Tensor) and isinstance(other, Tensor)
    return both and x.shape == other.shape and torch.equal(x, other)


_MOCO_V3 = (
    Rule("momentum_encoder.", None, "momentum encoder"),
    Rule("predictor.", None, "predictor"),
    Rule("base_encoder.fc.", "head."),
    Rule("base_encoder.head.", "head."),
    Rule("base_encoder.", "backbone."),
)


def _is_moco_v3(found: dict) -> bool:
    return has(unwrapped(found), "base_encoder.")


def _from_moco_v3(found: dict) -> Parts:
    return _sort(unwrapped(found), _MOCO_V3, "base_encoder")


_SEED = (
    _QUEUE,
    Rule("teacher.", None, "teacher of its training by SEED"),
    Rule("student.fc.", "head."),
    Rule("student.", "backbone."),
)


def _is_seed(found: dict) -> bool:
    state = unwrapped(found)
    return has(state, "student.") and not has(state, "student.backbone.")


def _from_seed(found: dict) -> Parts:
    return _sort(unwrapped(found), _SEED, "student")


_SWAV = (
    Rule("prototypes", None, "prototypes"),
    Rule("projection_head.", "head."),
    # EfficientNets by DisCo's code for SwAV have theirs beside the head.
    Rule("classifier.", None, "classifier that its training leaves alone"),
    Rule("", "backbone."),
)


def _is_swav(found: dict) -> bool:
    state = unwrapped(found)
    return has(state, "projection_head.") and not has(state, "backbone.")


def _from_swav(found: dict) -> Parts:
    return _sort(unwrapped(found), _SWAV)


_DINO = (
    Rule("head.last_layer.", None, "prototypes of the last layer"),
    Rule("head.mlp.", "head."),
    Rule("backbone.", "backbone."),
)


def _is_dino(found: dict) -> bool:
    if isinstance(found.get("teacher"), dict):
        return has(unwrapped(found["teacher"]), "backbone.")
    # The teacher alone, as of a pickled network.
    return has(unwrapped(found), "backbone.", "head.mlp.")


def _from_dino(found: dict) -> Parts:
    teacher = found.get("teacher")
    weights, ignored = _sort(
        unwrapped(teacher if isinstance(teacher, dict) else found), _DINO, "backbone or head"
    )
    if isinstance(found.get("student"), dict):
        ignored["student of its training"] = [f"student.{k}" for k in found["student"]]
    return Parts(from_xcit(weights), ignored)


def from_xcit(weights: dict[str, Any]) -> dict[str, Any]:
    """timm's names for XCiT: that of the position embedding, and three layers for query, key and
    value of class attention in place of one."""
    out = {}
    for key, x in weights.items():
        key = key.replace(".pos_embeder.", ".pos_embed.")
        joint = re.fullmatch(r"(backbone\.cls_attn_blocks\.\d+\.attn\.)qkv(\.\w+)", key)
        if joint and isinstance(x, Tensor) and x.ndim and len(x) % 3 == 0:
            before, after = joint.groups()
            out |= {f"{before}{name}{after}": part for name, part in zip("qkv", x.chunk(3))}
        else:
            out[key] = x
    return out


FORMATS = (
    Format(
        "an MMSelfSup or OpenSelfSup MoCo checkpoint (encoder_q.0.* and encoder_q.1.*)",
        _is_mmselfsup,
        _from_mmselfsup,
        (MLP, LINEAR),
        "encoder_q.1.mlp.*",
    ),
    Format(
        "a MoCo v1 or v2 or official DisCo checkpoint (encoder_q.*)",
        _is_moco,
        _from_moco,
        (MLP, LINEAR),
        "fc.* or classifier.*",
    ),
    Format(
        "a MoCo v3 checkpoint (base_encoder.*)",
        _is_moco_v3,
        _from_moco_v3,
        (MOCO_V3, MOCO_V3_VIT),
        "base_encoder.fc.* or base_encoder.head.*",
        # timm's ViT-S has 6 heads of attention.
        {"vit_small_patch16_224": {"num_heads": 12}},
    ),
    Format(
        "a SEED checkpoint (student.*)",
        _is_seed,
        _from_seed,
        (MLP, LINEAR),
        "student.fc.*",
    ),
    Format(
        "a SwAV, DeepCluster-v2 or SeLa-v2 checkpoint (projection_head.*)",
        _is_swav,
        _from_swav,
        (MLP_BN, MLP, LINEAR),
        "projection_head.*",
    ),
    Format(
        "a full DINO checkpoint (backbone.* and head.mlp.* in teacher)",
        _is_dino,
        _from_dino,
        (DINO, DINO_BN, LINEAR),
        "head.mlp.*",
    ),
)
