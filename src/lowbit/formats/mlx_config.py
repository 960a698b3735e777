"""config.json as mlx-lm reads it, which is not quite as transformers writes it.

mlx-lm reads fields by the names of each family's first release, and takes heads for tied and patterns of layers for the
published ones unless told. A field that it misses is no error there but other logits, so what transformers has renamed
since is written under both names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_UNKNOWN = ("bloom", "falcon", "opt")
"""Families that lowbit quantizes and mlx-lm does not have."""
_WITHOUT_WINDOW = ("gemma2", "mistral", "mixtral", "phi3")
"""Families whose windows mlx-lm leaves out."""


def configuration(
    config: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], skeleton: nn.Module
) -> dict[str, Any]:
    """config.json: the most frequent settings for all modules, every other module's by its name."""
    every = [dict(given) for given in settings.values()]
    usual = max(every, key=every.count)
    odd = {name: dict(given) for name, given in settings.items() if given != usual}
    model: Any = skeleton.config
    return {
        "tie_word_embeddings": bool(getattr(model, "tie_word_embeddings", False)),
        **{old: config[new] for old, new in model.attribute_map.items() if new in config},
        **_rotary(config.get("rope_parameters")),
        **_pattern(config.get("layer_types") or ()),
        **config,
        "quantization": {**usual, **odd},
        "quantization_config": {**usual, **odd},
    }


def _rotary(parameters: Any) -> dict[str, Any]:
    """transformers 5's `rope_parameters` as the fields that came before it."""
    if not isinstance(parameters, Mapping):
        return {}
    if "full_attention" in parameters:
        local = parameters.get("sliding_attention", {})
        base = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return {**base, **_rotary(parameters["full_attention"])}
    found = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return found


def _pattern(kinds: Sequence[str]) -> dict[str, int]:
    """Every how many layers one attends to everything, where the others have a window and that is regular."""
    if "sliding_attention" not in kinds or "full_attention" not in kinds:
        return {}
    period = kinds.index("full_attention") + 1
    regular = all((kind == "full_attention") == (index % period == period - 1) for index, kind in enumerate(kinds))
    return {"sliding_window_pattern": period} if regular else {}


def remarks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know of how mlx-lm 0.32 runs a model of this configuration."""
    kind, window = config.get("model_type"), config.get("sliding_window")
    if kind not in _WITHOUT_WINDOW or not window:
        return ()
    return (f"mlx-lm gives {kind} models no sliding window: texts of more than {window} tokens come out differently",)


def refuse_model(config: Mapping[str, Any]) -> str | None:
    """Why a model of this configuration is none for MLX, or None."""
    kind = config.get("model_type")
    if kind in _UNKNOWN:
        return f"mlx-lm 0.32 has no {kind} models: use gguf, or compressed-tensors"
    return None
