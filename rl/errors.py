"""Tells a user's errors from bugs, and handles an output that cannot be written any more.

In: an exception. Out: whether it is a user's error, an exit status, a line on stderr. Every module may import this one,
and it imports none of ours.
"""

import contextlib
import os
import sys
import traceback
from typing import TextIO

# What a name on the command line may stand for; `missing` says it of one that stands for nothing.
RUN = "a run folder (the output_dir of `grpo train` or `grpo sft`)"
RECIPE = "a YAML recipe"
MODEL = "a run folder, a Hugging Face folder, a YAML recipe, or a hub id that this machine can reach"

TRACEBACK_VARIABLE = "GRPO_TRACEBACK"
READER_GONE = 141  # exit status
OWN_PACKAGES = ("rewards", "rl")


class MissingError(ValueError):
    """A folder, a file or a model is not there."""


def missing(what: str, rule: str, got: object, hint: str = "") -> MissingError:
    """The error about a folder, a file or a model that is not there. All commands say it in these words.

    Args:
      what: the argument or key that names it. rule: what it must be. hint: a way out, or what was tried.
    """
    text = str(got) if len(str(got)) <= 200 else f"{str(got)[:190]}..."
    way_out = f"; {hint}" if hint else ""
    return MissingError(
        f"{what} must be {rule}, got {text!r}, which does not exist (working directory {os.getcwd()}){way_out}"
    )


def status_without_stdout(error: BaseException) -> int | None:
    """The exit status of a command that ended with this error because its stdout cannot be written any more; None for
    other errors.

    The content of stdout's buffer is dropped, because Python would report the same error again at exit.
    """
    if not isinstance(error, OSError) or error is not getattr(sys.stdout, "failure", None):
        return None
    silence(sys.stdout)
    if isinstance(error, BrokenPipeError):  # the reader of the output (`| head`) has left
        return READER_GONE
    return fail(f"standard output must take what the command prints, got: {error.strerror}; write it elsewhere")


def silence(stream: TextIO) -> None:
    """Sends the buffer of the stream, and all later writes, to the null device. The stream stays open."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def raised_by_tandem(error: BaseException) -> bool:
    """Whether Tandem's own code raised the error. If so, a ValueError is a user's error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals["__name__"].partition(".")[0] in OWN_PACKAGES


def exited_in(error: SystemExit) -> str | None:
    """`file:line` of code of the user that ended the process; None for Tandem's own and for that of `argparse`."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    name = str(frame.f_globals.get("__name__")).partition(".")[0]
    return None if name in (*OWN_PACKAGES, "__main__", "argparse") else f"{frame.f_code.co_filename}:{line}"


def fail(message: str) -> int:
    with contextlib.suppress(OSError):  # there is nowhere left to say it
        print(f"error: {message}", file=sys.stderr)
    return 2
