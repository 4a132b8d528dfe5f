"""Bounds of the caches whose keys hold layouts and masks: few of these are in use at a time, many pass by in a run."""

LAYOUTS = 64
"""Results for a layout and a mask, or for the sizes that make one: one or two for each kind of layer."""

PAIRS = 4096
"""Results for two ranks, two windows of ranks or two segments of one layout: all pairs of 64 ranks."""
