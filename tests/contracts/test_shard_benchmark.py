"""The benchmark of shards runs at a small size."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import shards


def test_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shards.py", "--count", "6", "--side", "24", "--batch", "4", "--rounds", "1", "--scratch"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path), "--json", str(tmp_path / "result.json")])
    shards.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 6
    assert result["results"].keys() == {
        f"{kind}, {state}" for kind in ("open", "read", "decode") for state in ("warm", "cold")
    }
    printed = capsys.readouterr().out
    for measurement, rows in result["results"].items():
        assert measurement in printed
        assert rows["folder"]["ratio"] == 1
        assert rows["shards"]["ms"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
