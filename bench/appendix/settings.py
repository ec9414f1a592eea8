"""The appendix's networks, testbeds and lengths in miniature.

A change here changes the hash of the arms that it concerns: they are trained anew, all others stay."""

from typing import Any, NamedTuple

Cfg = dict[str, Any]

# ---- networks: a student and the larger teacher of its kind

NETS: dict[str, Cfg] = {
    "mobile": dict(arch="mobilenetv3_small_050"),
    "resnet": dict(arch="resnet10t", kwargs=dict(channels=[16, 32, 64, 128], stem_width=16)),
    "resnet_teacher": dict(arch="resnet18", kwargs=dict(channels=[32, 64, 128, 256])),
    "vit": dict(
        arch="vit_tiny_patch16_224",
        kwargs=dict(patch_size=8, embed_dim=64, depth=3, num_heads=2),
    ),
    "vit_teacher": dict(
        arch="vit_tiny_patch16_224",
        kwargs=dict(patch_size=8, embed_dim=96, depth=3, num_heads=3),
    ),
    "xcit": dict(
        arch="xcit_tiny_12_p8_224",
        kwargs=dict(embed_dim=64, depth=2, num_heads=2, cls_attn_layers=1),
    ),
    "xcit_teacher": dict(
        arch="xcit_tiny_12_p8_224",
        kwargs=dict(embed_dim=96, depth=3, num_heads=3, cls_attn_layers=1),
    ),
}

# ---- testbeds: what all arms of a table share

PLAIN = dict(lr_scale="none", warmup_epochs=0, lr_min=0.0, per="step")
SHARED: Cfg = dict(
    data=dict(batch=128, threads=2, eval_resize=32, eval_size=32, eval_batch=256),
    view=dict(
        size=32,
        scale=[0.5, 1.0],
        blur_sigma=[0.1, 1.0],
        jitter=[0.4, 0.4, 0.4, 0.1],
        std=[0.229, 0.224, 0.225],
        interpolation="linear",
    ),
    eval=dict(bank=5000),
    checkpoint=dict(every=50, keep=1),
    log=dict(every=10),
)
SGD = dict(name="sgd", momentum=0.9, weight_decay=1e-4, decay_norm_and_bias=True, **PLAIN)
ADAMW = dict(
    name="adamw",
    lr_scale="none",
    lr_min=1e-5,
    warmup_epochs=0.5,
    weight_decay=0.04,
    weight_decay_end=0.1,
)
TESTBEDS: dict[str, Cfg] = {
    "moco": dict(
        views=[dict(count=2)],
        student=dict(hidden=512, dim=128),
        method=dict(name="moco", queue=4096, momentum=0.99, temp=0.2, distill=32.0),
        bn=dict(groups=4),
        optim=SGD | dict(lr=0.03),
    ),
    "swav": dict(
        # Without small crops, and with a softer temperature (docs/miniature.md).
        views=[dict(count=2, scale=[0.3, 1.0])],
        student=dict(hidden=512, dim=128, head_bn=True),
        method=dict(
            name="swav",
            temp=0.2,
            prototypes=64,
            freeze_steps=100,
            queue=0,
            queue_epoch=0,
            distill=2.0,
        ),
        bn=dict(sync=False),
        optim=SGD | dict(lr=0.6),
    ),
    "dino": dict(
        views=[dict(count=2)],
        student=dict(head="dino", hidden=512, dim=128),
        method=dict(
            name="dino",
            prototypes=1024,
            freeze_epochs=0,
            momentum=0.99,
            centre=0.9,
            distill=4.0,
            # Sharper than DINO's 0.1 and 0.04 (docs/miniature.md).
            temp=0.07,
            temp_mean=0.02,
            temp_mean_start=0.02,
        ),
        bn=dict(sync=False),
        optim=ADAMW | dict(lr=1e-3),
    ),
    "seed": dict(
        views=[dict(count=1)],
        student=dict(hidden=512, dim=128),
        method=dict(name="seed", queue=4096, temp=0.2, temp_teacher=0.01),
        bn=dict(groups=1),
        optim=SGD | dict(lr=0.06),
    ),
}

# ---- teachers


class Taught(NamedTuple):
    """A teacher: how it was trained."""

    testbed: str
    net: str
    # Laid over the testbed.
    differs: Cfg
    # Of SEED, which learns from a teacher itself.
    taught_by: str | None = None


TEACHERS: dict[str, Taught] = {
    "moco": Taught("moco", "resnet_teacher", dict(optim=dict(lr=0.06))),
    "swav": Taught("swav", "resnet_teacher", {}),
    "seed": Taught("seed", "resnet_teacher", {}, "moco"),
    "dino_vit": Taught("dino", "vit_teacher", {}),
    "dino_xcit": Taught("dino", "xcit_teacher", {}),
}


class Size(NamedTuple):
    """Lengths.  epochs: of every student, testbed by testbed."""

    epochs: dict[str, int]
    teacher_epochs: dict[str, int]
    # Laid over every arm.
    differs: Cfg
    # Overrides of `fastdisco eval`.
    scored: list[str]
    semi: dict[str, list[str]]
    transferred: list[str]
    mapped: list[str]


# Learning rates of the linear evaluations with crops, chosen on training images held out.
RATES = "[0.03,0.1,0.3,1,3]"
SIZES: dict[str, Size] = {
    "cpu": Size(
        epochs=dict(moco=3, swav=3, dino=4),
        teacher_epochs=dict(moco=10, swav=16, seed=6, dino_vit=8, dino_xcit=6),
        differs={},
        scored=[
            "eval.bank=10000",
            "knn.k=[20]",
            "probe.kinds=[logistic]",
            "probe.cs=[0.001,0.01,0.1]",
            "probe.iterations=100",
            "probe.held=0.02",
        ],
        semi={
            "1": [
                "semi.shares=[0.01]",
                "semi.tries=3",
                "semi.epochs=50",
                "semi.milestones=[30,40]",
                "semi.batch=64",
                "semi.held=0.2",
                f"semi.lrs={RATES}",
            ],
            "10": [
                "semi.shares=[0.1]",
                "semi.epochs=20",
                "semi.milestones=[12,16]",
                "semi.batch=64",
                "semi.held=0.1",
                f"semi.lrs={RATES}",
            ],
        },
        transferred=[
            "transfer.epochs=20",
            "transfer.batch=64",
            "transfer.held=0.05",
            f"transfer.lrs={RATES}",
        ],
        # The paper's classes, 5 to 14, are not all there.
        mapped=["tsne.classes=[0,1,2,3,4,5,6,7,8,9]", "tsne.images=50"],
    ),
}
# To try the command on a few images.
SIZES["tiny"] = Size(
    epochs=dict(moco=1, swav=1, dino=1),
    teacher_epochs=dict(moco=2, swav=2, seed=2, dino_vit=2, dino_xcit=2),
    differs=dict(
        data=dict(batch=8, threads=1, eval_batch=16), checkpoint=dict(every=1), log=dict(every=1)
    ),
    scored=["knn.k=[20]", "probe.kinds=[logistic]", "probe.cs=[0.01,0.1]", "probe.held=0.2"],
    semi={
        "1": ["semi.shares=[0.4]", "semi.epochs=2"],
        "10": ["semi.shares=[0.8]", "semi.epochs=2"],
    },
    transferred=["transfer.epochs=1"],
    mapped=["tsne.images=4"],
)

# ---- the paper's numbers: linear top-1 on ImageNet, alone and with DisCo

# Table -> our student -> (the paper's, alone, {teacher: with DisCo}).
PAPER: dict[str, dict[str, tuple[str, float, dict[str, float]]]] = {
    "table1": {
        "mobile": ("MobileNetV3-Large", 19.4, {"swav": 55.7}),
        "resnet": ("EfficientNet-B0", 46.8, {"swav": 62.4}),
    },
    "table2": {
        "mobile": ("MobileNetV3-Large", 36.2, {"moco": 64.4, "swav": 65.0}),
        "resnet": ("ResNet-18", 52.2, {"moco": 60.6, "swav": 65.1}),
    },
    "table3": {
        "vit": ("ViT-tiny", 63.2, {"dino_vit": 68.4}),
        "xcit": ("XCiT-tiny", 67.0, {"dino_xcit": 71.1}),
    },
}
