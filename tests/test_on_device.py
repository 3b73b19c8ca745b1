"""benchmarks/on_device.py: it keeps to its budget, names what did not run, and writes its table after each part."""

import importlib
import json

import pytest

from tests.helpers.places import ROOT


@pytest.fixture
def on_device(monkeypatch):
    """The module, imported as `python benchmarks/on_device.py` would."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("on_device")


def part(on_device, code):
    return on_device.Part("part", lambda folder, tiny: ["-c", code], lambda folder: [("what", "1 tokens/s")])


def test_without_time_every_part_is_named_and_none_is_begun(on_device, tmp_path, capsys):
    results = on_device.main(["--budget", "0", "--out", str(tmp_path)])
    assert [*results] == ["update", "decode", "step", "xla", "cudnn", "quickstart"]
    assert {result["not_run"] for result in results.values()} == {"0 s were left of the budget"}
    assert json.loads((tmp_path / "on_device.json").read_text()) == results
    assert "- decode: 0 s were left" in (tmp_path / "on_device.md").read_text()
    assert "quickstart: 0 s were left of the budget" in capsys.readouterr().out


def test_a_part_that_fails_or_takes_too_long_says_so_and_the_others_count(on_device, tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "LEAST_SECONDS", 0)
    good = on_device.run_part(part(on_device, "print(1)"), tmp_path, False, 60)
    bad = on_device.run_part(part(on_device, "raise SystemExit('no such device')"), tmp_path, False, 60)
    slow = on_device.run_part(part(on_device, "import time; time.sleep(600)"), tmp_path, False, 0.3)
    assert good["rows"] == [("what", "1 tokens/s")]
    assert bad["not_run"] == "exit status 1: no such device"
    assert slow["not_run"].startswith("it was not done in the 0 s that were left")
    lost = part(on_device, "print(1)")._replace(rows=lambda folder: json.loads("{}")["results"])
    assert on_device.run_part(lost, tmp_path, False, 60)["not_run"] == "its results cannot be read: KeyError: 'results'"
    text = on_device.table({"good": good, "bad": bad})
    assert text.splitlines()[2] == "| what | 1 tokens/s |"
    assert text.endswith("Did not run:\n\n- bad: exit status 1: no such device\n")


def test_parts_that_do_not_exist_are_refused(on_device, tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_device.main(["--parts", "update,speed", "--out", str(tmp_path)])
    assert (
        "--parts must name some of update, decode, step, xla, cudnn, quickstart, got speed" in capsys.readouterr().err
    )


@pytest.mark.long
def test_every_part_but_that_of_nvidia_runs_on_a_cpu(on_device, tmp_path):
    results = on_device.main(["--tiny", "--budget", "1800", "--out", str(tmp_path)])
    assert [name for name, result in results.items() if "not_run" in result] == ["cudnn"]
    assert "gpu only" in results["cudnn"]["not_run"]
    measured = (tmp_path / "on_device.md").read_text()
    for what in (
        "update, 0.6b, 4k",
        "decode, 0.6b, rows64",
        "whole GRPO step",
        "sampler against trainer",
        "peak memory",
    ):
        assert what in measured
