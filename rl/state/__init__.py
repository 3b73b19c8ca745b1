"""What is trained, and what lasts: states, optimizer, reference, checkpoints."""
