"""The parts of any decoder: a skeleton without weights, an anatomy found and proved, and folding along its edges."""

from .anatomy import Anatomy, BlockAnatomy, Edge, Heads, Norm, Rotations, Rows, Site, Tap
from .describe import describe
from .discover import discover
from .fold import apply_scale, apply_shift, reader_channels
from .prove import prove
from .skeleton import build_skeleton, transposed_parameters, unfuse_experts, unfused_parameters

__all__ = [
    "Anatomy",
    "BlockAnatomy",
    "Edge",
    "Heads",
    "Norm",
    "Rotations",
    "Rows",
    "Site",
    "Tap",
    "apply_scale",
    "apply_shift",
    "build_skeleton",
    "describe",
    "discover",
    "prove",
    "reader_channels",
    "transposed_parameters",
    "unfuse_experts",
    "unfused_parameters",
]
