"""The revisited benchmarks' scores: the official scorer's numbers, a slow oracle, and whole evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_ssl.data.benchmarks.revisited import Truth, read_ground_truth
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.data.transforms.pixel_ops import resize
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.descriptors import describe
from dino_ssl.evals.ranking import ranked_places
from dino_ssl.evals.retrieval import KAPPAS, PROTOCOLS, Retrieval, multiscale, protocol_scores
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT

LETTERS = {"easy": "E", "medium": "M", "hard": "H"}


def assert_official(expected: dict, file: Path, ranking: np.ndarray) -> None:
    """ranking [N, Q]: database numbers, best first; everything to the last digit."""
    truth = read_ground_truth(file).truth
    places = [Truth(*(ranked_places(ranking[:, q], kind) for kind in lists)) for q, lists in enumerate(truth)]
    for protocol, letter in LETTERS.items():
        scores, wanted = protocol_scores(places, protocol), expected[letter]
        assert (scores.mean_ap, list(scores.precision)) == (wanted["mAP"], wanted["mP@1,5,10"])
        assert scores.ap == wanted["AP"]


def test_the_official_scorers_numbers(shared: Path) -> None:
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


def test_protocols_against_a_filtered_ranking() -> None:
    """Take junk out of the ranking first, then average precision at recall steps of what is left."""
    rng = np.random.default_rng(0)
    rankings = [rng.choice(["easy", "hard", "junk", "wrong"], 40, p=[0.2, 0.2, 0.2, 0.4]) for _ in range(6)]
    rankings.append(np.array(["easy"] * 3 + ["wrong"] * 37))  # no hard positives: does not count under hard
    places = [Truth(*(np.flatnonzero(ranking == kind) for kind in Truth._fields)) for ranking in rankings]
    for protocol, (right, ignored) in PROTOCOLS.items():
        scores, aps = protocol_scores(places, protocol), []
        for ranking in rankings:
            left = np.isin(ranking[~np.isin(ranking, ignored)], right)
            at = np.flatnonzero(left)
            steps = [((i + 1) / (p + 1) + (i / p if p else 1)) / 2 for i, p in enumerate(at)]
            aps.append(sum(steps) / len(at) if len(at) else None)
        assert scores.ap == pytest.approx(aps)
        counted = [ap for ap in aps if ap is not None]
        assert scores.mean_ap == pytest.approx(sum(counted) / len(counted))
        assert len(counted) == (6 if protocol == "hard" else 7)
        assert all(0 <= p <= 1 for p in scores.precision)
        assert len(scores.precision) == len(KAPPAS)


def test_no_query_counts() -> None:
    none = np.empty(0, np.int64)
    scores = protocol_scores([Truth(np.array([3]), none, none)], "hard")
    assert np.isnan(scores.mean_ap)
    assert scores.ap == [None]


@pytest.fixture(scope="module")
def vit() -> Backbone:
    torch.manual_seed(0)
    return ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()


def smaller(image: torch.Tensor, scale: float) -> torch.Tensor:
    """[3, H, W] by hand: pixel i of the copy lies at (i + 1/2) / scale - 1/2 of the image, between its four pixels."""
    for axis in (1, 2):
        length = image.shape[axis]
        at = ((torch.arange(int(length * scale)) + 0.5) / scale - 0.5).clamp(0, length - 1)
        low = at.floor().long()
        share = (at - low)[:, None] if axis == 1 else at - low
        high = (low + 1).clamp(max=length - 1)
        image = image.index_select(axis, low) * (1 - share) + image.index_select(axis, high) * share
    return image


def test_multiscale_is_the_mean_over_smaller_copies(vit: Backbone) -> None:
    images = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        copies = [torch.stack([smaller(image, scale) for image in images]) for scale in (2**-0.5, 0.5)]
        assert [list(copy.shape[2:]) for copy in copies] == [[33, 28], [24, 20]]
        expected = (vit(images) + vit(copies[0]) + vit(copies[1])) / 3
        assert torch.allclose(multiscale(vit, images), expected, atol=1e-4)
        assert torch.equal(multiscale(vit, images, (1.0,)), vit(images))


SCENES = Scenes(count=5, size=48, part="test")


@pytest.mark.parametrize("settings", [Retrieval(), Retrieval(size=40, multiscale=True, query="whole")])
def test_a_whole_evaluation(vit: Backbone, settings: Retrieval) -> None:
    evaluator = settings.bind([SCENES.open()], EvalContext(size=32))
    scores = evaluator(vit)
    assert list(scores)[:3] == ["mAP easy", "mAP medium", "mAP hard"]
    assert len(scores) == 3 + 3 * len(KAPPAS)
    assert all(0 <= value <= 100 for value in scores.values())
    assert len(scores.details["AP"]["medium"]) == 5
    assert evaluator.data["database"]["images"] == 25
    assert scores == evaluator(vit)


def test_a_convnet_and_the_pixel_floor() -> None:
    args = (("channels", "(8,8,16,16)"), ("layers", "(1,1,1,1)"))
    evaluator = Retrieval(multiscale=True).bind([SCENES.open()], EvalContext(size=48))
    assert set(evaluator(Timm(name="resnet18", args=args).build().eval())) == set(evaluator.pixel_reference())


@pytest.mark.parametrize("batch_size", [1, 64])
def test_every_row_is_its_own_picture(vit: Backbone, batch_size: int) -> None:
    """Pictures of mixed shapes, which come out of order in batches: each row against that picture alone."""
    database = Retrieval().bind([SCENES.open()], EvalContext()).landmarks.database
    shapes = np.array([[(24, 32), (40, 16), (32, 32)][i % 3] for i in range(len(database))])
    context = EvalContext(size=32, batch_size=batch_size)
    out = describe(vit, database, shapes, vit, width=vit.embed_dim, what="cls", context=context)
    assert out.indices.tolist() == list(range(len(database)))
    for i, row in enumerate(out.features):
        image = torch.from_numpy(resize(database.read(i), *shapes[i].tolist())).permute(2, 0, 1)[None]
        with torch.no_grad():
            assert torch.allclose(vit(normalize(image))[0], row, atol=1e-4), i


class Watching(Backbone):
    """Remembers the sides of what it sees."""

    embed_dim, patch = 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += [tuple(images.shape[2:])] * len(images)
        return images.mean((2, 3))

    def features(self, images: torch.Tensor, layers: int = 1) -> list:
        raise NotImplementedError


def test_a_box_shrinks_as_its_picture_does() -> None:
    """Proportions are kept, no picture grows, and a side stays at least a patch at the smallest scale."""
    for settings, side, least in ((Retrieval(size=24), 24, 8), (Retrieval(size=400), 48, 8)):
        evaluator, network = settings.bind([SCENES.open()], EvalContext()), Watching()
        evaluator(network)
        sizes = evaluator.landmarks.boxed.sizes[:, ::-1] * side / 48
        expected = [tuple(np.maximum(np.rint(size), least).astype(int).tolist()) for size in sizes]
        assert sorted(network.seen) == sorted([*expected, *[(side, side)] * 25])
        assert len(set(expected)) > 2
    whole = Watching()
    Retrieval(query="whole", multiscale=True).bind([SCENES.open()], EvalContext())(whole)
    assert set(whole.seen) == {(48, 48), (33, 33), (24, 24)}


def test_features_are_kept(tmp_path: Path, vit: Backbone) -> None:
    evaluator = Retrieval().bind([SCENES.open()], EvalContext(size=32, cache=tmp_path))
    first = evaluator(vit)
    assert len(list(tmp_path.iterdir())) == 2
    assert evaluator(vit) == first
    other = Retrieval(multiscale=True).bind([SCENES.open()], EvalContext(size=32, cache=tmp_path))
    other(vit)
    assert len(list(tmp_path.iterdir())) == 4
    torch.manual_seed(1)
    stranger = ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()
    assert evaluator(stranger) == Retrieval().bind([SCENES.open()], EvalContext(size=32))(stranger)
    assert len(list(tmp_path.iterdir())) == 6
    assert evaluator(stranger).details != first.details
