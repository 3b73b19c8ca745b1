"""Files that commands write at their end: refused before any work where they cannot be written."""

import errno
import os
import re

import pytest

from rl.cli import main
from rl.files.output_file import check_writable, disk_trouble, writing

# Each with a source that is missing: whoever looks at that first says so.
COMMANDS = {
    "compile --json": ["compile", "absent.yml", "--json"],
    "data bench --json": ["data", "bench", "absent.yml", "--json"],
    "rewards check --json": ["rewards", "check", "absent.yml", "--json"],
    "checkpoint bench --json": ["checkpoint", "bench", "absent.yml", "--json"],
    "checkpoint verify --write": ["checkpoint", "verify", "absent", "--write"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(name, tmp_path, capsys):
    option = name.split()[-1]
    assert main([*COMMANDS[name], str(tmp_path)]) == 2
    assert f"{option} must be a file to write, got the folder '{tmp_path}'" in capsys.readouterr().err
    file = tmp_path / "none" / "file"
    assert main([*COMMANDS[name], str(file)]) == 2
    assert f"{option} must be a file in a folder that exists, got '{file}'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_compiled_programs_that_cannot_be_written_are_refused_before_they_are_compiled(tmp_path, capsys):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("model: {source: own.py:build}\n")  # which training takes no compiled programs for
    assert main(["compile", str(recipe), "--save", str(tmp_path)]) == 2
    assert f"--save must be a file to write, got the folder '{tmp_path}'" in capsys.readouterr().err
    assert main(["compile", str(recipe), "--save", str(tmp_path / "none" / "programs")]) == 2  # makes its folder
    assert "--save must go with a model of the toolkit's own decoder" in capsys.readouterr().err


def test_evaluation_refuses_a_file_that_cannot_be_written_before_weights_are_read(tmp_path, capsys):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("model: {source: no/such/folder}\n")
    assert main(["eval", str(recipe), "--output", str(tmp_path / "none" / "samples.jsonl")]) == 2
    assert "--output must be a file in a folder that exists" in capsys.readouterr().err


def test_what_is_missing_is_made_only_by_a_writer_that_says_so(tmp_path):
    check_writable(None, "--json")
    check_writable(tmp_path / "new", "--json")
    check_writable(tmp_path / "a" / "b" / "new", "--save", makes_folders=True)
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file", "--json")
    for path in (tmp_path / "file" / "new", tmp_path / "file" / "a" / "new"):
        with pytest.raises(ValueError, match="--save must be a file in a folder that exists"):
            check_writable(path, "--save", makes_folders=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who may run the tests, has every permission
    with pytest.raises(ValueError, match="--json must be a file that can be written"):
        check_writable(tmp_path / "new", "--json")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "whatever"), "No space left on device"),
        (OSError(errno.EIO, "whatever"), "Input/output error"),
        (OSError(errno.EDQUOT, "whatever"), os.strerror(errno.EDQUOT)),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: \"a/b\": [os_error_code='28']"), "No space left on device"),
        (RuntimeError("Error while serializing: I/O error: Input/output error (os error 5)"), "Input/output error"),
        (OSError(errno.EACCES, "whatever"), None),
        (ValueError("28"), None),
    ],
)
def test_a_full_or_broken_disk_is_told_from_other_errors(tmp_path, error, words):
    assert disk_trouble(error) == words
    message = f"{tmp_path} could not be written: {words}; make room" if words else str(error)
    with pytest.raises(ValueError if words else type(error), match=re.escape(message)), writing(tmp_path):
        raise error
