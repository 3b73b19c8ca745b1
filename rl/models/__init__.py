"""Decoder language models: shared pure ops, a Linen twin, an NNX twin, and readers and writers of weights."""
