"""Estimate the cost of a training run on described hardware. Pure Python."""
