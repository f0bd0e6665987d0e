"""The gallery of thumbnails: self-contained, escaped, and written group by group."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_ssl.search.gallery import Group, Tile, write_gallery

JPEG = b"\xff\xd8 not decoded"


def test_the_page_loads_nothing_and_needs_no_script(tmp_path: Path) -> None:
    tile = Tile("a/b.jpg", JPEG, "0.98", "keep", tmp_path / "photos" / "a" / "b.jpg")
    page = write_gallery(tmp_path / "g.html", "Duplicates", "Two images.", [Group("Group 1", [tile])]).read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith(("data:image/jpeg;base64,", "./photos/a/b.jpg")) for source in sources)
    assert 'alt="a/b.jpg"' in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("name", "expected", "link"),
    [
        ("<script>alert(1)<.jpg", "&lt;script&gt;alert(1)&lt;.jpg", "%3Cscript%3Ealert%281%29%3C.jpg"),
        ('" onerror="x.jpg', "&quot; onerror=&quot;x.jpg", "%22%20onerror%3D%22x.jpg"),
        ("two\nlines.jpg", "two\\nlines.jpg", "two%0Alines.jpg"),
        ("bytes\udcff.jpg", "bytes?.jpg", "bytes%FF.jpg"),
        ("\u202egpj.exe", "\\u202egpj.exe", "%E2%80%AEgpj.exe"),
    ],
)
def test_names_are_escaped(tmp_path: Path, name: str, expected: str, link: str) -> None:
    groups = [Group(name, [Tile(name, JPEG, name, name, tmp_path / name)], name)]
    page = write_gallery(tmp_path / "g.html", name, name, groups).read_text()
    assert name not in page
    assert (
        page.count(expected) == 10
    )  # title and heading, lead, title and note of the group; alt, badge, tip, name, note
    assert f'href="./{link}"' in page


def test_groups_are_read_while_the_page_is_written(tmp_path: Path) -> None:
    """A failure in the middle keeps the old page."""

    def groups() -> Iterator[Group]:
        for number in range(3):
            yield Group(f"Group {number}", (Tile(f"{number}-{k}.jpg", JPEG) for k in range(2)))
            done.append(number)
        raise ZeroDivisionError

    done: list[int] = []
    (tmp_path / "g.html").write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_gallery(tmp_path / "g.html", "Clusters", "", groups())
    assert done == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["g.html"]
    assert (tmp_path / "g.html").read_text() == "old"


def test_an_image_that_is_gone_has_no_link(tmp_path: Path) -> None:
    groups = [Group("", [Tile("gone.jpg", None, path=tmp_path / "gone.jpg")])]
    page = write_gallery(tmp_path / "g.html", "Clusters", "", groups).read_text()
    assert "not readable any more" in page
    assert "href" not in page
