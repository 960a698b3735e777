"""Several processes give the bytes of one with as many lanes, whatever the recipe; and none outlives the others."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.api import run
from lowbit.launch import _run, launch, together
from lowbit.methods.views import Need, Stats
from lowbit.prepare import prepare
from lowbit.request import Request
from lowbit.stream import rounding, sweep, text
from lowbit.stream.lanes import Lanes, _packed, _unpacked, connect, launched

RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rtn": ("llama", "rtn-w4a16-g32", {}),
    "gptq": ("llama", "gptq-w4a16-g32", {"lanes": 4}),
    "gptq at once": ("llama", "gptq-w4a16-g32", {"settings": ["gptq.true_sequential=false", "gptq.act_order=false"]}),
    "gptaq": ("llama", "gptaq+lorc4-w3a16-g32", {}),
    "awq": ("llama", "awq-w4a16-g32", {}),
    "static": ("llama", "smoothquant-w8a8-static", {}),
    "encoded": ("llama", "quarot+spqr-w3a16-g16", {}),
    "mixture": ("mixtral", "awq+gptq-w4a16-g32", {}),
}
NEEDS: frozenset[Need] = frozenset({"gram", "absmean", "minmax", "cross", "square"})
MICRO_BATCH = 64
"""Tokens: four windows. Two micro-batches are replayed, one here and one there."""


def quantize_all(root: str, under: str, *tell: Any) -> None:
    """By every recipe; in processes that share the work, also a run that was cut short."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "MICRO_BATCH", MICRO_BATCH)
        patch.setattr(text, "REPLAYED_TOKENS", 2 * MICRO_BATCH)
        patch.setattr(rounding, "STARVED", 100)  # experts see more tokens, but not in one lane
        for name in RECIPES:
            quantize(root, name, Path(under) / name)
        if launched() > 1:
            resume(root, Path(under), *tell)
    found = sums()
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, Path(under) / "sums.pt")


def quantize(root: str | Path, name: str, output: Path) -> None:
    family, recipe, options = RECIPES[name]
    lowbit.quantize(f"{root}/{family}", recipe, output, **asked(root), **({"lanes": 2} | options))


def asked(root: str | Path) -> dict[str, Any]:
    """Five micro-batches: a lane of two and one of three."""
    return {"calibration": f"{root}/text.txt", "samples": 20, "length": 16}


def sums() -> dict[str, list[Tensor]]:
    """Tensors of statistics in four lanes, of which some see nothing."""
    batches = list(torch.randn(9, 33, 24, generator=torch.Generator().manual_seed(0)))
    lanes, found = connect(4, torch.device("cpu")).of([batch[:, 0] for batch in batches]), {}
    for name, seen in {"all": range(9), "end": (5, 6, 8), "middle": (2, 3), "nothing": ()}.items():
        tally = lanes.tally(NEEDS)
        for place, index in enumerate(lanes.here):
            if place in lanes.turns:
                tally.turn()
            if index in seen:
                tally.update(batches[index], batches[index] + 1)
        total = lanes.total(tally)
        assert total.tokens == 33 * len(seen)
        found[name] = _packed(total)[1]
    return found


def resume(root: str, under: Path, tell: Any) -> None:
    """Go on behind the first block of a run as a kill would leave it, and tell as `launch` does."""
    cut, lanes = under / "cut", connect(2, torch.device("cpu"))
    if lanes.first:
        shutil.copytree(under / "gptaq", cut)
        for name in ("model-00003-of-00003.safetensors", "reports/block-00001.json", "model.safetensors.index.json"):
            (cut / name).unlink()
    lanes.agreed(None)
    family, recipe, options = RECIPES["gptaq"]
    asking = {"model": f"{root}/{family}", "recipe": recipe, "output": str(cut), **asked(root), **options, "lanes": 2}
    assert len(_run(run, asking, tell).blocks) == 2


def checksums(directory: Path) -> dict[str, str]:
    """Every file but the journal of timings."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "journal.jsonl"]
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a text, and what two processes (`shared`) and this one (`alone`) make of them by all recipes."""
    from tiny import save_model, save_text  # not in every process: transformers takes seconds

    path = tmp_path_factory.mktemp("lanes")
    for family in ("llama", "mixtral"):
        save_model(family, path / family)
    save_text(path / "text.txt")
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        job = partial(quantize_all, str(path), str(path / "shared"))
        shared = pool.submit(together, job, 2, lambda *what: HEARD.append(what))
        quantize_all(str(path), str(path / "alone"))
        shared.result()
    return path


HEARD: list[tuple[Any, ...]] = []
"""What the two processes told of their last run."""


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_write_what_one_writes(root: Path, name: str) -> None:
    assert checksums(root / "shared" / name) == checksums(root / "alone" / name)


def test_sums_are_those_of_one_process(root: Path) -> None:
    """Bit for bit, which codes of a tiny model do not tell."""
    alone, shared = (torch.load(root / place / "sums.pt") for place in ("alone", "shared"))
    assert {name: len(tensors) for name, tensors in shared.items()} == {"all": 6, "end": 6, "middle": 6, "nothing": 0}
    for name, tensors in alone.items():
        assert all(map(torch.equal, tensors, shared[name]))


def test_a_killed_run_goes_on_in_two_processes(root: Path) -> None:
    assert checksums(root / "shared" / "cut") == checksums(root / "alone" / "gptaq")
    journal = (root / "shared" / "cut" / "journal.jsonl").read_text()
    assert journal.count('"block": "model.layers.0"') == 1, "the first block was not done again"
    (_, first, count, started), (_, block, _, report) = HEARD
    assert (first, count, started, block) == (1, 2, None, 1) and report["name"] == "model.layers.1"


def test_a_request_is_carried_to_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they tell is what the request wants to hear."""
    monkeypatch.setattr("lowbit.launch.together", lambda *what: what)
    heard: list[Any] = []
    windows = [torch.arange(9)]
    request = Request("demo", "rtn-w4a16", "out", calibration=windows, gpus=2, notice=heard.append)
    job, count, hear = launch(run, request, 2)  # type: ignore[misc]
    carried, chosen = pickle.loads(pickle.dumps(job)).args
    assert (
        carried is run and count == 2 and chosen["gpus"] is None and chosen["lanes"] == 2 and chosen["model"] == "demo"
    )
    assert torch.equal(chosen["calibration"][0], windows[0]) and not {"notice", "on_block"} & chosen.keys()
    hear("notice", "a sentence")
    assert heard == ["a sentence"]


def test_lanes_are_part_of_the_plan(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of lanes is another order of sums: other bytes, and a refusal to go on."""
    family, recipe, _ = RECIPES["gptq"]
    monkeypatch.setattr(sweep, "MICRO_BATCH", MICRO_BATCH)
    lowbit.quantize(f"{root}/{family}", recipe, tmp_path / "out", **asked(root))
    assert checksums(tmp_path / "out") != checksums(root / "alone" / "gptq")
    with pytest.raises(ValueError, match="another plan, lanes was null and is now 4"):
        quantize(root, "gptq", tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "awq+gptq-w4a16-g32", "gptaq-w4a16-g32", "rtn-w4a16-g32"])
def test_two_gpus_write_what_one_writes(tmp_path: Path, recipe: str) -> None:
    from tiny import save_model, save_text

    model = save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    options = {"calibration": str(save_text(tmp_path / "text.txt", 20000)), "samples": 96, "length": 128}
    heard: list[int] = []
    done = lowbit.quantize(
        model, recipe, tmp_path / "two", **options, gpus=2, on_block=lambda index, *_: heard.append(index)
    )
    assert heard == [0, 0, 1, 1] and len(done.blocks) == 2
    lowbit.quantize(model, recipe, tmp_path / "one", **options, lanes=2)
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_one_process_ends_all(how: str) -> None:
    """The others wait for it, and nobody waits for them."""
    heard: list[Any] = []
    raised = {
        "killed": (ChildProcessError, r"the process of GPU 1 was killed \(SIGKILL\): finished blocks are kept, run"),
        "failed": (ValueError, "a sentence"),
    }
    with pytest.raises(raised[how][0], match=raised[how][1]):
        together(partial(fall, how), 2, lambda *what: heard.append(what))
    assert heard == [("ready", 3)]
    assert not multiprocessing.active_children()


def fall(how: str, tell: Any) -> None:
    """The second process falls while the first one waits for it."""
    lanes = connect(2, torch.device("cpu"))
    if lanes.first:
        tell("ready", lanes.count + 1)
    lanes.agreed(None)
    if not lanes.first and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif not lanes.first:
        raise ValueError("a sentence")
    lanes.gathered(None)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 2, "device": "cpu"}, "--gpus 2, and 0 CUDA devices can be used here"),
        ({"gpus": 0}, "--gpus 0"),
        ({"lanes": 0}, "0 lanes cannot be shared"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.quantize("demo", "rtn-w4a16-g32", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("signround-w4a16-g32", {}, "signround wants the whole text on one GPU: drop --gpus"),
        ("spinquant+gptq-w4a4kv4", {}, "spinquant wants the whole text on one GPU"),
        ("gptq-w4a16-g32", {"samples": 2, "length": 16}, "makes 1 micro-batches, too few for 2 lanes"),
        ("gptq-w4a16-g32", {"lanes": 3}, "3 lanes cannot be shared by 2 GPUs: make --lanes a multiple of 2"),
        ("gptq-w4a16-g32", {"gpus": 3}, "--gpus 3 in one of 2 processes"),
        ("gptq-g32", {"bits": 4.5}, "--bits and --size measure the model on one GPU"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    recipe: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        prepare(Request("demo", recipe, "out", **options))


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_totals_are_sums_of_lanes_in_order(count: int) -> None:
    """Against fp64, and bit for bit against the sums added by hand."""
    batches = list(torch.randn(7, 40, 24))
    lanes = Lanes(count).of([batch[:, 0] for batch in batches])
    tally, starts = lanes.tally(NEEDS), [7 * lane // count for lane in range(count + 1)]
    for index, x in enumerate(batches):
        if index in lanes.turns:
            tally.turn()
        tally.update(x, x + 1)
    total, x = lanes.total(tally), torch.cat(batches).double()
    assert total.tokens == total.gram.count == total.absmean.count == 280
    torch.testing.assert_close(total.hessian().double(), x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total.absmean.mean.double(), x.abs().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(total.square.norm.double(), x.norm(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(total.cross.matrix.double(), torch.ones_like(x).T @ x, rtol=1e-4, atol=1e-4)
    assert torch.equal(total.minmax.low.double(), x.amin(0)) and torch.equal(total.minmax.high.double(), x.amax(0))
    by_hand: Tensor | None = None
    for start, stop in itertools.pairwise(starts):
        lane = Stats.observing(frozenset({"gram"}))
        for each in batches[start:stop]:
            lane.update(each)
        by_hand = lane.hessian() if by_hand is None else by_hand + lane.hessian()
    assert torch.equal(total.hessian(), by_hand)


@pytest.mark.parametrize(("count", "world"), [(1, 1), (2, 2), (6, 3), (8, 2)])
def test_every_micro_batch_is_in_one_process_and_lane(count: int, world: int) -> None:
    batches = [torch.zeros(2, 3)] * 13
    shares = [Lanes(count, rank, world).of(batches) for rank in range(world)]
    assert [index for share in shares for index in share.here] == list(range(13))
    assert sum(len(share.turns) + 1 for share in shares) == count
    alone = Lanes(count).of(batches)
    begin = {0, *alone.turns}
    assert begin == {share.here.start + turn for share in shares for turn in (0, *share.turns)}


def test_jobs_go_to_whoever_has_least() -> None:
    shares = Lanes(2, 0, 2)
    assert shares.dealt([5.0]) == [1], "the first process has files to write"
    assert shares.dealt([1.0, 4.0, 2.0, 2.0]) == [1, 1, 0, 0]
    assert Lanes().dealt([1.0, 2.0]) == [0, 0]


def test_tensors_travel_beside_what_holds_them() -> None:
    stats = Stats.observing(frozenset({"gram", "minmax"}))
    stats.update(torch.randn(9, 4))
    packed, tensors = _packed({"stats": stats, "empty": torch.empty(0, 3), "flag": torch.tensor(True)})
    assert len(packed) < 1000 and [tensor.dtype for tensor in tensors].count(torch.float32) == 4
    found = _unpacked(packed, [tensor.clone() for tensor in tensors])
    assert torch.equal(found["stats"].hessian(), stats.hessian()) and found["stats"].tokens == 9
    assert found["empty"].shape == (0, 3) and bool(found["flag"])
