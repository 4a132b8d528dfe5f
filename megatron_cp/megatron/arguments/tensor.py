"""Checks of the flags for tensor-parallel linears, before the model is built."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import Unsupported, read, refuse
from megatron_cp.megatron.run import TensorFlags, has_our_layers
from megatron_cp.tensor import MEGATRONS, SCHEMES
from megatron_cp.tensor.place import AUTO_ENGINE, GridSize, engine_of, grid_of
from megatron_cp.tensor.tesseract import depth

OURS = [entry.name for entry in SCHEMES if entry.name != MEGATRONS]

UNSUPPORTED = (
    Unsupported(
        "transformer-engine's overlap of tensor-parallel communication, which belongs to its own linears",
        lambda args: bool(read(args, "tp_comm_overlap", False)),
        f"leave --tp-comm-overlap out, or use --tp-comm-type {MEGATRONS}",
    ),
    Unsupported(
        "products in FP8 or FP4, which transformer-engine's linears compute",
        lambda args: any(read(args, name) for name in ("fp8", "fp4")),
        f"leave --fp8-format and --fp4-format out, or use --tp-comm-type {MEGATRONS}",
    ),
    Unsupported(
        "the overlap of shared experts, which takes their linears apart",
        lambda args: bool(read(args, "moe_shared_expert_overlap", False)),
        "leave --moe-shared-expert-overlap out",
    ),
    Unsupported(
        "Megatron's own delay of weight gradients",
        lambda args: bool(read(args, "delay_wgrad_compute", False)),
        "leave --delay-wgrad-compute out, a split schedule delays them itself",
    ),
    Unsupported(
        "weights that data-parallel ranks share out",
        lambda args: (
            any(read(args, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2"))
            or read(args, "gtp_weight_remat_size", 1) > 1
        ),
        "use --use-distributed-optimizer",
    ),
    Unsupported(
        "CUDA graphs",
        lambda args: (
            read(args, "cuda_graph_impl", "none") != "none"
            or any(read(args, name, False) for name in ("enable_cuda_graph", "external_cuda_graph"))
        ),
        "leave --cuda-graph-impl and --enable-cuda-graph out",
    ),
)


def check_tensor(args: Any) -> None:
    """Refuse a `--tp-comm-type` that this run cannot have; ValueError with the rule, the value and a way out."""
    flags = TensorFlags.of(args)
    scheme, tp = SCHEMES.get(flags.comm_type), read(args, "tensor_model_parallel_size", 1)
    engine, who = engine_of(flags.engine), f"--tp-comm-type {scheme.name}"
    if flags.ours and tp < 2:
        raise Refused(
            f"{who} needs --tensor-model-parallel-size of at least 2, got {tp}; leave it out or use more ranks"
        )
    size = grid_of(scheme, tp, flags.grid)
    if not flags.ours:
        if flags.engine != AUTO_ENGINE:
            raise Refused(
                f"--tp-engine {engine} needs --tp-comm-type {' or '.join(OURS)}, got {scheme.name}; leave it out"
            )
        return
    if not read(args, "sequence_parallel", False):
        raise Refused(f"{who} gathers tokens that sequence parallelism spreads; add --sequence-parallel")
    if not has_our_layers(args):
        raise Refused(
            f"{who} needs a layer spec of megatron-cp, got --spec {' '.join(read(args, 'spec') or ['none'])}; "
            f"pass --spec megatron_cp.megatron.spec gpt_layer_spec"
        )
    if (given := read(args, "transformer_impl", "local")) != "local":
        raise Refused(f"{who} replaces Megatron's local linears, got --transformer-impl {given}; pass local")
    refuse(UNSUPPORTED, args, who)
    _check_sizes(args, who, tp, size)
    if engine == "symmetric" and read(args, "distributed_backend", "nccl") != "nccl":
        raise Refused(
            "--tp-engine symmetric needs GPUs that reach each other's memory, and this run has none; use ring"
        )
    if scheme.depth:
        depth(read(args, "context_parallel_size", 1), _data_parallel(args, tp))


def _check_sizes(args: Any, who: str, tp: int, size: GridSize) -> None:
    cp, length = read(args, "context_parallel_size", 1), read(args, "seq_length")
    if length and length % (tp * cp):
        raise Refused(
            f"{who} spreads --seq-length over {tp} x {cp} ranks of tensor and context parallelism, got {length}; use "
            f"{-(-length // (tp * cp)) * tp * cp}"
        )
    if size.weights > 1 and read(args, "add_bias_linear", False):
        raise Refused(
            f"{who} gathers weights over {size.weights} ranks, but no bias of an MLP; pass --disable-bias-linear, or "
            f"flux"
        )


def _data_parallel(args: Any, tp: int) -> int:
    others = tp * read(args, "pipeline_model_parallel_size", 1) * read(args, "context_parallel_size", 1)
    return max(1, (read(args, "world_size") or 1) // others)
