"""Kills, and full and broken disks, at every moment of a tiny run, which must then go on as if nothing had happened.

    python -m tests.helpers.chaos --kills 300 --faults all [--seed 0] [--folder FOLDER]

A case is a run that something happens to, once or several times, and the same command again, half of the time in the
other flavour. What must come of it: nothing that the trainer started is alive; the run, when it is complete, has the
metrics (without times, memory and counts of compilations), samples, checkpoint arrays, exported files and names of
files that an undisturbed run has; a start that fails says why in one line, without a traceback.

Kinds of faults:
  kill      SIGKILL at a change of a file below the folder, counted by tests/helpers/chaos.c; tear: amid a write
  kill PHASE  SIGKILL inside a phase of the run (PHASES), after so many events of Python's profiler
  time      SIGKILL after so many seconds
  full      ENOSPC from the k-th write, fsync or rename on
  broken    EIO at the k-th write, fsync or rename, once

A start costs seconds of imports, so all runs are forked from this process, which has imported everything and has
neither a thread nor a jax backend. Glibc on Linux, and a C compiler.
"""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from tests.helpers.metric_lines import steady
from tests.helpers.places import FILES, REWARDS

MODES = {"count": 0, "kill": 1, "tear": 2, "full": 3, "broken": 4}
LIMIT_SECONDS = 300.0
GAME = FILES / "counting_game.py"
_PR_SET_CHILD_SUBREAPER = 36

COMMON = f"""
model:
  arch:
    {{family: llama, hidden_size: 8, intermediate_size: 8, num_layers: 1, num_heads: 1, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 2, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:flat_for_even_answers", name: low}}]}}
sampling: {{max_completion_length: 4}}
optimizer: {{lr: 3e-3}}
grpo: {{steps: STEPS, prompts_per_step: 2, group_size: 2}}
sft: {{steps: STEPS, batch_size: 2, max_completion_length: 4}}
"""


class Recipe(NamedTuple):
    """One kind of run: its command, what it has beside COMMON, and its steps."""

    command: str
    settings: str
    steps: int


RECIPES = {
    "train": Recipe("train", "checkpoint: {every: 1, keep: 2}\neval: {every: 1}\n", 3),
    "short": Recipe("train", "checkpoint: {every: 1, keep: 1}\neval: {every: 0}\n", 2),
    "episodes": Recipe(
        "train",
        "checkpoint: {every: 2, keep: 2}\neval: {every: 0}\n"
        f"rollout: {{environment: '{GAME}:Counting', in_order: true, max_turns: 3, max_turn_tokens: 2}}\n",
        3,
    ),
    "sft": Recipe("sft", "checkpoint: {every: 1, keep: 2}\neval: {every: 0}\n", 2),
}
FAULTY = ("short", "sft")  # what full and broken disks are tried on, at every k in this order

# Where each phase of a command begins (what is wrapped, as the trainer looks it up), and how often it does.
PHASES = {
    "start": ("train", "rl.grpo_trainer", "load_prompts", 1),
    "compile": ("train", "jax._src.compiler", "compile_or_get_cached", 10),
    "rollout": ("train", "rl.rollout.collector", "sample_and_score", 3),
    "judging": ("train", "rewards.runner", "Scoring.result", 7),
    "update": ("train", "rl.training.update", "Updater.update", 3),
    "save": ("train", "rl.state.checkpoint", "Checkpoints.save", 3),
    "evaluation": ("train", "rl.rollout.collector", "evaluate", 4),
    "export": ("sft", "rl.run.output", "write_folder", 1),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a run. at: the number of the change or event, or seconds. entry: of the phase, from 1."""

    kind: str
    at: float
    phase: str = ""
    entry: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.phase + f' {self.entry}, ' if self.phase else ''}{self.at:g}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe's name with what happens to its run.

    is_switched: whether the start after the last fault is in the other flavour.
    """

    recipe: str
    faults: tuple[Fault, ...]
    is_switched: bool

    def __str__(self) -> str:
        return f"{self.recipe}: {'; '.join(map(str, self.faults))}{'; then Linen' if self.is_switched else ''}"


class Chaos:
    """The runs, one after another, and what an undisturbed one looks like."""

    def __init__(self, folder: pathlib.Path, library: str, names: Sequence[str]):
        self._folder = folder
        self._library = ctypes.CDLL(library)
        self._library.chaos_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long)
        self._library.chaos_changes.restype = self._library.chaos_failures.restype = ctypes.c_long
        self.changes: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.num_kills = 0  # that have met a run which was not done yet
        self._wanted: dict[str, dict[str, Any]] = {}
        for name in names:
            text = COMMON.replace("STEPS", str(RECIPES[name].steps)) + RECIPES[name].settings
            text += f"logging: {{compilation_cache: {folder / 'cache'}}}\n"
            (folder / f"{name}.yml").write_text(text)
            for flavour in ("false", "true") if name == "train" else ("true",):  # the first run fills the cache
                out = self._fresh(name)
                start = time.monotonic()
                status, log = self._run(name, out, f"pure_nnx={flavour}", Fault("count", 0))
                self.seconds[name] = time.monotonic() - start
                if status != 0:
                    raise RuntimeError(f"the undisturbed run failed with {status}:\n{log}")
            counted = json.loads((folder / "counts.json").read_text())
            self.changes[name], self.failures[name] = counted["changes"], counted["failures"]
            self._wanted[name] = self._outcome(name, out)

    def check(self, case: Case) -> list[str]:
        """What is wrong with the end of a case, in words; nothing where it is right."""
        out, problems = self._fresh(case.recipe), []
        for fault in case.faults:
            status, log = self._run(case.recipe, out, None, fault)
            self.num_kills += status == -signal.SIGKILL
            if fault.kind in ("full", "broken"):
                problems += _problems_of_end(status, log)
                problems += [f"hang: {log[-500:]}"] if status is None else []
            elif status not in (0, -signal.SIGKILL):
                problems.append(f"status {status} in place of a kill: {log[-3000:]}")
            elif fault.phase and status == 0:
                problems.append(f"phase {fault.phase} did not come to its entry {fault.entry}")
        status, log = self._run(case.recipe, out, "pure_nnx=false" if case.is_switched else None, None)
        if status != 0:
            return [*problems, f"the next start ended with {status}: {log[-3000:]}"]
        outcome = self._outcome(case.recipe, out)
        problems += [
            f"{name} differ: {_difference(outcome[name], wanted)}"
            for name, wanted in self._wanted[case.recipe].items()
            if outcome[name] != wanted
        ]
        return problems

    def _fresh(self, name: str) -> pathlib.Path:
        out = self._folder / "runs" / name
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        return out

    def _run(self, name: str, out: pathlib.Path, override: str | None, fault: Fault | None) -> tuple[int | None, str]:
        """(exit status, console) of one start; None when it hangs. Afterwards no process of it is left."""
        log = self._folder / "log"
        child = os.fork()
        if child == 0:
            self._become(name, out, override, fault, log)
        timed = fault if fault is not None and fault.kind == "time" else None
        status = _wait(child, timed.at if timed else LIMIT_SECONDS)
        if status is None:
            os.kill(child, signal.SIGKILL)
            killed = _wait(child, LIMIT_SECONDS)
            status = killed if timed else None
        _wait_for_orphans()
        return status, log.read_text(errors="replace")

    def _become(
        self, name: str, out: pathlib.Path, override: str | None, fault: Fault | None, log: pathlib.Path
    ) -> NoReturn:
        """Turn this fork into `grpo COMMAND`."""
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 1
        try:
            from rl import cli

            if fault is not None and fault.phase:
                _kill_in(fault)
            elif fault is not None and fault.kind in MODES:
                self._library.chaos_arm(os.fsencode(out), MODES[fault.kind], int(fault.at))
            arguments = [RECIPES[name].command, str(self._folder / f"{name}.yml"), f"output_dir={out}"]
            status = cli.main([*arguments, *([override] if override else [])])
            if fault is not None and fault.kind == "count":
                counts = {"changes": self._library.chaos_changes(), "failures": self._library.chaos_failures()}
                (self._folder / "counts.json").write_text(json.dumps(counts))
            if status == 0:
                self._library.chaos_arm(b"", 0, 0)
                arrays = _array_hashes(out / "checkpoints" / str(RECIPES[name].steps) / "state")
                (self._folder / "arrays.json").write_text(json.dumps(arrays))
        except BaseException:  # noqa: BLE001  what Python itself would do at the end of a program
            traceback.print_exc()
            status = 1
        finally:
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _outcome(self, name: str, out: pathlib.Path) -> dict[str, Any]:
        """What must be the same in every complete run."""
        from rl.run.metrics import read_metrics, read_samples

        metrics = [steady(line) for line in read_metrics(out)]
        files = {path.relative_to(out).as_posix() for path in out.glob("*")}
        if name == "episodes":  # a run that ends amid them may end workers that are asked, whose stacks are in the log
            files -= {"rewards.log"}
        # A kill may leave an old checkpoint more than are kept; a run that has nothing left to do lets it lie.
        older = {str(step) for step in range(RECIPES[name].steps)}
        steps = {path.name for path in out.glob("checkpoints/*")} - older
        files |= {f"checkpoints/{step}" for step in steps}
        exported = {path.name: path.read_bytes() for path in sorted(out.glob("export/*"))}
        return {
            "metrics": metrics,
            "samples": read_samples(out),
            "arrays": json.loads((self._folder / "arrays.json").read_text()),
            "files": sorted(files),
            "exported files": exported,
        }


def cases_of(chaos: Chaos, name: str, num_kills: int, faults: int | None, seed: int) -> Iterator[Case]:
    """`num_kills` kills of one recipe, one to three in a case; then full and broken disks, as in `cases`."""
    numbers = random.Random(seed)
    while num_kills > 0:
        kills = [
            Fault(numbers.choice(["kill", "tear"]), numbers.randint(1, chaos.changes[name]))
            for _ in range(min(numbers.randint(1, 3), num_kills))
        ]
        yield Case(name, tuple(kills), numbers.random() < 0.5)
        num_kills -= len(kills)
    yield from _disk_cases(chaos, [name], faults, numbers)


def cases(chaos: Chaos, num_kills: int, faults: int | None, seed: int) -> Iterator[Case]:
    """`num_kills` kills of every kind, then as many full and broken disks as `faults`; None: at every k, both."""
    numbers = random.Random(seed)
    phases, done, turn = list(PHASES), 0, 0
    while done < num_kills:
        kind = "phase" if turn < len(phases) else numbers.choice(["phase", "change", "time"])
        name = "sft" if kind == "change" and numbers.random() < 0.3 else "train"
        if kind == "phase":
            phase = phases[turn % len(phases)]
            name, _, _, entries = PHASES[phase]
            kills = [Fault("kill", int(10 ** numbers.uniform(0, 4)), phase, numbers.randint(1, entries))]
        elif kind == "change":
            kills = [Fault(numbers.choice(["kill", "tear"]), numbers.randint(1, chaos.changes[name]))]
        else:
            kills = [Fault("time", round(numbers.uniform(0, chaos.seconds[name] / 2), 3))]
        while turn >= len(phases) and len(kills) < 4 and done + len(kills) < num_kills and numbers.random() < 0.5:
            kills.append(Fault("kill", numbers.randint(1, chaos.changes[name] // 3)))  # what is left is less
        yield Case(name, tuple(kills), numbers.random() < 0.5)
        done, turn = done + len(kills), turn + 1
    if faults != 0:
        yield from _disk_cases(chaos, FAULTY, faults, numbers)


def _disk_cases(chaos: Chaos, names: Sequence[str], faults: int | None, numbers: random.Random) -> Iterator[Case]:
    """Full and broken disks, as many as `faults`; None: at every k, both."""
    places = [
        (name, k, kind) for name in names for k in range(1, chaos.failures[name] + 1) for kind in ("full", "broken")
    ]
    if faults is not None:
        places = numbers.sample(places, min(faults, len(places)))
    for number, (name, k, kind) in enumerate(places):
        yield Case(name, (Fault(kind, k),), number % 4 in (1, 2))


def _kill_in(fault: Fault) -> None:
    """Has this process end itself inside a phase, after `fault.at` events of the profiler, or at the phase's end."""
    _, module, path, _ = PHASES[fault.phase]
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    inner: Callable[..., Any] = getattr(owner, name)
    entries = events = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal events
        events += 1
        if events >= fault.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def outer(*arguments: Any, **options: Any) -> Any:
        nonlocal entries
        entries += 1
        if entries != fault.entry:
            return inner(*arguments, **options)
        sys.setprofile(count)
        inner(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, outer)


def _problems_of_end(status: int | None, log: str) -> list[str]:
    """What is wrong with how a start ended that an error of the disk has met."""
    if status == 0 or status is None:
        return []
    problems = [f"a traceback: {log[-800:]}"] if "Traceback (most recent call last)" in log else []
    if status < 0 or not any(line.startswith("error: ") for line in log.splitlines()):
        problems.append(f"status {status} without a word of why: {log[-800:]}")
    return problems


def _array_hashes(item: pathlib.Path) -> dict[str, str]:
    from rl.state.checkpoint_files import array_hash, read_array, stored_arrays

    return {"/".join(array.path): array_hash(read_array(array)) for array in stored_arrays(item)}


def _difference(got: Any, wanted: Any) -> str:
    if isinstance(wanted, list) and isinstance(got, list) and len(got) == len(wanted):
        got, wanted = next((a, b) for a, b in zip(got, wanted, strict=True) if a != b)
    if isinstance(wanted, dict) and isinstance(got, dict):
        names = [name for name in wanted.keys() | got.keys() if got.get(name) != wanted.get(name)]
        return "; ".join(f"{n}: {str(got.get(n))[:100]} for {str(wanted.get(n))[:100]}" for n in sorted(names)[:5])
    return f"{str(got)[:400]} for {str(wanted)[:400]}"


def _wait(child: int, seconds: float) -> int | None:
    """A child's exit code; None if it lives after so long."""
    deadline = time.monotonic() + seconds
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _wait_for_orphans() -> None:
    """Returns when no process that a run started is left; this process adopts them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.01)
            continue
        return
    raise RuntimeError("a process that the run started is still alive")


def build(folder: pathlib.Path) -> str:
    """Compiles tests/helpers/chaos.c; RuntimeError with what the compiler says."""
    library = folder / "chaos.so"
    compiler = os.environ.get("CC", "cc")
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(pathlib.Path(__file__).with_name("chaos.c")),
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler} cannot compile tests/helpers/chaos.c: {done.stderr}")
    return str(library)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills, and full and broken disks, at every moment of a tiny run.")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--faults", default="12", help="how many full and broken disks; all: at every k, both")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="of this recipe only, in place of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="cases to leave out, of a run that was stopped")
    parser.add_argument("--folder", help="for the runs; what the last case left stays there")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library is None:  # start again under the library, with what jax reads when it is imported
        folder = pathlib.Path(arguments.folder or tempfile.mkdtemp(prefix="chaos-"))
        folder.mkdir(parents=True, exist_ok=True)
        library = build(folder)
        environment = os.environ | {"LD_PRELOAD": library, "JAX_PLATFORMS": "cpu"}
        environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-m",
            "tests.helpers.chaos",
            *sys.argv[1:],
            "--folder",
            str(folder),
            "--library",
            library,
        ]
        try:
            return subprocess.run(command, env=environment, check=False).returncode
        finally:
            if arguments.folder is None:
                shutil.rmtree(folder, ignore_errors=True)
    for module in (
        "rl.grpo_trainer",
        "rl.sft_trainer",
        "rl.state.checkpoint_files",
        "transformers.tokenization_utils_fast",
    ):
        importlib.import_module(module)
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a fork would lose the other threads"
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    gc.freeze()  # no fork looks for garbage among what was imported, and copies its pages by that
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    names = [*(("train", "sft") if arguments.kills else ()), *(FAULTY if arguments.faults != "0" else ())]
    names = names if arguments.recipe is None else [arguments.recipe]
    chaos = Chaos(pathlib.Path(arguments.folder), arguments.library, list(dict.fromkeys(names)))
    print(f"changes {chaos.changes}, that can fail {chaos.failures}, seconds {chaos.seconds}", flush=True)
    faults = None if arguments.faults == "all" else int(arguments.faults)
    num_wrong = num_cases = 0
    all_cases = cases(chaos, arguments.kills, faults, arguments.seed)
    if arguments.recipe is not None:
        all_cases = cases_of(chaos, arguments.recipe, arguments.kills, faults, arguments.seed)
    for number, case in enumerate(all_cases):
        if number < arguments.skip:
            continue
        num_cases += 1
        problems = chaos.check(case)
        print(f"{'WRONG' if problems else 'ok'} {number} {case}", flush=True)
        for problem in problems:
            print(f"  {problem}", flush=True)
        num_wrong += bool(problems)
    used = sum(os.times()[:4])
    print(f"{num_cases} cases, {chaos.num_kills} kills, {num_wrong} wrong, {used:.0f} s of CPU", flush=True)
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
