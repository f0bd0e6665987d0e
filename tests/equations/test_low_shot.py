"""Logistic regression against Newton's method on the dense Hessian; and which labels are known."""

import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.logistic import fit_logistic, logistic_loss
from dino_ssl.evals.low_shot import BoundLowShot, LowShot, read_subset, sample_subset
from dino_ssl.models.backbone import Backbone, Features


def problem(n: int = 40, width: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, width, generator=rng)
    return F.normalize(centers[labels] + torch.randn(n, width, generator=rng), dim=1), labels


def newton(features: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """Full Newton steps, the Hessian by automatic differentiation; at most a few dozen numbers."""
    x = features.double()

    def objective(w: Tensor) -> Tensor:
        w = w.view(x.shape[1], classes)
        return F.cross_entropy(x @ w, labels) + decay / 2 * w.square().sum()

    w = torch.zeros(x.shape[1] * classes, dtype=torch.float64)
    for _ in range(50):
        w.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(w), w)
        hessian = torch.autograd.functional.hessian(objective, w.detach())
        step = torch.linalg.solve(hessian, gradient)
        w, rate = w.detach(), 1.0
        while objective(w - rate * step) > objective(w) and rate > 1e-6:
            rate /= 2
        w = w - rate * step
    return w.view(x.shape[1], classes)


# -- the regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [7, 8192])
def test_loss_and_gradient_are_autograds(rows: int) -> None:
    x, y = problem()
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x.double() @ w, y) + 0.05 * w.square().sum()
    expected.backward()
    loss, gradient = logistic_loss(w.detach(), x, y, 0.1, rows=rows)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, w.grad)


@pytest.mark.parametrize("decay", [1e-1, 0.1 / 40, 1e-5])
def test_the_optimum_is_newtons(decay: float) -> None:
    x, y = problem()
    fit, exact = fit_logistic(x, y, 3, decay, tolerance=1e-12), newton(x, y, 3, decay)
    _, gradient = logistic_loss(fit.weights, x, y, decay)
    assert gradient.norm() < 1e-7
    torch.testing.assert_close(fit.weights, exact, atol=1e-4 * float(exact.abs().max()), rtol=0)
    least = float(logistic_loss(exact, x, y, decay)[0])
    assert -1e-12 < fit.loss - least <= fit.gap + 1e-12
    assert fit.weights.dtype == torch.float64


def test_the_gap_that_is_stated_holds_where_it_stops_early() -> None:
    x, y = problem(200, 6)
    least = fit_logistic(x, y, 3, 1e-4, tolerance=1e-12).loss
    rough = fit_logistic(x, y, 3, 1e-4, tolerance=0.5)
    assert least < rough.loss <= least + rough.gap
    gradient = logistic_loss(rough.weights, x, y, 1e-4)[1]
    assert rough.gap == pytest.approx(float(gradient.square().sum()) / 2e-4)  # strong convexity with modulus decay
    assert rough.gap <= 0.5 * rough.loss
    assert rough.evaluations < fit_logistic(x, y, 3, 1e-4, tolerance=1e-12).evaluations


def test_no_more_evaluations_than_asked_and_progress_ends_whole() -> None:
    x, y = problem(200, 6)
    assert fit_logistic(x, y, 3, 1e-9, tolerance=1e-15, most=5).evaluations <= 20
    heard: list[tuple[int, int]] = []
    fit_logistic(x, y, 3, 1e-3, progress=lambda done, total: heard.append((done, total)))
    assert heard == sorted(heard)
    assert heard[-1] == (100, 100)


# -- which labels --------------------------------------------------------------------------------------------------


def test_a_share_is_of_every_class_and_a_smaller_one_lies_in_a_larger() -> None:
    labels = np.array([0] * 300 + [1] * 100 + [2] * 4 + [-1] * 50)
    part = sample_subset(labels, share=0.1, seed=3)
    assert np.bincount(labels[part]).tolist() == [30, 10, 1]
    assert set(sample_subset(labels, share=0.01, seed=3)) < set(part) < set(sample_subset(labels, share=0.5, seed=3))
    assert np.array_equal(part, sample_subset(labels, share=0.1, seed=3))
    assert not np.array_equal(part, sample_subset(labels, share=0.1, seed=4))
    assert np.bincount(labels[sample_subset(labels, per_class=4)]).tolist() == [4, 4, 4]
    assert sample_subset(labels, share=1.0).tolist() == list(range(404))


def test_a_list_names_files_with_or_without_their_folders(tmp_path: Path) -> None:
    names, file = ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"], tmp_path / "1percent.txt"
    file.write_text("3.jpg\n\ncat/1.jpg\n")
    assert read_subset(names, file).tolist() == [0, 2]
    file.write_text("3.jpg\nmug.jpg\n")
    with pytest.raises(UserError, match=r"names 2 pictures, of which 1 are not in TRAIN \(mug.jpg"):
        read_subset(names, file)
    with pytest.raises(UserError, match="cannot be read as a list"):
        read_subset(names, tmp_path)


# -- the evaluation ------------------------------------------------------------------------------------------------


class Tinted(ImageDataset):
    """Grey noise with a tint that tells the class."""

    def __init__(self, count: int, labels: list[int] | None = None, bad: tuple[int, ...] = (), seed: int = 0) -> None:
        self.bad, self.seed, self.asked = bad, seed, set()
        super().__init__(
            names=[f"{seed}/{i}.png" for i in range(count)],
            sizes=[(16, 16)] * count,
            labels=[i % 3 for i in range(count)] if labels is None else labels,
            classes=["a", "b", "c"],
        )

    def read(self, index: int) -> np.ndarray:
        self.asked.add(index)
        if index in self.bad:
            raise BadImage(self.names[index], "cut short")
        image = np.random.default_rng([self.seed, index]).integers(60, 120, (16, 16, 3), dtype=np.uint8)
        image[..., index % 3] += 50
        return image


class Colours(Backbone):
    """The mean colour, ten times as long where the picture is bright."""

    embed_dim, patch = 3, 16

    def forward(self, images: Tensor) -> Tensor:
        colour = images.mean((2, 3))
        return colour * (1 + 9 * (colour.sum(1, keepdim=True) > 0))

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError


SITE = EvalContext(size=16)


def bound(
    train: ImageDataset | None = None, val: ImageDataset | None = None, context: EvalContext = SITE, **change
) -> BoundLowShot:
    settings = LowShot(**{"share": (0.1,), "subsets": 3, "k": 1, **change})
    return settings.bind((train or Tinted(90), val or Tinted(60, seed=1)), context)


def test_what_can_be_told_is_told_and_what_cannot_is_chance() -> None:
    scores = bound(share=(0.1, 1.0), per_class=(2,))(Colours())
    assert list(scores) == [
        "10 %", "10 % spread", "10 % 1-NN", "10 % 1-NN spread", "100 %", "100 % 1-NN",
        "2 per class", "2 per class spread", "2 per class 1-NN", "2 per class 1-NN spread",
    ]  # fmt: skip
    assert scores["10 %"] == scores["100 %"] == 100
    assert scores["10 % spread"] == 0
    labels = np.random.default_rng(0).integers(0, 3, 150).tolist()
    chance = bound(Tinted(90, labels[:90]), Tinted(60, labels[90:], seed=1))(Colours())
    assert chance["10 %"] == pytest.approx(100 / 3, abs=16)


def test_mean_and_spread_are_those_of_the_subsets() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 150).tolist()
    scores = bound(Tinted(90, labels[:90]), Tinted(60, labels[90:], seed=1), subsets=4)(Colours())
    runs = scores.details["subsets"]["10 %"]
    assert len(runs) == 4
    assert len({run["loss"] for run in runs}) == 4  # other seeds, other pictures
    found = [run["top-1"] for run in runs]
    assert scores["10 %"] == pytest.approx(statistics.mean(found))
    assert scores["10 % spread"] == pytest.approx(statistics.stdev(found))
    assert scores["10 % spread"] > 0
    assert all(run["gap"] <= 1e-4 * run["loss"] for run in runs)


def test_each_subset_is_solved_on_its_own_pictures() -> None:
    """The figure of one seed is that of the regression by hand on the pictures that `sample_subset` names."""
    evaluator = bound(Tinted(90, bad=(8, 17)), per_class=(10,), share=(), seed=5)
    run = evaluator(Colours()).details["subsets"]["10 per class"][1]
    rows = [i for i in sample_subset(np.arange(90) % 3, per_class=10, seed=6) if i not in (8, 17)]
    known = SITE.extract(Colours(), Tinted(90).subset(rows))
    exact = newton(F.normalize(known.features, dim=1), known.labels, 3, 0.1 / len(rows))
    expected = logistic_loss(exact, F.normalize(known.features, dim=1), known.labels, 0.1 / len(rows))[0]
    assert run["images"] == len(rows)
    assert run["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_pictures_outside_every_subset_are_not_looked_at() -> None:
    train = Tinted(90)
    evaluator = bound(train)
    evaluator(Colours())
    assert train.asked == set(evaluator.used.tolist())
    assert 9 < len(train.asked) <= 27
    assert evaluator.data["train"]["images"] == 90


def test_lengths_of_features_matter_where_they_are_kept_alone() -> None:
    unit, kept = (bound(normalize=normal)(Colours()).details["subsets"]["10 %"][0]["loss"] for normal in (True, False))
    assert unit != pytest.approx(kept, rel=0.01)

    class Longer(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return 7 * super().forward(images)

    assert bound()(Longer()).details["subsets"]["10 %"][0]["loss"] == pytest.approx(unit, rel=1e-3)


def test_without_val_a_part_is_asked_about_and_pixels_have_a_figure() -> None:
    evaluator = LowShot(share=(0.5,), subsets=1).bind((Tinted(90),), SITE)
    assert not set(evaluator.train.names) & set(evaluator.val.names)
    assert set(evaluator.pixel_reference()) == set(evaluator(Colours())) == {"50 %", "50 % 20-NN"}


def test_progress_is_heard() -> None:
    heard: set[str] = set()
    context = replace(SITE, progress=lambda label: heard.add(label) or nullcontext(lambda done, total: None))
    bound(context=context)(Colours())
    assert "logistic regression, 10 %, subset 3 of 3" in heard


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(share=()), "--share, --per-class or --lists"),
        (dict(share=(1.5,)), "--share needs"),
        (dict(per_class=(0,)), "--per-class needs"),
        (dict(subsets=0), "--subsets must be at least 1"),
        (dict(regularization=0.0), "--regularization must be above 0"),
        (dict(per_class=(31,)), "smallest class of TRAIN has 30"),
    ],
)
def test_what_cannot_work_is_said(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bound(**change)


def test_a_list_is_a_subset_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "1percent.txt").write_text("\n".join(f"{i}.png" for i in range(9)))
    evaluator = bound(share=(), lists=(str(tmp_path / "1percent.txt"),))
    assert evaluator.used.tolist() == list(range(9))
    assert set(evaluator(Colours())) == {"1percent", "1percent 1-NN"}
