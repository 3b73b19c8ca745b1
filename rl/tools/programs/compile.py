"""`grpo compile CONFIG`: compiles a run's programs ahead of time, also for absent devices, and says whether the run
fits.

In: a recipe, and a TPU topology, a number of virtual CPU devices, or nothing (the devices at hand). Out: a report, as
text and as JSON, and with `--save` a file of the compiled programs that training takes (`compiled_file`). Neither
weights nor data are read.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.experimental.compilation_cache import compilation_cache

from rl.config.load import Config, load_config
from rl.config.sections import source_kind
from rl.devices.host_memory import limit_arenas, peak_bytes, start_peak
from rl.devices.programs import use_compilation_cache
from rl.files.output_file import check_writable
from rl.run.executables import save_compiled
from rl.run_folder.folder import check_trust
from rl.run_folder.trust import TO_COMPILE
from rl.tools.programs.compile_report import CompileReport, ProgramReport, report_of, report_refused
from rl.tools.programs.compile_text import to_json, to_text
from rl.tools.programs.loop_programs import Loop, LoopProgram, loop_programs
from rl.tools.programs.topologies import CHIPS, find_devices

MALLOC_ARENAS = 2  # with one, three compilers at a time were ten times as slow; with more, freed memory piles up


def compile_loop(loop: Loop, save: str | None = None, tell: Callable[[str], None] = lambda line: None) -> CompileReport:
    """Compiles the programs of a run, one after the other, and reports on them.

    Args:
      save: file for all programs, if all fit; None: only reported programs are compiled.
      tell: takes a line when a program is begun, and one when it is compiled.

    Raises:
      ValueError: with `save`, the back end cannot serialise a program.
    """
    reports: list[ProgramReport] = []
    kept = []
    for program in loop.programs:
        if program.is_reported or save is not None:
            tell(f"{program.name} ...")
            # A program from the persistent cache cannot be serialised again (jax 0.12 loses a part of it).
            with contextlib.nullcontext() if save is None else _compiled_anew():
                report, compiled = compile_one(program)
            tell(f"{program.name}: {report.seconds:.0f} s, {report.host_bytes / 1e9:.1f} GB of host memory")
            if program.is_reported or compiled is None:
                reports.append(report)
            if save is not None and compiled is not None:
                kept.append((program.key, *program.make(), compiled))
            del compiled
            jax.clear_caches()  # otherwise jax keeps all programs, in as much memory as the next compilation takes
    refused = dict.fromkeys(report.name for report in reports if report.refused is not None)
    if save is not None and refused:
        tell(f"nothing is saved: all programs must fit, and {', '.join(refused)} does not")
    elif save is not None:
        save_compiled(save, loop.config, loop.policy, loop.mesh, loop.memory, kept)
    return CompileReport(loop, CHIPS.get(loop.mesh.devices.flat[0].device_kind), reports)


def compile_one(program: LoopProgram) -> tuple[ProgramReport, jax.stages.Compiled | None]:
    """(report, compiled form) of a program; the form is None if the compiler finds the program too large for the
    device.
    """
    start_peak()
    start = time.perf_counter()
    built, arguments = program.make()
    try:
        compiled = built.compile(arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report_refused(program, str(error), time.perf_counter() - start, peak_bytes()), None
    seconds = time.perf_counter() - start
    return report_of(program, compiled, seconds, peak_bytes()), compiled


def compile_config(
    config: Config,
    topology: str | None = None,
    num_slices: int = 1,
    devices: str | None = None,
    save: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> CompileReport:
    """`grpo compile` as a function, with the command's arguments; `tell`: see `compile_loop`.

    Raises:
      ValueError: an argument is wrong, the chip is unknown, or `save` cannot be written, or belongs to a model whose
        training takes no compiled_file.
    """
    check_writable(save, "--save", makes_folders=True)
    if save is not None and source_kind(config.model.source) != "decoder":
        raise ValueError(
            "--save must go with a model of the toolkit's own decoder, the only one whose training takes a "
            f"compiled_file, got model.source {config.model.source!r}; leave --save out"
        )
    if save is not None and config.sampling.source is not None:
        raise ValueError(
            "--save must go without sampling.source, with which training takes no compiled_file, got "
            f"{config.sampling.source!r}; leave --save out"
        )
    found = find_devices(topology, num_slices, devices)
    kind = found[0].device_kind
    if topology is not None and kind not in CHIPS:
        raise ValueError(f"--topology must be of a chip out of {[chip.name for chip in CHIPS.values()]}, got {kind!r}")
    memory = CHIPS[kind].memory if topology is not None else None
    return compile_loop(loop_programs(config, found, memory), save, tell)


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo compile CONFIG [--topology T [--slices N] | --devices cpu:N] [--save FILE] [--json FILE] [key=value ...]`.

    Returns 0 for a run that fits, 1 for one that does not.
    """
    parser = argparse.ArgumentParser(prog="grpo compile", description=__doc__)
    parser.add_argument("config", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--topology", default=None, help="a TPU topology such as v5e:8x8; needs libtpu, but no TPU")
    parser.add_argument("--slices", type=int, default=1, help="that many of them, joined by the data center network")
    parser.add_argument("--devices", default=None, help="cpu:N, virtual CPU devices")
    parser.add_argument("--save", default=None, metavar="FILE", help="write the compiled programs, for compiled_file")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the report")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
    arguments = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    check_writable(arguments.json, "--json")
    config = load_config(arguments.config, arguments.overrides)
    config.rollout.refuse_turns("grpo compile")
    check_trust(arguments.config, config, arguments.overrides, TO_COMPILE, arguments.trust)
    if (
        config.logging.compilation_cache != "auto"
    ):  # times and memory are known only for programs that are really compiled
        use_compilation_cache(config)
    limit_arenas(MALLOC_ARENAS)
    if arguments.topology is not None and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # no device of this machine is needed
    # The source location of each operation takes a third of the host memory in a program of eighty layers.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    devices = (arguments.topology, arguments.slices, arguments.devices)
    report = compile_config(config, *devices, arguments.save, lambda line: print(line, file=sys.stderr))
    print(to_text(report))
    if arguments.json is not None:
        pathlib.Path(arguments.json).write_text(json.dumps(to_json(report), indent=1))
    return 0 if report.fits else 1


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Leaves the persistent compilation cache alone."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # otherwise jax decides only once whether there is a cache
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


if __name__ == "__main__":
    sys.exit(main())
