"""The registry: one line per method, in the slot it fills, under the name that recipes, YAML and `--set` use."""

from __future__ import annotations

from .adadim import AdaDim
from .affinequant import AffineQuant
from .awq import AWQ, AWQClip
from .base import Clip, Correct, Encode, Reconstruct, Rotation, Round, Transform
from .billm import BiLLM
from .dbllm import DBLLM
from .dgq import DGQ
from .flatquant import FlatQuant
from .gptaq import GPTAQ
from .gptq import GPTQ
from .hqq import HQQ
from .imatrix import Imatrix
from .lkd import LKD, ZQGlobal, ZQLocal
from .llmint8 import LLMInt8
from .lorc import LoRC
from .magnitude import Magnitude
from .mse import MSEClip
from .normtweak import NormTweak
from .omniquant import OmniQuant
from .osplus import OSPlus
from .owq import OWQ
from .pbllm import PBLLM
from .quarot import QuaRot
from .quik import QUIK
from .quip import QuIP
from .quipsharp import QuIPSharp
from .rtn import RTN, MinMaxClip
from .signround import SignRound
from .smoothquant import SmoothQuant
from .sparsegpt import SparseGPT
from .spinquant import SpinQuant
from .spqr import SpQR
from .tesseraq import TesseraQ
from .wanda import Wanda

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
    "hqq": HQQ,
    "dgq": DGQ,
    "adadim": AdaDim,
}
ROUNDS: dict[str, type[Round]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "gptaq": GPTAQ,
}
ENCODES: dict[str, type[Encode]] = {
    "pbllm": PBLLM,
    "billm": BiLLM,
    "dbllm": DBLLM,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "spqr": SpQR,
    "quik": QUIK,
    "llmint8": LLMInt8,
    "owq": OWQ,
    "quip": QuIP,
    "quipsharp": QuIPSharp,
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
    "normtweak": NormTweak,
}
CORRECTS: dict[str, type[Correct]] = {
    "lorc": LoRC,
}
