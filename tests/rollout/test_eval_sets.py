"""Named sets: the same samples however they are drawn, numbers that follow from the records, and what is refused."""

import dataclasses
import gc
import itertools
import json
import math
import re
import tracemalloc

import jax
import numpy as np
import pytest

from rewards.logged import CallLog
from rl.cli import main
from rl.config.load import load_config
from rl.config.sections import EvalSet
from rl.data.eval_sets import with_eval_sets
from rl.data.prompts import load_prompts
from rl.grpo_trainer import train
from rl.rollout.eval_scores import SetScores
from rl.rollout.eval_sets import check_followed
from rl.rollout.eval_statistics import (
    maj_at_k,
    majority,
    mcnemar,
    mean_interval,
    pass_at_k,
    wilson_interval,
)
from rl.run.best import Best, follow_best, is_over
from rl.run.metrics import read_metrics
from rl.run_folder.contents import best_step, checkpoint_steps
from rl.sampler.slot_sampler import Sampler
from rl.state.origin import tokenizer_from_config
from rl.tools.evaluate import evaluate_source, rounding_note
from tests.helpers.pages import blocks
from tests.helpers.places import FILES, REWARDS, ROOT

RECIPE = f"""
model:
  arch:
    {{family: qwen2, hidden_size: 16, intermediate_size: 32, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 5, max_prompt_length: 8}}
rewards:
  functions:
    - {{function: "{REWARDS}:digit_share", name: digits}}
    - {{function: "rewards.number:exact_number_flexible", name: flexible, weight: 0.0}}
    - {{function: "rewards.number:exact_number_strict", name: strict, weight: 0.0}}
sampling: {{max_completion_length: 3, slots: 8, logit_bias: {{51: 12, 52: 12, 53: 12, 123: 13, 1: 11}}}}
grpo: {{steps: 3, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}}
optimizer: {{lr: 0.04}}
eval:
  every: 1
  keep_samples: 2
  resamples: 200
  sets:
    drawn:
      {{source: arithmetic, args: {{operation: subtract, digits: 1}}, max_prompts: 7, samples: 4, ks: [1, 2, 4],
       reward: flexible, category: operation, prepare: "PREPARE"}}
    greedy: {{reward: strict}}
checkpoint: {{every: 10, keep: 1, best: {{metric: eval/drawn/reward/digits/mean}}}}
mesh: {{num_devices: 1}}
"""
_DRAWN = "drawn: A against B, 4 samples each, temperature 1"
PREPARE = """
def with_operation(row):
    return {**row, "operation": "negative" if row["answer"].startswith("-") else "positive"}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    (folder / "prepare.py").write_text(PREPARE)
    path = folder / "recipe.yml"
    path.write_text(RECIPE.replace("PREPARE", f"{folder / 'prepare.py'}:with_operation"))
    return path


@pytest.fixture(scope="module")
def run(recipe):
    return train(load_config(recipe, [f"output_dir={recipe.parent / 'run'}"]))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(run):
    """The result of the run's newest checkpoint, and the records of its samples."""
    output = run.parent / "evaluated.jsonl"
    return evaluate_source(run, output=str(output))[0], lines_of(output)


def test_numbers_of_a_set_follow_from_its_records(evaluated):
    result, records = evaluated
    drawn = [record for record in records if record.get("set") == "drawn"]
    assert [(record["prompt_index"], record["sample_index"]) for record in drawn] == [
        *itertools.product(range(7), range(4))
    ]
    scores, groups = result.sets["drawn"].scores, [drawn[i : i + 4] for i in range(0, 28, 4)]
    rights = [[record["rewards"]["flexible"] == 1 for record in group] for group in groups]
    shares = [sum(group) / 4 for group in rights]
    assert 0 < np.mean(shares) < 1
    main_scores = scores.main
    assert main_scores["avg_at_4"].value == main_scores["pass_at_1"].value == pytest.approx(np.mean(shares))
    assert main_scores["pass_at_4"].value == np.mean([any(group) for group in rights])
    pairs = [np.mean([any(pair) for pair in itertools.combinations(group, 2)]) for group in rights]
    assert main_scores["pass_at_2"].value == pytest.approx(np.mean(pairs))
    assert main_scores["avg_at_4"][1:3] == mean_interval(shares, 200)
    answers = [[record["logged"]["flexible"]["extracted"] for record in group] for group in groups]
    assert max(len({*group}) for group in answers) > 1
    voted = [majority(group) for group in answers]
    right = [place is not None and rights[q][place] for q, place in enumerate(voted)]
    assert main_scores["maj_at_4"].value == np.mean(right)
    assert main_scores["maj_at_4"][1:3] == wilson_interval(sum(right), 7)
    # Strict and flexible scores side by side, and categories that add up to the whole.
    metrics = result.sets["drawn"].metrics()
    for name in ("flexible", "strict"):
        own = np.mean([record["rewards"][name] >= 1 for record in drawn])
        assert metrics[f"eval/drawn/reward/{name}/avg_at_4"] == pytest.approx(own)
    counts = {name: own["avg_at_4"].count for name, own in scores.categories.items()}
    assert sum(counts.values()) == 7
    assert len(counts) == 2
    total = sum(metrics[f"eval/drawn/category/{name}/avg_at_4"] * count for name, count in counts.items())
    assert total / 7 == pytest.approx(main_scores["avg_at_4"].value)
    greedy = [record for record in records if record.get("set") == "greedy"]
    assert [record["completion"] for record in greedy] == [r["completion"] for r in records if "set" not in r]
    unanimous = SetScores(["flexible"], "flexible", 2, [2], 100)
    for _ in range(3):
        unanimous.add([{"rewards": {"flexible": 1.0}, "finish_reason": "eos"}] * 2, num_drawn=2)
    brief = dataclasses.replace(result.sets["drawn"], scores=unanimous).brief()
    assert brief.startswith("drawn: avg@2 100.0% (no interval: all questions agree), pass@2 100.0% (no")


def test_an_evaluation_during_the_run_is_that_of_the_command_and_keeps_its_samples(run, evaluated):
    result, records = evaluated
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == ["2.jsonl", "3.jsonl"]
    of_run = lines_of(run / "evaluations" / "3.jsonl")
    assert {record.pop("step") for record in of_run} == {3}
    assert of_run == records
    last = read_metrics(run)[-1]
    for name, value in result.sets["drawn"].metrics().items():
        assert last[name] == pytest.approx(value), name


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.block_size=6", "sampling.slots=3", "mesh={num_devices: 2, data: 2, fsdp: 1}", "pure_nnx=false"],
        pytest.param(["sampling.slots=1"], marks=pytest.mark.long),
        pytest.param(["mesh={num_devices: 4, data: 1, fsdp: 2, tensor: 2}"], marks=pytest.mark.long),
        pytest.param(["mesh={num_devices: 8, data: 2, fsdp: 4}", "eval.block_size=1"], marks=pytest.mark.long),
    ],
)
def test_samples_are_the_same_for_any_block_slots_and_devices(run, evaluated, overrides):
    output = run.parent / "again.jsonl"
    evaluate_source(run, overrides, output=str(output))
    assert lines_of(output) == evaluated[1]


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["true", "false"])
def test_samples_in_float64_are_the_same_for_any_block_slots_and_devices(run, flavour):
    outputs = [run.parent / f"double_{number}.jsonl" for number in range(2)]
    double = ["model.dtype=float64", f"pure_nnx={flavour}"]
    other = ["eval.block_size=6", "sampling.slots=4", "mesh={num_devices: 4, data: 2, fsdp: 2}"]
    with jax.enable_x64(True):
        evaluate_source(run, double, output=str(outputs[0]))
        evaluate_source(run, [*double, *other], output=str(outputs[1]))
    assert lines_of(outputs[0]) == lines_of(outputs[1])


def test_the_newest_and_the_best_checkpoint_stay(run):
    values = {line["step"]: line["eval/drawn/reward/digits/mean"] for line in read_metrics(run)}
    best = max((1, 2, 3), key=lambda step: (values[step], -step))
    assert best_step(run) == best
    assert checkpoint_steps(run) == sorted({best, 3})
    assert len({values[1], values[2], values[3]}) > 1


def test_the_best_value_is_followed_up_or_down_by_at_least_min_delta():
    def followed(values, *overrides):
        config = load_config(None, ["checkpoint.best.metric=eval/accuracy", "eval.patience=2", *overrides])
        best = Best()
        for step, value in enumerate(values):
            best = follow_best(config, best, step, {"eval/accuracy": value})
        return best.step, best.num_since, is_over(config, best)

    values = [0.9, 0.2, 0.4, None, 0.4, 0.1]  # the first is before any step, of which there is no checkpoint
    assert followed(values) == (2, 3, True)
    assert followed(values, "checkpoint.best.mode=min") == (5, 0, False)
    assert followed(values[:4], "eval.min_delta=0.3") == (1, 2, True)
    assert follow_best(load_config(None), Best(), 1, {"eval/accuracy": 1.0}) == Best()


def test_a_run_that_got_no_better_stops_also_when_it_was_cut_and_its_best_step_can_be_named(recipe, tmp_path, capsys):
    # The number of prompts is never better than at first.
    overrides = ["checkpoint={every: 1, best: {metric: eval/prompts}}", "eval.patience=2", "grpo.steps=9"]
    overrides += ["eval.sets={drawn: null, greedy: null}", f"output_dir={tmp_path / 'cut'}"]
    train(load_config(recipe, [*overrides, "grpo.steps=2"]))
    capsys.readouterr()
    for _ in range(2):  # the second call says it again
        path = train(load_config(recipe, overrides))
        said = " ".join(capsys.readouterr().out.split())
        assert "stopped early after step 3 of 9: eval/prompts was best after step 1, at 5" in said
        assert f"done: {path} has 3 steps; next: `grpo report {path}`" in said
        assert "saved step" not in said
        assert (best_step(path), checkpoint_steps(path)) == (1, [1, 3])
    main(["eval", str(path), "--step", "best"])
    assert "step 1: accuracy" in capsys.readouterr().out
    main(["export", str(path), str(tmp_path / "exported"), "--step", "best"])
    assert "exported step 1" in capsys.readouterr().out
    train(load_config(recipe, [*overrides, "eval.patience=3"]))
    assert checkpoint_steps(path) == [1, 4]
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.best.metric=loss"], "checkpoint.best.metric must be a metric of an evaluation"),
        (["checkpoint.best.metric=eval/drawn/pass_at_3"], "must be a measure of eval.sets.drawn, avg_at_4, pass_at_1"),
        (["checkpoint.best.metric=eval/nothing"], "must be a metric of the evaluations, got 'eval/nothing'; they have"),
        (
            ["checkpoint.best.metric=eval/drawn/reward/digit/mean"],
            "they have eval/drawn/avg_at_4, eval/drawn/pass_at_1",
        ),
        (["checkpoint.best.metric=eval/drawn/category/zero/prompts"], "got 'eval/drawn/category/zero/prompts'; they"),
        (["eval.patience=1", "checkpoint.best.metric=null"], "checkpoint.best.metric must be set with eval.patience"),
        (["eval.every=0"], "eval.every must be > 0 with checkpoint.best.metric"),
        (["eval.sets.drawn.temperature=0"], "temperature must be > 0 with samples 4"),
        (["eval.sets.drawn.ks=[5]"], "ks must name numbers from 1 to samples"),
        (["eval.sets.drawn.samples=0"], "eval.sets.drawn.samples must be >= 1"),
        (["eval.sets.drawn.sample=3"], "unknown config key 'eval.sets.drawn.sample'; an entry of eval.sets has"),
        (["eval.sets.drawn.reward=other"], "eval.sets.drawn.reward must name one of"),
        (["eval.sets.drawn.functions=[other]"], "eval.sets.drawn.functions must name some of rewards.functions"),
        (["eval.sets.greedy.columns={prompt: q}"], "eval.sets.greedy.source must be set with args, columns"),
        (["eval.sets.reward={source: arithmetic}"], "eval.sets must have names of letters"),
        (["eval.sets.drawn.category=level"], "eval.sets.drawn.category must name a column that every row has"),
        (["eval.sets.drawn.source=missing.jsonl"], "eval.sets.drawn.source: data source must be a .jsonl file, got"),
        (["data.eval_size=0"], "eval.sets.greedy.source must be set where no rows are held out"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_without_a_step(recipe, tmp_path, overrides, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        train(load_config(recipe, [f"output_dir={tmp_path / 'run'}", *overrides]), check_only=True)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_every_metric_that_evaluations_have_may_be_followed(run, recipe):
    config = load_config(recipe)
    tokenizer = tokenizer_from_config(config)
    data = with_eval_sets(load_prompts(config, tokenizer), config, tokenizer)
    names = {key for line in read_metrics(run) for key in line if key.startswith("eval/")}
    names |= {"eval/accuracy", "eval/reward/strict/mean", "eval/reward/strict/anything that it logs"}
    for metric in names:
        followed = load_config(recipe, [f"checkpoint.best.metric={json.dumps(metric)}"])
        check_followed(followed, data, ["digits", "flexible", "strict"])


def test_what_is_rounded_is_said_to_move_ties():
    rounded = (
        "with model.dtype bfloat16, sampling.kv_dtype int8, logits that are (nearly) equal may be ordered otherwise"
    )
    told = rounding_note(load_config(None, ["model.dtype=bfloat16", "sampling.kv_dtype=int8"]))
    assert told is not None
    assert told.startswith(rounded)
    assert rounding_note(load_config(None, ["model.dtype=float64"])) is None


def test_two_models_are_compared_question_by_question_by_models_and_by_files(run, tmp_path, capsys):
    output = tmp_path / "flips.jsonl"
    first = ["eval", str(run), "--step", "best", "--against", str(run.parent / "recipe.yml"), "--output", str(output)]
    main([*first, "eval.sets.greedy.reward=flexible", "eval.max_prompts=5"])
    by_models = capsys.readouterr().out
    files = [tmp_path / f"flips.{side}.jsonl" for side in "ab"]
    records = [lines_of(path) for path in files]
    assert _DRAWN in by_models.splitlines()
    for name in ("avg@4", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"):
        assert f"flexible: {name} " in by_models
    flips = lines_of(output)
    assert {flip["right"] for flip in flips} <= {"a", "b"}
    sides = [[r for r in own if r.get("set") == "greedy"] for own in records]
    pairs = [(a["rewards"]["flexible"], b["rewards"]["flexible"]) for a, b in zip(*sides, strict=True)]
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    own = [flip for flip in flips if (flip["set"], flip["function"]) == ("greedy", "flexible")]
    assert [flip["right"] for flip in own].count("a") == better
    assert len(own) == better + worse
    said = [line for line in by_models.splitlines() if "flexible: accuracy" in line and "McNemar" in line]
    assert f"better on {better}, worse on {worse}, McNemar p = {mcnemar(better, worse):.3g}" in said[-1]
    main(["eval", str(files[0]), "--against", str(files[1])])
    by_files = capsys.readouterr().out
    # Files do not say how many resamples an interval had.
    compared, again = (
        [re.sub(r"interval [^)]*", "", line) for line in said[said.index(_DRAWN) :]]
        for said in (by_models.splitlines(), by_files.splitlines())
    )
    assert compared[:-1] == again
    assert "all questions on which they differ" in compared[-1]
    assert "greedy: A against B, greedy" in by_files
    main(["eval", str(files[0]), "--against", str(files[0])])
    assert "difference +0.0% (no interval: all questions differ by the same)" in capsys.readouterr().out
    files[0].write_text(files[0].read_text().replace('"temperature": 0.0', '"temperature": 0.5'))
    main(["eval", str(files[0]), "--against", str(files[1])])
    assert "greedy: A against B, A temperature 0.5, B greedy" in capsys.readouterr().out
    for nowhere in (str(tmp_path / "nowhere"), str(tmp_path / "nowhere.jsonl")):
        assert main(["eval", str(run), "--against", nowhere])
        said = capsys.readouterr()
        assert not said.out  # the first model was not evaluated
        assert "which does not exist" in said.err
    files[1].write_text("".join(files[1].read_text().splitlines(keepends=True)[:-1]))
    for content, message in (
        (None, "b.jsonl ends before prompt 4 of greedy"),
        ('{"prompt": 1}\n', "line 1 must be a sample"),
    ):
        if content is not None:
            files[1].write_text(content)
        assert main(["eval", str(files[0]), "--against", str(files[1])])
        assert message in capsys.readouterr().err


def test_statistics_agree_with_counting_and_with_scipy():
    for n, k in ((5, 1), (5, 3), (4, 4)):
        for c in range(n + 1):
            drawn = [any(pick) for pick in itertools.combinations([True] * c + [False] * (n - c), k)]
            assert pass_at_k(n, c, k) == pytest.approx(np.mean(drawn))
    assert pass_at_k(3, 1, 4) is None
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - math.prod(1 - 100 / i for i in range(198, 201)))
    assert majority(["2", "1", None, "1", "2"]) == 0  # equally frequent: the one that was given first
    assert majority([None, "3", "4", "4"]) == 2
    assert majority([None]) is None
    assert maj_at_k(["1", "1", "2", "2", "2"], [True, True, False, False, False], 5) == 0
    assert maj_at_k(["1", "1", "2", "2", "2"], [True, True, False, False, False], 2) == 0.5  # the fifth is in no block
    assert maj_at_k(["9", "1", "9"], [None, True, None], 3) == 1  # what was not judged has no vote
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
    values = np.random.default_rng(0).normal(2, 1, 400)
    low, high = mean_interval(values, 2000)
    wanted = values.std() / 20 * 1.96
    assert (low, high) == pytest.approx((values.mean() - wanted, values.mean() + wanted), abs=0.012)
    assert mean_interval(values, 2000) == (low, high)


def test_memory_does_not_grow_with_the_rows_of_a_set(run, monkeypatch):
    """In Python, over blocks of six rows of sixty. A record of a sample has about 3,000 bytes, its numbers 150."""
    stream, seen = Sampler.stream, []

    def measured(*arguments):
        if len(seen) == 2:  # when all is compiled, for tracing is slow
            tracemalloc.start()
        gc.collect()
        seen.append(tracemalloc.get_traced_memory()[0])
        return stream(*arguments)

    monkeypatch.setattr(Sampler, "stream", measured)
    sixty = "{source: arithmetic, args: {operation: add, digits: 1}, max_prompts: 60}"
    overrides = [f"eval.sets={{drawn: null, greedy: null, sixty: {sixty}}}", "eval.block_size=6"]
    overrides += ["data.source=null", "data.eval_size=0"]
    overrides += ["data.args={operation: null, digits: null}", "checkpoint.best.metric=null"]
    try:
        result, _ = evaluate_source(run, overrides, keep_samples=False)
    finally:
        tracemalloc.stop()
    assert (result.sets["sixty"].scores.num_prompts, len(seen)) == (60, 10)
    slope = np.polyfit(6 * np.arange(3, 10), seen[3:], 1)[0]
    assert slope < 1000, f"{slope:.0f} bytes a row"


SOLUTIONS = """
import json, pathlib
from rl.sampler.user_source import Drawn

class Source:
    def __init__(self, tokenizer, problems, rights):
        self.tokenizer, self.rights = tokenizer, rights
        self.problems = [json.loads(line) for line in pathlib.Path(problems).read_text().splitlines()]

    def stream(self, params, prompts, requests, sampling, key):
        for place, request in enumerate(requests):
            text = self.tokenizer.decode([int(token) for token in prompts[request.prompt]])
            number = next(i for i, problem in enumerate(self.problems) if problem["prompt"] in text)
            is_right = request.sample_index < self.rights[number]
            code = self.problems[number]["answer"] if is_right else "    return None"
            code = self.problems[number]["starter"] + code
            ids = self.tokenizer.encode(f"```python\\n{code}\\n```", add_bos=False)
            yield place, Drawn([*ids, self.tokenizer.eos_ids[0]], [None] * (len(ids) + 1), "eos")

    def release(self): ...
    def close(self): ...

def make(config, tokenizer, problems, rights):
    return Source(tokenizer, problems, rights)
"""


def test_humaneval_has_pass_at_1_and_pass_at_10_in_the_sandbox(tmp_path, monkeypatch):
    """The recipe of docs/evaluation.md, with completions of which so many of ten are the reference solution."""
    pytest.importorskip("pydantic_monty", reason="needs the extra code")
    from examples.code_humaneval.make_data import to_row

    monkeypatch.chdir(tmp_path)
    rows = (FILES / "recipes" / "humaneval.jsonl").read_text().splitlines()
    (tmp_path / "humaneval.jsonl").write_text("".join(json.dumps(to_row(json.loads(row))) + "\n" for row in rows))
    (tmp_path / "solutions.py").write_text(SOLUTIONS)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (tmp_path / "humaneval.yml").write_text(re.search(r"^```yaml humaneval.yml\n(.*?)^```$", page, re.M | re.S)[1])
    rights = [0, 1, 10, 4]
    tiny = ["model.source=null", "tokenizer.source=byte", "data.chat=false", "rewards.num_workers=1"]
    tiny += ["model.arch={hidden_size: 8, intermediate_size: 8, num_layers: 1, num_heads: 1, num_kv_heads: 1}"]
    tiny += [
        "sampling.source=solutions.py:make",
        f"sampling.source_args={{problems: humaneval.jsonl, rights: {rights}}}",
    ]
    tiny += ["sampling.max_completion_length=1000", "data.max_prompt_length=1000", "mesh.num_devices=1"]
    result, _ = evaluate_source("humaneval.yml", tiny, output="samples.jsonl")
    scores = result.sets["humaneval"].scores.main
    assert scores["pass_at_1"].value == pytest.approx(sum(rights) / 40)
    assert scores["pass_at_10"].value == 3 / 4
    assert scores["pass_at_1"].low < scores["pass_at_1"].value < scores["pass_at_1"].high


def test_every_block_of_the_evaluation_page_is_a_file_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for _, name, body in blocks("docs/evaluation.md"):
        (tmp_path / name).write_text(body)
    config = load_config("evaluated.yml", ["output_dir=run"])
    train(config, check_only=True)
    page, keys = {*re.findall(r"`(\w+)`", text)}, {field.name for field in dataclasses.fields(EvalSet)}
    assert keys <= page
    assert SetScores(["flexible"], "flexible", 8, config.eval.sets["minus_drawn"].counted_ks, 100).main.keys() == {
        *("avg_at_8", "pass_at_1", "pass_at_4", "pass_at_8")
    }
    code: dict = {}
    exec((tmp_path / "last_word.py").read_text(), code)
    log = CallLog(2)
    assert code["last_word"]([], ["it is 7", ""], ["7", "7"], log.log_extra) == [1.0, 0.0]
    assert [log.of_sample(place) for place in range(2)] == [{"extracted": "7"}, {"extracted": None}]
