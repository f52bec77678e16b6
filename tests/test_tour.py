"""The notebook runs from top to bottom, on a small model."""
import nbclient
import nbformat

from commands import ROOT


def test_the_tour_runs_and_was_run(base, monkeypatch):
    """A notebook rots unseen: nobody imports it. What is shown on the web are the outputs that were saved with it."""
    notebook = nbformat.read(ROOT / "tour.ipynb", 4)
    saved = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in saved) == 3
    monkeypatch.setenv("MODEL", str(base))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "questions have both right and wrong samples" in printed and "'dpo': 0.6931" in printed
