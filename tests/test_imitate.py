"""What the reference does without while it is compared with transformers: said, measured, and undone."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import ct_cases
import pytest
import torch
from exported import LINEARS, llama, logits_of, make_run, windows

from lowbit.formats import compressed_tensors as ct
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
    assert found.remarks == (imitate.UNCACHED,)
    assert imitate.UNCACHED in found.message
    assert found.perplexity != found.client_perplexity
    assert torch.equal(logits_of(made.reference, windows()), before), "the reference was left as it was"


def test_narrowed_floats_are_told_of_and_put_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {LINEARS: nvfp4()})
    before = logits_of(run.reference, windows())
    with imitate.as_transformers(run.reference, run.path, {}) as remarks:
        assert remarks == (imitate.NARROW,)
        for module in imitate.linears(run.reference).values():
            assert torch.equal(module.weight, module.weight.bfloat16().float())
        assert not torch.equal(logits_of(run.reference, windows()), before)
    assert torch.equal(logits_of(run.reference, windows()), before)
