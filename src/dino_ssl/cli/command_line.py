"""Command line of a training run: flags override the fields of a Run.

The types of its fields, and therefore the flags, depend on the preset, the network and the method.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from dino_ssl.api.resolve import ExistingRun, find_run, runs_nearby
from dino_ssl.cli.eval_spec import RUN_TYPES
from dino_ssl.cli.images import dataset_named
from dino_ssl.cli.options import Flag, parse, switches
from dino_ssl.config import edit, import_type
from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.data.folder import Folder
from dino_ssl.data.sources import WORDS
from dino_ssl.errors import UserError
from dino_ssl.methods import METHODS, method_named
from dino_ssl.methods.method import MethodConfig
from dino_ssl.models import BackboneConfig, backbone_named
from dino_ssl.presets import resolve
from dino_ssl.run import Run


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of every training command, in addition to the fields of its Run."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A preset to start from (`dino presets`), or MODULE:FUNCTION that returns a dino_ssl.Run."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Training time in minutes; the number of epochs is derived from it."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Output folder runs/NAME."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Resume the run in this folder."""
    trust: Flag = False
    """With --resume: import types from outside the package, which runs their code."""
    dry_run: Flag = False
    """Print the plan, check it, and stop."""
    yes: Annotated[Flag, tyro.conf.arg(aliases=["-y"])] = False
    """Do not prompt; take the first choice of every question."""
    json: Flag = False
    """Print one JSON object to standard output, and messages to standard error."""
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)


class CommandLine:
    """Arguments that are parsed twice: with a Run of the right types as defaults, then with the plan."""

    def __init__(
        self,
        argv: list[str],
        *,
        kind: Callable[..., Any],
        prog: str,
        examples: str,
        base: Callable[[str | None], Run] = lambda preset: resolve(preset) if preset else Run(),
        data: Callable[["CommandLine"], DatasetConfig | None] = lambda line: line.named_dataset(),
    ) -> None:
        """Store the arguments and how to parse them.

        kind: the dataclass of the options. base: returns the Run of a preset name or None. data: returns the
        dataset if its type is not a folder.
        """
        self.argv, self.kind, self.prog, self.examples = argv, kind, prog, examples
        self._base, self._data = base, data

    @cached_property
    def types(self) -> argparse.Namespace:
        """The flags that decide the types of the Run, and therefore which other flags exist."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("preset", "network", "method", "resume", "out"):
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
            raise UserError(
                f"Nothing to resume in {self.types.resume}: expected a run folder with run.json and "
                f"checkpoints/last.pt.{runs_nearby(Path(self.types.resume))}"
            )
        return existing

    @cached_property
    def dataset(self) -> DatasetConfig | None:
        """The dataset, if the positional argument is a name instead of a folder."""
        return self._data(self)

    def named_dataset(self) -> DatasetConfig | None:
        """Return the dataset of a positional argument `scenes`, `simple-scenes` or MODULE:CLASS; None for a folder."""
        no_value = switches(self.kind(run=self._with_types(self.preset)))
        previous = ""
        for argument in self.argv:
            if not previous.startswith("--") or "=" in previous or previous in no_value:
                if argument in WORDS:
                    return self.preset.data if isinstance(self.preset.data, type(WORDS[argument])) else WORDS[argument]
                if isinstance(dataset := dataset_named(argument), DatasetConfig):
                    return dataset
            previous = argument
        return None

    def has(self, flag: str) -> bool:
        """Return whether the command line has this flag."""
        return any(argument == flag or argument.startswith(f"{flag}=") for argument in self.argv)

    def options(self) -> Any:
        """Return the options, parsed with a Run of the right types as defaults."""
        if self.existing is not None:
            return self.parse(self.existing.run)
        run = self.preset
        if isinstance(run.data, Folder) and ":" not in (self.types.preset or ""):
            run = edit(run, data=Folder(path=""))  # the folder of a preset of the package is an example
        if self.dataset is not None:
            run = edit(run, data=self.dataset)
        return self.parse(self._with_types(run))

    def change(self, run: Run) -> Run:
        """Return the run with the settings of this command line."""
        return self.parse(self._with_types(run)).run

    def parse(self, run: Run) -> Any:
        """Parse the arguments with the fields of `run` as defaults."""
        options = parse(cast(type[Any], self.kind), self.argv, self.prog, self.examples, self.kind(run=run), RUN_TYPES)
        if options.folder and self.dataset is None and self.existing is None:
            data = options.run.data
            data = edit(data, path=options.folder) if isinstance(data, Folder) else Folder(path=options.folder)
            options = edit(options, run=edit(options.run, data=data))
        return options

    def _with_types(self, run: Run) -> Run:
        """Return the run with the network and method given by --network and --method, with default settings."""
        if self.types.network is not None:
            run = edit(run, backbone=network_named(self.types.network).with_image_size(run.views.size))
        name = self.types.method
        if name is not None and (kind := method_kind(name)) is not type(run.method):
            run = edit(run, method=kind())
        return run


def network_named(name: str) -> BackboneConfig:
    """Return the settings of vit_tiny/16, timm:resnet18 or MODULE:CLASS."""
    if ":" in name and not name.startswith("timm:"):
        kind: Any = import_type(name, BackboneConfig)
        return kind()
    return backbone_named(name)


def method_kind(name: str) -> type[MethodConfig]:
    """Return the settings class of a method's name or of MODULE:CLASS."""
    return import_type(name, MethodConfig) if ":" in name and name not in METHODS else method_named(name)
