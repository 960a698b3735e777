"""The model without its weights: every parameter on the meta device, every buffer real.

transformers can build a model wholly on meta, but then rotary frequencies, masks and slopes are gone too and would have
to be recomputed family by family. Here only parameters are caught: uninitialised memory (`torch.empty`, which is how
large parameters are born) goes to meta at once, and whatever else is registered as a parameter follows. Buffers are
computed by the model's own code as always. A skeleton of 671 billion parameters takes seconds and little memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowbit.modules.experts import Experts, is_fused

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


BUILD_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError, ImportError)
"""What model code raises for a configuration that it does not expect, and for a package that is not there."""


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is None and (function is torch.empty or (function in FILLED and _is_huge(args))):
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


FILLED = (torch.zeros, torch.ones, torch.rand, torch.randn)


def _is_huge(size: Any) -> bool:
    """Larger than any buffer: 2²⁶ elements, a mask over a context of 8192 tokens."""
    dimensions = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
    return math.prod(number for number in dimensions if isinstance(number, int)) > 2**26


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def model_from_config(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a configuration, in evaluation mode.

    Raises ValueError where transformers knows no causal decoder for it, or where it is an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder; lowbit takes causal decoders only.")
    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not known and not remote:
        raise ValueError(f"{config.model_type} is not a causal decoder that transformers can build.")
    # The configuration is copied because transformers writes the dtype and the attention it settled on into it.
    config = copy.deepcopy(config)
    try:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except BUILD_ERRORS as error:
        raise ValueError(f"transformers cannot build {config.model_type} from its configuration: {error}.") from error
    return cast("PreTrainedModel", model.eval())


def build_skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration with parameters on meta, true buffers, and experts unfused.

    The dtype is the configuration's; attention is transformers' default, which is sdpa wherever the family has it.

    Raises:
        ValueError: the family is no causal decoder, or a buffer of it cannot be computed without its weights.
    """
    with _parameters_on_meta():
        model = model_from_config(config, trust_remote_code=trust_remote_code)
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and name not in persistent:
            raise ValueError(f"{config.model_type} leaves the buffer {name} uninitialised, so it cannot be streamed.")
    unfuse_experts(model)
    return model


def unfuse_experts(module: nn.Module) -> None:
    """Replaces every fused experts module below `module`, in place; weights become views of the fused ones."""
    for path, child in list(module.named_modules()):
        if path and is_fused(child):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, Experts(child))


def unfused_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Full name of each fused parameter, as transformers knows it -> full names of its slices, one per expert.

    Slice e of a fused parameter [E, …] is the e-th name. Weights listed by `transposed_parameters` are stored [E, I, O]
    and a slice must be transposed to become a linear's [O, I].
    """
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for fused, slices in module.fused_names().items():
                names[f"{path}.{fused}"] = tuple(f"{path}.{name}" for name in slices)
    return names


def transposed_parameters(model: nn.Module) -> frozenset[str]:
    """Full names of the fused weights that transformers stores [E, I, O] instead of [E, O, I]."""
    return frozenset(
        f"{path}.{projection}"
        for path, module in model.named_modules()
        if isinstance(module, Experts) and module.transposed
        for projection in module.projections
    )
