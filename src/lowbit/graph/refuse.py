"""What cannot be quantized block by block, refused in one sentence before anything else is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .families import SHARED_STATE
from .prove import UNCHANGED, Prover
from .structure import parameters
from .survey import Survey
from .trace import Trace
from .write import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ONE_BY_ONE = "so its blocks cannot be quantized one by one"


def refuse_family(config: PreTrainedConfig) -> None:
    """Raises ValueError for what a configuration alone gives away."""
    for attribute in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if not isinstance(getattr(config, attribute, None), int):
            raise ValueError(f"{config.model_type} is no plain decoder: its configuration states no {attribute}.")
    for attribute, sharing in SHARED_STATE.items():
        if getattr(config, attribute, None):
            raise ValueError(f"{config.model_type} {sharing} ({attribute}), {ONE_BY_ONE}.")


def refuse_shared_weights(blocks: nn.ModuleList, family: str) -> None:
    """Raises ValueError where two blocks hold the same parameter."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in parameters(block):
            if owner.setdefault(id(parameter), index) != index:
                raise ValueError(f"{family} uses the same weights in several blocks, {ONE_BY_ONE}.")


def refuse_stream(traces: list[Trace], family: str) -> None:
    """Raises ValueError where blocks pass on anything but one hidden state [B, T, D]."""
    for trace in traces:
        if trace.output.ndim != 3 or trace.hidden.shape != trace.output.shape:
            raise ValueError(f"{family} passes more than one hidden state from block to block, {ONE_BY_ONE}.")
        if trace.writes_state:
            raise ValueError(f"{family} shares state across blocks ({trace.writes_state}), {ONE_BY_ONE}.")
        if trace.repeated:
            raise ValueError(
                f"{family} runs {sorted(trace.repeated)[0]} more than once in a block, which is not supported."
            )


def refuse_looking_ahead(prover: Prover, family: str) -> None:
    """Raises ValueError where a later token changes earlier logits."""
    changed = prover.tokens.clone()
    changed[:, -1] = changed[:, -1] - 1
    difference = (Prover(prover.model, changed).logits - prover.logits)[:, :-1].abs().max()
    if difference > UNCHANGED * prover.logits.abs().max():
        raise ValueError(f"{family} is not a causal decoder: later tokens change earlier logits.")


def refuse_hidden_weights(found: Survey, trace: Trace, family: str) -> None:
    """Raises ValueError where more than half of a block's weights are not the weights of a linear that was seen."""
    names = Writer(found, trace.block, (1, 1)).names
    seen = {f"{name}.weight" for site in found.transposed for name in names(site)}
    sizes = {name: parameter.numel() for name, parameter in trace.block.named_parameters()}
    hidden = {name: size for name, size in sizes.items() if name not in seen}
    if 2 * sum(hidden.values()) > sum(sizes.values()):
        largest = max(hidden, key=lambda name: hidden[name])
        raise ValueError(f"{family} cannot be used: {largest} could not be proved to be the weight of a linear.")
