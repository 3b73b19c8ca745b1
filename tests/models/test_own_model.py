"""A module of the user's own as the policy: whole runs in both flavours, resumption, the contract and its refusals."""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.models.flavours import policy_from_config
from rl.models.foreign.files import check_policy, load_weights
from rl.run.metrics import read_metrics, read_samples
from rl.state.export import write_folder
from rl.state.origin import find_origin, tokenizer_from_config
from rl.tools.checkpoints.export import export
from rl.tools.trained import load_checkpoint, load_start
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS, ROOT

EXAMPLES = {"nnx": ROOT / "examples/own_model/gpt.py", "linen": ROOT / "examples/own_model/ssm.py"}
RECIPE = f"""
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 10, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 8}}
grpo: {{steps: 20, prompts_per_step: 8, group_size: 8, max_tokens_per_microbatch: 1024}}
optimizer: {{lr: 1e-2}}
eval: {{every: 10}}
mesh: {{num_devices: 1}}
checkpoint: {{every: 1000}}
"""


def config_for(folder, flavour, *overrides):
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE)
    settings = [f"output_dir={folder / 'run'}", f"pure_nnx={flavour == 'nnx'}".lower()]
    if not any(override.startswith("model.source=") for override in overrides):
        settings += [f"model.source={EXAMPLES[flavour]}:build", "model.args={hidden_size: 32, num_layers: 1}"]
    return load_config(recipe, [*settings, *overrides])


def policy_for(config):
    origin = find_origin(config, tokenizer_from_config(config))
    return policy_from_config(config, origin.model_config)


def stable_metrics(folder):
    return [steady(line) for line in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_a_run_with_a_module_of_ones_own_learns_and_the_sampler_agrees_with_the_trainer(tmp_path, flavour, capsys):
    metrics = read_metrics(train(config_for(tmp_path, flavour)))
    steps = metrics[1:]
    assert sum(line["reward/digits/mean"] for line in steps[-5:]) / 5 > steps[0]["reward/digits/mean"] + 0.3
    assert max(line["logprob_difference/mean"] for line in steps) <= 1e-6
    assert max(line["logprob_difference/max"] for line in steps) <= 1e-4
    assert [line["step"] for line in metrics if "eval/accuracy" in line] == [0, 10, 20]
    assert all(line["compiles"] == 0 for line in steps[2:])
    said = capsys.readouterr()
    assert "aligned waves" in said.out + said.err
    assert ("one prompt and completion" in said.out + said.err) == (flavour == "linen")


@pytest.mark.slow
@pytest.mark.parametrize("flavour", [pytest.param("nnx", marks=pytest.mark.long), "linen"])
def test_a_resumed_run_equals_the_uninterrupted_one_on_two_devices(tmp_path, flavour):
    overrides = ("checkpoint.every=1", "eval.every=0", "mesh.num_devices=2")
    for name, steps in (("whole", [2]), ("parts", [1, 2])):
        folder = tmp_path / name
        folder.mkdir()
        for count in steps:
            train(config_for(folder, flavour, *overrides, f"grpo.steps={count}"))
    left, right = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert stable_metrics(left) == stable_metrics(right)
    assert read_samples(left) == read_samples(right)
    # The weights of one are those of the other on their way out and in again: what export writes, model.weights reads.
    export(left, tmp_path / "out")
    start = load_start(config_for(tmp_path, flavour, f"model.weights={tmp_path / 'out' / 'model.safetensors'}"))
    resumed = load_checkpoint(config_for(tmp_path, flavour, *overrides), right)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, start.params)


def write_module(folder, text):
    file = folder / f"module_{abs(hash(text))}.py"
    file.write_text("import jax, jax.numpy as jnp\nimport flax.linen as nn\nfrom flax import nnx\n" + text)
    return [f"model.source={file}:build"]


BAG = """
class Bag(nnx.Module):
    def __init__(self, vocab_size, rngs):
        self.embed = nnx.Embed(vocab_size, 8, rngs=rngs)
        {init}
    def __call__(self, {arguments}):
        x = self.embed(tokens)
        return {hidden}
    def unembed(self, hidden):
        return self.embed.attend(hidden)
    {more}
def build(vocab_size, rngs):
    return Bag(vocab_size, rngs)
"""


def bag(folder, arguments="tokens", hidden="jnp.cumsum(x, axis=1)", init="pass", more="pass"):
    return write_module(folder, BAG.format(arguments=arguments, hidden=hidden, init=init, more=more))


def test_an_export_has_the_dtype_that_is_asked_for_and_no_other_format(tmp_path):
    trained = load_start(load_config(None, bag(tmp_path)))
    model, params, tokenizer = trained.origin.model_config, trained.params, trained.tokenizer
    for dtype in (None, "float32", "bfloat16", "float16"):
        write_folder(tmp_path / str(dtype), model, params, tokenizer, dtype)
        file = tmp_path / str(dtype) / "model.safetensors"
        stored = safetensors.numpy.load_file(file)["embed/embedding"]
        assert stored.dtype == (dtype or "float32")
        np.testing.assert_array_equal(stored, params["embed"]["embedding"].astype(stored.dtype))
        again = load_weights(file, model, trained.shardings)
        np.testing.assert_array_equal(again["embed"]["embedding"], stored.astype("float32"), strict=True)
    with pytest.raises(ValueError, match=r"--format must be huggingface, or left out, .*, got 'params'") as refused:
        write_folder(tmp_path / "params", model, params, tokenizer, None, "params")
    assert "--dtype" not in str(refused.value)
    assert not (tmp_path / "params").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": "ids"}, r"have __call__\('tokens', 'positions', 'attention_mask'\), or less, got \('ids',\)"),
        ({"hidden": "x[:, 0]"}, r"return hidden states \[B, T, D\], got \(2, 8\)"),
        ({"hidden": "x.astype(jnp.bfloat16)"}, r"compute in model.dtype \(float32\)"),
        ({"init": "self.drop = nnx.Dropout(0.1, rngs=rngs)"}, r"hold nothing but nnx.Param, got \['drop"),
        ({"more": "def extend(self, tokens, cache): pass"}, "have both init_cache"),
        (
            {"more": "logical_axes = {'*': ('vocab',)}"},
            r"give embed/embedding \[\d+, 8\] as many logical_axes as it has dims, got \('vocab',\)",
        ),
    ],
)
def test_a_module_that_breaks_the_contract_is_refused_with_the_rule(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        policy_for(config_for(tmp_path, "nnx", *bag(tmp_path, **changes)))


def test_a_module_whose_making_exits_is_refused_by_its_name(tmp_path):
    (tmp_path / "leaves.py").write_text("def build(rngs):\n    raise SystemExit(0)\n")
    with pytest.raises(ValueError, match=r"model\.source .*leaves\.py:build must return a module, got SystemExit: 0"):
        policy_for(config_for(tmp_path, "nnx", f"model.source={tmp_path}/leaves.py:build", "model.args={}"))


def test_the_flavour_of_the_module_and_pure_nnx_must_agree(tmp_path):
    for flavour, other in (("nnx", "linen"), ("linen", "nnx")):
        config = config_for(tmp_path, flavour, f"pure_nnx={other == 'nnx'}".lower())
        with pytest.raises(ValueError, match=rf"must return a flax.{other}.Module .*; set pure_nnx="):
            policy_for(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": "x + jnp.sum(x, axis=1, keepdims=True)"}, "must not depend on later tokens"),
        ({"arguments": "tokens, attention_mask"}, "must keep the sequences of a row apart"),
        (
            {
                "more": "def init_cache(self, num_rows, length): return jnp.zeros((num_rows, 8))\n"
                "    def extend(self, tokens, cache): return self(tokens), cache"
            },
            "`extend` must give the hidden states that the whole sequence gives",
        ),
    ],
)
def test_a_module_that_computes_something_else_than_it_promises_is_found_at_the_start(tmp_path, changes, message):
    policy = policy_for(config_for(tmp_path, "nnx", *bag(tmp_path, **changes)))
    with pytest.raises(ValueError, match=message):
        check_policy(policy, policy.init(jax.random.key(0)), "bag.py:build")


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_the_examples_compute_what_they_promise(tmp_path, flavour):
    policy = policy_for(config_for(tmp_path, flavour))
    check_policy(policy, policy.init(jax.random.key(0)), "example")
    assert policy.packs_rows == (flavour == "nnx")
    assert policy.without_adapters() is policy


def test_unknown_arguments_and_settings_of_the_own_decoder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.args must be arguments of .*, got \['width'\]"):
        policy_for(config_for(tmp_path, "nnx", *bag(tmp_path), "model.args={width: 3}"))
    for override in ("lora.rank=4", "sampling.kv_dtype=int8", "model.remat=block"):
        with pytest.raises(ValueError, match=rf"{re.escape(override.split('=')[0])} must be .* own decoder"):
            config_for(tmp_path, "nnx", override)
    with pytest.raises(ValueError, match=r"model.weights belongs to a module of your own"):
        load_config(None, ["model.weights=x.safetensors"])


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"embed/embedding": np.zeros((3, 8), np.float32), "bias": np.zeros(2)}, tmp_path / "w")
    config = config_for(tmp_path, "nnx", *bag(tmp_path), f"model.weights={tmp_path / 'w'}")
    with pytest.raises(ValueError, match=r"unexpected bias; embed/embedding must be \[259, 8\], got \[3, 8\]"):
        train(config)
