"""The page of `dino explore` in a real browser: Debian's chromium, or the path in CHROMIUM."""

import io
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, expect

from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.explore.server import Server
from dino_ssl.models.vit import ViT
from dino_ssl.search.index import Index

FORK = multiprocessing.get_context("fork")
"""A fork has imported torch already, which takes a new process seconds."""
HOSTILE = "<img src=x onerror=window.attacked=1>.jpg"
COUNT, COPIES = 60, 3


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Images of four classes in folders, three of them twice, one with a hostile name; a small network."""
    root = tmp_path_factory.mktemp("explore")
    scenes = Scenes(count=COUNT, size=96, classes=4).open()
    for i in range(COUNT):
        path = root / "photos" / scenes.classes[int(scenes.labels[i])] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.read(i)).save(path)
        if i < COPIES:
            Image.open(path).save(path.with_name(f"{i:03} copy.jpg"), quality=90)
    Image.fromarray(scenes.read(5)).save(path.with_name(HOSTILE))
    torch.manual_seed(0)
    network = ViT(width=48, depth=2, heads=3, patch=8, image_size=64).build().eval()
    return Index.build(network, str(root / "photos"), path=root / "photos.idx")


class Process:
    """A server in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, index: Index, export: Path) -> None:
        self.index, self.export, self.port = index, export, 18_123
        self.start()

    def start(self) -> None:
        receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._serve, args=(sender,), daemon=True)
        self.process.start()
        self.port, self.address = receiver.recv()

    def _serve(self, sender: Any) -> None:
        server = Server(self.index, port=self.port, export=self.export)
        sender.send((server.port, server.address))
        server.serve()
        os._exit(0)

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


@pytest.fixture(scope="session")
def server(index: Index, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    server = Process(index, tmp_path_factory.mktemp("export"))
    yield server
    server.kill()


@pytest.fixture
def context(browser: Browser, index: Index) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    yield context
    context.close()
    (index.folder / "selections.json").unlink(missing_ok=True)


@pytest.fixture
def page(context: BrowserContext, server: Process) -> Iterator[Page]:
    """The page, opened; errors of scripts and of the content security policy fail the test."""
    page = opened(context, server)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    yield page
    assert not errors


def opened(context: BrowserContext, server: Process) -> Page:
    page = context.new_page()
    page.goto(server.address)
    expect(page.locator(".grid .tile img[src]").first).to_be_visible()
    return page


def shown(page: Page, count: int) -> list[int]:
    """Return the rows of the first tiles of the grid, in their order."""
    expect(page.locator(".grid .tile").first).to_be_visible()
    tiles = "tiles => tiles.map(tile => [+tile.ariaPosInSet, +tile.querySelector('a').hash.split('/').pop()])"
    return [row for _, row in sorted(page.locator(".grid .tile").evaluate_all(tiles))][:count]


def open_image(page: Page, row: int) -> None:
    page.goto(page.url.partition("#")[0] + f"#/image/{row}")
    expect(page.locator(".results .tile").first).to_be_visible()


def row_named(index: Index, end: str) -> int:
    return next(row for row, name in enumerate(index.items.names) if name.endswith(end))


def test_the_grid_shows_every_image_and_hostile_names_as_text(page: Page, index: Index) -> None:
    assert "token" not in page.url
    assert page.locator("#content > [data-shown]").get_attribute("data-shown") == str(len(index))
    page.keyboard.press("/")
    page.keyboard.type("onerror=")
    expect(page.locator(".grid .tile")).to_have_count(1)
    expect(page.locator(".tile .name")).to_have_text(HOSTILE)
    page.keyboard.press("Enter")
    expect(page.locator(".grid .tile a")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".about h1")).to_have_text(HOSTILE)
    assert page.evaluate("window.attacked") is None


def test_a_click_searches_and_the_label_filters(page: Page, index: Index) -> None:
    page.locator(".grid .tile a").nth(7).click()
    expect(page.locator(".results .badge").first).to_be_visible()
    assert shown(page, 5) == [hit.row for hit in index.search(7, 6)][1:]
    label = str(index.items.labels[0])
    page.get_by_label("Label").select_option(label)
    expect(page.locator(".results .tile").first).to_have_attribute(
        "aria-setsize", str(sum(index.items.labels == label) - 1)
    )
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_have_text("All images")


def test_a_region_is_searched(page: Page, index: Index) -> None:
    open_image(page, 7)
    box = page.locator(".stage").bounding_box()
    assert box is not None
    with page.expect_response(lambda response: "&w=" in response.url):
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"])
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"])
        page.mouse.up()
    expect(page.locator(".results h2")).to_have_text("Images with a similar part")
    assert shown(page, 1) == [index.search(7, 1, region=(24, 24, 48, 48))[0].row]
    page.get_by_role("button", name="Search for the whole image").click()
    expect(page.locator(".results h2")).to_have_text("Similar images")


def test_a_dropped_image_is_searched(page: Page, index: Index) -> None:
    row = row_named(index, "030.png")
    Image.fromarray(index.read(row)).save(file := io.BytesIO(), "PNG")
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "query.png", {type: "image/png"}));
            for (const type of ["dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true}));
        }""",
        list(file.getvalue()),
    )
    expect(page.locator(".about h1")).to_have_text("Your image")
    assert shown(page, 1) == [row]


def test_a_click_on_a_patch_shows_what_it_attends_to(page: Page, index: Index) -> None:
    open_image(page, 7)
    page.get_by_role("button", name="Attention").click()
    expect(page.locator(".stage")).to_have_attribute("data-drawn", "-1")  # [CLS]
    before = drawing(page)
    box = page.locator(".stage").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 0.51 * box["width"], box["y"] + 0.26 * box["height"])
    columns = page.locator("canvas").evaluate("canvas => canvas.width")
    expect(page.locator(".stage")).to_have_attribute("data-drawn", str(columns // 4 * columns + columns // 2))
    after = drawing(page)
    assert before != after
    expect(page.locator(".results h2")).to_have_text("Nearest patches")
    assert page.locator(".results .box").count() > 10
    page.get_by_label("Head").select_option("1")
    page.get_by_label("Layer").select_option("0")
    page.wait_for_function("text => document.querySelector('canvas').toDataURL() !== text", arg=after)
    page.locator(".stage").press("ArrowRight")
    expect(page.locator(".stage")).to_have_attribute("data-drawn", str(columns // 4 * columns + columns // 2 + 1))
    page.get_by_role("button", name="Patch colors").click()
    expect(page.locator(".overlay")).to_be_visible()
    assert page.locator(".overlay").evaluate("image => image.decode().then(() => image.naturalWidth)") == columns


def drawing(page: Page) -> str:
    return page.locator("canvas").evaluate("canvas => canvas.toDataURL()")


def test_a_selection_survives_a_reload_and_is_exported(page: Page, index: Index, server: Process) -> None:
    page.locator(".grid .tile a").first.focus()
    for key in ("x", "ArrowRight", "x", "ArrowDown", "x"):
        page.keyboard.press(key)
    expect(page.locator("#sidebar .selections .number")).to_have_text("3")
    expect(page.locator("#sidebar")).to_have_attribute("aria-busy", "false")
    page.reload()
    expect(page.locator("#sidebar .selections .number")).to_have_text("3")
    expect(page.locator(".grid .tile.selected")).to_have_count(3)
    page.get_by_role("link", name="Selection 1").click()
    rows = shown(page, 9)
    assert len(rows) == 3
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    names = download.value.path().read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in names} == {index.items.names[row] for row in rows}
    page.get_by_role("button", name="Copy files").click()
    page.get_by_role("dialog").get_by_role("button", name="Copy").click()
    expect(page.locator(".notice")).to_contain_text("3 files written")
    assert sorted(
        str(path.relative_to(server.export / "Selection 1")) for path in server.export.rglob("*.*")
    ) == sorted(index.items.names[row] for row in rows)
    shutil.rmtree(server.export)


def test_duplicates_are_marked_and_kept(page: Page, index: Index) -> None:
    page.get_by_role("link", name="Duplicates").click()
    page.get_by_role("button", name="Find duplicates").click()
    groups = page.locator(".group")
    expect(groups).to_have_count(COPIES + 1, timeout=30_000)  # and the image with the hostile name
    page.get_by_role("button", name="Mark all").click()
    expect(page.locator("#sidebar .selections .number")).to_have_text(str(COPIES + 1))
    first = groups.first.locator(".removed")
    expect(first).to_have_count(1)
    first.get_by_role("button", name="Keep").click()
    expect(first).to_have_count(0)
    expect(page.locator("#sidebar")).to_have_attribute("aria-busy", "false")
    page.reload()
    expect(page.locator(".group .removed")).to_have_count(COPIES)  # results and marks are kept
    assert all(index.path_of(row).is_file() for row in range(len(index)))  # type: ignore[union-attr]


def test_clusters_and_a_lasso_on_the_map(page: Page, index: Index) -> None:
    page.get_by_role("link", name="Clusters").click()
    page.get_by_label("Number of clusters").fill("4")
    page.get_by_role("button", name="Find clusters").click()
    expect(page.locator(".cluster")).to_have_count(4, timeout=30_000)
    size = page.locator(".cluster .number").first.inner_text()
    page.get_by_role("button", name="Cluster 0").click()
    expect(page.locator("#content > [data-shown]")).to_have_attribute("data-shown", size)
    page.get_by_role("link", name="Map").click()
    page.get_by_role("button", name="Compute the map").click()
    expect(page.locator("#content > [data-shown]")).to_have_attribute("data-shown", str(len(index)), timeout=30_000)
    page.get_by_role("button", name="Lasso").click()
    box = page.locator(".map canvas").bounding_box()
    assert box is not None
    left, top, right, bottom = box["x"] + 9, box["y"] + 9, box["x"] + box["width"] - 9, box["y"] + box["height"] - 9
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()
    expect(page.locator(".chosen")).to_contain_text(f"{len(index)} images chosen")
    page.get_by_role("button", name="Select all").click()
    expect(page.locator("#sidebar .selections .number")).to_have_text(str(len(index)))
    expect(page.locator("#sidebar")).to_have_attribute("aria-busy", "false")  # stored before the next test


def test_two_tabs_share_selections_and_see_conflicts(context: BrowserContext, server: Process) -> None:
    first, second = opened(context, server), opened(context, server)
    first.locator(".grid .tile .check input").first.check(force=True)
    expect(second.locator(".grid .tile.selected")).to_have_count(1)
    second.locator(".grid .tile .check input").nth(3).check(force=True)
    expect(first.locator("#sidebar .selections .number")).to_have_text("2")
    first.bring_to_front()  # pages in the background draw once per second
    first.get_by_role("link", name="Selection 1").click()
    # a change that the first tab has not heard of, as from another computer's server
    post = (
        "data => fetch('/api/selections', {method: 'POST', body: JSON.stringify(data)}).then(answer => answer.status)"
    )
    assert second.evaluate(post, {"operation": "add", "selection": "Selection 1", "version": 0, "rows": [9]}) == 200
    first.get_by_role("button", name="Delete").click()
    first.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(first.locator(".notice.error")).to_contain_text("changed elsewhere")
    expect(first.locator("#sidebar .selections .number")).to_have_text("3")


def test_a_killed_server_is_reported_and_the_page_recovers(context: BrowserContext, server: Process) -> None:
    page = opened(context, server)
    page.locator(".grid .tile .check input").first.check(force=True)
    expect(page.locator("#sidebar .selections .number")).to_have_text("1")
    expect(page.locator("#sidebar")).to_have_attribute("aria-busy", "false")
    server.kill()
    page.locator(".grid .tile a").nth(3).click()
    expect(page.locator("#offline")).to_contain_text("does not answer")
    server.start()
    expect(page.locator("#offline")).to_contain_text("Open the new address")
    other = opened(context, server)  # sets the cookie of both tabs
    expect(other.locator("#sidebar .selections .number")).to_have_text("1")
    expect(page.locator("#offline")).to_be_hidden()
    expect(page.locator("#sidebar .selections .number")).to_have_text("1")


def test_a_page_of_another_state_of_the_index_reloads_itself(
    context: BrowserContext, server: Process, index: Index
) -> None:
    page, dialogs = opened(context, server), []

    def accept(dialog: Dialog) -> None:
        dialogs.append(dialog.type)
        dialog.accept()

    page.on("dialog", accept)
    page.wait_for_load_state("networkidle")  # an unanswered request would make the page reload before the tick
    info = index.folder / "index.json"
    times = (info.stat().st_atime_ns, info.stat().st_mtime_ns)
    server.kill()
    os.utime(info, ns=(times[0], times[1] + 1))
    server.start()
    context.request.get(server.address)  # sets the cookie, as another tab does
    page.locator(".grid .tile .check input").first.check(force=True)
    expect(page.locator(".notice.error")).to_contain_text("the page was reloaded")
    assert page.locator("#sidebar .selections li").count() == 0  # the tick is not applied
    page.locator(".grid .tile .check input").first.check(force=True)
    expect(page.locator("#sidebar .selections .number")).to_have_text("1")
    expect(page.locator("#sidebar")).to_have_attribute("aria-busy", "false")
    assert not dialogs


def test_a_page_reloads_itself_once_for_a_version(context: BrowserContext, server: Process) -> None:
    page, loads = context.new_page(), []
    page.on("load", lambda page: loads.append(page.url))
    answer = {"status": 409, "json": {"error": "Another version.", "version": "0123456789ab"}}
    for path in ("items", "job"):
        page.route(f"**/api/{path}*", lambda route: route.fulfill(**answer))
    page.goto(server.address)
    expect(page.locator("#offline")).to_contain_text("shows another index")
    page.wait_for_timeout(2500)  # longer than the time between two requests of a page that is offline
    assert len(loads) == 2


def test_the_page_fits_a_phone(browser: Browser, server: Process) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = opened(context, server)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_role("button", name="Menu").click()
    page.get_by_role("link", name="Clusters").click()
    expect(page.locator("h1")).to_have_text("Clusters")
    open_image(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
