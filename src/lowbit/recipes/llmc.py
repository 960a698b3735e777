"""Recipes of LLMC's alignment runs and benchmark (Gong et al. 2024, arXiv 2405.06001): data for `papers`."""

from __future__ import annotations

from .study import (
    ASYMMETRIC_INPUTS,
    BOTH,
    GPTQ_CODE,
    GPTQ_ROWS,
    LLAMA_2,
    LLAMA_3,
    PILE,
    WIKI,
    Entry,
    Figure,
    Study,
    on,
    small,
)

_OFFLINE = (ASYMMETRIC_INPUTS, "quarot.across=false", "quarot.down=false", "quarot.keys=false")


def _code(human: str, mbpp: str) -> tuple[Figure, ...]:
    return (*on(LLAMA_2, human, data="HumanEval pass@1"), *on(LLAMA_2, mbpp, data="MBPP pass@1"))


STUDIES = (
    Study(
        "LLMC's alignment runs",
        "arXiv 2405.06001",
        {
            "llmc/quarot-gptq-w8a8": Entry("quarot+mse+gptq-w8a8-asym", on(LLAMA_2, 5.48)),
            "llmc/quarot-gptq-w6a6": Entry("quarot+mse+gptq-w6a6-asym", on(LLAMA_2, "5.50")),
            "llmc/quarot-gptq-w4a4": Entry("quarot+mse+gptq-w4a4-asym", on(LLAMA_2, 6.22)),
        },
        WIKI,
        "as QuaRot's own; the cache keeps 16 bits",
        (ASYMMETRIC_INPUTS, *GPTQ_ROWS),
    ),
    Study(
        "LLMC's benchmark, weights",
        "arXiv 2405.06001",
        {
            "llmc/rtn-w4g128": Entry("rtn-w4a16-g128-asym", (*on(LLAMA_2, 5.78), *small(22.54, 15.75))),
            "llmc/rtn-w4": Entry("rtn-w4a16-asym", on(LLAMA_2, 6.11)),
            "llmc/rtn-w3g128": Entry("rtn-w3a16-g128-asym", on(LLAMA_2, 6.66)),
            "llmc/rtn-wfp4g128": Entry("rtn-wfp4a16-g128", on(LLAMA_2, "5.70")),
            "llmc/rtn-wfp4": Entry("rtn-wfp4a16", on(LLAMA_2, 5.89)),
            "llmc/awq-w4g128": Entry("awq-w4a16-g128-asym", on(LLAMA_2, 5.59)),
            "llmc/awq-w4": Entry("awq-w4a16-asym", on(LLAMA_2, 5.81)),
            "llmc/awq-w3g128": Entry("awq-w3a16-g128-asym", on(LLAMA_2, 6.19)),
            "llmc/awq-wfp4g128": Entry("awq-wfp4a16-g128", on(LLAMA_2, 5.63)),
            "llmc/awq-wfp4": Entry("awq-wfp4a16", on(LLAMA_2, 5.75)),
            "llmc/awq-w3g128-no-clip": Entry("awq+minmax-w3a16-g128-asym", on(LLAMA_3, 10.98, data=BOTH)),
            "llmc/awq-gptq-w3g128": Entry("awq+minmax+gptq-w3a16-g128-asym", on(LLAMA_3, 10.55, data=BOTH), GPTQ_CODE),
            "llmc/gptq-w3g128": Entry(
                "minmax+gptq-w3a16-g128-asym", (*on(LLAMA_2, "6.330"), *on(LLAMA_3, 10.67, data=BOTH)), GPTQ_CODE
            ),
            "llmc/quarot-w3g128": Entry("quarot-w3a16-g128-asym", on(LLAMA_3, 40.81)),
            "llmc/quarot-gptq-w3g128": Entry("quarot+minmax+gptq-w3a16-g128-asym", on(LLAMA_3, 7.99), GPTQ_CODE),
        },
        PILE,
        "integers asymmetric, as its alignment runs; its real-valued exponent bias for floats is not lowbit's",
    ),
    Study(
        "LLMC's benchmark, weights and inputs",
        "arXiv 2405.06001",
        {
            "llmc/rtn-w8a8": Entry("rtn-w8a8"),
            "llmc/rtn-w6a6": Entry("rtn-w6a6", on(LLAMA_2, 6.86)),
            "llmc/rtn-w4a4": Entry("rtn-w4a4", on(LLAMA_2, "NaN")),
            "llmc/rtn-wfp6afp6": Entry("rtn-wfp6afp6", on(LLAMA_2, 5.56), note="E3M2†"),
            "llmc/rtn-wfp4afp4": Entry("rtn-wfp4afp4", on(LLAMA_2, 90.85)),
            "llmc/smoothquant-w8a8": Entry("smoothquant-w8a8", small(17.68, 13.72)),
            "llmc/smoothquant-w6a6": Entry("smoothquant-w6a6", (*on(LLAMA_2, 6.77), *small(20.37, 15.29))),
            "llmc/smoothquant-w4a4": Entry("smoothquant-w4a4", small(331.7, 172.65)),
            "llmc/smoothquant-w4a8": Entry("smoothquant-w4a8", on(LLAMA_3, 8.85)),
            "llmc/smoothquant-w4a8-all": Entry(
                "smoothquant-w4a8", on(LLAMA_3, 7.92), ("smoothquant.all_edges=true",), note="down_proj smoothed too"
            ),
            "llmc/smoothquant-wfp6afp6": Entry("smoothquant-wfp6afp6", on(LLAMA_2, 5.56), note="E3M2†"),
            "llmc/smoothquant-wfp4afp4": Entry("smoothquant-wfp4afp4", on(LLAMA_2, 16.35)),
            "llmc/osplus-w8a8": Entry("osplus-w8a8", small(17.67, "13.70"), ("osplus.floor=0.1",)),
            "llmc/osplus-w6a6": Entry("osplus-w6a6", small(19.67, 15.32), ("osplus.floor=0.1",)),
            "llmc/osplus-w4a4": Entry("osplus-w4a4", small(263.76, 261.88), ("osplus.floor=0.1",)),
            "llmc/omniquant-w6a6": Entry("omniquant-w6a6-asym", settings=(ASYMMETRIC_INPUTS, "omniquant.epochs=20")),
            "llmc/omniquant-w4a4": Entry(
                "omniquant-w4a4-asym", settings=(ASYMMETRIC_INPUTS, "omniquant.epochs=20", "omniquant.let_rate=0.001")
            ),
            "llmc/quarot-w8a8": Entry("quarot+mse-w8a8-asym", small(17.77, "13.70"), _OFFLINE),
            "llmc/quarot-w6a6": Entry("quarot+mse-w6a6-asym", small(20.26, 14.93), _OFFLINE),
            "llmc/quarot-w4a4": Entry("quarot+mse-w4a4-asym", small(472, 57.5), _OFFLINE),
        },
        PILE,
        "QuaRot's small models without online maps, as there; floats as above",
    ),
    Study(
        "LLMC's benchmark, cache",
        "arXiv 2405.06001",
        {
            "llmc/kv8": Entry("w16a16kv8-kvg8", _code("13.41", "20.00")),
            "llmc/kv4": Entry("w16a16kv4-kvg8", _code("13.41", "21.00")),
            "llmc/kv2": Entry("w16a16kv2-kvg8", _code("0", "0")),
            "llmc/w4a8kv4": Entry(
                "rtn-w4a8kv4-kvg8", _code("12.20", "18.40"), note="how weights were rounded is not stated: nearest†"
            ),
        },
        None,
        "codes are stored once, not rounded again at every step; 16 bits give 12.80 and 22.00",
    ),
)
