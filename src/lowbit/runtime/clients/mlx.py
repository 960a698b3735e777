"""mlx-lm's own logits of an MLX directory: `PYTHON mlx.py JOBDIR …`, in the interpreter that has it.

Scales, biases and all that is not quantized become float32 first, which leaves codes as they are and makes MLX's
arithmetic exact: a difference to lowbit's model is then one of meaning, not of 16-bit rounding.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # where Python looks first, and finds this file for the client


def main(job: Path) -> None:
    """Read JOBDIR/job.json, write logits.npy [N, T, V] in fp32 and found.json."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    asked = json.loads((job / "job.json").read_text("utf8"))
    model, _ = load_model(Path(asked["export"]))
    model.set_dtype(mx.float32)
    model.eval()
    logits = [np.array(model(mx.array(window)[None]).astype(mx.float32)) for window in asked["windows"]]
    np.save(job / "logits.npy", np.concatenate(logits))
    (job / "found.json").write_text(json.dumps({"client": "mlx", "version": version("mlx-lm")}), "utf8")


if __name__ == "__main__":
    for place in sys.argv[1:]:
        main(Path(place))
