"""What a run would find out on its way, found before it begins: rows are encoded, and a network without numbers is asked.

1. Of each source as many rows are encoded as take a moment (`AFFORDED`); of a larger one the first, the last and the
   longest, while every row is looked at for its columns. A run encodes all.
2. The network is built of fake tensors, which have shapes and no values. It is given an example of every role that a step
   trains on or the judge measures; the judge's metrics and the methods themselves are run on it, up to where work
   would begin (`session.begins`) or a number is needed, which is not there. What they refuse until then is refused here.
3. A step that builds another network hands it on where it gets to its end without numbers; if not, later steps are asked
   about their data alone, and what only the new network would tell is left to the run.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from overhaul import models, session
from overhaul.data.examples import Examples, collate
from overhaul.data.lazy import TextFile
from overhaul.data.materials import Row, Source
from overhaul.data.values import FileRow, place_of
from overhaul.errors import MaterialWarning, OverhaulError, RequestError
from overhaul.forward import forward
from overhaul.judge import harness
from overhaul.judge import judge as judging
from overhaul.method import Material, Outcome
from overhaul.modes import at_rest
from overhaul.recipe.check import Checked, Step
from overhaul.recipe.encoded import check_encoded, encoded
from overhaul.session import WorkBegins
from overhaul.weights.depths import built_names

AFFORDED = 20_000
"""Rows of a source that are all encoded; of more, three times `SHOWN` are."""

SHOWN, STRETCH = 200, 50_000
"""Rows of a large source, from its beginning, its end and the longest; characters of a text that lies in a file."""

Result = TypeVar("Result")


def look_ahead(checked: Checked, data: Mapping[str, Examples] | None = None) -> None:
    """Refuse what a run of this request would refuse, as far as that can be known without a weight.

    Args:
        checked: the request.
        data: the examples of every role, where they are at hand already.

    Raises:
        RequestError: with what is wrong, where, and what to write instead.
    """
    if data is None:
        some = {
            role: [(spec, _some(checked, spec, rows)) for spec, rows in checked.rows[role]] for role in checked.used
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaterialWarning)  # they are among the notes
            data = {role: encoded(role, parts, checked.processor) for role, parts in some.items()}
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
            _told(partial(models.load_weights, known, checked.recipe.dtype, checked.recipe.trust_remote_code), "")
        networks = _Networks()
        network = networks.of(checked.model)
        if network is not None:
            _ask(network, checked, data)
        _ask_others(networks, checked, data)
        _Stages(checked, data, networks, network).go()


def _ask(network: nn.Module, checked: Checked, data: Mapping[str, Examples]) -> None:
    """Whether the network reads the examples, and can do what the judge asks of it."""
    judged = {role for request in checked.requests for role in request.roles.values()}
    widths: dict[str, int | None] = {}  # one of a kind stands for all
    for role, examples in data.items():
        if examples.kind not in widths:
            widths[examples.kind] = _width(role, examples, network)
        _check_said(role, examples, widths[examples.kind], type(network).__name__, role in judged)
    for request in checked.requests:
        _told(partial(judging.try_out, network, request, data), "")


def _ask_others(networks: _Networks, checked: Checked, data: Mapping[str, Examples]) -> None:
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
        other = networks.of(models.facts(reference["model"])) if "model" in reference else None
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


class _Networks:
    """Networks without numbers."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, known: models.Checkpoint) -> nn.Module | None:
        """One as config.json describes it; None where its code is not to be run."""
        if known.base is not None:  # an adapter becomes part of its weights
            return self.of(known.base)
        if "quantization_config" in known.config:  # its files hold other tensors than what it opens as
            return None
        built = models.planned(known)
        if built is None:
            return None
        if not known.is_new:
            _check_whole(known, built)
        with self.mode:
            return built.to_empty(device="cpu").eval()


def _check_whole(known: models.Checkpoint, built: Any) -> None:
    """Whether the files hold all tensors of the class, by the names that the library gives them."""
    held = {*built_names(built, known.shapes).values(), *(getattr(built, "all_tied_weights_keys", None) or ())}
    spared = getattr(built, "_keys_to_ignore_on_load_missing", None) or ()
    lost = [name for name in built.state_dict() if name not in held and not any(re.search(one, name) for one in spared)]
    if lost:
        raise RequestError(
            f"{known.source}: the weights lack {len(lost)} tensors of {known.architecture}, such as {lost[0]!r}. Fetch or "
            "save the model again, or name the class that was saved in config.json (`architectures`)."
        )


def _check_anchors(checked: Checked, data: Mapping[str, Examples]) -> None:
    """Whether the models that are compared with have every token of what they are asked."""
    for request in checked.requests:
        reference = checked.references.get(request.compared_with or "", {})
        words = models.facts(reference["model"]).config.get("vocab_size") if "model" in reference else None
        if not isinstance(words, int):
            continue
        for role in request.roles.values():
            tokens = [item["input_ids"] for item in data[role].items if "input_ids" in item]
            if any(int(ids.max()) >= words for ids in tokens):
                raise RequestError(
                    f"The role {role!r} has tokens beyond the {words} of the {request.compared_with} model; both need one "
                    "tokenizer."
                )


def _some(checked: Checked, spec: Source, rows: Sequence[Row]) -> Sequence[Row]:
    """Rows that are encoded in a moment and stand for all."""
    if len(rows) <= AFFORDED and not any(isinstance(value, TextFile) for row in rows[:2] for value in row.values()):
        return rows
    sizes = [(sum(each), number) for number, each in enumerate(checked.positions(spec, rows))]
    longest = sorted(number for _, number in sorted(sizes)[-SHOWN:])
    places = dict.fromkeys([*range(min(SHOWN, len(rows))), *longest, *range(max(0, len(rows) - SHOWN), len(rows))])
    return [_shortened(rows[place], f"row {place + 1}") for place in places]


def _shortened(row: Row, otherwise: str) -> Row:
    """The row with the beginning of a text that lies in a file."""
    values = {k: next(v.stretches(STRETCH), "") if isinstance(v, TextFile) else v for k, v in row.items()}
    return FileRow(place_of(row, otherwise), values)


def _told(work: Callable[[], Result], where: str) -> Result | None:
    """What some work gives on a network without numbers; None where it needs one. What it refuses is told, with `where`."""
    try:
        return work()
    except WorkBegins:
        return None
    except RequestError as error:
        if _lacks_numbers(error):
            return None
        raise RequestError(f"{where}{error}") from error
    except OverhaulError:  # it was found out under way, where nothing was
        return None
    except Exception:  # numbers are missing, or the run will tell
        return None


def _lacks_numbers(error: BaseException | None) -> bool:
    """Whether an error comes of tensors that have no values."""
    while error is not None:
        if isinstance(error, NotImplementedError) or type(error).__module__ == FakeTensorMode.__module__:
            return True
        error = error.__cause__ or error.__context__
    return False


SILENT = 0
"""The width of what a network says that has no output head."""


def _width(role: str, examples: Examples, network: nn.Module) -> int | None:
    """How many outputs the network has for such examples; None where that cannot be known.

    Raises:
        RequestError: it does not take them.
    """
    if examples.kind not in ("tokens", "pairs", "images"):
        return None
    try:
        with torch.no_grad(), at_rest(network):
            return forward(network, collate(examples.items[:1])).shape[-1]
    except (StopIteration, RequestError):  # what needs hidden states alone goes on
        return SILENT
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if _lacks_numbers(error):
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
    labels = [int(item["labels"]) for item in examples.items if "labels" in item and not item["labels"].ndim]
    wrong = next((label for label in labels if width and not 0 <= label < width), None)
    if wrong is not None and width:
        raise RequestError(
            f"The material {role!r} has the label {wrong} (example {labels.index(wrong) + 1}), but {name} tells {width} "
            f"classes apart, 0 to {width - 1}. Correct the labels, or leave such rows out."
        )


class _Stages:
    """The steps one after the other, each with the network that it would be given, as far as that is known."""

    def __init__(
        self, checked: Checked, data: Mapping[str, Examples], made: _Networks, network: nn.Module | None
    ) -> None:
        self.checked, self.data, self.made = checked, data, made
        self.networks: list[nn.Module | None] = [network]
        self.folders: list[models.Checkpoint | None] = [checked.model]

    def go(self) -> None:
        """Ask every step."""
        for step in self.checked.steps:
            outcome = _told(partial(self.ask, step), f"Step {step.number}, {step.name}: ")
            network, folder = self.networks[-1], self.folders[-1]
            if step.method.changes == "architecture":
                network = outcome.model if outcome is not None and isinstance(outcome.model, nn.Module) else None
            self.networks.append(network)
            self.folders.append(folder if step.method.changes == "nothing" else None)

    def ask(self, step: Step) -> Outcome | None:
        """Run a step without numbers; not where one of its materials is not known yet."""
        given = self.given(step)
        if given is None:
            return None
        with tempfile.TemporaryDirectory() as place:  # nothing comes to lie there
            torch.manual_seed(0)
            out = {"out": Path(place) / "model"} if step.method.writes else {}
            return step.method.call(**given, **out, **step.knobs)

    def given(self, step: Step) -> dict[str, Any] | None:
        """The materials of a step; None where one of them is not known yet."""
        given: dict[str, Any] = {}
        if (subject := step.method.subject) is not None:
            given[subject.name] = self._as_asked(subject, self.networks[-1], self.folders[-1])
        for role in step.method.roles:
            if role.name in step.reads:
                found = [self.material(role, name) for name in step.names(role.name)]
                given[role.name] = None if any(one is None for one in found) else found if role.many else found[0]
        return None if any(value is None for value in given.values()) else given

    def material(self, role: Material, name: str) -> Any:
        """One material; None where it is not known yet."""
        reference = self.checked.references.get(name)
        if reference is None:
            return (
                self.data[name] if role.kind == "examples" else [r for _, rows in self.checked.rows[name] for r in rows]
            )
        if "made" in reference:
            return None
        if "model" in reference:
            known = models.facts(reference["model"])
            return self._as_asked(role, self.made.of(known) if role.kind == "model" else None, known)
        after = reference["after"]
        place = 0 if after == "start" else next(step.number for step in self.checked.steps if step.goes_by(after))
        return self._as_asked(role, self.networks[place], self.folders[place])

    @staticmethod
    def _as_asked(role: Material, network: nn.Module | None, folder: models.Checkpoint | None) -> Any:
        """A network of the step's own, or the folder."""
        if role.kind == "checkpoint":
            return folder
        return None if network is None else copy.deepcopy(network).eval()
