"""The memory that compiled programs need on a device, and whether a run fits.

In: a run's programs (`rl.tools.programs.loop_programs`), each compiled. Out: `CompileReport`, with bytes of one device.
Not here: which keys to change (`rl.tools.programs.compile_advice`), the report as JSON and text
(`rl.tools.programs.compile_text`).
"""

import dataclasses
import re

import jax

from rl.sampler.contract import DECODE
from rl.tools.programs.hlo import Work, work_of
from rl.tools.programs.loop_programs import Loop, LoopProgram
from rl.tools.programs.topologies import Chip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program on one device.

    Attributes:
      arguments, outputs, temporaries: bytes. aliased: bytes of outputs that reuse the memory of arguments.
      peak: bytes of all these together. needed: peak plus what the run holds meanwhile.
      seconds, host_bytes: the time of compiling, and the largest size of the process meanwhile.
      work: its operations; None if it is refused, or its text cannot be read.
      refused: the compiler's message if the program does not fit; the numbers are then the compiler's, or 0.
      unread: the reason why its text cannot be read.
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
class CompileReport:
    """All programs of a run."""

    loop: Loop
    chip: Chip | None
    programs: list[ProgramReport]

    @property
    def worst(self) -> ProgramReport:
        """The program with the largest need."""
        return max(self.programs, key=lambda program: (program.refused is not None, program.needed))

    @property
    def fits(self) -> bool:
        """Whether every program fits beside the memory that the run holds."""
        return self.worst.refused is None and self.worst.needed <= self.loop.memory

    def kv_budget(self) -> int:
        """Bytes left for keys and values during drawing."""
        decode = next((p for p in self.programs if p.name == DECODE), None)
        resident = self.loop.resident
        held = resident.state + resident.reference + resident.reward_models + resident.copy
        return max(self.loop.memory - held - (decode.temporaries if decode else 0), 0)

    def terms(self) -> dict[str, int]:
        """{term: bytes} of memory, the largest first."""
        resident = self.loop.resident
        terms = {
            "weights": resident.weights,
            "optimizer state": resident.moments,
            "reference": resident.reference,
            "reward models": resident.reward_models,
            "weights of the rollouts": resident.copy,
            "keys and values": resident.cache,
            **{f"temporaries of {p.name}": p.temporaries for p in self.programs},
        }
        return dict(sorted(((k, v) for k, v in terms.items() if v), key=lambda item: -item[1]))


def report_of(program: LoopProgram, compiled: jax.stages.Compiled, seconds: float, host_bytes: int) -> ProgramReport:
    """The report of a compiled program."""
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
    """(text of a program, None), or (None, reason). A libtpu may write instructions that this jaxlib does not know."""
    try:
        return compiled.as_text(), None
    except jax.errors.JaxRuntimeError as error:
        return None, str(error).splitlines()[0][:200]


def report_refused(program: LoopProgram, message: str, seconds: float, host_bytes: int) -> ProgramReport:
    """The report of a program that the compiler found too large for the device."""
    # libtpu uses either wording.
    found = re.search(r"(?:Used |total memory required[^(]*\()([\d.]+)([KMGT]?)", message)
    used = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    said = message[found.start() :].splitlines()[0][:200] if found else message.splitlines()[0][:200]
    return ProgramReport(program.name, 0, 0, 0, 0, used, used + program.held, None, seconds, host_bytes, said)
