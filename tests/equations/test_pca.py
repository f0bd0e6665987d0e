"""Principal components against the SVD; patches of one kind get one colour in all pictures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.models.backbone import Backbone, Features
from dino_ssl.viz.pca import components, patch_colours, unit_range


def test_components_are_those_of_the_svd() -> None:
    rows = torch.randn(9000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 0.1, 2, 0.5]) + 7
    found = components(rows, 4)
    _, values, vectors = torch.linalg.svd((rows - rows.mean(dim=0)).double(), full_matrices=False)
    torch.testing.assert_close(found.variance.double(), values[:4].square() / 9000, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((found.directions.double() * vectors[:4]).sum(dim=1).abs(), torch.ones(4).double())
    torch.testing.assert_close(found.of(rows).mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.of(rows).var(dim=0, correction=0), found.variance, rtol=1e-3, atol=1e-5)
    largest = found.directions.gather(1, found.directions.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(components(rows.flip(0), 4).directions, found.directions, atol=1e-4, rtol=0)


def test_fewer_rows_or_columns_than_components() -> None:
    assert components(torch.randn(2, 8), 3).directions.shape == (2, 8)
    assert components(torch.randn(9, 1), 3).directions.shape == (1, 1)
    assert components(torch.ones(4, 3), 2).variance.tolist() == [0, 0]


def test_the_range_ignores_outliers() -> None:
    values = torch.linspace(0, 1, 1000)[:, None].clone()
    values[0], values[-1] = -1000, 1000
    level = unit_range(values)[:, 0]
    assert level[500] == pytest.approx(0.5, abs=0.02)
    assert (level.min(), level.max()) == (0, 1)
    assert torch.isfinite(unit_range(torch.ones(5, 2))).all()


class Colours(Backbone):
    """Features that are the patch's mean colour, turned into more numbers."""

    embed_dim, patch = 5, 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)))

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        patches = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1) @ self.weight
        return [Features(patches.mean(dim=(1, 2)), patches)]


def painted(*colours: tuple[int, int, int], rows: int = 4) -> np.ndarray:
    """Columns of patches in these colours."""
    return np.repeat(np.repeat(np.array(colours, np.uint8)[None], 8 * rows, axis=0), 8, axis=1)


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def test_like_patches_have_like_colours_in_all_pictures() -> None:
    images = [painted(RED, GREEN, RED, BLUE), painted(BLUE, BLUE, RED, WHITE)]
    (first, second), share = patch_colours(Colours(), iter(images), size=32)
    assert first.colours.shape == (4, 4, 3)
    assert first.foreground.all()
    np.testing.assert_allclose(first.colours[:, 0], first.colours[:, 2], atol=1e-4)
    np.testing.assert_allclose(first.colours[:, 3], second.colours[:, 0], atol=1e-4)
    np.testing.assert_allclose(first.colours[0, 0], second.colours[0, 2], atol=1e-4)
    seen = np.stack([first.colours[0, 0], first.colours[0, 1], first.colours[0, 3], second.colours[0, 3]])
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 10 * np.eye(4)
    assert apart.min() > 0.3
    assert sum(share) == pytest.approx(1, abs=1e-4)  # three numbers are behind the five
    assert share == sorted(share, reverse=True)
    assert min(first.shown.shape[:2]) >= 384


def test_the_foreground_is_what_the_border_is_not() -> None:
    thing = np.zeros((64, 64, 3), np.uint8)
    thing[16:48, 16:48] = [(255, 120, 0)]
    thing[16:32, 16:48] = [(255, 0, 120)]
    for picture in (thing, 255 - thing):  # whichever way the component points
        ((found,), _) = patch_colours(Colours(), [picture], size=64, foreground=0.5)
        expected = np.zeros((8, 8), bool)
        expected[2:6, 2:6] = True
        assert np.array_equal(found.foreground, expected)
        assert (found.colours[~expected] == 0).all()
        top, bottom = found.colours[2:4, 2:6], found.colours[4:6, 2:6]
        assert np.abs(top - bottom).max(axis=-1).min() > 0.5  # the range is that of the thing alone


def test_what_cannot_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        patch_colours(Colours(), [painted(RED)], size=32, foreground=1.0)
    with pytest.raises(UserError, match="None of the pictures"):
        patch_colours(Colours(), [])
    monkeypatch.setattr("dino_ssl.viz.pca.MAX_NUMBERS", 100)
    with pytest.raises(UserError, match="fewer pictures, or a smaller size"):
        patch_colours(Colours(), [painted(RED, GREEN), painted(RED, GREEN), painted(RED, GREEN)], size=32)
