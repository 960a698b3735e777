"""GPTQModel's own logits of a GPTQ or AWQ directory: `PYTHON gptqmodel.py JOBDIR …`, in the interpreter that has it.

Its torch kernels are asked for, which are the definition of both layouts there. The GPTQ one dequantizes in the dtype
of the scales, so in fp32 once the model is cast to it. The AWQ one computes in 16 bits whatever it is given; found.json
says which dtype it was.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # where Python looks first, and finds this file for the client
os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", GPTQMODEL_CPU_WORKERS="2")


def main(job: Path) -> None:
    """Read JOBDIR/job.json, write logits.npy [N, T, V] in fp32 and found.json."""
    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel

    asked = json.loads((job / "job.json").read_text("utf8"))
    torch.set_num_threads(asked["threads"])
    stated = json.loads((Path(asked["export"]) / "config.json").read_text("utf8"))["quantization_config"]
    awq = stated["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(asked["export"], backend=backend, device="cpu", dtype=torch.float16).model
    model = model.float().eval()
    with torch.no_grad():
        windows = torch.tensor(asked["windows"])
        logits = [model(input_ids=window[None], use_cache=False).logits.float() for window in windows]
    np.save(job / "logits.npy", torch.cat(logits).numpy())
    found = {"client": "gptqmodel", "version": version("gptqmodel"), "dtype": "float16" if awq else "float32"}
    (job / "found.json").write_text(json.dumps(found), "utf8")


if __name__ == "__main__":
    for place in sys.argv[1:]:
        main(Path(place))
