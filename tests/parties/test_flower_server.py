"""Under Flower's own server, on this machine: a server, a supernode a party, each with its own files.

They take minutes, most of it waiting for processes: run `make federated-test`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dealing import dealt, network
from overhaul.forget.vertical import Unlearning, unlearn
from overhaul.models import open_model, save
from overhaul.parties.flower import party_from
from overhaul.parties.messages import InProcess
from overhaul.parties.party import ActiveParty, Rates

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

APP = Path(__file__).parents[2] / "docs" / "federated"
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
RATES = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "clip": 1.0}

LOSING = '''
"""An active party that waits, in the middle of its first round, until somebody has killed a passive one."""

import time
from pathlib import Path

import torch
from flwr.serverapp import ServerApp
from safetensors.torch import load_file

from overhaul.parties.flower import Federation
from overhaul.parties.messages import NOTHING, Message, PartyLost
from overhaul.parties.party import ActiveParty, Rates
from overhaul.forget.vertical import Unlearning
from overhaul.models import open_model
from overhaul.files import write_json

app = ServerApp()


class Waiting:
    def __init__(self, grid):
        self.get_node_ids, self.grid = grid.get_node_ids, grid

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        if any(m.content.config_records["step"]["phase"] == "ask" for m in messages):
            (folder / "asked").touch()
            while not (folder / "killed").exists():
                time.sleep(0.1)
        return replies


@app.main()
def main(grid, context):
    global folder
    folder = Path(context.run_config["top"]).parent
    top, labels = open_model(folder / "top")[0], load_file(folder / "labels.safetensors")["labels"]
    federation = Federation.of(Waiting(grid), 2, 120.0)
    federation.timeout = 90.0
    active = ActiveParty(top, labels, federation, Rates(0.1, 0.9, clip=1.0))
    look, said = [Message(0, "look", 0, torch.arange(8), NOTHING)], ""
    (before,) = federation.exchange(look)
    weights = {name: tensor.clone() for name, tensor in top.state_dict().items()}
    try:
        active.round(torch.arange(8), Unlearning(top, torch.tensor([0])))
    except PartyLost as error:
        said = str(error)
    phases = [message.phase for message in federation.recorded if message.party == 0]
    (after,) = federation.exchange(look)
    stayed = torch.equal(before.values, after.values)
    kept = all(torch.equal(tensor, weights[name]) for name, tensor in top.state_dict().items())
    write_json(folder / "lost.json", {"said": said, "phases": phases, "stayed": stayed, "kept": kept})
'''


@pytest.fixture
def configs(tmp_path: Path) -> list[dict[str, Any]]:
    """Node configs of the passive parties, a folder each; beside them lies the active party's folder."""
    save(network().top, None, tmp_path / "active" / "top")
    save_file({"labels": LABELS}, tmp_path / "active" / "labels.safetensors")
    return dealt(tmp_path, RATES)


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def as_toml(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())


class Flower:
    """Flower's server and a supernode a party, on free ports of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.running: list[subprocess.Popen[bytes]] = []
        # programs are found by PATH; nothing is fetched, told or looked up elsewhere
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FLWR_HOME": str(self.home)}
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        quick = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, **quiet, **quick}

    def begin(self, configs: list[dict[str, Any]]) -> None:
        server, *nodes = free_ports(1 + len(configs))
        address = f"127.0.0.1:{server}"
        self.home.mkdir()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        )
        here = ["--insecure", "--host", "127.0.0.1", "--port"]
        self.start("flower-superlink", *here, str(server), "--disable-runtime-dependency-installation")
        for port, config in zip(nodes, configs, strict=True):
            self.start("flower-supernode", *here, str(port), "--superlink", address, "--node-config", as_toml(config))
        self.wait(lambda: answers(server), 120)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"log-{len(self.running)}").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.folder)
        self.running.append(process)
        return process

    def run(self, app: Path, **config: Any) -> subprocess.Popen[bytes]:
        return self.start("flwr", "run", str(app), "here", "--stream", "-c", as_toml(config))

    def wait(self, done: Any, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < ends, self.logs()
            time.sleep(0.2)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        assert not psutil.wait_procs(family, timeout=30)[1]

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("log-*")))


def answers(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def flower(folder: Path, configs: list[dict[str, Any]]) -> Iterator[Flower]:
    server = Flower(folder)
    try:
        server.begin(configs)
        yield server
    finally:
        for process in server.running:
            if process.poll() is None:
                server.kill(process)


def test_under_flowers_server_the_numbers_are_those_of_one_process_and_each_party_saves_its_own_part(
    tmp_path: Path, configs: list[dict[str, Any]]
) -> None:
    active = tmp_path / "active"
    with flower(tmp_path, configs) as server:
        run = server.run(
            APP, top=str(active / "top"), labels=str(active / "labels.safetensors"), into=str(active / "after"),
            epochs=1, lr=0.1, **{"weight-decay": 0.0},
        )  # fmt: skip
        server.wait(lambda: run.poll() is not None or (active / "after" / "run.json").exists(), 1000)
        assert (active / "after" / "run.json").exists(), server.logs()
    told = json.loads((active / "after" / "run.json").read_text())
    parties = [party_from(config) for config in configs]
    inside = InProcess(parties)
    top = network().top
    torch.manual_seed(0)
    objective = Unlearning(top, torch.tensor([0]))
    one = ActiveParty(top, LABELS, inside, Rates(**RATES))
    curves = unlearn(one, torch.arange(4), torch.arange(4, 8), objective, epochs=1, batch_size=32, limit=1 / 3)
    for name, values in curves.items():
        torch.testing.assert_close(torch.tensor(told["curves"][name]), torch.tensor(values), atol=1e-6, rtol=0)
    folders = [active / "after", *(Path(config["into"]) for config in configs)]
    for kept, module in zip(folders, [top, *(party.bottom for party in parties)], strict=True):
        saved = open_model(kept)[0].state_dict()
        assert saved.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(saved[name], tensor, atol=1e-6, rtol=0)
    moved = load_file(Path(configs[0]["into"]) / "model.safetensors")["network.1.weight"]
    assert not torch.equal(moved, network().bottoms[0].state_dict()["network.1.weight"])
    crossed = [(m.round, m.phase, m.party, m.ids.tolist(), list(m.values.shape)) for m in inside.recorded]
    saving = [(2, phase, k, [], [0, 0]) for phase in ("save", "done") for k in (0, 1)]
    assert sorted(map(str, crossed + saving)) == sorted(str(tuple(message.values())) for message in told["crossed"])


def test_a_party_that_is_killed_within_a_round_is_named_and_the_others_have_not_moved(
    tmp_path: Path, configs: list[dict[str, Any]]
) -> None:
    active, app = tmp_path / "active", tmp_path / "losing"
    shutil.copytree(APP, app)
    (app / "server_app.py").write_text(LOSING)
    with flower(tmp_path, configs) as server:
        run = server.run(app, top=str(active / "top"))
        server.wait(lambda: run.poll() is not None or (active / "asked").exists(), 500)
        assert (active / "asked").exists(), server.logs()
        server.kill(server.running[2])
        (active / "killed").touch()
        server.wait(lambda: run.poll() is not None or (active / "lost.json").exists(), 600)
        assert (active / "lost.json").exists(), server.logs()
    told = json.loads((active / "lost.json").read_text())
    assert "Party 1 did not answer 'gradients' in round 0" in told["said"]
    assert told["phases"][-3:] == ["ready", "abort", "done"]
    assert told["stayed"] and told["kept"]
