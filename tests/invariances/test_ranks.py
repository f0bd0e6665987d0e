"""Two gloo ranks give the result of one: of training with half the batch each, for every method, and of evaluations."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import all_evals
import pytest
import torch
from timm.layers import BatchNormAct2d  # pyright: ignore[reportPrivateImportUsage]
from tiny import RUN, Run, dataset_of, differences, edit, fit, last, run_on_ranks
from torch import nn

from dino_ssl import cli, distributed
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.evals import EVALUATIONS
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.scheduled import ScheduledEval
from dino_ssl.methods import BYOLConfig, MoCoConfig, SupervisedConfig, SwAVConfig
from dino_ssl.metrics import read_metrics
from dino_ssl.models.sync_bn import convert_sync_batchnorm
from dino_ssl.models.timm import Timm
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import Speed
from dino_ssl.runtime import start
from dino_ssl.state import build_method
from dino_ssl.training import train

CONVNET = Timm(name="resnet18", args=(("channels", "(8, 8, 8, 16)"), ("layers", "(1, 1, 1, 1)")))
NARROW = dict(width=24, depth=1, heads=2, drop_path=0.0)
PLAIN = edit(RUN, backbone=NARROW, optim=dict(algorithm="sgd", lr=0.3, epochs=2), save_minutes=60)
"""10 steps without drop-path, which is random per rank. SGD, because AdamW turns rounding errors of gradients that are
zero into steps of full size."""
KNN_EVAL = ScheduledEval(
    evaluation=KNN(k=(3,)), sources=(Scenes(count=30, size=32, classes=4, seed=1),), every_epochs=1
)
SMALL = dict(head_dim=16, head_hidden=32)


class Case(NamedTuple):
    """Changes of the run, and of the run on two ranks only; the largest rounding error of a weight."""

    changes: dict[str, Any]
    on_two_ranks: dict[str, Any] | None = None
    rounding: float = 1e-5


CASES = {
    "dino": Case(dict(optim=dict(lr=1.0), online_eval=dict(every_epochs=1), evals=(KNN_EVAL,), keep_every=1)),
    "sinkhorn over micro-batches": Case(
        dict(method=dict(targets="sinkhorn", teacher="previous-epoch")), dict(optim=dict(micro_batch=3))
    ),
    "batch softmax": Case(dict(method=dict(targets="batch-softmax", teacher="student"))),
    "batch norm everywhere, mse, predictor": Case(
        dict(
            method=dict(loss="mse", predictor=True, head_norm="batch", teacher="previous-step"),
            backbone=CONVNET,
            optim=dict(lr=0.1),  # at 0.3 a ConvNet's rounding grows faster
        )
    ),
    "byol": Case(dict(method=BYOLConfig(**SMALL, momentum=0.9)), rounding=5e-4),  # pyright: ignore[reportArgumentType]
    "moco": Case(
        dict(method=MoCoConfig(**SMALL, queue=37, momentum=0.9)),  # pyright: ignore[reportArgumentType]
        rounding=5e-4,
    ),
    "swav": Case(
        dict(method=SwAVConfig(**SMALL, out_dim=20, queue=19, queue_from=1)),  # pyright: ignore[reportArgumentType]
        rounding=5e-4,
    ),
    "supervised": Case(
        dict(
            method=SupervisedConfig(),
            views=Augment(size=32, repeats=2),
            optim=dict(algorithm="adamw", lr=0.03, layer_decay=0.5, warmup_lr=1e-4),
            online_eval=dict(every_epochs=1),
        )
    ),
}
"""16 keys per step wrap around in MoCo's queue of 37; SwAV's is full, and used, from step 8 on."""
MEANS = {
    "loss",
    "teacher_entropy",
    "kl",
    "lr",
    "weight_decay",
    "momentum",
    "teacher_temp",
    "3-NN",
    "20-NN",
    "top-1",
    "top-5",
}
"""Metrics that are means over images and do not depend on the number of ranks."""


class Ranks(NamedTuple):
    """The work of two ranks: its folder, and the output of each."""

    folder: Path
    outputs: list[str]


def preset() -> Run:
    """Return the settings of `dino train`, which are for two ranks."""
    return edit(RUN, optim=dict(batch_size=18, warmup_epochs=0), online_eval=dict(every_epochs=1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Train the cases, run all evaluations, and then `dino train`, in one process group."""
    folder = tmp_path_factory.mktemp("ranks")
    evals = all_evals.make(folder / "evals")
    shutil.copytree(evals, folder / "evals on one")

    def work() -> None:
        with start("float32") as rt:
            for name, case in CASES.items():
                run = edit(PLAIN, out=str(folder / name), **case.changes)
                run = edit(run, **(case.on_two_ranks or {}))
                for _ in train(run, rt, dataset_of(run.data)):
                    pass
            results = json.dumps(all_evals.evaluate_all(evals))
            (evals / f"rank{distributed.rank()}.json").write_text(results)
            planning.measure = lambda *_: Speed(0.01, 0.01)  # of this process only
            line = ("--preset", "test_ranks:preset", "--optim.epochs", "1", "--out", f"{folder / 'command'}")
            assert cli.main(["train", f"{evals / 'train'}", *line]) == 0

    return Ranks(folder, run_on_ranks(work, folder))


# -- training ----------------------------------------------------------------------------------------------


def test_two_ranks_with_half_the_batch_equal_one(ranks: Ranks, tmp_path: Path) -> None:
    """Weights, teacher, center, queue, statistics of batch norm, metrics and evaluations; then resume on one rank."""
    ones = {name: edit(PLAIN, out=str(tmp_path / name), **case.changes) for name, case in CASES.items()}
    twos = {name: edit(one, out=str(ranks.folder / name)) for name, one in ones.items()}
    for name, one in ones.items():
        fit(one)
        assert_close(twos[name], one, CASES[name].rounding)
        begun = build_method(one, classes=4).state_dict()
        assert len(differences(last(one)["method"], begun, same=torch.allclose)) > 10, f"{name}: nothing was trained"

    resumed = edit(ones["dino"], out=str(tmp_path / "resumed"))
    shutil.copytree(twos["dino"].out, resumed.out)
    os.replace(Path(resumed.out) / "checkpoints/epoch_0001.pt", Path(resumed.out) / "checkpoints/last.pt")
    assert last(resumed)["step"] == 5
    fit(resumed, resume=True)
    assert_close(resumed, ones["dino"], CASES["dino"].rounding)


def assert_close(run: Run, whole: Run, rounding: float) -> None:
    def close(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-4, atol=rounding)

    assert last(run)["step"] == last(whole)["step"] == 10
    assert not differences(last(run)["method"], last(whole)["method"], whole.out, same=close)
    for line, expected in zip(read_metrics(Path(run.out)), read_metrics(Path(whole.out)), strict=True):
        assert line["step"] == expected["step"]
        for name in MEANS & expected.keys():
            assert line[name] == pytest.approx(expected[name], abs=1e-4), (whole.out, line["step"], name)


@pytest.mark.parametrize("fused", [False, True])
def test_converted_norms_keep_their_activation(fused: bool) -> None:
    """timm's norms with an activation, and torch's: equal values, names and parameters after conversion."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.BatchNorm2d(4))
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    network(x)  # statistics of its own
    names, parameters = list(network.state_dict()), list(network.parameters())
    expected = network.eval()(x)
    changed = convert_sync_batchnorm(network, fused=fused)
    torch.testing.assert_close(changed.eval()(x), expected)
    assert not isinstance(changed[1], BatchNormAct2d)  # pyright: ignore[reportIndexIssue]
    assert list(changed.state_dict()) == names
    assert all(a is b for a, b in zip(changed.parameters(), parameters, strict=True))


# -- evaluations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(ranks: Ranks) -> tuple[Path, Path]:
    """Return (results of one process, results of two): same network and images, separate caches."""
    one = ranks.folder / "evals on one"
    (one / "rank0.json").write_text(json.dumps(all_evals.evaluate_all(one)))
    return one, ranks.folder / "evals"


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def eval_differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the paths at which two results differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [path for key in one for path in eval_differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [path for i, (a, b) in pairs for path in eval_differences(a, b, f"{where}/{i}")]
    same = one == other if isinstance(one, str | bool | None) else one == pytest.approx(other, rel=1e-3, abs=1e-4)
    return [] if same else [f"{where}: {one!r} and {other!r}"]


@pytest.mark.parametrize("name", [*EVALUATIONS, "linear, fresh crops"])
def test_two_ranks_give_the_results_of_one(folders: tuple[Path, Path], name: str) -> None:
    """Values, reference scores, details (queries, objects, skipped files), data and the hash of the weights."""
    one, two = (read(folder / "rank0.json")[name] for folder in folders)
    for result in (one, two):
        result["checkpoint"].pop("source")
    two = json.loads(json.dumps(two).replace(str(folders[1]), str(folders[0])))
    assert not eval_differences(one, two)
    assert read(folders[1] / "rank1.json")[name]["values"] == two["values"]
    assert any(0 < value < 100 for value in one["values"].values())  # sensitive to differences
    if name != "linear, fresh crops":  # its accuracy may be equal by chance
        assert one["values"] != one["references"]["random_weights"]


def test_files_are_written_once_and_only_for_the_network(folders: tuple[Path, Path]) -> None:
    one, two = (sorted((folder / "out").rglob("*.png")) for folder in folders)
    assert len(one) == 2 * 24
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_features_are_cached_by_rank_0(folders: tuple[Path, Path]) -> None:
    one, two = (sorted(f.name for f in (folder / "evals/features").iterdir()) for folder in folders)
    assert one == two != []


# -- the command line --------------------------------------------------------------------------------------


def test_only_rank_0_prints_and_writes(ranks: Ranks) -> None:
    output, run = "".join(ranks.outputs), ranks.folder / "command"
    assert output.count("The plan") == 1
    assert output.count("Training 1 epoch, ") == 1
    assert json.loads((run / "run.json").read_text())["run"]["optim"]["epochs"] == 1
    assert (run / "backbone.safetensors").is_file()
