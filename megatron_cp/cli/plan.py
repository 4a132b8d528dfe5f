"""`megatron-cp plan`: find the parallel sizes that train a model fastest on a number of GPUs of a cluster."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from megatron_cp import config
from megatron_cp.cli.estimate import loaded_experts
from megatron_cp.cli.importing import load
from megatron_cp.cli.options import ExpertLoads, Skew
from megatron_cp.experts import EXCHANGES, PIPELINED, TUTEL
from megatron_cp.experts import MEGATRONS as MEGATRONS_EXCHANGE
from megatron_cp.experts.degree import check_pieces
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.plan_request import CONTEXT, HEADROOM, SCHEDULED, FixedSizes
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from megatron_cp.registry import suggest, unknown
from megatron_cp.tensor import AUTO, MEGATRONS, SCHEMES
from megatron_cp.units import count

if TYPE_CHECKING:
    from megatron_cp.planner.estimate import Estimate
    from megatron_cp.planner.plans import Plans

PLANNED = {"bf16": "bfloat16", "fp8": "fp8"}


def plan(
    seq: Annotated[str, typer.Option(help="Tokens in a sequence, such as 131072 or 128K.")],
    gpus: Annotated[str, typer.Option(help="How many GPUs; the plan uses all.")],
    cluster: Annotated[str, typer.Option(help="A cluster of configs/clusters, or a file.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND…]", help="The training command, or script, of the model, without --model."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model of configs/models, such as llama3.1-8b, or a recipe file.")
    ] = None,
    tokens_per_batch: Annotated[str, typer.Option(help="Tokens of a step, such as 4M.")] = "4M",
    top: Annotated[int, typer.Option(min=1, help="How many plans to show.")] = 10,
    backends: Annotated[str, typer.Option(help="Context-parallel algorithms to weigh, with commas.")] = ",".join(
        CONTEXT
    ),
    schedules: Annotated[str, typer.Option(help="Pipeline schedules to weigh, with commas.")] = ",".join(SCHEDULED),
    tp_schemes: Annotated[
        str,
        typer.Option(
            help=f"Schemes of tensor parallelism to weigh, with commas, or {AUTO} for all; others than {MEGATRONS} "
            "need --transformer-impl local, which the plan's recipe says."
        ),
    ] = MEGATRONS,
    tp_comm_overlap: Annotated[
        bool,
        typer.Option(
            "--tp-comm-overlap", help="Let TransformerEngine's linears overlap their communication, where they can."
        ),
    ] = False,
    pp_offload: Annotated[
        bool, typer.Option("--pp-offload", help="Weigh activations on the host too, where memory is short.")
    ] = False,
    optimizer_state_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Keep Adam's moments and float32 weights in files in DIR, on the node's disk."
        ),
    ] = None,
    pp_slices: Annotated[
        str, typer.Option(help="Numbers of slices of a sequence to weigh beside whole sequences, with commas.")
    ] = "",
    pp_vocab_parallel: Annotated[
        str,
        typer.Option(
            help="Weigh LM head and embedding over all pipeline ranks, with these numbers of barriers, with commas."
        ),
    ] = "",
    moe_exchanges: Annotated[
        str,
        typer.Option(
            help=f"Exchanges of experts to weigh beside Megatron's dispatchers, with commas, or {AUTO} for all."
        ),
    ] = "",
    moe_pieces: Annotated[
        str, typer.Option(help="Numbers of pieces of routed tokens to weigh beside whole microbatches, with commas.")
    ] = "",
    skew: Skew = 0.0,
    expert_loads: ExpertLoads = None,
    tp: Annotated[
        int | None,
        typer.Option("--tp", "--tensor-model-parallel-size", min=1, help="Fix TP; a size not given is searched."),
    ] = None,
    cp: Annotated[int | None, typer.Option("--cp", "--context-parallel-size", min=1, help="Fix CP.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", "--pipeline-model-parallel-size", min=1, help="Fix PP.")] = None,
    dp: Annotated[int | None, typer.Option("--dp", min=1, help="Fix DP.")] = None,
    ep: Annotated[int | None, typer.Option("--ep", "--expert-model-parallel-size", min=1, help="Fix EP.")] = None,
    vp: Annotated[
        int | None, typer.Option("--vp", "--num-virtual-stages-per-pipeline-rank", min=1, help="Fix chunks of a rank.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch-size", min=1, help="Fix it.")] = None,
    headroom: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of a GPU's memory to leave free, the estimate's own error.")
    ] = HEADROOM,
    precision: Annotated[str, typer.Option(help=f"Of the products: {' or '.join(PLANNED)}.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the best plan as a recipe.")] = None,
) -> None:
    """Enumerate the splits of ranks, leave out those that rules or memory forbid, rank the rest by estimated speed."""
    from megatron_cp.planner.model import model_of
    from megatron_cp.planner.of_recipe import messages_of
    from megatron_cp.planner.plan_flags import chosen, kept
    from megatron_cp.planner.plan_request import PlanRequest, sequences
    from megatron_cp.planner.search import search
    from megatron_cp.planner.unmodelled import unmodelled

    if precision not in PLANNED:
        raise unknown("precision", precision, PLANNED)
    if bool(command) == bool(model):
        raise ValueError("name the model by --model, or by the command that trains it, after --; give one of the two")
    if command and write:
        raise ValueError("--write extends a recipe; make one of the command first: megatron-cp import --write FILE …")
    words = command or [model_source(model or "")]
    if write and write.exists():
        raise ValueError(f"{write} exists; name another file or remove it")
    if write and not write.parent.is_dir():
        raise ValueError(f"no folder {write.parent} to write {write.name} to; make it first")
    tokens, length, ranks = count(tokens_per_batch, "--tokens-per-batch"), count(seq, "--seq"), count(gpus, "--gpus")
    if 2 * tokens < length:
        raise ValueError(f"--tokens-per-batch {tokens:,} must be at least a sequence of {length:,} tokens; raise it")
    run = load(words[0], Unset(config.environment()), words[1:])
    loaded = loaded_experts(
        model_of(run),
        skew,
        expert_loads,
        run.number("--expert-model-parallel-size", 1),
        run.number("--expert-tensor-parallel-size", 1),
    )
    request = PlanRequest(
        model=loaded,
        seq=length,
        gpus=ranks,
        cluster=load_cluster(cluster),
        global_batch=sequences(tokens, length, ranks),
        backends=tuple(backends.replace(",", " ").split()),
        schedules=tuple(schedules.replace(",", " ").split()),
        offload=pp_offload,
        slices=tuple(count(one, "--pp-slices") for one in pp_slices.replace(",", " ").split()),
        barriers=tuple(count(one, "--pp-vocab-parallel") for one in pp_vocab_parallel.replace(",", " ").split()),
        tensor=_tensor_schemes(tp_schemes),
        tp_overlap=tp_comm_overlap,
        exchanges=_exchanges(moe_exchanges),
        pieces=tuple(check_pieces(count(one, "--moe-pieces")) for one in moe_pieces.replace(",", " ").split()),
        messages=messages_of(run),
        kept=kept(run),
        state_dir=optimizer_state_dir,
        precision=PLANNED[precision],
        fixed=FixedSizes(tp=tp, cp=cp, pp=pp, dp=dp, ep=ep, vp=vp, micro_batch=micro_batch),
        headroom=headroom,
    )
    # imports torch: after all that may be refused
    from megatron_cp.context.trace.record import record

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("weighing splits", total=1.0)
        found = search(request, record, top, lambda share: bar.update(task, completed=share))
    if as_json:
        typer.echo(json.dumps([_plain(one) for one in found.options], indent=2))
    else:
        _show(found)
    if replaced := chosen(run):
        given = ", ".join(f"{flag} {value}".strip() for flag, value in replaced.items())
        typer.echo(f"the plan's own choice in the place of the recipe's: {given}", err=as_json)
    if left_out := unmodelled(run):
        # the JSON is a list of plans alone
        typer.echo(f"not in the estimate: {', '.join(left_out)}", err=as_json)
    if write:
        _write(found.best, words[0], replaced, write)


def _tensor_schemes(text: str) -> tuple[str, ...]:
    names = [SCHEMES.get(name).name for name in text.replace(",", " ").split()]
    known = [name for name in SCHEMES.names if name != AUTO]
    # Megatron's own is what remains where others do not pay
    return tuple(known if AUTO in names else dict.fromkeys([MEGATRONS, *names]))


def _exchanges(text: str) -> tuple[str, ...]:
    words = text.replace(",", " ").split()
    asked = [EXCHANGES.get(name).name for name in words]
    names = EXCHANGES.names if TUTEL in asked else asked
    # pieces of Megatron's exchange are pipelined, and cost as much where reductions wait for them
    known = (MEGATRONS_EXCHANGE, PIPELINED, TUTEL)
    return tuple(name for name in dict.fromkeys(names) if name not in known and not EXCHANGES.get(name).first)


def model_source(model: str) -> str:
    """Return the recipe that describes a model: a shipped one's name, or the path of a file."""
    if model in (known := _models()):
        return f"models/{model}"
    if Path(model).is_file():
        return str(Path(model).resolve())
    raise ValueError(
        f"no model {model!r} in configs/models{suggest(model, known)}; give a file or one of: {', '.join(known)}"
    )


def _models() -> list[str]:
    return [path.removeprefix("models/") for path in recipe.shipped("models") if path != "models/llama"]


def _plain(one: "Estimate") -> dict[str, Any]:
    parallel = one.parallel
    names = ("tp", "cp", "backend", "pp", "vp", "dp", "ep", "micro_batch", "global_batch", "recompute")
    return {
        **{name: getattr(parallel, name) for name in names},
        "grid": list(parallel.grid.sizes) if parallel.grid else None,
        "schedule": parallel.schedule_name,
        **({"pp_offload": parallel.moves.limit} if parallel.moves else {}),
        **({"pp_slices": parallel.slices} if parallel.slices > 1 else {}),
        **({"pp_vocab_parallel": parallel.barriers} if parallel.barriers else {}),
        **({"tp_comm_type": parallel.tp_scheme} if parallel.tp_scheme != MEGATRONS else {}),
        **({"tp_grid": list(parallel.tp_grid)} if parallel.tp_grid else {}),
        **({"moe_dispatch": str(parallel.dispatch)} if one.model.experts else {}),
        **({"zero_quantized": parallel.messages._asdict()} if parallel.messages.asked else {}),
        "step_seconds": one.seconds,
        "tokens_per_second_per_gpu": one.tokens_per_s_per_gpu,
        "mfu": one.mfu,
        "memory_bytes": one.worst_memory.total,
        "bound_by": one.bound_by,
    }


def _show(found: "Plans") -> None:
    from megatron_cp.planner.plans import label

    # wide enough that no line of the table is broken
    request, console = found.request, Console(highlight=False, soft_wrap=True, width=max(110, Console().width))
    console.print(
        f"{request.model.name} on {request.gpus} GPUs of {request.cluster.name}, "
        f"{request.global_batch} sequences of {request.seq:,} tokens a step"
    )
    table = Table(Column("plan", no_wrap=True), "s/step", "tokens/s/GPU", "MFU", "GB")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in found.options:
        figures = (f"{one.seconds:.4g}", f"{one.tokens_per_s_per_gpu:,.0f}", f"{one.mfu:.1%}")
        table.add_row(label(one.parallel), *figures, f"{one.worst_memory.total / 1e9:.1f}")
    console.print(table)
    console.print(found.why)
    for line in [found.tensor_why, *found.experts_why]:
        if line:
            console.print(line)
    if smaller := found.smaller:
        took, most = (one.worst_memory.total / 1e9 for one in (smaller, found.best))
        console.print(
            f"{label(smaller.parallel)} takes {took:.1f} GB instead of {most:.1f} GB and "
            f"{smaller.seconds / found.best.seconds - 1:.1%} longer: take it where memory may be short"
        )
    if request.headroom and request.cluster.memory_bytes:
        free = request.headroom * request.cluster.memory_bytes / 1e9
        console.print(f"every plan leaves {free:.1f} of {request.cluster.memory_bytes / 1e9:.0f} GB free (--headroom)")
    rules = ", ".join(f"{name} ({number})" for name, number in found.left_out.most_common())
    console.print(f"{found.examined} splits weighed; left out by rules: {rules or 'none'}")


def _write(best: "Estimate", source: str, replaced: Iterable[str], file: Path) -> None:
    from megatron_cp.planner.plan_recipe import as_recipe

    file.write_text(as_recipe(best, source, replaced), encoding="utf-8")
    typer.echo(f"wrote {file}", err=True)
