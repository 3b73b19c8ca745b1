"""Tandem: GRPO post-training in JAX, with interchangeable Linen and NNX policies.

    run = rl.train(model=..., data=rows, rewards=[function], output_dir="runs/mine", grpo={"steps": 100})
    run = rl.load("runs/mine")

Both are in `rl.api`, which is imported when one of them is first used, because the import takes seconds.
"""

import importlib
import importlib.util
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.api import Run, load, train

__all__ = ["Run", "load", "train"]


def _check_rewards() -> None:
    """ImportError where `rewards` is another distribution's package. PyPI has packages of that name."""
    home = pathlib.Path(__file__).parents[1]
    spec = importlib.util.find_spec("rewards")
    found = None if spec is None or spec.origin is None else pathlib.Path(spec.origin).parent
    if found is None or not (home / "rewards").samefile(found):
        raise ImportError(
            f"the package 'rewards' must be Tandem's own, {home / 'rewards'}, but the Python path has {found} first; "
            "uninstall or rename that package, or put Tandem before it"
        )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rl' has no attribute {name!r}")
    return getattr(importlib.import_module("rl.api"), name)


_check_rewards()
