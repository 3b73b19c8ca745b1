"""Whole trainers that are compared, behind one interface: one step of each on the same prompts.

A step is what the trainer does with a batch of prompts: completions, rewards, advantages, log-probs of the reference,
and one optimizer update. Where the batch brings completions and rewards along nothing is drawn, and the step is the
update with its reference pass. All hold the same weights, and compute the same loss: the mean over completions of the
mean over tokens of -advantage * ratio + BETA * k3, on-policy, so that none needs a pass for old log-probs. Peers are in
`peer_trainers.py`; what is measured, and how often, in `train_step.py` and `grpo_step.py`.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from shapes import Workload
from weights import Weights, has_library

from rl.algorithms.advantages import compute_advantages
from rl.algorithms.entropy_coef import EntropyCoefState
from rl.algorithms.from_config import loss_config
from rl.config.load import load_config
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import Tokenizer
from rl.models.flavours import policy_from_config
from rl.rollout.groups import judge, minibatches, with_advantages
from rl.rollout.scoring import sample_and_score, start_rewards
from rl.run.metrics import Stopwatch
from rl.sampler.create import sampling_params
from rl.sampler.slot_sampler import Sampler
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn, setup_decode_state, setup_training_state
from rl.training.packing import PackingPlan, TrainCompletion, TrainGroup
from rl.training.shaped_inputs import plan_minibatches
from rl.training.train_step import jit_train_step
from rl.training.update import Updater, train_step_options

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.04, 1e-6, 1.0  # Adam's other numbers are everybody's defaults
PAD_ID = 1  # Tunix learns of padding by this id alone, and embeds it; no prompt holds it, and no EOS id is so small
REWARD_FILE = pathlib.Path(__file__).parent / "reward.py"
LIBRARIES = {"tunix": "tunix", "trl": "trl"}


class Batch(NamedTuple):
    """What one step is about.

    Attributes:
      prompts: token ids, [P] of them.
      completions: token ids of G completions of each prompt in turn; None: to be drawn.
      rewards: of the completions; None: computed by `reward.even_share`.
    """

    prompts: list[list[int]]
    completions: list[list[int]] | None = None
    rewards: list[float] | None = None


class Outcome(NamedTuple):
    """num_tokens: of the completions, up to and including the EOS. grad_norm: before clipping."""

    num_tokens: int
    loss: float
    grad_norm: float


class Trainer(Protocol):
    """One trainer with one model; its batches were given when it was built."""

    name: str

    def step(self) -> Outcome:
        """One step on the next batch."""
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...


class TandemTrainer:
    """The functions of `rl` in the order in which `rl.grpo_trainer` calls them."""

    name = "tandem"

    def __init__(
        self,
        weights: Weights,
        reference: Weights,
        workload: Workload,
        batches: Sequence[Batch],
        settings: Sequence[str] = (),
        plan: PackingPlan | None = None,
    ) -> None:
        """`plan`: the packing; None: that of a run with this workload."""
        self._batches = iter(enumerate(batches))
        self.config = tandem_config(workload, settings)
        config, mesh = self.config, weights.mesh
        self.policy = policy = policy_from_config(config, weights.policy.config, mesh)
        _, optimizer = create_training_optimizer(config, policy)
        init_policy_fn, init_reference_fn = InitStateFn(policy, optimizer, 0), InitStateFn(policy, None, 0)
        # Copies, because the policy's memory is donated to its first update.
        params = jax.tree.map(jnp.copy, weights.params)
        self._state, abstract = setup_training_state(config, mesh, init_policy_fn, params)
        self._reference, _ = setup_decode_state(config, mesh, init_reference_fn, reference.params)
        self.plan = plan_minibatches(config, workload.prompt_lengths[1], policy, mesh) if plan is None else plan
        options, loss = train_step_options(config, self.plan), loss_config(config)
        train_step = jit_train_step(policy, optimizer, loss, abstract.shardings, mesh=mesh, **options)
        self._updater = Updater(train_step, config, policy, self.plan, abstract.shardings, mesh=mesh)
        self._entropy = EntropyCoefState(0.0, 0.0)
        self._stack = contextlib.ExitStack()
        if batches[0].completions is None:
            self._tokenizer = Tokenizer(number_tokenizer(policy.config.vocab_size))
            self._sampling = sampling_params(config, workload.eos_ids(policy.config.vocab_size))
            self._sampler = Sampler(policy, mesh, weights.shardings, rules=config.mesh.rules)
            self._sampler.expect([prompt for batch in batches for prompt in batch.prompts])
            self._sampler.warm_up(self._state.params, workload.num_prompts, workload.num_samples, self._sampling)
            self._sampler.engine.programs.wait()
            self._runner = self._stack.enter_context(start_rewards(config, [], None, mesh))

    def step(self) -> Outcome:
        index, batch = next(self._batches)
        groups = self._draw(index, batch) if batch.completions is None else self._replay(batch)
        self._state, self._entropy, metrics = self._updater.update(
            self._state, self._reference, [groups], self._entropy
        )
        num_tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        return Outcome(num_tokens, metrics["loss"], metrics["grad_norm"])

    def close(self) -> None:
        self._stack.close()

    def _draw(self, index: int, batch: Batch) -> list[TrainGroup]:
        rows = [PromptRow(text_of(ids), np.asarray(ids, np.int32), {}, p) for p, ids in enumerate(batch.prompts)]
        size, key = self.config.grpo.group_size, jax.random.key(index)
        scored = sample_and_score(
            self._sampler,
            self._state.params,
            rows,
            size,
            self._sampling,
            key,
            self._runner,
            self._tokenizer,
            Stopwatch(),
        )
        judged = judge(self.config, rows, scored, self._runner.specs)
        return minibatches(self.config, with_advantages(self.config, judged))[0]

    def _replay(self, batch: Batch) -> list[TrainGroup]:
        assert batch.completions is not None
        section = self.config.grpo
        size = section.group_size
        advantages_B = compute_advantages(
            np.array(batch.rewards)[:, None],
            None,
            size,
            section.scale_rewards,
            section.aggregation,
            section.advantage_estimator,
        ).advantages_B
        completions = [
            TrainCompletion(np.asarray(ids, np.int32), float(advantage))
            for ids, advantage in zip(batch.completions, advantages_B, strict=True)
        ]
        return [
            TrainGroup(np.asarray(ids, np.int32), completions[p * size : (p + 1) * size])
            for p, ids in enumerate(batch.prompts)
        ]


def tandem_config(workload: Workload, settings: Sequence[str] = ()) -> Any:
    """The run configuration that stands for the common loss and optimizer, and the `key=value` settings on top."""
    return load_config(
        None,
        [
            f"grpo.prompts_per_step={workload.num_prompts}",
            f"grpo.group_size={workload.num_samples}",
            f"grpo.beta={BETA}",
            "grpo.use_bias_correction_kl=false",
            f"sampling.max_completion_length={workload.cap}",
            f"optimizer.lr={LEARNING_RATE}",
            f"optimizer.max_grad_norm={MAX_GRAD_NORM}",
            f"rewards.functions=[{{function: '{REWARD_FILE}:even_share'}}]",
            *settings,
        ],
    )


def text_of(token_ids: Sequence[int]) -> str:
    """Token ids as text for trainers that take nothing else: numbers with spaces in between."""
    return " ".join(map(str, token_ids))


def number_tokenizer(vocab_size: int) -> Any:
    """A Hugging Face tokenizer of that text. Its EOS is outside the vocabulary: a model cannot draw it."""
    import tokenizers
    import transformers

    # A special word that is part of a number would be cut out of it.
    words = {"<pad>" if i == PAD_ID else str(i): i for i in range(vocab_size)} | {"<eos>": vocab_size}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def is_installed(name: str) -> bool:
    """Whether the library behind a trainer can be imported."""
    return name not in LIBRARIES or has_library(LIBRARIES[name])


def make_batches(workload: Workload, vocab_size: int, count: int, with_completions: bool) -> list[Batch]:
    """`count` different batches; rewards are 0 to 100, so that nobody's epsilon beside a standard deviation counts."""
    batches = []
    for seed in range(count):
        prompts = _without_padding(workload.prompts(vocab_size, seed))
        rewards = np.random.default_rng((seed, 2)).uniform(0, 100, workload.num_rows).tolist()
        completions = _without_padding(workload.completions(vocab_size, seed))
        batches.append(Batch(prompts, completions, rewards) if with_completions else Batch(prompts))
    return batches


def check_same_outcome(outcomes: dict[str, Outcome], tolerance: float) -> None:
    """Refuses to compare trainers that do not compute the same update.

    Args:
      outcomes: by trainer, of the same batch from the same weights.
      tolerance: largest difference of loss and gradient norm, as a share of the first trainer's.

    Raises:
      ValueError: a trainer's differ by more.
    """
    (first, expected), *others = outcomes.items()
    for name, outcome in others:
        for field in ("loss", "grad_norm"):
            want, got = getattr(expected, field), getattr(outcome, field)
            if not abs(got - want) <= tolerance * abs(want):  # NaN too
                raise ValueError(
                    f"{field} of {name} must be within {tolerance} of {first}'s {want:.6g}, got {got:.6g}; leave the "
                    "trainer out with --engines until it computes the same"
                )


def _without_padding(sequences: list[list[int]]) -> list[list[int]]:
    return [[PAD_ID + 1 if token == PAD_ID else token for token in sequence] for sequence in sequences]
