"""Feature statistics and diagnostics equal their definitions: eigenvalues, angles and counts."""

import math

import pytest
import torch
from torch import nn

from dino_ssl.config import edit
from dino_ssl.feature_stats import FeatureStats, effective_rank, feature_statistics
from dino_ssl.methods.teacher_student import relative_distance
from dino_ssl.metrics import Meter
from dino_ssl.models.vit import ViT
from dino_ssl.optim import clip_grad_norm_per_tensor_
from dino_ssl.run import Run
from dino_ssl.schedules import Clock
from dino_ssl.state import build_method

CLOCK = Clock(0, 10, 2)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_effective_rank_is_the_participation_ratio_of_the_covariance(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1) + 3
    values = torch.linalg.eigvalsh(torch.cov(features.T))
    assert effective_rank(features) == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-4)


def test_effective_rank_counts_directions_of_equal_variance() -> None:
    three = torch.eye(12)[:3].repeat(2, 1) * torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]
    assert effective_rank(three) == pytest.approx(3, abs=1e-4)
    assert effective_rank(torch.ones(6, 12) + 1e-7 * torch.randn(6, 12)) < 1e-3  # constant


def test_spread_is_the_angle_and_ignores_lengths() -> None:
    opposite = torch.tensor([[1.0, 0], [-5.0, 0], [3.0, 0], [-1.0, 0]])
    assert feature_statistics(opposite)["feature_spread"] == pytest.approx(1)
    assert feature_statistics(opposite)["feature_norm"] == pytest.approx(2.5)
    angle = 0.1  # of both to their mean direction
    pair = torch.tensor([[math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]])
    assert feature_statistics(7 * pair)["feature_spread"] == pytest.approx(math.sin(angle))


def test_usage_is_logged_as_effective_number_over_all_steps() -> None:
    """Two steps that use one prototype each use two in total; the mean of the entropies would give one."""
    meter = Meter({}, 1)
    for used in (0, 1):
        shares = torch.zeros(8)
        shares[used] = 1
        meter.add({"loss": torch.tensor(float(used)), "prototypes_used": shares}, 3)
    metrics = meter.close(CLOCK)
    assert metrics["prototypes_used"] == pytest.approx(2)
    assert metrics["loss"] == pytest.approx(0.5)


def test_gradient_norm_is_measured_before_clipping() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_grad_norm_per_tensor_(parameters, 1.0) == pytest.approx(5)
    assert parameters[1].grad.norm() == pytest.approx(1)
    assert clip_grad_norm_per_tensor_(parameters, 0.0) == pytest.approx(2**0.5)


def test_feature_stats_use_global_views_of_the_last_batch_and_no_evaluation() -> None:
    run = edit(Run(), backbone=ViT(width=24, depth=1, heads=1, patch=8, image_size=16), method=dict(out_dim=8))
    run = edit(run, method=dict(head_hidden=8, head_bottleneck=4))
    method = build_method(run)
    stats = FeatureStats(method.backbone)
    assert not stats.measure()  # before the first forward pass
    with torch.no_grad():
        globals_, other = torch.rand(6, 3, 16, 16), torch.rand(9, 3, 16, 16)
        expected = method.backbone(globals_)
        method.backbone(other)  # local views come after
        method.backbone.eval()
        stats.next_step()
        method.backbone(other)  # an evaluation
        assert "feature_norm" not in stats.measure()
        method.backbone.train()
        method.backbone(globals_)
        method.backbone(other)
    assert stats.measure()["feature_norm"] == pytest.approx(expected.norm(dim=1).mean().item(), rel=1e-5)


def test_relative_distance_is_over_the_teachers_parameters() -> None:
    student, teacher = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 2))
    teacher[0].load_state_dict(student[0].state_dict())
    assert relative_distance(teacher, student) == 0
    with torch.no_grad():
        student[0].weight.fill_(1.0)
        student[0].bias.zero_()
        teacher[0].weight.fill_(0.5)
        teacher[0].bias.zero_()
    assert relative_distance(teacher, student) == pytest.approx(0.5)
