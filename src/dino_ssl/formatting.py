"""Durations and sizes as text."""


def duration(seconds: float) -> str:
    """Return `8 s`, `3 min 20 s`, `25 min`, `2 h 05 min`, `3 d 4 h`: two units at most."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        minutes, seconds = divmod(whole, 60)
        return f"{minutes} min {seconds:02d} s" if seconds else f"{minutes} min"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def format_bytes(count: int) -> str:
    """Return `312 bytes`, `4.1 kB`, `147 GB`: decimal units."""
    if count < 1000:
        return f"{count} bytes"
    value, unit = float(count), 0
    while value >= 999.5:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {('kB', 'MB', 'GB', 'TB', 'PB')[unit - 1]}"
