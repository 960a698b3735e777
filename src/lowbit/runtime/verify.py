"""Proof that a client computes from an export what lowbit computes from its own files.

The client is the real one, in a process of its own: it may crash, run out of memory or patch modules without touching
this one, and both models are never in one address space. It hands back its logits, and for every linear with quantized
inputs it compares, in the running model, what the multiplication received with what lowbit's reference makes of the
same input. Rounding is discontinuous, so equal codes on equal inputs is the exact statement there; logits are then held
to a divergence, and where only weights are quantized, to equality.

Shape letters: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..formats.files import read_shard, write_json, write_shard
from ..formats.native import spec_from_json, spec_to_json
from ..modules.linear import QLinear, quantize_activation
from ..numerics.grid import Grid
from ..numerics.spec import Int, Spec

EXACT = 1e-5
"""Largest difference of fp32 logits, as a part of the largest logit (at least 1): the order of summation is free."""
LARGEST_KL = 1e-3
"""nats, where inputs are quantized: after equal codes, only flips that rounding noise upstream sets off remain."""
LEAST_TOP1 = 0.99


@dataclass(frozen=True)
class Verification:
    """What comparing a client with lowbit showed. Numbers are None where the client produced none."""

    client: str
    version: str
    passed: bool
    message: str
    max_logit_difference: float | None = None
    largest_logit: float | None = None
    linears_compared: int = 0
    """Linears whose quantized inputs were compared element by element."""
    unequal_codes: int = 0
    """Elements of those inputs that differed."""
    kl: float | None = None
    top1: float | None = None


def verify_transformers(
    export: Path, reference: nn.Module, windows: Tensor, *, trust_remote_code: bool = False
) -> Verification:
    """Reload a compressed-tensors directory through transformers and compare it with lowbit's own model.

    `reference` is the run directory loaded by lowbit in fp32, `windows` [N, T] are token ids to compare it on.
    """
    client = "transformers"
    if find_spec("compressed_tensors") is None:
        missing = "not verified: compressed-tensors is not installed, pip install 'lowbit[export]'"
        return Verification(client, version(client), False, missing)
    released = f"{version(client)} with compressed-tensors {version('compressed-tensors')}"
    with TemporaryDirectory(prefix="lowbit-verify-") as name:
        job = Path(name)
        remarks, quantized = _hand_over(job, export, reference, windows, trust_remote_code)
        with _as_transformers(reference, _dtype_of(export)):
            expected = _logits(reference, windows)
        ended = subprocess.run(
            [sys.executable, "-m", __name__, str(job)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if ended.returncode:
            return Verification(client, released, False, _crash(ended))
        found = json.loads((job / "found.json").read_text("utf8"))
        if found["problems"]:
            return Verification(client, released, False, _unreadable(found["problems"]))
        verification = _judge(expected, read_shard(job / "logits.safetensors")["logits"], found, quantized)
    message = f"{verification.message} (transformers {released}){remarks}"
    return replace(verification, client=client, version=released, message=message)


def _hand_over(job: Path, export: Path, reference: nn.Module, windows: Tensor, trust: bool) -> tuple[str, bool]:
    """Write what the client needs: windows, and the input formats of linears. Gives (remarks, any input quantized)."""
    layers = {name: module.layer for name, module in reference.named_modules() if isinstance(module, QLinear)}
    layers = {name: layer for name, layer in layers.items() if layer.activation is not None}
    watched = {name: layer for name, layer in layers.items() if not _in_experts(name)}
    grids = {f"{name}.scale": layer.input_grid.scale for name, layer in watched.items() if layer.input_grid is not None}
    write_shard(job / "job.safetensors", {"windows": windows, **grids})
    formats = {name: spec_to_json(layer.activation) for name, layer in watched.items()}
    threads = torch.get_num_threads()
    write_json(job / "job.json", {"export": str(export), "trust": trust, "formats": formats, "threads": threads})
    left_out = "; transformers does not quantize the inputs of a mixture's experts, which were compared without"
    return left_out if len(watched) < len(layers) else "", bool(layers)


def _judge(expected: Tensor, logits: Tensor, found: Mapping[str, Any], quantized: bool) -> Verification:
    """Hold the client's logits [N, T, V] and its comparison of inputs to the limits."""
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    kl = float(F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True))
    kl = max(0.0, kl / expected[..., 0].numel())
    top1 = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    unequal = {name: count for name, count in found["unequal"].items() if count}
    figures = f"largest logit difference {difference:.2g} of {largest:.3g}, KL {kl:.2g}, top-1 agreement {top1:.2%}"
    if unequal:
        first = next(iter(unequal))
        flat = ", whose inputs it flattens and gives one range for all tokens" if first in found["flat"] else ""
        message = f"failed: inputs get other codes in {len(unequal)} linears, the first {first}{flat}; {figures}"
    elif quantized and (kl > LARGEST_KL or top1 < LEAST_TOP1):
        message = f"failed: equal codes on equal inputs, but {figures}"
    elif not quantized and not difference <= EXACT * max(1.0, largest):
        message = f"failed: {figures}"
    else:
        codes = f"equal codes on equal inputs in {len(found['unequal'])} linears, " if quantized else ""
        message = f"verified: {codes}{figures}"
    return Verification(
        "",
        "",
        message.startswith("verified"),
        message,
        difference,
        largest,
        len(found["unequal"]),
        sum(unequal.values()),
        kl,
        top1,
    )


def _unreadable(problems: Sequence[str]) -> str:
    """What to say of tensors that the client did not load as they were written."""
    if all(problem.endswith("weight_zero_point is mismatched") for problem in problems):
        return (
            f"not verified: transformers {version('transformers')} cannot read asymmetric packed weights (it expects "
            "zero-points of another shape): pip install transformers==5.22.0 to verify; vLLM 0.32 reads them"
        )
    return f"failed: {len(problems)} tensors did not load as written, the first: {problems[0]}"


def _crash(ended: subprocess.CompletedProcess[str]) -> str:
    """Why the client produced nothing, in one sentence."""
    if ended.returncode < 0:
        return f"not verified: the client was killed by signal {-ended.returncode}, perhaps for lack of memory"
    said = ended.stderr.strip().splitlines() or ["it said nothing"]
    return f"not verified: transformers {version('transformers')} cannot run the export: {said[-1]}"


def _in_experts(name: str) -> bool:
    return ".experts." in name


def _dtype_of(export: Path) -> torch.dtype:
    """The dtype that the export's configuration gives the model."""
    config = json.loads((export / "config.json").read_text("utf8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")  # type: ignore[no-any-return]


@contextmanager
def _as_transformers(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a mixture's experts compute as transformers has them: fused, so without quantized inputs, and dequantized in
    the dtype that the scales are stored in before they become fp32."""
    experts = [m for name, m in model.named_modules() if isinstance(m, QLinear) and _in_experts(name)]
    before = [(module.layer, module.weight) for module in experts]
    for module in experts:
        spec = module.layer.weight.parts[0].grid.spec
        rounded = dtype if isinstance(spec.number, Int) and spec.scale == "half" else torch.float32
        module.weight = module.layer.weight.dequantize(rounded).to(module.weight)
        module.layer = replace(module.layer, activation=None)
    try:
        yield
    finally:
        for module, (layer, weight) in zip(experts, before, strict=True):
            module.layer, module.weight = layer, weight


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    """fp32 logits [N, T, V], one window at a time."""
    return torch.cat([model(input_ids=window[None], use_cache=False).logits.float().cpu() for window in windows])


# --- the client's process ---------------------------------------------------------------------------------------------


class _Inputs(TorchFunctionMode):
    """Compares what each watched linear really multiplies with lowbit's quantization of what it was given."""

    def __init__(self, model: nn.Module, formats: Mapping[str, tuple[Spec, Grid | None]]) -> None:
        super().__init__()
        self.unequal = dict.fromkeys(formats, 0)
        self.flat: set[str] = set()
        self._formats = formats
        self._given: tuple[str, Tensor] | None = None
        for name in formats:
            model.get_submodule(name).register_forward_pre_hook(self._note(name))

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._given = name, arguments[0]

        return hook

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and self._given is not None:
            (name, x), self._given = self._given, None
            expected = quantize_activation(x, *self._formats[name])
            self.unequal[name] += int((args[0] != expected).sum())
            if x.dim() < 3:
                self.flat.add(name)
        return function(*args, **(kwargs or {}))


def _run_client(job: Path) -> None:
    """Load the export through transformers and write down its logits and what happened to the inputs."""
    from transformers import AutoModelForCausalLM

    asked, tensors = json.loads((job / "job.json").read_text("utf8")), read_shard(job / "job.safetensors")
    torch.set_num_threads(asked["threads"])
    model, loaded = AutoModelForCausalLM.from_pretrained(
        asked["export"],
        dtype=torch.float32,
        trust_remote_code=asked["trust"],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, by name
    )
    problems = _problems(loaded)
    if problems:
        write_json(job / "found.json", {"problems": problems})
        return
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):  # a mixture's experts stay in their scales' dtype
            parameter.data = parameter.data.float()
    formats = {}
    for name, data in asked["formats"].items():
        spec, scale = spec_from_json(data), tensors.get(f"{name}.scale")
        assert spec is not None
        formats[name] = spec, None if scale is None else Grid(spec, scale)
    with _Inputs(model, formats) as inputs:
        logits = _logits(model.eval(), tensors["windows"])
    write_shard(job / "logits.safetensors", {"logits": logits})
    write_json(job / "found.json", {"problems": [], "unequal": inputs.unequal, "flat": sorted(inputs.flat)})


def _problems(loaded: Mapping[str, Any]) -> list[str]:
    """What from_pretrained says went wrong; that it has no use for the input ranges of experts is known."""
    found = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in loaded[f"{kind}_keys"])
        found += [f"{name} is {kind}" for name in names if not (_in_experts(name) and name.endswith(".input_scale"))]
    return found


if __name__ == "__main__":
    _run_client(Path(sys.argv[1]))
