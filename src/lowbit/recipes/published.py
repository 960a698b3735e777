"""Recipes of the papers that proposed the methods: data for `papers`."""

from __future__ import annotations

from .document import Calibration
from .study import (
    ASYMMETRIC_INPUTS,
    BOTH,
    C4,
    GPTQ_CODE,
    GPTQ_ROWS,
    LLAMA_2,
    LLAMA_3,
    MEAN,
    PILE,
    WIKI,
    ZERO_POINTS,
    Entry,
    Figure,
    Study,
    on,
    small,
)

_ATTENTION_8 = (
    "scheme.overrides=[{pattern: '*attn*', weights: {format: int8, rule: symmetric-full, block: [16, -1]}, "
    "activations: {format: int8}}]"
)
_OMNI = Calibration("wikitext2", 128, 2048, 2)
_ALIGNED = "figures from LLMC's alignment runs (arXiv 2405.06001)"


def _opt(*values: float | str) -> tuple[Figure, ...]:
    models = ("OPT-6.7b", "OPT-13b", "OPT-30b", "OPT-66b")
    return tuple(Figure(model, str(value), MEAN) for model, value in zip(models, values, strict=True))


def _fp(*values: float | str) -> tuple[Figure, ...]:
    models = ("OPT-6.7b", "OPT-13b", "OPT-30b", "LLaMA-7b", "LLaMA-13b", "LLaMA-30b")
    return tuple(Figure(model, str(value), MEAN) for model, value in zip(models, values, strict=True))


STUDIES = (
    Study(
        "GPTQ",
        f"arXiv 2210.17323; {_ALIGNED}",
        {
            "gptq-w4g128": Entry("minmax+gptq-w4a16-g128-asym", (*on(LLAMA_2, 5.62), *small(20.03, 14.86))),
            "gptq-w3g128": Entry("minmax+gptq-w3a16-g128-asym", on(LLAMA_2, 6.32)),
            "gptq-w2g64": Entry("minmax+gptq-w2a16-g64-asym", on(LLAMA_2, 14.97)),
        },
        C4,
        "the same; a block's inputs come from the quantized blocks before it, as there",
        GPTQ_CODE,
    ),
    Study(
        "AWQ",
        f"arXiv 2306.00978; {_ALIGNED}",
        {
            "awq-w4g128": Entry("awq-w4a16-g128-asym", (*on(LLAMA_2, "5.60"), *small(21.42, "14.90"))),
            "awq-w3g128": Entry("awq-w3a16-g128-asym", on(LLAMA_2, 6.24)),
            "awq-w2g64": Entry(
                "awq-w2a16-g64-asym",
                on(LLAMA_2, 13.26, data=BOTH),
                note="clipped at both ends by one part, as this figure's run; the release's symmetric clip collapses",
            ),
        },
        Calibration("pile-awq", 128, 512, 42),
        "ranges are searched over all tokens through Gram matrices, not over 512 of them; inputs come from quantized "
        "blocks",
    ),
    Study(
        "SmoothQuant",
        f"arXiv 2211.10438; {_ALIGNED}",
        {
            "smoothquant-w8a8": Entry(
                "smoothquant-w8a8",
                (*on(LLAMA_2, 5.589), *small(17.68, 13.72)),
                ("smoothquant.alpha=0.5",),
                note="the 7B figure's row label is lost in the source, its place inferred",
            ),
            "smoothquant-w8a8-llama": Entry(
                "smoothquant-w8a8",
                on(LLAMA_2, 5.515),
                ("smoothquant.alpha=0.85",),
                note="the authors' strength for LLaMA (0.8 Mistral, 0.6 to 0.7 Falcon); the authors' own figure",
            ),
        },
        Calibration("pile-smoothquant", 512, 512, 42),
        "the same: behind norms only",
    ),
    Study(
        "Outlier Suppression+",
        f"arXiv 2304.09145; {_ALIGNED}",
        {
            "osplus-w8a8": Entry("osplus-w8a8", (*on(LLAMA_2, 5.511), *small(17.67, "13.70"))),
            "osplus-w6a6": Entry("osplus-w6a6", small(19.67, 15.32)),
            "osplus-w4a4": Entry("osplus-w4a4", small(263.76, 261.88)),
        },
        PILE,
        "compares whole attention and feed-forward outputs over all text, not the product in front of the next linear "
        "on the first batch; the 7B figure's row label is lost in the source, its place inferred",
        ("osplus.floor=0.1",),
    ),
    Study(
        "OmniQuant",
        f"arXiv 2308.13137; {_ALIGNED}",
        {
            "omniquant-w4g128": Entry("omniquant-w4a16-g128-asym", on(LLAMA_2, 5.59), ("omniquant.let=false",)),
            "omniquant-w3g128": Entry("omniquant-w3a16-g128-asym", on(LLAMA_2, 6.09), ("omniquant.let=false",)),
            "omniquant-w2g64": Entry(
                "omniquant-w2a16-g64-asym",
                on(LLAMA_2, 9.53),
                ("omniquant.let=false", "omniquant.epochs=40", "omniquant.augmented=true"),
            ),
            "omniquant-w8a8": Entry("omniquant-w8a8-asym", on(LLAMA_2, 5.49), (ASYMMETRIC_INPUTS,)),
            "omniquant-w6a6": Entry("omniquant-w6a6-asym", on(LLAMA_2, "5.70"), (ASYMMETRIC_INPUTS,)),
            "omniquant-w4a4": Entry(
                "omniquant-w4a4-asym",
                on(LLAMA_2, 12.21),
                (ASYMMETRIC_INPUTS, "omniquant.let_rate=0.001", "omniquant.alpha=0.75"),
            ),
            "omniquant-w4a4kv4": Entry(
                "omniquant-w4a4kv4-asym",
                on(LLAMA_2, 14.74),
                (ASYMMETRIC_INPUTS, "omniquant.let_rate=0.001", "omniquant.alpha=0.75", ZERO_POINTS),
                note="figure from FlatQuant's comparison (arXiv 2410.09426)",
            ),
        },
        _OMNI,
        "steps take a micro-batch of 2048 tokens; queries keep 16 bits; LET is left out for weights alone† (OPT: "
        "omniquant.let=true)",
        ("omniquant.epochs=20",),
    ),
    Study(
        "AffineQuant",
        "arXiv 2403.12544",
        {
            "affinequant-w4a4": Entry(
                "affinequant-w4a4-asym",
                (*on(LLAMA_2, 12.69), *on(LLAMA_2, 15.76, data="C4")),
                (
                    ASYMMETRIC_INPUTS,
                    "affinequant.stability=0.1",
                    "affinequant.let_rate=0.001",
                    "affinequant.alpha=0.75",
                ),
            ),
        },
        _OMNI,
        "text as OmniQuant's; queries and keys get vectors, since matrices would not commute with rotary embeddings",
    ),
    Study(
        "QuaRot",
        "arXiv 2404.00456",
        {
            "quarot-w4a4kv4": Entry("quarot+mse-w4a4kv4", (*on(LLAMA_2, 8.56), *on(LLAMA_3, "10.60"))),
            "quarot-gptq-w4a4kv4": Entry(
                "quarot+mse+gptq-w4a4kv4", (*on(LLAMA_2, "6.10"), *on(LLAMA_3, 8.16)), GPTQ_ROWS, note="order of GPTQ†"
            ),
            "quarot-kv4": Entry("quarot-w16a16kv4", on(LLAMA_2, 5.51)),
            "quarot-kv3": Entry("quarot-w16a16kv3", on(LLAMA_2, 5.68)),
            "quarot-kv2": Entry("quarot-w16a16kv2", on(LLAMA_2, 9.23)),
        },
        WIKI,
        "ranges of inputs and cache are whole (the paper's ratios 0.9 and 0.95† are 1 in its code); GPTQ sees blocks "
        "whose inputs are quantized",
        (ZERO_POINTS,),
    ),
    Study(
        "SpinQuant",
        "arXiv 2405.16406; figures from FlatQuant's comparison (arXiv 2410.09426)†",
        {
            "spinquant-w4a4kv4": Entry("spinquant+mse-w4a4kv4", (*on(LLAMA_2, 6.14), *on(LLAMA_3, 7.96))),
            "spinquant-gptq-w4a4kv4": Entry(
                "spinquant+mse+gptq-w4a4kv4", (*on(LLAMA_2, 5.96), *on(LLAMA_3, 7.39)), GPTQ_ROWS, note="order of GPTQ†"
            ),
        },
        Calibration("wikitext2", 800, 2048, 0),
        "one text for both: the 100 steps of 8 windows, then GPTQ, which there takes 128; the output projection's "
        "inputs are ranged per token, not per head",
        ("spinquant.steps=100", "spinquant.rate=1.5", "spinquant.batch=8", ASYMMETRIC_INPUTS, ZERO_POINTS),
    ),
    Study(
        "FlatQuant",
        "arXiv 2410.09426",
        {
            "flatquant-w4a4kv4": Entry(
                "flatquant-w4a4kv4",
                (*on(LLAMA_2, 5.79), *on(LLAMA_2, 7.79, data="C4"), *on(LLAMA_3, 6.98), *on(LLAMA_3, 11.13, data="C4")),
            ),
            "flatquant-gptq-w4a4kv4": Entry(
                "flatquant+gptq-w4a4kv4",
                (*on(LLAMA_3, "6.90"), *on(LLAMA_3, 11.21, data="C4")),
                GPTQ_ROWS,
                note="order of GPTQ†",
            ),
            "flatquant-w4a16": Entry("flatquant-w4a16", on(LLAMA_3, 6.54)),
            "flatquant-w3a16": Entry("flatquant-w3a16", on(LLAMA_3, 7.78)),
            "flatquant-k4v4": Entry("flatquant-w16a16k4v4", on(LLAMA_3, "6.20")),
            "flatquant-k3v3": Entry("flatquant-w16a16k3v3", on(LLAMA_3, 6.41)),
            "flatquant-k2v2": Entry("flatquant-w16a16k2v2", on(LLAMA_3, 8.93)),
            "flatquant-none": Entry(
                "flatquant-w4a4kv4",
                on(LLAMA_3, 1266.6),
                ("flatquant.lt=false", "flatquant.ps=false", "flatquant.lct=false"),
                note="ablation: rounding to nearest",
            ),
            "flatquant-p": Entry(
                "flatquant-w4a4kv4",
                on(LLAMA_3, "8.50"),
                ("flatquant.ps=false", "flatquant.lct=false"),
                note="ablation: transforms",
            ),
            "flatquant-p-c": Entry(
                "flatquant-w4a4kv4", on(LLAMA_3, 7.95), ("flatquant.lct=false",), note="ablation: transforms and scales"
            ),
            "flatquant-p-lct": Entry(
                "flatquant-w4a4kv4",
                on(LLAMA_3, 7.11),
                ("flatquant.ps=false",),
                note="ablation: transforms and clipping",
            ),
            "flatquant-lct-before": Entry(
                "flatquant-w4a4kv4",
                on(LLAMA_3, 7.37),
                ("flatquant.before=true",),
                note="ablation: clipping in front of P",
            ),
        },
        WIKI,
        "trained in the run's own precision: --dtype bfloat16 on a GPU is the paper's",
        ("flatquant.epochs=15", "flatquant.batch=4"),
    ),
    Study(
        "ZeroQuant",
        "arXiv 2206.01861",
        {
            "zeroquant-w8a8": Entry(
                "rtn-w8a8-g20-row",
                on("GPT-2-large", 19.47),
                note="64 groups of 1280 rows; wider matrices have more groups of as many rows",
            ),
            "zeroquant-w48a8": Entry(
                "rtn-w4a8-g16-row",
                on("GPT-3-350M", 92.1),
                settings=(_ATTENTION_8,),
                note="attention in 8 bits, feed-forward in 4; 64 groups of 1024 rows",
            ),
            "zeroquant-lkd-w48a8": Entry(
                "lkd-w4a8-g16-row",
                on("GPT-3-350M", 31.1),
                settings=(_ATTENTION_8,),
                note="the same with distillation",
            ),
        },
        Calibration("wikitext2", 3200, 128, 0),
        "WikiText-2 stands for training data that is not public (the paper: 30.4 on Wikipedia), 100 steps of 32 fresh "
        "sequences†; embeddings keep 16 bits",
        ("scheme.weights.rule=symmetric-full",),
    ),
    Study(
        "ZeroQuant-V2, the study",
        "arXiv 2303.08302",
        {
            "zq-gptq-w4a16": Entry("minmax+gptq-w4a16-asym", _opt(12.28, 11.42, 10.78, 10.52), GPTQ_ROWS),
            "zq-gptq-w4a8": Entry("minmax+gptq-w4a8-asym", _opt(13.88, 17.28, 20.71, 648.7), GPTQ_ROWS),
            "zqlocal-w4a16": Entry("zqlocal-w4a16-asym", _opt(12.46, 11.64, 11.05, 10.79)),
            "zqlocal-w4a8": Entry("zqlocal-w4a8-asym", _opt(13.24, 14.23, 18.53, 16.32)),
            "zqglobal-w4a16": Entry("zqglobal-w4a16-asym", _opt(12.38, 11.62, 11.04, 10.68)),
            "zqglobal-w4a8": Entry("zqglobal-w4a8-asym", _opt(13.17, 13.07, 14.65, 37.82)),
        },
        C4,
        "text as GPTQ's†, weights asymmetric per row†; rates are swept within every block, where the figures are the "
        "best of whole runs",
    ),
    Study(
        "LoRC (ZeroQuant-V2)",
        "arXiv 2303.08302",
        {
            "lorc-w4a16": Entry("minmax+gptq+lorc8-w4a16-asym", _opt("12.10", 11.36, 10.76, 10.34)),
            "lorc-w3a16": Entry("minmax+gptq+lorc8-w3a16-asym", _opt("13.00", "11.90", 11.14, 10.63)),
            "lorc-w2a16": Entry("minmax+gptq+lorc8-w2a16-asym", _opt(24.17, 18.53, 14.39, 13.01)),
        },
        C4,
        "text as GPTQ's†, weights asymmetric per row†; factors in 16 bits",
        GPTQ_ROWS,
    ),
    Study(
        "ZeroQuant-FP",
        "arXiv 2307.09782",
        {
            "zeroquant-fp-w8a8-int-int": Entry("minmax+gptq-w8a8-g256", _fp(12.66, 15.94, 25.76, 13.58, 10.63, "5.90")),
            "zeroquant-fp-w8a8-int-fp": Entry(
                "minmax+gptq-w8afp8-g256", _fp(11.99, 11.27, 10.69, 13.45, 10.38, "5.80")
            ),
            "zeroquant-fp-w8a8-fp-fp": Entry(
                "minmax+gptq-wfp8afp8-g256", _fp(11.99, 11.27, "10.70", 13.46, 10.38, 5.81)
            ),
            "zeroquant-fp-w4a8-int-int": Entry("minmax+gptq-w4a8-g256", _fp(13.18, "16.70", 24.42, 16.23, 11.48, 6.02)),
            "zeroquant-fp-w4a8-int-fp": Entry(
                "minmax+gptq-w4afp8-g256", _fp("12.20", 11.34, 10.73, 16.09, 11.31, 5.94)
            ),
            "zeroquant-fp-w4a8-fp-fp": Entry("minmax+gptq-wfp4afp8-g256", _fp(12.09, 11.34, 10.72, 15.14, 11.08, 5.92)),
            "zeroquant-fp-w4a8-m1": Entry("minmax+gptq-wfp4afp8-g256-pow2", note="scales that are powers of two"),
            "zeroquant-fp-w4a8-m2": Entry(
                "minmax+gptq-wfp4afp8-g256-m2", note="scales that are their row's largest over a power of two"
            ),
        },
        C4,
        "text as GPTQ's†, groups of 256†; compare per data set, since PTB dominates LLaMA's means",
        GPTQ_ROWS,
    ),
    Study(
        "SignRound",
        "arXiv 2309.05516, abstract",
        {
            "signround-w4g128": Entry("signround-w4a16-g128"),
            "signround-w3g128": Entry("signround-w3a16-g128-asym"),
            "signround-w2g64": Entry(
                "signround-w2a16-g64-asym",
                (Figure("7B to 70B models", "+6.91 to +33.22 points at 2 bits", "average of 11 zero-shot tasks"),),
            ),
        },
        Calibration("pile", 512, 2048, 42),
        "512 windows of the Pile's validation set stand for as many of pile-10k†; 200 steps of 8 sequences",
        ("signround.iterations=200", "signround.batch=8", "signround.rate=0.005"),
    ),
    Study(
        "TesseraQ",
        "arXiv 2410.19103, abstract",
        {"tesseraq-w2g128": Entry("awq+tesseraq-w2a16-g128-asym", on(LLAMA_2, 6.82), note="groups of 128†")},
        Calibration("wikitext2", 512, 2048, 0),
        "text recalled†; AWQ's clip searches over Gram matrices",
    ),
    Study(
        "GPTAQ",
        "arXiv 2504.02692",
        {
            "gptaq-w4g128": Entry("minmax+gptaq-w4a16-g128-asym", calibration=C4),
            "gptaq-w4a4kv4": Entry("quarot+mse+gptaq-w4a4kv4", settings=(ZERO_POINTS,), calibration=WIKI),
        },
        None,
        "all linears of a block are rounded on one look at its inputs; no figure is quoted",
        ("gptaq.alpha=0.25", "gptaq.act_order=true"),
    ),
    Study(
        "KIVI",
        "arXiv 2402.02750, abstract",
        {
            "kivi-kv2": Entry(
                "w16a16kv2-kivi", (Figure("Llama, Falcon, Mistral", "2.6 times less", "peak memory, weights included"),)
            ),
            "kivi-kv4": Entry("w16a16kv4-kivi"),
        },
        None,
        "the same: groups of 32, the newest 128 tokens exact",
        ("scheme.kv.group=32", "scheme.kv.residual=128"),
    ),
)
