"""`lowbit speed`: what it prints and writes, on a CPU in full, on a GPU for the smallest tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowbit.cli import main
from lowbit.kernels import speed, speed_caches, speed_cpu
from lowbit.kernels.speed_table import Row, Speed

GPU = torch.cuda.is_available() and speed.available(torch.cuda.current_device())


def test_a_cpu_shows_its_limits_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_cpu, "SHAPE", (256, 128))
    assert main(["speed", "--device", "cpu", "--json", str(tmp_path / "speed.json")]) == 0
    captured = capsys.readouterr()
    assert "note: measuring products on this CPU" in captured.err
    assert "copy" in captured.out and "| W8A16 256→128 | 1 |" in captured.out
    assert "missing: there is no CUDA device" in captured.out
    found = json.loads((tmp_path / "speed.json").read_text("utf8"))
    assert found["copy_bytes_per_second"] > 0 and found["product_flops"] > 0
    rows = found["tables"]["products on this CPU"]
    assert [row["work"] for row in rows] == ["W8A16 256→128"] * 2 + ["W4A16 256→128"] * 2
    assert all(row["plain"] > 0 and row["lowbit"] is None and row["times"] is None for row in rows)


def test_operators_that_a_build_does_not_have_are_left_out() -> None:
    def fails() -> None:
        raise NotImplementedError

    assert speed_cpu.runs(fails) is None
    assert speed_cpu.runs(lambda: None) is not None


def test_lines_and_json_say_the_same() -> None:
    rows = [Row("a", 1, 2.0, 9.0, None, 3.0), Row("b", 2, 2.0, 9.0, 4.0, None)]
    found = Speed("card", "2", 3e12, 7e14, {"table": rows}, ["something"])
    lines = list(found.lines())
    assert "copy 3,000 GB/s, bf16 product 700.00 TFLOP/s" in lines
    assert "| a | 1 | 2.0 | 9.0 | – | 3.0 | 3.00 |" in lines and "| b | 2 | 2.0 | 9.0 | 4.0 | – | – |" in lines
    assert found.to_json()["tables"]["table"][0]["times"] == 3.0
    assert found.to_json()["missing"] == ["something"]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU that the kernels know")
def test_a_gpu_measures_every_table() -> None:
    rates = (3e6, 7e8)
    rows = [
        *speed.weight_only_rows(rates, shapes=((256, 512),), tokens=(1,)),
        *speed.float_rows(rates, shapes=((256, 512),), tokens=(1,)),
        *speed.codes_rows(rates, shapes=((256, 512),), tokens=(1, 32)),
        *speed.encoding_rows(rates, widths=(1024,), tokens=(64,)),
        *speed_caches.rows(rates, batches=(2,), lengths=(512,)),
    ]
    assert len(rows) == 1 + 2 + 4 + 12 + 4
    assert [row.work for row in rows[:3]] == ["W4A16 256→512", "NVFP4A16 256→512", "MXFP4A16 256→512"]
    assert all(row.lowbit is not None and row.lowbit > 0 and row.plain > 0 for row in rows)
    assert [row.library is not None for row in rows[:7]] == [True, False, False, False, True, False, True]
