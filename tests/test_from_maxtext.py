"""docs/from-maxtext.md: one table, complete for the pull request, and everything that it calls Tandem's exists."""

import importlib
import importlib.util
import re

import pytest

from rl.cli import COMMANDS
from rl.config.load import load_config
from rl.config.sections import flatten, to_dict
from tests.helpers.places import ROOT

PAGE = ROOT / "docs" / "from-maxtext.md"
KINDS = ("name", "file", "test", "flag")
# Of commit 3d17df04d: its files (below src/maxtext unless they are tests), the names that it adds or gives another
# signature, and its flag.
FILES = [
    "checkpoint_conversion/standalone_scripts/convert_gpt3_ckpt_from_paxml.py",
    "configs/base.yml",
    "configs/types.py",
    "experimental/rl/grpo_trainer.py",
    "inference/maxengine/maxengine.py",
    "layers/train_state_nnx.py",
    "trainers/post_train/sft/train_sft_deprecated.py",
    "trainers/pre_train/train.py",
    "trainers/pre_train/train_compile.py",
    "utils/generate_param_only_checkpoint.py",
    "utils/layerwise_quantization.py",
    "utils/lora_utils.py",
    "utils/maxtext_utils.py",
    "utils/maxtext_utils_nnx.py",
    "utils/model_creation_utils.py",
    "utils/standalone_checkpointer.py",
    "utils/standalone_dataloader.py",
    "utils/train_utils.py",
    "tests/assets/logits_generation/generate_grpo_golden_logits.py",
    "tests/post_training/integration/grpo_correctness.py",
    "tests/post_training/integration/grpo_trainer_correctness_test.py",
    "tests/post_training/integration/sft_trainer_correctness_test.py",
    "tests/unit/maxtext_utils_test.py",
    "tests/unit/model_creation_utils_test.py",
    "tests/unit/sharding_compare_test.py",
    "tests/unit/state_dtypes_test.py",
    "tests/unit/train_utils_test.py",
    "tests/utils/forward_pass_logit_checker.py",
]
NAMES = [
    "init_initial_state",
    "get_abstract_state",
    "get_logical_annotations",
    "setup_training_state",
    "setup_decode_state",
    "create_training_tools",
    "create_training_optimizer",
    "create_checkpoint_manager",
    "jit_train_step",
    "get_first_step",
    "get_shaped_inputs",
    "TrainStateNNX",
    "apply_gradients",
    "create_nnx_rngs",
    "get_named_sharding_nnx",
    "set_named_sharding_nnx",
    "get_partition_spec_nnx",
    "move_memory_to_host",
    "move_memory_to_device",
    "create_nnx_sharded_model",
    "create_nnx_abstract_model",
    "pure_nnx",
]


def table_rows() -> list[list[str]]:
    """The cells of every row of every table of the page."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


TANDEM = sorted({name for row in table_rows() for name in quoted(row[-1])})


def test_the_page_is_one_table_of_three_columns():
    header, rule, *rows = table_rows()
    assert header == ["kind", "MaxText", "Tandem"]
    assert set("".join(rule)) == {"-"}
    assert {row[0] for row in rows} == set(KINDS)
    for row in rows:
        assert len(row) == 3, row
        assert quoted(row[1]), row
        # What has no counterpart says so.
        assert quoted(row[2]) or row[2].startswith("none: "), row
    assert len({row[1] for row in rows}) == len(rows)


def test_every_name_file_and_flag_of_the_pull_request_is_in_it():
    there = {name.partition("(")[0] for row in table_rows() for name in quoted(row[1])}
    assert not [name for name in (*FILES, *NAMES) if name not in there]


@pytest.mark.parametrize("name", TANDEM)
def test_what_it_calls_tandems_exists(name):
    if name.startswith("rl."):
        assert_object_exists(name.partition("(")[0])
    elif name.startswith("grpo "):
        assert_command_exists(name.split()[1:])
    elif name.startswith("python -m "):
        assert importlib.util.find_spec(name.removeprefix("python -m ")) is not None
    elif "/" in name:
        assert (ROOT / name.removeprefix("python ")).exists()
    else:
        assert_key_exists(name)


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        assert link.startswith("https://") or (PAGE.parent / link).exists(), link


def assert_object_exists(dotted: str) -> None:
    parts = dotted.split(".")
    length = max(i for i in range(1, len(parts) + 1) if is_module(".".join(parts[:i])))
    found = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        found = getattr(found, part)


def is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:  # what is before its last part is no package
        return False


def assert_command_exists(words: list[str]) -> None:
    command = COMMANDS[words[0]]
    known = set(re.findall(r"[\w-]+", f"{command.arguments} {command.details}"))
    assert set(words[1:]) <= known, words


def assert_key_exists(name: str) -> None:
    """A key of the configuration, with a value that it takes, or a section as `section.*`."""
    if "=" in name:
        load_config(None, [name])
        return
    keys = flatten(to_dict(load_config(None)))
    start = name.removesuffix("*")
    assert name in keys or any(key.startswith(f"{start.rstrip('.')}.") for key in keys), name
