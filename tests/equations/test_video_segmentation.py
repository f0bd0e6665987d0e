"""Label propagation equals loops, for any tiles and ranks; complete evaluations of video segmentation."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_ssl import distributed
from dino_ssl.data.masks import write_mask
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, Scores, reference_scores
from dino_ssl.evals.davis_score import score_results
from dino_ssl.evals.label_propagation import (
    input_size,
    label_map,
    label_propagation,
    one_hot,
    propagate,
    resize_nearest,
)
from dino_ssl.evals.video_segmentation import RawPatches, VideoSegmentation, segment
from dino_ssl.models import Timm, ViT
from dino_ssl.models.backbone import Backbone


def oracle(query: Tensor, keys: Tensor, labels: Tensor, radius: int, top_k: int, temperature: float) -> Tensor:
    """Propagate one position and one neighbor at a time."""
    h, w, _ = query.shape
    out = torch.zeros(h, w, labels.shape[-1])
    for y in range(h):
        for x in range(w):
            near = []
            for frame in range(len(keys)):
                for v in range(h):
                    for u in range(w):
                        if radius == 0 or (abs(v - y) <= radius and abs(u - x) <= radius):
                            cosine = float(query[y, x].double() @ keys[frame, v, u].double())
                            near.append((cosine, labels[frame, v, u]))
            near.sort(key=lambda pair: -pair[0])
            least = near[min(top_k, len(near)) - 1][0]
            kept = [(math.exp(cosine / temperature), label) for cosine, label in near if cosine >= least - 1e-9]
            out[y, x] = sum(weight * label for weight, label in kept) / sum(weight for weight, _ in kept)
    return out


def problem(h: int = 5, w: int = 7, frames: int = 3, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(h * w)
    features = F.normalize(torch.randn(frames + 1, h, w, 6, generator=rng), dim=-1)
    return features[-1], features[:-1], torch.rand(frames, h, w, classes, generator=rng).softmax(-1)


@pytest.mark.parametrize("tile", [2, 4, 12])
@pytest.mark.parametrize(
    ("radius", "top_k", "temperature"), [(2, 5, 0.1), (1, 1, 0.1), (0, 7, 0.5), (9, 4, 0.1), (1, 99, 1)]
)
def test_label_propagation_equals_loops_for_any_tiles(radius: int, top_k: int, temperature: float, tile: int) -> None:
    query, keys, labels = problem()
    expected = oracle(query, keys, labels, radius, top_k, temperature)
    options = dict(radius=radius, top_k=top_k)
    actual = label_propagation(query, keys, labels, temperature=temperature, tile=tile, **options)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
    assert (actual - labels.mean(0)).abs().max() > 0.05


def test_ties_of_repeated_frames_are_all_counted() -> None:
    """Four equal frames, top_k = 2: all positions that tie with the second are included."""
    query, keys, labels = problem(frames=4)
    keys = keys[:1].expand(4, -1, -1, -1).contiguous()
    actual = label_propagation(query, keys, labels, radius=2, top_k=2, tile=3)
    torch.testing.assert_close(actual, oracle(query, keys, labels, 2, 2, 0.1), atol=2e-6, rtol=0)
    first_two = label_propagation(query, keys[:2], labels[:2], radius=2, top_k=2)
    assert (actual - first_two).abs().max() > 0.05


class Largest(TorchDispatchMode):
    """Records the size of the largest result of an operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_the_full_affinity_is_never_stored() -> None:
    query, keys, labels = problem(h=32, w=32, frames=2)
    with Largest() as largest:
        label_propagation(query, keys, labels, radius=4, tile=8)
    full = keys[..., 0].numel() * query[..., 0].numel()
    assert 0 < largest.numel <= 8 * 8 * 2 * (8 + 2 * 4) ** 2 < full / 60


def test_label_propagation_is_float32_under_autocast() -> None:
    query, keys, labels = problem()
    exact = label_propagation(query, keys, labels, radius=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(label_propagation(query, keys, labels, radius=2), exact, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (2, [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]),
        (9, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        (0, [[0]] * 5),
    ],
)
def test_keys_are_the_first_frame_and_the_preceding_frames(monkeypatch, context: int, expected: list) -> None:
    """The feature of frame i is a multiple of unit vector i, and its label is i."""
    keys_used, read = [], []

    def spy(query: Tensor, keys: Tensor, labels: Tensor, **_) -> Tensor:
        assert labels.flatten().tolist() == keys.argmax(-1).flatten().tolist()
        assert keys.norm(dim=-1).flatten().tolist() == [1] * len(keys)
        keys_used.append(labels.flatten().tolist())
        return query.argmax(-1, keepdim=True).float()

    def features() -> Iterator[Tensor]:
        for i in range(6):
            read.append(i)
            yield 3 * torch.eye(6)[i].reshape(1, 1, 6)

    monkeypatch.setattr("dino_ssl.evals.label_propagation.label_propagation", spy)
    soft_labels = propagate(features(), torch.zeros(1, 1, 1), context=context)
    next(soft_labels)
    assert read == [0, 1], "frames are read lazily"
    assert len(list(soft_labels)) == 4
    assert keys_used == expected


def test_no_frames_give_no_masks() -> None:
    assert not list(propagate([], torch.zeros(1, 1, 2)))
    assert not list(segment(RawPatches(), [], np.ones((8, 8), np.uint8), VideoSegmentation(), EvalContext()))


def test_label_map_scales_every_class_that_is_not_constant() -> None:
    soft = torch.tensor([[[0.9, 0.1, 0.0], [0.7, 0.3, 0.0]]])  # the object is scaled to 1 at its maximum
    assert label_map(soft, 2, 4).tolist() == [[0, 0, 1, 1]] * 2
    everywhere = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert label_map(everywhere, 1, 2).tolist() == [[1, 1]]
    assert label_map(everywhere.flip(-1), 1, 2).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("frame", "patch", "expected"),
    [
        ((480, 854), 8, (480, 832)),  # DAVIS
        ((480, 910), 16, (480, 896)),
        ((1080, 1920), 16, (480, 832)),
        ((854, 480), 8, (832, 480)),
        ((480, 854), 32, (480, 832)),
        ((480, 854), 5, (480, 850)),
        ((480, 854), 14, (476, 854 // 14 * 14)),
        ((100, 5000), 8, (480, 24000 // 64 * 64)),
    ],
)
def test_input_size_is_a_multiple_of_the_patch(frame, patch: int, expected) -> None:
    assert input_size(*frame, size=480, patch=patch) == expected
    assert all(side % patch == 0 for side in input_size(*frame, size=100, patch=patch, multiple=1))


def test_resize_nearest_takes_the_pixel_under_the_center() -> None:
    assert resize_nearest(np.arange(6).reshape(1, 6), 1, 3).tolist() == [[1, 3, 5]]
    assert resize_nearest(np.array([[1, 2]]), 2, 4).tolist() == [[1, 1, 2, 2]] * 2
    image = np.random.default_rng(0).integers(0, 9, (7, 11))
    expected = np.asarray(Image.fromarray(image.astype(np.uint8)).resize((5, 3), Image.Resampling.NEAREST))
    assert (resize_nearest(image, 3, 5) == expected).all()


def test_labels_may_have_gaps_and_void_is_background() -> None:
    mask = np.array([[7, 7, 255, 2]], np.uint8)
    numbers, labels = one_hot(mask, 1, 4)
    assert numbers.tolist() == [0, 2, 7]
    assert labels.argmax(-1).tolist() == [[2, 2, 0, 1]]


def square(frames: int = 6, height: int = 64, width: int = 96) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return frames and masks of a bright square that moves over noise, aligned to patches of 8 pixels."""
    background = np.random.default_rng(0).integers(0, 60, (height, width, 3)).astype(np.uint8)
    images, masks = [], []
    for i in range(frames):
        image, mask = background.copy(), np.zeros((height, width), np.uint8)
        image[16:40, 8 * i : 8 * i + 24], mask[16:40, 8 * i : 8 * i + 24] = 255, 7
        images.append(image)
        masks.append(mask)
    return images, masks


def test_a_moving_square_is_tracked() -> None:
    images, masks = square()
    settings = VideoSegmentation(size=64, radius=3, multiple=8)
    predicted = list(segment(RawPatches(), images, masks[0], settings, EvalContext()))
    assert len(predicted) == 5
    for mask, true in zip(predicted, masks[1:], strict=True):
        assert ((mask == 7) & (true == 7)).sum() / ((mask == 7) | (true == 7)).sum() > 0.95
        assert set(np.unique(mask)) == {0, 7}


NETWORKS = {
    "vit": ViT(patch=8, width=32, depth=1, heads=2, image_size=32),
    "vit, patch 5": ViT(patch=5, width=32, depth=1, heads=2, image_size=30),
    "resnet": Timm(name="test_resnet"),
    "convnext": Timm(name="test_convnext"),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_any_network_and_any_frame_size_work(network) -> None:
    torch.manual_seed(0)
    backbone = network.build(drop_path=0.0).eval()
    images, masks = square(3, height=131, width=197)
    with torch.no_grad():
        predicted = list(segment(backbone, images, masks[0], VideoSegmentation(size=131), EvalContext()))
    assert [each.shape for each in predicted] == [(131, 197)] * 2
    assert all(each.dtype == np.uint8 and set(np.unique(each)) <= {0, 7} for each in predicted)
    assert any((each == 7).any() for each in predicted)


def test_frames_of_different_sizes_are_refused() -> None:
    images, masks = square(3)
    images[2] = images[2][:-8]
    with pytest.raises(UserError, match=r"96 x 56 pixels, and the first mask 96 x 64"):
        list(segment(RawPatches(), images, masks[0], VideoSegmentation(size=64), EvalContext()))


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic videos of 5 and 4 frames in the layout of DAVIS."""
    root = tmp_path_factory.mktemp("videos") / "DAVIS"
    for index, name in enumerate(("star", "flower", "gear")):
        video = Scenes(size=48, part="val").video(index, 5 - index % 2)
        for i, (frame, mask) in enumerate(zip(*video, strict=True)):
            path = root / "JPEGImages/480p" / name / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), frame[..., ::-1])
            write_mask(root / "Annotations/480p" / name / f"{i:05d}.png", mask)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("gear\nstar\nflower\n")
    return root


SMALL = VideoSegmentation(size=48, multiple=8)


def test_scores_equal_those_of_the_written_masks(davis: Path, tmp_path: Path) -> None:
    calls = []

    def progress(label: str):
        return nullcontext(lambda done, total: calls.append((label, done, total)))

    prepared = SMALL.prepare([davis], EvalContext(out=tmp_path, progress=progress))
    scores = prepared(RawPatches())
    official = score_results(tmp_path / "video-segmentation", davis)
    assert scores.details["official"] == official
    assert scores["J&F"] == pytest.approx(100 * official["J&F-Mean"])
    assert list(scores) == ["J&F", "J", "J recall", "J decay", "F", "F recall", "F decay"]
    assert list(official["per_object"]) == ["gear_1", "star_1", "flower_1", "flower_2"]
    assert len(list(tmp_path.rglob("*.png"))) == 14
    assert ("frames", 8, 8) in calls
    assert prepared.data["davis"]["frames"] == 14
    references = reference_scores(prepared, lambda: NETWORKS["vit"].build(drop_path=0.0))
    assert references["raw_pixels"] == Scores(scores)
    assert references["random_weights"] != scores
    assert score_results(tmp_path / "video-segmentation", davis) == official, "references write no masks"


def test_two_ranks_give_the_scores_of_one(davis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are scored one after the other, and gathered by hand."""
    prepared = SMALL.prepare([davis], EvalContext())
    expected = prepared(RawPatches()).details["official"]
    shards: list[Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda rows: shards.append(rows) or rows)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        prepared(RawPatches())
    assert [len(shard) for shard in shards] == [3, 1]
    monkeypatch.setattr(distributed, "all_gather", lambda rows: torch.cat(shards[::-1]))  # ranks in any order
    official = prepared(RawPatches()).details["official"]
    assert official == expected
    assert list(official["per_object"]) == list(expected["per_object"])


def test_synthetic_videos_depend_on_the_training_size() -> None:
    """They have 192 pixels, or twice the training size if that is larger."""
    data = {size: VideoSegmentation().prepare(["scenes"], EvalContext(size=size)).data for size in (16, 96, 128)}
    assert data[16]["davis"]["sequences"] == 8
    assert data[16] == data[96]
    assert data[16] != data[128]
    small = VideoSegmentation(size=32)
    assert small.prepare(["scenes"], EvalContext(size=128)).data == small.prepare(["scenes"], EvalContext(size=16)).data


@pytest.mark.parametrize(
    "change", [dict(top_k=0), dict(radius=-1), dict(temperature=0.0), dict(size=-5), dict(context=-1)]
)
def test_invalid_settings_are_refused(change: dict) -> None:
    with pytest.raises(UserError, match=f"`{next(iter(change))}` must be"):
        VideoSegmentation(**change)


def test_the_backbone_is_not_changed(davis: Path) -> None:
    backbone: Backbone = NETWORKS["resnet"].build().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    SMALL.prepare([davis], EvalContext())(backbone)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
