"""Procedural sources: right answers, distinct questions, the same rows for the same seed, clear refusals."""

import json

import pytest

from rl.data.reasoning_tasks import reasoning_gym_rows
from rl.data.tasks import arithmetic_rows, is_procedural, procedural_rows

SUMS = {"size": 60, "seed": 1, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.mark.parametrize(
    ("operation", "count"), [("add", 10_000), ("subtract", 10_000), ("multiply", 10_000), ("mixed", 30_000)]
)
def test_two_digit_arithmetic_lists_every_question_once_with_its_answer(operation, count):
    rows = arithmetic_rows(operation, digits=2, seed=0)
    assert len({row["prompt"] for row in rows}) == len(rows) == count
    for row in rows[:300]:
        assert row["prompt"].endswith("=")
        assert row["answer"] == str(eval(row["prompt"][:-1]))


def test_arithmetic_covers_operands_from_zero_to_the_last():
    rows = {row["prompt"]: row["answer"] for row in arithmetic_rows("subtract", digits=1, seed=0)}
    assert len(rows) == 100
    assert (rows["0-9="], rows["9-0="], rows["7-7="]) == ("-9", "9", "0")


def test_mixed_arithmetic_holds_all_three_signs():
    rows = arithmetic_rows("mixed", digits=3, seed=5, size=300)
    counts = [sum(sign in row["prompt"] for row in rows) for sign in "+-*"]
    assert sum(counts) == 300
    assert min(counts) > 60


def test_arithmetic_order_is_pinned_by_the_seed():
    # Spelled out, so that a change of Python version or of the algorithm cannot silently change every run's data.
    assert [row["prompt"] for row in arithmetic_rows("add", digits=2, seed=0)[:4]] == [
        "63+11=",
        "68+90=",
        "6+63=",
        "42+42=",
    ]
    assert arithmetic_rows("add", 2, seed=3) == arithmetic_rows("add", 2, seed=3)
    assert arithmetic_rows("add", 2, seed=3) != arithmetic_rows("add", 2, seed=4)


def test_large_spaces_are_sampled_without_listing_them():
    rows = arithmetic_rows("multiply", digits=12, seed=0, size=50)
    assert len({row["prompt"] for row in rows}) == 50
    assert any(len(row["answer"]) > 20 for row in rows)
    assert rows == arithmetic_rows("multiply", digits=12, seed=0, size=50)
    with pytest.raises(ValueError, match=r"data\.args\.size must be set"):
        arithmetic_rows("multiply", digits=12, seed=0)


def test_template_words_the_question():
    rows = arithmetic_rows("add", digits=1, seed=0, template="What is {expression}?")
    assert {"prompt": "What is 3+4?", "answer": "7"} in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "divide", "digits": 2}, r"operation must be one of .*'divide'"),
        ({"operation": "add", "digits": 0}, r"digits must be a whole number >= 1, got 0"),
        ({"operation": "add", "digits": "2"}, r"digits must be a whole number"),
        ({"operation": "add", "digits": 1, "size": 101}, r"size must be <= 100"),
        ({"operation": "add", "digits": 1, "size": 0}, r"size must be a whole number >= 1"),
        ({"operation": "add", "digits": 1, "seed": -1}, r"seed must be a whole number >= 0"),
        ({"operation": "add", "digits": 1, "template": "sum ="}, r"template must hold"),
        ({"operation": "add", "digits": 1, "template": "{expression}{"}, r"template must be a format string"),
        ({"operation": "add", "digits": 1, "template": "{expression:d}"}, r"template must be a format string"),
        ({"operation": "add", "digits": 1, "template": "{expression}{expression}"}, r"template must hold"),
        ({"operation": "add", "digits": 1, "terms": 1}, r"terms must be a whole number >= 2"),
        ({"operation": "add", "digit": 1}, r"got 'digit'; did you mean 'digits'"),
        ({"operation": "add"}, r"must hold \['digits'\]"),
    ],
)
def test_arithmetic_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        procedural_rows("arithmetic", arguments, seed=0)


def test_seed_in_the_arguments_wins_over_the_runs_seed():
    arguments = {"operation": "add", "digits": 1}
    assert procedural_rows("arithmetic", {**arguments, "seed": 7}, seed=0) == procedural_rows(
        "arithmetic", arguments, seed=7
    )
    assert procedural_rows("arithmetic", arguments, seed=0) != procedural_rows("arithmetic", arguments, seed=7)
    drawn = [procedural_rows("reasoning_gym:chain_sum", {**SUMS, "seed": seed}, seed=0) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_reasoning_gym_rows_are_distinct_right_and_json():
    rows = reasoning_gym_rows("chain_sum", {**SUMS, "size": 400})
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert 150 < len(rows) <= 200  # 400 draws of 200 questions, duplicates left out
    for row in rows:
        expression = row["metadata"]["expression"]
        assert f"{expression} =" in row["prompt"]
        assert row["answer"] == str(eval(expression))
        assert json.loads(json.dumps(row)) == row


def test_one_digit_sums_have_two_hundred_questions():
    rows = reasoning_gym_rows("chain_sum", {**SUMS, "size": 4000})
    assert len(rows) == 200


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("chain_sums", SUMS, r"got 'chain_sums'; did you mean 'chain_sum'"),
        ("chain_sum", {**SUMS, "min_term": 2}, r"got 'min_term'; did you mean 'min_terms'"),
        ("chain_sum", {**SUMS, "min_terms": 5}, r"must suit reasoning_gym:chain_sum"),
        ("chain_sum", {"seed": 1}, r"data\.args\.size must be a whole number >= 1, got None"),
        ("chain_sum", {"size": 5}, r"data\.args\.seed must be a whole number >= 0, got None"),
    ],
)
def test_reasoning_gym_refuses_bad_arguments(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        reasoning_gym_rows(task, arguments)


def test_only_known_names_are_procedural():
    assert is_procedural("arithmetic")
    assert is_procedural("reasoning_gym:gcd")
    assert not is_procedural("reasoning_gym")
    assert not is_procedural("arithmetic.jsonl")


def test_terms_make_longer_questions_evaluated_from_left_to_right():
    rows = arithmetic_rows("add", digits=1, seed=0, terms=4)
    assert len(rows) == len({row["prompt"] for row in rows}) == 10_000
    assert all(eval(row["prompt"].rstrip("=")) == int(row["answer"]) for row in rows)
    rows = arithmetic_rows("subtract", digits=1, seed=0, terms=3)
    assert all(eval(row["prompt"].rstrip("=")) == int(row["answer"]) for row in rows)


# Composites and levels

TWO = [{"name": "gcd", "weight": 3, "config": {"max_value": 50}}, {"name": "chain_sum", "level": {"num_terms": 2}}]


def test_a_composite_mixes_tasks_by_weight_and_each_row_knows_its_own():
    rows = reasoning_gym_rows("composite", {"size": 120, "seed": 3, "datasets": TWO})
    of_task = [row["metadata"]["source_dataset"] for row in rows]
    assert len(rows) > 100
    assert 0.6 < of_task.count("gcd") / len(rows) < 0.9
    sums = [row["metadata"]["expression"] for row in rows if row["metadata"]["source_dataset"] == "chain_sum"]
    assert {len(expression.split()) for expression in sums} == {7}  # four terms, three signs
    assert rows == reasoning_gym_rows("composite", {"size": 120, "seed": 3, "datasets": TWO})
    assert "level" not in rows[0]
    by_name = reasoning_gym_rows("composite", {"size": 9, "seed": 3, "datasets": ["gcd", "lcm"], "level": 1})
    assert {row["level"] for row in by_name} == {1}


def test_a_level_gives_the_values_of_the_tasks_curriculum_and_a_list_draws_of_each():
    rows = reasoning_gym_rows("chain_sum", {"size": 30, "seed": 1, "level": [0, 2]})
    for level, terms, digits in ((0, 2, 1), (2, 4, 3)):
        own = [row["metadata"] for row in rows if row["level"] == level]
        assert 20 < len(own) <= 30
        assert {(about["num_terms"], about["num_digits"]) for about in own} == {(terms, digits)}
    some = reasoning_gym_rows("chain_sum", {"size": 5, "seed": 1, "level": {"*": 1, "num_terms": 0}})
    assert {(row["metadata"]["num_terms"], row["metadata"]["num_digits"]) for row in some} == {(2, 2)}


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("chain_sum", {"level": 11}, r"data\.args\.level must be from 0 to 10 for reasoning_gym:chain_sum, got 11"),
        ("chain_sum", {"level": {"num_digits": 10}}, r"from 0 to 9 for num_digits of reasoning_gym:chain_sum, got 10"),
        ("chain_sum", {"level": {"digits": 1}}, r"attributes .*\['num_digits', 'num_terms'\], got 'digits'; did you"),
        ("chain_sum", {"level": [0, -1]}, r"data\.args\.level must be a whole number >= 0, got -1"),
        ("chain_sum", {"level": "hard"}, r"data\.args\.level must be from 0 to 10 .*got 'hard'"),
        ("chain_sum", {"level": []}, r"data\.args\.level must hold a level, got \[\]"),
        ("chain_sum", {"level": 0, "min_terms": 2}, r"must leave min_terms to the level, which gives it 2, got 2"),
        ("gsm_symbolic", {"level": 0}, r"level must be left out for reasoning_gym:gsm_symbolic, which has no"),
        ("caesar_cipher", {"level": 3}, r"must suit reasoning_gym:caesar_cipher, .* at level 3: AssertionError"),
        ("composite", {}, r"data\.args\.datasets must be a list of \{name, weight, config, level\}.*got None"),
        ("composite", {"datasets": [{"nam": "gcd"}]}, r"data\.args\.datasets\.0 must be .*got 'nam'"),
        ("composite", {"datasets": ["gdc"]}, r"datasets\.0\.name must be a task .*'gdc'; did you mean 'gcd'"),
        ("composite", {"datasets": [{"name": "gcd", "weight": 0}]}, r"datasets\.0\.weight must be a number > 0, got 0"),
        ("composite", {"datasets": [{"name": "gcd", "config": {"size": 3, "x": 1}}]}, r"0\.config must be .*got 'x'"),
        ("composite", {"datasets": ["gcd", "gcd"]}, r"must suit reasoning_gym:composite, .*Duplicate dataset names"),
    ],
)  # fmt: skip
def test_composites_and_levels_that_cannot_be_are_refused_by_name(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        reasoning_gym_rows(task, {"size": 5, "seed": 1, **arguments})
