"""Which paths are URLs, which keys take them, and the copies and uploads of files of a store in memory."""

import fsspec
import pytest

from rl.config.load import load_config
from rl.files.stores import (
    check_path,
    continued_copy,
    copy_of,
    is_remote,
    scheme_of,
    upload_all,
    uploaded_folder,
)
from tests.helpers.remote_stores import clear, memory_store


@pytest.fixture(autouse=True)
def _empty_stores():
    yield
    clear()


@pytest.mark.parametrize(
    "path",
    [
        *(
            "runs/mine",
            "/abs/olute",
            "owner/name",
            "arithmetic",
            "byte",
            "reasoning_gym:basic_arithmetic",
            "rewards.number:exact",
        ),
        *(
            "my.py:build",
            "dir/my.py:loss",
            r"C:\models\mine",
            "C:/models/mine",
            "tunix:/models/mine",
            "./a:b",
            "x.jsonl",
        ),
    ],
)
def test_what_has_no_scheme_is_no_url(path):
    assert scheme_of(path) is None
    check_path(path, "key", may_be_remote=False)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/a/b.jsonl", "gs://bucket/run/"])
def test_objects_of_the_two_stores_are_taken(url):
    assert is_remote(url)
    check_path(url, "key", may_be_remote=True)
    with pytest.raises(ValueError, match="key must be a local path, got"):
        check_path(url, "key", may_be_remote=False)


@pytest.mark.parametrize(
    "url", ["gs://", "gs://bucket", "s3://bucket/", "gs:/bucket/run", "s3:/bucket/run", "gs:///run"]
)
def test_a_url_without_bucket_or_name_is_refused(url):
    with pytest.raises(ValueError, match="key must name a bucket and a folder or file in it"):
        check_path(url, "key", may_be_remote=True)


@pytest.mark.parametrize(
    "url", ["http://h/x", "hdfs://h/run", "file:///tmp/run", "gcs://b/x", "S3://b/x", "a::gs://b/x"]
)
def test_another_scheme_is_refused(url):
    for may_be_remote in (False, True):
        with pytest.raises(ValueError, match=r"^key must be a local path"):
            check_path(url, "key", may_be_remote)


@pytest.mark.parametrize(
    "key",
    [
        *("output_dir", "model.source", "model.weights", "lora.adapter", "tokenizer.source", "tokenizer.chat_template"),
        *("data.source", "data.eval_source", "compiled_file", "logging.compilation_cache", "grpo.loss_type"),
        *("grpo.advantage_estimator", "sampling.source"),
    ],
)
def test_another_scheme_is_refused_at_load_by_key(key):
    suffix = ".py:f" if key.startswith(("grpo.", "sampling.")) else ""
    with pytest.raises(ValueError, match=f"^{key} must be a local path"):
        load_config(None, [f"{key}=http://host/x{suffix}"])


def test_a_scheme_behind_tunix_and_before_a_reward_function_is_looked_at():
    with pytest.raises(ValueError, match=r"^model\.source must be a local path or begin with gs:// or s3://"):
        load_config(None, ["model.source=tunix:http://host/model"])
    assert load_config(None, ["model.source=tunix:gs://bucket/model"]).model.source == "tunix:gs://bucket/model"
    with pytest.raises(ValueError, match=r"^rewards\.functions\.0\.function must be a local path"):
        load_config(None, ["rewards.functions=[{function: 'gs://bucket/my.py:f'}]"])


def test_the_driver_of_a_scheme_is_named_with_its_extra_when_it_is_missing(monkeypatch):
    from rl.files.stores import open_store

    def missing(scheme, **options):
        raise ImportError(f"Install the driver of {scheme}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r'pip install "tandem-grpo\[gcs\]"'):
        open_store("gs://bucket/run")


def test_a_copy_is_made_once_per_version_and_whole(tmp_path):
    store = memory_store("model")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.json").write_text("one")
    (tmp_path / "in" / "sub" / "b.bin").write_bytes(b"two")
    upload_all(store, {name: tmp_path / "in" / name for name in ("a.json", "sub/b.bin")})
    first = copy_of(store, tmp_path / "cache")
    assert (first / "a.json").read_text() == "one"
    assert (first / "sub" / "b.bin").read_bytes() == b"two"
    downloads = store.count("download")
    assert copy_of(store, tmp_path / "cache") == first
    assert store.count("download") == downloads == 2
    store.write("a.json", b"new")  # of the same size
    second = copy_of(store, tmp_path / "cache")
    assert (second / "a.json").read_text() == "new"
    assert (first / "a.json").read_text() == "one"


@pytest.mark.parametrize("name", ["../bad", "sub/../../bad", "/bad", "sub//bad", "./bad", "a\\bad"])
def test_an_object_whose_copy_would_lie_elsewhere_is_refused(tmp_path, name):
    store = memory_store("model")
    store.write("config.json", b"{}")
    store._fs.store[f"/bucket/model/{name}"] = store._fs.store["/bucket/model/config.json"]
    with pytest.raises(ValueError, match="must hold objects with the names of files below it, got"):
        copy_of(store, tmp_path / "cache")
    assert not list(tmp_path.rglob("bad"))


def test_the_url_of_one_object_is_a_file_and_of_nothing_an_error(tmp_path):
    memory_store("data").write("rows.jsonl", b"{}\n")
    memory_store("data").write("rows.jsonl.more", b"other")
    copy = copy_of(memory_store("data/rows.jsonl"), tmp_path)
    assert copy.name == "rows.jsonl"
    assert [path.name for path in copy.parent.iterdir()] == ["rows.jsonl"]
    with pytest.raises(ValueError, match="must be a file or a folder with files, and nothing is there"):
        copy_of(memory_store("data/rows"), tmp_path)


def test_a_folder_is_uploaded_with_the_file_that_makes_it_a_model_last_and_never_over_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = memory_store("out")
    with uploaded_folder(store) as folder:
        for name in ("config.json", "a.safetensors", "z.json"):
            (folder / name).write_text(name)
        assert store.stats() == {}
    assert list(store.stats()) == ["a.safetensors", "config.json", "z.json"]
    assert store.uploaded[-1] == "config.json"
    with pytest.raises(ValueError, match="export folder must be new or empty, got memory://bucket/out"):
        uploaded_folder(store).__enter__()
    stopped = uploaded_folder(memory_store("other"))
    (stopped.__enter__() / "a").write_text("half")
    assert not stopped.__exit__(KeyError, KeyError(), None)
    assert memory_store("other").stats() == {}
    assert not list((tmp_path / "tandem" / "outputs").iterdir())


def test_a_file_that_is_appended_to_goes_on_from_the_copy_that_is_ahead(tmp_path):
    store, names = memory_store("out"), ("", ".meta")
    stopped = continued_copy(store, "x", names, tmp_path / "a")
    path = stopped.__enter__()
    path.write_text("one\n")
    path.with_name("x.meta").write_text("settings")
    assert not stopped.__exit__(KeyError, KeyError(), None)  # what there is is uploaded
    assert store.read("x") == b"one\n"
    with continued_copy(store, "x", names, tmp_path / "b") as path:
        assert path.with_name("x.meta").read_text() == "settings"
        path.write_text(path.read_text() + "two\n")
    with continued_copy(store, "x", names, tmp_path / "a") as path:
        assert path.read_text() == "one\ntwo\n"
        path.write_text("one\ntwo\nthree\n")
    with continued_copy(store, "x", names, tmp_path / "a") as path:
        assert path.read_text() == "one\ntwo\nthree\n"
    (tmp_path / "a" / "x").write_text("other\n")
    with pytest.raises(ValueError, match="does not go on from its copy"):
        continued_copy(store, "x", names, tmp_path / "a").__enter__()


def test_a_download_that_fails_leaves_no_copy(tmp_path):
    store = memory_store("model")
    store.write("a", b"1")
    store.fail_at(2)  # after the list
    with pytest.raises(OSError, match="operation 2"):
        copy_of(store, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_write_under_a_condition_is_made_by_one_writer_only():
    store = memory_store("lease")
    version = store.write_if("lease.json", b"mine", None)
    assert version is not None
    assert store.write_if("lease.json", b"other", None) is None
    second = store.write_if("lease.json", b"renewed", version)
    assert second == store.version("lease.json")
    assert store.write_if("lease.json", b"late", version) is None
    assert store.read("lease.json") == b"renewed"
    assert store.read("nothing") is None
    assert store.version("nothing") is None


def test_names_are_those_below_the_url_alone():
    store = memory_store("run")
    for name in ("a", "checkpoints/1/x", "checkpoints/10/x"):
        store.write(name, b"1")
    memory_store("run2").write("b", b"1")
    assert list(store.stats()) == ["a", "checkpoints/1/x", "checkpoints/10/x"]
    assert list(store.stats("checkpoints/1/")) == ["checkpoints/1/x"]
    store.remove(["a", "not there"])
    assert "a" not in store.stats()
