"""Short help of the commands with many settings: pages of text, which are printed before torch is imported."""

from pathlib import Path


def help_page(command: str) -> str | None:
    """Return the page of a command, as of `eval finetune`; None if its help consists of its options."""
    path = Path(__file__).parent / f"{command.replace(' ', '-')}.txt"
    return path.read_text() if path.is_file() else None


def page_examples(command: str) -> str:
    """Return the examples of a command's page."""
    return (help_page(command) or "").partition("\nexamples:\n")[2].rstrip()
