"""Command line of a training run: flags override the fields of a Run.

The types of its fields, and therefore the flags, depend on the dataset, the preset, the network and the method.
"""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.api.resolve import ExistingRun, find_run, with_init_network
from dino_ssl.cli.eval_spec import RUN_TYPES
from dino_ssl.cli.flags import expand_short_flags, flag
from dino_ssl.cli.images import dataset_named
from dino_ssl.cli.options import Device, Flag, Json, parse, register_fields
from dino_ssl.config import differences, edit, format_value, import_type
from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.data.folder import Folder
from dino_ssl.data.sources import dataset_config
from dino_ssl.errors import UserError
from dino_ssl.methods import METHODS, method_named
from dino_ssl.methods.method import MethodConfig
from dino_ssl.models import BackboneConfig, backbone_named
from dino_ssl.models.pretrained import network_of
from dino_ssl.presets import resolve
from dino_ssl.run import Run


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of every training command, in addition to the fields of its Run."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A preset to start from (`dino presets`), or MODULE:FUNCTION that returns a dino_ssl.Run."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Training time in minutes, from which the number of epochs is derived; corrected once by the real speed."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Resume the run in this folder."""
    trust: Flag = False
    """With --resume: import types from outside the package, which runs their code."""
    dry_run: Flag = False
    """Print the plan, check it, and stop."""
    device: Device = None
    yes: Annotated[Flag, tyro.conf.arg(aliases=["-y"])] = False
    """Resume a stopped run in the output folder."""
    json: Json = False
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)


class CommandLine:
    """Arguments whose flags depend on the types of a Run: those are read first, then tyro parses all flags."""

    def __init__(
        self,
        argv: list[str],
        *,
        kind: type[Any],
        prog: str,
        examples: str,
        base: Callable[[str | None], Run] = lambda preset: resolve(preset) if preset else Run(),
        dataset: str | None = None,
    ) -> None:
        """Store the arguments and how to parse them.

        kind: the dataclass of the options. base: returns the Run of a preset name or None. dataset: the training set;
        None searches the arguments for one that is not a folder.
        """
        self.argv, self.kind, self.prog, self.examples = expand_short_flags(argv), kind, prog, examples
        self._base, self._dataset = base, dataset
        register_fields(kind)  # a run to resume is opened, and may be refused, before its flags are parsed

    @cached_property
    def types(self) -> argparse.Namespace:
        """The flags that decide the types of the Run, and therefore which other flags exist."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("preset", "network", "init", "method", "device", "resume", "out", "weights"):
            parser.add_argument(f"--{name}")
        parser.add_argument("--trust", action="store_true")
        return parser.parse_known_args([arg for arg in self.argv if arg not in ("-h", "--help")])[0]

    @cached_property
    def preset(self) -> Run:
        """The Run that the flags override, before a plan is made."""
        return self._base(self.types.preset)

    @cached_property
    def existing(self) -> ExistingRun | None:
        """The run of --resume; raises UserError if there is none."""
        if self.types.resume is None:
            return None
        existing = find_run(Path(self.types.resume), trust=self.types.trust)
        if existing is None:
            raise UserError(f"Nothing to resume in {self.types.resume}: expected run.json and checkpoints/last.pt.")
        return existing

    @cached_property
    def init_network(self) -> BackboneConfig | None:
        """The network of the weights that --init of a new run names."""
        if self.types.init in (None, "None") or self.types.resume is not None:
            return None
        return network_of(self.types.init, trust=self.types.trust)

    @cached_property
    def dataset(self) -> DatasetConfig | None:
        """The dataset of an argument `scenes`, `simple-scenes` or MODULE:CLASS that does not follow a flag."""
        words = [word for before, word in pairwise(["", *self.argv]) if not before.startswith("-")]
        datasets = map(self._dataset_named, words if self._dataset is None else [self._dataset])
        return next((data for data in datasets if data.folder is None), None)

    def _dataset_named(self, name: str) -> DatasetConfig:
        """Return the settings of a dataset; a preset with synthetic images keeps its own."""
        data, preset = dataset_config(dataset_named(name), "train"), self.preset.data
        return preset if data.folder is None and type(data) is type(preset) else data

    def has(self, flag: str) -> bool:
        """Return whether the command line has this flag."""
        return any(argument == flag or argument.startswith(f"{flag}=") for argument in self.argv)

    def options(self) -> Any:
        """Return the options, parsed with a Run of the right types as defaults."""
        if self.existing is not None:
            return self.parse(self.existing.run)
        run = self.preset
        if self.dataset is not None:
            run = edit(run, data=self.dataset)
        elif run.data.folder is not None and ":" not in (self.types.preset or ""):
            run = edit(run, data=Folder(path=""))  # the folder of a preset of the package is an example
        return self.parse(self._with_types(run))

    def change(self, run: Run) -> Run:
        """Return the run with the settings of this command line."""
        return self.parse(self._with_types(run)).run

    def parse(self, run: Run) -> Any:
        """Parse the arguments with the fields of `run` as defaults."""
        options = parse(self.kind, self.argv, self.prog, self.examples, self.kind(run=run), RUN_TYPES)
        if options.folder and self.dataset is None and self.existing is None:
            data, typed = self._dataset_named(options.folder), options.run.data
            if isinstance(data, Folder) and isinstance(typed, Folder):
                data = replace(typed, path=data.path)
            options = edit(options, run=edit(options.run, data=data))
        return options

    def _with_types(self, run: Run) -> Run:
        """Return the run with the network and method given by --network, --init and --method."""
        if self.types.network is not None:
            run = edit(run, backbone=network_named(self.types.network).with_image_size(run.views.size))
        if self.init_network is not None:
            is_named = self.types.network is not None or self.types.preset is not None
            run = with_init_network(run, self.init_network, is_named=is_named)
        name = self.types.method
        if name is not None and (kind := method_kind(name)) is not type(run.method):
            run = edit(run, method=kind())
        return run


def network_named(name: str) -> BackboneConfig:
    """Return the settings of vit_tiny/16, timm:resnet18 or MODULE:CLASS."""
    if ":" not in name or name.startswith("timm:"):
        return backbone_named(name)
    kind: Any = import_type(name, BackboneConfig)
    return kind()


def method_kind(name: str) -> type[MethodConfig]:
    """Return the settings class of a method's name or of MODULE:CLASS."""
    return import_type(name, MethodConfig) if ":" in name else method_named(name)


# -- settings as they are typed ------------------------------------------------------------------------------


def typed(name: str, value: Any) -> tuple[str, str]:
    """Return the flag and the value of a setting; a boolean has no value, a method its short name."""
    if isinstance(value, bool):
        parent, _, field = name.rpartition(".")
        return (flag(name) if value else flag(f"{parent}.no-{field}".lstrip(".")), "")
    if name == "method":
        value = next((short for short, kind in METHODS.items() if kind.__name__ == value), value)
    return flag(name), format_value(value)


def cli_diff(before: Run, after: Run, omit: Collection[str] = ()) -> str:
    """Return the flags that turn one run into another, except for some dotted fields."""
    words = []
    if type(after.method) is not type(before.method):
        before = edit(before, method=type(after.method)())
        words.append(" ".join(typed("method", type(after.method).__name__)))
    if type(after.backbone) is not type(before.backbone):
        words.append(f"--network {after.backbone.spec}")
        before = edit(before, backbone=network_named(after.backbone.spec))
    changed = [(name, value) for name, _, value in differences(before, after) if name not in omit]
    return " ".join([*words, *(" ".join(typed(name, value)).rstrip() for name, value in changed)])
