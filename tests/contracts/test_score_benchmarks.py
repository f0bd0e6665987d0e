"""benchmarks/evaluation_scores.py and benchmarks/scenes.py at a small size."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import SIMPLE_SCENES, Scenes
from dino_ssl.evals.knn import KNN
from dino_ssl.models.vit import ViT
from dino_ssl.presets.small import demo
from dino_ssl.state import export_backbone

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import evaluation_scores
import scenes


def test_hand_made_features_and_random_weights_are_scored_on_scenes() -> None:
    scores = scenes.measure(replace(SIMPLE_SCENES, size=32), 60)
    assert scores.keys() == {*scenes.FEATURES, "random weights"}
    assert len(scores["random weights"]) == len(scenes.SEEDS)
    assert scores["histogram of the Laplacian"][0] > 20  # twice the accuracy of chance


def test_the_titles_of_the_suite_are_unique() -> None:
    assert len({item.title for item in evaluation_scores.SUITE}) == len(evaluation_scores.SUITE)


def test_networks_are_scored_once_and_other_networks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        Scenes(count=12, size=32, classes=3, part=part).write(tmp_path / part)
    files = []
    for seed in range(3):
        torch.manual_seed(seed)
        run = edit(
            demo(), backbone=ViT(width=24, depth=1, heads=2, patch=8, image_size=32), out=str(tmp_path / f"{seed}")
        )
        files.append(str(export_backbone(run, run.backbone.build(drop_path=0.0), "last")))
    result_file = tmp_path / "scores.json"
    entry = evaluation_scores.SuiteEntry(KNN(k=(1,)), ("train", "val"))
    monkeypatch.setattr(evaluation_scores, "SUITE", (entry,))

    def run_script(*networks: str) -> dict:
        arguments = ["evaluation_scores.py", *networks, "--data", str(tmp_path), "--json", str(result_file)]
        monkeypatch.setattr(sys, "argv", arguments)
        evaluation_scores.main()
        return json.loads(result_file.read_text())

    result = run_script(*files[:2])
    [scores] = result["evaluations"].values()
    assert len(scores["trained"]) == len(scores["random weights"]) == 2
    assert scores["raw pixels"].keys() == scores["trained"][0].keys()
    assert all(0 <= each["1-NN"] <= 100 for each in (*scores["trained"], *scores["random weights"]))
    monkeypatch.setattr(evaluation_scores, "score", None)  # known scores are not computed again
    assert run_script(*files[:2])["evaluations"] == result["evaluations"]
    with pytest.raises(SystemExit, match="other networks"):
        run_script(*files[1:])
