"""Refuse beside `--pp-free-running` all that makes ranks of a pipeline wait for each other in every step."""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import read
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.pipeline.steady import FLAG, check_free


class StepWait(NamedTuple):
    """A wait of pipeline ranks for each other in every step.

    flag:  that brings it, or whose absence does
    asked: returns the flag's value where a run has that wait, True for a flag without a value, else None or False
    what:  the ranks wait for
    """

    flag: str
    asked: Callable[[Any], Any]
    what: str
    way_out: str


def _given(name: str) -> Callable[[Any], Any]:
    return lambda args: read(args, name)


def _balancing(args: Any) -> bool:
    logged = "aux_loss" in str(read(args, "moe_router_load_balancing_type", ""))
    return bool(read(args, "num_experts")) and (logged or read(args, "moe_z_loss_coeff") is not None)


WAITS = (
    StepWait("--clip-grad", _given("clip_grad"), "a norm of all gradients", "pass --clip-grad 0"),
    StepWait("--fp16", _given("fp16"), "each other's overflows", "pass --bf16"),
    StepWait("--loss-scale", _given("loss_scale"), "each other's overflows", "leave --loss-scale out"),
    StepWait(
        "embeddings tied by the lack of --untie-embeddings-and-output-weights",
        lambda args: not read(args, "untie_embeddings_and_output_weights", False),
        "the sum of both ends' gradients of the embedding",
        "pass --untie-embeddings-and-output-weights",
    ),
    StepWait(
        "--calculate-per-token-loss",
        _given("calculate_per_token_loss"),
        "the last one's number of tokens",
        "leave --calculate-per-token-loss out",
    ),
    StepWait(
        "--num-experts",
        lambda args: _balancing(args) and read(args, "num_experts"),
        "the auxiliary losses in the log",
        "pass --moe-router-load-balancing-type none, without --moe-z-loss-coeff",
    ),
    StepWait(
        "--mtp-num-layers",
        _given("mtp_num_layers"),
        "the gradients of the embedding that its layers share",
        "leave --mtp-num-layers out",
    ),
    StepWait(
        "--dsa-indexer-loss-coeff",
        _given("dsa_indexer_loss_coeff"),
        "the losses of indexers in the log",
        "pass --dsa-indexer-loss-coeff 0",
    ),
    StepWait(
        "--dataloader-inter-document-masking",
        _given("dataloader_inter_document_masking"),
        "the lengths of documents in the log",
        "leave --dataloader-inter-document-masking out",
    ),
    StepWait("--sft", _given("sft"), "the lengths of documents in the log", "leave --sft out"),
    StepWait(
        "--log-num-zeros-in-grad",
        _given("log_num_zeros_in_grad"),
        "the number of zeros in the log",
        "leave --log-num-zeros-in-grad out",
    ),
    StepWait("--log-params-norm", _given("log_params_norm"), "the norm in the log", "leave --log-params-norm out"),
    StepWait(
        "--exit-signal-handler",
        _given("exit_signal_handler"),
        "the signals that others got",
        "leave --exit-signal-handler out and save often, with --save-interval",
    ),
    StepWait(
        "--exit-duration-in-mins",
        _given("exit_duration_in_mins"),
        "the time that others have run",
        "pass --exit-interval with a number of steps",
    ),
    StepWait(
        "--timing-log-level",
        lambda args: read(args, "barrier_with_L1_time", True) and read(args, "timing_log_level", 0),
        "the start of every timer",
        "pass --no-barrier-with-level-1-timing",
    ),
)


def check_free_running(args: Any) -> None:
    """Refuse what makes free-running ranks wait in every step; ValueError with the flag, its value and a way out."""
    flags = PipelineFlags.of(args)
    if not flags.free_running:
        return
    check_free(flags.schedule)
    for wait in WAITS:
        if value := wait.asked(args):
            given = wait.flag if value is True else f"{wait.flag} {value:g}"
            raise Refused(
                f"{FLAG} does not go with {given}, for which ranks wait in every step for {wait.what}; {wait.way_out}"
            )
