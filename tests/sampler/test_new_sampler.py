"""A sampler of the user's own is one function in a file: here one that has a process draw. Nothing else is changed."""

import json
import math
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.inputs import Inputs
from rl.run.metrics import read_metrics
from rl.sampler.contract import Request
from rl.sampler.token_draw import SamplingParams
from rl.sampler.user_source import CheckedSource, Drawn, request_seeds
from rl.state.checkpoint_files import read_array, stored_arrays
from rl.state.origin import find_origin, tokenizer_from_config
from rl.tools.programs.compile import compile_config
from rl.tools.samples.sample import output_settings
from rl.tools.trained import load_start
from tests.helpers.places import REWARDS
from tests.helpers.tiny_models import tiny_config

EOS = 2  # of the byte tokenizer, whose byte b is token 3 + b
TABLE = {3 + ord("1"): 0.4, 3 + ord("x"): 0.3, 3 + ord("7"): 0.2, EOS: 0.1}

# Draws tokens from a fixed table, and does not know the log-prob of every third one.
SERVER = """
import json, math, random, sys
table = {int(token): share for token, share in json.loads(sys.argv[1]).items()}
for line in sys.stdin:
    asked = json.loads(line)
    numbers, drawn = random.Random(asked["seed"]), []
    while len(drawn) < asked["limit"] and (not drawn or drawn[-1][0] != int(sys.argv[2])):
        if asked["greedy"]:
            drawn.append((max(table, key=table.get), 0.0))
        else:
            (token,) = numbers.choices(list(table), list(table.values()))
            drawn.append((token, None if len(drawn) % 3 == 1 else math.log(table[token])))
    print(json.dumps(drawn), flush=True)
"""


class Server:
    """A process that draws; the log says when it would have been sent weights."""

    def __init__(self, log):
        command = [sys.executable, "-c", SERVER, json.dumps(TABLE), str(EOS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.log, self.has_weights = log, False
        self.say(f"process {self.process.pid}")

    def say(self, line):
        with open(self.log, "a") as file:
            file.write(line + "\n")

    def stream(self, params, prompts, requests, sampling, key):
        if not self.has_weights:
            self.say(f"weights {sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(params))}")
            self.has_weights = True
        for place, (request, seed) in enumerate(zip(requests, request_seeds(key, requests), strict=True)):
            asked = {"seed": seed, "limit": request.limit, "greedy": sampling.greedy}
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            tokens, logprobs = zip(*json.loads(self.process.stdout.readline()), strict=True)
            yield place, Drawn(tokens, logprobs, "eos" if tokens[-1] == EOS else "length")

    def release(self):
        self.has_weights = False

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def make_server(config, tokenizer, *, log):
    return Server(log)


RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 2, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 6}}
grpo:
  {{prompts_per_step: 2, group_size: 4, beta: 0, max_tokens_per_microbatch: 64, loss_type: dapo,
  sampler_is_correction: true}}
optimizer: {{name: sgd, lr: 0.5, max_grad_norm: 0}}
eval: {{every: 1}}
checkpoint: {{every: 1, keep: 5}}
logging: {{samples_per_step: 8}}
mesh: {{num_devices: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_sampler")
    shutil.copy(__file__, folder / "server.py")
    (folder / "recipe.yml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    def read(run, *overrides):
        source = f"sampling.source={folder}/server.py:make_server", f"sampling.source_args={{log: {folder / run}.log}}"
        return load_config(folder / "recipe.yml", [f"output_dir={folder / run}", *source, *overrides])

    return read


@pytest.fixture(scope="module")
def whole(recipe):
    return train(recipe("whole", "grpo.steps=2"))


def params_of(run, step):
    """By the path of each array."""
    arrays = stored_arrays(run / "checkpoints" / str(step) / "state")
    return {array.path[1:]: read_array(array) for array in arrays if array.path[0] == "params"}


def by_path(params):
    return {tuple(key.key for key in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(np.abs(left[path] - right[path]).max() for path in left)


@pytest.fixture(scope="module")
def updated_by_hand(recipe):
    """The weights before the first step, and a function that gives those after it from its completions alone."""
    start, encode = load_start(recipe("by_hand")), load_tokenizer("byte", None).encode

    def objective(params, tokens_BT, known_BT, advantages_BT, is_corrected):
        labels_BT = jnp.zeros_like(tokens_BT)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD = start.policy.hidden(params, Inputs(tokens_BT, positions_BT, labels_BT, labels_BT))
        logprobs_BTV = jax.nn.log_softmax(start.policy.unembed(params, hidden_BTD[:, :-1]))
        logprobs_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=2)[..., 0]
        ratio_BT = jnp.where(jnp.isnan(known_BT[:, 1:]), 1, jnp.exp(logprobs_BT - known_BT[:, 1:]))
        weights_BT = jax.lax.stop_gradient(jnp.where(is_corrected, jnp.minimum(ratio_BT, 3.0), 1.0))
        return jnp.sum(weights_BT * advantages_BT[:, 1:] * logprobs_BT)

    gradient = jax.jit(jax.grad(objective))

    def updated(run, is_corrected):
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        samples = [sample for sample in samples if sample["step"] == 1]
        tokens_BT = np.zeros((8, 14), np.int32)
        known_BT, advantages_BT = np.full(tokens_BT.shape, np.nan, np.float32), np.zeros(tokens_BT.shape, np.float32)
        for b, sample in enumerate(samples):
            prompt = encode(sample["prompt"])
            row = [*prompt, *sample["token_ids"]]
            tokens_BT[b, : len(row)] = row
            advantages_BT[b, len(prompt) : len(row)] = sample["advantage"]
            for number, token in enumerate(sample["token_ids"]):
                known_BT[b, len(prompt) + number] = math.nan if number % 3 == 1 else math.log(TABLE[token])
        slopes = gradient(start.params, tokens_BT, known_BT, advantages_BT, is_corrected)
        num_tokens, slopes = sum(sample["num_tokens"] for sample in samples), by_path(slopes)
        return {path: x + 0.5 * slopes[path] / num_tokens for path, x in by_path(start.params).items()}

    return by_path(start.params), updated


def test_a_run_trains_with_a_source_of_the_users_corrected_by_its_log_probs(recipe, whole, updated_by_hand):
    start, updated = updated_by_hand
    plain = train(recipe("plain", "grpo.steps=1", "grpo.sampler_is_correction=false", "eval.every=0"))
    found = [params_of(run, 1) for run in (whole, plain)]
    assert largest_difference(found[0], updated(whole, True)) < 1e-6
    assert largest_difference(found[1], updated(plain, False)) < 1e-6
    assert largest_difference(found[0], start) > 1e-4
    assert largest_difference(*found) > 1e-3
    lines = read_metrics(whole)
    lengths = [sample["num_tokens"] for sample in map(json.loads, (whole / "samples.jsonl").read_text().splitlines())]
    unscored = [sum(len(range(1, length, 3)) for length in lengths[first : first + 8]) for first in (0, 8)]
    assert [line["unscored_tokens"] for line in lines[1:]] == unscored
    assert all(line["logprob_difference/mean"] is None for line in lines[1:]), "nobody has the policy's own log-probs"
    assert lines[1]["sampler_ratio/min"] < 0.1, "the policy finds these tokens far less likely than the table does"
    assert [line["eval/truncated_share"] for line in lines] == [1.0, 1.0, 1.0]  # greedy: the same token until the limit


def test_a_resumed_run_draws_and_trains_as_an_uninterrupted_one_in_either_flavour(recipe, whole):
    resumed = train(recipe("resumed", "grpo.steps=1", "pure_nnx=false"))
    train(recipe("resumed", "grpo.steps=2"))
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert largest_difference(params_of(whole, 2), params_of(resumed, 2)) == 0


def test_a_source_is_told_when_weights_change_and_ended_with_the_run(folder, whole):
    lines = [line.split() for line in (folder / "whole.log").read_text().splitlines()]
    assert [line[0] for line in lines] == ["process", "weights", "weights", "weights"]  # the start, and after each step
    assert len({line[1] for line in lines[1:]}) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines[0][1]), 0)


def test_another_content_of_the_file_is_another_run(folder, recipe, whole):
    text = (folder / "server.py").read_text()
    try:
        (folder / "server.py").write_text(text + "\n")
        with pytest.raises(ValueError, match=r"file of sampling\.source"):
            train(recipe("whole", "grpo.steps=3"))
    finally:
        (folder / "server.py").write_text(text)
    with pytest.raises(ValueError, match=r"sampling\.source_args"):
        train(recipe("whole", "grpo.steps=3", f"sampling.source_args={{log: {folder / 'other.log'}}}"))


def test_a_file_of_completions_belongs_to_the_source_that_drew_them(recipe):
    def settings(*overrides):
        config = recipe("sampled", *overrides)
        tokenizer = tokenizer_from_config(config)
        drawn = types.SimpleNamespace(config=config, run=None), find_origin(config, tokenizer)
        return output_settings(*drawn, [], SamplingParams(6), 0, False)

    one, other = settings(), settings("sampling.source_args={log: other.log}")
    assert {name for name, value in one.items() if other[name] != value} == {"sampling.source_args"}
    assert len(one["file of sampling.source"]) == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.source=server"], r"sampling\.source must be path/to/file\.py:make_source or null, got 'server'"),
        (["sampling.source=null"], r"sampling\.source_args must be \{\} without sampling\.source"),
        (["sampling.slots=4"], r"sampling\.slots must be null with sampling\.source"),
        (["sampling.warm_up=true"], r"sampling\.warm_up must be false with sampling\.source"),
        (["sampling.kv_dtype=int8"], r"sampling\.kv_dtype must be null with sampling\.source"),
        (["sampling.weight_dtype=int8"], r"sampling\.weight_dtype must be null with sampling\.source"),
        (["mesh.rollout_rules={embed: []}"], r"mesh\.rollout_rules must be \{\} with sampling\.source"),
        (["grpo.policy_distribution=sampled"], r"grpo\.policy_distribution must be \"full\" with sampling\.source"),
        (["compiled_file=programs"], r"compiled_file must be null with sampling\.source"),
    ],
)
def test_settings_of_the_own_sampler_are_refused_by_name(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe("refused", *overrides)


def test_programs_of_a_run_with_a_source_are_not_saved(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"--save must go without sampling\.source"):
        compile_config(recipe("refused"), save=str(tmp_path / "programs"))


# What a source gives


class Fixed:
    """Gives what it is told to."""

    def __init__(self, given):
        self.given = given

    def stream(self, params, prompts, requests, sampling, key):
        return iter(self.given)

    def release(self):
        pass

    close = release


def make_fixed(config, tokenizer, *, tokens, logprobs, finish_reason="length", places=(0,)):
    return Fixed([(place, Drawn(tokens, logprobs, finish_reason)) for place in places])


def make_nothing(config, tokenizer):
    return Fixed([Drawn([5], [0.0], "length")])


class Broken:
    def __init__(self, when):
        self.fail_if(when == "made")
        self.when = when

    def stream(self, params, prompts, requests, sampling, key):
        self.fail_if(self.when == "asked")
        return self.draw()

    def draw(self):
        yield 0, Drawn([5], [0.0], "length")
        self.fail_if(True)

    def fail_if(self, is_time):
        if is_time:
            raise OSError("no server")

    release = close = draw


def make_broken(config, tokenizer, when):
    return Broken(when)


def make_leaving(config, tokenizer):
    raise SystemExit(0)


def make_half(config, tokenizer):
    return object()


def draw(name, arguments=None):
    config = load_config(None, [f"sampling.source={__file__}:{name}", f"sampling.source_args={arguments or '{}'}"])
    source = CheckedSource(config, load_tokenizer("byte", None), tiny_config())
    sampling = SamplingParams(max_completion_length=4, eos_ids=(EOS,))
    return list(source.stream(None, [[5]], [Request(0, 7, 1, 3)], sampling, jax.random.key(0)))


def test_what_a_source_gives_becomes_a_completion():
    ((place, completion),) = draw("make_fixed", "{tokens: [5, 6, 2], logprobs: [-1, null, 0.0], finish_reason: eos}")
    assert (place, completion.prompt_index, completion.sample_index) == (0, 7, 1)
    assert completion.token_ids.tolist() == [5, 6, 2]
    np.testing.assert_array_equal(completion.sampler_logprobs, [-1, np.nan, 0])
    assert (completion.finish_reason, completion.stop_reason) == ("eos", EOS)
    assert completion.policy_logprobs is None
    assert completion.top_ids.shape == completion.top_logprobs.shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tokens: [], logprobs: []", r"token_ids must be 1 to 3 tokens \(request\.limit\), got 0"),
        ("tokens: [5, 6, 7, 8], logprobs: [0, 0, 0, 0]", r"must be 1 to 3 tokens.*got 4 for the request at place 0"),
        ("tokens: [0.5], logprobs: [0]", r"token_ids must be a sequence of token ids, got \[0\.5\]"),
        ("tokens: [5, -1], logprobs: [0, 0]", r"token ids must be in \[0, \d+\), the model's vocabulary, got -1"),
        ("tokens: [99999], logprobs: [0]", r"token ids must be in .* got 99999"),
        ("tokens: [5, 6], logprobs: [0]", r"logprobs must have one entry for each of 2 tokens, got 1"),
        ("tokens: [[5], [6, 7]], logprobs: [0]", r"token_ids must be a sequence of token ids, got"),
        ("tokens: [5], logprobs: null", r"logprobs must have one entry for each token, or None in its place, got None"),
        ("tokens: [5], logprobs: [0], places: [0.0]", r"each of 1 requests once, .* got place 0\.0"),
        ("tokens: [5], logprobs: [0.1]", r"logprobs must be finite and <= 0, or None .*, got 0\.1"),
        ("tokens: [5], logprobs: [low]", r"logprobs must be finite and <= 0, or None .*, got 'low'"),
        ("tokens: [5], logprobs: [true]", r"logprobs must be finite and <= 0, or None .*, got True"),
        ("tokens: [5], logprobs: [0], finish_reason: done", r"must be one of \['eos', 'stop', 'length'\], got 'done'"),
        ("tokens: [5], logprobs: [0], finish_reason: stop", r"'eos' or 'length' without sampling\.stop_strings, got"),
        ("tokens: [5], logprobs: [0], finish_reason: eos", r"EOS token .* must come last, and that where .* \[5\] at"),
        ("tokens: [5, 2], logprobs: [0, 0]", r"an EOS token .* got \[5, 2\] at the end, with 'length'"),
        ("tokens: [2, 5], logprobs: [0, 0]", r"an EOS token .* got \[2, 5\] at the end, with 'length'"),
        ("tokens: [5], logprobs: [0], places: [0, 0]", r"each of 1 requests once, .* got place 0 again"),
        ("tokens: [5], logprobs: [0], places: [1]", r"each of 1 requests once, .* got place 1$"),
        ("tokens: [5], logprobs: [0], places: []", r"got nothing for 1 of them, the first at place 0"),
    ],
)
def test_a_completion_that_breaks_the_contract_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw("make_fixed", "{" + arguments + "}")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("make_nothing", None, r"stream must give \(place in requests, .*Drawn\), got a Drawn"),
        ("make_half", None, r"must return an object with the methods stream, release and close, got a object without"),
        ("make_nothing", "{speed: 1}", r"must take \(config, tokenizer\) and the arguments .* got \['speed'\]"),
        ("make_nobody", None, r"has no attribute 'make_nobody'"),
        (
            "make_broken",
            "{when: made}",
            r"must not raise, got OSError: no server \(.*test_new_sampler.py:\d+\).* nothing",
        ),
        ("make_leaving", None, r"must not raise, got SystemExit: 0 \(.*test_new_sampler.py:\d+\).* nothing"),
        ("make_broken", "{when: asked}", r": stream must not raise, got OSError: no server .* newest checkpoint"),
        ("make_broken", "{when: drawing}", r": stream must not raise, got OSError: no server .* newest checkpoint"),
    ],
)
def test_a_source_that_is_none_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(name, arguments)
