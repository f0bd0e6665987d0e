"""report.html: one self-contained page that tells what a run was, how it went, and what its network sees."""

import dataclasses
import json
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.analysis import page
from dino.analysis.asked import asked_section
from dino.analysis.curves import History, chart, line, read_history
from dino.analysis.render import cutout, heat
from dino.analysis.snapshots import read_index, read_neighbours
from dino.analysis.vital_signs import health_section, standing
from dino.config import to_dict
from dino.errors import UserError
from dino.files import write_whole
from dino.run import read_run
from dino.units import duration

COLUMNS = 6
"""Epochs shown side by side, and heads."""
SHOWN_SKIPPED = 300
FLOORS = {"raw_pixels": "raw pixels", "random_weights": "random weights", "majority_class": "majority class"}
SECTIONS = {
    "data": "Pictures", "backbone": "Network", "method": "Method", "views": "Views", "optim": "Optimizer",
    "knn": "k-NN while training",
}  # fmt: skip


def write_report(run_dir: Path | str) -> Path:
    """Writes RUN/report.html from what lies in the run's folder, and returns it.

    Whatever is missing is left out: a run that has just begun, has no labels, or was stopped gets its report
    too.
    """
    run_dir = Path(run_dir)
    described = _json(run_dir / "run.json")
    if not isinstance(described, dict):
        raise UserError(f"No run in {run_dir}: expected its run.json. Give the folder that `dino train` wrote to.")
    run, history = described.get("run", described), read_history(run_dir)
    body = [
        _header(run_dir, described, run, history),
        *(f'<p class="warning">{page.escape(str(said))}</p>' for said in standing(run_dir, described, history)),
        _headline(described, run, history),
        _curves(described, run, history),
        health_section(run_dir, described, history),
        asked_section(history.evaluations),
        _attention(run_dir / "snapshots"),
        _neighbours(run_dir / "snapshots"),
        _plan(run_dir, described),
        _settings(run_dir, run),
        _skipped(run_dir),
        _environment(described, history),
    ]
    text = page.page(f"{run_dir.resolve().name} · dino", body)
    return write_whole(run_dir / "report.html", lambda aside: aside.write_text(text, encoding="utf-8"))


def _header(run_dir: Path, described: Mapping, run: Mapping, history: History) -> str:
    epochs = _at(run, "optim", "epochs")
    reached = history.training[-1].get("epoch") if history.training else None
    if reached is None:
        state = "has not logged a step yet"
    elif epochs is not None and reached < epochs - 1e-6:
        state = f"stands at epoch {reached:.3g} of {epochs:g}"
    else:
        state = f"trained for {reached:.4g} epochs"
    pictures = _at(described, "data", "trained_on") or _at(described, "data", "pictures")
    where = _at(run, "data", "path")
    source = (f" on {pictures:,} pictures" if pictures else "") + (f" of {where}" if where else "")
    text = f"{_network(run)}, {described.get('learning', 'self-distilled with no labels')}{source}; it {state}."
    name = run_dir.resolve().name
    eyebrow = '<div class="eyebrow">dino · training report</div>'
    return f'{eyebrow}<h1>{page.escape(name)}</h1><p class="lead">{page.escape(text)}</p>\n'


def _headline(described: Mapping, run: Mapping, history: History) -> str:
    prototypes = described.get("prototypes")
    top = math.log(prototypes) if prototypes else None
    tiles = []
    name, rows = _quality(history)
    if rows:
        best = max(rows, key=lambda row: row[name])
        values = {"this run": best[name], **_floors(described, history, name)}
        note = f"best, at epoch {best.get('epoch', 0):.3g}; the last is {rows[-1][name]:.1f} %"
        tiles.append(page.bars(f"{name} accuracy on held-back pictures", values, note))
    for key, label in (("loss", "Loss"), ("teacher_entropy", "Teacher entropy"), ("kl", "KL to the student")):
        values = history.line(key)[1]
        if values:
            limit = (
                f"of ln K = {top:.2f}" if top and key != "kl" else "0 is nothing left to learn" if key == "kl" else ""
            )
            tiles.append(page.tile(label, f"{values[-1]:.3f}", limit))
    speeds, waits = history.line("images_per_s")[1], history.line("wait")[1]
    if speeds:
        note = f"{100 * float(np.median(waits)):.0f} % of the time spent waiting for data" if waits else ""
        tiles.append(page.tile("Speed", f"{np.median(speeds):,.0f}", note, unit="images/s"))
    return f'<div class="grid tiles">{"".join(tiles)}</div>\n' if tiles else ""


def _curves(described: Mapping, run: Mapping, history: History) -> str:
    prototypes = described.get("prototypes")
    top = {"ln K": math.log(prototypes)} if prototypes else {}
    entropies = {
        "teacher": "teacher_entropy",
        "over the batch": "marginal_entropy",
    }
    name, rows = _quality(history)
    floors = _floors(described, history, name)
    drawn = [
        chart({name or "k-NN": line(rows, name)}, title="Quality", unit=" %", references=floors, from_zero=True),
        chart(
            {"loss": history.line("loss")},
            title="Loss",
            references=top,
            note="At ln K the student only guesses." if top else "",
        ),
        chart(
            {label: history.line(key) for label, key in entropies.items()},
            title="Entropy",
            references=top,
            from_zero=True,
            note="Teacher at 0: one prototype for all. Teacher at ln K: uniform. Healthy is in between.",
        ),
        chart({"KL": history.line("kl")}, title="KL, teacher to student", from_zero=True),
        chart({"learning rate": history.line("lr")}, title="Learning rate", from_zero=True),
        chart({"momentum": history.line("momentum")}, title="Teacher momentum"),
        chart({"weight decay": history.line("weight_decay")}, title="Weight decay", from_zero=True),
        chart({"images/s": history.line("images_per_s")}, title="Speed", from_zero=True),
    ]
    charts = "".join(drawn)
    return page.section("Curves", "Over epochs.", f'<div class="grid charts">{charts}</div>' if charts else "")


def _attention(folder: Path) -> str:
    index = read_index(folder)
    epochs = [entry for entry in index["epochs"] if entry.get("maps")]
    if not epochs:
        return ""
    shown = [
        epochs[i] for i in sorted(set(np.linspace(0, len(epochs) - 1, min(COLUMNS, len(epochs))).round().astype(int)))
    ]
    last = shown[-1]
    over, detail = [], []
    for place, told in index["pictures"].items():
        picture = _image(folder / f"pictures/{place}.jpg")
        if picture is None or place not in last["maps"]:
            continue
        first = page.cell(picture, told.get("label") or Path(told["name"]).name, alt=told["name"])
        maps = (entry["maps"].get(place) for entry in shown)
        over.append(first + "".join(page.cell(_image(folder / f"{m}.jpg") if m else None) for m in maps))
        detail.append(first + "".join(page.cell(image) for image in _heads(folder, last, place, picture)))
    similar = last.get("kind") == "similarity"
    what = (
        "Similarity of every place to the pooled feature; this network has no attention."
        if similar
        else "Attention of the last block's [CLS] token, mean over heads, as training went on."
    )
    heads = min(last["heads"], COLUMNS) if last["heads"] > 1 else 0
    names = ["", "mask, 60 %", "mean", *(f"head {i}" for i in range(heads))]
    return page.section(
        "What it sees",
        what,
        page.pictures(["", *(f"epoch {entry['epoch']:.4g}" for entry in shown)], over),
        f'<p class="between">At epoch {last["epoch"]:.4g}: the fewest patches that hold 60 % of the mass'
        + (", and the heads one by one.</p>" if heads else ".</p>"),
        page.pictures(names, detail),
    )


def _heads(folder: Path, entry: Mapping, place: str, picture: np.ndarray) -> Iterator[np.ndarray | None]:
    """Mask, mean, and the heads, from the strip of maps that `snapshot` saved: heads, mean, mask, side by
    side.
    """
    shape = (picture.shape[0], picture.shape[1])
    strip = _image(folder / f"{entry['maps'][place]}.png", "L")
    width = entry["grid"][1]
    if strip is None or strip.shape[1] < width * (entry["heads"] + 2):
        yield None
        return
    maps = [strip[:, at : at + width] for at in range(0, strip.shape[1], width)]
    yield cutout(picture, maps[-1] > 127)
    yield heat(maps[-2], shape)
    if entry["heads"] > 1:
        yield from (heat(values, shape) for values in maps[: min(entry["heads"], COLUMNS)])


def _neighbours(folder: Path) -> str:
    found = read_neighbours(folder)
    rows, most = [], 0
    for query in found.get("queries", []):
        near = query.get("neighbours", [])
        most = max(most, len(near))
        cells = [page.cell(_thumb(folder, query), query.get("label") or Path(query["name"]).name, alt=query["name"])]
        for one in near:
            same = "same" if query.get("label") and one.get("label") == query["label"] else ""
            under = f"{one['similarity']:.2f}  {one.get('label') or ''}".strip()
            cells.append(page.cell(_thumb(folder, one), under, alt=one["name"], mark=same))
        rows.append("".join(cells))
    text = f"Among {found.get('pictures', 0):,} pictures, by the cosine of their features."
    heads = ["picture", "nearest", *([""] * (most - 1))]
    return page.section("Nearest neighbours", text, page.pictures(heads, rows))


def _plan(run_dir: Path, described: Mapping) -> str:
    reasons = described.get("plan") or _json(run_dir / "plan.json") or []
    if isinstance(reasons, dict):
        reasons = reasons.get("reasons", [])
    rows = [[str(r.get(key, "")) for key in ("name", "value", "why")] for r in reasons if isinstance(r, dict)]
    return page.section("Why these settings", "What the plan chose from the data and the machine.", page.table(rows))


def _settings(run_dir: Path, run: Mapping) -> str:
    try:
        known = read_run(run_dir)
        usual, run = _usual(known), {**run, "evals": list(map(str, known.evals))}  # as they are typed
    except (UserError, TypeError, ValueError):  # a run of another version: shown as it is, nothing muted
        usual = {}
    groups: dict[str, dict[str, Any]] = {
        "Run": {name: value for name, value in run.items() if not isinstance(value, dict)}
    }
    groups |= {SECTIONS.get(str(name), str(name)): value for name, value in run.items() if isinstance(value, dict)}
    defaults = {"Run": usual} | {SECTIONS.get(name, name): usual.get(name, {}) for name in run}
    cards = []
    for title, values in groups.items():
        standard = defaults.get(title) or {}
        rows = [
            (name.replace("_", " "), _value(value), name in standard and standard[name] == value)
            for name, value in values.items()
            if name != "type"
        ]
        rows.sort(key=lambda row: row[2])
        if rows:
            cards.append(page.definitions(title, "" if title == "Run" else str(values.get("type", "")), rows))
    return page.section(
        "Settings",
        "All of them, as run.json has them; those at their default are pale.",
        f'<div class="grid settings">{"".join(cards)}</div>' if cards else "",
    )


def _usual(value: Any) -> dict[str, Any]:
    """The defaults of a settings value's own types, as plain data; a nested value is compared with its own
    type's.
    """
    found = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if dataclasses.is_dataclass(own):
            found[field.name] = _usual(own)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default_factory())
    return found


def _skipped(run_dir: Path) -> str:
    rows = []
    path = run_dir / "skipped.jsonl"
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(text)
            rows.append((str(row["name"]), str(row["reason"])))
        except (ValueError, KeyError, TypeError):
            continue
    rows = list(dict.fromkeys(rows))
    if not rows:
        return ""
    counts = Counter(reason for _, reason in rows).most_common(12)
    more = f" (the first {SHOWN_SKIPPED}; skipped.jsonl has all)" if len(rows) > SHOWN_SKIPPED else ""
    listed = page.table(rows[:SHOWN_SKIPPED], first="name")
    return page.section(
        "Left out",
        f"{len(rows):,} file{'s' if len(rows) > 1 else ''} could not be used; nothing stands in their place.",
        page.table((f"{count:,}", reason) for reason, count in counts),
        f"<details{' open' if len(rows) <= 12 else ''}><summary>By name{more}</summary>{listed}</details>",
    )


def _environment(described: Mapping, history: History) -> str:
    rows = [(name, str(value)) for name, value in (described.get("versions") or {}).items()]
    machine = described.get("machine")
    if isinstance(machine, dict):
        rows += [(name, str(value)) for name, value in machine.items()]
    elif machine:
        rows.append(("machine", str(machine)))
    times = history.line("time")[1]
    if times:
        spent = times[-1] + sum(before for before, after in pairwise(times) if after < before)  # resumed: starts anew
        rows.append(("time training", duration(spent)))
    data = described.get("data") or {}
    rows += [
        (f"data: {name.replace('_', ' ')}", _value(value))
        for name, value in data.items()
        if value not in (None, "", [])
    ]
    rows.append(
        (
            "report",
            f"{time.strftime('%Y-%m-%d %H:%M')}, Python {platform.python_version()}, {platform.machine()}",
        )
    )
    return page.section("Environment", "What it ran on.", page.table(rows))


def _quality(history: History) -> tuple[str, list[dict[str, Any]]]:
    """The name of the figure measured while training ("20-NN" where it is there) and the evaluations that have it."""
    rows = history.evaluations.get("knn") or history.evaluations.get("accuracy") or []
    names = [name for row in rows for name in row if re.fullmatch(r"\d+-NN|top-1", name)]
    if not names:
        return "", []
    name = "20-NN" if "20-NN" in names else names[0]
    return name, [row for row in rows if isinstance(row.get(name), int | float)]


def _floors(described: Mapping, history: History, name: str) -> dict[str, float]:
    """Raw pixels and random weights under the same vote, from run.json or from the metrics."""
    found = {}
    for key, label in FLOORS.items():
        row = (described.get("baselines") or {}).get(key) or (history.evaluations.get(key) or [{}])[-1]
        if isinstance(row.get(name), int | float):
            found[label] = float(row[name])
    return found


def _network(run: Mapping) -> str:
    backbone = run.get("backbone") or {}
    if backbone.get("type") == "ViT":
        return f"ViT-{backbone.get('size', '?')}/{backbone.get('patch', '?')}"
    return str(backbone.get("name") or backbone.get("type") or "A network")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, list):
        return (
            f"{len(value)}: {', '.join(map(_value, value[:8]))}, …"
            if len(value) > 8
            else ", ".join(map(_value, value)) or "–"
        )
    if isinstance(value, dict):
        inside = ", ".join(f"{name} {_value(item)}" for name, item in value.items() if name != "type")
        return f"{value.get('type', '')}({inside})"
    return "–" if value is None or value == "" else str(value)


def _at(data: Mapping, *names: str) -> Any:
    for name in names:
        data = data.get(name) if isinstance(data, Mapping) else None  # type: ignore[assignment]
    return data


def _thumb(folder: Path, described: Mapping) -> np.ndarray | None:
    return _image(folder / described["file"]) if described.get("file") else None


def _image(path: Path, mode: str = "RGB") -> np.ndarray | None:
    """A picture that this project saved; None where it is missing or cut short."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError):
        return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
