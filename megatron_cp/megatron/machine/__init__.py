"""The machine of a rank: facts about it, a CPU in place of a GPU, and environment variables."""
