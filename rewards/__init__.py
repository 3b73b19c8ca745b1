"""Rewards: the contract of a reward function, the isolated runner, the rubric, and ready-made functions.

Pure Python. Nothing here imports jax or `rl`, so that a reward worker starts in a fraction of a second.
"""
