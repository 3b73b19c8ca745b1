"""Training states, optimizer, reference, checkpoints, export."""
