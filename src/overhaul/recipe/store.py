"""The run folder: what is done, under which key, written so that a kill leaves either all of a thing or nothing.

OUT/run.json                    which recipe owns the folder
OUT/steps/01-forget.npo-KEY/    model/ and step.json, renamed into place when complete
OUT/judged/KEY.json             what the judge measured of one model
OUT/timed/KEY.json              how long models took that were timed in turn
OUT/model, report.html, report.json, recipe.yaml, lineage.json
OUT/published.json              the names of what was put into OUT/model
OUT/run.log                     what was said while it ran, with the time of day
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overhaul import processes, session
from overhaul.data.lazy import file_digest
from overhaul.errors import RequestError, writing
from overhaul.files import contents, read_json, remove, write_json, write_text
from overhaul.models import Checkpoint
from overhaul.recipe.materials import model_of
from overhaul.report.numbers import humanise

WRITTEN = {".safetensors", ".json"}
"""What is taken for a run's own beside its model where the list of it is lost: two models in one folder would be read."""


def key_of(*parts: Any) -> str:
    """A short hash of everything given, as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, default=contents)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_key(known: Checkpoint) -> str:
    """All that a model is opened with: weights and config, and beside them its words, its images' processor, its habits."""
    beside = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(known.folder.iterdir())
        if path.suffix in {".json", ".txt", ".model", ".jinja"} and path.name not in {"config.json", "lineage.json"}
    }
    return key_of(known.digest(), beside, *([model_key(known.base)] if known.base else []))


def key_outside(reference: Mapping[str, Any]) -> str:
    """Of a material that comes from outside the run and is no data: a model, or a file of tensors."""
    if "model" in reference:
        return model_key(model_of(reference))
    return file_digest(Path(reference["tensors"]))


@dataclass(frozen=True)
class Stage:
    """A model of the run: as it came in, or after a step.

    Attributes:
        name: of the step.
        key: of the model: all that it depends on.
        facts: of its folder.
        record: of the step.
        place: the step's folder.
        step_key: of the step, on which its products depend.
        changed: whether the step made a model; else the one before goes on.
    """

    name: str
    key: str
    facts: Checkpoint
    record: Mapping[str, Any] | None = None
    place: Path | None = None
    step_key: str = ""
    changed: bool = True


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _stamps(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files; nothing where there is none."""
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in _files(folder)]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in stats]


def _hashes(folder: Path) -> list[str]:
    """Of the contents of the same files: a copy has other times."""
    found = []
    for path in _files(folder):
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found


def _check_apart(root: Path, reads: Iterable[Checkpoint]) -> None:
    """Refuse to put a run where a model lies that it reads: what is made of a model would take its place."""
    inside = [known for known in reads if known.folder.resolve().is_relative_to(root.resolve())]
    if inside:
        raise RequestError(
            f"The recipe reads the model in {inside[0].folder}, and {root} is the folder of the run itself, whose models "
            "are replaced as it goes on. Choose another folder with -o."
        )


def _check_room(root: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    needed_bytes -= sum(path.stat().st_size for path in root.glob("steps/**/*") if path.is_file())  # done already
    if free < needed_bytes:
        raise RequestError(
            f"{root} lies on a disk with {humanise(free, 'bytes')} free; this run writes about "
            f"{humanise(needed_bytes, 'bytes')} (a model per step, and checkpoints of the training under way). Choose "
            "another folder with -o."
        )


def _refuse_links(root: Path) -> None:
    inside = (path for path in root.glob("*/*") if path.parent != root / "model")  # there, links are the user's own
    for path in [*root.glob("*"), *inside, *root.glob("steps/*/*")]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):  # to open a pipe may never end
            raise RequestError(
                f"{path} is a link or no file; a run folder holds what it wrote itself. Remove it, or choose another."
            )


def _tidy(root: Path) -> None:
    """Take away what a killed run left half-written."""
    for stale in [*root.glob(".*.partial"), *root.glob("steps/.*.partial")]:
        remove(stale)


def _lock(root: Path) -> int | None:
    """Keep other processes out of a run folder, where its file system knows locks.

    Raises:
        RequestError: one is at work there.
    """
    if os.name != "posix":
        return None
    import fcntl

    place = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise RequestError(
            f"Another process works on the run in {root} now. Wait until it ends, or choose another folder with -o."
        ) from None
    except OSError:  # a file system without locks
        pass
    return place


class RunFolder:
    """One run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """What was claimed is this process's until the `with` ends; a process that is killed lets go by itself."""
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Keep what is said inside in the folder."""
        if not processes.is_main():
            yield
            return
        with session.logged(self.root / "run.log"):
            yield

    def release(self) -> None:
        """Let other processes in."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @classmethod
    def claim(cls, root: Path, owner: str, needed_bytes: int, reads: Iterable[Checkpoint] = ()) -> RunFolder:
        """Take a new, empty or own folder.

        Args:
            root: where the run goes.
            owner: the recipe's name; a folder that holds the run of another is refused.
            needed_bytes: what the run will write, at the least.
            reads: the models that it begins from or reads.

        Raises:
            RequestError: the folder holds something else or a model that is read, another process works there, or the
                disk has too little room.
            RunError: it cannot be written.
        """
        marker = root / "run.json"
        with writing(root):
            taken = root.is_file()
        if taken:
            raise RequestError(f"{root} is a file; -o names a folder.")
        _check_apart(root, reads)
        if os.path.lexists(marker):
            _refuse_links(root)
            holds = (read_json(marker, holds=("recipe",)) or {}).get("recipe", owner)
            if holds != owner:
                raise RequestError(
                    f"{root} holds the run of another recipe ({holds!r}, not {owner!r}). Choose another folder with -o."
                )
        elif root.exists() and any(root.iterdir()):
            raise RequestError(f"{root} is not empty and holds no run of Overhaul. Choose another folder with -o.")
        claimed = cls(root)
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            claimed.lock = _lock(root)
        try:
            with writing(root):
                _tidy(root)
                _check_room(root, needed_bytes)
                write_json(marker, {"recipe": owner})
                (root / ".writable").touch()
                (root / ".writable").unlink()
        except BaseException:
            claimed.release()
            raise
        return claimed

    def step(self, number: int, name: str, key: str) -> Path:
        """Where a finished step lies."""
        return self.root / "steps" / f"{number:02d}-{name}-{key}"

    def finished_step(self, place: Path) -> bool:
        """Whether a step lies at its place as it was finished; one whose model was written into since is put aside.

        The published model shares its files with the last step's, where the file system has hard links: what is written
        over the one in place is in the other.
        """
        if not place.exists():
            return False
        record = read_json(place / "step.json", holds=("name", "made"))
        if record is not None:
            if self._as_finished(place, record):
                return True
            warnings.warn(
                f"{place / 'model'} was changed after its step was finished; the step is done again.", stacklevel=2
            )
        with writing(place):
            remove(place)
        return False

    def _as_finished(self, place: Path, record: Mapping[str, Any]) -> bool:
        """Whether a step's model is as it was written: by its stamps; of a copy, whose times are others, by contents."""
        kept, now = record.get("files"), _stamps(place / "model")
        if kept is None or kept == now:
            return True
        copied = [one[:2] for one in kept] == [one[:2] for one in now] and record.get("sha256") == _hashes(
            place / "model"
        )
        if copied:
            write_json(place / "step.json", {**record, "files": now})
        return copied

    def scratch(self, key: str) -> Path:
        """Where the checkpoints of a step under way lie; removed when it is done."""
        return self.root / "steps" / f".{key}.working"

    def finish_step(self, place: Path, partial: Path, record: Mapping[str, Any], key: str) -> None:
        """Make a step's folder complete and visible in one rename; its checkpoints are no longer needed."""
        kept = {"files": _stamps(partial / "model"), "sha256": _hashes(partial / "model")}
        write_json(partial / "step.json", {**record, **kept})
        with writing(place):
            os.replace(partial, place)
        shutil.rmtree(self.scratch(key), ignore_errors=True)

    def judged(self, key: str) -> Path:
        """Where the judge's numbers on one model lie."""
        return self.root / "judged" / f"{key}.json"

    def timed(self, key: str) -> Path:
        """Where the times of several models lie."""
        return self.root / "timed" / f"{key}.json"

    def tidy(self) -> None:
        """Take away the checkpoints of steps that are no longer under way, nor part of the recipe."""
        for stale in self.root.glob("steps/.*.working"):
            shutil.rmtree(stale, ignore_errors=True)

    def publish(self, source: Path, texts: Mapping[str, str]) -> None:
        """Put the last step's model, with its papers, at OUT/model; the old one is replaced only when it is complete.

        What somebody else put beside the old one stays: `published.json` says what was ours.
        """
        target, partial, old = self.root / "model", self.root / ".model.partial", self.root / ".model.old"
        listed = self.root / "published.json"
        ours = read_json(listed, list) or [path.name for path in target.glob("*") if path.suffix in WRITTEN]
        with writing(target):
            for stale in (partial, old):
                remove(stale)
            partial.mkdir(parents=True)
            for file in sorted(source.iterdir()):
                _put(file, partial)
            for name, text in texts.items():
                write_text(partial / name, text)
            names = sorted(path.name for path in partial.iterdir())
            for file in target.glob("*"):
                if file.name not in ours and file.name not in names:
                    _put(file, partial)
            if target.exists():
                os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old, ignore_errors=True)
        write_json(listed, names)


def _put(file: Path, folder: Path) -> None:
    """A file or folder under its own name in another folder: a second name where the file system has them, else a copy."""
    place = folder / file.name
    if file.is_dir() and not file.is_symlink():
        shutil.copytree(file, place, symlinks=True)
        return
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(file, place, follow_symlinks=False)
