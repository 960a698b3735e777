"""Zero-shot tasks, run by lm-evaluation-harness on a model already in memory.

The harness is what papers quote, so it is called as it is and only its results are reshaped. It is an extra, imported
on use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..data.text import Tokenizer
from .local_tasks import OWN, PLACES, LocalTask, find_tasks

TaskScores = dict[str, dict[str, dict[str, float | None]]]


def run_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    batch: int = 8,
    *,
    data: Path | None = None,
) -> TaskScores:
    """Zero-shot scores of the harness's ``tasks``: {task: {metric: {"value", "stderr"}}}.

    Args:
        limit: at most so many questions of each task; None for all.
        batch: requests per forward.
        data: a directory of local files to take the documents from instead of the hub; without `tasks`, all it holds.

    Raises:
        ValueError: the harness is not installed, does not know a task, or the directory lacks it.
    """
    local = [] if data is None else find_tasks(data, tasks)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'lowbit[tasks]'") from error
    with TemporaryDirectory(prefix="lowbit-tasks-") as scratch:
        manager = _manager(local, Path(scratch))
        names = [task.name for task in local] or list(tasks)
        missing = [task for task in names if task not in manager.all_tasks]
        if missing:
            raise ValueError(f"lm-evaluation-harness knows no task {', '.join(missing)}: `lm_eval ls tasks` lists them")
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found = simple_evaluate(model=wrapped, tasks=names, num_fewshot=0, limit=limit, task_manager=manager)
    return read_results(found["results"])


def _manager(local: Sequence[LocalTask], directory: Path) -> Any:
    """The harness's tasks, of which `local` have configurations of ours that include its own."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if not local:
        return TaskManager()
    home = Path(lm_eval.tasks.__file__).parent
    places = {task.name: home / PLACES[task.name] for task in local if task.name in PLACES}
    if not all(file.is_file() for file in places.values()) or {task.name for task in local} - {*places, *OWN}:
        index = TaskManager().task_index
        places = {task.name: index[task.name].yaml_path for task in local if task.name in index}
    for task in local:
        if task.name in places or task.name in OWN:
            config = task.config(places.get(task.name), directory)
            (directory / f"{task.name}.yaml").write_text(json.dumps(config), encoding="utf8")  # JSON is YAML
    return TaskManager(include_path=str(directory), include_defaults=False)


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
