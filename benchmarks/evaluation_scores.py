"""Scores of trained networks and of random weights in every evaluation, on small public datasets.

    python benchmarks/evaluation_scores.py runs/seed0 runs/seed1 --data data --json scores.json

The runs are one recipe trained with several seeds. DATA has imagenette128 (train, val), clothing128 (train, test),
rparis_mini, davis and voc12. As many networks with random weights are evaluated as runs are given, and raw pixels where
an evaluation defines them. Evaluations that are in the output file already are skipped.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import dino_ssl
from attention_paired import random_network
from common import about, save
from dino_ssl.config import to_dict
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.evals.base import EvalContext, Evaluation
from dino_ssl.evals.copy_detection import CopyDetection
from dino_ssl.evals.features import weights_hash
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.linear import Linear
from dino_ssl.evals.low_shot import LowShot
from dino_ssl.evals.object_discovery import ObjectDiscovery
from dino_ssl.evals.retrieval import Retrieval
from dino_ssl.evals.two_crop_retrieval import TwoCropRetrieval
from dino_ssl.evals.video_segmentation import VideoSegmentation
from dino_ssl.models.backbone import Attentive, Backbone
from dino_ssl.terminal import Terminal


@dataclass(frozen=True)
class SuiteEntry:
    """One evaluation of the suite and its data."""

    evaluation: Evaluation
    sources: tuple[str, ...]
    """Folders below DATA."""
    needs_attention: bool = False
    """Needs attention maps: skipped for ConvNets."""

    @property
    def title(self) -> str:
        """Name, switches that are on, and data: unique in the suite."""
        switches = [f" --{name}" for name in ("multiscale", "center") if getattr(self.evaluation, name, False)]
        return f"{self.evaluation.name}{''.join(switches)}, {self.sources[0].partition('/')[0]}"


IMAGENETTE, CLOTHING = ("imagenette128/train", "imagenette128/val"), ("clothing128/train", "clothing128/test")
SUITE = (
    SuiteEntry(KNN(k=(20,)), IMAGENETTE),
    SuiteEntry(KNN(k=(20,)), CLOTHING),
    SuiteEntry(LowShot(), IMAGENETTE),
    SuiteEntry(LowShot(), CLOTHING),
    SuiteEntry(Linear(), IMAGENETTE),
    SuiteEntry(Linear(), CLOTHING),
    SuiteEntry(Retrieval(), ("rparis_mini",)),
    SuiteEntry(CopyDetection(), ("imagenette128/val",)),
    SuiteEntry(CopyDetection(multiscale=True), ("imagenette128/val",)),
    SuiteEntry(TwoCropRetrieval(), ("imagenette128/val",)),
    SuiteEntry(TwoCropRetrieval(), ("clothing128/test",)),
    SuiteEntry(VideoSegmentation(), ("davis",)),
    SuiteEntry(AttentionMasks(), ("voc12",), needs_attention=True),
    SuiteEntry(ObjectDiscovery(split="val"), ("voc12",), needs_attention=True),
    SuiteEntry(ObjectDiscovery(split="val", center=True), ("voc12",), needs_attention=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders or weights: one network, several seeds")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--only", nargs="+", default=[""], help="evaluations whose title contains one of these texts")
    parser.add_argument("--json", type=Path, help="output file, written after each evaluation")
    options = parser.parse_args()
    networks = [dino_ssl.load(run) for run in options.runs]
    description = about(vars(options)) | {"precision": "float32", "weights": [weights_hash(each) for each in networks]}
    results = known_results(options.json, description["weights"])
    for item in SUITE:
        is_defined = isinstance(networks[0], Attentive) or not item.needs_attention
        is_selected = any(text in item.title for text in options.only)
        if is_defined and is_selected and item.title not in results:
            results[item.title] = score(item, options.data, networks)
            print_scores(item.title, results[item.title])
            save(options.json, {"benchmark": "evaluation_scores", **description, "evaluations": results})


def known_results(path: Path | None, weights: list[str]) -> dict[str, Any]:
    """Return the evaluations of an existing output file; exit if they are of other networks."""
    if path is None or not path.is_file():
        return {}
    known = json.loads(path.read_text())
    if known["weights"] != weights:
        raise SystemExit(f"{path} has scores of other networks: expected another file for --json")
    return known["evaluations"]


def score(item: SuiteEntry, data: Path, networks: list[Backbone]) -> dict[str, Any]:
    """Return the scores of the networks, of as many networks with random weights, and of raw pixels."""
    context = EvalContext(size=networks[0].transform.size, progress=Terminal().progress)
    prepared = item.evaluation.prepare([str(data / source) for source in item.sources], context)
    random = [random_network(networks[0], seed) for seed in range(len(networks))]
    return {
        "protocol": to_dict(item.evaluation),
        "size": prepared.size,
        "trained": [prepared(network) for network in networks],
        "random weights": [prepared(network) for network in random],
        **{name.replace("_", " "): reference() for name, reference in prepared.references.items()},
    }


def print_scores(title: str, result: dict[str, Any]) -> None:
    """Print a row for each score: mean, smallest and largest of the networks."""
    table = Table("score", "trained", "random weights", "raw pixels", title=title)
    for name in result["trained"][0]:
        cells = [mean_and_range([each[name] for each in result[key]]) for key in ("trained", "random weights")]
        raw = result.get("raw pixels", {}).get(name)
        table.add_row(name, *cells, "-" if raw is None else f"{raw:.1f}")
    Terminal().console.print(table)


def mean_and_range(values: list[float]) -> str:
    """Return mean, smallest and largest value as text."""
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
