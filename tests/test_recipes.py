"""Recipe names, documents and `--set`: what is expected is written out by hand, for the grammar is a contract."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

from lowbit.methods import CLIPS, CORRECTS, RECONSTRUCTS, ROUNDS, TRANSFORMS
from lowbit.methods.awq import AWQ, AWQClip
from lowbit.methods.base import Clip, Correct, Reconstruct, Rotation, Round, Transform
from lowbit.methods.flatquant import FlatQuant
from lowbit.methods.gptaq import GPTAQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.lorc import LoRC
from lowbit.methods.mse import MSEClip
from lowbit.methods.omniquant import OmniQuant
from lowbit.methods.quarot import QuaRot
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Override, Scheme
from lowbit.methods.signround import SignRound
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.numerics.kv import KV
from lowbit.numerics.spec import MINIMA, NF4, PLAIN, Float, Int, Number, Rule, ScaleDtype, Spec
from lowbit.recipes import (
    NAMED,
    Calibration,
    LoadedRecipe,
    from_dict,
    load_yaml,
    parse,
    resolve,
    show,
    to_dict,
    to_yaml,
)
from lowbit.recipes.document import read_yaml
from lowbit.recipes.grammar import parse_override

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text("utf-8")

FP8 = Float(4, 3, 448.0)
FP4 = Float(2, 1, 6.0)
FP6 = Float(3, 2, 28.0)
MXFP4 = Spec(FP4, (1, 32), "e8m0")
A4 = Spec(Int(4), (1, -1), "float32", dynamic=True)
A8 = Spec(Int(8), (1, -1), "float32", dynamic=True)
AFP8 = Spec(FP8, (1, -1), "float32", dynamic=True)


def weights(bits: int, group: int = -1, rule: Rule = "symmetric", scale: ScaleDtype = "half") -> Spec:
    return Spec(Int(bits, rule), (1, group), scale, dynamic=False)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_registry() -> None:
    assert {*TRANSFORMS} == {"quarot", "spinquant", "smoothquant", "awq", "osplus"}
    assert {*CLIPS} == {"minmax", "mse", "awqclip", "imatrix", "hqq", "dgq", "adadim"}
    assert {*ROUNDS} == {"rtn", "gptq", "gptaq"}
    before = {name for name, kind in RECONSTRUCTS.items() if not kind.after}
    assert before == {"omniquant", "affinequant", "flatquant"}
    assert {*RECONSTRUCTS} - before == {"signround", "tesseraq", "lkd", "zqglobal", "zqlocal", "normtweak"}
    assert {*CORRECTS} == {"lorc"}


@pytest.mark.parametrize(
    ("slots", "kinds"),
    [
        ((Transform, Rotation), TRANSFORMS),
        ((Clip,), CLIPS),
        ((Round,), ROUNDS),
        ((Reconstruct,), RECONSTRUCTS),
        ((Correct,), CORRECTS),
    ],
)
def test_registered_methods_fill_their_slot(slots: tuple[type, ...], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        method = kind()
        assert sum(isinstance(method, slot) for slot in slots) == 1
        assert hash(method) == hash(kind())
        assert kind.name == name


# --- names ------------------------------------------------------------------------------------------------------------

NAMES: dict[str, Recipe] = {
    # the design's examples that this version supports
    "rtn-w4a16-g128": Recipe(Scheme(weights(4, 128)), RTN(), MinMaxClip()),
    "gptq-w3a16-g128-asym": Recipe(Scheme(weights(3, 128, "asymmetric")), GPTQ(), AWQClip()),
    "awq+gptq-w4a16-g64": Recipe(Scheme(weights(4, 64)), GPTQ(), AWQClip(), (AWQ(),)),
    "smoothquant-w8a8": Recipe(Scheme(weights(8, scale="float32"), A8), RTN(), MinMaxClip(), (SmoothQuant(),)),
    "gptq-wfp4afp8-g128": Recipe(Scheme(Spec(FP4, (1, 128), "half"), AFP8), GPTQ(), AWQClip()),
    "smoothquant-fp8": Recipe(Scheme(Spec(FP8, (1, -1), "float32"), AFP8), RTN(), MinMaxClip(), (SmoothQuant(),)),
    # methods
    "awq-w4a16-g128-asym": Recipe(Scheme(weights(4, 128, "asymmetric")), RTN(), AWQClip(), (AWQ(),)),
    "awq+rtn-w4a16": Recipe(Scheme(weights(4)), RTN(), AWQClip(), (AWQ(),)),
    "awq+minmax-w4a16": Recipe(Scheme(weights(4)), RTN(), MinMaxClip(), (AWQ(),)),
    "awq+awqclip+gptq-w4": Recipe(Scheme(weights(4)), GPTQ(), AWQClip(), (AWQ(),)),
    "minmax+gptq-w4": Recipe(Scheme(weights(4)), GPTQ(), MinMaxClip()),
    "mse-w4a16": Recipe(Scheme(weights(4)), RTN(), MSEClip()),
    "mse+gptq-w2a16-g64": Recipe(Scheme(weights(2, 64)), GPTQ(), MSEClip()),
    "smoothquant+gptq-w4a8-g128": Recipe(Scheme(weights(4, 128), A8), GPTQ(), AWQClip(), (SmoothQuant(),)),
    "smoothquant+awq-w4": Recipe(Scheme(weights(4)), RTN(), AWQClip(), (SmoothQuant(), AWQ())),
    "awq+smoothquant-w4": Recipe(Scheme(weights(4)), RTN(), AWQClip(), (AWQ(), SmoothQuant())),
    "w4a16-g128": Recipe(Scheme(weights(4, 128)), RTN(), MinMaxClip()),
    "-w4a16-g128": Recipe(Scheme(weights(4, 128)), RTN(), MinMaxClip()),
    # schemes
    "rtn-w1": Recipe(Scheme(weights(1)), RTN(), MinMaxClip()),
    "rtn-w8a16": Recipe(Scheme(weights(8)), RTN(), MinMaxClip()),
    "rtn-w8a8-asym": Recipe(Scheme(weights(8, -1, "asymmetric", "float32"), A8), RTN(), MinMaxClip()),
    "rtn-w8afp8": Recipe(Scheme(weights(8, scale="float32"), AFP8), RTN(), MinMaxClip()),
    "rtn-w16a8": Recipe(Scheme(None, A8), RTN(), MinMaxClip()),
    "rtn-w6a2": Recipe(Scheme(weights(6), Spec(Int(2), (1, -1), "float32", dynamic=True)), RTN(), MinMaxClip()),
    "rtn-w4a8-asym-static-g32": Recipe(
        Scheme(weights(4, 32, "asymmetric"), Spec(Int(8), (-1, -1), "float32", dynamic=False)), RTN(), MinMaxClip()
    ),
    "rtn-fp8-static": Recipe(
        Scheme(Spec(FP8, (1, -1), "float32"), Spec(FP8, (-1, -1), "float32", dynamic=False)), RTN(), MinMaxClip()
    ),
    "rtn-wfp8afp8": Recipe(Scheme(Spec(FP8, (1, -1), "float32"), AFP8), RTN(), MinMaxClip()),
    "rtn-fp8a16": Recipe(Scheme(Spec(FP8, (1, -1), "float32")), RTN(), MinMaxClip()),
    "rtn-wfp8": Recipe(Scheme(Spec(FP8, (1, -1), "float32")), RTN(), MinMaxClip()),
    "rtn-wfp8a8-g128": Recipe(Scheme(Spec(FP8, (1, 128), "float32"), A8), RTN(), MinMaxClip()),
    # block formats, codebooks and what scales may be
    "rtn-nvfp4": Recipe(Scheme(Spec(FP4, (1, 16), "e4m3"), Spec(FP4, (1, 16), "e4m3", True)), RTN(), MinMaxClip()),
    "rtn-nvfp4a16": Recipe(Scheme(Spec(FP4, (1, 16), "e4m3")), RTN(), MinMaxClip()),
    "rtn-nvfp4afp8": Recipe(Scheme(Spec(FP4, (1, 16), "e4m3"), AFP8), RTN(), MinMaxClip()),
    "gptq-mxfp4": Recipe(Scheme(MXFP4, replace(MXFP4, dynamic=True)), GPTQ(), AWQClip()),
    "rtn-mxfp4amxfp8": Recipe(Scheme(MXFP4, Spec(FP8, (1, 32), "e8m0", True)), RTN(), MinMaxClip()),
    "rtn-mxfp6a16": Recipe(Scheme(Spec(FP6, (1, 32), "e8m0")), RTN(), MinMaxClip()),
    "rtn-mxint8a16": Recipe(Scheme(Spec(Int(8), (1, 32), "e8m0")), RTN(), MinMaxClip()),
    "rtn-w8amxint8": Recipe(
        Scheme(weights(8, scale="float32"), Spec(Int(8), (1, 32), "e8m0", True)), RTN(), MinMaxClip()
    ),
    "rtn-wfp6afp6-g128": Recipe(
        Scheme(Spec(FP6, (1, 128), "half"), Spec(FP6, (1, -1), "float32", True)), RTN(), MinMaxClip()
    ),
    "rtn-wfp4afp4": Recipe(Scheme(Spec(FP4, (1, -1)), Spec(FP4, (1, -1), "float32", True)), RTN(), MinMaxClip()),
    "rtn-nf4": Recipe(Scheme(Spec(NF4, (1, 64), "half")), RTN(), MinMaxClip()),
    "rtn-nf4a16-g128-double": Recipe(Scheme(Spec(NF4, (1, 128), "double")), RTN(), MinMaxClip()),
    "rtn-wfp4afp8-g256-pow2": Recipe(Scheme(Spec(FP4, (1, 256), "e8m0-rceil"), AFP8), RTN(), MinMaxClip()),
    "gptq-wfp4afp8-g256-m2": Recipe(Scheme(Spec(FP4, (1, 256), "m2"), AFP8), GPTQ(), AWQClip()),
    "rtn-w8a8-g16-row": Recipe(Scheme(Spec(Int(8), (16, -1), "float32"), A8), RTN(), MinMaxClip()),
    "rtn-wfp4a16-g32": Recipe(Scheme(Spec(FP4, (1, 32), "half")), RTN(), MinMaxClip()),
    # rotations, training, corrections, caches
    "quarot+gptq-w4a4kv4": Recipe(Scheme(weights(4), A4, kv=KV(4, 4)), GPTQ(), AWQClip(), (QuaRot(),)),
    "flatquant-w4a4kv4": Recipe(Scheme(weights(4), A4, kv=KV(4, 4)), RTN(), MinMaxClip(), reconstruct=(FlatQuant(),)),
    "rtn-w16a16k4v2": Recipe(Scheme(None, kv=KV(4, 2)), RTN(), MinMaxClip()),
    "gptq+lorc32-w3a16": Recipe(Scheme(weights(3)), GPTQ(), AWQClip(), correct=(LoRC(rank=32),)),
    "lorc-w3": Recipe(Scheme(weights(3)), RTN(), MinMaxClip(), correct=(LoRC(rank=8),)),
    "awq+mse+omniquant+gptaq+signround+lorc4-w2": Recipe(
        Scheme(weights(2)), GPTAQ(), MSEClip(), (AWQ(),), "", (OmniQuant(), SignRound()), (LoRC(rank=4),)
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_these_objects(name: str) -> None:
    assert parse(name) == replace(NAMES[name], name=name)


KNOWN = (
    "(known: quarot, spinquant, smoothquant, awq, osplus, minmax, mse, awqclip, imatrix, hqq, dgq, adadim, flatquant, "
    "omniquant, affinequant, pbllm, billm, dbllm, magnitude, wanda, sparsegpt, spqr, quik, llmint8, owq, quip, "
    "quipsharp, rtn, gptq, gptaq, signround, tesseraq, lkd, zqglobal, zqlocal, normtweak, lorc)"
)
ORDER = (
    "transforms come first, then the clip, what is trained before rounding, what weights are made of, rounding, what "
    "is trained after it, corrections: "
)
OPEN = "it leaves the bits of weights open: add --bits or --size, or write for instance w4 in front"
START = (
    "a scheme begins with w1 to w8, w16, wfp8, wfp6, wfp4, fp8, nf4, q2k, q3k, q4k, q5k, q6k, nvfp4, mxfp4, mxfp6, "
    "mxfp8 or mxint8 in this version"
)
AFTER = "this version knows a2 to a8, a16, afp8, afp6, afp4, anvfp4, amxfp4, amxfp6, amxfp8 or amxint8 there"
OPTIONS = "(known: -gGROUP, -kvgGROUP, -kivi, -asym, -pow2, -m2, -double, -row, -static)"

REFUSED_NAMES = {
    # the design's examples that belong to later versions
    "gptq-g128": OPEN,
    "papers/gptq": f"unknown method 'papers/gptq', did you mean 'sparsegpt'? {KNOWN}",
    "rtn-w4a16-head8": f"unknown option '-head8' {OPTIONS}",
    # methods
    "gtpq-w4a16": f"unknown method 'gtpq', did you mean 'gptq'? {KNOWN}",
    "smothquant+gptq-w4a16": f"unknown method 'smothquant', did you mean 'smoothquant'? {KNOWN}",
    "RTN-w4a16": f"unknown method 'RTN', did you mean 'rtn'? {KNOWN}",
    "rtn+-w4a16": f"unknown method '' {KNOWN}",
    "gptq+awq-w4a16": f"{ORDER}awq+gptq",
    "gptq+mse+awq-w4a16": f"{ORDER}awq+mse+gptq",
    "rtn+gptq-w4a16": "rtn and gptq both choose the codes: keep one of them",
    "mse+awqclip-w4a16": "mse and awqclip both choose the range of the codes: keep one of them",
    "awq+awq-w4a16": "awq is named twice: once is enough",
    # schemes
    "": "it does not say what to quantize to, write for instance gptq-w4a16-g128",
    "gptq": "it does not say what to quantize to, write for instance gptq-w4a16-g128",
    "gptq-": "it does not say what to quantize to, write for instance gptq-w4a16-g128",
    "rtn-w0": "weights have 1 to 8 bits, or 16 to stay as they are, not 0",
    "rtn-w9a16": "weights have 1 to 8 bits, or 16 to stay as they are, not 9",
    "rtn-w4a1": "activations have 2 to 8 bits, or 16 to stay as they are, not 1",
    "rtn-w4a12": "activations have 2 to 8 bits, or 16 to stay as they are, not 12",
    "rtn-w16a16": "16-bit weights and 16-bit activations leave nothing to quantize",
    "rtn-w16": "16-bit weights and 16-bit activations leave nothing to quantize",
    "rtn-fp8a8": "fp8 means FP8 activations, or none as fp8a16: for others write wfp8a8",
    "rtn-w4a16x": f"cannot read 'x' in 'w4a16x': {AFTER}",
    "rtn-a8": OPEN,
    # options
    "rtn-w4-assym": f"unknown option '-assym', did you mean '-asym'? {OPTIONS}",
    "rtn-w4-g": f"unknown option '-g' {OPTIONS}",
    "rtn-w4-g-1": f"unknown option '-g' {OPTIONS}",
    "rtn-w4-g0": "a group has at least one column: -g128 is usual, and no -g means whole rows",
    "rtn-w4-g64-g128": "-g64 and -g128 give two group sizes: keep one of them",
    "rtn-w4-asym-asym": "-asym is given twice: once is enough",
    "rtn-fp8-asym": "-asym needs integers, and fp8 e4m3 has no zero-point: drop it",
    "rtn-w4a16-static": "-static describes quantized activations, and there are none: drop it, or add a8 or afp8",
    "rtn-w16a8-asym": "-g and -asym describe quantized weights, and w16 has none: drop them",
    "rtn-w16a8-g64": "-g and -asym describe quantized weights, and w16 has none: drop them",
    "rtn-w4a16-g32-asym-pow2": "e8m0-rceil scales have no zero-points: drop the asymmetric rule, or use half",
    "rtn-w4-g32-pow2-m2": "-pow2 and -m2 both say how scales are stored: keep one of them",
    "rtn-w4-m2": "-m2 relates the groups of a row, and there is one: write for instance -g256-m2",
    "rtn-w4-g4-row-m2": "-m2 relates the groups of a row, and there is one: write for instance -g256-m2",
    "rtn-w4-row": "-row lets whole rows share a scale, -g saying how many: write for instance -g16-row",
    "rtn-nvfp4-g32": "fp4 e2m1, group 16, e4m3 scales is a whole format: drop -g32",
    "rtn-mxfp4-asym-pow2": "fp4 e2m1, group 32, e8m0 scales is a whole format: drop -asym and -pow2",
    "rtn-mxint8-static": "the ranges of int8, group 32, e8m0 scales come with the values: drop -static",
    "rtn-nf4-asym": "-asym needs integers, and nf4 has no zero-point: drop it",
    "rtn-nf4anf4": f"cannot read 'anf4' in 'nf4anf4': {AFTER}",
    "rtn-nvfp4afp9": f"cannot read 'afp9' in 'nvfp4afp9': {AFTER}",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_refused_names(name: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(name)
    assert str(error.value) == f"recipe '{name}': {REFUSED_NAMES[name]}"


# --- documents --------------------------------------------------------------------------------------------------------


def many_names() -> Iterator[str]:
    methods = ("rtn", "gptq", "awq", "awq+gptq", "mse+gptq", "smoothquant+awq+awqclip+gptq")
    formats = ("w1", "w4", "w8", "w8a8", "w4a8", "w6a6", "wfp8", "fp8", "fp8a16", "wfp4afp8", "nf4", "wfp6")
    for parts in itertools.product(methods, formats, ("", "-g32"), ("", "-asym"), ("", "-static")):
        asym_float = "f" in parts[1] and parts[3]
        static_nothing = parts[1] in ("w1", "w4", "w8", "wfp8", "fp8a16", "nf4", "wfp6") and parts[4]
        if not (asym_float or static_nothing):
            yield f"{parts[0]}-{''.join(parts[1:])}"
    for scheme in ("nvfp4", "mxfp4amxfp8", "mxint8a16", "nf4-double", "wfp4afp8-g64-pow2", "w4-g64-m2", "w8-g4-row"):
        yield f"gptq-{scheme}"


def test_documents_round_trip() -> None:
    names = [*many_names()]
    assert len(names) > 150
    for name in names:
        recipe = resolve(name, overrides=["*.a=w8a16-g128", "b=fp8"], ignore=["c*"]).recipe
        pinned = LoadedRecipe(recipe, Calibration("c4", 128, 2048, 0))
        assert from_dict(to_dict(recipe)) == LoadedRecipe(recipe)
        assert from_dict(json.loads(json.dumps(to_dict(recipe, pinned.calibration)))) == pinned
    for name in names[::7]:
        recipe = parse(name)
        assert from_dict(read_yaml(to_yaml(recipe, Calibration()))) == LoadedRecipe(recipe, Calibration())


RULES: tuple[Rule, ...] = get_args(Rule)
SCALES: tuple[ScaleDtype, ...] = tuple(scale for scale in get_args(ScaleDtype) if scale not in (*MINIMA, "integer"))


def specs() -> Iterator[tuple[Spec, Spec]]:
    """Weight formats of every rule, block and scale type, each with an activation format."""
    numbers: list[Number] = [Int(bits, rule) for bits in (2, 8) for rule in RULES]
    numbers += [FP8, Float(5, 2, 57344.0), FP4, FP6, Float(2, 3, 7.5), Float(3, 0, 16.0), NF4]
    inputs = [((1, -1), True), ((-1, -1), False), ((-1, -1), True), ((1, 64), True), ((-1, 64), False)]
    for i, number in enumerate(numbers):
        asymmetric = isinstance(number, Int) and not number.symmetric
        for j, block in enumerate([(1, -1), (-1, -1), (1, 32), (1, 1), (128, 128), (4, -1), (-1, 8), (3, 5)]):
            scales = PLAIN if asymmetric else SCALES
            scale = scales[(i + j) % len(scales)]
            if not (asymmetric and block in ((128, 128), (3, 5))):
                shape, dynamic = inputs[j % len(inputs)]
                yield Spec(number, block, scale), Spec(number, shape, PLAIN[j % 4] if dynamic else scale, dynamic)
                if dynamic and not asymmetric:
                    yield Spec(number, block, scale), Spec(number, shape, ("e8m0", "e4m3", "e8m0-even")[j % 3], True)


def test_formats_round_trip() -> None:
    found = [*specs()]
    assert len(found) > 100
    for weight, inputs in found:
        recipe = Recipe(
            Scheme(weight, inputs, (Override("x", None, inputs), Override("y", weight))), RTN(), MinMaxClip()
        )
        assert from_dict(json.loads(json.dumps(to_dict(recipe)))).recipe == recipe


def test_settings_round_trip_to_the_last_bit() -> None:
    recipe = Recipe(Scheme(weights(3)), GPTQ(damp=0.1 + 0.2, block=7), MSEClip(norm=1e-5), (AWQ(3, True),), "1e5")
    assert from_dict(read_yaml(to_yaml(recipe))).recipe == recipe


def test_document_layout() -> None:
    scheme = Scheme(
        weights(4, 64), A8, (Override("*.down_proj", Spec(FP8, (128, 128), "float32"), None), Override("x"))
    )
    recipe = Recipe(scheme, RTN(), MSEClip(), (SmoothQuant(0.8),), "mine")
    assert to_yaml(recipe, Calibration("c4", samples=128, seed=0)) == (
        "name: mine\n"
        "scheme:\n"
        "  weights: {format: int4, rule: symmetric, group: 64, scale: half}\n"
        "  activations: {format: int8, rule: symmetric, per: token, scale: float32}\n"
        "  kv: null\n"
        "  overrides:\n"
        "  - pattern: '*.down_proj'\n"
        "    weights:\n"
        "      format: fp8-e4m3\n"
        "      block: [128, 128]\n"
        "      scale: float32\n"
        "    activations: null\n"
        "  - {pattern: x, weights: null, activations: null}\n"
        "transforms:\n"
        "- smoothquant: {alpha: 0.8, all_edges: false, down_part: 0.0}\n"
        "clip:\n"
        "  mse: {grid: 100, maxshrink: 0.8, norm: 2.4}\n"
        "round:\n"
        "  rtn: {}\n"
        "reconstruct: []\n"
        "correct: []\n"
        "calibration: {source: c4, samples: 128, seed: 0}\n"
    )


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("scheme: {weights: {format: int4}}", "w4"),
        ("{scheme: {weights: {format: int4, group: 128}}, transforms: [awq]}", "awq-w4-g128"),
        ("{scheme: {weights: {format: int4}}, transforms: [awq: ], round: gptq}", "awq+gptq-w4"),
        ("{scheme: {weights: {format: int4}}, clip: mse, round: {rtn: {}}}", "mse-w4"),
        ("scheme: {weights: {format: int8}, activations: {format: int8}}", "w8a8"),
        ("scheme: {weights: {format: int8}, activations: {format: int8, per: tensor}}", "w8a8-static"),
        ("scheme: {weights: {format: fp8-e4m3}, activations: {format: fp8-e4m3}}", "fp8"),
        ("scheme: {weights: {format: fp8-e4m3}}", "fp8a16"),
        ("scheme: {weights: {format: fp4-e2m1, group: 32}}", "wfp4-g32"),
        ("scheme: {weights: {format: nf4, group: 64, scale: double}}", "nf4-double"),
        ("scheme: {weights: {format: int8, block: [16, -1]}}", "w8-g16-row"),
        ("scheme: {weights: {format: fp4-e2m1, group: 16, scale: e4m3}}", "nvfp4a16"),
        (
            "{scheme: {weights: {format: fp4-e2m1, group: 32, scale: e8m0},"
            " activations: {format: fp8-e4m3, group: 32, scale: e8m0}}}",
            "mxfp4amxfp8",
        ),
    ],
)
def test_short_documents_mean_what_names_mean(short: str, name: str) -> None:
    assert from_dict(read_yaml(short)) == LoadedRecipe(replace(parse(name), name=""))


W4 = {"weights": {"format": "int4"}}
REFUSED_DOCUMENTS: list[tuple[Any, str]] = [
    (None, "a recipe: expected a mapping of keys to values, not None"),
    ({}, "the scheme is missing: add for instance scheme: {weights: {format: int4, group: 128}}"),
    (
        {"sheme": W4},
        "unknown key 'sheme', did you mean 'scheme'? (known: name, scheme, transforms, clip, encode, round, "
        "reconstruct, correct, calibration)",
    ),
    ({"scheme": W4, "name": 4}, "name: input should be a valid string, not 4"),
    ({"scheme": {}}, "scheme: nothing is quantized, give weights, activations or kv a format"),
    (
        {"scheme": {"weigths": None}},
        "unknown key 'scheme.weigths', did you mean 'weights'? (known: weights, activations, kv, overrides)",
    ),
    ({"scheme": {"weights": "int4"}}, "scheme.weights: expected a mapping of keys to values, not 'int4'"),
    (
        {"scheme": {"weights": {"bits": 4}}},
        "unknown key 'scheme.weights.bits' (known: format, rule, group, block, scale)",
    ),
    (
        {"scheme": {"activations": {"group": 4}}},
        "scheme.activations: the format is missing (known: int1, int2, int3, int4, int5, int6, int7, int8, fp8-e4m3, "
        "fp8-e5m2, "
        "fp6-e3m2, fp6-e2m3, fp4-e2m1, fp4-e3m0, nf4)",
    ),
    (
        {"scheme": {"weights": {"format": "fp8-e4m4"}}},
        "scheme.weights.format: unknown format 'fp8-e4m4', did you mean 'fp8-e4m3'? (known: int1, int2, int3, int4, "
        "int5, int6, int7, int8, fp8-e4m3, fp8-e5m2, "
        "fp6-e3m2, fp6-e2m3, fp4-e2m1, fp4-e3m0, nf4, bf16)",
    ),
    (
        {"scheme": {"weights": {"format": "int4", "scale": "fp32"}}},
        "scheme.weights.scale: unknown scale type 'fp32' (known: half, float32, bfloat16, float16, e8m0, e8m0-rceil, "
        "e8m0-ceil, e8m0-even, e4m3, m2, m2-ceil, double, float16-min, kquant, integer, bilevel)",
    ),
    (
        {"scheme": {"weights": {"format": "fp8-e4m3", "rule": "symmetric"}}},
        "scheme.weights.rule: scale rules are for integers and fp8-e4m3 is none, leave it out",
    ),
    (
        {"scheme": {"weights": {"format": "int1", "rule": "symmetric-restricted"}}},
        "scheme.weights: the symmetric-restricted rule needs 2 bits or more: at 1 bit its only code is zero",
    ),
    (
        {"scheme": {"weights": {"format": "int4", "group": True}}},
        "scheme.weights.group: expected channel, tensor or a positive number of columns, not True",
    ),
    (
        {"scheme": {"weights": {"format": "int4", "group": 8, "block": [1, 8]}}},
        "scheme.weights: group and block both say which weights share a scale, keep one of them",
    ),
    (
        {"scheme": {"weights": {"format": "int4", "block": [128]}}},
        "scheme.weights.block: expected [rows, columns], -1 for all of them, not [128]",
    ),
    (
        {"scheme": {"weights": {"format": "int4", "block": [0, 8]}}},
        "scheme.weights: a unit is at least 1 x 1, or -1 for a whole axis, not 0 x 8",
    ),
    (
        {"scheme": {"weights": {"format": "int4", "rule": "asymmetric", "block": [8, 8]}}},
        "scheme.weights: square blocks are padded with zeros and must be symmetric: drop the asymmetric rule",
    ),
    (
        {"scheme": {"activations": {"format": "int8", "per": "channel"}}},
        "scheme.activations.per: unknown unit 'channel' (known: token, tensor)",
    ),
    (
        {"scheme": {"activations": {"format": "int8", "dynamic": False}}},
        "scheme.activations: tokens to come have no ranges yet, so per token is dynamic; static is per: tensor",
    ),
    ({"scheme": {**W4, "overrides": {}}}, "scheme.overrides: input should be a valid list, not {}"),
    (
        {"scheme": {**W4, "overrides": [{"weights": None}]}},
        "scheme.overrides[0].pattern: input should be a valid string, not None",
    ),
    (
        {"scheme": {**W4, "overrides": [{"pattern": "x"}, {"pattern": "y", "weights": {"format": "int44"}}]}},
        "scheme.overrides[1].weights.format: unknown format 'int44', did you mean 'int4'? (known: int1, int2, int3, "
        "int4, int5, int6, int7, int8, fp8-e4m3, fp8-e5m2, "
        "fp6-e3m2, fp6-e2m3, fp4-e2m1, fp4-e3m0, nf4, bf16)",
    ),
    (
        {"scheme": W4, "round": {"gptq": {"dampp": 1}}},
        "unknown setting 'round.gptq.dampp', did you mean 'damp'? (known: damp, act_order, groups, true_sequential, "
        "block)",
    ),
    (
        {"scheme": W4, "round": {"gptq": {"damp": "lots"}}},
        "round.gptq.damp: input should be a valid number, not 'lots'",
    ),
    (
        {"scheme": W4, "round": {"gptq": {"damp": float("nan")}}},
        "round.gptq.damp: a setting is a finite number, not nan",
    ),
    ({"scheme": W4, "round": {"gptq": {"damp": True}}}, "round.gptq.damp: input should be a valid number, not True"),
    ({"scheme": W4, "round": {"gptq": {"block": 64.0}}}, "round.gptq.block: input should be a valid integer, not 64.0"),
    (
        {"scheme": W4, "round": {"gptq": {"groups": "stail"}}},
        "round.gptq.groups: input should be 'static', 'fresh' or 'stale', not 'stail'",
    ),
    (
        {"scheme": W4, "round": "gtpq"},
        "round: unknown round method 'gtpq', did you mean 'gptq'? (known: rtn, gptq, gptaq)",
    ),
    ({"scheme": W4, "clip": {"gptq": {}}}, "clip: gptq is a round method, not a clip method"),
    (
        {"scheme": W4, "round": {"gptq": {}, "rtn": {}}},
        "round: expected one method with its settings, as in {gptq: {damp: 0.01}}, not {'gptq': {}, 'rtn': {}}",
    ),
    ({"scheme": W4, "transforms": "awq"}, "transforms: input should be a valid list, not 'awq'"),
    ({"scheme": W4, "transforms": ["awq", {"awq": {}}]}, "transforms[1]: awq is listed twice, once is enough"),
    (
        {"scheme": W4, "transforms": ["awq", {"smoothquant": {"alfa": 1}}]},
        "unknown setting 'transforms[1].smoothquant.alfa', did you mean 'alpha'? (known: alpha, all_edges, down_part)",
    ),
    ({"scheme": W4, "calibration": {"samples": 0}}, "calibration: at least one sample is needed, not 0"),
    ({"scheme": W4, "calibration": {"length": 1}}, "calibration: a sample has at least two tokens, not 1"),
    ({"scheme": W4, "calibration": {"seed": -1}}, "calibration: seeds are not negative, as -1 is"),
    ({"scheme": W4, "calibration": {"source": ""}}, "calibration: the source is empty: name a set or a text file"),
    (
        {"scheme": W4, "calibration": {"seeds": 1}},
        "unknown setting 'calibration.seeds', did you mean 'seed'? (known: source, samples, length, seed)",
    ),
]


@pytest.mark.parametrize(("data", "sentence"), REFUSED_DOCUMENTS, ids=[case[1][:40] for case in REFUSED_DOCUMENTS])
def test_refused_documents(data: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(data)
    assert str(error.value) == sentence


# --- files ------------------------------------------------------------------------------------------------------------


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("scheme: {weights: {format: int4}}\ncalibration: {samples: 8}\n")
    expected = LoadedRecipe(replace(parse("w4"), name="mine"), Calibration(samples=8))
    assert load_yaml(path) == resolve(path) == resolve(str(path)) == expected
    (tmp_path / "again.yml").write_text(show(path))
    assert resolve(tmp_path / "again.yml") == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"scheme: {weights: {format: int4}", "line 1 is not YAML (expected ',' or '}', but got '<stream end>')"),
        (b"name: x\nscheme: {weights: *w}\n", "line 2 is not YAML (found undefined alias 'w')"),
        (b"clip: mse\nclip: minmax\n", "line 2 is not YAML (the key 'clip' comes twice)"),
        (b"a: \x00", "this is not YAML (unacceptable character #x0000: special characters are not allowed)"),
        (b"", "a recipe: expected a mapping of keys to values, not None"),
        (b"scheme: {weights: {format: int9}}", "scheme.weights.format: unknown format 'int9', did you mean 'int"),
    ],
)
def test_refused_files(tmp_path: Path, text: bytes, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        load_yaml(path)
    assert str(error.value).startswith(f"{path}: {sentence}") and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^cannot read the recipe file .*none\.yaml: No such file or directory$"):
        resolve(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"binary\.yaml is not UTF-8 text: is it a recipe\?$"):
        resolve(tmp_path / "binary.yaml")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"recipe\.json is no recipe: give a file that ends in \.yaml, or a name"):
        resolve(str(tmp_path / "recipe.json"))


# --- --set, --override, --ignore --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("gptq-w4", "gptq.damp=0.05", Recipe(Scheme(weights(4)), GPTQ(damp=0.05), AWQClip())),
        ("gptq-w4", "gptq.damp=1e-3", Recipe(Scheme(weights(4)), GPTQ(damp=0.001), AWQClip())),
        ("gptq-w4", "gptq.act_order=false", Recipe(Scheme(weights(4)), GPTQ(act_order=False), AWQClip())),
        ("gptq-w4", "gptq.groups=fresh", Recipe(Scheme(weights(4)), GPTQ(groups="fresh"), AWQClip())),
        ("awq-w4", "awqclip.grid=5", Recipe(Scheme(weights(4)), RTN(), AWQClip(grid=5), (AWQ(),))),
        (
            "smoothquant-w4a8",
            "smoothquant.alpha=1",
            Recipe(Scheme(weights(4), A8), RTN(), MinMaxClip(), (SmoothQuant(1.0),)),
        ),
        ("w4", "scheme.weights.group=64", Recipe(Scheme(weights(4, 64)), RTN(), MinMaxClip())),
        (
            "w4",
            "scheme.weights.rule=symmetric-full",
            Recipe(Scheme(weights(4, -1, "symmetric-full")), RTN(), MinMaxClip()),
        ),
        ("w4a8", "scheme.activations.per=tensor", NAMES["rtn-w4a8-asym-static-g32"]),
        ("w4", "scheme.weights={format: int8, group: 2}", Recipe(Scheme(weights(8, 2)), RTN(), MinMaxClip())),
        ("w4", "round=gptq", Recipe(Scheme(weights(4)), GPTQ(), MinMaxClip())),
    ],
)
def test_set(name: str, setting: str, expected: Recipe) -> None:
    if setting == "scheme.activations.per=tensor":
        expected = replace(expected, scheme=replace(expected.scheme, weights=weights(4)))
    assert resolve(name, settings=[setting]) == LoadedRecipe(replace(expected, name=name))


def test_settings_apply_in_order_and_reach_the_calibration() -> None:
    settings = [
        "gptq.damp=1",
        "round={gptq: {block: 32}}",
        "gptq.damp=2",
        "calibration.samples=4",
        "calibration.seed=1",
    ]
    loaded = resolve("gptq-w4", settings=settings)
    assert loaded == LoadedRecipe(
        replace(parse("gptq-w4"), round=GPTQ(damp=2.0, block=32)), Calibration(samples=4, seed=1)
    )


GPTQ_SETTINGS = (
    "awqclip.grid, awqclip.maxshrink, gptq.damp, gptq.act_order, gptq.groups, gptq.true_sequential, gptq.block"
)
DOCUMENT_KEYS = "name, scheme, transforms, clip, encode, round, reconstruct, correct, calibration"
REFUSED_SETTINGS = {
    "gptq.damp": "write SETTING=VALUE, as in gptq.damp=0.05",
    "=3": "write SETTING=VALUE, as in gptq.damp=0.05",
    "gptq.dampp=1": f"unknown setting 'gptq.dampp', did you mean 'gptq.damp'? (known: {GPTQ_SETTINGS})",
    "gptq.damp.x=1": f"unknown setting 'gptq.damp.x', did you mean 'gptq.damp'? (known: {GPTQ_SETTINGS})",
    "damp=1": f"unknown setting 'damp', did you mean 'gptq.damp'? (known: {GPTQ_SETTINGS}, {DOCUMENT_KEYS})",
    "awq.grid=3": f"unknown setting 'awq.grid', did you mean 'awqclip.grid'? (known: {GPTQ_SETTINGS}, {DOCUMENT_KEYS})",
    "gptq.damp=lots": "round.gptq.damp: input should be a valid number, not 'lots'",
    "gptq.damp=": "round.gptq.damp: input should be a valid number, not None",
    "gptq.damp=[": "line 1 is not YAML (expected the node content, but found '<stream end>')",
    "scheme.weigths.group=3": "unknown key 'scheme.weigths', did you mean 'weights'? (known: weights, activations, "
    "kv, overrides)",
    "scheme.weights.gruop=3": "unknown key 'scheme.weights.gruop', did you mean 'group'? (known: format, rule, group, "
    "block, scale)",
    "scheme.activations.per=tensor": "scheme.activations has no parts to set here, give it whole or in a recipe file",
    "transforms.0=awq": "transforms has no parts to set here, give it whole or in a recipe file",
    "scheme.weights=null": "scheme: nothing is quantized, give weights, activations or kv a format",
}


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_refused_settings(setting: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve("gptq-w4", settings=[setting])
    assert str(error.value) == f"--set {setting}: {REFUSED_SETTINGS[setting]}"


def test_overrides_and_ignored_sites() -> None:
    overrides = ["*.down_proj=w8a16-g128", "lm_head=w8a8", "odd=name=w16"]
    recipe = resolve("gptq-w4", overrides=overrides, ignore=["*.0.*", "x"]).recipe
    assert recipe.scheme.overrides == (
        Override("*.down_proj", weights(8, 128)),
        Override("lm_head", weights(8, scale="float32"), A8),
        Override("odd=name"),
        Override("*.0.*"),
        Override("x"),
    )
    assert recipe.scheme.formats("model.layers.3.mlp.down_proj") == (weights(8, 128), None)
    assert recipe.scheme.formats("model.layers.0.mlp.down_proj") == (None, None)
    assert recipe.name == "gptq-w4"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("w8a16", "write PATTERN=SCHEME, as in '*.down_proj=w8a16-g128'"),
        ("=w8a16", "write PATTERN=SCHEME, as in '*.down_proj=w8a16-g128'"),
        ("x=", "write PATTERN=SCHEME, as in '*.down_proj=w8a16-g128'"),
        ("x=w9", "weights have 1 to 8 bits, or 16 to stay as they are, not 9"),
        ("x=gptq-w4", f"cannot read 'gptq': {START}"),
    ],
)
def test_refused_overrides(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_override(text)
    assert str(error.value) == f"override '{text}': {sentence}"


def test_an_empty_ignore_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^an empty pattern matches nothing: write for instance --ignore '\*\.down_proj'$"
    ):
        resolve("gptq-w4", ignore=["x", ""])


def test_a_recipe_object_is_taken_as_it_is() -> None:
    recipe = Recipe(Scheme(weights(4)), GPTQ(damp=0.3), MSEClip(grid=7))
    assert resolve(recipe) == LoadedRecipe(recipe)
    assert resolve(recipe, settings=["mse.norm=2"]).recipe.clip == MSEClip(grid=7, norm=2.0)


# --- a new method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fussy:
    """A clip that only likes positive widths."""

    width: int = 3

    name: ClassVar[str] = "fussy"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"a width is positive, not {self.width}")


def test_one_registry_line_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLIPS, "fussy", Fussy)  # type: ignore[arg-type]
    recipe = parse("awq+fussy-w4")
    assert recipe.clip == Fussy()
    assert from_dict(to_dict(recipe)).recipe == recipe
    assert resolve("fussy-w4", settings=["fussy.width=5"]).recipe.clip == Fussy(5)
    with pytest.raises(ValueError) as error:
        resolve("fussy-w4", settings=["fussy.width=0"])
    assert str(error.value) == "--set fussy.width=0: clip.fussy: a width is positive, not 0"


# --- what users are shown ---------------------------------------------------------------------------------------------


def test_named_recipes_are_recipes() -> None:
    for name, line in NAMED.items():
        assert parse(name).name == name
        assert line and "\n" not in line
        assert from_dict(read_yaml(show(name))).recipe == parse(name)


def test_docs_list_the_named_recipes() -> None:
    table = DOCS.split("## Names worth starting from")[1].split("##")[0]
    assert dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.M)) == NAMED


def test_docs_show_what_is_printed() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    assert blocks[0] == show("awq+gptq-w4a16-g128")
    short = from_dict(read_yaml(blocks[1]))
    assert short.calibration == Calibration("c4", 128, 2048, 0)
    assert short.recipe == Recipe(
        Scheme(weights(4, 128), None, (Override("*.down_proj", weights(8, 128)), Override("*.layers.0.self_attn.*"))),
        GPTQ(damp=0.05),
        AWQClip(),
        (AWQ(),),
    )


def test_docs_commands_are_understood(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for flag in ("--recipe", "--output", "--bits", "--size", "--target"):
        parser.add_argument(flag)
    for flag in ("--set", "--override", "--ignore"):
        parser.add_argument(flag, action="append", default=[])
    commands = re.findall(r"^lowbit quantize (.*)$", DOCS, re.M)
    assert len(commands) > 4
    for command in commands:
        given = parser.parse_args(shlex.split(command))
        if given.recipe != "my-recipe.yaml":
            width = 3 if given.bits or given.size else None
            options = {"settings": given.set, "overrides": given.override, "ignore": given.ignore}
            changed = resolve(given.recipe, **options, width=width)
            assert (changed != resolve(given.recipe, width=width)) == any(options.values())


def test_docs_name_every_word() -> None:
    for word in (*TRANSFORMS, *CLIPS, *ROUNDS, *RECONSTRUCTS, *CORRECTS, *(each.name for each in fields(Calibration))):
        assert f"`{word}`" in DOCS
    names = re.findall(r"`((?:[a-z]+\+)*[a-z]+-w[0-9]a16[a-z0-9-]*)`", DOCS)
    assert len(names) > len(NAMED) / 2
    for name in names:
        parse(name)


def test_docs_python(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    exec(compile(code, "docs/recipes.md", "exec"), {})
    assert capsys.readouterr().out.startswith("name: mine\n")
