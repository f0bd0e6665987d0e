"""Time a redraw of the map in headless Chromium: processor time of the script.

    python benchmarks/map_redraw.py --json docs/benchmarks/map.json

Every redraw draws all points at another zoom, as a frame of the page. A display shows a frame every 16.7 ms. A round
is 100 redraws of each case; `ms` is the median over the rounds.
"""

import argparse
import statistics
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from common import about, save, spread

MAP = Path(__file__).parents[1] / "src/dino_ssl/search/static/map.js"
REDRAWS = 100
CASES = {
    f"device pixel ratio {scale}, {'10 % selected' if selected else 'no selection'}": (scale, selected)
    for scale in (1, 2)
    for selected in (False, True)
}
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in CASES}
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        version = browser.version
        for _ in range(options.rounds):
            for name, (scale, selected) in CASES.items():
                times[name].append(measure(browser, options.points, scale, selected=selected))
    rows = [{"part": name, "ms": statistics.median(values), "times": values} for name, values in times.items()]
    for row in rows:
        print(f"{row['part']:40}    {spread(row['times'])} ms")
    description = {"canvas": "1400 x 900", "redraws": REDRAWS, "chromium": version}
    save(options.json, {"benchmark": "map_redraw", **about(vars(options)), **description, "rows": rows})


if __name__ == "__main__":
    main()
