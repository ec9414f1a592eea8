"""The model card: README.md of an export, as the Hugging Face hub shows it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.evals.results import Result, is_share, newest
from fastdisco.teacher import formats

# Licences of the checkpoints that are published in a format of teacher/layouts.py, by words of its
# name, as docs/teachers.md has them; a file that somebody else trained may have another.
_LICENCES = {
    "MoCo v1 or v2": "cc-by-nc-4.0",
    "SwAV, DeepCluster-v2": "cc-by-nc-4.0",
    "full DINO": "apache-2.0",
}
UNKNOWN = "unknown"
# Packages of the environment that a reader compares first.
_VERSIONS = ("python", "torch", "timm", "onnx", "onnxruntime", "fastdisco")


class Origin(NamedTuple):
    """Where the weights come from."""

    cfg: Config | None  # of the run; None: not of a run of ours
    source: str  # of the network, in words
    teacher: str  # in words; '' without one
    licence: str  # as the hub writes it
    checkpoint: str = ""  # of the run, by its folder's name


def origin(cfg: Config, source: str, run: Path | None, licence: str | None) -> Origin:
    """Of a run's network or of a file's.  licence: the user's word, which wins.

    The teacher's file is looked into where it is still there."""
    if run is None:
        return Origin(None, source, "", licence or _licence(source))
    if cfg.teacher is None:
        return Origin(cfg, source, "", licence or UNKNOWN)
    t = cfg.teacher
    words = f"`{t.file.name}`"
    try:
        found = formats.read(t.file, t.arch, t.kwargs, student=t.student)
    except UserError:
        return Origin(cfg, source, f"{words}, which is not here any more", licence or UNKNOWN)
    words += f", {found.arch}, {found.format}"
    return Origin(cfg, source, words, licence or _licence(found.format))


def text(name: str, about: Mapping[str, Any], where: Origin, results: Sequence[Result]) -> str:
    """The card.

    about    the content of export.json
    results  evaluations of these weights"""
    arch, view = about["network"]["arch"], about["view"]
    parts = [
        _front(where.licence),
        f"# {name}: {arch}",
        _training(where),
        f"Licence: {_told(where)}",
        "## Use\n\n" + _use(about),
        f"Images: short side to {view['resize']} pixels ({view['interpolation']}), centre crop of "
        f"{view['size']}, values 0 to 1, less {_numbers(view['mean'])}, divided by "
        f"{_numbers(view['std'])}. Output: {about['network']['features']} pooled features.",
    ]
    if results:
        parts.append("## Accuracy\n\n" + _accuracy(results))
    if "int8" in about:
        parts.append("## int8\n\n" + _int8(about["int8"]))
    parts.append("## Environment\n\n" + _environment(about))
    return "\n\n".join(parts) + "\n"


def results_of(folder: Path) -> list[Result]:
    """The evaluations that a run's folder holds of its last weights; [] where there are none."""
    return newest(folder)[0] if any(folder.glob("*-????????.json")) else []


def _licence(source: str) -> str:
    return next((licence for words, licence in _LICENCES.items() if words in source), UNKNOWN)


def _front(licence: str) -> str:
    """The block that the hub reads."""
    lines = ["library_name: timm", f"license: {licence}", "pipeline_tag: image-feature-extraction"]
    tags = ["tags:", "- image-feature-extraction", "- self-supervised", "- fastdisco"]
    return "\n".join(["---", *lines, *tags, "---"])


def _training(where: Origin) -> str:
    cfg = where.cfg
    if cfg is None:
        return f"The weights are those of {where.source}."
    m, length = cfg.method.name, f"{cfg.run.epochs} epochs"
    if cfg.run.max_steps:
        length += f", at most {cfg.run.max_steps} steps"
    lines = [
        "A small network trained without labels by "
        "[DisCo's distillation](https://arxiv.org/abs/2104.09124)."
        if where.teacher
        else "A small network trained without labels.",
        "",
        "| what | value |",
        "|---|---|",
        f"| method | {m}{', distilled' if where.teacher else ''} |",
        f"| teacher | {where.teacher or 'none'} |",
        f"| network | {where.source}{', ' * bool(where.checkpoint)}{where.checkpoint} |",
        f"| data | `{'/'.join(cfg.data.train.parts[-2:])}` |",
        f"| training | {length}, batch {cfg.data.batch}, crops of {cfg.view.size} pixels |",
    ]
    return "\n".join(lines)


def _told(where: Origin) -> str:
    if where.licence == UNKNOWN:
        return (
            "unknown. The licences of the teacher and of the training data pass to these weights; "
            "find out which they are before you give them on."
        )
    passed = "the teacher's, which passes to" if where.teacher else "that of"
    return (
        f"{where.licence}, {passed} these weights, if the checkpoint is the published one. That of "
        "the training data comes on top."
    )


def _use(about: Mapping[str, Any]) -> str:
    found = []
    if "timm" in about:
        found.append(
            "```python\nimport timm\n\n"
            'net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))\n```"
        )
    if "torchvision" in about:
        arch = about["network"]["arch"]
        found.append(
            f"```python\nnet = torchvision.models.{arch}()\n"
            'net.load_state_dict(torch.load("torchvision.pth"), strict=False)'
            "  # all but the classifier\n```"
        )
    if "detectron2" in about:
        found.append(
            "detectron2: `MODEL.WEIGHTS detectron2.pth`, with `MODEL.RESNETS.STRIDE_IN_1X1 False` and "
            "`INPUT.FORMAT RGB`."
        )
    if "onnx" in about:
        found.append(
            "```python\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            'features = session.run(None, {"image": images})[0]  # [B,3,S,S] float32 -> [B,F]\n```'
        )
    return "\n\n".join(found)


def _accuracy(results: Sequence[Result]) -> str:
    lines = ["| value | % | 95 % interval | protocol |", "|---|---:|---|---|"]
    for r in results:
        for key, value in r.values.items():
            if is_share(key) and math.isfinite(value):
                ends = r.intervals.get(key)
                around = f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}" if ends else ""
                lines.append(f"| {r.named(key)} | {100 * value:.2f} | {around} | `{r.hash}` |")
    return "\n".join(lines)


def _int8(found: Mapping[str, Any]) -> str:
    lines = ["| value | float32 file, % | int8 file, % |", "|---|---:|---:|"]
    for key, value in found["fp32"].items():
        got = found["values"].get(key)
        shown = "collapsed" if got is None else f"{100 * got:.2f}"
        lines.append(f"| {key} | {100 * value:.2f} | {shown} |")
    kept = ", ".join(f"`{name}`" for name in found["floats"]) or "none"
    verdict = (
        "" if found["passed"] else f" It was rejected: more than {found['max_drop']:g} points."
    )
    from_ = found["calibration"]
    return "\n".join(lines) + (
        f"\n\nBoth are measured on the files themselves; {found['drop']:.2f} points lost.{verdict} "
        f"Ranges are of {from_['images']} images. Layers in float: {kept}."
    )


def _environment(about: Mapping[str, Any]) -> str:
    env = about["environment"]
    versions = [f"{k} {env['versions'][k]}" for k in _VERSIONS if k in env["versions"]]
    commit = f"; commit {env['commit']}" if env["commit"] else ""
    return f"{', '.join(versions)}{commit}; exported on {env['cpu']}."


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{x:g}" for x in values) + ")"
