"""The rollout benchmark on tiny shapes: what it counts, compares and refuses."""

import copy
import importlib
import json
import pathlib
import re
import statistics
import types

import numpy as np
import pytest

from tests.helpers.places import ROOT

FOLDER = ROOT / "benchmarks"
# Tunix names its shardings as older flax did, and calls its own cache for Llama deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.slow]


@pytest.fixture
def benchmark(monkeypatch):
    """The modules of the benchmark, imported as `python benchmarks/rollout.py` would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = ("engines", "results", "rollout", "shapes")
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_one_run_compares_all_installed_engines(benchmark, tmp_path, capsys):
    file = tmp_path / "rollout.json"
    arguments = ["--tiny", "--repeats", "2", "--shapes", "a", "--workloads", "dense", "--json", str(file)]
    report = benchmark.rollout.main(arguments)
    results = json.loads(file.read_text())["results"]
    assert results == report["results"]
    installed = [name for name in ("tandem", "tunix", "trl") if benchmark.engines.is_installed(name)]
    assert "tunix" in installed
    assert [result["engine"] for result in results] == installed
    fastest_peer = max(result["tokens_per_second"] for result in results[1:])
    for result in results:
        calls = result["calls"]
        assert [call["num_tokens"] for call in calls] == [2 * 3 * 12] * 2  # prompts x samples x tokens
        assert result["mean_length"] == 12
        rates = [call["num_tokens"] / call["seconds"] for call in calls]
        assert result["tokens_per_second"] == pytest.approx(statistics.median(rates))
        assert result["ratio"] == pytest.approx(result["tokens_per_second"] / fastest_peer)
        assert result["target"] is None  # a tiny run reaches nothing and misses nothing
    told = capsys.readouterr().out
    for floor in ("matrix products with weights alone", "and those of attention"):
        assert re.search(rf"{floor}: .* tokens/s, [\d.]+x the better peer", told)


def test_without_a_peer_there_is_no_ratio(benchmark):
    arguments = ["--preset", "gpu", "--tiny", "--repeats", "1", "--shapes", "0.6b", "--workloads", "rows64,rows128"]
    results = benchmark.rollout.main([*arguments, "--engines", "tandem"])["results"]
    assert [(result["workload"], result["engine"]) for result in results] == [
        ("rows64", "tandem"),
        ("rows128", "tandem"),
    ]
    assert all(result["ratio"] is None and result["share"] > 0 for result in results)


@pytest.mark.parametrize(("name", "shape"), [("tunix", "c"), ("trl", "a")])
def test_a_peer_computes_the_same_and_ends_at_the_first_eos_or_the_cap(benchmark, tmp_path, name, shape):
    if not benchmark.engines.is_installed(name):
        pytest.skip(f"the library behind {name} is not installed")
    config = benchmark.shapes.tiny_shape(benchmark.shapes.CPU_SHAPES[shape])
    workload = benchmark.shapes.Workload(4, 8, (5, 9), 12, mean_share=0.6)
    weights = benchmark.engines.Weights(config)
    benchmark.rollout.hf.save_folder(tmp_path / "model", config, weights.params)
    engine = benchmark.engines.build_engine(name, weights, tmp_path / "model", workload)
    tandem = benchmark.engines.Tandem(weights, workload)
    benchmark.engines.check_same_logits([tandem, engine], config.vocab_size, 1e-5)
    eos_ids = workload.eos_ids(config.vocab_size)
    completions = engine.generate(workload.prompts(config.vocab_size, 3), 3)
    assert len(completions) == 32
    lengths = [len(ids) for ids in completions]
    assert max(lengths) == 12
    assert min(lengths) < 12
    for ids in completions:
        assert not np.isin(ids[:-1], eos_ids).any()
        assert ids[-1] in eos_ids or len(ids) == 12
    again, other = (engine.generate(workload.prompts(config.vocab_size, 3), seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(completions, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(completions, other, strict=True))


def test_engines_of_different_weights_are_not_compared(benchmark):
    config = benchmark.shapes.tiny_shape(benchmark.shapes.CPU_SHAPES["a"])
    workload = benchmark.shapes.tiny_workload(benchmark.shapes.CPU_WORKLOADS["dense"])
    weights = benchmark.engines.Weights(config)
    changed = copy.copy(weights)
    changed.params = weights.params | {"norm": {"scale": 1.1 * weights.params["norm"]["scale"]}}
    tandem, other = (benchmark.engines.Tandem(each, workload) for each in (weights, changed))
    benchmark.engines.check_same_logits([tandem, tandem], config.vocab_size, 0.0)
    with pytest.raises(ValueError, match=r"logits of tandem must be within 0\.001 .* got a difference"):
        benchmark.engines.check_same_logits([tandem, other], config.vocab_size, 1e-3)


def test_ratio_is_to_the_faster_peer_and_decides_the_target(benchmark):
    results = benchmark.results
    seconds = {"tandem": (1.0, 2.0, 10.0), "tunix": (5.0, 4.0, 3.0), "trl": (5.0, 10.0, 20.0)}
    calls = {name: [results.Call(s, 1.5 * s, 4096, 0) for s in times] for name, times in seconds.items()}
    workload = benchmark.shapes.CPU_WORKLOADS["dense"]
    kv_bytes = {"tandem": None, "tunix": 1, "trl": 2}

    def summarize(calls, target):
        return results.summarize("a", "dense", workload, calls, kv_bytes, 0.001, target, 0.25, share_target=0.5)

    by_target = {target: summarize(calls, target) for target in (2.5, 2.0, None)}
    tandem, tunix, trl = by_target[2.5]
    assert (tandem.tokens_per_second, tandem.min_tokens_per_second, tandem.max_tokens_per_second) == (2048, 409.6, 4096)
    assert (tandem.ratio, tunix.ratio, trl.ratio) == (2.0, 1.0, 0.4)
    assert (tandem.seconds, tandem.cores, tandem.mean_length, tandem.share) == (2.0, 1.5, 128.0, 2.048)
    assert [by_target[target][0].met for target in (2.5, 2.0, None)] == [False, True, None]
    assert (tunix.target, tunix.met, tunix.kv_bytes) == (None, None, 1)
    table = results.table_of(by_target[2.5], "")
    row = {column.header: next(iter(column.cells)) for column in table.columns}
    assert (row["tokens/s"], row["min-max"], row["ms/call"], row["cores"]) == ("2048", "410-4096", "2000", "1.5")
    assert (row["KV MB"], row["share"], row["ratio"], row["target"]) == ("n/a", "204.8%", "2.00x", "2.5x missed")
    assert row["share target"] == "50% met"
    (alone,) = summarize({"tandem": calls["tandem"]}, 2.5)
    assert (alone.ratio, alone.target, alone.met) == (None, 2.5, None)


def test_memory_of_the_cache_and_the_share_of_the_machine_have_bars_too(benchmark):
    results, workload = benchmark.results, benchmark.shapes.CPU_WORKLOADS["ragged"]

    def summarize(engines=("tandem", "tunix", "trl"), target=0.25, **kv_bytes):
        calls = {name: [results.Call(1.0, 1.0, 4096, 0)] for name in engines}
        return results.summarize("a", "ragged", workload, calls, kv_bytes, 0.001, None, target, 5.0)

    met, tunix, trl = summarize(tandem=1_000_000, tunix=4_000_000, trl=5_000_000)
    assert (met.kv_ratio, met.kv_target, met.kv_met) == (0.25, 0.25, True)
    assert (tunix.kv_ratio, tunix.kv_target, tunix.kv_met) == (1.0, None, None)
    assert (trl.kv_ratio, trl.kv_met) == (1.25, None)
    # 4,096 tokens a second at 0.001 of the machine each are less than five machines.
    assert [(found.share_target, found.share_met) for found in (met, tunix)] == [(5.0, False), (None, None)]
    missed = summarize(tandem=1_001_000, tunix=4_000_000, trl=None)
    assert (missed[0].kv_met, missed[2].kv_ratio) == (False, None)
    told = []
    for found in ([met, tunix, trl], missed):
        table = results.table_of(found, "")
        columns = {column.header: list(column.cells) for column in table.columns}
        told.append([columns[name] for name in ("KV MB", "KV ratio", "KV target")])
    assert told[0] == [["1.0", "4.0", "5.0"], ["0.250x", "1.000x", "1.250x"], ["0.25x met", "", ""]]
    assert told[1] == [["1.0", "4.0", "n/a"], ["0.250x", "1.000x", "n/a"], ["0.25x missed", "", ""]]
    (alone,) = summarize(("tandem",), tandem=1, tunix=8, trl=8)
    assert (alone.kv_ratio, alone.kv_met) == (None, None)
    assert summarize(tandem=1, tunix=8, trl=8, target=None)[0].kv_met is None


def test_the_bars_are_those_that_were_set(benchmark):
    shapes = benchmark.shapes
    assert shapes.TARGETS == {("a", "dense"): 2.5, ("b", "dense"): 2.0, ("a", "ragged"): 3.0, ("b", "ragged"): 2.5}
    assert shapes.KV_TARGETS == {"ragged": 0.25}
    assert shapes.SHARE_TARGETS == {"b": 0.5}
    assert shapes.CPU_WORKLOADS["ragged"].prompt_lengths == (192, 192)


def test_shares_count_weights_and_cache_as_computed_by_hand(benchmark):
    config = benchmark.shapes.tiny_shape(benchmark.shapes.CPU_SHAPES["a"])
    # Embedding (the head too), q, k, v, o, gate, up, down, norms of the block, of the heads and of the end.
    size = 64 * 32 + 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8 + 32
    assert benchmark.results.compute_share(config, 1000.0) == pytest.approx(2 * size / 1000)
    workload = benchmark.shapes.Workload(2, 3, (10, 10), 12)
    cache = (2 * 10 + 6 * 6) * (1 * 2 * 2 * 8)  # two prompts, six completions half of the time full
    share = benchmark.results.bandwidth_share(config, workload, 1000.0)
    assert share == pytest.approx(4 * (size + cache) / 6 / 1000)


@pytest.mark.parametrize("vocab_size", [512, 4096])
def test_eos_ids_give_the_mean_length_asked_for(benchmark, vocab_size):
    workload = benchmark.shapes.CPU_WORKLOADS["ragged"]
    eos_ids = workload.eos_ids(vocab_size)
    assert len(set(eos_ids)) == len(eos_ids)
    assert 0 <= min(eos_ids) <= max(eos_ids) < vocab_size

    def drawn_mean(count):
        drawn = np.random.default_rng(0).random((20_000, workload.cap)) < count / vocab_size
        return np.where(drawn.any(axis=1), drawn.argmax(axis=1) + 1, workload.cap).mean()

    errors = [abs(drawn_mean(len(eos_ids) + change) - 0.4 * 256) for change in (-1, 0, 1)]
    assert errors[1] < 10
    assert errors[1] <= min(errors) + 1  # about what 20,000 draws can tell


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="resident memory is read from Linux' /proc")
def test_steady_state_reports_compilations_and_memory(benchmark):
    found = benchmark.rollout.main(["--tiny", "--steady-state", "--steady-calls", "4"])["steady_state"]
    assert (found["shape"], found["num_calls"], found["early_call"]) == ("a", 4, 2)
    assert 50e6 < found["early_bytes"] < 50e9
    flat = found["late_bytes"] <= 1.02 * found["early_bytes"]
    assert found["met"] == (flat and found["num_compiles"] == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "a,z"], "--shapes must name some of a, b, c, got 'z'"),
        (
            ["--preset", "gpu", "--workloads", "dense"],
            "--workloads must name some of rows64, rows128, rows256, got 'dense'",
        ),
        (["--engines", "vllm"], "--engines must name some of tandem, tunix, trl, got 'vllm'"),
        (["--repeats", "0"], "--repeats must be >= 1, got 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.rollout.main(arguments)
    assert message in capsys.readouterr().err


def test_companies_are_compared_up_to_the_first_changed_token(benchmark, capsys):
    independence = importlib.import_module("independence")

    def completion(*token_ids):
        return types.SimpleNamespace(token_ids=np.array(token_ids))

    expected = [completion(1, 2, 3), completion(4, 5, 6, 7), completion(8)]
    got = [completion(1, 2, 3), completion(4, 9, 9), completion(8)]
    assert independence.changed_tokens(expected, got) == (1, 3 + 2 + 1)
    found = independence.main(["--tiny", "--tokens", "500"])
    assert set(found) == {*independence.COMPANIES, independence.ALONE}
    for name, (changed, compared) in found.items():
        assert compared >= 500 // (8 if name == independence.ALONE else 1)
        assert changed <= 2
    told = capsys.readouterr().out
    for name in found:
        assert re.search(rf"^{name}(, prompts reversed)?: \d of [\d,]+ tokens changed \(\d\.\de[+-]\d\d\)$", told, re.M)


def test_restoring_is_timed_with_and_without_the_comparison_of_hashes(benchmark, capsys):
    importlib.import_module("restore").main(["--layers", "1", "--rounds", "1"])
    assert re.search(r"not compared [\d.]+ s, compared [\d.]+ s: [+-][\d.]+ %", capsys.readouterr().out)


def test_curricula_are_compared_by_the_prompts_that_they_take_to_the_same_accuracy(benchmark, capsys):
    curriculum = importlib.import_module("curriculum")

    def curve(accuracies, spreads, drawn_before=0.0):
        lines = [{"step": 0, "eval/accuracy": accuracies[0]}]
        for step, (accuracy, spread) in enumerate(zip(accuracies[1:], spreads, strict=True), 1):
            lines.append({"step": step, "eval/accuracy": accuracy, "zero_variance_share": 1 - spread})
        return curriculum.curve_of(lines, 32, drawn_before)

    uniform = curve([0.2, 0.2, 0.5, 0.8, 0.8], [0.25, 0.25, 0.5, 0.5])
    other = curve([0.2, 0.5, 0.8, 0.8, 0.8], [0.75] * 4, drawn_before=16.0)
    assert uniform.prompts == [0, 32, 64, 96, 128]
    pair = curriculum.compare(uniform, other)
    assert pair["spread_ratio"] == pytest.approx(2)
    # The first as it is, then means of three: 0.2, 0.3, 0.5, 0.7, 0.8 and 0.2, 0.5, 0.7, 0.8, 0.8.
    assert (pair["accuracy"], pair["prompts_uniform"], pair["prompts"]) == pytest.approx((0.8, 128, 16 + 96))
    assert uniform.prompts_to(0.6) == pytest.approx(80)
    assert other.prompts_to(0.6) == pytest.approx(16 + 48)
    assert other.prompts_to(0.2) == 16
    assert (pair["half_uniform"], pair["half"]) == pytest.approx((64, 16 + 32))
    assert uniform.prompts_to(0.9) == np.inf
    assert curriculum.sign_test([1.2, 1.5, 2.0, 0.9, 1.1]) == pytest.approx(6 / 32)
    for arguments, message in (
        (["--seeds", "0,x"], "--seeds must be whole numbers with commas between them, got '0,x'"),
        (["--arms", "passrate"], "--arms must begin with uniform and name some of uniform, measured, passrate"),
    ):
        with pytest.raises(SystemExit):
            curriculum.main(arguments)
        assert message in capsys.readouterr().err


def test_episodes_draw_the_same_tokens_in_turns_and_in_one_go(benchmark, tmp_path, capsys):
    episodes, file = importlib.import_module("episodes"), tmp_path / "episodes.json"
    sizes = ["--prompts", "2", "--samples", "2", "--slots", "2", "--repeats", "1"]
    results = episodes.main(["--tiny", "--delays", "0,0.01", *sizes, "--json", str(file)])
    assert json.loads(file.read_text()) == results
    assert [result["delay"] for result in results] == [0.0, 0.01]
    for result in results:
        assert 4 * 4 * 4 <= result["drawn"] <= 4 * 4 * 8  # episodes x turns x tokens
        assert result["compiles"] == [0]
        assert result["read"] >= 1.0
        seconds = result["seconds"]
        assert result["ratio"] == pytest.approx(seconds["turns"] / max(seconds["plain"], seconds["alone"]))
    assert f"4 episodes on 2 slots, {results[0]['drawn']} drawn tokens" in capsys.readouterr().out
