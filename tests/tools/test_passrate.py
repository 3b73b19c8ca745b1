"""`grpo data passrate`: the numbers by hand, a kill and what goes on after it, the file as a data source."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys

import pyarrow.parquet
import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.data.order import order_of
from rl.data.prompts import fingerprint, load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.run.metrics import CompileCounter
from rl.tools.passrate import passrate
from rl.tools.passrate_file import Rate, encode_outputs
from tests.helpers.places import ROOT

REWARDS = """
import json, os, pathlib, signal

def judged(completion, prompt, level, folder):
    '''Every call is told to a file. A level of 9 is never judged; a reward may lie outside of 0..1.'''
    folder = pathlib.Path(folder)
    value = None if level == 9 else level * (len(completion.encode()) % 4) / 3
    with (folder / "told.jsonl").open("a") as file:
        file.write(json.dumps([prompt, value]) + "\\n")
    if (folder / "kill").exists() and len((folder / "told.jsonl").read_text().splitlines()) > 13:
        supervisor = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text()
        os.kill(int(supervisor.rpartition(")")[2].split()[1]), signal.SIGKILL)
    if (folder / "fail").exists():
        raise KeyError("mend me")
    return value

def weightless(completion):
    raise KeyError("is not called")
"""
LEVELS = [-1, 0.5, 1, 2, 9]
ROWS = [{"question": f"{n}+{n}=", "gold": str(2 * n), "level": LEVELS[n % 5], "note": [n]} for n in range(9)]
ROWS.append({"question": "7" * 30, "gold": "1", "level": 1, "note": [0]})  # too long
RECIPE = """
model:
  arch: {{family: qwen3, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1,
    head_dim: 8, initializer_range: 0.3}}
data: {{source: {folder}/rows.jsonl, columns: {{prompt: question, answer: gold}}, eval_size: 2, max_prompt_length: 20,
  system_prompt: "Sum: "}}
rewards:
  functions:
  - {{function: "{folder}/mine.py:weightless", weight: 0}}
  - {{function: "{folder}/mine.py:judged", kwargs: {{folder: {folder}}}, elementwise: true}}
  check_on_gold: false
sampling: {{max_completion_length: 4, slots: 4}}
grpo: {{steps: 1, prompts_per_step: 4, group_size: 2, max_tokens_per_microbatch: 64}}
eval: {{every: 0, reward: "{folder}/mine.py:judged"}}
checkpoint: {{every: 1}}
mesh: {{num_devices: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("passrate")
    (path / "mine.py").write_text(REWARDS)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "recipe.yml").write_text(RECIPE.format(folder=path))
    return path


def measure(folder: pathlib.Path, output: pathlib.Path, *arguments: str) -> int:
    recipe = str(folder / "recipe.yml")
    return main(["data", "passrate", recipe, recipe, "--output", str(output), "--draws", "4", *arguments])


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(folder) -> pathlib.Path:
    """The output of a command that was not stopped, with what the function was asked and said beside it."""
    assert measure(folder, folder / "rates.jsonl") == 0
    (folder / "told.jsonl").rename(folder / "told_at_first.jsonl")
    return folder / "rates.jsonl"


def test_rates_are_the_means_of_the_cut_rewards_of_each_prompt(folder, measured):
    told = collections.defaultdict(list)
    for prompt, value in read(folder / "told_at_first.jsonl"):
        told[prompt].append(value)
    rows = read(measured)
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS[:9]  # the order and the names of the source
    held_out = [row for row in rows if "Sum: " + row["question"] not in told]
    assert len(held_out) == 2
    assert all((row["pass_rate"], row["pass_rate_draws"]) == (None, 0) for row in held_out)
    trained = [row for row in rows if row not in held_out]
    for row in trained:
        values = told["Sum: " + row["question"]]
        assert len(values) == 4
        if row["level"] == 9:
            assert (row["pass_rate"], row["pass_rate_draws"]) == (None, 0)
        else:
            assert row["pass_rate"] == sum(min(max(value, 0), 1) for value in values) / 4
            assert row["pass_rate_draws"] == 4
    rates = {row["pass_rate"] for row in trained}
    assert {None, 0.0} < rates
    assert any(rate and 0 < rate < 1 for rate in rates)
    assert sorted(path.name for path in folder.glob("rates*")) == ["rates.jsonl"]


def test_a_run_takes_the_file_with_the_same_rows_and_knows_their_rates_at_the_start(folder, measured):
    tokenizer = load_tokenizer("byte")
    before = load_prompts(load_config(folder / "recipe.yml"), tokenizer)
    config = load_config(folder / "recipe.yml", [f"data.source={measured}", "data.curriculum.by=pass_rate"])
    after = load_prompts(config, tokenizer)
    for left, right in zip((*before.train, *before.held_out), (*after.train, *after.held_out), strict=True):
        assert (left.prompt, left.prompt_ids.tolist()) == (right.prompt, right.prompt_ids.tolist())
        assert left.columns.items() < right.columns.items()
    known = order_of(config.data, after, 0, 2).curriculum.state["rates"]
    rates = [row.columns["pass_rate"] for row in after.train]
    assert known == {str(number): rate for number, rate in enumerate(rates) if rate is not None}
    assert 3 < len(known) < len(rates)


@pytest.mark.slow
def test_a_killed_command_keeps_what_it_measured_and_the_same_command_finishes_it(folder, measured, capsys):
    output = folder / "killed.jsonl"
    (folder / "kill").touch()
    recipe = str(folder / "recipe.yml")
    command = [sys.executable, "-m", "rl.cli", "data", "passrate", recipe, recipe, "--output", str(output)]
    killed = subprocess.run([*command, "--draws", "4"], cwd=ROOT, env=os.environ, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder / "kill").unlink()
    part = folder / "killed.jsonl.part"
    assert not output.exists()
    lines = part.read_text().splitlines(keepends=True)
    assert 2 <= len(lines) < 7  # whole chunks of 2 prompts
    part.write_text("".join(lines[:-1]) + lines[-1][:9])  # as a machine that went down could leave it
    (folder / "told.jsonl").unlink()
    assert measure(folder, output, "--draws", "3") == 2
    assert "draws was 4, is 3" in capsys.readouterr().err
    assert measure(folder, output) == 0
    assert output.read_bytes() == measured.read_bytes()
    assert len(read(folder / "told.jsonl")) == 4 * (7 - len(lines) + 2)  # what is left, and the chunk that was cut
    assert sorted(path.name for path in folder.glob("killed*")) == ["killed.jsonl"]
    (folder / "told.jsonl").unlink()


def test_a_function_that_fails_stops_the_measurement_and_the_same_command_goes_on(folder, measured, capsys):
    output = folder / "failed.jsonl"
    (folder / "fail").touch()
    assert measure(folder, output) == 2
    assert "failed on 8 of 8" in capsys.readouterr().err
    assert not output.exists()
    (folder / "fail").unlink()
    assert measure(folder, output) == 0
    assert output.read_bytes() == measured.read_bytes()
    (folder / "told.jsonl").unlink()


def test_the_rates_of_an_adapter_run_go_into_parquet_alike_in_both_flavours(folder):
    run = train(load_config(folder / "recipe.yml", ["lora.rank=2", f"output_dir={folder}/run"]))
    recipe, found = folder / "recipe.yml", []
    for flavour in ("true", "false"):
        output = folder / f"{flavour}.parquet"
        result = passrate(str(run), str(recipe), str(output), overrides=[f"pure_nnx={flavour}"], trust=True)
        assert (result.draws, len(result.rates), result.num_new) == (2, 7, 7)
        table = pyarrow.parquet.read_table(output)
        found.append(table.to_pylist())
        data = load_prompts(load_config(recipe, [f"data.source={output}"]), load_tokenizer("byte"))
        assert [row.columns["pass_rate"] for row in data.train] == [rate.rate for rate in result.rates]
    assert found[0] == found[1]
    (folder / "told.jsonl").unlink()


def test_mixtures_and_chats_are_written_as_their_sources_had_them(tmp_path):
    chats = [
        [{"role": "user", "content": f"chat {n}"}, {"role": "assistant", "content": f"said {n}"}] for n in range(6)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"talk": chat, "hint": None}) + "\n" for chat in chats))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"q": f"plain {n}", "answer": "1"}) + "\n" for n in range(5)))
    entries = [
        {"name": "a", "source": "a.jsonl", "columns": {"prompt": "talk"}, "answer_from_messages": True, "eval_size": 2},
        {
            "name": "b",
            "source": "b.jsonl",
            "columns": {"prompt": "q", "answer": "answer"},
            "system_prompt": "Be brief.",
        },
    ]

    def config(ending):
        sources = [entry | {"source": str(tmp_path / (entry["name"] + ending))} for entry in entries]
        return load_config(
            None, ["data.chat=true", 'data.assistant_prefill="So"', f"data.sources={json.dumps(sources)}"]
        )

    tokenizer, own = load_tokenizer("byte"), config(".jsonl")
    data = load_prompts(own, tokenizer)
    rates = {number: Rate(number / 10, 4) for number in range(1, len(data.train))}
    files = encode_outputs(str(tmp_path / "{source}.rates.jsonl"), own.data, data, rates)
    assert [pathlib.Path(path).name for path in files] == ["a.rates.jsonl", "b.rates.jsonl"]
    for path, content in files.items():
        pathlib.Path(path).write_bytes(content)
    assert [row["talk"] for row in read(tmp_path / "a.rates.jsonl")] == chats
    again = load_prompts(config(".rates.jsonl"), tokenizer)
    assert [row.columns["pass_rate"] for row in again.train] == [None, *(n / 10 for n in range(1, 9))]
    for row in (*again.train, *again.held_out):
        del row.columns["pass_rate"], row.columns["pass_rate_draws"]
    assert fingerprint(again.train) == fingerprint(data.train)
    assert fingerprint(again.held_out) == fingerprint(data.held_out)
    (one,) = encode_outputs(str(tmp_path / "all.jsonl"), own.data, data, rates).values()
    rows = [json.loads(line) for line in one.splitlines()]
    assert collections.Counter(row["data_source"] for row in rows) == {"a": 6, "b": 5}
    assert rows[-1]["prompt"] == "plain 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", "0"], "--draws must be from 1 to 65536, got 0"),
        (["--output", "rates.csv"], "--output must end with .jsonl or .parquet, got 'rates.csv'"),
        (["--output", "gs://a/rates.jsonl"], "--output must be a local path"),
        (["--output", "no/such/rates.jsonl"], "--output must be a file in a folder that exists"),
        (["--output", "{source}.jsonl"], "--output must be one file for one data.source"),
        (
            ["--output", "o-{sorce}.jsonl"],
            "--output may hold {source} and no other field, got {sorce} in 'o-{sorce}.js",
        ),
        (
            ["--output", "rows.jsonl"],
            "--output must be new, got 'rows.jsonl', which exists; choose another one, or pass",
        ),
        (["--step", "3"], "--step needs a run folder"),
        (["rewards.functions=[]"], "rewards.functions must be set"),
        (["eval.reward=other"], "eval.reward must name one of rewards.functions"),
        (["sampling.temperature=0"], "sampling.temperature must be > 0"),
        (["sampling.max_completion_length=4000"], "must fit the model's 2048 positions"),
        (["grpo.prompts_per_step=8"], "grpo.prompts_per_step must be <= the number of training rows, got 8"),
        (["data.source=absent.jsonl"], "which does not exist"),
        (["data.streaming=true", "data.eval_size=0"], "data.streaming must be false to measure pass rates"),
        (["model.source=no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_compiled(
    folder, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    with CompileCounter() as compiles:
        assert measure(folder, pathlib.Path("out.jsonl"), *arguments) == 2
        assert compiles.count == 0
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_recipe_is_a_yaml_file_and_a_model_something_with_weights(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for names, message in (
        (["recipe.yml", "rows.jsonl"], "CONFIG must be a YAML recipe, got 'rows.jsonl'"),
        (["rows.jsonl", "recipe.yml"], "MODEL must be a run folder"),
    ):
        assert main(["data", "passrate", *names, "--output", "out.jsonl"]) == 2
        assert message in capsys.readouterr().err


def test_values_that_the_format_cannot_hold_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "x"}\n')
    config = load_config(None, [f"data.source={tmp_path}/rows.jsonl"])
    data = load_prompts(config, load_tokenizer("byte"))
    assert encode_outputs("out.jsonl", config.data, data, {})
    with pytest.raises(
        ValueError, match=r"format that the values of the rows fit, got 'out\.parquet': .* name a \.jsonl"
    ):
        encode_outputs("out.parquet", config.data, data, {})
