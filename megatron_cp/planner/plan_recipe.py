"""Write a plan as a recipe that `train`, `validate`, `estimate` and `render` accept unchanged."""

import io
from collections.abc import Iterable, Iterator

from ruamel.yaml import YAML

from megatron_cp.experts.copies import NO_COPIES, ExpertCopies
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch
from megatron_cp.pipeline.schedule import HOST
from megatron_cp.planner.estimate import Estimate
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plans import label
from megatron_cp.tensor import MEGATRONS

# a step of the shipped recipes for long sequences; planned runs start from it
LEARNING_RATE = {"--lr": 3e-5, "--min-lr": 3e-6}
# what training/recompute sets
FULL = frozenset({"--recompute-granularity", "--recompute-method", "--recompute-num-layers"})


def as_recipe(plan: Estimate, model: str, replaced: Iterable[str] = ()) -> str:
    """Return the YAML of a recipe for the plan.

    model:    what it extends: a name below configs, or a path
    replaced: the model's flags in whose place the plan has its own choice; those that it leaves out are taken back
    """
    gpus, per_node = plan.parallel.world, plan.cluster.ranks_per_node
    of_experts = dict(_dispatch_flags(plan.parallel.dispatch)) if plan.model.experts else {}
    if plan.parallel.expert_copies.asked:
        of_experts |= dict(_copies_flags(plan.parallel.expert_copies))
    local = min(gpus, per_node)
    extends = [model, "training/long-context", "training/nodes"]
    full = plan.parallel.recompute == "full"
    extends += ["training/recompute"] if full else []
    args = {"--seq-length": plan.seq, **dict(_flags(plan.parallel)), **of_experts, **LEARNING_RATE}
    content = {
        "extends": extends,
        "CLUSTER": plan.cluster.name,
        "LAUNCH": {"--nnodes": gpus // local, "--nproc-per-node": local},
        "MODEL_ARGS": args | {flag: False for flag in replaced if flag not in args and not (full and flag in FULL)},
    }
    text = io.StringIO()
    text.write(f"# {label(plan.parallel)}, planned for {gpus} GPUs of {plan.cluster.name}:\n")
    text.write(
        f"# {plan.seconds:.3g} s a step, {plan.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, MFU {plan.mfu:.1%}, "
        f"{plan.worst_memory.total / 1e9:.0f} GB on the fullest rank.\n"
    )
    yaml = YAML()
    yaml.dump(content, text)
    return text.getvalue()


def _dispatch_flags(dispatch: Dispatch) -> Iterator[tuple[str, object]]:
    yield "--moe-token-dispatcher-type", dispatch.dispatcher
    if dispatch.comm_type != STOCK.comm_type:
        yield "--moe-comm-type", dispatch.comm_type
    if dispatch.pieces > 1:
        yield "--moe-pieces", dispatch.pieces
    if dispatch.group is not None:
        yield "--moe-group-ranks", dispatch.group


def _copies_flags(copies: ExpertCopies) -> Iterator[tuple[str, object]]:
    yield "--moe-placement", copies.policy
    yield "--moe-replica-slots", copies.slots
    if copies.cluster != NO_COPIES.cluster:
        yield "--moe-cluster", copies.cluster
    if copies.ahead != NO_COPIES.ahead:
        yield "--moe-copies-ahead", copies.ahead
    # neither TransformerEngine's experts are lent, nor shards, nor are gradients that come home summed by a kernel
    yield "--transformer-impl", "local"
    yield "--expert-tensor-parallel-size", 1
    yield "--no-gradient-accumulation-fusion", True


def _flags(parallel: Parallel) -> Iterator[tuple[str, object]]:
    yield "--tensor-model-parallel-size", parallel.tp
    if parallel.sp:
        yield "--sequence-parallel", True
    if parallel.tp_overlap:
        yield "--tp-comm-overlap", True
    if parallel.tp_scheme != MEGATRONS:
        yield "--tp-comm-type", parallel.tp_scheme
        yield "--transformer-impl", "local"
    if parallel.tp_grid:
        yield "--tp-grid", list(parallel.tp_grid)
    yield "--context-parallel-size", parallel.cp
    if parallel.cp > 1:
        yield "--cp-comm-type", parallel.backend
    if parallel.grid:
        yield "--hierarchical-context-parallel-sizes", [parallel.grid.inner, parallel.grid.outer]
    yield "--pipeline-model-parallel-size", parallel.pp
    if parallel.vp > 1:
        yield "--num-virtual-stages-per-pipeline-rank", parallel.vp
    if parallel.schedule:
        yield "--pp-schedule", parallel.schedule
    if parallel.slices > 1:
        yield "--pp-slices", parallel.slices
    if parallel.free_running:
        yield "--pp-free-running", True
    if parallel.barriers:
        yield "--pp-vocab-parallel", parallel.barriers
    if parallel.moves:
        yield "--pp-offload", parallel.moves.limit
        if parallel.moves.to != HOST:
            yield "--pp-offload-to", parallel.moves.to
    if parallel.keep_attention:
        yield "--cp-keep-attention", True
    if parallel.latent:
        yield "--cp-latent", True
    if parallel.mlp_chunks > 1:
        yield "--mlp-chunks-for-training", parallel.mlp_chunks
    if parallel.loss_chunks:
        yield "--cp-loss-chunks", parallel.loss_chunks
    if parallel.state_dir:
        yield "--optimizer-state-dir", parallel.state_dir
        if parallel.state_weights:
            yield "--optimizer-state-weights", True
    if parallel.balanced_ends:
        yield "--account-for-embedding-in-pipeline-split", True
        yield "--account-for-loss-in-pipeline-split", True
    if parallel.ep > 1:
        yield "--expert-model-parallel-size", parallel.ep
    yield "--micro-batch-size", parallel.micro_batch
    yield "--global-batch-size", parallel.global_batch
    if parallel.precision in ("bfloat16", "fp8"):
        yield "--bf16", True
    if parallel.precision == "fp8":
        yield "--fp8-format", "hybrid"
