"""Advice for a run that does not fit: keys to change, ordered by the bytes that each saves.

In: a `CompileReport` of `rl.tools.programs.compile_report`. Out: lines of text, the most useful first. The
saving of a change is an estimate, and only orders the lines.
"""

import collections
import math
from typing import NamedTuple

import jax

from rl.config.rules import decoder_keys
from rl.config.sections import source_kind
from rl.devices.mesh import num_row_shards
from rl.models.config import base_specs, flatten_specs
from rl.models.logprobs import TILE_ROWS
from rl.sampler.contract import DECODE, PREFILL
from rl.tools.programs.compile_report import CompileReport
from rl.tools.programs.loop_programs import logit_chunk
from rl.tools.programs.topologies import GIB
from rl.training.train_step import TRAIN_STEP


class _Change(NamedTuple):
    """A key to change, in words, and a rough estimate of the bytes that it saves of a device's largest need."""

    text: str
    saves: float


def advice(report: CompileReport) -> list[str]:
    """Keys to change, the most useful first; empty for a run that fits."""
    if report.fits:
        budget, wanted = report.kv_budget(), report.loop.resident.cache
        if wanted > budget:
            return [_kv_memory(report).text]
        return []
    loop = report.loop
    held = loop.resident.state + loop.resident.reference + loop.resident.reward_models
    found = _fewer_copies(report)
    if held > 0.6 * loop.memory:
        found += _smaller_state(report)
    found += _smaller_rollout(report) if report.worst.name in (PREFILL, DECODE) else _smaller_pieces(report)
    lines = [change.text for change in sorted(found, key=lambda change: -change.saves)]
    if not found or held > 0.6 * loop.memory:
        total = held * loop.mesh.size
        judges = ", reward models" if loop.resident.reward_models else ""
        lines.append(f"more chips: weights{judges}, optimizer state and reference are {total / GIB:.0f} GiB in all")
    others = tuple(f"{key}=" for key in decoder_keys(loop.config))  # keys that this model does not have
    return [line for line in dict.fromkeys(lines) if not line.startswith(others)]


def _fewer_copies(report: CompileReport) -> list[_Change]:
    loop, resident = report.loop, report.loop.resident
    share = loop.policy.config.num_parameters * _itemsize(loop.policy.config.param_dtype) / loop.mesh.size
    if resident.weights <= 1.5 * share:
        return []
    saves = (resident.state + resident.reference + _gradients(report)) * (1 - share / resident.weights)
    return [_Change("mesh.data=1 mesh.fsdp=-1: no device holds parameters that another holds too", saves)]


def _smaller_state(report: CompileReport) -> list[_Change]:
    loop, config, resident = report.loop, report.loop.config, report.loop.resident
    weights, moments, reference, gradients = resident.weights, resident.moments, resident.reference, _gradients(report)
    found = []
    if config.grpo.beta and reference:
        found.append(_Change("grpo.beta=0: no reference beside the policy", reference))
    if config.model.param_dtype == "float32":
        both = " model.dtype=bfloat16" if source_kind(config.model.source) == "tunix" else ""  # which has one for both
        text = f"model.param_dtype=bfloat16{both}: half the bytes of weights and gradients"
        stored = weights if config.lora.base_dtype is None else resident.adapters
        found.append(_Change(text, (stored + reference + gradients) / 2))
    elif config.optimizer.moment_dtype is None and config.optimizer.name == "adamw":
        text = "optimizer.name=adafactor: sums of rows and columns in place of both moments"
        found.append(_Change(text, moments))
    if not config.optimizer.offload and moments:
        # In the update they reuse the memory of the backward pass.
        room = max(report.worst.temporaries - gradients, 0) if report.worst.name == TRAIN_STEP else moments
        text = "optimizer.offload=true: moments in the hosts' memory but for the update itself"
        found.append(_Change(text, min(moments, room)))
    if not config.lora.rank:
        text = "lora.rank=16: moments and gradients of adapters only, and the frozen weights are the reference"
        specs = [spec for _, spec in flatten_specs(base_specs(loop.policy.config))]
        specs = [spec for spec in specs if len(spec.shape) > 1 and "vocab" not in spec.axes]
        inputs = [math.prod(spec.shape[dim] for dim in spec.contract_dims) for spec in specs]
        sides = sum(n + math.prod(spec.shape) // n for n, spec in zip(inputs, specs, strict=True))
        adapters = 4 * 16 * sides * 4 / loop.mesh.size  # weights, moments and gradients in float32
        found.append(_Change(text, moments + reference + gradients - adapters))
    elif config.lora.base_dtype is None:
        saves = (weights - resident.adapters) * (1 - 1 / _itemsize(config.model.param_dtype))
        found.append(_Change("lora.base_dtype=int8: the frozen weights in 8 bits", saves))
    return found


def _smaller_rollout(report: CompileReport) -> list[_Change]:
    loop, config, cache = report.loop, report.loop.config, report.loop.resident.cache
    slots = config.sampling.slots
    found = [_kv_memory(report)] if slots is None else []
    fewer = 0 if slots is None else max(slots // 2, num_row_shards(loop.mesh, config.mesh.rules))
    if slots is not None and fewer < slots:
        found.append(_Change(f"sampling.slots={fewer}", cache * (1 - fewer / slots)))
    if config.sampling.kv_dtype is None:
        saves = cache * (1 - 1 / _itemsize(loop.policy.config.dtype))
        found.append(_Change("sampling.kv_dtype=int8: the cache in 8 bits", saves))
    return found + _more_tensor(report)


def _smaller_pieces(report: CompileReport) -> list[_Change]:
    loop, config, model = report.loop, report.loop.config, report.loop.policy.config
    found, is_decoder = [], source_kind(config.model.source) == "decoder"
    num_layers = model.num_layers if is_decoder else 1
    shards = num_row_shards(loop.mesh, config.mesh.rules)
    # Everything except gradients and gathered weights grows with the tokens of a piece.
    activations = max(report.worst.temporaries - _gradients(report) - _gathered(report), 0)
    rows, chunk = loop.inputs.plan.num_rows // shards, logit_chunk(config, loop.inputs, loop.mesh)
    position = 2 * rows * model.vocab_size * 4 / max(config.mesh.tensor, 1)  # logits of one in each row, their gradient
    if config.model.remat in ("none", "dots", "outputs"):
        text = "model.remat=block: of each layer only its input is kept"
        layers = max(activations - chunk * position, 0)
        saves = layers * (1 - 1 / (num_layers + 1))  # one layer is whole while it is computed again
        found.append(_Change(text, saves))
    elif config.model.remat == "block" and is_decoder:
        text = "model.remat=full: inputs of every sqrt(num_layers)-th layer only are kept"
        found.append(_Change(text, _hidden(report) * max(num_layers - 2 * math.sqrt(num_layers), 0)))
    if is_decoder and not config.model.scan_layers and num_layers > 8:
        # As if one more layer were gathered while one is computed.
        text = "model.scan_layers=true: layers in a loop, whose memory is that of one layer"
        found.append(_Change(text, _gathered(report) / 2))
    tokens = config.grpo.max_tokens_per_microbatch
    least = shards * (config.data.max_prompt_length + config.sampling.max_completion_length)
    if tokens >= 2 * least:
        fewer = max(tokens // 2, least)
        found.append(_Change(f"grpo.max_tokens_per_microbatch={fewer}", activations * (1 - fewer / tokens)))
    if chunk > TILE_ROWS:
        fewer = max(chunk // 4 // TILE_ROWS, 1) * TILE_ROWS
        logits = min((chunk - fewer) * position, activations)
        found.append(_Change(f"grpo.logprob_chunk={fewer}: fewer logits at a time", logits))
    return found + _more_tensor(report)


def _more_tensor(report: CompileReport) -> list[_Change]:
    loop = report.loop
    tensor, specs = loop.config.mesh.tensor, flatten_specs(base_specs(loop.policy.config))
    sizes = [size for _, spec in specs for size, axis in zip(spec.shape, spec.axes, strict=True) if axis == "kv_heads"]
    larger = 2 * max(tensor, 1)
    if tensor < 1 or loop.mesh.size % larger or not sizes or any(size % larger for size in sizes):
        return []
    saves = _gathered(report) / 2
    if report.worst.name == TRAIN_STEP and source_kind(loop.config.model.source) == "decoder":
        # A device then has twice the rows, and the input of every layer that is kept.
        num_layers = loop.policy.config.num_layers
        kept = 2 * math.sqrt(num_layers) if loop.config.model.remat == "full" else num_layers
        saves -= _hidden(report) * kept
    return [_Change(f"mesh.tensor={larger}: heads, mlp and vocabulary on {larger} devices each", saves)]


def _itemsize(dtype: str) -> int:
    return jax.numpy.dtype(dtype).itemsize


def _gradients(report: CompileReport) -> int:
    """Bytes of the trained weights' gradients, in the program with the largest need."""
    resident = report.loop.resident
    return (resident.adapters or resident.weights) if report.worst.name == TRAIN_STEP else 0


def _hidden(report: CompileReport) -> int:
    """Bytes of the hidden states of a piece between two layers."""
    loop, plan = report.loop, report.loop.inputs.plan
    rows, model = plan.num_rows // num_row_shards(loop.mesh, loop.config.mesh.rules), loop.policy.config
    return rows * plan.row_length * model.hidden_size * _itemsize(model.dtype)


def _gathered(report: CompileReport) -> float:
    """Bytes of the largest layer and of the largest table as gathered for their products.

    They are whole except along the tensor axis, in the dtype of the activations; in the train step, with a gradient
    that is not added up yet. 0 where they are not cut otherwise.
    """
    loop, model = report.loop, report.loop.policy.config
    parts = max(loop.config.mesh.tensor, 1)
    if 1.5 * parts * loop.resident.weights > model.num_parameters * _itemsize(model.param_dtype):
        return 0
    layers, tables = collections.Counter(), [0]
    for path, spec in flatten_specs(base_specs(model)):
        if "vocab" in spec.axes:
            tables.append(math.prod(spec.shape))
        else:
            layers[path[0]] += math.prod(spec.shape)
    gradient = _itemsize(model.param_dtype) if _gradients(report) and model.lora is None else 0
    return (max(layers.values(), default=0) + max(tables)) * (_itemsize(model.dtype) + gradient) / parts


def _kv_memory(report: CompileReport) -> _Change:
    budget = report.kv_budget()
    share = max(int(budget / report.loop.memory * 90), 1) / 100
    text = f"sampling.kv_memory={share}: the share of memory that is left for keys and values"
    return _Change(text, max(report.loop.resident.cache - share * report.loop.memory, 0))
