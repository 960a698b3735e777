"""The compatibility table of docs/formats.md: what a recipe asks for, against what every export format can carry.

Nothing here knows a format: each is asked by its own `refuse` and `refuse_whole`, with the very words that `--target`
would refuse a run with. `--write` puts the table into the page; tests/test_formats_table.py fails when it is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit import recipes
from lowbit.formats.base import INSTEAD, Format, modules, narrowed, refuse_encoded
from lowbit.numerics.kv import KV
from lowbit.numerics.spec import E4M3, Spec, per_block

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- made by scripts/formats_table.py, not by hand -->", "<!-- end of what is made -->"

SQUARES = per_block(E4M3, 128), Spec(E4M3, (1, 128), "float32", dynamic=True)
"""DeepSeek-V3's weights and inputs, which no recipe name says."""


_REFUSED = re.compile(r", not [^:]*(?=: )")
"""What a sentence says of the one format that it refuses."""


@dataclass(frozen=True)
class Feature:
    """One row: what is asked for, by a recipe's name where it has one."""

    title: str
    recipe: str = "w4a16-g128"
    formats: tuple[Spec, Spec] | None = None
    ordered: bool = False
    mapped: bool = False
    transposed: bool = False
    corrected: bool = False
    kv: KV | None = None

    def refusal(self, name: str, form: Format) -> str | None:
        """Why the format of this name cannot carry it, or None."""
        recipe = recipes.resolve(self.recipe).recipe
        scheme, encode = recipe.scheme, recipe.encode
        reason = form.refuse_whole(kv=self.kv or scheme.kv, corrected=self.corrected)
        if reason is None and encode is not None:
            reason = refuse_encoded(name, form, encode.name)
            reason = reason and reason.replace(name, "the format").replace(encode.name, "the method")
        if reason is not None:
            return reason
        weights, inputs = self.formats or (scheme.weights, scheme.activations)
        how = {"transposed": self.transposed, "ordered": self.ordered, "mapped": self.mapped}
        reason = form.refuse(narrowed(form, weights), inputs, shape=(4096, 4096), **how)
        return None if reason is None else general(reason, weights, inputs)


def general(reason: str, *specs: Spec | None) -> str:
    """A refusal without the very format that was refused, which the row says already: one note for many rows."""
    reason = _REFUSED.sub("", reason)
    for spec in specs:
        reason = reason if spec is None else reason.replace(str(spec), "this")
    return reason


def named(*names: str) -> list[Feature]:
    """Rows of recipes."""
    return [Feature(f"`{name}`", name) for name in names]


SECTIONS: dict[str, list[Feature]] = {
    "integer weights": [
        *named("w4a16-g128", "w4a16-g128-asym", "w4a16-g32", "w4a16-g32-asym", "w4a16", "w8a16-g128", "w8a16"),
        *named("w8a16-g32", "w5a16-g32", "w6a16-g128", "w3a16-g128", "w2a16-g64", "w2a16-g64-asym"),
        Feature("`w4a16-g128`, act-order with groups fitted on the way", ordered=True),
    ],
    "llama.cpp's K-quants": named("q2k", "q3k", "q4k", "q5k", "q6k"),
    "float weights": named("wfp8a16", "nvfp4a16", "mxfp4a16", "mxfp6a16", "mxfp8a16", "nf4-g64", "nf4-g64-double"),
    "quantized inputs": [
        *named("w8a8", "w8a8-static", "w4a8-g128", "w4a4", "fp8", "fp8-static", "wfp4afp8-g128"),
        *named("nvfp4", "nvfp4-static", "mxfp4", "mxfp8"),
        Feature("FP8 in squares of 128, inputs in groups of 128", formats=SQUARES),
    ],
    "keys and values": [
        *named("w4a16kv8-g128", "w4a16kv4-g128"),
        Feature("E4M3 cache with one calibrated range", kv=KV(8, 8, layout="tensor", rule="e4m3")),
    ],
    "what weights are made of": [
        Feature("pruned, in 16 bits (`wanda50`, `sparsegpt2:4`)", "wanda50"),
        Feature("pruned, with codes (`wanda50+gptq-w4a16-g128`)", "wanda50+gptq-w4a16-g128"),
        Feature("some entries or channels in 16 bits (`spqr`, `owq`, `quik`, `llmint8`)", "owq-w4a16-g128"),
        Feature("one bit here, more there (`pbllm`, `billm`, `dbllm`)", "billm"),
        Feature("codes behind maps on both sides (`quip`, `quipsharp`)", "quip-w4a16"),
    ],
    "what methods add": [
        Feature("a low-rank or other correction (`lorc`)", corrected=True),
        Feature("an online map of inputs (`quarot.down=true`, `flatquant`)", mapped=True),
        Feature("weights stored [in, out] (GPT-2's Conv1D)", transposed=True),
    ],
}


def render() -> str:
    """The table and its notes, as Markdown."""
    forms = list(modules())
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(name for name, _ in forms)} |", "|---|" + "---|" * len(forms)]
    lines.append(f"| read by | {' | '.join(', '.join(form.CLIENTS) for _, form in forms)} |")
    for title, features in SECTIONS.items():
        lines.append(f"| **{title}** |{' |' * len(forms)}")
        lines += [f"| {feature.title} | {' | '.join(_cells(feature, forms, notes))} |" for feature in features]
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    lines += [f"`--format {name}` is refused: {reason}." for name, reason in INSTEAD.items()]
    return "\n".join(lines)


def _cells(feature: Feature, forms: Sequence[tuple[str, Format]], notes: dict[str, int]) -> list[str]:
    found = []
    for name, form in forms:
        reason = feature.refusal(name, form)
        found.append("yes" if reason is None else f"({notes.setdefault(reason, len(notes) + 1)})")
    return found


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text("utf8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), "utf8")
    else:
        print(render())
