"""Write tests/kernels/signatures.json: the signatures of the attention functions that the kernels call.

Usage: python scripts/kernel_signatures.py. Each release is downloaded and read, none is imported or installed. torch's
are the schemas of its ops, out of the smallest of its wheels; FlashAttention-3 is on no index, its were written down.
"""

import ast
import datetime
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).resolve().parents[1] / "tests/kernels/signatures.json"
TORCH = ("2.8.0", "2.11.0", "2.14.1", "2.15.0")
OPS = re.compile(r"- func: ((_flash_attention_(?:for|back)ward|_scaled_dot_product_(?:flash|cudnn)_attention\w*)\(.*)")


class Source(NamedTuple):
    """Functions in one file of a package, the same in all these releases."""

    package: str
    file: str
    functions: tuple[str, ...]
    releases: tuple[str, ...]


FLASH = ("_flash_attn_forward", "_flash_attn_backward")
SOURCES = (
    Source(
        "flash-attn",
        "flash_attn/flash_attn_interface.py",
        FLASH,
        tuple("2.6.0.post1 2.6.3 2.7.0.post2 2.7.2.post1 2.7.4.post1 2.8.0.post2 2.8.2 2.8.3.post2".split()),
    ),
    Source("flash-attn-4", "flash_attn/cute/interface.py", ("_flash_attn_fwd", "_flash_attn_bwd"), ("4.0.0b36",)),
    Source(
        "transformer-engine",
        "transformer_engine/pytorch/cpp_extensions/fused_attn.py",
        ("fused_attn_fwd", "fused_attn_bwd"),
        ("2.15.0", "2.17.1", "2.18.0", "2.20.2"),
    ),
)
# read on 2026-11-26 in hopper/flash_attn_interface.py of the flash-attention repository
WRITTEN_DOWN = {
    "commit c082294": {
        "_flash_attn_forward": (
            "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, "
            "max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, "
            "seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), "
            "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, "
            "pack_gqa=None, sm_margin=0"
        ),
        "_flash_attn_backward": (
            "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, "
            "max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, "
            "deterministic=False, sm_margin=0"
        ),
    },
    "commit 01afd16": {
        "_flash_attn_forward": (
            "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
            "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
            "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, "
            "seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
            "causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, "
            "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
        ),
        "_flash_attn_backward": (
            "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
            "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
            "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
            "deterministic=False, sm_margin=0"
        ),
    },
}


def main() -> None:
    """Download, read and write."""
    packages = {
        source.package: {release: signatures(source, release) for release in source.releases} for source in SOURCES
    }
    packages["flash_attn_3"] = WRITTEN_DOWN
    written = {
        "made": f"{datetime.date.today()} by python scripts/kernel_signatures.py",
        "packages": packages,
        "torch": {release: schemas(release) for release in TORCH},
    }
    TARGET.write_text(json.dumps(written, indent=2) + "\n")


def signatures(source: Source, release: str) -> dict[str, str]:
    """Return the parameters of each function, with their defaults and without their types."""
    tree = ast.parse(read(f"{source.package}=={release}", source.file))
    found = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    for arguments in (found[name] for name in source.functions):
        for argument in arguments.args:
            argument.annotation = None
    return {name: ast.unparse(found[name]) for name in source.functions}


def schemas(release: str) -> dict[str, str]:
    """Return the schemas of torch's fused attention ops."""
    text = read(
        f"torch=={release}", "torchgen/packaged/ATen/native/native_functions.yaml", platform="macosx_14_0_arm64"
    )
    return {name: f"aten::{schema}" for schema, name in OPS.findall(text)}


def read(requirement: str, file: str, platform: str | None = None) -> str:
    """Return the text of a file in the archive of a release."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--pre", requirement]
    if platform:
        command += ["--only-binary", ":all:", "--platform", platform, "--platform", "macosx_11_0_arm64"]
    else:
        # the metadata of a source archive are made by its setup.py, which asks for torch
        command += ["--no-build-isolation"]
    environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--dest", folder], check=True, env=environment)
        (archive,) = Path(folder).iterdir()
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(file).decode()
        with tarfile.open(archive) as source:
            (member,) = (one for one in source.getmembers() if one.name.split("/", 1)[-1] == file)
            return source.extractfile(member).read().decode()


if __name__ == "__main__":
    main()
