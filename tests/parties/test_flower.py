from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import tiny_vit
from dealing import dealt, network
from overhaul.errors import RequestError, RunError
from overhaul.forget.vertical import Unlearning, unlearn
from overhaul.models import open_model, save
from overhaul.parties.flower import (
    ACTION,
    Federation,
    Processes,
    _identify,
    client_app,
    flower,
    from_records,
    party_from,
    to_records,
)
from overhaul.parties.messages import NOTHING, InProcess, Message, PartyLost
from overhaul.parties.model import Part, PartConfig
from overhaul.parties.party import ActiveParty, Rates

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
RATES = {"lr": 0.1, "momentum": 0.9, "clip": 1.0}
FORGET, RECOVERY = torch.arange(4), torch.arange(4, 8)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return dealt(tmp_path_factory.mktemp("parties"), RATES)


@pytest.fixture(scope="module")
def grid(configs: list[dict[str, Any]]) -> Iterator[Processes]:
    # started the other way round: which node is which party must be asked
    with Processes(configs[::-1]) as running:
        yield running


def unlearnt(transport: Any) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Curves, and the active party's network afterwards."""
    model = network()
    active = ActiveParty(model.top, LABELS, transport, Rates(**RATES))
    torch.manual_seed(3)
    objective = Unlearning(model.top, torch.tensor([0]))
    curves = unlearn(active, FORGET, RECOVERY, objective, epochs=2, batch_size=4)
    return curves, model.top.state_dict()


def test_a_message_is_the_same_after_flowers_records() -> None:
    message = Message(3, "gradients", 1, torch.tensor([4, 2]), torch.randn(2, 5))
    again = from_records(to_records(message))
    assert again[:3] == message[:3]
    assert torch.equal(again.ids, message.ids) and torch.equal(again.values, message.values)


@pytest.mark.smoke
def test_processes_give_the_numbers_of_one_process_and_only_the_protocol_crosses(
    grid: Processes, configs: list[dict[str, Any]]
) -> None:
    inside = InProcess([party_from(config) for config in configs])
    curves, top = unlearnt(inside)
    federation = Federation.of(grid, 2)
    assert len({process.pid for process in grid.running}) == 2 and federation.nodes == [2, 1]
    far_curves, far_top = unlearnt(federation)
    torch.testing.assert_close(
        torch.tensor(far_curves["objective"]), torch.tensor(curves["objective"]), atol=1e-6, rtol=0
    )
    for name, tensor in top.items():
        torch.testing.assert_close(far_top[name], tensor, atol=1e-6, rtol=0)
    assert len(federation.recorded) == len(inside.recorded) > 0
    widths = {0: 5, 1: 4}
    for message in federation.recorded:
        records = to_records(message)
        assert set(records) == {"tensors", "step"}
        assert set(records["tensors"]) == {"ids", "values"}
        assert set(records["step"]) == {"round", "phase", "party"}
        assert sorted(message.ids.tolist()) in ([0, 1, 2, 3], [4, 5, 6, 7])
        carries = message.phase in ("embeddings", "gradients")
        assert message.values.shape == ((4, widths[message.party]) if carries else (0, 0))


def test_a_process_that_ends_is_named_and_the_others_have_not_moved(configs: list[dict[str, Any]]) -> None:
    with Processes(configs) as grid:
        federation = Federation.of(grid, 2)
        active = ActiveParty(network().top, LABELS, federation, Rates(**RATES))
        before = active.logits(FORGET), [m.values for m in federation.recorded if m.phase == "embeddings"]
        grid.running[1].terminate()
        grid.running[1].wait()
        with pytest.raises(
            PartyLost, match=r"Party 1 did not answer 'ask' in round 0 .*Going on without it is refused"
        ):
            active.round(FORGET, Unlearning(active.top, torch.tensor([0])))
        (reply,) = federation.exchange([Message(0, "look", 0, FORGET, torch.empty(0, 0))])
        assert torch.equal(reply.values, before[1][0])
        with pytest.raises(RunError, match="2 parties were expected, numbered from 0; 1 came"):
            Federation.of(grid, 2, timeout=0.5)


def test_a_reply_that_comes_too_late_is_a_lost_party(grid: Processes) -> None:
    federation = Federation.of(grid, 2)
    federation.timeout = 0.2
    active = ActiveParty(network().top, LABELS, federation, Rates(**RATES))
    started = time.monotonic()
    for process in grid.running:  # a party that is stopped cannot be in time
        process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(PartyLost, match="no reply within 0.2 s"):
            active.logits(FORGET)
        assert time.monotonic() - started < 5
    finally:
        for process in grid.running:
            process.send_signal(signal.SIGCONT)
    federation.timeout = 30.0  # what came too late is not taken for the next reply
    assert torch.equal(active.logits(RECOVERY), active.logits(RECOVERY))
    assert [m.ids.tolist() for m in federation.recorded if m.phase == "embeddings"] == [RECOVERY.tolist()] * 4


def test_each_party_saves_its_own_part_and_what_refuses_is_told(
    grid: Processes, configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    federation = Federation.of(grid, 2)
    (embedded,) = federation.exchange([Message(0, "look", 1, torch.arange(8), NOTHING)])
    federation.save(4)
    assert all(m.values.numel() == 0 for m in federation.recorded[2:])  # requests cross, never weights
    again = party_from({**configs[1], "part": configs[1]["into"]})
    look = Message(0, "look", 1, torch.arange(8), NOTHING)
    torch.testing.assert_close(again.handle(look).values, embedded.values, atol=1e-6, rtol=0)
    shutil.move(configs[1]["into"], tmp_path / "moved")
    shutil.copytree(configs[0]["into"], configs[1]["into"])
    with pytest.raises(RunError, match=r"Not every party has saved its part \(party 1: RequestError: .*exists already"):
        federation.save(4)


def test_saving_again_writes_nothing_and_never_over_another_network(
    configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    into, request = tmp_path / "into", Message(0, "save", 0, torch.empty(0, dtype=torch.long), NOTHING)
    party = party_from({**configs[0], "into": str(into)})
    party.handle(request)
    written = into.stat().st_mtime_ns
    party.handle(request)
    assert into.stat().st_mtime_ns == written
    with torch.no_grad():
        next(party.bottom.parameters()).add_(1.0)
    with pytest.raises(RequestError, match="exists already"):
        party.handle(request)
    with pytest.raises(RequestError, match="Party 0 has nowhere to save its part: give its node config `into`"):
        party_from({name: value for name, value in configs[0].items() if name != "into"}).handle(request)


def test_what_a_party_is_to_be_saved_to_must_not_exist_before_its_first_message(
    configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    _identify(0)
    app, into = flower("flwr.app"), tmp_path / "into"
    config = {**configs[0], "into": str(into)}
    context = app.Context(run_id=0, node_id=1, node_config=config, state=app.RecordDict(), run_config={})
    look = Message(0, "look", 0, torch.arange(2), NOTHING)
    message = app.Message(to_records(look), dst_node_id=1, message_type=ACTION)
    into.mkdir()
    with pytest.raises(RequestError, match="exists already, and party 0 is to be saved there: name another"):
        client_app()(message, context)
    into.rmdir()
    assert from_records(client_app()(message, context).content).values.shape == (2, 5)
    into.mkdir()  # as after saving: later messages are answered
    assert client_app()(message, context).has_content()


def test_a_node_config_that_lacks_something_and_a_part_that_does_not_fit_are_refused(
    configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    lacking = {name: value for name, value in configs[0].items() if name != "features"}
    with pytest.raises(RequestError, match="lacks 'features'; it has party, part, into, lr"):
        party_from(lacking)
    shutil.copytree(configs[0]["part"], tmp_path / "part")
    weights = Path(configs[1]["part"]) / "model.safetensors"
    shutil.copyfile(weights, tmp_path / "part" / "model.safetensors")
    with pytest.raises(RequestError, match="do not belong together"):
        party_from({**configs[0], "part": str(tmp_path / "part")})


def test_a_party_of_a_transformers_model_is_opened_and_saved_as_well(tmp_path: Path) -> None:
    inner: Any = tiny_vit().config
    part = Part(PartConfig(inner=inner.to_dict(), inner_class="ViTModel"))
    save(part, None, tmp_path / "part")
    save_file({"features": torch.randn(8, 1, 8, 8)}, tmp_path / "features.safetensors")
    names = {name: str(tmp_path / name) for name in ("part", "into")}
    party = party_from({"party": 0, **names, "features": str(tmp_path / "features.safetensors"), "lr": 0.1})
    with torch.no_grad():
        next(party.bottom.parameters()).add_(1.0)
    party.handle(Message(0, "save", 0, torch.empty(0, dtype=torch.long), NOTHING))
    saved = open_model(tmp_path / "into")[0].state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in party.bottom.state_dict().items())


def test_a_process_for_every_message_imports_neither_transformers_nor_an_optimizer_to_embed(
    configs: list[dict[str, Any]],
) -> None:
    code = f"""
import sys, torch
from overhaul.parties.flower import party_from
from overhaul.parties.messages import NOTHING, Message
party_from({configs[0]!r}).handle(Message(0, "ask", 0, torch.arange(4), NOTHING))
print("transformers" in sys.modules, "torch._dynamo" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"], told


def test_without_flower_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flwr.supercore.task_identity", None)
    with pytest.raises(RequestError, match=r"pip install overhaul\[federated\]"):
        Processes([{"party": 0, "part": str(tmp_path)}])
