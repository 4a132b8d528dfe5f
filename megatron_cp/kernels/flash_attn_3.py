"""Attention through the interface of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), for Hopper GPUs.

It is built from the `hopper` folder of the flash-attention repository, and two forms of its interface are in use: the
one with a pair as `window_size`, and the later one that is registered with torch and takes two limits.
"""

from importlib import import_module

from torch import Tensor

from megatron_cp.kernels.flash_attn import Interface, buffers, loaded, no_limit, only_cuda
from megatron_cp.kernels.fused import FusedKernel, Gradients, Only, Op
from megatron_cp.kernels.packages import Package, check_parameters, lacking_gpu
from megatron_cp.kernels.protocol import Window

WIDEST_HEAD = 256
PACKAGE = Package(
    "flash_attn_3", ("3.0.0", "3.0.0b1"), "build it in the hopper folder of the flash-attention repository"
)
HOPPER = (9, 0)

ONE_WINDOW, TWO_LIMITS = ["window_size"], ["window_size_left", "window_size_right"]
LENGTHS = "cu_seqlens_q cu_seqlens_k"
FORWARD = {
    split: [
        *f"q k v k_new v_new qv {'out_' if split else 'out'} {LENGTHS} cu_seqlens_k_new seqused_q seqused_k".split(),
        *"max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary".split(),
        *"q_descale k_descale v_descale softmax_scale causal".split(),
        *window,
        *"attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin".split(),
    ]
    for split, window in ((False, ONE_WINDOW), (True, TWO_LIMITS))
}
BACKWARD = {
    split: [
        *f"dout q k v out softmax_lse {LENGTHS} sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv".split(),
        *("softmax_scale", "is_causal" if split else "causal"),
        *window,
        *"softcap deterministic sm_margin".split(),
    ]
    for split, window in ((False, ONE_WINDOW), (True, TWO_LIMITS))
}


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    return only_cuda(device, dtype, head_dim, WIDEST_HEAD)


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None."""
    return PACKAGE.missing() or lacking_gpu(device, HOPPER, "a Hopper GPU")


def create(*, device: str, deterministic: bool) -> FusedKernel:
    """Raises RuntimeError when the package is there but does not load (built for another torch or CUDA)."""
    interface: Interface = loaded(lambda: import_module("flash_attn_interface"), PACKAGE)
    return FusedKernel("flash-3", Only(flash_3_op(interface, deterministic=deterministic)))


def flash_3_op(interface: Interface, *, deterministic: bool) -> Op:
    """Return the package's op, with the calling convention that this build has."""
    forms = [FORWARD[split] for split in (False, True)]
    split = check_parameters(PACKAGE.name, interface._flash_attn_forward, *forms) == FORWARD[True]
    check_parameters(PACKAGE.name, interface._flash_attn_backward, BACKWARD[split])

    def limits(window: Window | None) -> dict[str, object]:
        left, right = no_limit(window)
        return {"window_size_left": left, "window_size_right": right} if split else {"window_size": (left, right)}

    def forward(
        q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Window | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # appended keys, lengths, pages, rotary angles and scales of FP8: the early form has no defaults for them
        unused = [None] * (FORWARD[split].index("softmax_scale") - 3)
        out, lse, *_ = interface._flash_attn_forward(q, k, v, *unused, scale, causal, **limits(window))
        return out.transpose(1, 2), lse

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> Gradients:
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = buffers(q, k, v)
        unused = [None] * 6
        interface._flash_attn_backward(
            dout, q, k, v, out, lse.contiguous(), *unused, dq, dk, dv, scale, causal,
            **limits(window), deterministic=deterministic,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Op("flash-attn 3", forward, backward, windows=True)
