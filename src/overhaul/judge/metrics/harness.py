"""Tasks of lm-evaluation-harness, put to the model that a judge holds."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from torch import nn

from overhaul.judge import harness
from overhaul.judge.metrics import metric


@metric("lm-eval", "a task of lm-evaluation-harness", reads=(), tasks=True)
def lm_eval(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    *,
    limit: Annotated[int, Gt(0)] | None = None,
    num_fewshot: Annotated[int, Ge(0)] | None = None,
    metric: str | None = None,
    include_path: str | None = None,
    batch_size: Annotated[int, Gt(0)] = 1,
    seed: Annotated[int, Ge(0), Lt(2**32)] | None = None,
    chat: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> list[harness.Score]:
    """Every metric of a task, a group or a tag, each as the task itself states it.

    Args:
        model: in eval mode; it is held once.
        tokenizer: the model's.
        task: its name.
        limit: only the first so many rows of each task.
        num_fewshot: examples before each question; the task's own number if it is not given.
        metric: of the task's metrics this one alone (`acc_norm`); a limit (`at_least`) then holds for it alone.
        include_path: a folder of your own tasks (YAML), relative to the recipe.
        batch_size: requests that are run at once; in low precision the last digits depend on it.
        seed: draws the examples before a question, and samples; lm-eval's own seeds if it is not given.
        chat: questions are put in the tokenizer's chat template.
        confirm_run_unsafe_code: run what the model writes, which a task of code asks for (lm-eval's own switch).
    """
    options = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "metric": metric,
        "include_path": include_path,
        "batch_size": batch_size,
        "seed": seed,
        "chat": chat,
        "confirm_run_unsafe_code": confirm_run_unsafe_code,
    }
    return harness.scores(model, tokenizer, task, options)
