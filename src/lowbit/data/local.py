"""Documents that are on this machine: the text in the package and text files, and the answer to a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Literal

from .text import read_documents, split_documents

PACKAGED = "demo"
OPTIONS = {"calibration": "--calibration", "evaluation": "--perplexity"}


def local_documents(source: str, purpose: Literal["calibration", "evaluation"], named: Iterable[str]) -> list[str]:
    """The documents of ``demo`` (the packaged text for ``purpose``) or of a text file.

    Raises:
        ValueError: the file is no text, or ``source`` is neither a file nor one of the ``named`` texts, which the
            caller knows; the nearest name is suggested.
    """
    if source == PACKAGED:
        packaged = resources.files("lowbit").joinpath("assets", "text", f"{purpose}.txt")
        return split_documents(packaged.read_bytes(), f"the packaged {purpose} text")
    if Path(source).exists():
        return read_documents(source)
    known = [PACKAGED, *named]
    near = difflib.get_close_matches(source, known, n=1)
    advice = (
        f"did you mean {OPTIONS[purpose]} {near[0]}?"
        if near
        else f"give the path of a text file or one of {', '.join(known)}"
    )
    raise ValueError(f"no {purpose} text '{source}': {advice}")
