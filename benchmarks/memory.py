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
from rl.packing import PackingPlan

NUM_ROWS, LENGTH = 16, 1024
LOGPROB_CHUNK = 16  # tokens of a row whose logits exist at one time: 256 of the piece
MAX_SHARE = 0.25  # of Tunix' temporaries
MAX_GROWTH = 1.3  # over the step with the small vocabulary, the gradient of the large embedding added
TPU_TOPOLOGY = (
    "v5e:4x4"  # one sequence per chip: what a chip holds of Tunix' step must fit into it, or it is no program
)


class Memory(NamedTuple):
    """Bytes of temporaries, per device. growth: over the small vocabulary. share: of Tunix'; None without it."""

    platform: str
    num_devices: int
    tandem: int
    tandem_small_vocabulary: int
    tunix: int | None
    growth: float
    share: float | None


def compare_memory(console: Console, platform: str, settings: list[str], tiny: bool) -> dict[str, Any]:
    """Compiles the steps and prints what was found."""
    devices = _devices(platform)
    length = 32 if tiny else LENGTH
    small, large = (_body(vocab_size, tiny) for vocab_size in MEMORY_VOCABULARIES)
    mesh = topology_mesh(devices)

    def tandem(config: ModelConfig) -> int:
        # A row holds all of its tokens but the last, which predicts nothing.
        workload = Workload(NUM_ROWS // 2, 2, (length // 2, length // 2), length // 2)
        plan = PackingPlan(1, NUM_ROWS, length, completions_per_row=1, completion_length=length // 2)
        options = [f"grpo.logprob_chunk={LOGPROB_CHUNK}", f"grpo.max_tokens_per_microbatch={NUM_ROWS * length}"]
        step = compile_tandem(config, workload, plan, [*options, *settings], mesh, pure_nnx=True)
        return step.compiled.memory_analysis().temp_size_in_bytes

    own, own_small = tandem(large), tandem(small)
    embedding = (large.vocab_size - small.vocab_size) * large.hidden_size * 4 // len(devices)
    tunix = None
    if is_installed("tunix"):
        tunix_mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
        compiled = compile_tunix(large, NUM_ROWS, length // 2, length // 2, tunix_mesh)
        tunix = compiled.memory_analysis().temp_size_in_bytes
    found = Memory(
        platform=platform,
        num_devices=len(devices),
        tandem=own,
        tandem_small_vocabulary=own_small,
        tunix=tunix,
        growth=own / (own_small + embedding),
        share=None if tunix is None else own / tunix,
    )
    where = f"{len(devices)} x {devices[0].device_kind}"
    console.print(
        f"{where}, V = {large.vocab_size}: {own / 1e9:.3f} GB of temporaries a device; with V = {small.vocab_size} and "
        f"the embedding's gradient {(own_small + embedding) / 1e9:.3f} GB: {_verdict(found.growth, MAX_GROWTH, tiny)}"
    )
    if tunix is not None:
        console.print(f"Tunix' step: {tunix / 1e9:.3f} GB: {_verdict(own / tunix, MAX_SHARE, tiny)}")
    return found._asdict()


def _body(vocab_size: int, tiny: bool) -> ModelConfig:
    config = dataclasses.replace(MEMORY_BODY, vocab_size=vocab_size, remat="block")
    if tiny:
        config = dataclasses.replace(tiny_shape(config), vocab_size=vocab_size // 64)
    # XLA for CPU merges the second forward pass of layers that are not scanned with the first again.
    is_scannable = any(field.name == "scan_layers" for field in dataclasses.fields(ModelConfig))
    return dataclasses.replace(config, **({"scan_layers": True} if is_scannable else {}))


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
