"""Classes from a few labeled images: predictions, confidence, and an accuracy that no label flatters."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dino_ssl
from dino_ssl.api.classify import FOLDS, cross_validate, fit_knn, fit_linear
from dino_ssl.cli.classify import in_folder
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.evals import resumable
from dino_ssl.evals.features import pixel_feature
from dino_ssl.models.vit import VisionTransformer, ViT
from dino_ssl.models.weights import save_backbone


def clusters(counts: list[int], width: int = 6, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return features and labels of classes with these numbers of images."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centers = torch.randn(len(counts), width, generator=rng)
    return centers[y] + noise * torch.randn(len(y), width, generator=rng), y


class Colors(ImageDataset):
    """Images of one color each, red or blue."""

    def __init__(self, count: int, labels: list[int] | None = None) -> None:
        names = [f"{i}.png" for i in range(count)]
        super().__init__(names=names, sizes=[(32, 32)] * count, labels=labels, classes=["blue", "red", "unused"])

    def read(self, index: int) -> np.ndarray:
        if index == 5:
            raise dino_ssl.data.dataset.BadImage(self.names[index], "damaged")
        image = np.full((32, 32, 3), 10 + index, np.uint8)
        image[..., 0 if index % 2 else 2] = 200
        return image


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return ViT(width=64, depth=1, heads=1, patch=16, image_size=32).build()


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_a_separable_dataset_is_classified_without_error(backbone, method: str) -> None:
    labeled = Colors(5, [0, 1, 0, 1, -1])
    result = dino_ssl.classify(backbone, Colors(40), labeled, method=method, size=32)
    assert result.names == [f"{i}.png" for i in range(40) if i != 5]
    assert [skip.reason for skip in result.skipped] == ["damaged"]
    assert result.labels == [("blue", "red")[int(name[:-4]) % 2] for name in result.names]
    assert result.runners_up == [("red", "blue")[int(name[:-4]) % 2] for name in result.names]
    assert ((result.confidences > 0.5) & (result.confidences <= 1)).all()
    assert (result.labeled, result.tested, result.accuracy) == ({"blue": 2, "red": 2}, 4, 100)
    assert result.classifier == {"knn": "2-NN", "linear": "linear"}[method]
    assert result.references == {"raw_pixels": {"accuracy": 100}}


def test_labels_may_be_features(backbone) -> None:
    labeled = Colors(4, [0, 1, 0, 1])
    expected = dino_ssl.classify(backbone, Colors(20), labeled, size=32)
    result = dino_ssl.classify(backbone, Colors(20), dino_ssl.embed(backbone, labeled, size=32), size=32)
    assert (result.labels, result.accuracy, result.references) == (expected.labels, expected.accuracy, {})


def test_the_accuracy_of_raw_pixels_is_that_of_their_nearest_neighbors(backbone) -> None:
    labels = [0, 1, 1, 0, 1, 0, 0, 1, -1]  # not those of the colors; image 5 cannot be read
    labeled, rows = Colors(9, labels), [0, 1, 2, 3, 4, 6, 7]
    x = torch.from_numpy(np.stack([pixel_feature(labeled.read(i)) for i in rows]))
    correct = cross_validate(
        lambda *data: fit_knn(*data, k=2), x, torch.tensor(labels)[rows], 7, lambda done, total: None
    )
    (reference,) = dino_ssl.classify(backbone, Colors(4), labeled, size=32).references.values()
    assert reference == {"accuracy": pytest.approx(100 * correct.double().mean())}
    assert 0 < correct.sum() < 7


def test_leave_one_out_equals_a_loop(monkeypatch) -> None:
    x, y = clusters([5, 4, 3], noise=1.0)
    x[1] = x[0]  # copies
    expected = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        cosines = F.normalize(x[others], dim=1) @ F.normalize(x[i], dim=0)
        near = cosines.argsort(descending=True)[:3]
        votes = torch.zeros(3).index_add(0, y[others][near], (cosines[near] / 0.07).exp())
        expected.append(bool(votes.argmax() == y[i]))
    assert 0 < sum(expected) < len(x)
    found = cross_validate(lambda *data: fit_knn(*data, k=3), x, y, FOLDS["knn"], lambda done, total: None)
    assert found.tolist() == expected


def test_an_image_is_never_classified_by_a_classifier_that_has_seen_its_label() -> None:
    x, y = clusters([7, 2, 4])
    rows = torch.arange(len(x))[:, None].float()
    folds = []

    def fit(train: Tensor, labels: Tensor, classes: int):
        assert (classes, set(labels.tolist())) == (3, {0, 1, 2})  # every class stays in the training part

        def classify(test: Tensor) -> Tensor:
            assert not set(train.ravel().tolist()) & set(test.ravel().tolist())
            folds.append(len(test))
            return torch.zeros(len(test), classes)

        return classify

    cross_validate(fit, rows, y, 5, lambda done, total: None)
    assert sorted(folds) == [2, 2, 3, 3, 3]


def test_random_labels_have_the_accuracy_of_chance() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(200) % 2
    for fit, folds in ((lambda *data: fit_knn(*data, k=5), FOLDS["knn"]), (fit_linear, FOLDS["linear"])):
        assert 0.35 < cross_validate(fit, x, y, folds, lambda done, total: None).float().mean() < 0.65


@pytest.fixture
def labeled(photos, tmp_path):
    """Folder with three images of each of two classes."""
    for folder in sorted(photos.iterdir())[-2:]:
        (tmp_path / "labeled" / folder.name).mkdir(parents=True)
        for file in sorted(folder.glob("train*"))[:3]:
            shutil.copy(file, tmp_path / "labeled" / folder.name)
    return tmp_path / "labeled"


def test_the_command_writes_a_line_per_image_and_says_how_good_it_is(trained, photos, labeled, dino, tmp_path) -> None:
    run, _ = trained
    output = dino("classify", run, "--labels", labeled, photos, "-o", "out/labels.csv", "--threshold", "0.9")
    assert output.code == 0, output.err
    (path,) = (tmp_path / "out").iterdir()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "label", "confidence", "runner_up"]
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert len(rows) == 40
    uncertain = sum(float(row["confidence"]) < 0.9 for row in rows)
    assert f"{uncertain} of 40 unlabeled images have a confidence below 0.9" in output.out
    assert "Accuracy on 6 labeled images, by leave-one-out" in output.out
    accuracy, pixels = re.search(
        r"leave-one-out: ([\d.]+) % \(.* class: 50.0 %; raw pixels: ([\d.]+) %", output.out
    ).groups()
    assert ("Below raw pixels: accuracy." in output.out) == (float(accuracy) < float(pixels))
    assert "skipped: star/empty.png: empty file" in output.out
    result = dino("classify", run, photos, "--labels", labeled, "--method", "linear", "--json").json
    assert list(result["labeled"].values()) == [3, 3]
    assert sum(result["predicted"].values()) == result["images"] == 40
    assert (result["classifier"], result["tested"], len(result["skipped"])) == ("linear", 6, 2)


def test_labeled_images_of_the_dataset_are_not_counted_as_uncertain(tmp_path) -> None:
    names = ["a/1.jpg", "labeled/cat/1.jpg", "labeled2/1.jpg"]
    assert in_folder(names, str(tmp_path), str(tmp_path / "labeled/")).tolist() == [False, True, False]
    assert in_folder(names, str(tmp_path), str(tmp_path)).all()
    assert not in_folder(names, str(tmp_path), str(tmp_path.parent)).any()
    assert not in_folder(names, str(tmp_path / "a.parquet"), str(tmp_path / "labeled")).any()


def test_an_interrupted_command_resumes_and_writes_the_same_file(
    trained, photos, labeled, dino, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(resumable, "FIRST_CHUNK", 16)
    line = ("classify", trained[0], photos, "--labels", labeled, "--batch-size", "8", "-o")
    assert dino(*line, "whole.csv").code == 0
    forward, seen = VisionTransformer.forward, []

    def interrupt(self: VisionTransformer, images: Tensor) -> Tensor:
        seen.append(len(images))
        if sum(seen) == 6 + 32:  # labeled images, and the last batch of the second chunk
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", interrupt)
    stopped = dino(*line, "parts.csv")
    assert stopped.code != 0
    assert "the same command resumes from parts.csv.partial" in stopped.out
    assert not (tmp_path / "parts.csv").exists()
    seen.clear()
    assert "Resuming after 16 of 40 images" in dino(*line, "parts.csv").out
    assert sum(seen) == 6 + 24
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "parts.csv.partial").exists()


def test_features_in_a_file_replace_the_images_of_the_same_weights(trained, photos, labeled, dino, tmp_path) -> None:
    run, _ = trained
    for folder, name in ((photos, "photos.parquet"), (labeled, "labeled.parquet")):
        assert dino("embed", run, folder, "-o", name).code == 0
    assert dino("classify", run, photos, "--labels", labeled, "-o", "one.csv").code == 0
    output = dino("classify", run, "photos.parquet", "--labels", "labeled.parquet", "-o", "two.csv")
    assert output.code == 0, output.err
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    network = ViT(width=64, depth=1, heads=1, patch=16, image_size=32)
    other = save_backbone(network, network.build().state_dict(), tmp_path / "other.safetensors")
    output = dino("classify", other, photos, "--labels", "labeled.parquet")
    assert output.code == 2
    assert "labeled.parquet has features of other weights" in output.err
    (tmp_path / "bad.parquet").write_text("no table")
    assert "is not a Parquet file of `dino embed`" in dino("classify", run, photos, "--labels", "bad.parquet").err


def test_unlabeled_images_cannot_teach(trained, photos, labeled, dino) -> None:
    output = dino("classify", trained[0], photos, "--labels", labeled / "star")
    assert output.code == 2
    assert "--labels expected images of at least two classes; got 0" in output.err
