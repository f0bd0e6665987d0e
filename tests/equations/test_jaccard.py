"""Jaccard similarity of attention masks and annotations, compared with a loop over pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import attention_size, patch_attention
from dino_ssl.evals.attention_masks import AttentionMasks, ObjectScore, jaccard, mean_over_images, object_scores
from dino_ssl.evals.base import EvalContext
from dino_ssl.models.backbone import Attentive, Backbone, Features
from dino_ssl.models.vit import ViT


def jaccard_by_pixels(mask: np.ndarray, annotation: np.ndarray, value: int) -> float:
    """Count pixel by pixel; a pixel belongs to the patch that contains its center."""
    (height, width), (h, w) = annotation.shape, mask.shape
    both = either = 0
    for y in range(height):
        for x in range(width):
            if annotation[y, x] == 255:
                continue
            in_mask = bool(mask[int((y + 0.5) * h / height), int((x + 0.5) * w / width)])
            in_object = annotation[y, x] == value
            both += in_mask and in_object
            either += in_mask or in_object
    return both / either if either else 0.0


@pytest.mark.parametrize(
    ("shape", "grid"), [((40, 24), (5, 3)), ((37, 53), (4, 7)), ((3, 5), (4, 4)), ((9, 9), (1, 1))]
)
def test_jaccard_equals_a_loop_over_pixels(shape, grid) -> None:
    rng = np.random.default_rng(0)
    annotation = rng.choice([0, 3, 15, 255], shape, p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
    masks = rng.random((4, *grid)) < 0.4
    masks[0], masks[1] = False, True
    for number in (3, 15):
        expected = [jaccard_by_pixels(mask, annotation, number) for mask in masks]
        np.testing.assert_allclose(jaccard(masks, annotation, number), expected, atol=1e-12)


def test_void_pixels_are_not_counted() -> None:
    annotation = np.zeros((8, 8), np.uint8)
    annotation[:, :4] = 7
    mask = np.zeros((1, 2, 2), bool)
    mask[0, :, 0] = True  # exactly the object
    assert jaccard(mask, annotation, 7) == 1
    mask[:] = True
    assert jaccard(mask, annotation, 7) == 0.5
    annotation[:, 4:] = 255  # the excess of the mask is void
    assert jaccard(mask, annotation, 7) == 1


def test_an_image_without_objects_has_no_score() -> None:
    heads = np.random.default_rng(0).random((2, 4, 4))
    annotation = np.full((8, 8), 255, np.uint8)
    annotation[:4] = 0
    assert list(object_scores(0, heads, annotation, (0.6,))) == []


def test_the_best_head_is_selected_per_object() -> None:
    annotation = np.zeros((8, 8), np.uint8)
    annotation[:4, :4], annotation[4:, 4:] = 1, 2
    heads = np.zeros((3, 2, 2))
    heads[0, 1, 1] = heads[2, 0, 0] = heads[1, 0, 1] = 1
    first, second = object_scores(9, heads, annotation, (0.6,))
    assert (first.object, first.head, first.best, first.area) == (1, 2, 1.0, 0.25)
    assert (second.object, second.head, second.best) == (2, 0, 1.0)
    assert (first.mean, second.mean) == (0, 0.5)  # the mean over heads: two of three equal patches
    assert first.image == 9


def test_objects_are_averaged_per_image_first() -> None:
    scores = [ObjectScore(image, 1, best=best) for image, best in ((0, 1.0), (0, 0.0), (3, 0.2))]
    assert mean_over_images(scores, "best") == pytest.approx(100 * (0.5 + 0.2) / 2)


def test_attention_size_is_480_or_twice_a_small_training_size() -> None:
    assert [attention_size(size) for size in (48, 96, 223, 224, 384)] == [96, 192, 446, 480, 480]


class Bright(Attentive):
    """Head 0 attends to bright patches, head 1 to dark ones, for every query."""

    embed_dim, patch, num_blocks, registers = 2, 8, 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        bright = F.avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1)
        scores = torch.cat([torch.zeros(len(images), 2), 5 * bright], dim=1)
        heads = torch.stack([scores, -scores], dim=1).softmax(dim=-1)
        return heads[:, :, None].expand(-1, -1, scores.shape[1], -1)


class Planted(ImageDataset):
    """Annotated bright squares on a dark background; image 2 cannot be read, image 3 has no object."""

    def __init__(self, count: int = 6) -> None:
        super().__init__(names=[f"{i}" for i in range(count)], sizes=[(32, 32)] * count)

    def mask(self, index: int) -> np.ndarray:
        mask = np.zeros((32, 32), np.uint8)
        if index != 3:
            mask[8:24, 8 * (index % 3) : 8 * (index % 3) + 16] = index + 1
        return mask

    def read(self, index: int) -> np.ndarray:
        if index == 2:
            raise BadImage("2", "is gone")
        return np.repeat(np.where(self.mask(index) > 0, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def test_a_complete_evaluation() -> None:
    prepared = AttentionMasks(size=32).prepare([Planted()], EvalContext())
    scores = prepared(Bright())
    assert scores["jaccard 60%"] == pytest.approx(75)  # 60 % of four equal patches are three
    assert scores["jaccard 80%"] == pytest.approx(100)
    assert scores["mean of heads 60%"] == pytest.approx(400 / 7)  # the bright patches have half of the attention
    assert prepared.data["voc"]["images"] == 6
    details = scores.details
    assert details["skipped"] == [{"name": "2", "reason": "is gone"}]
    assert (details["objects"], details["images with objects"]) == (4, 4)
    assert details["mask of the whole image"] == pytest.approx(25)
    assert {row["head"] for row in details["per object"]} == {0}
    last = {"image": "5", "object": 6, "mass": 0.8, "area": 0.25, "best": 1.0, "mean": pytest.approx(1 / 3)}
    last |= {"head": 0}
    assert details["per object"][-1] == last


def test_void_is_explained_if_masks_of_0_and_255_have_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planted, "mask", lambda dataset, index: np.full((32, 32), 255 * (index % 2), np.uint8))
    message = r"None of the 6 images contains an object; 1 cannot be read, for example 2\. .* 255 void, .* as 1\."
    with pytest.raises(UserError, match=message):
        AttentionMasks(size=32).prepare([Planted()], EvalContext())(Bright())


def test_the_number_of_ranks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = AttentionMasks(size=32).prepare([Planted()], EvalContext())(Bright())
    shards: list[Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "all_gather", lambda rows: shards.append(rows) or torch.zeros(0, rows.shape[1]))
    for rank in (3, 1, 0, 2):  # in any order
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(UserError, match="None of the"):
            AttentionMasks(size=32).prepare([Planted()], EvalContext())(Bright())
    monkeypatch.setattr(distributed, "all_gather", lambda rows: torch.cat(shards))
    gathered = AttentionMasks(size=32).prepare([Planted()], EvalContext())(Bright())
    assert gathered == expected
    assert gathered.details == expected.details
    assert sum(len(shard) for shard in shards) == 9  # four objects at two masses, and one unreadable image


def test_synthetic_images_have_masks() -> None:
    from dino_ssl.data.synthetic.scenes import Scenes

    net = ViT(size="tiny", patch=8, image_size=32, width=24, depth=1, heads=2).build()
    scores = AttentionMasks(mass=(0.5,)).prepare([Scenes(count=3, size=32, part="val").open()], EvalContext(size=32))(
        net
    )
    assert 0 < scores["jaccard 50%"] < 100
    assert AttentionMasks().prepare(["scenes"], EvalContext()).data["voc"]["images"] == 500


def test_invalid_settings_and_datasets_without_masks_are_refused() -> None:
    for mass in ((), (0.6, 1.5), (0.0,)):
        with pytest.raises(UserError, match="`mass`"):
            AttentionMasks(mass=mass)

    class Plain(ImageDataset):
        def read(self, index: int) -> np.ndarray:
            raise NotImplementedError

    with pytest.raises(UserError, match="Plain has none"):
        AttentionMasks().prepare([Plain(names=[], sizes=[])], EvalContext())


def test_a_network_without_attention_is_refused() -> None:
    class Convolutions(Backbone):
        embed_dim, patch = 4, 8

        def forward(self, images: Tensor) -> Tensor:
            raise NotImplementedError

        def features(self, images: Tensor, layers: int = 1) -> list[Features]:
            raise NotImplementedError

    with pytest.raises(UserError, match="Convolutions has no attention: expected a Vision Transformer"):
        AttentionMasks(size=32).prepare([Planted()], EvalContext())(Convolutions())


def test_patch_attention_equals_the_rows_of_the_network() -> None:
    torch.manual_seed(0)
    net = ViT(size="tiny", patch=8, image_size=32, width=24, depth=2, heads=3, registers=2).build().train()
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    rows = patch_attention(net, image, [None, 0, 23], layer=0)
    assert net.training
    from dino_ssl.preprocessing import normalize

    with torch.no_grad():
        attention = net.eval().attention(normalize(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]), 0)[0]
    np.testing.assert_allclose(
        rows, attention[:, [0, 3, 26], 3:].transpose(0, 1).reshape(3, 3, 4, 6).numpy(), atol=1e-6
    )
