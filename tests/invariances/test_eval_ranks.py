"""Every evaluation on two gloo ranks equals one rank, including reference scores and written files."""

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
    """Return (results of one process, results of two): same network and images, separate caches."""
    one = all_evals.make(tmp_path_factory.mktemp("evals") / "one")
    two = one.with_name("two")
    shutil.copytree(one, two)
    (one / "rank0.json").write_text(json.dumps(all_evals.evaluate_all(one)))
    run_on_ranks([all_evals.__file__, str(two)], world=2)
    return one, two


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the paths at which two results differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [path for key in one for path in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [path for i, (a, b) in pairs for path in differences(a, b, f"{where}/{i}")]
    same = one == other if isinstance(one, str | bool | None) else one == pytest.approx(other, rel=1e-3, abs=1e-4)
    return [] if same else [f"{where}: {one!r} and {other!r}"]


@pytest.mark.parametrize("name", [*EVALUATIONS, "linear, fresh crops"])
def test_two_ranks_give_the_results_of_one(folders: tuple[Path, Path], name: str) -> None:
    """Values, reference scores, details (queries, objects, skipped files), data and the hash of the weights."""
    one, two = (read(folder / "rank0.json")[name] for folder in folders)
    for result in (one, two):
        result["checkpoint"].pop("source")
    two["data"] = json.loads(json.dumps(two["data"]).replace(str(folders[1]), str(folders[0])))
    assert not differences(one, two)
    assert read(folders[1] / "rank1.json")[name]["values"] == two["values"]
    assert any(0 < value < 100 for value in one["values"].values())  # sensitive to differences
    if name != "linear, fresh crops":  # its accuracy may be equal by chance
        assert one["values"] != one["references"]["random_weights"]


def test_files_are_written_once_and_only_for_the_network(folders: tuple[Path, Path]) -> None:
    one, two = (sorted((folder / "out").rglob("*.png")) for folder in folders)
    assert len(one) == 2 * 24
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_features_are_cached_by_rank_0(folders: tuple[Path, Path]) -> None:
    one, two = (sorted(f.name for f in (folder / "evals/features").iterdir()) for folder in folders)
    assert one == two != []
