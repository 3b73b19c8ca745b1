"""Finds why an update was skipped: which of weights, advantages, loss and gradient is not finite.

In: a step's metrics, its advantages and the weights. Out: the cause with its way out, in words. It looks at the weights
on the host, array by array, so it runs only after a step without an update.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Finite, but far beyond anything that trains: results computed from such numbers soon leave float32.
_LARGE_ADVANTAGE, _LARGE_WEIGHT = 1e4, 1e6


def cause_of_skips(metrics: Mapping[str, float], params: Any, advantages: np.ndarray | None = None) -> str:
    """A message about what is not finite in a step without an update, and what to do.

    Args:
      metrics: `loss` and `grad_norm` of the step.
      params: the weights. Of arrays that are spread over processes, only this process's parts are looked at.
      advantages: the advantages of the step's completions; None in supervised training.
    """
    sizes = sizes_of(params)
    broken = [name for name, size in sizes.items() if not math.isfinite(size)]
    way_out = (
        "go on from an earlier checkpoint with a lower optimizer.lr, or, if no update was made yet, from another "
        "model.source"
    )
    if broken:
        return f"{len(broken)} arrays of weights are not finite (the first is {broken[0]}), so no loss is; {way_out}"
    if sizes and max(sizes.values()) > _LARGE_WEIGHT:
        name = max(sizes, key=lambda name: sizes[name])
        return f"weights go up to {sizes[name]:.3g} ({name}), for an update was too large; {way_out}"
    is_loss = not math.isfinite(metrics["loss"])
    what = "the loss is not finite" if is_loss else "the gradient is not finite, while the loss is"
    largest = 0.0 if advantages is None else float(np.abs(advantages).max(initial=0.0))
    if largest > _LARGE_ADVANTAGE:
        return (
            f"the weights are finite, {what}, and advantages go up to {largest:.3g}: rewards are too large; lower the "
            "weight of their function in rewards.functions, or set grpo.scale_rewards=group"
        )
    if advantages is None:
        return f"the weights are finite, {what}: activations overflow; set model.dtype=float32, or lower optimizer.lr"
    return (
        f"weights and advantages are finite, {what}: log-probs or activations overflow; set model.dtype to float32, "
        "lower optimizer.lr, or raise grpo.beta"
    )


def sizes_of(params: Any) -> dict[str, float]:
    """{name: the largest absolute value} of each floating-point array of a pytree, in this process's parts; NaN where
    the array holds one.
    """

    def size(array: jax.Array) -> float:
        parts = [np.asarray(shard.data) for shard in array.addressable_shards if shard.replica_id == 0]
        with np.errstate(invalid="ignore"):  # some versions warn about a NaN, which is expected here
            return float(np.max([np.abs(part).max(initial=0.0).astype(np.float64) for part in parts], initial=0.0))

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): size(array)
        for path, array in jax.tree_util.tree_leaves_with_path(params)
        if jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
    }
