"""Pieces of HTML for reports and galleries, and their style sheet. Images are inlined: a page loads nothing."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

from dino_ssl.files import atomic_write
from dino_ssl.formatting import visible

STYLE = Path(__file__).with_name("html.css").read_text(encoding="utf-8")


def page(title: str, body: Iterable[str], script: str = "") -> Iterator[str]:
    """Yield an HTML document part by part. Its content security policy forbids loading anything, and other scripts.

    script: a JavaScript module that the document runs. A page with one may show images of its own folder.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; img-src data: file: 'self'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        )
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n"
    )
    yield from body
    yield "\n</main>"
    yield f'<script type="module">{script}</script>' if script else ""
    yield "</body></html>\n"


def write_page(path: Path, title: str, body: Iterable[str], script: str = "") -> Path:
    """Write a `page` atomically; only one part of the body is in memory at a time. Return the path."""

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(page(title, body, script))

    return atomic_write(path, write)


def text(name: str) -> str:
    """Return a foreign text, such as a file name, as HTML: control characters as escapes, undecodable bytes as ?."""
    return escape(visible(name.encode("utf-8", "replace").decode()))


def jpeg(data: bytes, alt: str) -> str:
    """Return an inlined JPEG as an image with an alternative text."""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{encoded}" alt="{text(alt)}" loading="lazy">'


def message(sentence: str) -> str:
    """Return a message of the library as HTML; names in backticks become code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(sentence))


def section(title: str, sentence: str, *parts: str) -> str:
    """Return a heading, a sentence (HTML) and the parts, or an empty string if all parts are empty."""
    content = "".join(parts)
    return f"<section><h2>{escape(title)}</h2><p>{sentence}</p>{content}</section>\n" if content else ""


def tile(label: str, value: str, note: str = "", *, unit: str = "") -> str:
    """Return a card with a large value."""
    unit = f" <span>{escape(unit)}</span>" if unit else ""
    return (
        f'<div class="card tile"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}{unit}</div><div class="small">{escape(note)}</div></div>'
    )


def bars(label: str, values: Mapping[str, float], note: str = "") -> str:
    """Return a card with percentages as bars; the first is the result, the others are references."""
    rows = "".join(
        f'<div class="bar{"" if number else " best"}"><span>{escape(name)}</span>'
        f'<i style="width:{min(max(value, 0), 100):.1f}%"></i><b>{value:.1f} %</b></div>'
        for number, (name, value) in enumerate(values.items())
    )
    return (
        f'<div class="card tile wide"><div class="label">{escape(label)}</div>'
        f'<div class="value">{next(iter(values.values())):.1f} <span>%</span></div>{rows}'
        f'<div class="small" style="margin-top:8px">{escape(note)}</div></div>'
    )


def image_cell(path: Path | None, caption: str = "", *, alt: str = "", kind: str = "") -> str:
    """Return a table cell with an inlined JPEG and a caption; a dash if the file is missing. kind: CSS class."""
    image = "–"
    if path is not None and path.is_file():
        image = jpeg(path.read_bytes(), alt)
    line = f'<div class="under {kind}" title="{escape(caption)}">{escape(caption)}</div>' if caption else ""
    return f"<td>{image}{line}</td>"


def image_table(headings: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table of `image_cell` rows that scrolls sideways; an empty string without rows."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    table = f'<table class="images"><thead><tr>{head}</tr></thead>{body}</table>'
    return f'<div class="scroll">{table}</div>' if body else ""


def table(rows: Iterable[Iterable[str]], *, wrap: bool = False) -> str:
    """Return rows of text as a table, or an empty string without rows. wrap: long texts of the first column too."""
    body = "".join(f"<tr>{''.join(f'<td>{message(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = "list wrap" if wrap else "list"
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>' if body else ""
