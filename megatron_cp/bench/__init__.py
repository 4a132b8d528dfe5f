"""Measuring: correctness first, then time, contenders side by side in one run."""
