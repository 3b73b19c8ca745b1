"""Held-out evaluation: what is counted, and how."""

import io
import json
import re
import shutil

import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.data.prompts import load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.files.hf_config import read_config
from rl.rollout.eval_statistics import wilson_interval
from rl.run.announce import warn_about_prompts, warn_about_sampling
from rl.run.console import Console
from rl.run.metrics import read_metrics, read_samples
from rl.sampler.create import eos_ids, sampling_params, stop_text
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from rl.state.origin import Origin, tokenizer_from_config
from rl.tools.evaluate import evaluate_source
from tests.helpers.metric_lines import without_entry
from tests.helpers.places import FILES, REWARDS

MODELS = FILES / "models"
RECIPE = f"""
model:
  arch:
    {{family: qwen2, hidden_size: 16, intermediate_size: 32, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 13, max_prompt_length: 8}}
rewards:
  functions:
    - {{function: "{REWARDS}:digit_share", name: digits}}
    - {{function: "{REWARDS}:always_right", name: right, weight: 0.0}}
    - {{function: "{REWARDS}:right_for_even_answers", name: even, weight: 0.0}}
    - {{function: "{REWARDS}:tells_the_moment", name: told, weight: 0.0}}
sampling: {{max_completion_length: 4, slots: 8}}
grpo: {{steps: 2, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}}
eval: {{every: 1}}
checkpoint: {{every: 1}}
mesh: {{num_devices: 1}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run, and each call of a sampler in it: the sampler, and the number of requests."""
    folder, calls, stream = tmp_path_factory.mktemp("evaluation"), [], Sampler.stream
    (folder / "recipe.yml").write_text(RECIPE)

    def recorded(self, params, prompts, requests, *arguments):
        calls.append((self, len(requests)))
        return stream(self, params, prompts, requests, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "stream", recorded)
        return train(load_config(folder / "recipe.yml", [f"output_dir={folder / 'run'}"])), calls


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


@pytest.fixture(scope="module")
def evaluated(run):
    """The run evaluated as its recipe says."""
    return evaluate_source(run)


def test_rollouts_and_evaluation_have_one_sampler(trained):
    samplers, sizes = zip(*trained[1], strict=True)
    assert sizes == (13, 4, 13, 4, 13), "evaluation before the first step, and after each rollout and update"
    assert len(set(samplers)) == 1


def test_checkpoint_keeps_how_the_reward_functions_are_called(run):
    loop = json.loads((run / "checkpoints" / "2" / "loop" / "metadata").read_text())
    assert loop["reward_calls"] == dict.fromkeys(("digits", "right", "even", "told"), "elementwise")


def test_functions_know_the_moment_and_what_they_log_is_in_metrics_and_samples(run):
    lines = read_metrics(run)
    assert not any(map(without_entry, lines))

    def told(line, place):
        return [line[f"{place}reward/told/{name}"] for name in ("global_step", "max_steps", "epoch")]

    num_rows = 100 - 13
    assert [told(line, "") for line in lines[1:]] == [[0, 2, 0], [1, 2, pytest.approx(2 / num_rows)]]
    assert [told(line, "eval/") for line in lines] == [[n, 2, pytest.approx(2 * n / num_rows)] for n in range(3)]
    samples = read_samples(run)
    assert [sample["logged"] for sample in samples] == [{"told": {"said": s["completion"]}} for s in samples]
    after, _ = evaluate_source(run)
    assert (after.logged["reward/told/global_step"], after.samples[0]["logged"].keys()) == (2, {"told"})
    # One name for one field, in both files: the gold answer beside the completion, and the weighted sum of rewards.
    for sample in (*samples, *after.samples):
        assert int(sample["answer"]) == eval(sample["prompt"].rstrip("="))
        assert sample["reward"] == pytest.approx(sample["rewards"]["digits"])
        assert sample["num_tokens"] == len(sample["token_ids"])
        assert {"prompt_index", "sample_index", "completion", "finish_reason"} <= sample.keys()


def test_every_held_out_prompt_counts_once_though_there_are_fewer_slots(evaluated):
    result, where = evaluated
    assert where == "step 2"
    assert result.num_prompts == result.num_judged == len({sample["prompt"] for sample in result.samples}) == 13


def test_accuracy_is_the_share_of_the_function_that_counts(run):
    even, _ = evaluate_source(run, ["eval.reward=even"])
    expected = sum(eval(sample["prompt"].rstrip("=")) % 2 == 0 for sample in even.samples)
    assert even.accuracy == pytest.approx(expected / 13)
    assert 0 < expected < 13
    assert even.interval == wilson_interval(expected, 13)


def test_an_evaluation_of_a_mixture_has_the_numbers_of_each_source(run, evaluated, capsys):
    assert evaluated[0].sources == {}
    entry = "{{source: arithmetic, name: {0}, args: {{operation: {0}, digits: 1}}, eval_size: {1}}}"
    mixture = [
        f"data.sources=[{entry.format('add', 5)}, {entry.format('subtract', 20)}]",
        *("data.source=null", "data.args={operation: null, digits: null}", "data.eval_size=0"),
    ]
    main(["eval", str(run), *mixture, "eval.reward=even", "eval.max_prompts=11"])
    told = capsys.readouterr()
    assert "source subtract: accuracy " in told.out
    header = told.err[told.err.index("grpo eval\n") :]
    assert re.findall(r"^  (\w[\w ]*?)  ", header, re.MULTILINE) == [
        "run folder",
        "model",
        "policy",
        "devices",
        "prompts",
    ]
    result, _ = evaluate_source(run, [*mixture, "eval.reward=even", "eval.max_prompts=11"])
    assert {name: own.num_prompts for name, own in result.sources.items()} == {"add": 5, "subtract": 6}  # by turns
    metrics = result.metrics()
    for name, sign in (("add", "+"), ("subtract", "-")):
        own = [sample for sample in result.samples if sign in sample["prompt"]]
        right = sum(eval(sample["prompt"].rstrip("=")) % 2 == 0 for sample in own)
        assert metrics[f"eval/{name}/accuracy"] == metrics[f"eval/{name}/reward/even/mean"] == right / len(own)
        assert (metrics[f"eval/{name}/accuracy_low"], metrics[f"eval/{name}/accuracy_high"]) == wilson_interval(
            right, len(own)
        )
        assert metrics[f"eval/{name}/reward/digits/mean"] == pytest.approx(
            sum(sample["rewards"]["digits"] for sample in own) / len(own)
        )
    counts = [metrics[f"eval/{name}/accuracy"] * metrics[f"eval/{name}/prompts"] for name in ("add", "subtract")]
    assert metrics["eval/accuracy"] == pytest.approx(sum(counts) / 11)
    alone, _ = evaluate_source(run, [mixture[0].replace("eval_size: 5", "eval_size: 0"), *mixture[1:]])
    assert (alone.num_prompts, alone.sources) == (20, {})


def test_function_that_compares_completions_is_left_out_by_name_and_is_no_accuracy(run, capsys):
    functions = [
        {"function": f"{REWARDS}:best_of_group", "name": "best", "weight": 1.0},
        {"function": f"{REWARDS}:right_for_even_answers", "name": "even", "weight": 0.0},
    ]
    output = run.parent / "left_out.jsonl"
    main(["eval", str(run), f"rewards.functions={json.dumps(functions)}", "--output", str(output)])
    told = capsys.readouterr().out
    assert "100" not in told.replace("(95%", "").splitlines()[0]
    assert "left out, for they are not called for one completion at a time: best" in told
    assert "best: mean" not in told
    assert all(json.loads(line)["rewards"].keys() == {"even"} for line in output.read_text().splitlines())
    for functions_left, reward in ((functions, "best"), (functions[:1], "null")):
        with pytest.raises(
            ValueError, match=r"leaves out best: .*\(best: .* gave other rewards .*there is no accuracy"
        ):
            evaluate_source(run, [f"rewards.functions={json.dumps(functions_left)}", f"eval.reward={reward}"])


def test_evaluation_is_greedy_whatever_the_training_temperature(run, evaluated):
    cold, _ = evaluated
    hot, _ = evaluate_source(run, ["sampling.temperature=5.0", "sampling.top_k=3", "seed=0"])
    assert [sample["completion"] for sample in cold.samples] == [sample["completion"] for sample in hot.samples]


def test_evaluation_leaves_penalties_out_and_keeps_forbidden_ids_and_bias(run, evaluated):
    def completions(result):
        return [sample["completion"] for sample in result.samples]

    plain = completions(evaluated[0])
    penalties = ["repetition_penalty=9.0", "frequency_penalty=50.0", "presence_penalty=50.0"]
    assert completions(evaluate_source(run, [f"sampling.{penalty}" for penalty in penalties])[0]) == plain
    x, y = (3 + ord(letter) for letter in "xy")  # the byte tokenizer has three special tokens first
    rules = [f"sampling.logit_bias={{{x}: 1000.0, {y}: 2000.0}}", f"sampling.forbidden_ids=[{y}]"]
    assert completions(evaluate_source(run, rules)[0]) == ["xxxx"] * 13
    assert plain != ["xxxx"] * 13


def test_stop_strings_that_are_special_tokens_are_looked_for_in_text_that_shows_them():
    tokenizer = load_tokenizer("byte", None)
    eos = tokenizer.special_tokens[0]
    ids = [*tokenizer.encode("ab", add_bos=False), tokenizer.backend.get_vocab()[eos]]
    for stop, text in (("b", "ab"), (eos, f"ab{eos}"), (f"b{eos}", f"ab{eos}")):
        assert stop_text(load_config(None, [f"sampling.stop_strings=['{stop}']"]), tokenizer)(ids) == text


def test_every_sampling_key_reaches_the_sampler():
    config = load_config(
        None,
        [
            "sampling={temperature: 0.5, top_k: 3, top_p: 0.9, min_p: 0.1, max_completion_length: 9}",
            "sampling={min_completion_length: 2, stop_strings: [x], forbidden_ids: [4, 2]}",
            "sampling={repetition_penalty: 1.5, frequency_penalty: 0.25, presence_penalty: -0.5}",
            "sampling.logit_bias={7: -1, 3: 2.5}",
        ],
    )
    assert sampling_params(config, (1,)) == SamplingParams(
        max_completion_length=9,
        eos_ids=(1,),
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        min_completion_length=2,
        stop_strings=("x",),
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        logit_bias=((3, 2.5), (7, -1.0)),
        forbidden_ids=(4, 2),
    )


def test_sampling_defaults_of_a_model_folder_are_never_applied(tmp_path):
    folder = shutil.copytree(MODELS / "qwen2", tmp_path / "model")
    defaults = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1}
    defaults |= {"repetition_penalty": 1.05, "max_new_tokens": 5, "suppress_tokens": [3], "eos_token_id": [7, 5]}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    config = load_config(None, [f"model.source={folder}", "sampling.max_completion_length=64"])
    model_config = read_config(folder)
    assert {5, 7} <= set(model_config.eos_token_ids)
    ids = eos_ids(config, model_config, load_tokenizer("byte"))
    assert sampling_params(config, ids) == SamplingParams(max_completion_length=64, eos_ids=ids)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], []),
        (["sampling.temperature=0.5"], []),
        (["sampling.top_p=0.9", "sampling.presence_penalty=1.0"], ["sampling.top_p", "sampling.presence_penalty"]),
        (["sampling.logit_bias={3: 1.0}"], ["sampling.logit_bias"]),
        (["sampling.forbidden_ids=[3]"], ["sampling.forbidden_ids"]),
        (["sampling.top_k=5", "grpo.sampler_is_correction=true"], ["sampling.top_k"]),
        (["sampling.presence_penalty=1.0", "grpo.sampler_is_correction=true"], []),
        (["sampling.source=mine.py:make", "sampling.slots=null"], ["sampling.source"]),
        (["sampling.top_k=5", "grpo.policy_distribution=sampled"], []),
        (["sampling.kv_dtype=int8", "grpo.policy_distribution=sampled", "sampling.top_k=5"], ["sampling.kv_dtype"]),
    ],
)
def test_training_warns_of_rules_that_the_loss_does_not_correct_for(overrides, named):
    config, stream = load_config(None, overrides), io.StringIO()
    with Console(1, stream) as console:
        warn_about_sampling(console, config, sampling_params(config, (1,)))
    printed = stream.getvalue()
    assert bool(printed) == bool(named)
    if named:  # what can be trained as it was drawn is not to be corrected for by a ratio
        is_exact = not {"sampling.presence_penalty", "sampling.kv_dtype", "sampling.source"} & {*named}
        assert ("grpo.policy_distribution=sampled" in printed) == is_exact
        assert ("grpo.sampler_is_correction=true" in printed) != is_exact
    rules = [word.strip(",:") for word in printed.split() if word.startswith("sampling.")]
    assert sorted(rules) == sorted(named)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ([], "data.chat is false, and the tokenizer has a chat template: prompts are plain text"),
        (["data.chat=true"], ""),
        (["data.chat=true", "data.chat_template_kwargs={thinking: false, eos_token: x}"], "reads thinking, eos_token"),
        (["model.source=null"], ""),
        (["tokenizer.source=TRAINED"], ""),
    ],
)
def test_training_warns_of_text_prompts_for_a_chat_model_and_of_variables_without_effect(overrides, warning, tmp_path):
    tokenizer = load_tokenizer("byte")
    tokenizer.mark_prompts(chat=False)
    tokenizer.save_pretrained(tmp_path)
    recipe = [f"model.source={MODELS / 'qwen2'}", "tokenizer.source=byte", *overrides]
    config = load_config(None, [entry.replace("TRAINED", str(tmp_path)) for entry in recipe])
    tokenizer, stream = tokenizer_from_config(config), io.StringIO()
    with Console(1, stream) as console:
        folder = config.model.source and MODELS / "qwen2"
        warn_about_prompts(console, config, Origin(read_config(MODELS / "qwen2"), folder, {}), tokenizer)
    printed = " ".join(stream.getvalue().split())
    assert bool(printed) == bool(warning)
    assert warning in printed


def test_run_evaluates_before_the_first_step_and_after_the_last(run, evaluated):
    lines = [line for line in read_metrics(run) if "eval/accuracy" in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[-1]["eval/reward/digits/mean"] == pytest.approx(evaluated[0].means["digits"])


def test_eval_command_prints_the_interval_and_writes_every_sample(run, tmp_path, capsys):
    assert main(
        ["eval", str(run), "eval.max_prompts=5", "eval.reward=right", "--output", str(tmp_path / "samples.jsonl")]
    ) in (0, None)
    printed = capsys.readouterr().out
    assert "step 2: accuracy 100.0% (95% interval 56.6% to 100.0%) on 5 prompts" in printed
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[0]["rewards"]["right"] == 1.0


@pytest.fixture(scope="module")
def trained_on_file(tmp_path_factory):
    """A folder whose run is trained on rows of rows.jsonl, of which some are held out."""
    tmp_path = tmp_path_factory.mktemp("of_file")
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(9)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPE)
    overrides = [f"data.source={source}", "data.args={operation: null, digits: null}", "data.eval_size=3"]
    return train(load_config(recipe, [f"output_dir={tmp_path / 'run'}", *overrides, "grpo.steps=1", "eval.every=0"]))


@pytest.fixture
def of_file(trained_on_file):
    """The same; rows and identity are as they were when the test is over."""
    changed = [trained_on_file.parent / "rows.jsonl", trained_on_file / "run.json"]
    texts = [path.read_text() for path in changed]
    yield trained_on_file
    for path, text in zip(changed, texts, strict=True):
        path.write_text(text)


def test_evaluation_of_a_run_says_how_its_held_out_rows_have_changed(of_file, capsys):
    source = of_file.parent / "rows.jsonl"
    text = source.read_text()
    evaluate_source(of_file)
    assert "held-out" not in capsys.readouterr().err
    source.write_text(text.replace('"answer": "', '"answer": "1'))
    evaluate_source(of_file)
    said = capsys.readouterr().err
    assert f"warning: the held-out rows are not those that the run {of_file} began with: the questions are the" in said
    # Without the rows that were held out, others are: those that were trained on.
    held_out = [
        row.prompt for row in load_prompts(load_config(of_file / "config.yml"), load_tokenizer("byte")).held_out
    ]
    lines = [line for line in text.splitlines(keepends=True) if json.loads(line)["prompt"] not in held_out]
    source.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"none that it was trained on, but they are 3 rows with other questions"):
        evaluate_source(of_file)
    evaluate_source(of_file, [f"data.source={source}"])  # the user's word
    assert "held-out" not in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_held_out_rows(of_file):
    other = load_config(of_file / "config.yml", ["grpo.steps=2"])
    source = of_file.parent / "rows.jsonl"
    held_out = load_prompts(other, load_tokenizer("byte")).held_out[0].prompt
    changed = [json.loads(line) for line in source.read_text().splitlines()]
    changed = [row | ({"answer": "0"} if row["prompt"] == held_out else {}) for row in changed]
    source.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(ValueError, match=r"the held_out of the run in .* a resumed run needs the same one"):
        train(other)
    # An older version wrote nothing of them.
    identity = json.loads((of_file / "run.json").read_text())
    del identity["held_out"]
    (of_file / "run.json").write_text(json.dumps(identity))
    assert train(other) == of_file


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
