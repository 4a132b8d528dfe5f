"""Flags of pipeline schedules."""

from dataclasses import dataclass

from megatron_cp.megatron.flags.flag import Flags, flag, one_of
from megatron_cp.pipeline import SCHEDULES, TABLE_FILE, on_v
from megatron_cp.pipeline.offload import AUTO as LIMIT_FROM_MEMORY
from megatron_cp.pipeline.offload import Offload, limit_of
from megatron_cp.pipeline.placement import ONE_PIPE
from megatron_cp.pipeline.schedule import HOST, MOVE_TARGETS, PEER


@dataclass(frozen=True, kw_only=True)
class PipelineFlags(Flags):
    """Flags of pipeline schedules; without a schedule everything is left to Megatron."""

    prefix = "pp"
    title = "pipeline schedules (megatron-cp)"

    schedule: str | None = flag(
        None,
        lambda: one_of(*SCHEDULES.names),
        lambda: (
            "Order of forwards and backwards over the pipeline, instead of Megatron's own: "
            + "; ".join(f"{rule.name}: {rule.what}" for rule in SCHEDULES)
            + f"; {TABLE_FILE}FILE: a table of your own, as simulate --table takes it. "
            "Chunks per rank come from --num-virtual-stages-per-pipeline-rank and its kin."
        ),
    )
    placement: str | None = flag(
        None,
        lambda: one_of(*ONE_PIPE),
        lambda: (
            "With --pp-schedule auto, whether stages go around the ranks, which is the default, or down and up again."
        ),
    )
    costs: str | None = flag(
        None,
        lambda: "FILE",
        lambda: (
            "With --pp-schedule auto, the times and activations of every stage that it schedules for: YAML or JSON, "
            "as --pp-profile-steps writes it."
        ),
    )
    profile_steps: int | None = flag(
        None,
        lambda: "STEPS",
        lambda: (
            "With --pp-schedule auto and without --pp-costs, measure them in the first steps, at least 2, schedule "
            "for them from then on, and leave them beside the checkpoints of --save."
        ),
        int,
    )
    memory_limit: float | None = flag(
        None,
        lambda: "M_B",
        lambda: (
            "Most activations of a rank, in what its layers keep of one microbatch (M_B): auto stays below it, a "
            "fixed schedule that needs more is refused."
        ),
        float,
    )
    offload: str | None = flag(
        None,
        lambda: "CHUNKS",
        lambda: (
            "Keep the activations of at most so many chunks on a rank, from their forward to their backward; those "
            f"needed last move away meanwhile. {LIMIT_FROM_MEMORY}: the most that fit under --pp-memory-limit."
        ),
    )
    offload_to: str | None = flag(
        None,
        lambda: one_of(*MOVE_TARGETS),
        lambda: (
            "Where --pp-offload moves them: to the host's memory, which is the default, or to the peer, the rank as "
            "far from the other end of the pipeline."
        ),
    )

    vocab_parallel: int | None = flag(
        None,
        lambda: "{1,2}",
        lambda: (
            "With any --pp-schedule but "
            + ", ".join(rule.name for rule in SCHEDULES if rule.no_vocabulary)
            + ": the rows of the LM head, its loss and the rows of the embedding over all ranks of the pipeline, which "
            "wait for each other 1 or 2 times in every microbatch. 1 keeps fewer activations and needs the memory of a "
            "sum of all ranks' gradients on the last one."
        ),
        int,
    )
    slices: int | None = flag(
        None,
        lambda: "K",
        lambda: (
            "Send every sequence through the pipeline in K slices of about equal cost, which shorten the bubble and "
            "the activations of the first ranks: with "
            + ", ".join(rule.name for rule in SCHEDULES if rule.takes_slices)
            + "."
        ),
        int,
    )
    free_running: bool = flag(
        False,
        lambda: "",
        lambda: (
            "With --pp-schedule "
            + ", ".join(rule.name for rule in SCHEDULES if rule.delay)
            + ", let every rank of the pipeline begin its next step without waiting for the update of the others. "
            "There is no norm of all gradients any more, neither to clip by nor in the log; whether a step has "
            "succeeded, and the learning rate in the log, are each rank's own. Losses and weights stay what they are. "
            "Ranks still wait for each other wherever the run logs, evaluates or saves."
        ),
        bool,
    )

    @property
    def sliced(self) -> bool:
        """True if sequences are cut."""
        return self.slices is not None and self.slices > 1

    @property
    def moves(self) -> Offload | None:
        """The limit of chunks and the target; ValueError for what is no limit."""
        return None if self.offload is None else Offload(limit_of(self.offload), self.offload_to or HOST)

    @property
    def moves_activations(self) -> bool:
        """True if activations leave a rank between forward and backward."""
        return self.offload is not None or (self.schedule is not None and SCHEDULES.get(self.schedule).lends)

    @property
    def lends(self) -> bool:
        """True if they go to another rank."""
        return self.moves_activations and (self.offload is None or self.offload_to == PEER)

    @property
    def on_v(self) -> bool:
        """True if the schedule places stages on the V."""
        return on_v(self.schedule, self.placement)

    @property
    def two_copies(self) -> bool:
        """True if the schedule sends microbatches through two copies of the model."""
        return self.schedule is not None and SCHEDULES.get(self.schedule).two_copies

    @property
    def without_flush(self) -> bool:
        """True if a schedule is asked for whose steps end without a flush; ValueError for a name unknown."""
        return self.schedule is not None and SCHEDULES.get(self.schedule).delay is not None

    @property
    def splits(self) -> bool:
        """True if the schedule splits backwards into input and weight gradients."""
        return self.schedule is not None and SCHEDULES.get(self.schedule).split
