"""A command line that is laid over a Run: what its flags mean depends on the preset, the network and the method."""

import itertools
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from dino_ssl.api.resolve import find_run, flag, runs_nearby
from dino_ssl.cli.eval_spec import EVAL_SPECS
from dino_ssl.cli.options import parse
from dino_ssl.config import edit, flatten, to_dict
from dino_ssl.data.folder import Folder
from dino_ssl.data.sources import WORDS
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.methods import METHODS
from dino_ssl.models import backbone_named
from dino_ssl.presets import resolve
from dino_ssl.run import Run

SWITCHES = ("--dry-run", "--yes", "-y", "--json")
UNKNOWN = "?"
"""In place of the word for drawn pictures: the line has to be looked through for it."""


class Options(Protocol):
    """What a session needs of a command's options, besides the run's own flags."""

    @property
    def folder(self) -> str: ...
    @property
    def preset(self) -> str | None: ...
    @property
    def minutes(self) -> float | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def resume(self) -> str | None: ...
    @property
    def dry_run(self) -> bool: ...
    @property
    def yes(self) -> bool: ...
    @property
    def json(self) -> bool: ...
    @property
    def run(self) -> Run: ...
    @property
    def recipe(self) -> str | None:
        """The preset that the run is, with what the line sets in it; None where the plan chooses."""
        ...


def preset_or_plan(name: str | None) -> Run:
    """What the flags of `dino train` are laid over: a preset, or a Run for the plan to choose."""
    return resolve(name) if name else Run()


class CommandLine:
    """The command line, laid over a Run: first over a skeleton of the right types, then over the plan."""

    def __init__(
        self,
        argv: list[str],
        *,
        kind: Callable[..., Options],
        prog: str,
        examples: str,
        base: Callable[[str | None], Run] = preset_or_plan,
        drawn: str | None = UNKNOWN,
    ) -> None:
        """base: the Run for the preset's name, or for none. drawn: the word for drawn pictures that stands in the
        folder's place, where that is known; None for none."""
        self.argv, self.kind, self.prog, self.examples, self.base, self.known = argv, kind, prog, examples, base, drawn

    @cached_property
    def recipe(self) -> Run:
        """What the flags are laid over, as it is: made once, since it may open a checkpoint."""
        return self.base(self.value("--preset"))

    def value(self, flag: str) -> str | None:
        """A flag's value before anything is parsed: what the types of the other flags depend on."""
        for place, word in enumerate(self.argv):
            if word == flag and place + 1 < len(self.argv):
                return self.argv[place + 1]
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return None

    def has(self, flag: str) -> bool:
        return any(word == flag or word.startswith(f"{flag}=") for word in self.argv)

    def skeleton(self) -> Run:
        """A Run whose data and network are of the types that the line asks for."""
        if (folder := self.value("--resume")) is not None:
            found = find_run(Path(folder))
            if found is None:
                raise UserError(
                    f"There is nothing to resume in {folder}: expected a run's folder, with run.json and "
                    f"checkpoints/last.pt.{runs_nearby(Path(folder))}"
                )
            return found.run
        run, of_ones_own = self.recipe, ":" in (self.value("--preset") or "")
        if isinstance(run.data, Folder) and not of_ones_own:  # a recipe is for anybody's pictures
            run = edit(run, data=Folder(path=""))
        if (word := self.drawn()) is not None:
            run = edit(run, data=run.data if isinstance(run.data, Scenes) else WORDS[word])
        if (name := self.value("--network")) is not None:
            run = edit(run, backbone=backbone_named(name))
        return self.learning(run)

    def drawn(self) -> str | None:
        """The word for drawn pictures that stands in the folder's place (`scenes`, `simple-scenes`): not a flag's value."""
        if self.known != UNKNOWN:
            return self.known
        settings = flatten(to_dict(self.recipe)).items()
        alone = {*SWITCHES, *(flag(name) for name, value in settings if isinstance(value, bool))}
        for before, word in itertools.pairwise(["", *self.argv]):
            ends = not before.startswith("-") or "=" in before or before.replace("no-", "") in alone
            if word in WORDS and ends:
                return word
        return None

    def parse(self, over: Run) -> Options:
        kind, default = cast(type[Any], self.kind), self.kind(run=over)
        options = parse(kind, self.argv, self.prog, self.examples, default, EVAL_SPECS)
        data = options.run.data
        if options.folder and self.drawn() is None:
            data = edit(data, path=options.folder) if isinstance(data, Folder) else Folder(path=options.folder)
            options = edit(options, run=edit(options.run, data=data))
        return options

    def change(self, run: Run) -> Run:
        """The run with what the line sets."""
        if (name := self.value("--network")) is not None:
            run = edit(run, backbone=backbone_named(name).with_image_size(run.views.size))
        return self.parse(self.learning(run)).run

    def learning(self, run: Run) -> Run:
        """The run with the method that the line names, at its own defaults where the run has another one."""
        name = self.value("--method")
        if name not in METHODS or type(run.method) is METHODS[name]:
            return run  # a name that is none is refused with the other flags
        return edit(run, method=METHODS[name]())
