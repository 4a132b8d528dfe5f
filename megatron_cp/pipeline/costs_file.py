"""Costs in a file, YAML or JSON: `--pp-profile-steps` writes it and `--pp-costs` reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_cp.errors import Refused
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.placement import Placement
from megatron_cp.registry import suggest

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PerStage = Annotated[list[Positive], Field(min_length=2)]
Size = Annotated[int, Field(gt=0)]
MIB = 2**20


class StageCosts(NamedTuple):
    """One stage and microbatch: seconds of F, I and W, bytes from F to I, and the part of them that stays until W."""

    forward: float
    input: float
    weight: float
    kept: float
    held: float


class Model(BaseModel):
    """The model that the costs were measured with, by Megatron's arguments; a field that is left out is not compared.

    layout: the layers of each stage, where they are not spread evenly
    """

    model_config = ConfigDict(extra="forbid")

    num_layers: Size
    hidden_size: Size
    seq_length: Size
    micro_batch_size: Size
    tensor_model_parallel_size: Size
    context_parallel_size: Size
    pipeline_model_parallel_size: Size
    virtual_pipeline_model_parallel_size: Size
    expert_model_parallel_size: Size | None = None
    ffn_hidden_size: Size | None = None
    num_experts: int | None = None
    params_dtype: str | None = None
    recompute_granularity: str | None = None
    layout: str | None = None

    def difference(self, other: "Model") -> str | None:
        """Return the first field that both name and that differs."""
        given = self.model_dump(exclude_none=True)
        return next((name for name, value in given.items() if value != getattr(other, name)), None)


class CostsFile(BaseModel):
    """Costs of every stage for one microbatch, stages in global order.

    T_F, T_I, T_W: forward, input gradient and weight gradient, in milliseconds
    T_comm:        one hop between neighbouring ranks, in milliseconds
    T_move:        moving M_B of the fullest rank away, or back, in milliseconds
    M_B, M_W:      activations from F to I, and the part of them kept until W, in MiB; M_W is M_B when left out
    """

    model_config = ConfigDict(extra="forbid")

    model: Model
    T_F: PerStage
    T_I: PerStage
    T_W: PerStage
    T_comm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    T_move: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    M_B: PerStage
    M_W: Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=2)] | None = None

    def costs(self, placement: Placement) -> Costs:
        """Return the costs for the simulator; M_B, the unit of caps, is what the fullest rank keeps of a microbatch.

        Raises ValueError where the stages are not those of `placement`, or M_W is above M_B.
        """
        stages = len(placement.rank_of)
        held = self.M_W or self.M_B
        for name, values in (("T_F", self.T_F), ("T_I", self.T_I), ("T_W", self.T_W), ("M_B", self.M_B), ("M_W", held)):
            if len(values) != stages:
                raise Refused(f"{name} is of {len(values)} stages, the run has {stages}")
        unit = max(sum(self.M_B[stage] for stage in mine) for mine in placement.of_rank)
        return Costs(
            forward=tuple(self.T_F),
            input=tuple(self.T_I),
            weight=tuple(self.T_W),
            comm=self.T_comm,
            kept=tuple(self.M_B),
            held=tuple(held),
            unit=unit,
            move=self.T_move or 0.0,
        )


def of_stages(
    model: Model, stages: Sequence[StageCosts], hop: float, move: float = 0.0, placement: Placement | None = None
) -> CostsFile:
    """Return the costs from the measured stages and the seconds of a hop, and of moving a byte under a placement."""
    fullest = max(sum(stages[stage].kept for stage in mine) for mine in placement.of_rank) if placement else 0.0
    return CostsFile(
        model=model,
        T_F=[stage.forward * 1e3 for stage in stages],
        T_I=[stage.input * 1e3 for stage in stages],
        T_W=[stage.weight * 1e3 for stage in stages],
        T_comm=hop * 1e3,
        T_move=move * fullest * 1e3 if move else None,
        M_B=[stage.kept / MIB for stage in stages],
        M_W=[stage.held / MIB for stage in stages],
    )


def read(file: Path) -> CostsFile:
    """Return the costs in `file`; raises ValueError in one line for what cannot be read or is no cost."""
    from ruamel.yaml import YAML

    from megatron_cp.yaml_file import parse

    content = parse(file, YAML(typ="safe").load)
    if not isinstance(content, Mapping):
        raise Refused(f"{file}: costs are a mapping of {', '.join(CostsFile.model_fields)}")
    try:
        return CostsFile.model_validate(content)
    except ValidationError as invalid:
        raise Refused(f"{file}: {_first(invalid.errors()[0])}") from None


def _first(error: Any) -> str:
    """Return the fault of one entry in one line."""
    place, name = ".".join(map(str, error["loc"])), str(error["loc"][-1])
    if error["type"] == "extra_forbidden":
        known = (Model if len(error["loc"]) > 1 else CostsFile).model_fields
        return f"unknown entry {place}{suggest(name, known)}; known: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{place} is missing"
    rule = error["msg"].replace("Input should be", "must be").replace("List should", "must")
    return f"{place} {rule}, got {error['input']!r}"


def write(file: Path, costs: CostsFile, steps: int) -> None:
    """Write the costs of `steps` measured steps so that `read` gives back the same numbers."""
    from ruamel.yaml import YAML

    file.parent.mkdir(parents=True, exist_ok=True)
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.width = 10_000
    with file.open("w", encoding="utf-8") as stream:
        stream.write(f"# measured over {steps} steps; times in ms, activations in MiB, per stage and microbatch\n")
        yaml.dump(costs.model_dump(exclude_none=True), stream)


def refuse_other_model(file: Path, costs: CostsFile, model: Model) -> None:
    """Raise ValueError when the costs were measured with another model, or cut otherwise."""
    name = costs.model.difference(model)
    if name:
        raise Refused(
            f"--pp-costs {file} holds for {name} = {getattr(costs.model, name)}, got {getattr(model, name)}; "
            f"measure again with --pp-profile-steps"
        )
