"""HQQ's own half of peer_speed.py: run with the interpreter of an environment that has the package hqq.

usage: hqq_quantize.py MODEL TOKENS.safetensors   (tensor "evaluation", int64 [N, L]; HQQ looks at no other text)
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent))
from scoring import perplexity


def main():
    source, tokens = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    settings = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    began = time.perf_counter()
    packed = [Quantizer.quantize(linear.weight.data.float(), **settings) for linear in linears]
    seconds = time.perf_counter() - began
    for linear, (codes, meta) in zip(linears, packed, strict=True):
        linear.weight.data = Quantizer.dequantize(codes, meta).to(linear.weight.dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = perplexity(model, load_file(tokens)["evaluation"])
    print(json.dumps({"seconds": seconds, "perplexity": found, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
