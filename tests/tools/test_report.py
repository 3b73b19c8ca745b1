import math
import random
import subprocess
import sys

import pytest

from rl.run.metrics import MetricsWriter
from rl.run_folder.remote_steps import copy_of_report
from rl.tools.report.read import Run, read_runs
from rl.tools.report.report import main
from rl.tools.report.summary import format_table, smooth, summarize
from tests.helpers.places import ROOT
from tests.helpers.remote_stores import clear, memory_store

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(folder, seed, num_steps=60, without=()):
    """A run whose reward rises from about 0.3 to about 0.9, with noise, evaluated before and during training."""
    noise = random.Random(seed)
    with MetricsWriter(folder, 0) as writer:
        writer.write({"step": 0, "eval/accuracy": 0.25})
        for step in range(1, num_steps + 1):
            row = {
                "step": step,
                "reward/mean": 0.3 + 0.6 * step / num_steps + noise.gauss(0, 0.02),
                "kl": 0.001 * step,
                "entropy": math.exp(-step / 30),
                "completion_length/mean": 12.0 + noise.random(),
                "completion_length/max": 20,
                "seconds/rollout": 0.5 if step == 1 else 0.1,
                "seconds/step": 1.0,
                "tokens_per_second/rollout": 100.0 if step == 1 else 1000.0,
                "peak_memory_gb": 1.25,
            }
            if step % 20 == 0:
                row["eval/accuracy"] = 0.25 + 0.01 * step
            writer.write({name: value for name, value in row.items() if name not in without})


def read_png_size(path):
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_report_writes_a_page_into_the_run_folder_or_a_picture_where_told_and_prints_the_path(tmp_path, capsys):
    write_run(tmp_path / "sums", seed=0)
    assert main([str(tmp_path / "sums")]) == 0
    assert f"report: {tmp_path / 'sums' / 'report.html'}" in capsys.readouterr().out
    picture = tmp_path / "sums" / "reward.png"
    assert main([str(tmp_path / "sums"), "--output", str(picture)]) == 0
    width, height = read_png_size(picture)
    assert width > 1000
    assert height > 800
    output = capsys.readouterr().out
    assert f"curves: {picture}" in output
    assert "held-out accuracy, after   85.0% (step 60)" in output


def test_a_page_is_written_without_jax(tmp_path):
    write_run(tmp_path, seed=0, num_steps=1)
    code = "import sys; from rl.tools.report.report import main; main(sys.argv[1:]); "
    code += "print([name for name in ('jax', 'matplotlib', 'transformers') if name in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.endswith("\n[]\n")


def test_of_a_run_in_a_store_the_files_that_are_there_now_are_read(tmp_path):
    store, place = memory_store("reported"), tmp_path / "place"
    store.write("metrics.jsonl", b'{"step": 1, "loss": 0.5}\n')
    store.write("events.jsonl", b'{"step": 1, "warning": "early"}\n')
    copy_of_report(store, place)
    (run,) = read_runs([place])
    assert ([event["warning"] for event in run.events], run.samples) == (["early"], [])
    store.remove(["events.jsonl"])
    copy_of_report(store, place)
    assert read_runs([place])[0].events == []
    clear()


def test_summary_tells_what_the_run_did(tmp_path):
    write_run(tmp_path / "sums", seed=0)
    (run,) = read_runs([tmp_path / "sums"])
    summary = summarize(run)
    assert summary["steps"] == "60"
    assert 0.28 < float(summary["reward, first"]) < 0.36
    assert 0.84 < float(summary["reward, last"]) < 0.94
    assert float(summary["reward, best"].split()[0]) >= float(summary["reward, last"]) - 0.02
    assert summary["held-out accuracy, before"] == "25.0% (step 0)"
    assert summary["KL, last"] == "0.0600"
    assert summary["time in steps"] == "1m00s"
    assert summary["peak memory"] == "1.25 GB"


def test_mean_speed_is_weighted_by_time(tmp_path):
    write_run(tmp_path / "sums", seed=0)
    (run,) = read_runs([tmp_path / "sums"])
    tokens, seconds = 100 * 0.5 + 59 * 1000 * 0.1, 0.5 + 59 * 0.1
    assert summarize(run)["tokens/s, rollout"] == f"{tokens / seconds:.0f}"


def test_several_runs_share_one_picture_and_one_table(tmp_path, capsys):
    write_run(tmp_path / "nnx", seed=0)
    write_run(tmp_path / "linen", seed=1, without=("kl", "eval/accuracy"))
    output = tmp_path / "plots" / "both.png"
    assert main([str(tmp_path / "nnx"), str(tmp_path / "linen"), "--output", str(output)]) == 0
    read_png_size(output)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["nnx", "linen"]
    (kl_line,) = [line for line in lines if line.startswith("KL, last")]
    assert kl_line.split()[-2:] == ["0.0600", "-"]


def test_runs_in_folders_of_one_name_are_told_apart_by_path(tmp_path):
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "run", seed=0, num_steps=2)
    names = [run.name for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert names == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_a_supervised_run_shows_its_loss(tmp_path, capsys):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in range(1, 41):
            writer.write({"step": step, "loss": 4.0 / step, "kl": math.nan})
    assert main([str(tmp_path), "--output", str(tmp_path / "reward.png")]) == 0
    assert "loss, first  3.000" in capsys.readouterr().out
    read_png_size(tmp_path / "reward.png")


def test_a_run_of_one_step_can_be_reported(tmp_path):
    write_run(tmp_path, seed=0, num_steps=1)
    assert main([str(tmp_path)]) == 0


def test_an_empty_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="must hold at least one step"):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match=r"got '.*metrics\.jsonl', a file; name the folder, "):
        main([str(tmp_path / "metrics.jsonl"), "--output", str(tmp_path / "report.html")])


def test_a_picture_format_that_is_not_known_is_refused(tmp_path):
    write_run(tmp_path, seed=0, num_steps=2)
    with pytest.raises(ValueError, match=r"must end in one of \.html, \.htm, \.png"):
        main([str(tmp_path), "--output", str(tmp_path / "curve.bmp")])


def test_a_run_without_anything_to_draw_is_refused(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "lr": 0.1})
    with pytest.raises(ValueError, match="to be drawn"):
        main([str(tmp_path), "--output", str(tmp_path / "reward.png")])


def test_smoothing_starts_at_the_first_value_keeps_constants_and_lags_less_than_its_window():
    assert smooth([3.0, 5.0], window=4)[0] == 3.0
    assert smooth([2.0] * 9, window=4) == pytest.approx([2.0] * 9)
    assert smooth([1.0, 4.0, 2.0], window=1) == [1.0, 4.0, 2.0]
    step_response = smooth([0.0] * 20 + [1.0] * 20, window=4)
    assert 0.8 < step_response[24] < 1.0


def test_null_values_are_left_out_of_a_series():
    run = Run("x", [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3}, {"step": 4, "kl": 0.25}])
    assert run.series("kl") == ([1, 4], [0.5, 0.25])
    assert format_table([run]).splitlines()[1].split() == ["steps", "4"]


@pytest.mark.parametrize("name", ["report.html", "reward.png", "curves.pdf", "curves.svg"])
def test_a_report_takes_the_place_of_one_that_was_written_before_and_of_nothing_else(tmp_path, name):
    write_run(tmp_path / "run", seed=0, num_steps=2)
    path, mine = tmp_path / "run" / name, tmp_path / "mine"
    mine.write_text("mine")
    command = [str(tmp_path / "run"), "--output", str(path)]
    for make in (path.symlink_to, lambda mine: path.write_text(mine.read_text())):
        make(mine)
        with pytest.raises(ValueError, match="move it away, or name another one by --output"):
            main(command)
        assert path.read_text() == mine.read_text() == "mine"
        path.unlink()
    for _ in range(2):
        assert main(command) == 0
    assert path.stat().st_size > 1000
    assert not list(path.parent.glob(".tandem-*"))
