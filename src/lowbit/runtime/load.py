"""Load any model to run it: lowbit's own directories through the reference layers, all others through transformers.

A lowbit directory is filled by the same `install` that a sweep propagates through, so what is loaded computes what was
measured while quantizing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..formats import native
from ..formats.files import INDEX, read_shard, shard_header
from ..formats.source import first_line, locate, scan
from ..graph.skeleton import build_skeleton
from ..modules.linear import install

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def is_native(path: Path) -> bool:
    """Whether a directory is one that `lowbit quantize` writes, complete or not."""
    file = path / "config.json"
    if not file.is_file():
        return (path / "plan.json").is_file()
    config = json.loads(file.read_text(encoding="utf8"))
    return (config.get("quantization_config") or {}).get("quant_method") == "lowbit"


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a directory, hub id or `demo`, in evaluation mode.

    `dtype` is what it computes in (default: the checkpoint's own). Raises ValueError, in one sentence, where there is
    no model, or the run that makes it has not finished.
    """
    path = locate(source, trust_remote_code=trust_remote_code)
    if not is_native(path):
        return _load_transformers(path, dtype, device, trust_remote_code)
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} is not finished: run the same `lowbit quantize` command again to complete it")
    from transformers import GenerationConfig

    config = plain_config(path, trust_remote_code=trust_remote_code)
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    chosen = dtype or config.dtype or torch.float32
    for file in sorted({path for path, _ in scan(path)[1].values()}):
        layers, rest = native.unpack(shard_header(file).metadata, read_shard(file))
        install(model, layers, rest, chosen, device)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def plain_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a lowbit directory without the mark that it is one: what its skeleton is built from."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    del config.quantization_config
    return config


def _load_transformers(
    path: Path, dtype: torch.dtype | None, device: str | torch.device, trust: bool
) -> PreTrainedModel:
    """Any other model that transformers loads, quantized or not; headers are checked first, for a clear error."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    scan(path)
    logging.disable_progress_bar()  # its bars would stand between our own
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"transformers cannot load {path}: {first_line(error)}") from error
    return model.to(device).eval()


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises ValueError where there is none that transformers can use."""
    from transformers import AutoTokenizer

    path = locate(source, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"{path} has no tokenizer that transformers can use ({first_line(error)}): copy its files beside the model"
        ) from error
