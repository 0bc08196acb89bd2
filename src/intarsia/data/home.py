"""Where fetched models, texts and tasks live."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of everything fetched: `$INTARSIA_HOME`, else `~/.cache/intarsia`. It need not exist yet."""
    return Path(os.environ.get("INTARSIA_HOME") or Path.home() / ".cache" / "intarsia").expanduser()
