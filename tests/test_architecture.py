"""The structure that the design fixes: import order, the seam, the configuration's owners."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from rl.config import load_config
from rl.config_sections import flatten, to_dict
from rl.loss_types import LossConfig
from rl.mesh import AXES

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "rl").rglob("*.py")) + sorted((ROOT / "rewards").rglob("*.py"))

# From the ground up: a module may import those of its own line and of the lines above it.
LAYERS = [
    [
        "rl.remote",
        "rl.remote_lease",
        "rl.remote_ledger",
        "rl.remote_settle",
        "rl.remote_steps",
        "rl.yaml_text",
        "rl.config_sections",
        "rl.config_ranges",
        "rl.config_rules",
        "rl.config",
        "rl.models.config",
        "rl.host_memory",
        "rl.json_file",
        "rl.parquet_pages",
        "rl.models.finite",
        "rl.untrusted",
        "rl.untrusted_worker",
        "rl.metrics",
        "rl.interrupt",
        "rl.tools.launch",
        "rl.cli",
        "rl.categorical",
        "rl.programs",
        "rl.completion_file",
        "rl.output_file",
        "rl.local_files",
        "rl.checkpoint_files",
        "rl.run_files",
        "rl.replaced_run",
        "rl.trust",
    ],
    [
        "rl.mesh",
        "rl.hosts",
        "rl.models.quantized",
        "rl.console",
        "rl.health",
        "rl.not_finite",
        "rl.models.hf_config",
        "rl.sampling",
        "rl.tokenizer",
        "rl.tasks",
        "rl.tools.hlo",
        "rl.tools.topologies",
    ],
    ["rl.models.ops", "rl.loss_types", "rl.remote_run"],
    [
        "rl.models.block_attention",
        "rl.models.cache",
        "rl.models.lora",
        "rl.loss_metrics",
        "rl.entropy_coef",
        "rl.advantages",
        "rl.logprobs",
        "rl.sources",
        "rl.tools.report",
    ],
    ["rl.models.scanned"],
    [
        "rl.losses",
        "rl.models.attention_kernels",
        "rl.models.linen_model",
        "rl.models.nnx_model",
        "rl.models.train_state",
        "rl.data",
    ],
    [
        "rl.models.policy",
        "rl.models.own",
        "rl.models.tunix_config",
        "rl.models.tunix_policy",
        "rl.models.tunix_files",
        "rl.models.hf",
        "rl.packing",
        "rl.prompt_rows",
    ],
    [
        "rl.models.param_folder",
        "rl.models.maxtext",
        "rl.models.peft",
        "rl.models.lora_remainder",
        "rl.models.quantized_files",
        "rl.models.foreign",
        "rl.user_functions",
        "rl.reference",
        "rl.states",
        "rl.optimizer",
        "rl.decoding",
        "rl.weights",
        "rl.run_folder",
    ],
    ["rl.checkpoint", "rl.scheduling", "rl.engine", "rl.train_step", "rl.executables"],
    ["rl.token_advantages"],
    ["rl.shape_plan", "rl.prompt_logprobs"],
    ["rl.sampler"],
    ["rl.wave_sampler"],
    ["rl.rollout", "rl.update", "rl.trained"],
    ["rl.shaped_inputs"],
    [
        "rl.evaluation",
        "rl.dynamic_sampling",
        "rl.tools.export",
        "rl.tools.convert",
        "rl.tools.data",
        "rl.tools.checkpoint_bench",
        "rl.tools.layerwise",
        "rl.tools.quantize_report",
        "rl.tools.quantize_foreign",
        "rl.tools.quantize",
    ],
    ["rl.tools.loop_programs"],
    ["rl.tools.compile_report"],
    ["rl.tools.compile_advice"],
    ["rl.tools.compile_text"],
    ["rl.grpo_trainer", "rl.sft_trainer", "rl.replay", "rl.tools.compile"],
    ["rl.sample_command", "rl.tools.checkpoint", "rl.tools.lora"],
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
    assert [module_name(p) for p in SOURCES if pattern.search(p.read_text())] == ["rl.mesh"]


def test_every_config_key_is_read_by_some_code():
    code = "\n".join(path.read_text() for path in SOURCES if not module_name(path).startswith("rl.config"))
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
