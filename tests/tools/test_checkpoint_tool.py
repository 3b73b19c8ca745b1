"""`grpo checkpoint`: what is in a checkpoint, whether it is whole, other layouts, and how fast it is written."""

import json
import pathlib
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rl import grpo_trainer
from rl.cli import main as grpo
from rl.config.load import load_config
from rl.data.prompts import fingerprint, load_pairs, load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.models.config import LORA_A, RopeScaling, flatten_specs, parameter_specs
from rl.models.files.hf import load_params, read_config, save_folder
from rl.models.files.maxtext import layout_of, read_params, weight_names
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.run.health import healthy
from rl.run_folder.folder import RunFolder, read_run
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.checkpoint_files import damaged_files, item_folders, read_array, read_record, stored_arrays, write_record
from rl.state.origin import find_origin, tokenizer_from_config
from rl.state.states import setup_training_state
from rl.tools.checkpoints.checkpoint import compare_hashes, find, inspect, verify
from rl.tools.checkpoints.checkpoint_bench import bench, fill_moments
from rl.tools.checkpoints.convert import upgrade_run
from rl.tools.trained import training_setup
from tests.helpers.tiny_models import noisy_params, tiny_config
from tests.whole_runs.test_sft_trainer import RECIPE

GRPO = ("grpo.steps=2", "eval.every=0", "data.eval_size=0", "optimizer.name=sgd")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("tool") / "recipe.yml"
    path.write_text(RECIPE)
    return path


def write_run(folder, recipe, steps, *overrides, kind="sft"):
    """A run folder whose checkpoints hold the state at the start of a run, changed a little at each step."""
    config = load_config(recipe, [f"output_dir={folder}", "data.eval_size=0", *overrides])
    tokenizer = tokenizer_from_config(config)
    origin = find_origin(config, tokenizer)
    rows = load_pairs(config, tokenizer).rows if kind == "sft" else load_prompts(config, tokenizer).train
    identity = {"policy": origin.identity, "data": fingerprint(rows)}
    owner = RunFolder(config, kind, identity | ({"reference": origin.identity} if kind == "grpo" else {}))
    owner.begin()
    mesh, init_state_fn = training_setup(config, origin)
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn)
    state = fill_moments(setup_training_state(config, mesh, init_state_fn)[0])
    for step in steps:
        loop = {"step": step, "flavour": init_state_fn.policy.flavour, "health": healthy()._asdict()}
        if kind == "grpo":
            epoch, position = divmod(step * config.grpo.prompts_per_step, len(rows))
            loop |= {"epoch": epoch, "position": position, "entropy": {"coef": 0.5, "last_entropy": 1.5}}
        changed = jax.jit(lambda leaf, step: leaf * (1 + step / 8))(state.params["norm"]["scale"], step)
        params = state.params | {"norm": {"scale": changed}}
        checkpoints.save(step, state._replace(step=jnp.int32(step), params=params), loop)
    checkpoints.close()
    owner.close()
    return folder


@pytest.fixture(scope="module")
def run(recipe):
    return write_run(recipe.parent / "run", recipe, (2, 4))


@pytest.fixture(scope="module")
def adapter_run(recipe):
    return write_run(recipe.parent / "adapter", recipe, (1,), "lora.rank=2", "pure_nnx=false")


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that may be damaged."""
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


def arrays_of(run, step):
    return {array.path: read_array(array) for array in stored_arrays(run / "checkpoints" / str(step) / "state")}


def largest_file(folder):
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


# inspect


def test_inspect_names_step_flavour_record_and_every_array(run, adapter_run):
    text = "\n".join(inspect(find(run)))
    for words in ("step        4", "written by  nnx", "written at  20", f"{run}, sft, optimizer adamw", '"health": {'):
        assert words in text
    origin = find_origin(load_config(run / "config.yml"), load_tokenizer("byte"))
    specs = dict(flatten_specs(parameter_specs(origin.model_config)))
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    for path, spec in specs.items():
        line = lines["state/params/" + "/".join(path)]
        assert f"float32   [{', '.join(map(str, spec.shape))}]" in line
        assert line.endswith(f"{4 * int(np.prod(spec.shape)):,} bytes")
        assert "state/opt_state/1/0/mu/" + "/".join(path) in lines
    assert {"state/step", "state/rng"} < set(lines)
    text = "\n".join(inspect(find(adapter_run)))
    assert "written by  linen" in text
    assert 'adapter     {"rank": 2, "alpha": 32.0, "targets": ["*_proj"]' in text
    assert f"self_attn/q_proj/{LORA_A}" in text
    assert "q_proj/kernel" not in text


def test_a_step_is_chosen_by_number_or_by_its_own_folder(run):
    assert find(run, 2) == (run / "checkpoints" / "2", run, 2)
    assert find(run / "checkpoints" / "2")[1:] == (run, 2)
    with pytest.raises(ValueError, match=r"--step must be one of the checkpoints of .*, \[2, 4\], got 3"):
        find(run, 3)
    with pytest.raises(ValueError, match="--step needs a run folder"):
        find(run / "checkpoints" / "2", 2)
    with pytest.raises(ValueError, match="must be a checkpoint that Orbax wrote"):
        inspect(find(run / "checkpoints"))


# verify


@pytest.mark.parametrize("kind", ["run", "adapter_run"])
def test_a_checkpoint_as_it_was_written_is_whole(kind, request, capsys):
    folder = request.getfixturevalue(kind)
    assert verify(find(folder))[1:] == ([], [])
    assert grpo(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("whole\n")


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted"])
def test_a_damaged_file_is_named_with_exit_status_1(copy, damage, capsys):
    path = largest_file(copy / "checkpoints" / "4" / "state")
    if damage == "flipped":
        flip_a_byte(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    assert grpo(["checkpoint", "verify", str(copy)]) == 1
    told = capsys.readouterr()
    assert f"problem: {path} is {'missing' if damage == 'deleted' else 'damaged'}" in told.err
    assert told.out.endswith("damaged or unusable\n")
    assert grpo(["checkpoint", "verify", str(copy), "--step", "2"]) == 0


def test_without_hashes_an_unreadable_file_is_named_with_its_arrays(copy):
    folder = copy / "checkpoints" / "4"
    for hashes in folder.parent.glob("*/hashes.json"):
        hashes.unlink()
    identity = json.loads((copy / "run.json").read_text())
    del identity["run"]  # as an older version left it
    (copy / "run.json").write_text(json.dumps(identity))
    path = max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])
    result = verify(find(copy))
    assert "no hashes.json" in result.notes[0]
    assert any(f"{path}: cannot be read: state/opt_state/" in problem for problem in result.problems)


def test_written_content_hashes_find_the_arrays_that_differ(run, tmp_path, capsys):
    file = tmp_path / "hashes.json"
    assert grpo(["checkpoint", "verify", str(run), "--write", str(file)]) == 0
    assert grpo(["checkpoint", "verify", str(run), "--against", str(file)]) == 0
    capsys.readouterr()
    assert grpo(["checkpoint", "verify", str(run), "--step", "2", "--against", str(file)]) == 1
    assert f"compared with {file}: other numbers: state/params/" in capsys.readouterr().err
    hashes = json.loads(file.read_text())
    assert compare_hashes(hashes, hashes) == []
    assert compare_hashes({"a": "1"}, {"b": "1"}) == ["missing: b", "not there before: a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[1]", "it holds no object with a hash for each name"),
        ('{"state/step": 3}', "it holds no object with a hash for each name"),
    ],
)
def test_a_file_that_holds_no_content_hashes_is_refused_before_anything_is_read(tmp_path, capsys, content, message):
    file = tmp_path / "hashes.json"
    if content is not None:
        file.write_text(content)
    assert grpo(["checkpoint", "verify", "absent", "--against", str(file)]) == 2
    told = capsys.readouterr().err
    assert f"--against must be a file that `grpo checkpoint verify --write` wrote, got {str(file)!r}: " in told
    assert message in told


def test_numbers_that_are_not_finite_are_counted_by_array(copy):
    config = load_config(copy / "config.yml", [f"output_dir={copy}"])
    mesh, init_state_fn = training_setup(config, find_origin(config, tokenizer_from_config(config)))
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn)
    state, loop = checkpoints.restore()
    state.params["norm"]["scale"] = state.params["norm"]["scale"].at[3:5].set(jnp.nan)
    checkpoints.save(5, state, {**loop, "step": 5})
    checkpoints.close()
    size = state.params["norm"]["scale"].size
    assert verify(find(copy, 5)).problems == [f"numbers that are not finite in state/params/norm/scale (2 of {size})"]


def test_a_checkpoint_that_the_run_could_not_resume_from_is_explained(copy):
    record = read_record(copy / "checkpoints" / "4")
    write_record(copy / "checkpoints" / "4", {"step": record["step"], "flavour": "nnx"})
    config = (copy / "config.yml").read_text()
    (copy / "config.yml").write_text(
        config.replace("num_layers: 1", "num_layers: 2").replace("name: adamw", "name: lion")
    )
    problems = "\n".join(verify(find(copy)).problems)
    assert "config.yml must be as the run wrote it" in problems
    assert "loop/metadata is damaged" in problems
    assert "the loop record lacks health" in problems
    assert "missing ['layers_1']['input_layernorm']['scale']" in problems


# convert: older runs


def make_old(run, folder):
    """The run as the first version left it."""
    shutil.copytree(run, folder)
    step = folder / "checkpoints" / "2"
    record = read_record(step)
    write_record(step, {key: record[key] for key in ("step", "entropy", "flavour")})
    (step / "hashes.json").unlink()
    tree = {}
    for array in stored_arrays(step / "state"):
        path = array.path
        if path[-1] == "count":
            assert path == ("opt_state", "1", "2", "count")
            path = ("opt_state", "1", "1", "1", "count")
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = read_array(array)
    shutil.rmtree(step / "state")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(step / "state", args=ocp.args.StandardSave(tree))
    identity = json.loads((folder / "run.json").read_text())
    del identity["data"], identity["run"]
    (folder / "run.json").write_text(json.dumps(identity))
    config = (folder / "config.yml").read_text()
    (folder / "config.yml").write_text(config.replace("  slots: null", "  max_rows: 256"))
    return folder


def test_a_run_of_the_first_version_becomes_what_this_version_writes_and_resumes(recipe, tmp_path, capsys):
    whole = write_run(tmp_path / "whole", recipe, (2,), *GRPO, kind="grpo")
    old = make_old(whole, tmp_path / "old")
    before = {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}
    with pytest.raises(ValueError, match="max_rows"):
        read_run(old)
    new = tmp_path / "new"
    assert grpo(["checkpoint", "convert", str(old), str(new)]) == 0
    told = capsys.readouterr().out
    for words in (
        "sampling.max_rows is sampling.slots",
        "data is what data.source gives now",
        "checkpoint 2: loop record: filled in epoch, position, health",
        "checkpoint 2: state: opt_state/1/1/1/count is opt_state/1/2/count",
    ):
        assert words in told
    assert before == {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}
    arrays, others = arrays_of(whole, 2), arrays_of(new, 2)
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        assert array.dtype == others[path].dtype
        np.testing.assert_array_equal(array, others[path], err_msg="/".join(path))
    assert read_record(new / "checkpoints" / "2") == read_record(whole / "checkpoints" / "2")
    assert read_run(new)[1] == {name: value for name, value in read_run(whole)[1].items() if name != "run"}
    assert verify(find(new))[1:] == ([], [])
    # A run that has all of its steps is checked and restored, and ends at once.
    assert grpo_trainer.train(load_config(recipe, [f"output_dir={new}", *GRPO])) == new
    with pytest.raises(ValueError, match="must be new or empty"):
        upgrade_run(old, new)


def test_a_run_of_this_version_is_copied_as_it_is(run, tmp_path):
    assert upgrade_run(run, tmp_path / "new") == []
    assert damaged_files(tmp_path / "new" / "checkpoints" / "4") == []
    assert verify(find(tmp_path / "new")).hashes == verify(find(run)).hashes


# convert: MaxText

BLOCK = {
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
    "self_attn": {
        "q_proj": ("self_attention", "query"),
        "k_proj": ("self_attention", "key"),
        "v_proj": ("self_attention", "value"),
        "o_proj": ("self_attention", "out"),
        "q_norm": ("self_attention", "query_norm"),
        "k_norm": ("self_attention", "key_norm"),
    },
    "mlp": {"gate_proj": ("mlp", "wi_0"), "up_proj": ("mlp", "wi_1"), "down_proj": ("mlp", "wo")},
}
GEMMA_BLOCK = BLOCK | {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def maxtext_decoder(config, params, layers, interleaved=False):
    """The weights as MaxText's decoder holds them; `layers`: scanned, unscanned or list."""

    def block(layer):
        names, out = GEMMA_BLOCK if config.family == "gemma3_text" else BLOCK, {}
        for module, child in layer.items():
            if isinstance(names[module], str):
                out[names[module]] = {"scale": norm(child["scale"])}
                continue
            for name, leaves in child.items():
                outer, inner = names[module][name]
                leaves = {leaf: value(name, leaf, np.asarray(array)) for leaf, array in leaves.items()}
                out.setdefault(outer, {})[inner] = leaves
        return out

    def norm(scale):
        return np.asarray(scale) + (1 if config.family == "gemma3_text" else 0)

    def value(name, leaf, array):
        if leaf == "scale":
            return norm(array)
        if config.family == "llama" and name == "q_proj":
            array = (array / np.sqrt(config.head_dim)).astype(np.float32)
        if interleaved and name in ("q_proj", "k_proj"):
            half = config.head_dim // 2
            array = np.stack([array[..., :half], array[..., half:]], axis=-1).reshape(array.shape)
        return array

    def stack(blocks):
        return jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *blocks)

    blocks = [block(params[f"layers_{i}"]) for i in range(config.num_layers)]
    decoder = {"decoder_norm": {"scale": norm(params["norm"]["scale"])}}
    if layers == "unscanned":
        decoder |= {f"layers_{i}": one for i, one in enumerate(blocks)}
    elif layers == "list":
        decoder["layers"] = {str(i): one for i, one in enumerate(blocks)}
    elif config.family == "gemma3_text":
        whole = config.num_layers // 6 * 6
        decoder["layers"] = {f"layers_{i}": stack(blocks[i:whole:6]) for i in range(6)}
        decoder["layers_remainder"] = {f"layers_{i}": one for i, one in enumerate(blocks[whole:])}
    else:
        decoder["layers"] = stack(blocks)
    if "lm_head" in params:
        decoder["logits_dense"] = {"kernel": np.asarray(params["lm_head"]["kernel"])}
    embedding = np.asarray(params["embed_tokens"]["embedding"])
    if config.family == "gemma3_text":
        embedding = embedding * np.float32(jnp.bfloat16(config.hidden_size**0.5))
    padding = np.zeros((7, config.hidden_size), np.float32)  # a vocabulary of a round size
    return {"decoder": decoder, "token_embedder": {"embedding": np.concatenate([embedding, padding])}}


def nnx_values(tree):
    return {name: nnx_values(child) if isinstance(child, dict) else {"value": child} for name, child in tree.items()}


def llama31():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    return tiny_config("llama", rope_scaling=scaling, tie_word_embeddings=False, num_layers=3)


def gemma(num_layers):
    types = tuple("full_attention" if i % 6 == 5 else "sliding_attention" for i in range(num_layers))
    return tiny_config("gemma3_text", hidden_size=24, num_layers=num_layers, layer_types=types)


CASES = {
    "llama, Linen, unscanned": (tiny_config("llama"), "unscanned", "linen", False),
    "llama 3.1, NNX, scanned": (llama31(), "scanned", "nnx", True),
    "qwen2, Linen, scanned": (tiny_config("qwen2", tie_word_embeddings=False), "scanned", "linen", False),
    "qwen3, NNX, list": (tiny_config("qwen3"), "list", "nnx rl", False),
    "gemma3, Linen, scanned": (gemma(8), "scanned", "linen", False),
    "gemma3, NNX, unscanned": (gemma(3), "unscanned", "nnx train", False),
}


def maxtext_tree(config, params, layers, flavour, interleaved):
    weights = maxtext_decoder(config, params, layers, interleaved)
    if flavour == "linen":
        vision = {"vision_encoder": {"Gemma3VisionEncoderLayer_0": {"pos_embedding": np.ones((1, 4, 4), np.float32)}}}
        weights |= vision if config.family == "gemma3_text" else {}
        moments = {"mu": {"params": maxtext_decoder(config, params, layers)}, "count": np.int32(3)}
        return {"params": {"params": weights}, "step": np.int32(3), "opt_state": [moments, {}]}
    weights["decoder"]["dropout"] = {"rngs": {"params": {"count": np.uint32(1)}}}
    weights = nnx_values(weights)
    if flavour == "nnx train":
        return {"model": weights, "optimizer": {"step": {"value": np.uint32(3)}}}
    return {"base": weights} if flavour == "nnx rl" else weights


def logits_fn(config):
    policy = create_policy(config, True)
    tokens = jnp.arange(24).reshape(2, 12) % config.vocab_size
    return jax.jit(lambda params: policy.unembed(params, policy.hidden(params, plain_inputs(tokens))))


@pytest.mark.parametrize("name", CASES)
def test_weights_of_maxtext_compute_the_same_as_a_hugging_face_folder(name, tmp_path, capsys):
    config, layers, flavour, interleaved = CASES[name]
    params = noisy_params(config)
    like = tmp_path / "like"
    save_folder(like, config, jax.tree.map(jnp.zeros_like, params), load_tokenizer("byte"))
    checkpoint = tmp_path / "0" / "items"
    tree = maxtext_tree(config, params, layers, flavour, interleaved)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3="NNX" in name)) as checkpointer:
        checkpointer.save(checkpoint, args=ocp.args.PyTreeSave(tree))
    folder = checkpoint.parent if config.family == "qwen2" else checkpoint
    assert grpo(["checkpoint", "convert", str(folder), str(tmp_path / "out"), "--like", str(like)]) == 0
    assert ("left out 1 arrays of vision_encoder" in capsys.readouterr().out) == (name == "gemma3, Linen, scanned")
    assert read_config(tmp_path / "out") == read_config(like)
    converted = load_params(tmp_path / "out", config)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=3e-7, atol=3e-7), converted, params)
    logits = logits_fn(config)
    np.testing.assert_allclose(logits(converted), logits(params), rtol=0, atol=2e-4)
    found = find(checkpoint)
    words = "MaxText Linen" if flavour == "linen" else "MaxText NNX"
    layout = "layers scanned" if layers == "scanned" else "layers unscanned"
    assert f"{words}, {layout}" in "\n".join(inspect(found))
    assert verify(found).problems == []


def test_what_is_missing_left_over_or_misshapen_in_a_maxtext_checkpoint_is_named():
    config = tiny_config("llama")
    tree = {"params": {"params": maxtext_decoder(config, noisy_params(config), "scanned")}}

    def read(change, **arguments):
        copied = jax.tree.map(np.copy, tree)
        change(copied["params"]["params"]["decoder"])
        flat = jax.tree_util.tree_leaves_with_path(copied)
        arrays = {tuple(part.key for part in path): leaf for path, leaf in flat}
        return read_params(config, weight_names(arrays), lambda path: arrays[path], **arguments)

    with pytest.raises(ValueError, match=r"1 arrays .* are missing: decoder/decoder_norm/scale"):
        read(lambda decoder: decoder.pop("decoder_norm"))
    with pytest.raises(ValueError, match=r"1 arrays .* have no place: decoder/layers/mlp/wi_9/kernel"):
        read(lambda decoder: decoder["layers"]["mlp"].update(wi_9={"kernel": np.ones(2)}))
    with pytest.raises(ValueError, match=r"wi_0/kernel must have shape \[16, 2, 24\], got \[2, 16, 24\]"):
        read(lambda decoder: decoder["layers"]["mlp"].update(wi_0={"kernel": np.ones((2, 16, 24))}))
    other, _ = read(lambda decoder: None, rope="interleaved")
    plain, _ = read(lambda decoder: None)
    assert not np.array_equal(
        other["layers_0"]["self_attn"]["q_proj"]["kernel"], plain["layers_0"]["self_attn"]["q_proj"]["kernel"]
    )
    with pytest.raises(ValueError, match="rope must be left out for qwen3"):
        read_params(tiny_config("qwen3"), {}, lambda path: None, rope="halves")
    assert weight_names([("params", "layers_0", "mlp")]) == {}
    assert layout_of([("params", "layers_0", "mlp")]) is None


def test_arguments_of_convert_that_do_not_apply_are_refused(run, tmp_path, capsys):
    assert grpo(["checkpoint", "convert", str(run), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 2
    assert "--dtype must be left out for a run folder" in capsys.readouterr().err
    assert grpo(["checkpoint", "inspct", str(run)]) == 2
    assert "needs one of inspect, verify, convert, bench, got 'inspct'" in capsys.readouterr().err
    checkpoint = str(run / "checkpoints" / "4")
    assert grpo(["checkpoint", "convert", checkpoint, str(tmp_path / "out")]) == 2
    assert "--like MODEL must give" in capsys.readouterr().err
    assert grpo(["checkpoint", "convert", checkpoint, str(tmp_path / "out"), "--like", str(run)]) == 2
    assert "must hold the weights of a decoder of MaxText's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# bench


@pytest.mark.parametrize("kind", ["run", "adapter_run"])
def test_bench_measures_the_state_of_a_run_and_leaves_nothing_behind(kind, request, capsys, tmp_path):
    folder = request.getfixturevalue(kind)
    before = sorted(folder.parent.iterdir()), sorted(folder.rglob("*"))
    out = tmp_path / "bench.json"
    assert grpo(["checkpoint", "bench", str(folder), "--steps", "2", "--json", str(out), "mesh.num_devices=2"]) == 0
    assert (sorted(folder.parent.iterdir()), sorted(folder.rglob("*"))) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"step {4 if kind == 'run' else 1} of {folder}: ")
    assert [line.split()[0] for line in lines[1:]] == ["restore", "fill", "round", "1", "2", "median"]
    assert [line.count(" GB/s") for line in lines[1:]] == [1, 1, 0, 3, 3, 3]
    written = json.loads(out.read_text())
    assert [phase["name"] for phase in written["phases"]] == ["restore", "fill"]
    assert set(written["phases"][0]) == {"name", "seconds", "num_bytes", "gigabytes_per_second"}
    assert [list(timing) for timing in written["timings"]] == [["blocking", "complete", "restore"]] * 2
    assert written["phases"][0]["num_bytes"] == written["num_bytes"]


def test_bench_of_a_recipe_counts_every_array_of_the_state(recipe, run):
    result = bench(recipe, 1, (f"output_dir={recipe.parent / 'measured'}",))
    assert result.source == f"the state at the start of {recipe}"
    assert result.num_bytes == sum(array.nbytes for array in arrays_of(run, 4).values())
    assert result.num_disk_bytes > 0.8 * result.num_bytes
    init, fill = result.phases
    assert (init.name, init.num_bytes) == ("init", result.num_bytes)
    moments = [array for path, array in arrays_of(run, 4).items() if "opt_state" in path and array.ndim]
    assert (fill.name, fill.num_bytes) == ("fill", sum(array.nbytes for array in moments))
    assert init.seconds > 0
    assert fill.seconds > 0
    assert len(result.timings) == 1
    assert 0 < result.timings[0].blocking <= result.timings[0].complete
    assert not (recipe.parent / "measured").exists()
    with pytest.raises(ValueError, match="--steps must be >= 1, got 0"):
        bench(recipe, 0)


def test_filled_moments_are_finite_and_cannot_be_compressed(recipe):
    config = load_config(recipe, ["optimizer.moment_dtype=bfloat16"])
    state, _ = setup_training_state(config, *training_setup(config, find_origin(config, tokenizer_from_config(config))))
    filled = fill_moments(state)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)  # noqa: E731
    assert kinds(filled) == kinds(state)
    moments = [np.asarray(leaf) for leaf in jax.tree.leaves(filled.opt_state) if leaf.ndim]
    assert {moment.dtype.name for moment in moments} == {"bfloat16", "float32"}
    for moment in moments:
        assert np.isfinite(moment.astype(np.float32)).all()
        assert moment.size < 500 or len(zlib.compress(moment.tobytes(), 9)) > 0.9 * moment.nbytes
    counts = [[leaf for leaf in jax.tree.leaves(tree.opt_state) if not leaf.ndim] for tree in (state, filled)]
    assert counts[0] == counts[1]


def test_items_are_found_in_a_step_and_by_themselves(run):
    folder = run / "checkpoints" / "4"
    assert item_folders(folder) == {"state": folder / "state"}
    assert item_folders(folder / "state") == {"": folder / "state"}
    assert verify(find(folder / "state")).notes[1].startswith("not part of a run folder")
