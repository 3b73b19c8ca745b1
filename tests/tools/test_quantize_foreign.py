"""`grpo quantize` of Tunix models and of modules of the user's own, in both flavours, and what reads the result."""

import functools
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from rl.cli import main
from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.config import Quantization, flatten_specs, leaf_at, spec_at
from rl.models.files.folders import set_leaf
from rl.models.files.hf import save_folder
from rl.models.flavours import foreign_config
from rl.models.foreign import tunix_files
from rl.models.foreign.files import check_weights, weight_reader
from rl.models.foreign.own_files import save_weights
from rl.models.foreign.tunix_config import with_globals
from rl.models.inputs import plain_inputs
from rl.models.logprobs import token_logprobs
from rl.models.quantized import QuantizedArray, dequantize, quantize
from rl.models.train_state import string_keys
from rl.state.origin import find_origin
from rl.tools.quantization.quantize import quantize_folder
from rl.tools.quantization.quantize_foreign import DEFAULT_PATTERNS, quantize_foreign
from rl.tools.trained import load_start
from tests.helpers import tunix_golden
from tests.helpers.places import FILES, REWARDS, ROOT
from tests.helpers.tiny_models import noisy_params, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in tunix_golden.IGNORED_WARNINGS]
GOLDEN = FILES / "models"
EXAMPLES = {"nnx": ROOT / "examples/own_model/gpt.py", "linen": ROOT / "examples/own_model/ssm.py"}
TEXT = "what is 12+34? it is 46, as everybody knows."
TOKENS = tuple(load_tokenizer("byte").encode(TEXT))
ROWS = [
    "data.source=arithmetic",
    "data.args={operation: add, digits: 1}",
    "data.eval_size=1",
    f"rewards.functions=[{{function: '{REWARDS}:digit_share', name: digits}}]",
]
LIMITS = ["mesh.num_devices=1", "sampling.max_completion_length=6", "sampling.slots=2", "sampling.eos_ids=[258]"]
LIMITS += ["sampling.warm_up=false", "data.max_prompt_length=8"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> pathlib.Path:
    """A Qwen3 of experts whose vocabulary holds all bytes."""
    source, folder = tunix_golden.FOLDER / "qwen3_moe", tmp_path_factory.mktemp("moe") / "model"
    folder.mkdir()
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in sorted({"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys()):
        tensors[name] = rng.normal(0, 0.3, (259, tensors[name].shape[1])).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 259, "eos_token_id": 258}))
    return folder


def own_settings(flavour, weights):
    settings = [f"pure_nnx={flavour == 'nnx'}".lower(), f"model.source={EXAMPLES[flavour]}:build", *LIMITS]
    return [*settings, f"model.args={json.dumps({'hidden_size': 16, 'num_layers': 2})}", f"model.weights={weights}"]


@pytest.fixture(scope="module", params=["nnx", "linen"])
def module(request, tmp_path_factory):
    """(flavour, the file with the weights of a module of the user's own)."""
    file = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    start = load_start(load_config(None, own_settings(request.param, "null")))
    save_weights(file, start.params)
    return request.param, file


def is_small(leaf):
    return isinstance(leaf, QuantizedArray)


def assert_is_the_quantised_model(trained, plain, quantization, chosen, tokens=TOKENS):
    """Its parameters are those of `plain`, the chosen ones rounded, and its hidden states are those of the rounded."""
    got = dict(flatten(trained.params))
    assert {name for name, leaf in got.items() if is_small(leaf)} == chosen
    for name, leaf in flatten(plain.params):
        want = leaf
        if name in chosen:
            dims = spec_at(plain.policy.config, name.split("/")).contract_dims
            want = quantize(leaf, dims, quantization.dtype, quantization.group_size)
        jax.tree.map(np.testing.assert_array_equal, got[name], want)
    wide = jax.tree.map(lambda leaf: dequantize(leaf) if is_small(leaf) else leaf, trained.params, is_leaf=is_small)
    found = logprobs(trained, trained.params, tokens)
    np.testing.assert_allclose(found, logprobs(plain, wide, tokens), atol=1e-5)
    assert np.max(np.abs(found - logprobs(plain, plain.params, tokens))) > 1e-4


def flatten(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_small)
    return [("/".join(part.key for part in path), leaf) for path, leaf in leaves]


def logprobs(trained, params, tokens=TOKENS):
    """Of each token but the first, by the whole sequence at once."""
    return np.asarray(_logprobs(trained.policy, params, jnp.asarray([tokens])))[0]


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(policy, params, tokens):
    hidden = policy.hidden(params, plain_inputs(tokens))
    return token_logprobs(policy, params, hidden[:, :-1], tokens[:, 1:], 1.0, 512, False)[0]


def perplexities_in(said, num_tokens):
    """What the command says: before and after."""
    match = re.search(rf"perplexity on {num_tokens} tokens: ([\d.]+) before, ([\d.]+) after", said)
    assert match, said
    return [float(number) for number in match.groups()]


def assert_sampling_and_evaluation_read(model, settings, tmp_path, trained, capsys):
    """Evaluation's greedy completion is what sampling draws, and its log-probs are those of the whole sequence."""
    assert main(["eval", model, *ROWS, *settings, "--output", str(tmp_path / "eval")]) == 0
    one = json.loads((tmp_path / "eval").read_text().splitlines()[0])
    capsys.readouterr()
    assert main(["sample", model, "--prompt", one["prompt"], "sampling.temperature=0", *settings]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert drawn["completion"] == one["completion"]
    prompt = load_tokenizer("byte").encode(one["prompt"])
    want = logprobs(trained, trained.params, (*prompt, *drawn["token_ids"]))[len(prompt) - 1 :]
    assert len(want) > 0
    np.testing.assert_allclose(drawn["logprobs"], want, atol=1e-4)


@pytest.mark.parametrize("family", [*tunix_golden.FAMILIES, "qwen2", "qwen3", "llama_tied", "gemma3_text"])
def test_one_parameter_is_read_as_tunix_loads_it_with_all(family):
    """Stacked experts, merged q, k and v, biases: the very bits that Tunix's loader gives."""
    folder = (tunix_golden.FOLDER if family in tunix_golden.FAMILIES else GOLDEN) / family
    config = foreign_config(load_config(None, [f"model.source=tunix:{folder}"]), folder)
    table = tunix_files._table(config.model)  # with the corrections
    loader = config.model.loader.create_model_from_safe_tensors
    load = with_globals(loader, _get_key_and_transform_mapping=lambda _: table)
    loaded = nnx.state(load(str(folder), config.model.config, dtype=jnp.float32, mode="optimized"), nnx.Param)
    params, read = string_keys(nnx.to_pure_dict(loaded)), weight_reader(folder, config)
    for path, _ in flatten_specs(config.specs):
        np.testing.assert_array_equal(read(path), leaf_at(params, path), err_msg="/".join(path))


def test_a_folder_quantised_for_the_own_decoder_is_no_tunix_model(tmp_path):
    quantize_folder(GOLDEN / "qwen3", tmp_path / "out", Quantization("int8"))
    config = load_config(None, [f"model.source=tunix:{tmp_path / 'out'}"])
    with pytest.raises(ValueError, match=r"writes for this model\.source: missing embedder/input_embedding"):
        check_weights(tmp_path / "out", foreign_config(config, tmp_path / "out"))


@pytest.mark.slow
def test_a_tunix_model_of_experts_is_quantised_and_read(moe, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    settings = ["tokenizer.source=byte", *LIMITS]
    arguments = ["--dtype", "int4", "--group-size", "4", "--text", str(tmp_path / "text")]
    assert main(["quantize", f"tunix:{moe}", str(tmp_path / "out"), *settings, *arguments]) == 0
    said = capsys.readouterr().out
    source = f"tunix:{tmp_path / 'out'}"
    trained = load_start(load_config(None, [f"model.source={source}", *settings]))
    plain = load_start(load_config(None, [f"model.source=tunix:{moe}", *settings]))
    names = [f"attn/{name}_proj/w" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    chosen = {f"layers/{layer}/{name}" for layer in (0, 1) for name in names}
    assert_is_the_quantised_model(trained, plain, Quantization("int4", 4), chosen)
    kernel = trained.params["layers"]["0"]["mlp"]["down_proj"]
    assert kernel.values.shape == (4, 12, 16)  # experts, inputs, outputs
    assert kernel.scale.shape == (4, 3, 16)
    assert "14 matrices in int4, a scale per 4 inputs" in said
    assert "embedder" in said
    perplexities = [math.exp(-np.mean(logprobs(version, version.params))) for version in (plain, trained)]
    assert perplexities_in(said, len(TOKENS) - 1) == pytest.approx(perplexities, rel=1e-4)
    assert abs(perplexities[0] - perplexities[1]) > 0.01
    # The error of a layer, by hand.
    squares = np.zeros(2)
    for name in (name for name in chosen if name.startswith("layers/0/")):
        exact = np.asarray(dict(flatten(plain.params))[name], np.float64)
        rounded = np.asarray(dequantize(dict(flatten(trained.params))[name]), np.float64)
        squares += np.sum((exact - rounded) ** 2), np.sum(exact**2)
    line = next(line for line in said.splitlines() if line.startswith("layers/0"))
    assert float(line.split()[1]) == pytest.approx(math.sqrt(squares[0] / squares[1]), abs=1e-5)
    assert_sampling_and_evaluation_read(source, settings, tmp_path, trained, capsys)


@pytest.mark.slow
def test_a_module_of_ones_own_is_quantised_and_read(module, tmp_path, capsys):
    flavour, file = module
    (tmp_path / "text").write_text(TEXT)
    text = ["--text", str(tmp_path / "text"), "--context", "15"]
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    recipe.write_text(f"model: {{source: '{EXAMPLES[flavour]}:build'}}")
    assert main(["quantize", str(recipe), str(out), *own_settings(flavour, file), *text]) == 0
    said = capsys.readouterr().out
    trained = load_start(load_config(None, own_settings(flavour, out)))
    plain = load_start(load_config(None, own_settings(flavour, file)))
    chosen = {name for name, leaf in flatten(plain.params) if name.endswith("kernel")}
    assert len(chosen) == {"nnx": 8, "linen": 11}[flavour]
    assert_is_the_quantised_model(trained, plain, Quantization("int8"), chosen, TOKENS[:15])
    assert f"{len(chosen)} matrices in int8, a scale per output" in said
    assert ("blocks/1" if flavour == "nnx" else "layers_1") in said
    pieces = [TOKENS[start : start + 15] for start in (0, 15, 30)]
    perplexities = []
    for version in (plain, trained):
        values = np.concatenate([logprobs(version, version.params, piece) for piece in pieces])
        perplexities.append(math.exp(-np.mean(values)))
    assert perplexities_in(said, 3 * 14) == pytest.approx(perplexities, rel=1e-4)
    assert perplexities[0] != perplexities[1]
    assert_sampling_and_evaluation_read(str(recipe), own_settings(flavour, out), tmp_path, trained, capsys)


@pytest.mark.parametrize("module", ["nnx"], indirect=True)
def test_a_quantised_module_lies_on_a_mesh_as_it_is_stored(module, tmp_path):
    flavour, file = module
    quantization = Quantization("int4", 8, (DEFAULT_PATTERNS["own"],))
    quantize_foreign(load_config(None, own_settings(flavour, file)), tmp_path / "out", quantization)
    settings = [*own_settings(flavour, tmp_path / "out"), "mesh.num_devices=8", "mesh.fsdp=4", "mesh.tensor=2"]
    trained = load_start(load_config(None, settings))
    plain = load_start(load_config(None, own_settings(flavour, file)))
    chosen = {name for name, _ in flatten(plain.params) if name.endswith("kernel")}
    assert_is_the_quantised_model(trained, plain, quantization, chosen)
    assert jax.tree.map(lambda leaf: leaf.sharding, trained.params) == trained.shardings


@pytest.mark.parametrize("module", ["nnx"], indirect=True)
def test_what_cannot_be_done_with_such_models_is_refused_with_a_way_out(module, tmp_path, capsys):
    flavour, file = module
    config = load_config(None, own_settings(flavour, file))
    small = tmp_path / "small"
    quantize_foreign(config, small, Quantization("int8", None, (DEFAULT_PATTERNS["own"],)))
    quantized = own_settings(flavour, small)
    with pytest.raises(ValueError, match="has no adapters to train, got one stored in int8; set model"):
        train(load_config(None, [*quantized, *ROWS, f"output_dir={tmp_path / 'run'}"]))
    for settings, options, message in (
        (own_settings(flavour, "null"), (), r"model\.weights must name the weights of .*:build, got null"),
        (quantized, (), "must hold plain weights, got int8 already"),
        (
            own_settings(flavour, tmp_path),
            (),
            r"model\.weights must be a safetensors file, or a folder of grpo",
        ),
        (own_settings(flavour, file), (None, ("nothing",)), "must each find a matrix, got 'nothing'"),
        (
            own_settings(flavour, file),
            (5, ("kernel$",)),
            "must divide the inputs of each matrix, got 5 for",
        ),
        (own_settings(flavour, file), (None, ("kernel$",), True), "--head must be left out with model.source"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_foreign(load_config(None, settings), tmp_path / "new", Quantization("int8", *options))
    assert not (tmp_path / "new").exists()
    assert main(["quantize", "some/folder", str(tmp_path / "new"), "seed=1"]) == 2
    assert "takes no key=value, got ['seed=1']" in capsys.readouterr().err
    # A scale of another grouping.
    file = next(path for path in sorted(small.glob("*.safetensors")) if b"kernel_scale" in path.read_bytes())
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if name.endswith("kernel_scale"))
    safetensors.numpy.save_file(tensors | {name: np.repeat(tensors[name], 2, 0)}, file)
    with pytest.raises(ValueError, match=rf"{name} must be F32 \[1, \d+\], got F32 \[2, \d+\]"):
        load_start(load_config(None, quantized))


MEASURE = """
import json, sys
from rl.config.load import load_config
from rl.devices.host_memory import limit_arenas
from rl.models.config import Quantization
from rl.tools.quantization.quantize import MALLOC_ARENAS
from rl.tools.quantization.quantize_foreign import DEFAULT_PATTERNS, quantize_foreign
limit_arenas(MALLOC_ARENAS)  # as the command does
kind, out, *models = sys.argv[1:]
for number, settings in enumerate(models):  # what compiling and one layer take, then the rest
    quantization = Quantization("int4", 32, (DEFAULT_PATTERNS[kind],))
    report = quantize_foreign(load_config(None, json.loads(settings)), f"{out}/{number}", quantization)
print(report.bytes_before, report.start_bytes, report.peak_bytes)
"""


def own_module_of(num_layers, folder):
    """Writes the weights of a module of the user's own; the settings that name it."""
    sizes = f"model.args={{hidden_size: 512, num_layers: {num_layers}}}"
    settings = ["pure_nnx=false", f"model.source={EXAMPLES['linen']}:build", sizes]
    specs = flatten_specs(find_origin(load_config(None, settings), load_tokenizer("byte")).model_config.specs)
    params: dict = {}
    for path, spec in specs:
        set_leaf(params, path, np.full(spec.shape, 0.01, np.float32))
    file = folder / f"{num_layers}.safetensors"
    save_weights(file, params)
    return [*settings, f"model.weights={file}"]


def tunix_model_of(num_layers, folder):
    """Writes a Qwen3 for Tunix; the settings that name it."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    config = tiny_config(vocab_size=259, num_layers=num_layers, **sizes)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), noisy_params(config))
    save_folder(folder / str(num_layers), config, params, max_shard_bytes=1e8)
    return [f"model.source=tunix:{folder / str(num_layers)}", "tokenizer.source=byte"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_of"), [("own", own_module_of), ("tunix", tunix_model_of)])
def test_one_layer_is_in_memory_at_a_time(kind, model_of, tmp_path):
    """With 14 layers the process is hardly larger than with 2 of the same shape."""
    models = [json.dumps(model_of(num_layers, tmp_path)) for num_layers in (2, 14)]
    command = [sys.executable, "-c", MEASURE, kind, str(tmp_path / "out"), *models]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    size, start, peak = map(int, output.split())
    assert size > 140e6
    assert peak - start < 0.3 * size
