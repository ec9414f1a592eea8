"""The configuration: YAML in, one validated `Config` out.

Level 0: imports nothing of fastdisco but `common`.  The blocks and their defaults are in blocks.py
and
methods.py, what a method's authors trained with in recipes.py, the files' reader in reading.py."""

from fastdisco.common.errors import UserError
from fastdisco.config.block import Block
from fastdisco.config.blocks import (
    Bn,
    Checkpoint,
    Config,
    Data,
    Engine,
    Eval,
    Log,
    OneOfMany,
    Optim,
    Perf,
    Run,
    Student,
    Teacher,
)
from fastdisco.config.crops import Crop, Crops
from fastdisco.config.derived import crops, micro_batch, students
from fastdisco.config.merge import flatten
from fastdisco.config.methods import Dino, Moco, Rkd, Seed, Swav
from fastdisco.config.reading import dump, load, validate
from fastdisco.config.recipes import RECIPES

__all__ = [
    "RECIPES",
    "Block",
    "Bn",
    "Checkpoint",
    "Config",
    "Crop",
    "Crops",
    "Data",
    "Dino",
    "Engine",
    "Eval",
    "Log",
    "Moco",
    "OneOfMany",
    "Optim",
    "Perf",
    "Rkd",
    "Run",
    "Seed",
    "Student",
    "Swav",
    "Teacher",
    "UserError",
    "crops",
    "dump",
    "flatten",
    "load",
    "micro_batch",
    "students",
    "validate",
]
