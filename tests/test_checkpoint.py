"""Reading checkpoints by byte range, held to transformers' own `from_pretrained`, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import BASES, FAMILIES, Models, bound, make, rewrite, truth
from torch import Tensor

from lowbit.modules.linear import install
from lowbit.stream.checkpoint import Prefetch, check_finite, free

EXPERT = re.compile(r"(.+)\.(\d+)\.(gate_up_proj|down_proj)\.(weight|bias)")


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def expected(name: str, loaded: dict[str, Tensor], transposed: bool) -> Tensor:
    """What transformers holds under a skeleton's name: itself, or a slice of a fused parameter."""
    if name in loaded:
        return loaded[name]
    match = EXPERT.fullmatch(name)
    assert match, name
    path, expert, projection, kind = match.groups()
    fused = loaded[f"{path}.{projection}" + ("_bias" if kind == "bias" else "")][int(expert)]
    return fused.T if transposed and kind == "weight" else fused


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_what_transformers_loads(save: Models, family: str, sharded: bool) -> None:
    path = save(family, sharded)
    assert len(list(path.glob("*.safetensors"))) > 1 or not sharded
    checkpoint, skeleton = bound(path)
    loaded = truth(path)
    names = checkpoint.names()
    assert set(names) == set(skeleton.state_dict())
    for name, tensor in checkpoint.read(names).items():
        if name.endswith(".mlp.gate.weight"):  # transformers 5.24 widens routers to fp32, which changes no value
            assert torch.equal(tensor.float(), expected(name, loaded, family == "gpt-oss").float()), name
            continue
        assert same_bits(tensor, expected(name, loaded, family == "gpt-oss")), name
    assert checkpoint.unexpected == ()
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt-oss"])
def test_sizes_are_known_before_reading(save: Models, family: str) -> None:
    checkpoint, _ = bound(save(family))
    block = checkpoint.names(next(n for n in checkpoint.names() if "layers.0." in n).partition("0.")[0] + "0.")
    tensors = checkpoint.read(block)
    assert list(tensors) == list(block) and len(block) > 5
    assert checkpoint.nbytes(block) == sum(tensor.nbytes for tensor in tensors.values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(storages) == len(tensors), "every tensor has memory of its own"


@pytest.mark.parametrize("family", BASES)
def test_checkpoint_of_the_base_model(save: Models, tmp_path: Path, family: str) -> None:
    """Without the head, names lack the prefix that the causal model puts in front; its tied head is found anyway."""
    model = make(family)
    model.config.tie_word_embeddings = True
    base = getattr(transformers, BASES[family])(model.config).to(torch.bfloat16)
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    checkpoint, skeleton = bound(tmp_path)
    loaded = truth(tmp_path)
    assert set(checkpoint.names()) == set(skeleton.state_dict())
    for name, tensor in checkpoint.read(checkpoint.names()).items():
        assert same_bits(tensor, loaded[name]), name


def test_left_over_tensors(save: Models, tmp_path: Path) -> None:
    """Masks and frequencies of old checkpoints are nobody's business; anything else is reported."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        tensors["transformer.h.0.surprise"] = torch.ones(3)

    checkpoint, _ = bound(rewrite(save("gpt2"), tmp_path / "gpt2", add))
    assert checkpoint.unexpected == ("transformer.h.0.surprise",)

    def frequencies(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    checkpoint, _ = bound(rewrite(save("llama"), tmp_path / "llama", frequencies))
    assert checkpoint.unexpected == ()


def test_ties(save: Models, tmp_path: Path) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert bound(save("llama"))[0].tied == {}
    assert bound(save("llama-tied"))[0].tied == {head: embedding}
    path = save("llama-tied")
    equal = rewrite(path, tmp_path / "equal", lambda t: t.update({head: t[embedding].clone()}))
    assert bound(equal)[0].tied == {head: embedding}
    other = rewrite(path, tmp_path / "other", lambda t: t.update({head: -t[embedding]}))
    checkpoint, _ = bound(other)
    assert checkpoint.tied == {}, "a head of its own is not tied, whatever the config says"
    assert same_bits(checkpoint.read([head])[head], -load_file(path / "model.safetensors")[embedding])
    swapped = rewrite(path, tmp_path / "swapped", lambda t: t.update({head: t.pop(embedding)}))
    checkpoint, _ = bound(swapped)
    assert checkpoint.tied == {embedding: head}
    assert same_bits(checkpoint.read([embedding])[embedding], truth(swapped)[embedding])


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt-oss", "gpt2"])
def test_rows(save: Models, family: str) -> None:
    checkpoint, skeleton = bound(save(family, True))
    index = torch.tensor([5, 3, 4, 5, 0, 15])
    for name in checkpoint.names():
        whole = checkpoint.read([name])[name]
        if whole.shape[0] > 15:
            assert same_bits(checkpoint.rows(name, index), whole[index]), name
    embedding = next(n for n in checkpoint.names() if (skeleton.get_input_embeddings() and "wte" in n) or "embed" in n)
    assert checkpoint.rows(embedding, torch.tensor([], dtype=torch.int64)).shape == (0, 32)
    with pytest.raises(ValueError, match="has 96 rows and row 96 was asked for"):
        checkpoint.rows(embedding, torch.tensor([0, 96]))


def test_pieces_tell_names_to_write_back_to(save: Models) -> None:
    """Splitting what the model holds by its pieces gives the checkpoint's own tensors."""
    for family in ("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "gpt2", "phi3"):
        checkpoint, _ = bound(save(family))
        stored = load_file(save(family) / "model.safetensors")
        rebuilt = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
        for name, tensor in checkpoint.read(checkpoint.names()).items():
            lines = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
            for piece in checkpoint.pieces(name):
                height = len(piece.columns if piece.transposed else piece.rows)
                part, lines = lines[:height], lines[height:]
                into = rebuilt[piece.name]
                into = into.view(-1, into.shape[-1] if into.dim() > 1 else 1)
                rows, columns = torch.tensor(piece.rows), torch.tensor(piece.columns)
                into[rows[:, None], columns] = part.T if piece.transposed else part
            assert len(lines) == 0
        assert all(same_bits(rebuilt[name], stored[name]) for name in stored), family
    checkpoint, _ = bound(save("mixtral"))
    pieces = checkpoint.pieces("model.layers.1.mlp.experts.3.gate_up_proj.weight")
    assert [piece.name.rpartition("experts.")[2] for piece in pieces] == ["3.w1.weight", "3.w3.weight"]
    assert [(piece.rows, piece.transposed) for piece in pieces] == [(range(48), False)] * 2


def map_llama(monkeypatch: pytest.MonkeyPatch, mapping: list[Any]) -> None:
    """Let transformers load Llama by another conversion."""
    from transformers import conversion_mapping

    real = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: copy.deepcopy(mapping) if kind == "llama" else real(kind),
    )


def test_permuted_and_transposed_pieces(save: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of the mapping that no family above uses: split, transpose, interleave, rotary permutation."""
    from transformers.core_model_loading import Chunk, Interleave, PermuteForRope, Transpose, WeightConverter

    mapping = [
        WeightConverter(
            "mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Interleave(0), Chunk(0)]
        ),
        WeightConverter("mlp.down.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
        WeightConverter(
            "self_attn.qo.weight",
            ["self_attn.q_proj.weight", "self_attn.o_proj.weight"],
            [Chunk(0), PermuteForRope(permute_layer_names=["q_proj"])],
        ),
    ]
    original = save("llama")
    plain = truth(original)
    map_llama(monkeypatch, mapping)

    def rename(tensors: dict[str, Tensor]) -> None:
        for layer in ("model.layers.0.", "model.layers.1."):
            gate, up = tensors.pop(f"{layer}mlp.gate_proj.weight"), tensors.pop(f"{layer}mlp.up_proj.weight")
            tensors[f"{layer}mlp.gate_up.weight"] = torch.stack([gate, up], 1).flatten(0, 1).contiguous()
            tensors[f"{layer}mlp.down.weight"] = tensors.pop(f"{layer}mlp.down_proj.weight").T.contiguous()
            q, o = (tensors.pop(f"{layer}self_attn.{name}_proj.weight") for name in "qo")
            tensors[f"{layer}self_attn.qo.weight"] = torch.cat([q, o])

    path = rewrite(original, tmp_path / "odd", rename)
    checkpoint, _ = bound(path)
    loaded = truth(path)
    for name, tensor in checkpoint.read(checkpoint.names()).items():
        assert same_bits(tensor, loaded[name]), name
        assert ("q_proj" in name) != same_bits(tensor, plain[name]), name
    assert checkpoint.pieces("model.layers.0.mlp.up_proj.weight")[0].rows == range(1, 96, 2)
    assert checkpoint.pieces("model.layers.0.mlp.down_proj.weight")[0].transposed


def test_a_conversion_that_computes_is_refused(save: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Double(ConversionOps):
        def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Tensor]:
            return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}

    mapping = [WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Double()])]
    path = save("llama")
    map_llama(monkeypatch, mapping)
    with pytest.raises(ValueError, match=r"down_proj\.weight is not stored but computed by transformers"):
        bound(path)


def test_a_model_that_does_not_fit(save: Models, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = rewrite(save("llama"), tmp_path / "lacking", lambda t: (t.pop(name), None)[1])
    with pytest.raises(ValueError, match=rf"lacks {re.escape(name)}, which LlamaForCausalLM needs"):
        bound(lacking)
    with pytest.raises(ValueError, match=r"holds model\.\S+ of shape .* where config\.json asks for .*take config"):
        bound(rewrite(save("llama"), tmp_path / "shape", lambda t: None, intermediate_size=40))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.\S+, \S+, \S+ and 6 more"):
        bound(rewrite(save("llama"), tmp_path / "deep", lambda t: None, num_hidden_layers=3))
    expert = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    with pytest.raises(ValueError, match=r"do not make up model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        bound(rewrite(save("mixtral"), tmp_path / "expert", lambda t: (t.pop(expert), None)[1]))
    with pytest.raises(ValueError, match=r"shape \[4, 96, 32\]|lacks .*experts\.4\."):
        bound(rewrite(save("mixtral"), tmp_path / "experts", lambda t: None, num_local_experts=5))
    with pytest.raises(ValueError, match="is already quantized"):
        bound(rewrite(save("llama"), tmp_path / "q", lambda t: None, quantization_config={"quant_method": "gptq"}))


def test_shard_that_shrinks_while_it_is_read(save: Models, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(save("llama"), path)
    checkpoint, _ = bound(path)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(ValueError, match="became shorter while it was read"):
        checkpoint.read(checkpoint.names())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prefetch(device: str, save: Models) -> None:
    """For a GPU it reads into memory that the GPU can copy from by itself."""
    checkpoint, _ = bound(save("mixtral"))
    prefixes = ["model.layers.0.", "model.layers.1."]
    with Prefetch(checkpoint, torch.device(device)) as ahead:
        ahead.start(checkpoint.names(prefixes[0]))
        for prefix, following in zip(prefixes, [*prefixes[1:], None], strict=True):
            tensors = ahead.result()
            if following:
                ahead.start(checkpoint.names(following))
                with pytest.raises(AssertionError, match="only one block"):
                    ahead.start(checkpoint.names(following))
            direct = checkpoint.read(checkpoint.names(prefix))
            assert tensors.keys() == direct.keys()
            assert all(same_bits(tensors[name], direct[name]) for name in direct)
            assert all(tensor.is_pinned() == (device == "cuda") for tensor in tensors.values())


def test_prefetch_reads_in_the_background_and_hands_on_errors(save: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = bound(save("llama"))
    go, threads = threading.Event(), []

    def read(names: tuple[str, ...], pinned: bool) -> dict[str, Tensor]:
        assert not pinned
        threads.append(threading.current_thread())
        assert go.wait(10)
        raise ValueError(f"cannot read {names[0]}")

    monkeypatch.setattr(checkpoint, "read", read)
    with Prefetch(checkpoint, torch.device("cpu")) as ahead:
        ahead.start(["x"])
        go.set()
        with pytest.raises(ValueError, match="cannot read x"):
            ahead.result()
    assert threads and threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_check_finite(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.stream.checkpoint._ELEMENTS", 7)
    good = torch.randn(5, 6).to(dtype)
    check_finite("good", good)
    check_finite("empty", good[:0])
    check_finite("codes", torch.ones(3, dtype=torch.int8))
    bad = good.clone()
    bad.view(-1)[[3, 17]] = torch.tensor(torch.nan).to(dtype)
    with pytest.raises(ValueError, match=r"layers\.3\.weight holds 2 NaN values: "):
        check_finite("layers.3.weight", bad)
    bad.view(-1)[29] = torch.tensor(-torch.inf).to(dtype)
    with pytest.raises(ValueError, match="w holds 2 NaN and 1 infinite values: "):
        check_finite("w", bad)


def test_a_block_filled_and_freed(save: Models) -> None:
    """The skeleton's block computes what transformers' computes, and is as it was born afterwards."""
    path = save("llama", True)
    checkpoint, skeleton = bound(path)
    prefix = "model.layers.1."
    block = skeleton.get_submodule(prefix[:-1])
    born = {name: (tensor.shape, tensor.device.type) for name, tensor in block.state_dict().items()}
    tensors = checkpoint.read(checkpoint.names(prefix))
    install(block, {}, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, torch.float32)
    mine = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).get_submodule(prefix[:-1])
    assert all(torch.equal(block.state_dict()[name], tensor) for name, tensor in mine.state_dict().items())
    free(block)
    assert {name: (tensor.shape, tensor.device.type) for name, tensor in block.state_dict().items()} == born
    assert {device for _, device in born.values()} == {"meta"}


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
from transformers import AutoConfig
from lowbit.graph.skeleton import build_skeleton
from lowbit.stream.checkpoint import Checkpoint, Prefetch

checkpoint = Checkpoint.open(sys.argv[1])
checkpoint.bind(build_skeleton(checkpoint.config))
blocks = [checkpoint.names(f"model.layers.{i}.") for i in range(8)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
with Prefetch(checkpoint, torch.device("cpu")) as ahead:
    ahead.start(blocks[0])
    for following in [*blocks[1:], None]:
        tensors = ahead.result()
        if following:
            ahead.start(following)
        assert all(int(tensor.view(-1)[-1]) == 0 for tensor in tensors.values())
        del tensors
print(peak() - before, checkpoint.nbytes(blocks[0]), checkpoint.size_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in kilobytes on Linux")
def test_peak_memory_is_two_blocks(tmp_path: Path) -> None:
    """This block and the one read ahead, however large the file; the file is sparse and costs no disk.

    glibc's malloc raises its threshold for mapping as large tensors are freed, and then keeps some of what is freed;
    the threshold is fixed here, so that what is measured is the reader.
    """
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, vocab_size=64
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    growth, block, size = map(int, done.stdout.split())
    assert size > 7 * block > 200e6
    assert growth < 2.2 * block
