"""Whose code a run folder names: signed, checked by every command before any of it runs, and trusted when told so."""

import json
import os
import pathlib
import re
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.run_folder.folder import RunFolder, check_trust
from rl.run_folder.trust import READY_MADE, TO_EVALUATE, TO_READ, TO_SAMPLE, TO_TRAIN, code_of, untrusted
from rl.state.checkpoint_files import write_hashes
from rl.tools.checkpoints.convert import upgrade_run
from rl.tools.data import bench
from tests.helpers.places import ROOT

REFUSAL = "names code that is not shown to be yours: "


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Where the key of this test is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def code(tmp_path):
    """A file that leaves a trace where it is imported, and then fails."""
    path = tmp_path / "code" / "own.py"
    path.parent.mkdir()
    path.write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise RuntimeError('was run')\n")
    return path


def rewards(*functions):
    return "rewards.functions=[" + ", ".join(f"{{function: {name!r}}}" for name in functions) + "]"


def make_run(folder, *overrides, kind="grpo"):
    config = load_config(None, [f"output_dir={folder}", *overrides])
    run = RunFolder(config, kind, {"policy": {"source": config.model.source}, "data": "0 rows"})
    run.begin()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (folder / "checkpoints" / "1" / "state").mkdir(parents=True)
    write_hashes(folder / "checkpoints" / "1")
    run.recorded()
    run.close()
    return config


def problem_of(folder, *overrides, kinds=TO_EVALUATE):
    """What a command would say about a run folder; None where it would go on."""
    try:
        check_trust(folder, load_config(folder / "config.yml", overrides), overrides, kinds)
    except ValueError as error:
        beginning, _, problem = str(error).partition(REFUSAL)
        return problem if beginning and problem.endswith("look at that code, then say --trust to run it") else "?"
    return None


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record, indent=2) + "\n")


# The signature


def test_a_new_run_is_signed_with_a_key_that_only_the_user_can_read(tmp_path, state, code):
    make_run(tmp_path / "run", rewards(f"{code}:score"))
    key = state / "tandem" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    assert problem_of(tmp_path / "run") is None
    make_run(tmp_path / "second", rewards(f"{code}:score"))
    assert problem_of(tmp_path / "run") is None  # with the same key
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert problem_of(tmp_path / "moved") is None


def test_a_key_is_made_once_by_whoever_comes_first(tmp_path):
    config = load_config(None)

    def sign(number):
        (tmp_path / str(number)).mkdir()
        return RunFolder(load_config(None, [f"output_dir={tmp_path / str(number)}"]), "grpo", {"policy": {}}).begin()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sign, range(8)))
    records = [json.loads((tmp_path / str(number) / "run.json").read_text()) for number in range(8)]
    assert all(untrusted(tmp_path / str(number), records[number], code_of(config)) is None for number in range(8))


TAMPERING = {
    "no HMAC": (lambda run, code: edit(run / "run.json", lambda record: record.pop("hmac")), "run.json has no HMAC"),
    "an HMAC of somebody": (
        lambda run, code: edit(run / "run.json", lambda record: record.update(hmac="0" * 64)),
        "is not one of the key",
    ),
    "an HMAC that is no ASCII": (
        lambda run, code: edit(run / "run.json", lambda record: record.update(hmac="\u00e4")),
        "is not one of the key",
    ),
    "another identity": (
        lambda run, code: edit(run / "run.json", lambda record: record.update(data="1 row")),
        "is not one of the key",
    ),
    "another hash of a file": (
        lambda run, code: edit(run / "run.json", lambda record: record["files"].update({f"{code}:score": "0" * 64})),
        "is not one of the key",
    ),
    "run.json is gone bad": (lambda run, code: (run / "run.json").write_text("[" * 9999), "run.json cannot be read"),
    "another config.yml": (
        lambda run, code: (run / "config.yml").write_text((run / "config.yml").read_text() + "\n"),
        "config.yml has changed since run.json was signed",
    ),
    "another file": (
        lambda run, code: code.write_text("evil"),
        "own.py:score' is not, or cannot be shown to be, what it was",
    ),
    "no file": (lambda run, code: code.unlink(), "own.py:score' is not, or cannot be shown to be, what it was"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_a_run_folder_that_was_changed_is_not_trusted(tmp_path, code, name):
    change, message = TAMPERING[name]
    make_run(tmp_path / "run", rewards(f"{code}:score", READY_MADE[0]))
    change(tmp_path / "run", code)
    problem = problem_of(tmp_path / "run")
    assert problem is not None
    assert message.replace("own.py:score'", "own.py:score") in problem
    assert f"It would run rewards.functions '{code}:score' ({code})" in problem
    assert READY_MADE[0] not in problem
    if name != "another config.yml":  # which is refused whatever runs
        assert problem_of(tmp_path / "run", kinds=TO_SAMPLE) is None  # which runs no reward


def test_a_key_that_others_can_read_or_that_is_no_key_shows_nothing(tmp_path, state, code):
    make_run(tmp_path / "run", rewards(f"{code}:score"))
    key = state / "tandem" / "key"
    for change, message in (
        (lambda: key.chmod(0o644), "must be a file of this user that no other can read; chmod 600 it"),
        (lambda: (key.chmod(0o600), key.write_bytes(b"short")), "must be 32 bytes, got 5; remove it"),
        (lambda: key.write_bytes(bytes(32)), "is not one of the key"),
        (lambda: key.unlink(), "its HMAC cannot be checked: the key .* cannot be read"),
    ):
        change()
        assert re.search(message, problem_of(tmp_path / "run") or "")
    assert not key.exists()  # reading makes none


def test_where_no_key_can_be_kept_the_run_goes_on_and_says_so(tmp_path, monkeypatch, code):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    config = load_config(None, [f"output_dir={tmp_path / 'run'}", rewards(f"{code}:score")])
    run = RunFolder(config, "grpo", {"policy": {"source": None}})
    run.begin()
    (message,) = run.messages
    assert message.startswith("run.json is not signed, so commands that read this run will want --trust: the key ")
    run.close()
    quiet = RunFolder(load_config(None, [f"output_dir={tmp_path / 'quiet'}"]), "grpo", {"policy": {"source": None}})
    quiet.begin()
    assert quiet.messages == []  # it names no code
    quiet.close()


# What names code, and where it lies


def test_code_is_found_without_being_imported(tmp_path, monkeypatch, code):
    package = tmp_path / "some_package"
    package.mkdir()
    for name in ("__init__.py", "inner.py"):
        (package / name).write_text(code.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(
        None,
        [
            rewards(
                "some_package.inner:f",
                "no_such_package.inner:f",
                "json.no_such:f",
                "rewards.number:re.sub",
                READY_MADE[1],
            ),
            f"model.source={code}:build",
            f"grpo.loss_type={code}:loss",
            f"grpo.advantage_estimator={code}:advantage",
            f"sampling.source={code}:source",
            "logging.compilation_cache=~/cache",
            f"logging.trackers=['{code}:make_tracker', wandb, mlflow]",
            "logging.tracker_args.mlflow.tracking_uri=http://127.0.0.1",  # which hears what the run says
        ],
    )
    programs = load_config(None, ["compiled_file=programs.bin"])
    games = f"{{game: '{code}:Game', server: 'openenv:http://127.0.0.1:8000', other: 'textarena:Sudoku-v0'}}"
    data = "data.source=arithmetic"
    turns = load_config(None, [data, f"rollout.environment={games}", f"rollout.tools=['{code}:add']"])
    codes = [*code_of(config), *code_of(programs), *code_of(turns)]
    found = {(each.key, each.name.rpartition("/")[2]): each.file for each in codes}
    assert found == {
        ("rewards.functions", "some_package.inner:f"): package / "inner.py",
        ("rewards.functions", "no_such_package.inner:f"): None,
        ("rewards.functions", "json.no_such:f"): None,
        ("rewards.functions", "rewards.number:re.sub"): ROOT / "rewards" / "number.py",
        ("model.source", "own.py:build"): code,
        ("grpo.loss_type", "own.py:loss"): code,
        ("grpo.advantage_estimator", "own.py:advantage"): code,
        ("sampling.source", "own.py:source"): code,
        ("rollout.environment", "own.py:Game"): code,
        ("rollout.environment", "127.0.0.1:8000"): ROOT / "rewards" / "openenv_environment.py",
        ("rollout.tools", "own.py:add"): code,
        ("compiled_file", "programs.bin"): pathlib.Path.cwd() / "programs.bin",
        ("logging.compilation_cache", "cache"): pathlib.Path.home() / "cache",
        ("logging.trackers", "own.py:make_tracker"): code,
        ("logging.trackers", "mlflow"): ROOT / "rl" / "run" / "trackers" / "to_mlflow.py",
    }
    assert not (tmp_path / "imported").exists()


def test_every_ready_made_reward_is_one_and_needs_no_trust(tmp_path):
    from rewards.importing import import_function

    assert all(callable(import_function(name, "it")) for name in READY_MADE)
    make_run(tmp_path / "run", rewards(*READY_MADE))
    edit(tmp_path / "run" / "run.json", lambda record: record.pop("hmac"))
    assert problem_of(tmp_path / "run") is None


def test_code_in_the_run_folder_itself_is_never_trusted(tmp_path, monkeypatch, code):
    """A helper module or compiled bytecode beside it could be anybody's."""
    folder = tmp_path / "run"
    monkeypatch.chdir(code.parent)
    make_run(folder, rewards("own.py:score"))
    assert problem_of(folder) is None
    (folder / "own.py").write_bytes(code.read_bytes())
    monkeypatch.chdir(folder)
    assert "own.py:score lies in the run folder itself" in (problem_of(folder) or "")


def test_what_the_command_line_names_is_the_users_own_word(tmp_path, code):
    make_run(tmp_path / "run", rewards(READY_MADE[0]))
    edit(tmp_path / "run" / "run.json", lambda record: record.pop("hmac"))
    assert problem_of(tmp_path / "run", rewards(f"{code}:score")) is None
    assert problem_of(tmp_path / "run", f"rewards={{functions: [{{function: '{code}:score'}}]}}") is None
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"rewards: {{functions: [{{function: '{code}:score'}}]}}\n")
    check_trust(recipe, load_config(recipe), ())
    # The configuration of a folder that hides its run.json is no recipe.
    strange = tmp_path / "strange"
    (strange / "checkpoints" / "1").mkdir(parents=True)
    os.rename(recipe, strange / "config.yml")
    assert "run.json cannot be read" in _of_recipe(strange)


@pytest.mark.parametrize(
    "override", ["rewards={num_workers: 1}", "rewards={}", "grpo={beta: 0}", "model={dtype: float32}", "logging={}"]
)
def test_a_section_on_the_command_line_is_no_word_for_the_keys_that_it_leaves_out(tmp_path, code, override):
    make_run(tmp_path / "run", *all_code(code))
    edit(tmp_path / "run" / "run.json", lambda record: record.pop("hmac"))
    said = problem_of(tmp_path / "run", override, kinds=TO_TRAIN) or ""
    for key in ("rewards.functions", "model.source", "grpo.loss_type", "logging.compilation_cache"):
        assert f"{key} '" in said


def all_code(code):
    return (
        rewards(f"{code}:score"),
        f"model.source={code}:build",
        f"grpo.loss_type={code}:loss",
        f"logging.compilation_cache={code.parent}",
    )


def _of_recipe(folder):
    with pytest.raises(ValueError, match=REFUSAL) as error:
        check_trust(folder / "config.yml", load_config(folder / "config.yml"), ())
    return str(error.value)


# A run that goes on


def test_a_resumed_run_is_signed_with_its_first_step(tmp_path, code):
    folder, settings = tmp_path / "run", rewards(f"{code}:score")
    make_run(folder, settings)
    edit(folder / "run.json", lambda record: record.pop("hmac"))
    before = (folder / "run.json").read_bytes()
    config = load_config(None, [f"output_dir={folder}", settings])
    for records in (False, True):
        run = RunFolder(config, "grpo", {"policy": {"source": None}, "data": "0 rows"})
        assert any("run.json is signed anew with the first step: run.json has no HMAC" in text for text in run.messages)
        run.begin()
        assert (folder / "run.json").read_bytes() == before
        if records:
            assert run.recorded() == []
        run.close()
    assert problem_of(folder) is None
    code.write_text("def score(completions): ...")
    assert "cannot be shown to be, what it was" in (problem_of(folder) or "")
    run = RunFolder(config, "grpo", {"policy": {"source": None}, "data": "0 rows"})
    assert any("own.py:score is not, or cannot be shown" in text for text in run.messages)
    run.recorded()
    run.close()
    assert problem_of(folder) is None


def test_a_run_that_goes_on_does_not_sign_for_code_that_it_does_not_use(tmp_path, code):
    folder, settings = tmp_path / "run", rewards(f"{code}:score")
    make_run(folder, settings, "logging.compilation_cache=/tmp/somebodys")
    edit(folder / "run.json", lambda record: record.pop("hmac"))
    config = load_config(None, [f"output_dir={folder}", settings])
    run = RunFolder(config, "grpo", {"policy": {"source": None}, "data": "0 rows"})
    assert any("names logging.compilation_cache '/tmp/somebodys'" in text for text in run.messages)
    run.recorded()
    run.close()
    assert "has no HMAC" in (problem_of(folder) or "")


# A config.yml that was edited


ORIGIN = {"policy": {"source": None}, "data": "0 rows"}
CHANGED = r"config\.yml must be as the run wrote it, and it has changed since, by its hash in run\.json"


def edit_config(folder, old, new):
    text = (folder / "config.yml").read_text()
    assert text.count(old) == 1
    (folder / "config.yml").write_text(text.replace(old, new))


def test_a_run_does_not_go_on_under_a_config_that_was_edited_unless_told_so(tmp_path):
    folder = tmp_path / "run"
    written = make_run(folder)
    edit_config(folder, "  lr: 1.0e-06", "  lr: 0.5")
    edited, before = load_config(folder / "config.yml"), (folder / "run.json").read_bytes()
    assert edited.optimizer.lr == 0.5
    for check_only in (True, False):
        with pytest.raises(ValueError, match=CHANGED + r"; put the old file back and change keys on the command line"):
            RunFolder(edited, "grpo", ORIGIN, check_only)
        with pytest.raises(ValueError, match=CHANGED + r" \(optimizer\.lr was 1e-06, is 0\.5\); put"):
            RunFolder(written, "grpo", ORIGIN, check_only)  # what it was is known
    with pytest.raises(ValueError, match=CHANGED):
        check_trust(folder, edited, ())
    assert (folder / "run.json").read_bytes() == before
    check_trust(folder, edited, (), trust=True)
    run = RunFolder(edited, "grpo", ORIGIN, trust=True)
    assert any("signed anew with the first step: config.yml has changed" in text for text in run.messages)
    run.begin()
    run.recorded()
    run.close()
    check_trust(folder, edited, ())
    RunFolder(edited, "grpo", ORIGIN).close()


def test_a_value_on_the_command_line_and_an_older_run_need_no_word(tmp_path):
    folder = tmp_path / "run"
    make_run(folder)
    overrides = ["grpo.steps=4"]
    config = load_config(folder / "config.yml", overrides)
    check_trust(folder, config, overrides)
    RunFolder(config, "grpo", ORIGIN).close()
    edit_config(folder, "  lr: 1.0e-06", "  lr: 0.5")
    edit(folder / "run.json", lambda record: [record.pop(name) for name in ("format", "files", "hmac")])
    config = load_config(folder / "config.yml")
    check_trust(folder, config, ())
    run = RunFolder(config, "grpo", ORIGIN)
    assert run.resumed
    run.close()
    replaces = load_config(None, [f"output_dir={folder}", "checkpoint.overwrite=true"])
    RunFolder(replaces, "grpo", ORIGIN).close()


# Commands


COMMANDS = {
    "train": ["train", "{run}"],
    "train by its config.yml": ["train", "{run}/config.yml"],
    "sft": ["sft", "{run}/config.yml"],
    "eval": ["eval", "{run}"],
    "eval by its config.yml": ["eval", "{run}/config.yml"],
    "sample": ["sample", "{run}", "--prompt", "1+1="],
    "replay": ["sample", "--replay", "{run}", "1", "0", "0"],
    "compile": ["compile", "{run}/config.yml", "--devices", "cpu:1"],
    "doctor": ["doctor", "{run}/config.yml"],
    "rewards check": ["rewards", "check", "{run}/config.yml"],
    "export": ["export", "{run}", "{run}/../out"],
    "bench": ["checkpoint", "bench", "{run}"],
    "quantize": ["quantize", "{run}/config.yml", "{run}/../out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_nothing_that_a_strange_run_folder_names_unless_told_so(tmp_path, code, capsys, name):
    run, trace = tmp_path / "run", tmp_path / "imported"
    make_run(
        run,
        *(
            f"model.source={code}:build",
            rewards(f"{code}:score"),
            f"grpo.loss_type={code}:loss",
            *("data.source=arithmetic", "data.args={operation: add, digits: 1}", "data.eval_size=2"),
        ),
    )
    edit(run / "run.json", lambda record: record.pop("hmac"))
    command = [text.format(run=run) for text in COMMANDS[name]]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{REFUSAL}run.json has no HMAC" in said, said
    assert (f"model.source '{code}:build'" in said) == (name != "rewards check")  # which needs no model
    assert not trace.exists()
    assert main([*command, "--trust"]) == (1 if name == "doctor" else 2)  # which says what is wrong, and goes on
    captured = capsys.readouterr()
    said = captured.out if name == "doctor" else captured.err
    assert ("was run" if name != "replay" else "data must be what it was") in said
    assert trace.exists() == (name != "replay")


@pytest.mark.parametrize("name", [*COMMANDS, "export of an adapter"])
def test_a_command_takes_no_config_that_was_edited_unless_told_so(tmp_path, capsys, name):
    run = tmp_path / "run"
    make_run(run, "data.source=arithmetic", "data.args={operation: add, digits: 1}", "lora.rank=2")
    edit_config(run, "  lr: 1.0e-06", "  lr: 0.5")
    command = {**COMMANDS, "export of an adapter": ["export", "{run}", "{run}/../out", "--adapter"]}[name]
    assert main([text.format(run=run) for text in command]) == 2
    assert re.search(CHANGED, capsys.readouterr().err)


def test_a_report_and_a_look_at_checkpoints_import_nothing(tmp_path, code, capsys):
    run = tmp_path / "run"
    make_run(run, f"model.source={code}:build", rewards(f"{code}:score"))
    edit(run / "run.json", lambda record: record.pop("hmac"))
    assert main(["report", str(run)]) == 0
    (run / "checkpoints/1/state/_METADATA").write_text('{"tree_metadata": {}}')
    write_hashes(run / "checkpoints" / "1")
    assert main(["checkpoint", "inspect", str(run)]) == 0
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert f"note: not compared with the run's configuration: {run} {REFUSAL}" in capsys.readouterr().out
    assert not (tmp_path / "imported").exists()


def test_reading_the_data_of_a_run_runs_its_function_only_where_it_is_the_users(tmp_path, code):
    run = tmp_path / "run"
    make_run(run, "data.source=arithmetic", "data.args={operation: add, digits: 1}", f"data.prepare={code}:rows")
    assert problem_of(run, kinds=TO_READ) is None
    code.write_text(code.read_text() + "\n")
    with pytest.raises(ValueError, match=r"own\.py:rows.*look at that code, then say --trust"):
        bench(run / "config.yml")
    edit(run / "run.json", lambda record: record.pop("data"))  # as of a version that recorded none
    with pytest.raises(
        ValueError, match=r"must not name functions that prepare rows, .*own\.py:rows'\}; take them out"
    ):
        upgrade_run(run, tmp_path / "new")
    assert not (tmp_path / "imported").exists()
    with pytest.raises(ValueError, match=r"data\.prepare: .*does not import: RuntimeError: was run"):
        bench(run / "config.yml", trust=True)


# So that it stays so


READERS = {
    # Reads a configuration and looks at whose its code is, or leaves it to who calls it.
    "checks": {
        "rl.api",
        "rl.run.command",
        "rl.tools.trained",
        "rl.tools.evaluate",
        "rl.tools.rewards",
        "rl.tools.data",
        "rl.tools.doctor.doctor",
        "rl.tools.samples.replay",
        "rl.tools.programs.compile",
        "rl.tools.checkpoints.lora",
    }
    | {"rl.tools.checkpoints.export", "rl.tools.checkpoints.checkpoint_bench", "rl.tools.checkpoints.checkpoint"},
    # Runs no code that a configuration names: data and tokenizers are read, not run.
    "runs nothing": {
        "rl.config.load",
        "rl.run_folder.contents",
        "rl.run_folder.folder",
        "rl.state.branch",
        "rl.tools.checkpoints.convert",
        "rl.tools.report.data",
        "rl.tools.samples.sample",
    },
}
IMPORTERS = {
    # Of a user's functions, and of compiled programs; what they take must be in `rl.run_folder.trust.code_of`.
    r"\bimport_function\(|\bload_function\(": {
        "rewards.contract",
        "rewards.environment_kinds",
        "rewards.environment_rewards",
        "rewards.importing",
        "rewards.tools",
        "rewards.worker",
        "rl.algorithms.from_config",
        "rl.data.prepare",
        "rl.models.foreign.own_config",
        "rl.run.trackers.trackers",
        "rl.sampler.user_source",
    },
    r"deserialize_executable|jax_compilation_cache_dir": {"rl.run.executables", "rl.devices.programs"},
    # The second is the sandbox in which programs of completions run.
    r"exec_module|runpy|\beval\(|\bexec\(": {"rewards.importing", "rewards.code_child"},
    r"pickle\.load": {"rewards.objects"},  # which only a worker calls
}


def modules(pattern):
    paths = [*(ROOT / "rl").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {names[path] for path in paths if re.search(pattern, path.read_text())}


def test_every_command_that_reads_a_configuration_is_known_to_look_at_whose_it_is():
    found = modules(r"\b(load_config|load_run_config|read_run|identify)\(")
    assert found == READERS["checks"] | READERS["runs nothing"]
    assert READERS["checks"] <= modules(r"check_(trust|code)\(")
    for pattern, known in IMPORTERS.items():
        assert modules(pattern) == known, pattern
