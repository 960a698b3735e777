"""The names that `lowbit recipes` lists, each with a line on what it is for. Other names of the grammar work too."""

NAMED: dict[str, str] = {
    "rtn-w8a16": "8-bit weights, no calibration: half the size at hardly any cost",
    "rtn-w4a16-g128": "4-bit weights in seconds, no calibration: the baseline of every table",
    "mse-w4a16-g128": "the same with ranges searched for the least rounding error, still no calibration",
    "gptq-w4a16-g128": "4-bit weights that make up for each other's errors: a good first choice",
    "gptq-w4a16-g128-asym": "the same with zero-points, for weights that lie to one side",
    "awq-w4a16-g128-asym": "4-bit weights with the important channels scaled up, as AWQ's authors publish them",
    "awq+gptq-w4a16-g128": "both: channels scaled by AWQ, codes chosen by GPTQ",
    "awq+gptq-w3a16-g128": "3-bit weights, where the methods' gains add up",
    "awq+gptq-w2a16-g64-asym": "2-bit weights: an experiment, expect a visible loss",
    "rtn-w8a8": "8-bit weights and activations, no calibration: for models without outlier channels",
    "smoothquant-w8a8": "8-bit weights and activations, outliers moved into the weights: integer matrix products",
    "smoothquant-w8a8-static": "the same with activation ranges fixed by calibration, for hardware that needs them",
    "smoothquant-w6a6": "6-bit weights and activations: what the papers compare at",
    "smoothquant+gptq-w4a8-g128": "4-bit weights and 8-bit activations",
    "rtn-fp8": "FP8 weights and activations, no calibration: for GPUs with FP8 matrix products",
    "smoothquant-fp8": "the same with outliers moved into the weights",
    "rtn-fp8a16": "FP8 weights alone, no calibration",
    "gptq-wfp4afp8-g128": "FP4 weights in groups and FP8 activations",
}
