"""Stage by stage: every stage sees what it would if the whole block ran again behind each rounding, bit for bit."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY, build, tokens
from tiny import save_model, save_text
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.graph.anatomy import Anatomy, Site, Tap
from lowbit.graph.discover import discover
from lowbit.graph.skeleton import unfuse_experts
from lowbit.methods import GPTQ, LoRC, MinMaxClip
from lowbit.methods.recipe import Recipe
from lowbit.methods.scheme import Override, Scheme
from lowbit.methods.views import Stats
from lowbit.modules.linear import QLinear, install
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import Int, per_group, per_token
from lowbit.stream import run
from lowbit.stream.block import Outcome, quantize_block
from lowbit.stream.hidden import HiddenStates
from lowbit.stream.rounding import rounded
from lowbit.stream.stages import Layout, Passes, stages
from lowbit.stream.text import Text
from lowbit.stream.work import BlockWork

PLENTY = 1 << 40
BATCHES = 3
RECIPE = Recipe(Scheme(per_group(Int(3), 16)), GPTQ(true_sequential=True), MinMaxClip())


@cache
def anatomy_of(family: str) -> Anatomy:
    return discover(build(family).config)


class Bench:
    """One block of a tiny model in fp32, the inputs that its model gives it, and a fresh `BlockWork`."""

    def __init__(self, family: str, index: int, directory: Path, recipe: Recipe = RECIPE, **options: Any) -> None:
        model = build(family)
        unfuse_experts(model)
        anatomy = anatomy_of(family)
        self.block = model.get_submodule(anatomy.full_name(index, ""))
        self.inputs = HiddenStates(PLENTY, directory)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, args = (kwargs.pop("hidden_states"), args) if "hidden_states" in kwargs else (args[0], args[1:])
            self.inputs.append(hidden)
            self.calls.append((args, kwargs))

        with torch.no_grad(), self.block.register_forward_pre_hook(record, with_kwargs=True):
            for seed in range(BATCHES):
                ids = tokens(batch=4, length=16, seed=seed)
                model.get_submodule(anatomy.layers.rpartition(".")[0])(input_ids=ids, use_cache=False)
        part = anatomy.blocks[index]
        formats = {s.name: recipe.scheme.formats(s.name) for s in part.sites}
        tensors = {name: tensor.detach().clone() for name, tensor in self.block.named_parameters()}
        self.work = BlockWork(self.block, part, recipe, formats, tensors, torch.float32, torch.device("cpu"))
        self.text = Text(self.call, self.inputs, **{"budget": PLENTY} | options)

    def call(self, block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.calls[batch]
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def forward(self, block: nn.Module, batch: int) -> Tensor:
        return self.call(block, batch, self.inputs[batch])


@torch.no_grad()
def in_full(bench: Bench) -> tuple[dict[str, QLayer], list[Tensor]]:
    """True-sequential by its definition: the whole block over all text behind every rounded stage."""
    work, layers = bench.work, {}
    work.install_dense()
    for stage in stages(work.anatomy.taps):
        stats: dict[str, Stats] = {}
        hooks = []
        for tap in stage:
            seen = Stats.observing(frozenset({"gram"}))
            stats |= {site.name: seen for site in tap.sites}
            module = work.block.get_submodule(tap.name)
            hooks.append(module.register_forward_pre_hook(lambda _m, args, s=seen: s.update(args[0].flatten(0, -2))))
        for batch in range(BATCHES):
            bench.forward(work.block, batch)
        for hook in hooks:
            hook.remove()
        fresh = rounded(work, stage, stats, seed=0)
        biases = {name: tensor for name, tensor in work.source.items() if name.endswith(".bias")}
        install(work.block, fresh, biases, torch.float32)
        layers |= fresh
    return layers, [bench.forward(work.block, batch) for batch in range(BATCHES)]


def same_codes(found: dict[str, QLayer], expected: dict[str, QLayer]) -> bool:
    assert found.keys() == expected.keys()
    pairs = [(found[name].weight.parts[0], expected[name].weight.parts[0]) for name in expected]
    return all(torch.equal(a.codes, b.codes) and torch.equal(a.grid.scale, b.grid.scale) for a, b in pairs)


def quantized(bench: Bench) -> tuple[Outcome, list[Tensor]]:
    outcome = quantize_block(bench.work, bench.text)
    assert not any("forward" in vars(module) for module in bench.block.modules()), "the block is left as it was"
    return outcome, list(bench.inputs)


@pytest.mark.parametrize("family", TINY)
def test_equals_running_the_whole_block_behind_every_stage(family: str, tmp_path: Path) -> None:
    """Modules side by side, sums in place, post-norms, fused QKV, Conv1D, MLA, experts: whatever the budget."""
    index = len(anatomy_of(family).blocks) - 1
    layers, outputs = in_full(Bench(family, index, tmp_path))
    for budget in (PLENTY, 20_000, 0):
        outcome, advanced = quantized(Bench(family, index, tmp_path, budget=budget))
        assert outcome.advanced
        assert same_codes(outcome.layers, layers)
        assert all(map(torch.equal, advanced, outputs))


def test_experts_of_one_projection_are_one_stage() -> None:
    order = stages(anatomy_of("mixtral").blocks[0].taps)
    leaves = [{site.name.rpartition(".")[2] for tap in stage for site in tap.sites} for stage in order]
    assert leaves == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]
    assert [len(stage) for stage in order] == [1, 1, 4, 4]


def test_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the look at the block as it arrives (one micro-batch), linears, norms and attention run once a batch."""
    counts: Counter[str] = Counter()
    attention, linear = F.scaled_dot_product_attention, QLinear.forward
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (counts.update(["attention"]), attention(*a, **k))[1]
    )
    bench = Bench("llama", 0, tmp_path)
    norm = type(bench.block.input_layernorm)
    normalize = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: (counts.update(["norm"]), normalize(self, x))[1])
    counts.clear()
    monkeypatch.setattr(QLinear, "forward", lambda self, x: (counts.update(["linear"]), linear(self, x))[1])
    outcome, _ = quantized(bench)
    assert len(outcome.layers) == 7
    # Beside the batches: the original's output for the first one, and that of plain rounding, for the report.
    assert counts == {"attention": BATCHES + 2, "linear": 7 * BATCHES + 7, "norm": 2 * (BATCHES + 2)}


def test_without_a_next_block_nothing_is_sent_through(tmp_path: Path) -> None:
    bench = Bench("llama", 0, tmp_path, onward=False)
    before = list(bench.inputs)
    outcome, after = quantized(bench)
    assert not outcome.advanced and all(map(torch.equal, before, after))
    onward, _ = quantized(Bench("llama", 0, tmp_path))
    assert same_codes(outcome.layers, onward.layers)
    assert outcome.error_after == onward.error_after and outcome.error_before == onward.error_before


@pytest.mark.parametrize("memory", [PLENTY, 30_000])
def test_what_is_kept_stays_under_the_budget_and_goes(tmp_path: Path, memory: int) -> None:
    bench = Bench("llama", 0, tmp_path)
    bench.work.install_dense()
    layout, sites = Layout(), bench.work.anatomy.sites
    with torch.no_grad(), layout.watching(bench.block, sites):
        bench.forward(bench.block, 0)
    assert {name: tail.module for name, tail in layout.tails.items()} == {
        "self_attn.o_proj": "self_attn",
        "mlp.down_proj": "mlp",
    }
    order = stages(bench.work.anatomy.taps)
    passes = Passes(bench.block, sites, bench.work.anatomy.edges, order, layout, bench.forward, BATCHES, memory)
    kept = []
    for index in range(len(order)):
        passes.observe(index, frozenset({"gram"}))
        assert passes._bytes == sum(k.nbytes for here in passes._kept for k in here.values()) <= memory
        kept.append({path for here in passes._kept for path in here})
    if memory == PLENTY:
        norms = {"input_layernorm"}, {"self_attn", "post_attention_layernorm"}
        assert kept == [norms[0], {"self_attn"}, norms[1], {"self_attn", "mlp"}]
    assert len(list(passes.outputs())) == BATCHES
    assert passes._bytes == 0 and not any(passes._kept)


class InPlace(nn.Module):
    """A block that writes into what its modules return, and adds to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("a", "b", "c"):
            inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
            self.add_module(name, inner if name == "a" else nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule("a")(x)
        y += x
        z = self.get_submodule("b")(y)
        z *= 0.5
        return self.get_submodule("c")(z) + y


@torch.no_grad()
def test_what_a_model_wrote_into_is_computed_again() -> None:
    sites = [Site(name, (32, 32), bias=True) for name in ("a.0", "b", "c")]
    taps = [Tap((site,)) for site in sites]
    x = torch.randn(BATCHES, 2, 8, 32)
    block, layout = InPlace(), Layout()
    with layout.watching(block, sites):
        block(x[0])
    expected: dict[str, Tensor] = {}
    for site in sites:
        block.get_submodule(site.name).register_forward_pre_hook(
            lambda _m, args, name=site.name: expected.update({name: args[0].flatten(0, -2).clone()})
        )
    outputs = [block(part) for part in x]
    passes = Passes(block, sites, (), stages(taps), layout, lambda b, i: b(x[i]), BATCHES, PLENTY)
    for index, site in enumerate(sites):
        found = passes.observe(index, frozenset({"minmax"}))[site.name].minmax
        assert found is not None
        seen = []
        for part in x:
            block(part)
            seen.append(expected[site.name])
        assert torch.equal(found.high, torch.cat(seen).amax(0))
    assert all(map(torch.equal, passes.outputs(), outputs))


class Mixed(nn.Module):
    """Two experts on halves of the tokens, and behind them a linear that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = [nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(2)]
        self.experts, self.last = nn.ModuleList(pairs), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        halves = [expert(half) for expert, half in zip(self.experts, x.split(4, 1), strict=True)]
        return self.last(torch.cat(halves, 1))


@torch.no_grad()
def test_what_follows_experts_that_wait_is_not_kept() -> None:
    sites = [Site(f"experts.{e}.{i}", (32, 32), bias=True, expert=e) for e in range(2) for i in (0, 2)]
    x = torch.randn(BATCHES, 2, 8, 32)
    block, layout, every = Mixed(), Layout(), [*sites, Site("last", (32, 32), bias=True)]
    with layout.watching(block, every):
        block(x[0])
    outputs = [block(part) for part in x]
    order = stages([Tap((site,)) for site in sites])
    passes = Passes(block, every, (), order, layout, lambda b, i: b(x[i]), BATCHES, PLENTY)
    for index in range(2):
        seen = passes.observe(index, frozenset({"gram"}))
        for e in range(2):
            inputs = x[:, :, 4 * e : 4 * e + 4].flatten(0, 2)
            for layer in block.experts[e][: 2 * index]:
                inputs = layer(inputs)
            assert torch.allclose(seen[f"experts.{e}.{2 * index}"].hessian(), inputs.T @ inputs, rtol=0, atol=1e-4)
    assert all(map(torch.equal, passes.outputs(), outputs))


def test_corrections_are_made_at_once_and_ignored_linears_compute_as_they_are_stored(tmp_path: Path) -> None:
    kept = Override("self_attn.*", None, per_token(Int(4)))
    recipe = Recipe(Scheme(per_group(Int(3), 16), overrides=(kept,)), RECIPE.round, MinMaxClip(), correct=(LoRC(4),))
    bench = Bench("llama", 0, tmp_path, recipe)
    before = list(bench.inputs)
    outcome, advanced = quantized(bench)
    fresh = build("llama").get_submodule("model.layers.0")
    install(fresh, outcome.layers, outcome.rest, torch.float32)
    assert outcome.layers["mlp.down_proj"].weight.low_rank is not None
    assert outcome.layers["self_attn.o_proj"].activation is not None
    with torch.no_grad():
        assert all(torch.equal(bench.call(fresh, i, before[i]), advanced[i]) for i in range(BATCHES))


def quantize(model: Path, text: Path, output: Path, **options: Any) -> Path:
    settings = ["gptq.true_sequential=true"]
    options = {"calibration": str(text), "samples": 8, "length": 32, "settings": settings, "dtype": "float32"} | options
    return lowbit.quantize(model, "awq+gptq-w4a16-g32", output, **options).path


def contents(directory: Path) -> dict[str, bytes]:
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "journal.jsonl"]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def test_the_next_blocks_inputs_are_those_of_the_stored_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart makes them from the shard, with gains and biases in the checkpoint's 16 bits: the same bytes."""
    model = save_model("llama-tied", tmp_path / "model", dtype=torch.bfloat16)
    text = save_text(tmp_path / "text.txt")
    whole = quantize(model, text, tmp_path / "whole")
    write = run.RunDirectory.write_block

    def interrupted(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.RunDirectory, "write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, text, tmp_path / "parts")
    monkeypatch.setattr(run.RunDirectory, "write_block", write)
    assert contents(quantize(model, text, tmp_path / "parts", memory=1)) == contents(whole)
    ids = tokens()
    with torch.no_grad():
        once = lowbit.load(whole, dtype=torch.float32)(input_ids=ids).logits
        again = lowbit.load(tmp_path / "parts", dtype=torch.float32)(input_ids=ids).logits
    assert once.isfinite().all() and torch.equal(once, again)
