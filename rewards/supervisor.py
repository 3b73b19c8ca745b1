"""The supervisor of one reward worker: run by its path, by `rewards.process`, with the standard library alone.

    python -I -S supervisor.py CONTROL LIMIT COMMAND...

It starts COMMAND, which takes over its standard input, output and error, and ends it with everything that it started,
also what left the process group or whose parents are dead. CONTROL is the descriptor of a socket to the runner. LIMIT
is the memory that all of these processes may hold together, in bytes; 0 is no limit, and elsewhere than on Linux there
is none. It imports nothing of a user or of this project, so nothing but a signal can stop it.

From the runner, one byte each: `k` ends everything, `d` first has the worker write its stack to the log. A closed
socket means that the runner is gone. The worker's input is closed then too, and it gets a moment to end by itself. To
the runner, one line each: `worker PID` after the start, `memory BYTES` when it is ended for its memory, and last, when
nothing is left, `exit CODE`, where a negative number is a signal's.

On Linux the supervisor adopts every descendant whose parent dies (PR_SET_CHILD_SUBREAPER), so it has a child for as
long as anything is left, and the worker is killed should the supervisor die. Elsewhere it ends the process group.
"""

import ctypes
import os
import select
import signal
import sys
import time

_IS_LINUX = sys.platform == "linux"
_HAS_PROC = os.path.isdir("/proc/self/task")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

_MEMORY_SECONDS = 0.2  # between two looks at the memory
_RUNNER_SECONDS = 1.0  # between two looks at the runner, because a fork of it may hold the socket open
_EXIT_SECONDS = 3.0  # for a worker without a runner, and its exit handlers
_DUMP_SECONDS = 0.05  # for the signal handler that writes the stack of a hung worker to the log
_SWEEP_SECONDS = 0.001  # between the first rounds of killing, then twice as long each time
_LONGEST_SWEEP_SECONDS = 0.1
_GIVE_UP_SECONDS = 10.0  # because a process in the kernel's hands, or another user's, cannot be ended
# RLIMIT_DATA counts reserved memory, which may be much more than resident memory.
_RESERVED_PER_RESIDENT = 2


def main() -> None:
    """Start the worker, and see to its end."""
    control, limit, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(control, False)
    runner = os.getppid()
    _catch_signals()
    woken, wakes = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    if _IS_LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    supervisor, worker = os.getpid(), os.fork()
    if worker == 0:
        _become(command, supervisor, limit)
    _leave_pipes()
    _tell(control, f"worker {worker}")
    code = _watch(control, woken, runner, worker, limit)
    _tell(control, f"exit {_end_all(worker, code)}")


def _catch_signals() -> None:
    """Installs handlers so that no signal that can be caught ends a supervisor. Handlers, unlike ignored signals, are
    not inherited.
    """
    for number in {signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1,
                   signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE}:  # fmt: skip
        signal.signal(number, lambda number, frame: None)


def _become(command: list[str], supervisor: int, limit: int) -> None:
    """Turn this forked process into the worker."""
    try:
        os.setsid()
        if _IS_LINUX:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if limit:
                _limit_data(limit * _RESERVED_PER_RESIDENT)
        if os.getppid() == supervisor:  # otherwise the supervisor died before the worker could hear of it
            os.execv(command[0], command)
    except (OSError, ValueError) as error:
        os.write(2, f"the worker process cannot be started: {error}\n".encode())
    os._exit(127)


def _limit_data(limit: int) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _leave_pipes() -> None:
    """Close the worker's input and output here, because nobody else may hold them open."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _watch(control: int, woken: int, runner: int, worker: int, limit: int) -> int | None:
    """Wait for a reason to end everything. Returns the worker's exit code if it ended by itself."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    wait, deadline = _MEMORY_SECONDS if limit and _IS_LINUX else _RUNNER_SECONDS, None
    while deadline is None or time.monotonic() < deadline:
        ready = {descriptor for descriptor, _ in poll.poll(wait * 1000)}
        if woken in ready:
            os.read(woken, 512)
            _, code = _reap(worker)
            if code is not None:
                return code
        if control in ready or os.getppid() != runner:
            order = os.read(control, 1) if control in ready else b""
            if order == b"d":
                os.kill(worker, signal.SIGUSR1)
                time.sleep(_DUMP_SECONDS)
            if order:
                return None
            if deadline is None:
                deadline = time.monotonic() + _EXIT_SECONDS
                poll.unregister(control)
        if limit and _IS_LINUX and (held := _held_beyond(limit)):
            _tell(2, f"the worker's processes held {held} bytes of memory, allowed are {limit}: ended")
            _tell(control, f"memory {held}")
            return None
    return None


def _end_all(worker: int, code: int | None) -> int:
    """Kill every process below this one. Returns the worker's exit code; code: what is known of it.

    Each process is stopped when it is found, before its children are looked for, until no new one is found. A stopped
    process starts nothing, so the next round finds fewer. Only then they are killed. Processes with a dead parent are
    found as children of this process.
    """
    pause, deadline = _SWEEP_SECONDS, time.monotonic() + _GIVE_UP_SECONDS
    while True:
        stopped: set[int] = set()
        while new := _descendants(signal.SIGSTOP) - stopped:
            stopped |= new
        for process in stopped:
            _signal(process, signal.SIGKILL)
        if not _HAS_PROC:
            _signal_group(worker)
        is_last, found = _reap(worker)
        code = found if code is None else code
        if is_last or time.monotonic() > deadline:
            return -signal.SIGKILL if code is None else code
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SWEEP_SECONDS)


def _reap(worker: int) -> tuple[bool, int | None]:
    """Reap dead children. Returns whether none is left, and the worker's exit code if it is among them."""
    code = None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True, code
        if process == 0:
            return False, code
        if process == worker:
            code = os.waitstatus_to_exitcode(status)


def _descendants(sent: int = 0) -> set[int]:
    """Every process below this one. sent: a signal for each, before its own children are looked for."""
    found: set[int] = set()
    waiting = [os.getpid()]
    is_listed = not _HAS_PROC or os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    parents = None if is_listed else _parents()
    while waiting:
        for child in _children(waiting.pop(), parents):
            if child not in found:
                found.add(child)
                waiting.append(child)
                if sent:
                    _signal(child, sent)
    return found


def _children(process: int, parents: dict[int, int] | None) -> list[int]:
    if parents is not None:
        return [child for child, parent in parents.items() if parent == process]
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                children += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # dead meanwhile, another user's, or no /proc
        pass
    return children


def _parents() -> dict[int, int]:
    """The parent of every process, where the kernel does not list children."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return parents


def _held_beyond(limit: int) -> int:
    """The memory that the processes below this one hold together, in bytes, if it is more than `limit`, else 0."""
    processes = _descendants()
    # Pages that processes share are in the resident size of each; the kernel's fair count of them is slow to read.
    if sum(map(_resident, processes)) <= limit:
        return 0
    held = sum(map(_proportional, processes))
    return held if held > limit else 0


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):  # it died meanwhile
        return 0


def _proportional(process: int) -> int:
    """Resident memory, shared pages divided by the number of processes that share them."""
    try:
        with open(f"/proc/{process}/smaps_rollup", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:"))
    except (PermissionError, StopIteration):  # a process that may not be looked at, or is dying
        return _resident(process)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except (ProcessLookupError, PermissionError):  # dead, or another user's by a set-user-ID program
        pass


def _signal_group(worker: int) -> None:
    try:
        os.killpg(worker, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left; PermissionError: nobody but the dead, on macOS
        pass


def _tell(control: int, line: str) -> None:
    try:
        os.write(control, f"{line}\n".encode())
    except OSError:  # the runner is gone
        pass


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    main()
