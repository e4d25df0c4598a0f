"""Tasks by name: found, checked for code that nobody asked for, and the files that they are made of. No data is read."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from overhaul.errors import RequestError, reading
from overhaul.judge.harness.surroundings import quietly
from overhaul.versions import installed

OLDEST = "0.4.13"
"""The first lm-eval whose tasks are found and loaded as here."""


def check(where: str, names: Any, options: Mapping[str, Any], base: Path, trust: bool) -> dict[str, Any]:
    """Whether there are such tasks, and none runs code that was not asked for. No data is read.

    Args:
        where: the place in the recipe, which errors begin with.
        names: of tasks, groups or tags: one or a list.
        options: of `lm_eval`, of the right types.
        base: the folder that `include_path` is relative to.
        trust: whether Python that comes with tasks and metrics may run.

    Returns:
        The options; `include_path` is absolute.

    Raises:
        RequestError: lm-eval or a task is not there, or a task runs code.
    """
    options = dict(options)
    if (given := options.get("include_path")) is not None:
        with reading(f"{where}: include_path {given!r}"):
            folder = (base / Path(given).expanduser()).absolute()
            if not folder.is_dir():
                raise RequestError(
                    f"{where}: include_path {given!r} is no folder at {folder}. Paths start at the recipe."
                )
        options["include_path"] = str(folder)
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not name:
            raise RequestError(
                f"{where} names tasks of lm-evaluation-harness, not {name!r}; write lm_eval: [arc_easy]."
            )
        with quietly():
            index = manager(where, name, options).task_index
        if name not in index:
            raise RequestError(f"{where}: lm-evaluation-harness has no task {name!r}.{_near(name, index, options)}")
        for entry in reached(name, index):
            _check_entry(where, entry, options, trust)
    return options


def _near(name: str, index: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """What may have been meant, and what of the user's own folder could not be read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = difflib.get_close_matches(name, list(index), n=1, cutoff=0.6)
    hint = f" Did you mean {found[0]!r}?" if found else " `lm-eval ls tasks` lists them."
    if (folder := options.get("include_path")) is None:
        return f"{hint} A task of your own is found with `include_path: FOLDER`."
    for path in _tasks_in(folder):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever YAML and the file system raise
            return f"{hint} {path} cannot be read: {' '.join(str(error).split())}"
    return hint


def _check_entry(where: str, entry: Any, options: Mapping[str, Any], trust: bool) -> None:
    """Whether one task runs code that was not asked for.

    Raises:
        RequestError: it does, or the metric is not known.
    """
    from lm_eval.api.registry import metric_registry

    config = entry.cfg or {}
    if config.get("unsafe_code") and not options.get("confirm_run_unsafe_code"):
        raise RequestError(unsafe(where, entry.name))
    if trust:
        return
    own = options.get("include_path")
    for path in _chain(entry) if own is not None and Path(entry.yaml_path or "").is_relative_to(own) else []:
        if "!function" in path.read_text(encoding="utf-8"):
            raise RequestError(
                f"{where}: the task {entry.name!r} runs Python of its own (`!function` in {path}). If you have read that "
                "code and trust it, say `trust_remote_code: true` in the recipe."
            )
    if config.get("process_results") is not None:
        return
    for one in config.get("metric_list") or []:
        name = one.get("metric") if isinstance(one, Mapping) else None
        if isinstance(name, str) and "/" not in name and (one.get("hf_evaluate") or name not in metric_registry):
            raise RequestError(
                f"{where}: the task {entry.name!r} is scored by {name!r}, which is no metric of lm-eval itself but is "
                "fetched from the hub with its code. If you trust it, say `trust_remote_code: true` in the recipe."
            )


def unsafe(where: str, name: str) -> str:
    """What is said of a task that runs what the model writes."""
    return (
        f"{where}: the task {name!r} runs code that the model writes. If this machine may do so, say "
        "`confirm_run_unsafe_code: true` beside it."
    )


def manager(where: str, task: str, options: Mapping[str, Any]) -> Any:
    """lm-eval's own, which knows a task and all in it.

    Its index of 15,000 tasks takes seconds to read, so it is left alone where the user's folder has all that is asked for.

    Raises:
        RequestError: lm-eval cannot be imported, or is too old.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RequestError(
            f"{where} needs lm-evaluation-harness, which cannot be imported ({error}); the extra `overhaul[eval]` has it."
        ) from None
    if not hasattr(TaskManager, "load"):
        raise RequestError(
            f"{where} needs lm-eval {OLDEST} or newer, not {installed('lm_eval')}: install `overhaul[eval]`."
        )
    folder = options.get("include_path")
    if folder is None:
        return _indexed(None, ())
    stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in _tasks_in(folder))
    own = _indexed(folder, stamps, alone=True)
    return own if _whole(task, own.task_index) else _indexed(folder, stamps)


@lru_cache(maxsize=4)
def _indexed(folder: str | None, stamps: tuple[Any, ...], alone: bool = False) -> Any:
    """The manager of all tasks, or of a folder's `alone`; read again where a file of the folder changed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=not alone)


def _whole(task: str, index: Mapping[str, Any]) -> bool:
    """Whether an index has a task and all that a group names; a tag may have further tasks elsewhere."""
    entries = reached(task, index)
    names = {entry.name for entry in entries}
    asked = {name for entry in entries for name in _named_in((entry.cfg or {}).get("task"))}
    return task in names and asked <= names and all(entry.yaml_path is not None for entry in entries)


def _named_in(members: Any) -> Iterator[str]:
    """The names in a task's `task:`: its own, or a group's members at any depth."""
    if isinstance(members, str):
        yield members
    for one in members if isinstance(members, list) else []:
        parts = [one.get("group"), one.get("task")] if isinstance(one, Mapping) else [one]
        for part in parts:
            yield from _named_in(part)


def _tasks_in(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*.yaml") if path.is_file())


def reached(task: str, index: Mapping[str, Any]) -> list[Any]:
    """The entries of a task, or of a group or tag and all in it."""
    found: dict[str, Any] = {}
    ahead = [task]
    while ahead:
        name = ahead.pop()
        if name in index and name not in found:
            entry = found[name] = index[name]
            ahead += sorted(entry.tags) if entry.yaml_path is None else _named_in((entry.cfg or {}).get("task"))
    return list(found.values())


def _chain(entry: Any) -> list[Path]:
    """The YAML files that a task is made of."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found: list[Path] = []
    ahead = [Path(entry.yaml_path)] if entry.yaml_path is not None else []
    while ahead:
        path = ahead.pop().resolve()
        if path not in found and path.is_file():
            found.append(path)
            includes = load_yaml(path, resolve_func=False, recursive=False).get("include") or []
            ahead += [path.parent / one for one in (includes if isinstance(includes, list) else [includes])]
    return found


def places(task: str, options: Mapping[str, Any]) -> list[Path]:
    """Every file of a task that is not of the hub: its YAML, the Python beside it, and local data."""
    found: dict[Path, None] = {}
    with quietly():
        for entry in reached(task, manager("lm_eval", task, options).task_index):
            chain = _chain(entry)
            found |= dict.fromkeys(chain)
            for path in chain:
                if "!function" in path.read_text(encoding="utf-8"):
                    found |= dict.fromkeys(sorted(path.parent.glob("*.py")))
            found |= dict.fromkeys(_data(entry))
    return list(found)


def start_of(entries: Sequence[Any]) -> Path:
    """Where relative paths of tasks start: where the command is given, as with lm-eval, else beside a task's file."""
    for entry in entries:
        named = [one for one in _named(entry.cfg or {}) if not Path(one).expanduser().is_absolute()]
        beside = Path(entry.yaml_path).parent if entry.yaml_path is not None else Path.cwd()
        if any((beside / one).exists() for one in named) and not any(Path(one).exists() for one in named):
            return beside
    return Path.cwd()


def _named(config: Mapping[str, Any]) -> list[str]:
    """What a task says of where its rows are, addresses left out."""
    options = config.get("dataset_kwargs") or {}
    ahead: list[Any] = [config.get("dataset_path"), options.get("data_files"), options.get("data_dir")]
    found: list[str] = []
    while ahead:
        one = ahead.pop()
        if isinstance(one, Mapping | list):
            ahead += one.values() if isinstance(one, Mapping) else one
        elif isinstance(one, str) and "://" not in one:
            found.append(one)
    return found


def _data(entry: Any) -> Iterator[Path]:
    """Local files that a task reads its rows from; folders and patterns are followed."""
    start = start_of([entry])
    for one in _named(entry.cfg or {}):
        place = start / Path(one).expanduser()
        for path in place.parent.glob(place.name):
            yield from sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())


def content(task: str, options: Mapping[str, Any]) -> list[str]:
    """All that the numbers of a task depend on beside the model and the options: lm-eval's version, and each file's hash."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in places(task, options)]
    return [str(installed("lm_eval")), *hashes]
