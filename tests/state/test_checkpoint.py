"""Checkpoints: one layout for both flavours and every mesh, checked before a restore, safe when the disk is full."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models.config import LoRAConfig, ModelConfig
from rl.models.flavours import policy_from_config
from rl.models.lora import split
from rl.state.checkpoint import DamagedCheckpointError, create_checkpoint_manager, from_tree, to_tree
from rl.state.checkpoint_files import damaged_files, write_hashes
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn, get_abstract_state
from tests.helpers.places import ROOT

SHAPE = ModelConfig.from_arch("qwen2", 24, 16, 32, 1, 4, 2, 8)
WITH_ADAPTERS = dataclasses.replace(SHAPE, lora=LoRAConfig(rank=2, alpha=4.0, targets=("*_proj",)))
DEEPER = ModelConfig.from_arch("qwen2", 24, 16, 32, 2, 4, 2, 8)
LOOP = {"step": 7, "entropy": {"coef": 0.1, "last_entropy": float("inf")}, "flavour": "nnx"}


def loop_of(step):
    return {**LOOP, "step": step}


def setup(folder, *overrides, shape=SHAPE, devices=None):
    """(config, mesh, init_state_fn) of a run in `folder`."""
    config = load_config(None, [f"output_dir={folder}", *overrides])
    policy = policy_from_config(config, shape)
    _, optimizer = create_training_optimizer(config, policy)
    return config, create_mesh(config.mesh, devices), InitStateFn(policy, optimizer, 0)


def open_checkpoints(folder, *overrides, read_only=False, warn=None, **arguments):
    abstract = abstract_of(overrides, **arguments)
    return create_checkpoint_manager(*setup(folder, *overrides, **arguments), read_only, abstract=abstract, warn=warn)


@functools.cache
def abstract_of(overrides, **arguments):
    return get_abstract_state(*setup("of_no_importance", *overrides, **arguments))


def state_of(abstract, salt=0.0):
    """A state in which every number is its own: a value at the wrong place cannot go unseen."""
    leaves, tree = jax.tree.flatten(abstract.shapes)
    shardings = jax.tree.leaves(abstract.shardings)
    values = [
        (np.sin(np.arange(1, leaf.size + 1) * (i + 1) + salt) * 1000).reshape(leaf.shape).astype(leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return tree.unflatten([jax.device_put(value, where) for value, where in zip(values, shardings, strict=True)])


def host(state):
    return jax.tree.map(np.array, state)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def write(folder, step, *overrides, salt=0.0, **arguments):
    """Writes one checkpoint; returns its numbers."""
    checkpoints = open_checkpoints(folder, *overrides, **arguments)
    state = state_of(checkpoints.abstract, salt)
    numbers = host(state)
    checkpoints.save(step, state, loop_of(step))
    checkpoints.close()
    return numbers


def steps_in(folder):
    return sorted(int(entry.name) for entry in (folder / "checkpoints").iterdir() if entry.name.isdecimal())


# What comes back


@pytest.mark.parametrize(("written_by", "read_by"), [("true", "false"), ("false", "true")])
def test_one_flavour_reads_what_the_other_wrote_bit_for_bit(tmp_path, written_by, read_by):
    numbers = write(tmp_path, 7, f"pure_nnx={written_by}")
    checkpoints = open_checkpoints(tmp_path, f"pure_nnx={read_by}")
    state, loop = checkpoints.restore()
    checkpoints.close()
    assert loop == LOOP
    assert_equal(host(state), numbers)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert all(np.any(leaf) for leaf in moments)
    assert np.any(state.rng)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_are_read_without_the_moments(tmp_path, optimizer):
    settings = f"optimizer.name={optimizer}", "optimizer.weight_decay=0"
    numbers = write(tmp_path, 7, *settings)
    checkpoints = open_checkpoints(tmp_path, *settings, read_only=True)
    before = {id(array) for array in jax.live_arrays()}
    params, rng = checkpoints.restore_weights()
    read = [array for array in jax.live_arrays() if id(array) not in before]
    checkpoints.close()
    assert_equal(host(params), numbers.params)
    np.testing.assert_array_equal(rng, numbers.rng)
    sizes = [leaf.nbytes for leaf in (*jax.tree.leaves(numbers.params), numbers.rng)]
    assert sum(array.nbytes for array in read) <= sum(sizes) + 8  # and the number of the step


@pytest.mark.matrix
@pytest.mark.parametrize("pure_nnx", ["true", "false"])
@pytest.mark.parametrize("shape", [SHAPE, WITH_ADAPTERS], ids=["whole", "adapters"])
def test_a_state_without_optimizer_reads_what_any_optimizer_wrote_beside(tmp_path, pure_nnx, shape):
    numbers = write(tmp_path, 7, "optimizer.name=adafactor", f"pure_nnx={pure_nnx}", shape=shape)
    config, mesh, init_state_fn = setup(tmp_path, "optimizer.name=sgd", f"pure_nnx={pure_nnx}", shape=shape)
    decoding = dataclasses.replace(init_state_fn, optimizer=None)
    checkpoints = create_checkpoint_manager(config, mesh, decoding, read_only=True)
    assert checkpoints.abstract.shapes.opt_state == ()
    base = split(shape, numbers.params)[1] if shape.lora else None
    params, rng = checkpoints.restore_weights(7, base)
    assert_equal(host(params), numbers.params)
    np.testing.assert_array_equal(rng, numbers.rng)
    with pytest.raises(ValueError, match=r"the arrays of .*: unexpected \['opt_state'\]"):
        checkpoints.restore(7, base)  # a whole state needs the optimizer that wrote it
    checkpoints.close()


def test_both_flavours_write_the_same_paths(tmp_path):
    listings = []
    for flavour in ("true", "false"):
        write(tmp_path / flavour, 7, f"pure_nnx={flavour}")
        metadata = json.loads((tmp_path / flavour / "checkpoints" / "7" / "state" / "_METADATA").read_text())
        listings.append(sorted(metadata["tree_metadata"]))
    assert listings[0] == listings[1]
    text = " ".join(listings[0])
    for path in ("params", "opt_state", "step", "rng", "layers_0", "q_proj"):
        assert path in text


@pytest.mark.parametrize(
    ("overrides", "num_devices"), [(("mesh.data=8", "mesh.fsdp=1"), 8), (("mesh.fsdp=4", "mesh.tensor=2"), 8), ((), 1)]
)
def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path, overrides, num_devices):
    numbers = write(tmp_path, 7, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    checkpoints = open_checkpoints(tmp_path, *overrides, devices=tuple(jax.devices()[:num_devices]))
    state, _ = checkpoints.restore()
    checkpoints.close()
    assert_equal(host(state), numbers)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == checkpoints.abstract.shardings


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    state = state_of(checkpoints.abstract)
    numbers = host(state)
    checkpoints.save(1, state, loop_of(1))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    checkpoints.wait()
    assert_equal(host(checkpoints.restore()[0]), numbers)
    checkpoints.close()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "sgd"])
def test_the_layout_has_no_empty_part_and_loses_nothing(tmp_path, optimizer):
    abstract = get_abstract_state(*setup(tmp_path, f"optimizer.name={optimizer}"))
    state = state_of(abstract)
    tree = to_tree(state)
    assert set(tree) == {"step", "params", "opt_state", "rng"}

    def no_empty_dict(part):
        return not isinstance(part, dict) or (part and all(no_empty_dict(child) for child in part.values()))

    assert no_empty_dict(tree)
    assert_equal(from_tree(tree, abstract.shapes), state)


# Which checkpoints there are


def test_the_newest_checkpoints_are_kept_and_none_leaves_memory_behind(tmp_path, monkeypatch):
    returned = []
    monkeypatch.setattr("rl.state.checkpoint.return_freed", lambda: returned.append(True))
    checkpoints = open_checkpoints(tmp_path, "checkpoint.keep=2")
    assert checkpoints.latest_step is None
    for step in (2, 4, 6, 10):
        checkpoints.save(step, state_of(checkpoints.abstract, salt=step), {"step": step})
    checkpoints.wait()
    assert len(returned) == 4
    assert checkpoints.latest_step == 10
    checkpoints.close()
    assert steps_in(tmp_path) == [6, 10]
    checkpoints = open_checkpoints(tmp_path)
    for step in (None, 10, 6):
        state, loop = checkpoints.restore(step)
        assert loop == {"step": step or 10}
        assert_equal(host(state), host(state_of(checkpoints.abstract, salt=step or 10)))
    with pytest.raises(ValueError, match=r"must hold checkpoint 4, got steps \[6, 10\]"):
        checkpoints.restore(4)
    checkpoints.close()


def test_a_step_is_saved_once(tmp_path):
    numbers = write(tmp_path, 3)
    write(tmp_path, 3, salt=1.0)
    checkpoints = open_checkpoints(tmp_path)
    assert_equal(host(checkpoints.restore()[0]), numbers)
    checkpoints.close()


def test_restoring_from_an_empty_folder_is_refused(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"must hold checkpoint None, got steps \[\]"):
        checkpoints.restore()
    checkpoints.close()


def test_a_half_written_checkpoint_is_none_and_is_removed_by_the_next_writer_only(tmp_path):
    numbers = write(tmp_path, 3)
    half = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    reader = open_checkpoints(tmp_path, read_only=True)
    assert reader.latest_step == 3
    assert_equal(host(reader.restore()[0]), numbers)
    reader.close()
    assert half.exists()  # a run may be writing it
    writer = open_checkpoints(tmp_path)
    assert writer.latest_step == 3
    writer.save(5, state_of(writer.abstract, salt=5.0), loop_of(5))
    writer.close()
    assert steps_in(tmp_path) == [3, 5]
    assert not half.exists()


def test_a_reader_creates_nothing(tmp_path):
    reader = open_checkpoints(tmp_path / "nowhere", read_only=True)
    assert reader.latest_step is None
    reader.close()
    assert list(tmp_path.iterdir()) == []


# Checkpoints that do not fit, or are damaged


def test_a_checkpoint_of_another_model_names_the_paths(tmp_path):
    write(tmp_path / "small", 7)
    write(tmp_path / "deep", 7, shape=DEEPER)
    checkpoints = open_checkpoints(tmp_path / "small", shape=DEEPER)
    with pytest.raises(ValueError, match=r"the weights of .*checkpoints/7 do not fit the model: ") as error:
        checkpoints.restore()
    assert "missing ['layers_1']['input_layernorm']['scale']" in str(error.value)
    checkpoints.close()
    checkpoints = open_checkpoints(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"unexpected \['layers_1'\]\['input_layernorm'\]"):
        checkpoints.restore()
    checkpoints.close()


def test_misshapen_arrays_are_named_with_both_shapes(tmp_path):
    wider = ModelConfig.from_arch("qwen2", 24, 16, 48, 1, 4, 2, 8)
    write(tmp_path, 7, "optimizer.name=sgd")
    checkpoints = open_checkpoints(tmp_path, "optimizer.name=sgd", shape=wider)
    message = r"\['layers_0'\]\['mlp'\]\['up_proj'\]\['kernel'\] must be float32\[16, 48\], got float32\[16, 32\]"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore()
    checkpoints.close()


def test_another_parameter_dtype_is_not_converted_in_silence(tmp_path):
    write(tmp_path, 7, "optimizer.name=sgd")
    half = ModelConfig.from_arch("qwen2", 24, 16, 32, 1, 4, 2, 8, param_dtype="bfloat16")
    checkpoints = open_checkpoints(tmp_path, "optimizer.name=sgd", shape=half)
    with pytest.raises(ValueError, match=r"\['embedding'\] must be bfloat16\[24, 16\], got float32\[24, 16\]"):
        checkpoints.restore()
    checkpoints.close()


def test_a_checkpoint_of_another_optimizer_never_leaves_moments_at_zero(tmp_path):
    write(tmp_path, 7, "optimizer.name=sgd")
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"missing \['opt_state'\].*\['mu'\]"):
        checkpoints.restore()
    checkpoints.close()


# Files that are not those that were written


def flip_a_bit(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    checkpoints = open_checkpoints(folder)
    for step in (3, 5):
        checkpoints.save(step, state_of(checkpoints.abstract, salt=step), loop_of(step))
    checkpoints.close()
    return folder


@pytest.fixture
def copied(two_steps, tmp_path):
    """A copy of the run that may be damaged."""
    return pathlib.Path(shutil.copytree(two_steps, tmp_path / "run"))


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_no_file_of_a_checkpoint_can_change_unseen(two_steps, tmp_path):
    whole = two_steps / "checkpoints" / "5"
    assert damaged_files(whole) == []
    step = tmp_path / "5"
    names = files_of(whole)
    assert {"_CHECKPOINT_METADATA", "loop/metadata", "state/_METADATA", "hashes.json"} < set(names)
    damages = {
        "is damaged": flip_a_bit,
        "is damaged: it": lambda path: os.truncate(path, path.stat().st_size // 2),
        "is missing": pathlib.Path.unlink,
    }
    shutil.copytree(whole, step)
    for name in names:
        for told, damage in damages.items():
            damage(step / name)
            found = damaged_files(step)
            if (name, told) == ("hashes.json", "is missing"):
                assert found is None  # as of an older version, which is said
            else:
                (problem,) = found
                assert problem.startswith(f"{step / name} {told}")
            shutil.copy(whole / name, step / name)


def test_no_byte_of_the_list_of_hashes_can_change_unseen(tmp_path):
    (tmp_path / "one").write_text("content")
    write_hashes(tmp_path)
    path = tmp_path / "hashes.json"
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert damaged_files(tmp_path) == [f"{path} is damaged: it is not what was written"], position


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "loop/metadata", "_CHECKPOINT_METADATA", "hashes.json"])
def test_a_run_sets_a_damaged_checkpoint_aside_and_goes_on_from_the_one_before(copied, name):
    folder = copied / "checkpoints"
    flip_a_bit(folder / "5" / name)
    (folder / "5.damaged").mkdir()  # of an earlier time
    before = {path: (folder / "5" / path).read_bytes() for path in files_of(folder / "5")}
    reader_said, said = [], []
    reader = open_checkpoints(copied, read_only=True, warn=reader_said.append)
    params, _ = reader.restore_weights()
    assert_equal(host(params), host(state_of(reader.abstract, salt=3).params))
    assert reader.restored_step == 3
    with pytest.raises(DamagedCheckpointError, match=f"checkpoint {folder}/5 must be whole, and {folder}/5/{name} is"):
        reader.restore_weights(5)
    reader.close()
    assert steps_in(copied) == [3, 5]  # a reader changes nothing
    writer = open_checkpoints(copied, warn=said.append)
    assert writer.latest_step == 5
    state, _ = writer.restore()
    assert_equal(host(state), host(state_of(writer.abstract, salt=3)))
    assert writer.latest_step == 3
    writer.save(5, state_of(writer.abstract, salt=6), loop_of(5))
    assert_equal(host(writer.restore()[0]), host(state_of(writer.abstract, salt=6)))
    writer.close()
    assert steps_in(copied) == [3, 5]
    assert before == {path: (folder / "5.damaged.2" / path).read_bytes() for path in files_of(folder / "5.damaged.2")}
    told = f"checkpoint {folder}/5 is DAMAGED and is not used: {folder}/5/{name} is damaged: it is not what was written"
    taken = "checkpoint 3 is taken in its place"
    assert reader_said == [f"{told}; {taken}"]
    assert said == [f"{told}; it is now {folder}/5.damaged.2; {taken}"]


def test_where_no_checkpoint_is_whole_all_stay_and_nothing_begins(copied):
    for step in (3, 5):
        flip_a_bit(copied / "checkpoints" / str(step) / "loop" / "metadata", 0)
    checkpoints = open_checkpoints(copied)
    with pytest.raises(ValueError, match=r"is whole, and of steps \[3, 5\] none is: .*/5/loop/metadata is damaged"):
        checkpoints.restore()
    checkpoints.close()
    assert steps_in(copied) == [3, 5]


@pytest.mark.parametrize("damage", ["is missing, which an earlier step has", "is damaged: it is no file"])
def test_a_step_that_lost_its_list_of_hashes_is_damaged(copied, damage):
    path = copied / "checkpoints" / "5" / "hashes.json"
    path.unlink()
    if "no file" in damage:
        path.mkdir()
    assert damaged_files(path.parent) == [f"{path} {damage}"]
    said = []
    checkpoints = open_checkpoints(copied, warn=said.append)
    checkpoints.restore()
    assert (checkpoints.restored_step, checkpoints.latest_step) == (3, 3)
    checkpoints.close()
    assert steps_in(copied) == [3]
    assert f"5 is DAMAGED and is not used: {path} {damage}" in said[0]


@pytest.mark.parametrize("version", ["without hashes", "with hashes of some files"])
def test_checkpoints_of_older_versions_are_read_with_a_line_about_it(copied, version):
    path = copied / "checkpoints" / "5" / "hashes.json"
    hashes = json.loads(path.read_text())
    for step in (3, 5):
        (copied / "checkpoints" / str(step) / "hashes.json").unlink()
    if version == "with hashes of some files":
        names = [name for name in hashes["files"] if name.startswith("state/")]
        some = {name: hashlib.sha256((path.parent / name).read_bytes()).hexdigest() for name in names}
        path.write_text(json.dumps({"algorithm": "sha256", "files": some}))
    said = []
    checkpoints = open_checkpoints(copied, read_only=True, warn=said.append)
    state, _ = checkpoints.restore()
    assert_equal(host(state), host(state_of(checkpoints.abstract, salt=5)))
    assert len(said) == 1
    assert "is not compared as a whole with what was written" in said[0]
    checkpoints.close()


@pytest.mark.parametrize("verify", ["true", "false"])
def test_a_step_under_the_name_of_another_is_damage_and_the_run_saves_what_it_trains_after_it(copied, verify):
    folder, said = copied / "checkpoints", []
    (folder / "5").rename(folder / "9")
    writer = open_checkpoints(copied, f"checkpoint.verify={verify}", warn=said.append)
    writer.restore()
    assert (writer.restored_step, writer.latest_step) == (3, 3)
    writer.save(5, state_of(writer.abstract, salt=6), loop_of(5))
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["3", "5", "9.damaged"]
    assert f"{folder}/9 holds step 5: it was renamed, or put in the place of another" in said[0]


def test_a_save_that_saves_nothing_is_an_error(copied):
    writer = open_checkpoints(copied)
    with pytest.raises(ValueError, match=r"checkpoint 4 must be newer than every other in .* there is 5, so nothing"):
        writer.save(4, state_of(writer.abstract), loop_of(4))
    writer.close()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(json.dumps({"run": name}))
        for step in (3, 5):
            write(folder / name, step)
    return folder


@pytest.fixture
def runs(two_runs, tmp_path):
    """Two runs with ids, each with steps 3 and 5, that may be damaged."""
    return tuple(pathlib.Path(shutil.copytree(two_runs / name, tmp_path / name)) for name in ("one", "two"))


def test_a_checkpoint_of_another_run_is_damage(runs):
    one, two = runs
    shutil.rmtree(one / "checkpoints" / "5")
    shutil.copytree(two / "checkpoints" / "5", one / "checkpoints" / "5")
    told = f"{one}/checkpoints/5 is of another run: its id is two, that of run.json is one"
    assert damaged_files(one / "checkpoints" / "5") == [told]
    said = []
    reader = open_checkpoints(one, read_only=True, warn=said.append)
    reader.restore_weights()
    reader.close()
    assert reader.restored_step == 3
    assert told in said[0]
    (two / "run.json").write_text("{}")  # as of an older version, which wrote no such steps
    assert damaged_files(two / "checkpoints" / "5") == [
        f"{two}/checkpoints/5 is of another run: its id is two, that of run.json is None"
    ]


def test_a_run_with_an_id_has_no_step_without_hashes(runs):
    one, _ = runs
    for path in one.glob("checkpoints/*/hashes.json"):
        path.unlink()
    reader = open_checkpoints(one, read_only=True)
    with pytest.raises(ValueError, match=r"none is: .*/5/hashes\.json is missing, which every step of this run has"):
        reader.restore_weights()
    reader.close()


def test_an_older_run_that_goes_on_has_steps_of_both_kinds(runs):
    one, _ = runs
    (one / "run.json").write_text("{}")
    (one / "checkpoints" / "3" / "hashes.json").unlink()
    shutil.rmtree(one / "checkpoints" / "5")
    write(one, 5)
    said = []
    reader = open_checkpoints(one, read_only=True, warn=said.append)
    reader.restore_weights()
    assert (reader.restored_step, said) == (5, [])
    reader.restore_weights(3)
    reader.close()
    assert "is not compared as a whole with what was written" in said[0]


def test_comparing_can_be_switched_off(copied):
    flip_a_bit(copied / "checkpoints" / "5" / "state" / "commit_success.txt")
    checkpoints = open_checkpoints(copied, "checkpoint.verify=false", read_only=True)
    checkpoints.restore()
    assert checkpoints.restored_step == 5
    checkpoints.close()


# Disk space


def bytes_of(abstract):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.shapes))


def on_disk(folder):
    return sum(max(path.stat().st_size, path.stat().st_blocks * 512) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(monkeypatch):
    """The free bytes of a disk that a test may change."""
    free = {"bytes": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 40, 0, free["bytes"]))
    return free


def test_disk_space_is_estimated_for_the_first_checkpoint_and_measured_from_then_on(tmp_path, disk):
    checkpoints = open_checkpoints(tmp_path, "checkpoint.keep=2")
    with pytest.raises(
        ValueError, match=r"needs about .* kB free for 2 \+ 1 checkpoints of .*, got 0 bytes; .*lower checkpoint\.keep"
    ) as error:
        checkpoints.check_disk_space()
    estimate = float(re.search(r"checkpoints of ([0-9.]+) kB", str(error.value))[1]) * 1e3
    disk["bytes"] = 1 << 30
    checkpoints.check_disk_space()
    checkpoints.save(1, state_of(checkpoints.abstract), loop_of(1))
    checkpoints.wait()
    size = on_disk(tmp_path / "checkpoints" / "1")
    assert min(size, estimate) > 1.5 * bytes_of(checkpoints.abstract)  # small files take whole blocks
    disk["bytes"] = 2 * size  # two are kept, of which one is there, and one is being written
    checkpoints.check_disk_space()
    disk["bytes"] -= 1
    with pytest.raises(ValueError, match="free some space"):
        checkpoints.check_disk_space()
    checkpoints.close()


def test_a_checkpoint_without_room_is_not_begun(copied, disk):
    checkpoints = open_checkpoints(copied)
    disk["bytes"] = max(on_disk(copied / "checkpoints" / step) for step in "35") - 1
    with pytest.raises(ValueError, match=r"the next checkpoint needs .* kB in .*/checkpoints, and .* kB are free; the"):
        checkpoints.save(7, state_of(checkpoints.abstract), loop_of(7))
    disk["bytes"] += 1
    checkpoints.save(7, state_of(checkpoints.abstract), loop_of(7))
    checkpoints.close()
    assert steps_in(copied) == [5, 7]


# In a process of its own: for the limit, and because Orbax leaves threads and warnings behind where it fails.
IN_TROUBLE = """
import os, pathlib, resource, shutil, sys
sys.path.insert(0, ".")
from rl.run.metrics import MetricsWriter
from rl.tools.checkpoints.export import FORMATS
from tests.state.test_checkpoint import SHAPE, bytes_of, loop_of, open_checkpoints, state_of

folder = pathlib.Path(sys.argv[1])
checkpoints = open_checkpoints(folder / "run")
size = bytes_of(checkpoints.abstract)

def told(what, call):
    try:
        call()
    except ValueError as error:
        print(what, error, sep=": ")

def limit(number):
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))

limit(size - 1)
told("limit", checkpoints.check_disk_space)
limit(size)
checkpoints.check_disk_space()
checkpoints.save(1, state_of(checkpoints.abstract), loop_of(1))
checkpoints.wait()

def contents(checkpoint):
    # All of them: which file holds which array is decided by how fast each was written.
    paths = [path for path in checkpoint.rglob("d/*") if path.is_file()]
    assert paths
    return paths

damages = {
    "cut": lambda checkpoint: [os.truncate(path, path.stat().st_size // 2) for path in contents(checkpoint)],
    "deleted": lambda checkpoint: [path.unlink() for path in contents(checkpoint)],
    "no record": lambda checkpoint: (checkpoint / "loop" / "metadata").unlink(),
}
for name, damage in damages.items():
    shutil.copytree(folder / "run", folder / name)
    damage(folder / name / "checkpoints" / "1")
    (folder / name / "checkpoints" / "1" / "hashes.json").unlink()
    told(name, open_checkpoints(folder / name).restore)

metrics = MetricsWriter(folder, 1)
params = state_of(checkpoints.abstract).params
limit(2000)
told("save", lambda: (checkpoints.save(2, state_of(checkpoints.abstract, salt=2.0), loop_of(2)), checkpoints.wait()))
limit(10)
told("metrics", lambda: metrics.write({"step": 1}))
metrics.close()
for kind, write in FORMATS.items():
    told(kind, lambda: write(folder / kind, SHAPE, params))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """The folder of a run that met every trouble, and what it was told each time."""
    folder = tmp_path_factory.mktemp("trouble")
    command = [sys.executable, "-c", IN_TROUBLE, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return folder, dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)


def test_a_file_size_limit_below_the_size_of_the_state_is_refused_at_the_start(trouble):
    message = trouble[1]["limit"]
    assert re.match(r"files may be at most [0-9.]+ kB here \(ulimit -f\), a checkpoint of [0-9.]+ kB ", message)
    assert message.endswith("raise the limit")


@pytest.mark.parametrize(("what", "name"), [("metrics", "metrics.jsonl"), ("huggingface",) * 2, ("params",) * 2])
def test_a_disk_that_takes_no_more_is_one_line_whatever_was_written(trouble, what, name):
    folder, told = trouble
    assert told[what].startswith(f"{folder / name} could not be written: File too large; make room or choose another")
    assert not (folder / name).is_dir()


@pytest.mark.parametrize("damage", ["cut", "deleted", "no record"])
def test_a_damaged_checkpoint_is_refused_with_a_way_out(trouble, damage):
    folder, told = trouble
    assert told[damage].startswith(f"checkpoint {folder}/{damage}/checkpoints/1 must be whole, but it cannot be read (")
    assert told[damage].endswith("remove that folder, and the run goes on from the checkpoint before it")


def test_a_write_that_fails_says_so_and_leaves_older_checkpoints_valid(trouble):
    folder, told = trouble[0] / "run", trouble[1]
    assert told["save"].startswith(f"a checkpoint could not be written to {folder}/checkpoints: File too large; the ")
    assert told["save"].endswith("start the same command again to go on from the newest of them")
    checkpoints = open_checkpoints(folder)
    assert checkpoints.latest_step == 1
    state, loop = checkpoints.restore()
    assert loop == loop_of(1)
    assert_equal(host(state), host(state_of(checkpoints.abstract)))
    checkpoints.save(2, state_of(checkpoints.abstract, salt=2.0), loop_of(2))
    checkpoints.close()
    assert steps_in(folder) == [1, 2]
