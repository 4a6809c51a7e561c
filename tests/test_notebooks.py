"""Every notebook runs as it is kept: its asserts are tests, its outputs are not in git."""

import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_draws_its_figures(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    figures = [data for data in shown if data.get("text/plain", "").startswith("<Figure")]
    assert all("image/png" in data for data in figures)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_git_holds_no_outputs(name):
    shown = subprocess.run(
        ["git", "show", f":./{name}"], cwd=FOLDER, capture_output=True, text=True
    )
    text = (FOLDER / name).read_text() if shown.returncode else shown.stdout
    cells = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
