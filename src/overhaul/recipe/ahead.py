"""What a run would find out on its way, found before it begins: rows are encoded, and a network without numbers is asked.

1. Of each source as many rows are encoded as take a moment (`affordable`); of a larger one the first, the last and the
   longest, while every row is looked at for its columns. A run encodes all.
2. A network without its weights (`stand_ins`) is given an example of every role that a step trains on or the judge
   measures; the judge's metrics and the methods themselves are run on it, up to where work would begin
   (`session.begins`). What they refuse until then is refused here.
3. A step that builds another network hands it on, at its end or where its work begins. Where it does not, later steps
   are asked about their data alone, and what only the new network would tell is left to the run.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import models, session
from overhaul.data.examples import Examples, collate, wrong_label
from overhaul.data.lazy import TextFile
from overhaul.data.materials import Row, Source, encode
from overhaul.data.values import FileRow, place_of
from overhaul.errors import MaterialWarning, RequestError
from overhaul.forward import forward
from overhaul.judge import harness
from overhaul.judge import judge as judging
from overhaul.method import Material
from overhaul.modes import at_rest
from overhaul.objectives import check_taken
from overhaul.recipe import products
from overhaul.recipe.check import Checked, Step
from overhaul.recipe.encoded import affordable, check_encoded, encoded
from overhaul.recipe.materials import model_of
from overhaul.recipe.stand_ins import DRAWN, Networks, NotYet, lacks_numbers, told
from overhaul.session import WorkBegins

SHOWN, STRETCH = 200, 50_000
"""Rows of a large source, from its beginning, its end and the longest; characters of a text that lies in a file."""


def look_ahead(checked: Checked, data: Mapping[str, Examples] | None = None) -> None:
    """Refuse what a run of this request would refuse, as far as that can be known without a weight.

    Args:
        checked: the request.
        data: the examples of every role, where they are at hand already.

    Raises:
        RequestError: with what is wrong, where, and what to write instead.
    """
    if data is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaterialWarning)  # they are among the notes
            data = {role: encoded(role, checked.rows[role], partial(_encoded, checked)) for role in checked.used}
        check_encoded(data, checked.model)
    judging.check_data(checked.requests, data)
    tasks = [request for request in checked.requests if request.task]
    config = getattr(models.planned(checked.model), "config", None) if tasks else None
    for one in tasks:
        harness.look_ahead(f"judge.{one.group}.{one.metric}", one.task, one.options, checked.processor, config)
    for known in checked.references_read():
        models.check_shapes(known)
    _check_anchors(checked, data)
    with _planning(checked.recipe.stack), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for known in (checked.model, *checked.references_read()):
            told(partial(models.load_weights, known, checked.recipe.dtype, checked.recipe.trust_remote_code), "")
        networks = Networks()
        network = networks.of(checked.model)
        if network is not None:
            _ask(network, checked, data)
        _ask_others(networks, checked, data)
        with tempfile.TemporaryDirectory() as scratch:  # for networks that a step is to read from their files
            _Stages(checked, data, networks, network, scratch).go()


def _ask(network: nn.Module, checked: Checked, data: Mapping[str, Examples], where: str = "") -> None:
    """Whether the network reads the examples, and can do what the judge asks of it."""
    judged = {role for request in checked.requests for role in request.roles.values()}
    widths: dict[str, int | None] = {}  # one of a kind stands for all
    for role, examples in data.items():
        if examples.kind not in widths:
            widths[examples.kind] = _width(role, examples, network)
        _check_said(role, examples, widths[examples.kind], type(network).__name__, role in judged)
    for request in checked.requests:
        told(partial(judging.try_out, network, request, data), "")


def _ask_others(networks: Networks, checked: Checked, data: Mapping[str, Examples]) -> None:
    """Whether the models beside the recipe's read what they will be given: a step's examples, or what is compared on."""
    given: dict[str, set[str]] = {}
    for step in checked.steps:
        examples = {name for name in step.materials if name in data}
        for role in step.method.roles:
            if role.is_model and role.name in step.reads:
                for name in step.names(role.name):
                    given.setdefault(name, set()).update(examples)
    judged = {name: set[str]() for name in checked.anchors}
    for request in checked.requests:
        judged.get(request.compared_with or "", set()).update(request.roles.values())
    for name in dict.fromkeys([*given, *judged]):
        reference = checked.references.get(name, {})
        other = networks.of(model_of(reference)) if "model" in reference else None
        if other is None:
            continue
        for role in sorted(given.get(name, set()) | judged.get(name, set())):
            try:
                width = _width(role, data[role], other)
                _check_said(role, data[role], width, type(other).__name__, role in judged.get(name, ()))
            except RequestError as error:
                raise RequestError(f"The model {name!r} ({reference['model']}): {error}") from error


@contextmanager
def _planning(stack: str | None) -> Iterator[None]:
    """Nothing is begun, and no random number is used up."""
    quiet = session.using(planning=True, scratch=None, device="cpu", stack=stack)
    with quiet, torch.random.fork_rng(devices=[]):
        yield


def _check_anchors(checked: Checked, data: Mapping[str, Examples]) -> None:
    """Whether the models that are compared with have every token of what they are asked."""
    for request in checked.requests:
        reference = checked.references.get(request.compared_with or "", {})
        words = model_of(reference).config.get("vocab_size") if "model" in reference else None
        if not isinstance(words, int):
            continue
        for role in request.roles.values():
            tokens = [item["input_ids"] for item in data[role].items if "input_ids" in item]
            if any(int(ids.max()) >= words for ids in tokens):
                raise RequestError(
                    f"The role {role!r} has tokens beyond the {words} of the {request.compared_with} model; both need one "
                    "tokenizer."
                )


def _encoded(checked: Checked, rows: Sequence[Row], spec: Source) -> Examples:
    """The examples of a source, or of some of its rows that stand for all."""
    return (
        checked.examples(rows, spec)
        if affordable(rows)
        else encode(_some(checked, spec, rows), spec, checked.processor)
    )


def _some(checked: Checked, spec: Source, rows: Sequence[Row]) -> Sequence[Row]:
    """Rows that are encoded in a moment and stand for all."""
    sizes = [(sum(each), number) for number, each in enumerate(checked.positions(spec, rows))]
    longest = sorted(number for _, number in sorted(sizes)[-SHOWN:])
    places = dict.fromkeys([*range(min(SHOWN, len(rows))), *longest, *range(max(0, len(rows) - SHOWN), len(rows))])
    return [_shortened(rows[place], f"row {place + 1}") for place in places]


def _shortened(row: Row, otherwise: str) -> Row:
    """The row with the beginning of a text that lies in a file."""
    values = {k: next(v.stretches(STRETCH), "") if isinstance(v, TextFile) else v for k, v in row.items()}
    return FileRow(place_of(row, otherwise), values)


SILENT = 0
"""The width of what a network says that has no output head."""


def _width(role: str, examples: Examples, network: nn.Module) -> int | None:
    """How many outputs the network has for such examples; None where that cannot be known.

    Raises:
        RequestError: it does not take them.
    """
    if examples.kind not in ("tokens", "pairs", "images"):
        return None
    check_taken(network, examples, f"The material {role!r}")
    try:
        with torch.no_grad(), at_rest(network):
            return forward(network, collate(examples.items[:1])).shape[-1]
    except (StopIteration, RequestError):  # what needs hidden states alone goes on
        return SILENT
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if lacks_numbers(error):
            return None
        reads = getattr(network, "main_input_name", "something else")
        raise RequestError(
            f"The material {role!r} holds {examples.kind}, which {type(network).__name__} does not take (it reads {reads}): "
            f"{error}"
        ) from error


def _check_said(role: str, examples: Examples, width: int | None, name: str, judged: bool) -> None:
    """Whether the network says something where it is judged, and has the classes that the examples name."""
    if width == SILENT and judged:
        raise RequestError(
            f"judge measures on {role!r}, but {name} has no output head: it returns hidden states and says nothing. "
            "Leave it out of `judge:`, or open the model as a class with a head (`architectures` in config.json)."
        )
    if width and (wrong := wrong_label(examples, width)):
        place, label = wrong
        raise RequestError(
            f"The material {role!r} has the label {label} (example {place + 1}), but {name} tells {width} classes apart, 0 "
            f"to {width - 1}. Correct the labels, or leave such rows out."
        )


class _Stages:
    """The steps one after the other, each with the network that it would be given, as far as that is known."""

    def __init__(
        self, checked: Checked, data: Mapping[str, Examples], made: Networks, network: nn.Module | None, scratch: str
    ) -> None:
        self.checked, self.data, self.made, self.scratch = checked, data, made, scratch
        self.networks: list[nn.Module | None] = [network]
        self.folders: list[models.Checkpoint | None] = [checked.model]

    def go(self) -> None:
        """Ask every step."""
        for step in self.checked.steps:
            handed = told(partial(self.ask, step), f"Step {step.number}, {step.name}: ")
            network, folder = self.networks[-1], self.folders[-1]
            if step.method.changes == "architecture":
                network, folder = handed if isinstance(handed, nn.Module) else None, None
                if network is not None:  # it is judged as the others are
                    _ask(network, self.checked, self.data, f"The model after step {step.number}, {step.name}: ")
            elif step.method.changes == "weights" and folder is not None:  # tensors of these names and shapes
                folder = replace(folder, source=f"step {step.number}")
            self.networks.append(network)
            self.folders.append(folder)

    def ask(self, step: Step) -> Any:
        """Run a step as far as it goes without weights: what it hands on, as far as that is known."""
        given = self.given(step)
        if given is None:
            return None
        torch.manual_seed(0)
        out = {"out": Path(self.scratch) / "model"} if step.method.writes else {}  # nothing comes to lie there
        try:
            made = step.method.call(**given, **out, **step.knobs).model
        except WorkBegins as begun:
            return begun.hands_on
        if step.method.changes == "architecture":
            _check_rebuilt(step, self.networks[-1], made)
        return made

    def given(self, step: Step) -> dict[str, Any] | None:
        """The materials of a step; None where the model that it changes is not known."""
        given: dict[str, Any] = {}
        if (subject := step.method.subject) is not None:
            known = self.stage(subject, len(self.networks) - 1)
            if known is None:
                return None
            given[subject.name] = known
        for role in step.method.roles:
            if role.name in step.reads:
                found = [self.material(role, name) for name in step.names(role.name)]
                given[role.name] = found if role.many else found[0]
        return given

    def material(self, role: Material, name: str) -> Any:
        """One material, as far as it is known."""
        reference = self.checked.references.get(name)
        if reference is None:
            return (
                self.data[name] if role.kind == "examples" else [r for _, rows in self.checked.rows[name] for r in rows]
            )
        if "made" in reference:
            return NotYet()
        if "tensors" in reference:
            return products.read("tensors", Path(reference["tensors"]))
        if "model" in reference:
            known = model_of(reference)
            found = known if role.kind == "checkpoint" else self.made.of(known)
        else:
            after = reference["after"]
            place = 0 if after == "start" else next(one.number for one in self.checked.steps if one.goes_by(after))
            found = self.stage(role, place)
        return NotYet() if found is None else found

    def stage(self, role: Material, place: int) -> Any:
        """The model after a number of steps: a network of the step's own, or its folder; None where it is not known."""
        network = self.networks[place]
        if role.kind == "checkpoint":
            if self.folders[place] is None and network is not None and self.checked.model.parameters <= DRAWN:
                folder = models.save(network, self.checked.processor, Path(self.scratch) / str(place))
                self.folders[place] = replace(models.facts(folder), source=f"step {place}")
            return self.folders[place]
        return None if network is None else copy.deepcopy(network).eval()


def _check_rebuilt(step: Step, before: nn.Module | None, after: Any) -> None:
    """Refuse a step that would hand on the network that it was given."""
    if before is not None and isinstance(after, nn.Module) and _built(before) == _built(after):
        raise RequestError(
            f"with {dict(step.knobs)} it would change nothing: the network has the same layers before and after it. Change "
            "its knobs, or leave the step out."
        )


def _built(network: nn.Module) -> Any:
    """What a network is apart from its numbers."""
    config: Any = getattr(network, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else config
    return type(network).__name__, described, {name: tensor.shape for name, tensor in network.state_dict().items()}
