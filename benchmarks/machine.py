"""What the machine can do: matrix-product rate and copy bandwidth."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

Probe = Callable[[], float]


def matmul_probe(size: int) -> Probe:
    """Measures operations per second of one float32 product of two [size, size] matrices, of 2 * size**3 operations."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    return _probe(jax.jit(jnp.dot), (x, x), 2 * size**3)


def copy_probe(num_bytes: int) -> Probe:
    """Measures bytes per second, read and written together, of a pass over an array of `num_bytes` into another one."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    return _probe(jax.jit(lambda x: x + 1), (x,), 2 * x.nbytes)


def _probe(function: Callable, arguments: tuple[jax.Array, ...], amount: float) -> Probe:
    def measure() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return amount / (time.perf_counter() - start)

    measure()  # compiles
    return measure
