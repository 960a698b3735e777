"""llama.cpp's own logits of an exported file: `PYTHON llamacpp.py JOBDIR …`, where llama-cpp-python is installed.

The library's C functions are called one by one, since the class around them wants a vocabulary that can tokenize, and
windows come as token ids. The cache of keys and values is kept in fp32 and attention is computed plainly, so that what
is left of a difference to lowbit is what llama.cpp makes of the inputs of quantized linears: 8-bit integers.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(job: Path) -> None:
    """Read JOBDIR/job.json, write logits.npy [N, T, V] in fp32 and found.json."""
    import llama_cpp
    import numpy as np

    asked = json.loads((job / "job.json").read_text("utf8"))
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(_file(Path(asked["export"]))).encode(), _model_options(llama_cpp))
    if not model:
        raise SystemExit("llama.cpp cannot load the file")
    windows = asked["windows"]
    context = llama_cpp.llama_init_from_model(model, _options(llama_cpp, max(map(len, windows)), asked["threads"]))
    if not context:
        raise SystemExit("llama.cpp cannot make a context for the model")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.stack([_logits(llama_cpp, context, window, size) for window in windows])
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    np.save(job / "logits.npy", logits)
    found = {"client": "llamacpp", "version": f"llama-cpp-python {version('llama-cpp-python')}"}
    (job / "found.json").write_text(json.dumps(found), "utf8")


def _file(export: Path) -> Path:
    """The file of an exported directory, or the file itself."""
    return next(export.glob("*.gguf")) if export.is_dir() else export


def _model_options(llama_cpp: Any) -> Any:
    """Weights on the CPU as the file has them: rearranged for AMX, K-quants crashed 0.3.36 on machines that have it."""
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = False
    return options


def _options(llama_cpp: Any, length: int, threads: int) -> Any:
    """A context for windows of that many tokens, each computed in one go."""
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.swa_full = True
    return options


def _logits(llama_cpp: Any, context: Any, window: list[int], size: int) -> Any:
    """fp32 logits [T, V] of one window, with an empty cache in front of it."""
    import numpy as np

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(window), 0, 1)
    batch.n_tokens = len(window)
    for place, token in enumerate(window):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama.cpp cannot compute a window")
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(window), size)).copy()
    llama_cpp.llama_batch_free(batch)
    return logits


if __name__ == "__main__":
    for place in sys.argv[1:]:
        main(Path(place))
