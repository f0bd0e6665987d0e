"""The report's looks: its style sheet (report.css) and a few pieces of HTML.

Nothing is fetched: pictures travel inside of the page.
"""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document. The policy in its head forbids it to fetch anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n{''.join(body)}\n</main></body></html>\n"
    )


def section(title: str, text: str, *parts: str) -> str:
    """A headline, a sentence, and what it is about; the empty string where there is nothing to show."""
    shown = "".join(parts)
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{shown}</section>\n" if shown else ""


def tile(label: str, value: str, note: str = "", *, unit: str = "") -> str:
    unit = f" <span>{escape(unit)}</span>" if unit else ""
    return (
        f'<div class="card tile"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}{unit}</div><div class="small">{escape(note)}</div></div>'
    )


def bars(label: str, values: Mapping[str, float], note: str = "") -> str:
    """Percentages as bars from 0 to 100; the first is the one that matters."""
    rows = "".join(
        f'<div class="bar{" best" if place == 0 else ""}"><span>{escape(name)}</span>'
        f'<i style="width:{min(max(value, 0), 100):.1f}%"></i><b>{value:.1f} %</b></div>'
        for place, (name, value) in enumerate(values.items())
    )
    return (
        f'<div class="card tile wide"><div class="label">{escape(label)}</div>'
        f'<div class="value">{next(iter(values.values())):.1f} <span>%</span></div>{rows}'
        f'<div class="small" style="margin-top:8px">{escape(note)}</div></div>'
    )


def inline(image: np.ndarray, *, width: int = 192, alt: str = "") -> str:
    """An <img> with the picture in it, as JPEG, at most `width` wide."""
    if image.shape[1] > width:
        height = max(1, round(image.shape[0] * width / image.shape[1]))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=80, optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" loading="lazy">'


def cell(image: np.ndarray | None, under: str = "", *, alt: str = "", mark: str = "") -> str:
    """A table cell with a picture and a line below it; without a picture, a dash. `mark`: a class for the
    line.
    """
    shown = "–" if image is None else inline(image, alt=alt)
    line = f'<div class="under {mark}" title="{escape(under)}">{escape(under)}</div>' if under else ""
    return f"<td>{shown}{line}</td>"


def dataset(heads: list[str], rows: Iterable[str]) -> str:
    """A table of pictures that scrolls sideways where it is wider than the page. rows: what is inside of each
    <tr>
    """
    rows = list(rows)
    if not rows:
        return ""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="images"><thead><tr>{top}</tr></thead>{body}</table></div>'


def definitions(title: str, kind: str, rows: Iterable[tuple[str, str, bool]]) -> str:
    """A card of names and values; the third of each row says whether it is the default, which is printed
    pale.
    """
    listed = "".join(
        f"<dt{_default(usual)}>{escape(name)}</dt><dd{_default(usual)}>{escape(value)}</dd>"
        for name, value, usual in rows
    )
    kind = f" <span>{escape(kind)}</span>" if kind else ""
    return f'<div class="card"><h3>{escape(title)}{kind}</h3><dl>{listed}</dl></div>'


def table(rows: Iterable[Iterable[str]], *, first: str = "") -> str:
    """Rows of text; `first` is the class of each row's first cell."""
    body = "".join(
        "<tr>" + "".join(f'<td class="{first if i == 0 else ""}">{escape(c)}</td>' for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div style="overflow-x:auto"><table class="list">{body}</table></div>' if body else ""


def _default(usual: bool) -> str:
    return ' class="default"' if usual else ""
