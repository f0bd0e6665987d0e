"""dino clusters, map and select on a small index: tables, pages, files that the next command reads, and errors."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import dino_ssl
from dino_ssl.models.vit import ViT

HOSTILE = "a\n<b>\x1b[2J'.png"


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 40 images in 4 classes, `photos.idx`, of the copied folder `photos`; one name is hostile."""
    root = tmp_path_factory.mktemp("indexed")
    shutil.copytree(photos, root / "photos")
    os.rename(next((root / "photos" / "star").glob("*.png")), root / "photos" / "star" / HOSTILE)
    torch.manual_seed(0)
    net = ViT(width=24, depth=1, heads=2, patch=8, image_size=32, drop_path=0.0).build()
    dino_ssl.Index.build(net, str(root / "photos"), path=root / "photos.idx")
    return root


@pytest.fixture
def index(folder: Path, dino) -> Path:
    """The index, in a working directory of its own."""
    shutil.copytree(folder / "photos.idx", "photos.idx")
    return Path("photos.idx")


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_clusters_are_written_as_table_and_page(dino, index: Path) -> None:
    ran = dino("clusters", index, "-k", "3", "--csv", "c.csv", "--html", "c.html", "--json")
    assert ran.code == 0, ran.err
    rows = rows_of("c.csv")
    assert len(rows) == 40
    sizes = {entry["cluster"]: entry["images"] for entry in ran.json["clusters"]}
    assert {name: sum(row["cluster"] == name for row in rows) for name in "012"} == sizes
    assert 0 < ran.json["agreement"]["purity"] <= 1
    page = Path("c.html").read_text()
    assert page.count("<figure") == sum(min(size, 12) for size in sizes.values())
    assert "<b>\x1b" not in page
    text = dino("clusters", index)
    assert "the highest silhouette" in text.out
    assert "-k N chooses another number" in text.out
    noise = dino("clusters", index, "--density", "--min-size", "30", "--json")
    assert [entry["cluster"] for entry in noise.json["clusters"]][-1] == "noise"


def test_a_map_has_the_last_clusters_and_a_thumbnail_of_every_image(dino, index: Path) -> None:
    assert dino("clusters", index, "-k", "3").code == 0
    ran = dino("map", index, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {"index": "photos.idx", "file": "map.html", "points": 40, "method": "exact t-SNE"}
    text = Path("map.html").read_text()
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(found)
    assert len(data["names"]) == len(data["thumbnails"]) == 40
    assert [coloring["title"] for coloring in data["colorings"]] == ["label", "cluster"]
    assert data["colorings"][1]["names"] == ["0", "1", "2"]
    ran = dino("map", index, "--thumbnails", "my thumbs", "--max-points", "10", "-o", "pages/map.html")
    assert "10 of 40 images" in ran.out
    (found,) = re.findall(r'"folder":"(.*?)"', Path("pages/map.html").read_text())
    assert found == "../my%20thumbs"
    assert len([*Path("my thumbs").glob("*.jpg")]) == 10


@pytest.mark.parametrize("method", ["coverage", "typical", "outliers"])
def test_a_second_round_reads_the_files_of_the_first(dino, index: Path, method: str) -> None:
    first = dino("select", index, "-n", "12", "--method", method, "--csv", "1.csv", "--html", "1.html", "--json")
    assert first.code == 0, first.err
    assert [row["name"] for row in rows_of("1.csv")] == [item["name"] for item in first.json["images"]]
    assert Path("1.html").read_text().count("<figure") == 12
    second = dino("select", index, "-n", "50", "--method", method, "--labeled", "1.csv", "--list", "2.txt", "--json")
    names = [item["name"] for item in [*first.json["images"], *second.json["images"]]]
    assert len(set(names)) == len(names) == 40
    lines = "".join(f"{item['name']}\n" for item in second.json["images"])
    assert Path("2.txt").read_text() == lines
    Path("2.txt").write_text("\n".join(name for name in names if "\n" not in name))
    left = dino("select", index, "--labeled", "1.csv", "2.txt", "--json")
    assert left.json["images"] if left.code == 0 else "No image is left" in left.err


def test_errors_name_the_choice(dino, index: Path) -> None:
    Path("names.txt").write_text("star/missing.png\n")
    Path("columns.csv").write_text("file\nx\n")
    Path("other").mkdir()
    Path("other/0000000.jpg").write_text("a photo")
    for words, message in (
        (["clusters", index, "-k", "100"], "-k"),
        (["clusters", index, "-k", "2", "--density"], "either"),
        (["map", index, "--perplexity", "0"], "--perplexity must be at least 1"),
        (["select", index, "-n", "0"], "must be at least 1"),
        (["select", index, "--labeled", "names.txt"], "star/missing.png"),
        (["select", index, "--labeled", "columns.csv"], "a column name"),
        (["select", index, "--labeled", "missing.txt"], "missing.txt"),
        (["clusters", "photos"], "There is no index photos"),
        (["clusters", index, "--per-cluster", "0"], "--per-cluster must be at least 1"),
        (["clusters", index, "--html", "photos/1.jpg"], "has the name of an image"),
        (["map", index, "-o", "photos/1.PNG"], "has the name of an image"),
        (["select", index, "--list", "other"], "other is a folder"),
        (["map", index, "--thumbnails", "other"], "other has other content"),
        (["search", index, "0", "--html", "1.webp"], "has the name of an image"),
        (["duplicates", index, "--yes", "--move", "columns.csv"], "columns.csv is a file"),
    ):
        ran = dino(*words)
        assert (ran.code, message in ran.err) == (2, True), ran.err


def test_results_are_kept_until_the_index_changes(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = dino_ssl.Index(index)
    clusters, layout = opened.clusters(4), opened.map()
    monkeypatch.setattr("dino_ssl.search.index.find_clusters", None)
    monkeypatch.setattr("dino_ssl.search.index.lay_out", None)
    again, known = opened.clusters(4), opened.last_clusters()
    assert known is not None
    for kept in (again, known):
        assert (kept.assignment == clusters.assignment).all()
        assert (kept.method, kept.sizes, kept.agreement) == (clusters.method, clusters.sizes, clusters.agreement)
    assert (opened.map().points == layout.points).all()
    monkeypatch.setattr(dino_ssl.Index, "generation", 99)
    assert opened.last_clusters() is None
    with pytest.raises(TypeError):  # computed again
        opened.map()


@pytest.mark.parametrize("word", ["clusters", "map", "select"])
def test_help_has_examples(dino, word: str) -> None:
    assert f"dino {word} photos.idx" in dino(word, "--help").out
