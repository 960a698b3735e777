"""A request, checked: everything that is decided before a weight is read.

`prepare` turns what a user asks for into a plan, or refuses in one sentence. As in `api.py`, everything heavy is
imported inside, so that `lowbit --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .request import Request

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .graph.anatomy import Anatomy
    from .methods.recipe import Recipe
    from .recipes.document import LoadedRecipe
    from .stream.allocate import Allocation
    from .stream.checkpoint import Checkpoint
    from .stream.plan import Plan, Refuse

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass
class Prepared:
    """A checked request: the plan, and what carrying it out needs. No weight has been read."""

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    plan: Plan
    record: dict[str, Any]
    windows: list[torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    allocation: Allocation | None = None
    """The widths that a budget was spent on."""

    @property
    def seed(self) -> int:
        """Seed of everything random in the run."""
        return int((self.record["calibration"] or {}).get("seed", 0))


def prepare(request: Request) -> Prepared:
    """Check a request against its model and make the plan; refuses in seconds, before a weight is read."""
    from . import budget, recipes
    from .data.calibrate import fingerprint
    from .formats.native import VERSION
    from .stream.checkpoint import Checkpoint
    from .stream.hidden import micro_batches
    from .stream.lanes import Lanes, check
    from .stream.plan import make_plan
    from .stream.sweep import micro_batch

    widths = budget.by_width(request) if budget.budgeted(request) else {}
    loaded = next(iter(widths.values()), None) or recipes.resolve(
        request.recipe, settings=request.settings, overrides=request.overrides, ignore=request.ignore
    )
    device, (count, world) = device_of(request.device), shared(request)
    check(loaded.recipe, world)
    checkpoint = Checkpoint.open(request.model, revision=request.revision, trust_remote_code=request.trust_remote_code)
    skeleton, anatomy = anatomy_of(checkpoint, request.trust_remote_code)
    dtype = _dtype(request.dtype, checkpoint.config.dtype, device)
    loaded = _narrowed(request, loaded, checkpoint)
    refuse = _target(request.target, loaded.recipe)
    text = bool(widths) or loaded.recipe.calibrated
    windows, calibration = _calibration(request, loaded, checkpoint) if text else ([], None)
    allocation = None
    if widths:
        widths = {width: _narrowed(request, each, checkpoint) for width, each in widths.items()}
        opened = budget.Opened(request, widths, checkpoint, skeleton, anatomy, refuse)
        loaded, allocation = budget.allocated(opened, windows, dtype, device)
    if text and count > 1:
        Lanes(count).of(micro_batches(windows, micro_batch(anatomy, loaded.recipe, device)))
    tokens = sum(window.numel() for window in windows)
    window = max((window.numel() for window in windows), default=0)
    plan = make_plan(
        checkpoint, anatomy, loaded.recipe, tokens=tokens, dtype=dtype, refuse=refuse, window=window, device=device
    )
    plan = replace(plan, stack_bytes=_stack_bytes(request, plan, device))
    record = {
        "numerics": VERSION,
        "model": checkpoint.fingerprint(),
        "recipe": recipes.to_dict(loaded.recipe),
        "calibration": None if calibration is None else {**calibration, "tokens": fingerprint(windows)},
        "target": request.target,
        **({"stack_bytes": plan.stack_bytes} if plan.stack_bytes else {}),
        **_arithmetic(device, dtype, count, micro_batch(anatomy, loaded.recipe, device)),
        **({"allocation": budget.record_of(request)} if widths else {}),
    }
    for notice in plan.notices:
        request.notice(notice)
    return Prepared(checkpoint, skeleton, plan, record, windows, dtype, device, allocation)


def _arithmetic(device: torch.device, dtype: torch.dtype, lanes: int, micro_batch: int) -> dict[str, Any]:
    """What the order and precision of sums depend on."""
    import torch

    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
        "micro_batch": micro_batch,
        **({"lanes": lanes} if lanes > 1 else {}),
        "torch": torch.__version__,
    }


def _stack_bytes(request: Request, plan: Plan, device: torch.device) -> int:
    """What a stack of experts may take: how many make one belongs to a run, whatever --gpu-memory it goes on with."""
    from .stream.plan import stack_bytes
    from .stream.run import begun_with

    begun = {} if request.output is None or request.restart else begun_with(Path(request.output))
    return int(begun.get("stack_bytes", 0)) if begun else stack_bytes(plan, device, request.gpu_memory)


def shared(request: Request) -> tuple[int, int]:
    """(lanes, processes) of a request; how many were started, if some were, is how many there are.

    Raises ValueError where the processes, or their GPUs, are not there, or cannot share the lanes evenly.
    """
    from .stream.lanes import launched

    started = launched()
    world = started if request.gpus is None else request.gpus
    if started > 1 and world != started:
        raise ValueError(f"--gpus {world} in one of {started} processes that were started together: drop --gpus")
    if started == 1 and world != 1:
        _check_gpus(world, device_of(request.device))
    if world > 1 and (request.bits is not None or request.size is not None):
        raise ValueError("--bits and --size measure the model on one GPU: drop --gpus")
    count = world if request.lanes is None else request.lanes
    if count < 1 or count % world:
        raise ValueError(f"{count} lanes cannot be shared by {world} GPUs: make --lanes a multiple of {world}")
    return count, world


def _check_gpus(wanted: int, device: torch.device) -> None:
    import torch

    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if not 1 < wanted <= there:
        raise ValueError(f"--gpus {wanted}, and {there} CUDA devices can be used here: lower it, or drop it")
    if device.index is not None:
        raise ValueError(f"--gpus {wanted} takes the first {wanted} devices: write --device cuda, without a number")


def anatomy_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Anatomy]:
    """The model without weights, bound to its files, and its proved anatomy."""
    from .graph import build_skeleton, discover

    skeleton = build_skeleton(checkpoint.config, trust_remote_code=trust_remote_code)
    checkpoint.bind(skeleton)
    return skeleton, discover(checkpoint.config, skeleton)


def context_of(config: Any) -> int | None:
    """How many tokens the model can attend to; None where its configuration states no limit."""
    stated = [getattr(config, name, None) for name in CONTEXT_FIELDS]
    return next((value for value in stated if isinstance(value, int)), None)


def device_of(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: use --device cpu, or install a CUDA build of torch")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda") from None


def _dtype(name: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What blocks compute in: the checkpoint's dtype where the device is fast in it, else fp32."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in known:
            raise ValueError(f"unknown dtype {name!r}: use auto, {', '.join(known)}")
        return known[name]
    if device.type != "cpu":
        return stored if stored is not None and stored in known.values() else torch.float32
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if stored == torch.bfloat16 and fast else torch.float32


def _narrowed(request: Request, loaded: LoadedRecipe, checkpoint: Checkpoint) -> LoadedRecipe:
    """The recipe with weights as the export format asked for stores them; refuses models that it cannot carry."""
    from .formats.base import find, narrowed, refusal

    if request.target is None:
        return loaded
    form, scheme = find(request.target), loaded.recipe.scheme
    reason = refusal(form, checkpoint.config.to_dict())
    if reason is not None:
        raise ValueError(reason)
    overrides = tuple(replace(each, weights=narrowed(form, each.weights)) for each in scheme.overrides)
    scheme = replace(scheme, weights=narrowed(form, scheme.weights), overrides=overrides)
    return replace(loaded, recipe=replace(loaded.recipe, scheme=scheme))


def _target(name: str | None, recipe: Recipe) -> Refuse | None:
    """What the export format asked for objects to, as the plan asks it; of the whole model, at once."""
    from .formats.base import find, refuse_encoded

    if name is None:
        return None
    form = find(name)
    reason = form.refuse_whole(kv=recipe.scheme.kv, corrected=bool(recipe.correct))
    if reason is None and recipe.encode is not None:
        reason = refuse_encoded(name, form, recipe.encode.name)
    if reason is not None:
        raise ValueError(reason)
    return lambda weights, inputs, site, ordered, mapped: form.refuse(
        weights, inputs, shape=site.shape, transposed=site.transposed, ordered=ordered, mapped=mapped
    )


def _calibration(request: Request, loaded: Any, checkpoint: Checkpoint) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Token windows, and what plan.json records of where they came from."""
    if request.calibration is not None and not isinstance(request.calibration, str):
        return _given_windows(request.calibration, request.seed or 0, checkpoint.config.vocab_size)
    from .data.calibrate import Calibration, load_calibration
    from .data.text import check_tokenizer, resolve_window

    pinned = loaded.calibration
    tokenizer = checkpoint.tokenizer()
    check_tokenizer(tokenizer, checkpoint.config.vocab_size)

    def chosen(name: str, default: Any) -> Any:
        asked = (getattr(request, "calibration" if name == "source" else name), getattr(pinned, name, None), default)
        return next((value for value in asked if value is not None), None)

    length, shrunk = resolve_window(chosen("length", None), 2048, context_of(checkpoint.config), "--length")
    if shrunk is not None:
        request.notice(shrunk)
    defaults = Calibration()
    source = chosen("source", defaults.source)
    samples, seed = chosen("samples", defaults.samples), chosen("seed", defaults.seed)
    windows = load_calibration(source, tokenizer, samples, length, seed, lambda: _whole_model(request, checkpoint))
    return windows, {"source": Path(source).name, "samples": samples, "length": length, "seed": seed}


def _whole_model(request: Request, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that generated calibration samples from: the one thing that takes all of it in memory at once."""
    from .runtime.load import load
    from .stream.memory import free_memory

    size, place = checkpoint.nbytes(checkpoint.names()), device_of(request.device)
    free = free_memory() if request.memory is None else request.memory
    if size > free:
        raise ValueError(
            f"generated calibration loads the whole model, {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            "free: calibrate on a text, or on --calibration random"
        )
    request.notice(f"generated calibration loads the whole model once, {size / 2**30:.1f} GiB, before blocks are read")
    return load(checkpoint.path, device=place, trust_remote_code=request.trust_remote_code)


def _given_windows(
    windows: Sequence[torch.Tensor], seed: int, vocabulary: int
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Windows of token ids that the caller drew."""
    import torch

    rows = [window.to("cpu", torch.long) for window in windows]
    if not rows or any(row.ndim != 1 or len(row) < 2 for row in rows):
        raise ValueError("calibration windows are one-dimensional tensors of at least two token ids")
    if max(int(row.max()) for row in rows) >= vocabulary:
        raise ValueError(f"a calibration window holds a token beyond the model's {vocabulary}: is it its tokenizer's?")
    return rows, {"source": "tokens", "samples": len(rows), "length": max(map(len, rows)), "seed": seed}


def hidden_budget(memory: int | None, plan: Plan, world: int = 1) -> int:
    """Bytes of hidden states that may stay in memory of each of `world` processes, which share what there is."""
    from .stream.memory import free_memory

    if memory is None:
        return free_memory() // 2 // world
    return max(0, memory // world - (plan.peak_bytes - plan.hidden_bytes))
