"""Devices, versions, memory, disk and optional packages of this machine.

In: this process. Out: findings. Nothing is compiled, and no configuration is needed.
"""

import importlib.metadata
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax

from rl.devices.host_memory import available_bytes
from rl.run.environment import environment
from rl.tools.doctor.findings import Finding, size_text

_OWN = "tandem-grpo"
_FOR_DEVELOPERS = ("dev", "docs")
_LITTLE_DISK = 5 * 2**30  # bytes
# What shows that a machine has an accelerator, and the extra that brings jax for it.
_ACCELERATORS = {
    "/dev/nvidiactl": ("an NVIDIA GPU", "cuda"),
    "/dev/accel0": ("a TPU", "tpu"),
    "/dev/vfio/0": ("a TPU", "tpu"),
}
_VERSION = re.compile(r"\d+(?:\.\d+)*")


class Requirement(NamedTuple):
    """A package that is needed: its name, the rules for its version, such as ">=2,<3", and its extra; "" without."""

    name: str
    rules: str
    extra: str


def machine_findings(folder: str | os.PathLike | None = None) -> list[Finding]:
    """Findings about the machine. folder: where runs are written, which need not exist; the working directory when
    None.
    """
    return [*_devices(), *_versions(), *_memory(), *_disk(folder), *_packages()]


def _devices() -> Iterator[Finding]:
    device = jax.devices()[0]
    count = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        count += f", {size_text(limit)} each for jax, {size_text(limit - stats.get('bytes_in_use', 0))} of them free"
    yield Finding("ok", "devices", count)
    if device.platform != "cpu":
        return
    for path, (what, extra) in _ACCELERATORS.items():
        if not os.path.exists(path):
            continue
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            yield Finding("change", "devices", f"{what} is here, and JAX_PLATFORMS=cpu hides it", "unset JAX_PLATFORMS")
        else:
            way_out = f"pip install '{_OWN}[{extra}]', and check its driver"
            yield Finding("change", "devices", f"{what} is here ({path}), and jax does not see it", way_out)
        return


def _versions() -> Iterator[Finding]:
    found = environment()
    names = [_OWN, "python", "jax", "jaxlib", "flax", "optax", "numpy", "transformers"]
    shown = [f"{name} {found[name]}" for name in names if name in found]
    yield Finding("ok", "versions", ", ".join(shown))
    yield Finding("ok", "system", f"{found.get('system', '?')}, {found.get('cores', '?')} cores")
    for needed in requirements():
        if not needed.extra and (problem := problem_of(needed)) is not None:
            yield Finding("wrong", "versions", problem, f"pip install '{needed.name}{needed.rules}'")


def _memory() -> Iterator[Finding]:
    if available := available_bytes():
        yield Finding("ok", "memory of the host", f"{size_text(available)} available")


def _disk(folder: str | os.PathLike | None) -> Iterator[Finding]:
    path = pathlib.Path(folder or ".").expanduser().absolute()
    cache = pathlib.Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser().absolute()
    for what, place in {"disk of the run": path, "disk of downloads": cache}.items():
        nearest = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(nearest).free
        if free < _LITTLE_DISK:
            way_out = (
                "free some, or set output_dir" if place == path else "free some, or set HF_HOME in the environment"
            )
            yield Finding("change", what, f"{size_text(free)} free at {nearest}", f"{way_out} to another disk")
        else:
            yield Finding("ok", what, f"{size_text(free)} free at {nearest}")


def _packages() -> Iterator[Finding]:
    extras: dict[str, list[Requirement]] = {}
    for needed in requirements():
        if needed.extra and needed.extra not in _FOR_DEVELOPERS and needed.name != _OWN:
            extras.setdefault(needed.extra, []).append(needed)
    problems = {extra: list(filter(None, map(problem_of, needed))) for extra, needed in extras.items()}
    if complete := [extra for extra, found in problems.items() if not found]:
        yield Finding("ok", "optional packages", ", ".join(complete))
    if lacking := {extra: found for extra, found in problems.items() if found}:
        missing = "; ".join(f"{extra} ({', '.join(found)})" for extra, found in lacking.items())
        yield Finding("note", "optional packages", f"not here: {missing}", f"pip install '{_OWN}[NAME]' where needed")


def requirements() -> list[Requirement]:
    """The packages that this one names, those of extras included; none where it is not installed."""
    try:
        texts = importlib.metadata.requires(_OWN) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for text in texts:
        package, _, marker = text.partition(";")
        name = re.match(r"[\w.-]+", package.strip())
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
        of_devices = "[" in package  # jax for an accelerator, which `_devices` looks at
        if name is not None and not of_devices and "sys_platform" not in marker:
            rules = re.sub(r"[\s()]", "", package.strip()[name.end() :])
            found.append(Requirement(name[0], rules, extra[1] if extra else ""))
    return found


def problem_of(needed: Requirement) -> str | None:
    """Why a package will not do: it is missing, or of a version that the rules leave out; None where it will."""
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{needed.name} is missing"
    have = _numbers(version)
    for rule in filter(None, needed.rules.split(",")):
        sign, number = rule.rstrip("0123456789.*"), rule.lstrip("<>=!~")
        want = _numbers(number)
        size = max(len(have), len(want))
        left, right = (numbers + (0,) * (size - len(numbers)) for numbers in (have, want))
        fits = {
            ">=": left >= right,
            "<=": left <= right,
            "<": left < right,
            ">": left > right,
            "!=": left != right,
            "==": have[: len(want)] == want,
            "~=": left >= right and have[: len(want) - 1] == want[:-1],
        }
        if not fits.get(sign, True):
            return f"{needed.name} must be {needed.rules}, got {version}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    match = _VERSION.match(version)
    return tuple(map(int, match[0].split("."))) if match else ()
