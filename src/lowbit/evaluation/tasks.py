"""Zero-shot tasks, run by lm-evaluation-harness on a model already in memory.

The harness is what papers quote, so it is called as it is and only its results are reshaped. It is an extra, imported
on use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.text import Tokenizer

TaskScores = dict[str, dict[str, dict[str, float | None]]]


def run_tasks(
    model: nn.Module, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None = None, batch: int = 8
) -> TaskScores:
    """Zero-shot scores of the harness's ``tasks``: {task: {metric: {"value", "stderr"}}}.

    Args:
        limit: at most so many questions of each task; None for all.
        batch: requests per forward.

    Raises:
        ValueError: the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'lowbit[tasks]'") from error
    manager = TaskManager()
    missing = [task for task in tasks if task not in manager.all_tasks]
    if missing:
        raise ValueError(f"lm-evaluation-harness knows no task {', '.join(missing)}: `lm_eval ls tasks` lists them")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(model=wrapped, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager)
    return read_results(found["results"])


def read_results(results: Mapping[str, Mapping[str, Any]]) -> TaskScores:
    """Reshape the harness's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``.

    The filter ``none`` is dropped from names; a standard error that the harness could not give is None.
    """
    scores: TaskScores = {}
    for task, entries in results.items():
        scores[task] = {}
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = entries.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            scores[task][name] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
    return scores
