"""fastdisco: DisCo self-supervised distillation (ECCV 2022) of small vision models at the speed of
the hardware.

The packages, from the lowest level to the highest; a file imports only from lower levels
(tests/test_architecture.py):

0  common, config, kernels    what all others build on, the configuration, the losses
1  data, models, engine       images, networks, and what trains them
2  teacher, methods, evals    the frozen teacher, how outputs become losses, accuracy
3  run                        one training: its folder, checkpoints, log and students
4  train, cli, commands       the training loop and the command line
"""

from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
# `fastdisco.kernels` is a folder of this package once installed.  In a checkout it lies beside
# this folder, so the package must look there, too.
if (_ROOT / "kernels" / "reference.py").is_file():
    __path__.append(str(_ROOT))
