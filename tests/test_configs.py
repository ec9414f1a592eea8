"""The paper's rows: each file in configs/ builds, is documented, is unlike the others, and is in
docs/results.md with its number."""

import re

import layouts
import pytest
import torch
import yaml
from conftest import ROOT
from timm.layers import DropPath
from torch import nn

from fastdisco import config, models
from fastdisco.commands import train
from fastdisco.teacher import formats

FILES = sorted(
    p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in ("base", "demo")
)
TWIN = ROOT / "configs/mobv3_moco.yaml"  # reproduces no row
NAMES = {
    "EfficientNet-B0": "efficientnet_b0",
    "EfficientNet-B1": "efficientnet_b1",
    "MobileNetV3-Large": "mobilenetv3_large_100",
    "ResNet-18": "resnet18",
    "ResNet-34": "resnet34",
    "ViT-tiny": "vit_tiny_patch16_224",
    "XCiT-tiny": "xcit_tiny_12_p16_224",
}
TEACHERS = {
    "ResNet-50 (MoCo-v2)": "resnet50",
    "ResNet-101 (MoCo-v2)": "resnet101",
    "ResNet-152 (MoCo-v2)": "resnet152",
    "ResNet-50w2 (SwAV)": "resnet50w2",
    "ResNet-50 (SeLa-v2)": "resnet50",
    "ResNet-50 (SwAV)": "resnet50",
    "ViT-small (DINO)": "vit_small_patch16_224",
    "XCiT-small (DINO)": "xcit_small_12_p16_224",
}
# SEED's own EfficientNets, by its code.
PUBLISHED = {
    "drop_rate": 0.2,
    "drop_path_rate": 0.2,
    "bn_eps": 1e-3,
    "bn_momentum": 0.01,
    "pad_type": "same",
}
IMAGES = 1_281_167  # ImageNet-1k, training
each = lambda files: pytest.mark.parametrize(
    "path", files, ids=lambda p: str(p.relative_to(ROOT / "configs"))
)


def header(path):
    """Title, table, number, status, teacher's file of the comment that a row's file starts with."""
    text = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    found = re.match(
        r"# (?P<title>.+)\.\n"
        r"# Row: (?P<table>(?:main|appendix) Table \d(?: and appendix Table \d)?), "
        r"(?:linear top-1 on ImageNet (?P<number>\d\d\.\d)|no number printed) "
        r"\((?P<status>confirmed|unverified|doubtful)\)\.(?:.*\n)+?"
        r"# Teacher: (?P<teacher>none|[\w.]+)(?: \(.+\), see docs/teachers.md)?\.\n"
        r"# Cost: (?P<epochs>\d+) epochs x (?P<steps>[\d,]+) steps of (?P<batch>\d+) images\.\n"
        r"# Command: (?P<command>.+)\n",
        text,
    )
    assert found, f"{path}: its header is not of the form\n{header.__doc__}\n{text}"
    return found.groupdict()


@each([p for p in FILES if p != TWIN])
def test_the_header_is_true(path):
    raw, head = yaml.safe_load(path.read_text()), header(path)
    base = yaml.safe_load((path.parent / raw["base"]).read_text()) if "base" in raw else {}
    own = path.relative_to(ROOT / "configs").with_suffix("").parts
    assert raw["run"]["name"] == "_".join(own)
    student, _, teacher = (
        head["title"].split(": ")[-1].removeprefix("MoCo-v2 alone: ").partition(" from ")
    )
    assert raw["student"]["arch"] == NAMES[student]
    # The published code's are torchvision's.
    theirs = PUBLISHED if path.stem.endswith("_published") else None
    kwargs = config.load(path).student.kwargs if "kwargs" in raw["student"] else None
    assert kwargs == ({"zero_init_last": False} if "ResNet" in student else theirs)
    assert (raw["teacher"] or {}).get("arch") == TEACHERS.get(teacher) and (teacher != "") == (
        raw["teacher"] is not None
    )
    assert head["teacher"] == (
        "none" if raw["teacher"] is None else raw["teacher"]["file"].removeprefix("/data/teachers/")
    )
    assert head["command"] == f"deepspeed fastdisco/train.py --config {path.relative_to(ROOT)}"
    # What makes a row is in its own file.
    assert not set(base) & {"run", "student", "teacher", "method", "optim", "view", "views"}


@each(FILES)
def test_the_cost_is_that_of_imagenet(path):
    cfg = config.load(path)
    cost = f"# Cost: {cfg.run.epochs} epochs x {IMAGES // cfg.data.batch:,} steps of {cfg.data.batch} images.\n"
    assert cost in path.read_text()


def test_no_two_resolve_alike():
    seen = {}
    for path in FILES:
        flat = config.flatten(config.load(path).model_dump(mode="json"))
        key = repr(sorted((k, v) for k, v in flat.items() if k != "run.name"))
        assert key not in seen, f"{path} and {seen[key]}"
        seen[key] = path


def test_the_rows_of_a_method_share_all_but_student_teacher_and_head():
    """Within a folder only these differ; and the file that the README runs is a row of disco/ like
    the others."""
    groups = {}
    for path in FILES:
        if path != TWIN:
            groups.setdefault(
                path.parent.name if path.parent.name != "configs" else "disco", []
            ).append(path)
    for name, paths in groups.items():
        flats = [config.flatten(config.load(p).model_dump(mode="json")) for p in paths]
        differ = {k for f in flats for k in f if f[k] != flats[0].get(k)}
        # Rows with and without one: then all of its keys.
        if any(f.get("teacher", ...) is None for f in flats):
            differ = {k for k in differ if not k.startswith("teacher.")}
        # Its rows with DisCo and without.
        differ -= {"rkd": {"method.distill"}, "swav": {"method.target"}}.get(name, set())
        differ = {k for k in differ if not k.startswith("student.kwargs")}
        assert differ <= {
            "run.name",
            "student.arch",
            "student.hidden",
            "teacher",
            "teacher.file",
            "teacher.arch",
            "teacher.kwargs",
        }, (name, differ)
        assert name == "moco" or name == "seed" or "student.hidden" not in differ


@each(FILES)
def test_a_dry_run_works_without_data_and_teacher(path, capsys, tmp_path):
    assert train.main(["--config", str(path), "--dry-run", f"run.out={tmp_path}"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    cfg = config.load(path)
    crops = {
        "moco": "2 x 224 px",
        "seed": "1 x 224 px",
        "swav": "2 x 224, 6 x 96 px",
        "dino": "2 x 224, 8 x 96 px",
    }[cfg.method.name]
    assert f"crops of {crops}" in out and f"student     {cfg.student.arch}" in out and "GiB" in out
    missing = out[out.index("missing ") :]
    assert (
        ("teacher.file" in missing) == (cfg.teacher is not None)
        and "data.train /data/imagenet/train" in missing
        and "data.val" in missing
    )
    assert not list(tmp_path.iterdir())


def test_seeds_own_student_is_that_of_its_code():
    path = ROOT / "configs/seed/effb0_r50_published.yaml"
    with torch.device("meta"):
        net = models.of(config.load(path)).backbone
    # Of all blocks but the first; timm uses it, as SEED's code does, where there is a shortcut.
    paths = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    assert paths == pytest.approx([0.2 * i / 16 for i in range(1, 16)])
    assert net.drop_rate == 0.2
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49 and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5 and {type(m).__name__ for m in strided} == {"Conv2dSame"}


@each([p for p in FILES if p.parent.name in ("dino", "swav")])
def test_dino_trains_in_bf16_and_disco_on_swav_has_the_published_target(path):
    cfg = config.load(path)
    if path.parent.name == "dino":
        assert cfg.engine.precision == "bf16" and cfg.bn.sync
    else:
        assert cfg.method.target == ("published" if cfg.teacher else "normalised")


def published(name):
    """What the teacher's file holds, by its published names and shapes, on the meta device."""
    with torch.device("meta"):
        if name.startswith(("swav", "selav2")):
            return layouts.swav(2, 8192) if "RN50w2" in name else layouts.swav(1, 2048)
        if name.startswith("dino"):
            return (
                layouts.dino(layouts.xcit_small(), layouts.dino_head({}, 384), "module.")
                if "xcit" in name
                else layouts.dino(layouts.vit_small(), layouts.dino_head({}, 384))
            )
        state = layouts.resnet50(
            1,
            (3, 8, 36, 3) if "r152" in name else (3, 4, 23, 3) if "r101" in name else (3, 4, 6, 3),
        )
        layouts.linear(state, "fc.0", 2048, 2048)
        layouts.linear(state, "fc.2", 128, 2048)
        return {"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}}


def test_the_teachers_fit_by_their_published_layouts(monkeypatch):
    monkeypatch.setattr(models, "read", lambda file: published(file.name))
    wanted = {
        (cfg.teacher.file, cfg.teacher.arch, cfg.student.dim)
        for cfg in map(config.load, FILES)
        if cfg.teacher
    }
    # Each file is one architecture and one width wherever it is used.
    assert len(wanted) == len({file for file, *_ in wanted}) >= 6
    for file, arch, dim in wanted:
        with torch.device("meta"):
            assert formats.read(file, arch, {}, dim).arch == formats.read(file).arch == arch


def test_the_page_of_results_has_every_row_with_the_number_of_its_file():
    text = (ROOT / "docs/results.md").read_text()
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (\w+) \| (.*?)\| `(configs/.+?)` \|$", text, re.M
    )
    page = {
        config: (table, student, teacher, number, status)
        for table, student, teacher, number, status, _, config in rows
    }
    assert len(page) == len(rows) == text.count("`configs/") - 1  # one is in the text
    files = {}
    for path in FILES:
        if path != TWIN:
            head = header(path)
            student, _, teacher = head["title"].split(": ")[-1].partition(" from ")
            files[str(path.relative_to(ROOT))] = (
                head["table"],
                student,
                teacher or "none",
                head["number"] or "-",
                head["status"],
            )
    assert page == files


def test_the_lists_of_rows_are_whole():
    """The paper's tables, row by row: which cells have a file."""
    cells = {
        (
            header(p)["title"].split(":")[0],
            *header(p)["title"].split(": ")[-1].partition(" from ")[::2],
        )
        for p in FILES
        if p != TWIN
    }
    cnn = ["EfficientNet-B0", "EfficientNet-B1", "MobileNetV3-Large", "ResNet-18", "ResNet-34"]
    want = {("MoCo-v2 alone", s, "") for s in cnn}
    want |= {("DisCo", s, t) for s in cnn for t in list(TEACHERS)[:4]}
    want |= {("DisCo", s, t) for s in cnn[:4] for t in ("ResNet-50 (SeLa-v2)", "ResNet-50 (SwAV)")}
    want |= {("SEED", s, t) for s in cnn for t in list(TEACHERS)[:3]}
    want |= {(how, s, "ResNet-50 (MoCo-v2)") for s in cnn[:4] for how in ("RKD", "RKD with DisCo")}
    for s in ("EfficientNet-B0", "MobileNetV3-Large"):
        want |= {("SwAV alone", s, ""), ("SwAV with DisCo", s, "ResNet-50 (SwAV)")}
    for s, t in (("ViT-tiny", "ViT-small (DINO)"), ("XCiT-tiny", "XCiT-small (DINO)")):
        want |= {("DINO alone", s, ""), ("DINO with DisCo", s, t)}
    assert cells == want
