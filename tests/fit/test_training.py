"""The open loop: steps that a method writes itself, with the guards and the resume of `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_resnet
from fit.test_checkpoints import interrupted
from fit.test_loop import same, small, weights
from overhaul import session
from overhaul.data.examples import Batch, Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import Ledger, Training, TrainingState, adamw, fit, sgd
from overhaul.modes import at_rest
from overhaul.objectives import Term, cross_entropy, cross_entropy_sum, sequences, units


def norm_modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_norms_of_a_frozen_backbone_do_not_move() -> None:
    model, data = tiny_resnet(), {"a": examples_for("resnet", 8)}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fit(model, [cross_entropy("a")], data, steps=3, lr=1e-2, trainable=lambda name: name.startswith("classifier"))
    assert len(before) > 10 and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    fit(model, [cross_entropy("a")], data, steps=1, lr=1e-2)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_only_modules_in_which_something_trains_are_in_train_mode() -> None:
    """A frozen norm in a block that trains stays at rest; dropout is on where its block trains, and off where not."""
    model: Any = FAMILIES["vit"](hidden_dropout_prob=0.1).train()
    layers = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    layers[1].requires_grad_(False)
    for name, parameter in layers[2].named_parameters():
        parameter.requires_grad_("norm" not in name)
    dropouts = [[m for m in layer.modules() if isinstance(m, nn.Dropout)] for layer in layers]
    with Training(model, {}, steps=1):
        assert model.training and layers[0].training and not layers[1].training and layers[2].training
        assert all(m.training for m in dropouts[0]) and not any(m.training for m in dropouts[1])
        assert dropouts[1] and all(m.training for m in dropouts[2])
        assert not any(m.training for m in layers[2].modules() if isinstance(m, nn.LayerNorm))
        modes = [module.training for module in model.modules()]
        with at_rest(model):
            assert not any(module.training for module in model.modules())
        assert modes == [module.training for module in model.modules()]
    assert not any(module.training for module in model.modules())


def moved(dtype: torch.dtype, lr: float, steps: int) -> tuple[dict[str, Tensor], nn.Module]:
    torch.manual_seed(0)
    model = small().to(torch.bfloat16).float().to(dtype)  # one start for all
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    fit(model, [cross_entropy("a")], {"a": examples_for("llama", 12)}, steps=steps, batch_size=4, lr=lr)
    assert all(p.dtype is dtype for p in model.parameters())
    return {name: p.detach().float() - before[name] for name, p in model.named_parameters()}, model


def length(change: dict[str, Tensor]) -> float:
    return float(torch.stack([part.square().sum() for part in change.values()]).sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_moves_as_float32_does_up_to_the_rounding_of_storage(dtype: torch.dtype) -> None:
    """At this rate a step is far below what a bfloat16 weight can show: without masters almost nothing moves."""
    (low, _), (full, _) = moved(dtype, 1e-5, 60), moved(torch.float32, 1e-5, 60)
    rounding = {n: 0.5 * torch.finfo(dtype).eps * 1.1 for n in full}
    torch.manual_seed(0)
    start = small().to(torch.bfloat16).float()
    wide = {name: (p.detach().abs() + 1e-3) * rounding[name] for name, p in start.named_parameters()}
    apart = {name: (low[name] - full[name]).abs() for name in full}
    # of 60 steps of 1e-5 each, gradients in bfloat16 may turn a few about
    assert all((apart[name] <= wide[name] + 2e-4).float().mean() > 0.99 for name in full)
    assert length(low) > 0.5 * length(full)


def test_float16_gradients_do_not_overflow_or_vanish() -> None:
    """In float16 this loss, scaled by 1e6, has infinite gradients, and scaled by 1e-7 none."""
    for scale in (1e6, 1e-7):
        torch.manual_seed(0)
        model = small().half()
        before = weights(model)
        term = Term("a", lambda logits, batch, s=scale: cross_entropy_sum(logits, batch) * s, units)
        fit(model, [term], {"a": examples_for("llama", 8)}, steps=3, lr=1e-2)
        assert all(p.dtype is torch.float16 and p.isfinite().all() for p in model.parameters())
        assert not torch.equal(weights(model)["model.norm.weight"], before["model.norm.weight"])


def test_masters_are_in_the_checkpoint_and_in_the_state(tmp_path: Path) -> None:
    data, knobs = {"a": examples_for("llama", 9)}, {"batch_size": 4, "lr": 1e-4}

    def train(*parts: int, state: TrainingState | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = small().to(torch.bfloat16)
        for steps in parts:
            fit(model, [cross_entropy("a")], data, steps=steps, state=state, **knobs)
        return weights(model)

    straight = train(8)
    state = TrainingState()
    assert same(train(3, 5, state=state), straight) and state.masters
    state.save(tmp_path / "state")
    again = TrainingState.read(tmp_path / "state")
    assert (again.step, again.examples) == (8, {"a": 32}) and same(again.masters, state.masters)
    for name, values in state.optimizer.items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(again.optimizer[name][k])) for k, v in values.items()
        )
    with session.using(scratch=tmp_path, checkpoint_seconds=0.0):
        with pytest.raises(KeyboardInterrupt), session.using(report=interrupted(5)):
            train(8)
        assert same(train(8), straight)
    with pytest.raises(RequestError, match="holds no training state"):
        TrainingState.read(tmp_path)


def sampled(model: nn.Module, prompts: Examples, seed: int) -> Examples:
    """Each prompt with another last token, drawn by the model: a rollout of length one."""
    items = []
    generator = torch.Generator().manual_seed(seed)
    with at_rest(model), torch.no_grad():
        for item in prompts:
            logits: Any = model(input_ids=item["input_ids"][None, :-1]).logits[0, -1]
            token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            ids = torch.cat([item["input_ids"][:-1], token])
            items.append({"input_ids": ids, "labels": torch.cat([torch.full_like(ids[:-1], -100), token])})
    return Examples(items, [{}] * len(items))


def rolled(scratch: Path | None, report: session.Report = lambda *_: None) -> tuple[dict[str, Tensor], Training]:
    """Rollouts, a buffer of what they drew, noise from torch's generator, and a second optimizer on every third step."""
    torch.manual_seed(4)
    model = FAMILIES["gpt2"](n_layer=2, resid_pdrop=0.1)
    data = {"prompts": examples_for("llama", 10), "good": examples_for("llama", 7, seed=1)}
    with (
        session.using(scratch=scratch, checkpoint_seconds=0.0, report=report),
        Training(model, data, steps=7, lr=1e-2, others={"sft": adamw()}, name="rl") as training,
    ):
        for step in training:
            answers = sampled(model, step.draw("prompts", 4), step.seed)
            step.backward([cross_entropy("answers", 0.1, "reward")], {"answers": answers})
            step.apply()
            training.kept.setdefault("buffer", []).append(answers.items[0]["input_ids"])
            training.kept["noise"] = float(torch.rand(()))
            if step.number % 3 == 0:
                step.backward([cross_entropy("good", name="good")], {"good": step.draw("good", 2)})
                step.apply("sft")
    return weights(model), training


def test_a_loop_with_rollouts_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight, whole = rolled(None)
    with pytest.raises(KeyboardInterrupt):
        rolled(tmp_path, interrupted(5))
    resumed, training = rolled(tmp_path)
    assert same(resumed, straight)
    assert training.ledger.curves == whole.ledger.curves and training.ledger.examples == {"prompts": 28, "good": 6}
    assert training.kept["noise"] == whole.kept["noise"] and len(training.kept["buffer"]) == 7
    assert all(torch.equal(a, b) for a, b in zip(training.kept["buffer"], whole.kept["buffer"], strict=True))
    assert len(whole.ledger.curves["sft lr"]) == len(whole.ledger.curves["good"]) == 3
    assert len(whole.ledger.curves["loss"]) == len(whole.ledger.curves["reward"]) == 7


def test_a_second_optimizer_steps_on_its_own_parameters_alone() -> None:
    """As two parts of one model that play against each other: each step moves one of them."""
    model, data = small(), {"a": examples_for("llama", 8)}

    def upper(model: nn.Module, trained: Any) -> torch.optim.Optimizer:
        return sgd()(model, {name: p for name, p in trained.items() if "layers.1." in name})

    def lower(model: nn.Module, trained: Any) -> torch.optim.Optimizer:
        return sgd()(model, {name: p for name, p in trained.items() if "layers.1." not in name})

    def changed(before: dict[str, Tensor]) -> set[bool]:
        return {"layers.1." in name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    with Training(model, data, steps=2, lr=0.1, optimizer=lower, others={"upper": upper}) as training:
        for step in training:
            examples = step.draw("a", 4)
            before = weights(model)
            step.backward([cross_entropy("a")], {"a": examples})
            step.apply()
            assert changed(before) == {False}
            before = weights(model)
            step.backward([cross_entropy("a", -1.0)], {"a": examples})
            step.apply("upper")
            assert changed(before) == {True}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 9}, "steps is 6, here it is 9"),
        ({"schedule": "linear"}, "schedule is constant, here it is linear"),
        ({"batch_size": 2}, "batch size is 4"),
        ({"lr": 1e-3}, "lr is 0.01"),
        ({"trainable": lambda name: "mlp" in name}, "number of trained parameters"),
        ({"optimizer": adamw(weight_decay=0.3)}, r"weight_decay of main, group 1 is [0-9.]+, here it is 0\.3"),
        ({"optimizer": adamw((0.5, 0.9))}, r"betas of main, group 1"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    data, knobs = {"a": examples_for("llama", 8)}, {"steps": 6, "batch_size": 4, "lr": 1e-2}
    with session.using(scratch=tmp_path, checkpoint_seconds=0.0):
        with pytest.raises(KeyboardInterrupt), session.using(report=interrupted(3)):
            fit(small(), [cross_entropy("a")], data, **knobs)
        model = small()
        before = weights(model)
        with pytest.raises(RequestError, match=f"left by another training: its {named}"):
            fit(model, [cross_entropy("a")], data, **{**knobs, **changes})
        assert same(weights(model), before)


def test_a_term_reads_hidden_states_with_their_gradient() -> None:
    """Pulling what leaves block 1 to zero trains blocks 0 and 1 and not what comes after."""
    model, data = tiny_llama(num_hidden_layers=3, tie_word_embeddings=False), {"a": examples_for("llama", 6)}
    seen: list[torch.Size] = []

    def loss(logits: Tensor, batch: Batch, states: dict[str, Tensor]) -> Tensor:
        seen.append(states["leaving.1"].shape)
        assert states["model.norm"].shape == states["entering.0"].shape == seen[-1]
        return states["leaving.1"].square().sum()

    before = weights(model)
    pull = Term("a", loss, sequences, reads=("leaving.1", "entering.0", "model.norm"))
    ledger = fit(model, [pull], data, steps=12, batch_size=6, lr=1e-2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any("layers.2" in name or name == "model.norm.weight" or "lm_head" in name for name in changed)
    assert any("layers.1" in name for name in changed) and any("layers.0" in name for name in changed)
    assert ledger.curves["loss"][-1] < ledger.curves["loss"][0] and seen[0][-1] == 32
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RequestError, match=r"There is no site 'leaving\.7'"):
        fit(model, [Term("a", loss, sequences, reads=("leaving.7",))], data, steps=1)


def test_a_weight_follows_the_step_and_one_of_zero_spares_its_term() -> None:
    calls: list[int] = []

    def counting(logits: Tensor, batch: Batch) -> Tensor:
        calls.append(len(logits))
        return cross_entropy_sum(logits, batch)

    def fading(ledger: Ledger) -> float:
        return max(0.0, 1.0 - 0.5 * ledger.step)

    data = {"a": examples_for("llama", 4).select([0] * 4), "b": examples_for("llama", 4).select([1] * 4)}
    terms = [cross_entropy("a", name="a"), Term("b", counting, units, fading, "b")]
    ledger = fit(small(), terms, data, steps=4, batch_size=4, lr=1e-3)
    a, b = ledger.curves["a"], ledger.curves["b"]
    assert len(calls) == len(b) == 2 and ledger.examples == {"a": 16, "b": 16}
    assert ledger.curves["loss"] == pytest.approx([a[0] + b[0], a[1] + 0.5 * b[1], a[2], a[3]])


def test_a_step_that_is_not_applied_is_told() -> None:
    with (
        Training(small(), {"a": examples_for("llama", 4)}, steps=2) as training,
        pytest.raises(RuntimeError, match=r"step 1 of 'fit' ended without step\.apply\(\)"),
    ):
        for step in training:
            step.draw("a", 2)


def test_a_bad_step_leaves_weights_and_statistics_and_ends_the_loop() -> None:
    model, data = tiny_resnet(), {"a": examples_for("resnet", 8)}
    good = weights(model)
    worse = Term("a", lambda logits, batch: logits.sum() * torch.nan, sequences, name="worse")
    with (
        pytest.raises(RunError, match="step 2: the term 'worse' on the role 'a' is nan"),
        Training(model, data, steps=3) as training,
    ):
        for step in training:
            good = weights(model)
            step.take([cross_entropy("a")] if step.number == 0 else [worse], 4)
    assert same(weights(model), good) and training.ledger.step == 1


def test_gradients_of_several_backwards_add_up() -> None:
    results = []
    for apart in (False, True):
        torch.manual_seed(0)
        model, data = small(), {"a": examples_for("llama", 6), "b": examples_for("llama", 6, seed=1)}
        with Training(model, data, steps=2, lr=0.1, optimizer=sgd(), clip=None) as training:
            for step in training:
                drawn = {role: step.draw(role, 4) for role in "ab"}
                terms = [cross_entropy("a", name="a"), cross_entropy("b", 0.5, "b")]
                for part in [[term] for term in terms] if apart else [terms]:
                    step.backward(part, drawn)
                step.apply()
        results.append((weights(model), training.ledger.curves["loss"]))
    assert all(torch.allclose(results[0][0][name], value, atol=1e-6) for name, value in results[1][0].items())
    assert results[0][1] == pytest.approx(results[1][1])


def test_what_is_kept_must_be_plain(tmp_path: Path) -> None:
    with (
        session.using(scratch=tmp_path, checkpoint_seconds=0.0),
        pytest.raises(TypeError, match="keeps tensors, numbers, texts, lists and dicts of them, not a Linear"),
        Training(small(), {"a": examples_for("llama", 4)}, steps=2) as training,
    ):
        for step in training:
            step.take([cross_entropy("a")], 2)
            training.kept["head"] = nn.Linear(2, 2)
