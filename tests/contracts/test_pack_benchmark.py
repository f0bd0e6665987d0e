"""The benchmark of packs at a small size: it runs, and says what it measured of which."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import pack


def test_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pack.py", "--count", "6", "--side", "24", "--batch", "4", "--rounds", "1", "--scratch"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path), "--json", str(tmp_path / "found.json")])
    pack.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 6
    assert found["results"].keys() == {f"{w}, {s}" for w in ("open", "read", "picture") for s in ("warm", "cold")}
    printed = capsys.readouterr().out
    for what, rows in found["results"].items():
        assert what in printed
        assert rows["folder"]["ratio"] == 1
        assert rows["pack"]["ms"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
