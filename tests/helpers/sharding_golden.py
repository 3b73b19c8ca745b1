"""Where every array of a training run lies, for several (model, topology, rules): the goldens of test_sharding_compare.

`python -m tests.helpers.sharding_golden` writes them anew, to tests/files/golden/sharding_*.json; look at the
difference before you commit it. In: the cases below. Out: per leaf of the state and of the train step's inputs its
shape and dtype, its logical axes, the mesh axes of each dim and the shape of its part on one device. Nothing is
computed and no device is asked for: a mesh of 512 is described as easily as one of 8. Both flavours have the same
goldens.
"""

import dataclasses
import json
import pathlib
import sys

import jax
from jax.sharding import AbstractMesh, AxisType

from rl.config.load import load_config
from rl.devices.mesh import axis_sizes, num_row_shards
from rl.models.config import ModelConfig
from rl.models.flavours import policy_from_config
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import _lora
from rl.state.states import InitStateFn
from rl.training.shaped_inputs import get_shaped_inputs
from tests.helpers.places import FILES

FOLDER = FILES / "golden"
QWEN3_8B = ("qwen3", 151_936, 4096, 12_288, 2, 32, 8, 128)
LLAMA_70B = ("llama", 128_256, 8192, 28_672, 2, 64, 8, 128)
GEMMA_1B = ("gemma3_text", 262_144, 1152, 6912, 2, 4, 1, 256)
SMALL = ("qwen2", 259, 48, 96, 1, 4, 2, 12)  # biases, a vocabulary that nothing divides

BATCH = (  # a minibatch with every field that a loss may need, but those of `kl_in_reward`
    "grpo.prompts_per_step=64",
    "grpo.group_size=8",
    "grpo.epochs=2",
    "grpo.top_entropy_quantile=0.2",
    "data.max_prompt_length=256",
    "sampling.max_completion_length=256",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model by its shape (two layers stand for all), and overrides that give mesh, rules and optimizer."""

    arch: tuple
    overrides: tuple[str, ...]
    untied: bool = False


CASES = {
    "qwen3_8b_fsdp8": Case(QWEN3_8B, ("mesh.fsdp=8",), untied=True),
    "qwen3_8b_all_axes": Case(QWEN3_8B, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), untied=True),
    "llama_70b_v5e_16x16": Case(LLAMA_70B, ("mesh.fsdp=64", "mesh.tensor=4"), untied=True),
    "llama_70b_two_slices": Case(LLAMA_70B, ("mesh.data=2", "mesh.fsdp=32", "mesh.tensor=8", "mesh.dcn={data: 2}")),
    "gemma3_1b_one_kv_head": Case(GEMMA_1B, ("mesh.fsdp=4", "mesh.tensor=4")),
    "odd_vocabulary": Case(SMALL, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), untied=True),
    "own_axis_and_rules": Case(
        QWEN3_8B,
        (
            "mesh.fsdp=2",
            "mesh.axes={context: 2}",
            "mesh.tensor=2",
            "mesh.rules.batch=[data, fsdp, context]",
            "mesh.rules.mlp=[tensor, context]",
            "mesh.rules.embed=[]",
        ),
    ),
    "adapters_on_int8": Case(QWEN3_8B, ("mesh.fsdp=4", "mesh.tensor=2", "lora.rank=16", "lora.base_dtype=int8")),
    "kl_in_reward": Case(
        SMALL,
        (
            *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "grpo.preset=reinforce++"),
            *("grpo.policy_distribution=sampled", "sampling.top_k=4"),
        ),
    ),
    "muon": Case(SMALL, ("mesh.fsdp=4", "mesh.tensor=2", "optimizer.name=muon")),
    "adafactor": Case(QWEN3_8B, ("mesh.fsdp=4", "mesh.tensor=2", "optimizer.name=adafactor")),
}


def describe(case: Case, flavour: str) -> dict:
    """What a golden holds: the mesh, and per leaf shape, logical axes, mesh axes and shape on one device."""
    config = load_config(None, [f"pure_nnx={str(flavour == 'nnx').lower()}", *BATCH, *case.overrides])
    sizes = {axis: 1 if size == -1 else size for axis, size in axis_sizes(config.mesh).items()}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    model_config = ModelConfig.from_arch(*case.arch, tie_word_embeddings=not case.untied)
    policy = policy_from_config(config, dataclasses.replace(model_config, lora=_lora(config, model_config)))
    init_state_fn = InitStateFn(policy, create_training_optimizer(config, policy)[1], 0)
    budget = 4096 * num_row_shards(mesh, config.mesh.rules)
    grpo = dataclasses.replace(config.grpo, max_tokens_per_microbatch=budget)
    inputs = get_shaped_inputs(dataclasses.replace(config, grpo=grpo), mesh, init_state_fn)
    leaves = [
        *_leaves("state", inputs.state, inputs.state_shardings, inputs.state_annotations),
        *_leaves("minibatch", inputs.minibatch, inputs.minibatch_shardings, inputs.minibatch_annotations),
    ]
    return {"mesh": sizes, "leaves": dict(leaves)}


def _leaves(prefix, shapes, shardings, annotations):
    is_names = lambda tree: type(tree) is tuple and all(n is None or isinstance(n, str) for n in tree)  # noqa: E731
    # An optimizer's parts without numbers are empty tuples; those of arrays without dims are leaves of the shapes.
    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    names = treedef.flatten_up_to(annotations)
    for (path, shape), sharding, axes in zip(flat, jax.tree.leaves(shardings), names, strict=True):
        assert is_names(axes), path
        yield f"{prefix}{jax.tree_util.keystr(path)}", _entry(shape, sharding, axes)


def _entry(shape, sharding, axes) -> dict:
    return {
        "shape": [*map(int, shape.shape)],
        "dtype": str(shape.dtype),
        "logical": list(axes),
        "spec": [list(part) if isinstance(part, tuple) else part for part in sharding.spec],
        "on_one_device": [*map(int, sharding.shard_shape(tuple(shape.shape)))],
    }


def to_text(description: dict) -> str:
    """JSON with one line per leaf, so that a difference is read leaf by leaf."""
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in description["leaves"].items())
    return f'{{"mesh": {json.dumps(description["mesh"])},\n "leaves": {{\n{lines}\n}}}}\n'


def path_of(name: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """The file of a case."""
    return folder / f"sharding_{name}.json"


def differences(golden: dict, now: dict) -> list[str]:
    """What differs, a line per leaf and field."""
    lines = [] if golden["mesh"] == now["mesh"] else [f"mesh: was {golden['mesh']}, is {now['mesh']}"]
    for path in dict.fromkeys([*golden["leaves"], *now["leaves"]]):
        old, new = golden["leaves"].get(path), now["leaves"].get(path)
        if old is None or new is None:
            lines.append(f"{path}: {'is new' if old is None else 'is gone'}")
            continue
        lines += [
            f"{path}: {field} was {old.get(field)}, is {new.get(field)}"
            for field in dict.fromkeys([*old, *new])
            if old.get(field) != new.get(field)
        ]
    return lines


def write(folder: pathlib.Path) -> None:
    """Writes the goldens of all cases, and takes away those of none."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("sharding_*.json"):
        path.unlink()
    for name, case in CASES.items():
        path_of(name, folder).write_text(to_text(describe(case, "nnx")))


if __name__ == "__main__":
    write(FOLDER)
    print(f"wrote {len(CASES)} goldens to {FOLDER}", file=sys.stderr)
