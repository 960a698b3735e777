"""A finished block is written while the next one is worked on, and no error there is lost."""

from __future__ import annotations

import threading

import pytest

from lowbit.stream.sweep import _Writer


def fails() -> None:
    raise OSError("no space left")


def test_at_once() -> None:
    written = list[int]()
    with _Writer(behind=False) as writer:
        writer.start(lambda: written.append(1))
        assert written == [1]
        with pytest.raises(OSError):
            writer.start(fails)


def test_one_behind_and_in_order() -> None:
    written, go = list[int](), threading.Event()

    def slow() -> None:
        go.wait(10)
        written.append(1)

    with _Writer(behind=True) as writer:
        writer.start(slow)
        assert written == []
        go.set()
        writer.start(lambda: written.append(2))
        assert written[0] == 1
    assert written == [1, 2]


def test_what_writing_raised_comes_up_at_the_next_block_or_the_end() -> None:
    with pytest.raises(OSError, match="no space"), _Writer(behind=True) as writer:
        writer.start(fails)
        writer.start(lambda: None)
    with pytest.raises(OSError, match="no space"), _Writer(behind=True) as writer:
        writer.start(fails)


def test_a_block_that_was_finished_stays_finished_when_the_next_one_fails() -> None:
    written, go = list[int](), threading.Event()

    def slow() -> None:
        go.wait(10)
        written.append(1)

    with pytest.raises(ValueError, match="NaN"), _Writer(behind=True) as writer:
        writer.start(slow)
        threading.Timer(0.2, go.set).start()
        raise ValueError("NaN")
    assert written == [1]
