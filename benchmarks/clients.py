"""Recipe × format × client as one table: every export loaded by the software it is for, and compared with lowbit.

    python scripts/clients.py -- python benchmarks/clients.py MODEL --calibration calib.txt --text test.txt \\
        --work runs --json rows.jsonl [--only qwen2 …]

MODEL, a trained one, is quantized with 32 windows of 512 tokens of the calibration text and compared on windows of the
other text. Beside it come random models of other families, two blocks of 256 wide with MODEL's tokenizer, which are
compared on random ids. A comparison is `lowbit export --verify`'s, with its limits. Numbers are the client's against
lowbit's own model in fp32: the largest difference of logits as a part of the largest logit, or for vLLM, which gives
scores alone, the mean difference of log-probabilities with its spread; divergence; perplexity on both sides.

`transformers` decompresses compressed-tensors exports by that package's own function, and reads GPTQ and AWQ with the
help of GPTQModel, in whose environment it runs then. What a format or a client refuses is a row that says why. Runs
and exports stay in `--work`; rows already in the file of `--json` are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.data.evaluation import load_windows
from lowbit.formats import base
from lowbit.runtime.clients import find_client
from lowbit.runtime.planned import planned
from lowbit.runtime.verify import verify

Formats = Mapping[str, Sequence[str]]
"""Format -> clients."""
TRAINED: dict[str, Formats] = {
    "gptq-w4a16-g128": {
        "compressed-tensors": ("transformers", "vllm"),
        "gptq": ("gptqmodel", "transformers", "vllm"),
        "awq": ("gptqmodel", "vllm"),
        "gguf": ("llamacpp",),
        "mlx": ("mlx",),
        "modelopt": ("vllm",),
        "bitsandbytes": ("bitsandbytes",),
    },
    "awq-w4a16-g128-asym": {
        "compressed-tensors": ("transformers", "vllm"),
        "gptq": ("gptqmodel", "vllm"),
        "awq": ("gptqmodel", "transformers", "vllm"),
        "mlx": ("mlx",),
    },
    "awq-w4a16-g64-asym target=mlx": {"mlx": ("mlx",)},
    "gptq-w3a16-g128": {
        "compressed-tensors": ("transformers",),
        "gptq": ("gptqmodel", "transformers"),
        "awq": ("gptqmodel",),
        "mlx": ("mlx",),
    },
    "gptq-w8a16-g32": {"gptq": ("gptqmodel", "vllm"), "gguf": ("llamacpp",), "mlx": ("mlx",)},
    "gptq-w4a16-g32-asym target=gguf": {"gguf": ("llamacpp",)},
    "gptq-q4k": {"gguf": ("llamacpp",), "compressed-tensors": ("transformers",)},
    "gptq-q2k": {"gguf": ("llamacpp",)},
    "gptq-w8a8": {"compressed-tensors": ("transformers", "vllm"), "gguf": ("llamacpp",)},
    "smoothquant-w8a8": {"compressed-tensors": ("transformers", "vllm")},
    "quarot+gptq-w4a16-g128 quarot.down=false quarot.across=false": {"compressed-tensors": ("transformers", "vllm")},
    "rtn-fp8": {"compressed-tensors": ("transformers", "vllm")},
    "rtn-nvfp4a16": {"compressed-tensors": ("transformers", "vllm")},
    "rtn-nvfp4-static": {"compressed-tensors": ("transformers",)},
    "rtn-mxfp4a16": {"compressed-tensors": ("transformers",), "gguf": ("llamacpp",), "mlx": ("mlx",)},
    "rtn-nf4-g64": {"bitsandbytes": ("bitsandbytes",)},
    "rtn-w4a16kv8-g128 scheme.kv.layout=tensor scheme.kv.rule=e4m3": {"compressed-tensors": ("transformers", "vllm")},
}
RANDOM: dict[str, Formats] = {
    "rtn-w4a16-g128": {
        "compressed-tensors": ("transformers", "vllm"),
        "gptq": ("gptqmodel", "transformers", "vllm"),
        "gguf": ("llamacpp",),
        "mlx": ("mlx",),
    },
    "rtn-w4a16-g128-asym": {"awq": ("gptqmodel", "transformers", "vllm")},
    "rtn-w8a8": {"compressed-tensors": ("transformers", "vllm")},
    "rtn-fp8": {"compressed-tensors": ("transformers", "vllm"), "modelopt": ("vllm",)},
    "rtn-q4k": {"gguf": ("llamacpp",)},
    "rtn-nf4-g64": {"bitsandbytes": ("bitsandbytes",)},
}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"query_pre_attn_scalar": 64, "sliding_window": 512},
}
SQUARES = 'scheme.weights={"format":"fp8-e4m3","block":[128,128]} scheme.activations.group=128'
"""DeepSeek-V3's FP8, which is the one whose experts vLLM has kernels for on CPUs (those with AMX)."""
OF_FAMILIES: dict[str, dict[str, Formats]] = {"mixtral": {f"rtn-fp8 {SQUARES}": {"compressed-tensors": ("vllm",)}}}
"""Recipes for one family alone, after those for all of them."""
RENAMED = ("mixtral", "gptqmodel")
"""Family and client that look the experts up by transformers' names, not the checkpoint's."""
FEW: dict[str, tuple[slice, slice]] = {"vllm": (slice(0, 1), slice(0, 64)), "mlx": (slice(0, 2), slice(None))}
"""Windows and tokens that a client is given where it is slow on a CPU: vLLM in FP8 with a range per row, which it
multiplies number by number (64 tokens of a model of 33 million weights take minutes), and MLX always."""
SAMPLES, LENGTH = 32, 512
"""Of the calibration text."""
KEYS = ("model", "recipe", "format", "client")


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--work", type=Path, default=None, help="where runs and exports stay")
    parser.add_argument("--only", nargs="+", default=[""], help="rows that hold one of these")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    done = dict(finished(arguments.json))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, arguments.work or Path(scratch))
        for key in rows(arguments.model.name):
            if key in done or not any(text in " ".join(key) for text in arguments.only):
                continue
            began = time.perf_counter()
            row = dict(zip(KEYS, key, strict=True)) | bench.measure(*key)
            done[key] = row | {"seconds": round(time.perf_counter() - began, 1)}
            print(json.dumps(done[key]), file=sys.stderr, flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    print(json.dumps(done[key]), file=file)
    print_table([done[key] for key in rows(arguments.model.name) if key in done])


def rows(trained: str) -> Iterator[tuple[str, ...]]:
    """(model, recipe, format, client) of every row, in the order of the table."""
    families = [(family, RANDOM | OF_FAMILIES.get(family, {})) for family in FAMILIES]
    for model, recipes in ((trained, TRAINED), *families):
        for recipe, formats in recipes.items():
            for form, clients in formats.items():
                yield from ((model, recipe, form, client) for client in clients)


def finished(file: Path | None) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The rows of an earlier call."""
    if file is not None and file.exists():
        for line in file.read_text("utf8").splitlines():
            row = json.loads(line)
            yield tuple(row[key] for key in KEYS), row


class Bench:
    """The models with their windows, and the directory in which what is made of them stays."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.text = load_windows(arguments.text, tokenizer, arguments.length, arguments.windows)
        self.random = torch.randint(
            3, len(tokenizer), tuple(self.text.shape), generator=torch.Generator().manual_seed(0)
        )
        self.tokenizer = tokenizer
        self.load = lru_cache(maxsize=1)(self._load)

    def measure(self, model: str, recipe: str, form: str, client: str) -> dict[str, Any]:
        """Quantize and export what is not there yet, and verify it in the client."""
        run = self.work / re.sub(r"[^\w.+-]", "", f"{model} {recipe}".replace(" ", "_").replace("=", "-"))
        names = "transformers" if (model, client) == RENAMED else "checkpoint"
        target = run.with_name(f"{run.name}@{form}" + ("-renamed" if names == "transformers" else ""))
        try:
            self.quantize(model, recipe, run)
            if not target.exists():
                lowbit.export(run, target, format=form, names=names)
        except ValueError as error:
            return {"refused": str(error)}
        windows = self.text if model == self.arguments.model.name else self.random
        windows = windows[FEW[client]] if client == "mlx" or (client, recipe) == ("vllm", "rtn-fp8") else windows
        with interpreter(form, client):
            found = verify(client, target, self.load(run), windows, planned=planned(run, base.find(form)))
        message = found.message.replace(f"{self.work.resolve()}/", "")
        return asdict(found) | {"message": message, "windows": list(windows.shape), "names": names}

    def quantize(self, model: str, recipe: str, run: Path) -> None:
        """A recipe's name, then settings of it and the target, with `=`. A finished run is left as it is."""
        name, *words = recipe.split()
        settings = [word for word in words if not word.startswith("target=")]
        (target,) = [word.removeprefix("target=") for word in words if word not in settings] or [None]
        source = self.arguments.model if model == self.arguments.model.name else self.made(model)
        calibration = {"calibration": self.arguments.calibration, "samples": SAMPLES, "length": LENGTH}
        needs_text = not name.startswith("rtn-") or "static" in name or "kv" in name
        lowbit.quantize(source, name, run, settings=settings, target=target, **(calibration if needs_text else {}))

    @staticmethod
    def _load(run: Path) -> Any:
        return lowbit.load(run, dtype=torch.float32)

    def made(self, family: str) -> Path:
        """A random model of the family, in bfloat16, with the trained model's tokenizer; made once."""
        place = self.work / family
        if place.exists():
            return place
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = CONFIG_MAPPING[family](**SHAPE, **FAMILIES[family], **special, vocab_size=len(self.tokenizer))
        generator = torch.Generator().manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim < 2:
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        model.to(torch.bfloat16).save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        return place


@contextmanager
def interpreter(form: str, client: str) -> Iterator[None]:
    """transformers needs GPTQModel beside it for GPTQ and AWQ, so it runs where that is, unless told otherwise."""
    variable, helper = find_client("transformers").variable, find_client("gptqmodel").variable
    lent = client == "transformers" and form in ("gptq", "awq") and variable not in os.environ and helper in os.environ
    if lent:
        os.environ[variable] = os.environ[helper]
    try:
        yield
    finally:
        if lent:
            del os.environ[variable]


def print_table(found: Sequence[Mapping[str, Any]]) -> None:
    """Markdown; why a row is no plain success stands below, by number."""
    print("| model | recipe | format | client | loads | difference | KL | top-1 | perplexity there | here | verdict |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    notes: dict[str, int] = {}
    usual = max(row.get("windows", []) for row in found)
    for row in found:
        reasons = [row["refused"]] if "refused" in row else list(row["remarks"])
        if row.get("windows", usual) != usual:
            reasons.append(f"on {row['windows'][0]} x {row['windows'][1]} tokens")
        if row.get("names") == "transformers":
            reasons.append("exported with --names transformers")
        verdict = "refused" if "refused" in row else row["message"].split(":")[0]
        if verdict not in ("verified", "refused"):
            reasons = [shorten(row["message"].split(" (in ")[0].removeprefix(f"{verdict}: "), 300, placeholder=" …")]
        numbers = "".join(f" ({notes.setdefault(reason, len(notes) + 1)})" for reason in reasons)
        recipe, *settings = row["recipe"].split()
        named = "".join([f"`{recipe}`", *(f" `{setting}`" for setting in settings)])
        cells = (row["model"], named, row["format"], row["client"], *figures(row), f"{verdict}{numbers}")
        print(f"| {' | '.join(cells)} |")
    print()
    for reason, number in notes.items():
        print(f"{number}. {reason}")


def figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    """loads, difference, KL, top-1 and both perplexities of a row, as the table shows them."""
    if row.get("client_perplexity") is None:
        return ("no", *[""] * 5)
    there, here = (f"{row[name]:.4f}" for name in ("client_perplexity", "perplexity"))
    if row["kl"] is None:
        return "yes", f"{row['score_difference']:+.4f} ± {row['score_spread']:.3f} nats", "", "", there, here
    difference = row["max_logit_difference"] / row["largest_logit"]
    return "yes", f"{difference:.1e}", f"{row['kl']:.1e}", f"{row['top1']:.2%}", there, here


if __name__ == "__main__":
    main()
