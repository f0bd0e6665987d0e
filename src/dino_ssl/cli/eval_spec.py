"""`--evals "retrieval roxford5k/ --every-epochs 10"`: an evaluation while training, with the words of `dino eval`."""

import shlex
from dataclasses import field, make_dataclass
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dino_ssl.cli.options import parse
from dino_ssl.errors import UserError
from dino_ssl.evals import EVALUATIONS, find_evaluation
from dino_ssl.evals.scheduled import ScheduledEval

ASKS = ConstructorRegistry()
"""How tyro reads an `ScheduledEval`: one word of the command line, which holds several."""


@ASKS.primitive_rule
def ask_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[ScheduledEval] | None:
    if info.type is not ScheduledEval:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar='"NAME DATA..."',
        instance_from_str=lambda words: parse_ask(words[0]),
        is_instance=lambda value: isinstance(value, ScheduledEval),
        str_from_instance=lambda ask: [str(ask)],
    )


def parse_ask(text: str) -> ScheduledEval:
    """`knn train/ val/ --k 5 --every-epochs 10` as settings, by the options of `dino eval knn`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--evals cannot read {text!r}: {error}.") from error
    if not words or (words[0] not in EVALUATIONS and len(words) == 1):
        raise UserError(
            f"--evals expected an evaluation and its data together in quotes; got {text!r}. What is trained on comes "
            "before it.\n"
            f'For example: dino train photos/ --evals "knn train/ val/" "retrieval roxford5k/ --every-epochs 10"\n'
            f"Evaluations: {', '.join(EVALUATIONS)}."
        )
    evaluation = find_evaluation(words[0])
    prog = f"dino train DATA --evals {words[0]}"
    options = parse(_options(evaluation), words[1:], prog, f"  {prog.replace(words[0], chr(34) + text + chr(34))}")
    return ScheduledEval(
        evaluation=options.protocol,
        sources=sources_of(options, evaluation),
        every_epochs=options.every_epochs,
    )


def source_fields(evaluation: Any) -> list[Any]:
    """The fields of an evaluation's sources, in order, for `make_dataclass`."""
    fields: list[Any] = []
    for source in evaluation.sources:
        here = (source.name.lower(), positional(source.help))
        fields.append(here if source.required else (*here, field(default="")))
    return fields


def sources_of(options: Any, evaluation: Any) -> tuple[str, ...]:
    """What was given for them."""
    given = (getattr(options, source.name.lower()) for source in evaluation.sources)
    return tuple(source for source in given if source)


def positional(help: str) -> Any:
    return Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=help)]


def _options(evaluation: Any) -> type:
    """Sources, protocol, and how often."""
    often = "Epochs between two times, the first before the first step; 0: at the end alone."
    fields = [
        *source_fields(evaluation),
        ("protocol", Annotated[evaluation, tyro.conf.OmitArgPrefixes], field(default_factory=evaluation)),
        ("every_epochs", Annotated[float, tyro.conf.arg(help=often)], field(default=0.0)),
    ]
    options = make_dataclass("Options", fields, frozen=True)
    options.__doc__ = f"While training: {evaluation.__doc__}\n\nThe paper: {evaluation.paper}."
    return options
