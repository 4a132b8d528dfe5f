"""Recipes: one YAML file, rendered into Megatron's flags and a launch command."""
