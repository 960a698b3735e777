"""A small double of a model, on which its anatomy can be traced and proved in double precision within a second.

The double is built from a shrunk copy of the configuration by the model's own code, so it has the same structure. It
is held against the real skeleton afterwards, block by block; where shrinking broke something the next larger copy is
tried. Shrinking knows the usual names of dimensions, nothing about families: an unknown name stays as large as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .skeleton import BUILD_ERRORS, build_skeleton
from .structure import Signature, block_kinds, covering_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
WIDTH = 16
"""Of a head, halved where there are many; partial rotary factors down to a quarter leave an even number of channels."""
NARROW_WIDTH = 40
"""Of the model, where it need not be the product of heads and head width."""

FIXED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rotary_dim": 8,
    "intermediate_size": 56,
    "intermediate_size_mlp": 56,
    "ffn_dim": 56,
    "n_inner": 56,
    "ffn_hidden_size": 56,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "qk_head_dim": 16,
    "v_head_dim": 14,
    "query_pre_attn_scalar": 16,
}
AT_MOST = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
LARGEST = 100_000_000
"""Parameters of a probe; the next larger copy than the small one may be the model itself."""
NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class DoublePrecision(TorchFunctionMode):
    """Runs float64 model code in float64 throughout: casts to narrower floats, frequent in norms, are not obeyed."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in CASTS:
            return args[0].double()
        kwargs = {key: torch.float64 if _narrow(value) else value for key, value in (kwargs or {}).items()}
        return function(*[torch.float64 if _narrow(value) else value for value in args], **kwargs)


def _narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW


def head_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """(query heads, key-value heads) as the configuration states them."""
    query = config.num_attention_heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(count := getattr(config, name, None), int):
            return query, count
    return query, query


def _integers(config: PreTrainedConfig, sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    for name, size in sizes.items():
        value, derived = getattr(config, name, None), isinstance(getattr(type(config), name, None), property)
        if isinstance(value, int) and not isinstance(value, bool) and not derived:
            yield name, value, size


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters without length scaling, whose factor lists would not fit; per layer type where they are so."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {key: _plain_rope(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    kept = {key: value for key, value in parameters.items() if key in ("rope_theta", "partial_rotary_factor")}
    return {"rope_type": "default", **kept}


def shorten(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy with the first `layers` blocks; every per-layer list is cut along."""
    short, full = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == full:
            setattr(short, name, value[:layers])
    short.num_hidden_layers = layers
    return short


def shrink(config: PreTrainedConfig, layers: int, *, coupled: bool = False) -> PreTrainedConfig:
    """A copy with the first `layers` blocks and small dimensions, but as many heads as ever.

    How Q, K and V are laid out in a fused projection is counted in heads, so a layout that fits a smaller number of
    them need not fit the real one. `coupled` keeps the model as wide as all heads together even where it could differ.
    """
    small = shorten(config, layers)
    query = config.num_attention_heads
    width = WIDTH if query <= 32 else WIDTH // 2
    free = {name for name, *_ in _integers(config, {"head_dim": 0, "v_head_dim": 0})}
    small.hidden_size = NARROW_WIDTH if free and not coupled else query * width
    for name, _, size in _integers(config, FIXED):
        setattr(small, name, size)
    for name, value, size in _integers(config, AT_MOST):
        setattr(small, name, min(value, size))
    for name, value, _ in _integers(config, {"head_dim": width}):
        rotary = value == getattr(config, "qk_rope_head_dim", None)
        setattr(small, name, FIXED["qk_rope_head_dim"] if rotary else width)
    for name, value, _ in _integers(config, {"word_embed_proj_dim": 0}):
        setattr(small, name, small.hidden_size if value == config.hidden_size else NARROW_WIDTH)
    if isinstance(rope := getattr(config, "rope_parameters", None), dict):
        small.rope_parameters = _plain_rope(rope)
    return small


def build_probe(config: PreTrainedConfig, *, trust_remote_code: bool, seed: int = 0) -> PreTrainedModel:
    """A model with random float64 weights and unfused experts. Raises ValueError if it cannot be.

    Matrices have unit gain, vectors (gains, biases) lie around 1.
    """
    config = copy.deepcopy(config)
    config.dtype = torch.float64
    model = build_skeleton(config, trust_remote_code=trust_remote_code).double()
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters are too many for a probe")
    generator = torch.Generator().manual_seed(seed)
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in real:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                value = 1 + 0.2 * noise if noise.ndim < 2 else noise * noise.shape[-1] ** -0.5
                real[id(parameter)] = nn.Parameter(value, requires_grad=False)
            if parameter is not None:
                module._parameters[name] = real[id(parameter)]
    return model


def matching_probe(
    config: PreTrainedConfig, kinds: list[Signature], layers: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The smallest double that can be built, runs, and whose blocks have the real ones' structure.

    Args:
        kinds: `block_kinds` of the real model; `layers`: the path of its blocks.

    Raises ValueError where there is none.
    """
    length, problem = covering_prefix(kinds), ""
    for smaller in (shrink, partial(shrink, coupled=True), shorten):
        try:
            candidate = smaller(config, length)
            probe = build_probe(candidate, trust_remote_code=trust_remote_code)
            if block_kinds(cast(nn.ModuleList, probe.get_submodule(layers)), candidate) != kinds[:length]:
                problem = problem or "a small copy of it has another structure"
                continue
            with DoublePrecision(), torch.no_grad():
                probe(input_ids=prompts(probe), use_cache=False)
        except (*BUILD_ERRORS, ZeroDivisionError) as error:
            problem = problem or f"a small copy of it fails ({error})"
            continue
        return probe
    raise ValueError(f"{config.model_type} could not be probed: {problem}.")


def prompts(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Random token ids [2, 12], without the first few ids, which may be padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, min(VOCABULARY, model.config.vocab_size), (2, 12), generator=generator)
