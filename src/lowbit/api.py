"""What lowbit does, as four functions: quantize, load, evaluate, export. The command line adds only a screen to them.

Everything heavy is imported inside, so that `lowbit --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prepare import context_of, device_of, shared
from .prepare import prepare as prepare
from .request import Notice, Request

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation.report import EvaluationReport
    from .formats.base import Format
    from .methods.recipe import Recipe
    from .runtime.verify import Verification
    from .stream.allocate import Allocation
    from .stream.run import RunDirectory


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
    paper_bits: float | None = None
    """Bits per quantized weight as papers count them; None of models that other tools quantized."""
    allocation: Allocation | None = None
    """The widths that a budget was spent on."""

    def to_json(self) -> dict[str, Any]:
        """The JSON of `lowbit quantize --json`."""
        data = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("path", "allocation")}
        spent = {} if self.allocation is None else {"allocation": self.allocation.to_json()}
        return {**data, **spent}


def quantize(model: str | Path, recipe: str | Path | Recipe, output: str | Path, **options: Any) -> Quantized:
    """Quantize `model` (directory, hub id or `demo`) by a recipe (name, YAML file or `Recipe`) into a directory.

    Options are the other fields of `Request`. A directory that an interrupted run left behind is gone on with; a
    finished one is left unchanged. With `gpus` above 1, the processes that are started import the calling script again,
    which keeps work of its own behind `if __name__ == "__main__"`. Raises ValueError, in one sentence, for a request
    that cannot be met.
    """
    return run(Request(str(model), str(recipe) if isinstance(recipe, Path) else recipe, str(output), **options))


def run(request: Request) -> Quantized:
    """Carry a request out, from wherever an earlier run of it was interrupted, on one GPU or several."""
    from .launch import carry_out, launch
    from .stream.lanes import connect, launched

    if request.output is None:
        raise ValueError("where to? name a directory with --output")
    lanes, world = shared(request)
    if world > launched():
        return launch(run, request, world)
    directory, prepared = carry_out(request, connect(lanes, device_of(request.device)))
    return _result(directory, prepared.plan.paper_bits, prepared.allocation)


def _result(
    directory: RunDirectory, paper_bits: float | None = None, allocation: Allocation | None = None
) -> Quantized:
    """What a finished directory's files and journal say."""
    from .formats.native import sizes

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
        paper_bits,
        allocation,
    )


def load(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load any model to run it: a lowbit directory, or whatever transformers loads. See `runtime.load.load`."""
    from .runtime.load import load as load_model

    return load_model(source, **options)


def import_model(
    source: str | Path, output: str | Path, *, trust_remote_code: bool = False, notice: Notice = lambda _text: None
) -> Quantized:
    """Write a model that another tool quantized as a finished lowbit directory; its codes stay as they are.

    `source` is a directory of a format that lowbit reads, or a .gguf file. Like a run, it goes on where it was
    interrupted. Raises ValueError, in one sentence, for what no reader of lowbit's knows.
    """
    from .importing import import_into

    return _result(import_into(source, Path(output), trust_remote_code=trust_remote_code, notice=notice))


def evaluate(
    model: str | Path,
    *,
    perplexity: Sequence[str] = (),
    window: int | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    tasks_data: str | Path | None = None,
    against: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    notice: Notice = lambda _text: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> EvaluationReport:
    """Measure a model in fp32: perplexity on texts, tasks, divergence from another model, and its honest size.

    `perplexity` names texts (`demo`, a published set, a file); without any, and without tasks, the packaged text is
    used. `tasks_data` is a directory of local files that tasks take their documents from, by default all that it holds.
    `against` is the original to compare with, over the same windows. `progress` gets (text, done, total).
    """
    import torch

    from .data.evaluation import load_windows
    from .data.text import check_tokenizer, resolve_window
    from .evaluation.divergence import Divergence, divergence_over
    from .evaluation.report import EvaluationReport
    from .evaluation.tasks import run_tasks
    from .evaluation.text import evaluate_text
    from .runtime.load import load, load_tokenizer

    asked = bool(tasks) or tasks_data is not None
    texts = list(perplexity) or ([] if asked else ["demo"])
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    place = device_of(device)
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
    if asked:
        data = None if tasks_data is None else Path(tasks_data)
        report.tasks = run_tasks(loaded, tokenizer, tasks, limit, data=data)
    _count_bits(report, model, loaded, trust_remote_code)
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
    names: str = "checkpoint",
    verify: str | None = None,
    notice: Notice = lambda _text: None,
) -> Exported:
    """Write a finished lowbit directory in another format, from its stored codes; nothing is rounded or fitted again.

    `names` are those of the checkpoint that the model came from, or of "transformers"' own tree of modules, by which
    GPTQModel looks up what transformers merges on load: the experts of a Mixtral. `verify` names a client that reloads
    the result ("": the format's first); its numbers are compared with lowbit's.
    """
    from .evaluation.size import size_on_disk
    from .formats.base import by_modules, check_names, check_terms, find
    from .graph import build_skeleton
    from .runtime.clients import find_client
    from .runtime.load import is_native, plain_config

    path, target = Path(source), Path(output)
    form = find(format)
    if not is_native(path):
        raise ValueError(
            f"{path} is no directory of lowbit's own: quantize a model first, or `lowbit import` a quantized one"
        )
    check_terms(format, form, path)
    check_names(names, form)
    client = None if verify is None else find_client(verify or form.CLIENTS[0]).name
    named = checkpoint_names(path) if names == "checkpoint" else by_modules(checkpoint_names(path))
    for text in form.export_directory(path, target, build_skeleton(plain_config(path)), named):
        notice(text)
    verified = None if client is None else _verify(path, target, form, client)
    return Exported(target, format, size_on_disk(target), verified)


VERIFIED_WINDOWS, VERIFIED_LENGTH = 4, 128
"""Text on which an export is compared with lowbit's own model."""


def _verify(source: Path, target: Path, form: Format, client: str) -> Verification:
    import torch

    from .data.evaluation import load_windows
    from .data.text import resolve_window
    from .runtime.load import load, load_tokenizer
    from .runtime.planned import planned
    from .runtime.verify import verify

    model = load(source, dtype=torch.float32)
    length, _ = resolve_window(None, VERIFIED_LENGTH, context_of(model.config))
    windows = load_windows("demo", load_tokenizer(source), length, VERIFIED_WINDOWS)
    return verify(client, target, model, windows, planned=planned(source, form))


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
    compiled: bool = False,
    trust_remote_code: bool = False,
    notice: Notice = lambda _text: None,
) -> str:
    """Continue `prompt` with any model that lowbit loads; temperature 0 takes the likeliest token each time.

    On a GPU, `compiled` takes a minute before the first token and makes the following ones faster; `notice` hears
    which linears do not compute on codes there, and why.
    """
    import torch

    from .data.text import tokenize_documents
    from .runtime.decode import Decoder, decodable, end_tokens
    from .runtime.fast import slow
    from .runtime.load import load, load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    place = device_of(device)
    loaded = load(model, device=place, trust_remote_code=trust_remote_code)
    ids = tokenize_documents([prompt], tokenizer)[None].to(place)
    torch.manual_seed(seed)
    for reason, count in slow(loaded).items():
        notice(f"{count} linears compute on dense copies, since {reason}")
    if place.type == "cuda" and decodable(loaded):
        decoder = Decoder(loaded, ids.shape[1] + tokens, temperature=temperature, compiled=compiled)
        output = decoder(ids, tokens, end_tokens(loaded))
    else:
        output = _by_transformers(loaded, tokenizer, ids, tokens, temperature)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _by_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, tokens: int, temperature: float
) -> Tensor:
    """The prompt [1, T] and what transformers' `generate` adds to it; keys and values in codes where they have any."""
    import torch

    from .modules.attention import as_cache, attached
    from .runtime.cache import quantized_cache

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    cache = as_cache(model, quantized_cache(model)) if attached(model) else {}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **sampling, **cache)


def _as_decoded(model: PreTrainedModel) -> None:
    """Let a KIVI model be measured as it decodes: prefill attends to exact keys and values, which hides the cost."""
    from .modules.attend import decode_kivi
    from .modules.attention import attached

    for path, layer in attached(model).items():
        if layer.kv.layout == "channel":
            decode_kivi(model.get_submodule(path))


def _count_bits(report: EvaluationReport, source: str | Path, model: PreTrainedModel, trust: bool) -> None:
    from .evaluation.size import bits_per_parameter, bits_per_weight, parameters_of, size_on_disk, stored_for
    from .formats.native import sizes
    from .runtime.load import find_model, is_native

    path = find_model(source, trust_remote_code=trust)
    report.size_bytes = size_on_disk(path)
    stored, weights, parameters = *stored_for(model), parameters_of(model)
    if is_native(path):
        size = sizes(path)
        stored, weights, parameters = size.stored_bytes, max(1, size.quantized_weights), size.parameters
    if weights:
        report.bits_per_weight = bits_per_weight(stored, weights)
        report.bits_per_parameter = bits_per_parameter(report.size_bytes, parameters)
