"""The time that chat templates are told: that of a run's start, in every later part of the run as well.

In: a configuration. Out: a time in ISO 8601, from run.json where the run has begun, else the present. Not here: the
templates (`rl.data.tokenizer`).
"""

import datetime
import functools

from rl.config.load import Config
from rl.devices import hosts
from rl.run_folder.contents import is_run_folder, read_identity
from rl.run_folder.mirror import run_path

CLOCK = "clock"  # key in run.json


def run_clock(config: Config) -> str:
    """The clock of the run of this configuration, the same in all of its processes. ValueError for a run.json that
    cannot be read.
    """
    return hosts.from_first(functools.partial(_clock, config))


def _clock(config: Config) -> str:
    if config.output_dir is not None and not config.checkpoint.overwrite and is_run_folder(run_path(config)):
        clock = read_identity(run_path(config)).get(CLOCK)
        if isinstance(clock, str):
            return clock
    return _now()


@functools.cache
def _now() -> str:
    """Asked once, so that all that a process renders has one time."""
    return datetime.datetime.now().replace(microsecond=0).isoformat()
