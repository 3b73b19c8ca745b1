"""Whether a run is well: updates that were skipped, spikes, and signs that the policy collapses.

In: the `health` section, the metrics of each step, and a small JSON-able state that checkpoints carry, so that a
resumed run warns where an uninterrupted one does. Out: warnings in words, whether all samples of the step should be
kept, and an error when nothing is learned any more. Not here: the guard that skips an update (`rl.train_step`), the
rounding of updates (`rl.optimizer`).
"""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from rl.config_sections import HealthSection

_MIN_HISTORY = 10  # steps, before a value can be called unusual
_NORMAL_SPREAD = 1.4826  # standard deviation of normal numbers / median of their absolute deviations
_MIN_SPREAD = 0.05  # of the median: values that hardly differ from one another must not make small steps look large
_MISMATCH = "logprob_difference/mean"
_MIN_SPREADS = {_MISMATCH: 1e-3}  # nats: with a threshold of 10 a hundredth, far above what float32 rounds
_WAY_OUT = {
    "kl": "lower optimizer.lr or raise grpo.beta",
    _MISMATCH: "set grpo.sampler_is_correction=true, lower optimizer.lr, or set model.dtype to float32",
    "grad_norm": "lower optimizer.lr or optimizer.max_grad_norm",
}
_SAMPLES = "samples.jsonl of a GRPO run holds every completion of the step"


class HealthState(NamedTuple):
    """What is remembered from step to step.

    Attributes:
      num_skipped: updates of the run that were skipped.
      num_skipped_last: of those, the ones since the last step in which an update was made.
      recent: the last finite values of the metrics that are watched for spikes, oldest first.
      lasting: for each sign of collapse the number of steps in a row that showed it.
    """

    num_skipped: int
    num_skipped_last: int
    recent: dict[str, list[float]]
    lasting: dict[str, int]


class Checkup(NamedTuple):
    """What one step showed.

    Attributes:
      state: for the next step.
      warnings: in words, for the console.
      keep_samples: whether all samples of the step should be kept, for something unusual happened in it.
    """

    state: HealthState
    warnings: list[str]
    keep_samples: bool


def healthy() -> HealthState:
    """The state of a run that has done nothing yet."""
    return HealthState(0, 0, {}, {})


def check_step(
    section: HealthSection, state: HealthState, metrics: Mapping[str, float], num_updates: int = 1
) -> Checkup:
    """Looks at the metrics of one step of `num_updates` updates.

    Args:
      metrics: `skipped_updates` is needed; of the others those that are there are looked at.
    """
    skipped = int(metrics["skipped_updates"])
    unusual = _skips(skipped) + _spikes(section, state, metrics)
    signs = _signs(section, metrics)
    lasting = {sign: state.lasting.get(sign, 0) + 1 for sign in signs}
    warnings = [*unusual, *(text for sign, text in signs.items() if _is_due(lasting[sign], section.patience))]
    in_a_row = state.num_skipped_last + skipped if skipped == num_updates else 0
    recent = {
        name: [*state.recent.get(name, []), float(metrics[name])][-section.spike_window :]
        for name in _watched(section, metrics)
        if math.isfinite(metrics.get(name, math.nan))
    }
    state = HealthState(state.num_skipped + skipped, in_a_row, {**state.recent, **recent}, lasting)
    return Checkup(state, warnings, bool(unusual))


def check_progress(section: HealthSection, state: HealthState) -> None:
    """ValueError when so many updates in a row were skipped that going on is pointless."""
    limit = section.max_skipped_updates
    if limit is not None and state.num_skipped_last >= limit:
        raise ValueError(
            f"health.max_skipped_updates must be above the number of updates skipped in a row, got {limit} with "
            f"{state.num_skipped_last} skipped; loss or gradient were not finite in any of them, and the weights stay "
            "those of the last update that was made. Look at the last lines of samples.jsonl and metrics.jsonl; lower "
            "optimizer.lr or optimizer.max_grad_norm, or set model.dtype to float32, in a new output_dir"
        )


def _skips(num_skipped: int) -> list[str]:
    if not num_skipped:
        return []
    problem = f"{num_skipped} update(s) skipped: loss or gradient norm was not finite"
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

    The spread is the median absolute deviation, scaled to the standard deviation of normal numbers, which a few earlier
    spikes do not move; and at least a twentieth of the median, and `least_spread`. Without enough values, or with a
    spread of zero, nothing is a spike; NaN is none.
    """
    if len(recent) < _MIN_HISTORY:
        return False
    median = statistics.median(recent)
    deviation = statistics.median(abs(number - median) for number in recent)
    spread = max(_NORMAL_SPREAD * deviation, _MIN_SPREAD * abs(median), least_spread)
    return spread > 0 and value > median + threshold * spread


def _signs(section: HealthSection, metrics: Mapping[str, float]) -> dict[str, str]:
    """The signs of collapse that a step's metrics show, in words, by name."""
    signs = {}
    equal, entropy, truncated = (
        metrics.get(name, math.nan) for name in ("zero_variance_share", "entropy", "truncated_share")
    )
    if section.equal_rewards_share is not None and equal >= section.equal_rewards_share:
        signs["equal_rewards"] = (
            f"{equal:.0%} of the completions have the same reward as the others of their group, there is little to "
            "learn from; raise grpo.group_size or sampling.temperature, choose other prompts (data.source), or look at "
            "rewards.functions"
        )
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


def _is_due(num_steps: int, patience: int) -> bool:
    """Whether a sign that has lasted `num_steps` is named now: after `patience` steps, and each time that has
    doubled.
    """
    times, rest = divmod(num_steps, patience)
    return rest == 0 and times.bit_count() == 1
