"""Data rows become prompts of token ids."""
