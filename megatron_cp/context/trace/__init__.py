"""One run of a backend's loop as records: prove it, cost it, follow its critical path."""
