"""A map: near features are near points, the layout is deterministic, and its page is self-contained and inert."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dino_ssl.errors import UserError
from dino_ssl.search import map as maps
from dino_ssl.search import map_page
from dino_ssl.search.map import Layout, lay_out
from dino_ssl.search.map_page import write_map
from dino_ssl.search.results import load_result, save_result


def mixture(count: int, groups: int = 4, width: int = 12):
    rng = np.random.default_rng(0)
    rows = np.eye(width)[np.arange(count) % groups] + 0.1 * rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), np.arange(count) % groups


@pytest.mark.parametrize("method", ["exact t-SNE", "openTSNE"])
def test_groups_stay_together_and_the_map_is_deterministic(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "EXACT_POINTS", 500 if method == "exact t-SNE" else 40)
    monkeypatch.setattr(maps, "ITERATIONS", 20)
    monkeypatch.setattr(maps, "EARLY_ITERATIONS", 20)
    rows, groups = mixture(80)
    seen: list[tuple[int, int]] = []
    layout, again = (lay_out(rows, progress=lambda *done: seen.append(done)) for _ in range(2))
    assert layout.method == method
    assert seen[-1][0] == seen[-1][1]
    np.testing.assert_array_equal(layout.points, again.points)
    distance = np.linalg.norm(layout.points[:, None] - layout.points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (groups[distance.argmin(1)] == groups).all()


def test_of_many_images_evenly_spaced_ones_are_drawn() -> None:
    layout = lay_out(mixture(30)[0], max_points=3)
    assert layout.rows.tolist() == [0, 10, 20]


def test_without_open_tsne_the_map_is_a_sample(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(maps.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(maps.tsne, "MAX_POINTS", 20)
    layout = lay_out(mixture(50)[0])
    assert (len(layout.rows), layout.method) == (20, "exact t-SNE")
    assert "20 evenly spaced images" in caplog.text
    assert "dino-ssl[search]" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_few_and_equal_images_have_finite_points(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (mixture(count)[0], np.repeat(mixture(1)[0], count, 0)):
        layout = lay_out(rows)
        assert layout.points.shape == (count, 2)
        assert np.isfinite(layout.points).all()
    monkeypatch.setattr(maps, "EXACT_POINTS", 3)
    assert np.isfinite(lay_out(np.repeat(mixture(1)[0], 9, 0)).points).all()  # openTSNE ends the process


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        lay_out(mixture(4)[0][:0])
    with pytest.raises(UserError, match="`perplexity` must be at least 1"):
        lay_out(mixture(4)[0], perplexity=0)


# -- the page -----------------------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=alert(1)>\n=1+1.jpg"


def page_of(folder: Path, **options) -> tuple[str, dict]:
    layout = Layout(np.array([0, 5, 7]), np.array([[0, 0], [2, 1], [1, 1]], np.float32), "openTSNE")
    colorings = {"label": ["b", None, "a"], "cluster": ["10", "2", "10"]}
    names = [EVIL, "\udcff.jpg", "c.jpg"]
    text = write_map(folder / "map.html", "<my> images", layout, names, colorings, **options).read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data)


def numbers(text: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), "<u2").tolist()


def test_the_page_has_points_names_and_groups(tmp_path: Path) -> None:
    _, data = page_of(tmp_path, thumbnails=[(2, b"jpeg")])
    assert data["names"] == [EVIL, "\udcff.jpg", "c.jpg"]
    assert numbers(data["x"]) == [0, 65535, 32768]
    assert numbers(data["y"]) == [65535, 32768, 32768]  # the page's y grows downwards; one scale for both axes
    label, cluster = data["colorings"]
    assert (label["names"], numbers(label["values"]), label["none"]) == (["a", "b"], [1, 65535, 0], "no label")
    assert (cluster["names"], numbers(cluster["values"])) == (["2", "10"], [1, 0, 1])
    assert data["thumbnails"] == {"2": f"data:image/jpeg;base64,{base64.b64encode(b'jpeg').decode()}"}
    assert data["rows"] == [0, 5, 7]


def test_the_page_runs_its_own_script_and_loads_nothing(tmp_path: Path) -> None:
    text, _ = page_of(tmp_path)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2  # data and module: no name ends an element
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert "<my>" not in text
    assert not re.search(r"https?://", text.replace("http-equiv", ""))
    assert "onerror" not in text.replace(json.dumps(EVIL)[1:-1].replace("<", "\\u003c"), "")


def test_only_the_largest_groups_have_a_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_page, "MAX_GROUPS", 2)
    coloring = map_page._coloring("label", ["a", "b", "b", "c", "c"])
    assert (coloring["names"], coloring["none"]) == (["b", "c"], "other")
    assert numbers(coloring["values"]) == [65535, 0, 0, 1, 1]


def test_results_are_kept_with_their_key(tmp_path: Path) -> None:
    save_result(tmp_path, "map", {"points": np.arange(4.0)}, generation=3, perplexity=30)
    assert load_result(tmp_path, "map", generation=3)["points"].tolist() == [0, 1, 2, 3]
    assert load_result(tmp_path, "map", generation=3, perplexity=20) is None
    assert load_result(tmp_path, "map", generation=4) is None
    assert load_result(tmp_path, "clusters", generation=3) is None
    (tmp_path / "map.npz").write_bytes(b"PK damaged")
    assert load_result(tmp_path, "map", generation=3) is None
