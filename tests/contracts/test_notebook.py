"""In a notebook: one output for all bars of a call, plain messages, and short results."""

import ast
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
from PIL import Image

import dino_ssl
from dino_ssl import terminal
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.models.vit import ViT
from dino_ssl.terminal import LiveBars, Terminal

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/first_run.ipynb"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record what IPython would show: ("new" | "update", object)."""
    calls: list[tuple[str, Any]] = []

    def display(content: Any, *, raw: bool, display_id: bool) -> SimpleNamespace:
        calls.append(("new", content))
        return SimpleNamespace(update=lambda content, raw=False: calls.append(("update", content)))

    module = ModuleType("IPython.display")
    module.display = display  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(terminal, "REFRESH_SECONDS", 0)
    return calls


def test_all_bars_of_a_terminal_are_one_output(shown: list[tuple[str, Any]], capsys: pytest.CaptureFixture) -> None:
    out = Terminal()
    for label in ("features", "neighbors"):
        with out.progress(label) as progress:
            for done in range(5):
                progress(done, 5)
            out.print(f"[{label}] done")
    assert [kind for kind, _ in shown].count("new") == 1
    bars = [content for _, content in shown if isinstance(content, LiveBars)]
    assert len(set(bars)) == 2
    assert len(bars) >= 10
    assert "4/5" in bars[-1]._repr_mimebundle_([], [])["text/plain"]
    assert shown[-1] == ("update", terminal.EMPTY)
    assert capsys.readouterr().out == "[features] done\n[neighbors] done\n"


def test_a_quiet_terminal_shows_nothing(shown: list[tuple[str, Any]]) -> None:
    with Terminal(quiet=True).progress("features") as progress:
        progress(1, 2)
    assert not shown


def test_results_are_short() -> None:
    torch.manual_seed(0)
    backbone, scenes = ViT(width=64, depth=1, heads=1, patch=16, image_size=32).build(), Scenes(count=3, size=32)
    embedding = dino_ssl.embed(backbone, scenes, size=32)
    assert repr(embedding).startswith("Embedding(images: 3, dimensions: 64, ")
    assert "<tr><th>dimensions</th><td>64</td></tr>" in embedding._repr_html_()
    maps = dino_ssl.attention(backbone, scenes.open().read(0), size=32)
    assert repr(maps) == "AttentionMaps(attention of [CLS], layer 0, 1 head, 2 x 2 patches)"
    assert np.asarray(Image.open(io.BytesIO(maps._repr_jpeg_()))).std() > 10


def test_the_stored_notebook_was_executed_and_names_no_path_of_a_machine() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    images = [out["data"].pop("image/jpeg", None) for cell in cells for out in cell["outputs"] if "data" in out]
    assert sum(image is not None for image in images) == 3
    text = json.dumps(cells)
    assert not [part for part in ("/tmp", "/home", "/root", "/work", "image/png", "Traceback") if part in text]
    for cell in cells:  # what it calls exists
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dino_ssl":
                assert hasattr(dino_ssl, node.attr), node.attr
