from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from overhaul.errors import RequestError, RunError
from overhaul.forget._federated import Federation, Processes, from_records, party_from, to_records
from overhaul.forget._messages import InProcess, Message, PartyLost
from overhaul.forget._parties import ActiveParty, Rates, VerticalConfig, VerticalModel
from overhaul.forget.vertical import Unlearning, unlearn
from overhaul.models import save

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
RATES = {"lr": 0.1, "momentum": 0.9, "clip": 1.0}
FORGET, RECOVERY = torch.arange(4), torch.arange(4, 8)


def network() -> VerticalModel:
    torch.manual_seed(0)
    return VerticalModel(
        VerticalConfig(columns=[[0, 3], [3, 8]], bottoms=[{"widths": [6, 5]}, {"widths": [10, 4]}], top=[9, 3])
    )


def features() -> Tensor:
    return torch.randn(8, 1, 2, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each party's own files: its part of the network and its columns."""
    folder, model = tmp_path_factory.mktemp("parties"), network()
    found: list[dict[str, Any]] = []
    for k, (part, block) in enumerate(zip(model.bottoms, model.blocks(features()), strict=True)):
        own = folder / str(k)
        own.mkdir()
        save(part, None, own / "part")
        save_file({"features": block.contiguous()}, own / "features.safetensors")
        found.append({"party": k, "part": str(own / "part"), "features": str(own / "features.safetensors"), **RATES})
    return found


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
        (reply,) = federation._replies([(1, Message(0, "look", 0, FORGET, torch.empty(0, 0)))]).values()
        assert torch.equal(reply.values, before[1][0])
        with pytest.raises(RunError, match="2 parties were expected, numbered from 0; 1 came"):
            Federation.of(grid, 2, timeout=0.5)


def test_a_reply_that_comes_too_late_is_a_lost_party(grid: Processes) -> None:
    federation = Federation.of(grid, 2)
    federation.timeout = 0.0
    active = ActiveParty(network().top, LABELS, federation, Rates(**RATES))
    started = time.monotonic()
    with pytest.raises(PartyLost, match="no reply within 0 s"):
        active.logits(FORGET)
    assert time.monotonic() - started < 5
    federation.timeout = 30.0  # what came too late is not taken for the next reply
    assert torch.equal(active.logits(RECOVERY), active.logits(RECOVERY))
    assert [m.ids.tolist() for m in federation.recorded if m.phase == "embeddings"] == [RECOVERY.tolist()] * 4


def test_without_flower_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flwr.supercore.task_identity", None)
    with pytest.raises(RequestError, match=r"pip install overhaul\[federated\]"):
        Processes([{"party": 0, "part": str(tmp_path)}])
