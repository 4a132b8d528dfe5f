"""Render recipes, one YAML file each, to Megatron's flags and a launch command."""
