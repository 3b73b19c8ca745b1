"""Which errors are a user's, and what a command says and returns when nobody reads its output any more.

In: an exception. Out: whether it is a user's error, an exit status, a line on stderr. Everything may import this
module; it imports nothing of ours.
"""

import contextlib
import os
import sys
import traceback
from typing import TextIO

TRACEBACK_VARIABLE = "GRPO_TRACEBACK"
READER_GONE = 141  # exit status
OWN_PACKAGES = ("rewards", "rl")


def status_without_stdout(error: BaseException) -> int | None:
    """The exit status of a command that ended with this error because its stdout takes nothing any more; None where
    that is not why. What stdout still holds is dropped, or Python would complain of it once more in the end.
    """
    if not isinstance(error, OSError) or error is not getattr(sys.stdout, "failure", None):
        return None
    silence(sys.stdout)
    if isinstance(error, BrokenPipeError):  # whoever read the output (`| head`) has seen enough
        return READER_GONE
    return fail(f"standard output must take what the command prints, got: {error.strerror}; write it elsewhere")


def silence(stream: TextIO) -> None:
    """Sends to nowhere what the stream holds and what will be written to it; it stays open."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def raised_by_tandem(error: BaseException) -> bool:
    """Whether an error comes from Tandem's own code: a user's then, if it is a ValueError."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals["__name__"].partition(".")[0] in OWN_PACKAGES


def fail(message: str) -> int:
    with contextlib.suppress(OSError):  # there is nowhere left to say it
        print(f"error: {message}", file=sys.stderr)
    return 2
