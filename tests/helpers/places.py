"""Where things lie: the checkout, the tests' files, and a file of reward functions."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ROOT / "tests/files"
REWARDS = FILES / "reward_functions.py"
