"""What the benchmarks' commands share: options, and errors in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


def _cache(_: object, __: object, value: Path | None) -> Path:
    from featxfer.features.extract import default_cache  # torch is not needed for --help

    return value or default_cache()


root_option = click.option("--root", type=Path, required=True, help="A devkit in VOC layout.")
cache_option = click.option(
    "--cache",
    type=Path,
    callback=_cache,
    help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]",
)


def split_options(command: Callable[..., None]) -> Callable[..., None]:
    """Splits of the devkit that are trained on, and tested."""
    test = click.option("--test-split", default="test", help="Of the devkit, to test on.")
    train = click.option("--train-split", default="trainval", help="Of the devkit, to train on.")
    return train(test(command))


@contextmanager
def told_errors() -> Iterator[None]:
    """What a user can mend is told in a line; Ctrl-C says that nothing finished is lost."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What is finished is kept: the same command goes on.", err=True)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        raise click.ClickException(str(error)) from error


def chosen(option: str, value: str | None, known: Iterable[str]) -> list[str]:
    """Names of an option with commas between, each once; every known one for None."""
    names = list(known)
    asked = names if value is None else list(dict.fromkeys(value.split(",")))
    unknown = [name for name in asked if name not in names]
    if unknown:
        message = f"got {', '.join(unknown)}, wanted some of {', '.join(names)}"
        raise click.BadParameter(message, param_hint=option)
    return asked


def numbers(kind: type[int] | type[float], example: str) -> Callable[..., tuple[Any, ...]]:
    """The callback of an option that takes numbers with commas between."""

    def parse(_: object, __: object, value: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"got {value!r}, wanted {example}") from error

    return parse
