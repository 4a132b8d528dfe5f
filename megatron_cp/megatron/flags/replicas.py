"""Flags of data parallelism."""

from dataclasses import dataclass

from megatron_cp.megatron.flags.flag import Flags, flag, one_of
from megatron_cp.replicas import AVERAGE, OUTERS, QUANTISATIONS, OuterOptimizer, Quantisation


@dataclass(frozen=True, kw_only=True)
class LocalSgdFlags(Flags):
    """Flags of islands of replicas, which are Megatron's --num-distributed-optimizer-instances."""

    prefix = "local_sgd"
    title = "Local SGD (megatron-cp)"

    steps: str | None = flag(
        None,
        lambda: "H|SCHEDULE",
        lambda: (
            "Let the instances of --num-distributed-optimizer-instances train apart, as islands that average weights "
            "and moments every H steps. STEP:H,STEP:H changes H at these steps, the first of which is 1: 1:1,1001:8."
        ),
    )
    spread: float | None = flag(
        None,
        lambda: "SHARE",
        lambda: (
            "With --local-sgd-steps, average only where a sample of the weights is farther apart than this share of "
            "their norm, but always where weights are saved, evaluated or final; by default at each of these steps."
        ),
        float,
    )
    outer: str = flag(
        AVERAGE,
        lambda: one_of(*OUTERS.names),
        lambda: (
            "With --local-sgd-steps, what islands go on from: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in OUTERS)
            + "."
        ),
    )
    outer_lr: float | None = flag(
        None,
        lambda: "RATE",
        lambda: f"Learning rate of --local-sgd-outer {_with_momentum('learning_rate')}.",
        float,
    )
    outer_momentum: float | None = flag(
        None,
        lambda: "DECAY",
        lambda: f"Momentum of --local-sgd-outer {_with_momentum('momentum')}.",
        float,
    )

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """The named one; ValueError for a name that is unknown."""
        return OUTERS.get(self.outer)

    @property
    def learning_rate(self) -> float:
        """The outer optimizer's; its own where none is given."""
        return self.outer_lr if self.outer_lr is not None else self.outer_optimizer.learning_rate or 0.0

    @property
    def decay(self) -> float:
        """The decay of the outer optimizer's momentum; its own where none is given."""
        return self.outer_momentum if self.outer_momentum is not None else self.outer_optimizer.momentum or 0.0


def _with_momentum(default: str) -> str:
    return ", ".join(f"{entry.name}, by default {getattr(entry, default)}" for entry in OUTERS if entry.remembers)


@dataclass(frozen=True, kw_only=True)
class QuantisedFlags(Flags):
    """Flags of quantised messages between replicas, with the names that DeepSpeed gives them."""

    prefix = "zero_quantized"
    title = "ZeRO++ (megatron-cp)"

    gradients: str | None = flag(
        None,
        lambda: one_of(*QUANTISATIONS.names),
        lambda: (
            "Reduce gradients over nodes in two hops, quantised but for those of norms, biases, embeddings, output "
            "layers, routers and experts; " + "; ".join(f"{entry.name}: {entry.what}" for entry in QUANTISATIONS) + "."
        ),
    )
    weights: bool = flag(
        False,
        lambda: "",
        lambda: "Gather weights over nodes in two hops, in int8 but for the same; optimizers keep them in float32.",
        bool,
    )
    ranks_per_node: int | None = flag(
        None,
        lambda: "N",
        lambda: "Ranks on a node for the two; by default as many as torchrun has started there.",
        int,
    )

    @property
    def asked(self) -> bool:
        """True if anything is quantised."""
        return self.gradients is not None or self.weights

    @property
    def of_gradients(self) -> Quantisation | None:
        """The named one; ValueError for a name that is unknown."""
        return None if self.gradients is None else QUANTISATIONS.get(self.gradients)


@dataclass(frozen=True, kw_only=True)
class StateFlags(Flags):
    """Flags of the optimizer's state in files."""

    prefix = "optimizer_state"
    title = "ZeRO-Infinity (megatron-cp)"

    dir: str | None = flag(
        None,
        lambda: "DIR",
        lambda: (
            "Keep Adam's moments in files in DIR, on a disk of the node, and step them by pieces with read-ahead. The "
            "files have no names and end with the run; checkpoints hold the moments as ever."
        ),
    )
    weights: bool = flag(
        False,
        lambda: "",
        lambda: "With --optimizer-state-dir, keep the float32 weights of a bf16 or fp16 model there too.",
        bool,
    )


@dataclass(frozen=True, kw_only=True)
class MlpFlags(Flags):
    """Flags of MLPs whose weights are gathered part by part."""

    prefix = "mlp"
    title = "MLPs in tiles (megatron-cp)"

    tiles: int | None = flag(
        None,
        lambda: "N",
        lambda: (
            "With --use-torch-fsdp2, cut the hidden units of every MLP into N tiles, which are gathered one after the "
            "other in the place of all weights of a layer. A checkpoint is of its number of tiles."
        ),
        int,
    )
