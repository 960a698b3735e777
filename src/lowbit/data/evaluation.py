"""Evaluation windows from the packaged text, a text file, or a published test set by name.

A name stands for one exact recipe, because one set has several in use that differ by more than methods do: C4 "new" and
"old" give LLaMA-3-8B 9.4 and 9.2.
"""

from __future__ import annotations

from torch import Tensor

from . import hub, recipes
from .local import local_documents
from .text import Tokenizer, tokenize_documents, windows

NAMED: dict[str, tuple[hub.HubText, recipes.EvaluationRecipe]] = {
    "wikitext2": (hub.wikitext2("test"), recipes.joined_test("\n\n")),
    "c4": (hub.c4("validation", shards=8), recipes.c4_new),
    "c4-old": (hub.c4("validation", shards=8), recipes.c4_old),
    "ptb": (hub.ptb("test"), recipes.joined_test(" ")),
    "ptb-old": (hub.ptb("validation"), recipes.joined_test("\n\n")),
}


def load_windows(source: str, tokenizer: Tokenizer, length: int, limit: int | None = None) -> Tensor:
    """Windows of token ids, int64 [N, L], that do not overlap (``c4-old`` draws them at random, by its fixed seed).

    Args:
        source: ``demo`` (the text in the package), a name of :data:`NAMED`, or the path of a text file.
        limit: at most so many windows, from the front; None for all.

    Raises:
        ValueError: an unknown name, a file that is no text, too little text, or no network.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: evaluation needs at least 1 window")
    if source in NAMED:
        place, recipe = NAMED[source]
        found = recipe(hub.fetch(place), tokenizer, length)
    else:
        found = windows(tokenize_documents(local_documents(source, "evaluation", NAMED), tokenizer), length)
    return found[:limit]
