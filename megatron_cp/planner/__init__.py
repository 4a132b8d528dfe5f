"""What a run will cost: descriptions of hardware, and simulation of what ranks do on it. Pure Python."""
