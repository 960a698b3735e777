"""The registry: one line per method, in the slot it fills, under the name that recipes, YAML and `--set` use."""

from __future__ import annotations

from .affinequant import AffineQuant
from .awq import AWQ, AWQClip
from .base import Clip, Correct, Reconstruct, Rotation, Round, Transform
from .flatquant import FlatQuant
from .gptaq import GPTAQ
from .gptq import GPTQ
from .imatrix import Imatrix
from .lkd import LKD, ZQGlobal, ZQLocal
from .lorc import LoRC
from .mse import MSEClip
from .omniquant import OmniQuant
from .osplus import OSPlus
from .quarot import QuaRot
from .rtn import RTN, MinMaxClip
from .signround import SignRound
from .smoothquant import SmoothQuant
from .spinquant import SpinQuant
from .tesseraq import TesseraQ

TRANSFORMS: dict[str, type[Rotation] | type[Transform]] = {
    "quarot": QuaRot,
    "spinquant": SpinQuant,
    "smoothquant": SmoothQuant,
    "awq": AWQ,
    "osplus": OSPlus,
}
CLIPS: dict[str, type[Clip]] = {
    "minmax": MinMaxClip,
    "mse": MSEClip,
    "awqclip": AWQClip,
    "imatrix": Imatrix,
}
ROUNDS: dict[str, type[Round]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "gptaq": GPTAQ,
}
RECONSTRUCTS: dict[str, type[Reconstruct]] = {
    "flatquant": FlatQuant,
    "omniquant": OmniQuant,
    "affinequant": AffineQuant,
    "signround": SignRound,
    "tesseraq": TesseraQ,
    "lkd": LKD,
    "zqglobal": ZQGlobal,
    "zqlocal": ZQLocal,
}
CORRECTS: dict[str, type[Correct]] = {
    "lorc": LoRC,
}
