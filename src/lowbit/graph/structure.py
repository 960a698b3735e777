"""Where the blocks are, which of them are alike, and whether two models have the same structure.

Blocks are compared by their module trees: classes, names, and the parameters that each module holds. Lists of identical
children (experts, per-head norms) count as one, since their number is a dimension like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..modules.experts import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Signature = tuple[Any, ...]


def signature(module: nn.Module) -> Signature:
    """The module tree as nested tuples; equal for modules that differ in dimensions only."""
    children = [(name, signature(child)) for name, child in _children(module)]
    if len(children) > 1 and _is_list(module) and len({child for _, child in children}) == 1:
        children = [("*", children[0][1])]
    held = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
    return type(module).__name__, held, tuple(children)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(module, Experts):
        return [(name, child) for name, child in module.named_children() if name == "0" or not name.isdigit()]
    return list(module.named_children())


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters below a module; of unfused experts, which are slices of one tensor, only the first one's."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for _, child in _children(module):
        yield from parameters(child)


def block_kinds(blocks: nn.ModuleList, config: PreTrainedConfig) -> list[Signature]:
    """What tells each block from the others: its module tree, and its layer type where the configuration names one."""
    types = getattr(config, "layer_types", None) or [None] * len(blocks)
    return [(signature(block), kind) for block, kind in zip(blocks, types, strict=False)]


def covering_prefix(kinds: list[Signature]) -> int:
    """Length of the shortest prefix that holds every kind, and two blocks where there are two."""
    return max(min(2, len(kinds)), max(kinds.index(kind) + 1 for kind in set(kinds)))


def find_layers(model: nn.Module, config: PreTrainedConfig) -> str:
    """Path of the list of decoder blocks: the outermost list with one module per layer.

    Raises ValueError where there is none.
    """
    for path, module in model.named_modules():
        if _is_list(module) and len(list(module.children())) == config.num_hidden_layers:
            return str(path)
    raise ValueError(f"No list of {config.num_hidden_layers} decoder blocks was found in {type(model).__name__}.")


def expert_lists(block: nn.Module) -> dict[str, int]:
    """Path -> number of children, for every list of experts: identical networks of several linears each."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            found[path] = len(module)
        elif _is_list(module):
            children = list(module.children())
            networks = all(len(list(child.children())) > 1 for child in children)
            if len(children) > 1 and networks and len({signature(child) for child in children}) == 1:
                found[path] = len(children)
    return found


def split_expert(name: str, lists: dict[str, int]) -> tuple[str, int, str] | None:
    """("mlp.experts", 3, "down_proj") for "mlp.experts.3.down_proj"; None for what is no part of an expert."""
    for path in lists:
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            if index.isdigit():
                return path, int(index), rest
    return None


def common_module(names: list[str]) -> str:
    """Path of the smallest module that holds all of `names`; "" is the block itself."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join(parts[0][:shared])
