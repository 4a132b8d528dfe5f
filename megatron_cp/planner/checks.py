"""Refuse, with a way out, sizes and choices that no training has together."""

from megatron_cp.context import BACKENDS
from megatron_cp.context.checks import check_latent
from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import check_slices, check_vocabulary
from megatron_cp.pipeline.steady import check_free
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel


def check(model: Transformer, parallel: Parallel, seq: int) -> None:
    """Raise ValueError, with a way out, where sizes do not divide as Megatron requires."""
    if model.heads % parallel.tp:
        raise ValueError(f"tensor parallel {parallel.tp} must divide the {model.heads} attention heads; lower it")
    if max(model.kv_heads, parallel.tp) % min(model.kv_heads, parallel.tp):
        raise ValueError(f"tensor parallel {parallel.tp} and {model.kv_heads} query groups must divide; lower it")
    if parallel.sp and seq % (parallel.tp * parallel.cp):
        size = parallel.tp * parallel.cp
        raise ValueError(f"sequence parallelism needs a sequence divisible by TP x CP = {size}, got {seq}")
    if parallel.cp > 1 and seq % (2 * parallel.cp):
        raise ValueError(f"context parallel {parallel.cp} needs a sequence divisible by {2 * parallel.cp}, got {seq}")
    if model.experts % parallel.ep:
        raise ValueError(f"expert parallel {parallel.ep} must divide the {model.experts} experts")
    _check_sliced(model, parallel)
    _check_vocabulary(model, parallel)
    _check_free_running(model, parallel)
    _check_copies(model, parallel)
    _check_messages(parallel)
    if parallel.latent and not model.latent:
        raise Refused("--cp-latent sends the latents of multi-latent attention, which this model lacks; leave it out")
    if parallel.latent:
        check_latent(BACKENDS.get(parallel.backend))
    if parallel.vp > 1 and parallel.pp == 1:
        raise ValueError(f"virtual stages ({parallel.vp}) need a pipeline; raise pp or set vp to 1")
    if parallel.layout:
        stages = parallel.pp * parallel.vp
        if len(parallel.layout) != stages or sum(parallel.layout) != model.layers:
            raise ValueError(
                f"a layout of {len(parallel.layout)} stages and {sum(parallel.layout)} layers is not one of "
                f"{parallel.pp} x {parallel.vp} stages and {model.layers} layers"
            )
        return
    slots = model.layers + (2 if parallel.balanced_ends else 0)
    if slots % (parallel.pp * parallel.vp):
        raise ValueError(
            f"{slots} layers{' with the ends' if parallel.balanced_ends else ''} do not divide into "
            f"{parallel.pp} x {parallel.vp} stages; choose other pipeline sizes"
        )


def _check_messages(parallel: Parallel) -> None:
    """Raise ValueError for quantised messages where training refuses them."""
    if not parallel.messages.asked:
        return
    if parallel.fsdp or not parallel.distributed_optimizer or parallel.instances > 1:
        raise Refused(
            "--zero-quantized-gradients and --zero-quantized-weights are of one instance of the distributed optimizer; "
            "pass --use-distributed-optimizer, without FSDP and --num-distributed-optimizer-instances"
        )
    if parallel.messages.weights and parallel.precision == "float32":
        raise Refused("--zero-quantized-weights needs weights beside the optimizer's float32 ones; pass --bf16")
    if parallel.copies > 1:
        raise Refused(
            f"two copies of the model would be rounded apart by quantised messages, got {parallel.schedule_name}; take "
            f"another --pp-schedule"
        )


def _check_sliced(model: Transformer, parallel: Parallel) -> None:
    if parallel.slices == 1:
        return
    if parallel.pp == 1 or parallel.schedule is None:
        raise Refused(f"{parallel.slices} slices of a sequence need a pipeline and --pp-schedule; add 1f1b, or take 1")
    check_slices(SCHEDULES.get(parallel.schedule), parallel.slices)
    if model.experts or model.latent or model.mtp or BACKENDS.get(parallel.backend).capabilities.over_time:
        raise Refused(
            f"{parallel.slices} slices of a sequence do not go with experts, latent attention, multi-token prediction "
            f"and attention in chunks over time (--cp-comm-type {parallel.backend}); leave --pp-slices out"
        )


def _check_vocabulary(model: Transformer, parallel: Parallel) -> None:
    """Refuse beside a vocabulary over all ranks what no training with it does."""
    if not parallel.barriers:
        return
    if parallel.pp == 1 or parallel.schedule is None:
        raise Refused(
            "a vocabulary over all ranks needs a pipeline and --pp-schedule; add 1f1b, or leave --pp-vocab-parallel out"
        )
    check_vocabulary(SCHEDULES.get(parallel.schedule), parallel.barriers, parallel.slices, parallel.moves)
    unable = {
        "multi-token prediction": bool(model.mtp),
        "output layer and loss in chunks (--cp-loss-chunks)": parallel.loss_chunks is not None,
        "products in fp8": parallel.precision == "fp8",
        "fully sharded data parallelism": parallel.fsdp,
        "islands of replicas (--local-sgd-steps)": parallel.local_steps is not None,
    }
    if told := [what for what, asked in unable.items() if asked]:
        raise Refused(f"a vocabulary over all ranks does not go with {told[0]}; leave --pp-vocab-parallel out")


def _check_free_running(model: Transformer, parallel: Parallel) -> None:
    """Refuse with free-running ranks what makes the pipeline's ends wait for each other."""
    if not parallel.free_running:
        return
    check_free(parallel.schedule if parallel.pp > 1 else None)
    if model.tied or model.mtp:
        raise Refused(
            "--pp-free-running needs a model whose first and last stage share no weight, got tied embeddings or "
            "multi-token prediction; pass --untie-embeddings-and-output-weights, without --mtp-num-layers"
        )


def _check_copies(model: Transformer, parallel: Parallel) -> None:
    """Refuse with two copies of the model what no training with them does."""
    if parallel.copies == 1:
        return
    unable = {
        "multi-token prediction": bool(model.mtp),
        "activations that move (--pp-offload)": parallel.moves is not None,
        "fully sharded data parallelism": parallel.fsdp,
    }
    if told := [what for what, asked in unable.items() if asked]:
        raise Refused(f"{parallel.schedule} holds two copies of the model, without {told[0]}; take zb-v")
