"""Checkpoints: inspect, resume, overwrite, and clean up after a failed save."""
