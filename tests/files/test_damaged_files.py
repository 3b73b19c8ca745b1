"""Damage to the files of others: whatever stands in them, they are read, or refused by name, and nothing else happens.

A fixed choice of cases, each a small change to a file that is good: a value of JSON by one that does not belong there,
a bit of a binary file.
"""

import copy
import json
import os
import pathlib
import random
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rl.data.sources import load_rows
from rl.data.tokenizer import load_tokenizer
from rl.models.config import LoRAConfig
from rl.models.files import hf
from rl.models.files.folders import open_tensors
from rl.models.files.peft import CONFIG_FILE, adapter_for, load_adapter, read_adapter, save_adapter
from tests.helpers.places import FILES
from tests.helpers.tiny_models import noisy_params, tiny_config

GOLDEN = FILES / "models"
DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = (
    *(None, "", "2", True, False, -1, 0, 1, 3, 0.5, 2**31, 10**9, 10**30, 1e30, float("nan"), float("inf")),
    *([], {}, [1], ["x"], [None], [[1]], {"a": 1}, {"": []}, DEEP, "x" * 50_000, "../../etc/passwd", "\0", "\ud800"),
    "(a|a)*b",
)


def places(value, path=()):
    """The path of a JSON value and of all that lies in it; of long lists the first few."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    node = value
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return value


def outcomes(read, file, contents, named):
    """How often the file is read and how often refused; an AssertionError where a message does not say which it is."""
    good, counts, errors = file.read_bytes(), {"read": 0, "refused": 0}, []
    for content in contents:
        file.write_bytes(content)
        try:
            read()
            counts["read"] += 1
        except ValueError as error:
            errors.append(error)
    file.write_bytes(good)
    counts["refused"] = len(errors)
    for error in errors:
        assert str(named) in str(error)
        assert len(str(error)) < 2500
        assert not isinstance(error, UnicodeError)
    return counts


def hostile_json(file, number, seed=0):
    good = json.loads(file.read_text())
    cases = [(path, value) for path in places(good) for value in HOSTILE]
    for path, value in random.Random(seed).sample(cases, number):
        yield json.dumps(changed(good, path, value)).encode("utf-8", "surrogatepass")


def damaged_bytes(content, number, end, seed=0):
    """`content` with one to three bits of its first `end` bytes turned, or cut short."""
    rng = random.Random(seed)
    for i in range(number):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        yield bytes(damaged[: rng.randrange(len(content))] if i % 10 == 0 else damaged)


@pytest.mark.parametrize("name", ["gemma3_text", "llama3_scaled_rope", "qwen2"])
def test_a_model_folder_with_a_hostile_value_is_read_or_refused_by_name(tmp_path, name):
    folder = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    for file in ("config.json", "generation_config.json"):
        counts = outcomes(
            lambda: hf.check_weights(folder, hf.read_config(folder)),
            folder / file,
            hostile_json(folder / file, 120),
            folder,
        )
        assert min(counts.values()) > 0


def test_damaged_weights_and_their_index_are_read_or_refused_by_name(tmp_path):
    config = tiny_config()
    hf.save_folder(tmp_path / "model", config, noisy_params(config), max_shard_bytes=6000)
    index = tmp_path / "model" / hf.INDEX_FILE
    read = lambda: hf.check_weights(tmp_path / "model", config)  # noqa: E731
    assert outcomes(read, index, hostile_json(index, 120), tmp_path)["refused"] > 60
    file = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    content = file.read_bytes()
    header_bytes = int(np.frombuffer(content[:8], "<u8")[0])
    assert outcomes(read, file, damaged_bytes(content, 120, 8 + header_bytes), tmp_path)["refused"] > 60


def test_a_damaged_adapter_is_read_or_refused_by_name(tmp_path):
    config, trained = tiny_config(), tiny_config(lora=LoRAConfig(3, 6.0, ("*_proj",)))
    save_adapter(tmp_path / "out", trained, noisy_params(trained), "x")
    file = tmp_path / "out" / CONFIG_FILE
    counts = outcomes(
        lambda: (adapter_for(tmp_path / "out", config), load_adapter(tmp_path / "out", trained)),
        file,
        hostile_json(file, 150),
        tmp_path,
    )
    assert min(counts.values()) > 0


def test_a_damaged_tokenizer_is_read_or_refused_by_name(tmp_path):
    load_tokenizer("byte").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / name
        counts = outcomes(lambda: load_tokenizer(tmp_path).encode("a"), file, hostile_json(file, 60), "tokenizer")
        assert min(counts.values()) > 0


def test_a_damaged_parquet_file_is_read_or_refused_by_name(tmp_path):
    file = tmp_path / "x.parquet"
    rows = [{"prompt": f"question {i}", "answer": str(i), "tags": ["a"] * (i % 3)} for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=20)
    content = file.read_bytes()
    read = lambda: load_rows(str(file), {}, {"prompt": "prompt"}, 0)  # noqa: E731
    counts = outcomes(read, file, damaged_bytes(content, 300, len(content)), "x.parquet")
    assert min(counts.values()) > 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "a.jinja"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        os.mkfifo(folder / name)
        for read in (hf.resolve_source, load_tokenizer):
            with pytest.raises(ValueError, match=f"{name} must be a file, got a named pipe; remove it"):
                read(folder)
        with pytest.raises(ValueError, match=f"{name} must be a file, got a named pipe"):
            load_tokenizer("byte", folder / name)
    os.mkfifo(tmp_path / CONFIG_FILE)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} must be a file, got a named pipe"):
        read_adapter(tmp_path)
    os.mkfifo(tmp_path / "weights")
    with (
        pytest.raises(ValueError, match="weights must be a file, got a named pipe"),
        open_tensors(tmp_path / "weights"),
    ):
        pass
