"""What an entry of `papers` is made of, and the words that several studies share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .document import Calibration

WIKITEXT = "WikiText-2"


@dataclass(frozen=True)
class Figure:
    """A published result: which model, on what, and the number as it was printed."""

    model: str
    value: str
    data: str = WIKITEXT


@dataclass(frozen=True)
class Entry:
    """One recipe: a name of the grammar, its figures, what `--set` changes, a remark of its own."""

    base: str
    figures: tuple[Figure, ...] = ()
    settings: tuple[str, ...] = ()
    note: str = ""
    calibration: Calibration | None = None
    """Where it is not that of the study."""


@dataclass(frozen=True)
class Study:
    """What the recipes of one paper share: the source of its figures, its text, and what lowbit does otherwise."""

    title: str
    source: str
    entries: Mapping[str, Entry]
    calibration: Calibration | None = None
    note: str = ""
    settings: tuple[str, ...] = ()
    """Settings of every entry, in front of its own."""


def on(model: str, *values: float | str, data: str = WIKITEXT) -> tuple[Figure, ...]:
    """Figures of one model; numbers whose last digit is 0 are given as they were printed."""
    return tuple(Figure(model, str(value), data) for value in values)


LLAMA_2, LLAMA_3 = "LLaMA-2-7B", "LLaMA-3-8B"
MEAN = "mean of WikiText-2, PTB, C4"
BOTH = "mean of WikiText-2, C4"
GPTQ_CODE = ("gptq.act_order=true", "gptq.groups=stale", "gptq.true_sequential=true")
GPTQ_ROWS = ("gptq.act_order=false", "gptq.true_sequential=true")
ASYMMETRIC_INPUTS = "scheme.activations.rule=asymmetric"
ZERO_POINTS = "scheme.kv.rule=zero-point"
C4 = Calibration("c4", 128, 2048, 0)
WIKI = Calibration("wikitext2", 128, 2048, 0)
PILE = Calibration("pile", 128, 512, 42)


def small(smollm: float | str, qwen: float | str) -> tuple[Figure, ...]:
    """Figures of LLMC's tables of small models."""
    return (*on("SmolLM-135M", smollm), *on("Qwen2-0.5B", qwen))
