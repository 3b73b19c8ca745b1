"""`rl.train` and `rl.load`: objects where a recipe names files, and a run folder as the commands leave one."""

import json
import os
import shutil
import signal
import subprocess
import sys

import datasets
import pytest

import rl
from rl.api import _overrides, _read_objects, load, train
from rl.cli import main
from rl.config.load import load_config
from rl.config.objects import Objects, check_given, given
from rl.data.prompts import load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.run_folder.contents import read_json
from tests.helpers.places import REWARDS, ROOT

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
ARCH = {"family": "llama", "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}
TINY = {
    "model": {"arch": {**ARCH, "num_kv_heads": 1, "head_dim": 8}},
    "sampling": {"max_completion_length": 4},
    "grpo": {"steps": 2, "prompts_per_step": 2, "group_size": 2},
    "mesh": {"num_devices": 1},
    "optimizer": {"lr": 3e-3},
    "checkpoint": {"every": 1},
    "eval": {"every": 0},
}
DATA = {"source": ROWS, "eval_size": 2, "max_prompt_length": 8}
GOAL = [2]


def length_share(completion):
    return len(completion) / GOAL[0]


def made(bonus):
    def my_reward(completion, answer):
        return bonus + float(answer in completion)

    return my_reward


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    rewards = [made(0.25), {"function": lambda completion: -float(len(completion)), "name": "short", "weight": 0.1}]
    return train(data=DATA, rewards=rewards, output_dir=folder, **{**TINY, "eval": {"every": 2}})


def test_import_rl_imports_nothing_heavy():
    code = "import sys, rl; print([name for name in sys.modules if name.partition('.')[0] in {heavy}])"
    heavy = {"jax", "numpy", "yaml", "pydantic", "rich", "datasets", "pandas", "cloudpickle"}
    printed = subprocess.run(
        [sys.executable, "-c", code.format(heavy=heavy)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert printed.stdout == "[]\n"
    assert rl.train is train
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rl.trian  # noqa: B018


@pytest.mark.slow
def test_the_metrics_of_a_run_are_a_table_by_step(run):
    assert list(run.metrics.index) == [0, 1, 2]
    assert run.metrics.loc[1, "reward/my_reward/mean"] >= 0.25
    assert (run.metrics["reward/short/mean"].dropna() <= 0).all()


@pytest.mark.slow
def test_the_run_folder_names_objects_and_has_their_hashes(run):
    config = load_config(run.path / "config.yml")
    assert [entry.function for entry in config.rewards.functions] == ["<object my_reward>", "<object short>"]
    assert config.data.source == "<object rows>"
    hashes = read_json(run.path / "run.json")["reward_functions"]
    assert sorted(hashes) == ["my_reward", "short"]


@pytest.mark.slow
def test_a_run_evaluates_and_samples_and_exports_itself(run, tmp_path):
    result = run.evaluate()
    assert result.num_prompts == 2
    assert result.means["my_reward"] >= 0.25
    assert "samples" not in repr(result)
    table = run.sample(["2+2=", "1+1="], n=2, temperature=0.5)
    assert list(zip(table["prompt_index"], table["sample_index"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(table["prompt"][:2]) == ["2+2=", "2+2="]
    assert list(run.sample("2+2=", n=2, temperature=0.5)["completion"]) == list(table["completion"][:2])
    assert (run.export(tmp_path / "folder") / "config.json").is_file()


@pytest.mark.slow
def test_a_run_of_another_session_asks_for_its_objects_again(run, capsys):
    again = load(run.path)
    assert again.metrics.equals(run.metrics)
    assert again.config == run.config
    with pytest.raises(
        ValueError, match=r"'<object my_reward>', a function of the Python session.*rl.load\(RUN, rewar"
    ):
        again.evaluate()
    with pytest.raises(ValueError, match=r"data.source is '<object rows>', rows of the .*rl.load\(RUN, data=ROWS\)"):
        load(run.path, rewards=[made(0.0)]).evaluate()
    assert load(run.path, rewards=[made(0.5)], data=ROWS).evaluate().means["my_reward"] >= 0.5
    assert main(["eval", str(run.path)]) == 2
    assert "error: rewards.functions holds '<object my_reward>'" in capsys.readouterr().err
    named = [f"rewards.functions=[{{function: '{REWARDS}:digit_share'}}]", "data.source=arithmetic", "data.columns={}"]
    assert main(["eval", str(run.path), *named, "data.args={operation: add, digits: 1}"]) == 0


def test_objects_are_given_for_the_time_of_a_run_only():
    config = load_config(None, ['data.source="<object rows>"'])
    with pytest.raises(ValueError, match=r"data.source is '<object rows>'"):
        load_prompts(config, load_tokenizer("byte", None))
    with given(Objects(rows={"<object rows>": ROWS})):
        assert len(load_prompts(config, load_tokenizer("byte", None)).train) == len(ROWS)


@pytest.mark.slow
def test_a_source_of_a_mixture_may_be_rows_of_the_session(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "c", "answer": "3"}')
    given_rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    layer, objects = _read_objects(None, {"sources": [str(path), {"source": given_rows, "name": "mine"}]}, None)
    config = load_config(None, _overrides(layer))
    with given(objects):
        data = load_prompts(config, load_tokenizer("byte"))
    assert [row.prompt for row in data.train] == ["c", "a", "b"]
    assert data.train[1].columns == {"data_source": "mine", "answer": "1"}
    with pytest.raises(ValueError, match=r"data\.sources\.1\.source is '<object rows of source 1>'"):
        check_given(config)


def test_a_second_run_in_a_session_is_its_own_and_goes_on_with_the_same_function_only(run, tmp_path):
    again = {"data": DATA, "rewards": [made(0.75)], "output_dir": tmp_path / "run", **TINY}
    second = train(**again)
    assert second.metrics["reward/my_reward/mean"].min() >= 0.75
    again["grpo"] = {**TINY["grpo"], "steps": 3}
    train(**{**again, "rewards": [made(0.75)], "data": {**DATA, "source": datasets.Dataset.from_list(ROWS)}})
    assert list(second.metrics.index) == [1, 2, 3]
    with pytest.raises(
        ValueError, match=r"the reward_functions of the run in .* was .*'my_reward'.*another output_dir"
    ):
        train(**{**again, "rewards": [made(0.5)]})
    with pytest.raises(ValueError, match=r"holds another run: .*optimizer.lr was 0.003, is 0.1"):
        train(**{**again, "optimizer": {"lr": 0.1}})


@pytest.mark.slow
def test_an_interrupt_saves_and_gives_the_session_its_own_handler_back(tmp_path, capsys):
    asked = []

    def interrupts(completion, pid):
        if not asked:
            os.kill(pid, signal.SIGINT)
            asked.append(pid)
        return float(len(completion))

    def own_handler(number, frame):
        raise AssertionError("the run handles interrupts while it trains")

    before = signal.signal(signal.SIGINT, own_handler)
    try:
        run = train(
            data={**DATA, "eval_size": 0},
            rewards={
                "functions": [{"function": interrupts, "kwargs": {"pid": os.getpid()}}],
                "check_on_gold": False,
            },
            output_dir=tmp_path / "run",
            **{**TINY, "grpo": {**TINY["grpo"], "steps": 50, "prompts_per_step": 1}},
        )
        assert signal.getsignal(signal.SIGINT) is own_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(run.metrics.index) == [1]
    assert (tmp_path / "run/checkpoints/1").is_dir()
    saved = f"saved step 1 of 50 in {tmp_path / 'run'}; the same command goes on"
    assert capsys.readouterr().out.splitlines()[-1] == saved


RECIPE = "model: {source: some/model}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": [1]}, r"rewards\[0\] must be a function, the name of one .*got 1"),
        ({"rewards": [dict]}, r"rewards\[0\] must be a function.*got <class 'dict'>"),
        ({"rewards": made(0.0)}, r"rewards must be a list of functions, got <function.*write rewards=\[FUNCTION\]"),
        ({"rewards": [made(0.0), made(1.0)]}, "distinct names, got .'my_reward', 'my_reward'"),
        ({"data": [{"question": "1+1="}]}, "data.columns.prompt must name a column of '<object rows>', got 'prompt'"),
        ({"data": {"prompt": ["1+1="]}}, "unknown config key 'data.prompt'"),
        ({"data": ["1+1="]}, "data.source must be rows, each a dict with 'prompt'"),
        ({"data": [{"prompt": "1", "answer": object()}]}, "data.source row 0: column 'answer' must hold numbers, text"),
        ({"data": datasets.DatasetDict()}, "data.source must be one split, whole, got a DatasetDict"),
        (
            {"data": datasets.Dataset.from_list(ROWS).to_iterable_dataset()},
            r"read again .*name what it reads, as in data=",
        ),
        ({"data": {"source": ROWS, "streaming": True}}, "data.streaming must be false for rows that are given as an"),
        ({"data": {"source": ROWS, "args": {"n": 1}}}, "data.args must be empty for rows that are given"),
        ({"data": []}, "must hold at least one row"),
        ({"grop": {"steps": 1}}, "unknown config key 'grop.steps'; did you mean 'grpo.steps'"),
        ({"grpo": 5}, "grpo must be a mapping of keys, got 5"),
        ({"grpo": {"steps": object()}}, "grpo must hold plain values, as a recipe does"),
        ({"output_dir": None}, "output_dir must be set"),
        ({"distributed": {"num_processes": 2}}, "rl.train must run in one process"),
        ({"rewards": ["<object gone>"]}, "rewards.functions holds '<object gone>'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, message, tmp_path):
    plain = {"data": DATA, "rewards": [made(0.0)], "output_dir": tmp_path / "run", **TINY}
    with pytest.raises(ValueError, match=message):
        train(**{**plain, **arguments})
    assert not (tmp_path / "run").exists()


def test_a_model_beside_a_recipe_that_has_one_is_refused(tmp_path):
    (tmp_path / "recipe.yml").write_text(RECIPE)
    with pytest.raises(
        ValueError, match=r"model must be left out with .*recipe.yml', which has model.source 'some/mod"
    ):
        train(tmp_path / "recipe.yml", model="other/model")


@pytest.mark.slow
def test_keywords_are_laid_over_a_recipe_and_overrides_over_them(tmp_path):
    (tmp_path / "recipe.yml").write_text(json.dumps({**TINY, "seed": 5}))
    run = train(
        tmp_path / "recipe.yml",
        data=DATA,
        rewards=["rewards.number:exact_number_strict", {"function": length_share, "weight": 0.5}],
        output_dir=tmp_path / "run",
        grpo={"steps": 3},
        overrides=["grpo.steps=1"],
    )
    config = run.config
    assert (config.seed, config.grpo.steps, config.grpo.group_size) == (5, 1, 2)
    names = ["rewards.number:exact_number_strict", "<object length_share>"]
    assert [entry.function for entry in config.rewards.functions] == names


@pytest.mark.slow
def test_a_run_without_a_step_has_an_empty_table(run, tmp_path):
    for name in ("config.yml", "run.json"):
        shutil.copy(run.path / name, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert len(load(tmp_path).metrics) == 0


@pytest.mark.slow
def test_a_run_refuses_no_prompt_and_a_wrong_number(run):
    with pytest.raises(ValueError, match="needs at least one prompt"):
        run.sample([])
    with pytest.raises(ValueError, match="must be a whole number >= 1, got 0"):
        run.sample("a", n=0)
    with pytest.raises(ValueError, match=r"unknown config key 'sampling.temprature'; did you mean"):
        run.sample("a", temprature=1)
    with pytest.raises(ValueError, match="must be a run folder"):
        load(ROOT)
