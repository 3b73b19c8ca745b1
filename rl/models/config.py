"""The description of a decoder: `ModelConfig`, and the shapes and logical axes of its parameters. Imports no jax.

In: the numbers of an architecture, by hand (`ModelConfig.from_arch`) or from a Hugging Face folder
(`rl.models.files.hf`).
Out: one frozen, hashable description that both twins are built from. The maths is in `rl.models.ops`.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from rl.files.json_file import briefly, shown
from rl.models.families import FAMILIES, Family, families_with

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
DTYPES = ("float32", "bfloat16", "float16", "float64")
REMAT_MODES = ("none", "dots", "outputs", "block", "full")
ROPE_KINDS = ("none", "linear", "llama3")
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
QUANTIZED_DTYPES = ("int8", "int4", "float8_e4m3fn")
ATTENTION_AND_MLP = r"^layers_\d+/(self_attn|mlp)/\w+_proj/kernel$"
LARGEST_ID = 2**31 - 1
# Far beyond every model. A larger number is a slip, or an attempt to make the reader allocate or loop without end.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_layers": 4096,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": LARGEST_ID,
}
LARGEST_MODEL = 10**13  # parameters
LORA_A, LORA_B = "lora_a", "lora_b"  # names of an adapter's two matrices, beside the "kernel" that they belong to


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled: not at all, all by `factor` ("linear"), or by wavelength ("llama3")."""

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope_scaling kind must be one of {', '.join(ROPE_KINDS)}, got {self.kind!r}")
        if not 1.0 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling factor must be >= 1, got {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling llama3 must have 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which matrices of a model are stored in few bits, and how; see `rl.models.quantized`.

    `patterns` are regular expressions. A kernel or embedding table whose path ("layers_0/mlp/up_proj/kernel") one of
    them matches is quantised to `dtype`, with one scale for each `group_size` inputs of an output (None: all inputs).
    With `head` the matrix that gives the logits is quantised, too.
    """

    dtype: str
    group_size: int | None = None
    patterns: tuple[str, ...] = (ATTENTION_AND_MLP,)
    head: bool = False

    def __post_init__(self) -> None:
        _check_choice("dtype of quantised weights", self.dtype, QUANTIZED_DTYPES)
        if self.group_size is not None:
            _check_positive("group size of quantised weights", self.group_size)
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"patterns of quantised weights must be regular expressions, got {shown(pattern)}: {briefly(error)}"
                ) from error


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters, Hu et al., https://arxiv.org/abs/2106.09685: x W becomes x W + scale (x A) B, W frozen.

    `targets` are patterns over module names such as "layers_0/self_attn/q_proj" (* is any characters, "/" too). The
    scale is alpha / rank, or alpha / sqrt(rank) if `rank_stabilized` (https://arxiv.org/abs/2312.03732). `base_dtype`
    is the stored type of the frozen weights (None: `param_dtype`). `base_group_size` is the number of inputs that share
    a scale where that type is quantised (None: all inputs of an output); see `rl.models.lora.freeze`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilized: bool = False
    base_dtype: str | None = None
    base_group_size: int | None = None

    def __post_init__(self) -> None:
        _check_positive("lora rank", self.rank)
        _check_positive("lora alpha", self.alpha)
        if not self.targets:
            raise ValueError('lora targets must hold a pattern, got none; "*_proj" is every matrix of the layers')

    @property
    def scale(self) -> float:
        """Factor on the product of the two matrices."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def applies_to(self, module: Iterable[str]) -> bool:
        """Whether the module at this path has an adapter."""
        return any(fnmatch.fnmatchcase("/".join(module), pattern) for pattern in self.targets)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder architecture. Sizes are counts, `dtype` is the compute type, `param_dtype` the stored type.

    `layer_types` names "full_attention" or "sliding_attention" for every layer; sliding layers see `sliding_window`
    positions and use `rope_local_theta`. `remat` says what the backward pass computes again, see `ops.remat_options`.
    `scan_layers` runs the layers of training as a loop, see `rl.models.scanned`.

    `attention_bias` adds a bias to q, k and v, and to o where the family has one there. With `lora` the tree has
    adapters, and only they are trained. `quantization` says how the model's files are quantised; their weights stay as
    they are stored.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: RopeScaling
    rope_local_theta: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    query_pre_attn_scalar: float
    initializer_range: float
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: str
    param_dtype: str
    remat: str
    lora: LoRAConfig | None = None
    scan_layers: bool = False
    quantization: Quantization | None = None

    kind: ClassVar[str] = "decoder"
    has_own_kernel: ClassVar[bool] = False
    takes_adapters: ClassVar[bool] = True
    has_known_names: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_arch(
        cls,
        family: str,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 4096,
        norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        rope_theta: float | None = None,
        rope_scaling: RopeScaling = RopeScaling(),
        rope_local_theta: float = 10_000.0,
        activation: str | None = None,
        attention_bias: bool | None = None,
        mlp_bias: bool = False,
        sliding_window: int | None = None,
        layer_types: tuple[str, ...] | None = None,
        query_pre_attn_scalar: float | None = None,
        initializer_range: float = 0.02,
        eos_token_ids: tuple[int, ...] = (),
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        dtype: str = "float32",
        param_dtype: str = "float32",
        remat: str = "none",
        lora: LoRAConfig | None = None,
    ) -> "ModelConfig":
        """A fresh architecture. Arguments that are left out (None) take the family's value.

        Raises ValueError for sizes that do not fit. Without `layer_types`, the family's `window_pattern` says which
        layers have the `sliding_window`.
        """
        _check_choice("family", family, tuple(FAMILIES))
        _check_size("num_layers", num_layers)
        features = FAMILIES[family]
        if head_dim is None:
            _check_positive("num_heads", num_heads)
            if hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_heads when head_dim is not given, got {hidden_size} and "
                    f"{num_heads}; give head_dim"
                )
            head_dim = hidden_size // num_heads
        if layer_types is None:
            pattern = None if sliding_window is None else features.window_pattern
            layer_types = alternating_layer_types(num_layers, 1 if pattern is None else pattern)
        return cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            norm_eps=norm_eps,
            tie_word_embeddings=tie_word_embeddings,
            rope_theta=features.rope_theta if rope_theta is None else rope_theta,
            rope_scaling=rope_scaling,
            rope_local_theta=rope_local_theta,
            activation=features.activation if activation is None else activation,
            attention_bias=features.always_attention_bias if attention_bias is None else attention_bias,
            mlp_bias=mlp_bias,
            sliding_window=sliding_window,
            layer_types=tuple(layer_types),
            query_pre_attn_scalar=head_dim if query_pre_attn_scalar is None else query_pre_attn_scalar,
            initializer_range=initializer_range,
            eos_token_ids=tuple(eos_token_ids),
            bos_token_id=bos_token_id,
            pad_token_id=pad_token_id,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            lora=lora,
        )

    @property
    def specs(self) -> dict[str, Any]:
        """The parameter tree without adapters, with a `ParameterSpec` at every leaf."""
        return _decoder_specs(self)

    @property
    def features(self) -> Family:
        """The features of the family."""
        return FAMILIES[self.family]

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias."""
        return self.attention_bias and self.features.output_bias

    @property
    def rotary_dim(self) -> int:
        """The number of rotated dims of each head; they are the first ones."""
        return int(self.head_dim * self.features.rotary_share)

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameter tree holds."""
        return sum(_product(spec.shape) for _, spec in flatten_specs(parameter_specs(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignConfig:
    """The description of a model that is not the toolkit's own decoder, under the names of `ModelConfig`.

    Attributes:
      kind: the implementation of the policy: "own" (a user's module) or "tunix".
      family: a name for messages.
      specs: the parameter tree with a `ParameterSpec` at every leaf; a dim without a logical axis has the name None.
      model: what that implementation needs to build the model.
      quantization: how the model's files are quantised; their weights stay as they are stored.
    """

    kind: str
    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: str
    param_dtype: str
    remat: str
    specs: Mapping[str, Any]
    model: Any
    quantization: Quantization | None = None

    # What differs from the toolkit's own decoder, under the names of `ModelConfig`.
    lora: ClassVar[None] = None
    scan_layers: ClassVar[bool] = False
    has_own_kernel: ClassVar[bool] = True  # of attention
    takes_adapters: ClassVar[bool] = False
    has_known_names: ClassVar[bool] = False  # of parameters, which the patterns of base.yml match

    def __str__(self) -> str:
        """What tells a model of this source from another one; nothing that differs from process to process."""
        return self.family

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameter tree holds."""
        return sum(_product(spec.shape) for _, spec in flatten_specs(self.specs))


class ParameterSpec(NamedTuple):
    """Shape of one parameter, the logical name of each of its dims, and the dims that its matrix product sums over.

    Norms and biases have no such dims. The embedding table has those of its product with hidden states. For a user's
    module they are not known; the dims given are those that share a scale when it is quantised.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    contract_dims: tuple[int, ...] = ()


def alternating_layer_types(num_layers: int, pattern: int) -> tuple[str, ...]:
    """Every `pattern`-th layer has full attention, the others a sliding window (Gemma 3: pattern 6)."""
    _check_positive("sliding_window_pattern", pattern)
    return tuple(SLIDING_ATTENTION if (i + 1) % pattern else FULL_ATTENTION for i in range(num_layers))


def parameter_specs(config: ModelConfig | ForeignConfig) -> dict[str, Any]:
    """The parameter tree of both twins, with a `ParameterSpec` at every leaf; adapters lie beside their kernels."""
    specs = base_specs(config)
    return specs if config.lora is None else _with_adapters(specs, config.lora)


def base_specs(config: ModelConfig | ForeignConfig) -> dict[str, Any]:
    """The parameter tree without adapters, as a model's own files hold it."""
    return dict(config.specs)


def spec_at(config: ModelConfig | ForeignConfig, path: Iterable[str]) -> ParameterSpec:
    """The `ParameterSpec` of one parameter of `base_specs`."""
    return leaf_at(config.specs, path)


def leaf_at(tree: Any, path: Iterable[str]) -> Any:
    """The value at a path."""
    for name in path:
        tree = tree[name]
    return tree


def _decoder_specs(config: ModelConfig) -> dict[str, Any]:
    tree = {
        "embed_tokens": {"embedding": ParameterSpec((config.vocab_size, config.hidden_size), ("vocab", "embed"), (1,))},
        **{f"layers_{i}": _layer_specs(config) for i in range(config.num_layers)},
        "norm": _norm_spec(config.hidden_size),
    }
    if not config.tie_word_embeddings:
        tree["lm_head"] = _dense_spec((config.hidden_size,), ("embed",), (config.vocab_size,), ("vocab",), False)
    return tree


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree with the tuple of logical axis names at every leaf.

    Names: vocab, embed, heads, kv_heads, head_dim, mlp, norm, lora. Mesh axes are not known here.
    """
    return _map_specs(parameter_specs(config), lambda spec: spec.axes)


def flatten_specs(
    tree: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], ParameterSpec]]:
    """(path, spec) of every parameter of `parameter_specs`, in the order of declaration."""
    for name, child in tree.items():
        if isinstance(child, ParameterSpec):
            yield (*prefix, name), child
        else:
            yield from flatten_specs(child, (*prefix, name))


def _with_adapters(tree: Mapping[str, Any], lora: LoRAConfig, module: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree with the two matrices of an adapter, inputs x rank and rank x outputs, beside each target's kernel."""
    result: dict[str, Any] = {}
    for name, child in tree.items():
        result[name] = child if isinstance(child, ParameterSpec) else _with_adapters(child, lora, (*module, name))
    if "kernel" in tree and lora.applies_to(module):
        kernel = tree["kernel"]
        num_inputs = len(kernel.contract_dims)
        # Adapters are never quantised, so they need no dims to sum over.
        result[LORA_A] = ParameterSpec((*kernel.shape[:num_inputs], lora.rank), (*kernel.axes[:num_inputs], "lora"))
        result[LORA_B] = ParameterSpec((lora.rank, *kernel.shape[num_inputs:]), ("lora", *kernel.axes[num_inputs:]))
    return result


def adaptable_modules(config: ModelConfig) -> list[str]:
    """Names of the modules that can have an adapter, for instance "layers_0/self_attn/q_proj"."""
    return ["/".join(path[:-1]) for path, _ in flatten_specs(base_specs(config)) if path[-1] == "kernel"]


def _layer_specs(config: ModelConfig) -> dict[str, Any]:
    hidden, mlp, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = ("heads", "head_dim"), ("kv_heads", "head_dim")
    query_shape, key_shape = (config.num_heads, head_dim), (config.num_kv_heads, head_dim)
    attention = {
        "q_proj": _dense_spec((hidden,), ("embed",), query_shape, query, config.attention_bias),
        "k_proj": _dense_spec((hidden,), ("embed",), key_shape, key, config.attention_bias),
        "v_proj": _dense_spec((hidden,), ("embed",), key_shape, key, config.attention_bias),
        "o_proj": _dense_spec(query_shape, query, (hidden,), ("embed",), config.output_bias),
    }
    if config.features.qk_norm:
        attention |= {"q_norm": _norm_spec(head_dim), "k_norm": _norm_spec(head_dim)}
    layer = {
        "input_layernorm": _norm_spec(hidden),
        "self_attn": attention,
        "post_attention_layernorm": _norm_spec(hidden),
        "mlp": {
            "gate_proj": _dense_spec((hidden,), ("embed",), (mlp,), ("mlp",), config.mlp_bias),
            "up_proj": _dense_spec((hidden,), ("embed",), (mlp,), ("mlp",), config.mlp_bias),
            "down_proj": _dense_spec((mlp,), ("mlp",), (hidden,), ("embed",), config.mlp_bias),
        },
    }
    if config.features.post_norms:
        layer |= {"pre_feedforward_layernorm": _norm_spec(hidden), "post_feedforward_layernorm": _norm_spec(hidden)}
    return layer


def _norm_spec(size: int) -> dict[str, ParameterSpec]:
    return {"scale": ParameterSpec((size,), ("norm",))}


def _dense_spec(
    in_shape: tuple[int, ...],
    in_axes: tuple[str, ...],
    out_shape: tuple[int, ...],
    out_axes: tuple[str, ...],
    use_bias: bool,
) -> dict[str, ParameterSpec]:
    contract_dims = tuple(range(len(in_shape)))
    specs = {"kernel": ParameterSpec((*in_shape, *out_shape), (*in_axes, *out_axes), contract_dims)}
    return specs | {"bias": ParameterSpec(out_shape, out_axes)} if use_bias else specs


def _map_specs(tree: Mapping[str, Any], function: Any) -> dict[str, Any]:
    return {
        name: function(child) if isinstance(child, ParameterSpec) else _map_specs(child, function)
        for name, child in tree.items()
    }


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def _check_size(name: str, value: int) -> None:
    _check_positive(name, value)
    if value > LARGEST[name]:
        raise ValueError(f"{name} must be at most {LARGEST[name]}, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def _check(config: ModelConfig) -> None:
    for name, choices in (
        ("family", tuple(FAMILIES)),
        ("activation", ACTIVATIONS),
        ("dtype", DTYPES),
        ("param_dtype", DTYPES),
        ("remat", REMAT_MODES),
    ):
        _check_choice(name, getattr(config, name), choices)
    for name in LARGEST:
        _check_size(name, getattr(config, name))
    for name in ("norm_eps", "rope_theta", "rope_local_theta", "query_pre_attn_scalar", "initializer_range"):
        _check_positive(name, getattr(config, name))
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    num_parameters = config.hidden_size * (
        config.vocab_size + config.num_layers * (heads + 3 * config.intermediate_size)
    )
    if num_parameters > LARGEST_MODEL:
        raise ValueError(
            f"the sizes of a model must multiply to at most {LARGEST_MODEL:.0e} parameters, got {num_parameters:.1e}: "
            + ", ".join(f"{name} {getattr(config, name)}" for name in LARGEST)
        )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {config.num_heads} and {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embeddings, got {config.head_dim}")
    features = config.features
    if config.rotary_dim % 2:
        raise ValueError(
            f"head_dim must let {config.family} rotate an even number of dims, {features.rotary_share} of them, got "
            f"{config.head_dim}"
        )
    if len(config.layer_types) != config.num_layers:
        raise ValueError(
            f"layer_types must name {config.num_layers} layers (num_layers), got {len(config.layer_types)}"
        )
    for layer_type in config.layer_types:
        _check_choice("layer_types entry", layer_type, (FULL_ATTENTION, SLIDING_ATTENTION))
    if SLIDING_ATTENTION in config.layer_types:
        if features.window_pattern is None:
            raise ValueError(
                f"sliding_attention layers are supported for {families_with('window_pattern')} only, got family "
                f"{config.family}"
            )
        if config.sliding_window is None or config.sliding_window < 1:
            raise ValueError(f"sliding_window must be >= 1 with sliding_attention layers, got {config.sliding_window}")
    if features.always_attention_bias and not config.attention_bias:
        raise ValueError(
            f"attention_bias must be true for {config.family}, whose q, k and v always have a bias, got false"
        )
    if config.mlp_bias and not features.may_have_mlp_bias:
        raise ValueError(
            f"mlp_bias must be false for {config.family}, got true; only {families_with('may_have_mlp_bias')} has it"
        )
    if not features.has_query_scale and config.query_pre_attn_scalar != config.head_dim:
        raise ValueError(
            f"query_pre_attn_scalar must equal head_dim ({config.head_dim}) for {config.family}, "
            f"got {config.query_pre_attn_scalar}; only {families_with('has_query_scale')} has it"
        )
    for token_id in config.eos_token_ids:
        if not 0 <= token_id < config.vocab_size:
            raise ValueError(f"eos_token_ids must be in [0, vocab_size = {config.vocab_size}), got {token_id}")
    if config.lora is not None:
        _check_targets(config, config.lora)
        if config.quantization is not None and config.lora.base_dtype in QUANTIZED_DTYPES:
            raise ValueError(
                f"lora.base_dtype must be left out for a model that is stored in {config.quantization.dtype} already, "
                f"got {config.lora.base_dtype!r}"
            )


def _check_targets(config: ModelConfig, lora: LoRAConfig) -> None:
    modules = adaptable_modules(config)
    for pattern in lora.targets:
        if not fnmatch.filter(modules, pattern):
            layers_as_one = dict.fromkeys(re.sub(r"^layers_\d+/", "layers_*/", name) for name in modules)
            raise ValueError(
                f"lora targets must each match a matrix (* stands for any characters), got {pattern!r}; the names are "
                + ", ".join(layers_as_one)
            )
