"""JSON files of measured figures in docs/, and studies of tables, have command, machine and date."""

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for name in ("benchmarks", "ablations") for path in sorted((ROOT / "docs" / name).glob("*.json"))]
STUDIES = sorted((ROOT / "docs/ablations/studies").rglob("study.json"))
FIELDS = ("command", "machine", "date")
WITHOUT_COMMAND = (
    "time_to_accuracy-small-64px.json",
    "time_to_accuracy-small-64px-half-an-hour.json",
    "time_to_accuracy-small-64px-half-an-hour-long-schedules.json",
    "time_to_accuracy-vit-tiny.json",
    "time_to_accuracy-narrow-vit-patches.json",
)
"""Recorded before the script wrote the command; their note has what is known."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_describes_its_measurement(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"(?<![\w./])/\w+", text), "an absolute path"
    result = json.loads(text)
    if path.name in WITHOUT_COMMAND:
        assert result["note"]
        return
    assert [name for name in FIELDS if not result.get(name)] == [], "missing"
    program, script, *_ = shlex.split(result["command"])
    if program != "dino":
        assert program == "python"
        assert re.fullmatch(r"(benchmarks|tests/reference)/\w+\.py", script)
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT / "docs/ablations/studies")))
def test_study_has_its_commands_and_its_results_machine_and_date(path: Path) -> None:
    study = json.loads(path.read_text())
    assert study["commands"]
    assert all(shlex.split(command)[:3] == ["dino", "ablate", study["table"]] for command in study["commands"])
    results = sorted(path.parent.glob("*/seed*/result.json"))
    assert results
    for file in (path, *results):
        assert not re.findall(r"(?<![\w./])/\w+", file.read_text()), "an absolute path"
    assert all(json.loads(file.read_text())[name] for file in results for name in ("machine", "date"))


def test_exceptions_exist() -> None:
    assert set(WITHOUT_COMMAND) <= {path.name for path in FILES}
