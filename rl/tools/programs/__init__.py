"""`grpo compile`: the programs of a run, compiled for devices that need not be there."""
