"""The metrics of a run: what each name in metrics.jsonl means, its unit, its healthy range, and what to do outside it.

In: nothing. Out: `METRICS`, from which docs/metrics.md is written (`python -m rl.run.metric_page`), the entry of a
name, and the names of older versions (`RENAMED`, which only `rl.run.metrics.read_metrics` uses).

Names have one scheme, `subject/what`, in lower case with underscores. A number that is alone has one word. In a pattern
`<part>` stands for any name, and what is in brackets may be missing.
"""

import functools
import re
from typing import NamedTuple

ANY = "any"  # a unit: that of the user's own values


class Metric(NamedTuple):
    """One entry.

    Attributes:
      name: a name or a pattern.
      meaning: what it is; of a step, where nothing else is said.
      unit: of its values.
      healthy: the range in which nothing is to be done; empty where there is none.
      advice: what to do outside that range, with the keys to change; empty where there is none.
    """

    name: str
    meaning: str
    unit: str = "share"
    healthy: str = ""
    advice: str = ""


class Subject(NamedTuple):
    """Entries that belong together, under a title. `note`: what is true of all of them."""

    title: str
    note: str
    metrics: tuple[Metric, ...]


_LOOK = "look at `samples.jsonl` and at what `rewards.functions` return"

METRICS: tuple[Subject, ...] = (
    Subject(
        "Rewards",
        "Over the completions of the step. A completion that no function with a weight could judge does not count.",
        (
            Metric("reward/mean", "mean of the weighted sums of rewards", ANY, "rises", f"flat for long: {_LOOK}"),
            Metric("reward/std", "standard deviation of the weighted sums", ANY, "> 0", f"0: {_LOOK}"),
            Metric("reward/<function>/mean", "mean of one function's rewards, before its weight", ANY),
            Metric("reward/<function>/std", "their standard deviation", ANY, "> 0 while there is something to learn"),
            Metric(
                "reward/<function>/variance_share",
                "part of the spread of weighted rewards within groups that is this function's; with two or more "
                "functions with a weight",
            ),
            Metric(
                "reward/dominant_share",
                "the largest `variance_share`, left out where the other functions have given all they can",
                healthy="< `health.dominant_share`",
                advice="change the weights in `rewards.functions`, or set `grpo.aggregation: normalize_then_sum`",
            ),
            Metric(
                "reward/length_correlation",
                "correlation of reward and length within groups",
                "-1 to 1",
                "within `health.length_correlation` of 0",
                "`rewards.overlong_buffer`, `grpo.loss_type: dr_grpo` or `sampling.min_completion_length`",
            ),
            Metric(
                "reward/<function>/errors",
                "completions without a reward because of an exception, a crash, or a value that is no reward",
                "completions",
                "0",
                "the warning names the line; the traceback is in `rewards.log`",
            ),
            Metric(
                "reward/<function>/timeouts",
                "completions without a reward because of the time limit",
                "completions",
                "0",
                "raise `rewards.timeout_seconds`, or make the function faster",
            ),
            Metric("reward/<function>/exception", "of `errors`: the function raised", "completions", "absent"),
            Metric("reward/<function>/crash", "of `errors`: its worker died", "completions", "absent"),
            Metric("reward/<function>/wrong_length", "of `errors`: not one value each", "completions", "absent"),
            Metric("reward/<function>/not_a_number", "of `errors`: no number, or NaN", "completions", "absent"),
            Metric("reward/<function>/out_of_range", "of `errors`: beyond 1e6 in size", "completions", "absent"),
            Metric("reward/<function>/none", "completions that the function declined to judge", "completions"),
            Metric(
                "reward/<function>/retries",
                "calls that were made again after errors of the network",
                "calls",
                "near 0",
                "look at the judge or its limits of use",
            ),
            Metric("reward/<function>/seconds_mean", "time of a completion, retries and failures included", "seconds"),
            Metric(
                "reward/<function>/seconds_max",
                "that of the slowest completion",
                "seconds",
                "< `rewards.timeout_seconds`",
            ),
            Metric(
                "reward/<function>/<metric>",
                "mean of what the function logged under this name; `logged_<metric>` where a name above is meant",
                ANY,
            ),
        ),
    ),
    Subject(
        "Groups and advantages",
        "Shares are of the completions of the step.",
        (
            Metric("advantage/mean", "mean of the advantages; of turns with `grpo.turn_advantages`", ANY, "near 0"),
            Metric("advantage/std", "their standard deviation", ANY, "> 0", "0: nothing is learned, see below"),
            Metric(
                "zero_variance_share",
                "groups whose rewards are all equal, so that they teach nothing",
                healthy="< 0.5",
                advice="easier or harder prompts (`data.curriculum`), a larger `grpo.group_size`, more "
                "`sampling.temperature`, or `grpo.dynamic_sampling_rounds`",
            ),
            Metric(
                "unjudged_share",
                "completions that no function with a weight could judge",
                healthy="0",
                advice="`reward/<function>/errors` and `none` say which function and why",
            ),
            Metric(
                "masked_share",
                "completions that the loss leaves out: not judged, or cut with `grpo.mask_truncated`",
                healthy="< 0.5",
                advice="raise `sampling.max_completion_length`",
            ),
            Metric(
                "equal_completions_share",
                "the most frequent completion among those that answer different prompts",
                healthy="< `health.equal_completions_share`",
                advice="rewards ask for no answer to the prompt, or the policy collapsed: lower `optimizer.lr`, raise "
                "`grpo.beta`",
            ),
            Metric(
                "uncomputed_share",
                "tokens of groups without an advantage, which updates did not compute (`grpo.skip_zero_advantage`)",
            ),
        ),
    ),
    Subject(
        "Completions",
        "Lengths count tokens that the policy drew.",
        (
            Metric("completion_length/mean", "mean length", "tokens", "no run towards the limit"),
            Metric("completion_length/max", "greatest length", "tokens", "below the limit"),
            Metric(
                "truncated_share",
                "completions that were cut at the length limit",
                healthy="< `health.truncated_share`",
                advice="raise `sampling.max_completion_length`, set `sampling.stop_strings`, or leave them out with "
                "`grpo.mask_truncated`",
            ),
            Metric("unscored_tokens", "tokens whose log-prob the user's source does not know", "tokens", "0"),
        ),
    ),
    Subject(
        "Loss and update",
        "Means over the updates of the step that were made. Means over tokens, or over completions where the policy "
        "ratio belongs to these (`grpo.importance_sampling_level: sequence`).",
        (
            Metric(
                "loss",
                "what is minimised; of `grpo sft` the negative log-likelihood of a token",
                "nats",
                "near 0 on-policy in GRPO, falls in SFT",
                "nothing in GRPO: with centred advantages its value is 0 although its gradient is not",
            ),
            Metric("policy_loss", "the loss without entropy bonus and positive NLL", "nats"),
            Metric(
                "grad_norm",
                "norm of the gradient before clipping",
                "any",
                "no spikes (`health.grad_norm_spike`)",
                "lower `optimizer.lr` or `optimizer.max_grad_norm`",
            ),
            Metric("lr", "learning rate of the last update", "1", "1e-7 to 2e-5 (weights), 1e-6 to 5e-4 (adapters)"),
            Metric(
                "skipped_updates",
                "updates that were not made, for loss or gradient was not finite",
                "updates",
                "0",
                "the warning names the cause",
            ),
            Metric(
                "update/lost_share",
                "part of the weights' update that rounding to `model.param_dtype` discards",
                healthy="< 0.5",
                advice="`model.param_dtype: float32`",
            ),
            Metric(
                "kl",
                "estimate of the KL divergence to the reference (`grpo.kl_estimator`)",
                "nats per token",
                "grows slowly, no spikes (`health.kl_spike`)",
                "lower `optimizer.lr` or raise `grpo.beta`",
            ),
            Metric(
                "entropy",
                "entropy of the policy",
                "nats per token",
                "> `health.entropy_floor`",
                "raise `grpo.entropy_coef`, `grpo.epsilon_high` or `sampling.temperature`, or lower `optimizer.lr`",
            ),
            Metric("selected_entropy", "entropy over the tokens of `grpo.top_entropy_quantile`", "nats per token"),
            Metric("entropy_coef", "weight of the entropy bonus after the step", "1"),
            Metric("ratio/mean", "ratio of policy to old probabilities", "1", "near 1"),
            Metric(
                "ratio/max",
                "the greatest ratio",
                "1",
                "1 in the first update on a rollout; < 10",
                "fewer `grpo.epochs` or `grpo.minibatches`, or a lower `optimizer.lr`",
            ),
            Metric(
                "clip_ratio/low_mean",
                "part where the lower bound holds the gradient back",
                healthy="< 0.2 with region_mean",
                advice="fewer updates of a step, or a lower `optimizer.lr`",
            ),
            Metric("clip_ratio/low_min", "the least such part of a completion"),
            Metric("clip_ratio/high_mean", "part where the upper bound holds the gradient back"),
            Metric("clip_ratio/high_max", "the greatest such part of a completion"),
            Metric("clip_ratio/region_mean", "part where either bound does", healthy="< 0.2"),
            Metric("cispo/clip_ratio", "tokens whose weight is capped (`grpo.loss_type: cispo`)", healthy="< 0.2"),
            Metric("gmpo/clip_ratio", "tokens whose ratio is clipped (`gmpo`)", healthy="< 0.2"),
            Metric("dppo/masked_share", "tokens that leave the trust region (`dppo_tv`, `dppo_kl`)", healthy="< 0.2"),
            Metric("vespo/phi_mean", "mean weight of a completion (`vespo`)", "1", "near 1"),
            Metric(
                "off_policy/kept_share",
                "completions that `grpo.off_policy_mask_threshold` keeps",
                healthy="> 0.8",
                advice="raise the threshold, or train on newer rollouts",
            ),
            Metric("positive_nll", "negative log-likelihood of completions with an advantage > 0", "nats per token"),
            Metric("loss_term/<metric>", "mean of what the loss of a user's file returns under this name", ANY),
        ),
    ),
    Subject(
        "Sampler against trainer",
        "`logprob_difference` compares two programs: same weights, same distribution, first update of the step. "
        "`drawn_difference` compares two distributions: what the loss takes as old against what the tokens were really "
        "drawn from (after top-k, top-p, min-p), over all updates.",
        (
            Metric(
                "logprob_difference/mean",
                "mean difference between the sampler's and the trainer's log-probs, absolute",
                "nats per token",
                "< 1e-5 in float32, < 0.02 in bfloat16",
                "`model.dtype: float32`, or `grpo.sampler_is_correction: true`",
            ),
            Metric("logprob_difference/max", "the greatest", "nats", "< 1e-3 in float32, < 1 in bfloat16"),
            Metric(
                "logprob_drift/mean",
                "how far the policy moved since the draw; in place of `logprob_difference` for older rollouts",
                "nats per token",
                "< 0.1",
                "younger rollouts, or a lower `optimizer.lr`",
            ),
            Metric("logprob_drift/max", "the greatest", "nats"),
            Metric("rollout_age", "steps between the weights that drew and the update", "steps"),
            Metric(
                "drawn_difference/mean",
                "mean difference between old log-probs and those in the distribution that was drawn from, absolute",
                "nats per token",
                "as `logprob_difference` without truncation",
            ),
            Metric("drawn_difference/max", "the greatest", "nats"),
            Metric("sampler_ratio/min", "least importance ratio of old to drawn, as the loss takes it", "1"),
            Metric("sampler_ratio/mean", "its mean (`grpo.sampler_is_correction`)", "1", "near 1"),
            Metric("sampler_ratio/max", "the greatest", "1", "<= `grpo.sampler_is_clip_max`"),
            Metric(
                "sampler_ratio/raw_mean",
                "its mean before any bound",
                "1",
                "0.9 to 1.1",
                "sampler and trainer do not agree: see `logprob_difference`, or "
                "`grpo.policy_distribution: sampled` with truncated sampling",
            ),
            Metric(
                "sampler_ratio/cut_share", "tokens whose ratio, or whose completion's, is beyond a bound", "share", "~0"
            ),
        ),
    ),
    Subject(
        "Choice of prompts",
        "With `grpo.dynamic_sampling_rounds` or `data.curriculum`.",
        (
            Metric("dynamic_sampling/refilled", "groups that were replaced by others", "groups"),
            Metric(
                "dynamic_sampling/unfilled",
                "groups with equal rewards that nothing replaced",
                "groups",
                "0",
                "other prompts, or more `grpo.dynamic_sampling_rounds`",
            ),
            Metric("dynamic_sampling/rounds", "rounds of refills", "rounds"),
            Metric("dynamic_sampling/prompts", "prompts that the step used up", "prompts"),
            Metric("curriculum/known", "training rows whose pass rate is known"),
            Metric("curriculum/in_band", "training rows inside `data.curriculum.band`", healthy="> 0.1"),
        ),
    ),
    Subject(
        "Episodes of several turns",
        "With environments, tools or agents. In an evaluation these names begin with `eval/`.",
        (
            Metric("[eval/[<set>/]]turns/mean", "turns of an episode", "turns"),
            Metric("[eval/[<set>/]]turns/max", "most turns of an episode", "turns", "< `rollout.max_turns`"),
            Metric("[eval/[<set>/]]observation_length/mean", "tokens that were read and not drawn", "tokens"),
            Metric("[eval/[<set>/]]tool_calls/mean", "calls of tools", "calls"),
            Metric(
                "[eval/[<set>/]]tool_calls/bad",
                "calls that could not be read, or named no tool",
                "calls",
                "falls",
                "show an example in the system prompt",
            ),
            Metric(
                "[eval/[<set>/]]episodes/<end>",
                "episodes that ended so: done, max_turns, max_drawn, max_tokens, too_many_sequences, failed",
                healthy="done near 1",
                advice="raise the limit that it names (`rollout`); failed: see the warning",
            ),
            Metric("environment/<environment>/seconds_mean", "time in the environment's code", "seconds"),
            Metric("environment/<environment>/failures", "episodes that were lost in it", "episodes", "0"),
            Metric("environment/<environment>/reward_mean", "mean reward of its episodes", ANY),
            Metric("environment/<environment>/<metric>", "mean of the metric of that name that it gives", ANY),
            Metric("journal/seconds", "time for writing the journal of episodes", "seconds", "< 1 % of the step"),
            Metric("journal/mb", "what was written", "megabytes"),
            Metric("journal/drawn_again", "episodes that a resumed step could not take from it", "episodes", "absent"),
        ),
    ),
    Subject(
        "Evaluation",
        "On held-out prompts, every `eval.every` steps; null at other steps is no value. `<set>` is a source of a "
        "mixture, where there are several, a name of `eval.sets`, or `NAME/category/VALUE` of one.",
        (
            Metric(
                "eval/[<set>/]accuracy",
                "prompts whose greedy completion gets >= 1 from the function that counts (`eval.reward`)",
                healthy="rises with the reward",
                advice="the reward rises and this falls: the reward is hacked, or prompts are learned by heart",
            ),
            Metric("eval/[<set>/]accuracy_low", "lower end of its 95 % Wilson interval"),
            Metric("eval/[<set>/]accuracy_high", "upper end"),
            Metric("eval/[<set>/]prompts", "evaluated prompts", "prompts"),
            Metric("eval/[<set>/]reward/<function>/mean", "mean of one function's rewards", ANY),
            Metric(
                "eval/[<set>/]reward/<function>/<metric>",
                "mean of what the function logged; of a set of `eval.sets` also the measures below by this function",
                ANY,
            ),
            Metric(
                "eval/[<set>/]avg_at_<k>",
                "right samples of a question, of k that are drawn; `_low` and `_high`, here and below, are the ends of "
                "a 95 % interval (docs/evaluation.md)",
                healthy="rises with the reward",
            ),
            Metric("eval/[<set>/]pass_at_<k>", "questions of which one of k samples is right, unbiased"),
            Metric("eval/[<set>/]maj_at_<k>", "questions of which the most frequent answer of k samples is right"),
            Metric("eval/[<set>/]completion_length/mean", "mean length", "tokens"),
            Metric("eval/[<set>/]truncated_share", "completions that were cut", "share", "near 0"),
        ),
    ),
    Subject(
        "Time and memory",
        "They differ from machine to machine, and in a resumed run.",
        (
            Metric(
                "seconds/<phase>",
                "time in rollout, reward (what is left of it after the last completion), train, eval or checkpoint (of "
                "the step before); `step` is all of it, and `other` what is in no phase",
                "seconds",
                "other near 0",
            ),
            Metric("tokens_per_second/<phase>", "drawn tokens by the time of rollout, train or step", "tokens/s"),
            Metric(
                "compiles",
                "programs that were compiled or read from the cache",
                "programs",
                "0 after the first steps",
                "shapes change: docs/compile.md",
            ),
            Metric("peak_memory_gb", "peak memory so far, of the fullest device or of the process", "GB"),
            Metric(
                "trackers/<tracker>/dropped",
                "steps that did not reach a tracker, since this start of the run",
                "steps",
                "0",
                "the tracker is down or slow: docs/trackers.md, `logging.tracker_queue`",
            ),
        ),
    ),
)

# Names of older versions, as patterns, and what they are called now.
RENAMED: dict[str, str] = {
    "ratio_mean": "ratio/mean",
    "ratio_max": "ratio/max",
    "clip_ratio_low_mean": "clip_ratio/low_mean",
    "clip_ratio_low_min": "clip_ratio/low_min",
    "clip_ratio_high_mean": "clip_ratio/high_mean",
    "clip_ratio_high_max": "clip_ratio/high_max",
    "clip_ratio_region_mean": "clip_ratio/region_mean",
    "cispo_clip_ratio": "cispo/clip_ratio",
    "gmpo_clip_ratio": "gmpo/clip_ratio",
    "dppo_masked": "dppo/masked_share",
    "vespo_phi_mean": "vespo/phi_mean",
    "off_policy_kept": "off_policy/kept_share",
    "sampler_logprob_difference_mean": "drawn_difference/mean",
    "sampler_logprob_difference_max": "drawn_difference/max",
    "sampler_ratio_min": "sampler_ratio/min",
    "sampler_ratio_mean": "sampler_ratio/mean",
    "sampler_ratio_max": "sampler_ratio/max",
    "sampler_ratio_raw_mean": "sampler_ratio/raw_mean",
    "sampler_ratio_cut_share": "sampler_ratio/cut_share",
    "reward/<function>/timeout": "reward/<function>/timeouts",
    "eval/completion_length": "eval/completion_length/mean",
    "eval/reward/<word>": "eval/reward/<word>/mean",
    "eval/<word>/reward/<word>": "eval/<word>/reward/<word>/mean",
}
# The same of the fields of samples.jsonl.
RENAMED_FIELDS: dict[str, str] = {"tokens": "num_tokens"}


def entry_of(name: str) -> Metric | None:
    """The entry of a metric; None where the table has none. A whole name goes before a pattern."""
    matches = [metric for subject in METRICS for metric in subject.metrics if _regex(metric.name).fullmatch(name)]
    return min(matches, key=lambda metric: metric.name.count("<"), default=None)


def current_name(name: str) -> str:
    """The name that a metric of an older version has now."""
    if name in RENAMED:
        return RENAMED[name]
    for old, new in RENAMED.items():
        if "<" in old and (match := _regex(old).fullmatch(name)):
            around = re.split(r"<\w+>", new)
            return "".join(text + part for text, part in zip(around, [*match.groups(), ""], strict=True))
    return name


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression. `<word>` is a part without a slash; other parts may have some."""
    text = re.escape(pattern).replace(r"\[", "(?:").replace(r"\]", ")?")
    text = re.sub(r"<(\w+)>", lambda part: "([^/]+)" if part[1] == "word" else "(.+)", text)
    return re.compile(text, re.DOTALL)
