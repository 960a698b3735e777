"""Load any model to run it: codes, lowbit's own or another tool's, through the reference layers, 16 bits through
transformers.

A lowbit directory is filled by the same `install` that a sweep propagates through, so what is loaded computes what was
measured while quantizing; on a GPU, in 16 bits, layers that compute on codes stand in for the reference (`fast`). What
another tool quantized is read by lowbit's own readers (`formats.foreign`) and filled by it too; only what none of them
recognizes is left to transformers and the packages that it asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..formats import native
from ..formats.files import INDEX, read_shard, shard_header
from ..formats.foreign import GGUF, Opened, is_foreign, module_of, open_foreign
from ..formats.source import first_line, locate, scan
from ..graph.skeleton import build_skeleton
from ..modules.linear import install
from .adopt import Adopted
from .fast import install_fast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Install = Callable[..., None]
"""`modules.linear.install`, or what stands in for it."""


def is_native(path: Path) -> bool:
    """Whether a directory is one that `lowbit quantize` writes, complete or not."""
    file = path / "config.json"
    if not file.is_file():
        return (path / "plan.json").is_file()
    config = json.loads(file.read_text(encoding="utf8"))
    return (config.get("quantization_config") or {}).get("quant_method") == native.METHOD


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    fast: bool = True,
) -> PreTrainedModel:
    """The model of a directory, hub id or `demo`, in evaluation mode.

    `dtype` is what it computes in (default: the checkpoint's own). Where kernels know the GPU, linears compute on their
    codes and hold no dense copy, unless `fast` is false; a printed model says which do not, and why. Raises ValueError,
    in one sentence, where there is no model, or the run that makes it has not finished.
    """
    path = find_model(source, trust_remote_code=trust_remote_code)
    fill = install_fast if fast and torch.device(device).type == "cuda" else install
    if is_native(path):
        return _load_native(path, dtype, device, trust_remote_code, fill)
    if is_foreign(path):
        return _load_foreign(path, dtype, device, trust_remote_code, fill)
    return _load_transformers(path, dtype, device, trust_remote_code)


def find_model(source: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The directory of a model, or the .gguf file that is one. Raises ValueError where there is none."""
    path = Path(source).expanduser()
    if path.suffix == GGUF and path.is_file():
        return path
    return locate(source, trust_remote_code=trust_remote_code)


def _load_native(
    path: Path, dtype: torch.dtype | None, device: str | torch.device, trust: bool, fill: Install
) -> PreTrainedModel:
    """A directory of lowbit's own, shard by shard."""
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} is not finished: run the same `lowbit quantize` command again to complete it")
    config = plain_config(path, trust_remote_code=trust)
    model = build_skeleton(config, trust_remote_code=trust)
    chosen = dtype or config.dtype or torch.float32
    for file in sorted({path for path, _ in scan(path)[1].values()}):
        layers, rest = native.unpack(shard_header(file).metadata, read_shard(file))
        fill(model, layers, rest, chosen, device)
    return _filled(model, path, device)


def _load_foreign(
    path: Path, dtype: torch.dtype | None, device: str | torch.device, trust: bool, fill: Install
) -> PreTrainedModel:
    """A model that another tool quantized, module by module."""
    adopted, model = adopt(path, trust_remote_code=trust)
    chosen = dtype or model.config.dtype or torch.float32
    for _, names in groupby(adopted.names(), module_of):
        layers, rest = adopted.read(names)
        fill(model, layers, rest, chosen, device)
    return _filled(model, path, device)


def adopt(path: Path, *, trust_remote_code: bool = False) -> tuple[Adopted, PreTrainedModel]:
    """Another tool's model, bound to a skeleton of it. Raises ValueError, in one sentence, where they do not fit."""
    opened = open_foreign(path)
    config = plain_config(path, trust_remote_code=trust_remote_code) if path.is_dir() else _config_of(opened)
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    return Adopted(opened, model), model


def _config_of(opened: Opened) -> PreTrainedConfig:
    """transformers' configuration of a model whose file holds it in other words."""
    from transformers import AutoConfig

    stated = dict(opened.config)
    config: PreTrainedConfig = AutoConfig.for_model(stated.pop("model_type"), **stated)
    return config


def _filled(model: PreTrainedModel, path: Path, device: str | torch.device) -> PreTrainedModel:
    """The last steps once every tensor is installed: ties, buffers, how to generate."""
    from transformers import GenerationConfig

    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def plain_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a quantized model without the mark that it is one: what its skeleton is built from."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
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

    path = find_model(source, trust_remote_code=trust_remote_code)
    inside: dict[str, str] = {}
    if path.suffix == GGUF and path.is_file():
        path, file = path.parent, path.name
        inside = {} if any(path.glob("tokenizer*")) else {"gguf_file": file}
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **inside)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"{path} has no tokenizer that transformers can use ({first_line(error)}): copy its files beside the model"
        ) from error
