"""The benchmarks of whole trainers on tiny shapes: what they count, compare and refuse."""

import dataclasses
import importlib
import json
import statistics
import types

import numpy as np
import pytest

from rl.training.packing import TrainCompletion, TrainGroup, pack
from tests.helpers.places import ROOT

FOLDER = ROOT / "benchmarks"
# Tunix names its shardings as older flax did, and calls its own cache for Llama deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def benchmark(monkeypatch):
    """The modules of the benchmarks, imported as `python benchmarks/train_step.py` would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = (
        "accelerator",
        "comparison",
        "grpo_step",
        "shapes",
        "step_results",
        "stepped",
        "train_step",
        "trainers",
        "turns",
    )
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def installed(benchmark):
    return [name for name in ("tandem", "tunix", "trl") if benchmark.trainers.is_installed(name)]


@pytest.mark.slow
def test_updates_of_all_installed_trainers_agree_and_are_compared(benchmark, tmp_path):
    file = tmp_path / "train_step.json"
    arguments = ["--tiny", "--repeats", "2", "--shapes", "a", "--workloads", "i-ragged", "--json", str(file)]
    report = benchmark.train_step.main(arguments)
    read = json.loads(file.read_text())
    results = read["results"]
    assert results == report["results"]
    assert [result["engine"] for result in results] == installed(benchmark)
    assert "tunix" in installed(benchmark)
    fastest_peer = min(result["seconds"] for result in results[1:])
    workload = benchmark.shapes.tiny_workload(benchmark.shapes.TRAIN_WORKLOADS["i-ragged"])
    lengths = [sum(map(len, workload.completions(64, seed))) for seed in (1, 2)]  # batch 0 is the check's
    for result in results:
        assert [call["num_tokens"] for call in result["calls"]] == lengths
        assert result["seconds"] == statistics.median(call["seconds"] for call in result["calls"])
        assert result["ratio"] == pytest.approx(result["seconds"] / fastest_peer)
        assert result["share"] > 0
        assert result["target"] is None  # a tiny run reaches nothing and misses nothing
    nnx, linen = read["flavours"]
    assert (nnx["flavour"], linen["flavour"]) == ("nnx", "linen")
    assert nnx["operations"] == linen["operations"] > 0
    assert nnx["bytes_accessed"] == linen["bytes_accessed"] > 0


@pytest.mark.slow
def test_whole_steps_of_all_installed_trainers_are_compared(benchmark):
    report = benchmark.grpo_step.main(["--tiny", "--repeats", "2", "--shapes", "a", "--workloads", "i-ragged"])
    results = report["results"]
    assert [result["engine"] for result in results] == installed(benchmark)
    for result in results:
        assert len(result["calls"]) == 2
        for call in result["calls"]:
            assert 6 <= call["num_tokens"] <= 6 * 12  # 2 prompts x 3 samples, up to the cap
        assert (result["share"], result["target"]) == (None, None)
    assert any(result["mean_length"] < 12 for result in results)


@pytest.mark.slow
def test_trainers_measured_apart_are_compared_as_well(benchmark, monkeypatch):
    events = []
    for trainer in (benchmark.trainers.TandemTrainer, benchmark.comparison.PEER_TRAINERS["tunix"]):
        step, close = trainer.step, trainer.close
        monkeypatch.setattr(trainer, "step", lambda self, step=step: events.append(self.name) or step(self))
        monkeypatch.setattr(trainer, "close", lambda self, close=close: events.append("end") or close(self))
    arguments = ["--tiny", "--repeats", "2", "--shapes", "a", "--workloads", "i-ragged", "--apart"]
    peer, own = benchmark.grpo_step.main([*arguments, "--engines", "tunix,tandem"])["results"]
    assert events == ["tunix"] * 3 + ["end"] + ["tandem"] * 3 + ["end"]
    assert (peer["engine"], own["engine"]) == ("tunix", "tandem")
    assert own["ratio"] == pytest.approx(own["seconds"] / peer["seconds"])


@pytest.mark.slow
def test_memory_of_compiled_steps_is_compared(benchmark):
    found = benchmark.train_step.main(["--memory", "--tiny", "--set", "grpo.loss_type=dapo"])["memory"]
    assert (found["platform"], found["num_devices"]) == ("cpu", 1)
    assert found["tandem"] == found["one_device"] > found["one_device_small_vocabulary"] > 0
    embedding = (151936 // 64 - 1024 // 64) * 32 * 4
    assert found["growth"] == pytest.approx(found["one_device"] / (found["one_device_small_vocabulary"] + embedding))
    if benchmark.trainers.is_installed("tunix"):
        assert found["share"] == pytest.approx(found["tandem"] / found["tunix"])


@pytest.mark.slow
def test_updates_on_an_accelerator_are_timed_alone(benchmark, tmp_path, capsys):
    file = tmp_path / "updates.json"
    arguments = ["--preset", "gpu", "--tiny", "--repeats", "2", "--shapes", "0.6b", "--workloads", "4k"]
    report = benchmark.train_step.main([*arguments, "--set", "model.remat=block", "--json", str(file)])
    (result,) = json.loads(file.read_text())["updates"]
    assert result == report["updates"][0]
    assert (result["shape"], result["workload"], result["attention"]) == ("0.6b", "4k", "xla attention")
    assert result["num_tokens"] == 1024
    assert [call["num_tokens"] for call in result["calls"]] == [16 * 8 * 8] * 2  # prompts x completions x tokens
    assert result["seconds"] == statistics.median(call["seconds"] for call in result["calls"])
    assert result["tokens_per_second"] == pytest.approx(1024 / result["seconds"])
    assert (result["mfu"], result["peak_bytes"], result["num_compiles"]) == (None, None, 0)  # of a CPU
    assert "rows of 4k tokens" in capsys.readouterr().out


def test_mfu_and_peak_memory_are_those_of_the_device(benchmark):
    accelerator, plan = benchmark.accelerator, benchmark.shapes.row_plan("16k")
    calls = [benchmark.turns.Call(seconds, seconds, 640, 1) for seconds in (1.0, 2.0, 9.0)]

    def result(kind, peaks):
        setting = ("0.6b", "16k", kind, "cudnn attention")
        return accelerator.summarize_updates(setting, plan, calls, [989.4e12, 0.4 * 2 * 989.4e12, 989.4e12], peaks)

    own, other, unknown = (
        result("NVIDIA H100 80GB HBM3", (5 * 10**9, 7 * 10**9)),
        result("NVIDIA H100 80GB HBM3", (7 * 10**9, 7 * 10**9)),
        result("cpu", (None, None)),
    )
    assert (own.seconds, own.min_seconds, own.max_seconds, own.num_compiles) == (2.0, 1.0, 9.0, 3)
    assert (own.num_tokens, own.tokens_per_second, own.mfu) == (65536, 32768.0, pytest.approx(0.4))
    assert (own.is_own_peak, other.is_own_peak, unknown.is_own_peak) == (True, False, False)
    columns = accelerator.updates_table([own, other, unknown]).columns
    cells = {column.header: list(column.cells) for column in columns}
    assert cells["peak GB"] == ["7.0", "<= 7.0", "n/a"]
    assert cells["MFU"] == ["40.0%", "40.0%", "n/a"]
    assert cells["ms/update"] == ["2000"] * 3


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", ["4k", "8k", "16k"])
def test_rows_on_an_accelerator_are_full(benchmark, name, tiny):
    workload, plan = benchmark.shapes.row_workload(name, tiny), benchmark.shapes.row_plan(name, tiny)
    prompts, completions = workload.prompts(64, 0), iter(workload.completions(64, 0))
    groups = [
        TrainGroup(np.int32(prompt), [TrainCompletion(np.int32(next(completions))) for _ in range(8)])
        for prompt in prompts
    ]
    batch = pack(groups, plan)
    assert batch.tokens_MRT.size == 65536 // (64 if tiny else 1)
    assert batch.num_microbatches == plan.num_microbatches
    assert (batch.group_ids_MRT == 0).all()  # one group in each row, and no padding


def test_trainers_that_compute_something_else_are_not_compared(benchmark):
    outcome = benchmark.trainers.Outcome(100, 0.5, 2.0)
    check = benchmark.trainers.check_same_outcome
    check({"tandem": outcome, "tunix": outcome._replace(loss=0.5004, grad_norm=1.999)}, 1e-3)
    for changes, message in (
        ({"loss": 0.51}, r"loss of trl must be within 0\.001 of tandem's 0\.5, got 0\.51"),
        ({"grad_norm": float("nan")}, r"grad_norm of trl must be within .* got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            check({"tandem": outcome, "tunix": outcome, "trl": outcome._replace(**changes)}, 1e-3)


def test_ratio_is_to_the_faster_peer_and_decides_the_target(benchmark):
    Call, summarize = benchmark.turns.Call, benchmark.step_results.summarize_steps
    seconds = {"tandem": (1.0, 2.0, 9.0), "tunix": (5.0, 4.0, 3.0), "trl": (5.0, 10.0, 20.0)}
    calls = {name: [Call(s, 1.5 * s, 640, 1) for s in times] for name, times in seconds.items()}
    by_target = {
        target: summarize("b", "i", 32, calls, [10.0, 40.0, 90.0], 100.0, target) for target in (0.4, 0.5, None)
    }
    tandem, tunix, trl = by_target[0.5]
    assert (tandem.seconds, tandem.min_seconds, tandem.max_seconds) == (2.0, 1.0, 9.0)
    assert (tandem.ratio, tunix.ratio, trl.ratio) == (0.5, 1.0, 2.5)
    assert (tandem.mean_length, tandem.cores, tandem.share, tandem.num_compiles) == (20.0, 1.5, 0.1, 3)
    assert [by_target[target][0].met for target in (0.4, 0.5, None)] == [False, True, None]
    assert (tunix.target, tunix.met) == (None, None)
    row = {c.header: next(iter(c.cells)) for c in benchmark.step_results.steps_table(by_target[0.4], "").columns}
    assert (row["ms/step"], row["min-max"], row["share"], row["ratio"]) == ("2000", "1000-9000", "10.0%", "0.50x")
    assert row["target"] == "0.40x missed"
    alone = summarize("b", "i", 32, {"tandem": calls["tandem"]}, None, 100.0, 0.5)[0]
    assert (alone.ratio, alone.met, alone.share) == (None, None, None)


def test_operations_count_real_tokens_once_as_computed_by_hand(benchmark):
    config = benchmark.shapes.tiny_shape(benchmark.shapes.CPU_SHAPES["a"])
    batch = benchmark.trainers.Batch([[2, 3, 4], [5, 6]], [[7], [8, 9], [2], [3]], [0.0] * 4)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, the mlp
    tokens, completion_tokens = 5 + 5, 5
    seen = (1 + 2 + 3) + (1 + 2) + 4 + (4 + 5) + 3 + 3  # prompts, then each completion's tokens
    forward = 2 * layer * tokens + 2 * 64 * 32 * completion_tokens + 4 * 4 * 8 * seen
    assert benchmark.step_results.model_operations(config, batch) == 4 * forward
    deeper = dataclasses.replace(config, num_layers=2, layer_types=config.layer_types * 2)
    extra = 2 * layer * tokens + 4 * 4 * 8 * seen
    assert benchmark.step_results.model_operations(deeper, batch) == 4 * (forward + extra)


def test_batches_have_the_lengths_of_their_workload(benchmark):
    for name, (prompt, cap, mean) in {"i": (64, 128, 128), "i-ragged": (64, 128, 64), "ii": (192, 256, 102.4)}.items():
        workload = benchmark.shapes.TRAIN_WORKLOADS[name]
        batches = benchmark.trainers.make_batches(workload, 4096, 40, with_completions=True)
        eos_ids, pad = workload.eos_ids(4096), benchmark.trainers.PAD_ID
        assert pad not in eos_ids
        lengths = [len(completion) for batch in batches for completion in batch.completions]
        assert abs(np.mean(lengths) - mean) < 8  # about three standard errors
        assert max(lengths) == cap
        for batch in batches:
            assert ([len(ids) for ids in batch.prompts], len(batch.completions)) == ([prompt] * 4, 32)
            assert len(set(batch.rewards)) == 32
            for ids in batch.completions:
                assert not np.isin(ids[:-1], (*eos_ids, pad)).any()
                assert len(ids) == cap or ids[-1] in eos_ids
        assert batches[0].prompts != batches[1].prompts
        drawn = benchmark.trainers.make_batches(workload, 4096, 1, with_completions=False)[0]
        assert drawn == (batches[0].prompts, None, None)


def test_a_loop_is_run_one_step_at_a_time(benchmark):
    done = []

    def loop(pause):
        for step in range(3):
            pause()
            done.append(step)

    stepped = benchmark.stepped.SteppedLoop(loop)
    assert done == []
    stepped.step()
    assert done == [0]
    stepped.step()
    stepped.close()
    assert done == [0, 1]


def test_an_error_in_a_stepped_loop_reaches_the_caller(benchmark):
    def loop(pause):
        pause()
        raise ZeroDivisionError("in the loop")

    stepped = benchmark.stepped.SteppedLoop(loop)
    with pytest.raises(ZeroDivisionError, match="in the loop"):
        stepped.step()
    short = benchmark.stepped.SteppedLoop(lambda pause: pause())
    with pytest.raises(ValueError, match="one batch more"):
        short.step()
    for loop in (stepped, short):
        loop.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "z"], "--shapes must name some of a, b, c, got 'z'"),
        (["--workloads", "dense"], "--workloads must name some of i, i-ragged, ii, got 'dense'"),
        (["--engines", "verl"], "--engines must name some of tandem, tunix, trl, got 'verl'"),
        (["--repeats", "0"], "--repeats must be >= 1, got 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(benchmark, capsys, arguments, message):
    for program in (benchmark.train_step, benchmark.grpo_step):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "a"], "--shapes must name some of 0.6b, 1.7b, got 'a'"),
        (["--workloads", "i"], "--workloads must name some of 4k, 8k, 16k, got 'i'"),
        (["--engines", "trl"], "--engines must name some of tandem, got 'trl'"),
        (["--memory"], "--preset gpu must be given without --memory and --apart"),
    ],
)
def test_arguments_that_mean_nothing_on_an_accelerator_are_refused(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.train_step.main(["--preset", "gpu", *arguments])
    assert message in capsys.readouterr().err
