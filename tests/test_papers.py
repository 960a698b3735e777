"""The recipes of papers: what they pin, against the settings the papers state, and the page that lists them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.cli import main
from lowbit.data import calibrate
from lowbit.methods import CORRECTS, RECONSTRUCTS, ROUNDS, TRANSFORMS
from lowbit.methods.gptq import GPTQ
from lowbit.methods.lkd import LKD
from lowbit.methods.lorc import LoRC
from lowbit.methods.mse import MSEClip
from lowbit.methods.omniquant import OmniQuant
from lowbit.methods.quarot import QuaRot
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Override, Scheme
from lowbit.methods.signround import SignRound
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.spinquant import SpinQuant
from lowbit.numerics.kv import KV, kivi
from lowbit.numerics.spec import E2M1, E4M3, Int, Spec
from lowbit.recipes import PAPERS, Calibration, LoadedRecipe, from_dict, load_yaml, resolve, show, to_dict
from lowbit.recipes.papers import STUDIES, page

DOCS = Path(__file__).resolve().parents[1] / "docs" / "papers.md"

C4 = Calibration("c4", 128, 2048, 0)
WIKI = Calibration("wikitext2", 128, 2048, 0)


def weights(bits: int, group: int = -1, rule: str = "asymmetric") -> Spec:
    return Spec(Int(bits, rule), (1, group), "half")  # type: ignore[arg-type]


def inputs(number: object) -> Spec:
    return Spec(number, (1, -1), "float32", dynamic=True)  # type: ignore[arg-type]


GPTQ_CODE = GPTQ(damp=0.01, act_order=True, groups="stale", true_sequential=True, block=128)
GPTQ_ROWS = GPTQ(damp=0.01, act_order=False, groups="static", true_sequential=True, block=128)
ROTATED_KV = KV(4, 4, rule="zero-point")
A4_ASYM = inputs(Int(4, "asymmetric"))
ROWS_8 = Spec(Int(8, "symmetric-full"), (16, -1), "float32")

BY_HAND: dict[str, tuple[Recipe, Calibration | None]] = {
    "gptq-w3g128": (Recipe(Scheme(weights(3, 128)), GPTQ_CODE, MinMaxClip()), C4),
    "smoothquant-w8a8-llama": (
        Recipe(
            Scheme(Spec(Int(8), (1, -1), "float32"), inputs(Int(8))), RTN(), MinMaxClip(), (SmoothQuant(alpha=0.85),)
        ),
        Calibration("pile-smoothquant", 512, 512, 42),
    ),
    "omniquant-w4a4": (
        Recipe(
            Scheme(weights(4), A4_ASYM),
            RTN(),
            MinMaxClip(),
            reconstruct=(OmniQuant(epochs=20, let_rate=1e-3, lwc_rate=1e-2, alpha=0.75),),
        ),
        Calibration("wikitext2", 128, 2048, 2),
    ),
    "omniquant-w2g64": (
        Recipe(
            Scheme(weights(2, 64)),
            RTN(),
            MinMaxClip(),
            reconstruct=(OmniQuant(let=False, epochs=40, augmented=True),),
        ),
        Calibration("wikitext2", 128, 2048, 2),
    ),
    "quarot-gptq-w4a4kv4": (
        Recipe(Scheme(weights(4, -1, "symmetric"), inputs(Int(4)), kv=ROTATED_KV), GPTQ_ROWS, MSEClip(), (QuaRot(),)),
        WIKI,
    ),
    "spinquant-w4a4kv4": (
        Recipe(
            Scheme(weights(4, -1, "symmetric"), A4_ASYM, kv=ROTATED_KV),
            RTN(),
            MSEClip(),
            (SpinQuant(steps=100, rate=1.5, batch=8),),
        ),
        Calibration("wikitext2", 800, 2048, 0),
    ),
    "zeroquant-lkd-w48a8": (
        Recipe(
            Scheme(
                Spec(Int(4, "symmetric-full"), (16, -1), "half"),
                inputs(Int(8)),
                (Override("*attn*", ROWS_8, inputs(Int(8))),),
            ),
            RTN(),
            MinMaxClip(),
            reconstruct=(LKD(steps=100, rates=(5e-6,), batch=32, decay=0.0, inputs="float"),),
        ),
        Calibration("wikitext2", 3200, 128, 0),
    ),
    "lorc-w2a16": (Recipe(Scheme(weights(2)), GPTQ_ROWS, MinMaxClip(), correct=(LoRC(rank=8, bits=16),)), C4),
    "zeroquant-fp-w4a8-m2": (
        Recipe(Scheme(Spec(E2M1, (1, 256), "m2"), inputs(E4M3)), GPTQ_ROWS, MinMaxClip()),
        C4,
    ),
    "signround-w2g64": (
        Recipe(
            Scheme(weights(2, 64)),
            RTN(),
            MinMaxClip(),
            reconstruct=(SignRound(iterations=200, batch=8, rate=1 / 200),),
        ),
        Calibration("pile", 512, 2048, 42),
    ),
    "kivi-kv2": (Recipe(Scheme(None, kv=kivi(2, 2, group=32, residual=128)), RTN(), MinMaxClip()), None),
    "llmc/smoothquant-w4a8-all": (
        Recipe(
            Scheme(weights(4, -1, "symmetric"), inputs(Int(8))), RTN(), MinMaxClip(), (SmoothQuant(all_edges=True),)
        ),
        Calibration("pile", 128, 512, 42),
    ),
    "llmc/kv4": (Recipe(Scheme(None, kv=KV(4, 4, "group", 8)), RTN(), MinMaxClip()), None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_settings_are_the_papers(name: str) -> None:
    recipe, calibration = BY_HAND[name]
    assert resolve(f"papers/{name}") == LoadedRecipe(replace(recipe, name=f"papers/{name}"), calibration)


def test_every_entry_is_a_recipe_with_its_text(tmp_path: Path) -> None:
    for name in PAPERS:
        loaded = resolve(f"papers/{name}")
        assert loaded.recipe.name == f"papers/{name}"
        assert from_dict(to_dict(loaded.recipe, loaded.calibration)) == loaded
        assert loaded.recipe.calibrated == (loaded.calibration is not None)
        if loaded.calibration is not None:
            assert None not in vars(loaded.calibration).values()
            assert loaded.calibration.source in (*calibrate.NAMED, calibrate.GENERATED)
    file = tmp_path / "mine.yaml"
    file.write_text(show("papers/llmc/quarot-gptq-w4a4"), "utf-8")
    assert load_yaml(file) == resolve("papers/llmc/quarot-gptq-w4a4")


def test_names_are_unique_and_figures_complete() -> None:
    assert len(PAPERS) == sum(len(study.entries) for study in STUDIES)
    for study in STUDIES:
        assert re.search(r"arXiv \d{4}\.\d{5}|https://", study.source)
        for entry in study.entries.values():
            assert all(figure.model and figure.value and figure.data for figure in entry.figures)


def test_every_method_has_a_paper() -> None:
    used = {
        part.name
        for name in PAPERS
        for recipe in [resolve(f"papers/{name}").recipe]
        for part in (*recipe.transforms, recipe.round, *recipe.reconstruct, *recipe.correct)
    }
    assert used == {*TRANSFORMS, *ROUNDS, *RECONSTRUCTS, *CORRECTS}


def test_settings_may_be_changed() -> None:
    loaded = resolve("papers/gptq-w4g128", settings=["gptq.damp=0.1", "calibration.samples=16"])
    assert loaded.recipe.round == replace(GPTQ_CODE, damp=0.1)
    assert loaded.calibration == replace(C4, samples=16)


def test_an_unknown_paper_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError) as error:
        resolve("papers/gtpq-w4g128")
    nearest = "did you mean papers/gptq-w4g128? (`lowbit recipes` lists them)"
    assert str(error.value) == f"no paper's recipe is called 'papers/gtpq-w4g128': {nearest}"


def test_the_list_shows_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cut = lines.index("")
    assert lines[0].startswith("rtn-w8a16 ") and cut > 10
    assert [line.split()[0] for line in lines[cut + 2 :]] == [f"papers/{name}" for name in PAPERS]
    assert main(["recipes", "papers/kivi-kv2"]) == 0
    assert capsys.readouterr().out == show("papers/kivi-kv2")


def test_the_page_is_the_data() -> None:
    assert DOCS.read_text("utf-8") == page(), "write lowbit.recipes.papers.page() to docs/papers.md"
