"""Reference checks of label propagation and the DAVIS scorer."""

import json
from pathlib import Path

import torch

from golden import SINGLE, Check, Result, read


def video_propagation(path: Path) -> Result:
    """Check the soft masks of every frame after the first, and the label maps at image resolution."""
    from dino_ssl.evals.label_propagation import label_map, propagate

    data, check = read(path), Check()
    config = json.loads(str(data["config"]))
    h, w = config["grid"]
    features = torch.from_numpy(data["features"]).unflatten(1, (h, w))
    soft = list(
        propagate(
            features,
            torch.from_numpy(data["first_mask"]).permute(1, 2, 0),
            context=config["n_last_frames"],
            radius=config["neighborhood"],
            top_k=config["topk"],
            temperature=config["temperature"],
        )
    )
    check.close("soft_masks", torch.stack(soft).permute(0, 3, 1, 2), data["soft_masks"])
    side = config["patch_size"]
    for frame, expected in enumerate(data["label_maps"]):
        check.equal(f"label_maps/{frame}", label_map(soft[frame], h * side, w * side), expected)
    return check.result()


def davis_mini(path: Path) -> Result:
    """Check every number of the official scorer."""
    from dino_ssl.evals.davis_score import score_results

    expected, check = json.loads((path / "expected.json").read_text()), Check()
    actual = score_results(path / "results", path / "DAVIS")
    check.equal("objects", sorted(actual["per_object"]), sorted(expected["per_object"]))
    for name, value in expected.items():
        if name != "per_object":
            check.close(name, actual[name], value, SINGLE)
    for name, values in expected["per_object"].items():
        for statistic, value in values.items():
            check.close(f"{name}/{statistic}", actual["per_object"][name][statistic], value, SINGLE)
    return check.result()
