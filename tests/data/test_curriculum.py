"""Curricula: rows by a column and by pass rates that are measured."""

import json

import numpy as np
import pytest

from rl.config.load import load_config
from rl.data.order import Order, order_of
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import PairData, PromptData
from rl.run.checks import check_recipe
from rl.sampler.token_draw import SamplingParams

SIZE = 40


def data(column=None, values=()):
    rows = [
        PromptRow(str(n), np.array([n], np.int32), {} if column is None else {column: values[n]}, n, f"row {n}")
        for n in range(SIZE)
    ]
    return PromptData(rows, [], SIZE, 0, [])


def order(rows, *overrides, prompts=4):
    config = load_config(None, [f"data.curriculum.{text}" for text in overrides])
    return order_of(config.data, rows, 3, prompts)


def take_all(made, count, position=0):
    """The rows of the next draws, four at a time."""
    rows = []
    while len(rows) < count:
        taken, position = made.take(position, 4)
        rows += taken
    return rows


def test_without_a_curriculum_the_order_is_that_of_the_rows_alone():
    assert order(data(), "by=null").curriculum is None


@pytest.mark.parametrize("easy", ["low", "high"])
def test_a_column_orders_each_epoch_from_easy_to_hard(easy):
    levels = [str(n % 4) for n in range(SIZE)]  # as a CSV file has them
    made = order(data("level", levels), "by=level", f"easy_values={easy}", "mode=easy_to_hard")
    epochs = np.reshape(take_all(made, 2 * SIZE), (2, SIZE))
    for epoch in epochs:
        assert sorted(epoch) == list(range(SIZE))
        assert [row % 4 for row in epoch] == sorted((n % 4 for n in range(SIZE)), reverse=easy == "high")
    assert epochs[0].tolist() != epochs[1].tolist()  # equally easy rows are in the order of their epoch
    assert made.curriculum.state == {}


def test_rows_outside_of_the_band_keep_a_share_of_their_turns_and_none_starves():
    rates = np.linspace(0, 1, SIZE).tolist()
    made = order(data("rate", rates), "by=rate", "floor=0.2")
    counts = np.bincount(take_all(made, 3000), minlength=SIZE)
    inside = np.array([0.2 <= rate <= 0.8 for rate in rates])
    assert counts[inside].min() > 0.95 * counts[inside].max()  # a turn is lost where its step has the row already
    share = counts[~inside] / counts[inside].mean()
    assert share.min() > 0
    assert abs(share.mean() - 0.2) < 0.03
    for other in (order(data("rate", rates), "by=rate", "floor=0.2"), made):  # of the position alone
        assert other.take(50, 4) == made.take(50, 4)


def test_the_chance_of_a_pass_rate_falls_in_a_straight_line_from_the_band_to_the_floor():
    rates = [0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 1.0]
    made = order(data("pass_rate", [rates[n % 8] for n in range(SIZE)]), "by=pass_rate", "floor=0.2")
    drawn = np.mean([made.curriculum.is_drawn(epoch, np.arange(SIZE)) for epoch in range(400)], axis=0)
    shares = drawn.reshape(-1, len(rates)).mean(axis=0)
    assert shares == pytest.approx([0.2, 0.6, 1, 1, 1, 0.6, 0.4, 0.2], abs=0.04)
    assert shares[2:5].tolist() == [1, 1, 1]
    for band in ("[0, 0.5]", "[0.5, 1]"):  # one has nothing below it, the other nothing above
        (all_of_it,) = np.unique(order(data(), "by=pass_rate", f"band={band}").curriculum.is_drawn(0, np.arange(SIZE)))
        assert all_of_it


def test_a_measured_rate_counts_from_the_next_step_on_and_forgets_by_halves():
    made = order(data(), "by=pass_rate")
    curriculum = made.curriculum
    assert curriculum.metrics() == {"curriculum/known": 0, "curriculum/in_band": 0}
    curriculum.note({0: 1.0, 1: 0.5})
    curriculum.note({2: 0.0})
    assert curriculum.state == {"rates": {}}
    curriculum.end_step()
    curriculum.note({0: 0.0, 1: 1.0})
    curriculum.end_step()
    assert curriculum.state == {"rates": {"0": 0.5, "1": 0.75, "2": 0.0}}
    assert curriculum.metrics() == {"curriculum/known": 3 / SIZE, "curriculum/in_band": 2 / SIZE}


def test_a_column_of_pass_rates_is_what_is_known_at_the_start():
    made = order(data("pass_rate", [None, 0.25, *[1.0] * (SIZE - 2)]), "by=pass_rate", "memory=0.8")
    made.curriculum.note({0: 0.5, 1: 0.75})
    made.curriculum.end_step()
    rates = made.curriculum.state["rates"]
    assert [rates["0"], rates["1"], rates["2"]] == [0.5, pytest.approx(0.35), 1.0]


@pytest.mark.parametrize("mode", ["band", "easy_to_hard"])
def test_a_restored_curriculum_goes_on_as_one_that_was_not_interrupted(mode):
    overrides = ("by=pass_rate", f"mode={mode}")

    def run(made, first, last, position):
        seen = []
        for step in range(first, last):
            rows, position = made.take(position, 4)
            refill, position = made.take(position, 2, rows)
            made.curriculum.note({row: (7 * row + step) % 10 / 9 for row in (*rows, *refill)})
            made.curriculum.end_step()
            seen.append((*rows, *refill))
        return seen, position

    whole, _ = run(order(data(), *overrides), 0, 25, 0)
    assert all(len(set(rows)) == 6 for rows in whole)
    begun = order(data(), *overrides)
    half, position = run(begun, 0, 10, 0)  # in the middle of an epoch
    state = json.loads(json.dumps(begun.curriculum.state))
    resumed = order(data(), *overrides)
    resumed.curriculum.restore(state)
    assert half + run(resumed, 10, 25, position)[0] == whole
    forgetful = order(data(), *overrides)
    assert half + run(forgetful, 10, 25, position)[0] != whole


def test_easy_to_hard_is_by_what_was_known_when_the_epoch_began():
    made = order(data(), "by=pass_rate", "mode=easy_to_hard")
    first, position = made.take(0, SIZE - 2)
    made.curriculum.note({row: row / SIZE for row in first})
    made.curriculum.end_step()
    last, position = made.take(position, 2)
    assert sorted([*first, *last]) == list(range(SIZE))  # what was learned did not move the epoch under way
    easiness = {row: 0.5 if row in last else row / SIZE for row in range(SIZE)}
    second = [easiness[row] for row in made.take(position, SIZE)[0]]
    assert second == sorted(second, reverse=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_band_draws_more_groups_with_a_spread_than_the_plain_order(seed):
    generator = np.random.default_rng(seed)
    solved = generator.permutation([0.0] * 20 + [1.0] * 12 + [0.5] * 8)  # the chance of each row to be solved

    def share(made, steps=60, group=4):
        position, spreads = 0, []
        for _ in range(steps):
            rows, position = made.take(position, 4)
            passed = generator.random((4, group)) < solved[rows][:, None]
            spreads += (passed.any(axis=1) & ~passed.all(axis=1)).tolist()
            if made.curriculum is not None:
                made.curriculum.note(dict(zip(rows, passed.mean(axis=1), strict=True)))
                made.curriculum.end_step()
        return np.mean(spreads)

    assert share(order(data(), "by=pass_rate")) > 1.5 * share(order(data(), "by=null"))


def test_a_curriculum_works_inside_a_mixture():
    config = load_config(
        None, ["data.curriculum.by=rate", "data.sources=[{source: a, count: 30}, {source: b, count: 10}]"]
    )
    rows = data("rate", [1.0, 0.5] * (SIZE // 2))
    rows = PromptData(rows.train, [], SIZE, 0, [], (20, 20))
    counts = np.bincount(take_all(order_of(config.data, rows, 0, 4), 2000), minlength=SIZE)
    inside = counts[1::2]
    assert inside[:10].mean() / inside[10:].mean() == pytest.approx(3, rel=0.05)
    assert counts[::2].sum() < 0.2 * inside.sum()


def test_what_a_curriculum_cannot_use_is_refused():
    with pytest.raises(
        ValueError, match=r"by must be pass_rate or a column of the data, got 'levl'; .*did you mean 'level'"
    ):
        order(data("level", range(SIZE)), "by=levl")
    for value in ("hard", None, True):
        with pytest.raises(ValueError, match=rf"row 1: column 'level' must hold a number, .*got {value!r}; "):
            order(data("level", [1, value, *range(SIZE)]), "by=level")
    with pytest.raises(ValueError, match=r"row 1: column 'level' must hold a number, .*got 1000"):
        order(data("level", [1, 10**400, *range(SIZE)]), "by=level")
    for value in (70, "1.5", -0.1):
        with pytest.raises(ValueError, match=rf"row 1: column 'pass_rate' must hold a share .*got '?{value}'?; divide"):
            order(data("pass_rate", [None, value, *[0.5] * SIZE]), "by=pass_rate")
    for override, message in (
        ("band=[0.8, 0.2]", r"band must be \[lowest, highest\], got \[0\.8, 0\.2\]"),
        ("band=[0.8]", r"band must be \[lowest, highest\]"),
        ("floor=0", r"floor must be >= 0\.01, a share; 0 would leave rows out for good, got 0"),
        ("{by: pass_rate, easy_values: low}", r"easy_values must be high with data\.curriculum\.by=pass_rate"),
    ):
        text = f"data.curriculum={override}" if override.startswith("{") else f"data.curriculum.{override}"
        with pytest.raises(ValueError, match=message):
            load_config(None, [text])
    with pytest.raises(
        ValueError, match=r"by must be null for supervised fine-tuning, got 'level'; it is for grpo train"
    ):
        order(PairData([], [], 0, []), "by=level")


def test_a_band_that_holds_no_row_is_told_at_the_start():
    rows = data("level", [5 + n % 3 for n in range(SIZE)])
    band = ["data.curriculum.by=level", "data.curriculum.band=[0.2, 0.8]"]
    rewards = "rewards.functions=[{function: 'rewards.number:exact_number_strict'}]"
    check_recipe(load_config(None, [*band, rewards]), rows, SamplingParams(max_completion_length=4), 4096)
    (note,) = rows.messages
    assert "column 'level' has 5 to 7, and the band is 0.2 to 0.8" in note
    for rows, *overrides in ((data("level", range(SIZE)), "by=level", "band=[7, 7]"), (data(), "by=pass_rate")):
        assert order(rows, *overrides).curriculum.notes() == []


def test_an_order_without_a_curriculum_or_shares_has_no_state_of_its_own():
    made = Order([SIZE], 3, 4)
    assert made.take(8, 4)[0] == made.step(2)
