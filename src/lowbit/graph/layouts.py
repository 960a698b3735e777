"""Where the rows that matter lie in a fused projection, as formulas of the dimensions.

A layout found on the small probe must hold for the real model, so it is kept as a name and computed again for the real
shapes instead of being scaled up from indices. All known layouts are cuts of [groups, period]: one span per group.
"""

from __future__ import annotations

from functools import lru_cache

Layout = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
"""(row index or None for all rows, source channel of every reader channel or None for the same)."""


def _cut(groups: int, period: int, offset: int, span: int) -> tuple[int, ...]:
    """Rows offset … offset + span of every group of `period` rows."""
    return tuple(group * period + offset + row for group in range(groups) for row in range(span))


@lru_cache(maxsize=256)
def elementwise_layouts(outputs: int, inputs: int) -> dict[str, Layout]:
    """Ways in which `inputs` reader channels may be rows of an up projection: `outputs` rows, perhaps gate and up."""
    if outputs == inputs:
        return {"all rows": (None, None)}
    if outputs != 2 * inputs:
        return {}
    return {
        "first half": (_cut(1, outputs, 0, inputs), None),
        "last half": (_cut(1, outputs, inputs, inputs), None),
        "even rows": (_cut(inputs, 2, 0, 1), None),
        "odd rows": (_cut(inputs, 2, 1, 1), None),
    }


@lru_cache(maxsize=256)
def value_layouts(outputs: int, inputs: int, query: int, key_value: int) -> dict[str, Layout]:
    """Ways in which V may lie in a projection with `outputs` rows, read by an output projection of `inputs` columns.

    V is repeated for the query heads of its group. It lies either in one piece (Phi-3, GPT-2, old Falcon) or per
    key-value head, beside its queries and its key (BLOOM, GPT-NeoX, new Falcon, DeepSeek's kv_b_proj).
    """
    layouts: dict[str, Layout] = {}
    if inputs % query:
        return layouts
    width = inputs // query
    for label, heads in (("query", query), ("key-value", key_value), ("one", 1)):
        if query % heads or heads * width > outputs:
            continue
        repeat = query // heads
        channels = None
        if repeat > 1:
            channels = tuple(j // (width * repeat) * width + j % width for j in range(inputs))
        if heads * width == outputs:
            layouts[f"{label} heads, all rows"] = (None, channels)
            continue
        for name, groups in (("in one piece", 1), ("per head", heads)):
            if outputs % groups:
                continue
            period, span = outputs // groups, heads * width // groups
            offsets = {"first": 0, "last": period - span, "after queries": inputs // groups, "after keys": span}
            for place, offset in offsets.items():
                if offset + span <= period:
                    layouts[f"{label} heads, {name}, {place}"] = (_cut(groups, period, offset, span), channels)
    return layouts
