"""Runs of BYOL, MoCo-v2 and SwAV are equal after a resume."""

from pathlib import Path

import pytest
import torch
from tiny import RUN, Run, edit, fit, last, same_training

from dino_ssl.config import from_dict, to_dict
from dino_ssl.methods import METHODS, BYOLConfig, MoCoConfig, SwAVConfig
from dino_ssl.methods.method import MethodConfig
from dino_ssl.metrics import read_metrics
from dino_ssl.models.timm import Timm

HERE = Path(__file__).parent
CONVNET = Timm(name="resnet18", args=(("channels", "(8, 8, 8, 16)"), ("layers", "(1, 1, 1, 1)")))
SMALL = dict(head_dim=16, head_hidden=32)
BASELINES = {
    "byol": BYOLConfig(**SMALL, momentum=0.9),  # pyright: ignore[reportArgumentType]
    "moco": MoCoConfig(**SMALL, queue=37, momentum=0.9),  # pyright: ignore[reportArgumentType]
    "swav": SwAVConfig(**SMALL, out_dim=20, queue=19, queue_from=1),  # pyright: ignore[reportArgumentType]
}
"""16 keys per step wrap around in MoCo's queue of 37; SwAV's is full, and used, from step 8 on."""


def baseline(name: str, out: Path, **changes: object) -> Run:
    run = edit(RUN, method=BASELINES[name], out=str(out), optim=dict(epochs=2), save_minutes=60)
    return edit(run, **changes)


@pytest.mark.parametrize("name", BASELINES)
def test_resume_is_bit_equal(tmp_path: Path, name: str) -> None:
    """Weights, batch norm, teacher, queue, prototypes and optimizer; on a ConvNet with local views."""
    whole = baseline(name, tmp_path / "whole", backbone=CONVNET, views=dict(local=1), online_eval=dict(every_epochs=2))
    fit(whole)
    part = edit(whole, out=str(tmp_path / "part"), save_minutes=0)
    fit(part, until=9)
    fit(part, resume=True)
    assert not same_training(part, whole)
    ends = [[line for line in read_metrics(Path(run.out)) if "eval" in line] for run in (part, whole)]
    assert ends[0] == ends[1]


def test_queue_is_in_the_checkpoint(tmp_path: Path) -> None:
    run = baseline("moco", tmp_path / "run", optim=dict(epochs=1))
    fit(run)
    state = last(run)["method"]
    assert state["queue.place"] == 5 * 16 % 37
    assert set(state["queue.born"].tolist()) == {2, 3, 4}  # 32 keys of the last two steps, and 5 of the one before
    torch.testing.assert_close(state["queue.rows"].norm(dim=1), torch.ones(37))


@pytest.mark.parametrize("kind", METHODS.values())
def test_run_json_names_its_method(kind: type[MethodConfig]) -> None:
    run = edit(RUN, method=kind())
    assert from_dict(Run, to_dict(run)) == run
