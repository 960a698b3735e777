"""What the reference does without, or rounds, while it is compared with a client: said, measured, and undone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import ct_cases
import pytest
import torch
from exported import LINEARS, llama, logits_of, make_run, windows
from torch import Tensor

from lowbit.formats import compressed_tensors as ct
from lowbit.modules.attention import attached
from lowbit.numerics.kv import KV, fit
from lowbit.numerics.qtensor import QAttention
from lowbit.numerics.spec import Int, nvfp4, per_group
from lowbit.runtime import imitate
from lowbit.runtime.clients import transformers
from lowbit.runtime.verify import verify

W4 = per_group(Int(4), 32)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run transformers' script here instead of in a process of its own."""

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        transformers.run(Path(command[2]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("lowbit.runtime.verify.subprocess.run", run)


@pytest.mark.usefixtures("in_process")
def test_a_cache_that_transformers_ignores_is_left_out_and_told_of(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    kv = KV(8, 8, "tensor", rule="e4m3")
    side = kv.key_quantizer
    assert side is not None
    keys, values = (fit(*side.range(0.3 * torch.randn(2, 2, 9, 16)), side) for _ in range(2))
    made = ct_cases.make_run(
        tmp_path / "run",
        llama(initializer_range=0.3),
        {LINEARS: (W4, None)},
        attention=QAttention(kv, affine=(keys, values)),
    )
    ct.export_directory(made.path, tmp_path / "out", made.skeleton)
    before = logits_of(made.reference, windows())
    found = verify("transformers", tmp_path / "out", made.reference, windows())
    assert found.passed, found.message
    if not found.remarks:  # up to 5.20 or so
        pytest.skip(f"transformers {found.version} quantizes keys and values as it is told to")
    assert found.remarks == (imitate.UNCACHED,)
    assert imitate.UNCACHED in found.message
    assert found.perplexity != found.client_perplexity
    assert torch.equal(logits_of(made.reference, windows()), before), "the reference was left as it was"


def test_narrowed_floats_are_told_of_and_put_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {LINEARS: nvfp4()})
    before = logits_of(run.reference, windows())
    with imitate.as_transformers(run.reference, {}) as remarks:
        assert remarks == (imitate.NARROW,)
        for module in imitate.linears(run.reference).values():
            assert torch.equal(module.weight, module.weight.bfloat16().float())
        assert not torch.equal(logits_of(run.reference, windows()), before)
    assert torch.equal(logits_of(run.reference, windows()), before)


def by_hand(row: list[float], columns: int, *, signed: bool) -> list[float]:
    """A row of inputs as ggml's reference code quantizes it, one block after the other, and what it then stands for."""
    found = []
    for start in range(0, len(row), columns):
        block = row[start : start + columns]
        extreme = max(block, key=abs)
        step = extreme / -127 if signed else abs(extreme) / 127
        codes = [min(round(x / step), 127) if step else 0 for x in block]
        found += [code * (step if signed else float(torch.tensor(step).half())) for code in codes]
    return found


@pytest.mark.parametrize(("rounded", "columns"), [(imitate.block_rounded, 32), (imitate.super_rounded, 256)])
def test_inputs_are_rounded_as_ggml_does(rounded: Callable[[Tensor], Tensor], columns: int) -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [200.0]])
    x[1, :256] = 0
    expected = torch.tensor([by_hand(row, columns, signed=columns == 256) for row in x.tolist()])
    apart = (rounded(x) - expected).abs() / x.abs().amax(-1, keepdim=True)
    assert float(apart.max()) <= 1e-2, "a value halfway between two codes may take either"
    assert float((apart > 1e-6).float().mean()) < 0.01
    assert not torch.equal(rounded(x), x)


def test_llama_cpp_rounds_what_enters_quantized_linears(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {LINEARS: W4})
    before = logits_of(run.reference, windows())
    name, module = next(iter(imitate.linears(run.reference).items()))
    x = torch.randn(2, module.weight.shape[1])
    plain = module(x)
    with imitate.imitated("llamacpp", run.reference, {}) as remarks:
        assert remarks == (imitate.ROUNDED,)
        assert torch.allclose(module(x), imitate.block_rounded(x) @ module.weight.T), name
        assert not torch.equal(module(x), plain)
        assert not torch.equal(logits_of(run.reference, windows()), before)
    assert torch.equal(logits_of(run.reference, windows()), before)


def test_a_cache_is_cut_off_where_vllm_runs_on_a_cpu(tmp_path: Path) -> None:
    kv = KV(8, 8, "tensor", rule="e4m3")
    side = kv.key_quantizer
    assert side is not None
    sides = tuple(fit(*side.range(0.3 * torch.randn(2, 2, 9, 16)), side) for _ in range(2))
    made = ct_cases.make_run(
        tmp_path / "run", llama(initializer_range=0.3), {LINEARS: (W4, None)}, attention=QAttention(kv, affine=sides)
    )
    before = logits_of(made.reference, windows())
    with imitate.imitated("vllm", made.reference, {"device": "cuda"}) as remarks:
        assert remarks == ()
    (cache, *_) = attached(made.reference).values()
    x = 0.1 * torch.randn(1, 2, 5, 16)
    rounded = cache.stored(x, 1)
    with imitate.imitated("vllm", made.reference, {"device": "cpu"}) as remarks:
        assert remarks == (imitate.CUT,)
        cut = cache.stored(x, 1)
        assert not torch.equal(logits_of(made.reference, windows()), before)
    scale = cache.affine[1].scale.float()
    assert (cut.abs() <= x.abs() + 1e-6).all(), "nothing moves away from zero"
    assert torch.equal((cut / scale).to(torch.float8_e4m3fn).float(), cut / scale), "what is left is an E4M3 number"
    up = rounded.abs() > x.abs()
    assert torch.equal(cut[~up], rounded[~up]) and up.any() and not torch.equal(cut[up], rounded[up])
    assert torch.equal(cache.stored(x, 1), rounded)
    assert torch.equal(logits_of(made.reference, windows()), before)
