"""W4 on this CPU, lowbit against a peer on the same calibration tokens, one after the other.

    python benchmarks/peer_speed.py gptq MODEL --calibration calib.txt --text test.txt --peer-python PEER/bin/python

`gptq` is GPTQ against llm-compressor, `signround` learned rounding of 200 iterations against auto-round, `hqq` HQQ (in
groups of 64) against its authors' package. Both get the same token windows. Seconds count quantization alone (lowbit:
anatomy, streaming and writing included; the peer: its call on a loaded model). Each runs in a process of its own,
`--rounds` times in turn; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowbit.data.calibrate import load_calibration
from lowbit.data.evaluation import load_windows
from lowbit.runtime.load import load_tokenizer

HERE = Path(__file__).parent
PAIRS = {
    "gptq": ("gptq-w4a16-g128", "llm-compressor", "llmcompressor_gptq.py"),
    "signround": ("signround-w4a16-g128", "auto-round", "autoround_signround.py"),
    "hqq": ("hqq-w4a16-g64", "hqq", "hqq_quantize.py"),
}
"""lowbit's recipe, the peer, and its script."""
OURS = """
import json, sys, time, torch, lowbit
from safetensors.torch import load_file
from lowbit.evaluation.text import evaluate_text
recipe, model, tokens, output = sys.argv[1:]
lowbit.quantize("demo", "rtn-w4a16-g128", output + "-warm")  # imports are not quantization
began = time.perf_counter()
run = lowbit.quantize(model, recipe, output, calibration=list(load_file(tokens)["calibration"]))
seconds = time.perf_counter() - began
found = evaluate_text(lowbit.load(output, dtype=torch.float32), load_file(tokens)["evaluation"]).perplexity
print(json.dumps({"seconds": seconds, "perplexity": found.perplexity, "peak_memory_bytes": run.peak_memory_bytes}))
"""


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=PAIRS)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    recipe, peer_name, script = PAIRS[arguments.method]
    tokenizer = load_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = str(Path(scratch) / "tokens.safetensors")
        rows = load_calibration(arguments.calibration, tokenizer, 128, 512, 0)
        evaluation = load_windows(arguments.text, tokenizer, 512, arguments.windows).contiguous()
        save_file({"calibration": torch.stack(rows), "evaluation": evaluation}, tokens)
        results: dict[str, list[dict[str, float]]] = {"lowbit": [], peer_name: []}
        for turn in range(arguments.rounds):
            ours = [sys.executable, "-c", OURS, recipe, arguments.model, tokens, f"{scratch}/ours-{turn}"]
            peer = [arguments.peer_python, str(HERE / "peers" / script), arguments.model, tokens]
            for name, command in (("lowbit", ours), (peer_name, peer)):
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    print("| tool | seconds (median) | of | perplexity | peak memory |\n|---|---|---|---|---|")
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {', '.join(f'{s:.1f}' for s in seconds)} "
            f"| {runs[0]['perplexity']:.3f} | {runs[0]['peak_memory_bytes'] / 1e9:.2f} GB |"
        )
    medians = [statistics.median(run["seconds"] for run in runs) for runs in results.values()]
    print(f"\n{peer_name} takes {medians[1] / medians[0]:.2f} times as long as lowbit")


if __name__ == "__main__":
    main()
