"""Hidden states between blocks: wherever they live, a pass and a reader find what was put there last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import GPU, Machine
from torch import Tensor, nn

from lowbit.stream import ferry
from lowbit.stream.hidden import HiddenStates
from lowbit.stream.prologue import Calls
from lowbit.stream.text import Streams, Text

PLENTY = 1 << 40
SHAPE = (2, 3, 4)
COUNT = 6
BLOCK = nn.Identity()


def given(count: int = COUNT) -> list[Tensor]:
    return [torch.randn(SHAPE) for _ in range(count)]


def same(found: Iterable[Tensor], expected: list[Tensor]) -> bool:
    found = list(found)
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# --- on a CPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 2, COUNT])
def test_states_in_memory_and_on_disk(kept: int, tmp_path: Path) -> None:
    first, second = given(), given()
    states = HiddenStates(kept * first[0].nbytes, tmp_path / "states")
    for state in first:
        states.append(state)
    assert same(states, first) and states.nbytes == kept * first[0].nbytes
    for index in (4, 0, 5, 1):
        states[index] = second[index]
    assert same(states, [second[0], second[1], first[2], first[3], second[4], second[5]])
    saved = {name: state.clone() for name, state in states.snapshot().items()}
    for index in range(COUNT):
        states[index] = first[index]
    states.restore(saved)
    assert same(states, [second[0], second[1], first[2], first[3], second[4], second[5]])
    states.clear()
    assert len(states) == states.nbytes == 0 and not (tmp_path / "states").exists()


def test_a_cpu_works_on_the_states_themselves(tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)
    for state in given():
        states.append(state)
    for index in range(COUNT):
        with states.at(index, torch.device("cpu")) as hidden:
            assert hidden is states[index]


# --- a GPU that is told when to work ----------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["late", "early"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with Machine(request.param) as machine:
        monkeypatch.setattr(torch.cuda, "Stream", machine.side)
        monkeypatch.setattr(torch.cuda, "stream", machine.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: machine.current)
        yield machine


def sent(machine: Machine, states: HiddenStates, count: int = COUNT) -> list[Tensor]:
    """Fill the states with what a GPU makes, and return the same."""
    expected = given(count)
    for state in expected:
        states.append(machine.computed(SHAPE, lambda state=state: state))
    return expected


def text_of(machine: Machine, states: HiddenStates, seen: list[Tensor], **options: Any) -> Text:
    """A text whose blocks double what they see."""

    def call(_block: nn.Module, _batch: int, hidden: Tensor) -> Tensor:
        machine.current.add(lambda: seen.append(hidden.clone()))
        return machine.computed(SHAPE, lambda: 2 * hidden)

    return Text(call, states, device=GPU, **options)


def test_passes_over_states_in_pinned_memory(machine: Machine, tmp_path: Path) -> None:
    states, seen = HiddenStates(PLENTY, tmp_path), []
    expected = sent(machine, states)
    text = text_of(machine, states, seen)
    for _ in range(2):
        for batch in range(COUNT):
            text.forward(BLOCK, batch)
    for batch in [*range(COUNT), *range(COUNT)]:  # a pass that replaces the states, and the next one right behind it
        states[batch] = text.forward(BLOCK, batch)
    assert machine.work.done < len(machine.work.queue)
    machine.work.run()
    assert machine.loads == 4 * (COUNT - 1)
    assert same(seen, [factor * state for factor in (1, 1, 1, 2) for state in expected])
    assert same(states, [4 * state for state in expected])


def test_both_streams_of_a_text(machine: Machine, tmp_path: Path) -> None:
    streams = [HiddenStates(PLENTY, tmp_path) for _ in range(3)]
    expected = [sent(machine, states) for states in streams]
    seen: list[Tensor] = []
    text = text_of(machine, streams[0], seen, clean=streams[1], targets=streams[2])
    text.fill_targets(BLOCK)
    for batch in range(COUNT):
        text.forward_clean(BLOCK, batch)
        text.forward(BLOCK, batch)
    machine.work.run()
    turns = [state for pair in zip(expected[1], expected[0], strict=True) for state in pair]
    assert same(seen, [*expected[1], *turns])
    assert same(streams[2], [2 * state for state in expected[1]])


def test_streams_go_on_to_the_next_block(machine: Machine, tmp_path: Path) -> None:
    class Block(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor]:
            return (machine.computed(SHAPE, lambda: 2 * hidden),)

    states = HiddenStates(PLENTY, tmp_path)
    expected, block = sent(machine, states), Block()
    streams = Streams(Calls([[((), {})] * COUNT] * 3), states, GPU, lambda _taken: 0)
    streams.split(PLENTY, tmp_path, torch.device("cpu"))
    for index in range(2):
        text = streams.text(index)
        text.fill_targets(block)
        streams.advance(text, block if index else None)
    saved = streams.snapshot()
    assert machine.loads == 3 * (COUNT - 1)
    assert all(torch.equal(saved[f"state.{index:05d}"], 2 * state) for index, state in enumerate(expected))
    assert all(torch.equal(saved[f"float.state.{index:05d}"], 4 * state) for index, state in enumerate(expected))


def test_a_state_that_is_replaced_on_its_way_is_not_used(machine: Machine, tmp_path: Path) -> None:
    states, seen = HiddenStates(PLENTY, tmp_path), []
    expected, other = sent(machine, states), given(2)
    text = text_of(machine, states, seen)
    text.forward(BLOCK, 0)
    states[1] = machine.computed(SHAPE, lambda: other[0])
    with states.at(1, GPU):
        states[2] = machine.computed(SHAPE, lambda: other[1])  # while it is on its way
    text.forward(BLOCK, 1)
    text.forward(BLOCK, 2)
    text.forward(BLOCK, 0)  # another order than that of a pass
    machine.work.run()
    assert same(seen, [expected[0], *other, expected[0]])


def test_states_that_are_cleared_are_not_used(machine: Machine, tmp_path: Path) -> None:
    states, seen = HiddenStates(PLENTY, tmp_path), []
    sent(machine, states)
    text = text_of(machine, states, seen)
    text.forward(BLOCK, 0)
    machine.work.run()
    states.clear()
    assert not machine.live
    expected = sent(machine, states, 2)
    seen.clear()
    for batch in range(2):
        text.forward(BLOCK, batch)
    machine.work.run()
    assert same(seen, expected)


def test_work_that_ends_early_or_fails_waits_for_what_is_on_its_way(machine: Machine, tmp_path: Path) -> None:
    states, seen = HiddenStates(PLENTY, tmp_path), []
    expected = sent(machine, states)

    def fail(_block: nn.Module, _batch: int, hidden: Tensor) -> Tensor:
        machine.current.add(lambda: seen.append(hidden.clone()))
        raise KeyError

    text = Text(fail, states, device=GPU)
    for batch in range(COUNT):
        with pytest.raises(KeyError):
            text.forward(BLOCK, batch)
        machine.work.run()
        side = states._ferry._side
        assert side is not None and side.done == len(side.queue)
    assert same(seen, expected)


def test_a_reader_waits_once_and_only_for_what_is_under_way(machine: Machine, tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)
    expected = sent(machine, states, ferry.UNDER_WAY)
    assert machine.waits == 0
    assert torch.equal(states[0], expected[0]) and machine.waits
    before = machine.waits
    assert same(states, expected) and same(states.snapshot().values(), expected)
    assert machine.waits == before


def test_a_snapshot_stays_what_it_was(machine: Machine, tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)
    expected = sent(machine, states)
    saved, text = states.snapshot(), text_of(machine, states, [])
    for batch in range(COUNT):
        states[batch] = text.forward(BLOCK, batch)
    machine.work.run()
    assert same(saved.values(), expected)
    states.restore(saved)
    assert same(states, expected)


def test_the_host_is_no_more_than_a_few_states_ahead(machine: Machine, tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)

    def ahead() -> int:
        return sum(bool(state.isnan().all()) for state in states._kept)

    sent(machine, states)
    assert ahead() == ferry.UNDER_WAY
    text = text_of(machine, states, [])
    for batch in range(COUNT):
        states[batch] = text.forward(BLOCK, batch)
        assert ahead() <= ferry.UNDER_WAY


def test_one_more_state_is_on_the_gpu(machine: Machine, tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)
    sent(machine, states)
    states._ferry.settle()
    most: list[int] = []

    def call(_block: nn.Module, _batch: int, hidden: Tensor) -> Tensor:
        machine.work.run()
        most.append(len(machine.live))
        return hidden

    text = Text(call, states, device=GPU)
    for batch in range(COUNT):
        text.forward(BLOCK, batch)
    assert most == [2] * (COUNT - 1) + [1]


def test_states_that_are_not_in_pinned_memory_do_not_travel_ahead(machine: Machine, tmp_path: Path) -> None:
    expected, found = given(4), []
    states = HiddenStates(3 * expected[0].nbytes, tmp_path / "states")
    for state, made in zip(expected, (True, False, True, True), strict=True):  # the second was restored
        states.append(machine.computed(SHAPE, lambda state=state: state) if made else state)
    assert states._kept[3] is None, "the last one is on disk"
    for batch in range(4):
        with states.at(batch, GPU) as hidden:
            machine.current.add(lambda hidden=hidden: found.append(hidden.clone()))
    machine.work.run()
    assert machine.loads == 0 and same(found, expected)


def test_states_taken_in_any_order_do_not_travel_ahead(machine: Machine, tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)
    expected = sent(machine, states)
    assert all(torch.equal(states[index], expected[index]) for index in (3, 0, 5, 1))
    assert machine.loads == 0


# --- on a GPU ---------------------------------------------------------------------------------------------------------

LONG = 20_000_000
"""Cycles that a stream sleeps: some milliseconds, in which everything else could be done."""
LARGE = (2, 512, 1024)


def slow(states: HiddenStates) -> torch.cuda.Stream:
    """Let what is sent ahead next come late."""
    states._ferry._side = states._ferry._side or torch.cuda.Stream(GPU)
    with torch.cuda.stream(states._ferry._side):
        torch.cuda._sleep(LONG)
    return states._ferry._side


def both(tmp_path: Path) -> tuple[HiddenStates, HiddenStates]:
    """The same states at home on the host and on the GPU."""
    host, gpu = HiddenStates(PLENTY, tmp_path / "host"), HiddenStates(PLENTY, tmp_path / "gpu", GPU)
    for _ in range(COUNT):
        state = torch.randn(LARGE, device=GPU, dtype=torch.bfloat16)
        host.append(state)
        gpu.append(state)
    assert all(kept.is_pinned() for kept in host._kept) and all(kept.is_cuda for kept in gpu._kept)
    return host, gpu


def equal(host: HiddenStates, gpu: HiddenStates) -> bool:
    return same(host, [state.cpu() for state in gpu])


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["nothing", "loading", "work"])
def test_states_of_the_host_are_those_of_the_gpu(late: str, tmp_path: Path) -> None:
    host, gpu = both(tmp_path)

    def call(_block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        if late == "work":
            torch.cuda._sleep(LONG)
        return (hidden.to(GPU) * 1.25 + batch).sin()

    for _ in range(3):
        for states in (gpu, host):
            text = Text(call, states, device=GPU)
            for batch in range(COUNT):
                if late == "loading":
                    slow(host)
                states[batch] = text.forward(BLOCK, batch)
    assert equal(host, gpu)


@pytest.mark.gpu
def test_a_state_of_the_host_is_replaced_on_its_way(tmp_path: Path) -> None:
    host, gpu = both(tmp_path)
    found: list[Tensor] = []
    for batch in range(COUNT):
        slow(host)
        with host.at(batch, GPU) as hidden:
            found.append(hidden.clone())
            assert torch.equal(hidden, gpu[batch])
            if batch % 2 and batch + 1 < COUNT:
                host[batch + 1] = gpu[batch + 1] = torch.randn_like(hidden)
    assert same(found, list(gpu)) and equal(host, gpu)


@pytest.mark.gpu
def test_memory_of_what_was_sent_in_vain_is_free(tmp_path: Path) -> None:
    host, _ = both(tmp_path)
    for end in ("replaced", "failed", "forgotten"):
        torch.cuda.synchronize()
        slow(host)
        with pytest.raises(KeyError), host.at(0, GPU):
            raise KeyError
        if end == "replaced":
            host[1] = torch.zeros(LARGE, device=GPU, dtype=torch.bfloat16)
            with host.at(1, GPU):
                pass
        if end == "forgotten":
            host.clear()
        host._ferry._loaded = None
        others = [torch.full(LARGE, 7.0, device=GPU, dtype=torch.bfloat16) for _ in range(16)]
        torch.cuda.synchronize()
        assert all(bool((other == 7).all()) for other in others)


@pytest.mark.gpu
def test_a_reader_gets_whole_states_and_pages_are_not_given_away_too_early(tmp_path: Path) -> None:
    states = HiddenStates(PLENTY, tmp_path)
    for round in range(20):
        made = torch.full(LARGE, float(round), device=GPU, dtype=torch.bfloat16)
        torch.cuda._sleep(LONG // 4)
        if round:
            states[0] = made
        else:
            states.append(made)
        if round % 3 == 0:  # otherwise it is replaced before it has arrived, and its pages go to another
            assert bool((states[0] == round).all())
    assert bool((states.snapshot()["state.00000"] == 19).all())


def checksums(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob("*.safetensors")}


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "awq+gptq-w4a16-g32", "gptaq-w4a16-g32", "smoothquant-w8a8"])
def test_a_run_gives_the_same_bytes_wherever_its_states_live(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import save_model, save_text

    import lowbit
    from lowbit.stream import sweep

    taken: list[Tensor] = []
    over = ferry.Ferry.over
    monkeypatch.setattr(ferry.Ferry, "over", lambda self, *of: taken.append(of[0]) or over(self, *of))
    model = save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    options = {"calibration": str(save_text(tmp_path / "text.txt", 20000)), "samples": 96, "length": 128}
    for home in ("gpu", "host"):
        assert not taken
        monkeypatch.setattr(sweep, "at_home", lambda *_, home=home: home == "gpu")
        lowbit.quantize(model, recipe, tmp_path / home, device="cuda", **options)
    assert taken
    assert checksums(tmp_path / "gpu") and checksums(tmp_path / "gpu") == checksums(tmp_path / "host")
