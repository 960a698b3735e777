"""The container of a GGUF file: keys, the list of tensors, then their bytes, through the `gguf` package's writer.

The list stands in front of the data, so whoever writes a file is asked for its tensors twice: what they are, and then
their bytes, part by part in the same order. Memory is one part's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import gguf_blocks as blocks
from . import gguf_config, gguf_names
from .files import raw_bytes
from .gguf_vocab import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it: `data` are its bytes, uint8 [..., B]."""

    kind: str
    data: Tensor


Parts = Callable[[bool], Iterable[Mapping[str, Stored]]]
"""(whether bytes are wanted; else tensors may lie on the meta device) -> the tensors of the model's parts."""


def pack_float(tensor: Tensor, kind: str | None = None) -> Stored:
    """A tensor that is not quantized, in its own dtype unless another is named."""
    kind = kind or _FLOATS[tensor.dtype]
    dtype = next(dtype for dtype, name in _FLOATS.items() if name == kind)
    return Stored(kind, tensor.to(dtype).contiguous().view(torch.uint8))


def write_file(path: Path, config: Mapping[str, Any], vocabulary: Vocabulary | None, parts: Parts, name: str) -> None:
    """Write the model of a configuration (all fields present) with these tensors."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files are written by the gguf package: pip install 'lowbit[gguf]'") from error
    family = gguf_names.family(config["model_type"])
    extra = {key: pack_float(tensor, "F32") for key, tensor in gguf_config.rope_tensors(config).items()}
    with closing(gguf.GGUFWriter(path, family.arch)) as writer:
        kinds = Counter(kind for part in (extra, *parts(False)) for kind in _announce(writer, part))
        _write_keys(writer, config, vocabulary, kinds, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write(writer, extra)
        for part in parts(True):
            _write(writer, part)


def _announce(writer: GGUFWriter, stored: Mapping[str, Stored]) -> Iterator[str]:
    """List tensors in the file's head; gives the type of every matrix, as often as its bytes."""
    import gguf
    import numpy as np

    for name, each in stored.items():
        kind = gguf.GGMLQuantizationType[each.kind]
        writer.add_tensor_info(name, tuple(each.data.shape), np.dtype(np.uint8), each.data.numel(), kind)
        if each.data.dim() > 1:
            yield each.kind


def _write(writer: GGUFWriter, stored: Mapping[str, Stored]) -> None:
    import numpy as np

    for each in stored.values():
        data = each.data.contiguous()
        writer.write_tensor_data(np.frombuffer(raw_bytes(data), np.uint8).reshape(data.shape))


def _write_keys(
    writer: GGUFWriter, config: Mapping[str, Any], vocabulary: Vocabulary | None, kinds: Counter[str], name: str
) -> None:
    writer.add_name(name)
    writer.add_quantization_version(2)
    writer.add_file_type(_file_type(kinds))
    for key, value in gguf_config.metadata(config).items():
        _add(writer, key, value)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for key, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    for key, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", flag)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _add(writer: GGUFWriter, key: str, value: gguf_config.Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _file_type(kinds: Counter[str]) -> int:
    """llama.cpp's number for a file of mostly this type."""
    import gguf

    quantized = {kind: count for kind, count in kinds.items() if kind in blocks.KINDS}
    kind = max(quantized or kinds, key=lambda each: kinds[each])
    named = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
    named["MXFP4"] = "MOSTLY_MXFP4_MOE"
    return int(gguf.LlamaFileType[named.get(kind, f"MOSTLY_{kind}")])
