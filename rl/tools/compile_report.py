"""What compiled programs need of a device, whether a run fits, and which keys to change where it does not.

In: a run's programs (`rl.tools.loop_programs`), each compiled. Out: `Report`, as JSON and as text. Bytes are those of
one device; times are what the chip's FLOP/s and memory bandwidth allow at best, communication aside.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from rl.config_rules import decoder_keys
from rl.config_sections import source_kind
from rl.logprobs import TILE_ROWS
from rl.mesh import num_row_shards
from rl.models.config import base_specs, flatten_specs
from rl.tools.hlo import Work, work_of
from rl.tools.loop_programs import DECODE, PREFILL, Loop, LoopProgram, logit_chunk
from rl.tools.topologies import GIB, Chip
from rl.update import TRAIN_STEP

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program on one device.

    Attributes:
      arguments, outputs, temporaries: bytes. aliased: of the outputs, those that take the place of arguments.
      peak: bytes of all of these together. needed: peak, and what else the run holds meanwhile.
      seconds, host_bytes: what compiling took; host_bytes is the largest size of the process meanwhile.
      work: what it does; None for one that is refused, and where its text cannot be read.
      refused: what the compiler said when the program does not fit; the numbers are then what it named, or 0.
      unread: why the text cannot be read.
    """

    name: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    needed: int
    work: Work | None
    seconds: float
    host_bytes: int
    refused: str | None = None
    unread: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All programs of a run."""

    loop: Loop
    chip: Chip | None
    programs: list[ProgramReport]

    @property
    def worst(self) -> ProgramReport:
        """The program that needs most."""
        return max(self.programs, key=lambda program: (program.refused is not None, program.needed))

    @property
    def fits(self) -> bool:
        """Whether every program fits beside what the run holds."""
        return self.worst.refused is None and self.worst.needed <= self.loop.memory

    def kv_budget(self) -> int:
        """Bytes that are left for keys and values while drawing."""
        decode = next((p for p in self.programs if p.name == DECODE), None)
        resident = self.loop.resident
        held = resident.state + resident.reference + resident.copy
        return max(self.loop.memory - held - (decode.temporaries if decode else 0), 0)

    def terms(self) -> dict[str, int]:
        """What takes memory, largest first."""
        resident = self.loop.resident
        terms = {
            "weights": resident.weights,
            "optimizer state": resident.moments,
            "reference": resident.reference,
            "weights of the rollouts": resident.copy,
            "keys and values": resident.cache,
            **{f"temporaries of {p.name}": p.temporaries for p in self.programs},
        }
        return dict(sorted(((k, v) for k, v in terms.items() if v), key=lambda item: -item[1]))


def report_of(program: LoopProgram, compiled: jax.stages.Compiled, seconds: float, host_bytes: int) -> ProgramReport:
    """What a compiled program needs and does."""
    memory = compiled.memory_analysis()
    assert memory is not None
    text, unread = _text_of(compiled)
    work = None if text is None else work_of(text, program.rounds)
    sizes = [memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes]
    arguments, outputs, aliased = (int(size) for size in sizes)
    temporaries = int(memory.temp_size_in_bytes)
    peak = arguments + outputs - aliased + temporaries
    return ProgramReport(
        *(program.name, arguments, outputs, aliased, temporaries, peak, peak + program.held, work, seconds, host_bytes),
        unread=unread,
    )


def _text_of(compiled: jax.stages.Compiled) -> tuple[str | None, str | None]:
    """A program as text, or None and why. A libtpu may write instructions that this jaxlib does not know."""
    try:
        return compiled.as_text(), None
    except jax.errors.JaxRuntimeError as error:
        return None, str(error).splitlines()[0][:200]


def report_refused(program: LoopProgram, message: str, seconds: float, host_bytes: int) -> ProgramReport:
    """Of a program that the compiler found too large for the device."""
    # libtpu has said it in either way.
    found = re.search(r"(?:Used |total memory required[^(]*\()([\d.]+)([KMGT]?)", message)
    used = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    said = message[found.start() :].splitlines()[0][:200] if found else message.splitlines()[0][:200]
    return ProgramReport(program.name, 0, 0, 0, 0, used, used + program.held, None, seconds, host_bytes, said)


class _Change(NamedTuple):
    """A key to change, in words, and the bytes that it takes off the largest need of a device: a rough estimate, by
    which changes are ordered.
    """

    text: str
    saves: float


def advice(report: Report) -> list[str]:
    """What to change, as keys, the most telling first; nothing for a run that fits."""
    if report.fits:
        budget, wanted = report.kv_budget(), report.loop.resident.cache
        if wanted > budget:
            return [_kv_memory(report).text]
        return []
    loop = report.loop
    held = loop.resident.state + loop.resident.reference
    found = _fewer_copies(report)
    if held > 0.6 * loop.memory:
        found += _smaller_state(report)
    found += _smaller_rollout(report) if report.worst.name in (PREFILL, DECODE) else _smaller_pieces(report)
    lines = [change.text for change in sorted(found, key=lambda change: -change.saves)]
    if not found or held > 0.6 * loop.memory:
        total = held * loop.mesh.size
        lines.append(f"more chips: weights, optimizer state and reference are {total / GIB:.0f} GiB in all")
    others = tuple(f"{key}=" for key in decoder_keys(loop.config))  # keys that this model does not have
    return [line for line in dict.fromkeys(lines) if not line.startswith(others)]


def _fewer_copies(report: Report) -> list[_Change]:
    loop, resident = report.loop, report.loop.resident
    share = loop.policy.config.num_parameters * _itemsize(loop.policy.config.param_dtype) / loop.mesh.size
    if resident.weights <= 1.5 * share:
        return []
    saves = (resident.state + resident.reference + _gradients(report)) * (1 - share / resident.weights)
    return [_Change("mesh.data=1 mesh.fsdp=-1: no device holds parameters that another holds too", saves)]


def _smaller_state(report: Report) -> list[_Change]:
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
        # In the update they take the place of what the backward pass needed.
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


def _smaller_rollout(report: Report) -> list[_Change]:
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


def _smaller_pieces(report: Report) -> list[_Change]:
    loop, config, model = report.loop, report.loop.config, report.loop.policy.config
    found, is_decoder = [], source_kind(config.model.source) == "decoder"
    num_layers = model.num_layers if is_decoder else 1
    shards = num_row_shards(loop.mesh, config.mesh.rules)
    # What there is besides gradients and gathered weights grows with the tokens of a piece.
    activations = max(report.worst.temporaries - _gradients(report) - _gathered(report), 0)
    rows, chunk = loop.inputs.plan.num_rows // shards, logit_chunk(config, loop.inputs, loop.mesh)
    position = 2 * rows * model.vocab_size * 4 / max(config.mesh.tensor, 1)  # logits of one in each row, their gradient
    if config.model.remat in ("none", "dots", "outputs"):
        text = "model.remat=block: of each layer only its input is kept"
        layers = max(activations - chunk * position, 0)
        saves = layers * (1 - 1 / (num_layers + 1))  # one is still whole while it is computed again
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


def _more_tensor(report: Report) -> list[_Change]:
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


def _gradients(report: Report) -> int:
    """Bytes of the gradients that the program which needs most has; those of weights that are trained."""
    resident = report.loop.resident
    return (resident.adapters or resident.weights) if report.worst.name == TRAIN_STEP else 0


def _hidden(report: Report) -> int:
    """Bytes of the hidden states of a piece between two layers."""
    loop, plan = report.loop, report.loop.inputs.plan
    rows, model = plan.num_rows // num_row_shards(loop.mesh, loop.config.mesh.rules), loop.policy.config
    return rows * plan.row_length * model.hidden_size * _itemsize(model.dtype)


def _gathered(report: Report) -> float:
    """Bytes of the largest layer and of the largest table as their products have them: whole but for the tensor axis,
    in the dtype of the activations, in the train step with a gradient that is not added up yet. 0 where they lie so.
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


def _kv_memory(report: Report) -> _Change:
    budget = report.kv_budget()
    share = max(int(budget / report.loop.memory * 90), 1) / 100
    text = f"sampling.kv_memory={share}: the share of memory that is left for keys and values"
    return _Change(text, max(report.loop.resident.cache - share * report.loop.memory, 0))


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    loop, chip = report.loop, report.chip
    programs = []
    for program in report.programs:
        entry = {k: v for k, v in vars(program).items() if k != "work"}
        if program.work is not None:
            work = program.work
            entry |= {"flops": work.flops, "bytes": work.num_bytes, "intensity": _intensity(work)}
            entry |= {"unknown_loops": work.unknown_loops, "roofline_seconds": roofline(work, chip)}
            entry["collectives"] = {kind: vars(c) for kind, c in work.collectives.items()}
        programs.append(entry)
    return {
        "devices": loop.mesh.size,
        "device_kind": loop.mesh.devices.flat[0].device_kind,
        "num_slices": num_slices(loop.mesh.devices.flat),
        "mesh": {str(axis): int(size) for axis, size in loop.mesh.shape.items()},
        "memory": loop.memory,
        "chip": None if chip is None else vars(chip),
        "flavour": loop.policy.flavour,
        "parameters": loop.policy.config.num_parameters,
        "packing": vars(loop.inputs.plan),
        "resident": vars(loop.resident),
        "kv_budget": report.kv_budget(),
        "programs": programs,
        "fits": report.fits,
        "terms": report.terms(),
        "advice": advice(report),
    }


def to_text(report: Report) -> str:
    """The report for people."""
    loop, chip, resident = report.loop, report.chip, report.loop.resident
    plan, model = loop.inputs.plan, loop.policy.config
    axes = " ".join(f"{axis}={size}" for axis, size in loop.mesh.shape.items())
    slices = num_slices(loop.mesh.devices.flat)
    name = chip.name if chip else loop.mesh.devices.flat[0].device_kind
    lines = [
        (
            f"model    {model.family}, {model.num_parameters / 1e9:.2f}B parameters, {loop.policy.flavour}, "
            f"{model.param_dtype} weights, {model.dtype} activations, {loop.policy.kernel.title}"
        ),
        (
            f"devices  {loop.mesh.size} x {name}{f' in {slices} slices' if slices > 1 else ''}, {axes}, "
            f"{gib(loop.memory)} GiB each"
        ),
        f"packing  {plan.num_microbatches} pieces of {plan.num_rows} rows x {plan.row_length} tokens an update",
        "",
    ]
    header = ["program", "arguments", "outputs", "temporaries", "peak", "with held", "TFLOP", "GB moved"]
    header += ["FLOP/byte", "best ms", "compiled s"]
    rows = [header]
    for program in report.programs:
        if program.refused:
            rows.append([program.name, *["-"] * 3, gib(program.peak), gib(program.needed), *["-"] * 4])
        else:
            sizes = (program.arguments, program.outputs, program.temporaries, program.peak, program.needed)
            rows.append([program.name, *(gib(size) for size in sizes), *_work_columns(program.work, chip)])
        rows[-1].append(f"{program.seconds:.0f}")
    lines += _columns(rows)
    lines += ["", "collectives of a device (times, GB received):"]
    for program in report.programs:
        if program.work is not None:
            kinds = [f"{k} {c.count} x, {c.num_bytes / 1e9:.3g} GB" for k, c in program.work.collectives.items()]
            lines.append(f"  {program.name}: {'; '.join(kinds) or 'none'}")
    budget = report.kv_budget()
    positions = f", {budget // resident.bytes_per_position:,} positions" if resident.bytes_per_position else ""
    lines += [
        "",
        (
            f"held     weights {gib(resident.weights)}, optimizer state {gib(resident.moments)}, "
            f"reference {gib(resident.reference)} GiB"
        ),
        (
            f"sampler  {gib(budget)} GiB are left for keys and values{positions}; the configuration takes up to "
            f"{gib(resident.cache)} GiB"
        ),
    ]
    for program in report.programs:
        if program.refused:
            lines.append(f"the compiler refuses {program.name}: {program.refused}")
        if program.unread:
            lines.append(f"operations of {program.name} are not counted, jaxlib cannot read them: {program.unread}")
    verdict = "fits" if report.fits else "does not fit"
    worst = report.worst
    lines.append(f"{verdict}: {worst.name} needs {gib(worst.needed)} of {gib(loop.memory)} GiB")
    largest = ", ".join(f"{name} {gib(size)}" for name, size in list(report.terms().items())[:5])
    lines.append(f"largest terms (GiB): {largest}")
    lines += [f"change:  {line}" for line in advice(report)]
    return "\n".join(lines)


def roofline(work: Work, chip: Chip | None) -> float | None:
    """The least seconds that the chip's products and memory allow; None for an unknown chip."""
    return None if chip is None else max(work.flops / chip.flops, work.num_bytes / chip.bandwidth)


def num_slices(devices: Any) -> int:
    """Slices that devices belong to."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def gib(size: float) -> str:
    """Bytes as GiB, of small ones more digits."""
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB or not size else f"{size / GIB:.2g}"


def _intensity(work: Work) -> float | None:
    return work.flops / work.num_bytes if work.num_bytes else None


def _work_columns(work: Work | None, chip: Chip | None) -> list[str]:
    if work is None:
        return ["-"] * 4
    intensity, best = _intensity(work), roofline(work, chip)
    return [
        f"{work.flops / 1e12:.4g}",
        f"{work.num_bytes / 1e9:.4g}",
        "-" if intensity is None else f"{intensity:.3g}",
        "-" if best is None else f"{1e3 * best:.3g}",
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
