"""`grpo launch --processes N [--cpu-devices K] -- COMMAND ...`: one command as N processes on this machine, watched.

In: a command of `grpo` that takes `key=value`. Out: N processes that know each other by the `distributed` keys, and the
exit status. When one process dies, the runtime of the others can only abort, and cannot say which was first. The parent
names it and ends the others. Across machines SLURM and Kubernetes do the same; see examples/launch.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rl.errors import READER_GONE

_SECONDS_TO_FINISH = 5.0  # for the last messages of the others, after the first has ended with an error
COMMANDS = ("train", "sft", "eval", "data passrate")  # that several processes can run together
_RESUMABLE = ("train", "sft")
_ABORTED = 128 + signal.SIGABRT  # the exit status of a shell whose command aborted, as jax's runtime does
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and waits for them.

    Returns:
      0 when all processes succeeded; 1 when one failed, which is named on stderr, and the others were ended; 141 when
      the reader of stdout is gone.
    """
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    address = f"127.0.0.1:{_free_port()}"
    num_first = 4 if arguments.command[0] == "data" else 2  # words of the command, its model and its recipe
    commands = [
        [
            *(sys.executable, "-m", "rl.cli", *arguments.command[:num_first]),
            f"distributed.coordinator_address={address}",
            f"distributed.num_processes={arguments.processes}",
            f"distributed.process_id={number}",
            *arguments.command[num_first:],
        ]
        for number in range(arguments.processes)
    ]
    environment = environment_of(os.environ, arguments.cpu_devices)
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.returncode is None:
                process.send_signal(number)

    # Own sessions: a terminal's Ctrl-C comes once, from here.
    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        processes += [subprocess.Popen(command, env=environment, start_new_session=True) for command in commands]
        numbers = ", ".join(f"{number} (pid {process.pid})" for number, process in enumerate(processes))
        print(f"processes {numbers}", file=sys.stderr)
        return _watch(processes, arguments.command[0])
    finally:
        _end(processes)
        for number, handler in previous.items():
            signal.signal(number, handler)


def environment_of(environment: dict[str, str] | os._Environ[str], cpu_devices: int | None) -> dict[str, str]:
    """The environment of a process. With `cpu_devices` it sees that many virtual devices of the CPU, and no others."""
    if cpu_devices is None:
        return dict(environment)
    flags = [flag for flag in environment.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICE_COUNT_FLAG)]
    return {
        **environment,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"{_DEVICE_COUNT_FLAG}={cpu_devices}"]),
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="grpo launch", description="one command as several processes on this machine, watched"
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--cpu-devices", type=int, default=None, help="virtual CPU devices of each; else what jax finds"
    )
    parser.add_argument("command", nargs="+", help="-- and a command of grpo, for example: -- train recipe.yml")
    arguments = parser.parse_args(argv)
    for name in ("processes", "cpu_devices"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    text = " ".join(arguments.command)
    name = next((name for name in COMMANDS if text.startswith(f"{name} ")), None)
    if name is None or text.removeprefix(f"{name} ").startswith("-"):
        raise ValueError(
            f"grpo launch must start one of {', '.join(COMMANDS)} with its recipe or run first, got "
            f"{text!r}; for example: -- train recipe.yml"
        )
    return arguments


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _watch(processes: list[subprocess.Popen], command: str) -> int:
    """Waits until all processes have succeeded or one has failed. Then names it, and says whether `command` resumes."""
    number_of = {process.pid: number for number, process in enumerate(processes)}
    while any(process.returncode is None for process in processes):
        # waitpid gives the process that ended first, even if the others follow within milliseconds.
        pid, status = os.waitpid(-1, 0)
        if pid not in number_of:
            continue
        number = number_of[pid]
        processes[number].returncode = os.waitstatus_to_exitcode(status)
        returncode = processes[number].returncode
        if returncode == READER_GONE:
            return returncode  # the reader of the output has left, which is no failure
        if returncode:
            cause = f"error: process {number} of {len(processes)} {_cause(returncode)}; the others are ended"
            # A cause from outside is gone with the process. The process's own error would come again.
            goes_on = command in _RESUMABLE and (returncode < 0 or returncode == _ABORTED)
            way_out = ". The same command again goes on from the last checkpoint" if goes_on else ""
            print(cause + way_out, file=sys.stderr)
            if returncode > 0:  # the others know nothing about a killed process
                _wait_for(processes, _SECONDS_TO_FINISH)
            return 1
    return 0


def _cause(returncode: int) -> str:
    if returncode < 0:
        return f"was the first to die, killed by {signal.Signals(-returncode).name}"
    return f"was the first to fail, with exit status {returncode}"


def _wait_for(processes: list[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()  # it would only wait for the process that died
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
