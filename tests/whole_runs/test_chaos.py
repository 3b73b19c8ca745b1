"""A run that is killed, or meets a full or broken disk, at any moment: see tests/helpers/chaos.py."""

import platform
import shutil
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None,
    reason="faults are injected by a library for glibc on Linux, which cc builds",
)
@pytest.mark.parametrize(
    ("kills", "faults", "more"),
    [
        ("12", "12", ()),
        pytest.param("300", "all", (), marks=pytest.mark.long),
        pytest.param("60", "40", ("--recipe", "episodes"), marks=pytest.mark.long),
    ],
)
def test_run_that_is_killed_or_meets_a_failing_disk_goes_on_as_if_nothing_had_happened(tmp_path, kills, faults, more):
    command = [
        sys.executable,
        "-m",
        "tests.helpers.chaos",
        "--kills",
        kills,
        "--faults",
        faults,
        "--folder",
        str(tmp_path),
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
