"""The demo model and texts in the package: what the card says is what is there, judged by transformers alone.

The script that made them needs a GPU and a corpus, so here only its parts run that decide what was trained and cut.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(str(resources.files("lowbit"))) / "assets"
DEMO = ASSETS / "demo"
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_demo_model.py"
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def documents(name: str) -> list[str]:
    text = (ASSETS / "text" / f"{name}.txt").read_text(encoding="utf-8")
    assert text.endswith(f"\n{SEPARATOR}\n")
    return text.removesuffix(f"\n{SEPARATOR}\n").split(f"\n{SEPARATOR}\n")


def windows(name: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[N, 512]: each document behind its own BOS, all in one row, cut."""
    ids = [0]
    for document in documents(name):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + [0]
    return torch.tensor(ids[: (len(ids) - 1) // 512 * 512]).view(-1, 512)


def test_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) <= 14_000_000


def test_shape_is_what_the_methods_need_to_be_shown() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    intermediate = config["intermediate_size"]
    assert config["model_type"] == "llama"
    assert config["hidden_size"] == 256
    assert config["vocab_size"] == 4096
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert intermediate % 128 == 0
    assert intermediate & (intermediate - 1) != 0
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"


def test_weights_are_bf16_tied_and_all_trained() -> None:
    loaded = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    parameters = dict(loaded.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert 5_500_000 < sum(p.numel() for p in parameters.values()) < 6_500_000
    for name, weight in parameters.items():
        assert weight.isfinite().all(), name
        assert (weight.reshape(weight.shape[0], -1).abs().amax(-1) > 0).all(), f"{name}: a row is zero"


def test_tokenizer_covers_any_text_with_one_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 4096
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer(SEPARATOR)["input_ids"] == [0]
    assert tokenizer("Hello")["input_ids"][0] != 0, "BOS is added by whoever cuts windows, not by the tokenizer"
    text = "naïve “quotes”, 漢字 🎉\n\ttabs  and spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_texts_are_prose_for_at_least_128_windows(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert windows(name, tokenizer).shape[0] >= 128
    for document in documents(name):
        assert len(document) > 20_000
        assert not re.search(r"Gutenberg|Transcriber|Produced by|https?:|\[Illustration", document)


def test_texts_share_nothing() -> None:
    calibration, evaluation = (" ".join(" ".join(documents(name)).split()) for name in ("calibration", "evaluation"))
    snippets = [evaluation[start : start + 40] for start in range(0, len(evaluation) - 40, 40)]
    assert not [snippet for snippet in snippets if snippet in calibration]


def test_perplexity_shows_a_trained_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Windows from all three books; the card has the figure for all windows, and training.json the run behind it."""
    found = windows("evaluation", tokenizer)
    chosen = found[10::40]
    with torch.no_grad():
        logits = model(input_ids=chosen).logits[:, :-1]
    perplexity = F.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten()).exp().item()
    assert perplexity < 28

    card = (DEMO / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"Perplexity (\S+) on `text/evaluation.txt`: fp32, (\d+) windows of 512 tokens", card)
    facts = json.loads((DEMO / "training.json").read_text())
    assert stated is not None
    assert int(stated[2]) == found.shape[0]
    assert float(stated[1]) < 28
    assert f"{facts['tokens']:,} tokens" in card
    assert facts["tokens"] >= 300_000_000
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_card_names_every_excerpt_and_licence(script: ModuleType) -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA" in card and "public\ndomain" in card and "Apache-2.0" in card
    for name, excerpts in script.TEXTS.items():
        for excerpt, document in zip(excerpts, documents(name), strict=True):
            assert excerpt.title in card and excerpt.author in card
            assert document.startswith(excerpt.opening)
            assert 0.9 * excerpt.kilobytes < len(document.encode()) / 1000 <= excerpt.kilobytes


def test_script_trains_this_model(script: ModuleType, model: PreTrainedModel) -> None:
    made = script.demo_config()
    for key in json.loads((DEMO / "config.json").read_text()).keys() - {
        "architectures",
        "dtype",
        "transformers_version",
    }:
        assert getattr(made, key) == getattr(model.config, key), key


def test_training_loss_is_that_of_transformers(script: ModuleType) -> None:
    fresh = script.make_model(torch.device("cpu"))
    rows = torch.randint(4096, (2, 40))
    loss = script.training_loss(fresh, rows)
    fresh.set_attn_implementation("eager")
    logits = fresh(input_ids=rows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert fresh.model.embed_tokens.weight.grad[0].abs().sum() > 0


def test_batches_visit_each_window_once_an_epoch(script: ModuleType) -> None:
    tokens = torch.arange(10 * 512)
    epoch = list(itertools.islice(script.batches(tokens, 4, torch.Generator().manual_seed(0)), 2))
    rows = torch.cat(epoch)
    assert rows.shape == (8, 513)
    assert torch.equal(rows - rows[:, :1], torch.arange(513).expand(8, 513))
    starts = rows[:, 0].sort().values
    assert torch.equal(starts.diff(), torch.full((7,), 512))


def test_cut_takes_whole_paragraphs_of_prose(script: ModuleType) -> None:
    body = "\n\n".join(["It was " + "a" * 400, "[Illustration: a ship]", " * * *", "b" * 400, "c" * 400])
    book = f"Produced by volunteers\n\nA TITLE\n\n{body}\n\nEnd of the Project Gutenberg EBook"
    assert script.cut(script.Excerpt(1, "", "", "It was"), ["another", book]) == f"It was {'a' * 400}\n\n{'b' * 400}"
    with pytest.raises(ValueError, match="2 books"):
        script.cut(script.Excerpt(1, "", "A Title", "It was"), [book, book])


def test_text_seen_in_training_is_refused(script: ModuleType) -> None:
    seen = "".join(chr(97 + i * i % 26) for i in range(3000))
    script.check_unseen("other words " * 300, [seen])
    with pytest.raises(ValueError, match="corpus holds"):
        script.check_unseen("x" * 2000 + seen, ["", seen])


def test_rate_rises_then_falls_to_zero(script: ModuleType) -> None:
    rates = [script.learning_rate(step, 5000) for step in range(5001)]
    peak = rates.index(max(rates))
    assert (peak, rates[peak]) == (script.WARMUP_STEPS - 1, script.PEAK_RATE)
    assert all(a <= b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[peak:]))
    assert rates[-1] == 0
