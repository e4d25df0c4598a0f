"""Tasks put to a model: tried without one, run on it, and what lm-eval gives read."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from overhaul.errors import RequestError, RunError
from overhaul.generation import generates
from overhaul.judge.harness.surroundings import quietly, sandboxed, undisturbed
from overhaul.judge.harness.tasks import manager, reached, start_of, unsafe
from overhaul.versions import installed

SEEDS = (0, 1234, 1234, 1234)
"""What `lm_eval.simple_evaluate` sets of itself: for Python, NumPy, torch, and the draw of examples before a question."""

BOOTSTRAPS = 100_000
"""Draws behind a standard error that has no formula; lm-eval's own number."""

REMARKS = {
    "runcat": "prompts too long for the model, of which the beginning was cut off",
    "not in within range": "rows whose right answer is none of their choices, counted as wrong",
}
"""What lm-eval only logs and a reader must know: a part of the line that says it, and what is said of their number."""

SHARES = re.compile(r"acc(_\w+)?|exact_match")
"""Metrics of lm-eval that lie between 0 and 1 whatever the task; others may be per cent."""


@dataclass(frozen=True)
class Score:
    """One number of a task.

    Attributes:
        name: the task's name for the metric, with the filter of answers in brackets where there are several.
        on: the task.
        value: a plain number; NaN where there is none.
        stderr: its standard error, None where lm-eval gives none.
        n: rows behind it.
        better: "up" or "down", as the task states it.
        unit: as in `Measure`.
        help: how it was asked.
    """

    name: str
    on: str
    value: float
    stderr: float | None
    n: int
    better: str
    unit: str
    help: str


def unfit(model: nn.Module) -> str:
    """Why tasks cannot be put to a model; empty if they can."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder-decoder, and lm_eval is put to models that continue one text."
    if not generates(model):
        return f"{type(model).__name__} does not continue text (it has no `generate`), so lm_eval cannot be put to it."
    return ""


def look_ahead(where: str, task: str, options: Mapping[str, Any], tokenizer: Any, config: Any) -> None:
    """Load a task with its data and build its first request: what a run would refuse, without a model.

    Args:
        where: the place in the recipe.
        task: its name.
        options: from `check`.
        tokenizer: the model's.
        config: the model's, where it is known.

    Raises:
        RequestError: with what is wrong.
    """
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise RequestError(f"{where}: the model has no tokenizer with an end-of-text token, which lm-eval needs.")
    if options.get("chat") and not getattr(tokenizer, "chat_template", None):
        raise RequestError(f"{where}: `chat: true` needs a chat template, and the model's tokenizer has none.")

    def templated(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        further = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return tokenizer.apply_chat_template(list(turns), tokenize=False, **further)

    with undisturbed(None), quietly(), sandboxed():
        loaded = _load(where, task, options)
        for name, one in loaded["tasks"].items():
            _check_task(where, name, one, options)
            try:
                one.build_all_requests(
                    limit=1,
                    apply_chat_template=bool(options.get("chat")),
                    fewshot_as_multiturn=True,
                    chat_template=templated if options.get("chat") else None,
                )
            except Exception as error:  # templates and tasks raise anything
                raise RequestError(f"{where}: the task {name!r} cannot ask its first row: {_said(error)}") from error
            _check_room(where, name, one, tokenizer, config)
        if (wanted := options.get("metric")) is not None:
            for name, one in loaded["tasks"].items():
                if wanted not in (known := one.higher_is_better()):
                    raise RequestError(
                        f"{where}: the task {name!r} has no metric {wanted!r}; it has {', '.join(known)}."
                    )


def _check_task(where: str, name: str, task: Any, options: Mapping[str, Any]) -> None:
    """What lm-eval finds out or passes over after the model has answered.

    Raises:
        RequestError: there is something.
    """
    if getattr(task, "UNSAFE_CODE", False) and not options.get("confirm_run_unsafe_code"):
        raise RequestError(unsafe(where, name))
    if getattr(task, "MULTIMODAL", False):
        raise RequestError(f"{where}: the task {name!r} shows pictures or sounds; here models are given text alone.")
    asked, own = options.get("num_fewshot"), task.get_config("num_fewshot")
    if asked and own == 0:
        raise RequestError(
            f"{where}: the task {name!r} is asked without examples by its own setting, which `num_fewshot: {asked}` cannot "
            "change. Leave it out for this task."
        )
    functions = getattr(task, "_metric_fn_list", {})
    lost = [metric for metric, function in functions.items() if function is None]
    if lost and task.get_config("process_results") is None:
        raise RequestError(f"{where}: the task {name!r} is scored by {lost[0]!r}, which cannot be had.")


def _check_room(where: str, name: str, task: Any, tokenizer: Any, config: Any) -> None:
    """Whether the model has positions for a question beside the longest answer.

    Raises:
        RequestError: it has not.
    """
    from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

    for request in task.instances:
        if request.request_type == "generate_until" and config is not None:
            answers: Any = normalize_gen_kwargs(request.args[1])
            asked, most = answers["max_gen_toks"], resolve_max_length(config, tokenizer)
            if asked >= most:
                raise RequestError(
                    f"{where}: the task {name!r} asks for answers of up to {asked} tokens, but the model ends at {most} "
                    "positions, which the question needs too. `max_gen_toks` in the task's `generation_kwargs` sets it."
                )


def scores(model: nn.Module, tokenizer: Any, task: str, options: Mapping[str, Any]) -> list[Score]:
    """What a model scores in a task. The model, the tokenizer and all random states are left as they were.

    Args:
        model: of transformers, in eval mode, on any device.
        tokenizer: the model's.
        task: its name. Of a group that has a number of its own this is given; else those of each task in it.
        options: of `lm_eval`.

    Raises:
        RequestError: there is no such task, or it cannot be put to this model.
        RunError: it failed under way.
    """
    where = f"lm_eval {task}"
    if reason := unfit(model):
        raise RequestError(reason)
    look_ahead(where, task, options, tokenizer, getattr(model, "config", None))
    python, numpy, torch_seed, _ = _seeds(options)
    with undisturbed(model), quietly() as said, sandboxed():
        import lm_eval
        import numpy as np
        import torch
        from lm_eval.models.huggingface import HFLM

        random.seed(python)
        np.random.seed(numpy)
        torch.manual_seed(torch_seed)
        loaded = _load(where, task, options)
        wrapped: Any = HFLM
        held = wrapped(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=options.get("batch_size") or 1)
        try:
            found: Any = lm_eval.evaluate(
                held,
                loaded,
                limit=options.get("limit"),
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                apply_chat_template=bool(options.get("chat")),
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=bool(options.get("confirm_run_unsafe_code")),
            )
        except torch.OutOfMemoryError as error:
            raise RunError(f"{where} ran out of memory. A smaller `batch_size` beside it needs less.") from error
        except Exception as error:  # tasks, their scoring and the model raise anything
            raise RunError(f"{where} could not be measured: {_said(error)}") from error
    counted = {remark: sum(mark in line for line in said) for mark, remark in REMARKS.items()}
    return _read(task, found, options, "".join(f"; {n} {remark}" for remark, n in counted.items() if n))


def _read(task: str, found: Mapping[str, Any], options: Mapping[str, Any], remarks: str) -> list[Score]:
    """The numbers of a task from what lm-eval gives."""
    results = found["results"]
    own = any("," in key for key in results.get(task, ()))
    names = [task] if own else [name for name in results if name in found["n-samples"]]
    scored: list[Score] = []
    for name in names:
        inside = _inside(name, found)
        n = sum(found["n-samples"][leaf]["effective"] for leaf in inside)
        higher = found["higher_is_better"].get(name) or {}
        shots = sorted({found["n-shot"].get(leaf, 0) for leaf in inside})
        said = f"lm-evaluation-harness {installed('lm_eval')}, {' or '.join(map(str, shots))}-shot{remarks}"
        for key, value in results[name].items():
            metric, comma, filtered = key.partition(",")
            wanted = options.get("metric") in (None, metric)
            if not comma or metric.endswith("_stderr") or not wanted:
                continue
            scored.append(
                Score(
                    name=metric if filtered == "none" else f"{metric}[{filtered}]",
                    on=task if name == task else f"{task} / {name}",
                    value=_number(value),
                    stderr=_error(results[name].get(f"{metric}_stderr,{filtered}")),
                    n=n,
                    better="down" if higher.get(metric) is False else "up",
                    unit="share" if SHARES.fullmatch(metric) else "bits/byte" if metric == "bits_per_byte" else "",
                    help=said,
                )
            )
    return scored


def _inside(name: str, found: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, at any depth; of a task itself."""
    children = found["group_subtasks"].get(name)
    return [name] if not children else [leaf for child in children for leaf in _inside(child, found)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) or hasattr(value, "dtype") else math.nan


def _error(value: Any) -> float | None:
    return found if math.isfinite(found := _number(value)) else None


def _seeds(options: Mapping[str, Any]) -> tuple[int, ...]:
    return SEEDS if options.get("seed") is None else (options["seed"],) * 4


def _load(where: str, task: str, options: Mapping[str, Any]) -> Any:
    """A task, or all of a group, with its data, as `simple_evaluate` sets it up.

    Raises:
        RequestError: it cannot be loaded.
    """
    found = manager(where, task, options)
    config = getattr(found.task_index.get(task), "cfg", None) or {}
    try:
        with contextlib.chdir(start_of(reached(task, found.task_index))):
            loaded = found.load([task])
    except Exception as error:  # data sets, templates, packages that a task needs, files
        source = f" Its data is {config['dataset_path']!r}." if "dataset_path" in config else ""
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        away = " Nothing can be fetched: HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set." if offline else ""
        where_from = " Relative paths start where the command is given, or at the task's file."
        lost = where_from if isinstance(error, FileNotFoundError) else ""
        raise RequestError(
            f"{where}: the task {task!r} cannot be loaded: {_said(error)}{source}{away}{lost}"
        ) from error
    for one in loaded["tasks"].values():
        own, asked = one.get_config("num_fewshot"), options.get("num_fewshot")
        if own != 0 and (asked is not None or own is None):
            one.set_config(key="num_fewshot", value=asked or 0)
        one.set_fewshot_seed(seed=_seeds(options)[3])
    return loaded


def _said(error: BaseException) -> str:
    said = " ".join(str(error).split()) or "no reason was given"
    return f"{type(error).__name__}: {said[:400].rstrip('.')}."
