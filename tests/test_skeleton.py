"""The skeleton against transformers itself: same buffers, same names, and experts that compute the same."""

from __future__ import annotations

import pytest
import torch
from families import TINY, build, tokens
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations import use_experts_implementation

from lowbit.graph import build_skeleton, transposed_parameters, unfuse_experts, unfused_parameters
from lowbit.modules.experts import Experts

MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_on_meta_and_buffers_are_the_models_own(name: str) -> None:
    config = TINY[name]()
    config.dtype = torch.bfloat16
    skeleton = build_skeleton(config)
    model = AutoModelForCausalLM.from_config(config)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    dtypes = {p.dtype for p in skeleton.parameters()}  # transformers 5.24 keeps some routers in fp32
    assert torch.bfloat16 in dtypes and dtypes == {p.dtype for p in model.parameters()}
    assert not skeleton.training
    own, true = dict(skeleton.named_buffers()), dict(model.named_buffers())
    assert own.keys() == true.keys()
    assert all(torch.equal(own[key], true[key]) for key in true)


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_transformers_but_for_the_experts(name: str) -> None:
    skeleton, model = build_skeleton(TINY[name]()), build(name)
    unfused, transposed = unfused_parameters(skeleton), transposed_parameters(skeleton)
    own = {key: parameter.shape for key, parameter in skeleton.named_parameters()}
    for key, parameter in model.named_parameters():
        if key not in unfused:
            assert own.pop(key) == parameter.shape
            continue
        for slice_name, part in zip(unfused[key], parameter, strict=True):
            assert own.pop(slice_name) == (part.T if key in transposed else part).shape
    assert not own


def test_names_of_unfused_experts() -> None:
    names = unfused_parameters(build_skeleton(TINY["mixtral"]()))
    assert names["model.layers.1.mlp.experts.down_proj"][3] == "model.layers.1.mlp.experts.3.down_proj.weight"
    assert names["model.layers.0.mlp.experts.gate_up_proj"][0] == "model.layers.0.mlp.experts.0.gate_up_proj.weight"
    assert len(names) == 4
    gpt_oss = build_skeleton(TINY["gpt_oss"]())
    assert transposed_parameters(gpt_oss) >= {"model.layers.0.mlp.experts.down_proj"}
    biases = unfused_parameters(gpt_oss)["model.layers.0.mlp.experts.down_proj_bias"]
    assert biases[2] == "model.layers.0.mlp.experts.2.down_proj.bias"


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_unfused_experts_compute_the_same(name: str, implementation: str) -> None:
    model = build(name)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        before = model(tokens()).logits
        unfuse_experts(model)
        after = model(tokens()).logits
    assert any(isinstance(module, Experts) for module in model.modules())
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6 * float(before.abs().max()))


def test_unfused_experts_are_views() -> None:
    model = build("gpt_oss")
    fused = model.model.layers[0].mlp.experts
    down, bias = fused.down_proj, fused.down_proj_bias
    unfuse_experts(model)
    expert = model.model.layers[0].mlp.experts[2].down_proj
    assert expert.weight.data_ptr() == down[2].data_ptr()
    with torch.no_grad():
        expert.weight.mul_(3.0)
        expert.bias.add_(1.0)
        assert torch.equal(down[2].T, expert.weight)
        assert torch.equal(bias[2], expert.bias)


def test_bfloat16_experts_sum_in_float32() -> None:
    """Many routes of one sign: a sum in bfloat16 stalls, a sum in float32 is right to the last bit of the output."""
    config = CONFIG_MAPPING["mixtral"](
        hidden_size=16, intermediate_size=16, num_local_experts=64, num_experts_per_tok=64
    )
    experts = AutoModelForCausalLM.from_config(_short(config), dtype=torch.bfloat16).model.layers[0].mlp
    unfuse_experts(experts)
    with torch.no_grad():
        for expert in range(64):
            for linear in (experts.experts[expert].gate_up_proj, experts.experts[expert].down_proj):
                linear.weight.fill_(0.25)
        x = torch.ones(3, 16, dtype=torch.bfloat16)
        routes = torch.arange(64).repeat(3, 1)
        one = experts.experts[0](x, experts.experts.rule._apply_gate).float()
        total = experts.experts(x, routes, torch.full((3, 64), 1.0, dtype=torch.bfloat16))
    torch.testing.assert_close(total, (64 * one).bfloat16(), rtol=0, atol=0)


def _short(config: object) -> object:
    config.num_hidden_layers, config.vocab_size, config.num_attention_heads = 1, 8, 2  # type: ignore[attr-defined]
    config.num_key_value_heads = 2  # type: ignore[attr-defined]
    return config


@use_experts_implementation(has_gate=False)
class UngatedExperts(nn.Module):
    """Experts with an up projection only, as in Nemotron-H."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 10))
        self.act_fn = nn.ReLU()

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("nd,efd->nef", hidden_states, self.up_proj).relu()
        each = torch.einsum("nef,edf->ned", inner, self.down_proj)
        return (each.gather(1, index[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(1)


def test_experts_without_a_gate() -> None:
    class Config:
        _experts_implementation = "eager"

    generator = torch.Generator().manual_seed(0)
    fused = UngatedExperts(Config())
    holder = nn.ModuleDict({"experts": fused})
    x, weights = torch.randn(7, 6, generator=generator), torch.rand(7, 2, generator=generator)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(7)])
    expected = fused(x, index, weights)
    unfuse_experts(holder)
    assert dict(holder.named_parameters()).keys() == {
        f"experts.{e}.{p}.weight" for e in range(3) for p in ("up_proj", "down_proj")
    }
    torch.testing.assert_close(holder["experts"](x, index, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("t5", "encoder-decoder"), ("vit", "not a causal decoder"), ("bart", "encoder-decoder")],
)
def test_other_kinds_of_models_are_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        build_skeleton(CONFIG_MAPPING[model_type]())
    assert model_type in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_that_transformers_cannot_build_is_one_sentence() -> None:
    config = TINY["llama"]()
    config.hidden_act = "no such activation"
    with pytest.raises(ValueError, match="transformers cannot build llama"):
        build_skeleton(config)


def test_a_large_model_costs_nothing() -> None:
    """Ten blocks of DeepSeek-V3, 100 GB in bfloat16: built from meta tensors, with its experts as linears."""
    config = CONFIG_MAPPING["deepseek_v3"](num_hidden_layers=10, dtype=torch.bfloat16)
    skeleton = build_skeleton(config)
    assert len(unfused_parameters(skeleton)) == 14
    assert sum(p.numel() for p in skeleton.parameters()) > 50e9
