"""Durations and sizes as text."""


def duration(seconds: float) -> str:
    """Return `8 s`, `3 min 20 s`, `25 min`, `2 h 05 min`, `3 d 4 h`: two units at most."""
    whole = max(0, round(seconds))
    minutes, hours = round(whole / 60), round(whole / 3600)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min" + (f" {whole % 60:02d} s" if whole % 60 else "")
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 48 * 60 else f"{hours // 24} d {hours % 24} h"


def format_bytes(count: int) -> str:
    """Return `312 bytes`, `4.1 kB`, `147 GB`: decimal units."""
    if count < 1000:
        return f"{count} bytes"
    value, units = count / 1000, ["kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
