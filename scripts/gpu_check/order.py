"""All steps in their order; a step imports what it needs in its own process, so that a package that is missing costs
the steps that need it.
"""

from collections.abc import Iterable

from gpu_check.steps import Step
from gpu_check.table import Row


def versions(device: str) -> Iterable[Row]:
    from gpu_check import machine

    return machine.versions(device)


def queue(device: str) -> Iterable[Row]:
    from gpu_check import machine

    return machine.queue(device)


def communicators(device: str) -> Iterable[Row]:
    from gpu_check import machine

    return machine.communicators(device)


def against_reference(device: str) -> Iterable[Row]:
    from gpu_check import kernels

    return kernels.against_reference(device)


def dropped(device: str) -> Iterable[Row]:
    from gpu_check import kernels

    return kernels.dropped(device)


def merges(device: str) -> Iterable[Row]:
    from gpu_check import kernels

    return kernels.merges(device)


def rates(device: str) -> Iterable[Row]:
    from gpu_check import kernels

    return kernels.rates(device)


def stream_k(device: str) -> Iterable[Row]:
    from gpu_check import products

    return products.stream_k(device)


def experts(device: str) -> Iterable[Row]:
    from gpu_check import experts as of_experts

    return of_experts.experts(device)


def rank_plans(device: str) -> Iterable[Row]:
    from gpu_check import plans

    return plans.rank_plans(device)


def in_threads(device: str) -> Iterable[Row]:
    from gpu_check import plans

    return plans.in_threads(device)


def chunks(device: str) -> Iterable[Row]:
    from gpu_check import plans

    return plans.chunks(device)


def pipeline(device: str) -> Iterable[Row]:
    from gpu_check import training

    return training.pipeline(device)


def offload(device: str) -> Iterable[Row]:
    from gpu_check import moves

    return moves.offload(device)


def state_files(device: str) -> Iterable[Row]:
    from gpu_check import state

    return state.state_files(device)


def model(device: str) -> Iterable[Row]:
    from gpu_check import training

    return training.model(device)


def quickstart(device: str) -> Iterable[Row]:
    from gpu_check import training

    return training.quickstart(device)


def transformer_engine(device: str) -> Iterable[Row]:
    from gpu_check import training

    return training.transformer_engine(device)


def models(device: str) -> Iterable[Row]:
    from gpu_check import models as of_models

    return of_models.models(device)


def combined(device: str) -> Iterable[Row]:
    from gpu_check import combined as of_pairs

    return of_pairs.combined(device)


ONE, MANY = (("CUDA_DEVICE_MAX_CONNECTIONS", count) for count in ("1", "8"))
# what decides most comes first; seconds are limits, of which a GPU needs a part; flash-attn 4 compiles at first calls
STEPS = (
    Step("versions", versions, 20),
    Step("kernels", against_reference, 120),
    Step("queue, one", queue, 15, (ONE,)),
    Step("queue, eight", queue, 15, (MANY,)),
    Step("rank plans", rank_plans, 120),
    Step("merges", merges, 30),
    Step("rates", rates, 90),
    Step("stream-k", stream_k, 60),
    Step("experts", experts, 60),
    Step("dropout", dropped, 90),
    Step("backends", in_threads, 60),
    Step("chunks", chunks, 20),
    Step("pipeline", pipeline, 30),
    Step("offload", offload, 40),
    Step("state files", state_files, 40),
    Step("quickstart", quickstart, 150),
    Step("model", model, 90),
    Step("TE", transformer_engine, 60),
    Step("models", models, 180),
    Step("combined", combined, 180),
    Step("communicators", communicators, 20),
)
