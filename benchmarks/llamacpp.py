"""llama.cpp's own K-quants against lowbit's, at equal bytes: perplexity of both as llama.cpp computes it.

    python scripts/clients.py llamacpp -- python benchmarks/llamacpp.py MODEL --calibration calib.txt --text test.txt \\
        --work files --json rows.jsonl

For every mix (Q4_K_M, Q3_K_M, Q2_K) a BF16 file of MODEL is quantized by llama.cpp, without and with an importance
matrix; then lowbit rounds the original by GPTQ onto the same K-quant of every tensor, read off llama.cpp's file, so
that the three are as long to the byte. Embedding and head stay BF16 in all. The importance matrix is the mean square of
every linear's inputs over the windows that GPTQ calibrates on, which is what llama.cpp's own program computes; its
library takes it from memory. llama.cpp runs where LOWBIT_LLAMACPP_PYTHON says.

Models whose checkpoint names are transformers' own and whose linears are modules: Llama, Qwen, Mistral, Gemma.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

import lowbit
from lowbit.data.calibrate import load_calibration
from lowbit.data.evaluation import load_windows
from lowbit.formats import gguf_names
from lowbit.formats.files import read_shard
from lowbit.formats.gguf import FILE, converted
from lowbit.formats.gguf_vocab import read_vocabulary
from lowbit.formats.gguf_write import write_file
from lowbit.runtime.clients import find_client

MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K")
ORIGINAL = ("", "BF16")
ROUNDINGS = ("llama.cpp", "llama.cpp, importance matrix", "lowbit")
AT_ONCE = 8
"""Windows whose logits are on disk together."""
QUANTIZE = """
import ctypes, sys
import gguf, llama_cpp as lib, numpy as np
source, target, mix, threads, importance = sys.argv[1:]
options = lib.llama_model_quantize_default_params()
options.ftype, options.nthread = getattr(lib, "LLAMA_FTYPE_MOSTLY_" + mix), int(threads)
options.output_tensor_type = options.token_embedding_type = gguf.GGMLQuantizationType.BF16
if importance:
    arrays = dict(np.load(importance))
    entries = (lib.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, array) in zip(entries, arrays.items()):
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options.imatrix = ctypes.cast(entries, type(options.imatrix))
sys.exit(lib.llama_model_quantize(source.encode(), target.encode(), options))
"""


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, of both texts")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--work", type=Path, default=None, help="where files stay")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    missing = find_client("llamacpp").missing()
    if missing is not None:
        parser.error(missing)
    done = dict(finished(arguments.json))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, arguments.work or Path(scratch))
        for mix, rounding in (ORIGINAL, *((mix, rounding) for mix in arguments.mixes for rounding in ROUNDINGS)):
            if (mix, rounding) in done:
                continue
            file = bench.file(mix, rounding)
            found = {"bytes": file.stat().st_size, "perplexity": bench.perplexity(file)}
            done[mix, rounding] = {"mix": mix, "rounding": rounding, **found}
            print(json.dumps(done[mix, rounding]), file=sys.stderr, flush=True)
            if arguments.json:
                with arguments.json.open("a") as output:
                    print(json.dumps(done[mix, rounding]), file=output)
    print_table(done)


def finished(file: Path | None) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """The rows of an earlier call."""
    if file is not None and file.exists():
        for line in file.read_text("utf8").splitlines():
            row = json.loads(line)
            yield (row["mix"], row["rounding"]), row


class Bench:
    """One model, its texts, and the files made of it."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.model, self.calibration, self.work = arguments.model, arguments.calibration, work
        self.samples, self.length = arguments.samples, arguments.length
        work.mkdir(parents=True, exist_ok=True)
        self.config = AutoConfig.from_pretrained(self.model).to_dict()
        self.family = gguf_names.family(self.config["model_type"])
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.windows = load_windows(arguments.text, self.tokenizer, self.length, arguments.windows)

    def file(self, mix: str, rounding: str) -> Path:
        """The file of a row, made unless it is there."""
        if not mix:
            return self.original()
        if rounding == "lowbit":
            return self.by_lowbit(mix)
        weighted = rounding != ROUNDINGS[0]
        target = self.work / f"{mix}{'-weighted' if weighted else ''}.gguf"
        if not target.exists():
            importance = str(self.importance()) if weighted else ""
            asked = [str(self.original()), str(target), mix, str(torch.get_num_threads()), importance]
            self.client("-c", QUANTIZE, *asked)
        return target

    def original(self) -> Path:
        """MODEL with matrices in BF16."""
        target = self.work / "original.gguf"
        if not target.exists():
            tensors = {}
            for shard in sorted(self.model.glob("*.safetensors")):
                tensors |= {name: x.bfloat16() if x.dim() > 1 else x for name, x in read_shard(shard).items()}
            heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
            named = converted({}, tensors, self.family, heads)
            vocabulary = read_vocabulary(self.model, self.config)
            write_file(target, self.config, vocabulary, lambda _: [named], self.model.name)
        return target

    def by_lowbit(self, mix: str) -> Path:
        """The same types of the same tensors, rounded by GPTQ."""
        run, target = self.work / f"{mix}-run", self.work / f"{mix}-lowbit"
        if not target.exists():
            usual = f"q{mix[1]}k"
            types = {name: kind for name, kind in self.types(self.file(mix, ROUNDINGS[0])) if kind != usual}
            lowbit.quantize(
                *(self.model, f"gptq-{usual}", run),
                target="gguf",
                calibration=self.calibration,
                samples=self.samples,
                length=self.length,
                overrides=[f"{name}={kind}" for name, kind in types.items()],
            )
            lowbit.export(run, target, format="gguf")
        return target / FILE

    def types(self, file: Path) -> Iterator[tuple[str, str]]:
        """(linear, its K-quant as recipes call it) of a file."""
        from gguf import GGUFReader

        for tensor in GGUFReader(file).tensors:
            if tensor.tensor_type.name.endswith("_K"):
                name = gguf_names.from_gguf(tensor.name, self.family)
                assert name is not None, f"{tensor.name} is no weight of the model"
                yield name.removesuffix(".weight"), f"q{tensor.tensor_type.name[1]}k"

    def importance(self) -> Path:
        """Mean squares of every linear's inputs, under GGUF's names."""
        target = self.work / "importance.npz"
        if target.exists():
            return target
        sums: dict[str, Tensor] = {}

        def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).square()
            sums[name] = sums.get(name, 0) + squares.sum(0, dtype=torch.float64)

        model = lowbit.load(self.model, dtype=torch.float32)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                module.register_forward_pre_hook(partial(add, name))
        rows = load_calibration(self.calibration, self.tokenizer, self.samples, self.length, 0)
        with torch.no_grad():
            for row in rows:
                model(row[None], use_cache=False)
        tokens = sum(map(len, rows))
        named = {gguf_names.to_gguf(f"{name}.weight", self.family)[0]: total / tokens for name, total in sums.items()}
        np.savez(target, **{name: mean.float().numpy() for name, mean in named.items()})
        return target

    def perplexity(self, file: Path) -> float:
        """exp of llama.cpp's mean loss over the predicted tokens of all windows."""
        losses = []
        for windows in self.windows.split(AT_ONCE):
            with tempfile.TemporaryDirectory(dir=self.work) as place:
                job = Path(place)
                asked = {"export": str(file), "windows": windows.tolist(), "threads": torch.get_num_threads()}
                (job / "job.json").write_text(json.dumps(asked), "utf8")
                self.client(str(find_client("llamacpp").script), place)
                logits = torch.from_numpy(np.load(job / "logits.npy"))[:, :-1]
            losses += [float(nn.functional.cross_entropy(x, w[1:])) for x, w in zip(logits, windows, strict=True)]
        return math.exp(math.fsum(losses) / len(losses))

    @staticmethod
    def client(*arguments: str) -> None:
        """Run llama.cpp's interpreter, and show what it said where it failed."""
        ended = subprocess.run([find_client("llamacpp").python, *arguments], capture_output=True, text=True)
        if ended.returncode:
            sys.exit(ended.stderr[-2000:] or f"llama.cpp ended with {ended.returncode}")


def print_table(done: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Markdown, a mix per line."""
    print(f"| mix | bytes | {' | '.join(ROUNDINGS)} |")
    print("|---|---|" + "---|" * len(ROUNDINGS))
    for mix in dict.fromkeys(mix for mix, _ in done if mix):
        found = [done.get((mix, rounding)) for rounding in ROUNDINGS]
        sizes = {row["bytes"] for row in found if row}
        figures = " | ".join("" if row is None else f"{row['perplexity']:.4f}" for row in found)
        print(f"| {mix} | {' / '.join(f'{size:,}' for size in sorted(sizes))} | {figures} |")
    if ORIGINAL in done:
        print(f"\nBF16: {done[ORIGINAL]['perplexity']:.4f}, {done[ORIGINAL]['bytes']:,} bytes.")


if __name__ == "__main__":
    main()
