"""Evaluations on the command line: their options, and `--evals "retrieval roxford5k/ --every-epochs 10"`."""

import shlex
from dataclasses import field, make_dataclass
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dino_ssl.cli.images import dataset_named
from dino_ssl.cli.options import one_line_help, parse
from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.data.sources import dataset_config
from dino_ssl.errors import UserError
from dino_ssl.evals import EVALUATIONS, find_evaluation
from dino_ssl.evals.scheduled import ScheduledEval

RUN_TYPES = ConstructorRegistry()
"""Lets tyro parse the types of a Run that it does not know: `ScheduledEval` and `DatasetConfig | None`."""
RUN_TYPES.struct_rule(one_line_help)


@RUN_TYPES.primitive_rule
def _scheduled_eval_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[ScheduledEval] | None:
    if info.type is not ScheduledEval:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar='"NAME DATA..."',
        instance_from_str=lambda arguments: parse_scheduled_eval(arguments[0]),
        is_instance=lambda value: isinstance(value, ScheduledEval),
        str_from_instance=lambda value: [str(value)],
    )


@RUN_TYPES.primitive_rule
def _val_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[DatasetConfig | None] | None:
    if info.type != DatasetConfig | None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FOLDER",
        instance_from_str=lambda arguments: dataset_config(dataset_named(arguments[0]), "val"),
        is_instance=lambda value: value is None or isinstance(value, DatasetConfig),
        str_from_instance=lambda value: ["none" if value is None else value.spec],
    )


def parse_scheduled_eval(text: str) -> ScheduledEval:
    """Parse `knn train/ val/ --k 5 --every-epochs 10`, with the options of `dino eval knn`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"`evals`: {text!r} cannot be parsed: {error}.") from error
    if not words or (words[0] not in EVALUATIONS and len(words) == 1):
        raise UserError(
            f"`evals` expected the name of an evaluation and its data in quotes; got {text!r}. The training data comes "
            "before this option.\n"
            f'For example: dino train photos/ --evals "knn train/ val/" "retrieval roxford5k/ --every-epochs 10"\n'
            f"Evaluations: {', '.join(EVALUATIONS)}."
        )
    evaluation = find_evaluation(words[0])
    help = "Epochs between two evaluations, the first before the first step; 0: only at the end."
    every = ("every_epochs", Annotated[float, tyro.conf.arg(help=help)], field(default=0.0))
    kind = eval_options(evaluation, [], [every], f"During training: {evaluation.__doc__}")
    prog = f"dino train DATA --evals {words[0]}"
    options = parse(kind, words[1:], prog, f'  dino train DATA --evals "{text}"')
    return ScheduledEval(
        evaluation=options.protocol, sources=sources_of(options, evaluation), every_epochs=options.every_epochs
    )


def eval_options(evaluation: Any, before: list[Any], after: list[Any], doc: str) -> type:
    """Return a dataclass of an evaluation's sources, its settings as `protocol`, and more fields before and after."""
    sources: list[Any] = []
    for source in evaluation.sources:
        argument = (source.name.lower(), positional(source.help))
        sources.append(argument if source.required else (*argument, field(default="")))
    protocol = Annotated[evaluation, tyro.conf.OmitArgPrefixes]
    fields = [*before, *sources, ("protocol", protocol, field(default_factory=evaluation)), *after]
    options = make_dataclass("Options", fields, frozen=True)
    options.__doc__ = f"{doc}\n\nIn the paper: {evaluation.paper}." if evaluation.paper else doc
    return options


def sources_of(options: Any, evaluation: Any) -> tuple[str | DatasetConfig, ...]:
    """Return the sources that were given."""
    values = (getattr(options, source.name.lower()) for source in evaluation.sources)
    return tuple(dataset_named(value) for value in values if value)


def positional(help: str) -> Any:
    """Return the type of a positional string argument."""
    return Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=help)]
