"""`dino index` and `dino search`: output, page, JSON and messages."""

import shutil
from pathlib import Path

import pytest

import dino_ssl


@pytest.fixture(scope="module")
def index(photos: Path, trained, tmp_path_factory) -> Path:
    return dino_ssl.Index.build(trained[0], photos, path=tmp_path_factory.mktemp("index") / "photos.idx").folder


def test_index_prints_what_has_changed(dino, photos, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    ran = dino("index", trained[0], "copy", "--approximate")
    assert ran.code == 0, ran.err
    assert "40 images, 48 dimensions: copy.idx\n40 added, 0 removed, 0 unchanged\nApproximate search: " in ran.out
    assert "lists are compared with a query; recall@10 against exact search: " in ran.out
    assert "skipped: star/empty.png: empty file" in ran.out
    first = sorted(copy.rglob("*.png"))[0]
    first.rename(first.with_name("renamed.png"))
    result = dino("index", trained[0], "copy", "-o", "copy.idx", "--json").json
    assert {name: result[name] for name in ("images", "added", "reused", "removed", "kept", "generation")} == {
        "images": 40, "added": 1, "reused": 1, "removed": 1, "kept": 39, "generation": 2,
    }  # fmt: skip
    assert len(result["skipped"]) == 2
    assert result["approximate"]["recall"] >= 0.99


def test_search_prints_a_table_json_and_a_page(dino, photos, index):
    opened = dino_ssl.Index(index)
    name = opened.items.names[3]
    ran = dino("search", index, photos / name, "-k", "3", "--html", "hits.html")
    assert ran.code == 0, ran.err
    assert "3 of 40 images" in ran.out
    rank, similarity, *image = ran.out.splitlines()[2].split()
    assert (rank, image) == ("1", [name, name.split("/")[0]])
    assert float(similarity) > 0.999
    page = Path("hits.html").read_text()
    assert page.count("<figure") == 4
    assert page.count("data:image/jpeg") == 4
    by_name = dino("search", index, name, "-k", "3", "--json").json
    assert [hit["name"] for hit in by_name["hits"]] == [hit.name for hit in opened.search(name, k=3)]
    region = dino("search", index, photos / name, "--region", "5", "5", "30", "20", "--label", "star", "--json").json
    assert {hit["label"] for hit in region["hits"]} == {"star"}


def test_a_moved_folder_and_network(dino, photos, index, trained, tmp_path):
    shutil.copytree(photos, tmp_path / "moved")
    shutil.copytree(trained[0], tmp_path / "net")
    opened = dino_ssl.Index(index)
    options = ("--images", "moved", "--checkpoint", "net", "--html", "hits.html")
    ran = dino("search", index, opened.items.names[0], "-k", "2", *options)
    assert ran.code == 0, ran.err
    assert "not readable" not in Path("hits.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.idx", "a.jpg"], "There is no index missing.idx: expected a folder with index.json"),
        (["INDEX"], "No query given. Expected an image: dino search photos.idx query.jpg"),
        (["INDEX", "a.jpg"], "There is no file a.jpg, and no image of this name in the index."),
        (["INDEX", "NAME", "-k", "0"], "--k must be at least 1"),
        (["INDEX", "NAME", "--region", "99", "0", "5", "5"], "--region 99 0 5 5 is outside of the image of 40 x 40."),
        (["INDEX", "NAME", "--label", "flowr"], "is of the class flowr; did you mean 'flower'?"),
    ],
)
def test_messages(dino, index, arguments, message):
    name = dino_ssl.Index(index).items.names[0]
    ran = dino("search", *({"INDEX": index, "NAME": name}.get(word, word) for word in arguments))
    assert ran.code == 2
    assert message in ran.err
