"""llm-compressor's half of peer_speed.py: run with the interpreter of an environment that has llm-compressor.

usage: llmcompressor_gptq.py MODEL TOKENS.safetensors   (tensors "calibration" and "evaluation", int64 [N, L])
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent))
from scoring import perplexity


def main():
    source, tokens = sys.argv[1:]
    tensors = load_file(tokens)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    ids = tensors["calibration"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    began = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = perplexity(model, tensors["evaluation"])
    print(json.dumps({"seconds": seconds, "perplexity": found, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
