"""Text files, calibration recipes and evaluation windows, held to the published loops written out naively."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save_model
from torch import Tensor

import lowbit
from lowbit.data import calibrate, evaluation, hub, recipes
from lowbit.data.calibrate import batches, fingerprint, load_calibration, shuffled, text_windows
from lowbit.data.evaluation import load_windows
from lowbit.data.text import check_tokenizer, read_documents, resolve_window, tokenize_documents, windows
from lowbit.runtime.load import load_tokenizer

WORDS = 50
BOS = WORDS


@pytest.fixture(scope="module")
def make_tokenizer() -> Callable[..., Any]:
    """Builds a tokenizer of words w0 … w49; ``bos`` is "added" (it adds <s>), "known" (it has one) or "none"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(bos: str) -> Any:
        vocabulary = {f"w{i}": i for i in range(WORDS)}
        if bos != "none":
            vocabulary["<s>"] = BOS
        inner = Tokenizer(models.WordLevel({**vocabulary, "<unk>": BOS + 1}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos == "added":
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        special = {"unk_token": "<unk>"} | ({} if bos == "none" else {"bos_token": "<s>"})
        return PreTrainedTokenizerFast(tokenizer_object=inner, **special)

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer("added")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Sixty documents of 0 to 39 words, all different."""
    draw = random.Random(7)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randrange(40))) for _ in range(60)]


def ids_of(document: str) -> list[int]:
    """What the "added" tokenizer makes of a document, by hand."""
    return [BOS] + [int(word[1:]) for word in document.split()]


def as_lists(rows: list[Tensor] | Tensor) -> list[list[int]]:
    return [row.tolist() for row in rows]


# --- text files


def test_documents_end_at_separator_lines_only(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(
        b"\xef\xbb\xbfone <|endoftext|> one\r\n\r\nstill one\n<|endoftext|>\n"
        b"<|endoftext|>\n two\n\n<|endoftext|>\nend\n"
    )
    assert read_documents(file) == ["one <|endoftext|> one\n\nstill one", " two\n", "end"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no text file"),
        (b"\x89PNG\r\n\xff\xfe", "not UTF-8 text"),
        (b"PK\0\0\0", "binary data"),
        (b"", "holds no text"),
        (b"<|endoftext|>\n \n<|endoftext|>\n", "holds no text"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(file)


@pytest.mark.parametrize(("bos", "expected"), [("added", [50]), ("known", [50]), ("none", [])])
def test_every_document_has_one_bos(make_tokenizer: Callable[..., Any], bos: str, expected: list[int]) -> None:
    tokens = tokenize_documents(["w1 w2", "w3"], make_tokenizer(bos))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [*expected, 1, 2, *expected, 3]


def test_a_tokenizer_that_always_adds_bos_does_not_double_it() -> None:
    class Stubborn:
        bos_token_id = 9

        def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[9, len(document)] for document in text]}

    assert tokenize_documents(["a", "abc"], Stubborn()).tolist() == [9, 1, 9, 3]  # type: ignore[arg-type]


def test_windows_drop_the_tail_and_nothing_else() -> None:
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(windows(torch.arange(11), 4), windows(torch.arange(8), 4))


def test_short_text_says_what_to_do() -> None:
    message = "calibration text has 300 tokens, one window of 512 needs 512: use a longer text or --length 256"
    with pytest.raises(ValueError, match=message):
        windows(torch.arange(300), 512, "calibration text", "--length")
    with pytest.raises(ValueError, match=r"use a longer text$"):
        windows(torch.arange(1), 512)


def test_window_shrinks_by_default_and_is_refused_on_request() -> None:
    assert resolve_window(None, 2048, 4096) == (2048, None)
    assert resolve_window(None, 2048, None) == (2048, None)
    assert resolve_window(1024, 2048, 1024) == (1024, None)
    window, notice = resolve_window(None, 2048, 1024, "--length")
    assert window == 1024
    assert notice is not None
    assert notice.startswith("--length is 1024 instead of 2048")
    with pytest.raises(ValueError, match="--window 2048 is more than the model's context: use 1024 or less"):
        resolve_window(2048, 2048, 1024)
    with pytest.raises(ValueError, match="at least 2"):
        resolve_window(1, 2048, 1024)


def test_tokenizer_must_fit_the_model(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, WORDS + 2)
    with pytest.raises(ValueError, match="ids up to 50, the model embeds 50"):
        check_tokenizer(tokenizer, WORDS)
    with pytest.raises(ValueError, match="ids up to 50, the model embeds 8"):
        check_tokenizer(tokenizer, 8)


def test_added_tokens_without_embedding_are_tolerated(make_tokenizer: Callable[..., Any]) -> None:
    padded = make_tokenizer("added")
    padded.add_tokens(["<extra>"])
    check_tokenizer(padded, WORDS + 2)


# --- calibration from text


def test_text_windows_are_pieces_of_the_stream(tokenizer: Any, documents: list[str]) -> None:
    stream = list(itertools.chain.from_iterable(ids_of(document) for document in documents))
    draw = random.Random(3)
    expected = []
    for _ in range(20):
        start = draw.randint(0, len(stream) - 16)
        expected.append(stream[start : start + 16])
    assert as_lists(text_windows(documents, tokenizer, 20, 16, 3)) == expected


def test_text_windows_without_bos_are_the_plain_stream(make_tokenizer: Callable[..., Any]) -> None:
    text = " ".join(f"w{i}" for i in range(WORDS))
    for row in text_windows([text], make_tokenizer("none"), 30, 10, 0):
        assert row.tolist() == list(range(int(row[0]), int(row[0]) + 10))


def test_text_windows_reach_both_ends(tokenizer: Any) -> None:
    rows = as_lists(text_windows(["w1 w2 w3 w4"], tokenizer, 40, 4, 0))
    assert {tuple(row) for row in rows} == {(BOS, 1, 2, 3), (1, 2, 3, 4)}
    assert as_lists(text_windows(["w1 w2 w3"], tokenizer, 1, 4, 0)) == [[BOS, 1, 2, 3]]


def test_load_calibration_from_a_file(tmp_path: Path, tokenizer: Any, documents: list[str]) -> None:
    file = tmp_path / "text.txt"
    kept = [document for document in documents if document]
    file.write_text("\n<|endoftext|>\n".join(kept))
    rows = load_calibration(str(file), tokenizer, 5, 16, 1)
    assert as_lists(rows) == as_lists(text_windows(kept, tokenizer, 5, 16, 1))
    assert fingerprint(rows) == fingerprint(load_calibration(str(file), tokenizer, 5, 16, 1))
    assert fingerprint(rows) != fingerprint(load_calibration(str(file), tokenizer, 5, 16, 2))
    mixed = load_calibration(f"{file}:shuffled", tokenizer, 5, 16, 1)
    assert as_lists(mixed) != as_lists(rows)
    assert [sorted(row) for row in as_lists(mixed)] == [sorted(row) for row in as_lists(rows)]
    with pytest.raises(ValueError, match=r"calibration text has \d+ tokens, one window of 4096 needs 4096"):
        load_calibration(str(file), tokenizer, 5, 4096, 1)
    with pytest.raises(ValueError, match="at least 1 sample"):
        load_calibration(str(file), tokenizer, 0, 16, 1)


def test_packaged_texts_differ(tokenizer: Any) -> None:
    """Both texts of the package are there, and nothing of the evaluation text is in the calibration text."""
    from lowbit.data.local import local_documents

    calibration = local_documents("demo", "calibration", ())
    lines = {line for document in calibration for line in document.splitlines() if len(line) > 40}
    tested = {line for document in local_documents("demo", "evaluation", ()) for line in document.splitlines()}
    assert lines
    assert not lines & tested
    assert len(load_calibration("demo", tokenizer, 3, 64, 0)) == 3
    assert load_windows("demo", tokenizer, 64, limit=2).shape == (2, 64)


def test_misspelt_names_get_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"did you mean --calibration wikitext2\?"):
        load_calibration("wikitxt2", tokenizer, 1, 8, 0)
    with pytest.raises(ValueError, match=r"did you mean --perplexity c4-old\?"):
        load_windows("c4_old", tokenizer, 8)
    with pytest.raises(ValueError, match="give the path of a text file or one of demo, wikitext2"):
        load_windows("/nowhere/at/all.txt", tokenizer, 8)


def test_shuffling_keeps_the_tokens_of_each_row() -> None:
    rows = [torch.arange(20), torch.arange(100, 110)]
    first, second = shuffled(rows, 0)
    assert first.tolist() != list(range(20))
    assert (sorted(first.tolist()), sorted(second.tolist())) == (list(range(20)), list(range(100, 110)))
    assert as_lists(shuffled(rows, 0)) == [first.tolist(), second.tolist()]


def test_batches_never_pad() -> None:
    rows = [torch.full((length,), i) for i, length in enumerate([4, 2, 4, 4, 2])]
    assert [batch.tolist() for batch in batches(rows, 2)] == [
        [[0] * 4, [2] * 4],
        [[3] * 4],
        [[1] * 2, [4] * 2],
    ]


def test_fingerprint_sees_ids_and_shape() -> None:
    rows = torch.arange(12)
    assert fingerprint(rows.view(3, 4)) == fingerprint(list(rows.view(3, 4)))
    assert fingerprint(rows.view(3, 4)) == fingerprint(rows.view(3, 4).int())
    others = [rows.view(4, 3), rows.view(2, 6), rows.view(3, 4).flip(0), rows.view(3, 4) + 1]
    assert len({fingerprint(other) for other in [rows.view(3, 4), *others]}) == 5


# --- calibration without a text


def test_random_ids_are_uniform_over_the_ordinary_ones(make_tokenizer: Callable[..., Any]) -> None:
    """Four standard deviations of a multinomial around every one of the 50 words, and no special token."""
    tokenizer = make_tokenizer("added")
    tokenizer.add_special_tokens({"eos_token": "</s>", "unk_token": "<unk>"})
    rows = load_calibration("random", tokenizer, 40, 500, 0)
    assert all(row.shape == (500,) and row.dtype == torch.int64 for row in rows)
    counts = torch.cat(rows).bincount(minlength=len(tokenizer))
    special = set(tokenizer.get_added_vocab().values())
    assert special and not any(counts[index] for index in special)
    ordinary = torch.tensor([int(count) for index, count in enumerate(counts) if index not in special])
    mean = 20000 / len(ordinary)
    assert float((ordinary - mean).abs().max()) < 4 * mean**0.5
    again, other = (load_calibration("random", tokenizer, 40, 500, seed) for seed in (0, 1))
    assert fingerprint(again) == fingerprint(rows) != fingerprint(other)


class Chain:
    """A model of a Markov chain, which says what it was given: after w it gives w+1 with 3/4 and w+2 with 1/4."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []

    def __call__(self, ids: Tensor, *, past_key_values: int | None = None, use_cache: bool) -> Any:
        assert use_cache
        self.steps.append((ids.shape[1], past_key_values))
        logits = torch.full((*ids.shape, WORDS + 2), -torch.inf)
        for offset, probability in ((1, 0.75), (2, 0.25)):
            logits.scatter_(-1, ((ids + offset) % WORDS)[..., None], torch.tensor(probability).log().item())
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + ids.shape[1])


@pytest.mark.parametrize("bos", ["added", "none"])
def test_generated_rows_are_sampled_from_the_model(make_tokenizer: Callable[..., Any], bos: str) -> None:
    """Steps of 1 and 2 in 3 to 1, one token at a time behind the cache, ten rows in batches of eight."""
    model = Chain()
    rows = load_calibration("generated", make_tokenizer(bos), 10, 200, 0, lambda: model)
    assert len(rows) == 10 and all(row.shape == (200,) for row in rows)
    head = 1 if bos == "added" else 0
    assert all(row[0] == BOS for row in rows) if head else any(row[0] != rows[0][0] for row in rows)
    words = torch.stack(rows)[:, head:]
    steps = (words[:, 1:] - words[:, :-1]) % WORDS
    inside = words[:, :-1] < WORDS  # the first id may be another
    assert set(steps[inside].tolist()) == {1, 2}
    assert 0.7 < float((steps[inside] == 1).double().mean()) < 0.8
    lengths = [length for length, _ in model.steps]
    assert lengths == ([1 + head] + [1] * (198 - head)) * 2
    assert [cached for _, cached in model.steps[:3]] == [None, 1 + head, 2 + head]
    again, other = (load_calibration("generated", make_tokenizer(bos), 10, 200, seed, Chain) for seed in (0, 1))
    assert fingerprint(again) == fingerprint(rows) != fingerprint(other)


def test_generated_rows_continue_each_other_as_without_a_cache(tmp_path: Path) -> None:
    """A real model: the same ids when every step runs the whole prefix again."""
    path = save_model("llama", tmp_path / "model")
    model, tokenizer = lowbit.load(path), load_tokenizer(path)
    rows = load_calibration("generated", tokenizer, 3, 12, 5, lambda: model)

    class Uncached:
        device = torch.device("cpu")

        def __call__(self, ids: Tensor, *, past_key_values: Tensor | None = None, use_cache: bool) -> Any:
            whole = ids if past_key_values is None else torch.cat([past_key_values, ids], 1)
            return SimpleNamespace(logits=model(whole, use_cache=False).logits, past_key_values=whole)

    plain = load_calibration("generated", tokenizer, 3, 12, 5, Uncached)
    assert as_lists(plain) == as_lists(rows)


def test_made_up_text_calibrates_a_run(tmp_path: Path) -> None:
    """The plan records the tokens; the whole model in memory is announced, and refused where it does not fit."""
    path, notices = save_model("llama", tmp_path / "model"), []
    options: dict[str, Any] = {"samples": 4, "length": 16, "seed": 3}
    for source in ("random", "generated"):
        lowbit.quantize(path, "gptq-w4a16-g16", tmp_path / source, calibration=source, notice=notices.append, **options)
        record = json.loads((tmp_path / source / "plan.json").read_text())["calibration"]
        tokenizer = load_tokenizer(path)
        rows = load_calibration(source, tokenizer, 4, 16, 3, lambda: lowbit.load(path))
        assert record == {"source": source, **options, "tokens": fingerprint(rows)}
    assert sum("loads the whole model once" in notice for notice in notices) == 1
    with pytest.raises(ValueError, match=r"loads the whole model, .* calibrate on a text"):
        lowbit.quantize(path, "gptq-w4a16-g16", tmp_path / "no", calibration="generated", memory=1000, **options)


# --- published recipes


@pytest.mark.parametrize("join", [" ", "\n\n"])
def test_joined_windows_draw_as_the_published_loop(tokenizer: Any, documents: list[str], join: str) -> None:
    stream = ids_of(join.join(documents))
    random.seed(2)
    expected = []
    for _ in range(9):
        start = random.randint(0, len(stream) - 16 - 1)
        expected.append(stream[start : start + 16])
    assert as_lists(recipes.joined_windows(join)(documents, tokenizer, 9, 16, 2)) == expected
    with pytest.raises(ValueError, match="longer text or --length"):
        recipes.joined_windows(join)(["w1 w2 w3"], tokenizer, 1, 4, 0)


def test_joined_windows_take_the_first_documents_only(tokenizer: Any) -> None:
    rows = recipes.joined_windows("\n\n", first=2)(["w1 w1 w1", "w2 w2 w2", "w3 w3 w3"], tokenizer, 20, 3, 0)
    assert {token for row in as_lists(rows) for token in row} == {BOS, 1, 2}


def naive_document_windows(documents: list[str], samples: int, length: int, seed: int) -> list[list[int]]:
    """GPTQ's C4 loop: reject short documents, then draw the place; one random state for both."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = ids_of(documents[i])
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        rows.append(ids[start : start + length])
    return rows


@pytest.mark.parametrize("seed", [0, 5])
def test_document_windows_draw_as_the_published_loop(tokenizer: Any, documents: list[str], seed: int) -> None:
    assert any(len(ids_of(document)) == 20 for document in documents), "a document of exactly L must be rejected"
    rows = recipes.document_windows(documents, tokenizer, 40, 20, seed)
    assert as_lists(rows) == naive_document_windows(documents, 40, 20, seed)


def test_document_windows_end_when_all_are_too_short(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no document is longer than 4 tokens"):
        recipes.document_windows(["w1", "w1 w2 w3"], tokenizer, 2, 4, 0)


def test_recipes_leave_the_global_random_state_alone(tokenizer: Any, documents: list[str]) -> None:
    random.seed(11)
    before = random.getstate()
    recipes.document_windows(documents, tokenizer, 3, 8, 0)
    recipes.joined_windows(" ")(documents, tokenizer, 3, 8, 0)
    text_windows(documents, tokenizer, 3, 8, 0)
    assert random.getstate() == before


def test_awq_blocks_are_full_and_in_order(tokenizer: Any, documents: list[str]) -> None:
    length, samples = 16, 12
    accepted = [ids for document in documents if len(ids := ids_of(document.strip())) <= length][:samples]
    stream = list(itertools.chain.from_iterable(accepted))
    rows = as_lists(recipes.pile_blocks(documents, tokenizer, samples, length, 0))
    assert len(rows) == len(stream) // length < samples
    assert all(len(row) == length for row in rows)
    assert list(itertools.chain.from_iterable(rows)) == stream[: len(rows) * length]


def test_awq_skips_empty_documents_and_strips(make_tokenizer: Callable[..., Any]) -> None:
    """Only a tokenizer that adds no BOS makes an empty document empty."""
    rows = recipes.pile_blocks(["  ", " w1 w2 \n", "", "w3 w4"], make_tokenizer("known"), 2, 2, 0)
    assert as_lists(rows) == [[1, 2], [3, 4]]


def test_smoothquant_rows_are_ragged(tokenizer: Any, documents: list[str]) -> None:
    rows = recipes.pile_ragged(documents, tokenizer, 10, 12, 0)
    assert as_lists(rows) == [ids_of(document)[:12] for document in documents[:10]]
    assert len({row.numel() for row in rows}) > 1


def test_general_rows_are_full(tokenizer: Any, documents: list[str]) -> None:
    expected = [ids[:12] for document in documents if len(ids := ids_of(document)) >= 12]
    assert as_lists(recipes.pile_full(documents, tokenizer, 7, 12, 0)) == expected[:7]
    with pytest.raises(ValueError, match=f"only {len(expected)} documents have 12 tokens"):
        recipes.pile_full(documents, tokenizer, len(expected) + 1, 12, 0)


def test_joined_test_sets_are_tokenized_once(tokenizer: Any, documents: list[str]) -> None:
    stream = ids_of(" ".join(documents))
    rows = as_lists(recipes.joined_test("\n\n")(documents, tokenizer, 16))
    assert rows == [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]


def test_c4_new_is_1100_documents_and_256_windows(tokenizer: Any) -> None:
    documents = [f"w{i % WORDS} w{i % WORDS}" for i in range(1300)]
    stream = ids_of(" ".join(documents[:1100]))
    assert as_lists(recipes.c4_new(documents, tokenizer, 4)) == [stream[i : i + 4] for i in range(0, 1024, 4)]
    assert recipes.c4_new(documents, tokenizer, 100).shape == (22, 100)


def test_c4_old_has_its_own_seed(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, documents: list[str]) -> None:
    monkeypatch.setattr(hub, "fetch", lambda text: documents)
    rows = load_windows("c4-old", tokenizer, 20)
    assert as_lists(rows) == naive_document_windows(documents, 256, 20, 0)
    random.seed(99)
    load_calibration("c4", tokenizer, 4, 20, seed=99)
    assert torch.equal(load_windows("c4-old", tokenizer, 20), rows)


def test_names_use_their_recipes(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, documents: list[str]) -> None:
    """Every name gives rows of the wanted length; its text is not the one that any test set is made of."""
    monkeypatch.setattr(hub, "fetch", lambda text: documents)
    for name in calibrate.NAMED:
        rows = load_calibration(name, tokenizer, 6, 8, 0)
        assert rows, name
        assert all(row.numel() == 8 for row in rows) or name == "pile-smoothquant"
    for name in evaluation.NAMED:
        assert load_windows(name, tokenizer, 8, limit=3).shape == (3, 8), name
    assert not {place for place, _ in calibrate.NAMED.values()} & {place for place, _ in evaluation.NAMED.values()}
    assert as_lists(load_windows("ptb", tokenizer, 8)) == as_lists(recipes.joined_test(" ")(documents, tokenizer, 8))


# --- the hub


@pytest.mark.filterwarnings("ignore")  # of the datasets library
def test_fetch_reads_the_file_in_the_published_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "en").mkdir()
    with gzip.open(tmp_path / "en" / "c4.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"w{i}", "url": "x"}) + "\n" for i in range(20))
    plain = hub.HubText(str(tmp_path), "validation", files="en/c4.json.gz")
    assert list(hub.fetch(plain)) == [f"w{i}" for i in range(20)]
    mixed = hub.HubText(str(tmp_path), "validation", files="en/c4.json.gz", shuffle=42)
    order = datasets.Dataset.from_dict({"i": list(range(20))}).shuffle(seed=42)["i"]
    assert list(hub.fetch(mixed)[:5]) == [f"w{i}" for i in order[:5]]


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"could not load 'Salesforce/wikitext' from the hub: no network\? give a text"
    ):
        load_windows("wikitext2", tokenizer, 8)


def test_missing_datasets_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[data\]'"):
        load_calibration("c4", tokenizer, 1, 8, 0)
