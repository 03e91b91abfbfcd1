"""Turn a missing optional dependency into the line that installs it."""

from collections.abc import Iterator
from contextlib import contextmanager

from leyden.errors import MissingExtraError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import the dependencies of extra `name` inside this block.

    Only a module that is *absent* is translated. An installed one that fails while it is imported, or that
    lacks an expected attribute, raises its own error: reinstalling would not help there.

    Raises:
        MissingExtraError: a module of a third party is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = error.name or "a module"
        if module.partition(".")[0] in ("leyden", "leyden_plugins"):
            raise
        raise MissingExtraError(
            f"{module!r} is not installed, and this part of Leyden needs it: pip install 'leyden[{name}]'",
            name=error.name,
            path=error.path,
        ) from error
