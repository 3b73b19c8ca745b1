"""Procedural sources: right answers, distinct questions, the same rows for the same seed, clear refusals."""

import json

import pytest

from rl.data.tasks import arithmetic_rows, is_procedural, procedural_rows, reasoning_gym_rows

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
