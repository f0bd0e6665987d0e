"""Principal components equal those of the SVD; similar patches have similar colors in all images."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.models.backbone import Backbone, Features
from dino_ssl.viz.pca import patch_colors, principal_components, unit_range


def test_components_are_those_of_the_svd() -> None:
    rows = torch.randn(9000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 0.1, 2, 0.5]) + 7
    components = principal_components(rows, 4)
    _, values, vectors = torch.linalg.svd((rows - rows.mean(dim=0)).double(), full_matrices=False)
    torch.testing.assert_close(components.variance.double(), values[:4].square() / 9000, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((components.directions.double() * vectors[:4]).sum(dim=1).abs(), torch.ones(4).double())
    torch.testing.assert_close(components.project(rows).mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        components.project(rows).var(dim=0, correction=0), components.variance, rtol=1e-3, atol=1e-5
    )
    largest = components.directions.gather(1, components.directions.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(
        principal_components(rows.flip(0), 4).directions, components.directions, atol=1e-4, rtol=0
    )


def test_fewer_rows_or_columns_limit_the_components() -> None:
    assert principal_components(torch.randn(2, 8), 3).directions.shape == (2, 8)
    assert principal_components(torch.randn(9, 1), 3).directions.shape == (1, 1)
    assert principal_components(torch.ones(4, 3), 2).variance.tolist() == [0, 0]


def test_the_range_ignores_outliers() -> None:
    values = torch.linspace(0, 1, 1000)[:, None].clone()
    values[0], values[-1] = -1000, 1000
    level = unit_range(values)[:, 0]
    assert level[500] == pytest.approx(0.5, abs=0.02)
    assert (level.min(), level.max()) == (0, 1)
    assert torch.isfinite(unit_range(torch.ones(5, 2))).all()


class MeanColor(Backbone):
    """A network whose features are a linear map of the mean color of each patch."""

    embed_dim, patch = 5, 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)))

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        patches = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1) @ self.weight
        return [Features(patches.mean(dim=(1, 2)), patches)]


def columns(*colors: tuple[int, int, int], rows: int = 4) -> np.ndarray:
    """Return an image with one column of patches per color."""
    return np.repeat(np.repeat(np.array(colors, np.uint8)[None], 8 * rows, axis=0), 8, axis=1)


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def test_similar_patches_have_similar_colors_in_all_images() -> None:
    images = [columns(RED, GREEN, RED, BLUE), columns(BLUE, BLUE, RED, WHITE)]
    (first, second), shares = patch_colors(MeanColor(), iter(images), size=32)
    assert first.colors.shape == (4, 4, 3)
    assert first.foreground.all()
    np.testing.assert_allclose(first.colors[:, 0], first.colors[:, 2], atol=1e-4)
    np.testing.assert_allclose(first.colors[:, 3], second.colors[:, 0], atol=1e-4)
    np.testing.assert_allclose(first.colors[0, 0], second.colors[0, 2], atol=1e-4)
    distinct = np.stack([first.colors[0, 0], first.colors[0, 1], first.colors[0, 3], second.colors[0, 3]])
    distances = np.linalg.norm(distinct[:, None] - distinct[None], axis=-1) + 10 * np.eye(4)
    assert distances.min() > 0.3
    assert sum(shares) == pytest.approx(1, abs=1e-4)  # the five dimensions have rank three
    assert shares == sorted(shares, reverse=True)
    assert min(first.display.shape[:2]) >= 384


def test_the_foreground_is_the_side_without_the_border() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = [(255, 120, 0)]
    image[16:32, 16:48] = [(255, 0, 120)]
    for signed in (image, 255 - image):  # for either sign of the component
        ((result,), _) = patch_colors(MeanColor(), [signed], size=64, foreground=0.5)
        expected = np.zeros((8, 8), bool)
        expected[2:6, 2:6] = True
        assert np.array_equal(result.foreground, expected)
        assert (result.colors[~expected] == 0).all()
        top, bottom = result.colors[2:4, 2:6], result.colors[4:6, 2:6]
        assert np.abs(top - bottom).max(axis=-1).min() > 0.5  # the color range is that of the foreground only


def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="above 0 and below 1"):
        patch_colors(MeanColor(), [columns(RED)], size=32, foreground=1.0)
    monkeypatch.setattr("dino_ssl.viz.pca.MAX_VALUES", 100)
    with pytest.raises(UserError, match="fewer images, or a smaller"):
        patch_colors(MeanColor(), [columns(RED, GREEN), columns(RED, GREEN), columns(RED, GREEN)], size=32)
