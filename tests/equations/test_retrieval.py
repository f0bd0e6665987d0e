"""Retrieval: scores equal the official scorer and a slow oracle; complete evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_ssl.data.benchmarks.revisited import Truth, read_ground_truth
from dino_ssl.data.synthetic.landmarks import synthetic_landmarks
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.features import extract_resized
from dino_ssl.evals.retrieval import KAPPAS, PROTOCOLS, Retrieval, multiscale, protocol_scores
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.preprocessing import normalize, resize

LETTERS = {"easy": "E", "medium": "M", "hard": "H"}


def assert_official(expected: dict, file: Path, ranking: np.ndarray) -> None:
    """Compare exactly; ranking [N, Q]: row indices of the database, best first."""
    truth = read_ground_truth(file).truth
    by_kind = [
        Truth(*(np.flatnonzero(np.isin(ranking[:, q], rows)) for rows in kinds)) for q, kinds in enumerate(truth)
    ]
    for protocol, letter in LETTERS.items():
        scores, official = protocol_scores(by_kind, protocol), expected[letter]
        assert (scores.mean_ap, list(scores.precision)) == (official["mAP"], official["mP@1,5,10"])
        assert scores.ap == official["AP"]


def test_scores_equal_the_official_scorer(shared: Path) -> None:
    folder = shared / "data" / "rparis_mini"
    expected = json.loads((folder / "expected_map.json").read_text())
    mini = next(key for key in expected if key.startswith("mini"))
    assert_official(expected[mini], folder / "gnd_rparis_mini.json", np.load(folder / "ranks_mini_colourhist.npy"))
    for name in ("gnd_roxford5k", "gnd_rparis6k"):
        truth = read_ground_truth(folder / f"{name}.pkl")
        n = len(truth.database)
        for title in (key for key in expected if key.startswith(name)):
            if "order" in title:  # junk, easy, hard, rest
                firsts = [np.concatenate([lists.junk, lists.easy, lists.hard]) for lists in truth.truth]
                columns = [np.concatenate([first, np.setdiff1d(np.arange(n), first)]) for first in firsts]
                ranking = np.stack(columns, axis=1)
            else:  # ranks[i, q] = (1237 i + 13 q) mod n
                ranking = (1237 * np.arange(n)[:, None] + 13 * np.arange(len(truth.queries))) % n
            assert_official(expected[title], folder / f"{name}.pkl", ranking)


def test_protocols_equal_scores_of_a_filtered_ranking() -> None:
    """Remove junk from the ranking first, then average the precision at recall steps."""
    rng = np.random.default_rng(0)
    rankings = [rng.choice(["easy", "hard", "junk", "negative"], 40, p=[0.2, 0.2, 0.2, 0.4]) for _ in range(6)]
    rankings.append(np.array(["easy"] * 3 + ["negative"] * 37))  # no hard positives: not counted under hard
    ranks = [Truth(*(np.flatnonzero(ranking == kind) for kind in Truth._fields)) for ranking in rankings]
    for protocol, (positive, junk) in PROTOCOLS.items():
        scores, aps = protocol_scores(ranks, protocol), []
        for ranking in rankings:
            at = np.flatnonzero(np.isin(ranking[~np.isin(ranking, junk)], positive))
            steps = [((i + 1) / (p + 1) + (i / p if p else 1)) / 2 for i, p in enumerate(at)]
            aps.append(sum(steps) / len(at) if len(at) else None)
        assert scores.ap == pytest.approx(aps)
        counted = [ap for ap in aps if ap is not None]
        assert scores.mean_ap == pytest.approx(sum(counted) / len(counted))
        assert len(counted) == (6 if protocol == "hard" else 7)
        assert all(0 <= p <= 1 for p in scores.precision)
        assert len(scores.precision) == len(KAPPAS)


def test_scores_without_positives_are_nan() -> None:
    empty = np.empty(0, np.int64)
    scores = protocol_scores([Truth(np.array([3]), empty, empty)], "hard")
    assert np.isnan(scores.mean_ap)
    assert scores.ap == [None]


@pytest.fixture(scope="module")
def vit() -> Backbone:
    torch.manual_seed(0)
    return ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()


def smaller(image: torch.Tensor, scale: float) -> torch.Tensor:
    """Scale [3, H, W] bilinearly: pixel i of the copy is at (i + 1/2) / scale - 1/2 of the image."""
    for axis in (1, 2):
        length = image.shape[axis]
        at = ((torch.arange(int(length * scale)) + 0.5) / scale - 0.5).clamp(0, length - 1)
        low = at.floor().long()
        weight = (at - low)[:, None] if axis == 1 else at - low
        high = (low + 1).clamp(max=length - 1)
        image = image.index_select(axis, low) * (1 - weight) + image.index_select(axis, high) * weight
    return image


def test_multiscale_is_the_mean_over_scaled_copies(vit: Backbone) -> None:
    images = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        copies = [torch.stack([smaller(image, scale) for image in images]) for scale in (2**-0.5, 0.5)]
        assert [list(copy.shape[2:]) for copy in copies] == [[33, 28], [24, 20]]
        expected = (vit(images) + vit(copies[0]) + vit(copies[1])) / 3
        assert torch.allclose(multiscale(vit, images), expected, atol=1e-4)
        assert torch.equal(multiscale(vit, images, (1.0,)), vit(images))


SCENES = Scenes(count=5, size=48, part="test")


@pytest.mark.parametrize("settings", [Retrieval(), Retrieval(size=40, multiscale=True, query="whole")])
def test_a_complete_evaluation(vit: Backbone, settings: Retrieval) -> None:
    prepared = settings.prepare([SCENES.open()], EvalContext(size=32))
    scores = prepared(vit)
    assert list(scores)[:3] == ["mAP easy", "mAP medium", "mAP hard"]
    assert len(scores) == 3 + 3 * len(KAPPAS)
    assert all(0 <= value <= 100 for value in scores.values())
    assert len(scores.details["AP"]["medium"]) == 5
    assert prepared.data["database"]["images"] == 25
    assert scores == prepared(vit)


def test_convnets_and_raw_pixels_are_scored() -> None:
    args = (("channels", "(8,8,16,16)"), ("layers", "(1,1,1,1)"))
    prepared = Retrieval(multiscale=True).prepare([SCENES.open()], EvalContext(size=48))
    assert set(prepared(Timm(name="resnet18", args=args).build().eval())) == set(prepared.references["raw_pixels"]())


@pytest.mark.parametrize("batch_size", [1, 64])
def test_every_row_belongs_to_its_image(vit: Backbone, batch_size: int) -> None:
    """Images of mixed shapes, which are batched in another order."""
    database = SCENES.open()
    shapes = np.array([[(24, 32), (40, 16), (32, 32)][i % 3] for i in range(len(database))])
    context = EvalContext(size=32, batch_size=batch_size)
    out = extract_resized(vit, database, shapes, vit, width=vit.embed_dim, key="cls", context=context)
    assert out.indices.tolist() == list(range(len(database)))
    for i, row in enumerate(out.features):
        image = torch.from_numpy(resize(database.read(i), *shapes[i].tolist())).permute(2, 0, 1)[None]
        with torch.no_grad():
            assert torch.allclose(vit(normalize(image))[0], row, atol=1e-4), i


class SizeRecorder(Backbone):
    """Records the sizes of its inputs."""

    embed_dim, patch = 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes += [tuple(images.shape[2:])] * len(images)
        return images.mean((2, 3))

    def features(self, images: torch.Tensor, layers: int = 1) -> list:
        raise NotImplementedError


def test_a_query_box_is_scaled_like_its_image() -> None:
    """Aspect ratios are kept, images are not enlarged, and a side has at least one patch at the smallest scale."""
    boxed = synthetic_landmarks(SCENES).boxed
    for settings, side, least in ((Retrieval(size=24), 24, 8), (Retrieval(size=400), 48, 8)):
        network = SizeRecorder()
        settings.prepare([SCENES.open()], EvalContext())(network)
        sizes = boxed.sizes[:, ::-1] * side / 48
        expected = [tuple(np.maximum(np.rint(size), least).astype(int).tolist()) for size in sizes]
        assert sorted(network.sizes) == sorted([*expected, *[(side, side)] * 25])
        assert len(set(expected)) > 2
    whole = SizeRecorder()
    Retrieval(query="whole", multiscale=True).prepare([SCENES.open()], EvalContext())(whole)
    assert set(whole.sizes) == {(48, 48), (33, 33), (24, 24)}


def test_features_are_cached(tmp_path: Path, vit: Backbone) -> None:
    prepared = Retrieval().prepare([SCENES.open()], EvalContext(size=32, cache=tmp_path))
    first = prepared(vit)
    assert len(list(tmp_path.iterdir())) == 2
    assert prepared(vit) == first
    other = Retrieval(multiscale=True).prepare([SCENES.open()], EvalContext(size=32, cache=tmp_path))
    other(vit)
    assert len(list(tmp_path.iterdir())) == 4
    torch.manual_seed(1)
    network = ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()
    assert prepared(network) == Retrieval().prepare([SCENES.open()], EvalContext(size=32))(network)
    assert len(list(tmp_path.iterdir())) == 6
    assert prepared(network).details != first.details
