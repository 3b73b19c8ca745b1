"""Supervised fine-tuning: the loss it computes, that it learns, resumes, and leaves a policy that GRPO starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import grpo_trainer, sft_trainer
from rl.config.load import load_config
from rl.data.order import Order
from rl.data.prompts import load_pairs
from rl.models.flavours import policy_from_config
from rl.models.inputs import plain_inputs
from rl.run.metrics import read_metrics
from rl.state.origin import find_origin, tokenizer_from_config
from rl.state.states import InitStateFn
from rl.tools.trained import load_checkpoint

RECIPE = """
model:
  arch:
    {family: llama, hidden_size: 32, intermediate_size: 64, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 16}
data: {source: arithmetic, args: {operation: add, digits: 1}, eval_size: 20, max_prompt_length: 8}
rewards:
  functions: [{function: "rewards.number:exact_number_strict", name: exact}]
sampling: {max_completion_length: 4}
sft: {steps: 40, batch_size: 16, max_completion_length: 4}
grpo: {steps: 1, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}
optimizer: {lr: 1e-2}
checkpoint: {every: 20}
mesh: {num_devices: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "recipe.yml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe):
    return sft_trainer.train(load_config(recipe, [f"output_dir={recipe.parent / 'run'}"]))


def test_first_loss_is_the_token_mean_of_the_negative_log_likelihood(recipe, run):
    config = load_config(recipe)
    tokenizer = tokenizer_from_config(config)
    policy = policy_from_config(config, find_origin(config, tokenizer).model_config)
    params = InitStateFn(policy, None, config.seed)().pure().params
    rows = load_pairs(config, tokenizer).rows
    total, count = 0.0, 0
    for index in Order([len(rows)], config.seed, config.sft.batch_size).step(0):
        prompt, completion = rows[index].prompt_ids, rows[index].completion_ids
        ids = jnp.asarray(np.concatenate([prompt, completion]))[None]
        hidden = policy.hidden(params, plain_inputs(ids))
        logprobs = jax.nn.log_softmax(policy.unembed(params, hidden))[0]
        total -= float(sum(logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(completion)))
        count += len(completion)
    assert read_metrics(run)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_loss_falls(run):
    losses = [line["loss"] for line in read_metrics(run)]
    assert losses[-1] < 0.5 * losses[0]


def test_exported_policy_has_the_weights_of_the_last_checkpoint_and_grpo_starts_from_it(recipe, run):
    trained = load_checkpoint(load_config(run / "config.yml"), run)
    overrides = [f"output_dir={recipe.parent / 'grpo'}", f"model.source={run / 'export'}", "eval.every=0"]
    config = load_config(recipe, overrides)
    started = grpo_trainer.train(config)
    assert read_metrics(started)[0]["step"] == 1
    from rl.tools.trained import load_start

    for left, right in zip(jax.tree.leaves(trained.params), jax.tree.leaves(load_start(config).params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_resumed_run_equals_the_uninterrupted_one_in_the_other_flavour(recipe, run):
    folder = recipe.parent / "halves"
    sft_trainer.train(load_config(recipe, [f"output_dir={folder}", "sft.steps=20", "pure_nnx=false"]))
    sft_trainer.train(load_config(recipe, [f"output_dir={folder}"]))
    assert [line["loss"] for line in read_metrics(folder)] == [line["loss"] for line in read_metrics(run)]


def test_grpo_refuses_the_folder_of_a_supervised_run(recipe, run):
    with pytest.raises(ValueError, match="holds a run of kind 'sft', this is 'grpo'"):
        grpo_trainer.train(load_config(recipe, [f"output_dir={run}"]))


def test_compiled_programs_of_grpo_are_refused(recipe):
    config = load_config(recipe, [f"output_dir={recipe.parent / 'none'}", "compiled_file=programs.bin"])
    with pytest.raises(ValueError, match=r"compiled_file must be null in grpo sft, .*got 'programs.bin'; leave it out"):
        sft_trainer.train(config)
    assert not (recipe.parent / "none").exists()
