"""Recipes of papers that make weights binary, wholly or for the most part (PB-LLM, BiLLM): data for `papers`."""

from __future__ import annotations

from .study import WIKI, Entry, Figure, Study

_SOURCE = "figures from the low-bit LLaMA3 study (arXiv 2404.14047)"


def _70b(*values: str) -> tuple[Figure, ...]:
    return tuple(Figure("LLaMA-3-70B", v, text) for v, text in zip(values, ("WikiText-2", "C4", "PTB"), strict=True))


STUDIES = (
    Study(
        "PB-LLM",
        f"arXiv 2310.00034; {_SOURCE}",
        {
            "pbllm-2": Entry(
                "pbllm-2", _70b("11.6", "34.5", "27.2"), note="LLaMA-3-8B is `papers/llama3/pbllm-w2g128`"
            ),
            "pbllm-1.7": Entry(
                "pbllm-1.7", _70b("18.6", "65.2", "55.9"), note="LLaMA-3-8B is `papers/llama3/pbllm-w1.7g128`"
            ),
        },
        WIKI,
        "salient weights have the ranges of whole rows; means and spreads as in the authors' code; without training",
        ("pbllm.saliency=hessian", "pbllm.statistics=zeroed", "scheme.weights.group=128"),
    ),
    Study(
        "BiLLM",
        f"arXiv 2402.04291; {_SOURCE}",
        {
            "billm": Entry("billm", _70b("17.1", "77.7", "54.2"), note="LLaMA-3-8B is `papers/llama3/billm-w1.1g128`"),
        },
        WIKI,
        "searches and compensation as in the authors' code",
        ("billm.searched=saliency", "billm.most=49", "billm.compensation=paper"),
    ),
)
