"""Make lowbit's demo model and its texts from a text corpus: tokenizer, texts, training, model card.

The package ships a real trained model so that every command can be tried, and every method's cost seen, without a
download. It has to be small (a wheel carries it) yet behave like its big relatives under quantization, which asks for
far more tokens per weight than is usual for the size: a model that was hardly trained loses nothing at 4 bits and so
shows nothing. One GPU reaches that in minutes, so this is one plain file: no trainer class, no data loader (the tokens
lie on the GPU), no resume.

    python scripts/train_demo_model.py --corpus train.txt.xz --books held-out-books.txt --minutes 8

Four steps run in this order unless named one by one: `tokenizer` and `texts` (CPU, a minute or two), `train` (made for
a CUDA device), `card` (either). Each reads what the earlier ones left in the output directory, so that `train` alone
can run on another machine.

Tokenizer and texts come out the same on every run. Training is seeded, but neither GPU arithmetic nor a length measured
in minutes repeats to the bit; `--tokens` fixes the length where the minutes allow it.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lowbit.data.evaluation import load_windows
from lowbit.data.text import SEPARATOR, split_documents
from lowbit.evaluation.text import perplexity

BOS = 0
VOCABULARY = 4096
CONTEXT = 1024
WINDOW = 512

PEAK_RATE = 5e-3
WARMUP_STEPS = 500
WEIGHT_DECAY = 0.2
TIMED_STEPS = range(30, 80)

NOT_PROSE = re.compile(r"^\s*\[(Illustration|Footnote|Transcriber)|Gutenberg|^\s*\*[ *]*$")


@dataclass(frozen=True)
class Excerpt:
    """A stretch of one book: from `opening`, whole paragraphs, at most `kilobytes` thousand bytes."""

    kilobytes: int
    author: str
    title: str
    opening: str


TEXTS = {
    "calibration": (
        Excerpt(100, "Frances Hodgson Burnett", "The Dawn of a To-morrow", "There are always two ways of looking"),
        Excerpt(
            40, "Miguel de Cervantes", "Don Quixote II, translated by John Ormsby", "When Don Quixote saw himself in"
        ),
        Excerpt(140, "Alexandre Dumas", "The Companions of Jehu", "We do not know if the prologue we are going"),
    ),
    "evaluation": (
        Excerpt(
            170, "Dorothy Whitehill", "Polly's First Year at Boarding School", "CHAPTER I—THE FIRST DAY OF SCHOOL\n"
        ),
        Excerpt(40, "George Gilfillan", "The Genius and Poetry of Pope", "Few poets during their lifetime"),
        Excerpt(60, "William Shakespeare", "Pericles, Prince of Tyre", "To sing a song that old was sung"),
    ),
}


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, plain or .xz, in order."""
    raw = path.read_bytes()
    return split_documents(lzma.decompress(raw) if path.suffix == ".xz" else raw, str(path))


def make_tokenizer(corpus: list[str], directory: Path) -> None:
    """Byte-level BPE, learnt on every fourth document; `<|endoftext|>` is id 0 and serves as BOS, EOS and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus[::4], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=CONTEXT,
    )
    fast.save_pretrained(directory)


def encode(documents: list[str], tokenizer: Tokenizer, batch: int = 256) -> numpy.ndarray:
    """All documents as one uint16 array of tokens, each with BOS in front. Encoded on every core."""
    pieces = []
    for start in range(0, len(documents), batch):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + batch], add_special_tokens=False):
            pieces.append(numpy.array([BOS, *encoding.ids], dtype=numpy.uint16))
    return numpy.concatenate(pieces)


def cut(excerpt: Excerpt, books: list[str]) -> str:
    """The excerpt's paragraphs, without illustrations, notes of the transcribers and Gutenberg's own lines.

    Raises ValueError if not exactly one book holds the opening words.
    """
    holders = [book for book in books if excerpt.opening in book]
    if len(holders) != 1:
        raise ValueError(
            f"{len(holders)} books hold the opening words of {excerpt.title!r}; pass the file that has it."
        )
    _, opening, rest = holders[0].partition(excerpt.opening)
    kept, size = [], 0
    for paragraph in (opening + rest).split("\n\n"):
        if NOT_PROSE.search(paragraph):
            continue
        size += len(paragraph.encode()) + 2
        if size > 1000 * excerpt.kilobytes:
            break
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def check_unseen(text: str, corpus: list[str], stride: int = 2000, length: int = 80) -> None:
    """Raise ValueError if a snippet of `length` characters, one every `stride`, occurs in the training corpus."""
    everything = "\n".join(corpus)
    for start in range(0, len(text) - length, stride):
        snippet = text[start : start + length]
        if snippet in everything:
            raise ValueError(f"The corpus holds {snippet!r}; choose books that it does not hold.")


def make_texts(corpus: list[str], books: list[str], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, excerpts in TEXTS.items():
        documents = [cut(excerpt, books) for excerpt in excerpts]
        for document in documents:
            check_unseen(document, corpus)
        text = f"\n{SEPARATOR}\n".join(documents) + f"\n{SEPARATOR}\n"
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text.encode())} bytes", flush=True)


def demo_config() -> LlamaConfig:
    """Grouped-query attention, tied head, and an intermediate size that divides by 128 but is no power of two."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=BOS,
        attn_implementation="causal",
    )


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention for whole windows: registered under a name of its own, it gets no mask and keeps the fast kernel."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


def training_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean loss over the WINDOW predicted tokens of each row of `windows` [rows, WINDOW + 1]."""
    hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), windows[:, 1:].flatten())


def batches(tokens: torch.Tensor, rows: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches [rows, WINDOW + 1]; each epoch shifts where windows begin and visits them in a new order."""
    span = torch.arange(WINDOW + 1, device=tokens.device)
    count = (len(tokens) - 1) // WINDOW - 1
    while True:
        shift = int(torch.randint(WINDOW, (1,), generator=generator))
        order = torch.randperm(count, generator=generator)
        for chosen in order[: count - count % rows].split(rows):
            starts = (shift + chosen * WINDOW).to(tokens.device)
            yield tokens[starts[:, None] + span].long()


def learning_rate(step: int, steps: int | None) -> float:
    """Warm-up, then straight down to zero at the last step; `steps` is None while throughput is being measured."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_RATE * (warm if steps is None else min(warm, (steps - step) / max(1, steps - WARMUP_STEPS)))


def make_optimizer(model: LlamaForCausalLM, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=device.type == "cuda")


def make_model(device: torch.device) -> LlamaForCausalLM:
    """A fresh fp32 model. Padding shares BOS's id, so the embedding must not freeze that row as padding."""
    AttentionInterface.register("causal", causal_attention)
    torch.manual_seed(0)
    model = LlamaForCausalLM(demo_config()).to(device)
    model.model.embed_tokens.padding_idx = None
    return model


def fit(model: LlamaForCausalLM, tokens: torch.Tensor, rows: int, budget: int, seconds: float) -> dict[str, float]:
    """Train for `budget` tokens or for what fits into `seconds`, whichever is less; returns the run's figures."""
    device = tokens.device
    optimizer = make_optimizer(model, device)
    loss_of = torch.compile(training_loss) if device.type == "cuda" else training_loss
    stream = batches(tokens, rows, torch.Generator().manual_seed(0))
    begin, mark, steps, step, losses = time.monotonic(), 0.0, None, 0, []
    cap = max(1, budget // (rows * WINDOW))
    while step < (cap if steps is None else steps) and time.monotonic() - begin < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        if step == TIMED_STEPS.start:
            losses[-1].item()  # waits for the device, as the clock does not
            mark = time.monotonic()
        elif step == TIMED_STEPS.stop:
            losses[-1].item()
            pace = (time.monotonic() - mark) / len(TIMED_STEPS)
            steps = min(cap, step + int(0.97 * (seconds - (time.monotonic() - begin)) / pace))
            print(f"{rows * WINDOW / pace:,.0f} tokens/s: {steps} steps", flush=True)
        if step % 100 == 0:
            check_and_report(step, steps, losses, time.monotonic() - begin)
    final = torch.stack(losses[-200:]).mean().item()
    return {"tokens": step * rows * WINDOW, "steps": step, "loss": final, "seconds": time.monotonic() - begin}


def check_and_report(step: int, steps: int | None, losses: list[torch.Tensor], elapsed: float) -> None:
    loss = torch.stack(losses[-100:]).mean().item()
    if math.isnan(loss):
        raise ValueError(f"The loss became NaN before step {step}; lower PEAK_RATE.")
    print(f"step {step} of {steps}, {elapsed:.0f} s, loss {loss:.4f}", flush=True)


def train(corpus: list[str], directory: Path, rows: int, budget: int, minutes: float) -> None:
    """Train, then write the model in bf16 and the run's figures beside the tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = encode(corpus, Tokenizer.from_file(str(directory / "tokenizer.json")))
    print(f"corpus: {len(data)} tokens", flush=True)
    model = make_model(device)
    tokens = torch.from_numpy(data.astype(numpy.int32)).to(device)
    figures = fit(model, tokens, rows, budget, 60 * minutes)
    model.to(torch.bfloat16).save_pretrained(directory)
    GenerationConfig(bos_token_id=BOS, eos_token_id=BOS, pad_token_id=BOS).save_pretrained(directory)
    facts = {"parameters": model.num_parameters(), "corpus_tokens": len(data), **figures}
    (directory / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


CARD = """\
---
license: apache-2.0
language: en
tags: [demonstration]
---
# lowbit's demo model

A demonstration model: a small Llama that ships with lowbit so that quantization can be tried and measured without a
download. It writes plausible English and knows nothing; do not use it for anything else.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {parameters:,} parameters, {config.num_hidden_layers} blocks |
| widths | hidden {config.hidden_size}, intermediate {config.intermediate_size} |
| query heads | {config.num_attention_heads} of width {config.head_dim} |
| key-value heads | {config.num_key_value_heads} (grouped-query attention) |
| head | tied to the embedding |
| vocabulary | {config.vocab_size}, byte-level BPE; `<|endoftext|>` (id 0) is BOS, EOS and padding |
| context | {config.max_position_embeddings}; trained on windows of {window} |
| weights | bf16 |

## Training
{tokens:,} tokens ({steps:,} steps; {epochs:.1f} passes over {corpus_tokens:,} tokens of English), AdamW, bf16 autocast,
{seconds:.0f} seconds on one GPU with `scripts/train_demo_model.py`. Mean loss of the last 200 steps: {loss:.4f} nats a
token (perplexity {training_perplexity:.2f}).

Data: 125 MB of English Wikipedia articles of 2019, whose text their authors license under
[CC BY-SA](https://creativecommons.org/licenses/by-sa/3.0/), and 45 MB of books of Project Gutenberg, in the public
domain in the United States. The corpus itself is not part of the package.

## Evaluation
Perplexity {perplexity:.4f} on `text/evaluation.txt`: fp32, {windows} windows of {window} tokens that do not overlap,
BOS in front of each document.

## The texts beside it
Books of Project Gutenberg, in the public domain in the United States, none of them in the training data:
{texts}

## Licence
The weights and the tokenizer are released under Apache-2.0, as lowbit is.
"""


def write_card(output: Path) -> None:
    directory = output / "demo"
    facts = json.loads((directory / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    windows = load_windows(str(output / "text" / "evaluation.txt"), AutoTokenizer.from_pretrained(directory), WINDOW)
    score = perplexity(model, windows)
    texts = "\n".join(
        f"- `text/{name}.txt`: excerpts of " + "; ".join(f"_{e.title}_ ({e.author})" for e in excerpts)
        for name, excerpts in TEXTS.items()
    )
    card = CARD.format(
        **facts,
        config=model.config,
        window=WINDOW,
        epochs=facts["tokens"] / facts["corpus_tokens"],
        training_perplexity=math.exp(facts["loss"]),
        perplexity=score.perplexity,
        windows=score.windows,
        texts=texts,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"perplexity {score.perplexity:.4f} over {score.windows} windows", flush=True)


def main() -> None:
    steps = ("tokenizer", "texts", "train", "card")
    parser = argparse.ArgumentParser(description="Make lowbit's demo model and its texts.")
    parser.add_argument(
        "steps", nargs="*", default=steps, metavar="step", help=f"any of {', '.join(steps)}; all if none"
    )
    parser.add_argument("--corpus", type=Path, help="training text, plain or .xz")
    parser.add_argument("--books", type=Path, help="books that are not in the corpus, for the texts")
    parser.add_argument("--output", type=Path, default=Path("src/lowbit/assets"))
    parser.add_argument("--tokens", type=int, default=2_000_000_000, help="train on at most so many tokens")
    parser.add_argument("--minutes", type=float, default=8.0, help="train for at most so long")
    parser.add_argument("--rows", type=int, default=256, help=f"windows of {WINDOW} tokens in a batch")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(steps):
        parser.error(f"no step is called {', '.join(sorted(unknown))}; the steps are {', '.join(steps)}")
    if args.corpus is None and set(args.steps) != {"card"}:
        parser.error("every step but card reads the training text: name it with --corpus")
    if args.books is None and "texts" in args.steps:
        parser.error("the step texts cuts its excerpts from books outside the corpus: name them with --books")
    corpus = read_documents(args.corpus) if args.corpus else []
    if "tokenizer" in args.steps:
        make_tokenizer(corpus, args.output / "demo")
    if "texts" in args.steps:
        make_texts(corpus, read_documents(args.books), args.output / "text")
    if "train" in args.steps:
        train(corpus, args.output / "demo", args.rows, args.tokens, args.minutes)
    if "card" in args.steps:
        write_card(args.output)


if __name__ == "__main__":
    main()
