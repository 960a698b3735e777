"""What every module of a block read and wrote in one forward pass, and replays of the block with all but one frozen.

"The same tensor" is decided by values, not by object identity: with random float64 data equal rows are the same rows,
and so views, casts, dropout and a router's gather of tokens are seen through without knowing of them. A replay runs the
block's own code with the output of every module that holds parameters nailed to its recorded value; changing one of
them, or the block's input, then shows what reaches whom directly, through nothing learned.

Shape letters: N rows (tokens, or the tokens routed to an expert), O output features, I input features, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """One module's call: its input as rows [N, I] and its output as it was returned."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Tensor
    output: Any

    def again(self) -> Any:
        """What the module returns now for the arguments that it was called with."""
        return self.module(*self.args, **self.kwargs)

    @property
    def rows(self) -> Tensor | None:
        """The output as rows [N, O]; None for a module that returns several tensors (a router)."""
        return as_rows(self.output) if isinstance(self.output, Tensor) else None


def as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def same(left: Tensor, right: Tensor) -> bool:
    """Both tensors hold the same rows in the same order."""
    return left.shape == right.shape and bool((left == right).all())


def gathers(rows: Tensor, source: Tensor) -> bool:
    """Every row of `rows` [N, I] is a row of `source` [M, I]: the same tensor, or some of its tokens."""
    if rows.shape[-1] != source.shape[-1] or not (source == rows[0]).all(1).any():
        return False
    return bool((rows[:, None] == source[None]).all(2).any(1).all())


def proportional(change: Tensor, direction: Tensor) -> bool:
    """Every row of `change` [N, D] is a multiple of `direction` [D], and not all are zero."""
    size = change.abs().max()
    factor = change @ direction / (direction @ direction)
    return bool(size > 0) and bool((change - factor[:, None] * direction).abs().max() <= 1e-9 * size)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _clone(value: Any) -> Any:
    """Copies that later in-place arithmetic of the model cannot reach."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(_clone(item) for item in value) if isinstance(value, (tuple, list)) else value


def _tensors(value: Any) -> set[int]:
    """Identities of the tensors that a container holds."""
    if isinstance(value, Tensor):
        return {id(value)}
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return {identity for item in items for identity in _tensors(item)}


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    """The modules below that hold parameters and no module that does: where the arithmetic with weights happens."""
    return {path: child for path, child in module.named_modules() if path and _is_leaf(child)}


def _is_leaf(module: nn.Module) -> bool:
    held = any(parameter is not None for parameter in module._parameters.values())
    return held and not any(True for child in module.children() for _ in child.parameters())


@contextmanager
def _hooked(modules: dict[str, nn.Module], hook: Callable[[Call], Any]) -> Iterator[None]:
    def bind(path: str) -> Callable[..., Any]:
        def forward_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            tensor = _first_tensor(args, kwargs)
            if tensor is None or not tensor.numel():
                return None
            return hook(Call(path, module, _clone(args), kwargs, as_rows(tensor).clone(), _clone(output)))

        return forward_hook

    handles = [module.register_forward_hook(bind(path), with_kwargs=True) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Trace:
    """One block's forward pass: its arguments, its modules' calls in order of execution, its output [B, T, D]."""

    block: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: dict[str, Call] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    held: dict[str, set[int]] = field(default_factory=dict)
    writes_state: str = ""
    """Name of an argument that the block leaves with other tensors in it than it found: state shared across blocks."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.held = {key: _tensors(value) for key, value in kwargs.items()}
        self.args, self.kwargs = tuple(_clone(value) for value in args), {k: _clone(v) for k, v in kwargs.items()}

    def leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.output = _first_output(output).clone()
        changed = [key for key, value in kwargs.items() if _tensors(value) != self.held[key]]
        self.writes_state = changed[0] if changed else ""

    def record(self, call: Call) -> None:
        if call.path in self.calls:
            self.repeated.add(call.path)
        self.calls[call.path] = call

    @property
    def hidden(self) -> Tensor:
        """The residual stream as the block receives it: its first floating argument, [B, T, D]."""
        return cast(Tensor, next(value for value in (*self.args, *self.kwargs.values()) if _floating(value)))

    def _arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        old = self.hidden
        args = tuple(hidden.clone() if value is old else value for value in self.args)
        return args, {key: hidden.clone() if value is old else value for key, value in self.kwargs.items()}

    def replay(
        self, hidden: Tensor | None = None, change: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Runs the block with every module's output frozen, except those in `change` (rows [N, O]) and its input.

        Returns what every module received, as rows, and the block's output, as rows.
        """
        received: dict[str, Tensor] = {}

        def freeze(call: Call) -> Any:
            received[call.path] = call.input
            recorded = self.calls[call.path].output
            if change and call.path in change:
                return change[call.path].reshape(recorded.shape).clone()
            return _clone(recorded)

        modules = {path: call.module for path, call in self.calls.items()}
        args, kwargs = self._arguments(self.hidden if hidden is None else hidden)
        with torch.no_grad(), _hooked(modules, freeze):
            output = self.block(*args, **kwargs)
        return received, as_rows(_first_output(output))


def _first_output(output: Any) -> Tensor:
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


def trace_model(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> tuple[list[Trace], dict[str, Call]]:
    """Runs the model on token ids [B, T]; returns a trace of every block, and the calls of the modules outside."""
    traces = [Trace(block) for block in blocks]
    inside = {id(module) for block in blocks for module in block.modules()}
    outer = Trace(model)
    with ExitStack() as stack, torch.no_grad():
        for trace in traces:
            stack.enter_context(_hooked(leaves(trace.block), trace.record))
            enter = trace.block.register_forward_pre_hook(trace.enter, with_kwargs=True)
            stack.callback(enter.remove)
            stack.callback(trace.block.register_forward_hook(trace.leave, with_kwargs=True).remove)
        outside = {path: module for path, module in leaves(model).items() if id(module) not in inside}
        stack.enter_context(_hooked(outside, outer.record))
        model(input_ids=tokens, use_cache=False)
    return traces, outer.calls
