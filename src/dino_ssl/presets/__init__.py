"""Presets: functions that return a complete Run, with its reported result and cost in the docstring.

presets.resolve("vits16")                 # a name of PRESETS
presets.resolve("mymodule:my_run")        # any importable function that returns a Run
"""

from collections.abc import Callable

from dino_ssl.config import edit, import_object
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.presets.baselines import byol, moco, swav
from dino_ssl.presets.finetune import cars, cifar10, cifar100, finetune, flowers, imagenet, inat18, inat19
from dino_ssl.presets.paper import (
    resnet50,
    resnet50_800,
    vitb8,
    vitb16,
    vits8,
    vits16,
    vits16_300,
    vits16_800,
    xcits12_16,
)
from dino_ssl.presets.small import demo, narrow_vit, small, small_vit
from dino_ssl.run import Run

PRESETS: dict[str, Callable[[], Run]] = {
    "demo": demo,
    "small": small,
    "small-vit": small_vit,
    "narrow-vit": narrow_vit,
    "vits16": vits16,
    "vits16-300": vits16_300,
    "vits16-800": vits16_800,
    "vits8": vits8,
    "vitb16": vitb16,
    "vitb8": vitb8,
    "xcits12-16": xcits12_16,
    "resnet50": resnet50,
    "resnet50-800": resnet50_800,
    "byol": byol,
    "moco": moco,
    "swav": swav,
    "finetune": finetune,
    **{f"finetune-{run.__name__}": run for run in (cifar10, cifar100, inat18, inat19, flowers, cars, imagenet)},
}


def resolve(name: str) -> Run:
    """Return the Run of a preset or of `module:function`. Raise UserError with similar names if there is none."""
    if name not in PRESETS and ":" not in name:
        raise UserError(
            f"Unknown preset {name!r}{did_you_mean(name, PRESETS)}\nPresets: {', '.join(PRESETS)}, "
            "or MODULE:FUNCTION for any importable function that returns a dino_ssl.Run."
        )
    if name in PRESETS:
        return edit(PRESETS[name](), out=f"runs/{name}")
    run = import_object(name)()
    if not isinstance(run, Run):
        raise UserError(f"Preset {name!r}: expected a function that returns a dino_ssl.Run, got {type(run).__name__}.")
    return run
