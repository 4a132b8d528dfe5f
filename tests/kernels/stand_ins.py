"""Stand-ins for functions that need a GPU: exactly the recorded signatures, computed by the reference kernel."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_cp.kernels.reference import ReferenceKernel

RECORDED = json.loads((Path(__file__).parent / "signatures.json").read_text())


def with_signature(name, parameters, body):
    """A function with these parameters; a call that does not fit them fails as it would in the package."""
    scope = {"body": body}
    exec(f"def {name}({parameters}):\n    return body(dict(locals()))", scope)
    return scope[name]


def of_schema(name, schema, body):
    """A function with the parameters of an op of torch."""
    arguments = torch._C.parse_schema(schema).arguments
    shown = [f"{one.name}={one.default_value!r}" if one.has_default_value() else one.name for one in arguments]
    first = next((index for index, one in enumerate(arguments) if one.kwarg_only), None)
    if first is not None:
        shown.insert(first, "*")
    return with_signature(name, ", ".join(shown), body)


def sbhd(*tensors):
    # b s h d -> s b h d and back
    return [x.transpose(0, 1) for x in tensors]


def window_of(left, right):
    """A window as the reference takes it; packages write -1 or None for no limit."""
    limits = tuple(None if limit in (-1, None) else limit for limit in (left, right))
    return None if limits == (None, None) else limits


def forward(q, k, v, scale, causal, window=None, softcap=None):
    """out [b s h d] and lse [b h s] of tensors [b s h d]."""
    q, k, v = sbhd(q, k, v)
    out, lse = ReferenceKernel(softcap).forward(q, k, v, scale=scale, causal=causal, window=window)
    return sbhd(out)[0].contiguous(), lse.permute(1, 2, 0).contiguous()


def backward(dout, q, k, v, out, lse, scale, causal, window=None, softcap=None):
    """dq, dk, dv [b s h d]; lse must be dense, since kernels read it through a bare pointer."""
    assert lse.is_contiguous()
    tensors = sbhd(dout, q, k, v, out)
    grads = ReferenceKernel(softcap).backward(*tensors, lse.permute(2, 0, 1), scale=scale, causal=causal, window=window)
    return sbhd(*grads)


def neutral(given, *used):
    """Assert that every other argument leaves attention as it is."""
    rest = {name: value for name, value in given.items() if name not in used}
    odd = {name for name, value in rest.items() if not (value is None or value == 0 or value in OPTIONS)}
    assert not odd, f"{ {name: rest[name] for name in odd} } would change something"


# the number of splits, and a switch of rotary embedding that has none to work on
OPTIONS = (1, True)


def flash_attn(release):
    """`flash_attn.flash_attn_interface` of a release."""
    signatures = RECORDED["packages"]["flash-attn"][release]
    split = "window_size_left" in signatures["_flash_attn_forward"]

    def how(given):
        limits = (given["window_size_left"], given["window_size_right"]) if split else given["window_size"]
        assert given["alibi_slopes"] is None
        assert given["dropout_p"] == 0
        return given["softmax_scale"], given["causal"], window_of(*limits), given["softcap"] or None

    def run_forward(given):
        assert not given["return_softmax"]
        q, k, v = (given[name] for name in "qkv")
        out, lse = forward(q, k, v, *how(given))
        return (out, lse, None, None) if split else (out, q, k, v, out, lse, None, None)

    def run_backward(given):
        assert given["deterministic"] is True
        inputs = (given[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
        for name, grad in zip(("dq", "dk", "dv"), backward(*inputs, *how(given)), strict=True):
            assert given[name].is_contiguous()
            given[name].copy_(grad)

    def unwrapped(given):
        raise AssertionError("the wrapped op is the one to call")

    bodies = {"_flash_attn_forward": run_forward, "_flash_attn_backward": run_backward}
    if not split:
        return SimpleNamespace(**{name: with_signature(name, signatures[name], body) for name, body in bodies.items()})
    return SimpleNamespace(
        **{name: with_signature(name, signatures[name], unwrapped) for name in bodies},
        **{f"_wrapped{name}": with_signature(name, signatures[name], body) for name, body in bodies.items()},
    )


def flash_attn_3(release):
    """`flash_attn_interface` as it was at a commit."""
    signatures = RECORDED["packages"]["flash_attn_3"][release]

    def how(given):
        causal = given["is_causal"] if "is_causal" in given else given["causal"]
        limits = given.get("window_size") or (given["window_size_left"], given["window_size_right"])
        return given["softmax_scale"], causal, window_of(*limits)

    options = ("softmax_scale", "causal", "is_causal", "window_size", "window_size_left", "window_size_right")

    def run_forward(given):
        neutral(given, "q", "k", "v", *options)
        out, lse = forward(given["q"], given["k"], given["v"], *how(given))
        return out, lse, None, None

    def run_backward(given):
        tensors = ("dout", "q", "k", "v", "out", "softmax_lse")
        neutral(given, *tensors, "dq", "dk", "dv", "deterministic", *options)
        for name, grad in zip(("dq", "dk", "dv"), backward(*(given[x] for x in tensors), *how(given)), strict=True):
            given[name].copy_(grad)

    bodies = {"_flash_attn_forward": run_forward, "_flash_attn_backward": run_backward}
    return SimpleNamespace(**{name: with_signature(name, signatures[name], body) for name, body in bodies.items()})


def flash_attn_4(release):
    """`flash_attn.cute.interface` of a release."""
    signatures = RECORDED["packages"]["flash-attn-4"][release]

    def how(given):
        assert not given["cu_seqlens_q"]
        assert not given["softcap"]
        return given["softmax_scale"], given["causal"], window_of(given["window_size_left"], given["window_size_right"])

    def run_forward(given):
        assert given["return_lse"]
        return *forward(given["q"], given["k"], given["v"], *how(given)), None, None, None

    def run_backward(given):
        return *backward(*(given[name] for name in ("dout", "q", "k", "v", "out", "lse")), *how(given)), None

    bodies = {"_flash_attn_fwd": run_forward, "_flash_attn_bwd": run_backward}
    return SimpleNamespace(**{name: with_signature(name, signatures[name], body) for name, body in bodies.items()})


def transformer_engine(release):
    """`transformer_engine.pytorch.cpp_extensions.fused_attn` of a release; its tensors are s b h d."""
    signatures = RECORDED["packages"]["transformer-engine"][release]

    def how(given):
        q, k = given["q"], given["k"]
        assert all(given[name].is_contiguous() for name in "qkv")
        assert (given["max_seqlen_q"], given["max_seqlen_kv"]) == (len(q), len(k))
        for name, x in (("cu_seqlens_q", q), ("cu_seqlens_kv", k)):
            assert given[name].tolist() == [len(x) * index for index in range(x.shape[1] + 1)]
            assert given[name].dtype == torch.int32
        assert given["fused_attention_backend"] == "arbitrary"
        assert given["qkv_layout"] == "sbhd_sbhd_sbhd"
        assert (given["attn_bias_type"], given["dropout"], given["fake_dtype"]) == ("no_bias", 0.0, q.dtype)
        masks = {"causal": True, "no_mask": False}
        return given["attn_scale"], masks[given["attn_mask_type"]], window_of(*given["window_size"])

    def run_forward(given):
        assert given["is_training"]
        out, lse = forward(*sbhd(given["q"], given["k"], given["v"]), *how(given))
        return out.transpose(0, 1).contiguous(), [lse[..., None], torch.zeros(2)]

    def run_backward(given):
        assert given["deterministic"]
        assert given["dqkv_layout"] == "sbhd_sbhd_sbhd"
        lse, random = given["aux_ctx_tensors"]
        assert random.numel() == 2
        tensors = sbhd(given["d_o"], given["q"], given["k"], given["v"], given["o"])
        return *sbhd(*backward(*tensors, lse.squeeze(-1), *how(given))), None

    return SimpleNamespace(
        FusedAttnBackend={"F16_arbitrary_seqlen": "arbitrary"},
        fused_attn_fwd=with_signature("fused_attn_fwd", signatures["fused_attn_fwd"], run_forward),
        fused_attn_bwd=with_signature("fused_attn_bwd", signatures["fused_attn_bwd"], run_backward),
    )


def torch_ops(release):
    """The namespace of torch's CUDA ops of a release, with tensors `b h s d`, and `b s h d` under the dispatcher's."""
    schemas = RECORDED["torch"][release]

    def bshd(*tensors):
        return [x.transpose(1, 2) for x in tensors]

    def how(given):
        assert given["dropout_p"] == 0.0
        window = window_of(given.get("window_size_left"), given.get("window_size_right"))
        return given["scale"], given["is_causal"], window

    def run_forward(given):
        tensors = [given[name] for name in ("query", "key", "value")]
        if "window_size_left" in given:
            assert [given["max_q"], given["max_k"]] == [x.shape[1] for x in tensors[:2]]
            return *forward(*tensors, *how(given)), None, None, None
        assert not given["return_debug_mask"]
        assert given.get("compute_log_sumexp", True)
        out, lse = forward(*bshd(*tensors), *how(given))
        # releases differ in whether cuDNN's lse ends in a dim of one
        return *bshd(out), lse[..., None] if "compute_log_sumexp" in given else lse, *[None] * 7

    def run_backward(given):
        names = ("grad_out", "query", "key", "value", "out")
        tensors, lse = [given[name] for name in names], given["logsumexp"]
        queries = 1 if "window_size_left" in given else 2
        assert [given["max_q"], given["max_k"]] == [x.shape[queries] for x in tensors[1:3]]
        if queries == 1:
            return backward(*tensors, lse, *how(given))
        lse = lse.squeeze(-1) if "attn_bias" in given else lse
        return tuple(bshd(*backward(*bshd(*tensors), lse, *how(given))))

    return SimpleNamespace(
        **{
            name: of_schema(name, schema, run_backward if name.endswith("backward") else run_forward)
            for name, schema in schemas.items()
        }
    )
