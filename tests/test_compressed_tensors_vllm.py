"""compressed-tensors exports in vLLM itself, which scores tokens (LOWBIT_VLLM_PYTHON names an interpreter that has it).

On a CPU it runs bfloat16 kernels, so log-probabilities are near lowbit's and not equal. How near is measured: they may
lie half as far again from lowbit's in fp32 as lowbit's own in bfloat16 do. A wrong layout moves them by whole nats.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported import Answer, client_answers, client_python
from torch import Tensor

import lowbit
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Scheme
from lowbit.numerics.grid import float_spacing
from lowbit.numerics.kv import KV
from lowbit.numerics.spec import E4M3, Float, Int, Spec, per_block, per_channel, per_group, per_token

pytestmark = pytest.mark.client

FP8 = per_channel(E4M3, scale="float32")
SCHEMES = {
    "w4": Scheme(per_group(Int(4), 128)),
    "w4-asym": Scheme(per_group(Int(4, "asymmetric"), 64)),
    "w8a8": Scheme(per_channel(Int(8), scale="float32"), per_token(Int(8))),
    "fp8": Scheme(FP8, per_token(E4M3)),
    "fp8-block": Scheme(per_block(E4M3, 128), Spec(E4M3, (1, 128), "float32", dynamic=True)),
    "w4-kv": Scheme(per_group(Int(4), 128), kv=KV(8, 8, "tensor", rule="e4m3")),
}
CPU = Path("/proc/cpuinfo")
REFUSED = {} if CPU.exists() and "amx_tile" in CPU.read_text() else {"fp8-block": "vLLM's CPU kernel of it wants AMX"}
"""What vLLM does not run on this processor."""
DEMO = Path(lowbit.__file__).with_name("assets") / "demo"
SLACK = 1.5
"""Parts of bfloat16's own noise."""


def truncated(x: Tensor, number: Float) -> Tensor:
    """`cast_float` as vLLM's CPU kernel casts what it caches: bits are cut off, not rounded (seen with 0.32)."""
    step = float_spacing(x, number)
    return (x / step).trunc_().mul_(step).clamp_(-number.largest, number.largest)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of every scheme is, by its name."""
    client_python("vllm")
    place = tmp_path_factory.mktemp("vllm")
    for name, scheme in SCHEMES.items():
        lowbit.quantize(DEMO, Recipe(scheme, RTN(), MinMaxClip()), place / name, samples=4, length=64)
    return place


@pytest.fixture(scope="module")
def vllm(place: Path) -> Answer:
    exports = {name: (place / f"{name}-out", text()) for name in SCHEMES}
    for name, (out, _) in exports.items():
        lowbit.export(place / name, out)
    asked = {name: export for name, export in exports.items() if name not in REFUSED}
    return client_answers("vllm", asked, place / "jobs")


@pytest.mark.parametrize("name", SCHEMES)
def test_vllm_scores_what_lowbit_scores(name: str, place: Path, vllm: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in REFUSED:
        pytest.skip(REFUSED[name])
    monkeypatch.setattr("lowbit.numerics.kv.cast_float", truncated)
    windows = text()
    (theirs, said), ours = vllm(name), scores(place / name, windows, torch.float32)
    assert said["client"] == "vllm"
    noise = float((scores(place / name, windows, torch.bfloat16) - ours).abs().mean())
    difference = theirs - ours
    print(
        name, "mean |difference|", float(difference.abs().mean()), "bfloat16", noise, "mean", float(difference.mean())
    )
    assert difference.abs().mean() < SLACK * noise
    assert abs(difference.mean()) < SLACK * noise / 2


def text() -> Tensor:
    """Token windows [4, 48] of the packaged text."""
    from lowbit.data.evaluation import load_windows
    from lowbit.runtime.load import load_tokenizer

    return load_windows("demo", load_tokenizer(DEMO), 48, 4)


@torch.no_grad()
def scores(run: Path, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """lowbit's log-probabilities [N, T - 1], computed in this dtype."""
    logits = lowbit.load(run, dtype=dtype)(input_ids=windows, use_cache=False).logits.float()
    return logits.log_softmax(-1)[:, :-1].gather(-1, windows[:, 1:, None])[..., 0]
