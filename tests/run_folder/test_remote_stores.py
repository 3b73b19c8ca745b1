"""gs:// and s3:// through their real drivers, against servers on loopback (`store_servers.py`). The packages are no
dependency: pip install gcsfs s3fs 'moto[s3]' flask flask-cors gcp-storage-emulator.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import uuid

import pytest

from rl.config.load import load_config
from rl.files.stores import copy_of, open_store
from rl.run.metrics import read_metrics
from rl.run_folder.lease import LEASE, LEASE_SECONDS
from rl.run_folder.ledger import Ledger, read_ledger
from rl.run_folder.mirror import Staging, run_path
from rl.run_folder.remote_steps import MARKER, local_source, read_markers
from tests.helpers.places import REWARDS, ROOT
from tests.run_folder.test_mirror import check_journal_moves
from tests.whole_runs.test_resume import RECIPE, STEPS, assert_same_run, start, wait_for_lines

NEEDED = ("gcsfs", "s3fs", "moto", "flask", "gcp_storage_emulator")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    # Of drivers and servers, whose versions nothing here names.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Servers, and the variables by which drivers find them."""
    command = [sys.executable, str(ROOT / "tests/helpers/store_servers.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as servers:
        assert servers.stdin is not None
        assert servers.stdout is not None
        addresses = json.loads(servers.stdout.readline())
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": addresses["s3"],
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "y",
                "AWS_DEFAULT_REGION": "us-east-1",
                "STORAGE_EMULATOR_HOST": addresses["gs"],
                "FSSPEC_GS_TOKEN": "anon",
                "FSSPEC_GCS_TOKEN": "anon",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of the bucket, which no emulator says
                "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
            }.items():
                patch.setenv(name, value)
            import fsspec.config

            fsspec.config.set_conf_env(fsspec.config.conf)
            yield
        servers.stdin.close()


@pytest.fixture(params=["gs", "s3"])
def url(request, environment):
    return f"{request.param}://bucket/tests/{uuid.uuid4().hex}"


def test_a_store_reads_writes_lists_and_removes(url, tmp_path):
    store = open_store(url)
    assert store.stats() == {}
    assert store.read("a") is None
    assert store.version("a") is None
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
    store.write("a", b"one")
    store.upload(tmp_path / "file", "sub/b")
    open_store(url + "2").write("c", b"of another folder")
    assert {name: stat.size for name, stat in store.stats().items()} == {"a": 3, "sub/b": 256_000}
    assert list(store.stats("sub/")) == ["sub/b"]
    before = store.stats()["a"]
    store.write("a", b"two")
    assert store.read("a") == b"two"
    assert store.stats()["a"] != before
    copy = copy_of(store, tmp_path / "cache")
    assert (copy / "sub" / "b").read_bytes() == (tmp_path / "file").read_bytes()
    assert copy_of(open_store(f"{url}/sub/b"), tmp_path / "cache").read_bytes() == (tmp_path / "file").read_bytes()
    store.remove(["a", "not there", "sub/b"])
    assert store.stats() == {}


def test_a_write_under_a_condition_is_made_by_one_writer_only(url):
    store = open_store(url)
    version = store.write_if("lease", b"mine", None)
    assert version is not None
    assert store.version("lease") == version
    assert store.write_if("lease", b"other", None) is None
    second = store.write_if("lease", b"renewed", version)
    assert second == store.version("lease")
    assert store.write_if("lease", b"late", version) is None
    assert store.read("lease") == b"renewed"


def test_a_start_that_uploads_nothing_leaves_nothing(url, tmp_path):
    store = open_store(url)
    staging = Staging(store, tmp_path / "a", 1)
    staging.open()
    assert list(store.stats()) == [LEASE]
    with pytest.raises(ValueError, match="is held by process"):
        Staging(store, tmp_path / "b", 1).open()
    staging.close()
    assert store.stats() == {}


def test_the_journal_of_a_run_that_left_a_step_is_there_on_another_machine(url, tmp_path):
    check_journal_moves(open_store(url), tmp_path)


def test_a_ledger_that_another_process_changed_is_not_replaced(url):
    store = open_store(url)
    first = Ledger(store, "a")
    first.claim(["x"])
    second = read_ledger(store)
    assert second is not None
    second.claim(["y"])
    with pytest.raises(ValueError, match="was changed by another process"):
        first.claim(["z"])
    store.write("z", b"theirs")
    with pytest.raises(ValueError, match="/z must be free for an upload"):
        second.claim(["z"])


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_is_not_there_is_said(environment, scheme, tmp_path):
    with pytest.raises(ValueError, match=r"could not be written .*check the name of the bucket"):
        Staging(open_store(f"{scheme}://no-such-bucket-here/run"), tmp_path, 1).open()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("remote")
    path = folder / "recipe.yml"
    path.write_text(RECIPE + f"logging: {{compilation_cache: {folder / 'cache'}}}\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe) -> pathlib.Path:
    folder = recipe.parent / "uninterrupted"
    assert start(recipe, folder).wait() == 0
    return folder


def test_a_run_killed_on_two_machines_equals_the_uninterrupted_run_and_every_command_reads_it(
    url, recipe, uninterrupted, tmp_path
):
    machines = [tmp_path / "a", tmp_path / "b"]

    def begin(machine: pathlib.Path) -> tuple[subprocess.Popen, pathlib.Path]:
        override = f"checkpoint.staging={machine}"
        return start(recipe, url, override), run_path(load_config(recipe, [f"output_dir={url}", override]))  # pyright: ignore[reportArgumentType]

    store, step = open_store(url), 0
    theirs: list[str] = []
    # Between checkpoints, amid an upload, near the end; on the same machine, then on another.
    for lines, machine in ((4, 0), (7, 0), (10, 1)):
        process, folder = begin(machines[machine])
        wait_for_lines(process, folder, lines)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        if machine == 0 and lines == 7:
            # Another machine finds the lease of the one that was killed, until it is over.
            process, _ = begin(machines[1])
            assert process.wait() != 0
            lease = json.loads(store.read(LEASE) or b"")
            store.write(LEASE, json.dumps({**lease, "time": lease["time"] - LEASE_SECONDS}).encode())
            step = min(read_markers(store))  # which is removed later
            theirs = [f"checkpoints/{step}/theirs", "checkpoints/1000/state/a", f"checkpoints/1000/{MARKER}"]
            for name in theirs:
                store.write(name, b"theirs")
    process, folder = begin(machines[1])
    assert process.wait() == 0
    assert_same_run(folder, uninterrupted)
    assert_same_run(local_source(url, with_samples=True), uninterrupted)
    assert max(read_markers(store)) == STEPS
    assert len(read_markers(store)) == 2
    assert step not in read_markers(store)
    assert list(store.stats(f"checkpoints/{step}/")) == [theirs[0]]
    assert [store.read(name) for name in theirs] == [b"theirs"] * 3
    # The first machine is behind by now, or has diverged from what the second made of the same step.
    process, folder = begin(machines[0])
    assert process.wait() == 0
    assert read_metrics(folder)[-1]["step"] == STEPS

    def grpo(*arguments: str) -> str:
        command = [sys.executable, "-m", "rl.cli", *arguments]
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

    assert "accuracy" in grpo("eval", url, "--output", f"{url}-out/eval.jsonl")
    assert len((open_store(f"{url}-out").read("eval.jsonl") or b"").splitlines()) == 10
    assert "checkpoint" in grpo("checkpoint", "inspect", url)
    assert grpo("checkpoint", "verify", url).endswith("whole\n")
    assert url in grpo("report", url)
    assert store.read("report.html") is not None
    assert grpo("export", url, f"{url}-model").startswith(f"exported step {STEPS}")
    lines = grpo("sample", f"{url}-model", "--prompt", "1+1=", "--output", f"{url}-out/samples.jsonl")
    assert lines == ""
    assert len((open_store(f"{url}-out").read("samples.jsonl") or b"").splitlines()) == 1
    open_store(f"{url}-data").write("rows.jsonl", b'{"prompt": "1+1=", "answer": "2"}\n' * 3)
    overrides = [f"data.eval_source={url}-data/rows.jsonl", "data.args={operation: add, digits: 1}"]
    assert "on 3 prompts" in grpo("eval", f"{url}-model", *overrides, "data.source=arithmetic", *rewards())
    with pytest.raises(subprocess.CalledProcessError) as caught:
        grpo("export", url, f"{url}-model")
    assert "must be new or empty" in caught.value.stderr


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_run_that_was_killed_amid_its_first_upload_is_begun_again_on_another_machine(
    url, recipe, uninterrupted, tmp_path
):
    store, ledger = open_store(url), Ledger(open_store(url), "a")
    files = ("run.json", "config.yml", "metrics.jsonl")
    ledger.claim([*files, "checkpoints/2/hashes.json", "checkpoints/2/state/a"])
    for name in files:
        store.upload(uninterrupted / name, name)
    store.write("checkpoints/2/state/a", b"half")
    process = start(recipe, url, f"checkpoint.staging={tmp_path}")  # pyright: ignore[reportArgumentType]
    assert process.wait() == 0
    assert_same_run(local_source(url, with_samples=True), uninterrupted)
    assert {marker.run for marker in read_markers(store).values()} == {"a"}
    assert store.stats("checkpoints/2/") == {}


def rewards() -> list[str]:
    path = REWARDS
    return [f"rewards.functions=[{{function: '{path}:digit_share'}}]"]
