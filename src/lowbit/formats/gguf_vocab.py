"""A tokenizer's files as GGUF's vocabulary: tokens, their kinds, merges or scores, special tokens, the chat template.

Everything is read from tokenizer.json (or, where there is none, SentencePiece's tokenizer.model), so that no tokenizer
library is needed. Two things are not written there in so many words. llama.cpp knows pre-tokenizers by name: the name
follows from the regular expression that the file splits by, not from a list of models, and where llama.cpp knows no
such expression a notice says so. And SentencePiece's scores order its merges: a merged piece scores minus its rank.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _BEHIND: "llama-bpe",
    _CONTRACTIONS + _WORD + r"\p{N}" + _BEHIND: "qwen2",
    "|".join(_CASED) + r"|\p{N}" + _CASED_BEHIND: "tekken",
    "|".join(f"{part}{_CONTRACTIONS}?" for part in _CASED) + r"|\p{N}{1,3}" + _CASED_BEHIND: "gpt-4o",
}
"""The expression of a Split pre-tokenizer -> llama.cpp's name for splitting so."""


@dataclass
class Vocabulary:
    """GGUF's keys of a vocabulary, without their prefix `tokenizer.`."""

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    template: str | None = None
    notices: tuple[str, ...] = ()


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a model's directory, padded to the model's; None where it has no tokenizer that is known."""
    settings = _json(directory / "tokenizer_config.json")
    file = directory / "tokenizer.json"
    content = _json(file)
    if content:
        found = _from_json(content)
    elif (directory / "tokenizer.model").is_file():
        found = _from_sentencepiece((directory / "tokenizer.model").read_bytes())
    else:
        return None
    if found is None:
        return None
    _pad(found, config["vocab_size"])
    _add_special(found, content, settings, config)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    beside = directory / "chat_template.jinja"
    found.template = beside.read_text("utf8") if template is None and beside.is_file() else template
    return found


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf8")) if path.is_file() else {}


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def _from_json(content: Mapping[str, Any]) -> Vocabulary | None:
    model = content["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind == "BPE":
        tokens = _ordered(model["vocab"], content)
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        kinds = _kinds(tokens, content)
        if not any(part["type"] == "ByteLevel" for part in _parts(content.get("pre_tokenizer"))):
            return _merged_pieces(content, tokens, kinds, model["merges"])
        pre, notices = _pre_tokenizer(content)
        return Vocabulary("gpt2", tokens, kinds, merges=merges, pre=pre, notices=notices)
    if kind == "Unigram":
        pieces = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
        tokens = _ordered(pieces, content)
        scores = [score for _, score in model["vocab"]]
        scores += [0.0] * (len(tokens) - len(scores))
        return Vocabulary("t5", tokens, _kinds(tokens, content), scores=scores, flags=_prefix(content))
    return None


def _ordered(vocab: Mapping[str, int], content: Mapping[str, Any]) -> list[str]:
    """Tokens by id, added ones included; ids that nothing has are named."""
    named = {index: token for token, index in vocab.items()}
    named |= {each["id"]: each["content"] for each in content.get("added_tokens", ())}
    return [named.get(index, f"[PAD{index}]") for index in range(max(named) + 1)]


def _kinds(tokens: Sequence[str], content: Mapping[str, Any]) -> list[int]:
    added = {each["id"]: CONTROL if each["special"] else USER_DEFINED for each in content.get("added_tokens", ())}
    unknown = content["model"].get("unk_token")
    fallback = content["model"].get("byte_fallback", False)
    kinds = []
    for index, token in enumerate(tokens):
        if token == unknown or index == content["model"].get("unk_id"):
            kinds.append(UNKNOWN)
        elif fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds.append(BYTE)
        else:
            kinds.append(added.get(index, UNUSED if token == f"[PAD{index}]" else NORMAL))
    return kinds


def _merged_pieces(
    content: Mapping[str, Any], tokens: list[str], kinds: list[int], merges: Sequence[Any]
) -> Vocabulary:
    """SentencePiece's BPE as tokenizer.json spells it: pieces score minus the rank of the merge that makes them."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, place)
    scores = [
        -float(rank.get(token, len(merges))) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    return Vocabulary("llama", tokens, kinds, scores=scores, pre="default", flags=_prefix(content))


def _prefix(content: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a space goes in front of a text."""
    parts = [*_parts(content.get("normalizer")), *_parts(content.get("pre_tokenizer"))]
    prepends = any(part["type"] == "Prepend" for part in parts)
    spaced = [part for part in parts if part["type"] == "Metaspace"]
    spaces = any(
        part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
        for part in spaced
    )
    return {"add_space_prefix": prepends or spaces}


def _parts(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The components of a sequence, flat."""
    if component is None:
        return
    inner = component.get("pretokenizers") or component.get("normalizers") or component.get("processors")
    if component["type"] == "Sequence" and inner is not None:
        for each in inner:
            yield from _parts(each)
    else:
        yield component


def _pre_tokenizer(content: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(llama.cpp's name for how the text is split before merging, notices)."""
    parts = list(_parts(content.get("pre_tokenizer")))
    own = any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts)
    splits = [part.get("pattern", {}).get("Regex") for part in parts if part["type"] == "Split"]
    digits = any(part["type"] == "Digits" and part.get("individual_digits") for part in parts)
    others = {part["type"] for part in parts} - {"ByteLevel", "Split", "Digits"}
    if own and not splits and not others:
        return ("smollm" if digits else "gpt-2"), ()
    if len(splits) == 1 and not own and not digits and not others and splits[0] in _SPLITS:
        name = _SPLITS[splits[0]]
        return name, ()
    return "default", (
        "llama.cpp knows no pre-tokenizer that splits text as this model's does, so its own tokens will differ here "
        "and there: give it token ids, or compare its tokens with the tokenizer's first",
    )


# --- tokenizer.model --------------------------------------------------------------------------------------------------


def _from_sentencepiece(data: bytes) -> Vocabulary:
    """The pieces of SentencePiece's protocol buffer: message 1 of the model, each (1 piece, 2 score, 3 kind)."""
    tokens, scores, kinds = [], [], []
    unigram, prefix = True, True
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            tokens.append(piece[1].decode("utf8"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            kinds.append(piece.get(3, NORMAL))
        elif number == 2:
            unigram = dict(_fields(value)).get(3, 1) == 1
        elif number == 3:
            prefix = bool(dict(_fields(value)).get(3, 1))
    return Vocabulary(
        "t5" if unigram else "llama", tokens, kinds, scores, pre="default", flags={"add_space_prefix": prefix}
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: integers, and bytes of all else."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else 8 if key & 7 == 1 else 4
        yield key >> 3, data[place : place + size]
        place += size


# --- both -------------------------------------------------------------------------------------------------------------


def _pad(found: Vocabulary, size: int) -> None:
    """Rows of the embedding that no token has are named; tokens beyond it, which the model cannot read, are dropped."""
    for index in range(len(found.tokens), size):
        found.tokens.append(f"[PAD{index}]")
        found.kinds.append(UNUSED)
        if found.scores is not None:
            found.scores.append(0.0)
    del found.tokens[size:], found.kinds[size:]
    if found.scores is not None:
        del found.scores[size:]


def _add_special(
    found: Vocabulary, content: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Ids of special tokens, and whether a text gets them around it."""
    place = {token: index for index, token in enumerate(found.tokens)}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{ours}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        index = place.get(token) if token is not None else config.get(f"{ours}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < len(found.tokens):
            found.special[theirs] = index
            if found.kinds[index] == NORMAL and ours != "unk":
                found.kinds[index] = CONTROL
    around = _around(content, place)
    for side, name in enumerate(("bos", "eos")):
        given = settings.get(f"add_{name}_token")
        default = found.special.get(name) is not None and around[side] == found.special.get(name)
        if given is None and not content:
            default = name == "bos"
        found.flags[f"add_{name}_token"] = default if given is None or content.get("post_processor") else bool(given)


def _around(content: Mapping[str, Any], place: Mapping[str, int]) -> tuple[int | None, int | None]:
    """The tokens that a post-processor puts in front of a text and behind it."""
    for part in _parts(content.get("post_processor")):
        if part["type"] == "TemplateProcessing" and part["single"]:
            ends = [part["single"][0].get("SpecialToken"), part["single"][-1].get("SpecialToken")]
            first, last = (None if end is None else place.get(end["id"]) for end in ends)
            return first, last
    return None, None
