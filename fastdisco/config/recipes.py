"""What the authors of each method trained with: under `method.name`, the defaults of the other
blocks.

A block's own default (blocks.py) holds where a recipe says nothing, and a configuration's own value
goes over both.  docs/method.md has the sources."""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "moco": {"views": [{"count": 2}]},
    "swav": {
        "run": {"epochs": 200},
        "data": {"batch": 512},
        "view": {"jitter": [0.8, 0.8, 0.8, 0.2], "std": [0.228, 0.224, 0.225]},
        "views": [
            {"count": 2, "size": 224, "scale": [0.14, 1.0]},
            {"count": 6, "size": 96, "scale": [0.05, 0.14]},
        ],
        "student": {"head_bn": True},
        "bn": {"sync": True},
        "optim": {"name": "lars", "lr": 0.6, "lr_min": 6e-4, "weight_decay": 1e-6},
    },
    "dino": {
        "run": {"epochs": 100},
        "data": {"batch": 512},
        "view": {"jitter": [0.4, 0.4, 0.2, 0.1], "interpolation": "cubic"},
        "views": [
            {"size": 224, "scale": [0.4, 1.0], "blur_p": 1.0},
            {"size": 224, "scale": [0.4, 1.0], "blur_p": 0.1, "solarize_p": 0.2},
            {"count": 8, "size": 96, "scale": [0.05, 0.4], "blur_p": 0.5},
        ],
        "student": {"head": "dino", "dim": 256, "kwargs": {"drop_path_rate": 0.1}},
        # Of XCiT and ResNets; ViT has none.
        "bn": {"sync": True},
        "optim": {
            "name": "adamw",
            "lr": 5e-4,
            "lr_scale": "linear",
            "lr_min": 1e-6,
            "warmup_epochs": 10,
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "decay_norm_and_bias": False,
            "clip": 3.0,
            "clip_each": True,
        },
    },
    "seed": {
        "views": [{"count": 1}],
        "optim": {
            "lr_scale": "linear",
            "per": "epoch",
            "warmup_epochs": 5,
            "warmup_from": "lr",
            "cosine_from": "start",
        },
    },
}
