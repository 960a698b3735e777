"""Proof that a client computes from an export what lowbit computes from its own files.

The client is the real one, in a process of its own (see `clients`). How near the numbers have to be depends on what it
does with them. Where it multiplies by dequantized weights in fp32, logits are equal. Where inputs are quantized,
rounding is discontinuous: transformers shows what its linears multiply, which has to be the very codes that lowbit's
reference makes of the same input, and logits are then held to a divergence. Clients with kernels of their own (16 bits,
quantized inputs) are held to a divergence, and those that give scores alone to the mean and spread of their difference.
The files are held to their plan: codes and scales, and hardly more.

Shape letters: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.native import spec_to_json
from ..modules.linear import QLinear
from ..numerics.spec import Float, Int, Spec
from .clients import Client, find_client
from .planned import Planned

TRANSFORMERS = "transformers"
EXACT = 1e-5
"""Largest difference of fp32 logits, as a part of the largest logit (at least 1): the order of summation is free."""

FLIPS = 2.5
"""How much further scores may be off where inputs are quantized, since rounding noise flips their codes: lowbit's own
model in bf16 spreads around itself in fp32 by 0.03 nats with 16-bit inputs, 0.12 with int8 and 0.16 with FP8 ones."""


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
    score_difference: float | None = None
    """Mean of the client's log-probability of the next token less lowbit's, nats."""
    score_spread: float | None = None
    """Standard deviation of that difference."""
    planned_bytes: int | None = None
    """What codes, scales and everything else take in lowbit's own layout."""
    stored_bytes: int | None = None
    """What the tensors of the export take."""


def verify(
    name: str,
    export: Path,
    reference: nn.Module,
    windows: Tensor,
    *,
    planned: Planned | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Reload the directory `export` in the client `name` and compare it with lowbit's own model.

    `reference` is the run directory loaded by lowbit in fp32, `windows` [N, T] are token ids to compare it on, and
    `planned` is what the files may weigh. Raises ValueError for a client that lowbit does not know.
    """
    client = find_client(name)
    missing = client.missing()
    if missing is not None:
        return Verification(name, "", False, f"not verified: {missing}")
    with TemporaryDirectory(prefix="lowbit-verify-") as scratch:
        job = Path(scratch)
        remarks, quantized = _hand_over(job, client, export, reference, windows, trust_remote_code)
        with _as_transformers(reference, export) if client.name == TRANSFORMERS else nullcontext():
            expected = _logits(reference, windows)
        command = [client.python, str(client.script), str(job)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=job)  # some write logs where they are
        if ended.returncode:
            return Verification(name, "", False, _crash(client, ended))
        found = json.loads((job / "found.json").read_text("utf8"))
        if found.get("problems"):
            return Verification(name, found["version"], False, _unreadable(client, found["problems"]))
        if (job / "logits.npy").is_file():
            logits = torch.from_numpy(np.load(job / "logits.npy"))
            exact = client.exact and not quantized and found.get("dtype", "float32") == "float32"
            judged = _judge(client, expected, logits, found, exact)
        else:
            scores = torch.from_numpy(np.load(job / "scores.npy"))
            judged = _judge_scores(client, expected, scores, windows, quantized)
    message = f"{judged.message} ({name} {found['version']}){remarks}"
    judged = replace(judged, client=name, version=found["version"], message=message)
    return judged if planned is None else weighed(judged, planned, export)


def weighed(found: Verification, planned: Planned, export: Path) -> Verification:
    """The same, failed where the files hold much less or more than they were planned to."""
    stored = planned.measure(export)
    size = f"{stored / 1e6:,.2f} MB of tensors for {planned.total / 1e6:,.2f} MB planned"
    fits = planned.least <= stored <= planned.most
    message = f"{found.message}; {size}"
    if not fits:
        message = f"failed: {size}, which is not what codes and scales take; {found.message}"
    return replace(
        found, passed=found.passed and fits, message=message, planned_bytes=planned.total, stored_bytes=stored
    )


def _hand_over(
    job: Path, client: Client, export: Path, reference: nn.Module, windows: Tensor, trust: bool
) -> tuple[str, bool]:
    """Write what the client needs: windows, and for transformers the input formats of linears.

    Gives (remarks, whether the client quantizes any inputs).
    """
    layers = {name: module.layer for name, module in reference.named_modules() if isinstance(module, QLinear)}
    layers = {name: layer for name, layer in layers.items() if layer.activation is not None}
    asked: dict[str, Any] = {
        "export": str(export.resolve()),
        "windows": windows.tolist(),
        "threads": torch.get_num_threads(),
    }
    watched = {}
    if client.name == TRANSFORMERS:
        watched = {name: layer for name, layer in layers.items() if not _in_experts(name)}
        grids = {name: layer.input_grid for name, layer in watched.items()}
        ranges: Any = {name: grid.scale.numpy() for name, grid in grids.items() if grid is not None}
        np.savez(job / "job.npz", **ranges)
        asked["formats"] = {name: spec_to_json(layer.activation) for name, layer in watched.items()}
        asked |= {"trust": trust, "lowbit": str(Path(__file__).parents[2])}
    (job / "job.json").write_text(json.dumps(asked), "utf8")
    left_out = "; transformers does not quantize the inputs of a mixture's experts, which were compared without"
    return left_out if client.name == TRANSFORMERS and len(watched) < len(layers) else "", bool(layers)


def _judge(client: Client, expected: Tensor, logits: Tensor, found: Mapping[str, Any], exact: bool) -> Verification:
    """Hold the client's logits [N, T, V] and its comparison of inputs to the limits."""
    if logits.shape != expected.shape:
        shapes = f"{list(logits.shape)} instead of {list(expected.shape)}"
        return Verification("", "", False, f"failed: the client gives logits of shape {shapes}")
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    kl = float(F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True))
    kl = max(0.0, kl / expected[..., 0].numel())
    top1 = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    compared: Mapping[str, int] = found.get("unequal", {})
    unequal = {name: count for name, count in compared.items() if count}
    figures = f"largest logit difference {difference:.2g} of {largest:.3g}, KL {kl:.2g}, top-1 agreement {top1:.2%}"
    codes = f"equal codes on equal inputs in {len(compared)} linears, " if compared else ""
    if unequal:
        first = next(iter(unequal))
        flat = ", whose inputs it flattens and gives one range for all tokens" if first in found["flat"] else ""
        message = f"failed: inputs get other codes in {len(unequal)} linears, the first {first}{flat}; {figures}"
    elif exact and not difference <= EXACT * max(1.0, largest):
        message = f"failed: {figures}"
    elif not exact and not (kl <= client.kl and top1 >= client.top1):
        message = f"failed: {'equal codes on equal inputs, but ' if compared else ''}{figures}"
    else:
        message = f"verified: {codes}{figures}"
    return Verification(
        "",
        "",
        message.startswith("verified"),
        message,
        difference,
        largest,
        len(compared),
        sum(unequal.values()),
        kl,
        top1,
    )


def _judge_scores(client: Client, expected: Tensor, scores: Tensor, windows: Tensor, quantized: bool) -> Verification:
    """Hold log-probabilities [N, T - 1] of the next tokens to those of expected logits [N, T, V]."""
    ours = expected[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    difference = scores - ours
    mean, spread = float(difference.mean()), float(difference.std())
    figures = f"mean difference of log-probabilities {mean:+.2g} nats, its spread {spread:.2g}"
    slack = FLIPS if quantized else 1.0
    passed = abs(mean) <= slack * client.score and spread <= slack * client.spread
    message = f"{'verified' if passed else 'failed'}: {figures}"
    return Verification("", "", passed, message, score_difference=mean, score_spread=spread)


def _unreadable(client: Client, problems: Sequence[str]) -> str:
    """What to say of tensors that the client did not load as they were written."""
    if all(problem.endswith("weight_zero_point is mismatched") for problem in problems):
        return (
            f"not verified: transformers {version('transformers')} cannot read asymmetric packed weights (it expects "
            "zero-points of another shape): pip install transformers==5.22.0 to verify; vLLM 0.32 reads them"
        )
    return f"failed: {len(problems)} tensors did not load as written, the first: {problems[0]} ({client.name})"


def _crash(client: Client, ended: subprocess.CompletedProcess[str]) -> str:
    """Why the client produced nothing, in one sentence."""
    if ended.returncode < 0:
        return f"not verified: the client was killed by signal {-ended.returncode}, perhaps for lack of memory"
    said = ended.stderr.strip().splitlines() or ["it said nothing"]
    return f"not verified: {client.name} cannot run the export: {said[-1]}"


def _in_experts(name: str) -> bool:
    return ".experts." in name


def _dtype_of(export: Path) -> torch.dtype:
    """The dtype that the export's configuration gives the model."""
    config = json.loads((export / "config.json").read_text("utf8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")  # type: ignore[no-any-return]


@contextmanager
def _as_transformers(model: nn.Module, export: Path) -> Iterator[None]:
    """Let a mixture's experts compute as transformers has them: fused, so without quantized inputs, and dequantized in
    the dtype that the scales are stored in before they become fp32. Floats below 8 bits become bfloat16 anywhere."""
    dtype = _dtype_of(export)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, QLinear) and m.layer.weight.parts]
    other = [(name, m) for name, m in linears if _in_experts(name) or _is_small(m.layer.weight.parts[0].grid.spec)]
    before = [(module, module.layer, module.weight) for _, module in other]
    for name, module in other:
        spec = module.layer.weight.parts[0].grid.spec
        rounded = dtype if isinstance(spec.number, Int) and spec.scale == "half" else torch.float32
        rounded = torch.bfloat16 if _is_small(spec) else rounded
        module.weight = module.layer.weight.dequantize(rounded).to(module.weight)
        if _in_experts(name):
            module.layer = replace(module.layer, activation=None)
    try:
        yield
    finally:
        for module, layer, weight in before:
            module.layer, module.weight = layer, weight


def _is_small(spec: Spec) -> bool:
    """Whether a weight is made of floats of fewer than 8 bits."""
    return isinstance(spec.number, Float) and spec.bits < 8


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    """fp32 logits [N, T, V], one window at a time."""
    return torch.cat([model(input_ids=window[None], use_cache=False).logits.float().cpu() for window in windows])
