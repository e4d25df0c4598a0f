"""Truth (part B): a direction by difference of means, as a probe and as a push, in its own model and in the other one.

t = mean(true) - mean(false)            of states after block l, each topic less its own mean
probe     h . t > (mean(true) . t + mean(false) . t) / 2
push      h <- h + c t on false statements, h - c t on true ones, at some blocks, at the tokens that were read
NIE       (p_after - p) / (goal - p),  p = P(TRUE) - P(FALSE),  goal 1 or -1; the mean of both ways
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Rows, collate
from overhaul.errors import RequestError
from overhaul.inspect.post_training.asking import NAME, Asker, Prompt, drawn, generator, named, needed, shots_of
from overhaul.method import Table
from overhaul.objectives import evaluate_answers
from overhaul.stack import LayerStack
from overhaul.trace import Add, Where, intervene, last_token, measure

Place = Literal["statement", "question"]
PLACES: tuple[Place, ...] = ("statement", "question")
"""Where a statement is read: at its last token, or at the last token of the question behind it."""

RANDOM = "random direction"
NEAR = 0.05
"""Where p is as near to its goal, its NIE says nothing."""

TRUTH = {"true": True, "false": False, "1": True, "0": False}
PAPERS_BAND = 5 / 32
"""The share of the blocks at which the paper pushes."""


@dataclass(frozen=True)
class Pushing:
    """How truth is read, and pushed.

    Attributes:
        probe_layer: the block after which it is read; if None, the one whose probes are right most often on held-out topics,
            the last block apart.
        probe_at: whether it is read at the last token of the "statement" or of the "question"; if None, where probes are
            right more often.
        push_blocks: at how many blocks up to that one the push is given; the paper's 5 of 32 if None.
        strength: of the push, in differences of means.
        push_length: whose difference of means that is: of the model that the direction is from (the "source", as in the
            paper), or the "receiver": the part of its own difference that lies along the direction, so that a model with
            larger states is not pushed less for that.
        test_topic: the topic whose statements are pushed, and from which no direction is made; the last one if None.
    """

    probe_layer: Annotated[int, Ge(0)] | None = None
    probe_at: Place | None = None
    push_blocks: Annotated[int, Ge(1)] | None = None
    strength: Annotated[float, Gt(0)] = 1.0
    push_length: Literal["source", "receiver"] = "source"
    test_topic: str | None = None


@dataclass(frozen=True)
class Probe:
    """A direction with the value of h . t that tells true from false.

    Attributes:
        direction: t, [d].
        threshold: halfway between the means.
    """

    direction: Float[Tensor, " d"]
    threshold: float

    @classmethod
    def of(cls, states: Float[Tensor, "n d"], truth: Tensor) -> Probe:
        """By difference of means."""
        means = states[truth].mean(0), states[~truth].mean(0)
        return cls(means[0] - means[1], float((means[0] + means[1]) @ (means[0] - means[1]) / 2))

    def right(self, states: Float[Tensor, "n d"], truth: Tensor) -> float:
        """The share of statements that it tells rightly."""
        return float(((states @ self.direction > self.threshold) == truth).float().mean())


@dataclass
class Truth:
    """The part that reads statements.

    Attributes:
        texts: the statements.
        truth: whether each is true, [n].
        topics: of each.
        pushed: those of the test topic.
        states: model -> place -> states after each block, [L, n, d].
        site: where truth is read: block and place.
        p: (whose direction or none, in which model, truth of the statements) -> mean P(TRUE) - P(FALSE).
    """

    texts: Sequence[str]
    objects: Sequence[str | None]
    truth: Tensor
    topics: Sequence[str]
    asker: Asker
    pushing: Pushing
    most: int
    batch_size: int
    states: dict[str, dict[Place, Tensor]] = field(default_factory=dict)
    p: dict[tuple[str | None, str, bool], float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows, asker: Asker, pushing: Pushing, depth: int, most: int, batch_size: int) -> Truth:
        """From rows with `statement` and `label`, and `topic` where there are several.

        Raises:
            RequestError: a row lacks one, a label says neither, a topic has statements of one kind alone.
        """
        needed(rows, "statements", ("statement", "label"))
        labels = [str(row["label"]).strip().lower() for row in rows]
        for number, label in enumerate(labels, 1):
            if label not in TRUTH:
                raise RequestError(
                    f"{NAME}: row {number} of 'statements' has the label {label!r}: write true or false."
                )
        if pushing.probe_layer is not None and pushing.probe_layer >= depth:
            raise RequestError(
                f"{NAME}: probe_layer={pushing.probe_layer}, and the models have the blocks 0 to {depth - 1}."
            )
        if pushing.probe_at == "statement" and depth - 1 in (0, pushing.probe_layer):
            raise RequestError(
                f"{NAME}: behind the last block a push at the statement's end reaches nothing. Take a smaller "
                "`probe_layer`, or probe_at: question."
            )
        topics = [named(row, "topic") or "all" for row in rows]
        several = list(dict.fromkeys(topics))
        if pushing.test_topic is not None and pushing.test_topic not in several:
            raise RequestError(
                f"{NAME}: test_topic={pushing.test_topic!r} is no topic of 'statements': {', '.join(several)}."
            )
        truth = torch.tensor([TRUTH[label] for label in labels])
        if len(several) == 1:  # two halves stand for two topics
            for kind in (True, False):
                places = (truth == kind).nonzero().flatten()
                for n in places[drawn(len(places), int(kind))][: len(places) // 2].tolist():
                    topics[n] = "all, other half"
            several = list(dict.fromkeys(sorted(topics)))
        for topic in several:
            kinds = [bool(truth[n]) for n, one in enumerate(topics) if one == topic]
            if min(kinds.count(True), kinds.count(False)) < 2:
                raise RequestError(
                    f"{NAME}: the topic {topic!r} of 'statements' has {kinds.count(True)} true and {kinds.count(False)} "
                    "false ones. A direction needs at least two of each."
                )
        objects = [named(row, "object") for row in rows]
        return cls([str(row["statement"]) for row in rows], objects, truth, topics, asker, pushing, most, batch_size)

    @property
    def test_topic(self) -> str:
        """The topic that no direction is made from where statements are pushed."""
        return self.pushing.test_topic or list(dict.fromkeys(self.topics))[-1]

    def longest(self) -> int:
        """Tokens of the longest prompt that is pushed."""
        return max(len(prompt.ids) for truth in (True, False) for prompt in self._prompts(truth)) + 1

    def read(self, role: str, model: nn.Module) -> None:
        """Keep a model's states of all statements, at both places."""
        stack = LayerStack.of(model)
        texts = {
            "statement": [self.asker.statement(text) for text in self.texts],
            "question": [torch.tensor(self.asker.prompt(text).ids) for text in self.texts],
        }
        self.states[role] = {place: last_states(stack, texts[place], "leaving", self.batch_size) for place in PLACES}

    def act(self, role: str, model: nn.Module) -> None:
        """Push statements of the test topic along each model's direction, and along a random one as long as the longest."""
        layer, place = self.site
        width = self.pushing.push_blocks or max(1, round(PAPERS_BAND * len(LayerStack.of(model))))
        blocks = range(max(0, layer - width + 1), layer + 1)
        own = self.probe(role, layer, place).direction
        pushes: dict[str | None, Tensor | None] = {None: None}
        for source in self.states:
            along = self.probe(source, layer, place).direction
            pushes[source] = step(own, along) if self.pushing.push_length == "receiver" else along
        longest = max(float(push.norm()) for push in pushes.values() if push is not None)
        noise = torch.randn(own.shape, generator=generator(0))
        pushes[RANDOM] = noise * longest / noise.norm()
        for truth in (True, False):
            prompts = self._prompts(truth)
            for source, whole in pushes.items():
                push = None if whole is None else (-1 if truth else 1) * self.pushing.strength * whole
                self.p[source, role, truth] = _chance(model, prompts, push, blocks, place, self.batch_size)

    @property
    def site(self) -> tuple[int, Place]:
        """The block and the place at which truth is read, the same for both models."""
        depth = len(next(iter(self.states.values()))["statement"])
        chosen = self.pushing.probe_layer
        layers = range(max(1, depth - 1)) if chosen is None else [chosen]
        places: Sequence[Place] = PLACES if self.pushing.probe_at is None else [self.pushing.probe_at]
        return max(
            (
                (layer, place)
                for place in places
                for layer in layers
                if place == "question" or layer < depth - 1  # behind the last block only the last token is read
            ),
            key=lambda site: sum(self.right(role, role, *site) for role in self.states),
        )

    def probe(self, role: str, layer: int, place: Place, apart: str | None = None, centred: str = "topic") -> Probe:
        """From all topics but one: the test topic if none is named."""
        apart = apart or self.test_topic
        chosen = torch.tensor([topic != apart for topic in self.topics])
        return Probe.of(self._centred(role, layer, place, apart, centred)[chosen], self.truth[chosen])

    def right(self, source: str, role: str, layer: int, place: Place, centred: str = "topic") -> float:
        """How often a probe fitted to one model's states tells the other's: on topics held out, the mean over topics.

        Args:
            source: whose probe.
            role: whose states.
            layer: after which block.
            place: at which token.
            centred: held-out topics less their own mean ("topic"), or less that of the others ("train").
        """
        rates = []
        for topic in dict.fromkeys(self.topics):
            held = torch.tensor([one == topic for one in self.topics])
            states = self._centred(role, layer, place, topic, centred)[held]
            rates.append(self.probe(source, layer, place, topic, centred).right(states, self.truth[held]))
        return sum(rates) / len(rates)

    def nie(self, source: str | None, role: str) -> float | None:
        """Of the pushes along one direction; None where the model was at the goal without them."""
        ways = []
        for truth, goal in ((True, -1.0), (False, 1.0)):
            ways.append(nie(self.p[source, role, truth], self.p[None, role, truth], goal))
        known = [one for one in ways if one is not None]
        return sum(known) / len(known) if len(known) == len(ways) else None

    def _prompts(self, truth: bool) -> list[Prompt]:
        known = [
            (text, bool(kind), topic) for text, kind, topic in zip(self.texts, self.truth, self.topics, strict=True)
        ]
        shown = [(text, kind) for text, kind, topic in known if topic != self.test_topic]
        chosen = [n for n, (_, kind, topic) in enumerate(known) if kind == truth and topic == self.test_topic]
        shots = self.asker.asking.shots
        return [
            self.asker.prompt(self.texts[n], self.objects[n], shots_of(shown, shots, n) if shots else ())
            for n in chosen[: self.most]
        ]

    def _centred(self, role: str, layer: int, place: Place, apart: str, centred: str) -> Float[Tensor, "n d"]:
        states = self.states[role][place][layer]
        shifted = torch.empty_like(states)
        others = torch.tensor([topic != apart for topic in self.topics])
        for topic in dict.fromkeys(self.topics):
            rows = torch.tensor([one == topic for one in self.topics])
            by = others if topic == apart and centred == "train" else rows
            shifted[rows] = states[rows] - states[by].mean(0)
        return shifted

    def facts(self) -> dict[str, float | int | str | None]:
        """Where truth was read, and how alike the directions are."""
        one, other = list(self.states)
        layer, place = self.site
        directions = [self.probe(role, layer, place).direction for role in (one, other)]
        pairs = [(source, role) for source in (one, other, RANDOM) for role in (one, other)]
        return {
            "truth_statements": len(self.texts),
            "truth_layer": layer,
            "truth_read_at": place,
            "truth_test_topic": self.test_topic,
            "truth_cosine": cosine(*directions),
            **{f"truth_nie_{a}_in_{b}".replace(" ", "_"): self.nie(a, b) for a, b in pairs},
        }

    def layers(self) -> dict[str, dict[int, float]]:
        """By block: how often probes are right on held-out topics, at the place that was chosen."""
        place = self.site[1]
        depth = range(len(next(iter(self.states.values()))[place]))
        return {
            f"truth: probe of {a} on {b}": {layer: self.right(a, b, layer, place) for layer in depth}
            for a in self.states
            for b in self.states
        }

    def tables(self) -> dict[str, Table]:
        """Probe transfer and push transfer."""
        layer, place = self.site
        roles = list(self.states)
        probes = [
            (a, *(self.right(a, b, layer, place, centred) for centred in ("topic", "train") for b in roles))
            for a in roles
        ]
        columns = [f"on {b}{end}" for end in ("", ", centred by the other topics") for b in roles]
        pushes = [(a, *(self.nie(a, b) for b in roles)) for a in (*roles, RANDOM)]
        said = [
            (a or "no push", b, *(self.p[a, b, truth] for truth in (True, False)))
            for a in (None, *roles, RANDOM)
            for b in roles
        ]
        return {
            f"truth: share told rightly on held-out topics, block {layer}, {place}": Table(
                ("probe of", *columns), tuple(probes)
            ),
            "truth: effect of a push (NIE; 1 is certainty of the opposite)": Table(
                ("direction of", *(f"in {b}" for b in roles)), tuple(pushes)
            ),
            "truth: P(TRUE) - P(FALSE)": Table(
                ("direction of", "model", "true statements", "false statements"), tuple(said)
            ),
        }


def last_states(
    stack: LayerStack, texts: Sequence[Tensor], kind: Literal["entering", "leaving"], batch_size: int
) -> Float[Tensor, "L n d"]:
    """The states of each text's last token at every block, in float32 on the CPU."""
    batches = [
        {name: value for name, value in collate([{"input_ids": ids} for ids in texts[n : n + batch_size]]).items()}
        for n in range(0, len(texts), batch_size)
    ]
    seen = measure(stack, batches, [kind], last_token)
    return torch.stack([seen[f"{kind}.{n}"].states.cpu() for n in range(len(stack))])


def _chance(
    model: nn.Module, prompts: Sequence[Prompt], push: Tensor | None, blocks: range, place: Place, batch_size: int
) -> float:
    """Mean P(TRUE) - P(FALSE), with or without a push at these blocks."""
    stack, total = LayerStack.of(model), 0.0
    for n in range(0, len(prompts), batch_size):
        some = prompts[n : n + batch_size]
        batch = collate([prompt.item for prompt in some])
        edits: Mapping[str, Add] = {}
        if push is not None:
            chosen = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
            for row, prompt in enumerate(some):
                chosen[row, [prompt.last] if place == "question" else [prompt.statement[-1], *prompt.object[-1:]]] = (
                    True
                )
            edits = {f"leaving.{block}": Add(push, Where(chosen)) for block in blocks}
        with intervene(stack, edits):
            chances = evaluate_answers(model, lambda logits, batch: _answers(logits, batch).softmax(-1), batch).cpu()
        rows = torch.arange(len(some))
        yes, no = torch.tensor([(prompt.yes, prompt.no) for prompt in some]).T
        total += float((chances[rows, yes] - chances[rows, no]).sum())
    return total / len(prompts)


def _answers(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return logits[:, :-1][batch["labels"][:, 1:] != IGNORED].float()


def step(own: Float[Tensor, " d"], along: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The part of a model's own difference of means that lies along a direction; all of it along its own."""
    return (own @ along) / (along @ along).clamp_min(torch.finfo(along.dtype).tiny) * along


def nie(after: float, before: float, goal: float) -> float | None:
    """The normalised effect of an intervention: 0 where nothing changed, 1 at the goal; None where it was there before."""
    return None if abs(goal - before) < NEAR else (after - before) / (goal - before)


def cosine(one: Float[Tensor, " d"], other: Float[Tensor, " d"]) -> float | None:
    """None where one of them is zero."""
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size else None
