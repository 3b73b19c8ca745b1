"""`grpo rewards check`: the reward functions of a recipe on completions that are known to be right or wrong."""

import json

import numpy as np
import pytest

from rewards.contract import RewardSpec
from rewards.runner import RewardRunner
from rl.cli import main
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import load_tokenizer
from rl.rollout.reward_check import tell_of_rewards
from rl.run.console import Console
from rl.run.metrics import MetricsWriter
from rl.tools.rewards import check

ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 7)]
REWARDS = """
def length(completions, completion_ids, truncated, **kwargs):
    return [-1.0 if cut else len(ids) / 1000 for ids, cut in zip(completion_ids, truncated)]

def best(completions, **kwargs):
    longest = max(map(len, completions))
    return [float(len(text) == longest) for text in completions]
best.needs_group = True

def right_fails(completion, answer):
    return 1e300 * (answer in completion)

def fails(completion):
    raise KeyError("no such " + completion)

def anywhere(completion, answer):
    return float(answer in completion)

def as_a_whole(queries, prompts, labels):
    return {"rewards": [float(queries[0][len(prompts[0]):] == labels[0])]}

def at_its_end(queries, prompts, labels):
    return {"rewards": [float(queries[0] == f"<bos>{prompts[0]}{labels[0]}<eos>")]}

def inverted(completion, answer):
    return float(answer not in completion)

def looks(environments, completions):
    return [game.turns for game in environments]
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with these reward functions; those without a colon are in a file of their own."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.py").write_text(REWARDS)

    def write(*functions, data="{}"):
        entries = [
            f"{{function: '{n if ':' in n else f'{tmp_path}/mine.py:{n}'}', name: {n.split(':')[-1]}}}"
            for n in functions
        ]
        (tmp_path / "recipe.yml").write_text(
            f"data: {{source: {tmp_path}/train.jsonl, columns: {data}}}\n"
            f"sampling: {{max_completion_length: 8}}\nrewards: {{functions: [{', '.join(entries)}]}}\n"
        )
        return str(tmp_path / "recipe.yml")

    return write


COLUMNS = "{prompt: prompt, answer: answer}"


def test_right_answers_junk_and_samples_are_judged_as_in_training(tmp_path, recipe, capsys):
    records = [
        {"prompt": "1+1=", "completion": "2", "token_ids": [50], "finish_reason": "eos"},
        {"prompt": "2+2=", "completion": "5", "token_ids": [53] * 8, "finish_reason": "length"},
        {"prompt": "of other data", "completion": "2", "token_ids": [50], "finish_reason": "eos"},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text("".join(json.dumps({"step": 1, **row}) + "\n" for row in records))
    path = recipe("rewards.number:exact_number_strict", "length", "best", data=COLUMNS)
    arguments = ["--rows", "4", "--samples", str(tmp_path / "run"), "--json", str(tmp_path / "out.json")]
    assert main(["rewards", "check", path, *arguments]) == 0
    said = capsys.readouterr().out
    checked = json.loads((tmp_path / "out.json").read_text())
    means = {
        sort: dict(zip(("num", "total", "means"), judged, strict=True)) for sort, judged in checked["sorts"].items()
    }
    for sort in ("as in the row", "stated", "boxed"):
        assert means[f"right answer, {sort}"]["means"]["exact_number_strict"] == 1.0
    wrong = ("empty", "junk", "noise", "the prompt", "another row's answer", "a list of answers", "cut off")
    for sort in (*wrong, "right answer, in tags"):
        assert means[sort]["means"]["exact_number_strict"] == 0.0
        assert means[sort]["num"] == 4
    assert means["cut off"]["means"]["length"] == -1.0  # it is known to be truncated
    assert means["junk"]["means"]["length"] == (len("I do not know.") + 1) / 1000  # its tokens are bytes and the EOS
    assert means["right answer, in tags"]["means"]["best"] == 1.0  # among the completions of its row
    assert means["samples of run"] == {
        "num": 2,
        "total": pytest.approx((1 + 0.001 + 0 - 1) / 2),
        "means": {"exact_number_strict": 0.5, "length": pytest.approx((0.001 - 1) / 2), "best": None},
    }
    assert "judged one by one, without best" in said
    assert said.endswith("a right answer scores above junk\n")
    assert checked["failures"] == {"exact_number_strict": {}, "length": {}, "best": {}}


def test_rewards_that_do_not_tell_right_from_junk_end_with_status_1(recipe, capsys):
    assert main(["rewards", "check", recipe("inverted", "fails", data=COLUMNS), "--rows", "2"]) == 1
    said = capsys.readouterr().out
    assert "error: a right answer must score above junk, got 0 (as in the row) and 1 (empty)" in said.replace(
        "right answer, ", ""
    )
    assert "warning: another row's answer scores 1, no less than the right answer's 0" in said
    assert "exception" in said  # in the table
    assert "KeyError" in said
    assert (
        main(
            ["rewards", "check", recipe("rewards.number:exact_number_strict", data="{prompt: prompt, answer: prompt}")]
        )
        == 1
    )
    told = "error: no function with a weight could judge a right answer; "
    assert f"{told}check the column `answer`" in capsys.readouterr().out
    assert main(["rewards", "check", recipe("fails", data=COLUMNS), "--rows", "2"]) == 1
    assert f"{told}mend the function that failed" in capsys.readouterr().out
    weightless = check(recipe("anywhere", data=COLUMNS), 2, overrides=["rewards.functions.0.weight=0"])
    assert f"error: {weightless.verdict}" == f"{told}give a function a weight"


def test_a_function_that_failed_on_some_completions_is_not_said_to_score_all_alike(recipe):
    checked = check(recipe("right_fails", data=COLUMNS), 2)
    assert ["out_of_range" in problem for problem in checked.problems] == [True]
    assert checked.failures == {"right_fails": {"out_of_range": 10}}


def test_a_reward_that_finds_the_answer_anywhere_is_told(recipe, capsys):
    assert main(["rewards", "check", recipe("anywhere", data=COLUMNS), "--rows", "6"]) == 0
    said = capsys.readouterr().out
    assert "warning: a list of answers scores 1, no less than the right answer's 1" in said
    assert said.endswith("a right answer scores above junk\n")
    checked = check(recipe("anywhere", data=COLUMNS), 1)  # no other row has an answer to list
    assert checked.sorts["a list of answers"].total == 0.0
    assert checked.problems == []


def test_an_option_that_is_named_by_its_position_is_a_right_answer_as_its_letter(tmp_path, recipe):
    path = recipe("rewards.choice:multiple_choice", data=COLUMNS)
    rows = [{"prompt": f"{n}. A) a B) b C) c", "answer": n % 3} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = check(path, 4)
    assert (checked.verdict, checked.is_wrong) == (None, False)
    assert checked.sorts["right answer, stated"].total == 1.0
    assert checked.sorts["another row's answer"].total == 0.0


def test_without_a_known_answer_only_failures_are_looked_for(tmp_path, recipe, capsys):
    path = recipe("rewards.format:think_format", data="{prompt: prompt, answer: null}")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    checked = check(path, 3)
    assert checked.verdict.startswith("what is right is not known")
    assert not checked.is_wrong
    assert list(checked.sorts) == ["empty", "junk", "noise", "the prompt", "cut off"]
    assert checked.problems == ["reward 'think_format' gives 0 to every sort of completion"]
    with pytest.raises(ValueError, match="--rows must be >= 1, got 0"):
        check(path, 0)
    assert main(["rewards", "try", path]) == 2
    assert "grpo rewards needs check, got 'try'" in capsys.readouterr().err


def test_functions_that_ask_for_environments_are_left_out_by_name(recipe):
    game = "rollout.environment=game.py:Game"
    checked = check(recipe("inverted", "looks", data=COLUMNS), 1, overrides=[game])
    assert [*checked.weights] == ["inverted"]
    assert "looks: left out, because no environment is played here" in checked.problems
    with pytest.raises(ValueError, match="looks ask for environments, which this command does not play"):
        check(recipe("looks", data=COLUMNS), 1, overrides=[game])
    with pytest.raises(ValueError, match=r"reward 'looks': it asks for environments, .* set rollout\.environment"):
        check(recipe("looks", data=COLUMNS), 1)


def test_a_wrong_setting_is_refused_before_anything_is_judged(recipe, capsys):
    path = recipe("rewards.format:think_format", data=COLUMNS)
    wrong = "rewards.functions=[{function: 'rewards.format:format_regex', name: form, kwargs: {pattern: '('}}]"
    assert main(["rewards", "check", path, wrong]) == 2
    told = capsys.readouterr()
    assert "reward 'form': pattern must be a regular expression" in told.err
    assert "got '('" in told.err
    assert not told.out


def test_a_right_answer_goes_on_from_the_beginning_that_the_prompt_gives(tmp_path, recipe):
    path = recipe("rewards.format:tag_format", "rewards.number:exact_number_strict", data=COLUMNS)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}")
    chat = ["data.chat=true", 'data.assistant_prefill="<think>\\n"', f"tokenizer.chat_template={tmp_path}/chat.jinja"]
    checked = check(path, 1, overrides=chat)
    means = {sort.rpartition(", ")[2]: [*judged.means.values()] for sort, judged in checked.sorts.items()}
    assert means["in tags"] == [1.0, 0.0]
    assert means["stated"] == means["as in the row"] == [0.0, 1.0]
    assert means["empty"] == [0.0, 0.0]


def test_samples_of_other_data_are_refused(tmp_path, recipe):
    with MetricsWriter(tmp_path / "run", 0) as writer:
        writer.write({"step": 1})
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": 1, "prompt": "3?", "completion": "1"}\n')
    with pytest.raises(ValueError, match=r"--samples must be a run with samples of prompts in data\.source, got none"):
        check(recipe("length", data=COLUMNS), samples=str(tmp_path / "run"))


def test_functions_of_openrlhf_read_the_special_tokens_as_in_a_run(recipe):
    checked = check(recipe("as_a_whole", "at_its_end", data=COLUMNS), 2)
    answer = checked.sorts["right answer, as in the row"]
    assert answer.means == {"as_a_whole": 0.0, "at_its_end": 1.0}
    assert check(recipe("as_a_whole", data=COLUMNS), 2).is_wrong  # it could not give a completion that ends anything


def test_the_start_tells_in_one_line_how_a_right_answer_scores_against_junk(tmp_path, recipe, capsys):
    row = PromptRow("1+1=", np.array([49], np.int32), {"prompt": "1+1=", "answer": "2"}, 0)

    others = [PromptRow("", np.array([49], np.int32), {"answer": str(2 * n)}, n) for n in range(4)]

    def told(*names, weights=(1.0, 0.5), row=row, others=others):
        specs = [
            RewardSpec(name, name if ":" in name else f"{tmp_path}/mine.py:{name}", weight, {})
            for name, weight in zip(names, weights, strict=False)
        ]
        with RewardRunner(specs, list(row.columns), 1, 5.0) as runner:
            tell_of_rewards(Console(3), runner, row, load_tokenizer("byte"), 8, others)
        return capsys.readouterr().out.splitlines()

    recipe("length")  # writes the file
    exact = "rewards.number:exact_number_strict"
    line = "rewards of the first row: a right answer scores {}, an empty or junk one {} and a cut one {}"
    assert told(exact, "length") == [line.format("1.02", "0.0075", "-0.5")]
    assert told(exact, "best") == [line.format("1", "0", "0")]  # a group of all is judged together
    (warning,) = told("inverted", exact)
    assert "a right answer must score above junk, got 0.5 (right answer, as in the row) and 1 (empty)" in warning
    assert warning.endswith("`grpo rewards check` shows more")
    (failed,) = told("fails")  # once: what fails is not said to score too little as well
    assert "warning: on a gold row, reward 'fails' failed on all" in failed
    (warning,) = told("anywhere")
    assert "a right answer must score above a list of answers that holds it, got 1 for both; let the" in warning
    assert told("anywhere", others=others[:2]) == [line.format("1", "0", "0")]  # of two options one is at the end
    of_other = PromptRow("1+1=", np.array([49], np.int32), {"prompt": "1+1="}, 0)
    assert told("length", row=of_other) == []
