"""The notebook in docs/ runs from its first cell to its last, by nbclient in its own kernel."""

import json
import os
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "prompt-to-prompt.ipynb"


def test_it_holds_no_outputs_and_no_long_lines():
    for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert all(len(line.rstrip()) <= 100 for line in cell["source"]), cell["source"]


@pytest.mark.full
def test_it_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel run notebooks")
    pytest.importorskip("ipykernel", reason="nbclient and ipykernel run notebooks")
    from nbclient import NotebookClient

    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": os.fspath(tmp_path)}}
    ).execute()
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 5
