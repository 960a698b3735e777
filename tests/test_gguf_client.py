"""llama.cpp on what lowbit exports, and lowbit on what llama.cpp quantizes.

LOWBIT_LLAMACPP_PYTHON names an interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from gguf_models import FAMILIES, TEXT, exported, logits_of, read_back, save_wide, wide, windows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer

import lowbit
from lowbit.formats import gguf_names
from lowbit.formats.files import SINGLE, read_shard
from lowbit.formats.gguf import converted, open_file
from lowbit.formats.gguf_write import write_file
from lowbit.modules.linear import QLinear
from lowbit.runtime import clients

gguf = pytest.importorskip("gguf", reason="needs pip install 'lowbit[gguf]'")

PYTHON = os.environ.get("LOWBIT_LLAMACPP_PYTHON")
CLIENT = Path(clients.__path__[0]) / "llamacpp.py"
LLAMA_33M = Path(__file__).parents[2] / "shared" / "models" / "llama-33m"

client = pytest.mark.client
needs_client = pytest.mark.skipif(PYTHON is None, reason="LOWBIT_LLAMACPP_PYTHON names no interpreter")


def logits_of_client(file: Path, ids: Tensor, job: Path) -> Tensor:
    job.mkdir()
    (job / "job.json").write_text(json.dumps({"export": str(file), "windows": ids.tolist(), "threads": 1}))
    ended = subprocess.run([str(PYTHON), str(CLIENT), str(job)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads((job / "found.json").read_text())["client"] == "llamacpp"
    return torch.from_numpy(np.load(job / "logits.npy"))


def divergence(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """(KL in nats, top-1 agreement)."""
    kl = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    return float(kl), float((found.argmax(-1) == expected.argmax(-1)).float().mean())


@client
@needs_client
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_lowbit_does(family: str, tmp_path: Path) -> None:
    """Kept tensors are fp32 here and linears 8-bit, whose inputs llama.cpp rounds to 8 bits: a small divergence."""
    everyone = (
        {"num_experts_per_tok": 4} if family in ("mixtral", "qwen3_moe") else {}
    )  # a router's choice may tip over
    model = wide(family, tmp_path / "model", **everyone)
    run, file = exported(model, "rtn-w8a16-g32", tmp_path, overrides=["*.down_proj=q6k"])
    ids = windows(TINY[family]().vocab_size)
    expected = logits_of(lowbit.load(run, dtype=torch.float32), ids)
    kl, top1 = divergence(expected, logits_of_client(file, ids, tmp_path / "job"))
    assert kl < 3e-4 and top1 >= 0.9


def write_floats(directory: Path, path: Path, dtype: torch.dtype) -> None:
    """A file of the model as it is, matrices in this dtype."""
    config = AutoConfig.from_pretrained(directory).to_dict()
    tensors = {name: x.to(dtype) if x.dim() > 1 else x for name, x in read_shard(directory / SINGLE).items()}
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    named = converted({}, tensors, gguf_names.family(config["model_type"]), heads)
    write_file(path, config, None, lambda _: [named], "floats")


LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
"""Largest difference of logits as a part of the largest: llama.cpp rounds inputs to fp16 where weights are fp16."""


@client
@needs_client
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_without_codes_give_the_same_logits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, order of rows, rope, norms, windows, caps and experts. GELU is looked up in a table of fp16 numbers."""
    directory = wide(family, tmp_path / "model")
    model = lowbit.load(directory, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype) if parameter.dim() > 1 else parameter)
    write_floats(directory, tmp_path / "model.gguf", dtype)
    ids = windows(TINY[family]().vocab_size)
    expected = logits_of(model, ids)
    difference = (logits_of_client(tmp_path / "model.gguf", ids, tmp_path / "job") - expected).abs().max()
    limit = LIMITS[dtype] if "gemma" not in family else max(LIMITS[dtype], 2e-4)
    assert float(difference) <= limit * float(expected.abs().max())


@client
@needs_client
@pytest.mark.parametrize(("tokens", "vocabulary"), [("bytes", 400), ("pieces", 500)])
def test_llama_cpp_tokenizes_as_the_tokenizer_does(tokens: str, vocabulary: int, tmp_path: Path) -> None:
    model = save_wide("llama", tmp_path / "model", tokens=tokens, vocab_size=vocabulary)
    _, file = exported(model, "rtn-w8a16-g32", tmp_path)
    texts = [*TEXT[::17], "Don't you?  Übung 12345\n\n x"]
    script = (
        "import sys, json, llama_cpp; m = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False);"
        "print(json.dumps([m.tokenize(t.encode(), add_bos=False, special=False) for t in json.loads(sys.argv[2])]))"
    )
    found = subprocess.run([str(PYTHON), "-c", script, str(file), json.dumps(texts)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert json.loads(found.stdout) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@client
@needs_client
@pytest.mark.skipif(not LLAMA_33M.is_dir(), reason="needs ../shared")
def test_what_llama_cpp_quantized_gives_the_same_values_and_logits(tmp_path: Path) -> None:
    """A file made by llama.cpp's own quantizer, read into codes. Rounding inputs to 8 bits is a cost that llama.cpp
    pays and lowbit does not: logits must be no further apart than that cost, which the same rounding in lowbit shows.
    """
    lowbit.quantize(LLAMA_33M, "rtn-w8a16-g32", tmp_path / "run", target="gguf")
    lowbit.export(tmp_path / "run", tmp_path / "out", format="gguf")
    script = (
        "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params();"
        "p.ftype = l.LLAMA_FTYPE_MOSTLY_Q4_K_M;"
        "p.allow_requantize = True; p.nthread = 1;"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    file = tmp_path / "q4km.gguf"
    subprocess.run([str(PYTHON), "-c", script, str(tmp_path / "out" / "model.gguf"), str(file)], check=True)
    opened = open_file(file)
    layers, _ = opened.read(f"{module}.weight" for module in opened.quantized())
    for tensor in gguf.GGUFReader(file).tensors:
        theirs = gguf_names.from_gguf(tensor.name, gguf_names.FAMILIES["llama"])
        if theirs is None or theirs.removesuffix(".weight") not in layers:
            continue
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        heads = gguf_names.heads_of(tensor.name, gguf_names.FAMILIES["llama"], (8, 4))
        values = values if heads is None else gguf_names.unpermuted(values, heads)
        assert torch.equal(layers[theirs.removesuffix(".weight")].weight.dequantize(), values)
    ids, job = windows(8192, 2, 64), tmp_path / "job"
    model = read_back(file)
    exact, found = logits_of(model, ids), logits_of_client(file, ids, job)
    for module in model.modules():
        if isinstance(module, QLinear) or module is model.lm_head:
            module.register_forward_pre_hook(lambda _, inputs: (eight_bits(inputs[0]),))
    assert divergence(exact, found)[0] <= 1.5 * divergence(exact, logits_of(model, ids))[0]


def eight_bits(x: Tensor) -> Tensor:
    """What llama.cpp makes of a K-quant's inputs: per 256 of them integers whose largest in magnitude is -127 steps."""
    units = x.reshape(*x.shape[:-1], -1, 256)
    extreme = units.gather(-1, units.abs().argmax(-1, keepdim=True))
    step = torch.where(extreme == 0, 1.0, extreme / -127)
    return ((units / step).round().clamp_max(127) * step).reshape(x.shape)
