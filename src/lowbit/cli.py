"""The command line. Results go to stdout, everything else (progress, notices, errors) to stderr.

Exit status: 0 done, 1 failed, 2 a request that cannot be met, 130 interrupted (run the same command to go on).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import build_parser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = build_parser(COMMANDS).parse_args(argv)
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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not have been imported
            raise
        return _fail("out of GPU memory: finished blocks are kept; lower --gpu-memory or use --device cpu", 1)
    except OSError as error:
        return _fail(str(error) if error.errno is None else f"{error.strerror}: {error.filename or ''}", 1)


def _fail(message: str, status: int) -> int:
    print(f"lowbit: {' '.join(message.split())}", file=sys.stderr)
    return status


# --- commands ---------------------------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _request(arguments: argparse.Namespace, **more: Any) -> Any:
    from .request import Request

    names = (
        "settings",
        "overrides",
        "ignore",
        "calibration",
        "samples",
        "length",
        "seed",
        "target",
        "bits",
        "size",
        "sensitivity",
        "device",
        "dtype",
        "memory",
        "gpu_memory",
        "gpus",
        "lanes",
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
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one speaks
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
            tasks_data=arguments.tasks_data,
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
        arguments.model,
        arguments.output,
        format=arguments.format,
        names=arguments.names,
        verify=arguments.verify,
        notice=_notice,
    )
    _write_json(arguments.json, exported.to_json())
    print("\n".join(exported.lines()))
    return 0 if exported.passed else 1


def _import(arguments: argparse.Namespace) -> None:
    from . import api
    from .screen import result_lines

    trust = arguments.trust_remote_code
    result = api.import_model(arguments.model, arguments.output, trust_remote_code=trust, notice=_notice)
    _write_json(arguments.json, result.to_json())
    print("\n".join(result_lines(result)))


def _inspect(arguments: argparse.Namespace) -> None:
    from .graph.describe import describe
    from .prepare import anatomy_of, prepare
    from .screen import plan_lines
    from .stream.checkpoint import Checkpoint

    if arguments.recipe is not None:
        prepared = prepare(_request(arguments))
        print(describe(prepared.plan.anatomy))
        print("\n".join(["", *plan_lines(prepared)]))
        return
    checkpoint = Checkpoint.open(
        arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    print(describe(anatomy_of(checkpoint, arguments.trust_remote_code)[1]))


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
            compiled=arguments.compile,
            trust_remote_code=arguments.trust_remote_code,
            notice=_notice,
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


def _speed(arguments: argparse.Namespace) -> None:
    from .kernels.speed import speed
    from .prepare import device_of

    result = speed(device_of(arguments.device), on_table=lambda name: _notice(f"measuring {name}"))
    _write_json(arguments.json, result.to_json())
    print("\n".join(result.lines()))


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


COMMANDS = {
    "quantize": _quantize,
    "evaluate": _evaluate,
    "export": _export,
    "import": _import,
    "inspect": _inspect,
    "generate": _generate,
    "recipes": _recipes,
    "speed": _speed,
}


if __name__ == "__main__":
    sys.exit(main())
