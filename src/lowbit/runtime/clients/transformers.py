"""transformers' own logits of an exported directory, and what its linears multiply: `PYTHON transformers.py JOBDIR`.

Beside logits this client shows its insides, so it is asked for more than others: job.json may hold "formats", the input
formats of linears by name, with their calibrated ranges in job.npz. What every such linear multiplies is then compared
with lowbit's own quantization of what it was given. That reference is not written a second time here: lowbit is
imported from the place that job.json names, which needs nothing but torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


def run(job: Path) -> None:
    """Read JOBDIR/job.json; write found.json, and logits.npy [N, T, V] in fp32 where every tensor loaded as written."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = json.loads((job / "job.json").read_text("utf8"))
    torch.set_num_threads(asked["threads"])
    model, loaded = AutoModelForCausalLM.from_pretrained(
        asked["export"],
        dtype=torch.float32,
        trust_remote_code=asked.get("trust", False),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, by name
    )
    found: dict[str, Any] = {"client": "transformers", "version": _version(), "problems": problems(loaded)}
    if not found["problems"]:
        _decompress(model, asked["export"])
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):  # a mixture's experts stay in their scales' dtype
                parameter.data = parameter.data.float()
        unequal, flat, logits = compare(model.eval(), asked, job)
        np.save(job / "logits.npy", logits)
        found |= {"unequal": unequal, "flat": flat}
    (job / "found.json").write_text(json.dumps(found), "utf8")


def _decompress(model: Any, export: str) -> None:
    """Have compressed-tensors weights unpacked now, not by the first forward pass: those of 4 bits become bfloat16.

    Online transforms are put in front of their linears by the package, which transformers does not ask to.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return
    compressor.decompress_model(model)
    stated = json.loads((Path(export) / "config.json").read_text("utf8"))["quantization_config"]
    if stated.get("transform_config"):
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        apply_transform_config(model, TransformConfig.model_validate(stated["transform_config"]))


def _version() -> str:
    """transformers', and that of the package that reads most exports for it."""
    try:
        return f"{version('transformers')} with compressed-tensors {version('compressed-tensors')}"
    except PackageNotFoundError:
        return version("transformers")


def problems(loaded: Mapping[str, Any]) -> list[str]:
    """What from_pretrained says went wrong; that it has no use for the input ranges of experts is known."""
    found = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in loaded[f"{kind}_keys"])
        found += [f"{name} is {kind}" for name in names if not (".experts." in name and name.endswith(".input_scale"))]
    return found


def compare(model: Any, asked: Mapping[str, Any], job: Path) -> tuple[dict[str, int], list[str], Any]:
    """(elements of each watched linear's inputs that differ, those given a matrix for many tokens, logits)."""
    import torch

    windows = torch.tensor(asked["windows"])

    @torch.no_grad()
    def logits() -> Any:
        out = [model(input_ids=window[None], use_cache=False).logits.float() for window in windows]
        return torch.cat(out).numpy()

    if not asked.get("formats"):
        return {}, [], logits()
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
        found = logits()
    return watch.unequal, sorted(watch.flat), found


def _watch(model: Any, quantizers: Mapping[str, Callable[[Any], Any]]) -> Any:
    """A torch mode that compares what each watched linear really multiplies with lowbit's quantization of its input."""
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    class Inputs(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.unequal = dict.fromkeys(quantizers, 0)
            self.flat: set[str] = set()
            self.given: tuple[str, Any] | None = None

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is linear and self.given is not None:
                (name, x), self.given = self.given, None
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
    run(Path(sys.argv[1]))
