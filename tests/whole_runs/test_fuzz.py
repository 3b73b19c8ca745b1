"""Generated input: everything before the first compilation succeeds or refuses by name, and changes nothing on disk.

A fixed choice of examples here; `make fuzz` draws new ones for an hour.
"""

import contextlib
import json
import shutil
import struct

import pytest
import yaml
from hypothesis import strategies as st

from rewards.protocol import HEADER
from rewards.replies import BrokenWorker, ReplyReader, read_load_reply, read_run_reply
from rl.config.load import dump_config, load_config
from rl.config.sections import to_dict
from rl.data.prompts import load_pairs, load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh
from rl.grpo_trainer import train
from rl.models.flavours import policy_from_config
from rl.run.metrics import CompileCounter
from rl.sampler.create import eos_ids
from rl.sft_trainer import train as train_sft
from rl.state.origin import find_origin, pretrained_params, tokenizer_from_config
from rl.state.states import InitStateFn, get_abstract_state
from tests.helpers.fuzzing import JSON_VALUES, KEYS, mutated, mutated_json, overrides, refused_or_done, search, snapshot
from tests.helpers.places import FILES

MODELS = FILES / "models"
FAMILIES = sorted(path.name for path in MODELS.iterdir())
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
ROWS = [{"prompt": f"{n}+{n + 1}=", "answer": str(2 * n + 1), "kind": "odd"} for n in range(6)]


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", True)


# Configurations


def test_any_overrides_give_a_configuration_that_reads_back_or_are_refused(tmp_path):
    path = tmp_path / "config.yml"

    def check(texts):
        config = refused_or_done(lambda: load_config(None, texts))
        if config is not None:
            path.write_text(dump_config(config), encoding="utf-8")
            assert load_config(path) == config
            assert yaml.safe_load(path.read_text(encoding="utf-8")) == to_dict(config)  # a reader of YAML 1.1

    search(check, overrides(), 250, share=0.15)


# Not base.yml itself: the fixed choice of examples would be another with every key that is added there.
RECIPE = b"""# a comment
seed: 3
output_dir: runs/a                # another
model:
  source: null
  arch:
    family: qwen3
    num_layers: 4
    rope_theta: 10000.0
data:
  source: arithmetic
  args: {operation: add, digits: [1, 2], 'nested': {a: "b"}}
  columns:
    prompt: question
    answer: null
rewards:
  functions:
    - {function: "rewards.number:exact_number_strict", name: exact}
    - function: my.py:f
      weight: -0.5
      kwargs: {limit: 1e-3}
sampling:
  logit_bias: {7: -100, 12: 2.5}
  stop_strings: ["\\n", x]
tokenizer:
  chat_template: |
    a
    b
grpo: {preset: dapo, steps: 7,
       beta: 0.1}
mesh:
  rules:
    embed: [[fsdp, tensor], [fsdp]]
"""


def test_any_text_is_a_recipe_or_is_refused_by_file(tmp_path):
    recipe = tmp_path / "recipe.yml"
    small = (
        b"grpo: &a {steps: 3, preset: dapo}\nsampling:\n  stop_strings: [x, 'y']\ndata: {args: {a: *a, <<: {b: 1}}}\n"
    )
    texts = (
        mutated(RECIPE) | mutated(small) | st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode())
    )

    def check(data):
        recipe.write_bytes(data)
        refused_or_done(lambda: load_config(recipe), str(recipe))

    search(check, texts, 250, share=0.1)


# The whole start


def write_recipe(folder):
    """A recipe whose start is refused in the end, for its folder holds something else: no worker is started."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine")
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"arch": {"family": "llama", **SIZES}},
        "data": {"source": str(folder / "rows.jsonl"), "max_prompt_length": 8, "eval_size": 2},
        "rewards": {"functions": [{"function": "rewards.number:exact_number_flexible", "name": "exact"}]},
        "sampling": {"max_completion_length": 4},
        "grpo": {"steps": 2, "prompts_per_step": 4, "group_size": 2, "max_tokens_per_microbatch": 128},
        "sft": {"batch_size": 2, "steps": 2},
        "mesh": {"data": 1, "num_devices": 1},
    }
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    return folder / "recipe.yml"


# Of these the start itself is another: other processes, workers, or files of a user's own.
OTHERS = ("distributed.", "rewards.functions", "output_dir", "logging.compilation_cache")


@pytest.mark.parametrize("start", [train, train_sft], ids=["grpo", "sft"])
def test_any_start_comes_to_its_run_folder_or_is_refused(tmp_path, start):
    recipe = write_recipe(tmp_path)
    keys = tuple(key for key in KEYS if not key.startswith(OTHERS) and (start is train or key.startswith(SFT_KEYS)))
    before = snapshot(tmp_path)

    def check(texts):
        with CompileCounter() as compiles:
            assert refused_or_done(lambda: start(load_config(recipe, texts), check_only=True), str(tmp_path)) is None
        assert compiles.count == 0
        assert snapshot(tmp_path) == before

    search(
        check,
        overrides(keys, most=5, hostile=False) | overrides(keys, most=3),
        100 if start is train else 40,
        share=0.2 if start is train else 0.1,
    )


SFT_KEYS = ("sft.", "data.", "optimizer.", "tokenizer.", "mesh.", "lora.", "model.", "sampling.")


def test_any_reward_function_key_is_checked_without_a_trace(tmp_path):
    """With workers: few."""
    recipe = write_recipe(tmp_path)
    (tmp_path / "run" / "thesis.tex").unlink()
    before = snapshot(tmp_path)
    keys = tuple(key for key in KEYS if key.startswith("rewards.") and "num_workers" not in key)

    def check(texts):
        refused_or_done(lambda: train(load_config(recipe, texts), check_only=True), str(tmp_path))
        assert snapshot(tmp_path) == before

    search(check, overrides(keys, most=2), 8, share=0.05)


# Rows


def test_any_rows_are_prompts_and_pairs_or_are_refused_by_file_or_key(tmp_path):
    source, tokenizer = tmp_path / "rows.jsonl", load_tokenizer("byte")
    good = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    messages = st.lists(
        st.fixed_dictionaries(
            {}, optional={"role": st.sampled_from(["user", "system", "x", 3]), "content": JSON_VALUES}
        ),
        max_size=3,
    )
    names = st.sampled_from(["prompt", "answer", "kind", "", "images", "completion"])
    rows = st.lists(st.dictionaries(names, JSON_VALUES | messages | st.text(max_size=9), max_size=4), max_size=6)
    files = mutated(good) | rows.map(lambda made: "".join(json.dumps(row) + "\n" for row in made).encode())
    keys = tuple(key for key in KEYS if key.startswith(("data.columns", "data.eval_size", "data.chat", "data.system")))

    def check(example):
        data, texts = example
        source.write_bytes(data)
        texts = [f"data.source={source}", "data.max_prompt_length=30", "sft.completion_column=answer", *texts]
        config = refused_or_done(lambda: load_config(None, texts))
        if config is not None:
            refused_or_done(lambda: load_prompts(config, tokenizer), str(source))
            refused_or_done(lambda: load_pairs(config, tokenizer), str(source))

    search(check, st.tuples(files, st.just([]) | overrides(keys, most=2, hostile=False)), 200, share=0.15)


# Model folders


def with_header(data, change):
    """A safetensors file with its JSON header changed."""
    (size,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@st.composite
def broken_folder(draw, tokenizer_files):
    """(family, {file: bytes}) with one or two files broken."""
    family = draw(st.sampled_from(FAMILIES))
    folder, files = MODELS / family, {}
    for name in draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True)):
        if name == "model.safetensors":
            data = (folder / name).read_bytes()
            (size,) = struct.unpack("<Q", data[:8])
            header = draw(mutated_json(json.loads(data[8 : 8 + size])))
            files[name] = (
                with_header(data, lambda _, header=header: header) if draw(st.integers(0, 3)) else draw(mutated(data))
            )
        else:
            path = folder / name if (folder / name).exists() else tokenizer_files / name
            files[name] = draw(mutated_json(json.loads(path.read_bytes())))
    return family, files


FILES = (
    *("config.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    "tokenizer_config.json",
)


def test_any_model_folder_is_loaded_or_refused(tmp_path):
    tokenizer_files, folder = tmp_path / "tokenizer", tmp_path / "model"
    load_tokenizer("byte").save_pretrained(tokenizer_files)

    def check(example):
        family, files = example
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(MODELS / family, folder)
        has_tokenizer = any(name.startswith("tokenizer") for name in files)
        if has_tokenizer:
            shutil.copytree(tokenizer_files, folder, dirs_exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        before = snapshot(folder)
        texts = [f"model.source={folder}", "mesh.num_devices=1", "mesh.data=1"]
        config = load_config(None, texts if has_tokenizer else [*texts, "tokenizer.source=byte"])
        refused_or_done(lambda: load_model(config), str(folder), *files)
        assert snapshot(folder) == before

    def load_model(config):
        tokenizer = tokenizer_from_config(config)
        tokenizer.encode("1+1=")
        origin = find_origin(config, tokenizer)
        eos_ids(config, origin.model_config, tokenizer)
        mesh = create_mesh(config.mesh)
        init = InitStateFn(policy_from_config(config, origin.model_config, mesh), None, config.seed)
        shardings = get_abstract_state(config, mesh, init, is_training=False).shardings.params
        pretrained_params(origin, shardings)

    search(check, broken_folder(tokenizer_files), 120, share=0.2)


# Rewards


def test_any_message_of_a_worker_is_a_reply_or_that_of_a_broken_worker():
    good = (
        {"nonce": "n", "op": "result", "index": 0, "value": 1.0, "kind": None, "message": None},
        {"nonce": "n", "op": "done", "kind": None, "message": None},
        {
            "nonce": "n",
            "op": "loaded",
            "style": "batch",
            "is_async": False,
            "calls": None,
            "columns": ["answer"],
            "takes_completion_ids": False,
            "needs_completion_ids": False,
        },
        {"nonce": "n", "op": "refused", "error": "x"},
    )
    frames = st.sampled_from(good).flatmap(mutated_json) | st.binary(max_size=20)

    def check(example):
        frame, tail = example
        for read in (lambda: read_run_reply(frame, "n", 2), lambda: read_load_reply(frame, "n", ["answer"])):
            with contextlib.suppress(BrokenWorker):
                value = getattr(read(), "value", None)
                assert value is None or (type(value) is float and abs(value) <= 1e6)
        reader = ReplyReader()
        reader.feed(HEADER.pack(len(frame)) + frame + tail)
        assert next(iter(reader.frames())) == frame
        with contextlib.suppress(BrokenWorker):
            list(reader.frames())

    search(check, st.tuples(frames, st.binary(max_size=12)), 300, share=0.05)
