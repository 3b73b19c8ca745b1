"""The option `--step` of commands that read a run: the number of a checkpoint, or `best`."""

import argparse

from rl.run_folder.contents import BEST, Step


def step_option(text: str) -> Step:
    """The value of `--step`, as a type of argparse."""
    if text == BEST:
        return text
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be the number of a checkpoint or {BEST}, got {text[:80]!r}")
    return int(text)
