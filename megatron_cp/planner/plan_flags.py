"""Flags of a recipe that a plan takes along into every split, and those in whose place it chooses."""

from typing import Any

from megatron_cp.planner.of_recipe import expert_copies_of, extras_of
from megatron_cp.recipe.recipe import Recipe

KEPT = {
    "--cp-placement": ("placement",),
    "--cp-keep-attention": ("keep_attention",),
    "--cp-latent": ("latent",),
    "--cp-loss-chunks": ("loss_chunks",),
    "--mlp-chunks-for-training": ("mlp_chunks",),
    "--expert-tensor-parallel-size": ("etp",),
    "--moe-placement": ("expert_copies",),
    "--no-overlap-p2p-communication": ("overlap_p2p",),
    "--use-megatron-fsdp": ("fsdp", "fp32_grads"),
    "--use-torch-fsdp2": ("fsdp", "fp32_grads"),
    "--data-parallel-sharding-strategy": ("sharding",),
    "--num-distributed-optimizer-instances": ("instances",),
    "--local-sgd-steps": ("local_steps",),
    "--local-sgd-outer": ("outer_bytes",),
    "--fp8-param-gather": ("fp8_params",),
    "--grad-reduce-in-bf16": ("fp32_grads",),
    "--use-precision-aware-optimizer": ("state_bytes",),
    "--optimizer-state-dir": ("state_dir", "state_weights"),
}
"""Flags that every split has as the recipe has them, and the fields of `Parallel` that they set."""

CHOSEN = frozenset(
    f"--{name}"
    for name in """
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    hierarchical-context-parallel-sizes cp-comm-type micro-batch-size global-batch-size
    recompute-granularity recompute-method recompute-num-layers recompute-modules recompute-activations
    num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank pipeline-model-parallel-layout
    decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pp-schedule pp-placement pp-slices
    pp-vocab-parallel pp-offload pp-offload-to pp-free-running tp-comm-type tp-grid tp-engine tp-comm-overlap
    moe-comm-type moe-pieces moe-ranks-per-node moe-group-ranks moe-gather fp8-format fp16
    """.split()
)
"""Flags in whose place a plan has its own choice, by its options or by the search."""

OF_STEPS = frozenset({"--moe-degrees", "--moe-tuning"})
"""Flags of an exchange that a run chooses anew in each step, which no plan has."""


def kept(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of `Parallel` that a recipe's flags set in every split; ValueError for a value unknown."""
    found = extras_of(recipe)
    given = [fields for flag, fields in KEPT.items() if flag in recipe.model_args]
    fields = {field: found[field] for fields in given for field in fields}
    if found["expert_copies"].asked and fields.get("etp") is None:
        # copies are of whole experts
        fields["etp"] = 1
    return fields


def chosen(recipe: Recipe) -> dict[str, str]:
    """Return the flags of a recipe, with their values, in whose place a plan has its own choice."""
    flags = CHOSEN | OF_STEPS
    # of copies it is kept
    flags |= frozenset() if expert_copies_of(recipe).asked else {"--moe-cluster"}
    return {flag: setting.text for flag, setting in recipe.model_args.items() if flag in flags}
