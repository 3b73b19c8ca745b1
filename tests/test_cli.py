import ast
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from rl.cli import COMMANDS, Command, main
from rl.run.metrics import MetricsWriter
from rl.tools import launch
from tests.helpers.places import ROOT

HEAVY = ("jax", "flax", "numpy", "transformers", "datasets", "matplotlib", "rich", "pydantic", "yaml")


def run_python(code, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_help_of_every_command_imports_nothing_heavy_and_the_end_looks_for_no_garbage():
    code = f"""
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0))
from rl.cli import COMMANDS, main
assert main(["--help"]) == 0
for name in COMMANDS:
    assert main([name, "--help"]) == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["[]", "True"]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{command.summary}$", output, re.MULTILINE) for name, command in COMMANDS.items())


def test_an_exit_in_code_of_the_user_is_an_error_with_its_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "code_that_exits.py").write_text("import sys\ndef main(argv):\n    sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"]._replace(module="code_that_exits"))
    assert main(["train", "recipe.yml"]) == 2
    assert re.search(r"must not exit, got SystemExit: 0 at .*code_that_exits\.py:3", capsys.readouterr().err)
    with pytest.raises(SystemExit):  # of argparse, which has said why
        main(["report", "--no-such-argument"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_each_argument(name, capsys):
    assert main([name, "--help"]) == 0
    usage, _, *rest = capsys.readouterr().out.splitlines()
    arguments = usage.removeprefix(f"usage: grpo {name} ")
    for argument in re.findall(r"key=value|--\w+|[A-Z_]{3,}", arguments):
        assert any(argument in line for line in rest), argument


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_each_option_of_its_parsers(name, capsys):
    spec = importlib.util.find_spec(COMMANDS[name].module)
    options = re.findall(r'add_argument\(\s*"(--[\w-]+)"', pathlib.Path(spec.origin).read_text())
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert [option for option in options if not re.search(rf"{option}\b", text)] == []


def test_help_names_the_options_of_each_subcommand(capsys):
    for command, words in (
        ("checkpoint", r"bench RUN_OR_CONFIG \[--steps N\] \[--json FILE\] \[key=value \.\.\.\]"),
        ("lora", r"inspect ADAPTER_OR_RUN \[--step N\] \[--json\]"),
    ):
        assert main([command, "--help"]) == 0
        assert re.search(words, capsys.readouterr().out)


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name].needs_arguments])
def test_a_command_without_arguments_shows_its_help_as_an_error(name, capsys):
    assert main([name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"usage: grpo {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_with_a_main_that_takes_arguments(name):
    spec = importlib.util.find_spec(COMMANDS[name].module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(pathlib.Path(spec.origin).read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for argument in function.args.args] == ["argv"]


def test_an_unknown_command_is_answered_with_the_nearest_name(capsys):
    assert main(["trian", "x.yml"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'trian'; did you mean train?")


def test_a_command_gets_its_arguments_unchanged(tmp_path, capsys):
    with MetricsWriter(tmp_path / "run", 0) as writer:
        writer.write({"step": 1, "reward/mean": 0.5})
    assert main(["report", "--output", str(tmp_path / "out.png"), str(tmp_path / "run")]) == 0
    assert (tmp_path / "out.png").exists()
    assert "reward, last" in capsys.readouterr().out


def test_a_users_error_is_told_without_a_traceback(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: RUN must be a run folder (the output_dir of `grpo train` or `grpo sft`), got {str(tmp_path)!r}, which "
        "has no metrics.jsonl\n"
    )
    assert captured.out == ""


RECIPE = "examples/arithmetic/sft.yml"
MISSING = [  # command, with ./none in the place of what is missing, and the argument that names it
    ("train ./none", "CONFIG"),
    ("sft ./none.yml", "CONFIG"),
    ("compile ./none", "CONFIG"),
    ("doctor ./none.yml", "CONFIG"),
    ("data bench ./none.yml", "CONFIG"),
    ("rewards check ./none.yml", "CONFIG"),
    ("checkpoint bench ./none", "CONFIG"),
    ("eval ./none", "MODEL"),
    ("sample ./none --prompt x", "MODEL"),
    ("serve ./none", "MODEL"),
    (f"data passrate ./none {RECIPE} --output ./x.jsonl", "MODEL"),
    ("lora merge ./none ./nowhere ./out", "MODEL"),
    ("quantize ./none ./out", "MODEL"),
    ("export ./none ./out", "RUN"),
    ("report ./none", "RUN"),
    ("lora extract ./none ./out", "RUN"),
    ("sample --replay ./none 1 0 0", "RUN"),
    ("checkpoint inspect ./none", "CHECKPOINT"),
    ("checkpoint verify ./none", "CHECKPOINT"),
    ("checkpoint convert ./none ./out", "CHECKPOINT"),
    ("eval ./none.jsonl --against ./none.jsonl", "A and B of --against"),
    ("lora inspect ./none", "an adapter"),
    (f"sample {RECIPE} --prompts ./none --output ./x.jsonl", "--prompts"),
    (f"sft {RECIPE} data.source=./none.jsonl data.args={{operation: null, digits: null}}", "data source"),
    (f"sft {RECIPE} model.source=./none", "model.source"),
    (f"sft {RECIPE} tokenizer.source=./none", "tokenizer.source"),
]


@pytest.mark.parametrize(("command", "what"), MISSING, ids=[command for command, _ in MISSING])
def test_what_is_missing_is_said_in_one_way_by_all_commands(command, what, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [part.replace("~", " ") for part in command.replace(": ", ":~").replace(", ", ",~").split()]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    said = rf"error: {what} must be .*, got '(\./)?none[.a-z]*', which does not exist \(working directory {ROOT}\)"
    assert re.match(said, captured.err), captured.err
    assert captured.out == ""


def test_a_traceback_is_shown_on_request(tmp_path, capsys, monkeypatch):
    assert main(["report", str(tmp_path), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("GRPO_TRACEBACK", "1")
    assert main(["report", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def add_command(tmp_path, monkeypatch):
    """Adds a command whose module, not one of Tandem's own, runs `body` in its main."""

    def add(name, body):
        (tmp_path / f"command_{name}.py").write_text(f"def main(argv):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(COMMANDS, name, Command(f"command_{name}", "ARGUMENT", "", ""))

    return add


def test_a_value_error_that_tandem_did_not_raise_keeps_its_traceback(add_command):
    add_command("broken", "raise ValueError('operands could not be broadcast')")
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        main(["broken", "x"])


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("a" * 300, "File name too long"), ("{file}/b", "Not a directory"), ("{folder}", "Is a directory")],
)
def test_a_path_that_cannot_be_used_is_told_without_a_traceback(add_command, tmp_path, capsys, argument, reason):
    (tmp_path / "file").touch()
    add_command("opens", "open(argv[0])")
    argument = argument.format(file=tmp_path / "file", folder=tmp_path)
    assert main(["opens", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{argument[:100]}")
    assert error.endswith(f" must be a path that can be used: {reason}; name another one\n")
    with pytest.raises(FileNotFoundError):  # may be a bug
        main(["opens", str(tmp_path / "nothing")])


def test_interruption_exits_with_130(add_command):
    add_command("interrupted", "raise KeyboardInterrupt")
    assert main(["interrupted", "x"]) == 130


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(tmp_path):
    (tmp_path / "command_endless.py").write_text("def main(argv):\n    while True:\n        print('line')\n")
    program = (
        "import sys; from rl.cli import COMMANDS, Command, main; "
        "COMMANDS['endless'] = Command('command_endless', 'X', '', ''); sys.exit(main(['endless', 'x']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.fixture
def broken_stdout(monkeypatch):
    """Makes a file that takes nothing the stdout of this process: a pipe without a reader, or a full device."""
    opened = []

    def replace(kind):
        if kind == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
            stream = os.fdopen(writer, "w")
        else:
            stream = open("/dev/full", "w")  # noqa: SIM115
        opened.append(stream)
        monkeypatch.setattr(sys, "stdout", stream)

    yield replace
    for stream in opened:
        stream.close()  # as the interpreter does in the end: what it still held must not be an error once more


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
PRINTS = {"little": "print('line')", "much": "print('line' * 100_000)", "rich": "Console(1).message('line')"}


@pytest.mark.parametrize("body", PRINTS.values(), ids=PRINTS)
def test_a_command_whose_reader_is_gone_ends_with_141_and_without_a_word(add_command, broken_stdout, capsys, body):
    add_command("prints", f"from rl.run.console import Console; {body}")
    broken_stdout("pipe")
    assert main(["prints", "x"]) == 141
    assert capsys.readouterr().err == ""


def test_a_launcher_whose_processes_lose_their_reader_ends_as_they_do(capsys):
    with subprocess.Popen(["sh", "-c", "exit 141"]) as ended, subprocess.Popen(["sleep", "60"]) as other:
        assert launch._watch([other, ended], "train") == 141
        launch._end([other])
    assert capsys.readouterr().err == ""


@needs_dev_full
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["prints", "x"]])
def test_a_command_whose_output_cannot_be_written_says_so(add_command, broken_stdout, capsys, arguments):
    add_command("prints", PRINTS["much"])
    broken_stdout("full device")
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: standard output must take what the command prints, got: No space left on device; write it elsewhere\n"
    )


@needs_dev_full
def test_another_full_disk_is_not_taken_for_that_of_the_output(add_command):
    add_command("writes", "raise OSError(28, 'No space left on device')")
    with pytest.raises(OSError, match="No space left"):
        main(["writes", "x"])


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 0
    sys.stdout.close()


def test_a_commands_exit_status_is_kept(add_command):
    add_command("status", "return len(argv)")
    assert main(["status", "a", "b", "c"]) == 3
    add_command("silent", "pass")
    assert main(["silent", "a"]) == 0


DIST_INFO = f"tandem_grpo-{importlib.metadata.version('tandem-grpo')}.dist-info"
# Programs that another process runs: importing them starts them, or moves streams about.
RUN_ALONE = ("rl.files.untrusted_worker",)


def read_pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_third_party_import_is_a_dependency():
    project = read_pyproject()["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["gcs"], *extras["s3"], *extras["rewards"], *extras["serve"]]
    requirements += extras["mlflow"]
    names = {re.split(r"[<>=]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    distributions = {"google": "google_tunix", "tunix": "google_tunix", "orbax": "orbax_checkpoint", "yaml": "pyyaml"}
    distributions |= {"aiohttp": "gcsfs", "botocore": "s3fs", "etils": "orbax_checkpoint", "referencing": "jsonschema"}
    # A notebook brings IPython, and tasks of verifiers bring verifiers.
    own = {"rl", "rewards", "IPython", "verifiers"}
    for top in ("rl", "rewards"):
        for path in (ROOT / top).rglob("*.py"):
            for module in imported_modules(path):
                if module not in own and module not in sys.stdlib_module_names:
                    assert distributions.get(module, module) in names, f"{path} imports {module}"


def imported_modules(path):
    """Top-level names that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def files_below(folder):
    return {path.relative_to(folder) for path in folder.rglob("*.yml")}


def module_names():
    paths = [path for top in ("rl", "rewards") for path in sorted((ROOT / top).rglob("*.py"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_a_package_of_the_same_name_that_comes_first_on_the_path_is_named(tmp_path):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import rl"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.search(rf"ImportError: .*'rewards' .*{re.escape(str(ROOT))}.*{re.escape(str(tmp_path))}", result.stderr)


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path):
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    for name in ("rl", "rewards", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Neither step needs a network: setuptools is a dev dependency, and what the wheel needs is installed already.
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = wheels.glob("tandem_grpo-*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
    assert {path.name for path in target.iterdir() if path.is_dir()} - {"bin"} == {"rl", "rewards", DIST_INFO}
    assert files_below(target / "rl/configs") == files_below(ROOT / "configs")
    modules = [name for name in module_names() if name not in RUN_ALONE]
    code = f"""
import importlib, rl, sys
from rl.config.load import load_config, read_preset
assert rl.__file__.startswith(sys.argv[1]), rl.__file__
config = load_config(None, ["grpo.preset=dapo"])
print(config.grpo.group_size, read_preset("dapo")["grpo"]["loss_type"])
from rl.tools.report.page import page_html
assert "</html>" in page_html("its files are in the wheel", "")
for name in {modules}:
    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name
"""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-P", "-c", code, str(target)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1] == "dapo"
    script = [str(target / "bin" / "grpo"), "--help"]
    assert (
        "usage: grpo COMMAND"
        in subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    )
