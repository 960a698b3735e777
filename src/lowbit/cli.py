"""The command line. Results go to stdout, everything else (progress, notices, errors) to stderr.

Exit status: 0 done, 1 failed, 2 a request that cannot be met, 130 interrupted (run the same command to go on).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MODEL_HELP = "a model directory, a Hugging Face hub id, or `demo` (the small model in the package)"


class _Parser(argparse.ArgumentParser):
    """Argument errors in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        return _fail("interrupted; finished blocks are kept, run the same command again to go on", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: pip install {error.name}, or lowbit[all]", 1)
    except MemoryError:
        return _fail("out of memory: finished blocks are kept; lower --memory or use a machine with more", 1)
    except OSError as error:
        return _fail(str(error) if error.errno is None else f"{error.strerror}: {error.filename or ''}", 1)


def _fail(message: str, status: int) -> int:
    print(f"lowbit: {' '.join(message.split())}", file=sys.stderr)
    return status


# --- arguments --------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = _Parser(
        prog="lowbit",
        description="Quantize language models, prove what it costs, and export what real software loads.",
        epilog="Start with: lowbit quantize demo --recipe gptq-w4a16-g128 --output out",
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_generate(commands)
    _add_recipes(commands)
    return parser


def _add(commands: Any, name: str, function: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"Example: {example}"
    )
    parser.set_defaults(command=function)
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
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu or cuda")
    machine.add_argument("--dtype", default="auto", help="what blocks compute in: auto, float32, bfloat16, float16")
    machine.add_argument(
        "--memory", type=_size, metavar="8GiB", help="memory budget; hidden states beyond it go to disk"
    )
    _add_model_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")


def _add_quantize(commands: Any) -> None:
    parser = _add(
        commands,
        "quantize",
        _quantize,
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
        _evaluate,
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
    parser.add_argument("--limit", type=int, metavar="WINDOWS", help="windows of each text")
    parser.add_argument("--tasks", default="", help="comma-separated tasks of lm-evaluation-harness")
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
        _export,
        "write a quantized model in a format that other software loads",
        "lowbit export out --format compressed-tensors --output served --verify",
    )
    parser.add_argument("model", metavar="DIR", help="a directory that `lowbit quantize` made")
    parser.add_argument(
        "--format", required=True, metavar="NAME", help="compressed-tensors (vLLM, SGLang, transformers)"
    )
    parser.add_argument("--output", required=True, metavar="DIR2", help="where the exported model goes")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="transformers",
        metavar="CLIENT",
        help="reload it in a client and compare with lowbit's own numbers (default client: transformers)",
    )
    _add_json(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        _inspect,
        "print a model's anatomy and what a recipe would do to it; no weight is read",
        "lowbit inspect demo --recipe smoothquant-w8a8",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_recipe_options(parser, required=False)


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands,
        "generate",
        _generate,
        "continue a prompt with any model that lowbit loads",
        'lowbit generate out "Once upon a time"',
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_model_options(parser)


def _add_recipes(commands: Any) -> None:
    parser = _add(
        commands,
        "recipes",
        _recipes,
        "list recipes, or show one as YAML to start a file from",
        "lowbit recipes gptq-w4a16-g128 > mine.yaml",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="any recipe name, listed or not")


def _size(text: str) -> int:
    """Bytes of "8GiB", "500MB", "2G"."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for instance 8GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


# --- commands ---------------------------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _request(arguments: argparse.Namespace, **more: Any) -> Any:
    from .api import Request

    names = (
        "settings",
        "overrides",
        "ignore",
        "calibration",
        "samples",
        "length",
        "seed",
        "target",
        "device",
        "dtype",
        "memory",
        "revision",
        "trust_remote_code",
    )
    chosen = {name: getattr(arguments, name) for name in names}
    return Request(arguments.model, arguments.recipe, notice=_notice, **chosen, **more)


def _quantize(arguments: argparse.Namespace) -> None:
    from . import api
    from .screen import BlockProgress, plan_lines, result_lines

    if arguments.plan:
        print("\n".join(plan_lines(api.prepare(_request(arguments)))))
        return
    with BlockProgress(_console()) as progress:
        request = _request(arguments, output=arguments.output, restart=arguments.restart, on_block=progress.on_block)
        result = api.run(request)
    _write_json(arguments.json, result.to_json())
    print("\n".join(result_lines(result)))


def _evaluate(arguments: argparse.Namespace) -> None:
    from . import api
    from .screen import TextProgress

    with TextProgress(_console()) as progress:
        report = api.evaluate(
            arguments.model,
            perplexity=arguments.perplexity,
            window=arguments.window,
            limit=arguments.limit,
            tasks=[task for task in arguments.tasks.split(",") if task],
            against=arguments.against,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            notice=_notice,
            progress=progress.on_text,
        )
    _write_json(arguments.json, report.to_json())
    _print_table(report.table())


def _export(arguments: argparse.Namespace) -> int:
    from . import api

    exported = api.export(
        arguments.model, arguments.output, format=arguments.format, verify=arguments.verify, notice=_notice
    )
    _write_json(arguments.json, exported.to_json())
    print("\n".join(exported.lines()))
    return 0 if exported.passed else 1


def _inspect(arguments: argparse.Namespace) -> None:
    from . import api
    from .graph.describe import describe
    from .screen import plan_lines
    from .stream.checkpoint import Checkpoint

    if arguments.recipe is not None:
        prepared = api.prepare(_request(arguments))
        print(describe(prepared.plan.anatomy))
        print("\n".join(["", *plan_lines(prepared)]))
        return
    checkpoint = Checkpoint.open(
        arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    print(describe(api.anatomy_of(checkpoint, arguments.trust_remote_code)[1]))


def _generate(arguments: argparse.Namespace) -> None:
    from .api import generate

    print(
        generate(
            arguments.model,
            arguments.prompt,
            tokens=arguments.tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
        )
    )


def _recipes(arguments: argparse.Namespace) -> None:
    from . import recipes

    if arguments.name is not None:
        print(recipes.show(arguments.name), end="")
        return
    for name, purpose in recipes.NAMED.items():
        print(f"{name:34} {purpose}")
    print("\nas published, with the paper's calibration and the figure to meet:")
    for name in recipes.PAPERS:
        print(f"{f'papers/{name}':34} {recipes.summary(name)}")


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
