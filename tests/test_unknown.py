"""Families that nobody told lowbit about: discovered and proved, or refused in one sentence.

`Strange` is a decoder of its own with none of the usual names: V before K before Q in one projection, grouped queries,
gate and up interleaved, gains stored as w - 1, a multiplier on the residual. Its siblings each do one forbidden thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lowbit.graph import Norm, Rows, build_skeleton, discover, prove

HEADS, GROUPS, WIDTH = 6, 2, 16


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"

    def __init__(self, hidden_size: int = 96, num_hidden_layers: int = 2, trick: str = "", **rest: Any) -> None:
        self.hidden_size, self.num_hidden_layers, self.trick = hidden_size, num_hidden_layers, trick
        self.num_attention_heads, self.num_key_value_heads, self.vocab_size = HEADS, GROUPS, 128
        super().__init__(**rest)


class Gain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x / x.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()


class Mixer(nn.Module):
    def __init__(self, config: StrangeConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.hidden_size // HEADS
        self.vkq = nn.Linear(config.hidden_size, self.width * (HEADS + 2 * GROUPS))
        self.collect = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        v, k, q = self.vkq(x).split([GROUPS * self.width, GROUPS * self.width, HEADS * self.width], -1)
        v, k, q = (y.view(batch, length, -1, self.width).transpose(1, 2) for y in (v, k, q))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.trick != "looks ahead", enable_gqa=True)
        return self.collect(y.transpose(1, 2).reshape(batch, length, -1))


class Stage(nn.Module):
    def __init__(self, config: StrangeConfig) -> None:
        super().__init__()
        self.trick = config.trick
        self.first, self.second = Gain(config.hidden_size), Gain(config.hidden_size)
        self.mixer = Mixer(config)
        self.widen = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.narrow = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if self.trick == "bare weights":
            self.bare = nn.Parameter(torch.randn(9 * config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
        if self.trick == "memory":
            x = x + memory.get("last", 0.0)
            memory["last"] = x.mean(1, keepdim=True) * 0
        x = x + 0.3 * self.mixer(self.first(x))
        if self.trick == "bare weights":
            x = x + F.linear(F.linear(x, self.bare).tanh(), self.bare.T)
        y = self.second(x)
        up, gate = self.widen(y).unflatten(-1, (-1, 2)).unbind(-1)
        x = x + 0.3 * self.narrow(up * F.silu(gate))
        return x + y if self.trick == "leak" else x


class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    base_model_prefix = "trunk"

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        stages = [Stage(config) for _ in range(config.num_hidden_layers)]
        if config.trick == "shared weights":
            stages[1].mixer = stages[0].mixer
        self.stages = nn.ModuleList(stages)
        self.last = Gain(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> CausalLMOutput:
        x, memory = self.words(input_ids), {}  # type: ignore[var-annotated]
        for stage in self.stages:
            x = stage(x, memory=memory)
        return CausalLMOutput(logits=self.out(self.last(x)))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    AutoConfig.register("strange", StrangeConfig, exist_ok=True)
    AutoModelForCausalLM.register(StrangeConfig, StrangeModel, exist_ok=True)
    yield


def test_an_unknown_family_is_discovered_and_proved() -> None:
    config = StrangeConfig()
    anatomy = discover(config)
    assert (anatomy.layers, anatomy.embedding, anatomy.head, anatomy.tied) == ("stages", "words", "out", False)
    assert anatomy.final_norm == Norm("last", 1.0)
    assert (anatomy.heads.query, anatomy.heads.key_value, anatomy.heads.width) == (HEADS, GROUPS, WIDTH)
    block = anatomy.blocks[0]
    edges = {edge.name: edge for edge in block.edges}
    assert edges.keys() == {
        "first -> mixer.vkq",
        "second -> widen",
        "mixer.vkq -> mixer.collect",
        "widen -> narrow",
    }
    value, up = edges["mixer.vkq -> mixer.collect"].source, edges["widen -> narrow"].source
    assert isinstance(value, Rows) and value.index == tuple(range(GROUPS * WIDTH))
    assert isinstance(up, Rows) and up.index == tuple(range(0, 384, 2))
    assert block.writes == ("mixer.collect", "narrow") and not block.refused
    torch.manual_seed(0)
    changes = prove(StrangeModel(config).double().eval(), anatomy, tokens())
    assert changes.keys() == {"norm", "value", "up"} and max(changes.values()) < 1e-9


def test_a_leaking_norm_is_refused_and_the_rest_is_used() -> None:
    block = discover(StrangeConfig(trick="leak")).blocks[0]
    assert ("second", "its output also goes to the residual stream") in block.refused
    assert [edge.name for edge in block.edges] == [
        "first -> mixer.vkq",
        "mixer.vkq -> mixer.collect",
        "widen -> narrow",
    ]


@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        ("bare weights", "bare could not be proved to be the weight of a linear"),
        ("looks ahead", "later tokens change earlier logits"),
        ("memory", "shares state across blocks"),
        ("shared weights", "uses the same weights in several blocks"),
    ],
)
def test_what_could_not_be_proved_is_named_in_one_sentence(trick: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        discover(StrangeConfig(trick=trick))
    message = str(error.value)
    assert message.startswith("strange") and message.endswith(".") and "\n" not in message


def test_a_missing_list_of_blocks_is_named() -> None:
    config = StrangeConfig()
    skeleton = build_skeleton(config)
    config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="No list of 5 decoder blocks"):
        discover(config, skeleton)
