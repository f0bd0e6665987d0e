"""BYOL, MoCo-v2 and SwAV learn classes that are neither in the brightness nor in single pixels."""

from pathlib import Path

import pytest
from test_learns import LONGER, OF_PAINT, Paints
from tiny import CPU, edit

from dino_ssl.events import Evaluated, Started
from dino_ssl.methods import BYOLConfig, MoCoConfig, SwAVConfig
from dino_ssl.training import train

SMALL = dict(head_dim=32, head_hidden=64)
LEARNERS = {
    "byol": BYOLConfig(head_dim=32, head_hidden=128, momentum=0.9, momentum_end=0.99),
    "moco": MoCoConfig(**SMALL, momentum=0.97, queue=128),  # pyright: ignore[reportArgumentType]
    "swav": SwAVConfig(**SMALL, out_dim=32, freeze_prototypes=0),  # pyright: ignore[reportArgumentType]
}
PACE = {"byol": dict(epochs=12, lr=0.006), "moco": dict(epochs=8, lr=0.016), "swav": dict(epochs=8, lr=0.016)}


@pytest.mark.parametrize("name", LEARNERS)
def test_baseline_learns(tmp_path: Path, name: str) -> None:
    """20-NN accuracy on the validation set is clearly above the untrained network and raw pixels."""
    run = edit(
        LONGER,
        out=str(tmp_path / "run"),
        method=LEARNERS[name],
        optim=dict(**PACE[name], batch_size=16, weight_decay_end=0.04),
        views=OF_PAINT,
        online_eval=dict(every_epochs=100, val_fraction=0.3),
        log_every=1000,
    )
    started, *rest = train(run, CPU, Paints(240, paint=0.88))
    assert isinstance(started, Started)
    references = {name: values["20-NN"] for name, values in started.reference_scores.items()}
    reached = [event.values["20-NN"] for event in rest if isinstance(event, Evaluated)][-1]
    assert reached > max(references.values()) + 5, (references, reached)
