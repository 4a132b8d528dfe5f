"""Name the flags of a recipe that change a step's time or memory and that the estimate does not model."""

from megatron_cp.recipe.recipe import Recipe

FLAGS = tuple(
    f"--{name}"
    for name in (
        "recompute-modules pipeline-model-parallel-layout decoder-first-pipeline-num-layers "
        "decoder-last-pipeline-num-layers use-torch-fsdp2 optimizer-cpu-offload cpu-offloading "
        "fine-grained-activation-offloading use-precision-aware-optimizer window-size mtp-num-layers "
        "multi-latent-attention expert-tensor-parallel-size fp4-format hybrid-layer-pattern delay-wgrad-compute "
        "overlap-moe-expert-parallel-comm num-distributed-optimizer-instances pp-memory-limit pp-costs "
        "experimental-attention-variant cuda-graph-impl"
    ).split()
)


def unmodelled(recipe: Recipe) -> list[str]:
    """Return the flags with their values, in the order of the recipe."""
    given = recipe.model_args
    found = [flag for flag in given if flag in FLAGS]
    if recipe.flag("--recompute-method", "") == "block":
        found.append("--recompute-method")
    if "--cp-comm-type" in given and len(set(recipe.flag("--cp-comm-type", "").split())) > 1:
        found.append("--cp-comm-type")
    return [f"{flag} {given[flag].text}".strip() for flag in found]
