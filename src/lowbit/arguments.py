"""What the command line can be asked for: every command, every option, and their help. What they do is in `cli.py`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

Command = Callable[[argparse.Namespace], int | None]

MODEL_HELP = "a model directory, a Hugging Face hub id, or `demo` (the small model in the package)"


class _Parser(argparse.ArgumentParser):
    """Argument errors in one sentence, which points to the help of the command that was called."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # argparse would let the parser of all commands say so
            options = [each.partition("=")[0] for each in unknown if each.startswith("--")]
            near = [
                match for each in options for match in get_close_matches(each, self._option_string_actions, 1, 0.75)
            ]
            meant = f"; did you mean {' '.join(near)}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Every command and its options; `commands` are what they call, by name."""
    parser = _Parser(
        prog="lowbit",
        description="Quantize language models, prove what it costs, and export what real software loads.",
        epilog="Start with: lowbit quantize demo --recipe gptq-w4a16-g128 --output out",
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(parsers)
    _add_evaluate(parsers)
    _add_export(parsers)
    _add_import(parsers)
    _add_inspect(parsers)
    _add_generate(parsers)
    _add_recipes(parsers)
    _add_speed(parsers)
    for name, function in commands.items():
        parsers.choices[name].set_defaults(command=function)
    return parser


def _add(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"Example: {example}"
    )
    return parser


def _add_recipe_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--recipe",
        required=required,
        metavar="NAME|FILE.yaml",
        help="for instance gptq-w4a16-g128; see `lowbit recipes`",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the recipe, for instance gptq.damp=0.05",
    )
    parser.add_argument(
        "--override",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN=SCHEME",
        help="other formats for some linears, for instance '*.down_proj=w8a16-g128'",
    )
    parser.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="PATTERN", help="linears that stay in 16 bits"
    )
    _add_budget_options(parser)
    parser.add_argument("--target", metavar="FORMAT", help="refuse at once what this export format cannot carry")
    text = parser.add_argument_group("calibration text (for recipes that look at activations)")
    text.add_argument(
        "--calibration",
        metavar="NAME|FILE.txt",
        help="a text file, a published set (wikitext2, c4, ptb, pile …), demo (packaged; the default), random (token "
        "ids), or generated (sampled from the model, which must fit into memory)",
    )
    text.add_argument("--samples", type=int, help="windows of text (default 128)")
    text.add_argument("--length", type=int, help="tokens in a window (default 2048, or the model's context)")
    text.add_argument("--seed", type=int, help="of the draw (default 0)")
    _add_machine_options(parser.add_argument_group("machine"))
    _add_model_options(parser)


def _add_machine_options(machine: argparse._ArgumentGroup) -> None:
    machine.add_argument("--device", default="auto", help="auto, cpu or cuda")
    machine.add_argument("--dtype", default="auto", help="what blocks compute in: auto, float32, bfloat16, float16")
    machine.add_argument(
        "--memory", type=_size, metavar="8GiB", help="memory budget; hidden states beyond it go to disk"
    )
    machine.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="24GiB",
        help="budget on a GPU; the least that a block needs goes beyond",
    )
    machine.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="share the calibration text and the rounding between N GPUs of this machine (or start N processes by "
        "torchrun, without this option)",
    )
    machine.add_argument(
        "--lanes",
        type=int,
        metavar="N",
        help="sum statistics in N parts of the text (default: one a GPU); the same lanes give the same bytes on any "
        "number of GPUs that divides them",
    )


def _add_budget_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits",
        type=float,
        metavar="3.25",
        help="bits per weight, spent where they matter, for a recipe without a width such as gptq-g128",
    )
    parser.add_argument("--size", type=_size, metavar="4GB", help="the same as the size of the model's files")
    parser.add_argument(
        "--sensitivity",
        choices=("fisher", "kl"),
        default="fisher",
        help="what tells where bits matter: the loss's curvature (the default), or trying every linear at every width, "
        "which takes the whole model in memory",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")


def _add_quantize(commands: Any) -> None:
    parser = _add(
        commands,
        "quantize",
        "quantize a model block by block into a directory; run again to resume",
        "lowbit quantize demo --recipe awq+gptq-w4a16-g128 --output out",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_recipe_options(parser, required=True)
    parser.add_argument("--output", metavar="DIR", help="where the quantized model goes")
    parser.add_argument("--plan", action="store_true", help="check everything, print the plan, and stop")
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run left in the directory")
    _add_json(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _add(
        commands,
        "evaluate",
        "measure a model: perplexity, tasks, divergence from the original, size",
        "lowbit evaluate out --perplexity demo --against demo",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--perplexity",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME|FILE.txt",
        help="texts: a file, wikitext2, c4, c4-old, ptb, ptb-old, or demo (the default)",
    )
    parser.add_argument("--window", type=int, help="tokens in a window (default 2048, or the model's context)")
    parser.add_argument("--limit", type=int, metavar="WINDOWS", help="windows of each text, questions of each task")
    parser.add_argument("--tasks", default="", help="comma-separated tasks of lm-evaluation-harness")
    parser.add_argument(
        "--tasks-data",
        metavar="DIR",
        help="take their documents from local files like piqa.jsonl instead of the hub; without --tasks, all there are",
    )
    parser.add_argument(
        "--against", metavar="MODEL", help="the original: mean KL divergence, top-1 agreement and cosine"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_model_options(parser)
    _add_json(parser)


def _add_export(commands: Any) -> None:
    parser = _add(
        commands,
        "export",
        "write a quantized model in a format that other software loads",
        "lowbit export out --format compressed-tensors --output served --verify",
    )
    parser.add_argument("model", metavar="DIR", help="a directory that `lowbit quantize` made")
    parser.add_argument(
        "--format",
        required=True,
        metavar="NAME",
        help="compressed-tensors (vLLM, SGLang, transformers), gptq, awq, gguf (llama.cpp, Ollama), modelopt "
        "(TensorRT-LLM), mlx or bitsandbytes; see docs/formats.md",
    )
    parser.add_argument("--output", required=True, metavar="DIR2", help="where the exported model goes")
    parser.add_argument(
        "--names",
        default="checkpoint",
        metavar="WHOSE",
        help="of tensors: checkpoint, the original's, which vLLM reads (default), or transformers, its own tree's, by "
        "which GPTQModel looks experts up (gptq and awq)",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="CLIENT",
        help="reload it in a client and compare with lowbit's own numbers: transformers, vllm, gptqmodel, llamacpp, "
        "mlx or bitsandbytes (default: the format's own)",
    )
    _add_json(parser)


def _add_import(commands: Any) -> None:
    parser = _add(
        commands,
        "import",
        "read a model that another tool quantized, codes unchanged, to evaluate it or export it to another format",
        "lowbit import Llama-3.1-8B-GPTQ --output imported",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a compressed-tensors, GPTQ, AWQ, FP8, ModelOpt, MLX or bitsandbytes directory, a "
        "hub id of one, or a .gguf file",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where lowbit's own directory goes")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    _add_json(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        "print a model's anatomy and what a recipe would do to it; no weight is read",
        "lowbit inspect demo --recipe smoothquant-w8a8",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_recipe_options(parser, required=False)


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands,
        "generate",
        "continue a prompt with any model that lowbit loads",
        'lowbit generate out "Once upon a time"',
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--compile", action="store_true", help="on a GPU: faster tokens, after a minute's wait for the first"
    )
    _add_model_options(parser)


def _add_recipes(commands: Any) -> None:
    parser = _add(
        commands,
        "recipes",
        "list recipes, or show one as YAML to start a file from",
        "lowbit recipes gptq-w4a16-g128 > mine.yaml",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="any recipe name, listed or not")


def _add_speed(commands: Any) -> None:
    parser = _add(
        commands,
        "speed",
        "measure this machine's kernels against 16 bits, with the limits that its memory and its products set",
        "lowbit speed --json speed.json",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_json(parser)


def _size(text: str) -> int:
    """Bytes of "8GiB", "500MB", "2G"."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for instance 8GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
