"""The attention of training passes behind one function, computed by the best kernel of the platform.

In: queries, keys and values of packed rows, and the boolean mask of `ops.visible`; no token of a packed row sees a
later place. Out: the same numbers from every back end, up to rounding, in value and in gradient: `xla` (plain
operations, `rl.models.block_attention`; any platform and dtype), `splash` (the Pallas kernel for TPU), `cudnn` (flash
attention on NVIDIA GPUs from Ampere on, bfloat16 or float16). The first two skip empty blocks of the mask, so
completions that do not see one another cost nothing. A new back end is one entry of `KERNELS`. Not here: decoding
(`ops.attention_over_parts`).

Legend: B rows, T query positions, S key positions, N query heads, K kv heads, H head dim.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rl.devices.mesh import partition_spec, row_axes
from rl.files.json_file import shown
from rl.models import ops
from rl.models.block_attention import BLOCK, LARGE_BLOCK, block_attention
from rl.models.config import ModelConfig

_LANES = 128  # lanes of a TPU's vector unit, the smallest block of the kernel
_HALF_TYPES = ("bfloat16", "float16")
_CUDNN_CAPABILITY = (8, 0)  # compute capability of Ampere, the first with the kernel
# The largest head size. jax allows 256 from Hopper on, forward and backward (`check_is_flash_attention` in
# jax/_src/cudnn/fused_attention_stablehlo.py). After Hopper, cuDNN may lack a backward pass for them
# (https://github.com/pytorch/pytorch/pull/152076).
_CUDNN_HEAD_DIM, _HOPPER, _HOPPER_HEAD_DIM = 128, 9, 256


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """A back end.

    Attributes:
      attend: (q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S], scale) -> [B, T, N, H]; for a model with a soft cap
        of scores, the cap is one more argument.
      skips_blocks: whether positions that no query sees cost nothing.
      block: positions of a block, where the back end is `block_attention`.
      reason: why "auto" did not take the best kernel of the platform; empty where it did.
    """

    name: str
    attend: ops.AttentionFn
    skips_blocks: bool = True
    block: int = BLOCK
    reason: str = dataclasses.field(default="", compare=False)

    @property
    def title(self) -> str:
        """The name, and the reason where there is one, for messages."""
        return f"{self.name} attention" + (f" ({self.reason})" if self.reason else "")


XLA = AttentionKernel("xla", block_attention)
XLA_ON_ACCELERATORS = AttentionKernel("xla", functools.partial(block_attention, block=LARGE_BLOCK), block=LARGE_BLOCK)


class Place(NamedTuple):
    """What a kernel is built for: a model, and the layout of rows and heads. It runs on every device's own share.

    `interpret`: run a TPU's kernel anywhere, slowly, as plain operations; for tests.
    """

    config: ModelConfig
    mesh: Mesh
    rules: Mapping[str, Sequence[str]]
    interpret: bool = False

    @property
    def device(self) -> Any:
        """One of the devices, which are all alike."""
        return self.mesh.devices.flat[0]


class KernelSpec(NamedTuple):
    """How one back end is chosen and made.

    Attributes:
      platform: the one platform of jax ("cpu", "gpu", "tpu") on which it runs and "auto" may take it; the first entry
        of a platform goes before others. None: it runs on every platform, and "auto" does not take it.
      problem: gives the reason why the back end cannot compute this model on these devices ("needs ..., got ...");
        None: it can.
      make: builds the back end, where there is no problem.
    """

    platform: str | None
    problem: Callable[[Place], str | None]
    make: Callable[[Place], AttentionKernel]


def choose_kernel(
    name: str, config: ModelConfig, mesh: Mesh, rules: Mapping[str, Sequence[str]], interpret: bool = False
) -> AttentionKernel:
    """The back end called `name`; for "auto", the best that devices, dtype and head size allow.

    Args:
      mesh, rules: the layout of rows and heads; a kernel runs on every device's own share of them.
      interpret: run the TPU's kernel anywhere, slowly, as plain operations; for tests.

    Raises:
      ValueError: the name is not in `KERNELS`, or the back end does not run on this platform or device, or not with
        this dtype or head size.
    """
    place = Place(config, mesh, rules, interpret)
    platform, reasons = place.device.platform, []
    if name == "auto":
        for kernel, spec in KERNELS.items():
            if spec.platform == platform:
                problem = spec.problem(place)
                if problem is None:
                    return spec.make(place)
                reasons.append(f"{kernel} {problem}")
        kernel = KERNELS["xla"].make(place)
        return dataclasses.replace(kernel, reason="; ".join(reasons)) if reasons else kernel
    if name not in KERNELS:
        raise ValueError(f"model.attention must be auto or one of {', '.join(KERNELS)}, got {shown(name)}")
    spec = KERNELS[name]
    if spec.platform not in (None, platform) and not interpret:
        raise ValueError(
            f"model.attention must be xla or auto on {platform}, got {name}, which runs on {spec.platform} only"
        )
    if problem := spec.problem(place):
        raise ValueError(f"model.attention={name} {problem}; set model.attention to xla or auto")
    return spec.make(place)


def _make_xla(place: Place) -> AttentionKernel:
    return XLA if place.device.platform == "cpu" else XLA_ON_ACCELERATORS


def _splash_problem(place: Place) -> str | None:
    return "needs model.dtype float32 or narrower, got float64" if place.config.dtype == "float64" else None


def _make_splash(place: Place) -> AttentionKernel:
    config, mesh, rules, interpret = place
    # Query heads and the kv heads that they read must lie on the same device.
    heads = partition_spec(("heads",), (config.num_heads,), mesh, rules)[0]
    kv_heads = partition_spec(("kv_heads",), (config.common_kv_heads,), mesh, rules)[0]
    rows = row_axes(mesh, rules)
    return AttentionKernel("splash", SplashAttention(mesh, rows or None, heads, heads != kv_heads, interpret))


def _cudnn_problem(place: Place) -> str | None:
    config, device = place.config, place.device
    capability, kind = _compute_capability(device), device.device_kind
    if capability is None:
        return f"needs an NVIDIA GPU, got {kind}"
    if capability < _CUDNN_CAPABILITY:
        least, own = (".".join(map(str, pair)) for pair in (_CUDNN_CAPABILITY, capability))
        return f"needs compute capability {least} or higher, got {own} of {kind}"
    if config.dtype not in _HALF_TYPES:
        return f"needs model.dtype {' or '.join(_HALF_TYPES)}, got {config.dtype}"
    largest = _HOPPER_HEAD_DIM if capability[0] == _HOPPER else _CUDNN_HEAD_DIM
    for head_dim in {config.head_dim, config.global_head_dim or config.head_dim}:
        if head_dim > largest or head_dim % 8:
            return f"needs heads of at most {largest} on {kind} and a multiple of 8, got head_dim {head_dim}"
    if config.attention_softcap is not None:
        return f"needs scores without a soft cap, got one of {config.attention_softcap:g} in {config.family}"
    return None


def _make_cudnn(place: Place) -> AttentionKernel:
    return AttentionKernel("cudnn", CudnnAttention(), skips_blocks=False)


KERNELS: dict[str, KernelSpec] = {
    "xla": KernelSpec(None, lambda place: None, _make_xla),
    "splash": KernelSpec("tpu", _splash_problem, _make_splash),
    "cudnn": KernelSpec("gpu", _cudnn_problem, _make_cudnn),
}


def _compute_capability(device: Any) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, such as (8, 0); None for other devices (ROCm reports a name)."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """`jax.nn.dot_product_attention`; jax splits it over rows and heads by itself."""

    implementation: Any = "cudnn"

    def __call__(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, scale: float
    ) -> jax.Array:
        """See `AttentionKernel`."""

        def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(
                q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale, implementation=self.implementation
            )

        return _padded(attend, q_BTNH, k_BSKH, v_BSKH, mask_BTS, multiple=2)


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """Splash attention with the mask given as numbers, on every device's rows and heads.

    Attributes:
      rows, heads: mesh axes that cut rows and query heads; None: whole on every device.
      repeat_kv: whether each query head gets its own copy of its kv head, because kv heads are cut differently.
    """

    mesh: Mesh
    rows: tuple[str, ...] | None
    heads: str | tuple[str, ...] | None
    repeat_kv: bool
    interpret: bool

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask_BTS: jax.Array,
        scale: float,
        softcap: float | None = None,
    ) -> jax.Array:
        """See `AttentionKernel`."""
        if self.repeat_kv:
            copies = q_BTNH.shape[2] // k_BSKH.shape[2]
            k_BSKH, v_BSKH = jnp.repeat(k_BSKH, copies, axis=2), jnp.repeat(v_BSKH, copies, axis=2)
        by_head, by_row = PartitionSpec(self.rows, None, self.heads, None), PartitionSpec(self.rows)
        attend = jax.shard_map(
            functools.partial(self._attend_rows, softcap),
            mesh=self.mesh,
            in_specs=(by_head, by_head, by_head, by_row),
            out_specs=by_head,
            check_vma=False,
        )
        # The kernel knows no scale.
        return _padded(attend, q_BTNH * jnp.asarray(scale, q_BTNH.dtype), k_BSKH, v_BSKH, mask_BTS, multiple=_LANES)

    def _attend_rows(
        self,
        softcap: float | None,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask_BTS: jax.Array,
    ) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

        length = q_BTNH.shape[1]
        block = next(size for size in (512, 256, _LANES) if length % size == 0)
        sizes = splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        )

        def attend_row(inputs: tuple[jax.Array, ...]) -> jax.Array:
            q_TNH, k_SKH, v_SKH, mask_TS = inputs
            # One mask for all heads.
            kernel: Any = splash.make_splash_mha(
                mask_TS[None],
                block_sizes=sizes,
                head_shards=1,
                q_seq_shards=1,
                attn_logits_soft_cap=softcap,
                interpret=self.interpret,
            )
            # It is traced here, and the kernel's own `if` cannot take a traced array.
            kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
            return jnp.swapaxes(kernel(*(jnp.swapaxes(x, 0, 1) for x in (q_TNH, k_SKH, v_SKH))), 0, 1)

        return jax.lax.map(attend_row, (q_BTNH, k_BSKH, v_BSKH, mask_BTS))


def _padded(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    multiple: int,
) -> jax.Array:
    """attend(q, k, v, mask) with positions padded to a multiple. Added positions see one another only."""
    num_tokens = q_BTNH.shape[1]
    added = -num_tokens % multiple
    if added:
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
        is_added = jnp.arange(num_tokens + added) >= num_tokens
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, added), (0, added))) | (is_added[:, None] & is_added)
    return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)[:, :num_tokens]
