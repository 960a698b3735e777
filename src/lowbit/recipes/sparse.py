"""Recipes of the papers that prune, and LLMC's runs of them: data for `papers`."""

from __future__ import annotations

from .document import Calibration
from .study import C4, LLAMA_2, LLAMA_3, PILE, Entry, Figure, Study, on

_LONG = "WikiText-2 at 4096 tokens, 16 bits 5.12"
_LARGE_2, _LARGE_3 = "LLaMA-2-70B", "LLaMA-3-70B"
_MODELS = (LLAMA_2, LLAMA_3, _LARGE_2, _LARGE_3)
_SWEEP = ("sparsegpt.damp=0.01", "sparsegpt.block=128")


def _both(*pairs: tuple[str, str]) -> tuple[Figure, ...]:
    """WikiText-2 and C4 of LLMC's four models."""
    found = zip(_MODELS, pairs, strict=True)
    return tuple(each for model, (wiki, c4) in found for each in (*on(model, wiki), *on(model, c4, data="C4")))


STUDIES = (
    Study(
        "Wanda",
        "arXiv 2306.11695",
        {
            "wanda-50": Entry("wanda50", on(LLAMA_2, 6.42, data=_LONG)),
            "wanda-2of4": Entry("wanda2:4", on(LLAMA_2, 11.02, data=_LONG)),
            "wanda-variant-50": Entry("wanda50", settings=("wanda.cumulative=true",), note="rows differ"),
            "wanda-magnitude-50": Entry("magnitude50", on(LLAMA_2, 14.89, data=_LONG), note="no calibration"),
            "wanda-magnitude-2of4": Entry("magnitude2:4", on(LLAMA_2, 54.59, data=_LONG), note="no calibration"),
            "wanda-sparsegpt-50": Entry("sparsegpt50", on(LLAMA_2, 6.51, data=_LONG)),
            "wanda-sparsegpt-2of4": Entry("sparsegpt2:4", on(LLAMA_2, 10.17, data=_LONG)),
        },
        C4,
    ),
    Study(
        "SparseGPT",
        "arXiv 2301.00774",
        {
            "sparsegpt-50": Entry("sparsegpt50", settings=_SWEEP),
            "sparsegpt-2of4": Entry("sparsegpt2:4", settings=_SWEEP[:1]),
            "sparsegpt-4of8": Entry("sparsegpt4:8", settings=_SWEEP[:1]),
            "sparsegpt-50-w4": Entry(
                "sparsegpt50-w4a16-asym", settings=_SWEEP, note="dropped and rounded in one sweep: 3 bits"
            ),
        },
        C4,
        "ranges of joint rounding are one for a row†; no figure is quoted",
    ),
    Study(
        "LLMC's Wanda",
        "arXiv 2405.06001",
        {
            "llmc/wanda-50-aligned": Entry(
                "wanda50",
                (*on(LLAMA_2, 6.91), *on(LLAMA_3, 9.58), *on(_LARGE_2, 4.19), *on(_LARGE_3, 5.75)),
                note="its alignment run; the authors' code gives 9.56 on LLaMA-3-8B",
                calibration=Calibration("pile", 512, 512, 42),
            ),
            "llmc/wanda-25": Entry(
                "wanda25", _both(("5.61", "7.46"), ("6.47", "10.01"), ("3.40", "5.76"), ("3.22", "7.44"))
            ),
            "llmc/wanda-50": Entry(
                "wanda50", _both(("6.85", "9.25"), ("9.68", "15.07"), ("4.17", "6.49"), ("5.81", "9.96"))
            ),
            "llmc/wanda-75": Entry(
                "wanda75", _both(("259.9", "260.4"), ("290", "337"), ("21.7", "32.5"), ("74.8", "94.0"))
            ),
        },
        PILE,
        "16 bits give 5.47 and 7.26, 6.13 and 9.44, 3.32 and 5.71, 2.85 and 7.16; a tenth depends on the text",
    ),
)
