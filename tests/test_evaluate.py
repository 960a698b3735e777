"""Perplexity and divergence against formulas written out by hand in float64, and the report's shape."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.data.evaluation import load_windows
from lowbit.data.text import windows as cut
from lowbit.evaluation import text
from lowbit.evaluation.divergence import divergence_over
from lowbit.evaluation.report import EvaluationReport
from lowbit.evaluation.size import bits_per_parameter, bits_per_weight, size_on_disk
from lowbit.evaluation.tasks import read_results, run_tasks
from lowbit.evaluation.text import batch_size, divergence, evaluate_text, perplexity

VOCABULARY = 37


class Bigram(nn.Module):
    """A model whose logits are one row of a table per token: what it predicts can be said by hand."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def tiny_llama(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).float()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_llama(1)


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return tiny_llama(2)


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(0, VOCABULARY, (5, 24))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 7 rows, so that every test crosses their borders."""
    monkeypatch.setattr(text, "PIECE_ELEMENTS", {"cpu": 7 * VOCABULARY + 5})


def log_probabilities(model: nn.Module, row: Tensor) -> Tensor:
    """Of one window's L - 1 predictions, in float64: [L - 1, V]."""
    with torch.no_grad():
        logits = model.eval()(input_ids=row[None], use_cache=False).logits[0, :-1].double()
    return logits - logits.exp().sum(-1, keepdim=True).log()


def test_a_uniform_model_has_the_vocabulary_as_perplexity(rows: Tensor) -> None:
    found = perplexity(Bigram(torch.full((VOCABULARY, VOCABULARY), 3.25)), rows)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert (found.windows, found.window, found.tokens) == (5, 24, 5 * 23)


def test_perplexity_is_exp_of_minus_the_mean_log_probability(llama: nn.Module, rows: Tensor) -> None:
    total = 0.0
    for row in rows:
        predicted = log_probabilities(llama, row)
        total += sum(float(predicted[t, row[t + 1]]) for t in range(23)) / 23
    assert perplexity(llama, rows).perplexity == pytest.approx(math.exp(-total / 5), rel=1e-5)


def test_perplexity_is_the_harmless_way_of_the_reference_code(llama: nn.Module, rows: Tensor) -> None:
    """transformers' own loss of each window, times L, over n * L: the published evaluation loop."""
    llama.eval()
    with torch.no_grad():
        losses = [llama(input_ids=row[None], labels=row[None]).loss * 24 for row in rows]
    expected = torch.exp(torch.stack(losses).sum() / (5 * 24))
    assert perplexity(llama, rows).perplexity == pytest.approx(float(expected), rel=1e-5)


def test_the_batch_changes_nothing(llama: nn.Module, other: nn.Module, rows: Tensor) -> None:
    alone = evaluate_text(llama, rows, other, batch=1)
    for batch in (2, 3, 5, None):
        found = evaluate_text(llama, rows, other, batch=batch)
        assert found.perplexity.perplexity == pytest.approx(alone.perplexity.perplexity, rel=1e-4)
        assert found.original is not None and alone.original is not None
        assert found.original.perplexity == pytest.approx(alone.original.perplexity, rel=1e-4)
        assert found.divergence is not None and alone.divergence is not None
        assert found.divergence.kl == pytest.approx(alone.divergence.kl, rel=1e-4)
        assert found.divergence.cosine == pytest.approx(alone.divergence.cosine, rel=1e-4)
        assert found.divergence.top1 == alone.divergence.top1


def test_less_than_a_window_more_changes_nothing(llama: nn.Module) -> None:
    tokens = torch.randint(0, VOCABULARY, (2 * 24 + 23,))
    assert perplexity(llama, cut(tokens, 24)) == perplexity(llama, cut(tokens[:48], 24))


def test_half_precision_logits_are_scored_in_fp32(rows: Tensor) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY).bfloat16()
    low, high = perplexity(Bigram(table), rows), perplexity(Bigram(table.float()), rows)
    assert low == high


def test_divergence_is_the_formula(llama: nn.Module, other: nn.Module, rows: Tensor) -> None:
    kl, same, cosines = [], [], []
    for row in rows:
        q, p = log_probabilities(llama, row), log_probabilities(other, row)
        kl += [sum(float(p[t, v].exp() * (p[t, v] - q[t, v])) for v in range(VOCABULARY)) for t in range(23)]
        same += [int(p[t].argmax()) == int(q[t].argmax()) for t in range(23)]
        with torch.no_grad():
            x, y = (m(input_ids=row[None], use_cache=False).logits[0, :-1].double().flatten() for m in (llama, other))
        cosines.append(float(x @ y / (x.norm() * y.norm())))
    found = divergence(llama, other, rows)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert found.kl > 0.1
    assert 0 < sum(same) < len(same)
    assert found.top1 == pytest.approx(sum(same) / len(same), abs=1e-12)
    assert found.cosine == pytest.approx(sum(cosines) / 5, abs=1e-6)


def test_several_texts_are_one_text(llama: nn.Module, other: nn.Module, rows: Tensor) -> None:
    parts = [(divergence(llama, other, part), part.shape[0]) for part in (rows[:1], rows[1:])]
    merged, whole = divergence_over(parts), divergence(llama, other, rows)
    assert (merged.kl, merged.top1, merged.cosine) == pytest.approx((whole.kl, whole.top1, whole.cosine), rel=1e-6)


def test_kl_is_from_the_original_to_the_model() -> None:
    """Of two tokens the original gives 3/4 and 1/4, the model 1/2 each: KL is 3/4 ln 3/2 + 1/4 ln 1/2."""
    original = Bigram(torch.tensor([[math.log(3.0), 0.0]]).repeat(2, 1))
    model = Bigram(torch.zeros(2, 2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(model, original, torch.zeros(1, 4, dtype=torch.long)).kl == pytest.approx(expected, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(llama: nn.Module, rows: Tensor) -> None:
    found = divergence(llama, llama, rows)
    assert (found.kl, found.top1, found.cosine) == (0.0, 1.0, 1.0)


def test_near_models_have_no_negative_kl(rows: Tensor) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY)
    for i in range(20):
        assert divergence(Bigram(table + 1e-7 * i), Bigram(table), rows).kl >= 0


def test_tokens_ruled_out_by_the_original_do_not_spoil_kl(rows: Tensor) -> None:
    table = torch.randn(VOCABULARY + 3, VOCABULARY + 3)
    padded = table.clone()
    padded[:, -3:] = -math.inf
    expected = divergence(Bigram(table[:, :-3] * 2), Bigram(table[:, :-3]), rows).kl
    assert divergence(Bigram(padded * 2), Bigram(padded), rows).kl == pytest.approx(expected, rel=1e-6)


def test_broken_input_is_one_sentence(llama: nn.Module, rows: Tensor) -> None:
    broken = torch.zeros(VOCABULARY, VOCABULARY)
    broken[3, 3] = math.nan
    rows[2, 4] = 3
    with pytest.raises(ValueError, match="the model gives logits that are NaN or infinite"):
        perplexity(Bigram(broken), rows)
    with pytest.raises(ValueError, match="the original gives logits that are NaN or infinite"):
        divergence(llama, Bigram(broken), rows)
    with pytest.raises(ValueError, match="vocabularies of 37 and 40"):
        divergence(llama, Bigram(torch.zeros(40, 40)), rows)
    with pytest.raises(ValueError, match="token id 36, the model knows 30 tokens"):
        perplexity(Bigram(torch.zeros(30, 30)), rows.fill_(36))
    with pytest.raises(ValueError, match=r"windows of shape \[24\]"):
        perplexity(llama, rows[0])


def test_models_are_evaluated_in_eval_mode_and_put_back(rows: Tensor) -> None:
    class Dropping(Bigram):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(input_ids, use_cache)

    training, resting = Dropping(torch.randn(VOCABULARY, VOCABULARY)), Dropping(torch.randn(VOCABULARY, VOCABULARY))
    training.train()
    resting.eval()
    evaluate_text(training, rows, resting)
    assert training.training
    assert not resting.training


def test_progress_counts_windows(llama: nn.Module, rows: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(llama, rows, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_batches_fit_the_budget() -> None:
    rows = torch.zeros(300, 512, dtype=torch.long)
    cpu = torch.device("cpu")
    size = batch_size(cpu, rows, 8192)
    assert size > 1
    assert size * 512 * 8192 * 4 <= text.LOGITS_BYTES["cpu"]
    assert batch_size(cpu, rows, 1_000_000) == 1
    assert batch_size(cpu, rows[:3], 50) == 3


# --- sizes, tasks, report


def test_sizes(tmp_path: Path) -> None:
    for name, size in {"a.safetensors": 700, "b.safetensors": 300, "config.json": 50, "tokenizer.json": 4000}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert size_on_disk(tmp_path) == 1000
    assert bits_per_weight(stored_bytes=528, weights=1024) == 4.125
    assert bits_per_parameter(file_bytes=1000, parameters=500) == 16


def test_harness_results_are_reshaped() -> None:
    results: dict[str, dict[str, Any]] = {
        "piqa": {"alias": "piqa", "acc,none": 0.75, "acc_stderr,none": 0.01, "sample_len": 8},
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
    }
    assert read_results(results) == {
        "piqa": {"acc": {"value": 0.75, "stderr": 0.01}},
        "gsm8k": {"exact_match,strict-match": {"value": 0.5, "stderr": None}},
    }


def test_missing_harness_is_one_sentence(monkeypatch: pytest.MonkeyPatch, llama: nn.Module) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[tasks\]'"):
        run_tasks(llama, None, ["piqa"])  # type: ignore[arg-type]


def test_report_is_the_documented_json(llama: nn.Module, other: nn.Module, rows: Tensor) -> None:
    scores = evaluate_text(llama, rows, other)
    report = EvaluationReport({"text.txt": scores.perplexity}, against=scores.divergence, size_bytes=1_500_000)
    report.tasks = {"piqa": {"acc": {"value": 0.75, "stderr": 0.01}}}
    report.bits_per_weight, report.bits_per_parameter = 4.125, 6.5
    found = json.loads(json.dumps(report.to_json()))
    assert found.keys() == {"perplexity", "tasks", "against", "bits_per_weight", "bits_per_parameter", "size_bytes"}
    assert found["perplexity"]["text.txt"].keys() == {"perplexity", "windows", "window", "tokens"}
    assert found["against"].keys() == {"kl", "top1", "cosine"}
    assert found["tasks"] == {"piqa": {"acc": {"value": 0.75, "stderr": 0.01}}}
    assert EvaluationReport().to_json()["against"] is None


def test_the_screen_says_what_the_json_says(llama: nn.Module, rows: Tensor) -> None:
    from rich.console import Console

    found = perplexity(llama, rows)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as screen_of:
        console.print(EvaluationReport({"text.txt": found}, bits_per_weight=4.125).table())
    screen = screen_of.get()
    assert f"{found.perplexity:.3f}" in screen
    assert "5 windows of 24 tokens" in screen
    assert "4.125" in screen


# --- a trained model


def test_trained_model_on_a_text_file(shared: Path) -> None:
    """The whole way, from file to figure, against transformers' own loss on windows cut by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = shared / "models" / "llama-33m"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    file = shared / "data" / "wiki-test.txt"
    tokens: list[int] = []
    for document in file.read_text().split("\n<|endoftext|>\n")[:4]:
        tokens += [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False)]
    rows = load_windows(str(file), tokenizer, 512, limit=4)
    assert rows.flatten().tolist() == tokens[: 4 * 512]
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    found = perplexity(model, rows)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    assert found.perplexity == pytest.approx(41.875, abs=0.002)
