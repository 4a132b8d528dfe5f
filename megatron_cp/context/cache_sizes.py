"""Bounds of the caches that are keyed by layouts and masks, of which a run uses few at a time."""

LAYOUTS = 64
"""Results for a layout and a mask, or for the sizes that make one: one or two for each kind of layer."""

PAIRS = 4096
"""Results for two ranks, two windows of ranks or two segments of one layout: as many as 64 ranks have pairs."""

GROUPS = 256
"""Results for a group of ranks of one layout: every group of a grid of 256 ranks."""

TRACES = 256
"""Recorded problems: every backend on every grid of a number of ranks, for a few numbers of heads."""
