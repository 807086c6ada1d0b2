"""What the benchmarks' commands share: errors in a line, and where finished work is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


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
