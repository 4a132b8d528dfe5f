"""Turn a recipe into a SLURM job: the script to submit, the check of its nodes, and its requeueing."""
