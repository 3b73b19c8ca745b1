"""examples/notebook/quickstart.ipynb runs as it stands, and what it shows in the repository is what a run gave."""

import json

import pytest

from tests.helpers.places import ROOT

NOTEBOOK = ROOT / "examples/notebook/quickstart.ipynb"


def outputs(cells, kind):
    return [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == kind]


def test_the_notebook_in_the_repository_is_executed_and_has_no_path_of_a_machine():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert outputs(cells, "display_data")
    assert not outputs(cells, "error")
    assert "/home/" not in NOTEBOOK.read_text()
    assert "/tmp/" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs_shows_one_live_line_and_its_policy_learns(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the extra dev has it")
    nbclient = pytest.importorskip("nbclient", reason="the extra dev has it")
    pytest.importorskip("ipykernel", reason="the extra dev has it")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, programs optimised
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    lines = [output["data"].get("text/plain", "") for output in outputs(book.cells, "display_data")]
    (live,) = [line for line in lines if line.startswith("step")]
    steps = int(live.split("/")[1].split()[0])
    assert live.startswith(f"step {steps}/{steps}  [####################]")
    printed = "".join(output["text"] for output in outputs(book.cells, "stream"))
    assert "25 train, 0 held out" in printed
    assert f"\nstep {steps - 1}/{steps}" not in printed  # a step without an evaluation has the live line only
    metrics = [json.loads(line) for line in (tmp_path / "runs/notebook/metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in metrics if "reward/mean" in line]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.8
    assert "bcdefghijklmnopqrstuvwxyz" in "".join(
        output["data"]["text/plain"] for output in outputs(book.cells, "execute_result")
    )
    assert (tmp_path / "my_model/config.json").is_file()
