"""What a quantized model is, apart from how it is reached: number formats, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..numerics.kv import KV
from ..numerics.spec import Spec


@dataclass(frozen=True)
class Override:
    """Formats for the sites whose full name matches `pattern` (shell wildcards); None keeps 16 bits."""

    pattern: str
    weights: Spec | None = None
    activations: Spec | None = None


@dataclass(frozen=True)
class Scheme:
    """What the result is: number formats of weights, of the activations in front of them, of cached keys and values."""

    weights: Spec | None
    activations: Spec | None = None
    overrides: tuple[Override, ...] = ()
    kv: KV | None = None

    def formats(self, name: str) -> tuple[Spec | None, Spec | None]:
        """(weight, activation) formats of the site of this full name; the last matching override wins."""
        for override in reversed(self.overrides):
            if fnmatchcase(name, override.pattern):
                return override.weights, override.activations
        return self.weights, self.activations
