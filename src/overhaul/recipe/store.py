"""The run folder: what is done, under which key, written so that a kill leaves either all of a thing or nothing.

OUT/run.json                    which recipe owns the folder
OUT/steps/01-forget.npo-KEY/    model/ and step.json, renamed into place when complete
OUT/judged/KEY.json             what the judge measured of one model
OUT/timed/KEY.json              how long models took that were timed in turn
OUT/model, report.html, report.json, recipe.yaml, lineage.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overhaul.errors import RequestError, writing
from overhaul.files import write_json, write_text
from overhaul.models import Checkpoint


def key_of(*parts: Any) -> str:
    """A short hash of everything given, as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


class RunFolder:
    """One run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def claim(cls, root: Path, owner: str, needed_bytes: int) -> RunFolder:
        """Take a new, empty or own folder.

        Args:
            root: where the run goes.
            owner: the recipe's name; a folder that holds the run of another is refused.
            needed_bytes: what the run will write, at the least.

        Raises:
            RequestError: the folder holds something else, or the disk has too little room.
            RunError: it cannot be written.
        """
        marker = root / "run.json"
        if root.is_file():
            raise RequestError(f"{root} is a file; -o names a folder.")
        if marker.exists():
            holds = json.loads(marker.read_text())["recipe"]
            if holds != owner:
                raise RequestError(
                    f"{root} holds the run of another recipe ({holds!r}, not {owner!r}). Choose another folder with -o."
                )
        elif root.exists() and any(root.iterdir()):
            raise RequestError(f"{root} is not empty and holds no run of Overhaul. Choose another folder with -o.")
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                write_json(marker, {"recipe": owner})
            (root / ".writable").touch()
            (root / ".writable").unlink()
        free = shutil.disk_usage(root).free
        if free < needed_bytes:
            raise RequestError(
                f"{root} lies on a disk with {free / 1e9:.1f} GB free; this run writes at least {needed_bytes / 1e9:.1f} GB "
                "(one model per step). Choose another folder with -o."
            )
        return cls(root)

    def step(self, number: int, name: str, key: str) -> Path:
        """Where a finished step lies."""
        return self.root / "steps" / f"{number:02d}-{name}-{key}"

    def scratch(self, key: str) -> Path:
        """Where the checkpoints of a step under way lie; removed when it is done."""
        return self.root / "steps" / f".{key}.working"

    def finish_step(self, place: Path, partial: Path, record: Mapping[str, Any], key: str) -> None:
        """Make a step's folder complete and visible in one rename; its checkpoints are no longer needed."""
        write_json(partial / "step.json", record)
        with writing(place):
            os.replace(partial, place)
        shutil.rmtree(self.scratch(key), ignore_errors=True)

    def judged(self, key: str) -> Path:
        """Where the judge's numbers on one model lie."""
        return self.root / "judged" / f"{key}.json"

    def timed(self, key: str) -> Path:
        """Where the times of several models lie."""
        return self.root / "timed" / f"{key}.json"

    def publish(self, source: Path, texts: Mapping[str, str]) -> None:
        """Put the last step's model, with its papers, at OUT/model; the old one is replaced only when it is complete."""
        target, partial, old = self.root / "model", self.root / ".model.partial", self.root / ".model.old"
        with writing(target):
            for stale in (partial, old):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in sorted(source.iterdir()):
                try:
                    os.link(file, partial / file.name)
                except OSError:  # a file system without hard links
                    shutil.copy2(file, partial / file.name)
            for name, text in texts.items():
                write_text(partial / name, text)
            if target.exists():
                os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old, ignore_errors=True)
