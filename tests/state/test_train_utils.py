"""What a training run is made of fits together: optimizer, mesh, states, checkpoints and the compiled update, from one
configuration and one `init_state_fn`, on eight devices; the other flavour goes on with it.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rl.algorithms.from_config import loss_config
from rl.config.load import load_config
from rl.devices import hosts
from rl.devices.mesh import create_mesh, replicated
from rl.models.flavours import policy_from_config
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.optimizer import create_training_optimizer, updates_per_step
from rl.state.states import InitStateFn, get_abstract_state, get_first_step, setup_training_state
from rl.training.packing import TrainCompletion, TrainGroup, pack, plan_packing
from rl.training.train_step import Minibatch, batch_shardings, jit_train_step
from tests.helpers.tiny_models import VOCAB, tiny_config

EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
LOOP = {"step": 1}


class Run:
    """The parts of a run in the order in which `rl.grpo_trainer` makes them."""

    def __init__(self, flavour, folder, *overrides):
        settings = ["optimizer.lr=1e-2", "grpo.minibatches=2", "grpo.beta=0", *(overrides or EIGHT)]
        pure_nnx = f"pure_nnx={str(flavour == 'nnx').lower()}"
        self.config = load_config(None, [f"output_dir={folder}", pure_nnx, *settings])
        self.mesh = create_mesh(self.config.mesh)
        self.policy = policy_from_config(self.config, tiny_config(num_layers=1))
        self.schedule, self.optimizer = create_training_optimizer(self.config, self.policy)
        self.init_state_fn = InitStateFn(self.policy, self.optimizer, 0)
        self.checkpoints = create_checkpoint_manager(self.config, self.mesh, self.init_state_fn)

    def start(self):
        return setup_training_state(self.config, self.mesh, self.init_state_fn)

    def train_step(self):
        return jit_train_step(
            self.policy,
            self.optimizer,
            loss_config(self.config),
            self.checkpoints.abstract.shardings,
            mesh=self.mesh,
            rules=self.config.mesh.rules,
            temperature=1.0,
            chunk_size=16,
            minibatches_per_rollout=2,
        )

    def minibatch(self, seed):
        """Ragged groups, some advantages of either sign."""
        rng = np.random.default_rng(seed)

        def completion():
            size = int(rng.integers(2, 6))
            logprobs = -rng.uniform(1, 5, size).astype(np.float32)
            return TrainCompletion(
                rng.integers(1, VOCAB, size).astype(np.int32), float(rng.normal()), logprobs, logprobs
            )

        prompts = [rng.integers(1, VOCAB, int(rng.integers(1, 5))).astype(np.int32) for _ in range(3)]
        groups = [TrainGroup(prompt, [completion() for _ in range(3)]) for prompt in prompts]
        plan = plan_packing(
            num_groups=3,
            group_size=3,
            max_prompt_length=4,
            max_completion_length=5,
            max_tokens_per_microbatch=128,
            num_row_shards=4,
            preferred_row_length=16,
        )
        batch = hosts.put(pack(groups, plan), batch_shardings(self.mesh, self.config.mesh.rules))
        scalars = hosts.put((np.int32(40), np.float32(0), np.bool_(True)), replicated(self.mesh))
        return Minibatch(batch, scalars[0], scalars[1], on_policy=scalars[2])


class Trained(NamedTuple):
    """A run of three updates, of which the first was saved: what it was before, between and after."""

    run: Run
    abstract: Any
    start: Any
    steps: list[int]
    is_donated: list[bool]
    shardings: list[Any]
    end: Any
    num_programs: int


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = Run("nnx", tmp_path_factory.mktemp("nnx"))
    state, abstract = run.start()
    start, train_step = host(state.params), run.train_step()
    steps, is_donated, shardings = [get_first_step(run.policy, state, 2)], [], []
    for number in range(1, 4):
        before = state
        state, update = train_step(state, run.minibatch(number))
        assert bool(update.is_applied)
        is_donated.append(all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state))))
        shardings.append(jax.tree.map(lambda leaf: leaf.sharding, state))
        steps.append(get_first_step(run.policy, state, updates_per_step(run.config)))
        if number == 2:
            run.checkpoints.save(1, state, LOOP)
            run.checkpoints.wait()
    run.checkpoints.close()
    return Trained(
        run, abstract, start, steps, is_donated, shardings, host((state.params, update.loss)), train_step._cache_size()
    )


def test_every_part_has_the_same_shapes_and_shardings(trained):
    run, abstract = trained.run, trained.abstract
    assert abstract == run.checkpoints.abstract == get_abstract_state(run.config, run.mesh, run.init_state_fn)
    assert trained.shardings == [abstract.shardings] * 3
    reference = get_abstract_state(run.config, run.mesh, InitStateFn(run.policy, None, 0))
    assert reference.shardings.params == abstract.shardings.params
    assert reference.shapes.opt_state == ()
    moved = [
        not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (trained.start, trained.end[0])), strict=True)
    ]
    assert all(moved)
    assert float(run.schedule(0)) == pytest.approx(1e-2)


def test_updates_count_steps_donate_the_state_and_compile_once(trained):
    assert trained.steps == [0, 0, 1, 1]
    assert trained.is_donated == [True] * 3
    assert trained.num_programs == 1


def test_a_saved_run_goes_on_in_the_other_flavour_on_another_mesh(trained):
    overrides = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=1", "mesh.num_devices=4")
    other = Run("linen", trained.run.config.output_dir, *overrides)
    restored, loop = other.checkpoints.restore()
    assert loop == LOOP
    assert get_first_step(other.policy, restored, updates_per_step(other.config)) == 1
    restored, update = other.train_step()(restored, other.minibatch(3))
    got = host((restored.params, update.loss))
    for left, right in zip(jax.tree.leaves(trained.end), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-5)
    other.checkpoints.close()
