"""The registry: one line per method, in the slot it fills, under the name that recipes, YAML and `--set` use."""

from __future__ import annotations

from .awq import AWQ, AWQClip
from .base import Clip, Round, Transform
from .gptq import GPTQ
from .mse import MSEClip
from .rtn import RTN, MinMaxClip
from .smoothquant import SmoothQuant

TRANSFORMS: dict[str, type[Transform]] = {
    "smoothquant": SmoothQuant,
    "awq": AWQ,
}
CLIPS: dict[str, type[Clip]] = {
    "minmax": MinMaxClip,
    "mse": MSEClip,
    "awqclip": AWQClip,
}
ROUNDS: dict[str, type[Round]] = {
    "rtn": RTN,
    "gptq": GPTQ,
}
