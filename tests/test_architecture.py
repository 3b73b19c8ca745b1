"""The structure that the design fixes: import order, the seam, the configuration's owners."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from rl.algorithms.loss_types import LossConfig
from rl.config.load import load_config
from rl.config.sections import flatten, to_dict
from rl.devices.mesh import AXES
from tests.helpers.places import ROOT

SOURCES = sorted((ROOT / "rl").rglob("*.py")) + sorted((ROOT / "rewards").rglob("*.py"))

# From the ground up: a module may import those of its own line and of the lines above it.
LAYERS = [
    [
        "rl.files.stores",
        "rl.run_folder.lease",
        "rl.run_folder.ledger",
        "rl.run_folder.settle",
        "rl.run_folder.remote_steps",
        "rl.config.yaml_text",
        "rl.config.sections",
        "rl.config.ranges",
        "rl.config.rules",
        "rl.config.load",
        "rl.models.config",
        "rl.devices.host_memory",
        "rl.files.json_file",
        "rl.data.parquet_pages",
        "rl.models.files.finite",
        "rl.files.untrusted",
        "rl.files.untrusted_worker",
        "rl.run.metrics",
        "rl.run.interrupt",
        "rl.tools.launch",
        "rl.cli",
        "rl.sampler.categorical",
        "rl.devices.programs",
        "rl.tools.samples.completion_file",
        "rl.files.output_file",
        "rl.files.local_files",
        "rl.state.checkpoint_files",
        "rl.run_folder.contents",
        "rl.run_folder.replaced",
        "rl.run_folder.trust",
    ],
    [
        "rl.devices.mesh",
        "rl.devices.hosts",
        "rl.models.quantized",
        "rl.run.console",
        "rl.run.health",
        "rl.run.not_finite",
        "rl.models.files.hf_config",
        "rl.sampler.token_draw",
        "rl.data.tokenizer",
        "rl.data.tasks",
        "rl.tools.programs.hlo",
        "rl.tools.programs.topologies",
    ],
    ["rl.models.ops", "rl.algorithms.loss_types", "rl.run_folder.mirror"],
    [
        "rl.models.block_attention",
        "rl.models.cache",
        "rl.models.lora",
        "rl.algorithms.loss_metrics",
        "rl.algorithms.entropy_coef",
        "rl.algorithms.advantages",
        "rl.models.logprobs",
        "rl.data.sources",
        "rl.tools.report",
    ],
    ["rl.models.scanned"],
    [
        "rl.algorithms.losses",
        "rl.models.attention_kernels",
        "rl.models.linen_model",
        "rl.models.nnx_model",
        "rl.models.train_state",
        "rl.data.prompts",
    ],
    [
        "rl.models.policy",
        "rl.models.foreign.own_config",
        "rl.models.foreign.tunix_config",
        "rl.models.foreign.tunix_policy",
        "rl.models.foreign.tunix_files",
        "rl.models.files.hf",
        "rl.training.packing",
        "rl.tools.samples.sample_prompts",
    ],
    [
        "rl.state.param_folder",
        "rl.models.files.maxtext",
        "rl.models.files.peft",
        "rl.models.files.lora_remainder",
        "rl.models.files.quantized_files",
        "rl.models.foreign.files",
        "rl.algorithms.from_config",
        "rl.state.reference_sync",
        "rl.state.states",
        "rl.state.optimizer",
        "rl.sampler.decoding",
        "rl.state.origin",
        "rl.run_folder.folder",
    ],
    [
        "rl.state.checkpoint",
        "rl.sampler.request_queue",
        "rl.sampler.engine",
        "rl.training.train_step",
        "rl.run.executables",
    ],
    ["rl.training.token_advantages"],
    ["rl.sampler.shape_plan", "rl.sampler.prompt_logprobs"],
    ["rl.sampler.slot_sampler"],
    ["rl.sampler.wave_sampler"],
    ["rl.rollout.groups", "rl.training.update", "rl.tools.trained"],
    ["rl.training.shaped_inputs"],
    [
        "rl.rollout.evaluation",
        "rl.rollout.step_prompts",
        "rl.tools.checkpoints.export",
        "rl.tools.checkpoints.convert",
        "rl.tools.data",
        "rl.tools.checkpoints.checkpoint_bench",
        "rl.tools.quantization.layerwise",
        "rl.tools.quantization.quantize_report",
        "rl.tools.quantization.quantize_foreign",
        "rl.tools.quantization.quantize",
    ],
    ["rl.tools.programs.loop_programs"],
    ["rl.tools.programs.compile_report"],
    ["rl.tools.programs.compile_advice"],
    ["rl.tools.programs.compile_text"],
    ["rl.grpo_trainer", "rl.sft_trainer", "rl.tools.samples.replay", "rl.tools.programs.compile"],
    ["rl.tools.samples.sample", "rl.tools.checkpoints.checkpoint", "rl.tools.checkpoints.lora"],
]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: pathlib.Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_of_rl_has_a_place_in_the_import_order():
    placed = {name for layer in LAYERS for name in layer}
    modules = {module_name(path) for path in SOURCES if path.name != "__init__.py"}
    modules = {name for name in modules if name.startswith("rl.")}
    assert modules == placed & modules, sorted(modules - placed)
    assert placed == modules, sorted(placed - modules)


def test_imports_inside_rl_go_one_way():
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for path in SOURCES:
        name = module_name(path)
        for other in imported_modules(path) & set(level):
            if name in level and level[other] > level[name]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_rewards_import_neither_jax_nor_rl():
    forbidden = re.compile(r"^(jax|flax|optax|orbax|rl|tunix)(\.|$)")
    for path in sorted((ROOT / "rewards").rglob("*.py")):
        assert not [name for name in imported_modules(path) if forbidden.match(name)], path


def test_pure_nnx_is_read_by_one_module():
    readers = [module_name(p) for p in SOURCES if re.search(r"\.pure_nnx\b", p.read_text())]
    assert readers == ["rl.models.policy"]


def test_no_path_is_chosen_by_the_class_of_a_model():
    pattern = re.compile(r"isinstance\([^)]*(model|policy|nnx\.Module|nn\.Module|linen)", re.IGNORECASE)
    assert not [module_name(p) for p in SOURCES if pattern.search(p.read_text())]


def test_mesh_axis_names_are_spelled_in_one_module():
    pattern = re.compile(r"""["'](fsdp|tensor)["']""")
    assert [module_name(p) for p in SOURCES if pattern.search(p.read_text())] == ["rl.devices.mesh"]


def test_every_config_key_is_read_by_some_code():
    code = "\n".join(path.read_text() for path in SOURCES if not module_name(path).startswith("rl.config.load"))
    # Sections whose keys are taken all at once, by the names that another list spells out.
    by_name = {"mesh": AXES, "grpo": [field.name for field in dataclasses.fields(LossConfig)]}
    unread = []
    for key in flatten(to_dict(load_config(None))):
        section, _, leaf = key.rpartition(".")
        if section in ("mesh.rules", "model.arch"):
            continue  # read as whole mappings
        if not re.search(rf"\.{leaf}\b", code) and leaf not in by_name.get(section, ()):
            unread.append(key)
    assert not unread


def test_every_config_key_has_a_comment_in_base_yml():
    lines = (ROOT / "configs" / "base.yml").read_text().splitlines()
    bare = [line for line in lines if re.match(r"\s*\w+:", line) and "#" not in line]
    # A section without a comment of its own has one on each of its keys.
    assert all(line.rstrip().endswith(":") for line in bare), bare


def test_unfinished_code_is_nowhere():
    pattern = re.compile(r"NotImplementedError|TODO|FIXME|XXX|mark\.(skip|xfail)\b")
    assert not [module_name(p) for p in SOURCES if pattern.search(p.read_text())]


@pytest.mark.parametrize("heavy", ["jax", "transformers", "datasets", "tunix", "matplotlib"])
def test_help_imports_no_heavy_library(heavy):
    code = f"import sys; from rl.cli import main; main(['--help']); assert {heavy!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
