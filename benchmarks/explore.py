"""The page of an index of 100,000 images: time to the first view and of a search click, in headless Chromium.

    python benchmarks/explore.py [--images 100000] [--turns 5] [--json FILE]

The images are links to 1,000 drawn JPEG files of 500 x 375 pixels, the features are those of benchmarks/search.py.
Views are those of new browser contexts, and end when every thumbnail in the window is shown. Thumbnails are made when
they are first seen, and kept, so the first view and later ones are listed apart. Each search click on an
image is on another one, whose results have no thumbnails yet. Times are those of the page's own clock.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

from common import SIZES, about, save, write_images
from dino_ssl.explore.server import Server
from dino_ssl.search.index import Index
from dino_ssl.search.listing import list_images
from dino_ssl.search.reading import Record
from search import fake_info, unit_rows, write_fake_index

FILES, FOLDERS = 1000, 100
FORK = multiprocessing.get_context("fork")
SCRIPT = """
window.complete = selector => {
    const inWindow = box => box.bottom > 0 && box.top < innerHeight;
    const images = [...document.querySelectorAll(selector)].filter(image => inWindow(image.getBoundingClientRect()));
    return images.length > 0 && images.every(image => image.complete && image.naturalWidth);
};
window.until = condition => new Promise(done => {
    const look = () => condition() ? done(performance.now()) : requestAnimationFrame(look);
    look();
});
"""
VIEW = "until(() => complete('.grid .tile img'))"  # since the address was opened
CLICK = """async position => {
    const began = performance.now();
    document.querySelectorAll(".grid .tile a")[position].click();
    const listed = await until(() => document.querySelector(".results .tile img"));
    return [listed - began, await until(() => complete(".results .tile img")) - began];
}"""


def write_index(scratch: Path, count: int) -> Path:
    """Write an index of `count` links to the same drawn files, and return its folder."""
    files = sorted(write_images(make(scratch / "files"), FILES, *SIZES["500"]).iterdir())
    for number in range(count):
        folder = scratch / "photos" / f"{number * FOLDERS // count:03d}"
        if number * FOLDERS % count < FOLDERS:
            make(folder)
        os.link(files[number % FILES], folder / f"image-{number:06d}.jpg")
    width, height = SIZES["500"]
    records = (([Record(os.urandom(16), 1, width, height) for _ in rows], rows) for rows in unit_rows(count))
    write_fake_index(
        scratch / "photos.idx", list_images(str(scratch / "photos")), fake_info(scratch / "photos")[1], records
    )
    return scratch / "photos.idx"


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def serve(folder: Path, address: Any) -> None:
    """Serve the page of an index, in a process of its own."""
    server = Server(Index(folder), port=18_200)
    address.send(server.address)
    server.serve()


def measure(browser: Browser, address: str, turns: int) -> Iterator[dict[str, Any]]:
    """Yield the times of the first view, of later views, and of search clicks."""
    views, clicks = [], []
    for turn in range(turns + 1):
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.add_init_script(SCRIPT)
        page.goto(address, wait_until="commit")
        views.append(page.evaluate(VIEW))
        clicks.append(page.evaluate(CLICK, turn + 1))
        page.context.close()
    listed, thumbnails = zip(*clicks[1:], strict=True)
    parts = {
        "first view": views[:1],
        "later views": views[1:],
        "search click: results": listed,
        "search click: all thumbnails in the window": thumbnails,
    }
    for name, times in parts.items():
        yield {"part": name, "ms": median(times), "times": np.round(times, 1).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=5, help="contexts of the browser after the first one")
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = write_index(Path(scratch), options.images)
        receiver, sender = FORK.Pipe(duplex=False)
        server = FORK.Process(target=serve, args=(folder, sender), daemon=True)
        server.start()
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        rows, version = [*measure(browser, receiver.recv(), options.turns)], browser.version
        server.kill()
    description = about(vars(options))
    table = Table("part", "ms", title=f"{options.images:,} images, {description['machine']}, Chromium {version}")
    for row in rows:
        table.add_row(row["part"], f"{row['ms']:.0f}")
    Console().print(table)
    save(options.json, {"benchmark": "explore", **description, "chromium": version, "rows": rows})


if __name__ == "__main__":
    main()
