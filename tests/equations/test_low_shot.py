"""Low-shot evaluation: logistic regression equals Newton's method on the dense Hessian; sampling of labels."""

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
from dino_ssl.evals import low_shot
from dino_ssl.evals.base import EvalContext, PreparedEval
from dino_ssl.evals.features import extract
from dino_ssl.evals.low_shot import LowShot, fit_logistic, logistic_loss, read_subset, sample_subset
from dino_ssl.models.backbone import Backbone, Features


def problem(n: int = 40, width: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, width, generator=rng)
    return F.normalize(centers[labels] + torch.randn(n, width, generator=rng), dim=1), labels


def newton(features: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """Newton's method with the Hessian by automatic differentiation, for small problems."""
    x = features.double()

    def objective(w: Tensor) -> Tensor:
        w = w.view(x.shape[1], classes)
        return F.cross_entropy(x @ w, labels) + decay / 2 * w.square().sum()

    w = torch.zeros(x.shape[1] * classes, dtype=torch.float64)
    for _ in range(50):
        w.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(w), w)
        if gradient.norm() < 1e-12:
            break
        hessian = torch.autograd.functional.hessian(objective, w.detach())
        step = torch.linalg.solve(hessian, gradient)
        w, rate = w.detach(), 1.0
        while objective(w - rate * step) > objective(w) and rate > 1e-6:
            rate /= 2
        w = w - rate * step
    return w.detach().view(x.shape[1], classes)


# -- the regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [7, 8192])
def test_loss_and_gradient_equal_autograd(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_shot, "ROWS", rows)
    x, y = problem()
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x.double() @ w, y) + 0.05 * w.square().sum()
    expected.backward()
    loss, gradient = logistic_loss(w.detach(), x, y, 0.1)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, w.grad)


@pytest.mark.parametrize("decay", [1e-1, 0.1 / 40, 1e-5])
def test_the_optimum_equals_newtons_method(decay: float) -> None:
    x, y = problem()
    fit, exact = fit_logistic(x, y, 3, decay, tolerance=1e-12), newton(x, y, 3, decay)
    _, gradient = logistic_loss(fit.weights, x, y, decay)
    assert gradient.norm() < 1e-7
    torch.testing.assert_close(fit.weights, exact, atol=1e-4 * float(exact.abs().max()), rtol=0)
    least = float(logistic_loss(exact, x, y, decay)[0])
    assert -1e-12 < fit.loss - least <= fit.gap + 1e-12
    assert fit.weights.dtype == torch.float64


def test_the_stated_gap_is_a_bound_if_the_solver_stops_early() -> None:
    x, y = problem(200, 6)
    least = fit_logistic(x, y, 3, 1e-4, tolerance=1e-12).loss
    rough = fit_logistic(x, y, 3, 1e-4, tolerance=0.5)
    assert least < rough.loss <= least + rough.gap
    gradient = logistic_loss(rough.weights, x, y, 1e-4)[1]
    assert rough.gap == pytest.approx(float(gradient.square().sum()) / 2e-4)  # strong convexity with modulus decay
    assert rough.gap <= 0.5 * rough.loss
    assert rough.evaluations < fit_logistic(x, y, 3, 1e-4, tolerance=1e-12).evaluations


def test_evaluations_are_limited_and_reported() -> None:
    x, y = problem(200, 6)
    assert fit_logistic(x, y, 3, 1e-9, tolerance=1e-15, max_evaluations=5).evaluations <= 20
    calls: list[tuple[int, int]] = []
    fit = fit_logistic(x, y, 3, 1e-3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(count, 0) for count in range(1, fit.evaluations + 1)]


# -- sampling of labels ---------------------------------------------------------------------------------------------


def test_a_share_is_taken_of_every_class_and_contains_smaller_shares() -> None:
    labels = np.array([0] * 300 + [1] * 100 + [2] * 4 + [-1] * 50)
    part = sample_subset(labels, share=0.1, seed=3)
    assert np.bincount(labels[part]).tolist() == [30, 10, 1]
    assert set(sample_subset(labels, share=0.01, seed=3)) < set(part) < set(sample_subset(labels, share=0.5, seed=3))
    assert np.array_equal(part, sample_subset(labels, share=0.1, seed=3))
    assert not np.array_equal(part, sample_subset(labels, share=0.1, seed=4))
    assert np.bincount(labels[sample_subset(labels, per_class=5)]).tolist() == [5, 5, 4]  # all of a small class
    assert sample_subset(labels, share=1.0).tolist() == list(range(404))


def test_a_list_names_files_with_or_without_folders(tmp_path: Path) -> None:
    names, file = ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"], tmp_path / "1percent.txt"
    file.write_text("3.jpg\n\ncat/1.jpg\n")
    assert read_subset(names, file).tolist() == [0, 2]
    file.write_text("3.jpg\nmug.jpg\n")
    with pytest.raises(UserError, match=r"lists 2 images; 1 of them are not in TRAIN \(mug.jpg"):
        read_subset(names, file)
    with pytest.raises(UserError, match="cannot be read as a list"):
        read_subset(names, tmp_path)


# -- the evaluation ------------------------------------------------------------------------------------------------


class Tinted(ImageDataset):
    """Gray noise with a tint for each class."""

    def __init__(self, count: int, labels: list[int] | None = None, bad: tuple[int, ...] = (), seed: int = 0) -> None:
        self.bad, self.seed, self.reads = bad, seed, set()
        super().__init__(
            names=[f"{seed}/{i}.png" for i in range(count)],
            sizes=[(16, 16)] * count,
            labels=[i % 3 for i in range(count)] if labels is None else labels,
            classes=["a", "b", "c"],
        )

    def read(self, index: int) -> np.ndarray:
        self.reads.add(index)
        if index in self.bad:
            raise BadImage(self.names[index], "cut short")
        image = np.random.default_rng([self.seed, index]).integers(60, 120, (16, 16, 3), dtype=np.uint8)
        image[..., index % 3] += 50
        return image


class Colors(Backbone):
    """The mean color, ten times as long for a bright image."""

    embed_dim, patch = 3, 16

    def forward(self, images: Tensor) -> Tensor:
        color = images.mean((2, 3))
        return color * (1 + 9 * (color.sum(1, keepdim=True) > 0))

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError


CONTEXT = EvalContext(size=16)


def prepare(
    train: ImageDataset | None = None, val: ImageDataset | None = None, context: EvalContext = CONTEXT, **change
) -> PreparedEval:
    settings = LowShot(**{"share": (0.1,), "subsets": 3, "k": 1, **change})
    return settings.prepare((train or Tinted(90), val or Tinted(60, seed=1)), context)


def test_separable_classes_reach_100_percent_and_random_labels_chance() -> None:
    scores = prepare(share=(0.1, 1.0), per_class=(2,))(Colors())
    assert list(scores) == [
        "10 %", "10 % spread", "10 % 1-NN", "10 % 1-NN spread", "100 %", "100 % 1-NN",
        "2 per class", "2 per class spread", "2 per class 1-NN", "2 per class 1-NN spread",
    ]  # fmt: skip
    assert scores["10 %"] == scores["100 %"] == 100
    assert scores["10 % spread"] == 0
    labels = np.random.default_rng(0).integers(0, 3, 150).tolist()
    chance = prepare(Tinted(90, labels[:90]), Tinted(60, labels[90:], seed=1))(Colors())
    assert chance["10 %"] == pytest.approx(100 / 3, abs=16)


def test_mean_and_spread_are_taken_over_subsets() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 150).tolist()
    scores = prepare(Tinted(90, labels[:90]), Tinted(60, labels[90:], seed=1), subsets=4)(Colors())
    runs = scores.details["subsets"]["10 %"]
    assert len(runs) == 4
    assert len({run["loss"] for run in runs}) == 4  # other seeds, other images
    accuracies = [run["top-1"] for run in runs]
    assert scores["10 %"] == pytest.approx(statistics.mean(accuracies))
    assert scores["10 % spread"] == pytest.approx(statistics.stdev(accuracies))
    assert scores["10 % spread"] > 0
    assert all(run["gap"] <= 1e-4 * run["loss"] for run in runs)


def test_each_subset_is_solved_on_its_own_images() -> None:
    """The loss of one seed equals the regression on the images of `sample_subset`."""
    prepared = prepare(Tinted(90, bad=(8, 17)), per_class=(10,), share=(), seed=5)
    run = prepared(Colors()).details["subsets"]["10 per class"][1]
    rows = [i for i in sample_subset(np.arange(90) % 3, per_class=10, seed=6) if i not in (8, 17)]
    known = extract(Colors(), Tinted(90).subset(rows), CONTEXT)
    exact = newton(F.normalize(known.features, dim=1), known.labels, 3, 0.1 / len(rows))
    expected = logistic_loss(exact, F.normalize(known.features, dim=1), known.labels, 0.1 / len(rows))[0]
    assert run["images"] == len(rows)
    assert run["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_only_images_of_a_subset_are_read() -> None:
    train = Tinted(90)
    prepared = prepare(train)
    prepared(Colors())
    subsets = LowShot(share=(0.1,), subsets=3).sample_subsets(train)["10 %"]
    assert train.reads == set(np.concatenate(subsets).tolist())
    assert 9 < len(train.reads) <= 27
    assert prepared.data["train"]["images"] == 90


def test_a_part_of_train_is_held_out_without_val() -> None:
    prepared = LowShot(share=(0.5,), subsets=1).prepare((Tinted(90),), CONTEXT)
    assert (prepared.data["train"]["images"], prepared.data["val"]["images"]) == (81, 9)
    assert set(prepared.references["raw_pixels"]()) == set(prepared(Colors())) == {"50 %", "50 % 20-NN"}


def test_progress_is_reported() -> None:
    labels: set[str] = set()
    context = replace(CONTEXT, progress=lambda label: labels.add(label) or nullcontext(lambda done, total: None))
    prepare(context=context)(Colors())
    assert "logistic regression, 10 %, subset 3 of 3" in labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(share=()), "`share`, `per_class` or `lists`"),
        (dict(share=(1.5,)), "`share` must be above 0 and at most 1"),
        (dict(per_class=(0,)), "`per_class` must be at least 1"),
        (dict(subsets=0), "`subsets` must be at least 1"),
        (dict(regularization=0.0), "`regularization` must be above 0"),
    ],
)
def test_invalid_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(**change)


def test_a_list_is_one_subset(tmp_path: Path) -> None:
    (tmp_path / "1percent.txt").write_text("\n".join(f"{i}.png" for i in range(9)))
    scores = prepare(share=(), lists=(str(tmp_path / "1percent.txt"),))(Colors())
    assert [run["images"] for run in scores.details["subsets"]["1percent"]] == [9]
    assert set(scores) == {"1percent", "1percent 1-NN"}
