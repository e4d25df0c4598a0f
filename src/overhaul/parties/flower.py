"""How messages travel between parties in processes of their own, with Flower.

1. `Federation` sends a `Message` through a Flower grid, and `client_app` answers it beside the columns. The numbers are
   those of parties in one process. docs/federated.md shows it under Flower's server.
2. Flower starts a process for every message, so a party's state lies in Flower's context between two of them; its
   embeddings are then computed twice a round. A bottom with dropout or learning norms must not be in training mode there.
3. That state ends with the run. `Federation.save` has every party write its part to its own disk; no weights cross.
4. `Processes` is a grid without a server: one process a party on this machine, which answers Flower's own messages, as
   protobuf, through a pipe.
5. Flower's server does not hide what it passes on: use TLS, and let the active party run it.

Flower is the extra `overhaul[federated]`.
"""

from __future__ import annotations

import importlib
import json
import random
import select
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.parties.messages import NOTHING, Message, lost
from overhaul.parties.party import PassiveParty, Rates, perceptron


def flower(module: str) -> Any:
    """A module of Flower.

    Raises:
        RequestError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # the typer that Flower pins uses what newer click deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"Parties in processes of their own need `pip install overhaul[federated]` ({error})."
        ) from error


ACTION = "query.parties"
"""The type of all our messages, as Flower names types."""


def to_records(message: Message) -> Any:
    """A message as Flower's RecordDict."""
    app = flower("flwr.app")
    arrays = {name: app.Array(getattr(message, name).detach().cpu().numpy()) for name in ("ids", "values")}
    step = {name: getattr(message, name) for name in ("round", "phase", "party")}
    return app.RecordDict({"tensors": app.ArrayRecord(arrays), "step": app.ConfigRecord(step)})


def from_records(records: Any) -> Message:
    """The message in a RecordDict."""
    arrays, step = records.array_records["tensors"], records.config_records["step"]
    ids, values = (torch.from_numpy(arrays[name].numpy()) for name in ("ids", "values"))
    return Message(int(step["round"]), step["phase"], int(step["party"]), ids, values)


def client_app() -> Any:
    """A Flower ClientApp that is one passive party: the one of its node config, see `party_from`.

    Before its first message the folder `into` must not exist, so that nobody trains what cannot be saved.
    """
    app = flower("flwr.app")
    client: Any = flower("flwr.clientapp").ClientApp()

    @client.query("parties")
    def answer(message: Any, context: Any) -> Any:
        own, into = party_from(context.node_config), context.node_config.get("into")
        if "party" in context.state.array_records:
            tensors = {name: torch.from_numpy(a.numpy()) for name, a in context.state.array_records["party"].items()}
            own.resume(tensors, int(context.state.config_records["party at"]["round"]))
        elif into and Path(into).exists():
            raise RequestError(f"{into!r} exists already, and party {own.number} is to be saved there: name another.")
        reply = own.handle(from_records(message.content))
        tensors = {name: app.Array(tensor.cpu().numpy()) for name, tensor in own.state().items()}
        context.state["party"] = app.ArrayRecord(tensors)
        context.state["party at"] = app.ConfigRecord({"round": own.round})
        return app.Message(to_records(reply), reply_to=message)

    return client


def party_from(config: Mapping[str, Any]) -> PassiveParty:
    """A passive party from its own files.

    Args:
        config: `party`, its number; `part`, the folder of its saved network; `features`, a safetensors file whose tensor
            "features" is [N, *block]; `lr`, and `momentum`, `weight_decay` and `clip` if wanted; `into`, the folder that
            its network is saved to when the active party says so.

    Raises:
        RequestError: one is missing, or the part's config and weights do not belong together.
    """
    if missing := [name for name in ("party", "part", "features", "lr") if name not in config]:
        raise RequestError(f"A party's node config lacks {missing[0]!r}; it has {', '.join(config)}.")
    rates = {name: float(config[name]) for name in ("lr", "momentum", "weight_decay", "clip") if name in config}
    features = load_file(config["features"])["features"]
    return PassiveParty(
        int(config["party"]), _bottom(config["part"]), features, Rates(**rates), keep=partial(_keep, config)
    )


def _bottom(part: str) -> nn.Module:
    """The network of a saved `Part`; a perceptron without transformers, which every message would wait for."""
    known = models.facts(part)
    if known.config.get("inner_class") or "widths" not in known.config:
        return models.open_model(part)[0]
    bottom = nn.Sequential(OrderedDict(network=perceptron(known.config["widths"], known.config["last"])))
    try:
        bottom.load_state_dict({name: tensor for f in known.weight_files for name, tensor in load_file(f).items()})
    except RuntimeError as error:
        raise RequestError(f"{part}: config.json and weights do not belong together: {error}") from error
    return bottom.eval()


def _keep(config: Mapping[str, Any], bottom: nn.Module) -> None:
    """Save a party's network beside the one that it started from.

    The request may come again where the reply was lost: a folder that holds these very weights is an answer.
    """
    if "into" not in config:
        raise RequestError(
            f"Party {config['party']} has nowhere to save its part: give its node config `into`, a folder."
        )
    whole, state = models.open_model(config["part"])[0], bottom.state_dict()
    whole.load_state_dict(state)
    if Path(config["into"]).exists():
        there = models.open_model(config["into"])[0].state_dict()
        if all(torch.equal(tensor, there.get(name, tensor.new_empty(0))) for name, tensor in state.items()):
            return
    models.save(whole, None, config["into"])


class Grid(Protocol):
    """What is used of `flwr.serverapp.Grid`."""

    def get_node_ids(self) -> Iterable[int]:
        """Of all clients."""
        ...

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        """The replies that came in time, in any order."""
        ...


@dataclass
class Federation:
    """Passive parties behind a Flower grid.

    Attributes:
        grid: of the ServerApp, or `Processes`.
        nodes: Flower's id of each party; see `of`.
        timeout: seconds after which a party counts as lost.
        recorded: every message that crossed, in order.
    """

    grid: Grid
    nodes: Sequence[int]
    timeout: float = 60.0
    recorded: list[Message] = field(default_factory=list)
    _sent: int = field(default_factory=lambda: random.getrandbits(48))

    @classmethod
    def of(cls, grid: Grid, parties: int, timeout: float = 60.0) -> Federation:
        """Wait for all parties, and ask each which one it is.

        Raises:
            RunError: not all came in time, or two have one number.
        """
        ends = time.monotonic() + timeout
        while len(nodes := list(grid.get_node_ids())) < parties and time.monotonic() < ends:
            time.sleep(0.1)
        nobody = Message(-1, "look", -1, torch.empty(0, dtype=torch.long), NOTHING)
        found, refused = cls(grid, nodes, timeout)._replies([(node, nobody) for node in nodes])
        by_party = {reply.party: node for node, reply in found.items()}
        if sorted(by_party) != list(range(parties)) or len(nodes) != parties:
            why = "".join(f" One refused: {reason}" for reason in refused.values())
            raise RunError(
                f"{parties} parties were expected, numbered from 0; {len(nodes)} came: {sorted(by_party)}.{why}"
            )
        return cls(grid, [by_party[k] for k in range(parties)], timeout)

    @property
    def parties(self) -> int:
        """How many there are."""
        return len(self.nodes)

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        """One message to each party and its reply."""
        replies, missing = self._crossing(messages)
        if missing:
            raise lost(*missing[0])
        return replies

    def save(self, round: int) -> None:
        """Have every party save its part to the folder `into` of its own node config.

        It may be called again: a party that has saved its part leaves it.

        Args:
            round: rounds held so far.

        Raises:
            RunError: a party did not save. It holds what it learnt for as long as the run lasts.
        """
        ids = torch.empty(0, dtype=torch.long)
        _, missing = self._crossing([Message(round, "save", k, ids, NOTHING) for k in range(self.parties)])
        if missing:
            told = "; ".join(f"party {message.party}: {why}" for message, why in missing)
            raise RunError(f"Not every party has saved its part ({told}). Correct that, then ask all of them again.")

    def _crossing(self, messages: Sequence[Message]) -> tuple[list[Message], list[tuple[Message, str]]]:
        """The replies in order, and the messages without one with the reason."""
        nodes = [(self.nodes[message.party], message) for message in messages]
        self.recorded += messages
        found, refused = self._replies(nodes)
        self.recorded += found.values()
        late = f"no reply within {self.timeout:g} s"
        missing = [(message, refused.get(node, late)) for node, message in nodes if node not in found]
        return [found[node] for node, _ in nodes if node in found], missing

    def _replies(self, addressed: Sequence[tuple[int, Message]]) -> tuple[dict[int, Message], dict[int, str]]:
        """By node: the replies, and why there is none."""
        app = flower("flwr.app")
        self._sent += 1
        sent = [
            app.Message(to_records(message), dst_node_id=node, message_type=ACTION, group_id=str(self._sent))
            for node, message in addressed
        ]
        replies = list(self.grid.send_and_receive(sent, timeout=self.timeout))
        found = {r.metadata.src_node_id: from_records(r.content) for r in replies if r.has_content()}
        return found, {r.metadata.src_node_id: r.error.reason for r in replies if r.has_error()}


class Processes:
    """A grid of one process a party on this machine; nodes are numbered from 1. Use it as a context.

    Args:
        configs: of each party, see `party_from`. A process is given its own and no other.
    """

    def __init__(self, configs: Sequence[Mapping[str, Any]]) -> None:
        _identify(0)
        code = f"from {__name__} import serve; serve()"
        start = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        # unbuffered: `select` knows nothing of bytes that Python has read ahead
        self.running = [
            subprocess.Popen([*start, json.dumps(dict(config))], stdin=pipe, stdout=pipe, bufsize=0)
            for config in configs
        ]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.communicate()

    def get_node_ids(self) -> list[int]:
        """Of the processes that run."""
        return [n for n, process in enumerate(self.running, start=1) if process.poll() is None]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Flower's messages, one to each process, and the replies that came in time."""
        serde = flower("flwr.common.serde")
        asked: list[tuple[Any, str]] = []
        for message in messages:
            process: Any = self.running[message.metadata.dst_node_id - 1]
            try:
                _write(process.stdin, serde.message_to_proto(message).SerializeToString())
            except BrokenPipeError:
                continue
            asked.append((process.stdout, message.metadata.group_id))
        ends = time.monotonic() + (timeout or 0.0)
        replies = [_reply(pipe, group, None if timeout is None else ends) for pipe, group in asked]
        return [reply for reply in replies if reply is not None]


def _reply(pipe: Any, group: str, ends: float | None) -> Any:
    """The reply to a message of this group; None where none came in time. One that came too late before is passed over."""
    while select.select([pipe], [], [], None if ends is None else max(0.0, ends - time.monotonic()))[0]:
        frame = _read(pipe)
        if not frame:
            return None
        if (reply := _message(frame)).metadata.group_id == group:
            return reply
    return None


def serve() -> None:
    """What a process of `Processes` does: answer messages from its standard input until that closes."""
    app, serde = flower("flwr.app"), flower("flwr.common.serde")
    torch.set_num_threads(1)
    config = json.loads(sys.argv[1])
    node = int(config["party"]) + 1
    _identify(node)
    channel, sys.stdout = sys.stdout.buffer, sys.stderr  # what else is printed must not get between messages
    context = app.Context(run_id=0, node_id=node, node_config=config, state=app.RecordDict(), run_config={})
    client = client_app()
    while frame := _read(sys.stdin.buffer):
        message = _message(frame)
        try:
            reply = client(message, context)
        except Exception as error:  # as Flower does: the party goes on, and the active one is told why
            reply = app.Message(app.Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        _write(channel, serde.message_to_proto(reply).SerializeToString())


def _identify(node: int) -> None:
    """Say who this process is, as Flower's server otherwise does: a message cannot be made without it."""
    identity: Any = flower("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = 0, node, 0


def _message(frame: bytes) -> Any:
    kind: Any = flower("flwr.proto.message_pb2").Message
    return flower("flwr.common.serde").message_from_proto(kind.FromString(frame))


def _write(pipe: BinaryIO | Any, frame: bytes) -> None:
    left = memoryview(len(frame).to_bytes(8, "big") + frame)
    while left:
        left = left[pipe.write(left) :]
    pipe.flush()


def _read(pipe: BinaryIO | Any) -> bytes:
    """The next frame; nothing where the other end was closed."""
    return _exactly(pipe, int.from_bytes(_exactly(pipe, 8), "big"))


def _exactly(pipe: BinaryIO | Any, count: int) -> bytes:
    """So many bytes, however many pieces they come in; fewer where the other end was closed."""
    found = b""
    while len(found) < count and (piece := pipe.read(count - len(found))):
        found += piece
    return found
