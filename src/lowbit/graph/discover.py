"""Discovers the anatomy of any decoder from its configuration, and proves it before anyone uses it.

A small random double of the model (`probe.py`) is run once and every kind of block in it is surveyed (`survey.py`):
what is a linear, who reads the same tensor, which output scales which input. Every edge found so must then leave the
logits of the whole double unchanged under a random map (`prove.py`), and what passes is written down for the real
dimensions (`write.py`). No weights are read, and no family is known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import nn

from .anatomy import Anatomy, BlockAnatomy, Heads, Norm, Rotations
from .fold import apply_scale, apply_shift, scale_source
from .probe import DoublePrecision, head_counts, matching_probe, prompts
from .prove import UNCHANGED, Place, Prover, by_kind, may_shift
from .refuse import refuse_family, refuse_hidden_weights, refuse_looking_ahead, refuse_shared_weights, refuse_stream
from .rotations import find_rotations
from .skeleton import build_skeleton
from .structure import Signature, block_kinds, find_layers, parameters
from .survey import Link, Survey, measure_norm, survey
from .trace import gathers, trace_model
from .write import Writer, write

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def discover(
    config: PreTrainedConfig, skeleton: PreTrainedModel | None = None, *, trust_remote_code: bool = False
) -> Anatomy:
    """The proved anatomy of a model, from its configuration alone.

    Args:
        skeleton: the model as `build_skeleton` made it, if it is at hand.

    Raises:
        ValueError: no causal decoder, state shared across blocks, or something essential that could not be proved.
    """
    refuse_family(config)
    if skeleton is None:
        skeleton = build_skeleton(config, trust_remote_code=trust_remote_code)
    layers = find_layers(skeleton, config)
    blocks = cast(nn.ModuleList, skeleton.get_submodule(layers))
    refuse_shared_weights(blocks, config.model_type)
    kinds = block_kinds(blocks, config)
    probe = matching_probe(config, kinds, layers, trust_remote_code)
    with DoublePrecision():
        discovery = _Discovery(probe, layers, kinds)
        discovery.prove()
        return discovery.write(config, skeleton)


class _Discovery:
    """A probe, its traces, and a survey of every kind of block in it."""

    def __init__(self, probe: PreTrainedModel, layers: str, kinds: list[Signature]) -> None:
        self.probe, self.layers, self.kinds = probe, layers, kinds
        self.family = probe.config.model_type
        self.blocks = cast(nn.ModuleList, probe.get_submodule(layers))
        self.heads = head_counts(probe.config)
        tokens = prompts(probe)
        self.traces, self.outer = trace_model(probe, self.blocks, tokens)
        refuse_stream(self.traces, self.family)
        self.prover = Prover(probe, tokens)
        refuse_looking_ahead(self.prover, self.family)
        self.surveys: dict[Signature, Survey] = {}
        for kind, trace in zip(kinds, self.traces, strict=False):
            if kind not in self.surveys:
                self.surveys[kind] = survey(trace, self.heads)
                refuse_hidden_weights(self.surveys[kind], trace, self.family)
        self.proofs: dict[str, float] = {}

    def _places(self) -> list[tuple[Survey, Link, Place]]:
        """Every link of every block of the probe, written down as edges; one link is many edges in a mixture."""
        return [
            (self.surveys[kind], link, (block, edge))
            for kind, block in zip(self.kinds, self.blocks, strict=False)
            for link, edge in Writer(self.surveys[kind], block, self.heads).edges()
        ]

    def prove(self) -> None:
        """Refuses the links that fail, marks those that can be shifted, and fills `proofs` with what passed."""
        changes = self.prover.change
        places = self._places()
        kinds = by_kind([place for *_, place in places])
        suspects = {name for name, those, _ in kinds if changes(those, apply_scale) > UNCHANGED}
        for found, link, (block, edge) in places:
            if edge.kind in suspects and changes([(block, edge)], apply_scale) > UNCHANGED:
                found.refuse(link, "the proof failed: a scale on it changes the logits")
        for found, link, place in self._samples():
            if changes([place], scale_source) <= UNCHANGED:
                found.refuse(link, "the proof is empty: a scale on the source alone changes nothing")
        for found, link, place in self._samples():
            if may_shift(place[1]) and changes([place], apply_shift) <= UNCHANGED:
                found.links[found.links.index(link)] = replace(link, shift=True)
        kinds = by_kind([place for *_, place in self._places()])
        self.proofs = {name: changes(those, fold) for name, those, fold in kinds}
        assert all(change <= UNCHANGED for change in self.proofs.values()), self.proofs

    def _samples(self) -> Iterator[tuple[Survey, Link, Place]]:
        """Every link once: in the first block of its kind, and for the expert that stands for all."""
        seen: set[tuple[int, str]] = set()
        for found, link, place in self._places():
            if (id(found), link.name) not in seen and place[1].name == link.name:
                seen.add((id(found), link.name))
                yield found, link, place

    def write(self, config: PreTrainedConfig, skeleton: PreTrainedModel) -> Anatomy:
        """The anatomy of the real model; blocks that are alike share one description."""
        written: dict[object, BlockAnatomy] = {}
        parts = []
        for kind, block in zip(self.kinds, cast(nn.ModuleList, skeleton.get_submodule(self.layers)), strict=True):
            like = (kind, tuple(parameter.shape for parameter in parameters(block)))
            if like not in written:
                written[like] = write(self.surveys[kind], block, head_counts(config))
            parts.append(written[like])
        names = {id(module): path for path, module in skeleton.named_modules()}
        embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
        anatomy = Anatomy(
            family=self.family,
            layers=self.layers,
            embedding=names[id(embedding)],
            head=names[id(head)],
            final_norm=self._final_norm(names[id(head)]),
            tied=head.weight is embedding.weight,
            heads=_heads(parts, config),
            blocks=tuple(parts),
            proofs=self.proofs,
        )
        rotations = self._rotations(anatomy)
        if rotations.heads:
            mixed = {id(part): replace(part, head_width=anatomy.heads.width) for part in parts}
            anatomy = replace(anatomy, blocks=tuple(mixed[id(part)] for part in parts))
        return replace(anatomy, rotations=rotations)

    def _rotations(self, anatomy: Anatomy) -> Rotations:
        """What may be rotated. It comes last: the probe is rotated for it and stays so."""
        kinds = zip(self.kinds, self.blocks, strict=False)
        parts = tuple(write(self.surveys[kind], block, self.heads) for kind, block in kinds)
        return find_rotations(self.probe, replace(anatomy, blocks=parts), self.outer, self.prover.tokens)

    def _final_norm(self, head: str) -> Norm | None:
        """The norm between the last block and the head."""
        stream = self.traces[-1].output.reshape(-1, self.traces[-1].output.shape[-1])
        for call in self.outer.values():
            if call.path != head and gathers(call.input, stream) and (norm := measure_norm(call)):
                return norm
        return None


def _heads(parts: list[BlockAnatomy], config: PreTrainedConfig) -> Heads:
    """Head geometry: from V's rows where a block shows them, else as the configuration states it."""
    query, key_value = head_counts(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // query
    return next((part.heads for part in parts if part.heads), Heads(query, key_value, width))
