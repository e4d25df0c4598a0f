"""Pushing a run's model: what a hub over HTTP is sent, and what never is."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from conftest import tiny_llama
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.recipe.push import push

OID = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload of small files asks for."""

    asked: list[tuple[str, Any]]
    refuses = False
    private = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        given = [json.loads(line) for line in body.splitlines() if line]
        self.asked.append((self.path, given))
        if self.refuses:
            return self.answer(403, {"error": "no rights here"})
        here = f"http://{self.headers['Host']}/me/forgot"
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": here, "name": "me/forgot"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in given[0]["files"]]
            return self.answer(200, {"files": files})
        return self.answer(200, {"commitUrl": f"{here}/commit/{OID}", "commitOid": OID, "success": True})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/forgot", "sha": "0" * 40, "private": self.private, "siblings": []})

    def answer(self, code: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Own", (Hub,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address, handler
        server.shutdown()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    models.save(tiny_llama(), None, tmp_path / "out" / "model")
    (tmp_path / "out" / "model" / "lineage.json").write_text("{}")
    return tmp_path / "out"


def test_nothing_leaves_the_machine_unless_it_is_said(hub: Any, finished: Path) -> None:
    _, handler = hub
    told = push(finished, "me/forgot")
    assert told.url is None and {"config.json", "model.safetensors", "lineage.json"} <= set(told.files)
    assert told.files["model.safetensors"] == (finished / "model" / "model.safetensors").stat().st_size
    assert not handler.asked


@pytest.mark.filterwarnings("ignore")
def test_every_file_goes_up_as_it_is(hub: Any, finished: Path) -> None:
    address, handler = hub
    done = push(finished, "me/forgot", dry_run=False)
    assert done.url == f"{address}/me/forgot/commit/{OID}"
    made = next(given[0] for path, given in handler.asked if path == "/api/repos/create")
    assert made.get("private") is True or made.get("visibility") == "private", made
    assert made["name"] == "forgot" and made["organization"] == "me"
    sent = next(given for path, given in handler.asked if "/commit/" in path)
    files = {one["value"]["path"]: one["value"] for one in sent if one["key"] == "file"}
    assert files.keys() == done.files.keys()
    for name, value in files.items():
        assert base64.b64decode(value["content"]) == (finished / "model" / name).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_what_a_hub_refuses_is_said_in_a_sentence(hub: Any, finished: Path) -> None:
    _, handler = hub
    handler.refuses = True
    with pytest.raises(RunError, match=r"(?s)me/forgot could not be pushed: .*403.*hf auth login"):
        push(finished, "me/forgot", dry_run=False)


@pytest.mark.filterwarnings("ignore")
def test_names_are_no_patterns_and_what_is_hidden_stays(hub: Any, finished: Path) -> None:
    _, handler = hub
    (finished / "model" / "notes [1].txt").write_text("x")
    (finished / "model" / ".git").mkdir()
    (finished / "model" / ".git" / "config").write_text("secret")
    done = push(finished, "forgot", dry_run=False)
    sent = next(given for path, given in handler.asked if "/api/models/me/forgot/commit/" in path)
    names = {one["value"]["path"] for one in sent if one["key"] == "file"}
    assert names == done.files.keys() and "notes [1].txt" in names and ".git/config" not in names


@pytest.mark.filterwarnings("ignore")
def test_nothing_goes_into_a_public_repository_unless_that_is_said(hub: Any, finished: Path) -> None:
    _, handler = hub
    handler.private = False
    with pytest.raises(RequestError, match=r"me/forgot is there already, and everybody may read it.*--public"):
        push(finished, "me/forgot", dry_run=False)
    assert not [path for path, _ in handler.asked if "/commit/" in path]
    assert push(finished, "me/forgot", dry_run=False, public=True).url


def test_what_is_no_model_or_no_name_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no finished model"):
        push(tmp_path, "me/forgot")
    with pytest.raises(RequestError, match="no name of a repository"):
        push(finished, "me/for got")
    (finished / "model" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(RequestError, match=r"optimizer\.pt may hold pickled code"):
        push(finished, "me/forgot")
