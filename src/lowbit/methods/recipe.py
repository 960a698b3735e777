"""A recipe: a scheme and one part for every slot that takes part in reaching it, and what follows from the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..numerics.spec import BF16, Spec
from .base import Clip, Correct, Encode, LearnedRotation, Reconstruct, Rotation, Round, Transform
from .scheme import Override, Scheme
from .views import Need


@dataclass(frozen=True)
class Recipe:
    """A scheme and the steps that reach it. Frozen: compose with `dataclasses.replace`."""

    scheme: Scheme
    round: Round
    clip: Clip
    transforms: tuple[Rotation | Transform, ...] = ()
    name: str = ""
    reconstruct: tuple[Reconstruct, ...] = ()
    correct: tuple[Correct, ...] = ()
    encode: Encode | None = None

    def __post_init__(self) -> None:
        if self.encode is not None:
            self._check_encode(self.encode)
        for place, step in enumerate(self.transforms):
            if place and isinstance(step, Rotation):
                first = "keep one of them" if self.rotation else f"write {step.name} first"
                raise ValueError(f"{step.name} turns the whole model, once and before everything else: {first}")

    def _check_encode(self, encode: Encode) -> None:
        if self.round.name not in {"rtn", *encode.rounds}:
            others = f" or name {', '.join(sorted(encode.rounds))}" if encode.rounds else ""
            raise ValueError(f"{encode.name} does not round by {self.round.name}: drop {self.round.name}{others}")
        weights = self.scheme.weights
        if weights is not None and weights.number == BF16 and self.round.name != "rtn":
            name = self.round.name
            raise ValueError(f"{name} makes codes, and bf16 weights have none: drop {name}, or add for instance -w4a16")
        if not getattr(encode, "ranged", True) and self.clip.name != "minmax":
            raise ValueError(f"{encode.name} has no range that {self.clip.name} could choose: drop {self.clip.name}")
        recoding = [method.name for method in self.reconstruct if method.after and getattr(method, "recodes", True)]
        if recoding:
            raise ValueError(f"{recoding[0]} trains plain codes, and {encode.name} makes others: keep one of them")
        if encode.maps and self.correct:
            names = ", ".join(each.name for each in self.correct)
            raise ValueError(f"{names} corrects plain weights, and {encode.name} maps them: keep one of them")

    @property
    def sequential(self) -> bool:
        """Whether the inputs of a linear are observed behind those finished before it."""
        return self.round.sequential if self.encode is None else self.encode.sequential

    @property
    def _chooses(self) -> tuple[Clip | Round | Encode, ...]:
        """Who chooses ranges and codes."""
        return (self.clip, self.round) if self.encode is None else (self.clip, self.round, self.encode)

    @property
    def rotation(self) -> Rotation | None:
        """What turns the whole model, if anything does."""
        first = self.transforms[0] if self.transforms else None
        return first if isinstance(first, Rotation) else None

    @property
    def folds(self) -> tuple[Transform, ...]:
        """The transforms of single edges."""
        return tuple(step for step in self.transforms if isinstance(step, Transform))

    @property
    def needs(self) -> frozenset[Need]:
        """Every statistic that some part needs; static activation ranges need the inputs' extremes."""
        return self._needs_of(*self.transforms, *self._chooses, *self.reconstruct, *self.correct)

    def _needs_of(
        self, *parts: Rotation | Transform | Clip | Round | Encode | Reconstruct | Correct
    ) -> frozenset[Need]:
        static = any(spec is not None and not spec.dynamic for spec in self._activations())
        return frozenset().union(*(part.needs for part in parts), {"minmax"} if static else ())

    @property
    def rounding_needs(self) -> frozenset[Need]:
        """What a sequential Round observes at every stage of a block, for itself, clip and correction."""
        return self._needs_of(*self._chooses, *self.correct)

    @property
    def arrival_needs(self) -> frozenset[Need]:
        """What is observed of a block before anything is done to it: all, unless Round takes its own at every stage."""
        if not self.sequential:
            return self.needs
        return self._needs_of(*self.transforms, *self.reconstruct, *(self.correct if self.retrains else ()))

    @property
    def retrains(self) -> bool:
        """Whether Round's codes are not the last ones."""
        return any(method.after for method in self.reconstruct)

    @property
    def calibrated(self) -> bool:
        """Whether any text is needed."""
        static = self.scheme.kv is not None and self.scheme.kv.static
        return bool(self.needs or self.reconstruct) or isinstance(self.rotation, LearnedRotation) or static

    @property
    def float_stream(self) -> bool:
        """Whether the original model's hidden states are wanted beside the quantized one's."""
        return bool(self.reconstruct) or "cross" in self.needs

    @property
    def revisits_stats(self) -> bool:
        """Whether anything looks at the Gram matrices after rounding."""
        late: tuple[Reconstruct | Correct, ...]
        late = (*(method for method in self.reconstruct if method.after), *self.correct)
        return any("gram" in part.needs for part in late)

    def _activations(self) -> tuple[Spec | None, ...]:
        return (self.scheme.activations, *(override.activations for override in self.scheme.overrides))

    def ignoring(self, patterns: Sequence[str]) -> Recipe:
        """The same recipe with sites matching any of `patterns` kept in 16 bits."""
        kept = tuple(Override(pattern) for pattern in patterns)
        return replace(self, scheme=replace(self.scheme, overrides=self.scheme.overrides + kept))
