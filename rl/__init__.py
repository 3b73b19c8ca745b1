"""Tandem: GRPO post-training in JAX, with interchangeable Linen and NNX policies."""
