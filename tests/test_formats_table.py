"""docs/formats.md says what the formats say of themselves, and the words are those that refuse a run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lowbit.cli import main
from lowbit.formats import base
from lowbit.runtime.clients import CLIENTS

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "formats_table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("formats_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["formats_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh(table: ModuleType) -> None:
    assert table.PAGE.read_text("utf8") == table.page(), "run make docs"


def test_every_format_has_a_column_and_every_note_advice(table: ModuleType) -> None:
    lines = table.render().splitlines()
    assert lines[0].strip("| ").split(" | ") == [name for name, _ in base.modules()]
    notes = [line for line in lines if line[:1].isdigit()]
    assert len(notes) > 10
    assert all(": " in note for note in notes), [note for note in notes if ": " not in note]


def test_every_format_is_read_by_clients_that_are_known() -> None:
    for name, form in base.modules():
        assert form.CLIENTS, name
        assert set(form.CLIENTS) <= CLIENTS.keys(), name
    assert all(client.script.is_file() for client in CLIENTS.values())


def test_onnx_is_refused_with_a_pointer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--format", "onnx", "--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path), *asked]) == 2
    said = capsys.readouterr().err
    assert "does not write onnx" in said
    assert "use gguf" in said
