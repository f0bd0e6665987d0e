"""Time a redraw of the map in headless Chromium: processor time of the script, written to docs/benchmarks/map.json.

    python benchmarks/map_redraw.py [--points 100000] [--chromium /usr/bin/chromium]

Every redraw draws all points at another zoom, as a frame of the page. A display shows a frame every 16.7 ms.
"""

import argparse
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from common import about, save

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
window.run = (redraws) => new Promise((done) => {
  const step = (left) => {
    if (!left) return done();
    map.zoom(left % 2 ? 1.05 : 0.96); // draws in the next frame
    requestAnimationFrame(() => setTimeout(step, 0, left - 1));
  };
  step(redraws);
});
"""


def measure(browser: Browser, points: int, scale: int, *, selected: bool) -> float:
    """Return the milliseconds of processor time of the script for a redraw."""
    page = browser.new_page(viewport={"width": 1400, "height": 900}, device_scale_factor=scale)
    page.set_content(PAGE)
    script = SCRIPT.replace("POINTS", str(points)).replace("SELECTED", str(selected).lower())
    page.add_script_tag(content=MAP.read_text() + script, type="module")
    page.wait_for_function("window.run")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # not the time of other processes

    def seconds() -> float:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ScriptDuration")

    page.evaluate("run(5)")
    before = seconds()
    page.evaluate(f"run({REDRAWS})")
    milliseconds = 1000 * (seconds() - before) / REDRAWS
    page.close()
    return round(milliseconds, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    results: dict[str, object] = {"benchmark": "map_redraw", **about(vars(options))}
    results |= {"points": options.points, "canvas": "1400 x 900", "redraws": REDRAWS}
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        results["chromium"] = browser.version
        for scale in (1, 2):
            for selected in (False, True):
                name = f"ms, device pixel ratio {scale}, {'10 % selected' if selected else 'no selection'}"
                results[name] = measure(browser, options.points, scale, selected=selected)
                print(name, results[name])
    save(ROOT / "docs/benchmarks/map.json", results)


if __name__ == "__main__":
    main()
