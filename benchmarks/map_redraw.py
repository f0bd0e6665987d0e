"""Time a redraw of the map in headless Chromium: milliseconds of script, written to docs/benchmarks/map.json.

    python benchmarks/map_redraw.py [--points 100000] [--chromium /usr/bin/chromium]

Every redraw draws all points at another zoom, with a pause, so that the browser shows it. A display shows 60 a second.
"""

import argparse
import json
import statistics
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "src/dino_ssl/search/static/map.js"
REDRAWS = 100
PAGE = "<canvas id='map' style='position: absolute; inset: 0; width: 100%; height: 100%'></canvas>"
SCRIPT = """
const count = POINTS, groups = 30, random = () => Math.random() + Math.random() + Math.random();
const fill = (make) => Array.from({length: count}, make);
const map = createMap(document.getElementById("map"), {x: fill(random), y: fill(random), groups,
  group: fill((_, i) => i % groups)});
if (SELECTED) map.select(fill((_, i) => i).filter((i) => i % 10 === 0));
map.draw();
const times = [], step = () => {
  map.zoom(times.length % 2 ? 1.05 : 0.96);
  times.push(map.draw());
  if (times.length < REDRAWS) setTimeout(step, 30);
  else window.times = times;
};
step();
"""


def measure(browser, points: int, scale: int, *, selected: bool) -> dict[str, float]:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, device_scale_factor=scale)
    page.set_content(PAGE)
    script = SCRIPT.replace("POINTS", str(points)).replace("REDRAWS", str(REDRAWS))
    page.add_script_tag(content=MAP.read_text() + script.replace("SELECTED", str(selected).lower()), type="module")
    page.wait_for_function("window.times", timeout=300_000)
    times = page.evaluate("window.times")
    page.close()
    return {"fastest_ms": min(times), "median_ms": statistics.median(times), "slowest_ms": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    results: dict[str, object] = {"points": options.points, "canvas": "1400 x 900 CSS pixels", "redraws": REDRAWS}
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        results["chromium"] = browser.version
        for scale in (1, 2):
            for selected in (False, True):
                name = f"device pixel ratio {scale}, {'10 % selected' if selected else 'no selection'}"
                results[name] = measure(browser, options.points, scale, selected=selected)
                print(name, results[name])
    path = ROOT / "docs/benchmarks/map.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
