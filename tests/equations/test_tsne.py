"""t-SNE meets its definition: perplexity, gradient of KL, decreasing KL, and separated clusters."""

import pytest
import torch

from dino_ssl.errors import UserError
from dino_ssl.viz.tsne import affinities, class_means, conditionals, kl, kl_gradient, tsne


def clusters(count: int = 60, groups: int = 4, width: int = 10, distance: float = 8.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % groups
    centers = distance * torch.eye(width)[:groups]
    return centers[labels] + torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize(("perplexity", "scale"), [(2.0, 1e-4), (5.0, 1.0), (15.0, 1e4)])
def test_every_row_has_the_perplexity(perplexity: float, scale: float) -> None:
    rows = conditionals(scale * clusters()[0], perplexity)
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(60))
    assert rows.diagonal().abs().max() == 0
    entropy = -(rows.double() * rows.double().clamp(min=1e-300).log()).sum(dim=1)
    torch.testing.assert_close(entropy.exp(), torch.full((60,), perplexity, dtype=torch.float64), atol=1e-3, rtol=0)


def test_conditionals_are_gaussian_in_the_distance() -> None:
    features = clusters(12)[0].double()
    row = conditionals(features.float(), 3.0)[4].double()
    others = torch.arange(12) != 4
    distance = (features - features[4]).square().sum(dim=1)[others]
    slope = row[others].log() / distance  # log P = -b d + c: two points give b, and all others are on the line
    b = (row[others].log()[0] - row[others].log()[1]) / (distance[1] - distance[0])
    torch.testing.assert_close(row[others].log() + b * distance, (row[others].log() + b * distance)[0].expand(11),
                               atol=1e-3, rtol=0)  # fmt: skip
    assert b > 0
    assert len(slope) == 11


def test_affinities_are_symmetric_and_sum_to_one() -> None:
    p = affinities(clusters()[0], 8.0)
    torch.testing.assert_close(p, p.T)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)


def test_the_gradient_equals_autograd() -> None:
    p = affinities(clusters(20)[0], 5.0).double()
    points = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    squared = torch.cdist(points, points).square()
    kernel = (1 / (1 + squared)) * (1 - torch.eye(20))
    q = kernel / kernel.sum()
    divergence = (p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log())).sum()
    (expected,) = torch.autograd.grad(divergence, points)
    torch.testing.assert_close(kl_gradient(p, points.detach()), expected)
    assert kl(p, points.detach()) == pytest.approx(float(divergence.detach()))


def test_the_divergence_decreases_and_clusters_stay_together() -> None:
    features, labels = clusters()
    (_, before), (_, after), (points, divergence) = (tsne(features, perplexity=10, iterations=n) for n in (1, 80, 200))
    assert divergence < after < before
    assert divergence < 0.5 * before
    assert divergence == pytest.approx(kl(affinities(features, 10), points))
    centers = torch.stack([points[labels == group].mean(dim=0) for group in range(4)])
    spread = max(float((points[labels == group] - centers[group]).norm(dim=1).max()) for group in range(4))
    assert torch.pdist(centers).min() > 2 * spread
    torch.testing.assert_close(points.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)


def test_tsne_is_deterministic_and_independent_of_scale() -> None:
    features = clusters(24)[0]
    first, again = (tsne(features, iterations=60)[0] for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(conditionals(4 * features, 5), conditionals(features, 5), atol=1e-4, rtol=1e-3)


def test_the_perplexity_is_limited_by_the_number_of_points() -> None:
    features = clusters(10)[0]
    points, divergence = tsne(features, perplexity=20, iterations=200)
    assert divergence == pytest.approx(kl(affinities(features, 3), points))
    assert points.abs().max() < 1e3  # no divergence
    assert tsne(torch.randn(6, 1), iterations=20)[0].shape == (6, 2)  # one-dimensional features
    assert torch.isfinite(tsne(torch.ones(8, 3), iterations=20)[0]).all()  # identical features


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="4 to 5000"):
        tsne(torch.zeros(3, 2))
    with pytest.raises(UserError, match="at least 1"):
        tsne(torch.randn(8, 2), perplexity=0.5)


def test_class_means_are_sorted_by_name_without_unlabeled_rows() -> None:
    features = torch.tensor([[1.0, 0], [3, 0], [0, 5], [9, 9]])
    means, names = class_means(features, ["b", "b", "a", None])
    assert names == ["a", "b"]
    torch.testing.assert_close(means, torch.tensor([[0.0, 5], [2, 0]]))
