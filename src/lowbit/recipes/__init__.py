"""Recipes by name or file: what `--recipe`, `--set`, `--override` and `--ignore` mean, and what `lowbit recipes` shows.

A recipe itself is `methods.recipe.Recipe`; here is only its spelling. `grammar` reads names, `document` reads and
writes YAML, and both know methods from the registry alone. `papers` builds what was published on top of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os.path import isfile
from pathlib import Path

from ..methods.recipe import Recipe
from .defaults import formats_for, weights_for
from .document import Calibration, LoadedRecipe, from_dict, load_yaml, to_dict, to_yaml
from .grammar import EXAMPLE, parse, parse_override, widths, with_width
from .named import NAMED
from .papers import PAPERS, PREFIX, paper, summary
from .settings import assign

__all__ = [
    "NAMED",
    "PAPERS",
    "Calibration",
    "LoadedRecipe",
    "from_dict",
    "load_yaml",
    "parse",
    "resolve",
    "show",
    "summary",
    "to_dict",
    "to_yaml",
    "widths",
]


def resolve(
    recipe: str | Path | Recipe,
    *,
    settings: Sequence[str] = (),
    overrides: Sequence[str] = (),
    ignore: Sequence[str] = (),
    width: int | None = None,
) -> LoadedRecipe:
    """The recipe of a name, of a paper or of a YAML file, changed as asked; a `Recipe` is taken as it is.

    settings: `gptq.damp=0.05` or a path of the document, in order. overrides: `PATTERN=SCHEME`, the last that matches
    a site wins. ignore: patterns of sites kept in 16 bits, whatever the overrides say. width: the bits of weights, if a
    name leaves them open. Raises ValueError with one sentence of advice.
    """
    if width is not None:
        loaded = _of_width(recipe, width)
    else:
        loaded = LoadedRecipe(recipe) if isinstance(recipe, Recipe) else _load(recipe)
    for setting in settings:
        loaded = assign(loaded, setting)
    if "" in ignore:
        raise ValueError("an empty pattern matches nothing: write for instance --ignore '*.down_proj'")
    scheme = loaded.recipe.scheme
    clip = loaded.recipe.clip
    added = [replace(each, weights=weights_for(clip, each.weights)) for each in map(parse_override, overrides)]
    added = [formats_for(loaded.recipe.encode, each) for each in added]
    scheme = replace(scheme, overrides=(*scheme.overrides, *added))
    return replace(loaded, recipe=replace(loaded.recipe, scheme=scheme).ignoring(ignore))


def show(recipe: str | Path) -> str:
    """The recipe of a name or file as complete YAML."""
    loaded = resolve(recipe)
    return to_yaml(loaded.recipe, loaded.calibration)


def _of_width(name: str | Path | Recipe, bits: int) -> LoadedRecipe:
    """The recipe of a name that leaves the bits of weights open, under that name."""
    if not isinstance(name, str) or name.startswith(PREFIX) or isfile(name):
        raise ValueError(f"{name} names its formats, so no bits are left to choose: take a name such as gptq-g128")
    return LoadedRecipe(replace(parse(with_width(name, bits)), name=name))


def _load(source: str | Path) -> LoadedRecipe:
    if isinstance(source, str) and source.startswith(PREFIX):
        return paper(source)
    if Path(source).suffix in (".yaml", ".yml"):
        return load_yaml(source)
    if isinstance(source, Path) or isfile(source):
        raise ValueError(f"{source} is no recipe: give a file that ends in .yaml, or a name such as {EXAMPLE}")
    return LoadedRecipe(parse(source))
