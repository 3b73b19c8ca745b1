"""Tandem's update in both flavours: operations and bytes as XLA counts them, and the time the host takes to start it.

XLA counts the body of a loop once, so its numbers are those of one piece of the batch and of one optimizer update.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from compiled import Step, compile_tandem, topology_mesh
from rich.console import Console
from shapes import CPU_SHAPES, TRAIN_WORKLOADS, tiny_shape, tiny_workload

FLAVOURS = {"nnx": True, "linen": False}
NUM_CALLS = 30
MAX_HOST_DIFFERENCE = 1e-3  # seconds


@dataclasses.dataclass(frozen=True)
class FlavourCost:
    """operations, bytes_accessed: as XLA counts them. host_seconds: median time until the call of a step returns, of a
    narrow model with the same number of layers.
    """

    shape: str
    flavour: str
    operations: float
    bytes_accessed: float
    host_seconds: float


def compare_flavours(console: Console, names: Sequence[str], settings: list[str], tiny: bool) -> dict[str, Any]:
    """Measures every shape on workload (i), and prints what was found."""
    costs = []
    for name in names:
        config = tiny_shape(CPU_SHAPES[name]) if tiny else CPU_SHAPES[name]
        workload = tiny_workload(TRAIN_WORKLOADS["i"]) if tiny else TRAIN_WORKLOADS["i"]
        mesh = topology_mesh()

        def build(config, pure_nnx, workload=workload, mesh=mesh) -> Step:
            return compile_tandem(config, workload, None, settings, mesh, pure_nnx)

        narrow = dataclasses.replace(tiny_shape(config), num_layers=config.num_layers, layer_types=config.layer_types)
        steps = {flavour: build(narrow, pure_nnx) for flavour, pure_nnx in FLAVOURS.items()}
        seconds = host_seconds(steps)
        for flavour, pure_nnx in FLAVOURS.items():
            analysis = (steps[flavour] if narrow == config else build(config, pure_nnx)).compiled.cost_analysis()
            found = FlavourCost(name, flavour, analysis["flops"], analysis["bytes accessed"], seconds[flavour])
            costs.append(found)
            console.print(
                f"{name}, {flavour}: {found.operations / 1e9:.3f}e9 operations and {found.bytes_accessed / 1e9:.3f}e9 "
                f"bytes in the compiled update, a step takes the host {1000 * found.host_seconds:.2f} ms"
            )
        nnx, linen = costs[-2:]
        is_equal = (nnx.operations, nnx.bytes_accessed) == (linen.operations, linen.bytes_accessed)
        is_near = abs(nnx.host_seconds - linen.host_seconds) <= MAX_HOST_DIFFERENCE
        console.print(
            f"{name}: operations and bytes must be equal: {'met' if is_equal else 'missed'}; host time must be within "
            f"{1000 * MAX_HOST_DIFFERENCE:g} ms: {'met' if is_near else 'missed'}"
        )
    return {"flavours": [dataclasses.asdict(cost) for cost in costs]}


def host_seconds(steps: dict[str, Step]) -> dict[str, float]:
    """Median time by name until the call of a compiled step returns, everything it needs being there; in turn."""
    arguments = {}
    for name, step in steps.items():
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), (step.state, step.minibatch))
        arguments[name] = jax.device_put(zeros, step.compiled.input_shardings[0])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(NUM_CALLS):
        for name, step in steps.items():
            state, minibatch = jax.block_until_ready(arguments[name])
            start = time.perf_counter()
            state, _ = step.compiled(state, minibatch)
            seconds[name].append(time.perf_counter() - start)
            arguments[name] = (state, minibatch)
    return {name: statistics.median(own) for name, own in seconds.items()}
