"""Reference check of the k-NN evaluation."""

import json
from pathlib import Path

import torch

from golden import Check, Result, read


def knn(path: Path) -> Result:
    """Check the top-1 and top-5 accuracies in percent."""
    from dino_ssl.evals.knn import knn_accuracy

    data, check = read(path), Check()
    settings = json.loads(str(data["config"]))
    arrays = [torch.from_numpy(data[key]) for key in ("train", "train_labels", "test", "test_labels")]
    ks = [int(key.removeprefix("top1_top5/k")) for key in data.files if key.startswith("top1_top5/")]
    result = knn_accuracy(*arrays, k=ks, temperature=settings["temperature"])
    for k in ks:  # one image more would change the accuracy by 100 / M percent
        check.close(f"k{k}", [result[f"{k}-NN"], result[f"{k}-NN top-5"]], data[f"top1_top5/k{k}"], 1e-9)
    return check.result()
