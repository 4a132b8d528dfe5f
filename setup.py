import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Ship the recipes inside the package; an editable install finds them in the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "megatron_cp", "configs"), dirs_exist_ok=True)


setup(
    name="megatron-cp",
    version="0.1.0",
    description="Context-parallel attention and pipeline schedules for stock Megatron-LM",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_cp", "megatron_cp.*"]),
    package_data={"megatron_cp.slurm": ["*.sh"]},
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.8",
        # Megatron makes hierarchical context-parallel groups with it
        "einops>=0.8",
        "jaxtyping>=0.3,<0.4",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "psutil>=6",
        "pydantic>=2.7",
        "rich>=13.9",
        "typer>=0.15",
        "ruamel.yaml>=0.18,<0.20",
        "zstandard>=0.23",
    ],
    extras_require={
        "flash": ["flash-attn>=2.6"],
        "te": ["transformer-engine[pytorch]>=2.6"],
        "tokenizers": ["tokenizers>=0.20", "sentencepiece>=0.2", "tiktoken>=0.8"],
        "report": ["tensorboard>=2.18"],
        "peers": ["ring-flash-attn==0.1.8", "yunchang==0.6.4"],
        "dev": ["pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.9", "mypy>=1.14", "beartype>=0.20", "types-psutil"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["megatron-cp = megatron_cp.cli:main"]},
)
