"""The losses against numbers that TRL 1.16 computes in float64 (tests/files/grpo_losses.json); their invariances."""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms import entropy_coef, loss_metrics, loss_types, losses
from rl.algorithms.loss_metrics import MetricSums
from rl.algorithms.loss_types import Denominators, LossConfig, LossInputs
from tests.helpers.places import FILES

DATA = json.loads((FILES / "grpo_losses.json").read_text())
CASES = {case["name"]: case for case in DATA["cases"]}
FIELDS = {field.name for field in dataclasses.fields(LossConfig)}
# One shape for all cases: operations compile once, and every case also checks that padding has no effect.
NUM_ROWS, NUM_TOKENS = 7, 10
METRIC_NAMES = {
    "kl": "kl",
    "entropy": "entropy",
    "policy_loss": "policy_loss",
    "clip_ratio/low_mean": "clip_ratio/low_mean",
    "clip_ratio/high_mean": "clip_ratio/high_mean",
    "clip_ratio/region_mean": "clip_ratio/region_mean",
    "clip_ratio/low_min": "clip_ratio/low_min",
    "clip_ratio/high_max": "clip_ratio/high_max",
    "cispo_clip_ratio": "cispo/clip_ratio",
    "vespo/phi_seq_mean": "vespo/phi_mean",
    "sampling/sampling_logp_difference/mean": "drawn_difference/mean",
    "sampling/sampling_logp_difference/max": "drawn_difference/max",
    "sampling/importance_sampling_ratio/min": "sampler_ratio/min",
    "sampling/importance_sampling_ratio/mean": "sampler_ratio/mean",
    "sampling/importance_sampling_ratio/max": "sampler_ratio/max",
}
DTYPES = {"float64": (np.float64, 1e-12), "float32": (np.float32, 5e-5)}


@dataclasses.dataclass
class Problem:
    """A minibatch and its loss, as numpy arrays."""

    policy_logprobs_BT: np.ndarray
    entropy_BT: np.ndarray | None
    inputs: LossInputs
    config: LossConfig
    counts: dict[str, Any]

    def denominators(self) -> Denominators:
        return losses.denominators_for(
            self.inputs.mask_BT,
            self.inputs.sequence_mask_B,
            self.entropy_BT,
            self.config,
            advantages_B=self.inputs.advantages_B,
            **self.counts,
        )

    def piece(self, rows: np.ndarray) -> "Problem":
        cut = functools.partial(jax.tree.map, lambda x: x[rows])
        entropy_BT = None if self.entropy_BT is None else cut(self.entropy_BT)
        inputs = LossInputs(*(None if field is None else cut(field) for field in self.inputs))
        return Problem(cut(self.policy_logprobs_BT), entropy_BT, inputs, self.config, self.counts)

    def evaluate(self, denominators: Denominators | None = None) -> tuple[Any, Any, Any, MetricSums]:
        """(loss, gradient by the policy log-probs, gradient by the entropies, sums)."""
        denominators = self.denominators() if denominators is None else denominators
        as_jax = functools.partial(jax.tree.map, jnp.asarray)
        entropy_BT = None if self.entropy_BT is None else jnp.asarray(self.entropy_BT)
        (loss, sums), (grad_BT, grad_entropy_BT) = jax.value_and_grad(losses.grpo_loss, argnums=(0, 1), has_aux=True)(
            jnp.asarray(self.policy_logprobs_BT), entropy_BT, as_jax(self.inputs), denominators, self.config
        )
        return loss, grad_BT, grad_entropy_BT, sums


def config_of(case: dict[str, Any], **changes: Any) -> LossConfig:
    values = {name: value for name, value in case["config"].items() if name in FIELDS}
    ours = {"kl_estimator": "k3", "positive_nll_coef": 0.0, "custom_term": None, "loss_args": ()}
    return LossConfig(**(values | ours | changes))


def problem_of(case: dict[str, Any], dtype: Any) -> Problem:
    """A golden case, padded to one shape with NaN."""
    data, config = case["inputs"], case["config"]
    num_rows = len(data["mask"])

    def padded(values: Any, fill: float, *, to: tuple[int, ...] = (NUM_ROWS, NUM_TOKENS)) -> Any:
        if values is None:
            return None
        array = np.array([[math.nan if x is None else x for x in np.atleast_1d(row)] for row in values], dtype)
        array = array.reshape(np.shape(values))
        result = np.full(to, fill, dtype)
        result[tuple(slice(n) for n in array.shape)] = array
        return result

    loss_config = config_of(case)
    infinity = math.inf
    last_entropy = infinity if config["last_world_entropy"] is None else config["last_world_entropy"]
    training = config["training"]
    return Problem(
        policy_logprobs_BT=padded(data["policy_logprobs"], math.nan),
        entropy_BT=padded(data["entropy"], math.nan),
        inputs=LossInputs(
            old_logprobs_BT=padded(data["old_logprobs"], math.nan),
            reference_logprobs_BT=padded(data["ref_logprobs"], math.nan),
            sampler_logprobs_BT=padded(data["sampler_logprobs"], math.nan),
            mask_BT=padded(data["mask"], 0),
            advantages_B=padded(data["advantages"], math.nan, to=(NUM_ROWS,)),
            sequence_mask_B=np.arange(NUM_ROWS) < num_rows,
        ),
        config=loss_config,
        counts={
            "entropy_coef": entropy_coef.applied_entropy_coef(loss_config.entropy_coef, last_entropy, loss_config),
            "num_items_in_batch": config["num_items_in_batch"],
            "gradient_accumulation_steps": config["gradient_accumulation_steps"] if training else 1,
            "steps_per_generation": config["steps_per_generation"] if training else 1,
            "num_processes": config["num_processes"],
        },
    )


def assert_close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    """Relative to the largest entry of the array; zeros absolutely."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    scale = np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * (scale or 1), err_msg=what)


def expected_metrics(case: dict[str, Any]) -> dict[str, float]:
    metrics = case["expected"]["metrics"]
    return {
        METRIC_NAMES[name]: math.nan if value is None else value
        for name, value in metrics.items()
        if name in METRIC_NAMES
    }


def golden_metrics(case: dict[str, Any], problem: Problem, sums: MetricSums) -> dict[str, Any]:
    """Our metrics. TRL averages arrays of one token position over all rows, values at mask 0 included; that is the
    masked mean for a mask of ones, whereas here a value at mask 0 counts in no metric."""
    metrics = loss_metrics.finish_metrics(sums)
    if np.shape(case["inputs"]["mask"])[1] > 1:
        return metrics
    rows = np.zeros((NUM_ROWS, NUM_TOKENS), bool)
    rows[: len(case["inputs"]["mask"]), 0] = True
    whole = dataclasses.replace(problem, inputs=problem.inputs._replace(mask_BT=rows))
    of_all_rows = loss_metrics.finish_metrics(whole.evaluate()[3])
    by_token = config_of(case).importance_sampling_level == "token"
    names = [name for name in metrics if name in ("kl", "entropy") or (by_token and "clip_ratio" in name)]
    return metrics | {name: of_all_rows[name] for name in names}


def metrics_of_the_raw_ratio(problem: Problem) -> dict[str, float]:
    """By hand: the sampler's ratio before any bound, and the share of tokens that a bound holds back."""
    inputs, config = problem.inputs, problem.config
    mask_BT = (inputs.mask_BT > 0) & inputs.sequence_mask_B[:, None]
    old_BT = problem.policy_logprobs_BT if inputs.old_logprobs_BT is None else inputs.old_logprobs_BT
    is_scored_BT = mask_BT & ~np.isnan(inputs.sampler_logprobs_BT)
    ratio_BT = np.exp(np.where(is_scored_BT, old_BT - inputs.sampler_logprobs_BT, 0))
    of_sequences = config.sampler_is_mode.startswith("sequence")
    ratio_BT = np.tile(np.prod(ratio_BT, axis=1, keepdims=True), ratio_BT.shape[1]) if of_sequences else ratio_BT
    low, high = config.sampler_is_clip_min or 0, config.sampler_is_clip_max or math.inf
    mean = np.mean(ratio_BT[inputs.sequence_mask_B, 0] if of_sequences else ratio_BT[mask_BT])
    cut = np.mean((ratio_BT < low)[mask_BT] | (ratio_BT > high)[mask_BT])
    return {"sampler_ratio/raw_mean": mean, "sampler_ratio/cut_share": cut}


@pytest.mark.matrix
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_golden_case_has_the_loss_gradients_and_metrics_of_trl(name: str, dtype_name: str) -> None:
    case, (dtype, tolerance) = CASES[name], DTYPES[dtype_name]
    expected = case["expected"]
    B, T = np.shape(case["inputs"]["mask"])
    with jax.enable_x64(dtype is np.float64):
        problem = problem_of(case, dtype)
        loss_types.validate_loss_config(problem.config)
        loss, grad_BT, grad_entropy_BT, sums = problem.evaluate()
        assert loss.dtype == grad_BT.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {np.dtype(dtype)}
        assert_close(loss, expected["loss"], tolerance, "loss")
        assert_close(grad_BT[:B, :T], expected["grad_policy_logprobs"], tolerance, "gradient by policy log-probs")
        assert not np.any(grad_BT[B:])
        assert not np.any(grad_BT[:, T:])
        if expected["grad_entropy"] is not None:
            assert_close(grad_entropy_BT[:B, :T], expected["grad_entropy"], tolerance, "gradient by entropy")
        elif grad_entropy_BT is not None:
            assert not np.any(grad_entropy_BT)
        metrics = golden_metrics(case, problem, sums)
        for metric, value in expected_metrics(case).items():
            assert_close(metrics[metric], value, max(tolerance, 1e-6 if "clip" in metric else 0), metric)
        if "sampler_ratio/mean" in metrics and np.any(problem.inputs.mask_BT > 0):
            for metric, value in metrics_of_the_raw_ratio(problem).items():
                assert_close(metrics[metric], value, tolerance, metric)


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_golden_sampler_ratios_are_those_of_trl(dtype_name: str) -> None:
    dtype, tolerance = DTYPES[dtype_name]
    checked = 0
    for name, case in CASES.items():
        expected = case["expected"]["sampler_is_ratio"]
        if expected is None:
            continue
        with jax.enable_x64(dtype is np.float64):
            problem = problem_of(case, dtype)
            policy_BT, inputs = problem.policy_logprobs_BT, problem.inputs
            old_BT = policy_BT if inputs.old_logprobs_BT is None else inputs.old_logprobs_BT
            mask_BT = jnp.asarray(inputs.mask_BT, bool)
            ratio_BX = loss_types.sampler_ratio(
                jnp.asarray(old_BT), jnp.asarray(inputs.sampler_logprobs_BT), mask_BT, problem.config
            )
        B, X = np.shape(expected)
        assert ratio_BX.shape[1] == (1 if problem.config.sampler_is_mode.startswith("sequence") else NUM_TOKENS)
        assert_close(ratio_BX[:B, :X], expected, tolerance, name)
        checked += 1
    assert checked == 42


def test_golden_entropy_coefficients_after_the_update_are_those_of_trl() -> None:
    checked = 0
    with jax.enable_x64(True):
        for name, case in CASES.items():
            expected = case["expected"]["metrics"].get("entropy_coef")
            if expected is None:
                continue
            problem = problem_of(case, np.float64)
            measured = float(loss_metrics.finish_metrics(problem.evaluate()[3])["selected_entropy"])
            config = problem.config
            assert entropy_coef.next_entropy_coef(config.entropy_coef, measured, config) == pytest.approx(
                expected, abs=1e-12
            ), name
            checked += 1
    assert checked == 22


def test_golden_data_is_complete() -> None:
    assert len(CASES) == len(DATA["cases"]) == 168
    golden = {case["config"]["loss_type"] for case in CASES.values()}
    # The others are not in TRL's trainer: tests/algorithms/test_losses_by_hand.py.
    assert set(loss_types.LOSS_TYPES) - golden == {"dppo_tv", "dppo_kl", "gmpo"}
    assert golden <= set(loss_types.LOSS_TYPES)
    metrics = {metric for case in CASES.values() for metric in case["expected"]["metrics"]}
    assert metrics == set(METRIC_NAMES) | {"entropy_coef"}


def random_problem(loss_type: str, seed: int, dtype: Any = np.float64, **changes: Any) -> Problem:
    """A ragged minibatch with every option on: empty real rows, padding rows, tokens that the sampler did not score."""
    random = np.random.default_rng(seed)
    B, T = NUM_ROWS, NUM_TOKENS
    options = {
        "loss_type": loss_type,
        "beta": 0.07,
        "delta": 1.8,
        "top_entropy_quantile": 0.6,
        "off_policy_mask_threshold": 0.3,
        "sampler_is_correction": not loss_type.startswith("dppo"),
        "positive_nll_coef": 0.3,
        "sampler_is_mode": "token_truncate" if loss_type == "vespo" else "sequence_mask",
        "sampler_is_clip_min": 0.2,
        "entropy_coef": 0.02,
        "max_completion_length": 9,
    }
    config = config_of(CASES["000 grid grpo token beta=0.0 delta=None"], **(options | changes))
    lengths_B = random.integers(1, T + 1, B)
    lengths_B[2] = 0
    sequence_mask_B = np.arange(B) != 4
    policy_BT = -random.exponential(1.0, (B, T))

    def near() -> np.ndarray:
        return (policy_BT + random.normal(0, 0.3, (B, T))).astype(dtype)

    sampler_BT = near()
    sampler_BT[3, 0] = math.nan
    return Problem(
        policy_logprobs_BT=policy_BT.astype(dtype),
        entropy_BT=random.exponential(1.0, (B, T)).astype(dtype),
        inputs=LossInputs(
            old_logprobs_BT=near(),
            reference_logprobs_BT=near(),
            sampler_logprobs_BT=sampler_BT,
            mask_BT=((np.arange(T) < lengths_B[:, None]) & sequence_mask_B[:, None]).astype(dtype),
            advantages_B=random.normal(0, 1, B).astype(dtype),
            sequence_mask_B=sequence_mask_B.astype(dtype),
        ),
        config=config,
        counts={
            "entropy_coef": config.entropy_coef,
            "num_items_in_batch": 57,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 3,
            "num_processes": 2,
        },
    )


def padded_rows(problem: Problem, num_rows: int) -> Problem:
    """`problem` with rows of NaN that are no sequences."""

    def pad(x: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([x, np.full((num_rows - len(x), *x.shape[1:]), fill, x.dtype)])

    fills = LossInputs(math.nan, math.nan, math.nan, 1, math.nan, 0, math.nan)
    return dataclasses.replace(
        problem,
        policy_logprobs_BT=pad(problem.policy_logprobs_BT, math.nan),
        entropy_BT=pad(problem.entropy_BT, math.nan),
        inputs=LossInputs(*(x if x is None else pad(x, fill) for x, fill in zip(problem.inputs, fills, strict=True))),
    )


@pytest.mark.parametrize("level", loss_types.IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", loss_types.LOSS_TYPES)
def test_any_split_into_pieces_gives_the_same_loss_gradient_and_metrics(loss_type: str, level: str) -> None:
    with jax.enable_x64(True):
        whole = random_problem(loss_type, seed=len(loss_type), importance_sampling_level=level)
        denominators = whole.denominators()
        loss, grad_BT, grad_entropy_BT, sums = whole.evaluate(denominators)
        assert np.abs(grad_BT).max() > 1e-3
        assert np.abs(grad_entropy_BT).max() > 1e-5
        order = np.random.default_rng(7).permutation(len(grad_BT))
        parts = np.split(order, [1, 4, 5])
        total, total_sums = 0.0, loss_metrics.zero_sums(sums)
        for rows in parts:
            value, piece_grad, piece_grad_entropy, piece_sums = padded_rows(whole.piece(rows), NUM_ROWS).evaluate(
                denominators
            )
            total += value
            total_sums = loss_metrics.combine_sums(total_sums, piece_sums)
            np.testing.assert_allclose(piece_grad[: len(rows)], grad_BT[rows], rtol=0, atol=1e-12)
            np.testing.assert_allclose(piece_grad_entropy[: len(rows)], grad_entropy_BT[rows], rtol=0, atol=1e-12)
            assert not np.any(piece_grad[len(rows) :])
        assert float(total) == pytest.approx(float(loss), rel=1e-12)
        metrics, total_metrics = loss_metrics.finish_metrics(sums), loss_metrics.finish_metrics(total_sums)
        assert metrics.keys() == total_metrics.keys()
        for name in metrics:
            assert float(total_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-12, abs=1e-15), name


@pytest.mark.parametrize("loss_type", sorted({*loss_types.LOSS_TYPES} - {"gmpo", "vespo"}))
def test_advantages_of_tokens_that_are_alike_are_that_of_their_sequence(loss_type: str) -> None:
    """And where they differ, each token is pulled by its own."""
    changes = {"off_policy_mask_threshold": None, "positive_nll_coef": 0.0, "sampler_is_mode": "token_mask"}
    plain = random_problem(loss_type, seed=5, **changes)
    advantages_BT = np.where(plain.inputs.mask_BT > 0, plain.inputs.advantages_B[:, None], math.nan)
    other_BT = advantages_BT * np.where(np.arange(advantages_BT.shape[1]) == 1, -2, 1)
    with jax.enable_x64(True):
        results = [
            dataclasses.replace(plain, inputs=plain.inputs._replace(advantages_B=advantages_B, advantages_BT=values_BT))
            for advantages_B, values_BT in (
                (plain.inputs.advantages_B, None),
                (np.zeros_like(plain.inputs.advantages_B), advantages_BT),
                (np.zeros_like(plain.inputs.advantages_B), other_BT),
            )
        ]
        (loss, grad_BT, *_), (same_loss, same_grad_BT, *_), (_, other_grad_BT, *_) = (p.evaluate() for p in results)
    assert float(loss) == pytest.approx(float(same_loss), rel=1e-14)
    np.testing.assert_allclose(same_grad_BT, grad_BT, rtol=1e-14)
    moved_BT = np.abs(other_grad_BT - grad_BT) > 1e-6
    assert moved_BT[:, 1].any()
    assert not np.delete(moved_BT, 1, axis=1).any()


@pytest.mark.parametrize("loss_type", loss_types.LOSS_TYPES)
def test_no_term_of_the_table_acts_without_an_advantage(loss_type: str) -> None:
    """Groups without one are not computed then: `rl.training.computed_groups`."""
    assert loss_types.LOSS_TYPES[loss_type].needs_advantage
    settings = {"beta": 0.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "top_entropy_quantile": 1.0}
    problem = random_problem(loss_type, seed=9, dtype=np.float32, **settings)
    inputs = problem.inputs._replace(advantages_B=np.zeros_like(problem.inputs.advantages_B))
    loss, grad_BT, grad_entropy_BT, _ = dataclasses.replace(problem, inputs=inputs).evaluate()
    assert loss == 0
    assert not np.any(grad_BT)
    assert not np.any(grad_entropy_BT)


@functools.cache
def clean_problem(loss_type: str) -> tuple[Problem, Any]:
    """A problem and what it evaluates to."""
    problem = random_problem(loss_type, seed=3, dtype=np.float32)
    return problem, problem.evaluate()


@pytest.mark.parametrize("loss_type", loss_types.LOSS_TYPES)
def test_clipped_tokens_are_those_that_the_metric_counts(loss_type: str) -> None:
    problem, (*_, sums) = clean_problem(loss_type)
    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    clipped_BT = losses.clipped_tokens(jnp.asarray(problem.policy_logprobs_BT), inputs, problem.config)
    counts = [float(sums.numerators[name]) for name in losses.CLIPS if name in sums.numerators]
    assert ([] if clipped_BT is None else [float(clipped_BT.sum())]) == counts


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("loss_type", loss_types.LOSS_TYPES)
def test_masked_values_have_no_effect_at_all(loss_type: str, garbage: float) -> None:
    clean, expected = clean_problem(loss_type)
    hidden_BT = clean.inputs.mask_BT == 0
    names = ("old_logprobs_BT", "reference_logprobs_BT", "sampler_logprobs_BT")
    inputs = clean.inputs._replace(
        **{name: np.where(hidden_BT, garbage, getattr(clean.inputs, name)) for name in names}
    )
    advantages_B = np.where(inputs.sequence_mask_B == 0, garbage, inputs.advantages_B)
    dirty = dataclasses.replace(
        clean,
        policy_logprobs_BT=np.where(hidden_BT, garbage, clean.policy_logprobs_BT).astype(np.float32),
        entropy_BT=np.where(hidden_BT, garbage, clean.entropy_BT).astype(np.float32),
        inputs=inputs._replace(advantages_B=advantages_B.astype(np.float32)),
    )
    actual = dirty.evaluate()
    assert np.isfinite(expected[0])
    for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("level", loss_types.IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", loss_types.LOSS_TYPES)
def test_huge_log_ratios_give_finite_losses_and_gradients(loss_type: str, level: str) -> None:
    problem = random_problem(loss_type, seed=1, dtype=np.float32, importance_sampling_level=level, delta=None)
    for shift in (-300.0, 300.0):
        inputs = problem.inputs._replace(
            old_logprobs_BT=problem.inputs.old_logprobs_BT + np.float32(shift),
            reference_logprobs_BT=problem.inputs.reference_logprobs_BT - np.float32(shift),
        )
        loss, grad_BT, grad_entropy_BT, sums = dataclasses.replace(problem, inputs=inputs).evaluate()
        for value in (loss, grad_BT, grad_entropy_BT, sums.totals, sums.numerators, sums.weights):
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(value))


def test_jitted_loss_equals_the_unjitted_one() -> None:
    problem = random_problem("dapo", seed=2, dtype=np.float32)

    def loss_of(policy_BT: jax.Array, entropy_BT: jax.Array, inputs: LossInputs) -> jax.Array:
        denominators = losses.denominators_for(
            inputs.mask_BT,
            inputs.sequence_mask_B,
            entropy_BT,
            problem.config,
            advantages_B=inputs.advantages_B,
            **problem.counts,
        )
        return losses.grpo_loss(policy_BT, entropy_BT, inputs, denominators, problem.config)[0]

    value, grads = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))(
        problem.policy_logprobs_BT, problem.entropy_BT, problem.inputs
    )
    loss, grad_BT, grad_entropy_BT, _ = problem.evaluate()
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(grads[0], grad_BT, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grads[1], grad_entropy_BT, rtol=0, atol=1e-7)


def test_on_policy_loss_is_zero_with_centred_advantages_but_its_gradient_is_not() -> None:
    problem = random_problem(
        "grpo",
        4,
        beta=0.0,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        sampler_is_correction=False,
        positive_nll_coef=0.0,
    )
    mask_BT = np.zeros_like(problem.inputs.mask_BT)
    mask_BT[:4] = 1
    advantages_B = np.zeros_like(problem.inputs.advantages_B)
    advantages_B[:4] = (1.0, -0.5, 0.25, -0.75)
    inputs = problem.inputs._replace(mask_BT=mask_BT, advantages_B=advantages_B, old_logprobs_BT=None)
    problem = dataclasses.replace(problem, inputs=inputs)
    with jax.enable_x64(True):
        loss, grad_BT, _, sums = problem.evaluate()
        metrics = loss_metrics.finish_metrics(sums)
    assert float(loss) == pytest.approx(0, abs=1e-15)
    assert float(metrics["ratio/mean"]) == float(metrics["ratio/max"]) == 1.0
    # Each token pulls with -A / (rows * tokens of the row * accumulation steps): 6 real rows of 10 tokens, 2 steps.
    np.testing.assert_allclose(grad_BT[:4, 0], -advantages_B[:4] / (6 * 10 * 2), rtol=1e-12)


@pytest.mark.parametrize(("estimator", "corrected"), [("k1", True), ("k2", False), ("k3", True)])
def test_kl_gradient_on_policy_is_that_of_the_reverse_kl_in_expectation(estimator: str, corrected: bool) -> None:
    """Over a whole vocabulary: sum_v p_v d/dlogits(estimate_v) must be the gradient of KL(p || reference)."""
    with jax.enable_x64(True):
        logits_V = jnp.asarray([0.3, -1.2, 0.9, 0.1])
        reference_V = jax.nn.log_softmax(jnp.asarray([-0.5, 0.4, 0.2, 1.0]))
        config = config_of(CASES["000 grid grpo token beta=0.0 delta=None"])
        config = dataclasses.replace(config, beta=1.0, kl_estimator=estimator, use_bias_correction_kl=corrected)
        loss_types.validate_loss_config(config)
        probabilities_V = jax.nn.softmax(logits_V)

        def kl(logits_V: jax.Array) -> jax.Array:
            return jnp.sum(jax.nn.softmax(logits_V) * (jax.nn.log_softmax(logits_V) - reference_V))

        @jax.jit
        def kl_loss(logits_V: jax.Array, v: int) -> jax.Array:
            ones = jnp.ones((1, 1))
            inputs = LossInputs(None, reference_V[v][None, None], None, ones, jnp.zeros(1), jnp.ones(1))
            denominators = losses.denominators_for(ones, jnp.ones(1), None, config, entropy_coef=0.0)
            logprobs_BT = jax.nn.log_softmax(logits_V)[v][None, None]
            return losses.grpo_loss(logprobs_BT, None, inputs, denominators, config)[0]

        expected_V = jax.grad(kl)(logits_V)
        actual_V = sum(probabilities_V[v] * jax.grad(kl_loss)(logits_V, v) for v in range(4))
    np.testing.assert_allclose(actual_V, expected_V, atol=1e-12)


def test_k3_keeps_its_digits_close_to_the_reference() -> None:
    log_ratio = np.float32(2.0**-13)
    assert float(loss_types.KL_ESTIMATORS["k3"](jnp.asarray(log_ratio))) == pytest.approx(
        float(log_ratio) ** 2 / 2, rel=1e-3
    )


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.3, 0.7, 0.999])
def test_entropy_threshold_is_the_linear_quantile_of_the_valid_tokens(quantile: float) -> None:
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        for num_valid in (1, 2, 11, 24):
            entropy_T = random.exponential(1.0, 24)
            mask_T = random.permutation(np.arange(24) < num_valid)
            shaped = (entropy_T.reshape(4, 6), mask_T.reshape(4, 6))
            expected = np.quantile(entropy_T[mask_T], 1 - quantile)
            assert float(losses.entropy_threshold(*shaped, quantile)) == pytest.approx(expected, rel=1e-14)


def test_entropy_threshold_with_a_whole_rank_keeps_the_token_of_that_rank() -> None:
    # (1 - 0.7) * 10 is 3.0000000000000004: the fourth smallest of eleven must not fall below its own threshold.
    entropy_BT = jnp.arange(11.0)[None] / 7
    threshold = losses.entropy_threshold(entropy_BT, jnp.ones((1, 11)), 0.7)
    assert int(jnp.sum(entropy_BT >= threshold)) == 8


def test_entropy_threshold_of_nothing_selects_nothing_and_of_one_everything() -> None:
    entropy_BT = jnp.asarray([[0.5, 2.0]])
    assert float(losses.entropy_threshold(entropy_BT, jnp.zeros((1, 2)), 0.5)) == math.inf
    assert float(losses.entropy_threshold(entropy_BT, jnp.ones((1, 2)), 1.0)) == -math.inf


def test_adaptive_entropy_coefficient_stays_within_its_bounds_and_waits_for_a_measurement() -> None:
    config = config_of(CASES["166 adaptive entropy, applied"])
    config = dataclasses.replace(
        config, entropy_target=0.5, entropy_coef_delta=0.1, entropy_coef_min=0.05, entropy_coef_max=0.25
    )
    assert entropy_coef.applied_entropy_coef(0.2, math.inf, config) == 0.0
    assert entropy_coef.applied_entropy_coef(0.2, 0.5, config) == 0.2
    assert entropy_coef.next_entropy_coef(0.2, 0.5, config) == 0.25
    assert entropy_coef.next_entropy_coef(0.2, 0.51, config) == pytest.approx(0.1)
    assert entropy_coef.next_entropy_coef(0.1, 0.51, config) == 0.05
    fixed = dataclasses.replace(config, use_adaptive_entropy=False)
    assert (
        entropy_coef.next_entropy_coef(0.2, 0.1, fixed)
        == entropy_coef.applied_entropy_coef(0.2, math.inf, fixed)
        == 0.2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of .*grpo.* got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence, got 'word'"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, got 'k4'"),
        ({"sampler_is_mode": "mask"}, "sampler_is_mode must be one of"),
        ({"beta": -0.1}, "beta must be in .* got -0.1"),
        ({"epsilon": math.nan}, "epsilon must be in"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile must be in .* got 1.5; 1 keeps every token"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be above 0"),
        ({"max_completion_length": 0}, "max_completion_length must be in"),
        ({"sampler_is_clip_min": 4.0}, "sampler_is_clip_min must not be above sampler_is_clip_max, got 4.0 > 3.0"),
        ({"entropy_coef_min": 2.0}, "entropy_coef_min must not be above entropy_coef_max"),
        ({"loss_type": "vespo", "sampler_is_correction": True}, "token_truncate or token_mask with loss_type vespo"),
        (
            {"loss_type": "gmpo", "sampler_is_correction": True, "sampler_is_mode": "token_mask"},
            "sequence_truncate or sequence_mask with loss_type gmpo",
        ),
        ({"loss_type": "dppo_kl", "sampler_is_correction": True}, "must be false with loss_type dppo_kl.* got true"),
        ({"positive_nll_coef": -0.1}, "positive_nll_coef must be in"),
        ({"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False}, "expected gradient of k1 alone is zero"),
    ],
)
def test_meaningless_config_is_refused(changes: dict[str, Any], message: str) -> None:
    config = config_of(CASES["000 grid grpo token beta=0.0 delta=None"], **changes)
    with pytest.raises(ValueError, match=message):
        loss_types.validate_loss_config(config)


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({"entropy_coef": 0.1, "top_entropy_quantile": 1.0}, "entropy", "needed for the entropy bonus"),
        ({"entropy_coef": 0.0, "top_entropy_quantile": 0.5}, "entropy", "needed for top_entropy_quantile = 0.5"),
        ({"beta": 0.04}, "reference", "reference log-probs are needed for beta = 0.04"),
    ],
)
def test_missing_inputs_are_refused(changes: dict[str, Any], missing: str, message: str) -> None:
    problem = random_problem("grpo", 0, dtype=np.float32, **changes)
    if missing == "entropy":
        problem = dataclasses.replace(problem, entropy_BT=None)
    else:
        problem = dataclasses.replace(problem, inputs=problem.inputs._replace(reference_logprobs_BT=None))
    with pytest.raises(ValueError, match=message):
        problem.evaluate()
