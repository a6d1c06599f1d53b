"""The notebook runs from its own folder and from the root, and is committed with its outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "walkthrough.ipynb"
# The imports and the first figure: what could depend on the folder.
FIRST_CELLS = 5


@pytest.fixture
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def drawn(notebook):
    """For each cell, how many figures it shows."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        for cell in notebook.cells
    ]


def tree(folder):
    return {path for path in folder.iterdir() if path.name != "__pycache__"}


@pytest.mark.parametrize(
    ("folder", "cells"), [(ROOT / "notebooks", None), (ROOT, FIRST_CELLS)], ids=["own", "root"]
)
def test_notebook_runs_and_draws_what_is_committed(
    folder, cells, committed, mnist_root, monkeypatch, tmp_path
):
    # With a backend of the caller's the kernel would show no figures.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    expected = drawn(committed)[:cells]
    committed.cells = committed.cells[:cells]
    for cell in committed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    before = tree(ROOT), tree(NOTEBOOK.parent)
    # Raises the error of a cell that fails.
    client = NotebookClient(
        committed, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    assert sum(expected) > 0
    assert drawn(committed) == expected
    assert (tree(ROOT), tree(NOTEBOOK.parent)) == before


def test_committed_notebook_is_valid_and_small(committed):
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_every_figure_of_the_notebook_is_committed(committed):
    for cell, figures in zip(committed.cells, drawn(committed), strict=True):
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            assert figures == cell.source.count("plt.show()")
    assert sum(drawn(committed)) >= 8


def test_committed_outputs_hold_no_errors_warnings_or_paths(committed):
    for cell in committed.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"/(home|root|tmp|Users|usr|opt|mnt|work)/|[A-Za-z]:\\", text)
            assert str(ROOT) not in text
