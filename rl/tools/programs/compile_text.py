"""The report of `grpo compile` as JSON and as text.

In: a `CompileReport` of `rl.tools.programs.compile_report`. Times are the best that the chip's FLOP/s and memory
bandwidth allow, without communication.
"""

from collections.abc import Sequence
from typing import Any

from rl.tools.programs.compile_advice import advice
from rl.tools.programs.compile_report import CompileReport
from rl.tools.programs.hlo import Work
from rl.tools.programs.topologies import GIB, Chip


def to_json(report: CompileReport) -> dict[str, Any]:
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


def to_text(report: CompileReport) -> str:
    """The report as text."""
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
    judges = f", reward models {gib(resident.reward_models)}" if resident.reward_models else ""
    budget = report.kv_budget()
    content, positions = "keys and values", ""
    if resident.bytes_per_row:
        sizes = f"{resident.bytes_per_row:,} bytes a row and {resident.bytes_per_position:,} bytes a position"
        content, positions = "keys, values and states", f", {sizes}"
    elif resident.bytes_per_position:
        positions = f", {budget // resident.bytes_per_position:,} positions"
    lines += [
        "",
        (
            f"held     weights {gib(resident.weights)}, optimizer state {gib(resident.moments)}, "
            f"reference {gib(resident.reference)}{judges} GiB"
        ),
        (
            f"sampler  {gib(budget)} GiB are left for {content}{positions}; the configuration takes up to "
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
    """Bytes as GiB, with more digits for small numbers."""
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
