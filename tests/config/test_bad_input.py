"""Bad input: told what is wrong, what the rule is and the way out, before anything heavy starts, no trace on disk.

Everything goes through the real entry points. Faults of reward functions at run time are isolated and counted instead.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from rewards.batch import COUNTS
from rl import sft_trainer
from rl.cli import main
from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh
from rl.grpo_trainer import train
from rl.models.config import ModelConfig, parameter_specs
from rl.models.files.hf import save_folder
from rl.models.flavours import policy_from_config
from rl.run.metrics import CompileCounter, read_metrics, read_samples
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn
from rl.tools.evaluate import evaluate_source
from tests.helpers.places import ROOT

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
ROWS = [{"prompt": f"{n}+{n + 1}=", "answer": str(2 * n + 1), "kind": "bad" if n == 0 else "good"} for n in range(4)]
TOO_LONG = {"prompt": "1" * 40 + "=", "answer": "1", "kind": "good"}
FUNCTIONS = ("good", "wrong_count", "strings", "nan", "raises", "hangs", "dies")
REWARDS = """
import os, time

def good(completion, answer):
    return float(len(completion))

def wrong_count(completions, kind):
    return [1.0] * (len(completions) + ("bad" in kind))

wrong_count.elementwise = True  # a function of whole batches would lose them all

def strings(completion, kind):
    return "1.0" if kind == "bad" else 1.0

def nan(completion, kind):
    return float("nan") if kind == "bad" else 1.0

def raises(completion, kind):
    return {"good": 1.0}[kind]

def hangs(completion, kind):
    time.sleep(1000 if kind == "bad" else 0)
    return 1.0

def dies(completion, kind):
    if kind == "bad":
        os._exit(3)
    return 1.0

def needs_solution(completion, solution):
    return 1.0
"""


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def write_recipe(folder):
    """A recipe that works, with one reward function that does."""
    (folder / "rewards_of_test.py").write_text(REWARDS)
    write_rows(folder / "rows.jsonl", ROWS)
    path = folder / "recipe.yml"
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"arch": {"family": "llama", **SIZES}},
        "data": {"source": str(folder / "rows.jsonl"), "max_prompt_length": 8},
        "rewards": {"functions": [reward(folder, "good")]},
        "sampling": {"max_completion_length": 4},
        "grpo": {"steps": 2, "prompts_per_step": 4, "group_size": 2, "max_tokens_per_microbatch": 128, "beta": 0.0},
        "mesh": {"data": 8, "fsdp": 1},
        "eval": {"every": 0},
    }
    path.write_text(json.dumps(recipe))  # which is YAML, too
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward(folder, name):
    return {"function": f"{folder / 'rewards_of_test.py'}:{name}", "name": name}


def snapshot(folder):
    """{path: (content, time of the last change)} of everything below a folder but what Python keeps of a module."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def refuse(recipe, *overrides, match):
    """Training is refused: nothing was compiled, and the folder of the recipe, with what lies in it, is as it was."""
    before = snapshot(recipe.parent)
    with CompileCounter() as compiles, pytest.raises(ValueError, match=match):
        train(load_config(recipe, overrides))
    assert compiles.count == 0
    assert snapshot(recipe.parent) == before


# Configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["grpo.stesp=3"],
            "unknown config key 'grpo.stesp'; did you mean 'grpo.steps'? (configs/base.yml lists every key)",
        ),
        (["grpo.group_size=1"], "grpo.group_size must be >= 2 for a group baseline, got 1"),
        (["grpo.group_size=2147483647"], "grpo.group_size must be <= 65536, because the host keeps a record"),
        (
            ["grpo.minibatches=3"],
            "grpo.minibatches must divide grpo.prompts_per_step (4), got 3; these fit: [1, 2, 4]",
        ),
        (["mesh.data=3"], "mesh sizes must multiply to the 8 device(s) in use, got data=3 x fsdp=1 x tensor=1; "),
        (["output_dir=null"], "output_dir must be set, got None; for example output_dir="),
        (["rewards.functions=[]"], "rewards.functions must be set, got []; for example rewards.functions="),
        (
            ["rewards.functions=[{function: 'rewards.number:exact_number_strict', weight: 0.0}]"],
            "rewards.functions must hold a weight other than 0, got only metrics",
        ),
        (["sampling.temperature=0"], "sampling.temperature must be > 0 for training, got 0"),
        *(
            (
                [*rules, *keys.split(" and ")],
                f"grpo.policy_distribution must be sampled with {keys} and {named}, got full: ",
            )
            for rules, keys, named in (
                (
                    ["grpo.sampler_is_correction=true", "sampling.top_p=0.9"],
                    "grpo.sampler_is_mode=sequence_mask",
                    "sampling.top_p",
                ),
                (["sampling.top_p=0.9"], "grpo.off_policy_mask_threshold=0.1", "sampling.top_p"),
                (
                    ["sampling.min_p=0.1", "sampling.top_k=5"],
                    "grpo.sampler_is_correction=true and grpo.loss_type=vespo",
                    "sampling.top_k, sampling.min_p",
                ),
                (
                    ["sampling.forbidden_ids=[3]"],
                    "grpo.old_logprobs=sampler and grpo.loss_type=gmpo",
                    "sampling.forbidden_ids",
                ),
                (
                    ["sampling.min_completion_length=2"],
                    "grpo.old_logprobs=sampler and grpo.importance_sampling_level=sequence",
                    "sampling.min_completion_length",
                ),
            )
        ),
        (
            ["grpo.policy_distribution=sampled", "sampling.repetition_penalty=1.1"],
            "sampling.repetition_penalty must be 1.0 with grpo.policy_distribution=sampled, which does not compute ",
        ),
        (
            ["grpo.prompts_per_step=5"],
            "grpo.prompts_per_step must be <= the number of training rows, got 5 for 4 rows; ",
        ),
        (["grpo.max_tokens_per_microbatch=40"], "grpo.max_tokens_per_microbatch must be >= "),
        (
            ["model.arch.max_position_embeddings=8"],
            "prompt and completion must fit the model's 8 positions, got up to ",
        ),
        (["model.arch.num_kv_heads=3"], "num_heads must be a multiple of num_kv_heads, got 2 and 3"),
        (
            ["optimizer.warmup_updates=2"],
            "optimizer.warmup_updates must be below the run's number of updates (2), got 2",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_updates=3"],
            "optimizer.decay_updates must be at most 2, what the warm-up leaves of the run's 2 updates, got 3; ",
        ),
        (
            ["optimizer.lr_groups=[{pattern: 'layers.*', lr_scale: 0.1}]"],
            "optimizer.lr_groups.0.pattern must match the name of a parameter (* stands for any characters), got ",
        ),
        (["sampling.eos_ids=[999]"], "sampling.eos_ids must be token ids below 259, got [999]"),
        (
            ["grpo.loss_type=cispo"],
            "grpo.epsilon_high must be set with loss_type cispo, where it is the cap of the ratio ",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_told_on_the_command_line(recipe, capsys, overrides, message):
    before = snapshot(recipe.parent)
    with CompileCounter() as compiles:
        assert main(["train", str(recipe), *overrides]) == 2
    assert compiles.count == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert "Traceback" not in captured.err
    assert snapshot(recipe.parent) == before


# Paths on the command line


def test_models_and_prompts_that_cannot_be_are_refused(capsys):
    for arguments, message in (
        (["eval", "~nobody-at-all/run"], "MODEL must be below a home folder that exists"),
        (["sample", "a" * 300, "--prompt", "x"], "MODEL must have at most 255 bytes between slashes"),
        (["sample", "/no/such/run", "--prompt", "x"], "MODEL must be a run folder, .* got '/no/such/run', which does"),
        (
            ["eval", "runs/none"],
            "MODEL must be a run folder, .* got 'runs/none', which does not exist",
        ),
        (["sample", "base.yml", "--prompts", "", "--output", "x"], "--prompts must be a file, got ''"),
    ):
        assert main(arguments) == 2
        assert re.match(f"error: {message}", capsys.readouterr().err)


# A check alone


@pytest.mark.parametrize(
    ("command", "overrides", "steps"), [("train", [], 2), ("sft", ["sft.batch_size=2", "data.eval_size=1"], 200)]
)
def test_a_check_says_what_a_run_would_do_and_changes_nothing(
    recipe, capsys, caplog, monkeypatch, command, overrides, steps
):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    is_cache_on = jax.config.jax_enable_compilation_cache
    before = snapshot(recipe.parent)
    try:
        with CompileCounter() as compiles:
            assert main([command, "--check", str(recipe), *overrides]) == 0
            captured = capsys.readouterr()
            last = captured.out.splitlines()[-1]
            where = recipe.parent / "run"
            assert last == f"grpo {command} would start a run of {steps} steps in {where}; nothing was written"
            assert "read only" not in captured.err + caplog.text
            assert main([command, str(recipe), *overrides, "rewards.functions=[{function: 'nope:f'}]", "--check"]) == 2
            assert "'nope' does not import" in capsys.readouterr().err
            if command == "train":
                failing = f"rewards.functions=[{json.dumps(reward(recipe.parent, 'raises'))}]"
                assert main([command, str(recipe), failing, "--check"]) == 0
                told = (
                    r"\nwarning: on a gold row, reward 'raises' failed on all of 12 .*: exception: KeyError: 'bad' \("
                )
                assert re.search(told, capsys.readouterr().out)
        assert compiles.count == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", is_cache_on)
    assert snapshot(recipe.parent) == before
    assert not (recipe.parent / "__pycache__").exists()


# Weights


@pytest.fixture
def model_folder(tmp_path):
    """A Hugging Face folder in two shards."""
    config = ModelConfig.from_arch("llama", vocab_size=259, **SIZES)
    is_spec = lambda x: hasattr(x, "axes")  # noqa: E731
    params = jax.tree.map(lambda spec: np.full(spec.shape, 0.01, np.float32), parameter_specs(config), is_leaf=is_spec)
    save_folder(tmp_path / "model", config, params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) == 2
    return tmp_path / "model"


def test_missing_weights_are_refused(recipe, model_folder):
    source = (f"model.source={model_folder}", "tokenizer.source=byte")
    shard = model_folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    refuse(recipe, *source, match=rf"{shard} must exist, but it does not; fetch the model again")
    for path in model_folder.glob("*.safetensors*"):
        path.unlink()
    refuse(
        recipe, *source, match=r"must hold model\.safetensors or model\.safetensors\.index\.json, but it has neither"
    )


def test_truncated_weights_are_refused(recipe, model_folder):
    shard = model_folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    source = (f"model.source={model_folder}", "tokenizer.source=byte")
    refuse(recipe, *source, match=rf"{shard} must be a whole safetensors file, got .*; fetch the model again")


def test_a_model_that_is_nowhere_is_refused(recipe):
    source = ("model.source=./no/such/model", "tokenizer.source=byte")
    refuse(recipe, *source, match=r"model\.source must be a Hugging Face folder or a hub id .*which does not exist")
    refuse(
        recipe,
        "model.source=./no/such/export",
        match=r"model\.source must be a Hugging Face folder or a hub id .*got '\./no/such/export', which does not "
        r"exist .*`grpo sft` writes OUTPUT_DIR/export",
    )


def test_a_tokenizer_of_another_model_is_refused(recipe):
    refuse(
        recipe, "model.arch.vocab_size=100", match=r"vocabulary must hold every token id, got 100 entries for .* 259"
    )


# Data


def test_an_evaluation_without_held_out_rows_is_refused_before_anything_is_compiled(recipe):
    with (
        CompileCounter() as compiles,
        pytest.raises(ValueError, match=r"evaluation needs held-out rows, got none; set"),
    ):
        evaluate_source(recipe)
    assert compiles.count == 0


def test_a_prompt_column_that_does_not_exist_is_refused(recipe):
    message = (
        r"data\.columns\.prompt must name a column of .*, got 'question'; the columns are \['answer', 'kind', 'prompt'"
    )
    refuse(recipe, "data.columns.prompt=question", match=message)
    refuse(recipe, f"data.columns.prompt={'a/' * 3000}", match=r"got 'a/.*\.\.\. \(6002 characters\); the columns")


def test_an_empty_data_set_is_refused(recipe):
    write_rows(recipe.parent / "rows.jsonl", [])
    refuse(recipe, match="must hold at least one row, got an empty data set")


def test_prompts_that_are_all_too_long_are_refused(recipe):
    write_rows(recipe.parent / "rows.jsonl", [TOO_LONG] * 4)
    refuse(
        recipe, match=r"data\.max_prompt_length must let a prompt .* through, got 8; the shortest of 4 has 42 tokens"
    )


def test_a_chat_prompt_needs_a_tokenizer_with_a_chat_template(recipe):
    tokenizer = load_tokenizer("byte")
    tokenizer.backend.chat_template = None
    tokenizer.save_pretrained(recipe.parent / "tokenizer")
    overrides = (f"tokenizer.source={recipe.parent / 'tokenizer'}", "data.chat=true")
    refuse(
        recipe,
        *overrides,
        match=r"must have a chat template .*, got none; set tokenizer\.chat_template to .* data\.chat=false",
    )


# Rewards


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "no_such_module:score",
            r"'no_such_module' does not import: ModuleNotFoundError: .*; for a file write its path",
        ),
        ("no_such_file.py:score", r"'no_such_file\.py' does not import: FileNotFoundError: no such file"),
        ("{file}:goood", r"has no attribute 'goood'; did you mean 'good'\?"),
        ("{broken}:score", r"broken\.py' does not import: SyntaxError: "),
        ("{file}:needs_solution", r"nothing provides the argument 'solution' .*Map a dataset column to that name"),
        ("rewards.number", r"function must be 'module:function' or 'path/to/file\.py:function', got 'rewards\.number'"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused(recipe, function, message):
    (recipe.parent / "broken.py").write_text("def score(:\n")
    names = {"file": recipe.parent / "rewards_of_test.py", "broken": recipe.parent / "broken.py"}
    refuse(recipe, f"rewards.functions=[{{function: '{function.format(**names)}'}}]", match=message)


# Disk


def test_too_little_disk_space_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refuse(recipe, match=r"needs about .* free for 2 \+ 1 checkpoints .*; free some space, lower checkpoint\.keep")


def test_a_file_size_limit_below_a_checkpoint_is_refused(recipe):
    command = f"ulimit -f 16; exec {sys.executable} -m rl.grpo_trainer {recipe}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        ["sh", "-c", command], cwd=recipe.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert re.search(
        r"files may be at most [0-9.]+ kB here \(ulimit -f\), a checkpoint of [0-9.]+ kB may need more", result.stderr
    )
    assert not (recipe.parent / "run").exists()


# An output folder that holds something else, and faults of reward functions at run time


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with one reward function that works and six that fail on every fourth completion."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    write_rows(folder / "rows.jsonl", [*ROWS, TOO_LONG])
    functions = json.dumps([reward(folder, name) for name in FUNCTIONS])
    overrides = [f"rewards.functions={functions}", "rewards.timeout_seconds=1.0"]
    with (folder / "stdout").open("w") as file:
        stdout, sys.stdout = sys.stdout, file
        try:
            train(load_config(recipe, [*overrides, "mesh.num_devices=1", "mesh.data=1"]))
        finally:
            sys.stdout = stdout
    return recipe, overrides


@pytest.fixture
def run_of_someone(finished, tmp_path):
    """A copy of the finished run: (its recipe, its overrides)."""
    recipe, overrides = finished
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    return recipe, [*overrides, f"output_dir={tmp_path / 'run'}"]


def test_a_folder_with_another_run_is_refused(run_of_someone, tmp_path):
    recipe, overrides = run_of_someone
    before = snapshot(tmp_path)
    for change, difference in (
        ("model.arch.hidden_size=32", r"model\.arch\.hidden_size was 16, is 32"),
        ("optimizer.lr=1e-3", r"optimizer\.lr was 1e-06, is 0\.001"),
        ("grpo.beta=0.1", r"grpo\.beta was 0\.0, is 0\.1"),
    ):
        refuse(
            recipe,
            *overrides,
            change,
            match=rf"holds another run: {difference}, which changes what a step computes; give it the old value",
        )
    assert main(["sft", str(recipe), *overrides, "sft.batch_size=2"]) == 2
    assert snapshot(tmp_path) == before


def test_a_check_of_a_run_that_is_there_says_where_it_would_go_on(run_of_someone, tmp_path, capsys):
    recipe, overrides = run_of_someone
    before = snapshot(tmp_path)
    train(load_config(recipe, [*overrides, "grpo.steps=9"]), check_only=True)
    assert "grpo train would go on from step 2 of 9 in" in capsys.readouterr().out
    train(load_config(recipe, overrides), check_only=True)
    assert "the run has 2 steps already and grpo.steps is 2: nothing is left to do" in capsys.readouterr().out
    train(load_config(recipe, [*overrides, "checkpoint.overwrite=true"]), check_only=True)
    assert "grpo train would start a run of 2 steps in" in capsys.readouterr().out
    for change, message in (("optimizer.lr=1e-3", "holds another run"), ("mesh.data=3", "mesh sizes must multiply")):
        with pytest.raises(ValueError, match=message):
            train(load_config(recipe, [*overrides, change]), check_only=True)
    assert snapshot(tmp_path) == before


def test_a_folder_with_something_else_is_refused(recipe):
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "thesis.tex").write_text("mine")
    for overwrite in ("false", "true"):
        refuse(
            recipe,
            f"checkpoint.overwrite={overwrite}",
            match=r"output_dir must be empty or hold a run, got .*thesis\.tex",
        )


def test_a_bad_start_with_overwrite_leaves_the_old_run(run_of_someone, tmp_path):
    recipe, overrides = run_of_someone
    before = snapshot(tmp_path)
    for change, message in (
        ("rewards.functions=[{function: 'no_such_module:score'}]", "does not import"),
        ("mesh.data=3", "mesh sizes must multiply"),
        ("grpo.max_tokens_per_microbatch=40", r"max_tokens_per_microbatch must be >="),
        ("data.columns.prompt=question", "must name a column"),
        ("sampling.forbidden_ids=[99999]", r"sampling\.forbidden_ids must be on token ids below .* \(259\)"),
        ("sampling.logit_bias={99999: 1.0}", r"sampling\.logit_bias must be on token ids below .* \(259\)"),
        ("sampling.slots=4", r"sampling\.slots must be >= 8"),
        ("sampling.kv_memory=1e-12", r"sampling\.kv_memory must allow at least one completion of 16 tokens"),
        ("mesh.rules={heds: [fsdp]}", r"mesh\.rules"),
    ):
        refuse(recipe, *overrides, "checkpoint.overwrite=true", change, match=message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sampling.forbidden_ids=[99999]", r"sampling\.forbidden_ids must be on token ids below .* \(259\)"),
        ("sampling.slots=4", r"sampling\.slots must be >= 8"),
        ("sampling.kv_memory=1e-12", r"sampling\.kv_memory must allow at least one completion of 16 tokens"),
    ],
)
def test_fine_tuning_that_could_not_be_evaluated_leaves_the_old_run(recipe, change, message):
    folder = recipe.parent / "run"
    (folder / "checkpoints" / "1").mkdir(parents=True)
    for name in ("run.json", "config.yml", "metrics.jsonl"):
        (folder / name).write_text("{}\n")
    changes = ["sft.batch_size=2", "data.eval_size=1", "checkpoint.overwrite=true", change]
    before = snapshot(recipe.parent)
    with CompileCounter() as compiles, pytest.raises(ValueError, match=message):
        sft_trainer.train(load_config(recipe, changes))
    assert compiles.count == 0
    assert snapshot(recipe.parent) == before


def test_a_checkpoint_of_another_model_is_refused_by_path(run_of_someone, tmp_path):
    recipe, overrides = run_of_someone
    config = load_config(recipe, [*overrides, f"output_dir={tmp_path / 'other'}"])
    other = ModelConfig.from_arch("llama", vocab_size=259, **{**SIZES, "num_layers": 2})
    policy = policy_from_config(config, other)
    init_state_fn = InitStateFn(policy, create_training_optimizer(config, policy)[1], 0)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run" / "run.json", tmp_path / "other")  # else it would be set aside, as of another run
    checkpoints = create_checkpoint_manager(config, create_mesh(config.mesh), init_state_fn)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), checkpoints.abstract.shapes)
    checkpoints.save(9, jax.device_put(zeros, checkpoints.abstract.shardings), {"step": 9})
    checkpoints.close()
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9", tmp_path / "run" / "checkpoints" / "9")
    before = snapshot(tmp_path)
    refuse(recipe, *overrides, match=r"weights of .*checkpoints/9 do not fit the model: unexpected \['layers_1'\]")
    assert snapshot(tmp_path) == before


def test_prompts_that_are_too_long_are_dropped_and_reported(finished):
    output = (finished[0].parent / "stdout").read_text()
    assert "dropped 1 of 5 prompts of data.source longer than data.max_prompt_length=8 tokens" in output
    assert "4 train, 0 held out" in output


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("wrong_count", "wrong_length"),
        ("strings", "not_a_number"),
        ("nan", "not_a_number"),
        ("raises", "exception"),
        ("hangs", "timeouts"),
        ("dies", "crash"),
    ],
)
def test_a_reward_that_fails_at_run_time_is_counted_shown_and_never_zero(finished, name, failure):
    folder = finished[0].parent
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line[f"reward/{name}/{failure}"] == 2  # one row of four, two completions each
        assert line[f"reward/{name}/mean"] == 1.0  # of those that were judged
    for sample in read_samples(folder / "run"):
        assert sample["rewards"][name] == (None if sample["prompt"] == ROWS[0]["prompt"] else 1.0)
    output = (folder / "stdout").read_text()
    gold = [
        line
        for line in output.splitlines()
        if line.startswith("warning: on a gold row,") and f"reward '{name}'" in line
    ]
    assert gold
    assert f"warning: reward '{name}' " in output  # and again at the step itself


def test_failing_rewards_stop_and_poison_nothing(finished):
    run = finished[0].parent / "run"
    for line in read_metrics(run):
        for key in ("reward/mean", "reward/good/mean", "loss", "grad_norm", "advantage/std"):
            assert np.isfinite(line[key]), key
        assert line["grad_norm"] > 0
        assert line["masked_share"] == 0.0  # `good` judged every row
        lost = [
            key for key in line if re.fullmatch("reward/good/(errors|timeouts|retries|" + "|".join(COUNTS) + ")", key)
        ]
        assert [line[key] for key in lost] == [0, 0, 0]
    assert "on a gold row, reward 'good'" not in (run.parent / "stdout").read_text()
    assert (run / "checkpoints" / "2").is_dir()
