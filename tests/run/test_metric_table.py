import ast
import json
import re

import pytest

from rl.config.load import load_config, to_dict
from rl.config.sections import flatten
from rl.run.metric_page import page
from rl.run.metric_table import METRICS, RENAMED, current_name, entry_of
from rl.run.metrics import read_metrics, read_samples
from tests.helpers.metric_lines import without_entry
from tests.helpers.places import ROOT

ENTRIES = [metric for subject in METRICS for metric in subject.metrics]
TABLE = ROOT / "rl" / "run" / "metric_table.py"


@pytest.fixture(scope="module")
def written() -> tuple[set[str], set[str]]:
    """Texts in the code, and texts with something put in, as patterns in which that is `<>`."""
    texts, patterns = set(), set()
    for path in [*(ROOT / "rl").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]:
        if path == TABLE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "<>" for part in node.values]
                patterns.add("".join(map(str, parts)))
    return texts, patterns


def test_the_page_of_metrics_is_the_one_of_the_table():
    now = (ROOT / "docs" / "metrics.md").read_text()
    assert now == page(), "python -m rl.run.metric_page > docs/metrics.md"


def test_every_entry_is_of_a_metric_that_the_code_writes(written):
    texts, patterns = written
    parts = [re.compile(re.escape(text).replace("<>", ".+")) for text in patterns if "/" in text.strip("<>/")]
    parts += [re.compile(".+/.+".join(map(re.escape, ends))) for ends in (("reward/", ""), ("environment/", ""))]
    lasts = {text.rpartition("/")[2] for text in texts | patterns}
    unknown = []
    for metric in ENTRIES:
        name = metric.name.replace("[eval/[<set>/]]", "").replace("eval/[<set>/]", "")
        name = re.sub(r"<\w+>", "<>", name)
        last = name.rpartition("/")[2]
        is_whole = name in texts | patterns or any(pattern.fullmatch(name) for pattern in parts)
        if not is_whole or (last != "<>" and last not in lasts):
            unknown.append(metric.name)
    assert not unknown


def test_names_are_of_one_scheme_and_keys_in_the_table_exist():
    keys = {*flatten(to_dict(load_config(None))), "rewards.functions", "data.curriculum"}
    names = [metric.name for metric in ENTRIES]
    assert len({*names}) == len(names)
    for metric in ENTRIES:
        assert re.fullmatch(r"[a-z0-9_/<>\[\]]+", metric.name), metric.name
        assert "/" in metric.name or not metric.name.endswith(("_mean", "_max", "_min", "_std")), metric.name
        for text in (metric.meaning, metric.unit, metric.healthy, metric.advice):
            assert "|" not in text
            assert text.isascii()
            for key in re.findall(r"`([a-z_]+\.[a-z_.]+)[:`]", text):
                assert key in keys or key in ("samples.jsonl", "rewards.log"), key


def test_a_metric_without_an_entry_is_found_and_one_of_a_users_own_name_has_one():
    names = ["step", "loss", "clip_ratio/low_mean", "reward/a/b/mean", "reward/mine/acc", "eval/reward/mine/mean"]
    names += ["eval/easy/accuracy", "eval/turns/mean", "turns/mean", "environment/game/won", "seconds/rollout"]
    assert not without_entry(dict.fromkeys(names, 0))
    assert without_entry({"step": 1, "kl": 0, "clip_ratio/high": 0, "surprise": 0}) == ["clip_ratio/high", "surprise"]
    logged, of_run = entry_of("reward/mine/acc"), entry_of("reward/mine/mean")
    assert logged is not None
    assert of_run is not None
    assert (logged.name, of_run.name) == ("reward/<function>/<metric>", "reward/<function>/mean")


def test_lines_of_an_older_run_are_read_under_todays_names(tmp_path):
    old = {"step": 1, "ratio_max": 1.5, "clip_ratio_high_max": 0.25, "kl": 0.5, "eval/reward/exact": 0.75}
    old |= {"eval/easy/reward/exact": 1.0, "eval/reward/exact/words": 3.0, "reward/a/b/timeout": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n" + json.dumps({"step": 2, "ratio/max": 2.0}) + "\n")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 1, "tokens": 3, "completion": "x"}) + "\n")
    first, second = read_metrics(tmp_path)
    assert first == {
        "step": 1,
        "ratio/max": 1.5,
        "clip_ratio/high_max": 0.25,
        "kl": 0.5,
        "eval/reward/exact/mean": 0.75,
        "eval/easy/reward/exact/mean": 1.0,
        "eval/reward/exact/words": 3.0,
        "reward/a/b/timeouts": 2,
    }
    assert second == {"step": 2, "ratio/max": 2.0}
    assert read_samples(tmp_path) == [{"step": 1, "num_tokens": 3, "completion": "x"}]
    for name in RENAMED.values():
        assert entry_of(name) is not None, name
        assert current_name(name) == name, "a name of today is no old one"
