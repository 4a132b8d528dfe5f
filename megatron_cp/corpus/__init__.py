"""Prepare corpora: find files, read documents, encode them as token ids. Pure Python and numpy."""
