"""Weights of our own models in the formats of others: Hugging Face, PEFT, MaxText."""
