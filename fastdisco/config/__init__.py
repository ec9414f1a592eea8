"""The configuration: YAML in, one validated `Config` out.

blocks.py    the blocks, their keys, defaults and checks
methods.py   the block `method`, for each method
crops.py     a view and its augmentation
recipes.py   the defaults of other blocks under a method, as its authors trained
config.py    the whole, and what its blocks must agree on
reading.py   files and overrides; the sentences about mistakes
division.py  how a step's images are divided, also on another number of ranks
derived.py   each student's configuration, the crops one by one, the micro batch, least memory

Level 0: imports nothing of fastdisco but `common`, and no torch."""

from fastdisco.common.errors import UserError
from fastdisco.config.block import Block
from fastdisco.config.blocks import (
    Bn,
    Checkpoint,
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
from fastdisco.config.config import Config
from fastdisco.config.crops import Crop, Crops
from fastdisco.config.derived import crops, micro_batch, refuse_beyond, students
from fastdisco.config.division import Division, can_follow, division, follow
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
    "Division",
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
    "can_follow",
    "crops",
    "division",
    "dump",
    "flatten",
    "follow",
    "load",
    "micro_batch",
    "refuse_beyond",
    "students",
    "validate",
]
