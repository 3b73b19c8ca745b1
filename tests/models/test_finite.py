"""NaN and infinity in weights: every type of number, every reader of files, and the key that lets them in."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rl.config.load import load_config
from rl.files import untrusted
from rl.models.config import ForeignConfig, ParameterSpec, Quantization
from rl.models.files import hf, quantized_files
from rl.models.files.finite import as_finite, is_finite
from rl.models.foreign.own_files import load_weights
from rl.state import param_folder
from rl.state.origin import find_origin, pretrained_params, tokenizer_from_config
from rl.tools.quantization.quantize import quantize_folder
from tests.helpers.places import FILES
from tests.helpers.tiny_models import noisy_params, tiny_config

GOLDEN = FILES / "models"
TYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
SHARED_FIELDS = ("vocab_size", "hidden_size", "max_position_embeddings", "eos_token_ids", "bos_token_id")
SHARED_FIELDS += ("pad_token_id", "dtype", "param_dtype", "remat")
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_of_every_type_is_told_apart(dtype):
    narrow = np.arange(1 << 16, dtype=np.uint32)
    bits = 8 * np.dtype(dtype).itemsize
    wide = narrow.astype(f"uint{max(bits, 32)}") << max(bits - 16, 0)
    values = wide.astype(f"uint{bits}").view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(values.astype(np.float64))
    assert expected.any()
    assert not expected.all()
    assert [is_finite(values[i : i + 1]) for i in range(values.size)] == expected.tolist()
    finite = values[expected]
    assert is_finite(finite)
    assert is_finite(finite[: finite.size // 4 * 4].reshape(2, 2, -1).T)
    assert not is_finite(np.append(finite, values[~expected][-1:]))
    assert is_finite(finite[:0])
    assert is_finite(np.full(3, -1, np.int8))


def test_a_number_that_the_type_does_not_reach_is_refused():
    with pytest.raises(ValueError, match=r"w must hold finite numbers, got 1 of 2 .* at \[1\], read as float16; fetch"):
        as_finite(np.array([1.0, 1e5], np.float32), np.float16, "w", allow_nonfinite=False)
    assert as_finite(np.array([1.0, 1e5], np.float32), np.float16, "w", allow_nonfinite=True)[1] == np.inf


def edit(file, name, change):
    tensors = safetensors.numpy.load_file(file)
    tensors[name] = change(tensors[name])
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def with_nan(value, place=(1, 2)):
    value = value.copy()
    value[place] = np.nan
    return value


def test_nan_in_the_weights_of_a_run_ends_its_start_unless_it_is_allowed(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama_tied", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 259}))
    edit(folder / "model.safetensors", "model.embed_tokens.weight", lambda value: np.resize(value, (259, 32)))
    edit(folder / "model.safetensors", NAME, with_nan)
    settings = [f"model.source={folder}", "tokenizer.source=byte"]
    config = load_config(None, settings)
    origin = find_origin(config, tokenizer_from_config(config))
    with pytest.raises(
        ValueError, match=rf"{folder}/model.safetensors: tensor {NAME} must hold finite .*allow_nonfinite"
    ):
        pretrained_params(origin, None)
    config = load_config(None, [*settings, "model.allow_nonfinite=true"])
    params = pretrained_params(find_origin(config, tokenizer_from_config(config)), None)
    assert params is not None
    assert np.isnan(params["layers_1"]["mlp"]["up_proj"]["kernel"]).sum() == 1


def test_nan_in_quantised_weights_and_patterns_without_an_end_are_refused(tmp_path, monkeypatch):
    quantize_folder(GOLDEN / "llama_tied", tmp_path / "out", Quantization("float8_e4m3fn"))
    config = hf.read_config(tmp_path / "out")
    index = json.loads((tmp_path / "out" / hf.INDEX_FILE).read_text())["weight_map"]
    for tensor, bad in ((NAME + hf.SCALE, np.inf), (NAME, 0x7F)):  # float8's NaN, stored as a byte
        edit(tmp_path / "out" / index[tensor], tensor, lambda value, bad=bad: np.full_like(value, bad))
        with pytest.raises(ValueError, match=rf"tensor {tensor} must hold finite numbers"):
            hf.load_params(tmp_path / "out", config)
    assert hf.load_params(tmp_path / "out", config, allow_nonfinite=True)
    monkeypatch.setattr(untrusted, "SECONDS", 0.3)
    endless = dataclasses.replace(config, quantization=Quantization("float8_e4m3fn", patterns=("(.|.)*!",)))
    with pytest.raises(
        ValueError, match=r"config.json: patterns of quantised weights must be .* it took more than 0.3 s"
    ):
        hf.check_weights(tmp_path / "out", endless)


def test_nan_in_a_parameter_only_checkpoint_is_refused(tmp_path):
    config = tiny_config()
    params = noisy_params(config)
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(-np.inf)
    param_folder.save_params(tmp_path / "out", config, params)
    with pytest.raises(ValueError, match=r"out/params: norm/scale must hold finite numbers, got 1 of 16 .* at \[3\]"):
        param_folder.load_params(tmp_path / "out", config)
    jax.tree.map(
        np.testing.assert_array_equal, param_folder.load_params(tmp_path / "out", config, allow_nonfinite=True), params
    )


def test_nan_and_integers_in_weights_of_an_own_module_are_refused(tmp_path):
    base = tiny_config()
    config = ForeignConfig(
        kind="own",
        family="Own",
        specs={"head": {"kernel": ParameterSpec((4, 6), (None, None), (0,))}},
        model=None,
        **{name: getattr(base, name) for name in SHARED_FIELDS},
    )
    file, kernel = tmp_path / "w.safetensors", np.ones((4, 6), np.float32)
    shardings = {"head": {"kernel": jax.sharding.SingleDeviceSharding(jax.devices()[0])}}
    safetensors.numpy.save_file({"head/kernel": with_nan(kernel)}, file)
    with pytest.raises(ValueError, match=rf"{file}: head/kernel must hold finite numbers, got 1 of 24"):
        load_weights(file, config, shardings)
    assert load_weights(file, config, shardings, allow_nonfinite=True)
    safetensors.numpy.save_file({"head/kernel": kernel.astype(np.int32)}, file)
    with pytest.raises(ValueError, match="head/kernel must be one of F64, F32, F16, BF16, got I32"):
        load_weights(file, config, shardings)
    quantized = dataclasses.replace(config, quantization=Quantization("int8", patterns=("head/kernel",)))
    stored = {
        "head/kernel": np.ones((4, 6), np.int8),
        "head/kernel_scale": with_nan(np.ones((1, 6), np.float32), (0, 1)),
    }
    safetensors.numpy.save_file(stored, tmp_path / hf.SINGLE_FILE)
    with pytest.raises(ValueError, match=rf"{hf.SINGLE_FILE}: tensor head/kernel_scale must hold finite numbers"):
        quantized_files.load_params(tmp_path, quantized, shardings)
