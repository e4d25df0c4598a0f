"""A gradient ledger: what each sample did to the weights while they were learnt, kept so that it can be taken back.

    LEDGER/index.json               what was recorded of which parameters, and the samples
    LEDGER/SAMPLE-EPOCH.safetensors one sample's gradients in one epoch

1. A matrix of which at most half of the rows were touched (the embedding of an untied model) is kept as these rows; that
   loses nothing.
2. Sums are taken one entry at a time, so memory does not depend on how many samples are forgotten.
3. A sample goes by its tokens and not by its row, so a ledger is found again from data that was encoded alike.
4. A ledger is training data: text can be recovered from gradients, and the index holds the tokens for fuzzy matching. Keep
   it where the data may be kept, and `delete` what was asked to be forgotten.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from overhaul.data.examples import Encoded, Examples
from overhaul.errors import RequestError, RunError, writing
from overhaul.influence import Gradients
from overhaul.selectors import blocks_of
from overhaul.stack import LayerStack

Where = Literal["embedding", "all", "first block", "last blocks"]
Epochs = Literal["first", "all", "last"]
Stores = Literal["gradient", "update"]

LAST_BLOCKS = 2
"""How many blocks "last blocks" are (the paper's 11 and 12 of GPT-2)."""

INDEX = "index.json"


def chosen(model: nn.Module, where: Where | list[int]) -> dict[str, nn.Parameter]:
    """The parameters of a group, by name; a tied one once, under its first name.

    Args:
        model: a language model.
        where: "embedding" is the token embedding (in a tied model the output head with it), "first block", "last blocks"
            (two), "all", or blocks by their depth.

    Raises:
        RequestError: the model names no embedding, or has no such block.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if where == "all":
        found = named
    elif where == "embedding":
        find: Any = getattr(model, "get_input_embeddings", None)
        weight = getattr(find(), "weight", None) if find is not None else None
        found = {name: parameter for name, parameter in named.items() if parameter is weight}
    else:
        stack = LayerStack.of(model)
        names = {"first block": "first:1", "last blocks": f"last:{min(LAST_BLOCKS, len(stack))}"}
        depths = blocks_of(stack, names[where] if isinstance(where, str) else where)
        found = {name: parameter for name, parameter in named.items() if stack.depth(name) in depths}
    if not found:
        raise RequestError(f"where={where!r} selects no parameter of {type(model).__name__} that can be trained.")
    return found


def identity(item: Encoded) -> str:
    """Which sample this is: a hash of its tokens and of which of them are learnt, not of its row's other columns."""
    hasher = hashlib.sha256()
    for name in ("input_ids", "labels"):
        hasher.update(name.encode() + item[name].to(torch.int64).numpy().tobytes())
    return hasher.hexdigest()[:24]


def architecture(model: nn.Module) -> str:
    """A hash of the names and shapes of all parameters."""
    shapes = sorted((name, list(parameter.shape)) for name, parameter in model.named_parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:24]


def weights_digest(model: nn.Module) -> str:
    """A hash of all weights."""
    hasher = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        hasher.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:24]


@dataclass
class Entry:
    """One sample of a ledger.

    Attributes:
        tokens: its `input_ids`, for fuzzy matching.
        epochs: in which of them it was recorded, from 1.
    """

    tokens: list[int]
    epochs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class GradientLedger:
    """What was recorded of a training. Create it with `record`, or `open` one that was.

    Attributes:
        folder: where its files lie.
        stores: gradients of the summed NLL, or displacements (minus the change of the weights).
        shapes: of the parameters that were recorded, by name.
        architecture: of the model, see `architecture`.
        weights: of the model as the training left it, see `weights_digest`.
        entries: the samples by `identity`.
    """

    folder: Path
    stores: Stores
    shapes: Mapping[str, tuple[int, ...]]
    architecture: str
    weights: str
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: str | Path, model: nn.Module) -> GradientLedger:
        """Open a ledger that was recorded of this model or of one with the same parameters.

        Raises:
            RequestError: there is none, its index cannot be read, or it belongs to another architecture.
        """
        folder = Path(folder).expanduser()
        if not (folder / INDEX).is_file():
            raise RequestError(
                f"{folder} is no gradient ledger: it has no {INDEX}. A ledger is recorded while a model learns; give the "
                "role `full` to have the model learn it here."
            )
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            entries = {name: Entry(**entry) for name, entry in index.pop("entries").items()}
            shapes = {name: tuple(shape) for name, shape in index.pop("shapes").items()}
            ledger = cls(folder=folder, entries=entries, shapes=shapes, **index)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{folder / INDEX} is damaged ({error!r}). Record the ledger again.") from error
        ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, shape in shapes.items():
            if ours.get(name) != shape:
                has = f"with the shape {list(ours[name])}" if name in ours else "not at all"
                raise RequestError(
                    f"The ledger {folder} was recorded of another model: it has {name} with the shape {list(shape)}, "
                    f"{type(model).__name__} has it {has}. Give the ledger of this model's training."
                )
        if ledger.architecture != architecture(model):
            raise RequestError(
                f"The ledger {folder} was recorded of another architecture: the other parameters of {type(model).__name__} "
                "differ in names or shapes. Give the ledger of this model's training."
            )
        return ledger

    @property
    def bytes(self) -> int:
        """Size of its entries on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def matching(self, examples: Examples, tau: float | None = None) -> list[str]:
        """The entries that belong to some examples.

        Args:
            examples: what is to be forgotten.
            tau: also take every sample whose tokens are alike by this ratio, see `alike`; None for the same tokens only.

        Raises:
            RequestError: an example was not recorded (without `tau`), or nothing is alike (with it).
        """
        if tau is None:
            wanted = list(dict.fromkeys(map(identity, examples.items)))
            missing = [name for name in wanted if name not in self.entries]
            if missing:
                raise RequestError(
                    f"{len(missing)} of {len(wanted)} examples are not in the ledger {self.folder}: they were not tracked, "
                    'were encoded in another way, or are deleted. match: "fuzzy" takes what is nearly the same.'
                )
            return wanted
        names = list(self.entries)
        found = alike(token_lists(examples), [self.entries[name].tokens for name in names], tau)
        if not found:
            raise RequestError(
                f"No sample of the ledger {self.folder} is alike to one of `forget` by {tau}. Lower tau, or check the data."
            )
        return [names[place] for place in found]

    def check(self, names: Iterable[str]) -> None:
        """Whether gradients of these parameters were recorded.

        Raises:
            RequestError: there are none of one.
        """
        for name in names:
            if name not in self.shapes:
                raise RequestError(
                    f"The ledger {self.folder} has no gradients of {name}; it holds {len(self.shapes)} parameters, such as "
                    f"{next(iter(self.shapes))}. Choose `where` among them, or record more."
                )

    def sum(self, ids: Sequence[str], epochs: Epochs = "first", names: Collection[str] | None = None) -> Gradients:
        """The sum of a group of entries, float32 (float64 of float64 weights) on the CPU, one entry in memory at a time.

        Args:
            ids: of the samples, see `matching`.
            epochs: of each sample the first one, all that were recorded, or the last one.
            names: of the parameters; all that were recorded if not given.

        Raises:
            RequestError: a parameter or a sample was not recorded.
            RunError: a file is missing or damaged.
        """
        wanted = list(self.shapes) if names is None else list(names)
        self.check(wanted)
        total = {name: torch.zeros(self.shapes[name]) for name in wanted}
        for one in ids:
            if one not in self.entries:
                raise RequestError(f"The ledger {self.folder} has no entry {one}.")
            at = sorted(self.entries[one].epochs)
            for epoch in {"first": at[:1], "all": at, "last": at[-1:]}[epochs]:
                for name, gradient in read(file_of(self.folder, one, epoch), self.shapes, wanted).items():
                    total[name] = total[name].to(gradient.dtype).add_(gradient)
        return total

    def delete(self, ids: Collection[str]) -> GradientLedger:
        """Remove entries from the disk for good; the ledger without them. Its digest of the weights stays.

        Raises:
            RunError: the files cannot be removed or the index not be written.
        """
        with writing(self.folder):
            for one in ids:
                for path in self.folder.glob(f"{one}-*.safetensors"):
                    path.unlink()
        left = replace(self, entries={name: entry for name, entry in self.entries.items() if name not in ids})
        left.write_index()
        return left

    def write_index(self) -> None:
        """Write the index beside its place and rename it."""
        known = {"stores": self.stores, "architecture": self.architecture, "weights": self.weights}
        entries = {name: vars(entry) for name, entry in self.entries.items()}
        text = json.dumps({**known, "shapes": dict(self.shapes), "entries": entries})
        partial = self.folder / f".{INDEX}.partial"
        with writing(self.folder):
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, self.folder / INDEX)


def token_lists(examples: Examples) -> list[list[int]]:
    """The tokens of each example."""
    return [item["input_ids"].tolist() for item in examples.items]


def alike(targets: Sequence[Sequence[int]], others: Sequence[Sequence[int]], tau: float) -> list[int]:
    """Places in `others` of the token sequences that are alike to a target: difflib's ratio 2 M / T is at least tau.

    Only sequences that share one of their rarest tokens are compared. None is missed: at a ratio of tau two sequences have
    at least n tau / (2 - tau) tokens in common, repetitions counted, where n is the length of either.

    Args:
        targets: what is looked for.
        others: where.
        tau: above 0, at most 1; at 1 sequences are the same.
    """
    frequency = Counter(token for tokens in (*targets, *others) for token in tokens)

    def rarest(tokens: Sequence[int]) -> list[tuple[int, int]]:
        seen: Counter[int] = Counter()
        numbered: list[tuple[int, int]] = []
        for token in tokens:  # the second of two equal tokens is another element, so that sets count repetitions
            numbered.append((token, seen[token]))
            seen[token] += 1
        needed = math.ceil(len(tokens) * tau / (2 - tau) - 1e-9)
        return sorted(numbered, key=lambda one: (frequency[one[0]], one))[: len(tokens) - needed + 1]

    holders: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, tokens in enumerate(targets):
        for element in rarest(tokens):
            holders[element].append(place)
    found: list[int] = []
    for place, tokens in enumerate(others):
        near = {target for element in rarest(tokens) for target in holders.get(element, ())}
        matcher = difflib.SequenceMatcher(None, "", tokens, autojunk=False)
        for target in sorted(near):
            matcher.set_seq1(targets[target])
            if matcher.ratio() >= tau:
                found.append(place)
                break
    return found


def file_of(folder: Path, name: str, epoch: int) -> Path:
    """Where one sample's gradients in one epoch lie."""
    return folder / f"{name}-{epoch}.safetensors"


def packed(name: str, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A gradient as it is stored: whole, or the rows that are not zero where these are at most half."""
    if gradient.ndim == 2:
        rows = gradient.ne(0).any(dim=1).nonzero()[:, 0]
        if 2 * len(rows) <= len(gradient):
            yield from ((f"rows:{name}", rows), (f"values:{name}", gradient[rows].contiguous()))
            return
    yield f"all:{name}", gradient.contiguous()


def read(path: Path, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> Gradients:
    """The gradients of one file, unpacked."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is missing or damaged ({error}), so its sample cannot be taken back.") from error
    found: Gradients = {}
    for name in names:
        if f"all:{name}" in stored:
            found[name] = stored[f"all:{name}"]
        elif f"rows:{name}" in stored:
            values = stored[f"values:{name}"]
            found[name] = values.new_zeros(shapes[name]).index_copy_(0, stored[f"rows:{name}"], values)
    return found
