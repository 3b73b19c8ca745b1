"""Tandem: GRPO post-training in JAX, with interchangeable Linen and NNX policies."""

import importlib.util
import pathlib


def _check_rewards() -> None:
    """ImportError where `rewards` is another distribution's package: PyPI has some of that name."""
    home = pathlib.Path(__file__).parents[1]
    spec = importlib.util.find_spec("rewards")
    found = None if spec is None or spec.origin is None else pathlib.Path(spec.origin).parent
    if found is None or not (home / "rewards").samefile(found):
        raise ImportError(
            f"the package 'rewards' must be Tandem's own, {home / 'rewards'}, but the Python path has {found} first; "
            "uninstall or rename that package, or put Tandem before it"
        )


_check_rewards()
