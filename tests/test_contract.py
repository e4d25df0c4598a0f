"""The battery: what every method must do, whatever it is. `contract.Case` says how a method is tried."""

from __future__ import annotations

import functools
import json
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import Case, Held, as_recipe, cases, marks
from overhaul import models, session
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.method import Method, methods
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.run import run
from overhaul.recipe.spec import read

METHODS = methods()
CASES = cases(METHODS)
EACH = pytest.mark.parametrize("name", CASES)
VARIED = [(name, knob) for name, case in CASES.items() for knob in case.varied]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_case_and_every_knob_a_place_in_it(name: str) -> None:
    verb, _, function = name.partition(".")
    assert name in CASES, f"declare a CASE in tests/{verb}/test_{function}.py; `contract.Case` says how"
    case = CASES[name]
    assert case.known is METHODS[name]
    assert {knob.name for knob in case.known.knobs} == {*case.varied, *case.idle}
    assert not set(case.varied) & set(case.idle) and all(case.idle.values())


class Tried:
    """One call of a case on a model that is set up oddly, and how all was before and after."""

    def __init__(self, case: Case, out: Path) -> None:
        self.case = case
        self.given = case.made()
        self.networks = {name: value for name, value in self.given.items() if isinstance(value, nn.Module)}
        for model in self.networks.values():
            model.train()
            next(one for one in model.modules() if not list(one.children())).eval()
            self.frozen(model).requires_grad_(False)
        self.before, self.folders = self.look(), digests(self.given)
        self.random = None
        self.outcome = case.run(out, self.given)
        self.random = torch.get_rng_state()
        self.after = self.look()
        torch.manual_seed(0)
        self.seeded = torch.get_rng_state()

    @staticmethod
    def frozen(model: nn.Module) -> nn.Parameter:
        """A parameter that the user has frozen."""
        return next(one for one in model.parameters() if one.ndim == 1)

    def look(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Tensors, modes, hooks and what trains, of every network by name."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, model in self.networks.items():
            found[name] = {
                "tensors": {key: value.clone() for key, value in model.state_dict().items()},
                "modes": {key: module.training for key, module in model.named_modules()},
                "hooks": {key: hooks(module) for key, module in model.named_modules() if hooks(module)},
                "trains": {key: one.requires_grad for key, one in model.named_parameters()},
                "gradients": {key: True for key, one in model.named_parameters() if one.grad is not None},
            }
        return found

    @property
    def changes(self) -> bool:
        return self.case.known.changes != "nothing"

    def subject(self, model: str) -> bool:
        """Whether the network of this name is the one that a stage hands on."""
        return self.case.known.subject is not None and model == self.case.known.subject.name


def digests(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of the checkpoints among the materials."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return {
        name: [one.digest() for one in value if isinstance(one, models.Checkpoint)] for name, value in lists.items()
    }


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for kind in kinds)


@functools.cache
def tried(name: str, base: Path) -> Tried:
    return Tried(CASES[name], base / f"tried-{name}")


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@EACH
def test_what_it_says_it_changes_is_all_that_changes(name: str, base: Path) -> None:
    it = tried(name, base)
    plain = it.case.made()
    for role, value in it.given.items():
        if isinstance(value, Examples):
            assert value.digest() == plain[role].digest(), f"the examples of {role!r} are others now"
    assert digests(it.given) == it.folders, "a checkpoint that it read is another now"
    for model, before in it.before.items():
        after, parameters = (
            it.after[model]["tensors"],
            dict(it.networks[model].named_parameters(remove_duplicate=False)),
        )
        same_shape = {
            key for key, value in before["tensors"].items() if key in after and after[key].shape == value.shape
        }
        moved = {key for key in same_shape if not equal(before["tensors"][key], after[key])}
        if not (it.changes and it.subject(model)):
            assert not moved and before["tensors"].keys() == after.keys(), f"{model} is another now"
        elif it.case.moves is not None:
            assert not {key for key in moved if not re.search(it.case.moves, key)}
        else:
            assert moved <= parameters.keys(), "a buffer has moved"
        if it.case.known.changes == "weights" and it.subject(model):
            assert moved and before["tensors"].keys() == after.keys() and len(same_shape) == len(after)
    if not it.changes:
        assert it.outcome.model is None or it.outcome.model in it.networks.values()


@EACH
def test_modes_hooks_gradients_and_the_random_state_are_as_they_were(name: str, base: Path) -> None:
    it = tried(name, base)
    for model, before in it.before.items():
        after = it.after[model]
        modes = {key: mode for key, mode in after["modes"].items() if key in before["modes"]}
        left_in_eval = it.changes and it.subject(model) and not any(modes.values())
        if not left_in_eval and "modes" not in it.case.apart:
            assert modes == {key: before["modes"][key] for key in modes}, model
        if "hooks" not in it.case.apart:
            assert after["hooks"] == before["hooks"], model
        assert not after["gradients"], model
        if "requires_grad" in it.case.apart:
            continue
        trains = {key: flag for key, flag in after["trains"].items() if key in before["trains"]}
        assert trains == {key: before["trains"][key] for key in trains}, model
    if "random state" not in it.case.apart:
        assert it.random is not None and torch.equal(it.random, it.seeded), "torch's generator has moved on"


@EACH
def test_saved_and_opened_again_it_gives_the_same(name: str, base: Path, tmp_path: Path) -> None:
    it = tried(name, base)
    result = it.outcome.model
    if result is None:
        assert not it.changes, "it says that it changes the model, and returns none"
        return
    examples = next((value for value in it.given.values() if isinstance(value, Examples)), None)
    saved = result if isinstance(result, Path) else models.save(result, None, tmp_path / "saved")
    opened = models.open_model(saved)[0]
    if isinstance(result, nn.Module):
        assert examples is not None, "without examples nothing can be compared"
        assert equal(outputs(result, examples), outputs(opened, examples))


@EACH
def test_an_empty_role_is_refused_in_words(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for material in case.known.materials:
        given = case.made()
        if given.get(material.name) is None or (material.is_model and not material.many):
            continue
        given[material.name] = [] if material.many or material.kind == "rows" else Examples([], [])
        if material.required:
            with pytest.raises(RequestError, match=material.name):
                case.run(tmp_path / "out", given)
                pytest.fail(f"{material.name} was taken without an example")
            continue
        try:
            case.run(tmp_path / "out", given)  # an optional role may as well be left out
        except RequestError as error:
            assert material.name in str(error)


def beyond(hint: Any) -> Iterator[Any]:
    """Values that an annotation does not allow."""
    kinds = list(alternatives(hint))
    for kind, bounds in kinds:
        for mark in bounds:
            for sign, step in (("gt", 0), ("ge", -1), ("lt", 0), ("le", 1)):
                if hasattr(mark, sign):
                    yield getattr(mark, sign) + step
        if kind is float:
            yield from (math.nan, math.inf)
        if kind is int and not any(other is float for other, _ in kinds):
            yield 1.5
    if not any(kind in (str, Any) for kind, _ in kinds):
        yield "no such choice"


def alternatives(hint: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The kinds of a union, each with its bounds."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *bounds = typing.get_args(hint)
        yield kind, tuple(bounds)
    elif typing.get_origin(hint) in (typing.Union, type(int | str)):
        for one in typing.get_args(hint):
            yield from alternatives(one)
    else:
        yield hint, ()


def hints(method: Method) -> dict[str, Any]:
    """The annotation of every knob, those of a group's fields included."""
    found = typing.get_type_hints(method.call, include_extras=True)
    for group, kind in method.groups.items():
        found |= {key: hint for key, hint in typing.get_type_hints(kind, include_extras=True).items() if key != group}
    return {knob.name: found[knob.name] for knob in method.knobs}


@EACH
def test_a_knob_out_of_its_range_is_refused_in_words(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    given = case.made()
    for knob, hint in hints(case.known).items():
        for value in beyond(hint):
            with pytest.raises(RequestError, match=rf"{re.escape(name)}: {knob}=.* is not possible"):
                case.run(tmp_path / "out", given, **{knob: value})
                pytest.fail(f"{knob}={value!r} was taken")


@functools.cache
def marks_of(name: str, knobs: str, base: Path) -> Mapping[str, str]:
    """What comes out with these knobs, which are written as Python."""
    return marks_with(CASES[name], base / f"{name}-{abs(hash(knobs))}", **eval(knobs))


def marks_with(case: Case, out: Path, **knobs: Any) -> dict[str, str]:
    given = case.made()
    subject = case.known.subject
    outcome = case.run(out, given, **knobs)
    model = outcome.model if isinstance(outcome.model, nn.Module) else None
    examples = next((value for value in given.values() if isinstance(value, Examples)), None)
    said = {"outputs": str(outputs(model, examples).tolist())} if model is not None and examples is not None else {}
    return marks(outcome, given[subject.name] if subject else None) | said


@torch.no_grad()
def outputs(model: nn.Module, examples: Examples) -> Tensor:
    """Logits of the first examples, in eval mode."""
    return forward(model.eval(), collate(examples.items[:4]))


@pytest.mark.parametrize(("name", "knob"), VARIED)
def test_two_values_of_a_knob_give_different_results(name: str, knob: str, base: Path) -> None:
    case = CASES[name]
    first, second, *needed = case.varied[knob]
    (others,) = needed or [{}]
    ours, theirs = (marks_of(name, repr({**case.knobs, **others, knob: one}), base) for one in (first, second))
    different = {part for part in ours.keys() | theirs.keys() if ours.get(part) != theirs.get(part)}
    # a fact that repeats the knob shows nothing
    told = {part for part in different if part.startswith("facts/") and ours.get(part) == json.dumps(first)}
    assert different - told, f"{knob}={first!r} and {knob}={second!r} give the same"


@EACH
def test_a_stopped_run_goes_on_and_gives_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reports: list[str] = []

    def stop_after(most: float) -> Callable[[str, int, int, str], None]:
        reports.clear()

        def report(what: str, done: int, total: int, detail: str) -> None:
            reports.append(what)
            if len(reports) >= most:
                raise KeyboardInterrupt

        return report

    with session.using(report=stop_after(math.inf)):
        whole = marks_with(case, tmp_path / "whole")
    steps = len(reports)
    (tmp_path / "scratch").mkdir()
    with session.using(scratch=tmp_path / "scratch", checkpoint_seconds=0.0, report=stop_after(steps * 2 // 3)):
        if steps > 1:
            with pytest.raises(KeyboardInterrupt):
                marks_with(case, tmp_path / "again")
    with session.using(scratch=tmp_path / "scratch", checkpoint_seconds=0.0, report=stop_after(math.inf)):
        again = marks_with(case, tmp_path / "again")
    assert again == whole
    if case.known.memory == "training" and "goes on" not in case.apart:
        assert steps > 1 and len(reports) < steps, "it began anew instead of going on"


@EACH
def test_a_recipe_runs_it_and_a_second_run_computes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    recipe = as_recipe(case, tmp_path)
    calls: list[str] = []
    plain = case.known.call

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.extend([name] * (not session.current().planning))
        return plain(*args, **kwargs)

    monkeypatch.setitem(vars(case.known), "call", counted)
    first = run(recipe, tmp_path / "run").report
    assert calls == [name]
    again = run(recipe, tmp_path / "run").report
    assert calls == [name], "the finished step was run again"
    assert [step["facts"] for step in again["steps"]] == [step["facts"] for step in first["steps"]]


WIDTH, INNER, TOLERANCE = 256, 768, 1.75
"""Networks of this width are mostly weights, as real ones are. In so small ones what is transient may add three quarters to
what was planned: a second copy of the model, or of what its training keeps, would be more."""


def wide(value: Any) -> Any:
    """The same network with more weights, where its config says how wide it is, and as many zeros as it has."""
    config: Any = getattr(value, "config", None)
    if not isinstance(value, nn.Module) or not {"hidden_size", "intermediate_size"} <= set(vars(config or object)):
        return value
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER}
    if getattr(config, "head_dim", None):
        sizes["head_dim"] = WIDTH // config.num_attention_heads
    make: Any = type(value)
    torch.manual_seed(0)  # what belongs to one network is alike
    wider = make(type(config)(**{**config.to_dict(), **sizes})).eval()
    with torch.no_grad():
        for name, parameter in wider.named_parameters():
            if parameter.ndim == 2:
                parameter[: int((value.get_parameter(name) == 0).float().mean() * len(parameter))] = 0
    return wider


PLANNED = [
    name for name, case in CASES.items() if case.known.memory in ("training", "forward") and "peak" not in case.apart
]
"""What streams is planned as a constant, and what holds gradients alone is measured less cheaply."""


@pytest.mark.parametrize("name", PLANNED)
def test_a_step_takes_no_more_memory_than_planned(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    made = replace(case, materials=lambda: {role: wide(value) for role, value in case.made().items()})
    (planned,) = plan(check(read(as_recipe(made, tmp_path))), 1e9)
    given = made.made()
    with Held(given) as held:
        made.run(tmp_path / "out", given)
    assert held.peak <= TOLERANCE * planned.peak_bytes, f"{held.peak / planned.peak_bytes:.2f} of what was planned"


def equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.nan_to_num(), theirs.nan_to_num())
