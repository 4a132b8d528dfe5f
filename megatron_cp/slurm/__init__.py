"""From a recipe to a job of SLURM: the script that is submitted, the check of its nodes, and how it is requeued."""
