"""The one exception that users see, and what its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntarsiaError(ValueError):
    """A sentence for a person: what was given, what is possible, what to do.

    The command line prints the message alone and exits with status 2; a traceback means a defect of ours.
    """


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known: the nearest one that is, if any is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
