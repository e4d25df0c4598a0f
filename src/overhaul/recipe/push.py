"""`overhaul push`: put a finished run's model on a hub. Nothing leaves the machine unless it is said."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overhaul.errors import OverhaulError, RequestError, RunError

NEVER = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Files that may hold pickled code."""


@dataclass(frozen=True)
class Pushed:
    """What goes up, or went.

    Attributes:
        name: of the repository.
        files: each file's name and its bytes.
        url: of the commit; None of a dry run.
    """

    name: str
    files: dict[str, int]
    url: str | None


def push(run: str | Path, name: str, *, dry_run: bool = True, public: bool = False) -> Pushed:
    """Upload a run's model, its card and its lineage, to the hub that `HF_ENDPOINT` names.

    Args:
        run: a run folder, or a model folder.
        name: of the repository, "owner/name"; it is made if it is not there.
        dry_run: only say what would go up.
        public: whether everybody may read a repository that is made; else it is private.

    Raises:
        RequestError: there is no finished model, the name is none, a file may hold pickled code, or a repository that
            everybody can read is there already.
        RunError: the hub refused, or cannot be reached.
    """
    from huggingface_hub.utils import validate_repo_id

    folder = Path(run) / "model" if (Path(run) / "model").is_dir() else Path(run)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise RequestError(
            f"{run} holds no finished model: give a run's folder, or one with config.json and safetensors."
        )
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise RequestError(f"{name!r} is no name of a repository, such as `owner/name`: {error}") from None
    inside = ((path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file())
    # what begins with a dot is the machine's own: .git, .cache, .DS_Store
    files = {at.as_posix(): path.stat().st_size for at, path in inside if not any(p[0] == "." for p in at.parts)}
    for file in files:
        if Path(file).suffix in NEVER:
            raise RequestError(
                f"{folder / file} may hold pickled code, which is not pushed. Remove it from the folder."
            )
    return Pushed(name, files, None if dry_run else _upload(folder, name, list(files), public))


def _upload(folder: Path, name: str, files: list[str], public: bool) -> str:
    from huggingface_hub import HfApi

    hub: Any = HfApi()
    patterns = [glob.escape(file) for file in files]
    try:
        name = hub.create_repo(name, private=not public, exist_ok=True).repo_id
        if not public and hub.repo_info(name).private is False:
            raise RequestError(
                f"The repository {name} is there already, and everybody may read it. `--public` says that this is meant; "
                "nothing was uploaded."
            )
        done = hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=patterns, commit_message="A model changed by Overhaul"
        )
    except OverhaulError:
        raise
    except Exception as error:  # the hub client raises many kinds; the user needs one message
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = f"{name} could not be pushed: {' '.join(str(error).split()).rstrip('.')}."
        later = " Give the same command again later." if status is None or status >= 409 else ""
        login = " `hf auth login` says who you are." if status in (401, 403, 404) else ""
        raise RunError(said + login + later) from error
    return str(done.commit_url)
