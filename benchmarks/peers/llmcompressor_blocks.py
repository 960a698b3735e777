"""llm-compressor's half of peer_blocks.py: run with the interpreter of an environment that has llm-compressor.

usage: llmcompressor_blocks.py gptq|awq MODEL TOKENS.safetensors OUTPUT   (tensor "calibration", int64 [N, L])
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main():
    method, source, tokens, _ = sys.argv[1:]
    torch.ones(1, device="cuda")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    ids = load_file(tokens)["calibration"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    settings = {"targets": "Linear", "scheme": "W4A16", "ignore": ["lm_head"]}
    recipe = GPTQModifier(**settings)
    if method == "awq":
        recipe = [AWQModifier(), QuantizationModifier(**settings)]
    began = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": torch.cuda.max_memory_allocated()}))


if __name__ == "__main__":
    main()
