"""Recipes of papers that round behind rotations of every linear's own (QuIP, QuIP#): data for `papers`."""

from __future__ import annotations

from .study import C4, Entry, Figure, Study

_STUDY = "arXiv 2404.14047"
_70B = tuple(
    Figure("LLaMA-3-70B", value, text) for value, text in (("13.0", "WikiText-2"), ("22.2", "C4"), ("24.9", "PTB"))
)

STUDIES = (
    Study(
        "QuIP",
        f"arXiv 2307.13304; figures from the low-bit LLaMA3 study ({_STUDY})",
        {
            "quip-w4": Entry("quip-w4a16"),
            "quip-w3": Entry("quip-w3a16"),
            "quip-w2": Entry("quip-w2a16", _70B, note="LLaMA-3-8B is `papers/llama3/quip-w2`"),
            "quip-rg-w2": Entry(
                "quip-w2a16", settings=("quip.rounding=rg", "quip.passes=10"), note="the variant LDLQ-RG; passes†"
            ),
        },
        C4,
        "text as GPTQ's†; columns go from the first to the last, which behind a random rotation is as good; the range "
        "and D are stored in fp16",
        ("quip.rho=2.4", "quip.damp=0.01"),
    ),
    Study(
        "QuIP#",
        "arXiv 2402.04396",
        {
            "quipsharp-w4": Entry("quipsharp-w4a16"),
            "quipsharp-w3": Entry("quipsharp-w3a16"),
            "quipsharp-w2": Entry("quipsharp-w2a16"),
        },
        C4,
        "C4 stands for the paper's longer text†; without its fine-tuning; the 15 longer vectors of the 256 in E8 are "
        "others†; no figure is quoted",
        ("quipsharp.sweeps=10", "quipsharp.damp=0.01"),
    ),
)
