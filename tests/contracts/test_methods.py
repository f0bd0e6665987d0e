"""The contract of every method: found by name, planned for a dataset, with the settings of its paper."""

import pytest

import dino_ssl
from dino_ssl import presets
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.methods import METHODS, BYOLConfig, MoCoConfig, SwAVConfig, method_named
from dino_ssl.methods.method import BuildContext, MethodConfig
from dino_ssl.models import ViT
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import Speed
from dino_ssl.presets.plan import plan
from dino_ssl.runtime import Machine, machine
from dino_ssl.schedules import Clock


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of known speed, so that a plan measures nothing."""
    monkeypatch.setattr(planning, "measure", lambda *_: Speed(0.01, 0.01))
    return machine()


@pytest.mark.parametrize("name", METHODS)
def test_plan_supports_every_method(name: str, here: Machine) -> None:
    dataset = Scenes(count=300, size=32, classes=3).open()
    planned = plan(dataset, here, method=METHODS[name], minutes=1)
    run = planned.run
    assert type(run.method) is METHODS[name]
    assert (run.views.view_shapes[1:] != []) == run.method.local_views
    rows = {reason.name: reason.value for reason in planned.reasons}
    assert ("K" in rows) if name == "dino" else (rows["method"] == run.method.summary)
    start = BuildContext(ViT(width=8, depth=1, heads=1, patch=8, image_size=16), classes=3)
    method = run.method.build(start)
    moved = {parameter for parameter in method.parameters() if parameter.requires_grad}
    assert moved == {parameter for parameter in method.trainable.parameters() if parameter.requires_grad}
    assert not any("teacher" in key for key in method.trainable.state_dict())
    assert all(0 <= schedule(Clock(0, 5, 2)) <= 1 for schedule in run.method.schedules().values())


def test_planned_queue_of_moco_is_at_most_an_epoch(here: Machine) -> None:
    """Keys older than an epoch are masked, and an epoch has two keys per image."""
    sizes = []
    for count in (100, 300, 5000):
        method = plan(Scenes(count=count, size=16).open(), here, method=MoCoConfig, minutes=1).run.method
        assert isinstance(method, MoCoConfig)
        sizes.append(method.queue)
        assert method.queue <= 2 * count
    assert sizes == sorted(set(sizes))


def test_error_suggests_the_nearest_method() -> None:
    assert method_named("swav") is SwAVConfig
    with pytest.raises(UserError, match=r"'mocov2'.*moco"):
        method_named("mocov2")
    with pytest.raises(UserError, match="byol"):
        dino_ssl.train(Scenes(count=20), method="boyl", out="never-made")


@pytest.mark.parametrize("kind", [BYOLConfig, MoCoConfig, SwAVConfig])
def test_methods_of_two_views_reject_one(kind: type[MethodConfig]) -> None:
    with pytest.raises(UserError, match="2 views"):
        edit(presets.resolve("finetune"), method=kind())


def test_baseline_presets_are_the_papers() -> None:
    """Table 13: ViT-S/16, 300 epochs. App. B and the authors' answers: MoCo's head, queue, temperature and decay."""
    runs = {name: presets.resolve(name) for name in ("byol", "moco", "swav")}
    assert {name: run.views.view_shapes for name, run in runs.items()} == {
        "byol": [(2, 224)],
        "moco": [(2, 224)],
        "swav": [(2, 224), (6, 96)],
    }
    for run in runs.values():
        assert isinstance(run.backbone, ViT)
        assert (run.backbone.size, run.backbone.patch, run.optim.epochs, run.optim.batch_size) == (
            "small",
            16,
            300,
            1024,
        )
        assert run.optim.lr == 5e-4
    moco = runs["moco"].method
    assert isinstance(moco, MoCoConfig)
    assert (moco.temperature, moco.queue, moco.momentum, moco.momentum_end) == (0.1, 65536, 0.996, 1.0)
    assert (moco.head_layers, moco.head_dim, moco.head_norm) == (3, 256, "batch")
    assert (runs["moco"].optim.weight_decay, runs["moco"].optim.weight_decay_end, runs["moco"].optim.clip_grad) == (
        0.05,
        0.05,
        0,
    )
