"""`grpo data bench`: the prompts of training, counted and timed, without model or device."""

import json
import os
import subprocess
import sys

import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.data.prompts import load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.tools.data import bench
from tests.helpers.places import ROOT

# 12 sums, two of them held out elsewhere with other spacing, and a prompt that is too long.
ROWS = [*({"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(12)), {"prompt": "1" * 30 + "=", "answer": "1"}]
HELD_OUT = [{"prompt": f" {n}+{n}= ", "answer": str(2 * n)} for n in (3, 10)]


@pytest.fixture
def recipe(tmp_path):
    for name, rows in (("train", ROWS), ("eval", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yml"
    path.write_text(
        f"data: {{source: {tmp_path}/train.jsonl, eval_source: {tmp_path}/eval.jsonl, max_prompt_length: 10}}\n"
        "grpo: {prompts_per_step: 4}\n"
    )
    return path


def test_every_row_is_counted_once_and_lengths_are_those_of_training(recipe):
    result = bench(recipe, num_steps=3)
    data = load_prompts(load_config(recipe), load_tokenizer("byte"))
    assert (result.num_rows, result.num_train, result.num_held_out) == (15, 10, 2)
    assert (result.num_dropped, result.num_removed) == (1, 2)
    lengths = [len(row.prompt_ids) for row in (*data.train, *data.held_out)]
    assert (result.num_tokens, result.longest_prompt) == (sum(lengths), max(lengths))
    assert result.mean_prompt == sum(lengths) / 12
    assert result.messages == data.messages
    assert result.peak_bytes >= result.start_bytes > 1e6
    assert min(result.seconds, result.step_seconds, result.tokenizer_seconds) > 0


def test_a_recipe_whose_model_is_not_there_yet_is_measured_in_bytes(recipe, capsys):
    assert main(["data", "bench", str(recipe), "model.source=./none"]) == 0
    told = capsys.readouterr().out
    assert "model.source './none' is not there, so tokens are bytes here" in told
    assert f"{bench(recipe).num_tokens:,} in all" in told
    assert main(["data", "bench", str(recipe), "model.source=./none", "tokenizer.source=./none"]) == 2


def test_rows_that_share_a_held_out_question_are_removed(tmp_path):
    rows = [{"prompt": f"{n // 2}+1=", "answer": "1"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yml").write_text(f"data: {{source: {tmp_path}/rows.jsonl}}\n")
    result = bench(tmp_path / "recipe.yml", overrides=["data.eval_size=1", "grpo.prompts_per_step=2"])
    assert (result.num_rows, result.num_train, result.num_held_out, result.num_removed) == (8, 6, 1, 1)


def test_every_block_of_a_stream_is_counted(recipe):
    whole = bench(recipe, num_steps=3)
    blocks = bench(recipe, 3, ["data.streaming=true", "data.block_size=5"])
    names = ("num_rows", "num_train", "num_held_out", "num_dropped", "num_removed", "num_tokens", "longest_prompt")
    assert {name: getattr(blocks, name) for name in names} == {name: getattr(whole, name) for name in names}
    assert [message.partition(":")[0] for message in blocks.messages] == [f"block {k} of 3" for k in (1, 3, 3)]


def test_the_command_needs_no_device_and_writes_its_numbers(recipe, tmp_path):
    command = [sys.executable, "-m", "rl.tools.data", "bench", str(recipe), "--json", str(tmp_path / "out.json")]
    # A platform that does not exist: whatever asks jax for a device fails.
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    result = subprocess.run(
        [*command, "data.max_prompt_length=64"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["num_rows"], found["num_dropped"], found["longest_prompt"]) == (15, 0, 32)
    assert found["tokens_per_second"] == pytest.approx(found["num_tokens"] / found["seconds"])
    assert found["rows_per_second"] == pytest.approx(15 / found["seconds"])
    for words in ("15 rows in", "rows/s", "tokens/s", "kept 13 (11 to train, 2 held out)", "32 at most", "MB"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "recipe.yml"], "grpo data needs bench or passrate, got 'read'"),
        (["bench", "absent.yml"], "absent.yml"),
        (["bench", "recipe.yml", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["bench", "recipe.yml", "data.source=null"], "data.source"),
        (["bench", "recipe.yml", "data.source=absent.jsonl"], "which does not exist"),
        (["bench", "recipe.yml", "data.columns.prompt=text"], "'text'"),
        (["bench", "recipe.yml", "data.max_prompt_length=2"], "must let a prompt of data.source through, got 2"),
        (["bench", "recipe.yml", "grpo.prompts_per_step=11"], "grpo.prompts_per_step"),
        (["bench", "recipe.yml", "tokenizer.source=no/such/folder"], "tokenizer.source must be a Hugging Face folder"),
        (["bench", "recipe.yml", "data.max_prompt=2"], "did you mean 'data.max_prompt_length'"),
    ],
)
def test_what_training_would_refuse_is_refused(recipe, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(recipe.parent)
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
