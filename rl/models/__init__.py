"""Decoder language models: shared pure ops, a Linen twin, an NNX twin, and Hugging Face weights in and out."""
