"""Proof that a client computes from an export what lowbit computes from its own files.

The client is the real one, in a process of its own (see `clients`). How near the numbers have to be depends on what it
does with them. Where it multiplies by dequantized weights in fp32, logits are equal. Where inputs are quantized,
rounding is discontinuous: transformers shows what its linears multiply, which has to be the very codes that lowbit's
reference makes of the same input, and computes once more with inputs as they come, where logits are equal again. What
is left between the two is rounding, which may carry them as far apart as it carries lowbit's own model from itself.
Clients with kernels of their own (16 bits, quantized inputs) are held to a divergence, and those that give scores alone
to the mean and spread of their difference. What they are known to round or leave out, the reference does too (see
`imitate`). The files are held to their plan: codes and scales, and hardly more.

Shape letters: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats import grouped
from ..formats.native import spec_to_json
from .clients import Client, find_client
from .imitate import imitated, in_experts, linears, logits_of, nudged, without_inputs
from .planned import Planned

TRANSFORMERS = "transformers"
EXACT = 1e-5
"""Largest difference of fp32 logits, as a part of the largest logit (at least 1): the order of summation is free."""

FLIPS = 2.5
"""How much further scores may be off where inputs are quantized, since rounding noise flips their codes: lowbit's own
model in bf16 spreads around itself in fp32 by 0.03 nats with 16-bit inputs, 0.12 with int8 and 0.16 with FP8 ones."""

OWN = 2.0
"""How many times the divergence of lowbit's own model from itself, inputs moved by a millionth, is rounding: draws of
that differ by a factor of 1.8 on a W4A4 model, where it is 0.05 nats."""


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
    unquantized_difference: float | None = None
    """Largest difference of logits where neither side quantizes the inputs of those linears."""
    kl: float | None = None
    own_kl: float | None = None
    """The same of lowbit's model from itself, its linears' inputs moved by a millionth, where that had to be asked."""
    top1: float | None = None
    score_difference: float | None = None
    """Mean of the client's log-probability of the next token less lowbit's, nats."""
    score_spread: float | None = None
    """Standard deviation of that difference."""
    client_perplexity: float | None = None
    """exp of the client's mean loss over the predicted tokens of the windows."""
    perplexity: float | None = None
    """The same of lowbit's own model, as it is."""
    remarks: tuple[str, ...] = ()
    """How the client was helped, and what was left out on both sides."""
    planned_bytes: int | None = None
    """What codes, scales and everything else take in lowbit's own layout."""
    stored_bytes: int | None = None
    """What the tensors of the export take."""


NOTHING = Verification("", "", False, "")


@dataclass(frozen=True)
class _Answer:
    """What a client wrote: what it says of itself, and of the windows what it has (see `clients`)."""

    found: Mapping[str, Any]
    logits: Tensor | None = None
    unquantized: Tensor | None = None
    """Logits with the inputs of watched linears as they come."""
    scores: Tensor | None = None


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
    answer = _ask(client, export, reference, windows, trust_remote_code)
    if isinstance(answer, str):
        return Verification(name, "", False, answer)
    release = answer.found["version"]
    if answer.found.get("problems"):
        return Verification(name, release, False, _unreadable(client, release, answer.found["problems"]))
    own = logits_of(reference, windows)
    with imitated(client.name, reference, answer.found) as left_out:
        expected = logits_of(reference, windows) if left_out else own
        judged = _judge(client, answer, expected, reference, windows)
    remarks = (*left_out, *answer.found.get("remarks", ()))
    judged = replace(
        judged,
        client=name,
        version=release,
        message="; ".join((f"{judged.message} ({name} {release})", *remarks)),
        remarks=remarks,
        perplexity=_perplexity(_scores(own, windows)),
    )
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


# --- the client -------------------------------------------------------------------------------------------------------


def _ask(client: Client, export: Path, reference: nn.Module, windows: Tensor, trust: bool) -> _Answer | str:
    """What the client answers, or why it does not, in one sentence."""
    with TemporaryDirectory(prefix="lowbit-verify-") as scratch:
        job = Path(scratch)
        _hand_over(job, client, export, reference, windows, trust)
        command = [client.python, str(client.script), str(job)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=job)  # some write logs where they are
        if ended.returncode:
            return _crash(client, ended)
        names = [name for name in ("logits", "unquantized", "scores") if (job / f"{name}.npy").is_file()]
        arrays = {name: torch.from_numpy(np.load(job / f"{name}.npy")) for name in names}
        return _Answer(json.loads((job / "found.json").read_text("utf8")), **arrays)


def _hand_over(job: Path, client: Client, export: Path, reference: nn.Module, windows: Tensor, trust: bool) -> None:
    """Write what the client needs: windows, and for transformers the input formats of linears."""
    asked: dict[str, Any] = {
        "export": str(export.resolve()),
        "windows": windows.tolist(),
        "threads": torch.get_num_threads(),
        "trust": trust,
    }
    if client.name == TRANSFORMERS:
        watched = {
            name: module
            for name, module in linears(reference).items()
            if module.layer.activation is not None and not in_experts(name)
        }
        grids = {name: module.layer.input_grid for name, module in watched.items()}
        ranges: Any = {name: grid.scale.numpy() for name, grid in grids.items() if grid is not None}
        np.savez(job / "job.npz", **ranges)
        asked["formats"] = {name: spec_to_json(module.layer.activation) for name, module in watched.items()}
        asked["lowbit"] = str(Path(__file__).parents[2])
    (job / "job.json").write_text(json.dumps(asked), "utf8")


def _unreadable(client: Client, release: str, problems: Sequence[str]) -> str:
    """What to say of tensors that the client, at this release, did not load as they were written."""
    if client.name == TRANSFORMERS and "gptqmodel" in release and all(".experts." in problem for problem in problems):
        return f"not verified: {grouped.EXPERTS}: verify with gptqmodel or vllm"
    if all(problem.endswith("weight_zero_point is mismatched") for problem in problems):
        return (
            f"not verified: transformers {version('transformers')} cannot read asymmetric packed weights (it expects "
            "zero-points of another shape): pip install transformers==5.22.0 to verify; vLLM 0.32 reads them"
        )
    return f"failed: {len(problems)} tensors did not load as written, the first: {problems[0]} ({client.name})"


RANK = re.compile(r"(\[rank\d+\]:\s*)+")
"""What torch's processes put in front of every line, each of those that hand it on."""
ADVICE = "For further information visit"
"""How pydantic goes on behind an error, with an address that ends in the word."""


def _crash(client: Client, ended: subprocess.CompletedProcess[str]) -> str:
    """Why the client produced nothing, in one sentence."""
    if ended.returncode < 0:
        return f"not verified: the client was killed by signal {-ended.returncode}, perhaps for lack of memory"
    lines = [RANK.sub("", line).strip() for line in ended.stderr.splitlines()]
    said = [line for line in lines if line and ADVICE not in line] or ["it said nothing"]
    errors = [place for place, line in enumerate(said) if "rror" in line]  # behind may stand advice or a progress bar
    last = (errors or [len(said) - 1])[-1]
    announced = said[last].endswith(":")
    reason = " ".join(said[last : last + 1 + announced]).split(" [type=")[0].removeprefix("Value error, ")
    return f"not verified: {client.name} cannot run the export: {reason} (in {client.python}, see {client.variable})"


# --- the verdict ------------------------------------------------------------------------------------------------------


def _judge(client: Client, answer: _Answer, expected: Tensor, reference: nn.Module, windows: Tensor) -> Verification:
    """Hold what the client gave to the limits; `expected` are the logits [N, T, V] of `reference`."""
    quantized = any(module.layer.activation is not None for module in linears(reference).values())
    if answer.logits is None:
        assert answer.scores is not None, "a client gives logits or scores"
        return _judge_scores(client, expected, answer.scores, windows, quantized)
    if answer.logits.shape != expected.shape:
        shapes = f"{list(answer.logits.shape)} instead of {list(expected.shape)}"
        return replace(NOTHING, message=f"failed: the client gives logits of shape {shapes}")
    (difference, largest), (kl, top1) = _distance(expected, answer.logits), _divergence(expected, answer.logits)
    found = replace(
        NOTHING,
        max_logit_difference=difference,
        largest_logit=largest,
        linears_compared=len(answer.found.get("unequal", {})),
        unequal_codes=sum(answer.found.get("unequal", {}).values()),
        kl=kl,
        top1=top1,
        client_perplexity=_perplexity(_scores(answer.logits, windows)),
    )
    if answer.unquantized is not None:
        return _judge_inputs(client, found, answer, expected, reference, windows)
    if client.rounds:
        return _judge_rounding(client, found, expected, reference, windows, _figures(found))
    exact = client.exact and not quantized and answer.found.get("dtype", "float32") == "float32"
    passed = difference <= EXACT * max(1.0, largest) if exact else kl <= client.kl and top1 >= client.top1
    return replace(found, passed=passed, message=f"{'verified' if passed else 'failed'}: {_figures(found)}")


def _figures(found: Verification) -> str:
    """What was measured, in words."""
    assert found.max_logit_difference is not None
    return (
        f"largest logit difference {found.max_logit_difference:.2g} of {found.largest_logit:.3g}, KL {found.kl:.2g}, "
        f"top-1 agreement {found.top1:.2%}"
    )


def _judge_inputs(
    client: Client, found: Verification, answer: _Answer, expected: Tensor, reference: nn.Module, windows: Tensor
) -> Verification:
    """The verdict on a client that shows what its linears multiply: codes, then all but codes, then what is left."""
    assert answer.unquantized is not None
    unequal = [name for name, count in answer.found["unequal"].items() if count]
    if unequal:
        flat = ", whose inputs it flattens and gives one range for all tokens"
        first = unequal[0] + (flat if unequal[0] in answer.found["flat"] else "")
        said = f"inputs get other codes in {len(unequal)} linears, the first {first}; {_figures(found)}"
        return replace(found, message=f"failed: {said}")
    with without_inputs(linears(reference)):
        difference, largest = _distance(logits_of(reference, windows), answer.unquantized)
    found = replace(found, unquantized_difference=difference)
    apart = f"logits from 16-bit inputs differ by {difference:.2g} of {largest:.3g}"
    same = f"equal codes on equal inputs in {found.linears_compared} linears"
    if not difference <= EXACT * max(1.0, largest):
        return replace(found, message=f"failed: equal codes on equal inputs, but {apart}; {_figures(found)}")
    return _judge_rounding(client, found, expected, reference, windows, f"{same}, {apart}; {_figures(found)}")


def _judge_rounding(
    client: Client, found: Verification, expected: Tensor, reference: nn.Module, windows: Tensor, said: str
) -> Verification:
    """The verdict where both sides round inputs alike: the client's limits, or what rounding does to lowbit's model."""
    assert found.kl is not None and found.top1 is not None
    if found.kl <= client.kl and found.top1 >= client.top1:
        return replace(found, passed=True, message=f"verified: {said}")
    with nudged(reference):
        own, _ = _divergence(expected, logits_of(reference, windows))
    found = replace(found, own_kl=own, passed=found.kl <= OWN * own)
    alone = f"where rounding alone carries lowbit's own model to KL {own:.2g}, inputs moved by a millionth"
    return replace(found, message=f"{'verified' if found.passed else 'failed'}: {said}, {alone}")


def _judge_scores(client: Client, expected: Tensor, scores: Tensor, windows: Tensor, quantized: bool) -> Verification:
    """Hold log-probabilities [N, T - 1] of the next tokens to those of expected logits [N, T, V]."""
    difference = scores - _scores(expected, windows)
    mean, spread = float(difference.mean()), float(difference.std())
    figures = f"mean difference of log-probabilities {mean:+.2g} nats, its spread {spread:.2g}"
    slack = FLIPS if quantized else 1.0
    passed = abs(mean) <= slack * client.score and spread <= slack * client.spread
    message = f"{'verified' if passed else 'failed'}: {figures}"
    return replace(
        NOTHING,
        passed=passed,
        message=message,
        score_difference=mean,
        score_spread=spread,
        client_perplexity=_perplexity(scores),
    )


def _distance(expected: Tensor, logits: Tensor) -> tuple[float, float]:
    """(largest difference, largest logit expected)."""
    return float((logits - expected).abs().max()), float(expected.abs().max())


def _divergence(expected: Tensor, logits: Tensor) -> tuple[float, float]:
    """(mean KL in nats, share of equal first choices) over all positions of logits [N, T, V]."""
    kl = float(F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True))
    top1 = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    return max(kl / expected[..., 0].numel(), 0.0), top1  # in this order a KL that is no number stays none


def _scores(logits: Tensor, windows: Tensor) -> Tensor:
    """Log-probabilities [N, T - 1] of the next tokens."""
    return logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]


def _perplexity(scores: Tensor) -> float:
    """exp of the mean loss, infinite where that is beyond floats."""
    return float(scores.double().mean().neg().exp())
