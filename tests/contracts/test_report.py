"""The report is one self-contained page, for complete and partial runs and any file names."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_ssl.collapse.monitor import diagnose
from dino_ssl.config import edit, to_dict
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.errors import UserError
from dino_ssl.evals.features import ImageFeatures
from dino_ssl.models.backbone import Backbone, Features
from dino_ssl.models.vit import ViT
from dino_ssl.report.curves import chart, read_history
from dino_ssl.report.run_report import write_report
from dino_ssl.report.sections import attention_section
from dino_ssl.report.snapshots import choose_samples, read_index, read_neighbors, save_snapshot, write_neighbors
from dino_ssl.run import Run, read_run

K = 1024


class Blobs(ImageDataset):
    """Bright disks (class 0) and bars (class 1) on noise; image 5 cannot be read."""

    def __init__(self, count: int = 24, side: int = 64) -> None:
        self.side = side
        names = [f"{'disk' if i % 2 == 0 else 'bar'}/<{i}> ünï&.jpg" for i in range(count)]
        labels = [i % 2 for i in range(count)]
        super().__init__(names=names, sizes=[(side, side)] * count, labels=labels, classes=["disk", "bar"])

    def read(self, index: int) -> np.ndarray:
        if index == 5:
            raise BadImage(self.names[5], "cut short")
        rng = np.random.default_rng(index)
        image = rng.integers(20, 90, (self.side, self.side, 3))
        ys, xs = np.mgrid[: self.side, : self.side]
        x, y = rng.integers(self.side // 3, self.side * 2 // 3, 2)
        near = np.hypot(xs - x, ys - y) < self.side / 5 if index % 2 == 0 else abs(xs - x) < self.side / 10
        image[near] = rng.integers(120, 255, 3)
        return image.astype(np.uint8)


def rows(steps: int = 120, *, best: float = 61.25) -> list[dict]:
    """Return metrics like those of a run that learns."""
    result = []
    for step in range(10, steps + 1, 10):
        t = step / steps
        loss, entropy = math.log(K) * (1 - 0.6 * t), math.log(K) * (0.8 - 0.5 * t)
        more = {
            "kl": loss - entropy,
            "marginal_entropy": 6.5,
            "lr": 1e-3 * (1 - t),
            "momentum": 0.99 + 0.01 * t,
        }
        speed = {"images_per_s": 100 + 5 * t, "wait": 0.03, "time": 60 * t, "weight_decay": 0.04}
        result.append({"step": step, "epoch": step / 10, "loss": loss, "teacher_entropy": entropy, **more, **speed})
        if step % 40 == 0:
            accuracy = best - 0.5 * abs(step - 80)  # the best is not the last
            result.append({"step": step, "epoch": step / 10, "eval": "knn", "20-NN": accuracy, "20-NN top-5": 99.0})
    return result


def write_rows(run_dir: Path, lines: list[dict], tail: str = "") -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def backbone() -> Backbone:
    torch.manual_seed(0)
    return ViT(size="tiny", patch=8, image_size=64, width=24, depth=2, heads=3).build()


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of `finished` that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "flowers & <weeds>"
    (folder / "snapshots").mkdir(parents=True)
    run = edit(Run(data=Folder(path="photos")), method=dict(out_dim=K), optim=dict(epochs=12), out=str(folder))
    info = {
        "format": 1,
        "run": to_dict(run),
        "prototypes": K,
        "backbone": to_dict(run.backbone),
        "data": {"images": 24, "trained_on": 22, "classes": ["disk", "bar"]},
        "reference_scores": {"raw_pixels": {"20-NN": 33.75}, "random_weights": {"20-NN": 28.5}},
        "versions": {"dino": "0.1.0", "torch": "2.11.0"},
    }
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "plan.json").write_text(
        json.dumps({"format": 1, "plan": [{"name": "K", "value": "1024", "reason": "24 images are few"}]})
    )
    write_rows(folder, rows())
    skipped = [{"name": "a <b>.jpg", "reason": "cut short"}, {"name": "notes.txt", "reason": "not an image"}]
    (folder / "skipped.jsonl").write_text("".join(json.dumps(s) + "\n" for s in skipped) + '{"name": "to')
    network, dataset = backbone(), Blobs()
    samples = choose_samples(dataset, 4)
    for epoch in (0, 4, 12):
        save_snapshot(network, dataset, samples, folder / "snapshots", epoch, 64)
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    assert dataset.labels is not None
    extracted = ImageFeatures(features, torch.from_numpy(dataset.labels), torch.arange(24), [])
    write_neighbors(extracted, dataset, samples, folder / "snapshots", k=3)
    return folder


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    """Return the report of the finished run."""
    return write_report(finished).read_text()


def test_the_page_has_results_settings_and_images(finished: Path, page: str) -> None:
    for text in (
        "61.2 %",
        "33.8 %",
        "28.5 %",
        "epoch 8",
        f"ln K = {math.log(K):.2f}",
    ):  # the best, not the last
        assert text in page, text
    assert "24 images are few" in page
    assert "cut short" in page
    assert "2 files could not be read" in page
    assert "<dt>out dim</dt><dd>1024</dd>" in page
    assert '<dt class="default">student temp</dt><dd class="default">0.1</dd>' in page
    for title in ("Curves", "Attention maps", "Nearest neighbors", "Plan", "Settings", "Environment", "Learning rate"):
        assert title in page, title
    assert not diagnose(read_history(finished).training, K)


def test_the_page_loads_nothing_and_escapes_names(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert "<weeds>" not in page
    assert "&lt;weeds&gt;" in page
    assert page.count("data:image/jpeg;base64,") >= 4 * (1 + 3) + 4 * (1 + 2 + 3)  # over epochs, then the panels
    assert len(page) < 3_000_000


def test_a_private_report_has_no_images_and_no_paths(run_dir: Path) -> None:
    content = json.loads((run_dir / "run.json").read_text())
    content["run"] |= {"data": {"type": "Folder", "path": "/home/ann/xrays"}, "init": "/home/ann/x.pth"}
    (run_dir / "run.json").write_text(json.dumps(content))
    write_rows(run_dir, [*rows(), {"step": 120, "epoch": 12, "eval": "retrieval /home/ann/pairs", "mAP": 1.0}])
    shown, private = (write_report(run_dir, thumbnails=value).read_text() for value in (True, False))
    images = "data:image/jpeg"
    for text in ("/home/ann/xrays", "/home/ann/x.pth", "/home/ann/pairs", "a &lt;b&gt;.jpg", images):
        assert text in shown
        assert text not in private, text
    assert "/home" not in private
    assert "This page has thumbnails of the dataset and paths of files." in shown
    for text in (
        "no images of the dataset and no paths",
        "retrieval pairs",
        "cut short",
        "<dt>out dim</dt><dd>1024</dd>",
    ):
        assert text in private
    assert images not in write_report(run_dir, edit(read_run(run_dir), thumbnails=False)).read_text()


def test_a_partial_run_gets_its_report(run_dir: Path) -> None:
    for name, title in (
        ("metrics.jsonl", "Learning rate"),
        ("snapshots", "Attention maps"),
        ("plan.json", "<h2>Plan"),
        ("skipped.jsonl", "Skipped files"),
    ):
        (run_dir / name).rename(run_dir.parent / name)
        html = write_report(run_dir).read_text()
        assert "Settings" in html
        assert title not in html


def test_another_format_is_refused(run_dir: Path) -> None:
    for name, read in (("index", read_index), ("neighbors", read_neighbors)):
        path = run_dir / f"snapshots/{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
        with pytest.raises(UserError, match=f"{name}.json has format 99; this version of dino reads format 1"):
            read(path.parent)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_a_dash(run_dir: Path) -> None:
    folder = run_dir / "snapshots"
    assert "<td>–</td>" not in attention_section(folder)
    next(folder.glob("epoch_0012/*.jpg")).unlink()
    assert "<td>–</td>" in attention_section(folder)


def test_history_ignores_a_torn_line_and_prefers_resumed_steps(run_dir: Path) -> None:
    again = [{"step": 90, "epoch": 9, "loss": 1.5}, {"step": 100, "epoch": 10, "loss": None}]
    write_rows(run_dir, [*rows(), *again], tail='{"step": 110, "lo')
    history = read_history(run_dir)
    assert [row["step"] for row in history.training] == [*range(10, 81, 10), 90, 100]
    assert history.line("loss")[1][-1] == 1.5  # None is not a point of a curve
    assert [row["step"] for row in history.evaluations["knn"]] == [40, 80, 120]


def test_snapshots_are_kept_by_epoch_without_bad_images(tmp_path: Path) -> None:
    network, dataset = backbone().train(), Blobs()
    for epoch in (3, 0, 3):
        save_snapshot(network, dataset, [0, 5, 7], tmp_path, epoch, 64)
    index = read_index(tmp_path)
    assert index["epochs"] == [0, 3]
    assert set(index["images"]) == {"0", "7"}
    assert index["panels"] == ["mask, 60 %", "mean", "head 0", "head 1", "head 2"]
    assert network.training  # the mode is restored


class Pooled(Backbone):
    """A network without attention: patches of 8 pixels and their mean."""

    embed_dim, patch = 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def features(self, images: torch.Tensor, layers: int = 1) -> list[Features]:
        patches = torch.nn.functional.avg_pool2d(images, 8).movedim(1, -1)
        return [Features(patches.mean((1, 2)), patches)]


def test_maps_of_a_network_without_attention_are_not_called_attention(tmp_path: Path) -> None:
    save_snapshot(Pooled(), Blobs(), [0, 7], tmp_path, 3, 64)
    section = re.sub(r"<[^>]*>", " ", attention_section(tmp_path))
    for text in ("Similarity maps", "similarity of each patch to the pooled feature", "mask, 60 %  similarity"):
        assert text in section
    assert not re.search(r"attention|head|mean|CLS", section, re.IGNORECASE)


def test_neighbors_are_the_nearest_other_images(tmp_path: Path) -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0, 2.0])  # cosine falls with the angle between two
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [50], [2], [3], [4]])
    extracted = ImageFeatures(features, torch.full((5,), -1), torch.tensor([2, 4, 6, 8, 9]), [])
    write_neighbors(extracted, Blobs(), [4, 5], tmp_path, k=2)  # 5 has no feature
    (query,) = read_neighbors(tmp_path)["queries"]
    assert [near["index"] for near in query["neighbors"]] == [2, 6]
    assert query["neighbors"][0]["similarity"] == pytest.approx(math.cos(0.1), abs=1e-4)
    write_neighbors(extracted, Blobs(), [5], tmp_path)
    assert not read_neighbors(tmp_path)["queries"]


def test_samples_cover_every_class() -> None:
    dataset = Blobs()
    assert dataset.labels is not None
    chosen = choose_samples(dataset, 4)
    assert sorted(dataset.labels[chosen].tolist()) == [0, 0, 1, 1]
    assert len(choose_samples(Blobs(3), 6)) == 3


def test_a_report_without_labels_names_no_classes(run_dir: Path) -> None:
    path = run_dir / "snapshots/neighbors.json"
    assert "Green: the same class" in write_report(run_dir).read_text()
    content = json.loads(path.read_text())
    for query in content["queries"]:
        query["label"] = None
    path.write_text(json.dumps(content))
    assert "Green" not in write_report(run_dir).read_text()


def test_a_hint_about_a_low_loss_does_not_contradict_the_verdict(run_dir: Path) -> None:
    """A loss near chance is a hint only if the scores do not show that the network learned."""
    near_chance = [row | {"loss": 6.9, "marginal_entropy": 6.91} for row in rows() if "loss" in row]
    for best, shown in ((61.25, False), (25.0, True)):
        scores = [row for row in rows(best=best) if "eval" in row]
        write_rows(run_dir, sorted([*near_chance, *scores], key=lambda row: row["step"]))
        html = write_report(run_dir).read_text()
        assert ("Not learning yet" in html) == shown
        assert ('class="verdict below"' in html) == shown


def history(loss: float, entropy: float, kl: float, marginal: float, *, first: float | None = None) -> list[dict]:
    values = np.linspace(loss if first is None else first, loss, 40).tolist()
    constant = {"teacher_entropy": entropy, "kl": kl, "marginal_entropy": marginal}
    return [{"step": step, "loss": value, **constant} for step, value in enumerate(values)]


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (history(8.3178, 8.3177, 1e-4, 8.3178), "Uniform collapse"),
        (history(0.02, 0.01, 0.01, 0.05, first=8.3), "one prototype"),
        (history(7.77, 6.0, 1.77, 7.8, first=8.2), "Not learning yet"),
        ([*history(6.0, 4.0, 2.0, 8.0), {"step": 40, "loss": None}], "not finite at step 40"),
        ([*history(6.0, 4.0, 2.0, 8.0), {"step": 40, "loss": math.nan}], "not finite at step 40"),
    ],
)
def test_failures_are_named(rows: list[dict], name: str) -> None:
    (finding,) = diagnose(rows, 4096)
    assert name in str(finding)


def test_a_healthy_run_has_no_findings() -> None:
    assert diagnose(history(4.8, 3.1, 1.7, 8.0, first=8.3), 4096) == []
    assert diagnose(history(7.9, 6.0, 1.9, 8.0)[:3], 4096) == []  # too early to judge


def test_a_long_curve_is_thinned_and_keeps_its_last_value() -> None:
    xs = list(range(10_000))
    figure = chart({"loss": (xs, [1.0] * 9_999 + [7.0])}, title="Loss")
    assert len(figure) < 30_000
    assert "<b>7</b>" in figure
    assert chart({"loss": ([], [])}, title="Loss") == ""
