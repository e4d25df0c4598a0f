"""Facts (part A): where a model keeps them, by patching; and whether another model can use what this one keeps.

D[l, i] = logit(TRUE) - logit(FALSE) at the end of a false statement whose state after block l at token i is the true one's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from overhaul.data.examples import Batch, Rows, collate
from overhaul.errors import RequestError
from overhaul.inspect.post_training.asking import NAME, Asker, Prompt, generator, named, needed, shots_of
from overhaul.method import Table
from overhaul.stack import LayerStack
from overhaul.trace import Patch, patch_grid, states_of

LABELS = (
    "statement before it", "subject", "last subject token", "between", "object", "end of statement", "question",
    "last token",
)  # fmt: skip
"""What a token of a prompt is; the subject is what the two statements of a pair differ in."""

KNOWLEDGE = ("subject", "last subject token", "object")
RANDOM = "random states"
SIDES = ("true", "false")


@dataclass(frozen=True)
class Pair:
    """A true statement and a false one whose tokens align, and a label for each token from the statement on."""

    true: Prompt
    false: Prompt
    labels: Sequence[str]
    number: int = 0

    @property
    def start(self) -> int:
        """The statement's first token."""
        return self.true.statement[0]


@dataclass(frozen=True)
class Group:
    """Pairs that run together: as many tokens from the statement on."""

    pairs: Sequence[Pair]

    def batch(self, side: str) -> Batch:
        """Their prompts, those with true statements or those with false ones."""
        return collate([getattr(pair, side).item for pair in self.pairs])

    def mask(self, offset: int, width: int) -> Tensor:
        """Each prompt's token so far from where its statement starts, [b, t]."""
        chosen = torch.zeros(len(self.pairs), width, dtype=torch.bool)
        chosen[torch.arange(len(self.pairs)), torch.tensor([pair.start + offset for pair in self.pairs])] = True
        return chosen

    def difference(self, logits: Tensor) -> Float[Tensor, " b"]:
        """logit(TRUE) - logit(FALSE)."""
        rows, ids = torch.arange(len(self.pairs)), [(pair.true.yes, pair.true.no) for pair in self.pairs]
        yes, no = torch.tensor(ids).T
        values = logits.float().cpu()
        return values[rows, yes] - values[rows, no]


@dataclass
class Knowledge:
    """The part that reads facts.

    Attributes:
        groups: pairs that run together.
        dropped: pairs whose tokens do not align.
        states: model -> group -> states after every block, from the statement on, of true statements [L, b, n, d].
        clean: (model, side) -> D without a patch, each pair's.
        maps: (whose states, in which model) -> D by block and label; None where no token has a label.
    """

    groups: list[Group]
    dropped: int
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    clean: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    maps: dict[tuple[str, str], list[list[float | None]]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows, asker: Asker, most: int, batch_size: int) -> Knowledge:
        """From rows with `true` and `false`, and `object` where it is known.

        Raises:
            RequestError: a row lacks one, or no pair aligns.
        """
        pairs: list[Pair] = []
        needed(rows, "facts", SIDES)
        known = [[(str(row[side]), side == "true") for side in SIDES] for row in rows]
        for n, row in enumerate(rows):
            others = [one for m, two in enumerate(known) if m != n for one in two]
            shots = shots_of(others, asker.asking.shots, n) if asker.asking.shots else []
            prompts = [asker.prompt(text, named(row, "object"), shots) for text, _ in known[n]]
            if prompts[0].ids == prompts[1].ids:
                raise RequestError(f"{NAME}: row {n + 1} of 'facts' has the same statement as true and as false.")
            if (pair := aligned(*prompts)) is not None:
                pairs.append(replace(pair, number=n))
        if not pairs:
            raise RequestError(
                f"{NAME}: in none of {len(rows)} rows of 'facts' do the true and the false statement have the same number "
                "of tokens, so no state of one has a place in the other. Choose subjects of equal length in tokens."
            )
        by_size: dict[int, list[Pair]] = {}
        for pair in pairs[:most]:
            by_size.setdefault(len(pair.labels), []).append(pair)
        groups = [Group(some[n : n + batch_size]) for some in by_size.values() for n in range(0, len(some), batch_size)]
        return cls(groups, len(rows) - len(pairs))

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(pair.true.ids) for group in self.groups for pair in group.pairs) + 1

    def read(self, role: str, model: nn.Module) -> None:
        """Keep a model's states of true statements, and what it says without a patch."""
        stack = LayerStack.of(model)
        self.states[role] = []
        for group in self.groups:
            for side in SIDES:
                seen = states_of(stack, group.batch(side))
                self.clean.setdefault((role, side), []).extend(group.difference(seen.logits).tolist())
                if side == "true":
                    self.states[role].append(_kept(group, seen.states))

    def act(self, role: str, model: nn.Module) -> None:
        """Patch true states into a model: its own, those of each other model, and random ones as far from its own."""
        stack = LayerStack.of(model)
        sums = {(source, role): _Sums(len(stack)) for source in (*self.states, RANDOM)}
        for number, group in enumerate(self.groups):
            batch = group.batch("false")
            width, length = batch["input_ids"].shape[1], len(group.pairs[0].labels)
            sources = {source: states[number] for source, states in self.states.items()}
            own = _kept(group, states_of(stack, batch).states)
            sources[RANDOM] = _as_far(own, sources[role], [pair.number for pair in group.pairs])
            masks = [group.mask(offset, width) for offset in range(length)]
            cells = [(layer, offset) for layer in range(len(stack)) for offset in range(length)]
            for source, states in sources.items():
                patches = [Patch(layer, masks[offset], states[layer, :, offset]) for layer, offset in cells]
                found = patch_grid(stack, batch, patches, group.difference)
                for (layer, offset), values in zip(cells, found, strict=True):
                    sums[source, role].add(layer, [pair.labels[offset] for pair in group.pairs], values.tolist())
        self.maps |= {key: each.means() for key, each in sums.items()}

    def labels(self) -> list[str]:
        """The labels that some token has, in the order of the text."""
        known = next(iter(self.maps.values()))
        return [label for label, value in zip(LABELS, known[0], strict=True) if value is not None]

    def map(self, source: str, role: str) -> Float[Tensor, "L k"]:
        """D by block and known label."""
        return torch.tensor([[value for value in row if value is not None] for row in self.maps[source, role]])

    def layers(self) -> dict[str, dict[int, float]]:
        """By block: the best patch, of the model's own states and of the other's."""
        return {
            f"facts: best patch of {source} in {role}": dict(enumerate(self.map(source, role).amax(1).tolist()))
            for source, role in self.maps
            if source != RANDOM
        }

    def tables(self) -> dict[str, Table]:
        """The maps, and their best cells beside what is said without a patch."""
        found: dict[str, Table] = {}
        rows = []
        for (source, role), _ in sorted(
            self.maps.items(), key=lambda one: (one[0][0] == RANDOM, one[0][0] != one[0][1])
        ):
            values, labels = self.map(source, role), self.labels()
            what = source if source == RANDOM else f"true states of {source}"
            found[f"facts: {what} in {role}"] = Table.grid(
                values,
                range(len(values)),
                labels,
                along="after block",
                across="patched token",
                unit="logit TRUE - FALSE",
            )
            layer, place = divmod(int(values.argmax()), len(labels))
            clean = (self.said(role, side) for side in ("false", "true"))
            rows.append((what, role, *clean, float(values.max()), f"block {layer}, {labels[place]}"))
        columns = ("patched in", "model", "false statement", "true statement", "best patch", "where")
        return {"facts: logit TRUE - FALSE": Table(columns, tuple(rows)), **found}

    def facts(self) -> dict[str, float | int | None]:
        """How alike the own maps of the two models are, and what patches do at best."""
        one, other = list(self.states)
        ours, theirs = self.map(one, one), self.map(other, other)
        told = {
            f"facts_best_{source}_in_{role}".replace(" ", "_"): float(self.map(source, role).max())
            for source, role in self.maps
        }
        knowing = [n for n, label in enumerate(self.labels()) if label in KNOWLEDGE]
        apart = (binned(ours) - binned(theirs)).abs()
        return {
            "facts_pairs": sum(len(group.pairs) for group in self.groups),
            "facts_pairs_not_aligned": self.dropped,
            "facts_map_pearson": pearson(ours, theirs),
            "facts_map_spearman": spearman(ours, theirs),
            "facts_map_pearson_binned": pearson(binned(ours), binned(theirs)),
            "facts_map_largest_difference_binned": float(apart.max()),
            "facts_map_largest_difference_binned_knowledge": float(apart[:, knowing].max()) if knowing else None,
            **told,
        }

    def said(self, role: str, side: str) -> float:
        """D of a model without a patch, the mean over pairs."""
        return float(numpy.mean(self.clean[role, side]))


class _Sums:
    """Means over all tokens of a label, of all pairs."""

    def __init__(self, depth: int) -> None:
        self.sums = torch.zeros(depth, len(LABELS), dtype=torch.float64)
        self.counts = torch.zeros(depth, len(LABELS), dtype=torch.float64)

    def add(self, layer: int, labels: Sequence[str], values: Sequence[float]) -> None:
        for label, value in zip(labels, values, strict=True):
            self.sums[layer, LABELS.index(label)] += value
            self.counts[layer, LABELS.index(label)] += 1

    def means(self) -> list[list[float | None]]:
        found = (self.sums / self.counts).tolist()
        return [
            [value if count else None for value, count in zip(*each, strict=True)]
            for each in zip(found, self.counts.tolist(), strict=True)
        ]


def aligned(true: Prompt, false: Prompt) -> Pair | None:
    """The pair with a label for each token from the statement on; None where they have not as many tokens.

    Args:
        true: the prompt with the true statement.
        false: the same with the false one.
    """
    start = true.statement[0]
    differing = [n for n, (a, b) in enumerate(zip(true.ids, false.ids, strict=False)) if a != b]
    alike = (len(true.ids), len(true.statement), true.object) == (len(false.ids), len(false.statement), false.object)
    if not alike or start != false.statement[0] or not differing:
        return None
    first, last, end = differing[0], differing[-1], true.statement[-1]

    def label(n: int) -> str:
        if n == true.last:
            return "last token"
        if first <= n <= last:
            return "last subject token" if n == last else "subject"
        if n > end:
            return "question"
        if n in true.object:
            return "object"
        return "end of statement" if n == end else "statement before it" if n < first else "between"

    return Pair(true, false, [label(n) for n in range(start, len(true.ids))])


def _kept(group: Group, states: Sequence[Tensor]) -> Tensor:
    """The states from each pair's statement on, on the CPU, [L, b, n, d]."""
    length = len(group.pairs[0].labels)
    rows = [slice(pair.start, pair.start + length) for pair in group.pairs]
    return torch.stack([torch.stack([state[n, row] for n, row in enumerate(rows)]).cpu() for state in states])


def _as_far(own: Float[Tensor, "L b n d"], other: Float[Tensor, "L b n d"], tags: Sequence[int]) -> Tensor:
    """States in a random direction, the same for a pair whatever runs with it, as far from a model's own as the others."""
    shape = own[:, 0].shape
    noise = torch.stack([torch.randn(shape, generator=generator(tag)) for tag in tags], dim=1)
    size = (other.float() - own.float()).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return (own.float() + size * noise).to(own.dtype)


def binned(values: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The paper's normalisation: 20 equal bins from least to largest; the lower ten are 0, the others 0.1 to 1."""
    low, high = values.min(), values.max()
    if high == low:
        return torch.zeros_like(values)
    place = (20 * (values - low) / (high - low)).floor().clamp(0, 19)
    return ((place - 9).clamp_min(0) / 10).to(values.dtype)


def pearson(one: Tensor, other: Tensor) -> float | None:
    """Pearson's correlation of all cells; None where one map is constant."""
    a, b = (each.double().flatten() - each.double().mean() for each in (one, other))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else None


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation of all cells; None where one map is constant."""
    ranks = [torch.from_numpy(stats.rankdata(each.double().flatten().numpy())) for each in (one, other)]
    return pearson(ranks[0], ranks[1])
