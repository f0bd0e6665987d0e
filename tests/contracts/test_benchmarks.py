"""The benchmark of the evaluations at small sizes: it runs, and all implementations give the same results."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import evaluations

SMALL = {
    "knn": partial(evaluations.knn_section, num_train=3000, num_queries=40, width=32, classes=20),
    "label_propagation": partial(evaluations.label_propagation_section, h=14, w=17, width=16),
    "davis_score": partial(evaluations.davis_score_section, count=4),
}
TOLERANCES = {"blocks": 1e-9, "blocks, stored in float16": 10, "local windows": 1e-5}
"""Largest difference to the definition: accuracy in percent, or label probability."""


def test_sections_run_and_agree_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SMALL.keys() == evaluations.SECTIONS.keys()
    monkeypatch.setattr(evaluations, "SECTIONS", SMALL)
    monkeypatch.setattr(sys, "argv", ["evaluations.py", "--rounds", "1", "--json", str(tmp_path / "result.json")])
    evaluations.main()
    sections = json.loads((tmp_path / "result.json").read_text())["sections"]
    assert sections.keys() == SMALL.keys()
    printed = capsys.readouterr().out
    for name, section in sections.items():
        assert f"{name}: {section['what']}" in printed
        first, *others = section["results"].items()
        assert first[1]["ratio"] == 1
        for candidate, row in others:
            assert row["seconds"] > 0
            assert row["error"] <= TOLERANCES[candidate], candidate


def test_unknown_section_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluations.py", "kmn"])
    with pytest.raises(SystemExit):
        evaluations.main()
    assert "unknown section kmn; expected knn" in capsys.readouterr().err


def test_plain_knn_is_neither_perfect_nor_chance() -> None:
    section = SMALL["knn"]()
    accuracies = next(iter(section.candidates.values()))()
    assert 10 < accuracies["20-NN"] < 100  # pyright: ignore[reportIndexIssue]
