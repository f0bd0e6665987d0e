"""Masks with a given share of the attention; maps of the right head, layer and query, for any image shape."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import resize_to_patches, top_mass_mask
from dino_ssl.models.backbone import Attentive, Backbone, Features
from dino_ssl.models.vit import ViT
from dino_ssl.viz import rendering
from dino_ssl.viz.attention import MIN_DISPLAY_SIDE, attention_maps, display_image
from dino_ssl.viz.rendering import save_image


def masked_by_loop(values: np.ndarray, mass: float) -> np.ndarray:
    """Select patches by descending attention until they hold `mass` of the total."""
    kept, held = np.zeros(len(values), bool), 0.0
    for i in np.argsort(-values, kind="stable"):
        if held >= mass * values.sum():
            break
        kept[i], held = True, held + values[i]
    return kept


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.8, 0.95])
def test_the_mask_is_the_smallest_that_holds_the_mass(mass: float) -> None:
    values = np.random.default_rng(0).exponential(size=(5, 3, 60))
    masks = top_mass_mask(values, mass)
    for value, mask in zip(values.reshape(-1, 60), masks.reshape(-1, 60), strict=True):
        assert np.array_equal(mask, masked_by_loop(value, mass))
        assert value[mask].sum() >= mass * value.sum()
        assert value[mask].sum() - value[mask].min() < mass * value.sum()


def test_mask_edge_cases() -> None:
    assert top_mass_mask(np.ones(10), 1.0).all()
    assert top_mass_mask(np.array([0.0, 9.0, 1.0]), 0.6).tolist() == [False, True, False]
    assert top_mass_mask(np.array([5.0]), 0.6).tolist() == [True]
    assert top_mass_mask(np.zeros(4), 0.6).sum() == 1  # zero attention: one patch is kept
    assert top_mass_mask(np.ones(10), 0.6).tolist() == [False] * 4 + [True] * 6
    for mass in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match="mass"):
            top_mass_mask(np.ones(3), mass)


class EncodedAttention(Attentive):
    """Attention weights that encode layer, head, query and key."""

    embed_dim, patch, num_blocks = 4, 8, 3

    def __init__(self, registers: int = 0) -> None:
        super().__init__()
        self.registers = registers
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        assert not self.training
        tokens = 1 + self.registers + (images.shape[2] // 8) * (images.shape[3] // 8)
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        base = key + 1000 * query + 1e6 * (layer % self.num_blocks)
        return torch.stack([base, base + 0.5]).float()[None].expand(len(images), -1, -1, -1)


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("registers", [0, 4])
def test_maps_hold_patches_only_and_the_right_head_layer_and_query(registers: int) -> None:
    network = EncodedAttention(registers).train()
    seen = attention_maps(network, random_image(40, 80), layer=-2, size=40)[0]  # 5 x 10 patches
    first = 1 + registers
    expected = 1e6 + first + np.arange(50).reshape(5, 10)
    np.testing.assert_allclose(seen.heads, np.stack([expected, expected + 0.5]))
    np.testing.assert_allclose(seen.mean, expected + 0.25)
    assert seen.layer == 1
    assert network.training  # the mode is restored
    point = attention_maps(network, random_image(40, 80), layer=0, queries=[(79, 0)], size=40)[0]
    # the upper right corner: patch 9
    np.testing.assert_allclose(point.heads[0], 1000 * (first + 9) + first + np.arange(50).reshape(5, 10))
    below = attention_maps(network, random_image(40, 80), layer=0, queries=[(8, 39.9)], size=40)[0]
    # the last row, second column
    assert below.heads[0, 0, 0] == 1000 * (first + 41) + first


def test_points_are_in_pixels_of_the_original_image() -> None:
    seen = attention_maps(EncodedAttention(), random_image(400, 800), layer=0, queries=[(799, 399)], size=40)[
        0
    ]  # downscaled by 10
    assert seen.heads[0, 0, 0] == 1000 * 50 + 1
    assert seen.point is not None
    np.testing.assert_allclose(seen.point, (799.5, 399.5))  # in pixels of `display`


def test_several_points_in_one_pass_equal_separate_calls() -> None:
    network, points = EncodedAttention(2), [(0.0, 0.0), (79.0, 39.0), (41.0, 3.0)]
    calls: list[int] = []
    plain = network.attention
    network.attention = lambda images, layer=-1: calls.append(layer) or plain(images, layer)  # type: ignore[method-assign]
    several = attention_maps(network, random_image(40, 80), queries=points, layer=1, size=40)
    assert calls == [1]
    for one, point in zip(several, points, strict=True):
        alone = attention_maps(network, random_image(40, 80), queries=[point], layer=1, size=40)[0]
        np.testing.assert_array_equal(one.heads, alone.heads)
        assert one.point == alone.point
    assert attention_maps(network, random_image(40, 80), queries=[], size=40) == []


def test_heads_selects_maps_and_their_mean() -> None:
    seen = attention_maps(EncodedAttention(), random_image(40, 40), size=40)[0]
    second = attention_maps(EncodedAttention(), random_image(40, 40), size=40, heads=[1])[0]
    np.testing.assert_array_equal(second.heads, seen.heads[1:])
    np.testing.assert_array_equal(second.mean, seen.heads[1])
    assert second.head_ids == [1]
    assert attention_maps(EncodedAttention(), random_image(40, 40), size=40, heads=[1, 0, 1])[0].head_ids == [1, 0]
    assert [name for name, _ in rendering.panels(second)] == ["image", "head 1", "overlay", "mask 60%"]
    for wrong in ([2], [-1], []):
        with pytest.raises(UserError, match=r"0 \.\. 1 for a network of 2 heads"):
            attention_maps(EncodedAttention(), random_image(40, 40), size=40, heads=wrong)


def test_small_maps_are_enlarged_and_drawn_on_the_original_image() -> None:
    photo = random_image(800, 1000)
    seen = attention_maps(EncodedAttention(), photo, size=40)[0]
    assert seen.image.shape == (40, 48, 3)
    assert seen.display.shape == (400, 480, 3)  # ten times: patches stay squares of whole pixels
    assert min(seen.display.shape[:2]) >= MIN_DISPLAY_SIDE
    assert all(min(drawn.shape[:2]) >= MIN_DISPLAY_SIDE for _, drawn in rendering.panels(seen))
    blurred = display_image(seen.image, seen.image)
    assert (
        seen.display.astype(float).std() > 1.5 * blurred.astype(float).std()
    )  # drawn on the original, not on the enlarged input
    large = attention_maps(EncodedAttention(), photo, size=480)[0]
    assert large.display is large.image
    point = attention_maps(EncodedAttention(), photo, size=40, queries=[(500, 400)])[0]
    ring = np.argwhere((rendering.panels(point)[0][1] == rendering.EDGE).all(axis=2))
    np.testing.assert_allclose(ring.mean(axis=0), (200, 240), atol=3)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(1, 1, 32), (37, 53, 32), (300, 20, 16), (64, 64, 480), (500, 375, 224)]
)
def test_any_shape_fits_whole_patches(height: int, width: int, size: int) -> None:
    fitted = resize_to_patches(random_image(height, width), size, 8)
    assert not fitted.shape[0] % 8
    assert not fitted.shape[1] % 8
    assert min(fitted.shape[:2]) == pytest.approx(size, abs=4)
    assert fitted.shape[0] / fitted.shape[1] == pytest.approx(height / width, rel=0.15)


def test_invalid_arguments_raise() -> None:
    with pytest.raises(UserError, match="`size` must be at least 1; got -5"):
        resize_to_patches(random_image(40, 40), -5, 8)
    with pytest.raises(UserError, match=r"-3 \.\. 2"):
        attention_maps(EncodedAttention(), random_image(40, 40), layer=3)
    with pytest.raises(UserError, match="outside"):
        attention_maps(EncodedAttention(), random_image(40, 40), queries=[(40, 0)])
    with pytest.raises(UserError, match="smaller size"):
        attention_maps(EncodedAttention(), random_image(10, 4000), size=480)
    with pytest.raises(UserError, match="no attention"):
        attention_maps(Halves(), random_image(40, 40), layer=0)


class Halves(Backbone):
    """No attention; the left half of the map equals the pooled feature, the right half is its negative."""

    embed_dim, patch = 2, 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        side = torch.ones(len(images), images.shape[2] // 8, images.shape[3] // 8, 2)
        side[:, :, side.shape[2] // 2 :] = -1
        return [Features(torch.full((len(images), 2), 3.0), side)]


def test_similarity_replaces_attention_in_other_networks() -> None:
    (seen,) = attention_maps(Halves(), random_image(32, 64), size=32)
    assert seen.kind == "similarity"
    assert [name for name, _ in rendering.panels(seen)] == ["image", "similarity", "overlay", "mask 60%"]
    assert repr(seen) == "AttentionMaps(similarity to the pooled feature, 8 x 4 patches)"
    np.testing.assert_allclose(seen.mean[:, :4], 1, atol=1e-6)
    np.testing.assert_allclose(seen.mean[:, 4:], 0, atol=1e-6)
    assert seen.mask[:, 4:].sum() == 0
    assert attention_maps(EncodedAttention(), random_image(32, 64), size=32)[0].kind == "attention"


def test_maps_equal_the_attention_of_a_vit() -> None:
    torch.manual_seed(0)
    network = ViT(size="tiny", patch=8, image_size=32, width=24, depth=2, heads=3, registers=2).build().eval()
    image = random_image(32, 48)
    seen = attention_maps(network, image, size=32)[0]
    from dino_ssl.preprocessing import normalize

    with torch.no_grad():
        batch = normalize(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
        expected = network.attention(batch)[0, :, 0, 3:].reshape(3, 4, 6)
    np.testing.assert_allclose(seen.heads, expected.numpy(), atol=1e-6)


def test_heat_maps_are_brightest_at_the_maximum() -> None:
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 5
    bright = rendering.heat_map(values, (64, 64)).sum(axis=2)
    assert (np.argwhere(bright == bright.max()) // 16 == (1, 2)).all()
    constant = rendering.heat_map(np.ones((3, 3)), (6, 6))
    assert len(np.unique(constant.reshape(-1, 3), axis=0)) == 1


def test_color_maps_are_limited_to_masks_and_the_highest_is_drawn() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    maps[0, :, :2], masks[0, :, :2] = 1, True
    maps[1, :, 2:], masks[1, :, 2:] = 7, True  # normalized separately
    maps[1, 0, 0], masks[1, 0, 0] = 2, True  # relatively lower than the first map
    masks[1, 3, 3] = False
    drawn = rendering.color_maps(grey, maps, masks, [(255, 0, 0), (0, 0, 255)]).astype(int)
    middle = drawn[8::16, 8::16]
    assert (middle[:, :2, 0] > middle[:, :2, 2] + 80).all()
    assert (middle[:3, 2:, 2] > middle[:3, 2:, 0] + 80).all()
    assert np.ptp(middle[3, 3]) < 10  # no mask: not colored
    assert len(set(rendering.palette(40))) == 40


def test_the_cutout_shows_the_image_inside_the_mask() -> None:
    image, mask = np.full((64, 64, 3), 200, np.uint8), np.zeros((4, 4), bool)
    mask[:2] = True
    drawn = rendering.cutout(image, mask)
    assert (drawn[4:24, 4:60] == 200).all()
    assert (drawn[40:] < 60).all()


@pytest.mark.parametrize(
    ("images", "count", "columns", "rows"),
    [
        (1, 4, 4, 1), (1, 8, 4, 2), (1, 11, 6, 2), (1, 17, 6, 3),  # 4 + 4 instead of 6 + 2
        (12, 8, 8, 12), (24, 4, 8, 12), (24, 2, 8, 6), (3, 2, 6, 1), (2, 17, 9, 4),  # small images side by side
    ],
)  # fmt: skip
def test_the_figure_fills_the_width_of_a_screen(images: int, count: int, columns: int, rows: int) -> None:
    """Black panels on white: their columns and rows are counted."""
    page = rendering.sheet([[("", np.zeros((40, 40, 3), np.uint8))] * count] * images)
    dark = page[..., 0] < 128
    lines = [np.diff(np.flatnonzero(np.diff(dark.any(axis=axis), prepend=False, append=False)))[::2] for axis in (0, 1)]
    assert [len(sides) for sides in lines] == [columns, rows]
    assert len({*lines[0], *lines[1]}) == 1  # all panels have one size
    assert page.shape[1] <= rendering.SHEET_WIDTH
    assert lines[0][0] == rendering.MAX_PANEL_HEIGHT or page.shape[1] > 0.95 * rendering.SHEET_WIDTH


def test_panels_of_any_shape_are_complete_in_the_figure() -> None:
    tall, wide = (np.zeros((*shape, 3), np.uint8) for shape in ((80, 40), (40, 80)))
    page = rendering.sheet([[("", tall)], [("", wide)]])
    dark = page[..., 0] < 128
    for image, half in ((tall, dark[:, : page.shape[1] // 2]), (wide, dark[:, page.shape[1] // 2 :])):
        drawn = half.any(axis=1).sum() / half.any(axis=0).sum()
        assert drawn == pytest.approx(image.shape[0] / image.shape[1], rel=0.02)


def test_an_image_has_a_panel_per_head_and_the_figure_is_saved_without_loss(tmp_path) -> None:
    dataset = [
        attention_maps(EncodedAttention(), random_image(40, width), size=40, queries=[(5, 5)])[0] for width in (40, 80)
    ]
    names = [name for name, _ in rendering.panels(dataset[0])]
    assert names == ["image", "mean", "overlay", "mask 60%", "heads", "head 0", "head 1"]
    both = rendering.sheet([rendering.panels(maps) for maps in dataset])
    path = save_image(tmp_path / "deep/figure.png", both)
    from PIL import Image

    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), both)
