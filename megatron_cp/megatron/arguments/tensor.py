"""Checks of the flags for tensor-parallel linears, before the model is built."""

from collections.abc import Callable
from typing import Any

from megatron_cp import config
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.unsupported import Unsupported, captures_graphs, read, refuse, shares_weights_out
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.run import has_our_layers, say
from megatron_cp.tensor import AUTO, CUBE, FLUX, GEMMS, MEGATRONS, PANELS, SCHEMES, SYMMETRIC, TORCH
from megatron_cp.tensor.cost import LayerLinears, cheapest
from megatron_cp.tensor.gemm import unable
from megatron_cp.tensor.place import AUTO_ENGINE, GridSize, check_engine, cube_side, engine_of, grid_of
from megatron_cp.tensor.tesseract import depth

OURS = [entry.name for entry in SCHEMES if entry.name not in (MEGATRONS, AUTO)]

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
        shares_weights_out,
        "use --use-distributed-optimizer",
    ),
    Unsupported(
        "CUDA graphs",
        captures_graphs,
        "leave --cuda-graph-impl and --enable-cuda-graph out",
    ),
)


def settle_tensor(args: Any, default: Callable[[], Cluster]) -> None:
    """Replace `auto` of --tp-comm-type, --tp-grid and --tp-gemm by what can run or takes least, and say why.

    It refuses nothing.

    default: the cluster where --cp-cluster names none
    """
    flags = TensorFlags.of(args)
    if flags.chosen:
        _settle_scheme(args, flags, default)
    if TensorFlags.of(args).gemm == AUTO:
        _settle_products(args)


def stand_in_for_overlap(args: Any) -> None:
    """Take flux, or the scheme that is asked for, in place of --tp-comm-overlap beside Megatron's linears, and say so.

    It refuses nothing: a run that cannot have flux keeps Megatron's own linears.
    """
    asked, args.tp_comm_overlap = read(args, "tp_comm_overlap", False), False
    if TensorFlags.of(args).comm_type == MEGATRONS:
        if _left_to_megatron(args):
            args.tp_comm_overlap = asked
            return
        args.tp_comm_type = FLUX
    say(
        f"--tp-comm-type {args.tp_comm_type} stands in for --tp-comm-overlap, which belongs to transformer-engine's "
        f"linears"
    )


def _settle_scheme(args: Any, flags: TensorFlags, default: Callable[[], Cluster]) -> None:
    scheme, grid, why = MEGATRONS, None, _left_to_megatron(args) if flags.comm_type == AUTO else ""
    engine = engine_of(flags.engine)
    if not why:
        try:
            cluster = load_cluster(args.cp_cluster) if read(args, "cp_cluster") else default()
            chosen = cheapest(
                layer_of(args),
                args.tensor_model_parallel_size,
                cluster,
                _dtype(args),
                split=PipelineFlags.of(args).splits,
                bias=bool(read(args, "add_bias_linear", False)),
                scheme=flags.comm_type,
                engine=engine,
            )
            scheme, why = chosen.placing.scheme, chosen.why
            grid = [str(size) for size in chosen.placing.size] if SCHEMES.get(scheme).grid else None
        except Refused as refused:
            scheme, grid, why = flags.comm_type.replace(AUTO, MEGATRONS), None, str(refused)
    args.tp_comm_type, args.tp_grid = scheme, grid
    say(f"--tp-comm-type {scheme}{' --tp-grid ' + ' '.join(grid) if grid else ''}: {why}")
    if flags.comm_type == AUTO and scheme == MEGATRONS:
        # of the linears that were not taken
        args.tp_engine, args.tp_gemm = AUTO_ENGINE, TORCH
    if flags.comm_type == AUTO and grid is None and engine == PANELS:
        # a ring where no weight is gathered
        args.tp_engine = AUTO_ENGINE


def _settle_products(args: Any) -> None:
    flags = TensorFlags.of(args)
    if not flags.ours:
        why = f"the linears of --tp-comm-type {MEGATRONS} are Megatron's own"
    elif engine_of(flags.engine) == SYMMETRIC:
        why = f"the products of --tp-engine {SYMMETRIC} are torch's own"
    elif lacking := unable(gpu=_on_gpus(args)):
        why = f"stream-k {lacking}"
    else:
        return
    args.tp_gemm = TORCH
    say(f"--tp-gemm {TORCH}: {why}")


def _on_gpus(args: Any) -> bool:
    return bool(read(args, "distributed_backend", "nccl") == "nccl")


def _left_to_megatron(args: Any) -> str:
    """Say why only Megatron's own linears can run; empty where others can."""
    if read(args, "tensor_model_parallel_size", 1) < 2 or not read(args, "sequence_parallel", False):
        return "others need --tensor-model-parallel-size of at least 2 and --sequence-parallel"
    if read(args, "transformer_impl", "local") != "local" or not has_our_layers(args):
        return "others need --transformer-impl local and a layer spec of megatron-cp"
    return next((f"others do not do {feature.what}" for feature in UNSUPPORTED if feature.asked(args)), "")


def layer_of(args: Any) -> LayerLinears:
    """Return the linears of a layer as Megatron's arguments describe it, before they are validated."""
    hidden, heads, swiglu = args.hidden_size, args.num_attention_heads, bool(read(args, "swiglu", False))
    gated = swiglu or read(args, "quick_geglu", False)
    width = read(args, "kv_channels") or hidden // heads
    groups = args.num_query_groups if read(args, "group_query_attention", False) else heads
    # Megatron's own default
    ffn = read(args, "ffn_hidden_size") or (int(4 * hidden * 2 / 3 / 64) * 64 if swiglu else 4 * hidden)
    second = ffn if not read(args, "num_experts") else read(args, "moe_shared_expert_intermediate_size") or 0
    tokens = args.micro_batch_size * args.seq_length / args.context_parallel_size
    return LayerLinears(
        tokens, hidden, (heads + 2 * groups) * width, heads * width, (2 if gated else 1) * second, second
    )


def _dtype(args: Any) -> str:
    return "bfloat16" if read(args, "bf16") else "float16" if read(args, "fp16") else "float32"


def check_tensor(args: Any) -> None:
    """Refuse a `--tp-comm-type` that this run cannot have; ValueError with the rule, the value and a way out."""
    flags = TensorFlags.of(args)
    scheme, tp = SCHEMES.get(flags.comm_type), read(args, "tensor_model_parallel_size", 1)
    engine, who = engine_of(flags.engine), f"--tp-comm-type {scheme.name}"
    gemm = GEMMS.get(flags.gemm).name
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
        if gemm != TORCH:
            raise Refused(f"--tp-gemm {gemm} needs --tp-comm-type {' or '.join(OURS)}, got {scheme.name}; leave it out")
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
    check_engine(engine, scheme, size)
    _check_sizes(args, who, tp, size)
    if gemm != TORCH and engine == SYMMETRIC:
        raise Refused(
            f"--tp-engine {SYMMETRIC} has the products of torch, got --tp-gemm {gemm}; use ring, or leave --tp-gemm out"
        )
    if gemm != TORCH and (lacking := unable(gpu=_on_gpus(args))):
        raise Refused(f"--tp-gemm {gemm} {lacking}; use {TORCH}")
    if engine == SYMMETRIC and not _on_gpus(args):
        raise Refused(
            "--tp-engine symmetric needs GPUs that reach each other's memory, and this run has none; use ring"
        )
    if engine == SYMMETRIC and config.variable("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise Refused(
            "--tp-engine symmetric copies on a second stream, got CUDA_DEVICE_MAX_CONNECTIONS=1, with which it waits "
            "for the products; unset it, or set it to 8 in a recipe's ENV_VARS: this engine needs none; or take ring"
        )
    if scheme.name == CUBE:
        cube_side(tp)
    if scheme.depth:
        depth(read(args, "context_parallel_size", 1), _data_parallel(args, tp))


def _check_sizes(args: Any, who: str, tp: int, size: GridSize) -> None:
    cp, length = read(args, "context_parallel_size", 1), read(args, "seq_length")
    if length and length % (tp * cp):
        raise Refused(
            f"{who} spreads --seq-length over {tp} x {cp} ranks of tensor and context parallelism, got {length}; use "
            f"{-(-length // (tp * cp)) * tp * cp}"
        )
    if (size.weights > 1 or who.endswith(CUBE)) and read(args, "add_bias_linear", False):
        raise Refused(f"{who} gathers weights of an MLP, but no bias; pass --disable-bias-linear, or use flux")


def _data_parallel(args: Any, tp: int) -> int:
    others = tp * read(args, "pipeline_model_parallel_size", 1) * read(args, "context_parallel_size", 1)
    return max(1, (read(args, "world_size") or 1) // others)
