"""The benchmark of the evaluations at small sizes: it runs, and the fast way says what the plain one says."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import evaluations

SMALL = {
    "knn": partial(evaluations.knn_section, dataset=3000, asked=40, wide=32, classes=20),
    "label_propagation": partial(evaluations.label_propagation_section, h=14, w=17, wide=16),
    "davis_score": partial(evaluations.davis_score_section, count=4),
}
APART = {"blocks": 1e-9, "blocks, stored in float16": 10, "local windows": 1e-5}
"""How far a candidate's result may lie from the plain one's: percent of accuracy, or a share of a label."""


def test_every_section_runs_and_is_equal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SMALL.keys() == evaluations.SECTIONS.keys()
    monkeypatch.setattr(evaluations, "SECTIONS", SMALL)
    monkeypatch.setattr(sys, "argv", ["evaluations.py", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    evaluations.main()
    sections = json.loads((tmp_path / "found.json").read_text())["sections"]
    assert sections.keys() == SMALL.keys()
    printed = capsys.readouterr().out
    for name, section in sections.items():
        assert f"{name}: {section['what']}" in printed
        first, *others = section["results"].items()
        assert first[1]["ratio"] == 1
        for candidate, row in others:
            assert row["seconds"] > 0
            assert row["error"] <= APART[candidate], candidate


def test_an_unknown_section_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluations.py", "kmn"])
    with pytest.raises(SystemExit):
        evaluations.main()
    assert "there is no section kmn; expected knn" in capsys.readouterr().err


def test_the_plain_votes_tell_the_classes_apart() -> None:
    """The comparison is worth something: an accuracy that is neither chance nor perfect."""
    section = SMALL["knn"]()
    plain = next(iter(section.candidates.values()))()
    assert 10 < plain["20-NN"] < 100  # pyright: ignore[reportIndexIssue]
