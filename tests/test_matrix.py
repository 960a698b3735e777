"""Composition: every method with every other, and with every scheme, end to end on tiny models.

All pairs of what may stand in two slots occur in some recipe of `covering`; the whole product would be tens of
thousands. Of every recipe it is asked that logits are finite, that the loaded model computes what the sweep computed to
the last bit, and that it is better than rounding to nearest wherever its own steps promise so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model
from torch import Tensor

import lowbit
from lowbit import api
from lowbit.methods import RECONSTRUCTS, ROUNDS, TRANSFORMS
from lowbit.methods.recipe import Recipe
from lowbit.recipes import parse, resolve
from lowbit.stream import block

QUICK: dict[str, dict[str, Any]] = {
    "spinquant": {"steps": 1},
    "awq": {"grid": 4},
    "osplus": {"steps": 4},
    "mse": {"grid": 10},
    "omniquant": {"epochs": 1},
    "affinequant": {"epochs": 2},
    "flatquant": {"epochs": 1},
    "signround": {"iterations": 3},
    "tesseraq": {"schedule": (0.5, 0.0), "iterations": 2},
    "lkd": {"steps": 2},
    "zqglobal": {"steps": 2},
    "zqlocal": {"steps": 2},
    "normtweak": {"rates": (1e-3,)},
}
WINDOWS = [*torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))]
LAYERS = {"llama": "model.layers", "mixtral": "model.layers", "opt": "model.decoder.layers"}

BEFORE = [name for name, kind in RECONSTRUCTS.items() if not kind.after]
AFTER = [name for name, kind in RECONSTRUCTS.items() if kind.after]
NOTHING = ""
SLOTS: dict[str, list[str]] = {
    "transform": [NOTHING, *TRANSFORMS],
    "clip": [NOTHING, "minmax", "mse", "awqclip"],
    "before": [NOTHING, *BEFORE],
    "round": [*ROUNDS, "gptq true_sequential=true", "gptq groups=stale"],
    "after": [NOTHING, *AFTER],
    "correct": [NOTHING, "lorc4"],
    "scheme": [
        "w4a16-g16",
        "w2a8-g32-asym-static",
        "w4a4kv4-g16",
        "wfp4afp8-g16-m2",
        "nvfp4",
        "w4a8k4v2-g8-row-kvg8",
    ],
}
Choice = dict[str, str]


def lawful(choice: Mapping[str, str]) -> bool:
    """Whether parts may stand together; what is not is refused, see `REFUSED`."""
    learned_twice = bool(choice.get("before")) and "groups=" in choice.get("round", "")
    return not (learned_twice and per_group(choice.get("scheme", "w4a16-g16")))


def per_group(scheme: str) -> bool:
    """Whether several columns, but not all of a row, share a scale."""
    return scheme != "w4a4kv4" and "-row" not in scheme


def covering(slots: Mapping[str, Sequence[str]], seed: int = 0) -> list[Choice]:
    """Few choices of one part per slot that hold every lawful pair of parts: greedy, the best of some random ones."""
    draw = random.Random(seed)
    missing = {
        ((a, x), (b, y))
        for a, b in combinations(slots, 2)
        for x in slots[a]
        for y in slots[b]
        if lawful({a: x, b: y} | ({} if "scheme" in (a, b) else {"scheme": "w4a16-g16"}))
    }
    rows: list[Choice] = []
    while missing:
        (a, x), (b, y) = min(missing)
        tries = []
        for _ in range(60):
            row = {slot: draw.choice(parts) for slot, parts in slots.items()} | {a: x, b: y}
            if lawful(row):
                tries.append(row)
        best = max(tries, key=lambda row: len(missing & pairs(row)))
        rows.append(best)
        missing -= pairs(best)
    return rows


def pairs(row: Mapping[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return {((a, row[a]), (b, row[b])) for a, b in combinations(row, 2)}


def recipe_of(choice: Choice) -> Recipe:
    name, _, setting = choice["round"].partition(" ")
    parts = (choice["transform"], choice["clip"], choice["before"], name, choice["after"], choice["correct"])
    settings = [f"{name}.{setting}"] if setting else []
    recipe = resolve(f"{'+'.join(part for part in parts if part)}-{choice['scheme']}", settings=settings).recipe
    return quick(recipe)


def quick(recipe: Recipe) -> Recipe:
    """The same with few iterations."""

    def short(method: Any) -> Any:
        return replace(method, **QUICK.get(method.name, {}))

    return replace(
        recipe,
        transforms=tuple(map(short, recipe.transforms)),
        clip=short(recipe.clip),
        reconstruct=tuple(map(short, recipe.reconstruct)),
    )


ROWS = covering(SLOTS)


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_model(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return make


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the sweep compares with the original: the output of every finished block comes last of its own."""
    seen: list[Tensor] = []
    measure = block.relative_error

    def record(value: Tensor, target: Tensor) -> float:
        seen.append(value.detach().clone())
        return measure(value, target)

    monkeypatch.setattr(block, "relative_error", record)
    yield seen


def check(family: str, model: Path, recipe: Recipe, directory: Path, outputs: list[Tensor]) -> list[dict[str, Any]]:
    """Quantize, load, and compare; returns the blocks' reports."""
    result = lowbit.quantize(model, recipe, directory, calibration=WINDOWS)
    loaded = lowbit.load(directory, dtype=torch.float32)
    last: list[Tensor] = []

    def note(_module: Any, _args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    loaded.get_submodule(f"{LAYERS[family]}.1").register_forward_hook(note)
    with torch.no_grad():
        logits = loaded(input_ids=torch.stack(WINDOWS), use_cache=False).logits
    assert logits.isfinite().all()
    if outputs:  # recipes without text measure weights instead
        assert torch.equal(last[0], outputs[-1])
    assert all(0 <= each["error_after"] < 2 for each in result.blocks)
    return result.blocks


def test_all_pairs_are_there() -> None:
    assert len(ROWS) < 60
    held = set().union(*map(pairs, ROWS))
    for a, b in combinations(SLOTS, 2):
        for x in SLOTS[a]:
            for y in SLOTS[b]:
                unlawful = "groups=" in x + y and bool({x, y} & {*BEFORE})
                assert ((a, x), (b, y)) in held or unlawful, (x, y)


@pytest.mark.parametrize("choice", ROWS, ids=lambda choice: "-".join(filter(None, choice.values())).replace(" ", ":"))
def test_every_pair(model_of: Callable[[str], Path], tmp_path: Path, outputs: list[Tensor], choice: Choice) -> None:
    blocks = check("llama", model_of("llama"), recipe_of(choice), tmp_path / "out", outputs)
    if choice["round"].startswith("gptq") and choice["scheme"] != "w2a8-g32-asym-static":
        assert blocks[0]["error_after"] < blocks[0]["error_before"]


NAMED_COMPOSITIONS = [
    "awq+gptq-w3a16-g16",
    "quarot+gptq-w4a4kv4",
    "spinquant+gptq-w4a4kv4",
    "flatquant+gptq-w4a4kv4",
    "smoothquant+lkd-w4a8-g16",
    "omniquant+lorc4-w3a16-g16",
    "quarot+lorc4-w4a8kv4-g16",
    "quarot+gptq+lorc4-w4a4kv4",
    "gptq+signround-w2a16-g16-asym",
    "awq+tesseraq-w2a16-g16-asym",
    "smoothquant+gptq-w4a4kv4",
]


@pytest.mark.parametrize("name", NAMED_COMPOSITIONS)
def test_named_compositions_beat_plain_rounding(
    model_of: Callable[[str], Path], tmp_path: Path, outputs: list[Tensor], name: str
) -> None:
    blocks = check("llama", model_of("llama"), quick(parse(name)), tmp_path / "out", outputs)
    assert all(each["error_after"] < each["error_before"] for each in blocks)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "quarot+gptq+lorc4-w4a4kv4-g16"),
        ("mixtral", "awq+omniquant+gptaq+signround-w3a8-g16"),
        ("mixtral", "flatquant+gptq+tesseraq-w4a8-g16"),
        ("mixtral", "smoothquant+affinequant+gptq+zqlocal-w4a8-static-g16"),
        ("opt", "osplus+omniquant+gptq+lorc4-w4a8kv4-g16"),
        ("opt", "spinquant+mse+gptq+lkd-w4a4kv4-g16"),
        ("opt", "affinequant+gptaq+signround-w3a16-g16-asym"),
        ("opt", "flatquant+zqglobal-w4a4kv4-g16"),
    ],
)
def test_other_families(
    model_of: Callable[[str], Path], tmp_path: Path, outputs: list[Tensor], family: str, name: str
) -> None:
    blocks = check(family, model_of(family), quick(parse(name)), tmp_path / "out", outputs)
    assert blocks[0]["error_after"] < blocks[0]["error_before"]


# --- unlawful ---------------------------------------------------------------------------------------------------------

AGAIN = "gptq would fit again the ranges that {} learns: set gptq.groups=static"
REFUSED: list[tuple[str, list[str], str | None, str]] = [
    ("quarot+spinquant-w4a4", [], None, "recipe '{}': spinquant turns the whole model, once and before .*: keep one"),
    ("awq+quarot-w4a4", [], None, "recipe '{}': quarot turns the whole model, once and .*: write quarot first"),
    *((f"{name}+gptq-w4-g16", ["gptq.groups=stale"], None, AGAIN.format(name)) for name in BEFORE),
    ("quarot-w4a16-g16", [], "compressed-tensors", "carries no online maps but Hadamard"),
    ("flatquant-w4a16-g16", [], "compressed-tensors", "carries no online maps but Hadamard"),
    ("gptq+lorc4-w4a16-g16", [], "compressed-tensors", "cannot carry a weight that is a sum of parts: use native"),
    ("gptq-w4a16kv4-g16", [], "compressed-tensors", "carries caches with calibrated symmetric ranges"),
    ("gptq-w4a16-g16", ["gptq.groups=fresh"], "compressed-tensors", "dropped group indices"),
    ("rtn-w4a4kv4-kvg3", [], None, "group of 3 does not divide the head width 16"),
]


@pytest.mark.parametrize(("name", "settings", "target", "sentence"), REFUSED)
def test_unlawful_compositions_are_refused_before_a_weight_is_read(
    model_of: Callable[[str], Path], name: str, settings: list[str], target: str | None, sentence: str
) -> None:
    request: dict[str, Any] = {"settings": settings, "target": target, "calibration": WINDOWS}
    with pytest.raises(ValueError, match=sentence.replace("{}", name.replace("+", r"\+"))) as error:
        api.prepare(api.Request(str(model_of("llama")), name, **request))
    assert "\n" not in str(error.value)


# --- quantizers off ---------------------------------------------------------------------------------------------------

EXACT = "w8a16-g1-asym"
"""A scale for every weight: it is the end of its own range, and comes back as it was but for fp32's last bits."""
SETTINGS = {
    "omniquant": ["omniquant.lwc=false"],
    "affinequant": ["affinequant.lwc=false"],
    "flatquant": ["flatquant.lct=false"],
}
"""Learned ranges begin inside the full ones: what a method does to the function besides is what is asked here."""


KEEPING = [*TRANSFORMS, *BEFORE, "quarot+osplus", "awq+omniquant", "quarot+awq+affinequant", "quarot+flatquant"]
ELSEWHERE = ["quarot", "osplus", "affinequant", "flatquant"]
"""Those that do something else on models of other families."""


@pytest.mark.parametrize(("family", "method"), [*product(["llama"], KEEPING), *product(["mixtral", "opt"], ELSEWHERE)])
def test_what_changes_the_model_keeps_its_function(
    model_of: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    ids, model = torch.stack(WINDOWS), model_of(family)
    settings = [setting for word in method.split("+") for setting in SETTINGS.get(word, ())]
    name = f"{method}+minmax" if method.split("+")[-1] in TRANSFORMS else method
    recipe = resolve(f"{name}-{EXACT}", settings=["scheme.weights.scale=float32", *settings]).recipe
    lowbit.quantize(model, quick(recipe), tmp_path / "out", calibration=WINDOWS)
    with torch.no_grad():
        exact, logits = (
            lowbit.load(path, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
            for path in (model, tmp_path / "out")
        )
    assert 0 < float((logits - exact).norm() / exact.norm()) < 2e-5
