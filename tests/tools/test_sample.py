"""`grpo sample`: what it draws, what it writes, how it goes on after a stop, and what it refuses."""

import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.files.hf import save_folder
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.run.metrics import CompileCounter, read_samples
from rl.sampler.contract import Completion
from rl.sampler.token_draw import SamplingParams
from rl.tools.samples import sample as sample_command
from rl.tools.samples.replay import compare, draw_again
from rl.tools.samples.sample_prompts import SampleRow
from rl.tools.trained import load_checkpoint, load_start
from tests.helpers.places import REWARDS, ROOT

RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 32, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 8, initializer_range: 0.3}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 3, max_prompt_length: 8}}
rewards:
  functions: [{{function: "{REWARDS}:digit_share", name: digits}}]
sampling: {{max_completion_length: 12, slots: 2}}
grpo: {{steps: 3, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}}
optimizer: {{lr: 1e-2}}
eval: {{every: 0}}
checkpoint: {{every: 1, keep: 3}}
mesh: {{num_devices: 1}}
"""
SLOTS = ["sampling.slots=null"]  # as many as memory allows
ROWS = [
    {"prompt": "1+2=", "n": 3, "id": "first", "level": 2},
    {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
    {"prompt_ids": [1, 52, 53], "seed": 11, "n": 2},
    {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "id": 7},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("sample")
    (path / "recipe.yml").write_text(RECIPE)
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def run(folder) -> pathlib.Path:
    return train(load_config(folder / "recipe.yml", [f"output_dir={folder / 'run'}"]))


@pytest.fixture(scope="module")
def model(folder) -> pathlib.Path:
    """The recipe's weights as a Hugging Face folder with the byte tokenizer."""
    trained = load_start(load_config(folder / "recipe.yml"))
    save_folder(folder / "model", trained.origin.model_config, jax.device_get(trained.params))
    load_tokenizer("byte").save_pretrained(folder / "model")
    return folder / "model"


def sample(*arguments: object) -> int:
    return main(["sample", *map(str, arguments)])


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def by_place(lines: list[dict]) -> dict[tuple[int, int], dict]:
    places = {(line["prompt_index"], line["sample_index"]): line for line in lines}
    assert len(places) == len(lines)
    return places


@pytest.fixture(scope="module")
def finished(folder) -> pathlib.Path:
    """An uninterrupted file of the recipe's own weights, two completions of each row that does not say."""
    path = folder / "finished.jsonl"
    assert sample(folder / "recipe.yml", "--prompts", folder / "prompts.jsonl", "--output", path, "--n", 2) == 0
    return path


# What is written


def test_every_row_gets_its_completions_with_its_id_and_columns(finished):
    lines = by_place(read(finished))
    assert sorted(lines) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert lines[0, 2]["prompt"] == "1+2="
    assert (lines[0, 2]["id"], lines[0, 2]["row"]) == ("first", {"level": 2})
    assert lines[1, 0]["prompt"] == ROWS[1]["messages"]
    assert "id" not in lines[1, 0]
    assert "row" not in lines[1, 0]
    assert lines[2, 0]["prompt"] is None
    assert lines[3, 1]["id"] == 7
    tokenizer = load_tokenizer("byte")
    for (prompt, _), line in lines.items():
        assert line["completion"] == tokenizer.decode(line["token_ids"])
        limit = 5 if prompt == 1 else 12
        assert len(line["token_ids"]) == len(line["logprobs"]) == len(line["sampler_logprobs"]) <= limit
        if line["finish_reason"] == "length":
            assert (len(line["token_ids"]), line["stop_reason"]) == (limit, None)
        else:
            assert (line["finish_reason"], line["stop_reason"]) == ("eos", line["token_ids"][-1])
    assert len({line["completion"] for line in lines.values()}) == len(lines), "completions differ"


LONGEST = 64  # tokens of prompts and completions here


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, inputs):
    policy = create_policy(config, pure_nnx=True)
    return policy.unembed(params, policy.hidden(params, inputs))


def full_logprobs(trained, token_ids: list[int], temperature: float) -> np.ndarray:
    """Float64 log-softmax [T, V] of a plain forward pass over one sequence, without a cache or company."""
    tokens = np.zeros((1, LONGEST), np.int32)  # one shape, compiled once: what follows a token does not matter to it
    tokens[0, : len(token_ids)] = token_ids
    logits = _logits(trained.policy.config, trained.params, plain_inputs(tokens))
    scores = np.asarray(logits[0, : len(token_ids)], np.float64) / temperature
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def test_log_probs_of_completion_prompt_and_alternatives_are_those_of_a_plain_forward_pass(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ["--top-logprobs", 3, "--prompt-logprobs", "sampling.temperature=0.5", "sampling.top_k=5"]
    sample(folder / "recipe.yml", "--prompts", folder / "prompts.jsonl", "--output", output, *options)
    trained = load_start(load_config(folder / "recipe.yml"))
    for line in read(output):
        prompt_ids, token_ids = line["prompt_ids"], line["token_ids"]
        expected = full_logprobs(trained, prompt_ids + token_ids, 0.5)
        num_prompt = len(prompt_ids)
        assert line["prompt_logprobs"][0] is None
        of_prompt = expected[np.arange(num_prompt - 1), prompt_ids[1:]]
        np.testing.assert_allclose(line["prompt_logprobs"][1:], of_prompt, atol=1e-5)
        predicting = expected[num_prompt - 1 : -1]
        of_tokens = predicting[np.arange(len(token_ids)), token_ids]
        np.testing.assert_allclose(line["logprobs"], of_tokens, atol=1e-5)
        among_five = of_tokens - np.log(np.exp(np.sort(predicting, axis=-1)[:, -5:]).sum(axis=-1))
        np.testing.assert_allclose(line["sampler_logprobs"], among_five, atol=1e-5)
        for pairs, row in zip(line["top_logprobs"], predicting, strict=True):
            best = np.argsort(-row)[:3]
            assert [token for token, _ in pairs] == best.tolist()
            np.testing.assert_allclose([value for _, value in pairs], row[best], atol=1e-5)


def test_greedy_log_probs_are_at_temperature_one(folder, capsys):
    assert sample(folder / "recipe.yml", "--prompt", "1+2=", "--prompt-logprobs", "sampling.temperature=0") == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    trained = load_start(load_config(folder / "recipe.yml"))
    expected = full_logprobs(trained, line["prompt_ids"] + line["token_ids"], 1.0)
    num_prompt = len(line["prompt_ids"])
    assert line["token_ids"] == expected[num_prompt - 1 : -1].argmax(axis=-1).tolist()
    rest = line["prompt_ids"][1:]
    np.testing.assert_allclose(line["prompt_logprobs"][1:], expected[np.arange(len(rest)), rest], atol=1e-5)
    assert set(line["sampler_logprobs"]) == {0.0}


def test_log_probs_that_are_no_numbers_are_told_and_not_written():
    tokens, good = np.array([5, 6, 7], np.int32), np.zeros(3, np.float32)
    bad = np.array([-1.0, np.nan, -np.inf], np.float32)
    row = SampleRow("x.jsonl:3", "a", [1], 2, 3, seed=None, row_id=None, columns={})
    for of_sampler, of_policy in ((good, bad), (bad, good)):
        nothing = np.zeros((3, 0))
        completion = Completion(2, 1, tokens, of_sampler, of_policy, "length", None, nothing, nothing)
        with pytest.raises(ValueError, match=r"x\.jsonl:3: .* got nan at token 1 of sample 1; look"):
            sample_command.to_record(row, completion, load_tokenizer("byte"), SamplingParams(3))


# Models


def test_a_run_a_model_folder_and_a_recipe_give_their_own_weights(folder, run, model, capsys):
    def completion(*arguments: object) -> dict:
        assert sample(*arguments, "--prompt", "3+4=", "mesh.num_devices=1", "sampling.max_completion_length=12") == 0
        return json.loads(capsys.readouterr().out)

    from_recipe, from_folder = completion(folder / "recipe.yml"), completion(model)
    assert from_recipe["token_ids"] == from_folder["token_ids"]
    np.testing.assert_allclose(from_recipe["logprobs"], from_folder["logprobs"], atol=1e-5)
    newest, third, first = completion(run), completion(run, "--step", 3), completion(run, "--step", 1)
    assert newest == third
    for line, step in ((third, 3), (first, 1)):
        trained = load_checkpoint(load_config(run / "config.yml"), run, step)
        prompt_ids = trained.tokenizer.encode("3+4=")
        expected = full_logprobs(trained, prompt_ids + line["token_ids"], 1.0)[len(prompt_ids) - 1 : -1]
        of_tokens = expected[np.arange(len(line["token_ids"])), line["token_ids"]]
        np.testing.assert_allclose(line["logprobs"], of_tokens, atol=1e-5)
    assert first["logprobs"] != third["logprobs"]


def test_several_prompts_are_given_on_the_command_line_each_with_n_completions(folder, capsys):
    assert sample(folder / "recipe.yml", "--prompt", "1+2=", "--prompt", "3+4=", "--n", 2) == 0
    lines = by_place([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert {place: line["prompt"] for place, line in lines.items()} == {
        (prompt, number): text for prompt, text in enumerate(("1+2=", "3+4=")) for number in range(2)
    }


def test_the_other_flavour_draws_the_same_bit_for_bit(folder, finished, tmp_path):
    output = tmp_path / "out.jsonl"
    files = ["--prompts", folder / "prompts.jsonl", "--output", output]
    assert sample(folder / "recipe.yml", *files, "--n", 2, "pure_nnx=false") == 0
    assert by_place(read(output)) == by_place(read(finished))


def test_chat_and_system_wrap_a_text_prompt_in_the_template(folder, capsys):
    options = ["--prompt", "hi", "--prompt-logprobs"]
    sample(folder / "recipe.yml", *options, "--chat", "--system", "be: brief")
    sample(folder / "recipe.yml", *options, "--system", "Q: ")
    chat, text = map(json.loads, capsys.readouterr().out.splitlines())
    tokenizer = load_tokenizer("byte")
    messages = [{"role": "system", "content": "be: brief"}, {"role": "user", "content": "hi"}]
    assert chat["prompt"] == messages
    assert chat["prompt_ids"] == tokenizer.encode_chat(messages)
    assert text["prompt"] == "Q: hi"
    assert text["prompt_ids"] == tokenizer.encode("Q: hi")


def test_randomness_is_the_seed_of_the_row_or_the_seed_of_the_call_and_the_place(folder, finished, tmp_path):
    def tokens(rows: list[dict], *options: object) -> list[list[int]]:
        prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sample(folder / "recipe.yml", "--prompts", prompts, "--output", output, "--overwrite", *options)
        return [line["token_ids"] for _, line in sorted(by_place(read(output)).items())]

    before = [line["token_ids"] for _, line in sorted(by_place(read(finished)).items())]
    assert tokens([ROWS[0]]) == before[:3], "a row in the same place, without the others"
    assert tokens([ROWS[2]], "--seed", 5) == before[5:7], "a row with a seed, in another place, with another --seed"
    assert tokens([ROWS[0]], "--seed", 5) != before[:3]


# Stopping and going on


@pytest.mark.parametrize("kept", [0, 3.5, 8.9])
def test_a_file_cut_anywhere_is_finished_with_the_same_completions(folder, finished, tmp_path, capsys, kept):
    whole = finished.read_bytes().splitlines(keepends=True)
    content = b"".join(whole[: int(kept)]) + whole[int(kept)][: int(len(whole[int(kept)]) * (kept % 1))]
    output = tmp_path / "cut.jsonl"
    output.write_bytes(content)
    (tmp_path / "cut.jsonl.meta.json").write_bytes((folder / "finished.jsonl.meta.json").read_bytes())
    command = [folder / "recipe.yml", "--prompts", folder / "prompts.jsonl", "--output", output, "--n", 2]
    assert sample(*command) == 0
    said = capsys.readouterr().err
    assert ("cut off a half-written last line" in said) == bool(kept % 1)
    assert output.read_bytes().startswith(b"".join(whole[: int(kept)])), "whole lines stay as they were"
    expected, got = by_place(read(finished)), by_place(read(output))
    assert expected.keys() == got.keys()
    for place, line in expected.items():
        for name in ("logprobs", "sampler_logprobs"):
            np.testing.assert_allclose(got[place].pop(name), line[name], atol=1e-5)
        assert got[place] == {name: value for name, value in line.items() if name in got[place]}


def test_a_finished_file_is_left_alone_and_nothing_is_loaded(folder, finished, capsys):
    before = finished.read_bytes()
    with CompileCounter() as compiles:
        command = [folder / "recipe.yml", "--prompts", folder / "prompts.jsonl", "--output", finished, "--n", 2]
        assert sample(*command) == 0
        assert compiles.count == 0
    assert finished.read_bytes() == before
    assert "holds 9 completions, 0 are left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["sampling.temperature=0.5"], "sampling.temperature was 1.0, is 0.5"),
        (["sampling.kv_dtype=int8"], "sampling.kv_dtype was None, is 'int8'"),
        (["sampling.weight_dtype=int8"], "sampling.weight_dtype was None, is 'int8'"),
        (["model.arch.initializer_range=0.4"], "model.arch was"),
        (["seed=3"], "seed was 0, is 3"),
        (["--seed", "3"], "seed was 0, is 3"),
        (["--n", "4"], "prompts was '4 rows"),
        (["--prompt-logprobs"], "prompt_logprobs was False, is True"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_kept(folder, finished, capsys, changes, named):
    before = finished.read_bytes()
    command = [folder / "recipe.yml", "--prompts", folder / "prompts.jsonl", "--output", finished, "--n", "2"]
    assert sample(*command, *changes) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "--overwrite" in said
    assert finished.read_bytes() == before


def test_a_file_of_another_program_is_refused_until_overwrite(folder, tmp_path, capsys):
    output = tmp_path / "notes.jsonl"
    output.write_text("my notes\n")
    command = [folder / "recipe.yml", "--prompt", "1+1=", "--output", output]
    assert sample(*command) == 2
    assert "notes.jsonl.meta.json is not beside it" in capsys.readouterr().err
    assert output.read_text() == "my notes\n"
    assert sample(*command, "--overwrite") == 0
    assert len(read(output)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.jsonl", "notes.jsonl.meta.json"]
    assert sample(*command) == 0
    assert "holds 1 completions, 0 are left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message", "is_seen_early"),
    [
        ("sampling.forbidden_ids=[99999]", "sampling.forbidden_ids must be on token ids below", True),
        ("sampling.logit_bias={99999: 1.0}", "sampling.logit_bias must be on token ids below", True),
        ("sampling.kv_memory=1e-12", "sampling.kv_memory must allow at least one completion", False),
    ],
)
def test_overwrite_deletes_nothing_before_there_is_a_new_line(
    folder, finished, tmp_path, capsys, change, message, is_seen_early
):
    output = tmp_path / "out.jsonl"
    shutil.copy(finished, output)
    shutil.copy(folder / "finished.jsonl.meta.json", tmp_path / "out.jsonl.meta.json")
    before = snapshot(tmp_path)
    with CompileCounter() as compiles:
        assert sample(folder / "recipe.yml", "--prompt", "a", "--output", output, "--overwrite", change, *SLOTS) == 2
        assert compiles.count == 0 or not is_seen_early
    assert message in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_ctrl_c_ends_cleanly_and_keeps_whole_lines(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ["--prompt", "1+2=", "--n", "20000", "--output", str(output), "sampling.slots=2"]
    # Where the tests run in the background of a shell, SIGINT is ignored, by them and by what they start.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{heed}; from rl.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "sample", str(folder / "recipe.yml"), *options]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not output.exists() or output.stat().st_size == 0):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    lines = by_place(read(output))
    assert 0 < len(lines) < 20000
    assert f"stopped after {len(lines)} of 20000 completions" in said


# The progress bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what it is told."""

    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch) -> Terminal:
    """What standard error is for the rest of the test; no fixture, for pytest puts its own back after those."""
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_the_bar_counts_the_completions_of_a_file_those_it_held_before_included(
    folder, finished, tmp_path, monkeypatch
):
    output = tmp_path / "cut.jsonl"
    output.write_bytes(b"".join(finished.read_bytes().splitlines(keepends=True)[:4]))
    (tmp_path / "cut.jsonl.meta.json").write_bytes((folder / "finished.jsonl.meta.json").read_bytes())
    command = [folder / "recipe.yml", "--prompts", folder / "prompts.jsonl", "--output", output, "--n", 2]
    terminal = open_terminal(monkeypatch)
    assert sample(*command) == 0
    shown = [int(number) for number in re.findall(r"(\d+)/9 ", terminal.getvalue())]
    assert (shown[0], shown[-1]) == (4, 9)
    assert shown == sorted(shown)


@pytest.mark.parametrize(
    ("stdout", "to_file", "is_shown"),
    [(Terminal, True, True), (io.StringIO, False, True), (Terminal, False, False)],
    ids=["file", "stdout_in_a_pipe", "stdout_on_the_same_terminal"],
)
def test_the_bar_is_on_a_terminal_that_completions_do_not_go_to(
    folder, tmp_path, monkeypatch, stdout, to_file, is_shown
):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", stdout())
    options = ["--output", tmp_path / "out.jsonl"] if to_file else []
    assert sample(folder / "recipe.yml", "--prompt", "1+2=", *options) == 0
    assert ("1/1 " in terminal.getvalue()) == is_shown
    assert ("token_ids" in sys.stdout.getvalue()) != to_file


def test_there_is_no_bar_in_a_pipe(folder, tmp_path, capsys):
    assert sample(folder / "recipe.yml", "--prompt", "1+2=", "--output", tmp_path / "out.jsonl") == 0
    told = capsys.readouterr()
    assert told.out == ""
    # Where it takes more than five seconds, a line now and then says so.
    assert all(line.endswith(" s so far") for line in told.err.splitlines()), told.err


def test_the_bar_shows_the_tokens_of_a_second_since_it_began_and_is_not_drawn_all_the_time(monkeypatch):
    terminal, now = open_terminal(monkeypatch), 100.0
    monkeypatch.setattr(sample_command.time, "monotonic", lambda: now)
    with sample_command.progress(5, 8, show=True) as advance:
        now = 102.0
        advance(50)
        now = 102.05
        advance(1)
        now = 104.0
        advance(49)
    drawn = re.findall(r"(\d/8) .* ([\d,]+) tokens/s", terminal.getvalue().replace("\r", "\n"))
    assert list(dict.fromkeys(drawn)) == [("5/8", "0"), ("6/8", "25"), ("8/8", "25")]


# Bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([""], "must hold at least one prompt"),
        (['{"prompt": "a"}', '{"prompt": '], "prompts.jsonl:2 must be one JSON object"),
        (["[1]"], "prompts.jsonl:1 must be one JSON object"),
        (['{"question": "a"}'], "must hold exactly one of prompt, messages, prompt_ids, got ['question']"),
        (['{"prompt": "a", "prompt_ids": [1]}'], "got ['prompt', 'prompt_ids']"),
        (["", '{"prompt": " "}'], "prompts.jsonl:2: the prompt must hold text"),
        (['{"prompt": 3}'], "prompt must be text or a list of messages"),
        (['{"messages": "hi"}'], "messages must be a list of messages"),
        (['{"messages": [{"role": "user"}]}'], "messages must be a list of messages"),
        (['{"prompt_ids": []}'], "at least one token"),
        (['{"prompt_ids": [1, "2"]}'], "prompt_ids must be a list of token ids"),
        (['{"prompt_ids": [1, 259]}'], "prompt_ids must be below 259, got 259"),
        (['{"prompt": "a", "n": 0}'], "n must be a whole number >= 1, got 0"),
        (['{"prompt": "a", "n": true}'], "n must be a whole number >= 1, got True"),
        (['{"prompt": "a", "seed": 4294967296}'], "seed must be at most 4294967295"),
        (['{"prompt": "a", "max_tokens": 1.5}'], "max_tokens must be a whole number >= 1, got 1.5"),
        (['{"prompt": "a", "max_tokens": 5000}'], "must fit in the model's 2048 positions"),
        (['{"prompt": "a", "max_tokens": 3}', '{"prompt": "a", "max_tokens": 2}'], "jsonl:2: max_tokens must be >= 3"),
        (['{"prompt": "a", "id": [1]}'], "id must be text or a whole number"),
        (['{"prompt": "a", "score": NaN}'], "columns must hold what can be written as JSON"),
        (['{"prompt": "a", "x": ' + "[" * 100 + "]" * 100 + "}"], "within each other 101 deep, the most is 100"),
        (['{"prompt": "a", "x": ' + "[" * 3000 + "]" * 3000 + "}"], "prompts.jsonl:1 must be one JSON object, got b'{"),
        (['{"prompt": "a"}', '{"prompt": "a\\ud800"}'], "prompts.jsonl:2: text must be valid Unicode"),
        (['{"messages": [{"role": "user", "content": "\\ud800"}]}'], "prompts.jsonl:1: text must be valid Unicode"),
    ],
)
def test_a_wrong_row_is_named_before_anything_is_compiled_or_written(folder, tmp_path, capsys, rows, message):
    (tmp_path / "prompts.jsonl").write_text("".join(row + "\n" for row in rows))
    with CompileCounter() as compiles:
        files = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl"]
        assert sample(folder / "recipe.yml", *files, "sampling.min_completion_length=3") == 2
        assert compiles.count == 0
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("name", [".", "/", "..", "device", "folder", "recipe.yml/out.jsonl", "o" * 248 + ".jsonl"])
def test_an_output_that_cannot_be_written_is_refused_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "recipe.yml", tmp_path)
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    for overwrite in ([], ["--overwrite"]):
        assert sample("recipe.yml", "--prompt", "a", "--output", name, *overwrite) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --output must be a file that can be written, got {name}")
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "grpo sample needs a MODEL"),
        (["RECIPE"], "either --prompts FILE or --prompt TEXT, got neither"),
        (["RECIPE", "--prompt", "a", "--prompts", "x.jsonl"], "either --prompts FILE or --prompt TEXT, got both"),
        (["RECIPE", "--prompts", "x.jsonl"], "--prompts needs --output"),
        (["RECIPE", "--prompts", "x.jsonl", "--output", "y.jsonl"], "--prompts must be a JSON-lines file, got"),
        (["RECIPE", "--prompt", ""], "--prompt 1: the prompt must hold text"),
        (["RECIPE", "--prompt", "a", "--n", "0"], "--n must be >= 1, got 0"),
        (
            ["RECIPE", "--prompt", "a", "sampling.temperature=1e-7"],
            "sampling.temperature must be 0 (greedy) or >= 1e-06",
        ),
        (["RECIPE", "--prompt", "a", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["RECIPE", "--prompt", "a", "--seed", "4294967296"], "--seed must be <= 4294967295, got 4294967296"),
        (["RECIPE", "--prompt", "a", "--top-logprobs", "300"], "--top-logprobs must be <= the vocabulary, 259"),
        (["RECIPE", "--prompt", "a", "sampling.temprature=1"], "did you mean"),
        (["RECIPE", "--prompt", "a", "--step", "1"], "--step needs a run folder"),
        (["RUN", "--prompt", "a", "--step", "9"], "--step must be one of the checkpoints"),
        (["EMPTY", "--prompt", "a"], "MODEL must be a run folder"),
        (["--replay", "EMPTY", "1", "0", "0"], "must be a run folder"),
        (["--replay", "RUN", "1", "x", "0"], "PROMPT must be a whole number, got 'x'"),
        (["--replay", "RUN", "1", "2", "0"], "PROMPT must be from 0 to 1, got 2"),
        (["--replay", "RUN", "1", "0", "2"], "SAMPLE must be from 0 to 1, got 2"),
        (["--replay", "RUN", "5", "0", "0"], "STEP must be one of [1, 2, 3], got 5; the run has done 3 steps"),
        (["--replay", "RUN", "1", "0", "0", "sampling.temperature=2"], "got other values for ['sampling.temperature']"),
        *[
            (
                ["--replay", "RUN", "1", "0", "0", *option],
                f"takes RUN STEP PROMPT SAMPLE and overrides only, got {named}",
            )
            for option, named in (
                (["--prompt", "a"], "['--prompt']"),
                (["--prompts", "a", "--output", "b"], "['--prompts', '--output']"),
                (["--step", "1", "--adapter", "a"], "['--step', '--adapter']"),
                (["--seed", "0", "--n", "2"], "['--n', '--seed']"),
                (["--chat", "--system", "", "--overwrite"], "['--overwrite', '--chat', '--system']"),
                (["--top-logprobs", "3", "--prompt-logprobs"], "['--top-logprobs', '--prompt-logprobs']"),
                (["5"], "['5']"),
            )
        ],
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(folder, run, tmp_path, capsys, arguments, message):
    places = {"RECIPE": folder / "recipe.yml", "RUN": run, "EMPTY": tmp_path}
    with CompileCounter() as compiles:
        assert sample(*(places.get(argument, argument) for argument in arguments)) == 2
        assert compiles.count == 0
    assert message in capsys.readouterr().err


# Replay


def test_completions_of_every_step_are_drawn_again_alone(run, capsys):
    records = read_samples(run)
    assert {record["step"] for record in records} == {1, 2, 3}
    for record in [next(r for r in records if r["step"] == step and r["sample_index"] == 1) for step in (1, 2, 3)]:
        place = record["step"], record["prompt_index"], record["sample_index"]
        assert sample("--replay", run, *place) == 0
        captured = capsys.readouterr()
        line = json.loads(captured.out)
        assert (line["completion"], line["token_ids"]) == (record["completion"], record["token_ids"])
        assert (line["prompt"], line["finish_reason"]) == (record["prompt"], record["finish_reason"])
        assert len(line["logprobs"]) == record["num_tokens"]
        assert "its tokens are equal to those in samples.jsonl" in captured.err
        assert "NOT" not in captured.err


def test_a_completion_is_drawn_again_on_another_mesh_and_in_the_other_flavour(run, capsys):
    record = next(record for record in read_samples(run) if record["step"] == 3)
    place = record["step"], record["prompt_index"], record["sample_index"]
    assert sample("--replay", run, *place, "mesh.num_devices=2", "pure_nnx=false") == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["completion"], line["token_ids"]) == (record["completion"], record["token_ids"])


def test_a_step_whose_weights_were_not_kept_cannot_be_replayed(folder, capsys):
    config = load_config(folder / "recipe.yml", [f"output_dir={folder / 'sparse'}", "checkpoint.every=2"])
    sparse = train(config)
    assert sample("--replay", sparse, 2, 0, 0) == 2
    said = capsys.readouterr().err
    assert "STEP must be one of [1, 3], got 2; the weights before step 2 were not kept: checkpoint.every" in said
    record = next(r for r in read_samples(sparse) if r["step"] == 3)
    assert sample("--replay", sparse, 3, record["prompt_index"], record["sample_index"]) == 0


def test_a_recorded_completion_that_differs_is_said(run, folder, capsys):
    copy = shutil.copytree(run, folder / "forged")
    first, *others = map(json.loads, (copy / "samples.jsonl").read_text().splitlines())

    def forge(record: dict) -> pathlib.Path:
        (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (record, *others)))
        return copy

    place = first["prompt_index"], first["sample_index"]
    assert sample("--replay", forge(first | {"completion": "forged"}), 1, *place) == 1
    assert "NOT equal to samples.jsonl: completion was 'forged', is " in capsys.readouterr().err
    replayed = draw_again(run, 1, *place)
    assert compare(forge(first), replayed) == (True, "its tokens are equal to those in samples.jsonl")
    for change, message in (
        ({"finish_reason": "stop"}, f"finish_reason was 'stop', is '{first['finish_reason']}'"),
        ({"num_tokens": 99}, f"num_tokens was 99, is {first['num_tokens']}"),
        ({"token_ids": [258, *first["token_ids"][1:]]}, f"token 0 was 258, is {first['token_ids'][0]}"),
    ):
        is_same, said = compare(forge(first | change), replayed)
        assert not is_same
        assert said == f"NOT equal to samples.jsonl: {message}"
    old = {name: value for name, value in first.items() if name != "token_ids"}
    is_same, said = compare(forge(old), replayed)
    assert is_same
    assert "samples.jsonl, which has no token ids" in said
    assert not compare(forge(old | {"num_tokens": 99}), replayed)[0]
    others = [line for line in others if (line["step"], line["prompt_index"], line["sample_index"]) != (1, *place)]
    assert compare(forge(others[0]), replayed)[1].startswith("samples.jsonl does not hold this completion")
