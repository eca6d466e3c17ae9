"""Requirements as commands that serve as gates take them: `int8=0.9`."""

from __future__ import annotations

from collections.abc import Collection

from graphopt.errors import OptionError


def requirement(text: str, known: Collection[str]) -> tuple[str, float]:
    """What is required, and the limit. OptionError where it is none of `known`, or no number follows."""
    key, equals, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        equals = ""
    if key not in known or not equals:
        raise OptionError(f"--require {text}: expected one of {', '.join(f'{k}=NUMBER' for k in known)}")
    return key, limit
