"""A mixture's experts as ordinary linears, one small feed-forward network per expert.

Newer transformers keep a layer's experts in bare 3-D parameters run by a grouped matmul, which no hook on a linear ever
sees. `Experts` holds the same weights as one `nn.Linear` per expert and projection, so that statistics, rounding and
replacement work as they do everywhere else. The gating rule stays the original module's own: it differs by family, and
a second copy of it would go stale. A loop over the experts that were hit is slower than a grouped matmul, but it is
exact, it needs no kernel, and calibration time is spent elsewhere.

Shape letters: N tokens, D model width, F feed-forward width, E experts, R routes per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def is_fused(module: nn.Module) -> bool:
    """True for a module that keeps all experts of a layer in 3-D parameters and says how they are laid out."""
    flags = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "num_experts"))
    return flags and not isinstance(module, Experts) and getattr(module, "down_proj", torch.empty(0)).ndim == 3


def _linear(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    """A linear around existing tensors. `nn.Linear(...)` draws random weights: seconds for 30 000 of them."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    for name, value in (("weight", weight), ("bias", bias)):
        linear.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trainable))
    return linear


class Expert(nn.Module):
    """One expert: `gate_up_proj` (or `up_proj` where there is no gate), the activation, `down_proj`."""

    def __init__(self, first: str, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.first = first
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, hidden_states: Tensor, activation: Activation) -> Tensor:
        """[N, D] -> [N, D]."""
        inner = activation(self.get_submodule(self.first)(hidden_states))
        return cast(Tensor, self.get_submodule("down_proj")(inner))


class Experts(nn.Module):
    """Drop-in for a fused experts module: children "0", "1", … are the experts, so names read `experts.3.down_proj`."""

    def __init__(self, fused: nn.Module) -> None:
        """Takes over `fused`'s weights as views (no copies); `fused` itself is left as it was."""
        super().__init__()
        assert is_fused(fused), f"{type(fused).__name__} keeps no fused experts"
        self.transposed = bool(fused.is_transposed)
        self.biased = bool(fused.has_bias)
        self.projections = ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")
        stacked = {name: cast(nn.Parameter, getattr(fused, name)) for name in self.projections}
        for index in range(stacked["down_proj"].shape[0]):
            linears = {}
            for name, parameter in stacked.items():
                weight = parameter.detach()[index]
                bias = getattr(fused, f"{name}_bias").detach()[index] if self.biased else None
                linears[name] = _linear(weight.T if self.transposed else weight, bias, parameter.requires_grad)
            self.add_module(str(index), Expert(self.projections[0], linears))
        self.num_experts = stacked["down_proj"].shape[0]
        for name, child in fused.named_children():
            self.add_module(name, child)
        # The original without its weights, kept out of the module tree: it only lends its gating rule.
        rule = copy.copy(fused)
        rule._parameters = {}
        self.__dict__["rule"] = rule

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> Expert:
        return cast(Expert, self.get_submodule(str(index)))

    def fused_names(self) -> dict[str, tuple[str, ...]]:
        """Name of each fused parameter -> names of the parameters that hold its slices, expert by expert."""
        names = {}
        for projection in self.projections:
            names[projection] = tuple(f"{index}.{projection}.weight" for index in range(len(self)))
            if self.biased:
                names[f"{projection}_bias"] = tuple(f"{index}.{projection}.bias" for index in range(len(self)))
        return names

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routes tokens [N, D] by expert numbers and weights [N, R]; the sum over routes is taken in at least fp32.

        Tokens are sorted by expert once, so an expert works on a slice, and outputs go back to places of their own:
        nothing is added up in an order that changes from run to run. Numbers beyond the last expert are no routes.
        """
        rule = self.__dict__["rule"]
        activation: Activation = rule._apply_gate if self.projections[0] == "gate_up_proj" else rule.act_fn
        norm = getattr(self, "post_expert_norm", None)
        routes, width = top_k_index.reshape(-1), top_k_index.shape[-1]
        counts = torch.bincount(routes, minlength=len(self)).tolist()[: len(self)]
        order = routes.argsort(stable=True)[: sum(counts)]
        if not len(order):
            return torch.zeros_like(hidden_states)
        slices = hidden_states[order // width].split(counts)
        output = torch.cat([self[index](x, activation) for index, x in enumerate(slices) if len(x)])
        output = (output if norm is None else norm(output)) * top_k_weights.reshape(-1)[order, None]
        placed = output.new_zeros(len(routes), output.shape[-1])
        placed[order] = output
        total = placed.unflatten(0, (-1, width)).sum(1, dtype=torch.promote_types(output.dtype, torch.float32))
        return total.to(hidden_states.dtype)
