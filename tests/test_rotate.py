"""Rotations merged into tiny models of every family: their own logits must not notice, or the family is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import COMMON, TINY, build, tokens
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from lowbit.graph import Anatomy, Norm, Site, discover, unfuse_experts
from lowbit.graph.probe import DoublePrecision
from lowbit.graph.rotate import (
    absorb,
    effective_gain,
    fold_model,
    fold_norms,
    fold_rows,
    free_norm,
    random_rotation,
    rotate_block,
    rotate_heads,
    rotate_model,
    rotate_rows,
    rotation_refusal,
)
from lowbit.numerics.maps import Map, hadamard_or_orthogonal, random_hadamard, random_orthogonal

NO_LINEAR = "and no linear behind it could take its gain"
POST_NORM = f"post_attention_layernorm writes into the residual stream, {NO_LINEAR}"
REFUSED = {
    "bloom": f"transformer.word_embeddings_layernorm normalises the embedding, {NO_LINEAR}",
    "opt-350m": "model.decoder.project_in writes into the residual stream before the blocks and is no embedding",
    "gemma2": POST_NORM,
    "gemma3": POST_NORM,
    "olmo2": POST_NORM,
}
MEAN = ["opt", "gpt2", "gpt_neox", "falcon-7b", "falcon-40b", "falcon-rw", "cohere", "stablelm", "stablelm-parallel"]
ROTATED = [name for name in TINY if name not in REFUSED]


@cache
def anatomy_of(name: str) -> Anatomy:
    return discover(TINY[name]())


def model_of(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = build(name).to(dtype)
    unfuse_experts(model)
    return model


def blocks_of(model: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    blocks = model.get_submodule(anatomy.layers)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), DoublePrecision():
        logits = model(input_ids=tokens(), use_cache=False).logits
    assert isinstance(logits, Tensor) and logits.dtype == torch.float64
    return logits


@cache
def original(name: str) -> Tensor:
    return logits_of(model_of(name))


def change(model: PreTrainedModel, name: str) -> float:
    """Largest change of the logits relative to the largest logit."""
    before = original(name)
    return float((logits_of(model) - before).abs().max() / before.abs().max())


# --- the steps --------------------------------------------------------------------------------------------------------

Step = Callable[[PreTrainedModel, Anatomy], None]


def residual(model: PreTrainedModel, anatomy: Anatomy) -> None:
    fold_model(model, anatomy)
    rotate_model(model, anatomy, random_rotation(anatomy, model.get_submodule(anatomy.embedding).weight.shape[1], 3))


def heads(model: PreTrainedModel, anatomy: Anatomy) -> None:
    for seed, (block, part) in enumerate(zip(blocks_of(model, anatomy), anatomy.blocks, strict=True)):
        rotate_heads(block, part, random_orthogonal(anatomy.heads.width, seed))


def online(model: PreTrainedModel, anatomy: Anatomy, kind: str) -> None:
    """Puts an online map on what reads an edge of this kind, as a hook, and absorbs it into the weight."""
    for block, part in zip(blocks_of(model, anatomy), anatomy.blocks, strict=True):
        for site in last_sites(part.sites, [edge.readers for edge in part.edges if edge.kind == kind], kind):
            width = site.shape[1] // anatomy.heads.query if kind == "value" else 1
            put_online(block, site, hadamard_or_orthogonal(site.shape[1] // width, width, seed=1))


def last_sites(sites: tuple[Site, ...], readers: list[tuple[Site, ...]], kind: str) -> Iterator[Site]:
    """The attention outputs, or the feed-forward outputs: those have a name but not always an edge (GELU, gpt_oss)."""
    outputs = {site.name for group in readers for site in group}
    down = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")
    yield from (site for site in sites if (site.name in outputs if kind == "value" else site.name.endswith(down)))


def put_online(block: nn.Module, site: Site, online_map: Map) -> None:
    absorb(block, site, online_map)
    block.get_submodule(site.name).register_forward_pre_hook(lambda _module, args: (online_map.apply(args[0]),))


STEPS: dict[str, Step] = {
    "fold": fold_model,
    "residual": residual,
    "heads": heads,
    "across heads": lambda model, anatomy: online(model, anatomy, "value"),
    "down": lambda model, anatomy: online(model, anatomy, "up"),
}


@pytest.mark.parametrize("name", TINY)
def test_what_may_be_rotated_is_known(name: str) -> None:
    rotations = anatomy_of(name).rotations
    refusal = rotation_refusal(anatomy_of(name))
    if name in REFUSED:
        assert rotations.residual == "" and refusal == f"{anatomy_of(name).family} cannot be rotated: {REFUSED[name]}."
        with pytest.raises(ValueError, match="cannot be rotated"):
            random_rotation(anatomy_of(name), 64, 0)
    else:
        assert rotations.residual == ("mean-preserving" if name in MEAN else "orthogonal") and refusal is None
        positions = {"opt": "model.decoder.embed_positions", "gpt2": "transformer.wpe"}
        tables = (anatomy_of(name).embedding, *([positions[name]] if name in positions else []))
        assert rotations.embeddings == tables
    assert rotations.heads


def test_only_the_proof_can_tell() -> None:
    """OLMo's norms have no parameters, so nothing shows who reads the residual stream; Qwen3-Next gates each channel of
    the attention output, which lets a scale of V pass and no rotation.
    """
    olmo = discover(CONFIG_MAPPING["olmo"](**COMMON))
    assert rotation_refusal(olmo) == "olmo cannot be rotated: a rotation of its residual stream changes the logits."
    assert olmo.rotations.heads
    attention = {"layer_types": ["full_attention"] * 2, "head_dim": 16, "num_experts": 4}
    gated = discover(CONFIG_MAPPING["qwen3_next"](**COMMON, **attention))
    assert gated.rotations.residual == "orthogonal" and not gated.rotations.heads
    assert all(any(edge.kind == "value" for edge in block.edges) for block in gated.blocks)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TINY)
def test_every_step_alone_keeps_the_logits(name: str, step: str) -> None:
    if name in REFUSED and step in ("fold", "residual"):
        return
    anatomy, model = anatomy_of(name), model_of(name)
    before = [parameter.clone() for parameter in model.parameters()]
    STEPS[step](model, anatomy)
    pairs = zip(before, model.parameters(), strict=False)
    assert any(not torch.equal(old, new) for old, new in pairs), "nothing was done"
    assert change(model, name) < 1e-9


@pytest.mark.parametrize("name", TINY)
def test_all_steps_together_keep_the_logits(name: str) -> None:
    anatomy, model = anatomy_of(name), model_of(name)
    for step in ("heads", "across heads", "down") if name in REFUSED else STEPS:
        if step != "fold":  # the residual rotation folds by itself
            STEPS[step](model, anatomy)
    assert change(model, name) < 1e-9


@pytest.mark.parametrize("name", ROTATED)
def test_blocks_are_rotated_with_their_norms_gain_free(name: str) -> None:
    """The fold leaves an effective gain of one in every norm in front of the residual stream's readers."""
    anatomy, model = anatomy_of(name), model_of(name, torch.float32)
    fold_model(model, anatomy)
    blocks = zip(blocks_of(model, anatomy), anatomy.blocks, strict=True)
    norms = [(block, norm) for block, part in blocks for norm in part.reads]
    final = anatomy.final_norm
    assert final is not None
    for module, norm in (*norms, (model, final)):
        gain = effective_gain(norm, module.get_submodule(norm.name).weight)
        assert torch.equal(gain, torch.ones_like(gain))
    if anatomy.tied:
        assert model.get_submodule(anatomy.head).weight is not model.get_submodule(anatomy.embedding).weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2"])
def test_a_rotation_is_undone_by_its_transpose(name: str) -> None:
    anatomy, model = anatomy_of(name), model_of(name, torch.float32)
    fold_model(model, anatomy)
    folded = {key: value.clone() for key, value in model.state_dict().items()}
    q, turn = random_rotation(anatomy, 64, 1), random_orthogonal(16, 2)
    for back in (False, True):
        rotate_model(model, anatomy, q.T if back else q)
        for block, part in zip(blocks_of(model, anatomy), anatomy.blocks, strict=True):
            rotate_heads(block, part, turn.T if back else turn)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, folded[key], rtol=0, atol=1e-6)


def test_heads_may_be_mapped_by_any_invertible_matrix() -> None:
    anatomy, model = anatomy_of("qwen2"), model_of("qwen2")
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for block, part in zip(blocks_of(model, anatomy), anatomy.blocks, strict=True):
        rotate_heads(block, part, matrix)
    assert change(model, "qwen2") < 1e-9


# --- what must not go unnoticed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_positions_left_behind_change_the_logits(name: str) -> None:
    anatomy = anatomy_of(name)
    forgetful = replace(anatomy, rotations=replace(anatomy.rotations, embeddings=anatomy.rotations.embeddings[:1]))
    model = model_of(name)
    residual(model, forgetful)
    assert change(model, name) > 1e-3


@pytest.mark.parametrize("name", MEAN)
def test_layer_norms_do_not_bear_other_rotations(name: str) -> None:
    anatomy, model = anatomy_of(name), model_of(name)
    fold_model(model, anatomy)
    rotate_model(model, anatomy, random_hadamard(64, 0))
    assert change(model, name) > 1e-3


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_every_reader_and_writer_counts(name: str) -> None:
    """Routers, the shared expert's gate, experts' biases, latent projections: each left behind shows in the logits."""
    anatomy = anatomy_of(name)
    q = random_rotation(anatomy, 64, 0)
    part = anatomy.blocks[-1]
    edges = [edge for edge in part.edges if isinstance(edge.source, Norm) and edge.source in part.reads]
    readers = [path for edge in edges for path in (*(site.name for site in edge.readers), *edge.others)]
    for left in [path for path in (*readers, *part.writes) if ".experts." not in path]:
        model = model_of(name)
        fold_model(model, anatomy)
        module = blocks_of(model, anatomy)[-1].get_submodule(left)
        kept = {key: value.clone() for key, value in module.named_parameters(recurse=False)}
        rotate_model(model, anatomy, q)
        module.load_state_dict(kept, strict=False)
        assert change(model, name) > 1e-6, left


def test_a_value_bias_left_behind_changes_the_logits() -> None:
    anatomy, model = anatomy_of("qwen2"), model_of("qwen2")
    block = blocks_of(model, anatomy)[0]
    kept = block.get_submodule("self_attn.v_proj").bias.clone()
    rotate_heads(block, anatomy.blocks[0], random_orthogonal(16, 0))
    block.get_submodule("self_attn.v_proj").bias.data.copy_(kept)
    assert change(model, "qwen2") > 1e-3


def test_embeddings_are_not_centred() -> None:
    """An RMSNorm sees the mean: subtracting it, as public code does, is no function-preserving step."""
    anatomy, model = anatomy_of("llama"), model_of("llama")
    table = model.get_submodule(anatomy.embedding).weight
    table.data.add_(0.7)
    before, rows = logits_of(model), table.detach().clone()
    residual(model, anatomy)
    assert (logits_of(model) - before).abs().max() < 1e-9 * before.abs().max()
    q = random_rotation(anatomy, 64, 3)
    torch.testing.assert_close(table.detach() @ q.T, rows, rtol=0, atol=1e-12)

    centred = model_of("llama")
    centred.get_submodule(anatomy.embedding).weight.data.copy_(rows - rows.mean(1, keepdim=True))
    assert (logits_of(centred) - before).abs().max() > 1e-3 * before.abs().max()


# --- norms ------------------------------------------------------------------------------------------------------------


def test_a_gain_of_zero_is_folded_where_no_bias_hangs_on_it() -> None:
    anatomy, model = anatomy_of("llama"), model_of("llama")
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight.data[3] = 0
    before = logits_of(model)
    residual(model, anatomy)
    assert (logits_of(model) - before).abs().max() < 1e-9 * before.abs().max()


def test_a_bias_under_a_gain_of_zero_is_refused() -> None:
    anatomy, model = anatomy_of("falcon-rw"), model_of("falcon-rw")  # its readers have biases: they take it
    block, part = blocks_of(model, anatomy)[0], anatomy.blocks[0]
    block.get_submodule("input_layernorm").weight.data[3] = 0
    before = logits_of(model)
    fold_norms(block, part)
    assert not block.get_submodule("input_layernorm").bias.any()
    assert (logits_of(model) - before).abs().max() < 1e-9 * before.abs().max()

    anatomy, model = anatomy_of("falcon-7b"), model_of("falcon-7b")  # its readers have none
    block, part = blocks_of(model, anatomy)[0], anatomy.blocks[0]
    block.get_submodule("input_layernorm").weight.data[3] = 0
    with pytest.raises(ValueError, match="input_layernorm has a gain of 0 under a bias"):
        fold_norms(block, part)


def test_rows_and_norms_outside_the_blocks_by_hand() -> None:
    """The pure functions that a table is streamed through, in pieces, against one dense product."""
    generator = torch.Generator().manual_seed(0)
    rows, gain = torch.randn(10, 8, generator=generator), torch.rand(8, generator=generator) + 0.5
    bias, q = torch.randn(8, generator=generator), random_orthogonal(8, 0)
    whole = (rows.double() * gain.double()) @ q
    pieces = [rotate_rows(fold_rows(part, gain), q) for part in rows.double().split(3)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-14)
    assert rotate_rows(rows.bfloat16(), q).dtype == torch.bfloat16

    weight, rest = free_norm(Norm("norm", offset=1.0, bias=True), gain - 1, bias)
    assert rest is not None and torch.equal(weight, torch.zeros(8))
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64)  # (x g + β) Wᵀ = (x + β/g) (W g)ᵀ
    torch.testing.assert_close((x + rest) @ fold_rows(rows.double(), gain).T, (x * gain + bias) @ rows.double().T)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.graph.rotate.CHUNK", size)
        yield


def test_pieces_make_no_difference() -> None:
    anatomy = anatomy_of("gpt2")
    states = []
    for size in (4096, 7):
        model = model_of("gpt2")
        with chunks_of(size):
            block = blocks_of(model, anatomy)[0]
            fold_norms(block, anatomy.blocks[0])
            rotate_block(block, anatomy.blocks[0], random_rotation(anatomy, 64, 0))
        states.append(block.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=1e-14)
