"""Several processes are one run: the curve of one process, stopped together, named when they die, resumed exactly.

The run is of 2 processes with 4 CPU devices each, on loopback, against one process with 8. It is killed, resumed in the
other flavour and stopped, all in one, for each start of jax costs seconds.
"""

import collections
import datetime
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from jax._src.clusters import cloud_tpu_cluster

from rl import sft_trainer
from rl.cli import main
from rl.config.load import dump_config, load_config
from rl.data.order import order_of
from rl.data.prompts import fingerprint, load_pairs, load_prompts
from rl.data.stream import STRIDE
from rl.data.tokenizer import load_tokenizer
from rl.devices import hosts
from rl.grpo_trainer import train
from rl.models.config import flatten_specs
from rl.models.files.hf import save_folder
from rl.run.metrics import read_metrics, read_samples
from rl.state.origin import model_shape
from rl.tools import launch
from rl.tools.evaluate import evaluate_source
from rl.tools.passrate import passrate
from rl.tools.trained import load_checkpoint, load_start, resolve_model
from tests.helpers import tunix_golden
from tests.helpers.metric_lines import steady
from tests.helpers.places import FILES, REWARDS, ROOT
from tests.helpers.tiny_models import noisy_params, tiny_config

pytestmark = pytest.mark.slow
STEPS = 7
RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 16, intermediate_size: 32, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 8, initializer_range: 0.3}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 8, max_prompt_length: 8}}
rewards:
  functions:
  - {{function: "{REWARDS}:digit_share", name: digits}}
  - {{function: "{REWARDS}:rank_in_batch", name: rank, weight: 0.1}}
  - {{function: "{REWARDS}:low_characters", name: low}}
  - {{function: "{REWARDS}:recorded", name: recorded, weight: 0, kwargs: {{folder: FOLDER}}}}
  - {{function: "{REWARDS}:recorded_batch", name: recorded_batch, weight: 0, kwargs: {{folder: FOLDER}}}}
sampling: {{max_completion_length: 6}}
grpo: {{steps: {STEPS}, prompts_per_step: 4, group_size: 4, minibatches: 2, max_tokens_per_microbatch: 1024}}
optimizer: {{lr: 3e-3}}
mesh: {{data: 2, fsdp: -1, slice_is: process}}
eval: {{every: 0}}
checkpoint: {{every: 2, keep: 9}}
"""
TRACKER = """
import json, os

class Who:
    def __init__(self, run):
        self.path = run.folder / "tracked.jsonl"
        self.say([os.getpid(), run.id])

    def say(self, what):
        with self.path.open("a") as file:
            print(json.dumps(what), file=file)

    def log(self, step):
        self.say(step.step)

    def close(self, is_failed):
        pass

def make(run):
    return Who(run)
"""
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("hosts")
    path = folder / "recipe.yml"
    (folder / "judged").mkdir()
    recipe = RECIPE.replace("FOLDER", str(folder / "judged"))
    (folder / "who.py").write_text(TRACKER)
    logging = f"compilation_cache: {folder / 'cache'}, samples_per_step: 16, trackers: ['{folder / 'who.py'}:make']"
    path.write_text(recipe + f"logging: {{{logging}}}\n")
    return path


@pytest.fixture(scope="module")
def alone(recipe) -> pathlib.Path:
    """The run of one process with eight devices."""
    overrides = ["checkpoint.every=1", "logging.compilation_cache=null"]
    return train(load_config(recipe, [f"output_dir={recipe.parent / 'alone'}", *overrides]))


class Launched:
    """`grpo launch` of a command with two processes, and what it says."""

    def __init__(self, folder: pathlib.Path, *arguments: str):
        self.folder = folder
        command = [sys.executable, "-m", "rl.cli", "launch", "--processes", "2", "--cpu-devices", "4", "--"]
        command += [*arguments, "distributed.heartbeat_timeout_seconds=10"]
        environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling takes most of the time
        self.said = folder.with_suffix(".stderr")
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def child(self, number: int) -> int:
        """The pid of process `number`."""
        return int(re.search(rf"\b{number} \(pid (\d+)\)", self.said.read_text()).group(1))

    def wait_for_step(self, step: int) -> None:
        """Returns when metrics.jsonl has the line of this step."""
        path = self.folder / "metrics.jsonl"
        while self.process.poll() is None and (not path.exists() or f'"step": {step},' not in path.read_text()):
            time.sleep(0.02)
        assert self.process.poll() is None, self.said.read_text()

    def end(self) -> tuple[int, str]:
        """The exit status and what was said on stderr."""
        return self.process.wait(timeout=120), self.said.read_text()


class Together(NamedTuple):
    """The run of two processes: how its two starts ended, lines written by the kill, seconds from there to the end, and
    the pids of the second start."""

    folder: pathlib.Path
    killed: tuple[int, str]
    stopped: tuple[int, str]
    lines_at_kill: list[dict]
    seconds: float
    pids: list[int]


@pytest.fixture(scope="module")
def together(recipe) -> Together:
    folder = recipe.parent / "together"
    first = Launched(folder, "train", str(recipe), f"output_dir={folder}")
    first.wait_for_step(3)
    started = time.monotonic()
    os.kill(first.child(1), signal.SIGKILL)
    killed = first.end()
    seconds, lines = time.monotonic() - started, read_metrics(folder)
    second = Launched(folder, "train", str(recipe), f"output_dir={folder}", "pure_nnx=false")
    second.wait_for_step(4)
    os.kill(second.child(1), signal.SIGTERM)
    return Together(folder, killed, second.end(), lines, seconds, [second.child(number) for number in (0, 1)])


def stable(lines):
    return [steady(line) for line in lines]


def test_two_processes_have_the_curve_of_one(alone, together):
    """The first steps in the NNX flavour, the last ones in Linen."""
    one, two = stable(read_metrics(alone)), stable(read_metrics(together.folder))
    assert [line["step"] for line in two] == list(range(1, len(two) + 1))
    assert len(two) >= 4
    for left, right in zip(one, two, strict=False):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (left["step"], name)
    assert all(line["loss"] and line["kl"] for line in one[1:])


def test_the_first_of_two_processes_tracks(together):
    seen = [json.loads(line) for line in (together.folder / "tracked.jsonl").read_text().splitlines()]
    (_, before), (pid, after) = [entry for entry in seen if isinstance(entry, list)]
    assert (before, pid) == (after, together.pids[0])
    steps = [entry for entry in seen if isinstance(entry, int)]
    assert sorted(set(steps)) == [line["step"] for line in read_metrics(together.folder)]


def test_two_processes_draw_and_judge_what_one_does(alone, together):
    two = read_samples(together.folder)
    one = read_samples(alone)[: len(two)]
    for name in ("step", "prompt_index", "sample_index", "completion", "rewards"):
        assert [row[name] for row in one] == [row[name] for row in two], name
    assert len({json.dumps(row["rewards"]) for row in one}) > 3


def test_each_process_judges_one_half_of_the_completions_and_they_are_all_together(recipe, together):
    """Those of the second start, which began behind the checkpoint of step 2."""
    rows = [row for row in read_samples(together.folder) if row["step"] > 2]
    rows.sort(key=lambda row: (row["step"], row["prompt_index"], row["sample_index"]))
    halves = [[row["completion"] for row in rows if row["prompt_index"] // 2 == number] for number in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 8 * len({row["step"] for row in rows}) > 0
    assert collections.Counter(halves[0]) != collections.Counter(halves[1])
    for pid, half in zip(together.pids, halves, strict=True):
        files = (recipe.parent / "judged").glob(f"{pid}-[0-9]*.jsonl")
        judged = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        assert collections.Counter(judged) == collections.Counter(half)
    # The function of the whole batch, the fifth, is of process 0.
    first, second = (recipe.parent / "judged" / f"{pid}-batches.jsonl" for pid in together.pids)
    batches = [json.loads(line) for line in first.read_text().splitlines()]
    assert batches == [[row["completion"] for row in rows[start : start + 16]] for start in range(0, len(rows), 16)]
    assert not second.exists()


def test_the_launcher_names_the_process_that_was_killed_within_a_minute(together):
    status, said = together.killed
    assert status == 1
    assert "error: process 1 of 2 was the first to die, killed by SIGKILL; the others are ended" in said
    assert together.seconds < 60


def test_a_restart_after_the_kill_repeats_its_steps_exactly(together):
    """Bit for bit, even in the other flavour: what was done after the last checkpoint is done again."""
    before, after = stable(together.lines_at_kill), stable(read_metrics(together.folder))
    assert before[-1]["step"] >= 3
    assert after[: len(before)] == before


def test_a_stop_request_of_one_process_stops_all_after_the_same_step(together):
    status, said = together.stopped
    assert status == 0, said
    done = read_metrics(together.folder)[-1]["step"]
    assert 4 <= done < STEPS
    assert (together.folder / "checkpoints" / str(done)).is_dir()


def test_weights_of_two_processes_are_read_on_other_devices_and_another_mesh(recipe, alone, together):
    def weights(folder, *overrides):
        trained = load_checkpoint(load_config(recipe, overrides), folder, read_metrics(together.folder)[-1]["step"])
        return trained.params

    one = weights(alone)
    two = weights(together.folder, "mesh.num_devices=4", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")
    assert len(jax.tree.leaves(two)[0].sharding.device_set) == 4
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=2e-5)


def test_sft_evaluation_and_pass_rates_of_two_processes_are_those_of_one(recipe, alone):
    """Losses and weights of the first, completions and rewards of the second, the file of the third; each is written
    once.
    """
    sft = ["sft.steps=2", "sft.batch_size=8", "sft.max_completion_length=4", "checkpoint.every=2"]
    sft.append("data.eval_size=0")  # `grpo eval` beside it evaluates
    together, evaluated, rates = (recipe.parent / name for name in ("sft_together", "evaluated.jsonl", "rates.jsonl"))
    launched = [
        Launched(together, "sft", str(recipe), f"output_dir={together}", *sft),
        Launched(evaluated, "eval", str(alone), "--output", str(evaluated)),
        Launched(rates, "data", "passrate", str(alone), str(recipe), "--output", str(rates)),
    ]
    one = sft_trainer.train(load_config(recipe, [*sft, f"output_dir={recipe.parent / 'sft_alone'}"]))
    result, _ = evaluate_source(alone)
    passed = passrate(str(alone), str(recipe), str(recipe.parent / "rates_alone.jsonl"))
    for each in launched:
        status, said = each.end()
        assert status == 0, said
    left, right = stable(read_metrics(one)), stable(read_metrics(together))
    assert [line["step"] for line in right] == [1, 2]
    for before, after in zip(left, right, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    weights = [safetensors.numpy.load_file(folder / "export" / "model.safetensors") for folder in (one, together)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *weights)
    samples = [json.loads(line) for line in evaluated.read_text().splitlines()]
    assert [sample["completion"] for sample in samples] == [sample["completion"] for sample in result.samples]
    assert [sample["rewards"] for sample in samples] == [sample["rewards"] for sample in result.samples]
    assert len({sample["completion"] for sample in samples}) > 1
    assert rates.read_bytes() == (recipe.parent / "rates_alone.jsonl").read_bytes()
    assert len({rate.rate for rate in passed.rates}) > 1


# Two processes that SLURM started, as jax sees it by the environment


TELL = """
import json, pathlib, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rl.data import blocks, sources
from rl.devices import hosts
from rl.config.load import load_config
from rl.data.order import order_of
from rl.data.prompts import fingerprint, load_pairs, load_prompts
from rl.run.executables import open_compiled
from rl.data.tokenizer import Tokenizer, load_tokenizer
def refuse():
    raise ValueError("output_dir is taken")
class Recorder(Tokenizer):
    def encode(self, text, add_bos=True):
        encoded.append(text)
        return super().encode(text, add_bos)
encoded, lines, json_row = [], [], sources.json_row
def recorded_row(line, *place):
    lines.append(line.decode())
    return json_row(line, *place)
def data_of(overrides):
    tokenizer = Recorder(load_tokenizer("byte").backend)
    sources.json_row = blocks.json_row = recorded_row
    prompts = load_prompts(load_config(None, overrides), tokenizer)
    told = {"read": lines[:], "encoded": encoded[:], "train": fingerprint(prompts.train), "messages": prompts.messages}
    told["held_out"] = fingerprint(prompts.held_out)
    told["prompts"] = [row.prompt for row in [*prompts.train, *prompts.held_out]]
    told["pairs"] = fingerprint(load_pairs(load_config(None, overrides), tokenizer).rows)
    lines.clear()
    told["stream"] = streamed(overrides, tokenizer)
    told["stream_read"] = lines[:]
    broken = load_config(None, [*overrides, overrides[0] + ".broken.jsonl"])
    try:
        load_prompts(broken, tokenizer)
    except ValueError as error:
        told["broken"] = str(error)
    return told
def streamed(overrides, tokenizer):
    config = load_config(None, [*overrides, "data.streaming=true", "data.block_size=10"])
    prompts, position, asked = load_prompts(config, tokenizer), 0, []
    order = order_of(config.data, prompts, config.seed, 8)
    for _ in range(3):
        numbers, position = order.take(position, 8)
        asked += [prompts.rows[number].prompt for number in numbers]
    return [asked, position, prompts.fingerprint()]
def tell(config):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    fresh = jax.random.key(5)
    with jax.transfer_guard("disallow"):
        array, number = hosts.put((np.arange(4.0, dtype=np.float32), np.int32(3)), (rows, everywhere))
        key = hosts.put_key(fresh, everywhere)
    told = {
        "first": hosts.is_first(),
        "gathered": hosts.gather([jax.process_index() / 3, "x" * 2000][: 1 + hosts.is_first()]),
        "any": hosts.any_process(jax.process_index() == 1),
        "from_first": hosts.from_first(lambda: 7 + jax.process_index()),
        "own": sorted(float(shard.data[0]) for shard in array.addressable_shards), "number": int(number),
        "key": jax.random.key_data(key).tolist() == jax.random.key_data(fresh).tolist(),
        "fetched": hosts.fetch({"a": array})["a"].tolist(), "quiet": hosts.console_stream() is not None,
        "data": data_of(sys.argv[1:]),
    }
    hosts._LARGEST_ROUND = 4096
    told["in_rounds"] = [part.decode() for part in hosts.gather_bytes(b"abcdefg" * (1 + 900 * jax.process_index()))]
    try:
        hosts.from_first(refuse)
    except ValueError as error:
        told["refused"] = str(error)
    try:
        open_compiled(load_config(None, ["compiled_file=programs.bin"]), None, mesh)
    except ValueError as error:
        told["compiled_file"] = str(error)
    try:
        hosts.check_same(load_config(None, [f"seed={jax.process_index()}"]), {})
    except ValueError as error:
        told["different"] = str(error)
    print(json.dumps(told), flush=True)
    if not hosts.is_first():
        load_config(None, ["no.such.key=1"])  # an error of this process alone: the first waits for it in vain
    hosts.gather("done")
config = load_config(None)
with hosts.joined(config.distributed):
    tell(config)
"""


def start_two(overrides: Sequence[str]) -> list[subprocess.Popen]:
    """Two processes as SLURM starts them, with the overrides that name their rows."""
    shared = {**os.environ, **SLURM, "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    shared |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TELL, *overrides],
            cwd=ROOT,
            env={**shared, "SLURM_PROCID": str(number)},
            **pipes,
        )
        for number in (0, 1)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Overrides that name rows of two files: lines of any length, and rows with a date, which JSON does not carry."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"prompt": f"{n} \u00e9" + "x" * (n % 7), "answer": n, "level": n / 3} for n in range(41)]
    lines = [json.dumps({**row, "tags": [1]} if row["answer"] > 30 else row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("\n" + "".join(lines))
    (folder / "train.jsonl.broken.jsonl").write_text("".join(lines[:38]) + "{broken\n")
    days = [{"prompt": f"day {n}", "answer": n, "day": datetime.date(2024, 1, 1 + n)} for n in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(days), folder / "eval.parquet", row_group_size=4)
    files = [f"data.source={folder / 'train.jsonl'}", f"data.eval_source={folder / 'eval.parquet'}"]
    return [*files, "data.chat=true", "data.max_prompt_length=27"]


class Told(NamedTuple):
    """What two processes that SLURM started say of each other, and how the second ends."""

    reports: list[dict]
    status: int
    said: str


@pytest.fixture(scope="module")
def told(sources) -> Told:
    processes = start_two(sources)
    outputs = [processes[1].communicate(timeout=120)]
    processes[0].kill()  # it waits for the other, until the heartbeat tells it
    outputs.insert(0, processes[0].communicate(timeout=60))
    found = [re.search(r"^{.*}$", output, re.MULTILINE) for output, _ in outputs]
    assert all(found), outputs
    return Told([json.loads(match.group()) for match in found], processes[1].returncode, outputs[1][1])


def test_each_process_reads_and_tokenizes_one_block_of_the_rows_and_has_all_of_them(sources, told):
    config = load_config(None, sources)
    alone, pairs = (load(config, load_tokenizer("byte")) for load in (load_prompts, load_pairs))
    parts = [report["data"] for report in told.reports]
    lines = pathlib.Path(config.data.source).read_text().splitlines(keepends=True)[1:]
    assert parts[0]["read"] + parts[1]["read"] == lines
    encoded = [text for part in parts for text in part["encoded"]]
    assert len(set(encoded)) == len(encoded) == len(lines) + 9
    assert {len(part["encoded"]) for part in parts} == {24, 26}
    for part in parts:
        assert part["train"] == fingerprint(alone.train)
        assert part["held_out"] == fingerprint(alone.held_out)
        assert part["prompts"] == [row.prompt for row in [*alone.train, *alone.held_out]]
        assert part["pairs"] == fingerprint(pairs.rows)
        assert part["messages"] == alone.messages
        assert "train.jsonl.broken.jsonl:39 must be one JSON object, got b'{broken" in part["broken"]
    config = load_config(None, [*sources, "data.streaming=true", "data.block_size=10"])
    stream = load_prompts(config, load_tokenizer("byte"))
    numbers, position = order_of(config.data, stream, config.seed, 8).take(0, 24)
    asked = [stream.rows[number].prompt for number in numbers]
    for part in parts:  # a stream reads and tokenizes each block together
        assert part["stream"] == [asked, position, stream.fingerprint()]
    num_read = 10 * (1 + position // STRIDE)
    assert num_read > 20
    assert [len(part["stream_read"]) for part in parts] == [num_read // 2, num_read // 2]
    assert sorted(parts[0]["stream_read"] + parts[1]["stream_read"]) == sorted(lines[:num_read])
    assert 0 < alone.num_dropped < len(alone.train)  # some are too long
    assert alone.held_out[0].columns["day"] == datetime.date(2024, 1, 1)


def test_processes_of_a_cluster_understand_each_other_and_an_error_of_one_ends_it_at_once(told):
    assert told.status == 2
    assert "error: process 1: unknown config key 'no.such.key'" in told.said
    first, second = told.reports
    assert [first["first"], second["first"]] == [True, False]
    assert [first["quiet"], second["quiet"]] == [False, True]
    for report in (first, second):
        assert report["gathered"] == [[0.0, "x" * 2000], [1 / 3]]
        assert report["any"] is True
        assert report["from_first"] == 7
        assert report["number"] == 3
        assert report["key"] is True
        assert "compiled_file must be null for several processes on CPU, " in report["compiled_file"]
        assert report["in_rounds"] == ["abcdefg", "abcdefg" * 901]
    assert [first["own"], second["own"]] == [[0.0, 1.0], [2.0, 3.0]]
    assert [first["fetched"], second["fetched"]] == [[0.0, 1.0, 2.0, 3.0], []]
    assert [first["refused"], second["refused"]] == ["output_dir is taken", "process 0: output_dir is taken"]


def test_processes_with_different_configurations_say_so(told):
    """Each of them; how a process ends that has an error is told above."""
    problem = "the configuration's seed must be the same in every process, got 0 in process 0 and 1 in process 1"
    assert all(report["different"].startswith(problem) for report in told.reports)


WAIT = """
import sys, time
from rl.devices import hosts
from rl.config.load import load_config
with hosts.joined(load_config(None, sys.argv[1:]).distributed):
    hosts.gather("here")
    print("joined", flush=True)
    time.sleep(300)
"""


def test_the_runtime_ends_whoever_a_killed_process_leaves_alone():
    """Without the launcher, and in no collective: of two runs at a time one loses process 1, the other process 0."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    runs = []
    for _ in range(2):
        keys = [
            f"coordinator_address=127.0.0.1:{launch._free_port()}",
            "num_processes=2",
            "heartbeat_timeout_seconds=5",
        ]
        commands = [
            [sys.executable, "-c", WAIT, *(f"distributed.{key}" for key in (*keys, f"process_id={number}"))]
            for number in (0, 1)
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs.append([subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands])
    try:
        for process in (*runs[0], *runs[1]):
            assert "joined\n" in iter(process.stdout.readline, ""), process.stderr.read()  # gloo says something before
        runs[0][1].kill()
        runs[1][0].kill()
        for survivor in (runs[0][0], runs[1][1]):
            _, said = survivor.communicate(timeout=60)  # the heartbeat and slack; by itself it would sleep on
            assert survivor.returncode == -signal.SIGABRT, said
    finally:
        for process in (*runs[0], *runs[1]):
            process.kill()
            process.communicate()


SHARDS = """
import hashlib, json, sys
import jax, numpy as np
from rl.devices import hosts
from rl.config.load import load_config
from rl.tools.trained import load_start
*sources, processes = map(json.loads, sys.argv[1:])
with hosts.joined(load_config(None, processes).distributed):
    for overrides in sources:
        for path, array in jax.tree_util.tree_leaves_with_path(load_start(load_config(None, overrides)).params):
            for shard in array.addressable_shards:
                place = [[part.start, part.stop] for part in shard.index]
                told = {"source": overrides[0], "name": jax.tree_util.keystr(path), "place": place}
                print(json.dumps({**told, "sha256": hashlib.sha256(np.asarray(shard.data)).hexdigest()}), flush=True)
"""


@pytest.mark.filterwarnings(*tunix_golden.IGNORED_WARNINGS)
def test_each_process_keeps_its_shards_of_a_tunix_model_and_of_a_module_of_ones_own(tmp_path):
    tokenizer, decoder = load_tokenizer("byte"), tiny_config("qwen3", vocab_size=300, eos_token_ids=(258,))
    save_folder(tmp_path / "decoder", decoder, noisy_params(decoder), tokenizer=tokenizer)
    module = [f"model.source={ROOT / 'examples/own_model/gpt.py'}:build", "model.args={hidden_size: 8, num_layers: 1}"]
    shape = model_shape(load_config(None, module), tokenizer, None)
    rng, file = np.random.default_rng(0), tmp_path / "model.safetensors"
    values = {"/".join(path): rng.normal(size=spec.shape) for path, spec in flatten_specs(shape.specs)}
    safetensors.numpy.save_file({name: value.astype(np.float32) for name, value in values.items()}, file)
    sources = [[f"model.source=tunix:{tmp_path / 'decoder'}"], [*module, f"model.weights={file}"]]
    printed = run_two(SHARDS, *map(json.dumps, sources))
    for overrides in sources:
        is_cut = False
        for path, whole in jax.tree_util.tree_leaves_with_path(load_start(load_config(None, overrides)).params):
            wanted = {"source": overrides[0], "name": jax.tree_util.keystr(path)}
            shards = [[line for line in lines if wanted.items() <= line.items()] for lines in printed]
            assert [len(found) for found in shards] == [1, 1], wanted
            for (shard,) in shards:
                part = np.asarray(whole)[tuple(slice(*ends) for ends in shard["place"])]
                assert hashlib.sha256(np.ascontiguousarray(part)).hexdigest() == shard["sha256"], wanted
            is_cut |= shards[0][0]["place"] != shards[1][0]["place"]
        assert is_cut


def run_two(script: str, *arguments: str) -> list[list[dict]]:
    """Two processes of one device each that run `script`, whose last argument are the keys of each; the lines of JSON
    that they print."""
    keys = [f"distributed.coordinator_address=127.0.0.1:{launch._free_port()}", "distributed.num_processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments, json.dumps([*keys, f"distributed.process_id={number}"])],
            cwd=ROOT,
            env=launch.environment_of(os.environ, 1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said for _, said in outputs)
    return [[json.loads(line) for line in printed.splitlines()] for printed, _ in outputs]  # gloo prints nothing


# What needs no second process


def test_a_process_is_silent_for_twenty_seconds_before_it_counts_as_dead():
    assert load_config(None).distributed.heartbeat_timeout_seconds == 20


@pytest.mark.parametrize(("tasks", "found"), [("2", True), ("1", False), (None, False)])
def test_a_cluster_counts_when_it_has_more_than_one_process(monkeypatch, tasks, found):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value) if tasks else monkeypatch.delenv(name, raising=False)
    if tasks:
        monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert hosts.is_in_a_cluster(load_config(None).distributed) is found


@pytest.fixture
def tpu_vm(monkeypatch) -> dict[str, str]:
    """A machine that jax takes for one with TPUs; what its metadata server answers, by the name of the attribute."""
    metadata: dict[str, str] = {}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda name: (metadata[name], 200) if name in metadata else ("", 404)
    )
    for name in (*SLURM, "TPU_SKIP_MDS_QUERY", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return metadata


@pytest.mark.parametrize(("names", "slices", "found"), [("a,b", "1", True), ("a", "2", True), ("a", "1", False)])
def test_the_workers_of_gke_are_found_by_their_names(monkeypatch, tpu_vm, names, slices, found):
    variables = {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": slices}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts.is_in_a_cluster(load_config(None).distributed) is found


@pytest.mark.parametrize(("workers", "found"), [("a:b:10.0.0.1,c:d:10.0.0.2", True), ("host-0", False)])
def test_the_workers_of_a_cloud_tpu_are_found_by_its_metadata(tpu_vm, workers, found):
    assert hosts.is_in_a_cluster(load_config(None).distributed) is False
    tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": workers, "tpu-env": "ZONE: 'x'"}
    assert hosts.is_in_a_cluster(load_config(None).distributed) is found


def test_keys_that_name_the_processes_come_together():
    section = load_config(None, ["distributed.num_processes=2", "distributed.process_id=0"]).distributed
    with pytest.raises(ValueError, match=r"distributed\.coordinator_address must be set, got None; .*10\.0\.0\.1:1234"):
        hosts.join_processes(section)


def test_commands_of_one_process_refuse_keys_that_name_processes_but_read_a_run_of_several(tmp_path, capsys):
    """The folder has the keys of its process 0, which neither of them nor `grpo eval` may wait for others by."""
    keys = ["coordinator_address=127.0.0.1:1", "num_processes=2", "process_id=0"]
    overrides, run = [f"distributed.{key}" for key in keys], tmp_path / "run"
    (run / "checkpoints" / "7").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "config.yml").write_text(dump_config(load_config(None, [*overrides, "distributed.auto=false", "seed=3"])))
    source = resolve_model(run, ["seed=4"])
    assert (source.run, source.config.seed, source.config.distributed.auto) == (run, 4, False)
    assert hosts.named(source.config.distributed) == {}
    hosts.join_processes(source.config.distributed)  # at once: it is alone
    asked = resolve_model(run, overrides, alone=False).config.distributed
    assert list(hosts.named(asked).values()) == ["127.0.0.1:1", 2, 0]
    (tmp_path / "recipe.yml").write_text("distributed: {num_processes: 2}")
    recipe, base = str(tmp_path / "recipe.yml"), FILES / "models/qwen3"
    for command in (
        ["sample", str(run), "--prompt", "a", overrides[1]],
        ["sample", recipe, "--prompt", "a"],
        ["quantize", f"tunix:{base}", str(tmp_path / "new"), overrides[1]],
        ["lora", "merge", str(base), str(base), str(tmp_path / "new"), overrides[1]],
        ["lora", "convert", str(base), str(tmp_path / "new"), recipe, f"model.source={base}"],
    ):
        assert main(command) == 2
        said = "distributed.num_processes must be null for a command of one process"
        assert (
            f"{said} (train, sft, eval and data passrate run in several), got 2; leave it out"
            in capsys.readouterr().err
        )


def test_a_first_process_that_nobody_reaches_is_an_error_with_its_address():
    address = f"127.0.0.1:{launch._free_port()}"
    keys = [f"coordinator_address={address}", "num_processes=2", "process_id=1", "initialization_timeout_seconds=1"]
    section = load_config(None, [f"distributed.{key}" for key in keys]).distributed
    message = rf"must be where process 0 listens within .* \(1\), got '{address}', .*refused; start process 0"
    with pytest.raises(ValueError, match=message):
        hosts.join_processes(section)


def test_alone_every_function_of_the_hosts_is_what_it_would_be_without():
    hosts.join_processes(load_config(None, ["distributed.auto=false"]).distributed)
    assert hosts.is_first()
    assert hosts.console_stream() is None
    assert hosts.gather({"a": 1.5}) == [{"a": 1.5}]
    assert hosts.from_first(lambda: 3) == 3
    assert [hosts.any_process(flag) for flag in (True, False)] == [True, False]
    hosts.check_same(load_config(None), {"data": "hash"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", "--", "train", "x.yml"], "--processes must be >= 1, got 0"),
        (["--processes", "2", "--cpu-devices", "0", "--", "train", "x.yml"], "--cpu-devices must be >= 1, got 0"),
        (
            ["--processes", "2", "--", "launch", "--processes", "2"],
            "must start one of train, sft, eval, data passrate with its .*, got 'launch --",
        ),
        (["--processes", "2", "--", "eval", "--output", "x"], "with its recipe or run first, got 'eval --output x'"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        launch.main(arguments)


def test_a_command_that_every_process_refuses_is_no_crash(tmp_path, capfd):
    assert launch.main(["--processes", "2", "--", "train", str(tmp_path / "missing.yml"), "grpo.steps=1"]) == 1
    said = capfd.readouterr().err
    assert "missing.yml" in said
    assert re.search(r"process [01] of 2 was the first to fail, with exit status 2; the others are ended$", said, re.M)


@pytest.mark.parametrize(
    ("command", "ending", "goes_on"),
    [
        ("train", "os.kill(os.getpid(), 9)", True),
        ("sft", "os._exit(134)", True),
        ("train", "os._exit(1)", False),
        ("eval", "os.kill(os.getpid(), 9)", False),
    ],
)
def test_the_launcher_promises_to_go_on_only_where_the_same_command_does(capfd, command, ending, goes_on):
    process = subprocess.Popen([sys.executable, "-S", "-c", f"import os; {ending}"])
    assert launch._watch([process], command) == 1
    said = capfd.readouterr().err
    assert "process 0 of 1 was the first to" in said
    assert ("The same command again goes on from the last checkpoint" in said) is goes_on


def test_virtual_devices_replace_those_of_the_shell():
    given = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8", "HOME": "/here"}
    made = launch.environment_of(given, 4)
    assert made["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert made["JAX_PLATFORMS"] == "cpu"
    assert launch.environment_of(given, None) == given
