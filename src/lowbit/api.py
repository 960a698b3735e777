"""What lowbit does, as four functions: quantize, load, evaluate, export. The command line adds only a screen to them.

Everything heavy is imported inside, so that `lowbit --help` answers at once.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .evaluation.report import EvaluationReport
    from .graph.anatomy import Anatomy
    from .methods.recipe import Recipe
    from .runtime.verify import Verification
    from .stream.checkpoint import Checkpoint
    from .stream.plan import Plan, Refuse

Notice = Callable[[str], None]
"""Receives one sentence that the user should see."""
OnBlock = Callable[[int, int, "Mapping[str, Any] | None"], None]
"""(block, number of blocks, its report when done; None when it starts)."""

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Request:
    """Everything that `quantize` can be asked for; names and defaults are those of the command line."""

    model: str
    recipe: str | Recipe
    output: str | None = None
    settings: Sequence[str] = ()
    overrides: Sequence[str] = ()
    ignore: Sequence[str] = ()
    calibration: str | Sequence[torch.Tensor] | None = None
    """A named set, a text file, or windows of token ids [T] as they are, for who draws them elsewhere."""
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    target: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    restart: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    notice: Notice = field(default=lambda _text: None)
    on_block: OnBlock = field(default=lambda *_: None)


@dataclass(frozen=True)
class Quantized:
    """What a run did; `to_json` is the documented object."""

    path: Path
    seconds: float
    peak_memory_bytes: int
    bits_per_weight: float
    bits_per_parameter: float
    size_bytes: int
    blocks: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The JSON of `lowbit quantize --json`."""
        keys = ("seconds", "peak_memory_bytes", "bits_per_weight", "bits_per_parameter", "size_bytes", "blocks")
        return {key: getattr(self, key) for key in keys}


def quantize(model: str | Path, recipe: str | Path | Recipe, output: str | Path, **options: Any) -> Quantized:
    """Quantize `model` (directory, hub id or `demo`) by a recipe (name, YAML file or `Recipe`) into a directory.

    Options are the other fields of `Request`. A directory that an interrupted run left behind is gone on with; a
    finished one is left unchanged. Raises ValueError, in one sentence, for a request that cannot be met.
    """
    return run(Request(str(model), str(recipe) if isinstance(recipe, Path) else recipe, str(output), **options))


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

    @property
    def seed(self) -> int:
        """Seed of everything random in the run."""
        return int((self.record["calibration"] or {}).get("seed", 0))


def prepare(request: Request) -> Prepared:
    """Check a request against its model and make the plan; refuses in seconds, before a weight is read."""
    import torch

    from . import recipes
    from .data.calibrate import fingerprint
    from .formats.native import VERSION
    from .stream.checkpoint import Checkpoint
    from .stream.plan import make_plan
    from .stream.sweep import MICRO_BATCH

    loaded = recipes.resolve(
        request.recipe, settings=request.settings, overrides=request.overrides, ignore=request.ignore
    )
    device = _device(request.device)
    checkpoint = Checkpoint.open(request.model, revision=request.revision, trust_remote_code=request.trust_remote_code)
    skeleton, anatomy = anatomy_of(checkpoint, request.trust_remote_code)
    dtype = _dtype(request.dtype, checkpoint.config.dtype, device)
    refuse = _target(request.target, loaded.recipe)
    windows, calibration = _calibration(request, loaded, checkpoint) if loaded.recipe.calibrated else ([], None)
    tokens = sum(window.numel() for window in windows)
    window = max((window.numel() for window in windows), default=0)
    plan = make_plan(
        checkpoint, anatomy, loaded.recipe, tokens=tokens, dtype=dtype, refuse=refuse, window=window, device=device
    )
    record = {
        "numerics": VERSION,
        "model": checkpoint.fingerprint(),
        "recipe": recipes.to_dict(loaded.recipe),
        "calibration": None if calibration is None else {**calibration, "tokens": fingerprint(windows)},
        "target": request.target,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "micro_batch": MICRO_BATCH,
        "torch": torch.__version__,
    }
    for notice in plan.notices:
        request.notice(notice)
    return Prepared(checkpoint, skeleton, plan, record, windows, dtype, device)


def anatomy_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Anatomy]:
    """The model without weights, bound to its files, and its proved anatomy."""
    from .graph import build_skeleton, discover

    skeleton = build_skeleton(checkpoint.config, trust_remote_code=trust_remote_code)
    checkpoint.bind(skeleton)
    return skeleton, discover(checkpoint.config, skeleton)


def run(request: Request) -> Quantized:
    """Carry a request out, from wherever an earlier run of it was interrupted."""
    from .formats.native import sizes
    from .stream.rotation import unties
    from .stream.run import RunDirectory
    from .stream.sweep import Progress, Sweep

    if request.output is None:
        raise ValueError("where to? name a directory with --output")
    began = time.perf_counter()
    prepared = prepare(request)
    directory = RunDirectory(Path(request.output), len(prepared.plan.anatomy.blocks))
    with directory.opened(prepared.record, restart=request.restart):
        if not directory.complete:
            _write_config(prepared.checkpoint.path, directory.path, unties(prepared.plan.anatomy, prepared.plan.recipe))
            Sweep(
                prepared.plan,
                prepared.skeleton,
                prepared.checkpoint,
                directory,
                prepared.windows,
                prepared.dtype,
                prepared.device,
                _hidden_budget(request.memory, prepared.plan),
                prepared.seed,
                Progress(request.on_block),
            ).execute()
            directory.log({"total": True, "seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()})
    size = sizes(directory.path)
    journal = directory.journal()
    seconds = {entry["block"]: entry["seconds"] for entry in journal if "block" in entry}
    totals = [entry for entry in journal if "total" in entry]
    reports = [directory.report(index) for index in range(directory.blocks)]
    return Quantized(
        directory.path,
        totals[-1]["seconds"] if totals else 0.0,
        max((entry["peak_memory_bytes"] for entry in totals), default=0),
        8 * size.stored_bytes / max(1, size.quantized_weights),
        8 * size.file_bytes / size.parameters,
        size.file_bytes,
        [{**report, "seconds": seconds.get(report["name"], 0.0)} for report in reports],
    )


def load(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load any model to run it: a lowbit directory, or whatever transformers loads. See `runtime.load.load`."""
    from .runtime.load import load as load_model

    return load_model(source, **options)


def evaluate(
    model: str | Path,
    *,
    perplexity: Sequence[str] = (),
    window: int | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    against: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    notice: Notice = lambda _text: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> EvaluationReport:
    """Measure a model in fp32: perplexity on texts, tasks, divergence from another model, and its honest size.

    `perplexity` names texts (`demo`, a published set, a file); without any, and without tasks, the packaged text is
    used. `against` is the original to compare with, over the same windows. `progress` gets (text, done, total).
    """
    import torch

    from .data.evaluation import load_windows
    from .data.text import check_tokenizer, resolve_window
    from .evaluation.divergence import Divergence, divergence_over
    from .evaluation.report import EvaluationReport
    from .evaluation.tasks import run_tasks
    from .evaluation.text import evaluate_text
    from .runtime.load import load, load_tokenizer

    texts = list(perplexity) or ([] if tasks else ["demo"])
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    place = _device(device)
    loaded = load(model, dtype=torch.float32, device=place, trust_remote_code=trust_remote_code)
    _as_decoded(loaded)
    check_tokenizer(tokenizer, loaded.get_input_embeddings().weight.shape[0])
    length, shrunk = resolve_window(window, 2048, context_of(loaded.config))
    if shrunk is not None and texts:
        notice(shrunk)
    windows = {text: load_windows(text, tokenizer, length, limit) for text in texts}
    options: dict[str, Any] = {"dtype": torch.float32, "device": place, "trust_remote_code": trust_remote_code}
    original = None if against is None else load(against, **options)
    report = EvaluationReport()
    found: list[tuple[Divergence, int]] = []
    for text, batch in windows.items():
        scores = evaluate_text(loaded, batch, original, progress=partial(progress, text))
        report.perplexity[text] = scores.perplexity
        if scores.divergence is not None:
            found.append((scores.divergence, len(batch)))
    if found:
        report.against = divergence_over(found)
    if tasks:
        report.tasks = run_tasks(loaded, tokenizer, tasks, limit)
    _count_bits(report, model, trust_remote_code)
    return report


@dataclass(frozen=True)
class Exported:
    """An exported directory and, where it was asked for, what its client made of it."""

    path: Path
    format: str
    size_bytes: int
    verification: Verification | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against using it."""
        return self.verification is None or self.verification.passed

    def to_json(self) -> dict[str, Any]:
        """The JSON of `lowbit export --json`."""
        checked = None if self.verification is None else asdict(self.verification)
        return {"path": str(self.path), "format": self.format, "size_bytes": self.size_bytes, "verification": checked}

    def lines(self) -> list[str]:
        """What the screen says."""
        written = f"{self.path}: {self.format}, {self.size_bytes / 1e6:,.1f} MB"
        return [written] if self.verification is None else [written, self.verification.message]


def export(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "compressed-tensors",
    verify: str | None = None,
    notice: Notice = lambda _text: None,
) -> Exported:
    """Write a finished lowbit directory in another format, from its stored codes; nothing is rounded or fitted again.

    `verify` names a client (transformers) that reloads the result; its numbers are compared with lowbit's.
    """
    from .evaluation.size import size_on_disk
    from .formats.base import find
    from .graph import build_skeleton
    from .runtime.load import is_native, plain_config

    path, target = Path(source), Path(output)
    form = find(format)
    if not is_native(path):
        raise ValueError(f"{path} is no directory that `lowbit quantize` made: quantize a model first")
    if verify not in (None, "transformers"):
        raise ValueError(f"lowbit cannot verify with {verify}: use --verify transformers")
    for text in form.export_directory(path, target, build_skeleton(plain_config(path)), checkpoint_names(path)):
        notice(text)
    return Exported(target, format, size_on_disk(target), None if verify is None else _verify(path, target))


VERIFIED_WINDOWS, VERIFIED_LENGTH = 4, 128
"""Text on which an export is compared with lowbit's own model."""


def _verify(source: Path, target: Path) -> Verification:
    import torch

    from .data.evaluation import load_windows
    from .data.text import resolve_window
    from .runtime.load import load, load_tokenizer
    from .runtime.verify import verify_transformers

    model = load(source, dtype=torch.float32)
    length, _ = resolve_window(None, VERIFIED_LENGTH, context_of(model.config))
    windows = load_windows("demo", load_tokenizer(source), length, VERIFIED_WINDOWS)
    return verify_transformers(target, model, windows)


def checkpoint_names(path: Path) -> Callable[[str], Sequence[tuple[str, slice]]]:
    """The names that a run directory's parameters had in the checkpoint it was made from, with their rows."""
    import json

    from .stream.run import NAMES

    recorded = json.loads((path / NAMES).read_text(encoding="utf8"))

    def names(name: str) -> Sequence[tuple[str, slice]]:
        found, start = [], 0
        for original, rows, transposed in recorded.get(name, ()):
            if transposed:
                raise ValueError(
                    f"the checkpoint keeps {name} transposed, which only native can write back: use native"
                )
            found.append((original, slice(start, start + rows)))
            start += rows
        return found or ((name, slice(None)),)

    return names


def generate(
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Continue `prompt` with any model that lowbit loads; temperature 0 takes the likeliest token each time."""
    import torch

    from .data.text import tokenize_documents
    from .modules.attention import attached
    from .runtime.cache import quantized_cache
    from .runtime.load import load, load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    place = _device(device)
    loaded = load(model, device=place, trust_remote_code=trust_remote_code)
    ids = tokenize_documents([prompt], tokenizer)[None].to(place)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    cache = {"past_key_values": quantized_cache(loaded)} if attached(loaded) else {}
    output = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=pad, **sampling, **cache
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _as_decoded(model: PreTrainedModel) -> None:
    """Let a KIVI model be measured as it decodes: prefill attends to exact keys and values, which hides the cost."""
    from .modules.attend import decode_kivi
    from .modules.attention import attached

    for path, layer in attached(model).items():
        if layer.kv.layout == "channel":
            decode_kivi(model.get_submodule(path))


def _count_bits(report: EvaluationReport, model: str | Path, trust_remote_code: bool) -> None:
    from .evaluation.size import size_on_disk
    from .formats.native import sizes
    from .formats.source import locate
    from .runtime.load import is_native

    path = locate(model, trust_remote_code=trust_remote_code)
    report.size_bytes = size_on_disk(path)
    size = sizes(path)
    if is_native(path):
        report.bits_per_weight = 8 * size.stored_bytes / max(1, size.quantized_weights)
        report.bits_per_parameter = 8 * size.file_bytes / size.parameters


def context_of(config: Any) -> int | None:
    """How many tokens the model can attend to; None where its configuration states no limit."""
    stated = [getattr(config, name, None) for name in CONTEXT_FIELDS]
    return next((value for value in stated if isinstance(value, int)), None)


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def _device(name: str) -> torch.device:
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


def _target(name: str | None, recipe: Recipe) -> Refuse | None:
    """What the export format asked for objects to, as the plan asks it; of the whole model, at once."""
    from .formats.base import find

    if name is None:
        return None
    form = find(name)
    reason = form.refuse_whole(cached=recipe.scheme.kv is not None, corrected=bool(recipe.correct))
    if reason is not None:
        raise ValueError(reason)
    return lambda weights, inputs, site, ordered, mapped: form.refuse(
        weights, inputs, transposed=site.transposed, ordered=ordered, mapped=mapped
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
    size, place = checkpoint.nbytes(checkpoint.names()), _device(request.device)
    free = _free_memory() if request.memory is None else request.memory
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


def _free_memory() -> int:
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def _hidden_budget(memory: int | None, plan: Plan) -> int:
    """Bytes of hidden states that may stay in memory."""
    if memory is None:
        return _free_memory() // 2
    return max(0, memory - (plan.peak_bytes - plan.hidden_bytes))


def _write_config(source: Path, output: Path, untied: bool) -> None:
    """config.json with lowbit's mark, and other files as they are; `untied` says that the head is its own."""
    from .formats.base import copy_companions, read_config
    from .formats.files import write_json
    from .formats.native import VERSION

    mark = {"quant_method": "lowbit", "version": VERSION}
    copy_companions(source, output)
    head = {"tie_word_embeddings": False} if untied else {}
    write_json(output / "config.json", {**read_config(source), **head, "quantization_config": mark})
