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
from rl.models.families import FAMILIES, OWN_ROPE, UNSCALED_ROPE, Family, families_with

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
DTYPES = ("float32", "bfloat16", "float16", "float64")
REMAT_MODES = ("none", "dots", "outputs", "block", "full")
ROPE_KINDS = ("none", "linear", "llama3", "yarn", "longrope", "proportional")
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
WITHOUT_ROTARY = "_without_rotary"  # added to the type of a layer that has no rotary positions
LINEAR_ATTENTION = "linear_attention"  # the type of a layer with a state in place of keys and values
LAYER_TYPES = tuple(name + end for end in ("", WITHOUT_ROTARY) for name in (FULL_ATTENTION, SLIDING_ATTENTION))
QUANTIZED_DTYPES = ("int8", "int4", "float8_e4m3fn")
ATTENTION_AND_MLP = r"^layers_\d+/(self_attn|linear_attn|mlp)/\w+_proj/kernel$"
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
LARGEST_OF_STATES = {
    "linear_num_key_heads": 2**14,
    "linear_key_head_dim": 2**10,
    "linear_num_value_heads": 2**14,
    "linear_value_head_dim": 2**10,
    "linear_conv_kernel_dim": 64,
}
LARGEST_MODEL = 10**13  # parameters
LAYER_SCALAR = "layer_scalar"  # the name of a parameter, which is not trained
# Names of parameters of layers with a state: of the convolution, of the decay, and the scale of a gated norm.
TAPS, A_LOG, DT_BIAS, GATED_SCALE = "taps", "A_log", "dt_bias", "weight"
LORA_A, LORA_B = "lora_a", "lora_b"  # names of an adapter's two matrices, beside the "kernel" that they belong to


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled: not at all, all by `factor` ("linear"), by wavelength ("llama3", "yarn"), each
    by a number of its own ("longrope"), or, of a share of the pairs, all by `factor` ("proportional").

    `rl.models.ops.rope_frequencies` has the formulas. Where a table depends on the length of the run, `longest` is its
    longest prompt with completion in tokens; None: the table for short ones.

    Attributes:
      attention_factor: factor on cos and sin of "yarn" and "longrope"; None: as `rope_factor` says.
      beta_fast, beta_slow: turns over the original length, above and below which "yarn" keeps and scales a pair.
      mscale, mscale_all_dim: numbers from which the factor of "yarn" is computed, where both are given.
      truncate: whether the borders of "yarn" are rounded to whole pairs.
      short_factor, long_factor: divisors of the frequencies of "longrope", one for each pair.
      share: the share of the pairs that "proportional" rotates.
      query_scale_beta: queries at position p are multiplied by 1 + beta log(1 + floor(p / original)); None: not at all.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    share: float = 1.0
    query_scale_beta: float | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope_scaling kind must be one of {', '.join(ROPE_KINDS)}, got {self.kind!r}")
        least = 0.0 if self.kind == "longrope" else 1.0
        if not least <= self.factor < math.inf or not self.factor:
            raise ValueError(f"rope_scaling factor must be >= 1, got {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling llama3 must have 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"rope_scaling yarn must have 0 < beta_slow <= beta_fast, got {self.beta_slow} and {self.beta_fast}"
            )
        if self.kind == "longrope" and not all(factor > 0 for factor in (*self.short_factor, *self.long_factor)):
            raise ValueError("rope_scaling longrope must have factors > 0 in short_factor and long_factor")
        if not 0 <= self.share <= 1:
            raise ValueError(f"rope_scaling share must be from 0 to 1, got {self.share}")

    @property
    def is_long(self) -> bool:
        """Whether the run is longer than what the model was trained on first, so that "longrope" is the long table."""
        return self.longest is not None and self.longest > self.original_max_position_embeddings


class LayerShape(NamedTuple):
    """The sizes of one layer.

    Attributes:
      has_keys: whether it computes keys and values; otherwise it reads those of an earlier layer of its type.
      has_values: whether values have a projection of their own; otherwise they are the keys' projection.
      is_read: whether later layers read its keys and values.
      is_recurrent: whether it has a state in place of keys and values.
    """

    head_dim: int
    num_kv_heads: int
    mlp_size: int
    has_keys: bool = True
    has_values: bool = True
    is_read: bool = False
    is_recurrent: bool = False


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

    `layer_types` names "full_attention", "sliding_attention" or "linear_attention" for every layer; sliding layers see
    `sliding_window` positions and use `rope_local_theta`, linear ones have a state (`rl.models.delta_rule`). `remat`
    says what the backward pass computes again, see `ops.remat_options`. `scan_layers` runs the layers of training as a
    loop, see `rl.models.scanned`.

    `attention_bias` adds a bias to q, k and v, and to o where the family has one there. With `lora` the tree has
    adapters, and only they are trained. `quantization` says how the model's files are quantised; their weights stay as
    they are stored.

    Attributes:
      rotary_share: the share of each head's dims that are rotated; None: the family's.
      rope_local_scaling: how the frequencies of layers with a window are scaled.
      embedding_multiplier, residual_multiplier: factors on the embeddings, and on what a layer adds to the residual
        stream.
      attention_multiplier: the scale of the scores; None: query_pre_attn_scalar ** -0.5.
      logits_divisor: what logits are divided by.
      attention_softcap, logit_softcap: scores and logits x become cap tanh(x / cap); None: they stay.
      global_head_dim, num_global_kv_heads: of layers without a window; None: as in the others.
      keys_are_values: in layers without a window, values are the keys' projection.
      num_kv_shared_layers: the last layers, which read the keys and values of the last layer before them of their type.
      double_wide_mlp: the MLP of these layers is twice as wide.
      per_layer_input_size: dims of the input of its own that each layer has; 0: none.
      per_layer_vocab_size: rows of the embedding table of these inputs.
      linear_num_key_heads, linear_key_head_dim, linear_num_value_heads, linear_value_head_dim: of layers with a state.
      linear_conv_kernel_dim: the tokens that the convolution of such a layer reads, its own among them.
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
    rotary_share: float | None = None
    rope_local_scaling: RopeScaling = RopeScaling()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_divisor: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    global_head_dim: int | None = None
    num_global_kv_heads: int | None = None
    keys_are_values: bool = False
    num_kv_shared_layers: int = 0
    double_wide_mlp: bool = False
    per_layer_input_size: int = 0
    per_layer_vocab_size: int = 0
    linear_num_key_heads: int = 0
    linear_key_head_dim: int = 0
    linear_num_value_heads: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0

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
        rope_local_theta: float | None = None,
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
        **features_of_family: Any,
    ) -> "ModelConfig":
        """A fresh architecture. Arguments that are left out (None) take the family's value.

        Raises ValueError for sizes that do not fit. Without `layer_types`, the family says which layers have the
        `sliding_window`, and which have no rotary positions. `features_of_family` are the attributes that few families
        have.
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
            layer_types = default_layer_types(features, num_layers, sliding_window)
        theta = features.rope_theta if rope_theta is None else rope_theta
        if features.local_rope == OWN_ROPE or not features.has_windows:
            local_theta, local_scaling = 10_000.0, RopeScaling()
        else:
            local_theta, local_scaling = local_rope_of(features, theta, rope_scaling)
        features_of_family = {
            "attention_multiplier": features.attention_multiplier,
            "rope_local_scaling": local_scaling,
            **features_of_family,
        }
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
            rope_theta=theta,
            rope_scaling=rope_scaling,
            rope_local_theta=local_theta if rope_local_theta is None else rope_local_theta,
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
            **features_of_family,
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
        """The number of rotated dims of each head of `head_dim`; they are the first ones."""
        return self.rotated_dims(self.head_dim)

    def rotated_dims(self, head_dim: int) -> int:
        """The number of rotated dims of a head."""
        return int(head_dim * (self.features.rotary_share if self.rotary_share is None else self.rotary_share))

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores."""
        return self.query_pre_attn_scalar**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def rope_of(self, layer_type: str) -> tuple[int, float, RopeScaling]:
        """(rotated dims, theta, scaling) of the layers of one type, where they have rotary positions."""
        if has_window(layer_type):
            return self.rotated_dims(self.head_dim), self.rope_local_theta, self.rope_local_scaling
        return self.rotated_dims(self.global_head_dim or self.head_dim), self.rope_theta, self.rope_scaling

    def layer_shape(self, index: int) -> LayerShape:
        """The sizes of a layer."""
        if self.layer_types[index] == LINEAR_ATTENTION:
            sizes = self.linear_key_head_dim, self.linear_num_key_heads, self.intermediate_size
            return LayerShape(*sizes, has_keys=False, has_values=False, is_recurrent=True)
        head_dim, kv_heads, is_global = self.head_dim, self.num_kv_heads, not has_window(self.layer_types[index])
        if is_global:
            head_dim = self.global_head_dim or head_dim
            kv_heads = self.num_global_kv_heads or kv_heads
        shares = self.kv_source(index) is not None
        return LayerShape(
            head_dim,
            kv_heads,
            self.intermediate_size * (2 if self.double_wide_mlp and shares else 1),
            has_keys=not shares,
            has_values=not shares and not (self.keys_are_values and is_global),
            is_read=self._is_read(index),
        )

    def kv_source(self, index: int) -> int | None:
        """The layer whose keys and values a layer reads; None: its own."""
        if index < self._first_sharing:
            return None
        alike = (i for i in range(self._first_sharing) if self.layer_types[i] == self.layer_types[index])
        return max(alike, default=None)

    def _is_read(self, index: int) -> bool:
        first, own = self._first_sharing, self.layer_types[index]
        return index < first and own in self.layer_types[first:] and own not in self.layer_types[index + 1 : first]

    def query_outputs(self, shape: LayerShape) -> int:
        """What q_proj gives for each head: the query and, where attention is gated, as many numbers of its gate."""
        return 2 * shape.head_dim if self.features.gated_attention else shape.head_dim

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer has a state in place of keys and values."""
        return LINEAR_ATTENTION in self.layer_types

    @property
    def linear_channels(self) -> int:
        """The channels of the convolution of a layer with a state: its queries, keys and values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def _first_sharing(self) -> int:
        return self.num_layers - self.num_kv_shared_layers

    @property
    def common_kv_heads(self) -> int:
        """The largest number that divides the kv heads of every layer: what cuts it cuts them all."""
        return math.gcd(self.num_kv_heads, self.num_global_kv_heads or self.num_kv_heads)

    def for_length(self, longest: int) -> "ModelConfig":
        """The model with the rotary tables of a run whose longest prompt with completion has this many tokens."""
        scalings = {
            name: dataclasses.replace(scaling, longest=longest)
            for name in ("rope_scaling", "rope_local_scaling")
            if (scaling := getattr(self, name)).kind == "longrope"
        }
        return dataclasses.replace(self, **scalings) if scalings else self

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
    is_recurrent: ClassVar[bool] = False
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


def alternating_layer_types(num_layers: int, pattern: int, others: str = SLIDING_ATTENTION) -> tuple[str, ...]:
    """Every `pattern`-th layer has full attention, the others a sliding window (Gemma 3: pattern 6) or a state."""
    _check_positive("sliding_window_pattern", pattern)
    return tuple(others if (i + 1) % pattern else FULL_ATTENTION for i in range(num_layers))


def default_layer_types(features: Family, num_layers: int, sliding_window: int | None) -> tuple[str, ...]:
    """The layers of a model that names none: which have a window, and which have no rotary positions."""
    if features.has_states:
        return alternating_layer_types(num_layers, features.state_interval, LINEAR_ATTENTION)
    pattern = 1
    if sliding_window is not None:
        pattern = num_layers + 1 if features.window_everywhere else features.window_pattern or 1
    layer_types = alternating_layer_types(num_layers, pattern)
    interval = features.no_rotary_interval
    has_rotary = [interval is None or (i + 1) % interval != 0 for i in range(num_layers)]
    if features.full_layers_without_rotary and sliding_window is not None:
        has_rotary = [has_window(name) for name in layer_types]
    return with_rotary(layer_types, has_rotary)


def with_rotary(layer_types: Iterable[str], has_rotary: Iterable[Any]) -> tuple[str, ...]:
    """The types of layers, of which some have no rotary positions."""
    return tuple(
        name if rotates else name + WITHOUT_ROTARY for name, rotates in zip(layer_types, has_rotary, strict=True)
    )


def has_window(layer_type: str) -> bool:
    """Whether layers of this type have a window."""
    return layer_type.startswith(SLIDING_ATTENTION)


def has_rotary(layer_type: str) -> bool:
    """Whether layers of this type have rotary positions."""
    return not layer_type.endswith(WITHOUT_ROTARY)


def local_rope_of(features: Family, theta: float, scaling: RopeScaling) -> tuple[float, RopeScaling]:
    """Theta and scaling of layers with a window, in a family where the other layers decide on them."""
    return theta, RopeScaling() if features.local_rope == UNSCALED_ROPE else scaling


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
    hidden, per_layer = config.hidden_size, config.num_layers * config.per_layer_input_size
    tree = {
        "embed_tokens": {"embedding": ParameterSpec((config.vocab_size, hidden), ("vocab", "embed"), (1,))},
        **{f"layers_{i}": _layer_specs(config, config.layer_shape(i)) for i in range(config.num_layers)},
        "norm": _norm_spec(hidden),
    }
    if per_layer:
        tree |= {
            "embed_tokens_per_layer": {
                "embedding": ParameterSpec((config.per_layer_vocab_size, per_layer), ("vocab", "embed"), (1,))
            },
            "per_layer_model_projection": _dense_spec((hidden,), ("embed",), (per_layer,), ("head_dim",), False),
            "per_layer_projection_norm": _norm_spec(config.per_layer_input_size),
        }
    if not config.tie_word_embeddings:
        tree["lm_head"] = _dense_spec((hidden,), ("embed",), (config.vocab_size,), ("vocab",), False)
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


def _layer_specs(config: ModelConfig, shape: LayerShape) -> dict[str, Any]:
    features, hidden, mlp = config.features, config.hidden_size, shape.mlp_size
    norms = features.norms
    layer: dict[str, Any] = {name: _norm_spec(hidden) for name in norms[:1] if name}
    if shape.is_recurrent:
        layer["linear_attn"] = _linear_attention_specs(config)
    else:
        layer["self_attn"] = _attention_specs(config, shape)
    layer |= {"post_attention_layernorm": _norm_spec(hidden)}
    layer["mlp"] = {
        "gate_proj": _dense_spec((hidden,), ("embed",), (mlp,), ("mlp",), config.mlp_bias),
        "up_proj": _dense_spec((hidden,), ("embed",), (mlp,), ("mlp",), config.mlp_bias),
        "down_proj": _dense_spec((mlp,), ("mlp",), (hidden,), ("embed",), config.mlp_bias),
    }
    layer |= {name: _norm_spec(hidden) for name in norms if name and name not in layer}
    if config.per_layer_input_size:
        own = config.per_layer_input_size
        layer |= {
            "per_layer_input_gate": _dense_spec((hidden,), ("embed",), (own,), ("head_dim",), False),
            "per_layer_projection": _dense_spec((own,), ("head_dim",), (hidden,), ("embed",), False),
            "post_per_layer_input_norm": _norm_spec(hidden),
        }
    if features.layer_scalar:
        layer[LAYER_SCALAR] = ParameterSpec((1,), ("norm",))
    return layer


def _attention_specs(config: ModelConfig, shape: LayerShape) -> dict[str, Any]:
    features, hidden, head_dim = config.features, config.hidden_size, shape.head_dim
    query, key = ("heads", "head_dim"), ("kv_heads", "head_dim")
    query_shape, key_shape = (config.num_heads, head_dim), (shape.num_kv_heads, head_dim)
    outputs = (config.num_heads, config.query_outputs(shape))
    attention = {"q_proj": _dense_spec((hidden,), ("embed",), outputs, query, config.attention_bias)}
    for name, exists in (("k_proj", shape.has_keys), ("v_proj", shape.has_values)):
        if exists:
            attention[name] = _dense_spec((hidden,), ("embed",), key_shape, key, config.attention_bias)
    attention["o_proj"] = _dense_spec(query_shape, query, (hidden,), ("embed",), config.output_bias)
    if features.qk_norm:
        heads = (config.num_heads, shape.num_kv_heads) if features.qk_norm_of_all else (1, 1)
        attention["q_norm"] = _norm_spec(heads[0] * head_dim)
        if shape.has_keys:
            attention["k_norm"] = _norm_spec(heads[1] * head_dim)
    return attention


def _linear_attention_specs(config: ModelConfig) -> dict[str, Any]:
    """Of a layer with a state. All heads are cut like kv heads, so that what belongs together stays together."""
    hidden, size = config.hidden_size, config.linear_conv_kernel_dim
    keys = (config.linear_num_key_heads, config.linear_key_head_dim)
    values = (config.linear_num_value_heads, config.linear_value_head_dim)
    heads, one = ("kv_heads", "head_dim"), (values[0],)
    outputs = {"q": keys, "k": keys, "v": values, "z": values, "b": one, "a": one}
    return {
        **{
            f"{name}_proj": _dense_spec((hidden,), ("embed",), shape, heads[: len(shape)], False)
            for name, shape in outputs.items()
        },
        "o_proj": _dense_spec(values, heads, (hidden,), ("embed",), False),
        **{f"{name}_conv": {TAPS: ParameterSpec((*outputs[name], size), (*heads, None))} for name in "qkv"},
        A_LOG: ParameterSpec(one, heads[:1]),
        DT_BIAS: ParameterSpec(one, heads[:1]),
        "norm": {GATED_SCALE: ParameterSpec(values[1:], ("norm",))},
    }


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
    head_dim, most_kv_heads = config.head_dim, config.num_kv_heads
    if config.features.mixed_layers:
        head_dim = max(head_dim, config.global_head_dim or 0)
        most_kv_heads = max(most_kv_heads, config.num_global_kv_heads or 0)
    heads = 2 * (config.num_heads + most_kv_heads) * head_dim
    mlp = config.intermediate_size * (2 if config.double_wide_mlp else 1)
    per_layer = config.num_layers * config.per_layer_input_size
    num_parameters = (
        config.hidden_size * (config.vocab_size + config.num_layers * (heads + 3 * mlp) + per_layer)
        + per_layer * config.per_layer_vocab_size
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
        _check_choice("layer_types entry", layer_type, (*LAYER_TYPES, LINEAR_ATTENTION))
    if config.is_recurrent:
        _check_recurrent(config)
    if any(map(has_window, config.layer_types)):
        if not features.has_windows:
            raise ValueError(
                f"sliding_attention layers are supported for {families_with('has_windows')} only, got family "
                f"{config.family}"
            )
        if config.sliding_window is None or config.sliding_window < 1:
            raise ValueError(f"sliding_window must be >= 1 with sliding_attention layers, got {config.sliding_window}")
    if features.always_attention_bias and not config.attention_bias:
        raise ValueError(
            f"attention_bias must be true for {config.family}, whose q, k and v always have a bias, got false"
        )
    if config.attention_bias and not features.may_have_attention_bias:
        raise ValueError(f"attention_bias must be false for {config.family}, which has none, got true")
    if config.mlp_bias and not features.may_have_mlp_bias:
        raise ValueError(
            f"mlp_bias must be false for {config.family}, got true; only {families_with('may_have_mlp_bias')} has it"
        )
    if not features.has_query_scale and config.query_pre_attn_scalar != config.head_dim:
        raise ValueError(
            f"query_pre_attn_scalar must equal head_dim ({config.head_dim}) for {config.family}, "
            f"got {config.query_pre_attn_scalar}; only {families_with('has_query_scale')} has it"
        )
    _check_rope(config)
    _check_features(config)
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


def _check_rope(config: ModelConfig) -> None:
    for layer_type in dict.fromkeys(name for name in config.layer_types if name != LINEAR_ATTENTION):
        rotated, _, scaling = config.rope_of(layer_type)
        if rotated % 2 or rotated < 2:
            raise ValueError(f"rotary positions must rotate a whole number of pairs of each head, got {rotated} dims")
        for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
            if len(getattr(scaling, name)) != rotated // 2:
                raise ValueError(
                    f"rope_scaling {name} must have {rotated // 2} numbers, one for each rotated pair, got "
                    f"{len(getattr(scaling, name))}"
                )
        if scaling.query_scale_beta is not None and not config.features.scales_query_by_position:
            raise ValueError(
                f"queries are scaled by position for {families_with('scales_query_by_position')} only, got family "
                f"{config.family}"
            )


# {feature of a family: attributes of a model that must be neutral without it}
_NEUTRAL_WITHOUT = {
    "has_multipliers": ("embedding_multiplier", "residual_multiplier", "logits_divisor"),
    "attention_softcap": ("attention_softcap",),
    "logit_softcap": ("logit_softcap",),
    "mixed_layers": (
        *("global_head_dim", "num_global_kv_heads", "keys_are_values", "num_kv_shared_layers", "double_wide_mlp"),
        "per_layer_input_size",
    ),
}


def _check_features(config: ModelConfig) -> None:
    for feature, names in _NEUTRAL_WITHOUT.items():
        for name in names:
            neutral = ModelConfig.__dataclass_fields__[name].default
            if getattr(config, name) != neutral and not getattr(config.features, feature):
                raise ValueError(
                    f"{name} must be {neutral} for {config.family}, got {getattr(config, name)}; only "
                    f"{families_with(feature)} has it"
                )
    for name in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
        _check_positive(name, getattr(config, name))
    for name in ("attention_multiplier", "attention_softcap", "logit_softcap"):
        if (value := getattr(config, name)) is not None:
            _check_positive(name, value)
    for name, limit in (("global_head_dim", "head_dim"), ("num_global_kv_heads", "num_kv_heads")):
        if (value := getattr(config, name)) is not None:
            _check_positive(name, value)
            if value > LARGEST[limit]:
                raise ValueError(f"{name} must be at most {LARGEST[limit]}, got {value}")
    if config.global_head_dim is not None and config.global_head_dim % 2:
        raise ValueError(f"global_head_dim must be even for rotary embeddings, got {config.global_head_dim}")
    if config.num_global_kv_heads is not None and config.num_heads % config.num_global_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_global_kv_heads, got {config.num_heads} and "
            f"{config.num_global_kv_heads}"
        )
    if not 0 <= config.num_kv_shared_layers < config.num_layers:
        raise ValueError(
            f"num_kv_shared_layers must be from 0 to {config.num_layers - 1}, got {config.num_kv_shared_layers}"
        )
    first = config.num_layers - config.num_kv_shared_layers
    if lost := sorted(set(config.layer_types[first:]) - set(config.layer_types[:first])):
        raise ValueError(
            f"num_kv_shared_layers must leave a layer of each type to read from, got {config.num_kv_shared_layers} of "
            f"{config.num_layers} layers, before which there is no {lost[0]}"
        )
    if config.per_layer_input_size:
        for name in ("per_layer_input_size", "per_layer_vocab_size"):
            limit = LARGEST["vocab_size" if "vocab" in name else "hidden_size"]
            _check_positive(name, getattr(config, name))
            if getattr(config, name) > limit:
                raise ValueError(f"{name} must be at most {limit}, got {getattr(config, name)}")
        if config.per_layer_vocab_size < config.vocab_size:
            raise ValueError(
                f"per_layer_vocab_size must be at least vocab_size, got {config.per_layer_vocab_size} and "
                f"{config.vocab_size}"
            )


def _check_recurrent(config: ModelConfig) -> None:
    if not config.features.has_states:
        raise ValueError(
            f"{LINEAR_ATTENTION} layers are supported for {families_with('has_states')} only, got family "
            f"{config.family}"
        )
    for name, limit in LARGEST_OF_STATES.items():
        _check_positive(name, getattr(config, name))
        if getattr(config, name) > limit:
            raise ValueError(f"{name} must be at most {limit}, got {getattr(config, name)}")
    if config.linear_conv_kernel_dim < 2:
        raise ValueError("linear_conv_kernel_dim must be >= 2, a token and those before it, got 1")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise ValueError(
            "linear_num_value_heads must be a multiple of linear_num_key_heads, got "
            f"{config.linear_num_value_heads} and {config.linear_num_key_heads}"
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
