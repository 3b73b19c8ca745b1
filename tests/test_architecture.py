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

# The rooms from the ground up: a room may import those of the rows above its own, nothing of its own row or below it.
ROOMS = [
    ["rl.errors", "rl.files"],
    ["rl.config"],
    ["rl.devices"],
    ["rl.run_folder", "rl.algorithms", "rl.data", "rl.models"],
    ["rl.state"],
    ["rl.training", "rl.sampler"],
    ["rl.run"],
    ["rl.rollout"],
    ["rl.serving"],
    ["rl.grpo_trainer", "rl.sft_trainer"],
    ["rl.tools"],
    ["rl.api", "rl.cli"],
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
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*folder, *filter(None, [node.module])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def own_imports() -> dict[str, set[str]]:
    """{module: the modules and rooms of rl and rewards that it imports, at its top or inside its functions}."""
    names = {module_name(path) for path in SOURCES} - {"rl", "rewards"}
    return {module_name(path): (imported_modules(path) & names) - {module_name(path)} for path in SOURCES}


def test_rooms_import_those_above_them_only():
    level = {room: index for index, row in enumerate(ROOMS) for room in row}
    wrong = []
    for name, others in own_imports().items():
        for other in others:
            room, other_room = (".".join(module.split(".")[:2]) for module in (name, other))
            if room != other_room and name.startswith("rl.") and other.startswith("rl."):
                assert room in level, f"{room} has no row in ROOMS"
                if level[other_room] >= level[room]:
                    wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_modules_import_each_other_in_a_circle():
    imports, seen = own_imports(), set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in seen:
            for other in sorted(imports[name]):
                visit(other, (*way, name))
            seen.add(name)

    for name in sorted(imports):
        visit(name, ())


def test_rewards_import_neither_jax_nor_rl():
    forbidden = re.compile(r"^(jax|flax|optax|orbax|rl|tunix)(\.|$)")
    for path in sorted((ROOT / "rewards").rglob("*.py")):
        assert not [name for name in imported_modules(path) if forbidden.match(name)], path


def test_neither_pages_nor_rollouts_nor_training_ask_for_adapters_or_the_kind_of_a_model():
    """What is trained is asked of `rl.models.trainable`; what differs between models, of the policy."""
    question = re.compile(r"lora|adapter|\.kind\b|\bkind ==", re.IGNORECASE)
    rooms = ("rl/rollout/", "rl/training/", "rl/grpo_trainer.py", "rl/sft_trainer.py")
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(rooms):
            found = [line for line in path.read_text().splitlines() if question.search(line)]
            assert not found, (name, found)


def test_pure_nnx_is_read_by_one_module():
    readers = [module_name(p) for p in SOURCES if re.search(r"\.pure_nnx\b", p.read_text())]
    assert readers == ["rl.models.flavours"]


def test_no_path_is_chosen_by_the_class_of_a_model():
    pattern = re.compile(r"isinstance\([^)]*(model|policy|nnx\.Module|nn\.Module|linen)", re.IGNORECASE)
    assert not [module_name(p) for p in SOURCES if pattern.search(p.read_text())]


def test_one_module_knows_which_samplers_there_are():
    classes = {"rl.sampler.slot_sampler.Sampler", "rl.sampler.wave_sampler.WaveSampler"}
    knowing = [module_name(path) for path in SOURCES if imported_modules(path) & classes]
    assert knowing == ["rl.sampler.create"]
    code = "\n".join(path.read_text() for path in SOURCES)
    assert not re.search(r"isinstance\([^)]*(sampler|source|Sampler)\b[^)]*Sampler", code)


@pytest.mark.parametrize("page", ["grpo_trainer", "sft_trainer"])
def test_the_pages_hold_no_helpers_and_no_closures_and_ask_no_kind_of_model(page):
    tree = ast.parse((ROOT / "rl" / f"{page}.py").read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    assert [node.name for node in ast.walk(tree) if isinstance(node, functions)] == ["train", "main"]
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not named & {"lora", "kind", "flavours", "pure_nnx", "decodes_in_waves", "packs_rows"}


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


# docs/LOG.md is history; docs/from-maxtext.md names files of MaxText too, and a test of its own reads it.
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in DOCS if path.name != "LOG.md"]


def test_markdown_is_wrapped_and_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    long = []
    for path in PAGES:
        fenced = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fenced ^= line.startswith("```")
            prose = not fenced and not line.startswith(("    ", "|", "```")) and "](" not in line
            if prose and len(line) > 100:
                long.append(f"{path.name}:{number}")
    assert not long, long


def test_every_file_and_module_that_a_text_names_exists():
    keys = set(flatten(to_dict(load_config(None))))
    recipes = [*sorted((ROOT / "configs").rglob("*.yml")), *sorted((ROOT / "examples").rglob("*.md"))]
    missing = []
    for path in (*PAGES, *SOURCES, *recipes):
        if path.name == "from-maxtext.md":
            continue
        text = path.read_text()
        for name in re.findall(r"(?<![\w/.])(?:rl|rewards|docs|tests|configs|examples|benchmarks)/[\w./+-]*\w", text):
            made_up = re.search(r"NAME|FAMILY|_$|^configs/x\.yml$", name)
            if not made_up and not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists():
                missing.append(f"{path.name}: {name}")
        for name in re.findall(r"(?<![\w/.-])(?:rl|rewards)(?:\.[a-zA-Z_]\w*)+", text):
            if name not in keys and not name.endswith(".md") and not names_something(name):
                missing.append(f"{path.name}: {name}")
        for name in re.findall(r"`(\w+\.py)`", text):
            if not any((ROOT / room).rglob(name) for room in ("rl", "rewards", "examples", "tests", "benchmarks")):
                missing.append(f"{path.name}: {name}")
    assert not missing, missing


def names_something(dotted: str) -> bool:
    """Whether `rl.room.module` or `rl.room.module.name` is there; of a name, only that its module spells it."""
    place = ROOT
    for part in dotted.split("."):
        if not (place / part).is_dir():
            module = place / f"{part}.py"
            if module.exists():
                rest = dotted.partition(f".{part}.")[2].partition(".")[0]
                return not rest or re.search(rf"\b{rest}\b", module.read_text()) is not None
            return re.search(rf"\b{part}\b", (place / "__init__.py").read_text()) is not None
        place = place / part
    return True


def test_unfinished_code_is_nowhere():
    pattern = re.compile(r"NotImplementedError|TODO|FIXME|XXX|mark\.(skip|xfail)\b")
    assert not [module_name(p) for p in SOURCES if pattern.search(p.read_text())]


def test_help_imports_nothing_that_takes_time():
    heavy = {"jax", "transformers", "datasets", "tunix", "matplotlib", "dataclasses", "importlib.metadata", "difflib"}
    code = f"import sys; from rl.cli import main; main(['--help']); assert not {heavy} & {{*sys.modules}}, sys.modules"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
