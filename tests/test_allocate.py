"""Bits where they matter: the price of a format against autograd over the whole model, the choice against enumeration,
and runs that keep their budget, resume, and refuse.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_bad_input import said
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import graph
from lowbit.graph.anatomy import Anatomy
from lowbit.graph.skeleton import unfuse_experts
from lowbit.methods.views import Stats
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import Int, Spec, per_group
from lowbit.numerics.stats import Gram
from lowbit.prepare import anatomy_of, prepare
from lowbit.recipes import parse, resolve
from lowbit.recipes.grammar import with_width
from lowbit.request import Request
from lowbit.stream import run
from lowbit.stream.allocate import solve
from lowbit.stream.checkpoint import Checkpoint
from lowbit.stream.divergence import Divergence
from lowbit.stream.sensitivity import Sensitivity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _known_anatomies() -> Iterator[None]:
    """The few models here are discovered once each: that takes longer than all that is tested."""
    known: dict[str, Anatomy] = {}
    discover = graph.discover

    def remembered(config: Any, skeleton: Any = None) -> Anatomy:
        key = config.to_json_string()
        if key not in known:
            known[key] = discover(config, skeleton)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "discover", remembered)
        yield


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("gptq-g128", "gptq-w3-g128"),
        ("awq+gptq-g64-asym", "awq+gptq-w3-g64-asym"),
        ("smoothquant+gptq-a8-g128", "smoothquant+gptq-w3a8-g128"),
        ("rtn-a8kv4-kivi", "rtn-w3a8kv4-kivi"),
        ("gptq", "gptq-w3"),
        ("gptq-qk", "gptq-q3k"),
    ],
)
def test_a_name_without_a_width(name: str, full: str) -> None:
    assert with_width(name, 3) == full
    found = resolve(name, width=3).recipe
    assert found.name == name and found.scheme == parse(full).scheme and found.round == parse(full).round
    with pytest.raises(ValueError, match=r"leaves the bits of weights open|does not say what to quantize"):
        parse(name)


@pytest.mark.parametrize("name", ["gptq-w4a16-g128", "w4a16", "rtn-nf4", "rtn-fp8", "gptq-q4k", "papers/gptq-w4g128"])
def test_a_name_with_a_width_has_nothing_to_choose(name: str) -> None:
    with pytest.raises(ValueError, match="no bits are left to choose"):
        resolve(name, width=3)


# --- the price --------------------------------------------------------------------------------------------------------


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def measured(
    path: Path, windows: list[Tensor], recipe: str, specs: tuple[Spec, ...], kind: type[Sensitivity] = Sensitivity
) -> tuple[dict[str, tuple[float, ...]], Anatomy]:
    checkpoint = Checkpoint.open(path)
    skeleton, anatomy = anatomy_of(checkpoint)
    names = [anatomy.full_name(i, site.name) for i, block in enumerate(anatomy.blocks) for site in block.sites]
    measurement = kind(
        skeleton, anatomy, checkpoint, parse(recipe), windows, torch.float32, CPU, 1 << 30, path / "scratch"
    )
    return measurement.losses({name: specs for name in names}), anatomy


def by_autograd(
    family: str, anatomy: Anatomy, windows: list[Tensor], recipe: str, specs: tuple[Spec, ...]
) -> dict[str, list[float]]:
    """The formulas with the whole model in memory, row by row: ½ Σ_o mean(g_o²) mean((E x)_o²) over the tokens that a
    linear saw, ½ Σ_d mean(g_d²) mean(δ_d²) at its block's output, the larger of both.
    """
    model, rule, ids = build(family), parse(recipe), torch.stack(windows)
    unfuse_experts(model)
    blocks = [anatomy.full_name(index, "") for index in range(len(anatomy.blocks))]
    linears = {f"{blocks[i]}.{site.name}": (i, site) for i, block in enumerate(anatomy.blocks) for site in block.sites}
    calls: dict[str, list[Any]] = {name: [] for name in (*linears, *blocks)}
    gradients: dict[str, list[Tensor]] = {name: [] for name in (*linears, *blocks)}

    def hook(name: str) -> Any:
        def on_call(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls[name].append((args, kwargs))
            first(output).register_hook(lambda gradient: gradients[name].append(gradient.flatten(0, -2).double()))

        return on_call

    hooks = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in calls]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *_: embedded))
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    for each in hooks:
        each.remove()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    found: dict[str, list[float]] = {}
    for name, (index, site) in linears.items():
        x = torch.cat([args[0].detach().flatten(0, -2) for args, _ in calls[name]])
        g, behind = torch.cat(gradients[name]), torch.cat(gradients[blocks[index]])
        block, ((args, kwargs),) = model.get_submodule(blocks[index]), calls[blocks[index]]
        stats = Stats(gram=Gram.of(x.T @ x, len(x)), tokens=len(x))
        weight, found[name] = site.weight(block).detach(), []
        for spec in specs:
            scores = site.name in anatomy.blocks[index].scores
            original = weight.clone()
            with torch.no_grad():
                rounded = rule.round.round(original, spec, rule.clip, stats, scores=scores).dequantize()
                before = first(block(*args, **kwargs))
                weight.copy_(rounded)
                moved = (first(block(*args, **kwargs)) - before).flatten(0, 1).double()
                weight.copy_(original)
            change = x.double() @ (rounded - original).double().T
            rows = [float(change[:, o].square().mean() * g[:, o].square().sum()) for o in range(len(original))]
            channels = [float(moved[:, d].square().mean() * behind[:, d].square().sum()) for d in range(moved.shape[1])]
            found[name].append(0.5 * max(sum(rows), sum(channels)) / ids.numel())
    return found


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama-tied", "gptq-w4-g32"), ("opt", "rtn-w4-g32"), ("gpt2", "rtn-w4-g32"), ("gemma2", "rtn-w4-g32")],
)
def test_prices_are_those_of_autograd(family: str, recipe: str, tmp_path: Path) -> None:
    windows = [torch.randint(3, 128, (16,)) for _ in range(4)]
    specs = (per_group(Int(3), 32), per_group(Int(6), 32))
    found, anatomy = measured(save_model(family, tmp_path / "model"), windows, recipe, specs)
    wanted = by_autograd(family, anatomy, windows, recipe, specs)
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert found[name] == pytest.approx(each, rel=2e-3), name


def test_experts_are_priced_by_the_tokens_that_they_see(tmp_path: Path) -> None:
    windows, specs = [torch.randint(3, 128, (16,)) for _ in range(4)], (per_group(Int(3), 32),)
    found, anatomy = measured(save_model("qwen3_moe", tmp_path / "model"), windows, "rtn-w4-g32", specs)
    wanted = by_autograd("qwen3_moe", anatomy, windows, "rtn-w4-g32", specs)
    assert any(".experts." in name for name in wanted)
    for name, each in wanted.items():
        assert found[name] == pytest.approx(each, rel=2e-3), name


def test_divergence_is_that_of_the_whole_model(tmp_path: Path) -> None:
    windows, spec = [torch.randint(3, 128, (16,)) for _ in range(4)], per_group(Int(3), 32)
    found, _ = measured(save_model("gpt2", tmp_path / "model"), windows, "rtn-w4-g32", (spec,), Divergence)
    model, ids = build("gpt2"), torch.stack(windows)
    with torch.no_grad():
        original = model(input_ids=ids).logits.log_softmax(-1)
        for name, (cost,) in found.items():
            weight = model.get_submodule(name).weight
            kept = weight.clone()
            weight.copy_(fit_range(kept.T.contiguous(), spec).quantize(kept.T.contiguous()).T)
            changed = model(input_ids=ids).logits.log_softmax(-1)
            weight.copy_(kept)
            wanted = torch.nn.functional.kl_div(changed, original, reduction="sum", log_target=True) / ids.numel()
            assert cost == pytest.approx(float(wanted), rel=1e-3), name


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    scale = 10.0 ** -draw.randrange(9)
    options = [
        [(size * (16 * bits + 2), scale * weight * 4.0**-bits * draw.uniform(0.8, 1.2)) for bits in (2, 3, 4, 6, 8)]
        for size, weight in ((draw.choice((64, 128, 448)), draw.lognormvariate(0, 2)) for _ in range(6))
    ]
    cheapest, dearest = (sum(end(price for price, _ in group) for group in options) for end in (min, max))
    budget = draw.randint(cheapest, dearest)

    def total(places: tuple[int, ...]) -> tuple[int, float]:
        taken = [group[place] for group, place in zip(options, places, strict=True)]
        return sum(price for price, _ in taken), sum(harm for _, harm in taken)

    every = (total(places) for places in product(range(5), repeat=6))
    best = min(harm for price, harm in every if price <= budget)
    price, harm = total(tuple(solve(options, budget)))
    assert price <= budget and harm == pytest.approx(best, rel=1e-9)


def test_a_budget_that_only_the_cheapest_keep() -> None:
    options = [[(3, 1.0), (5, 0.1)], [(7, 2.0), (9, 0.0)]]
    assert solve(options, 10) == [0, 0]
    assert solve(options, 12) == [0, 1]
    assert solve(options, 14) == [1, 1]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, text)"""
    root = tmp_path_factory.mktemp("allocate")
    return save_model("llama", root / "model"), save_text(root / "text.txt")


def quantize(material: tuple[Path, Path], output: Path, recipe: str = "rtn-g32", **options: Any) -> Any:
    model, text = material
    return lowbit.quantize(model, recipe, output, **{"calibration": str(text), "samples": 8, "length": 32} | options)


def checksums(directory: Path) -> dict[str, str]:
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "journal.jsonl"]
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def widths_of(material: tuple[Path, Path], recipe: str = "rtn-g32", **options: Any) -> dict[str, Spec | None]:
    """The weight format of every linear in the plan."""
    model, text = material
    options = {"calibration": str(text), "samples": 8, "length": 32} | options
    plan = prepare(Request(str(model), recipe, **options)).plan
    return {
        plan.anatomy.full_name(index, name): weights
        for index, formats in enumerate(plan.formats)
        for name, (weights, _) in formats.items()
    }


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("signround-g32-asym", ["signround.iterations=2"]), ("quarot+gptq+lorc4-g32", []), ("awq+rtn-a8-g32", [])],
)
def test_every_way_of_rounding_keeps_the_budget(
    material: tuple[Path, Path], tmp_path: Path, recipe: str, settings: list[str]
) -> None:
    least = 2.5 + (1.5 if "asym" in recipe else 0) + (3 if "lorc" in recipe else 0)
    done = quantize(material, tmp_path / "out", recipe, bits=least + 1, settings=settings)
    assert least + 0.7 < done.bits_per_weight <= least + 1
    assert len(set(done.allocation.widths.values())) > 1


def test_a_measured_divergence_chooses_too(material: tuple[Path, Path], tmp_path: Path) -> None:
    done = quantize(material, tmp_path / "out", bits=4, sensitivity="kl")
    assert 3.7 < done.bits_per_weight <= 4
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["allocation"]["sensitivity"] == "kl"


def test_a_size_is_that_of_the_files(material: tuple[Path, Path], tmp_path: Path) -> None:
    done = quantize(material, tmp_path / "out", size=120_000)
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert done.size_bytes == files
    assert 105_000 < files <= done.allocation.size_bytes <= 120_000


def test_what_is_chosen_is_a_plan_like_any_other(material: tuple[Path, Path], tmp_path: Path) -> None:
    quantize(material, tmp_path / "out", bits=4)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["recipe"]["name"] == "rtn-g32" and plan["allocation"]["bits"] == 4
    scheme = plan["recipe"]["scheme"]
    typed = [f"{each['pattern']}=w{each['weights']['format'][3:]}-g32" for each in scheme["overrides"]]
    base = f"rtn-w{scheme['weights']['format'][3:]}-g32"
    quantize(material, tmp_path / "typed", base, overrides=typed)
    both = [checksums(tmp_path / name) for name in ("out", "typed")]
    shards = [{name: digest for name, digest in found.items() if name.endswith("safetensors")} for found in both]
    assert shards[0] == shards[1]


def test_more_budget_costs_less(material: tuple[Path, Path]) -> None:
    losses = []
    for bits in (3, 4):
        request = Request(str(material[0]), "rtn-g32", calibration=str(material[1]), samples=8, length=32, bits=bits)
        allocation = prepare(request).allocation
        assert allocation is not None
        losses.append(allocation.loss)
    assert losses[0] > losses[1] > 0


def test_a_killed_run_goes_on_with_the_widths_it_began_with(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(material, tmp_path / "whole", bits=3.5)
    write = run.RunDirectory.write_block

    def interrupted(self: Any, block: int, *rest: Any) -> None:
        write(self, block, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.RunDirectory, "write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(material, tmp_path / "out", bits=3.5)
    monkeypatch.setattr(run.RunDirectory, "write_block", write)
    monkeypatch.setattr(Sensitivity, "losses", None)  # nothing is measured again
    again = quantize(material, tmp_path / "out", bits=3.5)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    assert again.allocation == whole.allocation
    with pytest.raises(ValueError, match=r"another plan, allocation\.bits was 3\.5 and is now 4"):
        quantize(material, tmp_path / "out", bits=4)
    with pytest.raises(ValueError, match="another plan, allocation"):
        quantize(material, tmp_path / "out", "rtn-w4-g32")
    with pytest.raises(ValueError, match="another plan"):
        quantize(material, tmp_path / "out", "rtn-g32-asym", bits=3.5)


def test_a_target_joins_what_its_clients_join(material: tuple[Path, Path]) -> None:
    chosen = widths_of(material, bits=3.5, target="compressed-tensors")
    for block in range(2):
        prefix = f"model.layers.{block}."
        assert len({chosen[f"{prefix}self_attn.{each}_proj"] for each in "qkv"}) == 1
        assert chosen[f"{prefix}mlp.gate_proj"] == chosen[f"{prefix}mlp.up_proj"]


def test_a_target_limits_the_widths(material: tuple[Path, Path]) -> None:
    chosen = widths_of(material, bits=5, target="gptq")
    assert {spec.bits for spec in chosen.values() if spec is not None} <= {2, 3, 4, 8}
    chosen = widths_of(material, bits=6, target="gguf")  # whose int4 takes 4.5 bits, as int2 does
    assert {spec.bits for spec in chosen.values() if spec is not None} <= {4, 5, 8}


def test_overrides_stay_and_experts_share(tmp_path: Path) -> None:
    moe = save_model("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text.txt")
    kept = ["*.layers.0.self_attn.q_proj=w6-g32"]
    chosen = widths_of(moe, "rtn-g32", bits=4, overrides=kept, ignore=["*.layers.1.self_attn.*"])
    assert chosen["model.layers.0.self_attn.q_proj"] == per_group(Int(6), 32)
    assert chosen["model.layers.1.self_attn.v_proj"] is None
    experts = [name for name in chosen if ".experts.0." in name]
    assert experts
    for name in experts:
        assert len({chosen[name.replace(".experts.0.", f".experts.{each}.")] for each in range(4)}) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--bits", "2"), "2 bits per weight is too little for gptq-g32, which takes 2.500 to 8.500"),
        (("--bits", "9"), "9 bits per weight is more than gptq-g32 can use, which takes 2.500 to 8.500"),
        (("--size", "1kB"), "0.00 MB is too little for gptq-g32, which takes"),
        (("--size", "1GB"), "1,000.00 MB is more than gptq-g32 can use, which takes"),
        (("--bits", "3", "--size", "1MB"), "both budgets"),
        (("--bits", "-1"), "no budget"),
        (("--bits", "4.5", "--target", "awq"), "awq carries gptq-g32 in 4 bits only, so no mixture is possible"),
        (("--bits", "4", "--override", "*=w4-g32"), "nothing is left to choose"),
        ((), "leaves the bits of weights open: add --bits or --size"),
    ],
)
def test_refusals(
    material: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    model, text = material
    command = ("quantize", model, "--recipe", "gptq-g32", "--output", tmp_path / "out", "--calibration", text)
    assert sentence in said(capsys, *command, "--samples", 4, "--length", 32, *arguments, status=2)
    assert not (tmp_path / "out").exists()


def test_a_named_width_with_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("quantize", "demo", "--recipe", "gptq-w4a16", "--output", tmp_path / "out", "--bits", "3")
    assert "no bits are left to choose" in said(capsys, *command, status=2)
