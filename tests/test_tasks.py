"""Local task files give the harness the very prompts that its own tasks make of the hub's documents."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_model, tokenizer

import lowbit
from lowbit.cli import main
from lowbit.evaluation.local_tasks import LocalTask, find_tasks

HUB: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "arc_easy": (
        {"query": "Question: What is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1},
        {
            "question": "What is hot?",
            "choices": {"text": ["ice", "fire", "snow", "rain"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        {"query": "fog is likely", "choices": ["a marsh", "a tundra"], "gold": 0},
        {
            "question_stem": "fog is likely",
            "choices": {"text": ["a marsh", "a tundra"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ),
    "piqa": (
        {"query": "Question: dresser\n", "choices": ["pin it", "finish it"], "gold": 1},
        {"goal": "dresser", "sol1": "pin it", "sol2": "finish it", "label": 1},
    ),
    "boolq": (
        {
            "query": "Passage: A tax.\nQuestion: none here.\nQuestion: is it a tax?\nAnswer:",
            "choices": ["no", "yes"],
            "gold": 1,
        },
        {"passage": "A tax.\nQuestion: none here.", "question": "is it a tax", "label": 1},
    ),
    "hellaswag": (
        {"query": "Clean and jerk: A lady walks. She bends. the lady", "choices": ["a", "b", "c", "d"], "gold": 3},
        {
            "activity_label": "Clean and jerk",
            "ctx_a": "A lady walks. She bends.",
            "ctx_b": "the lady",
            "endings": ["a", "b", "c", "d"],
            "label": 3,
        },
    ),
    "winogrande": (
        {
            "context_options": ["It was late because the auditorium", "It was late because the park"],
            "continuation": "was small.",
            "gold": 1,
        },
        {
            "sentence": "It was late because the _ was small.",
            "option1": "auditorium",
            "option2": "park",
            "answer": "2",
        },
    ),
    "lambada_openai": (
        {"context": "I don't care about", "continuation": "signs"},
        {"text": "I don't care about signs"},
    ),
}
"""Task -> (a document with its prompt made, the hub's document)."""

PROMPTS = {
    "arc_easy": ("Question: What is hot?\nAnswer:", " fire"),
    "openbookqa": ("fog is likely", " a marsh"),
    "piqa": ("Question: dresser\nAnswer:", " finish it"),
    "boolq": ("A tax.\nQuestion: none here.\nQuestion: is it a tax?\nAnswer:", " yes"),
    "hellaswag": ("Clean and jerk: A lady walks. She bends. The lady", " d"),
    "winogrande": ("It was late because the park", " was small."),
    "lambada_openai": ("I don't care about", " signs"),
}
"""What the model is asked for the right answer, as the harness's documentation of each task has it."""


@pytest.mark.parametrize("name", HUB)
def test_made_prompts_are_taken_apart(name: str, tmp_path: Path) -> None:
    made, hub = HUB[name]
    file = tmp_path / f"{name}.jsonl"
    file.write_text(json.dumps(made) + "\n\n" + json.dumps(hub) + "\n", "utf8")
    assert list(LocalTask(name, file).documents()) == [hub, hub]


def test_llama_cpps_file_of_hellaswag(tmp_path: Path) -> None:
    lines = [
        "Cooking: How to bake. Take flour.",
        "2",
        "e0",
        "e1",
        "e2",
        "e3",
        "Ski: He is. he",
        "0",
        "a",
        "b",
        "c",
        "d",
    ]
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    (task,) = find_tasks(tmp_path)
    assert task.name == "hellaswag"
    first, second = task.documents()
    assert (first["ctx_a"], first["ctx_b"], first["label"]) == ("How to bake. Take flour.", "", 2)
    assert (second["ctx_a"], second["ctx_b"], second["endings"]) == ("He is.", "he", ["a", "b", "c", "d"])


def test_directories_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        find_tasks(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no tasks"):
        find_tasks(tmp_path)
    (tmp_path / "piqa.jsonl").write_text(json.dumps({"query": "Question: x\n", "choices": ["a"], "gold": 0}), "utf8")
    with pytest.raises(ValueError, match=r"holds no boolq: it has piqa"):
        find_tasks(tmp_path, ["boolq"])
    with pytest.raises(ValueError, match=r"document 1 of .*piqa.jsonl is no piqa document"):
        list(find_tasks(tmp_path)[0].documents())


# --- the harness itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one file for each task."""
    pytest.importorskip("lm_eval")
    directory = tmp_path_factory.mktemp("tasks")
    for name, (made, _) in HUB.items():
        (directory / f"{name}.jsonl").write_text(f"{json.dumps(made)}\n" * 2, "utf8")
    siqa = {"query": "Context: He left.\nQuestion: Why?\nA. a\nB. b\nAnswer:", "choices": ["A", "B"], "gold": 0}
    (directory / "siqa.jsonl").write_text(f"{json.dumps(siqa)}\n" * 2, "utf8")
    return directory


@pytest.mark.filterwarnings("default")
def test_the_harness_asks_what_its_own_tasks_ask(files: Path, tmp_path: Path) -> None:
    from lowbit.evaluation.tasks import _manager

    manager = _manager(find_tasks(files), tmp_path)
    for name, (context, answer) in PROMPTS.items():
        task = manager.load([name])["tasks"][name]
        task.build_all_requests(limit=1, rank=0, world_size=1)
        asked = [request.args for request in task.instances]
        assert (context, answer) in asked, name
        assert len(asked) == len(HUB[name][0].get("choices", HUB[name][0].get("context_options", [0])))


@pytest.mark.filterwarnings("default")
def test_tasks_over_local_files_in_the_documented_json(files: Path, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    tokenizer(128).save_pretrained(model)
    file = tmp_path / "found.json"
    asked = ["--tasks", "piqa,lambada_openai,siqa", "--tasks-data", str(files), "--limit", "2"]
    assert not main(["evaluate", str(model), *asked, "--json", str(file)])
    found = json.loads(file.read_text("utf8"))
    assert found["perplexity"] == {}
    assert found["tasks"].keys() == {"piqa", "lambada_openai", "siqa"}
    assert found["tasks"]["piqa"].keys() == {"acc", "acc_norm"}
    assert found["tasks"]["lambada_openai"].keys() == {"perplexity", "acc"}
    for metrics in found["tasks"].values():
        for score in metrics.values():
            assert score.keys() == {"value", "stderr"}
            assert score["stderr"] is not None
    # two equal questions are both right or both wrong
    assert found["tasks"]["piqa"]["acc"]["value"] in (0.0, 1.0)


@pytest.mark.filterwarnings("default")
def test_a_score_is_what_the_model_says(files: Path, tmp_path: Path) -> None:
    """Accuracy and perplexity of LAMBADA from the loaded model itself."""
    import torch

    model = save_model("llama", tmp_path / "model")
    found = lowbit.evaluate(model, tasks=["lambada_openai"], tasks_data=files).tasks["lambada_openai"]
    loaded, words = lowbit.load(model, dtype=torch.float32), tokenizer(128)
    context, target = (words(text, add_special_tokens=False).input_ids for text in PROMPTS["lambada_openai"])
    with torch.no_grad():
        scores = loaded(torch.tensor([context + target])).logits[0, len(context) - 1].log_softmax(-1)
    assert len(target) == 1
    assert found["perplexity"]["value"] == pytest.approx(float((-scores[target[0]]).exp()), rel=1e-4)
    assert found["acc"]["value"] == float(scores.argmax() == target[0])


@pytest.mark.filterwarnings("default")
def test_a_task_that_nobody_knows(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model("llama", tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nonsense.jsonl").write_text('{"a": 1}\n', "utf8")
    asked = ["--tasks-data", str(tmp_path / "data")]
    assert main(["evaluate", str(model), *asked]) == 2
    assert "knows no task nonsense" in capsys.readouterr().err
