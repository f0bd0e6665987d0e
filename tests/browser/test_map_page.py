"""The page of `dino map` in a real browser: hover, legend, lasso, keys, and the table that it saves."""

import csv
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from dino_ssl.search.map import Layout
from dino_ssl.search.map_page import write_map

HOSTILE = "</script><img src=x onerror=window.attacked=1>.jpg"
NAMES = [HOSTILE, *(f"cat/{i}.jpg" for i in range(1, 100))]
LABELS = ["cat" if i % 4 else None for i in range(100)]


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A page of 10 x 10 points, whose first point is in the corner at the top left."""
    side = np.arange(10, dtype=np.float32)
    points = np.stack([np.tile(side, 10), -np.repeat(side, 10)], axis=1)
    jpeg = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    layout = Layout(np.arange(100), points, "exact t-SNE")
    colorings = {"label": LABELS, "cluster": [str(i // 50) for i in range(100)]}
    write_map(tmp_path / "map.html", "photos", layout, NAMES, colorings, [(0, jpeg)])
    page = browser.new_page(viewport={"width": 1100, "height": 720})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto((tmp_path / "map.html").as_uri())
    yield page
    assert problems == []
    assert page.evaluate("window.attacked") is None
    page.close()


def corner(page: Page) -> tuple[float, float]:
    """Return the position of the first point: 56 pixels of margin on the shorter side."""
    box = page.locator("#map").bounding_box()
    assert box is not None
    side = min(box["width"], box["height"]) - 112
    return box["x"] + box["width"] / 2 - side / 2, box["y"] + box["height"] / 2 - side / 2


def test_an_image_is_shown_when_the_mouse_is_on_its_point(page: Page) -> None:
    page.mouse.move(*corner(page))
    expect(page.locator("#tip b")).to_have_text(HOSTILE)
    expect(page.locator("#tip span")).to_have_text("label no label, cluster 0")
    expect(page.locator("#tip img")).to_have_count(1)
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#count")).to_have_text("1 selected")
    page.keyboard.press("Tab")


def test_a_lasso_selects_the_points_inside_which_are_saved(page: Page, tmp_path: Path) -> None:
    x, y = corner(page)
    page.locator("#lasso").click()
    page.mouse.move(x - 20, y + 20)
    page.mouse.down()
    for dx, dy in ((620, 20), (620, -20), (-20, -8)):  # the first row
        page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()
    expect(page.locator("#count")).to_have_text("10 selected")
    with page.expect_download() as download:
        page.locator("#download").click()
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == NAMES[:10]
    assert [row["label"] for row in rows] == [label or "" for label in LABELS[:10]]
    page.locator("#clear").click()
    expect(page.locator("#count")).to_have_text("Nothing selected")


def test_groups_and_words_of_names_are_selected_without_a_mouse(page: Page) -> None:
    page.locator("#legend button").first.press("Enter")
    expect(page.locator("#count")).to_have_text("75 selected")
    page.locator("#coloring").select_option("1")
    expect(page.locator("#legend button")).to_have_count(2)
    page.locator("#find").fill("/9")
    expect(page.locator("#count")).to_have_text("11 selected")
    page.locator("#map").focus()
    for key in ("Escape", "+", "ArrowLeft", "0", "ArrowDown", " "):
        page.keyboard.press(key)
    expect(page.locator("#count")).to_have_text("1 selected")
