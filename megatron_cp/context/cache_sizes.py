"""Bounds of the caches that are keyed by layouts and masks, of which a run uses few at a time."""

LAYOUTS = 64
"""Results for a layout and a mask, or for the sizes that make one: one or two for each kind of layer."""

PAIRS = 4096
"""Results for two ranks, two windows of ranks or two segments of one layout: as many as 64 ranks have pairs."""
