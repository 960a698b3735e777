"""Anatomies against tables written by hand from the architectures, and folding against the models' own logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from architectures import EXPECTED
from families import TINY, build, tokens
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from lowbit.graph import (
    Anatomy,
    BlockAnatomy,
    Edge,
    Heads,
    Norm,
    Rows,
    Site,
    apply_scale,
    apply_shift,
    build_skeleton,
    describe,
    discover,
    prove,
    unfuse_experts,
)
from lowbit.graph.fold import scale_source
from lowbit.graph.prove import source_channels


@cache
def anatomy_of(name: str) -> Anatomy:
    return discover(TINY[name]())


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of the tiny model, with unfused experts."""
    model = build(name).to(dtype)
    unfuse_experts(model)
    return model


def blocks_of(model: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    blocks = model.get_submodule(anatomy.layers)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def written(edge: Edge) -> str:
    source = edge.source.name if isinstance(edge.source, Norm) else edge.source.site.name
    readers = " ".join(sorted(site.name for site in edge.readers))
    others = f" + {' '.join(sorted(edge.others))}" if edge.others else ""
    return f"{edge.kind}{'!' if edge.shift else ''}: {source} > {readers}{others}"


def normal(edge: str) -> str:
    head, _, others = edge.partition(" + ")
    source, _, readers = head.partition(" > ")
    tail = f" + {' '.join(sorted(others.split()))}" if others else ""
    return f"{source} > {' '.join(sorted(readers.split()))}{tail}"


def kinds(anatomy: Anatomy) -> list[BlockAnatomy]:
    """The distinct blocks, in order."""
    found: list[BlockAnatomy] = []
    for block in anatomy.blocks:
        if not any(block is known for known in found):
            found.append(block)
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_anatomy_is_what_the_architecture_says(name: str) -> None:
    anatomy, expected = anatomy_of(name), EXPECTED[name]
    assert len(kinds(anatomy)) == len(expected)
    assert anatomy.tied == expected[0].tied
    assert anatomy.heads == Heads(*expected[0].heads, 16)
    for block, want in zip(kinds(anatomy), expected, strict=True):
        assert [" ".join(site.name for site in tap.sites) for tap in block.taps] == want.taps.split(" | ")
        assert {written(edge) for edge in block.edges} == {normal(edge) for edge in want.edges.split("; ")}
        assert {place for place, _ in block.refused} == set(want.refused.split())
        assert [norm.name for norm in block.reads] == want.reads.split()
        assert block.writes == tuple(want.writes.split())
        assert set(block.scores) == set(want.scores.split())


@pytest.mark.parametrize("name", EXPECTED)
def test_shapes_and_biases_are_the_models(name: str) -> None:
    anatomy = anatomy_of(name)
    model = model_of(name)
    for block, part in zip(blocks_of(model, anatomy), anatomy.blocks, strict=True):
        for site in part.sites:
            assert site.weight(block).shape == site.shape
            assert site.bias == (getattr(block.get_submodule(site.name), "bias", None) is not None)
            assert site.weight(block).data_ptr() == block.get_submodule(site.name).weight.data_ptr()


@pytest.mark.parametrize("name", EXPECTED)
def test_every_input_is_behind_an_edge_or_refused_with_a_reason(name: str) -> None:
    for block in kinds(anatomy_of(name)):
        read = {site.name for edge in block.edges for site in edge.readers}
        places = {place for place, reason in block.refused if reason}
        assert all(tap.name in read | places for tap in block.taps)


@pytest.mark.parametrize("name", EXPECTED)
def test_proofs_hold_on_the_full_configuration(name: str) -> None:
    """The anatomy was proved on a shrunk double; here it is proved on the tiny model's own dimensions and weights."""
    anatomy = anatomy_of(name)
    assert set(anatomy.proofs) == {
        edge.kind + suffix
        for block in anatomy.blocks
        for edge in block.edges
        for suffix in ("", " shift")
        if edge.shift or not suffix
    }
    assert max(anatomy.proofs.values()) < 1e-9
    changes = prove(model_of(name, torch.float64), anatomy, tokens())
    assert changes.keys() == anatomy.proofs.keys()
    assert max(changes.values()) < 1e-9


def scales(edge: Edge, block: nn.Module, generator: torch.Generator) -> Tensor:
    return torch.exp(0.5 * torch.randn(source_channels(block, edge), generator=generator))


@pytest.mark.parametrize("name", EXPECTED)
def test_folding_everything_at_once_keeps_the_logits(name: str) -> None:
    """In fp32, through the model's own forward: all edges of all blocks scaled, all lawful shifts made."""
    anatomy, model = anatomy_of(name), model_of(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(tokens()).logits
        for block, part in zip(blocks_of(model, anatomy), anatomy.blocks, strict=True):
            for edge in part.edges:
                if edge.shift:
                    apply_shift(block, edge, torch.randn(source_channels(block, edge), generator=generator))
                apply_scale(block, edge, scales(edge, block, generator))
        after = model(tokens()).logits
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize("name", EXPECTED)
def test_half_a_fold_changes_the_logits(name: str) -> None:
    anatomy, model = anatomy_of(name), model_of(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        before = model(tokens(4, 16)).logits
    for index, edge in distinct_edges(anatomy):
        block = blocks_of(model, anatomy)[index]
        kept = {key: value.clone() for key, value in block.state_dict().items()}
        scale_source(block, edge, scales(edge, block, generator))
        with torch.no_grad():
            change = (model(tokens(4, 16)).logits - before).abs().max()
        assert change > 1e-4 * before.abs().max(), edge.name
        block.load_state_dict(kept)


def distinct_edges(anatomy: Anatomy) -> Iterator[tuple[int, Edge]]:
    """(block, edge), every kind of block once and the first two experts of a list."""
    for part in kinds(anatomy):
        for edge in part.edges:
            if isinstance(edge.source, Norm) or edge.source.site.expert in (None, 0, 1):
                yield next(i for i, block in enumerate(anatomy.blocks) if block is part), edge


def test_wrong_channels_rows_and_offsets_change_the_logits() -> None:
    """What the proof must notice: another head's channels, K's rows for V's, a 1 + w norm taken for a plain one."""
    for name, wrong in (
        ("llama", lambda edge: replace(edge, channels=edge.channels[::-1]) if edge.kind == "value" else None),
        ("phi3", lambda edge: moved(edge, -32) if edge.kind == "value" else None),
        ("bloom", lambda edge: moved(edge, -16) if edge.kind == "value" else None),
        ("phi3", lambda edge: moved(edge, -96) if edge.kind == "up" else None),
        (
            "gemma2",
            lambda edge: replace(edge, source=replace(edge.source, offset=0.0)) if edge.kind == "norm" else None,
        ),
        ("mixtral", lambda edge: replace(edge, others=()) if edge.others else None),
        ("cohere", lambda edge: replace(edge, readers=edge.readers[:3]) if edge.kind == "norm" else None),
    ):
        anatomy = anatomy_of(name)
        broken = tuple(
            replace(block, edges=tuple(edge for old in block.edges if (edge := wrong(old)) is not None))
            for block in anatomy.blocks
        )
        assert all(block.edges for block in broken)
        changes = prove(model_of(name, torch.float64), replace(anatomy, blocks=broken), tokens())
        assert min(changes.values()) > 1e-3, name


def moved(edge: Edge, by: int) -> Edge:
    assert isinstance(edge.source, Rows) and edge.source.index is not None
    return replace(edge, source=replace(edge.source, index=tuple(row + by for row in edge.source.index)))


UNLAWFUL = [
    ("gpt2", "up", "mlp.c_fc", "mlp.c_proj"),
    ("falcon-rw", "up", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ("gemma2", "norm", "post_attention_layernorm", "mlp.gate_proj"),
    ("olmo2", "norm", "post_attention_layernorm", "mlp.gate_proj"),
    ("opt-350m", "norm", "self_attn_layer_norm", "fc1"),
]


@pytest.mark.parametrize(("name", "kind", "source", "reader"), UNLAWFUL)
def test_refused_edges_are_unlawful(name: str, kind: str, source: str, reader: str) -> None:
    anatomy = anatomy_of(name)
    block = anatomy.blocks[0]
    sites = {site.name: site for site in block.sites}
    norm = Norm(source, 1.0 if name == "gemma2" else 0.0, bias=name == "opt-350m")
    edge = Edge("refused", norm if kind == "norm" else Rows(sites[source]), (sites[reader],), kind=kind)
    blocks = tuple(replace(block, edges=(edge,)) for block in anatomy.blocks)
    changes = prove(model_of(name, torch.float64), replace(anatomy, blocks=blocks), tokens())
    assert changes[kind] > 1e-3


def test_value_rows_of_fused_projections() -> None:
    """V's rows, written out as the families' code cuts them: 4 heads (2 key-value heads) of width 16."""
    heads = range(4)
    rows = {
        "bloom": [head * 48 + 32 + i for head in heads for i in range(16)],
        "gpt_neox": [head * 48 + 32 + i for head in heads for i in range(16)],
        "falcon-rw": [head * 48 + 32 + i for head in heads for i in range(16)],
        "falcon-40b": [group * 64 + 48 + i for group in range(2) for i in range(16)],
        "falcon-7b": [80 + i for i in range(16)],
        "gpt2": [128 + i for i in range(64)],
        "phi3": [96 + i for i in range(32)],
        "deepseek_v3": [head * 32 + 16 + i for head in heads for i in range(16)],
    }
    for name, expected in rows.items():
        edge = next(edge for edge in anatomy_of(name).blocks[0].edges if edge.kind == "value")
        assert isinstance(edge.source, Rows) and edge.source.index == tuple(expected), name
    channels = next(edge for edge in anatomy_of("llama").blocks[0].edges if edge.kind == "value").channels
    assert channels == tuple(query // 2 * 16 + i for query in heads for i in range(16))


def test_inspected_modules() -> None:
    inspected = {
        name: {edge.name.split(" -> ")[1]: edge.inspect for edge in anatomy_of(name).blocks[-1].edges}
        for name in ("llama", "opt", "bloom", "cohere", "mixtral")
    }
    assert inspected["llama"] == {
        "self_attn.q_proj": "self_attn",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp",
        "mlp.down_proj": "mlp.down_proj",
    }
    assert inspected["opt"]["fc1"] == "fc1" and inspected["bloom"]["mlp.dense_h_to_4h"] == "mlp"
    assert inspected["cohere"]["self_attn.q_proj"] == "" and inspected["mixtral"]["mlp.experts.0.gate_up_proj"] == "mlp"


def test_norm_offsets_and_places_outside_the_blocks() -> None:
    for name, offset in (("llama", 0.0), ("gemma2", 1.0), ("gemma3", 1.0), ("opt", 0.0)):
        norms = {edge.source.offset for edge in anatomy_of(name).blocks[0].edges if isinstance(edge.source, Norm)}
        final = anatomy_of(name).final_norm
        assert norms == {offset} and final is not None and final.offset == offset
    assert anatomy_of("opt-350m").final_norm is None
    gpt2 = anatomy_of("gpt2")
    assert (gpt2.layers, gpt2.embedding, gpt2.head) == ("transformer.h", "transformer.wte", "lm_head")
    assert gpt2.full_name(1, "attn.c_attn") == "transformer.h.1.attn.c_attn"
    assert all(site.transposed for site in gpt2.blocks[0].sites)


def test_dimensions_are_the_configurations_not_the_probes() -> None:
    """BLOOM and Llama 3 at full size, nothing built but meta tensors."""
    llama = CONFIG_MAPPING["llama"](
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    )
    anatomy = discover(llama)
    value = next(edge for edge in anatomy.blocks[0].edges if edge.kind == "value")
    assert anatomy.heads == Heads(32, 8, 128)
    assert value.channels is not None and value.channels[130] == 2 and value.channels[4095] == 1023
    assert anatomy.blocks[31].taps[3].sites == (Site("mlp.down_proj", (4096, 14336)),)
    bloom = discover(CONFIG_MAPPING["bloom"](hidden_size=1024, n_head=16, n_layer=3))
    value = next(edge for edge in bloom.blocks[0].edges if edge.kind == "value")
    assert isinstance(value.source, Rows)
    assert value.source.index == tuple(head * 192 + 128 + i for head in range(16) for i in range(64))


def test_description_names_what_matters() -> None:
    text = describe(anatomy_of("deepseek_v3"))
    assert "block 0\n" in text and "blocks 1-2\n" in text
    assert "mlp.experts.*.gate_up_proj (32 rows) -> mlp.experts.*.down_proj" in text
    assert "mlp.experts.1." not in text and "mlp.gate\n" in text
    olmo2 = describe(anatomy_of("olmo2"))
    assert "self_attn.q_proj: it reads the residual stream itself" in olmo2 and "query-key norm" in olmo2


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bert", {}, "later tokens change earlier logits"),
        ("gemma3n_text", {}, "reuse the keys and values of earlier ones"),
        ("gemma3", {}, "states no num_hidden_layers"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(model_type: str, changes: dict[str, int], reason: str) -> None:
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**changes)
    with pytest.raises(ValueError, match=reason) as error:
        discover(config)
    assert str(error.value).startswith(model_type) and "\n" not in str(error.value)


def test_a_skeleton_at_hand_is_used() -> None:
    config = TINY["llama"]()
    assert discover(config, build_skeleton(config)) == anatomy_of("llama")
