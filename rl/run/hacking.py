"""Signs that a policy earns its reward in another way than was meant.

In: the metrics of a step, of which `rl.rollout.hacking` makes those that are looked at here, and their values in the
last steps. Out: signs in words, each with the key to change. Not here: how long a sign must last, and how often it is
said (`rl.run.health`).

    one function rules      the share of the spread of weighted rewards that is one function's
    a watched function      the reward rises while a function of weight 0 falls
    length                  rewards go with the length of completions
    equal completions       one completion answers different prompts
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence

from rl.config.sections import HealthSection

DOMINANT, LENGTH, EQUAL = "reward/dominant_share", "reward/length_correlation", "equal_completions_share"  # metrics
VARIANCE = "variance_share"  # reward/FUNCTION/variance_share
_SHARE = re.compile(rf"reward/(?P<name>.+)/{VARIANCE}", re.DOTALL)
_REWARD = "reward/mean"
_NO_RESIDUAL = 1e-12  # of the sum of squares, below which values count as being on a line


def remembered(metrics: Mapping[str, float], watched: Collection[str]) -> list[str]:
    """The metrics whose values in the last `health.trend_window` steps are needed.

    Args:
      watched: names of the reward functions of weight 0.
    """
    names = [_REWARD, LENGTH, *(f"reward/{name}/mean" for name in watched)]
    return [name for name in names if name in metrics]


def signs_of_hacking(
    section: HealthSection,
    metrics: Mapping[str, float],
    recent: Mapping[str, Sequence[float]],
    watched: Collection[str],
) -> dict[str, str]:
    """{sign: words}.

    Args:
      metrics: of the step.
      recent: the last values of the metrics that `remembered` names, that of the step included, oldest first.
      watched: names of the reward functions of weight 0.
    """
    return {
        **_one_rules(section.dominant_share, metrics),
        **_watched_falls(section, recent, watched),
        **_follows_length(section, recent),
        **_equal_completions(section.equal_completions_share, metrics),
    }


def trend(values: Sequence[float]) -> float:
    """How surely values rise: the slope of the least-squares line over its standard error (Student's t,
    https://en.wikipedia.org/wiki/Simple_linear_regression). Infinite for values on a line; 0 for fewer than three, and
    for equal ones.
    """
    num = len(values)
    if num < 3:
        return 0.0
    centre, mean = (num - 1) / 2, math.fsum(values) / num
    squares = math.fsum((place - centre) ** 2 for place in range(num))
    slope = math.fsum((place - centre) * (value - mean) for place, value in enumerate(values)) / squares
    total = math.fsum((value - mean) ** 2 for value in values)
    residual = total - slope**2 * squares
    if residual <= _NO_RESIDUAL * total:
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / math.sqrt(residual / (num - 2) / squares)


def _one_rules(threshold: float | None, metrics: Mapping[str, float]) -> dict[str, str]:
    shares = {match["name"]: metrics[name] for name in metrics if (match := _SHARE.fullmatch(name))}
    if threshold is None or not shares or not metrics.get(DOMINANT, math.nan) >= threshold:
        return {}
    name = max(shares, key=lambda key: shares[key])
    return {
        "dominant": f"{shares[name]:.0%} of the spread of weighted rewards within groups is that of {name!r}, although "
        "other functions with a weight are far from what they can give: they teach next to nothing; change the weights "
        "in rewards.functions, or set grpo.aggregation=normalize_then_sum"
    }


def _watched_falls(
    section: HealthSection, recent: Mapping[str, Sequence[float]], watched: Collection[str]
) -> dict[str, str]:
    threshold, window, rewards = section.watch_trend, section.trend_window, recent.get(_REWARD, [])
    if threshold is None or len(rewards) < window or trend(rewards) < threshold:
        return {}
    signs = {}
    for name in watched:
        values = recent.get(f"reward/{name}/mean", [])
        if len(values) == window and trend(values) <= -threshold:
            signs[f"watched {name}"] = (
                f"over the last {window} steps the reward rose while {name!r}, a function of weight 0, fell from about "
                f"{_end(values, first=True):.3g} to {_end(values):.3g}: the policy may earn rewards in another way "
                f"than was meant; read samples.jsonl, and give {name!r} a weight in rewards.functions, or raise "
                "grpo.beta"
            )
    return signs


def _follows_length(section: HealthSection, recent: Mapping[str, Sequence[float]]) -> dict[str, str]:
    values = recent.get(LENGTH, [])
    if section.length_correlation is None or len(values) < section.trend_window:
        return {}
    mean = math.fsum(values) / len(values)
    if abs(mean) < section.length_correlation:
        return {}
    which, way_out = "shorter", "raise sampling.min_completion_length"
    if mean > 0:
        which, way_out = "longer", "set rewards.overlong_buffer or grpo.loss_type=dr_grpo"
    return {
        "length": f"within groups {which} completions have the higher rewards (correlation {mean:.2f} over the last "
        f"{len(values)} steps): length may be what is learned; {way_out}, or change what rewards.functions count"
    }


def _equal_completions(threshold: float | None, metrics: Mapping[str, float]) -> dict[str, str]:
    share = metrics.get(EQUAL, math.nan)
    if threshold is None or not share >= threshold:
        return {}
    return {
        "equal completions": f"{share:.0%} of the completions are one and the same, for different prompts: rewards do "
        "not ask for an answer to the prompt, or the policy has collapsed; look at rewards.functions, raise "
        "sampling.temperature or grpo.beta, or lower optimizer.lr"
    }


def _end(values: Sequence[float], first: bool = False) -> float:
    """The mean of the first or last quarter of values."""
    count = max(len(values) // 4, 1)
    part = values[:count] if first else values[-count:]
    return math.fsum(part) / count
