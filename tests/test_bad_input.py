"""Bad input: each gets one clear sentence with advice and the right exit status, and what was finished stays."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text, tokenizer

import lowbit
from lowbit import cli
from lowbit.data.calibrate import load_calibration
from lowbit.formats import files
from lowbit.formats.files import read_shard, shard_header, write_shard
from lowbit.runtime.load import load_tokenizer
from lowbit.stream import run


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sharded model, text)."""
    root = tmp_path_factory.mktemp("bad")
    return save_model("llama", root / "model", max_shard_size="100KB"), save_text(root / "text.txt")


@pytest.fixture
def model(material: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(material[0], tmp_path / "model"))


@pytest.fixture
def text(material: tuple[Path, Path]) -> Path:
    return material[1]


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int) -> str:
    """The one sentence that a command says on stderr, besides notes."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("lowbit")]
    assert code == status, err
    assert out == ""
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def quantize(model: object, output: Path, *more: object, recipe: str = "rtn-w4a16-g32") -> tuple[object, ...]:
    return ("quantize", model, "--recipe", recipe, "--output", output, *more)


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    line = said(capsys, *quantize(tmp_path / "empty", tmp_path / "out"), status=2)
    assert "holds no model" in line and "config.json" in line
    assert "is no directory" in said(capsys, *quantize(tmp_path / "nowhere", tmp_path / "out"), status=2)
    assert not (tmp_path / "out").exists()


def test_missing_shard(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in said(capsys, *quantize(model, tmp_path / "out"), status=2)


def test_truncated_shard(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    line = said(capsys, *quantize(model, tmp_path / "out"), status=2)
    assert shard.name in line and "truncated" in line


def test_corrupt_shard(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(b"\xff" * 200)
    assert shard.name in said(capsys, *quantize(model, tmp_path / "out"), status=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_weight_names_the_tensor_and_keeps_finished_blocks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shard = next(file for file in model.glob("*.safetensors") if name in shard_header(file).tensors)
    tensors = read_shard(shard)
    tensors[name][3, 4] = value
    write_shard(shard, tensors)
    line = said(capsys, *quantize(model, tmp_path / "out"), status=2)
    assert name in line and ("NaN" in line or "infinite" in line)
    assert (tmp_path / "out" / "model-00002-of-00003.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_tokenizer_that_does_not_fit(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    words = tokenizer(100_000)
    vocabulary = {f"x{i}": i + 200 for i in range(50)}
    words.backend_tokenizer.model = type(words.backend_tokenizer.model)({"<unk>": 3, **vocabulary}, unk_token="<unk>")
    words.save_pretrained(model)
    assert config["vocab_size"] == 128
    arguments = quantize(model, tmp_path / "out", "--calibration", text, "--length", 32, recipe="gptq-w4a16-g32")
    assert "tokenizer does not fit the model" in said(capsys, *arguments, status=2)


def test_too_little_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    short = quantize(model, tmp_path / "out", "--calibration", tmp_path / "short.txt", "--length", 32, recipe="gptq-w4")
    assert "calibration text has 4 tokens" in said(capsys, *short, status=2)
    evaluated = ("evaluate", model, "--perplexity", tmp_path / "short.txt", "--window", 32)
    assert "one window of 32 needs 32" in said(capsys, *evaluated, status=2)


@pytest.mark.parametrize(
    ("recipe", "more", "expected"),
    [
        ("gptk-w4a16", (), "did you mean"),
        ("gptq-w4a16-g48", (), "does not divide 64 columns"),
        ("gptq-w9a16", (), "9"),
        ("rtn-w4a16-g32", ("--set", "rtn.damp=1"), "rtn"),
        ("gptq-w4a16-g32", ("--set", "gptq.dampp=1"), "damp"),
        ("gptq-w4a16-g32", ("--set", "gptq.damp=-1"), "damp must be positive"),
        ("rtn-w4a16-g32", ("--ignore", "*.downproj"), "did you mean *.down_proj?"),
        ("rtn-w4a16-g32", ("--target", "compressed-tensor"), "did you mean compressed-tensors?"),
        ("smoothquant-w4a4-g32", ("--target", "gptq"), "describe weights alone"),
        ("rtn-w4a16-g32", ("--device", "cuda"), "no CUDA device"),
        ("rtn-w4a16-g32", ("--dtype", "float8"), "unknown dtype"),
    ],
)
def test_nonsense_in_a_request(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, more: tuple, expected: str
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = quantize(model, tmp_path / "out", *more, "--calibration", text, "--length", 32, recipe=recipe)
    assert expected in said(capsys, *arguments, status=2)
    assert not (tmp_path / "out").exists()


def test_nonsense_in_a_recipe_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("scheme: {weights: {format: int4}}\nroud: {gptq: {}}\n")
    line = said(capsys, *quantize(model, tmp_path / "out", recipe=str(tmp_path / "mine.yaml")), status=2)
    assert "roud" in line and "round" in line


def test_longer_than_the_context(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = quantize(model, tmp_path / "out", "--calibration", text, "--length", 4096, recipe="gptq-w4")
    assert "more than the model's context" in said(capsys, *arguments, status=2)


def test_an_output_that_holds_something_else(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for more in ((), ("--restart",)):
        assert "holds something else (thesis.tex)" in said(capsys, *quantize(model, output, *more), status=2)
    assert (output / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    assert "is a file" in said(capsys, *quantize(model, tmp_path / "file"), status=2)
    assert "--output" in said(capsys, "quantize", model, "--recipe", "rtn-w4a16-g32", status=2)


def test_a_full_disk_keeps_what_is_finished(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, second, write = tmp_path / "out", "model-00003-of-00003.safetensors", files._write_all

    def full(file, view):
        if second in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, view)

    monkeypatch.setattr(files, "_write_all", full)
    line = said(capsys, *quantize(model, output), status=1)
    assert "disk full" in line and "finished blocks are kept" in line
    assert (output / "model-00002-of-00003.safetensors").exists()
    assert not list(output.glob(".*partial"))
    monkeypatch.setattr(files, "_write_all", write)
    assert cli.main([str(a) for a in quantize(model, output)]) == 0


def test_ctrl_c_can_be_resumed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run.RunDirectory.write_block

    def interrupted(self, block, *rest):
        write(self, block, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.RunDirectory, "write_block", interrupted)
    assert "run the same command again" in said(capsys, *quantize(model, tmp_path / "out"), status=130)
    monkeypatch.setattr(run.RunDirectory, "write_block", write)
    assert cli.main([str(a) for a in quantize(model, tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("error", "advice"), [(MemoryError(), "lower --memory"), (torch.OutOfMemoryError(), "lower --gpu-memory")], ids=str
)
def test_running_out_of_memory_can_be_resumed(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    advice: str,
) -> None:
    write, out = run.RunDirectory.write_block, tmp_path / "out"

    def second_fails(self: run.RunDirectory, block: int, *rest: object) -> None:
        if block == 1:
            raise error
        write(self, block, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run.RunDirectory, "write_block", second_fails)
        assert advice in said(capsys, *quantize(model, out), status=1)
    assert run.RunDirectory(out, 2).finished() == 1
    assert cli.main([str(argument) for argument in quantize(model, out)]) == 0


def test_an_unfinished_run_is_not_loaded(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.RunDirectory, "finish", lambda self: None)
    assert cli.main([str(a) for a in quantize(model, tmp_path / "out")]) == 0
    evaluated = ("evaluate", tmp_path / "out", "--perplexity", text, "--window", 32)
    assert "is not finished" in said(capsys, *evaluated, status=2)


def test_an_unknown_architecture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llamma", "architectures": ["Llamma"]}))
    assert "llamma" in said(capsys, *quantize(model, tmp_path / "out"), status=2)


def test_two_runs_into_one_directory(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run.RunDirectory(tmp_path / "out", 2)
    with directory.opened({"a": 1}, restart=False):
        assert "another run is writing" in said(capsys, *quantize(model, tmp_path / "out"), status=2)


def test_command_line_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "invalid choice" in said(capsys, "quantise", status=2)
    assert "--recipe" in said(capsys, "quantize", "demo", "--output", tmp_path / "out", status=2)
    assert "no size" in said(capsys, *quantize("demo", tmp_path / "out", "--memory", "lots"), status=2)


def test_calibration_windows_of_ones_own(tmp_path: Path) -> None:
    """Windows drawn elsewhere give what a text file gives that holds them; windows that cannot be are refused."""
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"samples": 4, "length": 32}
    lowbit.quantize(model, "gptq-w4a16-g16", tmp_path / "file", calibration=str(text), **options)
    rows = load_calibration(str(text), load_tokenizer(model), 4, 32, 0)
    lowbit.quantize(model, "gptq-w4a16-g16", tmp_path / "rows", calibration=rows)
    for shard in (tmp_path / "file").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "rows" / shard.name).read_bytes()
    refused = (([], "two token ids"), ([torch.zeros(2, 8)], "two token ids"), ([torch.tensor([1, 99999])], "beyond"))
    for wrong, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            lowbit.quantize(model, "gptq-w4a16-g16", tmp_path / "wrong", calibration=wrong)


@pytest.mark.parametrize("command", ["quantize", "evaluate", "speed"])
def test_an_option_that_no_command_has_is_answered_by_the_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if command == "speed" else ["demo"]
    recipe = ["--recipe", "rtn-w4a16"] if command == "quantize" else []
    for option, meant in (("--nonsense", ""), ("--jsom", "; did you mean --json?")):
        sentence = said(capsys, command, *model, *recipe, option, "4", status=2)
        assert sentence == f"lowbit {command}: unrecognized arguments: {option} 4{meant} (see lowbit {command} --help)"
