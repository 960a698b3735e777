"""What the tiny models of `families.py` are made of, written by hand from their papers and code."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Expected:
    """One kind of block. An edge is "kind: source > readers + others"; "!" after the kind marks a lawful shift."""

    taps: str
    edges: str
    writes: str
    reads: str = ""
    refused: str = ""
    scores: str = "self_attn.q_proj self_attn.k_proj"
    tied: bool = False
    heads: tuple[int, int] = (4, 2)


QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATED = "mlp.gate_proj mlp.up_proj"
TAPS = f"{QKV} | self_attn.o_proj | {GATED} | mlp.down_proj"
INNER_EDGES = "value: self_attn.v_proj > self_attn.o_proj; up: mlp.up_proj > mlp.down_proj"
LLAMA = Expected(
    TAPS,
    f"norm: input_layernorm > {QKV}; norm: post_attention_layernorm > {GATED}; {INNER_EDGES}",
    "self_attn.o_proj mlp.down_proj",
    "input_layernorm post_attention_layernorm",
)
QK_NORMS = "self_attn.q_norm self_attn.k_norm"
GEMMA = replace(
    LLAMA,
    edges=f"norm: input_layernorm > {QKV}; norm: pre_feedforward_layernorm > {GATED}; {INNER_EDGES}",
    writes="post_attention_layernorm post_feedforward_layernorm",
    reads="input_layernorm pre_feedforward_layernorm",
    refused="post_attention_layernorm post_feedforward_layernorm",
    tied=True,
)
PARALLEL = replace(
    LLAMA,
    taps=f"{QKV} {GATED} | self_attn.o_proj | mlp.down_proj",
    edges=f"norm: input_layernorm > {QKV} {GATED}; {INNER_EDGES}",
    reads="input_layernorm",
)


def four_linears(norms: str, attention: str, qkv: str, out: str, up: str, down: str, **changes: object) -> Expected:
    """GPT-like blocks: a fused QKV and a plain activation. Both norms, V and its output have biases."""
    first, second = norms.split()
    expected = Expected(
        f"{attention}.{qkv} | {attention}.{out} | mlp.{up} | mlp.{down}",
        f"norm!: {first} > {attention}.{qkv}; norm!: {second} > mlp.{up}; "
        f"value!: {attention}.{qkv} > {attention}.{out}",
        f"{attention}.{out} mlp.{down}",
        norms,
        f"mlp.{down}",
        f"{attention}.{qkv}",
        heads=(4, 4),
    )
    return replace(expected, **changes)  # type: ignore[arg-type]


def mixture(experts: int, others: str = "mlp.gate", first: str = "", last: str = "") -> Expected:
    """A Llama block whose feed-forward is a mixture of experts, perhaps beside one that every token passes."""
    routed = [(f"mlp.experts.{e}.gate_up_proj", f"mlp.experts.{e}.down_proj") for e in range(experts)]
    before, after = (
        [(f"{name}.gate_proj {name}.up_proj", f"{name}.down_proj")] if name else [] for name in (first, last)
    )
    networks = [*before, *routed, *after]
    return replace(
        LLAMA,
        taps=" | ".join([QKV, "self_attn.o_proj", *(f"{up} | {down}" for up, down in networks)]),
        edges="; ".join(
            [
                f"norm: input_layernorm > {QKV}",
                f"norm: post_attention_layernorm > {' '.join(up for up, _ in networks)} + {others}",
                "value: self_attn.v_proj > self_attn.o_proj",
                *(f"up: {up.split()[-1]} > {down}" for up, down in networks),
            ]
        ),
        writes=" ".join(["self_attn.o_proj", *(down for _, down in networks)]),
    )


LATENT = "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa"
LATENT_TAPS = f"{LATENT} | self_attn.q_b_proj | self_attn.kv_b_proj | self_attn.o_proj"
LATENT_EDGES = (
    f"norm: input_layernorm > {LATENT}; norm: self_attn.q_a_layernorm > self_attn.q_b_proj; "
    "norm: self_attn.kv_a_layernorm > self_attn.kv_b_proj; value: self_attn.kv_b_proj > self_attn.o_proj"
)


def latent(block: Expected) -> Expected:
    """The same block with DeepSeek's multi-head latent attention."""
    return replace(
        block,
        taps=block.taps.replace(f"{QKV} | self_attn.o_proj", LATENT_TAPS),
        edges=block.edges.replace(f"norm: input_layernorm > {QKV}", LATENT_EDGES).replace(
            "; value: self_attn.v_proj > self_attn.o_proj", ""
        ),
        scores="self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj",
        heads=(4, 4),
    )


NEOX = four_linears(
    "input_layernorm post_attention_layernorm",
    "attention",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
)
FALCON = four_linears(
    "input_layernorm post_attention_layernorm",
    "self_attention",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
    tied=True,
)
OPT = Expected(
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj | self_attn.out_proj | fc1 | fc2",
    f"norm!: self_attn_layer_norm > {QKV}; norm!: final_layer_norm > fc1; "
    "value!: self_attn.v_proj > self_attn.out_proj; up: fc1 > fc2",
    "self_attn.out_proj fc2",
    "self_attn_layer_norm final_layer_norm",
    tied=True,
    heads=(4, 4),
)

# A sink takes part of every token's attention, so a shift of V does not pass through; experts compute (up + 1) · glu.
GPT_OSS = replace(
    mixture(4, "mlp.router"),
    edges="; ".join(edge for edge in mixture(4, "mlp.router").edges.split("; ") if not edge.startswith("up:")),
    refused=" ".join(f"mlp.experts.{e}.down_proj" for e in range(4)),
)

EXPECTED: dict[str, list[Expected]] = {
    "llama": [LLAMA],
    "llama-tied": [replace(LLAMA, tied=True, edges=LLAMA.edges.replace("value:", "value!:"))],
    "mistral": [LLAMA],
    "qwen2": [replace(LLAMA, tied=True)],
    "qwen3": [replace(LLAMA, refused=QK_NORMS)],
    "granite": [LLAMA],
    "gemma2": [GEMMA, GEMMA],
    "gemma3": [replace(GEMMA, refused=f"{GEMMA.refused} {QK_NORMS}")] * 2,
    "phi3": [
        Expected(
            "self_attn.qkv_proj | self_attn.o_proj | mlp.gate_up_proj | mlp.down_proj",
            "norm: input_layernorm > self_attn.qkv_proj; norm: post_attention_layernorm > mlp.gate_up_proj; "
            "value: self_attn.qkv_proj > self_attn.o_proj; up: mlp.gate_up_proj > mlp.down_proj",
            "self_attn.o_proj mlp.down_proj",
            "input_layernorm post_attention_layernorm",
            scores="self_attn.qkv_proj",
        )
    ],
    "opt": [OPT],
    "opt-350m": [
        replace(
            OPT,
            edges="value!: self_attn.v_proj > self_attn.out_proj; up: fc1 > fc2",
            writes="final_layer_norm",
            reads="self_attn_layer_norm",
            refused="self_attn_layer_norm final_layer_norm self_attn.q_proj fc1",
        )
    ],
    "gpt2": [four_linears("ln_1 ln_2", "attn", "c_attn", "c_proj", "c_fc", "c_proj", tied=True)],
    "gpt_neox": [NEOX],
    "bloom": [FALCON],
    "falcon-rw": [FALCON],
    "falcon-40b": [
        replace(
            FALCON,
            edges=FALCON.edges.replace("!", "")
            .replace("input_layernorm", "ln_attn")
            .replace("post_attention_layernorm", "ln_mlp"),
            reads="ln_attn ln_mlp",
            heads=(4, 2),
        )
    ],
    "falcon-7b": [
        replace(
            FALCON,
            taps="self_attention.query_key_value mlp.dense_h_to_4h | self_attention.dense | mlp.dense_4h_to_h",
            edges="norm: input_layernorm > self_attention.query_key_value mlp.dense_h_to_4h; "
            "value: self_attention.query_key_value > self_attention.dense",
            reads="input_layernorm",
            heads=(4, 1),
        )
    ],
    "cohere": [replace(PARALLEL, tied=True, refused=QK_NORMS)],
    "olmo2": [
        replace(
            LLAMA,
            edges=INNER_EDGES,
            reads="",
            writes="post_attention_layernorm post_feedforward_layernorm",
            refused=f"{QK_NORMS} post_attention_layernorm post_feedforward_layernorm self_attn.q_proj mlp.gate_proj",
        )
    ],
    "stablelm": [replace(LLAMA, edges=LLAMA.edges.replace("norm: input", "norm!: input"))],
    "stablelm-parallel": [replace(PARALLEL, refused="self_attn.q_layernorm.norms self_attn.k_layernorm.norms")],
    "mixtral": [mixture(4)],
    "qwen3_moe": [replace(mixture(4), refused=QK_NORMS)],
    "qwen2_moe": [mixture(4, "mlp.gate mlp.shared_expert_gate", first="mlp.shared_expert")],
    "gpt_oss": [GPT_OSS, GPT_OSS],
    "deepseek_v3": [latent(LLAMA), latent(mixture(8, last="mlp.shared_experts"))],
}
