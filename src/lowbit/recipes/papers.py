"""Recipes as papers published them: `papers/NAME`, every setting and the calibration pinned, beside the figure to meet.

An entry is data: a recipe name, the settings that differ from lowbit's own (`--set` in writing), text, figures, and
what lowbit does otherwise. It is read by the same code as a user's command line, so nothing here is a second grammar,
and an entry can be retyped with other settings. Figures stand here because a reproduction without its target is none;
`docs/papers.md` is this file as a table (`page`). A dagger marks what was recalled and not checked against the paper.

Figures are WikiText-2 perplexities at 2048 tokens where nothing else is said.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from . import binary, grids, llama3, llmc, outliers, published, rotated, sparse
from .document import Calibration, LoadedRecipe
from .grammar import parse
from .settings import assign
from .study import WIKITEXT, Entry, Study

PREFIX = "papers/"
STUDIES = (
    *published.STUDIES,
    *grids.STUDIES,
    *outliers.STUDIES,
    *rotated.STUDIES,
    *binary.STUDIES,
    *sparse.STUDIES,
    *llama3.STUDIES,
    *llmc.STUDIES,
)


def _entries() -> dict[str, tuple[Study, Entry]]:
    return {name: (study, entry) for study in STUDIES for name, entry in study.entries.items()}


PAPERS = _entries()
"""Every entry by its name behind `papers/`, with its study."""


def summary(name: str) -> str:
    """One line on an entry, for lists."""
    study, entry = PAPERS[name]
    first = next(iter(entry.figures), None)
    target = "no figure" if first is None else f"{first.value} on {first.data}, {first.model}"
    return f"{study.title}: {target}"


def paper(name: str) -> LoadedRecipe:
    """The recipe `papers/NAME`. Raises ValueError with the nearest name where there is none."""
    short = name.removeprefix(PREFIX)
    if short not in PAPERS:
        near = get_close_matches(short.lower(), PAPERS, 1, 0.4)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "a name such as papers/gptq-w4g128 is meant"
        raise ValueError(f"no paper's recipe is called '{name}': {hint} (`lowbit recipes` lists them)")
    study, entry = PAPERS[short]
    loaded = LoadedRecipe(replace(parse(entry.base), name=f"{PREFIX}{short}"))
    for setting in settings_of(study, entry):
        loaded = assign(loaded, setting)
    return replace(loaded, calibration=entry.calibration or study.calibration if loaded.recipe.calibrated else None)


def settings_of(study: Study, entry: Entry) -> list[str]:
    """The settings of an entry: its study's that concern it, each unless it has its own, and then its own."""
    own = {setting.partition("=")[0] for setting in entry.settings}
    scheme = parse(entry.base).scheme
    shared = []
    for setting in study.settings:
        path = setting.partition("=")[0]
        method, _, rest = path.partition(".")
        if method == "scheme":
            part = rest.partition(".")[0]
            concerns = getattr(scheme, part) is not None
        else:
            concerns = method in entry.base.partition("-")[0].split("+")
        if concerns and path not in own:
            shared.append(setting)
    return [*shared, *entry.settings]


# --- the page ---------------------------------------------------------------------------------------------------------

_HEAD = """# Recipes of the papers

`lowbit quantize MODEL --recipe papers/NAME` runs a published recipe with its paper's settings and calibration;
`lowbit recipes papers/NAME` shows both as YAML. Settings are listed as `--set` would write them, on top of a recipe
name. Calibration is source, samples × length, seed; the command line's flags come first.

Figures are as published: WikiText-2 perplexities at 2048 tokens where nothing else is said, in that paper's own setup.
A dagger (†) marks what was recalled and not checked against the paper.

This page is made by `lowbit.recipes.papers.page()`.
"""


def page() -> str:
    """`docs/papers.md`."""
    return "\n".join([_HEAD, *(_section(study) for study in STUDIES)])


def _section(study: Study) -> str:
    lines = [f"## {study.title}", "", f"Source: {study.source}."]
    if study.calibration is not None:
        lines.append(f"Calibration: {_text(study.calibration)}.")
    if study.note:
        lines.append(f"In lowbit: {study.note}.")
    lines += ["", "| recipe | scheme and settings | published | remarks |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_row(study, name, entry) for name, entry in study.entries.items()), ""])


def _row(study: Study, name: str, entry: Entry) -> str:
    what = [f"`{part}`" for part in (entry.base, *settings_of(study, entry))]
    figures = [
        f"{each.model} {each.value}" + ("" if each.data == WIKITEXT else f" ({each.data})") for each in entry.figures
    ]
    remarks = [entry.note] if entry.note else []
    remarks += [] if entry.calibration is None else [f"calibration {_text(entry.calibration)}"]
    return f"| `{PREFIX}{name}` | {', '.join(what)} | {', '.join(figures)} | {'; '.join(remarks)} |"


def _text(calibration: Calibration) -> str:
    return f"{calibration.source}, {calibration.samples} × {calibration.length}, seed {calibration.seed}"
