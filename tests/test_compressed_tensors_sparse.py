"""Pruned models as compressed-tensors: what its releases left of sparse layouts, and zeros that its readers see."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from exported import client_answers, client_python, logits_of, tensors_of, windows
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.formats.ct_limits import FILLED, SPARSE
from lowbit.formats.ct_tensors import filled
from lowbit.methods.base import Encode
from lowbit.methods.magnitude import Magnitude
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import BF16, E2M1, E4M3, Int, Spec, mx, nvfp4, per_channel, per_group
from lowbit.runtime import verify
from lowbit.runtime.clients import transformers

package = pytest.importorskip("compressed_tensors")

OPTIONS = {"samples": 8, "length": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sparse")
    save_model("llama", place / "model", dtype=torch.bfloat16)
    save_text(place / "text.txt")
    return place


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the client here instead of in a process of its own, which would import transformers anew."""

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, str(Path(transformers.__file__))]
        transformers.run(Path(command[2]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(verify.subprocess, "run", run)


def pruned(spec: Spec, method: Magnitude) -> tuple[QLayer, Tensor]:
    """A layer and what of it is dropped."""
    weight = (torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) + 0.3).bfloat16().float()
    assert isinstance(method, Encode)
    made = method.encode(weight, spec, RTN(), MinMaxClip(), None, scores=False, seed=0)
    assert made.weight.regions is not None
    return QLayer(made.weight), made.weight.regions.mask(1)


@pytest.mark.parametrize(
    "spec",
    [
        *(per_group(Int(bits, rule), 16) for bits in (2, 4) for rule in ("symmetric", "asymmetric", "asymmetric-raw")),
        *(per_channel(Int(4, "symmetric-unsigned")), per_channel(E4M3), mx(E2M1), nvfp4()),
    ],
    ids=str,
)
def test_dropped_entries_get_the_code_of_zero_and_nothing_else_changes(spec: Spec) -> None:
    layer, mask = pruned(spec, Magnitude(0.5, 4))
    whole = filled(layer)
    assert whole.plain
    assert torch.equal(whole.weight.dequantize(), layer.weight.dequantize())
    assert torch.equal(whole.weight.parts[0].codes[~mask], layer.weight.parts[0].codes[~mask])
    assert not whole.weight.dequantize()[mask].any()


def test_other_layers_are_left_alone() -> None:
    layer, _ = pruned(per_channel(Int(4)), Magnitude(0.5))
    plain = filled(layer)
    assert filled(plain) is plain
    other, _ = pruned(Spec(Int(4, "asymmetric"), (1, 16), "float16-min"), Magnitude(0.5))
    assert filled(other) is other, "zero is no value of these codes"


def test_the_package_has_dropped_its_sparse_layouts() -> None:
    """The day that a release has them again, this fails, and there is something to write."""
    from compressed_tensors.compressors.base import BaseCompressor

    known = set(BaseCompressor.registered_names())
    assert "pack-quantized" in known
    assert not {"sparse-bitmask", "sparse-24-bitmask", "marlin-24"} & known


def test_sixteen_bits_are_refused_before_a_weight_is_read(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compressed-tensors has dropped its sparse layouts"):
        lowbit.quantize(place / "model", "wanda2:4", tmp_path / "run", target="compressed-tensors")
    assert not list(tmp_path.glob("run/*.safetensors"))
    lowbit.quantize(place / "model", "magnitude50", tmp_path / "run")
    with pytest.raises(ValueError, match="compressed-tensors has dropped its sparse layouts"):
        lowbit.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="gguf"):
        lowbit.export(tmp_path / "run", tmp_path / "out", format="gguf")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("recipe", ["magnitude2:4-w4a16-g32", "magnitude75-w8a8", "magnitude50-wfp8a16"])
def test_transformers_computes_what_lowbit_computes(recipe: str, place: Path, tmp_path: Path) -> None:
    lowbit.quantize(place / "model", recipe, tmp_path / "run", target="compressed-tensors")
    told: list[str] = []
    found = lowbit.export(tmp_path / "run", tmp_path / "out", verify="transformers", notice=told.append)
    assert FILLED in told
    assert found.verification is not None and found.verification.passed, found.verification
    assert found.verification.max_logit_difference is not None
    if "a8" not in recipe:
        assert found.verification.max_logit_difference <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))["quantization_config"]
    assert config["sparsity_config"] == {}


@pytest.mark.client
def test_an_older_release_reads_the_same_weights(place: Path, tmp_path: Path) -> None:
    """vLLM's own copy of the package is another release, and its kernels take the zeros as they come."""
    client_python("vllm")
    demo = Path(lowbit.__file__).with_name("assets") / "demo"
    lowbit.quantize(demo, "magnitude2:4-w4a16-g128", tmp_path / "run")
    lowbit.export(tmp_path / "run", tmp_path / "out")
    assert any(name.endswith("weight_packed") for name in tensors_of(tmp_path / "out"))
    batch = windows(vocabulary=400, count=2, length=32)
    scores, said = client_answers("vllm", {"": (tmp_path / "out", batch)}, tmp_path / "jobs")("")
    assert said["client"] == "vllm"
    logits = logits_of(lowbit.load(tmp_path / "run", dtype=torch.float32), batch)
    ours = logits.log_softmax(-1)[:, :-1].gather(-1, batch[:, 1:, None])[..., 0]
    coarse = logits_of(lowbit.load(tmp_path / "run", dtype=torch.bfloat16), batch)
    noise = float((coarse.log_softmax(-1)[:, :-1].gather(-1, batch[:, 1:, None])[..., 0] - ours).abs().mean())
    assert float((scores - ours).abs().mean()) <= 1.5 * noise


def test_the_reason_names_a_way_out() -> None:
    assert "use native" in SPARSE and "-w4a16-g128" in SPARSE
    assert Spec(BF16).number == BF16
