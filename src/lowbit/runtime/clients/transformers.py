"""transformers' own logits of an exported directory, and what its linears multiply: `PYTHON transformers.py JOBDIR …`.

Beside logits this client shows its insides, so it is asked for more than others: job.json may hold "formats", the input
formats of linears by name, with their calibrated ranges in job.npz. What every such linear multiplies is then compared
with lowbit's own quantization of what it was given, and unquantized.npy holds the logits that come of multiplying by
what was given. That reference is not written a second time here: lowbit is imported from the place that job.json names,
which needs nothing but torch.

What transformers is helped with, or does in its own way, found.json says in "remarks", in "uncached" the scales of
keys and values that it has no use for, and in "experts" the dtype in which it has dequantized a mixture's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

READERS = {"compressed-tensors": "compressed-tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}
"""The package that reads a kind of export for transformers."""
HELPED = "transform_config was applied by compressed-tensors itself, which transformers has to be told to do"
DEQUANTIZING = "GPTQModel's dequantizing kernel was asked for, where transformers takes one for int4 on CPUs"


def run(job: Path) -> None:
    """Read JOBDIR/job.json; write found.json, and logits.npy [N, T, V] in fp32 where every tensor loaded as written."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = json.loads((job / "job.json").read_text("utf8"))
    torch.set_num_threads(asked["threads"])
    stated = json.loads((Path(asked["export"]) / "config.json").read_text("utf8")).get("quantization_config") or {}
    method = stated.get("quant_method", "")
    model, loaded = AutoModelForCausalLM.from_pretrained(
        asked["export"],
        dtype=torch.float32,
        trust_remote_code=asked.get("trust", False),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, by name
        **_kernels(method, stated),
    )
    found: dict[str, Any] = {
        "client": "transformers",
        "version": _version(method),
        "problems": problems(loaded),
        "uncached": uncached(loaded),
        "dtype": "float16" if method == "awq" else "float32",
        "remarks": [DEQUANTIZING] if method in ("gptq", "awq") else [],
    }
    if not found["problems"]:
        found["remarks"] += _decompress(model, stated)
        found["experts"] = experts(model)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in (torch.bfloat16, torch.float16):  # experts and scales stay in the dtype of the file
                tensor.data = tensor.data.float()
        found |= compare(model.eval(), asked, job)
    (job / "found.json").write_text(json.dumps(found), "utf8")


def _kernels(method: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that have GPTQ and AWQ weights dequantized in torch: in fp32 for GPTQ; AWQ's computes in fp16."""
    from transformers import AwqConfig, GPTQConfig

    if method == "gptq":
        return {"quantization_config": GPTQConfig(bits=stated["bits"], backend="gptq_torch")}
    return {"quantization_config": AwqConfig(bits=stated["bits"], backend="torch_awq")} if method == "awq" else {}


def _decompress(model: Any, stated: Mapping[str, Any]) -> list[str]:
    """Have compressed-tensors weights unpacked now, not by the first forward pass: those of 4 bits become bfloat16.

    Online transforms are put in front of their linears by the package. Gives what transformers was helped with.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return []
    compressor.decompress_model(model)
    if not stated.get("transform_config"):
        return []
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    apply_transform_config(model, TransformConfig.model_validate(stated["transform_config"]))
    return [HELPED]


def _version(method: str) -> str:
    """transformers', and that of the package that reads the export for it."""
    reader = READERS.get(method, "")
    try:
        return f"{version('transformers')} with {reader} {version(reader)}" if reader else version("transformers")
    except PackageNotFoundError:
        return version("transformers")


def problems(loaded: Mapping[str, Any]) -> list[str]:
    """What from_pretrained says went wrong; that it has no use for the input ranges of experts is known, and so are
    the scales of keys and values (see `uncached`)."""
    found = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in loaded[f"{kind}_keys"])
        found += [f"{name} is {kind}" for name in names if not (".experts." in name and name.endswith(".input_scale"))]
    known = {f"{name} is unexpected" for name in uncached(loaded)}
    return [problem for problem in found if problem not in known]


def experts(model: Any) -> str | None:
    """The dtype of a mixture's dequantized weights, fused or not; None where it has no experts."""
    weights = [
        name for name, _ in model.named_parameters() if ".experts." in name and name.endswith(("_proj", ".weight"))
    ]
    return str(model.get_parameter(weights[0]).dtype).removeprefix("torch.") if weights else None


def uncached(loaded: Mapping[str, Any]) -> list[str]:
    """The scales of keys and values that from_pretrained has no use for: it does not quantize its cache then."""
    return sorted(name for name in loaded["unexpected_keys"] if name.endswith((".k_scale", ".v_scale")))


def compare(model: Any, asked: Mapping[str, Any], job: Path) -> dict[str, Any]:
    """Write logits; gives, for found.json, how many elements of each watched linear's inputs differ ("unequal"), and
    which of these linears are given a matrix for many tokens ("flat")."""
    import torch

    windows = torch.tensor(asked["windows"])

    @torch.no_grad()
    def logits() -> Any:
        out = [model(input_ids=window[None], use_cache=False).logits.float() for window in windows]
        return torch.cat(out).numpy()

    if not asked.get("formats"):
        np.save(job / "logits.npy", logits())
        return {}
    sys.path.append(asked["lowbit"])
    from lowbit.formats.native import spec_from_json
    from lowbit.modules.linear import quantize_activation
    from lowbit.numerics.grid import Grid

    ranges = np.load(job / "job.npz")
    quantizers = {}
    for name, data in asked["formats"].items():
        spec, scale = spec_from_json(data), ranges.get(name)
        assert spec is not None
        grid = None if scale is None else Grid(spec, torch.from_numpy(scale))
        quantizers[name] = lambda x, spec=spec, grid=grid: quantize_activation(x, spec, grid)
    watch = _watch(model, quantizers)
    with watch:
        np.save(job / "logits.npy", logits())
        watch.plain = True
        np.save(job / "unquantized.npy", logits())
    return {"unequal": watch.unequal, "flat": sorted(watch.flat)}


def _watch(model: Any, quantizers: Mapping[str, Callable[[Any], Any]]) -> Any:
    """A torch mode that compares what each watched linear really multiplies with lowbit's quantization of its input,
    or once it is `plain`, has it multiply the input itself."""
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    class Inputs(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.unequal = dict.fromkeys(quantizers, 0)
            self.flat: set[str] = set()
            self.given: tuple[str, Any] | None = None
            self.plain = False

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is linear and self.given is not None:
                (name, x), self.given = self.given, None
                if self.plain:
                    return function(x, *args[1:], **(kwargs or {}))
                self.unequal[name] += int((args[0] != quantizers[name](x)).sum())
                if x.dim() < 3:
                    self.flat.add(name)
            return function(*args, **(kwargs or {}))

    mode = Inputs()

    def note(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, arguments: Any) -> None:
            mode.given = name, arguments[0]

        return hook

    for name in quantizers:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    return mode


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # where Python looks first, and finds this file
    os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", GPTQMODEL_CPU_WORKERS="2")
    for place in sys.argv[1:]:
        run(Path(place))
