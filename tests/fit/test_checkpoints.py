"""Going on from where a training stood: after an interruption, in another training, on a branch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from conftest import FAMILIES, examples_for
from fit.test_loop import KNOBS, same, small, two_roles, weights
from overhaul import session
from overhaul.fit import Ledger, Training, fit
from overhaul.fit.checkpoints import TrainingState
from overhaul.fit.schedules import Infinite
from overhaul.objectives import cross_entropy


def interrupted(at: int, error: type[BaseException] = KeyboardInterrupt) -> session.Report:
    def report(what: str, done: int, total: int, detail: str) -> None:
        if done == at:
            raise error

    return report


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
@pytest.mark.parametrize("way", ["asked to stop", "interrupted"])
def test_resuming_gives_the_same_weights_bit_for_bit(family: str, way: str, tmp_path: Path) -> None:
    dropout = {"gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1}, "llama": {"attention_dropout": 0.1}}.get(family, {})
    data = {"a": examples_for(family, 10, seed=1), "b": examples_for(family, 7, seed=2)}
    terms = [cross_entropy("a", name="a"), cross_entropy("b", 0.5, "b")]

    def train(scratch: Path | None, stop: Any = None, report: session.Report = lambda *_: None) -> tuple[Any, Ledger]:
        torch.manual_seed(3)
        model = FAMILIES[family](**dropout)
        with (
            session.using(scratch=scratch, checkpoint_seconds=0.0, report=report),
            Training(model, data, steps=8, lr=1e-2, warmup=2, schedule="cosine") as training,
        ):
            for step in training:
                if stop and stop(training.ledger):
                    break
                step.take(terms, {"a": 4, "b": 3})
        return weights(model), training.ledger

    straight, whole = train(None)
    if way == "asked to stop":
        train(tmp_path, stop=lambda ledger: ledger.step == 5)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, report=interrupted(6))  # the fifth step is the last that was saved
    resumed, ledger = train(tmp_path)
    assert same(resumed, straight)
    assert ledger.curves == whole.curves
    assert (ledger.step, ledger.examples, ledger.tokens) == (whole.step, whole.examples, whole.tokens)
    assert ledger.examples == {"a": 32, "b": 24}


def test_a_checkpoint_is_safetensors_and_never_half_written(tmp_path: Path) -> None:
    with session.using(scratch=tmp_path, checkpoint_seconds=0.0):
        fit(small(), [cross_entropy("a")], {"a": examples_for("llama", 8)}, steps=2, name="heal", **KNOBS)
    (file,) = tmp_path.iterdir()
    assert file.name == "heal.checkpoint"
    with safe_open(str(file), framework="pt") as opened:
        assert any(key.startswith("optimizer/") for key in opened.keys())  # noqa: SIM118


def test_no_scratch_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(small(), [cross_entropy("a")], {"a": examples_for("llama", 8)}, steps=1, **KNOBS)
    assert not list(tmp_path.iterdir())


def test_a_state_continues_one_training_in_another_bit_for_bit() -> None:
    terms, data = two_roles()
    rates = Infinite(warmup=2, cooled=5, plateau=0.5, floor=0.1)
    knobs: dict[str, Any] = {"batch_size": {"a": 7, "b": 4}, "lr": 1e-2, "schedule": rates}
    torch.manual_seed(0)
    straight, whole = small(), TrainingState()
    once = fit(straight, terms, data, steps=9, state=whole, **knobs)
    torch.manual_seed(0)
    model, state = small(), TrainingState()
    parts = [fit(model, terms, data, steps=steps, state=state, **knobs) for steps in (4, 5)]
    assert same(weights(model), weights(straight))
    assert once.curves["lr"] == [*parts[0].curves["lr"], *parts[1].curves["lr"]]
    assert (state.step, state.examples) == (9, {"a": 63, "b": 36}) == (whole.step, whole.examples)
    for name, values in whole.optimizer.items():
        assert all(torch.equal(value, state.optimizer[name][key]) for key, value in values.items())


def test_a_branch_of_a_state_leaves_the_plateau_where_it_was() -> None:
    """The release protocol of an infinite schedule: anneal a copy, go on from before."""
    terms, data = [cross_entropy("a")], {"a": examples_for("llama", 20)}
    rates, state = Infinite(warmup=1, cooled=1, plateau=1.0, floor=0.1), TrainingState()
    model = small()
    fit(model, terms, data, steps=3, batch_size=4, lr=1e-2, schedule=rates, state=state)
    kept, branch, release = copy.deepcopy(state), copy.deepcopy(state), copy.deepcopy(model)
    annealed = fit(
        release, terms, data, steps=2, batch_size=4, lr=1e-2, schedule=rates.annealed(3, 2), state=branch
    )  # fmt: skip
    assert annealed.curves["lr"] == pytest.approx([1e-2, 1e-2 * 0.1**0.5])
    assert (state.step, branch.step) == (3, 5) and state.examples == kept.examples
    for name, values in kept.optimizer.items():
        assert all(torch.equal(value, state.optimizer[name][key]) for key, value in values.items())


@pytest.mark.parametrize("way", ["a state", "a checkpoint"])
def test_what_an_optimizer_keeps_stays_in_its_own_dtype(way: str, tmp_path: Path) -> None:
    """Of a bfloat16 parameter the momentum may be float32, which torch's own `load_state_dict` would round."""

    class Momentum(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    kept = self.state[p].setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
                    self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
                    kept.mul_(0.9).add_(p.grad.float())
                    p.sub_(group["lr"] * kept.to(p.dtype))

    def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return Momentum(trained.values(), {"lr": 1.0})

    data = {"a": examples_for("llama", 10)}
    knobs: dict[str, Any] = {"batch_size": 4, "lr": 1e-2, "optimizer": build}
    straight = small().to(torch.bfloat16)
    fit(straight, [cross_entropy("a")], data, steps=6, **knobs)
    torch.manual_seed(0)
    model = small().to(torch.bfloat16)
    if way == "a state":
        state = TrainingState()
        for _ in range(2):
            fit(model, [cross_entropy("a")], data, steps=3, state=state, **knobs)
        assert state.optimizer["model.norm.weight"]["steps"] == 6
    else:
        with session.using(scratch=tmp_path, checkpoint_seconds=0.0):
            with pytest.raises(KeyboardInterrupt), session.using(report=interrupted(4)):
                fit(model, [cross_entropy("a")], data, steps=6, **knobs)
            fit(model, [cross_entropy("a")], data, steps=6, **knobs)
    assert same(weights(model), weights(straight))
