"""auto-round's half of peer_speed.py: run with the interpreter of an environment that has auto-round.

usage: autoround_signround.py MODEL TOKENS.safetensors   (tensors "calibration" and "evaluation", int64 [N, L])
"""

import json
import resource
import sys
import time
from pathlib import Path

from auto_round import AutoRound
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parent))
from scoring import perplexity


def main():
    source, tokens = sys.argv[1:]
    tensors = load_file(tokens)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    ids = tensors["calibration"]
    began = time.perf_counter()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        scheme="W4A16",
        iters=200,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=8,
        dataset=DataLoader(list(ids), batch_size=8),
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = rounder.quantize()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {"seconds": seconds, "perplexity": perplexity(model, tensors["evaluation"]), "peak_memory_bytes": peak}
        )
    )


if __name__ == "__main__":
    main()
