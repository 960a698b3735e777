"""Recipes of papers that choose what grids look like (HQQ, DGQ, AdaDim), and Norm Tweaking's: data for `papers`."""

from __future__ import annotations

from .document import Calibration
from .study import C4, GPTQ_ROWS, WIKI, Entry, Study

STUDIES = (
    Study(
        "HQQ",
        "https://mobiusml.github.io/hqq_blog (2023)",
        {
            "hqq-w4g64": Entry("hqq-w4a16-g64"),
            "hqq-w3g64": Entry("hqq-w3a16-g64"),
            "hqq-w2g64": Entry("hqq-w2a16-g64"),
            "hqq-w2g16": Entry("hqq-w2a16-g16"),
        },
        None,
        "groups along inputs, where the authors' code has them along outputs unless told; offsets are stored in "
        "16 bits, at 4 bits too, where the code rounds zero-points; no figure is quoted",
        ("hqq.iterations=20", "hqq.norm=0.7", "hqq.beta=10.0", "hqq.growth=1.01"),
    ),
    Study(
        "DGQ",
        "arXiv 2310.04836",
        {
            "dgq-w4a8g128": Entry("smoothquant+dgq-w4a8-g128", note="inputs per token"),
            "dgq-w4a8g128-static": Entry("smoothquant+dgq-w4a8-g128-static", note="inputs per tensor, calibrated"),
        },
        WIKI,
        "text recalled†; groups and rows are judged by diagonal blocks of the Gram matrix; no figure is quoted",
        ("smoothquant.alpha=0.5", "smoothquant.down_part=0.005"),
    ),
    Study(
        "AdaDim",
        "arXiv 2309.15531",
        {
            "adadim-w4g128": Entry("adadim-w4a16-g128-asym"),
            "adadim-w3g128": Entry("adadim-w3a16-g128-asym"),
            "adadim-gptq-w4g128": Entry("adadim+gptq-w4a16-g128-asym"),
            "adadim-gptq-w3g128": Entry("adadim+gptq-w3a16-g128-asym"),
        },
        C4,
        "text as GPTQ's†; directions are compared under plain rounding, for GPTQ too; no figure is quoted",
        ("adadim.ranges=minmax", *GPTQ_ROWS),
    ),
    Study(
        "Norm Tweaking",
        "arXiv 2309.02784",
        {
            "normtweak-w4": Entry("minmax+gptq+normtweak-w4a16-asym"),
            "normtweak-w2g64": Entry("minmax+gptq+normtweak-w2a16-g64-asym"),
            "normtweak-mse-w4g128": Entry(
                "minmax+gptq+normtweak-w4a16-g128-asym",
                settings=(
                    "normtweak.loss=mse",
                    "normtweak.targets=float",
                    "normtweak.rates=[1e-6]",
                    "normtweak.slopes=[0.001]",
                    "normtweak.epochs=50",
                ),
                note="a toolkit's variant, which follows the original model's own stream",
                calibration=WIKI,
            ),
        },
        Calibration("generated", 128, 2048, 0),
        "slopes are searched in every block, over values recalled†; steps take a micro-batch of 2048 tokens; gains of "
        "bf16 models hardly feel such rates; no figure is quoted",
        ("normtweak.rates=[1e-5]", "normtweak.slopes=[0.0, 1.0, 10.0]", *GPTQ_ROWS),
    ),
)
