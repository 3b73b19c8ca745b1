"""Watches the health of a run: skipped updates, spikes, and signs that the policy collapses or hacks its rewards.

In: the `health` section, the metrics of each step, and a small JSON-able state that checkpoints carry, so that a
resumed run warns where an uninterrupted one does. Out: warnings in words, whether all samples of the step should be
kept, and an error when nothing is learned any more. Not here: the guard that skips an update
(`rl.training.train_step`), the rounding of updates (`rl.state.optimizer`), the signs of hacked rewards themselves
(`rl.run.hacking`).
"""

import math
import re
import statistics
from collections.abc import Collection, Mapping
from typing import NamedTuple

from rewards.batch import COUNTS
from rl.config.sections import HealthSection
from rl.run.hacking import remembered, signs_of_hacking

_MIN_HISTORY = 10  # steps, before a value can be called unusual
_NORMAL_SPREAD = 1.4826  # standard deviation of normal numbers / median of their absolute deviations
_MIN_SPREAD = 0.05  # of the median; otherwise almost equal values would make small steps look large
_NO_SPREAD = 1e-9  # of rewards, in parts of their mean: what rounding leaves of equal ones
_MISMATCH = "logprob_difference/mean"
_MIN_SPREADS = {_MISMATCH: 1e-3}  # nats: with a threshold of 10 a hundredth, far above what float32 rounds
_WAY_OUT = {
    "kl": "lower optimizer.lr or raise grpo.beta",
    _MISMATCH: "set grpo.sampler_is_correction=true, lower optimizer.lr, or set model.dtype to float32",
    "grad_norm": "lower optimizer.lr or optimizer.max_grad_norm",
}
_SKIPPED = "loss or gradient norm was not finite"
_KINDS = {kind if kind != "timeout" else "timeouts": kind for kind in COUNTS}  # of failures, by the part of a metric
_FAILURE = re.compile(rf"reward/(?P<name>.+)/(?P<kind>{'|'.join(_KINDS)})", re.DOTALL)  # a metric
_SAMPLES = "samples.jsonl of a GRPO run holds every completion of the step"


class HealthState(NamedTuple):
    """The state that is carried from step to step.

    Attributes:
      num_skipped: updates of the run that were skipped.
      num_skipped_last: of those, the ones since the last step in which an update was made.
      recent: the last finite values of the metrics that are watched for spikes and for hacked rewards, oldest first.
      lasting: for each sign of collapse or hacked rewards the number of steps in a row that showed it.
    """

    num_skipped: int
    num_skipped_last: int
    recent: dict[str, list[float]]
    lasting: dict[str, int]


class Checkup(NamedTuple):
    """What one step showed.

    Attributes:
      health: for the next step.
      warnings: in words, for the console.
      keep_samples: whether all samples of the step should be kept, for something unusual happened in it.
      cause_of_skips: why updates of the step were skipped, in words.
      metrics: of the step, with what the checkup adds, see `rl.run.checkup`.
    """

    health: HealthState
    warnings: list[str]
    keep_samples: bool
    cause_of_skips: str | None = None
    metrics: Mapping[str, float] = {}


def healthy() -> HealthState:
    """The state of a run that has done nothing yet."""
    return HealthState(0, 0, {}, {})


def examine(
    section: HealthSection,
    state: HealthState,
    metrics: Mapping[str, float],
    num_updates: int = 1,
    cause_of_skips: str | None = None,
    watched: Collection[str] = (),
) -> Checkup:
    """Looks at the metrics of one step of `num_updates` updates.

    Args:
      metrics: `skipped_updates` is needed; of the others those that are there are looked at.
      cause_of_skips: why updates of the step were skipped, in words.
      watched: names of the reward functions of weight 0.
    """
    skipped = int(metrics["skipped_updates"])
    unusual = _skips(skipped, cause_of_skips or _SKIPPED) + _spikes(section, state, metrics)
    windows = dict.fromkeys(_watched(section, metrics), section.spike_window)
    windows |= dict.fromkeys(remembered(metrics, watched), section.trend_window)
    recent = {
        name: [*state.recent.get(name, []), float(metrics[name])][-window:]
        for name, window in windows.items()
        if math.isfinite(metrics.get(name, math.nan))
    }
    recent = {**state.recent, **recent}
    nothing = _nothing_to_learn_from(metrics)
    signs = nothing or _signs(section, metrics) | signs_of_hacking(section, metrics, recent, watched)
    patience = 1 if nothing else section.patience
    lasting = {sign: state.lasting.get(sign, 0) + 1 for sign in signs}
    warnings = [*unusual, *(text for sign, text in signs.items() if _is_due(lasting[sign], patience))]
    in_a_row = state.num_skipped_last + skipped if skipped == num_updates else 0
    state = HealthState(state.num_skipped + skipped, in_a_row, recent, lasting)
    return Checkup(state, warnings, bool(unusual), cause_of_skips)


def raise_if_stuck(section: HealthSection, checkup: Checkup) -> None:
    """ValueError when so many updates in a row were skipped that going on is pointless."""
    limit, skipped = section.max_skipped_updates, checkup.health.num_skipped_last
    if limit is not None and skipped >= limit:
        raise ValueError(
            f"health.max_skipped_updates must be above the number of updates skipped in a row, got {limit} with "
            f"{skipped} skipped; the weights stay those of the last update that was made. In the last step "
            f"{checkup.cause_of_skips or _SKIPPED}. A change of these keys wants a new output_dir; the last lines of "
            "samples.jsonl and metrics.jsonl show more"
        )


def _skips(num_skipped: int, cause: str) -> list[str]:
    if not num_skipped:
        return []
    problem = f"{num_skipped} update(s) skipped: {cause}"
    return [f"{problem}; weights and optimizer are as before; {_SAMPLES}"]


def _watched(section: HealthSection, metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Thresholds of the metrics that are watched for spikes.

    Without a reference there is no `kl`. How far the trainer's log-probs are from the sampler's stands in for it: an
    estimate of the divergence between the policy that draws and the one that learns, which have the same weights where
    they are compared. It grows when the policy becomes so sharp that rounding counts.
    """
    distance = "kl" if "kl" in metrics else _MISMATCH
    return {distance: section.kl_spike, "grad_norm": section.grad_norm_spike}


def _spikes(section: HealthSection, state: HealthState, metrics: Mapping[str, float]) -> list[str]:
    def is_unusual(name: str, threshold: float | None) -> bool:
        recent, least = state.recent.get(name, []), _MIN_SPREADS.get(name, 0.0)
        return threshold is not None and name in metrics and is_spike(metrics[name], recent, threshold, least)

    return [
        f"{name} {metrics[name]:.3g} is a spike, its median over the last {len(state.recent[name])} steps is "
        f"{statistics.median(state.recent[name]):.3g}; {_SAMPLES}; if it comes again, "
        f"{_WAY_OUT[name]}"
        for name, threshold in _watched(section, metrics).items()
        if is_unusual(name, threshold)
    ]


def is_spike(value: float, recent: list[float], threshold: float, least_spread: float = 0.0) -> bool:
    """Whether `value` is more than `threshold` spreads above the median of `recent`.

    The spread is the median absolute deviation, scaled to the standard deviation of normal numbers. A few earlier
    spikes do not move it. It is at least a twentieth of the median, and at least `least_spread`. Without enough values,
    or with a spread of zero, nothing is a spike. NaN is no spike.
    """
    if len(recent) < _MIN_HISTORY:
        return False
    median = statistics.median(recent)
    deviation = statistics.median(abs(number - median) for number in recent)
    spread = max(_NORMAL_SPREAD * deviation, _MIN_SPREAD * abs(median), least_spread)
    return spread > 0 and value > median + threshold * spread


def _nothing_to_learn_from(metrics: Mapping[str, float]) -> dict[str, str]:
    """{sign: words} where no completion of the step reached the loss. The other metrics of such a step say nothing
    about the policy.
    """
    if metrics.get("unjudged_share", 0.0) == 1:
        return {"unjudged": f"no reward could be judged, nothing is learned from this step: {_main_failure(metrics)}"}
    if metrics.get("masked_share", 0.0) == 1:
        return {
            "masked": "every completion of the step that could be judged was cut at the length limit and left out by "
            "grpo.mask_truncated, nothing is learned from it; raise sampling.max_completion_length, set "
            "sampling.stop_strings, or turn grpo.mask_truncated off"
        }
    return {}


def _main_failure(metrics: Mapping[str, float]) -> str:
    """The most frequent reason why reward functions gave no value."""
    matches = {name: match for name in metrics if (match := _FAILURE.fullmatch(name)) and metrics[name]}
    counts = {(match["name"], _KINDS[match["kind"]]): metrics[name] for name, match in matches.items()}
    if not counts:
        return "all functions that count in the sum left it open; look at rewards.functions"
    name, kind = max(counts, key=lambda key: counts[key])
    if kind == "none":
        how, way_out = "returned None", "look at the columns that it compares with (data.columns) and at its rules"
    else:
        how, way_out = f"failed with {kind}", "the warnings above and rewards.log say how"
    return f"{name!r} {how} {counts[name, kind]:.0f} times, more often than anything else; {way_out}"


def _signs(section: HealthSection, metrics: Mapping[str, float]) -> dict[str, str]:
    """{sign: words} for the signs of collapse in a step's metrics."""
    signs = {}
    equal, entropy, truncated = (
        metrics.get(name, math.nan) for name in ("zero_variance_share", "entropy", "truncated_share")
    )
    if section.equal_rewards_share is not None and equal >= section.equal_rewards_share:
        signs["equal_rewards"] = _equal_rewards(equal, metrics)
    if section.entropy_floor is not None and entropy < section.entropy_floor:
        signs["entropy"] = (
            f"entropy {entropy:.3g} is under health.entropy_floor {section.entropy_floor}: the policy hardly explores; "
            "raise grpo.entropy_coef, grpo.beta, grpo.epsilon_high or sampling.temperature, or lower optimizer.lr"
        )
    if section.truncated_share is not None and truncated > section.truncated_share:
        signs["truncated"] = (
            f"{truncated:.0%} of the completions were cut at the length limit; raise sampling.max_completion_length, "
            "set sampling.stop_strings, or leave them out with grpo.mask_truncated"
        )
    return signs


def _equal_rewards(share: float, metrics: Mapping[str, float]) -> str:
    mean = metrics.get("reward/mean", math.nan)
    if metrics.get("reward/std", math.nan) <= _NO_SPREAD * max(abs(mean), 1.0):
        return (
            f"every completion of the step has the same reward, {mean:.4g}, whatever the prompt, there is nothing to "
            "learn from; look at rewards.functions (`grpo rewards check` tries them), or choose easier or harder "
            "prompts (data.source)"
        )
    return (
        f"{share:.0%} of the completions have the same reward as the others of their group, there is little to learn "
        "from; raise grpo.group_size or sampling.temperature, choose other prompts (data.source), or look at "
        "rewards.functions"
    )


def _is_due(num_steps: int, patience: int) -> bool:
    """Whether a sign that has lasted `num_steps` is named now: after `patience` steps, and each time that number has
    doubled.
    """
    times, rest = divmod(num_steps, patience)
    return rest == 0 and times.bit_count() == 1
