import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.run.metrics import CompileCounter, MetricsWriter, Stopwatch, peak_memory_bytes, read_metrics, read_samples


def write_steps(folder, start_step, steps):
    with MetricsWriter(folder, start_step) as writer:
        for step in steps:
            writer.write({"step": step, "reward/mean": step / 7})
            writer.write_samples(step, [{"completion": f"{step}.{i}", "reward": float(i)} for i in range(2)])


def test_written_metrics_are_read_back_exactly_with_step_first(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"lr": 1e-6, "step": 3, "kl": 0.1 + 0.2, "accuracy": 1, "on": True, "name": "x"})
    assert read_metrics(tmp_path) == [{"step": 3, "lr": 1e-6, "kl": 0.1 + 0.2, "accuracy": 1, "on": True, "name": "x"}]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 3, "lr": 1e-06, "kl": 0.30000000000000004,')


def test_numbers_that_json_lacks_become_null(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(
            {"step": 1, "a": math.nan, "b": -math.inf, "c": np.float32(np.nan), "d": jnp.float32(jnp.inf), "e": 2.0}
        )
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 2.0}


def test_numpy_and_jax_scalars_keep_their_value_and_type(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(
            {"step": np.int64(2), "a": np.float32(0.1), "b": jnp.int32(5), "c": jnp.bfloat16(0.5), "d": np.bool_(True)}
        )
    (row,) = read_metrics(tmp_path)
    assert row == {"step": 2, "a": float(np.float32(0.1)), "b": 5, "c": 0.5, "d": True}
    assert [type(value) for value in row.values()] == [int, float, int, float, bool]


def test_samples_keep_text_that_is_not_ascii_and_line_breaks(tmp_path):
    sample = {"completion": "\u00e9\u4e2d\n\u2028{}", "rewards": {"exact": 1.0, "format": None}, "ids": np.arange(3)}
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write_samples(4, [sample, sample])
    expected = {"step": 4, **sample, "ids": [0, 1, 2]}
    assert read_samples(tmp_path) == [expected, expected]


def test_resuming_drops_the_steps_that_run_again_and_gives_the_uninterrupted_files(tmp_path):
    write_steps(tmp_path / "whole", 0, range(1, 9))
    write_steps(tmp_path / "resumed", 0, range(1, 7))
    write_steps(tmp_path / "resumed", 5, range(5, 9))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == [
        "events.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
    ]


def test_every_cut_of_the_last_line_leaves_readable_files_that_resume(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    last_line_start = whole[:-1].rfind(b"\n") + 1
    for cut in range(last_line_start, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
        write_steps(tmp_path, 3, [3])
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_step_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "kl": 0.5})
        assert read_metrics(tmp_path) == [{"step": 1, "kl": 0.5}]


def test_a_killed_writer_leaves_readable_files(tmp_path):
    script = """
import itertools, sys
from rl.run.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], 0)
for step in itertools.count(1):
    writer.write({"step": step, "text": "x" * 5000})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        seen = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        seen += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[: len(seen)] == seen


def test_a_broken_line_inside_the_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, 3)


def test_a_line_without_a_step_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kl": 1}\n')
    with pytest.raises(ValueError, match="line 1, must be a JSON object with an integer step"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="RUN must be a run folder"):
        read_metrics(tmp_path)


def test_stopwatch_sums_phases_and_starts_again_each_lap():
    watch = Stopwatch()
    for _ in range(2):
        with watch.timer("rollout"):
            time.sleep(0.01)
    with pytest.raises(KeyError), watch.timer("train"):
        raise KeyError
    lap = watch.lap()
    assert list(lap) == ["seconds/rollout", "seconds/train", "seconds/step", "seconds/other"]
    assert lap["seconds/rollout"] >= 0.02
    assert lap["seconds/other"] >= 0
    assert lap["seconds/step"] == pytest.approx(sum(lap.values()) - lap["seconds/step"])
    assert list(watch.lap()) == ["seconds/step", "seconds/other"]


def test_compile_counter_counts_new_programs_only():
    double = jax.jit(lambda x: x * 2 + 1)
    small, large = jnp.ones(3), jnp.ones(5)
    with CompileCounter() as counter:
        double(small).block_until_ready()
        assert counter.lap() == 1
        double(small).block_until_ready()
        assert counter.lap() == 0
        double(large).block_until_ready()
        assert counter.lap() == 1
        assert counter.count == 2


def test_compile_counter_counts_compilations_of_other_threads():
    triple = jax.jit(lambda x: x * 3 + 1)
    x = jnp.ones(3)
    with CompileCounter() as counter:
        thread = threading.Thread(target=lambda: triple(x).block_until_ready())
        thread.start()
        thread.join()
        assert counter.count == 1


def test_a_closed_compile_counter_counts_no_more():
    x = jnp.ones(3)
    counter, witness = CompileCounter(), CompileCounter()
    counter.close()
    counter.close()
    with witness:
        jax.jit(lambda x: x * 5 + 1)(x).block_until_ready()
        assert (counter.count, witness.count) == (0, 1)


def test_peak_memory_is_bytes_and_grows_with_use():
    before = peak_memory_bytes()
    pages = pathlib.Path("/proc/self/statm")
    now = int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else 0
    block = np.ones((before - now + 200_000_000) // 8)  # beyond the peak, so that it has to move
    assert block[-1] == 1
    assert before > 50e6  # a process with jax in it
    assert peak_memory_bytes() >= before + 100_000_000
