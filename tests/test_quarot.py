"""QuaRot end to end: a rotated model computes what it computed, online maps included, and rounds better for it.

One linear of each model is zero and the only one to be quantized, so that nothing is lost to rounding: the logits of
what `lowbit.load` loads are then those of the original in transformers, up to fp32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from families import build, tokens
from safetensors import safe_open
from tiny import save_text, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import recipes
from lowbit.graph.anatomy import Anatomy, Edge, Norm, Site
from lowbit.graph.discover import discover
from lowbit.methods.awq import AWQ
from lowbit.methods.base import Rotation, Transform
from lowbit.methods.quarot import QuaRot, attention_outputs, down_inputs
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Override, Scheme
from lowbit.modules.attention import attached
from lowbit.modules.linear import QLinear
from lowbit.numerics.hadamard import hadamard
from lowbit.numerics.maps import Hadamard, Kronecker
from lowbit.numerics.spec import Int, per_channel
from lowbit.stream import run

FAMILIES = ["llama", "llama-tied", "qwen2", "mixtral", "opt", "gpt2", "deepseek_v3", "phi3"]
PARTS = ("residual", "heads", "across", "down")
NONE = dict.fromkeys((*PARTS, "keys"), False)


@cache
def anatomy_of(family: str) -> Anatomy:
    return discover(build(family).config)


def last_site(family: str) -> str:
    anatomy = anatomy_of(family)
    return anatomy.full_name(len(anatomy.blocks) - 1, anatomy.blocks[-1].taps[-1].sites[0].name)


def lossless(family: str, rotation: Rotation) -> Recipe:
    """A recipe that quantizes the last linear alone."""
    scheme = Scheme(None, overrides=(Override(last_site(family), per_channel(Int(8))),))
    return Recipe(scheme, RTN(), MinMaxClip(), (rotation,), "lossless")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of models whose last linear is zero."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(family: str) -> Path:
        model = build(family)
        model.config.dtype = torch.float32
        path, _, expert = last_site(family).partition(".experts.")
        with torch.no_grad():
            if not expert:
                model.get_submodule(path).weight.zero_()
            else:
                model.get_submodule(f"{path}.experts").down_proj.data[int(expert.partition(".")[0])].zero_()
        model.save_pretrained(root / family)
        tokenizer(model.config.vocab_size).save_pretrained(root / family)
        return root / family

    return make


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=tokens(), use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def change(path: Path, original: Path) -> float:
    before = logits_of(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32))
    return float((logits_of(lowbit.load(path)) - before).abs().max() / before.abs().max())


# --- the function is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_together_keeps_the_logits(saved: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    lowbit.quantize(saved(family), lossless(family, QuaRot()), tmp_path / "out")
    assert change(tmp_path / "out", saved(family)) < 2e-5


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_every_part_alone_keeps_the_logits(
    saved: Callable[[str], Path], tmp_path: Path, family: str, part: str
) -> None:
    kind = "orthogonal" if family == "gpt2" else "hadamard"
    settings = NONE | {part: True, "kind": kind}
    lowbit.quantize(saved(family), lossless(family, QuaRot(**settings)), tmp_path / "out")
    assert change(tmp_path / "out", saved(family)) < 2e-5
    before = dict(AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32).named_parameters())
    after = dict(lowbit.load(tmp_path / "out").named_parameters())
    same = [name for name in before if name in after and torch.equal(before[name], after[name])]
    assert len(same) < len(before) - 1, "nothing was done"


def test_a_rotated_family_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    for family, reason in {
        "gemma2": "post_attention_layernorm writes into the residual stream",
        "bloom": "word_embeddings_layernorm normalises the embedding",
        "opt-350m": "project_in writes into the residual stream",
    }.items():
        build(family).save_pretrained(tmp_path / family)
        with pytest.raises(ValueError, match=reason) as refused:
            lowbit.quantize(tmp_path / family, "quarot-w4a16", tmp_path / "out")
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    options = ["quarot.residual=false"]
    lowbit.quantize(tmp_path / "gemma2", "quarot-w4a16", tmp_path / "out", settings=options)


def test_a_tied_head_is_stored_by_itself(saved: Callable[[str], Path], tmp_path: Path) -> None:
    told: list[str] = []
    recipe = lossless("llama-tied", QuaRot())
    lowbit.quantize(saved("llama-tied"), recipe, tmp_path / "out", notice=told.append)
    anatomy, out = anatomy_of("llama-tied"), tmp_path / "out"
    assert any("unties the head" in line for line in told)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert f"{anatomy.head}.weight" not in json.loads((out / "names.json").read_text())
    with safe_open(next(out.glob("model-00001-*")), "pt") as file:
        head, table = (file.get_tensor(f"{path}.weight") for path in (anatomy.head, anatomy.embedding))
        norm = file.get_tensor(f"{anatomy.final_norm.name}.weight")  # type: ignore[union-attr]
    original = build("llama-tied")
    gain = original.get_parameter("model.norm.weight").double()
    q = QuaRot().matrices(anatomy)["residual"]
    rows = original.get_parameter("model.embed_tokens.weight").double()
    torch.testing.assert_close(table, (rows @ q).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(head, (rows @ torch.diag(gain) @ q).float(), rtol=0, atol=1e-6)
    assert torch.equal(norm, torch.ones_like(norm))


# --- matrices and places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_matrices_are_orthogonal_and_keep_the_mean_where_norms_subtract_it(family: str, kind: str) -> None:
    found = QuaRot(kind=kind).matrices(anatomy_of(family))  # type: ignore[arg-type]
    assert set(found) == {"residual", "heads.0", "heads.1"}
    for matrix in found.values():
        eye = torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)
    ones = torch.ones(64, dtype=torch.float64)
    kept = torch.allclose(found["residual"] @ ones, ones, atol=1e-12)
    assert kept == (family == "opt")
    if family == "llama" and kind == "hadamard":
        torch.testing.assert_close(found["residual"].abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))
    other = QuaRot(kind=kind, seed=1).matrices(anatomy_of(family))  # type: ignore[arg-type]
    assert not torch.equal(other["residual"], found["residual"])


def test_within_and_across_heads_make_one_hadamard_matrix() -> None:
    """(I ⊗ H_h)(H_n ⊗ I) = H_n ⊗ H_h, which for powers of two is the Hadamard matrix of all channels."""
    anatomy = anatomy_of("llama")
    across = QuaRot().online(anatomy, 0)["self_attn.o_proj"].matrix()
    within = torch.kron(torch.eye(4, dtype=torch.float64), QuaRot().matrices(anatomy)["heads.0"])
    torch.testing.assert_close(within @ across, hadamard(64).double() / 8, rtol=0, atol=1e-12)


def test_places_of_online_maps() -> None:
    maps = QuaRot().online(anatomy_of("mixtral"), 0)
    downs = {f"mlp.experts.{expert}.down_proj" for expert in range(4)}
    assert set(maps) == {"self_attn.o_proj", *downs}
    assert maps["self_attn.o_proj"] == Hadamard(4, 16) and maps["mlp.experts.0.down_proj"] == Hadamard(96)
    assert set(QuaRot(across=False).online(anatomy_of("gpt2"), 0)) == {"mlp.c_proj"}
    for family in FAMILIES:
        part = anatomy_of(family).blocks[-1]
        taps = [*attention_outputs(part), *down_inputs(part)]
        assert {site.name for tap in taps for site in tap.sites} >= {n for n in part.writes if n != "mlp"}


def test_widths_without_a_hadamard_matrix_get_small_orthogonal_factors() -> None:
    anatomy = anatomy_of("llama")
    odd = Site("mlp.down_proj", (64, 90))
    taps = tuple(replace(tap, sites=(odd,)) if tap.name == odd.name else tap for tap in anatomy.blocks[0].taps)
    edges = tuple(
        e if e.kind != "up" else Edge(e.name, Norm("none"), (odd,), kind="up") for e in anatomy.blocks[0].edges
    )
    strange = replace(anatomy, blocks=(replace(anatomy.blocks[0], taps=taps, edges=edges),))
    map = QuaRot().online(strange, 0)["mlp.down_proj"]
    assert isinstance(map, Kronecker) and map.sizes == (9, 10)
    matrix = map.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(90, dtype=torch.float64), rtol=0, atol=1e-6)


def test_keys_are_turned_where_a_cache_quantizes_them(outliers: tuple[Path, Path], tmp_path: Path) -> None:
    for keys in ("true", "false"):
        settings = [f"quarot.keys={keys}"]
        quantize(outliers, "quarot-w8a16kv4", tmp_path / keys, settings=settings)
    found = [attached(lowbit.load(tmp_path / keys)) for keys in ("true", "false")]
    assert [layer.key_map for layer in found[0].values()] == [Hadamard(16)] * 2
    assert [layer.key_map for layer in found[1].values()] == [None] * 2
    assert QuaRot().key_map(anatomy_of("deepseek_v3"), 0) is None  # its keys are wider than its values
    for family in ("llama", "gpt2", "falcon-7b", "phi3"):
        assert QuaRot().key_map(anatomy_of(family), 0) == Hadamard(16)
        assert QuaRot(keys=False).key_map(anatomy_of(family), 0) is None


def test_it_comes_first_and_alone() -> None:
    assert isinstance(QuaRot(), Rotation) and not isinstance(QuaRot(), Transform)
    recipe = recipes.parse("quarot+awq+gptq-w4a4")
    assert recipe.rotation == QuaRot() and recipe.folds == (AWQ(),)
    assert recipes.from_dict(recipes.to_dict(recipe)).recipe == recipe
    with pytest.raises(ValueError, match="write quarot first"):
        recipes.parse("awq+quarot-w4")
    with pytest.raises(ValueError, match="keep one of them"):
        recipes.parse("quarot+spinquant-w4")
    with pytest.raises(ValueError, match="nothing is rotated"):
        QuaRot(**NONE)


# --- what it is good for, and with what -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model whose residual stream has a few large channels, a text)."""
    root = tmp_path_factory.mktemp("outliers")
    model = build("llama")
    model.config.dtype = torch.float32
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::21] *= 30
    model.save_pretrained(root / "model")
    tokenizer(model.config.vocab_size).save_pretrained(root / "model")
    return root / "model", save_text(root / "text.txt")


def quantize(material: tuple[Path, Path], recipe: str, output: Path, **options: object) -> lowbit.api.Quantized:
    model, text = material
    return lowbit.quantize(model, recipe, output, calibration=str(text), samples=8, length=32, **options)


@pytest.mark.parametrize("steps", ["gptq", "awq", "smoothquant+gptq", "gptaq", "signround"])
def test_every_composition_is_better_than_plain_rounding(
    outliers: tuple[Path, Path], tmp_path: Path, steps: str
) -> None:
    settings = ["signround.iterations=2"] if steps == "signround" else []
    done = quantize(outliers, f"quarot+{steps}-w4a4", tmp_path / "out", settings=settings)
    assert all(block["error_after"] < block["error_before"] for block in done.blocks)
    if steps in ("gptq", "awq"):
        assert done.blocks[0]["error_after"] < 0.75 * done.blocks[0]["error_before"]


def test_the_yardstick_is_of_the_model_before_its_rotation(outliers: tuple[Path, Path], tmp_path: Path) -> None:
    """Without text, of its weights; with static inputs, over the text it is judged on.

    Turning back moves a few inputs to another code, which may be a fifth of a percent; after a rotation outliers are
    gone, and the error is half as large or less.
    """
    for recipe in ("w4a4", "w4a16-g32"):
        rotated = quantize(outliers, f"quarot-{recipe}", tmp_path / f"quarot-{recipe}")
        plain = quantize(outliers, f"rtn-{recipe}", tmp_path / recipe)
        assert [b["error_before"] for b in rotated.blocks] == [b["error_before"] for b in plain.blocks]
        assert rotated.blocks[0]["error_of"] == "weight"
    for recipe, flips in (("gptq-w4a16", 1e-4), ("gptq-w4a8", 5e-3)):
        rotated = quantize(outliers, f"quarot+{recipe}", tmp_path / f"quarot+{recipe}")
        plain = quantize(outliers, recipe, tmp_path / recipe)
        assert rotated.blocks[0]["error_before"] == pytest.approx(plain.blocks[0]["error_before"], rel=flips)
        assert rotated.blocks[0]["error_after"] < plain.blocks[0]["error_before"] / 2
    model, text = outliers
    options = {"calibration": str(text), "samples": 2, "length": 32}  # one micro-batch: both see the same ranges
    rotated = lowbit.quantize(model, "quarot+gptq-w8a8-static", tmp_path / "a", **options)
    plain = lowbit.quantize(model, "gptq-w8a8-static", tmp_path / "b", **options)
    assert rotated.blocks[0]["error_before"] == pytest.approx(plain.blocks[0]["error_before"], rel=1e-3)


def test_inputs_of_a_heavy_tailed_layer_become_gaussian(outliers: tuple[Path, Path], tmp_path: Path) -> None:
    def kurtosis(path: Path) -> float:
        model, seen = lowbit.load(path), []
        module = model.get_submodule("model.layers.0.mlp.gate_proj")
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
        logits_of(model)
        x = torch.cat(seen).double()
        return float(((x - x.mean()) / x.std()).pow(4).mean())

    before = kurtosis(outliers[0])
    quantize(outliers, "quarot-w8a16", tmp_path / "out")
    after = kurtosis(tmp_path / "out")
    assert before > 10 and abs(after - 3) < 1


@pytest.mark.parametrize("recipe", ["quarot+gptq-w4a4", "quarot+gptaq-w4a8"])
def test_what_is_loaded_is_what_was_propagated(
    outliers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """The inputs of the last block in the sweep are those in the loaded model, on the same windows."""
    from lowbit.data.calibrate import load_calibration
    from lowbit.stream import sweep
    from lowbit.stream.hidden import micro_batches

    seen: list[Tensor] = []
    inner = sweep.quantize_block

    def watching(work, text, seed):
        seen[:] = [text.inputs[batch].clone() for batch in range(text.batches)]
        return inner(work, text, seed=seed)

    monkeypatch.setattr(sweep, "quantize_block", watching)
    quantize(outliers, recipe, tmp_path / "out")
    model = lowbit.load(tmp_path / "out")
    assert any(isinstance(module, QLinear) and module.input_map for module in model.modules())
    found: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    from lowbit.runtime.load import load_tokenizer

    windows = load_calibration(str(outliers[1]), load_tokenizer(outliers[0]), 8, 32, 0)
    with torch.no_grad():
        for batch in micro_batches(list(windows), sweep.MICRO_BATCH):
            model(input_ids=batch, use_cache=False)
    for mine, theirs in zip(seen, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


# --- resume and export ------------------------------------------------------------------------------------------------


def checksums(directory: Path) -> dict[str, str]:
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "journal.jsonl"]
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("recipe", ["quarot+gptaq-w4a8", "spinquant+gptq-w4a8"])
@pytest.mark.parametrize("snapshots", [False, True])
def test_a_killed_run_ends_in_the_same_bytes(
    outliers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, snapshots: bool
) -> None:
    from lowbit.stream import sweep

    settings = ["spinquant.steps=2"] if "spinquant" in recipe else []
    quantize(outliers, recipe, tmp_path / "whole", settings=settings)
    monkeypatch.setattr(sweep, "SNAPSHOT_SECONDS", 0.0 if snapshots else 1e9)
    write = run.RunDirectory.write_block

    def interrupted(self, *rest):
        write(self, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.RunDirectory, "write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(outliers, recipe, tmp_path / "out", settings=settings)
    monkeypatch.setattr(run.RunDirectory, "write_block", write)
    quantize(outliers, recipe, tmp_path / "out", settings=settings)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_export_of_merged_rotations_and_refusal_of_the_others(saved: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    target = "compressed-tensors"
    with pytest.raises(ValueError, match="online maps") as refused:
        lowbit.quantize(saved("llama-tied"), "quarot-w8a16", tmp_path / "out", target=target)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    kept = ["*.self_attn.*"]  # even where the mapped linear keeps 16 bits
    with pytest.raises(ValueError, match=r"o_proj: .*online maps"):
        lowbit.quantize(saved("llama-tied"), "quarot-w8a16", tmp_path / "out", target=target, ignore=kept)

    merged = ["quarot.across=false", "quarot.down=false"]
    lowbit.quantize(saved("llama-tied"), "quarot-w8a16", tmp_path / "out", target=target, settings=merged)
    exported = lowbit.export(tmp_path / "out", tmp_path / "export")
    assert exported.passed
    ours, theirs = lowbit.load(tmp_path / "out"), lowbit.load(exported.path)
    assert float((logits_of(ours) - logits_of(theirs)).abs().max()) < 1e-4 * float(logits_of(ours).abs().max())

    lowbit.quantize(saved("llama-tied"), "quarot-w8a16", tmp_path / "online")
    with pytest.raises(ValueError, match="online maps"):
        lowbit.export(tmp_path / "online", tmp_path / "nowhere")


def test_a_mapped_linear_may_keep_16_bits(saved: Callable[[str], Path], tmp_path: Path) -> None:
    lowbit.quantize(saved("qwen2"), "quarot-w8a8", tmp_path / "out", ignore=["*.o_proj", "*.mlp.*"])
    module = lowbit.load(tmp_path / "out").get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(module, QLinear) and module.layer.input_map == Hadamard(4, 16) and not module.layer.weight.parts
    assert change(tmp_path / "out", saved("qwen2")) < 0.05
