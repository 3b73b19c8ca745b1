"""Refilled groups and the overlong punishment: on groups made by hand, and in whole runs that are resumed."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from rl.config.load import load_config
from rl.data.order import Order, order_of
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh
from rl.grpo_trainer import train
from rl.rollout.groups import Judged
from rl.rollout.scoring import start_rewards
from rl.rollout.step_prompts import check_calls, collect, has_spread
from rl.run.metrics import read_metrics, read_samples
from rl.sampler.contract import Completion
from rl.sampler.create import create_sampler
from rl.tools.samples.replay import compare, draw_again
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS

RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:flat_for_even_answers", name: flat}}]}}
sampling: {{max_completion_length: 6}}
grpo: {{steps: 4, prompts_per_step: 4, group_size: 3, max_tokens_per_microbatch: 64, dynamic_sampling_rounds: 2}}
optimizer: {{lr: 1e-2}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
checkpoint: {{every: 2}}
logging: {{samples_per_step: 12}}
"""


def recipe(folder: pathlib.Path, *overrides: str):
    path = folder / "recipe.yml"
    path.write_text(RECIPE)
    return load_config(path, [f"output_dir={folder / 'run'}", *overrides])


def stable(folder: pathlib.Path) -> list[dict]:
    """The lines of the steps, without what depends on the machine and without evaluations."""
    lines = [line for line in read_metrics(folder) if line["step"]]
    return [{k: v for k, v in steady(line).items() if not k.startswith("eval/")} for line in lines]


def final_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    tree = ocp.StandardCheckpointer().restore((folder / "checkpoints" / str(steps[-1]) / "state").absolute())
    return {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def loop_record(folder: pathlib.Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / str(step) / "loop" / "metadata").read_text())


# On groups made by hand


class Draws:
    """Draws groups of two completions; prompts whose number is in `useful` have two different rewards."""

    def __init__(self, useful: set[int]):
        self.useful = useful
        self.asked: list[tuple[list[int], list[int]]] = []

    def __call__(self, rows: Sequence[PromptRow], indices: Sequence[int]) -> Judged:
        self.asked.append(([row.index for row in rows], list(indices)))
        texts = [f"{row.index}/{sample}" for row in rows for sample in range(2)]
        rewards: list[list[float | None]] = [
            [float(sample and row.index in self.useful)] for row in rows for sample in range(2)
        ]
        counts = {"right": {"none": 0, "exception": len(rows)}}
        completions: list[list[Completion]] = [[None, None] for _ in rows]  # pyright: ignore[reportAssignmentType]
        return Judged(list(rows), completions, texts, rewards, ["right"], [1.0], counts, ["slow"])


def prompt_rows(count: int) -> list[PromptRow]:
    return [PromptRow(str(i), np.array([i], np.int32), {}, i) for i in range(count)]


def collected_from(config, rows: list[PromptRow], position: int, step: int, draw: Draws) -> Judged:
    return collect(config, rows, Order([len(rows)], config.seed, config.grpo.prompts_per_step), position, step, draw)


def next_indices(num_rows, seed, position, count, prompts_per_step, taken=()):
    return Order([num_rows], seed, prompts_per_step).take(position, count, taken)


def step_indices(num_rows, seed, step, prompts_per_step):
    """The rows of a step of a run without mixture, curriculum and refills."""
    return Order([num_rows], seed, prompts_per_step).step(step)


def test_groups_without_spread_are_replaced_by_the_next_prompts_of_the_same_order(tmp_path):
    config = recipe(tmp_path, "grpo.group_size=2", "grpo.dynamic_sampling_rounds=5")
    rows = prompt_rows(20)
    order = next_indices(20, config.seed, 4, 10, 4)[0]
    a, b, c, d, e, f, g, *_ = order
    # Of the first four, the second and fourth are flat; of the two that come next the first is, too; then one is drawn.
    draw = Draws({a, c, f, g})
    collected = collected_from(config, rows, 4, 7, draw)
    assert draw.asked == [([a, b, c, d], [0, 1, 2, 3]), ([e, f], [4, 5]), ([g], [6])]
    assert [row.index for row in collected.rows] == [a, f, c, g]
    assert collected.texts == [f"{i}/{sample}" for i in (a, f, c, g) for sample in range(2)]
    assert collected.rewards == [[0.0], [1.0]] * 4
    assert (collected.position, collected.weights_step) == (4 + 7, 7)
    values = {"refilled": 2, "unfilled": 0, "rounds": 2, "prompts": 7}
    assert collected.metrics == {f"dynamic_sampling/{name}": value for name, value in values.items()}
    assert collected.counts == {"right": {"none": 0, "exception": 7}}
    assert collected.problems == ["slow"]


def test_the_run_goes_on_with_what_it_has_when_the_rounds_or_the_rows_are_used_up(tmp_path):
    two_rounds = collected_from(recipe(tmp_path, "grpo.group_size=2"), prompt_rows(20), 0, 0, draw := Draws(set()))
    assert [len(rows) for rows, _ in draw.asked] == [4, 4, 4]
    assert two_rounds.position == 12
    assert two_rounds.metrics["dynamic_sampling/unfilled"] == 4
    assert "4 of 4 groups still have equal rewards after 2 rounds and 12 prompts" in two_rounds.problems[-1]
    assert [row.index for row in two_rounds.rows] == draw.asked[0][0]
    # Six rows: one round of two, then no row is left that this step has not seen.
    few = collected_from(recipe(tmp_path, "grpo.group_size=2"), prompt_rows(6), 0, 0, draw := Draws(set()))
    assert [len(rows) for rows, _ in draw.asked] == [4, 2]
    assert (few.position, few.metrics["dynamic_sampling/rounds"]) == (6, 1)


def test_groups_that_nothing_could_judge_are_not_put_down_to_the_prompts(tmp_path):
    class Unjudged(Draws):
        def __call__(self, rows: Sequence[PromptRow], indices: Sequence[int]) -> Judged:
            judged = super().__call__(rows, indices)
            failed = [row.index in (draw.asked[0][0][0], draw.asked[0][0][2]) for row in rows for _ in range(2)]
            rewards = [[None] if lost else row for row, lost in zip(judged.rewards, failed, strict=True)]
            return dataclasses.replace(judged, rewards=rewards)

    draw = Unjudged(set())
    collected = collected_from(recipe(tmp_path, "grpo.group_size=2"), prompt_rows(20), 0, 0, draw)
    _, first, second = collected.problems
    assert "2 of 4 groups still have no reward at all after 2 rounds and 12 prompts" in first
    assert "less easy" not in first
    assert "2 of 4 groups still have equal rewards after 2 rounds and 12 prompts" in second


def test_a_weighted_function_of_whole_batches_is_refused_beside_refills(tmp_path):
    def functions(**fields: Any) -> str:
        return f"rewards.functions={json.dumps([{'function': f'{REWARDS}:rank_in_batch', 'name': 'rank', **fields}])}"

    message = r"dynamic_sampling_rounds must be 0 .* got 2 with 'rank' \(.* gave other rewards .*needs_group: true"
    with pytest.raises(ValueError, match=message):
        train(recipe(tmp_path, functions()))
    assert not (tmp_path / "run").exists()
    for fields, override in (
        ({"weight": 0.0}, "grpo.dynamic_sampling_rounds=2"),
        ({"needs_group": True}, "grpo.dynamic_sampling_rounds=2"),
        ({}, "grpo.dynamic_sampling_rounds=0"),
    ):
        config = recipe(tmp_path, functions(**fields), override)
        with start_rewards(config, prompt_rows(2), None, create_mesh(config.mesh)) as runner:
            check_calls(config, runner)


SHY = """
def shy(completions):
    '''Compares, but not the completions of the start-up check.'''
    known = len(completions) == 1 or any("Let us see" in c for c in completions)
    return [len(c) / (1 if known else max(map(len, completions)) or 1) for c in completions]
"""


def test_a_comparison_found_in_the_run_is_warned_of_once_kept_and_refused_beside_refills(tmp_path, capsys):
    (tmp_path / "shy.py").write_text(SHY)
    functions = f"rewards.functions={json.dumps([{'function': f'{tmp_path}/shy.py:shy', 'name': 'shy'}])}"
    with pytest.raises(
        ValueError, match=r"dynamic_sampling_rounds must be 0 .* 'shy' \(in a batch of this run .*needs"
    ):
        train(recipe(tmp_path, functions, "sampling.slots=8"))
    capsys.readouterr()
    settings = (functions, "grpo.dynamic_sampling_rounds=0", "eval.every=2", "data.eval_size=5", "sampling.slots=8")
    (tmp_path / "whole").mkdir()
    whole = train(recipe(tmp_path / "whole", *settings))
    told = capsys.readouterr()
    assert (told.out + told.err).count("'shy' is called with whole batches, for in a batch of this run") == 1
    assert (told.out + told.err).count("evaluation leaves out shy") == 1
    assert "eval/reward/shy/mean" in read_metrics(whole)[0]
    for start in range(0, 48, 12):
        batch = read_samples(whole)[start : start + 12]
        lengths = [len(sample["completion"]) for sample in batch]
        assert [sample["rewards"]["shy"] for sample in batch] == [length / max(lengths) for length in lengths]
    loop = json.loads((whole / "checkpoints" / "2" / "loop" / "metadata").read_text())
    assert (loop["reward_calls"], loop["reward_doubts"]) == ({"shy": "whole_batch"}, {})


def test_without_dynamic_sampling_there_is_one_draw_and_no_metric(tmp_path):
    config = recipe(tmp_path, "grpo.group_size=2", "grpo.dynamic_sampling_rounds=0")
    collected = collected_from(config, prompt_rows(20), 8, 0, draw := Draws(set()))
    assert draw.asked == [(step_indices(20, config.seed, 2, 4), [0, 1, 2, 3])]
    assert (collected.position, collected.metrics, collected.problems) == (12, {}, ["slow"])


def test_spread_is_that_of_the_weighted_rewards_that_are_known():
    def judged(*rewards):
        return Judged([], [[None] * len(rewards)], [], list(rewards), ["a", "b"], [1.0, 0.0], {}, [])  # pyright: ignore

    assert has_spread(judged([0.0, 1.0], [1.0, 1.0]), 0)
    assert not has_spread(judged([1.0, 0.0], [1.0, 1.0]), 0)  # the second is a metric only
    assert not has_spread(judged([1.0, 0.0], [None, None]), 0)
    assert not has_spread(judged([None, None], [None, None]), 0)


def test_next_rows_pass_over_those_taken_and_cross_epochs_without_a_repetition():
    first, position = next_indices(10, 3, 0, 7, 4)
    assert (first, position) == ([*step_indices(10, 3, 0, 4), *step_indices(10, 3, 1, 4)][:7], 7)
    rest, position = next_indices(10, 3, position, 3, 4, first)
    assert sorted(first + rest) == list(range(10))
    assert position == 10
    # From the middle of an epoch to the next: whatever comes twice in the order is chosen once.
    chosen, position = next_indices(10, 3, 6, 8, 4)
    assert len(set(chosen)) == 8
    assert position >= 14
    assert next_indices(10, 3, position, 2, 4)[0] != chosen[:2]


# In whole runs

# Few rows, so that those measured in one epoch of the run have their turn in the next.
CURRICULUM = ("data.eval_size=5", "data.args.size=24", "data.curriculum.by=pass_rate", "data.curriculum.floor=0.5")


class Whole(NamedTuple):
    """A run with evaluations, and the keys of its sampler's programs when all was warm and at the end."""

    folder: pathlib.Path
    warm: set
    last: set


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    samplers, warm = [], set()

    def create(*args: Any, **options: Any) -> Any:
        sampler: Any = create_sampler(*args, **options)
        warm_up = sampler.warm_up

        def warm_up_and_wait(*args: Any) -> None:
            warm_up(*args)
            sampler.engine.programs.wait()
            warm.update(sampler.engine.programs)

        sampler.warm_up = warm_up_and_wait
        samplers.append(sampler)
        return sampler

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.grpo_trainer.create_sampler", create)
        run = train(recipe(folder, "eval.every=1", *CURRICULUM, "sampling.warm_up=true"))
    return Whole(run, warm, set(samplers[-1].engine.programs))


def test_refills_and_evaluations_compile_nothing_after_the_warm_up(whole):
    lines = read_metrics(whole.folder)
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 1, 2, 3, 4]
    assert len({line["dynamic_sampling/prompts"] for line in lines[1:]} - {4}) > 1, "refills of different sizes"
    assert whole.last == whole.warm
    assert [line["compiles"] for line in lines[2:]] == [0, 0, 0]


def test_a_run_resumed_in_the_other_flavour_refills_as_the_uninterrupted_one(tmp_path, whole, capsys):
    whole = whole.folder
    lines = read_metrics(whole)[1:]
    assert sum(line["dynamic_sampling/refilled"] for line in lines) > 2
    assert any(line["dynamic_sampling/rounds"] == 2 for line in lines)
    used = np.cumsum([line["dynamic_sampling/prompts"] for line in lines])
    assert used[1] > 2 * 4
    records = [loop_record(whole, step) for step in (2, 4)]
    positions = [19 * r["epoch"] + r["position"] for r in records]
    assert positions[0] >= used[1]
    assert positions[1] > used[3] > 19  # turns of rows outside of the band were left out
    assert 0 < len(records[0]["curriculum"]["rates"]) / 19 == lines[1]["curriculum/known"] <= 1
    halves = f"output_dir={tmp_path / 'halves'}", *CURRICULUM
    train(recipe(tmp_path, *halves, "grpo.steps=2"))
    train(recipe(tmp_path, *halves, "pure_nnx=false"))
    assert stable(whole) == stable(tmp_path / "halves")
    assert read_samples(whole) == read_samples(tmp_path / "halves")
    left, right = final_weights(whole), final_weights(tmp_path / "halves")
    assert left.keys() == right.keys()
    for path, array in left.items():
        np.testing.assert_array_equal(array, right[path], err_msg=path)
    # With steps of another size the run goes on at its place, in the order that it began with.
    train(smaller := recipe(tmp_path, *halves, "grpo.steps=5", "grpo.prompts_per_step=2"))
    assert "steps take 2 prompts from here on; the run began with 4" in capsys.readouterr().out
    assert loop_record(tmp_path / "halves", 5)["order_prompts_per_step"] == 4
    data = load_prompts(smaller, load_tokenizer("byte"))
    order = order_of(smaller.data, data, smaller.seed, 4)
    order.curriculum.restore(records[1]["curriculum"])
    num_prompts = int(read_metrics(tmp_path / "halves")[-1]["dynamic_sampling/prompts"])
    rows = order.take(positions[1], num_prompts)[0]
    samples = [sample for sample in read_samples(tmp_path / "halves") if sample["step"] == 5]
    assert len({sample["prompt_index"] for sample in samples}) == 2
    assert all(sample["prompt"] == data.train[rows[sample["prompt_index"]]].prompt for sample in samples)
    # A refilled group has a number of its own in the step, and with it random numbers of its own.
    assert max(sample["prompt_index"] for sample in read_samples(whole)) >= 4
    assert len({(s["step"], s["prompt_index"]) for s in read_samples(whole)}) == 16


def test_refilled_completions_are_drawn_again_alone(whole):
    records = [record for record in read_samples(whole.folder) if record["prompt_index"] >= 4]
    for step in (1, 3):
        record = next(record for record in reversed(records) if record["step"] == step)
        place = record["step"], record["prompt_index"], record["sample_index"]
        replayed = draw_again(whole.folder, *place)
        assert replayed.text == record["completion"]
        assert replayed.completion.token_ids.tolist() == record["token_ids"]
        assert compare(whole.folder, replayed)[0]
    num_prompts = int(read_metrics(whole.folder)[1]["dynamic_sampling/prompts"])
    with pytest.raises(ValueError, match=f"PROMPT must be from 0 to {num_prompts - 1}, got {num_prompts}"):
        draw_again(whole.folder, 1, num_prompts, 0)


def test_overlong_completions_are_punished_and_it_shows_as_a_metric_of_its_own(tmp_path):
    settings = (
        "rewards.overlong_buffer=0.5",
        "rewards.overlong_factor=0.25",
        "grpo.steps=2",
        "sampling.slots=8",
        f"sampling.eos_ids={list(range(60, 120))}",
    )
    folder = train(recipe(tmp_path, *settings, "grpo.dynamic_sampling_rounds=0"))
    # At most 6 tokens, the last 3 of them the buffer: 4 tokens cost 1/3, 5 cost 2/3, 6 cost 1.
    expected = {1: 0.0, 2: 0.0, 3: 0.0, 4: -1 / 3, 5: -2 / 3, 6: -1.0}
    samples = read_samples(folder)
    assert all(sample["rewards"]["overlong"] == pytest.approx(expected[sample["num_tokens"]]) for sample in samples)
    assert len({sample["rewards"]["overlong"] for sample in samples}) > 2
    for line in read_metrics(folder):
        mine = [sample["rewards"] for sample in samples if sample["step"] == line["step"]]
        assert len(mine) == 12
        assert line["reward/overlong/mean"] == pytest.approx(np.mean([r["overlong"] for r in mine]))
        assert line["reward/mean"] == pytest.approx(np.mean([r["flat"] + 0.25 * r["overlong"] for r in mine]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.overlong_buffer=512"], r"must be in \[0, 1\], a share of sampling\.max_completion_length.* got 512"),
        (["rewards.overlong_buffer=-0.1"], r"rewards\.overlong_buffer must be in \[0, 1\].* got -0\.1"),
        (["grpo.dynamic_sampling_rounds=-1"], r"grpo\.dynamic_sampling_rounds must be >= 0, got -1"),
        (
            ["rewards.overlong_buffer=0.2", "rewards.functions=[{function: a:b, name: overlong}]"],
            "must not name a function 'overlong' while rewards.overlong_buffer is set",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
