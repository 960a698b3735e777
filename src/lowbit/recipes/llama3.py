"""Table 1 of the low-bit LLaMA3 study, row by row: data for `papers`, and for the benchmark that prints it again.

The study ran every method's public code, whose grids have zero-points; where it quantizes in groups, groups have 128
columns. Only the figures that could be checked stand here.
"""

from __future__ import annotations

from .study import GPTQ_CODE, LLAMA_3, WIKI, Entry, Figure, Study

_TEXTS = ("WikiText-2", "C4", "PTB")
PREFIX = "llama3/"
"""What the names of its rows begin with."""


def _triple(*values: float | str) -> tuple[Figure, ...]:
    return tuple(Figure(LLAMA_3, str(value), text) for value, text in zip(values, _TEXTS, strict=True))


def _uniform(method: str, *settings: str) -> dict[str, Entry]:
    """A method's rows: 4, 3 and 2 bits in groups, then 8, 4, 3 and 2 bits in whole rows."""
    words = {"gptq": "minmax+gptq"}.get(method, method)
    grouped = {f"{method}-w{b}g128": Entry(f"{words}-w{b}a16-g128-asym", (), settings) for b in (4, 3, 2)}
    return grouped | {f"{method}-w{b}": Entry(f"{words}-w{b}a16-asym", (), settings) for b in (8, 4, 3, 2)}


_PBLLM_CODE = ("scheme.weights.group=128", "pbllm.statistics=zeroed")
_ROWS = {
    **_uniform("rtn"),
    **_uniform("gptq", *GPTQ_CODE),
    **_uniform("awq"),
    "quip-w4": Entry("quip-w4a16", _triple(6.5, 11.1, 9.5)),
    "quip-w3": Entry("quip-w3a16", _triple(7.5, 11.3, 12.6)),
    "quip-w2": Entry("quip-w2a16", _triple(85.1, 130, 180)),
    "dbllm-w2g128": Entry("dbllm-w2a16-g128", _triple(13.6, 19.2, 23.8), note="without its distillation"),
    "pbllm-w2g128": Entry("pbllm-2", _triple(24.7, 79.2, 65.6), _PBLLM_CODE),
    "pbllm-w1.7g128": Entry("pbllm-1.7", _triple(41.8, 260, 120), _PBLLM_CODE),
    "billm-w1.1g128": Entry("billm", _triple(28.3, 290, 94.7), ("billm.compensation=paper",)),
    **{f"smoothquant-w{b}a{b}": Entry(f"smoothquant-w{b}a{b}") for b in (8, 6, 4)},
}

STUDIES = (
    Study(
        "The low-bit LLaMA3 study, Table 1",
        "arXiv 2404.14047",
        {f"{PREFIX}{name}": entry for name, entry in _ROWS.items()},
        WIKI,
        "perplexity of the 16-bit model 6.1 (WikiText-2), 9.2 (C4), 10.6 (PTB)",
    ),
)
"""In the order in which the table has them."""
