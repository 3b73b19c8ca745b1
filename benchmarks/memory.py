"""Temporary memory of compiled updates with a large vocabulary: Tandem's next to Tunix' of the same shape.

16 sequences of 1,024 tokens, half of them prompt, layers rematerialised block by block on both sides. Nothing runs.
"""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from compiled import compile_tandem, compile_tunix, topology_mesh
from jax.sharding import Mesh
from rich.console import Console
from shapes import MEMORY_BODY, MEMORY_VOCABULARIES, Workload, tiny_shape
from trainers import is_installed

from rl.models.config import ModelConfig
from rl.training.packing import PackingPlan

NUM_ROWS, LENGTH = 16, 1024
MAX_SHARE = 0.25  # of Tunix' temporaries
MAX_GROWTH = 1.3  # over the step with the small vocabulary, the gradient of the large embedding added
TPU_TOPOLOGY = (
    "v5e:4x4"  # one sequence per chip: what a chip holds of Tunix' step must fit into it, or it is no program
)


class Memory(NamedTuple):
    """Bytes of temporaries.

    one_device, one_device_small_vocabulary: of Tandem's step on a single device, where nothing is gathered.
    growth: over the small vocabulary there, with the gradient of the large embedding added to it.
    tandem, tunix: a device's, on all of them. share: of Tunix'; both None without it.
    """

    platform: str
    num_devices: int
    one_device: int
    one_device_small_vocabulary: int
    growth: float
    tandem: int
    tunix: int | None
    share: float | None


def compare_memory(console: Console, platform: str, settings: list[str], tiny: bool) -> dict[str, Any]:
    """Compiles the steps and prints what was found."""
    devices = _devices(platform)
    length = 32 if tiny else LENGTH
    small, large = (_body(vocab_size, tiny) for vocab_size in MEMORY_VOCABULARIES)

    def tandem(config: ModelConfig, mesh: Mesh) -> int:
        # A row holds all of its tokens but the last, which predicts nothing.
        workload = Workload(NUM_ROWS // 2, 2, (length // 2, length // 2), length // 2)
        plan = PackingPlan(1, NUM_ROWS, length, completions_per_row=1, completion_length=length // 2)
        options = [f"grpo.max_tokens_per_microbatch={NUM_ROWS * length}"]
        step = compile_tandem(config, workload, plan, [*options, *settings], mesh, pure_nnx=True)
        return step.compiled.memory_analysis().temp_size_in_bytes

    alone, everywhere = topology_mesh(devices[:1]), topology_mesh(devices)
    one_device, one_device_small = tandem(large, alone), tandem(small, alone)
    own = tandem(large, everywhere) if len(devices) > 1 else one_device
    allowed = one_device_small + (large.vocab_size - small.vocab_size) * large.hidden_size * 4
    tunix = None
    if is_installed("tunix"):
        tunix_mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
        compiled = compile_tunix(large, NUM_ROWS, length // 2, length // 2, tunix_mesh)
        tunix = compiled.memory_analysis().temp_size_in_bytes
    growth, share = one_device / allowed, None if tunix is None else own / tunix
    kind = devices[0].device_kind
    console.print(
        f"1 x {kind}, V = {large.vocab_size}: {one_device / 1e9:.3f} GB of temporaries; with V = {small.vocab_size} "
        f"and the embedding's gradient {allowed / 1e9:.3f} GB: {_verdict(growth, MAX_GROWTH, tiny)}"
    )
    if tunix is not None and share is not None:
        console.print(
            f"{len(devices)} x {kind}, V = {large.vocab_size}: {own / 1e9:.3f} GB of temporaries a device, Tunix' step "
            f"{tunix / 1e9:.3f} GB: {_verdict(share, MAX_SHARE, tiny)}"
        )
    return Memory(platform, len(devices), one_device, one_device_small, growth, own, tunix, share)._asdict()


def _body(vocab_size: int, tiny: bool) -> ModelConfig:
    # XLA for CPU merges the second forward pass of layers that are not scanned with the first again.
    config = dataclasses.replace(MEMORY_BODY, vocab_size=vocab_size, remat="block", scan_layers=True)
    return dataclasses.replace(tiny_shape(config), vocab_size=vocab_size // 64) if tiny else config


def _devices(platform: str) -> list[Any]:
    if platform == "cpu":
        return jax.devices("cpu")[:1]
    from jax.experimental import topologies

    # libtpu looks for the chips that it is on; there are none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGY).devices)


def _verdict(ratio: float, limit: float, tiny: bool) -> str:
    verdict = "" if tiny else f", may be {limit} ({'met' if ratio <= limit else 'missed'})"
    return f"ratio {ratio:.2f}{verdict}"
