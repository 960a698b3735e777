"""Harness tasks over local files: the harness's own configuration of a task, with another place to get documents from.

A generated configuration includes the harness's file and names a local file instead of a hub data set, so prompts,
targets and metrics are the harness's by construction. Files hold documents either in the hub data set's own fields or
as LLM Foundry and llama.cpp ship them, with the prompt made already; those are taken apart again, so that the harness
makes it. What a file has lost stays lost: BoolQ's passages have no titles there, and SocialIQA has two answers of three
and no harness task of that kind, so it gets a configuration of its own.
"""

from __future__ import annotations

import bz2
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LETTERS = "ABCDEFGH"
_ENDINGS = (".jsonl", ".json", ".txt.bz2", ".txt")
_ALIASES = {"openbook_qa": "openbookqa", "hellaswag_val_full": "hellaswag"}
"""Names of known files that are not their task's."""

PLACES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""Where the harness keeps the usual tasks: to find them it would read thousands of files for half a minute."""
OWN: dict[str, dict[str, Any]] = {
    "siqa": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
}
"""Tasks that the harness does not have."""


@dataclass(frozen=True)
class LocalTask:
    """A task whose documents are in `file`."""

    name: str
    file: Path

    def documents(self) -> Iterator[Row]:
        """The documents in the fields of the hub's data set. Raises ValueError where the file holds something else."""
        restore = _RESTORE.get(self.name)
        for number, row in enumerate(_read(self.file), 1):
            try:
                yield restore(row) if restore is not None and not row.keys().isdisjoint(_MADE) else row
            except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"document {number} of {self.file} is no {self.name} document ({error!r})") from error

    def config(self, own: Path | None, directory: Path) -> dict[str, Any]:
        """The harness's configuration in its file `own`, or our own, over documents that are written to `directory`."""
        target = directory / f"{self.name}.jsonl"
        with target.open("w", encoding="utf8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.documents())
        return {
            **({"include": str(own)} if own is not None else OWN[self.name]),
            "task": self.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(target)}, "cache_dir": str(directory / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }


def find_tasks(directory: Path, names: Sequence[str] = ()) -> list[LocalTask]:
    """The tasks `names`, or all that there are, in a directory of files `TASK.jsonl`. Raises ValueError."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: --tasks-data takes one that holds files like piqa.jsonl")
    found: dict[str, Path] = {}
    for file in sorted(directory.iterdir()):
        ending = next((ending for ending in _ENDINGS if file.name.endswith(ending)), None)
        if ending is not None:
            stem = file.name.removesuffix(ending)
            found.setdefault(_ALIASES.get(stem, stem), file)
    missing = [name for name in names if name not in found]
    if missing or not found:
        raise ValueError(f"{directory} holds no {', '.join(missing) or 'tasks'}: it has {', '.join(found) or 'none'}")
    return [LocalTask(name, found[name]) for name in (names or found)]


def _read(file: Path) -> Iterator[Row]:
    raw = bz2.decompress(file.read_bytes()) if file.suffix == ".bz2" else file.read_bytes()
    text = raw.decode("utf8")
    if ".jsonl" in file.name:
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    elif file.suffix == ".json":
        yield from json.loads(text)
    else:
        lines = text.removesuffix("\n").split("\n")
        for start in range(0, len(lines), 6):
            query, gold, *endings = lines[start : start + 6]
            yield {"query": query, "gold": int(gold), "choices": endings}


# --- prompts taken apart ----------------------------------------------------------------------------------------------

_MADE = {"query", "context_options", "continuation"}
"""Fields of documents whose prompt is made already."""


def _arc(row: Row) -> Row:
    labels = list(LETTERS[: len(row["choices"])])
    question = row["query"].removeprefix("Question: ")
    return {
        "question": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _openbookqa(row: Row) -> Row:
    made = _arc(row)
    return {"question_stem": made.pop("question"), **made}


def _piqa(row: Row) -> Row:
    goal = row["query"].removeprefix("Question: ").rstrip("\n")
    first, second = row["choices"]
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _boolq(row: Row) -> Row:
    passage, _, question = row["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    question = question.removesuffix("?")
    return {"passage": passage.removeprefix("Passage: "), "question": question, "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    """The last sentence was a fragment of its own, which the harness capitalizes, where it begins in lower case."""
    label, _, context = row["query"].partition(": ")
    head, stop, tail = context.rpartition(". ")
    if not tail[:1].islower():
        head, stop, tail = context, "", ""
    endings = list(row["choices"])
    if len(endings) != 4:
        raise ValueError("four endings are expected")
    return {
        "activity_label": label,
        "ctx_a": head + stop.rstrip(),
        "ctx_b": tail,
        "endings": endings,
        "label": row["gold"],
    }


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    same = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)
    stem = first[: first.rfind(" ", 0, same) + 1]
    sentence = f"{stem}_ {row['continuation']}"
    options = {"option1": first.removeprefix(stem), "option2": second.removeprefix(stem)}
    return {"sentence": sentence, **options, "answer": str(row["gold"] + 1)}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


_RESTORE: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "lambada_openai": _lambada,
}
