"""Recipes of papers that keep outliers in 16 bits (SpQR, QUIK, LLM.int8(), OWQ): data for `papers`."""

from __future__ import annotations

from .study import C4, Entry, Figure, Study

_INT8 = "weights: {format: int8}, activations: {format: int8, rule: asymmetric}"
_DOWN_8 = f"scheme.overrides=[{{pattern: '*.down_proj', {_INT8}}}]"

STUDIES = (
    Study(
        "SpQR",
        "arXiv 2306.03078",
        {
            "spqr-w3g16": Entry(
                "spqr-w3a16-g16", (Figure("1% of outliers", "3.95 bits per weight", "as the paper counts"),)
            ),
            "spqr-w4g16": Entry("spqr-w4a16-g16"),
        },
        C4,
        "text as GPTQ's†; outliers of a group are judged before its scales are quantized; no perplexity is quoted",
        ("spqr.tau=0.2", "spqr.damp=1.0", "spqr.act_order=true"),
    ),
    Study(
        "QUIK",
        "arXiv 2310.09259",
        {
            "quik-w4a4": Entry("quik-w4a4", note="fully in 4 bits, as for OPT"),
            "quik-w4a4-down8": Entry("quik-w4a4", settings=(_DOWN_8,), note="down projections in 8 bits, as for LLaMA"),
            "quik-w8a8": Entry("quik-w8a8"),
        },
        C4,
        "text recalled†; outliers of 256 in 4096 channels, as a part of any width; no figure is quoted",
        ("quik.columns=0.0625", "quik.threshold=0.0"),
    ),
    Study(
        "LLM.int8()",
        "arXiv 2208.07339",
        {
            "llmint8-w8a8": Entry("llmint8-w8a8"),
            "llmint8-w8a8-int8": Entry(
                "llmint8-w8a8", settings=("llmint8.weights=int8",), note="outliers meet dequantized columns"
            ),
        },
        None,
        "outliers are those of a call, all its windows together; no figure is quoted",
        ("llmint8.threshold=6.0",),
    ),
    Study(
        "OWQ",
        "arXiv 2306.02272",
        {
            "owq-w3": Entry("owq-w3a16-asym", settings=("owq.bits=3.01",)),
            "owq-w4": Entry("owq-w4a16-asym", settings=("owq.bits=4.01",)),
            "owq-w3-3.1": Entry("owq-w3a16-asym", settings=("owq.bits=3.1",)),
        },
        C4,
        "text as GPTQ's†; ranges are searched for least output error; no figure is quoted",
    ),
)
