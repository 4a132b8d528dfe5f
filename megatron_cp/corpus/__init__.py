"""Preparing corpora: find files, read documents, turn them into token ids. Pure Python and numpy."""
