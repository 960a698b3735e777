"""Finding a model's files, and saying in one sentence what is wrong with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Models

from lowbit.formats import source as source_files
from lowbit.formats.files import shard_header
from lowbit.stream.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def test_a_path_that_is_no_model(save: Models, tmp_path: Path) -> None:
    def message(path: str | Path) -> str:
        with pytest.raises(ValueError) as caught:
            _ = Checkpoint.open(path).config
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it has no config.json" in message(empty)
    assert "is no directory" in message(tmp_path / "nowhere")
    assert "is no directory" in message("./nowhere")
    assert "is no directory" in message(save("llama") / "model.safetensors")
    (empty / "config.json").write_text("{}")
    assert "neither model.safetensors nor model.safetensors.index.json" in message(empty)
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert "convert it" in message(empty)
    shutil.copy(save("llama") / "model.safetensors", empty)
    assert "config.json" in message(empty)
    (empty / "config.json").write_text("{not json")
    assert "config.json" in message(empty)
    (empty / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "transformers cannot use" in message(empty)


def test_damaged_shards(save: Models, tmp_path: Path) -> None:
    def broken(change: Callable[[Path], object]) -> str:
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(save("llama", True), path)
        change(path)
        with pytest.raises(ValueError) as caught:
            Checkpoint.open(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    shards = sorted(file.name for file in save("llama", True).glob("*.safetensors"))
    index = "model.safetensors.index.json"
    assert f"lacks {shards[1]}, which its index names" in broken(lambda p: (p / shards[1]).unlink())
    whole = (save("llama", True) / shards[2]).read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        message = broken(lambda p, cut=cut: (p / shards[2]).write_bytes(whole[:cut]))
        assert shards[2] in message and "truncated" in message
    message = broken(lambda p: (p / shards[0]).write_bytes(b"\x10\0\0\0\0\0\0\0" + b"?" * 50))
    assert shards[0] in message and "corrupt" in message
    assert f"{index} is corrupt" in broken(lambda p: (p / index).write_text("{"))
    assert f"{index} is corrupt" in broken(lambda p: (p / index).write_text("[]"))
    message = broken(lambda p: (p / index).write_text((p / index).read_text().replace("up_proj", "upper_proj", 1)))
    assert "upper_proj" in message and "though the index says so" in message
    assert "neither model.safetensors nor" in broken(lambda p: (p / index).unlink())


def test_fingerprint(save: Models, tmp_path: Path) -> None:
    original = Checkpoint.open(save("llama", True)).fingerprint()
    assert set(original) == {"config.json", "model.safetensors.index.json"} | {
        file.name for file in save("llama", True).glob("*.safetensors")
    }
    path = tmp_path / "model"
    shutil.copytree(save("llama", True), path)
    assert Checkpoint.open(path).fingerprint() == original
    shard = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[next(iter(shard_header(shard).tensors.values())).start + 100] ^= 1
    shard.write_bytes(data)
    changed = Checkpoint.open(path).fingerprint()
    assert {name for name in original if original[name] != changed[name]} == {shard.name}
    config = path / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert Checkpoint.open(path).fingerprint()["config.json"] != original["config.json"]


def test_fingerprint_of_large_files_samples_every_tensor(
    save: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.stream.checkpoint._HASHED_WHOLE", 0)
    path = tmp_path / "model"
    shutil.copytree(save("llama"), path)
    file = path / "model.safetensors"
    checkpoint, whole = Checkpoint.open(path), file.read_bytes()
    before = checkpoint.fingerprint()
    for entry in shard_header(file).tensors.values():
        for place in (entry.start, (entry.start + entry.stop) // 2, entry.stop - 1):
            changed = bytearray(whole)
            changed[place] ^= 1
            file.write_bytes(changed)
            assert checkpoint.fingerprint()[file.name] != before[file.name]
    file.write_bytes(whole.replace(b"lm_head.weight", b"lm_tail.weight"))
    assert checkpoint.fingerprint()[file.name] != before[file.name]
    file.write_bytes(whole)
    assert checkpoint.fingerprint() == before


def test_demo_is_the_packaged_directory(monkeypatch: pytest.MonkeyPatch, save: Models, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    shutil.copytree(save("llama"), tmp_path / "assets" / "demo")
    monkeypatch.setattr(source_files, "package_files", lambda package: {"lowbit": tmp_path}[package])
    assert Checkpoint.open("demo").path == tmp_path / "assets" / "demo"


def test_hub_download_takes_what_is_needed(monkeypatch: pytest.MonkeyPatch, save: Models) -> None:
    """The hub itself is not asked: only what would be requested of it is checked."""
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(save("llama", True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    checkpoint = Checkpoint.open("org/model", revision="v1")
    assert checkpoint.path == save("llama", True)
    assert [(ask["repo"], ask["revision"]) for ask in asked] == [("org/model", "v1")] * 2
    assert not any("safetensors" in pattern for pattern in asked[0]["allow_patterns"])
    assert {file.name for file in checkpoint.files} <= set(asked[1]["allow_patterns"])
    assert "*.py" not in asked[1]["allow_patterns"]


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="no-such-org/no-such-model is no directory, and the Hugging Face hub"
    ) as caught:
        Checkpoint.open("no-such-org/no-such-model")
    assert "\n" not in str(caught.value)
