"""The packed, shared-prompt, micro-batched, sharded update against a plain one.

The plain one has a row per sequence, right padding, logits of the whole batch, `log_softmax`, and the loss's formula
written out once more.
Legend: B sequences, T token positions, L tokens of a completion, V vocab, D model; M, R, C as in `rl.training.packing`.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from rl.algorithms.entropy_coef import EntropyCoefState
from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_metrics import finish_metrics
from rl.config.load import Config, load_config
from rl.devices.mesh import create_mesh, no_implicit_transfers
from rl.devices.programs import Stored, stored_programs
from rl.models.config import LoRAConfig, ModelConfig, flatten_specs, parameter_specs
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.models.lora import split
from rl.models.policy import Policy
from rl.models.train_state import PureState
from rl.state.optimizer import create_training_optimizer
from rl.state.states import AbstractState, InitStateFn, get_abstract_state
from rl.training.computed_groups import leaves_groups_out
from rl.training.packing import PackingPlan, TrainCompletion, TrainGroup, pack
from rl.training.shaped_inputs import plan_minibatches
from rl.training.train_step import TRAIN_STEP, Minibatch, jit_train_step, token_logprobs_program
from rl.training.update import ENTROPIES, LOGPROBS, Updater, bare_batch, train_step_options
from tests.helpers.tiny_models import FAMILIES

# No other dim of the tiny model is 88: arrays over the vocabulary are known by their shape. 8 devices divide it.
VOCAB = 88
TEMPERATURE = 0.8
LENGTHS = ((4, (3, 7, 1)), (2, (5, 2, 6, 4)), (6, (2, 7)))  # of each prompt and of its completions
MAX_COMPLETION = 7
# 3 rows in use in 2 pieces of 2, the longest possible group cut; and a row per device, where there are several.
PLAN = PackingPlan(
    num_microbatches=6, num_rows=2, row_length=24, completions_per_row=4, completion_length=MAX_COMPLETION
)
SHARDED_PLAN = dataclasses.replace(PLAN, num_microbatches=2, num_rows=8, row_length=16)
CHUNK_SIZE = 5
# The first tokens of a group have one entropy, but for rounding. This quantile lies at none of them, for any family.
BETA, ENTROPY_COEF, EPSILON, SAMPLER_CAP, QUANTILE = 0.1, 0.05, 0.2, 1.2, 0.72
COMPOSITE = (
    f"grpo.beta={BETA}",
    f"grpo.entropy_coef={ENTROPY_COEF}",
    f"grpo.epsilon={EPSILON}",
    "grpo.sampler_is_correction=true",
    f"grpo.sampler_is_clip_max={SAMPLER_CAP}",
    f"grpo.top_entropy_quantile={QUANTILE}",
)
ONE_DEVICE = (1, 1, 1)
FLAVOURS = {"linen": False, "nnx": True}
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}  # of the largest entry of each leaf
PACKED_TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # likewise, of packing alone
TWO_LAYERS = {family: {"num_layers": 2, "layer_types": ("full_attention",) * 2} for family in FAMILIES}
TWO_LAYERS["gemma3_text"] |= {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")}
# The gradient takes the place of the optimizer state, bit for bit, and the parameters stay.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)
LEARNING_RATE = 0.05
ADAM = optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -0.01 / (1 + count))
)
# After the first update its trace is the gradient.
MOMENTUM, DESCENT = optax.sgd(0.01, momentum=0.9), optax.sgd(LEARNING_RATE)


# The model and the data


def tiny_config(family="qwen3", dtype="float32", **arch) -> ModelConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 8, "dtype": dtype, "param_dtype": dtype, **arch}
    return ModelConfig.from_arch(family, **sizes)


def noisy_params(config: ModelConfig, seed=0) -> dict[str, Any]:
    """Numpy parameters with norms and biases away from their neutral values."""
    rng, params = np.random.default_rng(seed), {}
    for path, spec in flatten_specs(parameter_specs(config)):
        *parents, name = path
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)
        centre = 1.0 - config.features.norm_offset if name == "scale" else 0.0
        node[name] = (centre + 0.3 * rng.normal(size=spec.shape)).astype(config.param_dtype)
    return params


class Problem(NamedTuple):
    """A minibatch as plain padded arrays; `groups` are lists of sequence indices."""

    prompts: list[np.ndarray]
    groups: list[list[int]]
    completions_BL: np.ndarray
    mask_BL: np.ndarray
    advantages_B: np.ndarray
    old_BL: np.ndarray
    reference_BL: np.ndarray
    sampler_BL: np.ndarray
    rollout_BL: np.ndarray
    entropy_BL: np.ndarray

    @property
    def lengths(self) -> list[int]:
        return self.mask_BL.sum(axis=1).astype(int).tolist()

    @property
    def prompt_of(self) -> list[np.ndarray]:
        """The prompt of each sequence."""
        return [prompt for prompt, members in zip(self.prompts, self.groups, strict=True) for _ in members]

    def completion(self, b: int) -> TrainCompletion:
        """Sequence b as the packer takes it."""
        tokens = slice(0, self.lengths[b])
        sampler, rollout = self.sampler_BL[b, tokens], self.rollout_BL[b, tokens]
        return TrainCompletion(self.completions_BL[b, tokens], self.advantages_B[b], sampler, rollout)

    def train_groups(self, order: Sequence[int]) -> list[TrainGroup]:
        """Groups as the packer takes them."""
        return [TrainGroup(self.prompts[g], [self.completion(b) for b in self.groups[g]]) for g in order]

    def part(self, order: Sequence[int]) -> "Problem":
        """Some of the groups as a problem of their own."""
        rows = [b for g in order for b in self.groups[g]]
        numbers = iter(range(len(rows)))
        groups = [[next(numbers) for _ in self.groups[g]] for g in order]
        return Problem([self.prompts[g] for g in order], groups, *(values[rows] for values in self[2:]))


def bare_problem(rng: np.random.Generator, lengths=LENGTHS) -> Problem:
    """Ragged groups; log-probs of all kinds and entropies are 0."""
    prompts = [rng.integers(0, VOCAB, prompt).astype(np.int32) for prompt, _ in lengths]
    counts = [count for _, completions in lengths for count in completions]
    members = iter(range(len(counts)))
    groups = [list(itertools.islice(members, len(completions))) for _, completions in lengths]
    shape = (len(counts), MAX_COMPLETION)
    mask_BL = (np.arange(MAX_COMPLETION) < np.array(counts)[:, None]).astype(np.float64)
    completions_BL = np.where(mask_BL, rng.integers(0, VOCAB, shape), 0).astype(np.int32)
    return Problem(prompts, groups, completions_BL, mask_BL, rng.normal(size=len(counts)), *[np.zeros(shape)] * 5)


def random_problem(lengths=LENGTHS, **model) -> Problem:
    """Ragged groups whose log-probs of all kinds differ; some ratios are clipped, one token is unscored. `model` is
    what `tiny_config` takes.
    """
    rng = np.random.default_rng(3)
    bare = bare_problem(rng, lengths)
    shape = bare.mask_BL.shape
    (_, (now_BL, entropy_BL)), _ = plain_run(bare, "float64", **model)
    near = lambda values: values + 0.4 * rng.normal(size=shape)  # noqa: E731
    old_BL, reference_BL = near(now_BL), near(now_BL)
    sampler_BL = near(old_BL)
    sampler_BL[1, 2] = np.nan
    return bare._replace(
        old_BL=old_BL,
        reference_BL=reference_BL,
        sampler_BL=sampler_BL,
        rollout_BL=near(now_BL),
        entropy_BL=entropy_BL,
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    return random_problem()


# The plain way

# What the loss takes of a problem, besides its tokens.
PLAIN_ARRAYS = ("advantages_B", "old_BL", "reference_BL", "sampler_BL", "entropy_BL")


def plain_logprobs(policy: Policy, problem: Problem):
    """params -> (log-probs, entropies) [B, L], from a padded batch and its full logits."""
    prompts, lengths = problem.prompt_of, problem.lengths
    longest = max(len(prompt) + count for prompt, count in zip(prompts, lengths, strict=True))
    tokens_BT = np.zeros((len(prompts), longest), np.int32)
    groups_BT = np.full_like(tokens_BT, -1)
    behind_BL = np.zeros(problem.mask_BL.shape, np.int32)
    for b, (prompt, count) in enumerate(zip(prompts, lengths, strict=True)):
        sequence = [*prompt, *problem.completions_BL[b, :count]]
        tokens_BT[b, : len(sequence)] = sequence
        groups_BT[b, : len(sequence)] = 0
        behind_BL[b, :count] = len(prompt) - 1 + np.arange(count)
    inputs = plain_inputs(tokens_BT)._replace(group_ids_BT=groups_BT)

    def logprobs(params):
        hidden_BTD = policy.hidden(params, inputs)
        log_softmax_BTV = jax.nn.log_softmax(policy.unembed(params, hidden_BTD) / TEMPERATURE, axis=-1)
        log_softmax_BLV = jnp.take_along_axis(log_softmax_BTV, behind_BL[..., None], axis=1)
        logprobs_BL = jnp.take_along_axis(log_softmax_BLV, problem.completions_BL[..., None], axis=-1)[..., 0]
        return logprobs_BL, -jnp.sum(jnp.exp(log_softmax_BLV) * log_softmax_BLV, axis=-1)

    return logprobs


def plain_loss(logprobs_BL, entropy_BL, problem: Problem, level="token"):
    """Clipped GRPO on high-entropy tokens, sampler correction, KL (k3, ratio in front), entropy bonus.

    level: of the ratio, of a token or of its whole sequence (GSPO, which has the gradient of each token's log-prob).
    """
    mask_BL, advantages_B1 = problem.mask_BL.astype(logprobs_BL.dtype), problem.advantages_B[:, None]
    old_BL, reference_BL = problem.old_BL, problem.reference_BL
    threshold = jnp.quantile(problem.entropy_BL[problem.mask_BL > 0], 1 - QUANTILE)
    chosen_BL = mask_BL * (problem.entropy_BL >= threshold)
    log_ratio_BL = (logprobs_BL - old_BL) * mask_BL
    if level == "sequence":
        log_ratio_BL = jnp.sum(log_ratio_BL, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask_BL, 1, keepdims=True), 1)
    ratio_BL = jnp.exp(log_ratio_BL)
    clipped_BL = jnp.clip(ratio_BL, 1 - EPSILON, 1 + EPSILON)
    policy_BL = -jnp.minimum(ratio_BL * advantages_B1, clipped_BL * advantages_B1) * chosen_BL
    policy_BL *= jnp.minimum(jnp.exp(jnp.nan_to_num(old_BL - problem.sampler_BL)), SAMPLER_CAP)
    difference_BL = reference_BL - logprobs_BL
    kl_BL = (jnp.exp(difference_BL) - difference_BL - 1) * ratio_BL
    term_BL = (policy_BL + BETA * kl_BL) * mask_BL
    bonus = jnp.sum(entropy_BL * chosen_BL) / jnp.sum(chosen_BL)
    return jnp.mean(jnp.sum(term_BL, axis=1) / jnp.maximum(jnp.sum(mask_BL, axis=1), 1)) - ENTROPY_COEF * bonus


def plain_value_and_gradient(policy: Policy, problem: Problem):
    """A compiled function of (params, arrays of a problem: `PLAIN_ARRAYS`).

    It returns ((loss, (log-probs, entropies)), gradient).
    """
    logprobs = plain_logprobs(policy, problem)

    def loss(params, *arrays):
        now = logprobs(params)
        return plain_loss(*now, problem._replace(**dict(zip(PLAIN_ARRAYS, arrays, strict=True)))), now

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def plain_program(lengths, dtype: str, **model):
    """The plain way for every problem of these lengths that `random_problem` makes."""
    bare = bare_problem(np.random.default_rng(3), lengths)
    return plain_value_and_gradient(create_policy(tiny_config(dtype=dtype, **model), False), bare)


def plain_run(problem: Problem, dtype: str, params=None, **model):
    """((loss, (log-probs, entropies)), gradient) of the plain way. `params`: None for those of `noisy_params`."""
    lengths = [
        (len(prompt), tuple(problem.lengths[b] for b in members))
        for prompt, members in zip(problem.prompts, problem.groups, strict=True)
    ]
    with jax.enable_x64(dtype == "float64"):
        params = noisy_params(tiny_config(dtype=dtype, **model)) if params is None else params
        arrays = [getattr(problem, name).astype(dtype) for name in PLAIN_ARRAYS]
        return jax.device_get(plain_program(tuple(lengths), dtype, **model)(params, *arrays))


def plain_result(problem: Problem, dtype: str, **model):
    """(loss, gradient) of the plain way."""
    (loss, _), gradient = plain_run(problem, dtype, **model)
    return loss, gradient


@pytest.fixture(scope="module")
def plain(problem):
    """dtype -> (loss, gradient) of the plain way; the same for every test of the module."""
    return functools.cache(functools.partial(plain_result, problem))


# The packed way


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A compiled train step with all that it was made from."""

    policy: Policy
    plan: PackingPlan
    mesh: Any
    rules: Any
    abstract: AbstractState
    optimizer: optax.GradientTransformation
    train_step: Any

    def fresh_state(self) -> PureState:
        params = noisy_params(self.policy.config)
        opt_state = self.optimizer.init(split(self.policy.config, params)[0])
        state = PureState(np.int32(0), params, opt_state, np.zeros(2, np.uint32))
        return jax.device_put(state, self.abstract.shardings)

    def minibatch(self, problem: Problem, order=None) -> Minibatch:
        """The problem packed, its groups in the order given."""
        order = range(len(problem.groups)) if order is None else order
        dtype = np.dtype(self.policy.config.dtype)
        ids = [b for g in order for b in problem.groups[g]]
        batch = pack(problem.train_groups(order), self.plan, dtype)

        def spread(values_BL):
            values_MRCL = np.zeros(batch.mask_MRCL.shape, dtype)
            for place in zip(*np.nonzero(batch.sequence_ids_MRC >= 0), strict=True):
                values_MRCL[place] = values_BL[ids[batch.sequence_ids_MRC[place]]]
            return values_MRCL

        batch = batch._replace(
            old_logprobs_MRCL=spread(problem.old_BL), reference_logprobs_MRCL=spread(problem.reference_BL)
        )
        return Minibatch(
            batch,
            num_items_in_batch=np.int32(sum(problem.lengths)),
            entropy_coef=dtype.type(ENTROPY_COEF),
            entropy_MRCL=spread(problem.entropy_BL),
            on_policy=np.bool_(False),
        )

    def loss_and_gradient(self, problem: Problem, order=None):
        """(loss, gradient, metrics) with `KEEP_GRADIENT` for optimizer."""
        state, update = self.train_step(self.fresh_state(), self.minibatch(problem, order))
        loss, gradient, update = jax.device_get((update.loss, state.opt_state, update))
        return loss, gradient, update


def make_trainer(
    flavour: str,
    dtype: str,
    mesh=ONE_DEVICE,
    plan=PLAN,
    chunk_size=CHUNK_SIZE,
    vocab=VOCAB,
    optimizer=KEEP_GRADIENT,
    overrides=(),
    family="qwen3",
    **model,
) -> Trainer:
    """One device, several pieces of several rows, and several chunks of a row, unless told otherwise.

    Args:
      optimizer: None for that of the configuration.
      model: fields of the `ModelConfig`.
    """
    sizes = (f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True))
    config = load_config(None, [*COMPOSITE, *sizes, *overrides])
    devices = create_mesh(config.mesh, jax.devices()[: int(np.prod(mesh))])
    model_config = dataclasses.replace(tiny_config(family, dtype, vocab_size=vocab), **model)
    policy = create_policy(model_config, FLAVOURS[flavour])
    optimizer = create_training_optimizer(config, policy)[1] if optimizer is None else optimizer
    abstract = get_abstract_state(config, devices, InitStateFn(policy, optimizer, 0))
    train_step = jit_train_step(
        policy,
        optimizer,
        loss_config(config),
        abstract.shardings,
        mesh=devices,
        rules=config.mesh.rules,
        temperature=TEMPERATURE,
        chunk_size=chunk_size,
        minibatches_per_rollout=1,
        shorter_lengths=plan.shorter_lengths,
        max_sequences=plan.max_sequences,
    )
    return Trainer(policy, plan, devices, config.mesh.rules, abstract, optimizer, train_step)


def make_updater(config: Config, packed: Trainer, stored: Stored | None = None) -> Updater:
    """The updater of a run with this configuration. The train step is its own, policy and shapes are the trainer's."""
    policy, plan, shardings, mesh = packed.policy, packed.plan, packed.abstract.shardings, packed.mesh
    options = train_step_options(config, plan)
    loss = loss_config(config)
    with stored_programs(stored) if stored else contextlib.nullcontext():
        train_step = jit_train_step(policy, packed.optimizer, loss, shardings, mesh=mesh, **options)
        return Updater(train_step, config, policy, plan, shardings, mesh=mesh)


@pytest.fixture(scope="module")
def trainer():
    """`make_trainer`, whose compiled functions the tests of the module share."""
    return functools.cache(make_trainer)


def assert_close_leaf_by_leaf(got, want, tolerance: float) -> None:
    """Each leaf within `tolerance` of its largest entry, and no leaf of zeros."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        largest = np.abs(b).max()
        assert a.dtype == b.dtype, path
        assert largest > 1e-3, path
        assert np.abs(a - b).max() <= tolerance * largest, (path, np.abs(a - b).max() / largest)


# Packed == plain


@functools.cache
def problem_of(family: str) -> Problem:
    """With a fourth group, which shares a row with another one."""
    return random_problem((*LENGTHS, (1, (2,))), family=family, **TWO_LAYERS[family])


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", PACKED_TOLERANCE)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradient_equal_the_plain_ones(family, flavour, dtype):
    """A prompt is shared by completions that reach beyond Gemma's window, of which the prompt itself is longer too, and
    a row by two prompts.
    """
    problem, tolerance = problem_of(family), PACKED_TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
        packed = make_trainer(flavour, dtype, family=family, **TWO_LAYERS[family])
        batch = packed.minibatch(problem).batch
        assert batch.num_microbatches > 1
        assert (batch.sequence_ids_MRC >= 0).any(axis=(0, 2)).all()  # in every row of a piece
        assert batch.group_ids_MRT.max() == 1, "no row holds two groups"
        loss, gradient, update = packed.loss_and_gradient(problem)
    want_loss, want_gradient = plain_result(problem, dtype, family=family, **TWO_LAYERS[family])
    assert abs(loss - want_loss) <= tolerance * abs(want_loss)
    assert_close_leaf_by_leaf(gradient, want_gradient, tolerance)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(want_gradient)))
    np.testing.assert_allclose(update.grad_norm, norm, rtol=tolerance)


def test_the_problem_puts_every_part_of_the_loss_to_work(problem, trainer):
    with jax.enable_x64(True):
        _, _, update = trainer("nnx", "float64").loss_and_gradient(problem)
        metrics = {name: float(value) for name, value in finish_metrics(update.sums).items()}
    assert metrics["clip_ratio/low_mean"] > 0
    assert metrics["clip_ratio/high_mean"] > 0
    assert metrics["kl"] > 0.01
    assert abs(metrics["ratio/mean"] - 1) > 0.01
    assert metrics["sampler_ratio/max"] == SAMPLER_CAP
    assert 0 < metrics["sampler_ratio/min"] < 0.8
    assert metrics["entropy"] < metrics["selected_entropy"]
    assert problem.advantages_B.min() < -0.5
    assert problem.advantages_B.max() > 0.5


def test_metrics_of_the_update_are_those_of_the_plain_arrays(problem, trainer):
    with jax.enable_x64(True):
        packed = trainer("nnx", "float64")
        _, _, update = packed.loss_and_gradient(problem)
        metrics = jax.device_get(finish_metrics(update.sums))
    (_, (now_BL, entropy_BL)), _ = plain_run(problem, "float64")
    valid_BL = problem.mask_BL > 0
    ratio_BL, gap_BL = np.exp(now_BL - problem.old_BL), np.abs(now_BL - problem.rollout_BL)
    k3_BL = np.expm1(problem.reference_BL - now_BL) - (problem.reference_BL - now_BL)
    expected = {
        "entropy": entropy_BL[valid_BL].mean(),
        "kl": (k3_BL * ratio_BL)[valid_BL].mean(),
        "ratio/mean": ratio_BL[valid_BL].mean(),
        "ratio/max": ratio_BL[valid_BL].max(),
    }
    np.testing.assert_allclose([metrics[name] for name in expected], list(expected.values()), rtol=1e-11)
    difference = update.difference
    assert difference.count == valid_BL.sum()
    np.testing.assert_allclose(difference.total / difference.count, gap_BL[valid_BL].mean(), rtol=1e-11)
    np.testing.assert_allclose(difference.highest, gap_BL[valid_BL].max(), rtol=1e-11)


CUTS = {
    "one piece, one chunk": {"plan": PackingPlan(1, 1, 64, 9, MAX_COMPLETION), "chunk_size": 1000},
    "rows of two groups": {"plan": PackingPlan(3, 4, 32, 7, MAX_COMPLETION), "chunk_size": 16},
    "a group over two rows": {"plan": PackingPlan(4, 1, 14, 3, MAX_COMPLETION), "chunk_size": 7},
    "a row of one sequence": {"plan": PackingPlan(12, 1, 13, 1, MAX_COMPLETION), "chunk_size": 1},
}


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("cut", CUTS)
def test_how_a_minibatch_is_cut_changes_nothing(cut, flavour, dtype, problem, plain, trainer):
    with jax.enable_x64(dtype == "float64"):
        packed = trainer(flavour, dtype, **CUTS[cut])
        batch = packed.minibatch(problem).batch
        loss, gradient, _ = packed.loss_and_gradient(problem)
    if cut.startswith("one piece"):
        assert batch.num_microbatches == 1
    if cut.startswith("a group"):
        num_members = (batch.sequence_ids_MRC[:, 0] >= 0).sum(axis=-1)
        assert sorted(num_members) == [1, 2, 3, 3]  # of four completions one has a row, and a prompt, of its own
    want_loss, want_gradient = plain(dtype)
    assert abs(loss - want_loss) <= TOLERANCE[dtype] * abs(want_loss)
    assert_close_leaf_by_leaf(gradient, want_gradient, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("budget", "expected", "used"),
    [(13, CUTS["a row of one sequence"]["plan"], 9), (34, PackingPlan(3, 1, 34, 4, MAX_COMPLETION), 3)],
)
def test_the_token_budget_of_a_micro_batch_makes_pieces_of_one_sequence_or_of_one_group(
    budget, expected, used, problem
):
    """What such a cut leads to: `test_how_a_minibatch_is_cut_changes_nothing`."""
    settings = (f"grpo.max_tokens_per_microbatch={budget}", "grpo.prompts_per_step=3", "grpo.group_size=4")
    config = load_config(None, [*settings, f"sampling.max_completion_length={MAX_COMPLETION}", "mesh.num_devices=1"])
    policy = create_policy(tiny_config(), True)
    plan = plan_minibatches(config, max(map(len, problem.prompts)), policy, create_mesh(config.mesh))
    assert plan == expected
    assert pack(problem.train_groups(range(3)), plan).num_microbatches == used


# One compiled program has a pass for each length; (8, 14) are both computed, one after the other.
@pytest.mark.parametrize(
    "shorter",
    [(8, 14), *(pytest.param(lengths, marks=pytest.mark.long) for lengths in ((8,), (17,), (22,), (13, 17, 22)))],
    ids=str,
)
def test_rows_computed_at_less_than_their_length_change_nothing(shorter, problem, plain, monkeypatch):
    computed = []

    def recorded(self, params, inputs):
        jax.debug.callback(lambda: computed.append(inputs.tokens_BT.shape[1]))
        return hidden(self, params, inputs)

    plan = dataclasses.replace(PLAN, num_rows=1, num_microbatches=2 * PLAN.num_microbatches, shorter_lengths=shorter)
    with jax.enable_x64(True):
        packed = make_trainer("nnx", "float64", plan=plan)
        hidden = type(packed.policy).hidden
        monkeypatch.setattr(type(packed.policy), "hidden", recorded)
        batch = packed.minibatch(problem).batch
        loss, gradient, _ = packed.loss_and_gradient(problem)
        jax.effects_barrier()
    fill = (batch.group_ids_MRT >= 0).sum(axis=(1, 2))[: batch.num_microbatches]
    assert sorted(computed) == sorted(
        min(length for length in (*shorter, plan.row_length) if n <= length) for n in fill
    )
    want_loss, want_gradient = plain("float64")
    assert abs(loss - want_loss) <= 1e-11 * abs(want_loss)
    assert_close_leaf_by_leaf(gradient, want_gradient, 1e-11)


def test_bfloat16_gradients_of_many_pieces_are_added_up_in_float32(problem):
    """300 times the same group, a piece each: summed in bfloat16 the last 44 would be lost to rounding."""
    trainer = make_trainer("nnx", "bfloat16", plan=PackingPlan(300, 1, 16, 3, MAX_COMPLETION))
    part = problem.part([0])
    size = len(part.groups[0])
    repeated = Problem(
        part.prompts * 300,
        [[*range(size * k, size * (k + 1))] for k in range(300)],
        *(np.tile(field, (300,) + (1,) * (field.ndim - 1)) for field in part[2:]),
    )
    expected, gradient = (trainer.loss_and_gradient(each)[1] for each in (part, repeated))
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient), strict=True):
        assert got.dtype == jnp.bfloat16
        want, got = want.astype(np.float32), got.astype(np.float32)
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


def test_the_order_of_the_groups_changes_nothing(problem, plain, trainer):
    with jax.enable_x64(True):
        loss, gradient, _ = trainer("nnx", "float64").loss_and_gradient(problem, order=(2, 0, 1))
    want_loss, want_gradient = plain("float64")
    assert abs(loss - want_loss) <= 1e-11 * abs(want_loss)
    assert_close_leaf_by_leaf(gradient, want_gradient, 1e-11)


def test_what_lies_in_padding_changes_nothing(problem, trainer):
    """Pieces beyond the last one in use, free slots of rows, masked values: all filled with numbers that would show."""
    packed = trainer("nnx", "float32")
    clean = packed.minibatch(problem)
    batch = clean.batch
    unused_MRCL, unused_MRC = batch.mask_MRCL == 0, batch.sequence_mask_MRC == 0
    soiled = batch._replace(
        tokens_MRT=np.where(batch.group_ids_MRT < 0, VOCAB - 1, batch.tokens_MRT),
        targets_MRN=np.where(batch.target_mask_MRN, batch.targets_MRN, 7),
        slots_MRCL=np.where(unused_MRCL, 3, batch.slots_MRCL),
        advantages_MRC=np.where(unused_MRC, np.float32(50), batch.advantages_MRC),
        sampler_logprobs_MRCL=np.where(unused_MRCL, np.float32(-9), batch.sampler_logprobs_MRCL),
        rollout_logprobs_MRCL=np.where(unused_MRCL, np.float32(-9), batch.rollout_logprobs_MRCL),
        old_logprobs_MRCL=np.where(unused_MRCL, np.float32(np.nan), batch.old_logprobs_MRCL),
        reference_logprobs_MRCL=np.where(unused_MRCL, np.float32(np.inf), batch.reference_logprobs_MRCL),
    )
    entropy_MRCL = np.where(unused_MRCL, np.float32(99), clean.entropy_MRCL)
    results = [
        jax.device_get(packed.train_step(packed.fresh_state(), minibatch))
        for minibatch in (clean, clean._replace(batch=soiled, entropy_MRCL=entropy_MRCL))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


# Sharded == single device


def assert_sharded_step_is_the_plain_one(sharded: Trainer, mesh, problem: Problem, want) -> None:
    """Also that the state lies on all devices, the next one where the old one did."""
    start = sharded.fresh_state()
    before = jax.tree.map(lambda leaf: leaf.sharding, start)
    embedding = before.params["embed_tokens"]["embedding"]
    assert len(embedding.device_set) == np.prod(mesh)
    _, fsdp, tensor = mesh
    assert embedding.shard_shape((VOCAB, 16)) == (VOCAB // tensor, 16 // fsdp)
    state, update = sharded.train_step(start, sharded.minibatch(problem))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
    moments = state.opt_state[0].trace if sharded.optimizer is MOMENTUM else state.opt_state
    loss, gradient = jax.device_get((update.loss, moments))
    tolerance = TOLERANCE[str(sharded.policy.config.dtype)]
    want_loss, want_gradient = want
    assert abs(loss - want_loss) <= tolerance * abs(want_loss)
    assert_close_leaf_by_leaf(gradient, want_gradient, tolerance)


@pytest.mark.matrix
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["data", "fsdp", "tensor"])
def test_sharded_loss_and_gradient_equal_the_plain_ones(axis, size, flavour, problem, plain, trainer):
    mesh = tuple(size if number == axis else 1 for number in range(3))
    with jax.enable_x64(True):
        sharded = trainer(flavour, "float64", mesh=mesh, plan=SHARDED_PLAN)
        assert_sharded_step_is_the_plain_one(sharded, mesh, problem, plain("float64"))


def test_loss_and_gradient_on_three_axes_at_once_equal_the_plain_ones(problem, plain, trainer):
    sharded = trainer("linen", "float32", optimizer=MOMENTUM, mesh=(2, 2, 2), plan=SHARDED_PLAN)
    assert_sharded_step_is_the_plain_one(sharded, (2, 2, 2), problem, plain("float32"))


# What the compiled function is


def test_the_old_state_is_donated(problem, trainer):
    packed = trainer("nnx", "float32", optimizer=ADAM)
    old = packed.fresh_state()
    state, _ = packed.train_step(old, packed.minibatch(problem))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert int(state.step) == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_moments_in_the_hosts_memory_make_the_same_update_and_go_back_there(flavour, problem, trainer):
    plain = trainer("nnx", "float32", optimizer=ADAM)
    offloaded = make_trainer(flavour, "float32", optimizer=ADAM, overrides=("optimizer.offload=true",))
    results = []
    for packed, kind in ((plain, "device"), (offloaded, "pinned_host")):
        state, minibatch = packed.fresh_state(), packed.minibatch(problem)
        for _ in range(2):
            state, _ = packed.train_step(state, minibatch)
            assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {kind}
        results.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_batches_of_any_raggedness_run_through_one_trace(trainer):
    packed = trainer("nnx", "float32", optimizer=ADAM)
    state = packed.fresh_state()
    pieces = set()
    for lengths in (((6, (7,) * 4),) * 3, ((1, (1,)), (2, (1,)), (1, (1, 1))), ((3, (4, 2, 7)),)):
        minibatch = packed.minibatch(bare_problem(np.random.default_rng(9), lengths))
        state, update = packed.train_step(state, minibatch)
        pieces.add(int(minibatch.batch.num_microbatches))
        assert np.isfinite(update.loss)
    assert len(pieces) > 1
    assert packed.train_step._cache_size() == 1


@pytest.mark.matrix
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("mesh", "plan"), [(ONE_DEVICE, PLAN), ((1, 4, 2), SHARDED_PLAN)], ids=["one device", "mesh"])
@pytest.mark.parametrize("lora", [LoRAConfig(2, 4.0, ("layers_[12]/*_proj",)), None], ids=["adapters", "whole"])
def test_an_update_is_the_same_with_layers_in_a_loop(lora, mesh, plan, flavour, problem):
    """Of adapters, which are on two of the three layers, as of all weights."""
    limit = 0.02
    overrides = ("optimizer.lr=1e-2", f"optimizer.max_grad_norm={limit}", "optimizer.weight_decay=0.1")
    num_layers = 3 if lora else 2
    layers = {"num_layers": num_layers, "layer_types": ("full_attention",) * num_layers, "lora": lora}
    results = []
    with jax.enable_x64(True):
        for scan_layers, *place in ((False, ONE_DEVICE, PLAN), (True, mesh, plan)):
            kinds = {"optimizer": None, "overrides": overrides, "scan_layers": scan_layers, **layers}
            trainer = make_trainer(flavour, "float64", *place, **kinds)
            state, update = trainer.train_step(trainer.fresh_state(), trainer.minibatch(problem))
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == trainer.abstract.shardings
            results.append(jax.device_get((state, update.loss, update.grad_norm)))
    assert results[0][2] > limit
    start = jax.tree.leaves(noisy_params(trainer.policy.config))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(results[0][0].params), start, strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


@pytest.mark.matrix
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_neither_flavour_computes_or_moves_more_than_the_other(rank, scan_layers, problem, trainer):
    """Operations and bytes of the compiled step are equal, so that neither flavour is the slower one."""
    costs, kinds = [], {}
    if rank:
        kinds["lora"] = LoRAConfig(rank, 4.0, ("*_proj",))
    if scan_layers:
        kinds["scan_layers"] = True
    for flavour in FLAVOURS:
        packed = trainer(flavour, "float32", **kinds)  # the plain ones are those of other tests
        step = packed.train_step if not rank else jax.jit(packed.train_step)
        analysis = step.lower(packed.abstract.shapes, packed.minibatch(problem)).compile().cost_analysis()
        costs.append({name: analysis[name] for name in ("flops", "bytes accessed")})
    assert costs[0] == costs[1]
    assert costs[0]["flops"] > 1e5


def host_calls(train_step, state, minibatch) -> int:
    """How many functions, of Python or C, the host runs to start one step that is compiled already."""
    state, _ = jax.block_until_ready(train_step(state, minibatch))
    calls = []
    gc.disable()  # its callbacks would be counted where it happens to run
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        result = train_step(state, minibatch)
    finally:
        sys.setprofile(None)
        gc.enable()
    jax.block_until_ready(result)
    return sum(event in ("call", "c_call") for event in calls)


def test_a_step_is_as_much_work_for_the_host_in_either_flavour(problem, trainer):
    """Of the same functions, so that it also takes as long."""
    trainers = [trainer(flavour, "float32") for flavour in FLAVOURS]
    counts = [host_calls(t.train_step, t.fresh_state(), jax.device_put(t.minibatch(problem))) for t in trainers]
    assert counts[0] == counts[1] > 0


def arrays_of(jaxpr):
    """Every array that a jaxpr computes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_logits_of_all_tokens_never_exist(problem, trainer):
    packed = trainer("nnx", "float32")
    jaxpr = jax.make_jaxpr(packed.train_step)(packed.fresh_state(), packed.minibatch(problem)).jaxpr
    rows = [int(np.prod(a.shape)) // VOCAB for a in arrays_of(jaxpr) if VOCAB in getattr(a, "shape", ())]
    assert max(rows) >= 16, "not even the embedding table was found"
    num_predictors = packed.minibatch(problem).batch.targets_MRN.shape[-1]
    assert num_predictors >= 4 * CHUNK_SIZE
    assert max(rows) <= max(packed.plan.num_rows * CHUNK_SIZE, packed.policy.config.hidden_size)


@pytest.fixture(scope="module")
def memory_of(problem):
    """optimizer -> (trainer, memory analysis of its train step, bytes of the logits of all tokens); a large vocabulary
    in one piece.
    """

    @functools.cache
    def measured(optimizer):
        vocab, plan = 8209, PackingPlan(1, 8, 128, 32, MAX_COMPLETION)
        packed = make_trainer("nnx", "float32", vocab=vocab, plan=plan, chunk_size=4, optimizer=optimizer)
        minibatch = packed.minibatch(problem)
        memory = packed.train_step.lower(packed.abstract.shapes, minibatch).compile().memory_analysis()
        return packed, memory, minibatch.batch.targets_MRN.size * vocab * 4

    return measured


def test_memory_of_the_compiled_step_is_a_fraction_of_the_logits_of_all_tokens(memory_of):
    _, memory, size_of_logits = memory_of(DESCENT)
    assert memory.temp_size_in_bytes < size_of_logits / 2


# Updates that are not finite


def poisoned(minibatch: Minibatch, kind: str) -> Minibatch:
    """One value of one token made non-finite: an advantage, or the reference's log-prob."""
    batch = minibatch.batch
    field = {"inf advantage": "advantages_MRC", "nan log-prob": "reference_logprobs_MRCL"}[kind]
    used = batch.sequence_mask_MRC if field == "advantages_MRC" else batch.mask_MRCL
    values = np.array(getattr(batch, field))
    values[tuple(np.argwhere(used > 0)[2])] = np.inf if kind == "inf advantage" else np.nan
    return minibatch._replace(batch=batch._replace(**{field: values}))


# In `make test`: Adam in NNX on one device and momentum in Linen on the mesh, which other tests have compiled too.
@pytest.mark.matrix
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["adam", "momentum"])
@pytest.mark.parametrize("mesh", [ONE_DEVICE, (2, 2, 2)], ids=["one device", "sharded"])
def test_update_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(
    mesh, optimizer, flavour, problem, trainer
):
    place = {} if mesh == ONE_DEVICE else {"mesh": mesh, "plan": SHARDED_PLAN}
    packed = trainer(flavour, "float32", optimizer=optimizer, **place)
    clean = packed.minibatch(problem)
    state, update = packed.train_step(packed.fresh_state(), clean)  # away from the start, where moments are all zero
    assert update.is_applied
    before = jax.device_get(state)
    for kind in ("inf advantage", "nan log-prob"):
        state, update = packed.train_step(state, poisoned(clean, kind))
        assert not update.is_applied
        assert not np.isfinite(float(update.loss) + float(update.grad_norm))
    assert int(state.step) == 3  # the position in the run goes on; the optimizer's own counts do not
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state)._replace(step=before.step), before)
    after_poison, update = packed.train_step(state, clean)
    assert update.is_applied
    twice, _ = packed.train_step(packed.train_step(packed.fresh_state(), clean)[0], clean)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(after_poison)._replace(step=0),
        jax.device_get(twice)._replace(step=0),
    )
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (twice.params, before.params)), strict=True))


def test_skipping_needs_no_second_copy_of_the_state(memory_of):
    """What Adam adds to the temporaries of plain gradient descent is a small part of the weights."""
    adam, descent = (memory_of(optimizer)[1].temp_size_in_bytes for optimizer in (ADAM, DESCENT))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory_of(ADAM)[0].abstract.shapes.params))
    assert adam - descent < 0.1 * size


def test_metrics_of_a_step_leave_skipped_updates_out_and_count_them(problem):
    settings = (*COMPOSITE, "grpo.minibatches=2", "grpo.prompts_per_step=4", "mesh.fsdp=1", "grpo.beta=0")
    settings += ("grpo.use_adaptive_entropy=true", f"grpo.logprob_chunk={CHUNK_SIZE}")
    packed = make_trainer("nnx", "float32", optimizer=ADAM)
    updater = make_updater(load_config(None, settings), packed)
    good = problem.train_groups([0, 1])
    bad = [TrainGroup(g.prompt_ids, [dataclasses.replace(c, advantage=np.inf) for c in g.completions]) for g in good]
    start = EntropyCoefState(ENTROPY_COEF, float("inf"))
    _, entropy_of_one, _ = updater.update(packed.fresh_state(), None, [good], start)
    state, entropy, metrics = updater.update(packed.fresh_state(), None, [bad, good], start)
    assert metrics["skipped_updates"] == 1
    assert all(np.isfinite(value) for value in metrics.values())
    assert entropy == entropy_of_one  # the adaptive coefficient has not moved in the skipped update
    assert metrics["ratio/max"] == 1.0  # what follows a skipped update is still the first on this rollout
    assert int(state.step) == 2
    empty = [TrainGroup(group.prompt_ids, []) for group in good]
    _, entropy_beside_nothing, beside_nothing = updater.update(packed.fresh_state(), None, [good, empty], start)
    assert entropy_beside_nothing == entropy_of_one  # nor in an update that measured nothing
    assert beside_nothing["entropy"] > 0.9 * metrics["entropy"]
    assert np.isfinite(beside_nothing["ratio/max"])
    state, entropy, metrics = updater.update(state, None, [bad, bad], entropy)
    assert metrics["skipped_updates"] == 2
    assert not np.isfinite(metrics["grad_norm"])
    assert entropy == entropy_of_one


# Transfers


def test_transfer_that_the_code_does_not_ask_for_raises_in_a_step(problem, trainer):
    packed = trainer("nnx", "float32", optimizer=ADAM)
    state, minibatch = packed.fresh_state(), packed.minibatch(problem)
    on_devices = jax.device_put(minibatch)
    with no_implicit_transfers():
        state, _ = packed.train_step(state, on_devices)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            packed.train_step(state, minibatch)  # numpy arrays


# Several updates per rollout


def token_logprobs_of(packed: Trainer, with_entropy=False):
    return token_logprobs_program(
        packed.policy,
        packed.abstract.shardings.params,
        mesh=packed.mesh,
        rules=packed.rules,
        temperature=TEMPERATURE,
        chunk_size=CHUNK_SIZE,
        with_entropy=with_entropy,
    ).jit()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_ratio_is_exactly_one_before_the_first_update_and_no_longer_after_it(flavour, problem, trainer):
    packed = trainer(flavour, "float32")
    minibatch, state = packed.minibatch(problem), packed.fresh_state()
    bare = minibatch.batch._replace(old_logprobs_MRCL=None, reference_logprobs_MRCL=None)
    old, _ = token_logprobs_of(packed)(state.params, bare)
    later = minibatch._replace(batch=minibatch.batch._replace(old_logprobs_MRCL=old))
    _, recomputed = packed.train_step(packed.fresh_state(), later)
    state, first = packed.train_step(state, later._replace(on_policy=np.bool_(True)))
    moved = jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, state.params, state.opt_state)
    _, second = packed.train_step(state._replace(params=moved), later)
    recomputed, first, second = (finish_metrics(update.sums) for update in (recomputed, first, second))
    assert abs(float(recomputed["ratio/max"]) - 1) < 1e-5  # the pass without gradient is the same up to rounding
    assert (float(first["ratio/mean"]), float(first["ratio/max"])) == (1.0, 1.0)
    assert float(second["ratio/max"]) > 1.01


HALVES = ([0, 1], [2])


@pytest.fixture(scope="module")
def step_of_halves(problem, trainer):
    """(epochs, old_of=None) -> (state, metrics, names of the programs that ran, values of tokens) of a step of two
    minibatches.

    Plain gradient descent in float64, with programs that are compiled once. `old_of` names the number of an update that
    is given old log-probs of its weights, in place of what it has.
    """
    programs = {}

    def step(epochs: int, old_of: int | None = None):
        settings = ("grpo.minibatches=2", f"grpo.epochs={epochs}", "grpo.prompts_per_step=4", "mesh.fsdp=1")
        settings += (f"grpo.logprob_chunk={CHUNK_SIZE}", f"sampling.temperature={TEMPERATURE}")
        ran = []

        def stored(name, program):
            compiled = programs.setdefault(name, program.jit())

            def call(*arguments):
                ran.append(name)
                if name == TRAIN_STEP and ran.count(name) - 1 == old_of:
                    state, minibatch = arguments
                    old = programs[LOGPROBS](state.params, bare_batch(minibatch.batch))[0]
                    arguments = state, minibatch._replace(batch=minibatch.batch._replace(old_logprobs_MRCL=old))
                result = compiled(*arguments)
                assert compiled._cache_size() == 1
                return result

            return call

        with jax.enable_x64(True):
            packed = trainer("nnx", "float64", optimizer=DESCENT)
            other = jax.device_put(noisy_params(packed.policy.config, seed=1), packed.abstract.shardings.params)
            updater = make_updater(load_config(None, [*COMPOSITE, *settings]), packed, stored)
            state, _, metrics = updater.update(
                packed.fresh_state(),
                packed.fresh_state()._replace(params=other, opt_state=()),
                [problem.train_groups(half) for half in HALVES],
                EntropyCoefState(ENTROPY_COEF, float("inf")),
            )
            return jax.device_get(state), metrics, ran, updater.token_values()

    return step


def test_entropies_are_computed_only_where_they_are_asked_for(problem, trainer):
    """The pass for old and reference log-probs does less work without them, and gives the same log-probs."""
    packed = trainer("nnx", "float32")
    arguments = packed.fresh_state().params, bare_batch(packed.minibatch(problem).batch)
    both, alone = (
        token_logprobs_of(packed, with_entropy).lower(*arguments).compile() for with_entropy in (True, False)
    )
    (logprobs, entropies), (logprobs_alone, none) = (jax.device_get(program(*arguments)) for program in (both, alone))
    assert none is None
    assert entropies.max() > 1
    np.testing.assert_array_equal(logprobs, logprobs_alone)
    exponentials, fewer = (program.cost_analysis()["transcendentals"] for program in (both, alone))
    assert exponentials - fewer >= packed.plan.num_rows * CHUNK_SIZE * VOCAB  # one less for each logit of a chunk


def test_updates_of_a_step_keep_the_old_logprobs_of_before_the_first(problem, trainer, step_of_halves):
    """Two minibatches, two epochs, plain gradient descent: where four plain updates with frozen old log-probs lead."""
    state, metrics, _, tokens = step_of_halves(epochs=2)
    with jax.enable_x64(True):
        policy, parts = trainer("nnx", "float64", optimizer=DESCENT).policy, [problem.part(half) for half in HALVES]
        start, other = noisy_params(policy.config), noisy_params(policy.config, seed=1)
        frozen, refreshed, gap_BL = plain_updates(policy, parts, start, other, LEARNING_RATE)
    assert int(state.step) == 4
    for got, want, wrong, before in zip(*map(jax.tree.leaves, (state.params, frozen, refreshed, start)), strict=True):
        moved = np.abs(want - before).max()
        assert np.abs(got - want).max() <= 1e-9 * moved
        assert np.abs(got - wrong).max() > 1e-3 * moved
    # Sampler and policy are compared where they have the same weights: in the first update, before any has been made.
    gap = gap_BL[parts[0].mask_BL > 0]
    np.testing.assert_allclose(metrics["logprob_difference/mean"], gap.mean(), rtol=1e-9)
    np.testing.assert_allclose(metrics["logprob_difference/max"], gap.max(), rtol=1e-9)
    # So are the values of tokens, for both minibatches, each token in its place.
    with jax.enable_x64(True):
        (_, (now_BL, _)), _ = plain_run(problem, "float64")
    for number, values in enumerate(tokens):
        drawn = problem.mask_BL[number] > 0
        assert values is not None
        np.testing.assert_allclose(values.logprob, now_BL[number][drawn], rtol=1e-9)
        np.testing.assert_allclose(values.difference, (problem.rollout_BL - now_BL)[number][drawn], rtol=1e-9)
        assert values.kl is not None
        assert values.kl.min() >= 0
        assert values.kl.max() > 0.01
        assert values.advantage is None
    clipped = np.concatenate([values.clipped for values in tokens])
    assert set(clipped) == {0.0, 1.0}  # the second epoch moves some tokens beyond the clip


def test_old_logprobs_that_no_update_reads_are_not_computed(step_of_halves):
    """Those of the first minibatch in the only epoch; its update gives the same when it has them."""
    state, metrics, ran, _ = step_of_halves(epochs=1)
    assert (ran.count(LOGPROBS), ran.count(ENTROPIES)) == (1 + 2, 2)  # old ones of the second, the reference's of both
    ran = step_of_halves(epochs=2)[2]
    assert (ran.count(LOGPROBS), ran.count(ENTROPIES)) == (2 + 2, 4)
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), step_of_halves(epochs=1, old_of=0)[:2])
    assert step_of_halves(epochs=1, old_of=1)[1]["ratio/max"] != metrics["ratio/max"]


def test_token_means_are_over_the_tokens_of_the_whole_rollout_batch(problem):
    """With weights that stand still the ratio is 1, and the mean of the updates' losses is minus the mean advantage."""
    settings = ("grpo.loss_type=dapo", "grpo.beta=0", "grpo.minibatches=2", "grpo.prompts_per_step=4", "mesh.fsdp=1")
    packed = make_trainer("nnx", "float32", optimizer=optax.sgd(0.0))
    updater = make_updater(load_config(None, settings), packed)
    groups = [problem.train_groups(half) for half in ([0, 1], [2])]
    _, _, metrics = updater.update(packed.fresh_state(), None, groups, EntropyCoefState(0.0, float("inf")))
    expected = -np.average(problem.advantages_B, weights=problem.lengths)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(metrics["ratio/max"] - 1) < 1e-5


@pytest.mark.parametrize(
    ("flavour", "mesh", "rows", "minibatches", "zero", "overrides", "pieces"),
    [
        ("linen", ONE_DEVICE, 1, HALVES, (1, 2), ("grpo.importance_sampling_level=sequence",), (2, 1)),
        ("nnx", (1, 2, 1), 2, ([0, 1, 2],), (0, 1), ("grpo.loss_type=bnpo", "grpo.old_logprobs=sampler"), (2,)),
    ],
)
def test_groups_without_advantage_are_not_computed_and_change_no_loss_and_no_update(
    flavour, mesh, rows, minibatches, zero, overrides, pieces, problem, trainer
):
    """Also where one of two minibatches holds no other, and where positive examples have an NLL term."""
    plan = dataclasses.replace(PLAN, num_rows=rows, num_microbatches=6)
    rows_of_zero = [b for g in zero for b in problem.groups[g]]
    advantages_B = problem.advantages_B.copy()
    advantages_B[rows_of_zero] = 0
    groups = problem._replace(advantages_B=advantages_B).train_groups(range(len(problem.groups)))
    for group in groups:  # some tokens are not the policy's, of groups with an advantage and without
        longest = max(range(len(group.completions)), key=lambda place: len(group.completions[place].token_ids))
        trained = np.arange(len(group.completions[longest].token_ids)) != 1
        group.completions[longest] = dataclasses.replace(group.completions[longest], trained=trained)
    settings = ["grpo.beta=0", "grpo.positive_nll_coef=0.1", f"grpo.minibatches={len(minibatches)}", *overrides]
    settings += ["grpo.prompts_per_step=4", f"mesh.fsdp={mesh[1]}", f"sampling.temperature={TEMPERATURE}"]
    programs, computed, results = {}, [], []

    def stored(name, program):
        compiled = programs.setdefault(name, program.jit())

        def call(*arguments):
            if name == TRAIN_STEP:
                computed.append(int(arguments[1].batch.num_microbatches))
            result = compiled(*arguments)
            assert compiled._cache_size() == 1, "the key changes no program"
            return result

        return call

    with jax.enable_x64(True):
        packed = trainer(flavour, "float64", mesh, plan, optimizer=DESCENT)
        for skips in ("false", "true"):
            computed.clear()
            config = load_config(None, [*settings, f"grpo.skip_zero_advantage={skips}"])
            state, _, metrics = make_updater(config, packed, stored).update(
                packed.fresh_state(),
                None,
                [[groups[g] for g in order] for order in minibatches],
                EntropyCoefState(0.0, float("inf")),
            )
            results.append((jax.device_get(state), metrics, tuple(computed)))
        start = jax.device_get(packed.fresh_state().params)
    (whole, metrics, all_pieces), (skipped, fewer, some_pieces) = results
    assert all_pieces == pieces
    assert some_pieces == (1,) * len(pieces)
    assert int(skipped.step) == int(whole.step) == len(pieces)
    for name in ("loss", "grad_norm", "positive_nll"):
        np.testing.assert_allclose(fewer[name], metrics[name], rtol=1e-11)
    for got, want, before in zip(*map(jax.tree.leaves, (skipped.params, whole.params, start)), strict=True):
        moved = np.abs(want - before).max()
        assert np.abs(got - want).max() <= 1e-11 * moved
    assert fewer["logprob_difference/mean"] > 0, "sampler and trainer are compared in every update"
    sizes = [len(problem.prompts[g]) + sum(problem.lengths[b] for b in problem.groups[g]) for g in range(3)]
    left_out = set(zero) - {2} if len(minibatches) == 2 else set(zero)  # the second minibatch keeps one
    assert fewer["uncomputed_share"] == sum(sizes[g] for g in left_out) / sum(sizes)
    assert "uncomputed_share" not in metrics


@pytest.mark.parametrize(
    ("overrides", "leaves_out"),
    [
        (["grpo.beta=0"], True),
        (["grpo.preset=dapo"], True),
        (["grpo.beta=0", "grpo.positive_nll_coef=0.1", "grpo.off_policy_mask_threshold=0.1"], True),
        (["grpo.beta=0", "grpo.skip_zero_advantage=false"], False),
        (["grpo.beta=0.01"], False),
        (["grpo.preset=reinforce++", "grpo.beta=0.01"], False),
        (["grpo.beta=0", "grpo.entropy_coef=0.01"], False),
        (["grpo.beta=0", "grpo.use_adaptive_entropy=true"], False),
        (["grpo.beta=0", "grpo.top_entropy_quantile=0.2"], False),
        (["grpo.beta=0", "grpo.loss_type=LOSS"], False),
    ],
)
def test_groups_without_advantage_are_computed_where_the_loss_reads_them(overrides, leaves_out, tmp_path):
    (tmp_path / "loss.py").write_text("def term(sequences, config):\n    return -sequences.logprobs_BT, {}\n")
    config = load_config(None, [entry.replace("LOSS", f"{tmp_path / 'loss.py'}:term") for entry in overrides])
    assert leaves_groups_out(config) == leaves_out


def test_with_the_kl_in_the_reward_each_token_has_the_advantage_of_what_follows(problem, trainer):
    """Two minibatches of REINFORCE++, plain gradient descent: where two plain updates lead."""
    settings = ("grpo.preset=reinforce++", "grpo.minibatches=2", "grpo.prompts_per_step=4", f"grpo.beta={BETA}")
    settings += ("mesh.fsdp=1", f"grpo.logprob_chunk={CHUNK_SIZE}", f"sampling.temperature={TEMPERATURE}")
    with jax.enable_x64(True):
        packed = trainer("nnx", "float64", optimizer=DESCENT)
        config = load_config(None, settings)
        other = jax.device_put(noisy_params(packed.policy.config, seed=1), packed.abstract.shardings.params)
        updater = make_updater(config, packed)
        groups = [problem.train_groups(half) for half in HALVES]
        reference = packed.fresh_state()._replace(params=other, opt_state=())
        start = EntropyCoefState(0.0, float("inf"))
        state, _, metrics = updater.update(packed.fresh_state(), reference, groups, start)
        # The plain way. The problem's advantages are the rewards here.
        params = before = noisy_params(packed.policy.config)
        old_BL, reference_BL = (plain_run(problem, "float64", weights)[0][1][0] for weights in (params, other))
        kl_BL = (old_BL - reference_BL) * problem.mask_BL
        returns_BL = problem.advantages_B[:, None] - BETA * np.cumsum(kl_BL[:, ::-1], axis=1)[:, ::-1]
        tokens = returns_BL[problem.mask_BL > 0]
        advantages_BL = (returns_BL - tokens.mean()) / (tokens.std(ddof=1) + 1e-4)
        logprobs = plain_logprobs(packed.policy, problem)

        @jax.jit
        @jax.grad
        def gradient(params, mask_BL):
            ratio_BL = jnp.exp(logprobs(params)[0] - old_BL)
            gain_BL = jnp.minimum(ratio_BL * advantages_BL, jnp.clip(ratio_BL, 0.8, 1.2) * advantages_BL)
            return -jnp.sum(gain_BL * mask_BL) / (len(tokens) / 2)

        for half in HALVES:
            mask_BL = np.zeros_like(problem.mask_BL)
            for rows in (problem.groups[g] for g in half):
                mask_BL[rows] = problem.mask_BL[rows]
            params = jax.tree.map(
                lambda leaf, slope: leaf - LEARNING_RATE * slope, params, jax.device_get(gradient(params, mask_BL))
            )
    for got, want, old in zip(*map(jax.tree.leaves, (jax.device_get(state.params), params, before)), strict=True):
        assert np.abs(got - want).max() <= 1e-9 * np.abs(want - old).max()
    np.testing.assert_allclose(metrics["kl"], kl_BL.sum() / len(tokens), rtol=1e-9)
    assert abs(metrics["kl"]) > 0.01


def test_the_logprobs_of_the_sampler_can_stand_in_for_old_ones(problem):
    """The ratio is then that of policy to sampler from the first update on, and 1 for a token that was not scored."""
    settings = ("grpo.old_logprobs=sampler", "grpo.beta=0", f"sampling.temperature={TEMPERATURE}", "mesh.fsdp=1")
    packed = make_trainer("linen", "float32", optimizer=optax.sgd(0.0))
    updater = make_updater(load_config(None, settings), packed)
    groups = [problem.train_groups(range(len(problem.groups)))]
    _, _, metrics = updater.update(packed.fresh_state(), None, groups, EntropyCoefState(0.0, float("inf")))
    (_, (now_BL, _)), _ = plain_run(problem, "float32")
    ratio_BL = np.exp(np.where(np.isnan(problem.sampler_BL), 0, now_BL - problem.sampler_BL))
    ratios = ratio_BL[problem.mask_BL > 0]
    assert np.isnan(problem.sampler_BL[problem.mask_BL > 0]).sum() == 1
    assert ratios.max() > 1.1
    np.testing.assert_allclose(metrics["ratio/mean"], ratios.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio/max"], ratios.max(), rtol=1e-5)


def plain_updates(policy: Policy, parts: list[Problem], start, reference, learning_rate: float):
    """What two epochs over `parts` lead to.

    Returns:
      Parameters with old log-probs frozen at the start, parameters with fresh ones for each update, and how far the
      first part's log-probs at the start are from those of the sampler.
    """
    gradients = [plain_value_and_gradient(policy, part) for part in parts]
    zeros = [np.zeros_like(part.old_BL) for part in parts]
    logprobs = [
        lambda params, of=gradient, part=part, zeros_BL=zeros_BL: of(params, part.advantages_B, *[zeros_BL] * 4)[0][1]
        for gradient, part, zeros_BL in zip(gradients, parts, zeros, strict=True)
    ]
    ends = []
    for is_frozen in (True, False):
        params = start
        for part, part_logprobs, gradient in [*zip(parts, logprobs, gradients, strict=True)] * 2:
            now_BL, entropy_BL = part_logprobs(params)
            old_BL, reference_BL = part_logprobs(start)[0] if is_frozen else now_BL, part_logprobs(reference)[0]
            _, step = gradient(params, part.advantages_B, old_BL, reference_BL, part.sampler_BL, entropy_BL)
            params = jax.tree.map(lambda leaf, slope: leaf - learning_rate * slope, params, step)
        ends.append(jax.device_get(params))
    return *ends, np.abs(np.asarray(logprobs[0](start)[0]) - parts[0].rollout_BL)
