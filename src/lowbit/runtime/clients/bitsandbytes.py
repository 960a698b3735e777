"""The logits of a bitsandbytes directory in transformers: `PYTHON bitsandbytes.py JOBDIR …`, where both are installed.

All is computed in float32, not in the 16 bits that the directory asks for, so that a difference to lowbit's
model is one of meaning, not of rounding.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # where Python looks first, and finds this file for the client
os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1")


def main(job: Path) -> None:
    """Read JOBDIR/job.json, write logits.npy [N, T, V] in fp32 and found.json."""
    import numpy as np
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    asked = json.loads((job / "job.json").read_text("utf8"))
    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(asked["export"], dtype=torch.float32).eval()
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert linears, "transformers made no 4-bit linear of the directory"
    for module in linears:
        module.compute_dtype = module.weight.quant_state.dtype = torch.float32
        module.support_avx512bf16_for_cpu = False  # a kernel that computes in bfloat16
    for parameter in model.parameters():
        if parameter.is_floating_point():  # transformers leaves them in the dtype of the file
            parameter.data = parameter.data.float()
    with torch.no_grad():
        windows = torch.tensor(asked["windows"])
        logits = [model(input_ids=window[None], use_cache=False).logits.float() for window in windows]
    np.save(job / "logits.npy", torch.cat(logits).numpy())
    found = {"client": "bitsandbytes", "version": f"{version('bitsandbytes')}, transformers {version('transformers')}"}
    (job / "found.json").write_text(json.dumps(found), "utf8")


if __name__ == "__main__":
    for place in sys.argv[1:]:
        main(Path(place))
