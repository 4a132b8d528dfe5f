"""The machine that a rank runs on: a CPU in place of a GPU, and the environment that a launcher leaves."""
