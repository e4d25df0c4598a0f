"""Pairs: models that correspond block by block (base and post-trained, before and after), checked once, opened one by one.

    pair = corresponding("inspect.post_training", {"base": base, "post": post})
    with pair["base"].opened() as model:             # let go at the end, before the other one is opened
        ...

1. Checkpoints are compared by what config.json builds, so that nothing is read before all fits.
2. A model in memory is one of them as it is; it stays with the caller.
3. What corresponds has one class, as many blocks with tensors of the same shapes, one width, as many rows of words, and
   tokenizers that give no number to two words. Other differences of the configs are said by `differences`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn

from overhaul import processes
from overhaul.checkpoints import Checkpoint, facts
from overhaul.errors import RequestError
from overhaul.forward import input_table
from overhaul.models import load_processor, planned
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.weights import agreement
from overhaul.weights.vocabularies import words

Shapes = Sequence[Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Facts:
    """What models must have in common.

    Attributes:
        kind: name of the class.
        depth: number of blocks.
        width: of the residual stream; None where the model has no input embedding of words.
        rows: of that embedding.
        blocks: of each block, the shape of every tensor by its name.
    """

    kind: str
    depth: int
    width: int | None
    rows: int | None
    blocks: Shapes = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Facts:
        """Of a network, which may be on the meta device.

        Raises:
            RequestError: it has no main stack of blocks.
        """
        stack = LayerStack.of(model)
        table = input_table(model)
        rows, width = (None, None) if table is None else (table.num_embeddings, table.embedding_dim)
        shapes = [{name: tuple(value.shape) for name, value in block.state_dict().items()} for block in stack.blocks]
        return cls(type(model).__name__, len(stack), width, rows, shapes)


@dataclass(frozen=True)
class Member:
    """One of several models that correspond.

    Attributes:
        role: its name among them ("base").
        given: the checkpoint, or the model in memory.
        facts: what it has in common with the others; None of a checkpoint whose class is not known before it is opened.
        like: what it must have in common with them.
    """

    role: str
    given: Checkpoint | nn.Module
    facts: Facts | None
    like: Facts | None = field(default=None, repr=False)
    of: str = field(default="", repr=False)

    @property
    def source(self) -> str:
        """As the user wrote it, or the class of a model in memory."""
        return self.given.source if isinstance(self.given, Checkpoint) else type(self.given).__name__

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config."""
        held: Any = getattr(self.given, "config", {})
        return held if isinstance(held, Mapping) else held.to_dict()

    @property
    def depth(self) -> int:
        """Number of blocks; of a class that is not known before it is opened, as its config says."""
        return self.facts.depth if self.facts is not None else int(self.config["num_hidden_layers"])

    @contextmanager
    def opened(self, dtype: str = "float32") -> Iterator[nn.Module]:
        """The model in eval mode, on the session's device; a checkpoint is let go at the end, so keep no reference to it.

        Args:
            dtype: of a checkpoint's weights; "stored" for that of most of them. A model in memory keeps its own.

        Raises:
            RequestError: it does not correspond to the others, which only now can be told.
        """
        if isinstance(self.given, nn.Module):
            with at_rest(self.given):
                yield self.given
            return
        model = self.given.open(self.given.dtype if dtype == "stored" else dtype).to(processes.device()).eval()
        if self.like is not None and self.facts is None:
            _check_facts(self.of, ("the others", self.like), (f"{self.role} ({self.source})", Facts.of(model)))
        try:
            yield model
        finally:
            # the caller's `as` name may outlive the block: the memory goes all the same
            model.to("meta")

    def processor(self) -> Any:
        """Its tokenizer or image processor; None of a model in memory, which has none with it."""
        return load_processor(self.given) if isinstance(self.given, Checkpoint) else None


def corresponding(
    method: str, models: Mapping[str, Checkpoint | nn.Module | str | Path], *, words_matter: bool = True
) -> dict[str, Member]:
    """Models that correspond to each other, by role, in the order given.

    Args:
        method: for messages.
        models: checkpoints, folders, or models in memory, by role ("base", "post"); at least two.
        words_matter: whether rows of words and tokenizers must agree as well.

    Raises:
        RequestError: fewer than two; one has no stack of blocks; or two do not correspond: both values are named.
    """
    if len(models) < 2:
        raise RequestError(f"{method}: at least two models are compared, and {len(models)} is given.")
    found = {role: facts(one) if isinstance(one, str | Path) else one for role, one in models.items()}
    known = {role: _facts_before(one) for role, one in found.items()}
    told = [(f"{role} ({_source(found[role])})", one) for role, one in known.items() if one is not None]
    for other in told[1:]:
        _check_facts(method, told[0], other, words_matter)
    if words_matter:
        for one, other in combinations([role for role, each in found.items() if isinstance(each, Checkpoint)], 2):
            _check_words(method, (one, found[one]), (other, found[other]))
    like = told[0][1] if told else None
    return {role: Member(role, one, known[role], like, method) for role, one in found.items()}


def differences(pair: Mapping[str, Member]) -> list[str]:
    """What the configs of the checkpoints among them say differently besides: a sentence each."""
    folders = [one.given for one in pair.values() if isinstance(one.given, Checkpoint)]
    return agreement.differences(folders) if len(folders) > 1 else []


def _source(model: Any) -> str:
    return model.source if isinstance(model, Checkpoint) else type(model).__name__


def _facts_before(model: Checkpoint | nn.Module) -> Facts | None:
    network = model if isinstance(model, nn.Module) else planned(model)
    return None if network is None else Facts.of(network)


def _check_facts(method: str, one: tuple[str, Facts], other: tuple[str, Facts], words_matter: bool = True) -> None:
    (first, ours), (second, theirs) = one, other

    def refuse(what: str, a: object, b: object, instead: str) -> None:
        if a != b:
            raise RequestError(f"{method}: {first} has {a} {what} and {second} {b}. {instead}")

    if ours.kind != theirs.kind:
        raise RequestError(
            f"{method}: {first} is a {ours.kind} and {second} a {theirs.kind}. Give two checkpoints of one architecture."
        )
    post = "Give the checkpoint that the other one was trained from, not another size of its family."
    refuse("blocks", ours.depth, theirs.depth, post)
    refuse("features in its stream", ours.width, theirs.width, post)
    for place, (a, b) in enumerate(zip(ours.blocks, theirs.blocks, strict=True)):
        differing = next((name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)), None)
        if differing is not None:
            sizes = [list(each[differing]) if differing in each else "nothing" for each in (a, b)]
            raise RequestError(
                f"{method}: block {place}, {differing}, is {sizes[0]} in {first} and {sizes[1]} in {second}. {post}"
            )
    if words_matter:
        refuse(
            "rows of words in its vocabulary",
            ours.rows,
            theirs.rows,
            f"Bring both to one size: model.resize_token_embeddings({max(ours.rows or 0, theirs.rows or 0)}), then save it.",
        )


def _check_words(method: str, one: tuple[str, Any], other: tuple[str, Any]) -> None:
    """Refuse tokenizers that give one number to different words; words that only one of them has may be new."""
    (first, ours), (second, theirs) = one, other
    if agreement.same_tokenizer_file(ours.folder, theirs.folder):
        return
    differing = agreement.differing_words(words(ours.folder), words(theirs.folder))
    if differing:
        raise RequestError(
            f"{method}: the tokenizers of {first} ({ours.source}) and {second} ({theirs.source}) number {len(differing)} "
            f"words differently: {differing[0]}. Give two checkpoints with one tokenizer; what one of them only adds is no "
            "difference."
        )
