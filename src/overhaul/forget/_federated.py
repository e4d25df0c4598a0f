"""How messages travel between parties in processes of their own, with Flower.

1. `Federation` sends a `Message` through a Flower grid, and `client_app` answers it beside the columns. The numbers are
   those of parties in one process.
2. Flower may start a process for every message, so a party's state lies in Flower's context between two of them; its
   embeddings are then computed twice a round. A bottom with dropout or learning norms must not be in training mode there.
3. `Processes` is a grid without a server: one process a party on this machine, which answers Flower's own messages, as
   protobuf, through a pipe. With Flower's server the same `client_app` runs in `flower-supernode` (`--node-config`
   names its files), and `Federation` in a ServerApp.
4. Flower's server does not hide what it passes on: use TLS, and let the active party run it.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import torch

from overhaul.errors import RequestError, RunError
from overhaul.forget._messages import NOTHING, Message, lost
from overhaul.forget._parties import PassiveParty, Rates


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


def client_app(party: Callable[[Any], PassiveParty]) -> Any:
    """A Flower ClientApp that is one passive party.

    Args:
        party: Flower's context -> the party as it was before the first round, such as `party_from` with its node config.
    """
    app = flower("flwr.app")
    client: Any = flower("flwr.clientapp").ClientApp()

    @client.query("parties")
    def answer(message: Any, context: Any) -> Any:
        own = party(context)
        if "party" in context.state.array_records:
            tensors = {name: torch.from_numpy(a.numpy()) for name, a in context.state.array_records["party"].items()}
            own.resume(tensors, int(context.state.config_records["party at"]["round"]))
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
            "features" is [N, *block]; `lr`, and `momentum`, `weight_decay` and `clip` if wanted.
    """
    from safetensors.torch import load_file

    from overhaul.models import open_model

    rates = {name: float(config[name]) for name in ("lr", "momentum", "weight_decay", "clip") if name in config}
    features = load_file(config["features"])["features"]
    return PassiveParty(int(config["party"]), open_model(config["part"])[0], features, Rates(**rates))


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
        found = cls(grid, nodes, timeout)._replies([(node, nobody) for node in nodes])
        by_party = {reply.party: node for node, reply in found.items()}
        if sorted(by_party) != list(range(parties)) or len(nodes) != parties:
            raise RunError(f"{parties} parties were expected, numbered from 0; {len(nodes)} came: {sorted(by_party)}.")
        return cls(grid, [by_party[k] for k in range(parties)], timeout)

    @property
    def parties(self) -> int:
        """How many there are."""
        return len(self.nodes)

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        """One message to each party and its reply."""
        self.recorded += messages
        found = self._replies([(self.nodes[message.party], message) for message in messages])
        self.recorded += found.values()
        for message in messages:
            if self.nodes[message.party] not in found:
                raise lost(message, f"no reply within {self.timeout:g} s")
        return [found[self.nodes[message.party]] for message in messages]

    def _replies(self, addressed: Sequence[tuple[int, Message]]) -> dict[int, Message]:
        app = flower("flwr.app")
        self._sent += 1
        sent = [
            app.Message(to_records(message), dst_node_id=node, message_type=ACTION, group_id=str(self._sent))
            for node, message in addressed
        ]
        replies = self.grid.send_and_receive(sent, timeout=self.timeout)
        return {r.metadata.src_node_id: from_records(r.content) for r in replies if r.has_content()}


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
    _identify(int(config["party"]) + 1)
    channel, sys.stdout = sys.stdout.buffer, sys.stderr  # what else is printed must not get between messages
    node = int(config["party"]) + 1
    context = app.Context(run_id=0, node_id=node, node_config=config, state=app.RecordDict(), run_config={})
    client = client_app(lambda context: party_from(context.node_config))
    while frame := _read(sys.stdin.buffer):
        reply = client(_message(frame), context)
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
