"""Two processes that talk by gloo give the figures that one gives: every evaluation, with its floors and its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import all_evals
import pytest
from tiny import run_on_ranks

from dino_ssl.evals import EVALUATIONS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(where one process evaluated, where two did): the same network and pictures, and caches of their own."""
    one = all_evals.make(tmp_path_factory.mktemp("evals") / "one")
    two = one.with_name("two")
    shutil.copytree(one, two)
    (one / "rank0.json").write_text(json.dumps(all_evals.answers(one)))
    run_on_ranks([all_evals.__file__, str(two)], world=2)
    return one, two


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def close(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two results differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [found for key in one for found in close(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in pairs for found in close(a, b, f"{where}/{i}")]
    same = one == other if isinstance(one, str | bool | None) else one == pytest.approx(other, rel=1e-3, abs=1e-4)
    return [] if same else [f"{where}: {one!r} and {other!r}"]


@pytest.mark.parametrize("name", [*EVALUATIONS, "linear, fresh crops"])
def test_two_ranks_say_what_one_says(folders: tuple[Path, Path], name: str) -> None:
    """Values, floors, details (each query, each object, each file that was left out), data and the network's hash."""
    one, two = (read(folder / "rank0.json")[name] for folder in folders)
    for result in (one, two):
        result["checkpoint"].pop("source")
    two["data"] = json.loads(json.dumps(two["data"]).replace(str(folders[1]), str(folders[0])))
    assert not close(one, two)
    assert read(folders[1] / "rank1.json")[name]["values"] == two["values"]
    assert any(0 < value < 100 for value in one["values"].values())  # a figure that could differ
    few = name == "linear, fresh crops"  # of which two networks may get as many right
    assert few or one["values"] != one["floors"]["random_weights"]


def test_files_are_written_once_and_of_the_asked_network(folders: tuple[Path, Path]) -> None:
    one, two = (sorted((folder / "out").rglob("*.png")) for folder in folders)
    assert len(one) == 3 * 24
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_features_are_kept_by_the_first_rank_for_all(folders: tuple[Path, Path]) -> None:
    one, two = (sorted(f.name for f in (folder / "evals/features").iterdir()) for folder in folders)
    assert one == two != []
