"""The three passes of restoration, one model at a time: the unlearned one, the original, and the unlearned one steered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import Examples, Tensors, join
from overhaul.errors import RequestError
from overhaul.inspect.restoration.states import NAME, Places, Sample, Tally, sampled, tokens_before, walk
from overhaul.inspect.restoration.steering import PAPER, SELECTED, Arm, Codes, Features, Form, arms, random_sets
from overhaul.judge.representation import Probe, probe
from overhaul.modes import at_rest
from overhaul.sae import Dictionary, SparseAutoencoder, learn, specificity
from overhaul.stack import LayerStack
from overhaul.trace.flow import with_stream

Kept = dict[int, list[Tensor]]
"""Layer -> the stream of every batch, [b, t, d] on the CPU."""


@dataclass(frozen=True)
class Material:
    """What is measured on.

    Attributes:
        train: the members of the group first.
        members: how many of them are members.
        forget: of the test examples, the group.
        retain: the others.
    """

    train: Examples
    members: int
    forget: Examples
    retain: Examples

    @property
    def forgotten_class(self) -> int | None:
        """The class of the group where all its images have one and no other has it."""
        if not self.forget.classified:
            return None
        own, others = ({int(item["labels"]) for item in part.items} for part in (self.forget, self.retain))
        return own.pop() if len(own) == 1 and not own & others else None


@dataclass(frozen=True)
class Run:
    """The knobs of one call; `column` is None where no probe is trained, `given` where autoencoders are."""

    alphas: Sequence[float]
    experts: int
    experts_by: str
    codes: Codes
    form: Form
    random_sets: int
    class_tokens: int | None
    dictionary: Dictionary
    batch_size: int
    seed: int
    column: str | None
    given: Mapping[int, SparseAutoencoder] | None = None


@dataclass
class Unlearned:
    """What is kept of the unlearned model.

    Attributes:
        layers: the chosen ones.
        depth: number of blocks.
        before: tokens before the patches of an image.
        read: what the head reads directly, in words; "" for nothing.
        forget: what it says of the group.
        retain: of the others.
        states: of the group.
        probe: on its own states.
    """

    layers: list[int]
    depth: int
    before: int
    read: str
    forget: Tally = field(default_factory=Tally)
    retain: Tally = field(default_factory=Tally)
    states: Kept = field(default_factory=lambda: defaultdict(list))
    probe: Probe | None = None


@dataclass
class Original:
    """What is kept of the original.

    Attributes:
        forget: what it says of the group.
        retain: of the others.
        states: of the group, then of the others.
        swapped: by layer, what it says of the group from the unlearned model's states.
        distance: by layer, |h - h'| / |h'| over the group.
        correlation: by layer, of the features of both models over the group.
        features: by layer.
        explained: by layer, share of the variance that the autoencoder explains on states held out; None where these are
            alike.
        probe: on its own states.
    """

    forget: Tally = field(default_factory=Tally)
    retain: Tally = field(default_factory=Tally)
    states: tuple[Kept, Kept] = field(default_factory=lambda: (defaultdict(list), defaultdict(list)))
    swapped: dict[int, Tally] = field(default_factory=lambda: defaultdict(Tally))
    distance: dict[int, float] = field(default_factory=dict[int, float])
    correlation: dict[int, float] = field(default_factory=dict[int, float])
    features: dict[int, Features] = field(default_factory=dict[int, Features])
    explained: dict[int, float | None] = field(default_factory=dict[int, float | None])
    probe: Probe | None = None


@dataclass
class Steered:
    """What the steered model says.

    Attributes:
        forget: of the group, by (layer, arm, alpha).
        retain: of the others under the paper's arm, by (layer, alpha).
        taken: by (layer, alpha), how many of the others are then called the forgotten class.
    """

    forget: dict[tuple[int, Arm, float], Tally] = field(default_factory=lambda: defaultdict(Tally))
    retain: dict[tuple[int, float], Tally] = field(default_factory=lambda: defaultdict(Tally))
    taken: dict[tuple[int, float], int] = field(default_factory=lambda: defaultdict(int))


@torch.no_grad()
def unlearned_pass(model: nn.Module, data: Material, run: Run, layers: Sequence[int]) -> Unlearned:
    """What the unlearned model says, its states of the group, and its probe."""
    stack = LayerStack.of(model)
    with at_rest(model):
        before = tokens_before(stack, data.forget, run.class_tokens)
        read = ("class token" if before else "") if data.forget.kind == "images" else "answers"
        made = Unlearned(
            list(layers), len(stack), before, "" if data.forget.kind == "tokens" and data.forget.classified else read
        )
        for seen in walk(stack, data.forget, layers, run.batch_size, "unlearned states"):
            made.forget.add(seen.logits, seen.batch)
            for layer in layers:
                if layer not in made.states:
                    _check_size(seen.rows(layer).shape[2], run, layer)
                made.states[layer].append(seen.rows(layer).cpu())
        for seen in walk(stack, data.retain, (), run.batch_size, "unlearned model on the others"):
            made.retain.add(seen.logits, seen.batch)
    made.probe = _probe(model, data, run)
    return made


def _check_size(width: int, run: Run, layer: int) -> None:
    if run.given is not None:
        if width != (known := len(run.given[layer].pre_bias)):
            raise RequestError(
                f"{NAME}: the autoencoder for layer {layer} is for {known} features, and its stream has {width}."
            )
        return
    latents = run.dictionary.expansion * width
    if run.dictionary.k > latents or 2 * run.experts > latents:
        raise RequestError(
            f"{NAME}: an autoencoder of {latents} latents ({run.dictionary.expansion} x {width} features) has no room for "
            f"k={run.dictionary.k}, or for {run.experts} experts beside as many random ones. Choose a larger `expansion`, "
            "or fewer of them."
        )


def original_pass(model: nn.Module, data: Material, run: Run, unlearned: Unlearned) -> Original:
    """What the original says and its states; how they compare; its tail on the unlearned states; its features."""
    stack, made = LayerStack.of(model), Original()
    layers = unlearned.layers
    sums = {layer: Compared() for layer in layers}
    with torch.no_grad(), at_rest(model):
        for number, seen in enumerate(
            walk(stack, data.forget, layers, run.batch_size, "original states, tails swapped")
        ):
            made.forget.add(seen.logits, seen.batch)
            for layer in layers:
                rows, theirs = seen.rows(layer), unlearned.states[layer][number]
                made.states[0][layer].append(rows.cpu())
                places = Places.of(seen.batch, rows, unlearned.before)
                sums[layer].add(*(one[(places.read | places.rest).cpu()] for one in (theirs, rows.cpu())))
                swapped = with_stream(seen.calls, seen.states[layer], theirs.to(rows.device))
                made.swapped[layer].add(seen.onwards(layer, swapped), seen.batch)
        for seen in walk(stack, data.retain, layers, run.batch_size, "original states of the others"):
            made.retain.add(seen.logits, seen.batch)
            for layer in layers:
                made.states[1][layer].append(seen.rows(layer).cpu())
        each = -(-run.dictionary.states // len(data.train))
        samples = sampled(stack, data.train, layers, run.batch_size, unlearned.before, each)
    made.probe = _probe(model, data, run)
    for layer, sample in samples.items():
        made.distance[layer], made.correlation[layer] = sums[layer].distance, sums[layer].correlation
        made.features[layer], made.explained[layer] = features(sample, data.members, run, layer)
    return made


def features(sample: Sample, members: int, run: Run, layer: int) -> tuple[Features, float | None]:
    """An autoencoder with its selected and random features, and the variance that it explains on states held out."""
    torch.manual_seed(run.seed)
    order = torch.randperm(len(sample.rows))
    kept = max(2, len(order) // 10)  # one alone has no variance to explain
    if run.given is None:
        if len(order) < kept + 2:
            raise RequestError(
                f"{NAME}: `train` has {len(order)} states at layer {layer} that carry features, and an autoencoder needs "
                "four or more: two to learn from, two held out. Give more examples in `train`, or `autoencoders`."
            )
        made = learn(sample.rows[order[kept:]], run.dictionary, f"autoencoder of layer {layer}")
    else:
        made = run.given[layer]
        made.count(sample.rows)
    score = specificity(made, sample.rows, sample.owner < members, run.experts_by)
    score[(made.neuron_activity == 0).cpu()] = -torch.inf
    selected = score.topk(min(run.experts, len(score))).indices.tolist()
    draw = torch.Generator().manual_seed(run.seed)
    chosen = random_sets(made, selected, run.random_sets, draw)
    return Features(made, selected, chosen, run.codes, run.form), made.explained_variance(sample.rows[order[:kept]])


@torch.no_grad()
def steering_pass(model: nn.Module, data: Material, run: Run, unlearned: Unlearned, source: Original) -> Steered:
    """What the unlearned model says under every arm; the prefix is run once a batch, a tail for each arm and alpha."""
    stack, made = LayerStack.of(model), Steered()
    device = next(model.parameters()).device
    known, paper = arms(unlearned.read), PAPER if unlearned.read else SELECTED
    for feature in source.features.values():
        feature.autoencoder.to(device)
    with at_rest(model):
        for part, (examples, goals) in enumerate(zip((data.forget, data.retain), source.states, strict=True)):
            what = ("the group", "the others")[part]
            for number, seen in enumerate(walk(stack, examples, unlearned.layers, run.batch_size, f"steering {what}")):
                for layer, feature in source.features.items():
                    own, goal = seen.rows(layer).float(), goals[layer][number].to(device).float()
                    pushes = feature.pushes(own, goal, Places.of(seen.batch, own, unlearned.before))
                    for arm in (paper,) if part else known:
                        for alpha in run.alphas:
                            for rows in pushes.states(arm, alpha):
                                state = with_stream(seen.calls, seen.states[layer], rows)
                                logits = seen.onwards(layer, state)
                                if part:
                                    made.retain[layer, alpha].add(logits, seen.batch)
                                    made.taken[layer, alpha] += _called(logits, data.forgotten_class)
                                else:
                                    made.forget[layer, arm, alpha].add(logits, seen.batch)
    return made


def _called(logits: Tensor, wanted: int | None) -> int:
    return 0 if wanted is None else int((logits.argmax(dim=-1) == wanted).sum())


class Compared:
    """Sums of two models' states over positions, for their distance and the correlation of their features."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Any = 0.0

    def add(self, own: Float[Tensor, "n d"], goal: Float[Tensor, "n d"]) -> None:
        """States of the unlearned and of the original model at the same positions."""
        a, b = own.double(), goal.double()
        parts = (a, b, a * a, b * b, a * b, (a - b).square())
        self.sums = self.sums + torch.stack([one.sum(dim=0) for one in parts])
        self.count += len(a)

    @property
    def distance(self) -> float:
        """|h - h'| / |h'|."""
        return float((self.sums[5].sum() / self.sums[3].sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())

    @property
    def correlation(self) -> float:
        """Of features around their means, weighted by their spread; 0 where nothing varies."""
        a, b, aa, bb, ab, _ = self.sums / self.count
        product = ((aa - a * a).sum() * (bb - b * b).sum()).clamp_min(0).sqrt()
        return float((ab - a * b).sum() / product) if product > 0 else 0.0


def _probe(model: nn.Module, data: Material, run: Run) -> Probe | None:
    return None if run.column is None else probe(model, data.train, join([data.forget, data.retain]), run.column)


def by_layer(given: Tensors, layers: str | None, k: int) -> dict[int, SparseAutoencoder]:
    """Autoencoders from "LAYER.NAME"; without a layer, of the only one that `layers` names.

    Raises:
        RequestError: there are none, or they cannot be read.
    """
    if not len(given):
        raise RequestError(f"{NAME}: `autoencoders` holds no tensors.")
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in given.items():
        layer, _, rest = name.partition(".")
        if not layer.isdecimal() and not str(layers).isdecimal():
            raise RequestError(
                f'{NAME}: `autoencoders` has {name!r}, which names no layer. Call it "LAYER.{name}", or say in `layers` '
                "which single one it is for."
            )
        found[int(layer if layer.isdecimal() else str(layers))][rest if layer.isdecimal() else name] = value
    return {layer: _read(one, layer, k) for layer, one in found.items()}


def _read(tensors: dict[str, Tensor], layer: int, k: int) -> SparseAutoencoder:
    try:
        return SparseAutoencoder.of_tensors(tensors, k)
    except RequestError as error:
        raise RequestError(f"{NAME}: `autoencoders`, layer {layer}: {error}") from None


def tensors(autoencoders: dict[int, SparseAutoencoder]) -> dict[str, Tensor]:
    """By "LAYER.NAME"."""
    return {f"{layer}.{name}": one for layer, made in autoencoders.items() for name, one in made.tensors().items()}
