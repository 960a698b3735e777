"""A killed run, started again, ends in the same bytes; a changed plan is refused; nothing finished is redone."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import TINY
from tiny import save_model, save_text

import lowbit
from lowbit.stream import run, sweep

BLOCKS = 4


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model of four blocks, text, uninterrupted run)."""
    root = tmp_path_factory.mktemp("resume")
    make = TINY["llama"]

    def deeper():
        config = make()
        config.num_hidden_layers = BLOCKS
        return config

    TINY["llama-deep"] = deeper
    model = save_model("llama-deep", root / "model", max_shard_size="100KB")
    text = save_text(root / "text.txt")
    return model, text, quantize(model, text, root / "whole").path


def quantize(model: Path, text: Path, output: Path, recipe: str = "awq+gptq-w4a16-g32", **options):
    return lowbit.quantize(model, recipe, output, **{"calibration": str(text), "samples": 8, "length": 32} | options)


def checksums(directory: Path) -> dict[str, str]:
    """Every file but the journal of timings."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "journal.jsonl"]
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def test_sigkill_and_again(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, text, whole = material
    script = (
        "import sys, time, torch; torch.set_num_threads(1); import lowbit; from lowbit.stream import run\n"
        "write = run.RunDirectory.write_block\n"
        "def slow(*a): write(*a); time.sleep(0.5)\n"
        "run.RunDirectory.write_block = slow\n"
        "model, text, output = sys.argv[1:]\n"
        "lowbit.quantize(model, 'awq+gptq-w4a16-g32', output, calibration=text, samples=8, length=32)\n"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-c", script, str(model), str(text), str(output)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    second = output / f"model-00003-of-0000{BLOCKS + 1}.safetensors"
    deadline = time.monotonic() + 120
    while not second.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert second.exists() and not (output / "model.safetensors.index.json").exists()
    before = second.stat().st_mtime_ns
    quantize(model, text, output)
    assert second.stat().st_mtime_ns == before
    assert checksums(output) == checksums(whole)


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize("memory", [None, 1])
def test_interrupted_behind_every_block(
    material: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshots: bool,
    memory: int | None,
) -> None:
    """Interrupted behind each block in turn, with hidden states in memory or on disk, replayed or from a snapshot."""
    model, text, whole = material
    monkeypatch.setattr(sweep, "SNAPSHOT_SECONDS", 0.0 if snapshots else 1e9)
    write = run.RunDirectory.write_block
    started: list[int] = []

    def interrupted(self, block, *rest):
        started.append(block)
        write(self, block, *rest)
        if len(started) == 1:
            raise KeyboardInterrupt

    for block in range(BLOCKS):
        started.clear()
        monkeypatch.setattr(run.RunDirectory, "write_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, text, tmp_path / "out", memory=memory)
        assert started == [block] and gc.get_freeze_count() == 0
    monkeypatch.setattr(run.RunDirectory, "write_block", write)
    quantize(model, text, tmp_path / "out", memory=memory)
    assert checksums(tmp_path / "out") == checksums(whole)


def test_a_finished_run_is_left_unchanged(material: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, whole = material
    before = checksums(whole)
    monkeypatch.setattr(run.RunDirectory, "write_block", None)
    again = quantize(model, text, whole)
    assert checksums(whole) == before
    assert len(again.blocks) == BLOCKS and again.seconds > 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"recipe": "gptq-w4a16-g32"}, "recipe"),
        ({"settings": ["gptq.damp=0.05"]}, "recipe.round.gptq.damp was 0.01 and is now 0.05"),
        ({"samples": 9}, "calibration.samples was 8 and is now 9"),
        ({"seed": 1}, "calibration.seed was 0 and is now 1"),
        ({"dtype": "bfloat16"}, "dtype was"),
    ],
)
def test_a_changed_plan_is_refused_by_field(material: tuple[Path, Path, Path], change: dict, field: str) -> None:
    model, text, whole = material
    before = checksums(whole)
    with pytest.raises(ValueError, match="another plan") as refused:
        quantize(model, text, whole, **change)
    assert field in str(refused.value)
    assert checksums(whole) == before


def test_another_model_and_other_text_are_refused(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, text, whole = material
    with pytest.raises(ValueError, match=r"calibration\.tokens"):
        quantize(model, save_text(tmp_path / "text.txt", seed=5), whole)
    other = save_model("llama-deep", tmp_path / "other", max_shard_size="10MB")
    with pytest.raises(ValueError, match="another plan, model"):
        quantize(other, text, whole)


def test_restart_starts_over(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, text, _ = material
    quantize(model, text, tmp_path / "out", recipe="rtn-w4a16-g32")
    quantize(model, text, tmp_path / "out", recipe="rtn-w8a16", restart=True)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["recipe"]["name"] == "rtn-w8a16"


def test_memory_budget_never_changes_the_bytes(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, text, whole = material
    quantize(model, text, tmp_path / "out", memory=1)
    assert checksums(tmp_path / "out") == checksums(whole)
