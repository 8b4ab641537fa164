"""The notebook in docs/ runs from its first cell to its last: by nbclient in a kernel of its own
where that is installed, and else its code, cell after cell."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "docs" / "prompt-to-prompt.ipynb"


def code():
    cells = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.full
def test_its_code_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, gradients = {"__name__": "notebook"}, torch.is_grad_enabled()
    try:
        for i, source in enumerate(code()):
            exec(compile(source, f"cell {i}", "exec"), names)
    finally:
        torch.set_grad_enabled(gradients)
    assert len(names["sweep"]) == 4


def test_it_holds_no_outputs_and_no_long_lines():
    for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert all(len(line.rstrip()) <= 100 for line in cell["source"]), cell["source"]


@pytest.mark.full
@pytest.mark.skipif(
    find_spec("nbclient") is None or find_spec("ipykernel") is None,
    reason="nbclient and ipykernel run notebooks",
)
def test_it_runs_as_a_notebook(tmp_path):
    import nbformat
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
