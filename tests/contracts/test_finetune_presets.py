"""The fine-tuning presets of Table 6 have the learning rates, lengths and batch sizes that DeiT's authors gave."""

import pytest

from dino_ssl import presets
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.schedules import Clock


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "deit", "peak", "erase"),
    [
        ("imagenet", 300, 1024, 5e-4, 1e-3, 0.25),
        ("cifar10", 1000, 768, 7.5e-6, 1.125e-5, 0.0),
        ("cifar100", 1000, 768, 5e-6, 7.5e-6, 0.0),
        ("inat18", 300, 1024, 5e-5, 1e-4, 0.25),
        ("inat19", 300, 1024, 5e-5, 1e-4, 0.25),
        ("flowers", 1000, 768, 7.5e-6, 1.125e-5, 0.0),
        ("cars", 1000, 768, 7.5e-5, 1.125e-4, 0.0),
    ],
)
def test_the_presets_of_table_6(name: str, epochs: int, batch: int, deit: float, peak: float, erase: float) -> None:
    run = presets.resolve(f"finetune-{name}")
    lr = run.optim.lr_schedule()
    values = [lr(Clock(step, 10, epochs)) for step in range(0, 10 * epochs)]
    assert (run.optim.epochs, run.optim.batch_size) == (epochs, batch)
    assert max(values) == pytest.approx(peak)
    assert values[49] == pytest.approx(peak)  # after five epochs
    assert peak == pytest.approx(deit * batch / 512)  # DeiT scales by batches of 512
    assert values[0] == 1e-6
    assert values[-1] < peak
    assert isinstance(run.views, Augment)
    assert (run.views.size, run.views.repeats, run.views.erase) == (224, 3, erase)
    assert run.method == SupervisedConfig(smoothing=0.1, mixup=0.8, cutmix=1.0)
    assert run.optim.weight_decay == run.optim.weight_decay_end == 0.05
    assert (run.optim.clip_grad, run.optim.layer_decay, run.backbone.drop_path) == (0, 1, 0.1)
