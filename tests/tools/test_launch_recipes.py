"""The scripts of examples/launch: valid shell, options that the tools have, and a command that `grpo` takes."""

import argparse
import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from rl.cli import COMMANDS
from rl.config.load import load_config
from tests.helpers.places import ROOT

FOLDER = ROOT / "examples" / "launch"
SCRIPTS = ("slurm.sh", "gke_xpk.sh")
# Options and the form of their values, https://slurm.schedmd.com/sbatch.html; None: the option takes none.
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"([a-z]\w*:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}",
    "signal": r"([RB]{1,2}:)?(\d+|[A-Z]+\d?)(@\d+)?",
    "requeue": None,
    "open-mode": "append|truncate",
    "output": r"(%\d*[%AaJjNnstuxbh]|[^%\s])+",
}
# Of `xpk workload create`: https://github.com/AI-Hypercomputer/xpk/blob/main/src/xpk/parser/workload.py
XPK = ("cluster", "workload", "tpu-type", "num-slices", "docker-image", "max-restarts", "command")
XPK += ("termination-grace-period-seconds", "restart-on-exit-codes", "project", "zone")
XPK_FLAGS = ("dry-run", "skip-validation")
GKE = {
    "CLUSTER": "c",
    "IMAGE": "i",
    "TPU_TYPE": "v5litepod-16",
    "NUM_SLICES": "2",
    "PROJECT": "p",
    "ZONE": "us-west4-a",
}


@pytest.fixture
def run(tmp_path):
    """run(script, *arguments, **environment) with stand-ins that note how they were called: (process, their calls)."""
    log = tmp_path / "calls"
    for name in ("srun", "scontrol", "xpk"):
        tool = tmp_path / name
        # Arguments end with a NUL, calls with a line end.
        tool.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> {log}\necho >> {log}\n'
            f"[[ {name} != srun ]] || exit ${{SRUN_STATUS:-0}}\n"
        )
        tool.chmod(0o755)

    def call(script, *arguments, **environment):
        log.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        command = [str(FOLDER / script), *arguments]
        process = subprocess.run(
            command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
        )
        return process, [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_shell_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)
    assert os.access(FOLDER / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_its_arguments_says_how_it_is_used(script, run):
    process, calls = run(script, "only one")
    assert (process.returncode, calls) == (2, [])
    assert "usage: " in process.stderr


def assert_grpo_takes(command: list[str], recipe: str, overrides: list[str]) -> None:
    assert command[:3] == ["grpo", "train", recipe]
    assert command[1] in COMMANDS
    config = load_config(None, command[3:])
    assert (config.output_dir, config.grpo.steps) == ("/shared/my run", 7)
    assert command[4:] == overrides


def test_slurm_options_are_those_of_sbatch():
    lines = re.findall(r"^#SBATCH (.*)$", (FOLDER / "slurm.sh").read_text(), re.MULTILINE)
    options = dict(re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line).groups() for line in lines)
    assert (len(lines), set(options)) == (len(SBATCH), set(SBATCH))
    for name, value in options.items():
        form = SBATCH[name]
        assert value is None if form is None else re.fullmatch(form, value or ""), (name, value)
    # sbatch stops to read options at the first line that is neither empty nor a comment.
    text = (FOLDER / "slurm.sh").read_text()
    assert text.rindex("#SBATCH") < text.index("set -euo")


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is not on the PATH")
def test_sbatch_itself_reads_the_recipe_up_to_the_call_of_a_controller(tmp_path):
    """sbatch reads all options before it asks a controller, and none is there."""
    settings = "ClusterName=none\nSlurmctldHost=none(127.0.0.1)\nSlurmctldPort=1\nGresTypes=gpu\n"
    (tmp_path / "slurm.conf").write_text(settings)
    wrong = tmp_path / "wrong.sh"
    wrong.write_text((FOLDER / "slurm.sh").read_text().replace("--signal=TERM@300", "--signal=TERM@soon"))
    for script, told in ((FOLDER / "slurm.sh", "Unable to contact slurm controller"), (wrong, "Invalid --signal")):
        command = ["sbatch", "--test-only", str(script), "recipe.yml", "/shared/out"]
        environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert told in process.stderr
        assert ("error" in process.stderr) == (script == wrong)


def test_slurm_starts_one_command_on_all_processes(run):
    process, calls = run("slurm.sh", "recipe.yml", "/shared/my run", "grpo.steps=7", SLURM_JOB_ID="5")
    assert process.returncode == 0, process.stderr
    ((tool, *arguments),) = calls
    assert tool == "srun"
    start = arguments.index("grpo")
    assert arguments[:start] == ["--kill-on-bad-exit=1", "--label", "--gpu-bind=none"]
    assert_grpo_takes(arguments[start:], "recipe.yml", ["grpo.steps=7"])


@pytest.mark.parametrize(
    ("status", "restarts", "is_queued"), [("134", "0", True), ("134", "5", False), ("2", "0", False), ("0", "0", False)]
)
def test_slurm_queues_a_run_again_that_failed_but_not_one_that_was_refused(run, status, restarts, is_queued):
    environment = {"SRUN_STATUS": status, "SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": "5"}
    process, calls = run("slurm.sh", "recipe.yml", "/shared/out", **environment)
    assert process.returncode == int(status)
    assert calls[1:] == ([["scontrol", "requeue", "5"]] if is_queued else [])


@pytest.mark.parametrize("dry", ["0", "1"])
def test_xpk_gets_options_that_it_has_and_a_command_that_grpo_takes(run, dry):
    overrides = ["grpo.steps=7", "mesh.dcn={data: 2}"]
    process, calls = run("gke_xpk.sh", "name", "recipe.yml", "/shared/my run", *overrides, **GKE, DRY_RUN=dry)
    assert process.returncode == 0, process.stderr
    ((tool, *arguments),) = calls
    assert [tool, *arguments[:2]] == ["xpk", "workload", "create"]
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in XPK:
        parser.add_argument(f"--{name}", required=True)
    for name in XPK_FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    parsed = parser.parse_args(arguments[2:])
    assert (parsed.cluster, parsed.workload, parsed.tpu_type, parsed.num_slices) == ("c", "name", "v5litepod-16", "2")
    assert parsed.dry_run is (dry == "1")
    assert_grpo_takes(shlex.split(parsed.command), "recipe.yml", overrides)


@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is not on the PATH")
def test_xpks_own_dry_run_takes_the_recipe_and_makes_a_job_of_it(tmp_path):
    overrides = ["grpo.steps=7", "mesh.dcn={data: 2}"]
    process = subprocess.run(
        [str(FOLDER / "gke_xpk.sh"), "name", "recipe.yml", "/shared/my run", *overrides],
        env={**os.environ, **GKE, "DRY_RUN": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    jobset = yaml.safe_load(re.search(r"^apiVersion: jobset.*?(?=^\[XPK\])", process.stdout, re.M | re.S).group())
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"]) == (2, 4)  # slices, and hosts of 16 chips
    (rule,) = job["podFailurePolicy"]["rules"]
    statuses = rule["onExitCodes"]
    assert (rule["action"], statuses["operator"]) == ("FailJob", "NotIn")
    assert [status in statuses["values"] for status in (1, 134, 2)] == [True, True, False]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (pod["terminationGracePeriodSeconds"], container["image"]) == (300, "i")
    command = re.search(r"\((grpo .*)\) & PID", container["command"][-1]).group(1)
    assert_grpo_takes(shlex.split(command), "recipe.yml", overrides)


def test_a_dry_run_needs_a_zone(run):
    environment = {name: value for name, value in GKE.items() if name != "ZONE"}
    process, calls = run("gke_xpk.sh", "name", "recipe.yml", "/shared/out", **environment, DRY_RUN="1")
    assert process.returncode != 0
    assert not calls
    assert "ZONE: a dry run does not ask gcloud for it" in process.stderr


def test_zone_and_project_of_gcloud_are_left_to_xpk(run):
    environment = {name: value for name, value in GKE.items() if name not in ("ZONE", "PROJECT")}
    process, calls = run("gke_xpk.sh", "name", "recipe.yml", "/shared/out", **environment)
    assert process.returncode == 0, process.stderr
    assert not {"--zone", "--project"} & set(calls[0])


def test_xpk_needs_a_cluster(run):
    process, calls = run("gke_xpk.sh", "name", "recipe.yml", "/shared/out", IMAGE="i", TPU_TYPE="v5litepod-16")
    assert process.returncode != 0
    assert not calls
    assert "CLUSTER" in process.stderr


def test_the_readme_names_every_file_and_its_commands_exist():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or path.name in text
    for command in re.findall(r"`grpo (\w+)", text):
        assert command in COMMANDS
