"""fastdisco: DisCo self-supervised distillation (ECCV 2022) of small vision models at the speed of
the hardware."""

from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
# A checkout: kernels/ lies beside this folder; installed, it lies inside.
if (_ROOT / "kernels" / "reference.py").is_file():
    __path__.append(str(_ROOT))
