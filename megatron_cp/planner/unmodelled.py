"""Name the flags of a recipe that change a step's time or memory and that the estimate does not model."""

from collections.abc import Iterator

from megatron_cp.experts import EXCHANGES, GSHARD, MEGATRONS, ROUTERS, TUTEL
from megatron_cp.planner.flags import ASSUMED, FREE, MODELLED
from megatron_cp.planner.work import MODULES
from megatron_cp.recipe.recipe import Recipe

OUR_SPEC = "megatron_cp."


def unmodelled(recipe: Recipe) -> list[str]:
    """Return the flags with their values, in the order of the recipe."""
    return [
        f"{flag} {recipe.model_args[flag].text}".strip() for flag in recipe.model_args if _is_left_out(recipe, flag)
    ]


def _is_left_out(recipe: Recipe, flag: str) -> bool:
    text = recipe.model_args[flag].text
    if flag == "--spec":
        return not text.startswith(OUR_SPEC)
    if flag in MODELLED:
        return flag in _partly_modelled(recipe)
    return flag not in FREE and text not in ASSUMED.get(flag, ())


def _partly_modelled(recipe: Recipe) -> Iterator[str]:
    """Yield the modelled flags whose values here are not."""
    if len(set(recipe.flag("--cp-comm-type", "").split())) > 1:
        # one backend per layer; all are counted as the first
        yield "--cp-comm-type"
    if set(recipe.flag("--recompute-modules", "").split()) - set(MODULES):
        yield "--recompute-modules"
    if "m" in recipe.flag("--pipeline-model-parallel-layout", "").rpartition("|")[0]:
        # its layers are counted on the last stage
        yield "--pipeline-model-parallel-layout"
    exchange = EXCHANGES.get(recipe.flag("--moe-comm-type", MEGATRONS))
    if exchange.name == TUTEL or exchange.first:
        # counted as one exchange of whole microbatches, and reductions as if none waited
        yield "--moe-comm-type"
    if ROUTERS.get(recipe.flag("--moe-router", MEGATRONS)).name == GSHARD:
        # every second expert is counted, as if its chance were 1
        yield "--moe-router"
    if recipe.flag("--pipeline-model-parallel-size", "1") != "1":
        # parameters are spread evenly over the stages
        yield "--moe-layer-experts"
    if recipe.flag("--fp8-format", "") not in ("", "hybrid", "e4m3"):
        yield "--fp8-format"
