"""Whether checkpoints mean the same by the same numbers: names of tensors, words, and what their configs say.

1. Names are compared as the class reads them: with or without the prefix before a model's body, as older and newer versions
   of the library write them, and with a tied tensor stored once or twice. Where they differ, buffers that the class no
   longer stores are left out, as the library leaves them out on loading.
2. A word's embedding is a row. Where two tokenizers give one row to different words, a blend of the rows means nothing.
3. What else the configs say differently (the base of rotary positions, head counts, the class) changes no shape, so only the
   user can tell whether it matters: it is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from overhaul.errors import RequestError
from overhaul.models import Checkpoint, planned
from overhaul.weights.depths import built_names
from overhaul.weights.index import (
    BY_WORDS,
    LEAVE_WORDS,
    Source,
    TensorFacts,
    TensorIndex,
    architecture,
    facts_of,
    sizes_that_differ,
    vocabulary,
)
from overhaul.weights.vocabularies import Reworded, Vocabulary, reworded, words

_UNIMPORTANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_TOLD_BY_SHAPES = {"vocab_size", "tie_word_embeddings"}
_SAID = 8
_MISSING = object()


def aligned(sources: Sequence[Source]) -> list[TensorIndex]:
    """The index of each checkpoint, with the names that the first one uses.

    Raises:
        RequestError: as in `TensorIndex.of`; there is no checkpoint; or a tensor is tied in one and not in another.
    """
    if not sources:
        raise RequestError("There is no model. Give at least one.")
    checkpoints = [facts_of(source) for source in sources]
    if ready := [known.index for known in checkpoints if isinstance(known, Reworded)]:
        assert len(ready) == len(checkpoints), "one vocabulary is of all models or of none"
        return ready
    first, *others = indexes = [TensorIndex.of(known) for known in checkpoints]
    if all(other.tensors.keys() == first.tensors.keys() for other in others):
        return indexes
    built = [_planned(known) for known in checkpoints]
    first, *others = [_as_loaded(model, index) for model, index in zip(built, indexes, strict=True)]
    return [first, *(_renamed(built[0], first, model, other) for model, other in zip(built[1:], others, strict=True))]


def one_vocabulary(sources: Sequence[Source], wanted: Vocabulary | bool) -> list[Checkpoint]:
    """Checkpoints as if they had the same words, for the functions that read files.

    Args:
        sources: the models.
        wanted: which words; False for the first one's, True for those of all.

    Raises:
        RequestError: as in `aligned`; or the words of one are not known.
    """
    chosen = wanted if isinstance(wanted, Vocabulary) else Vocabulary(wanted)
    return reworded(aligned(sources), [facts_of(source) for source in sources], chosen)


def _planned(known: Checkpoint) -> nn.Module | None:
    """What the class builds; None where it is not known, and names have to be enough."""
    try:
        return planned(known)
    except RequestError:
        return None


def _as_loaded(model: Any, index: TensorIndex) -> TensorIndex:
    """The index without what the library itself leaves out on loading, such as buffers that a class no longer stores."""
    adjust = getattr(model, "_adjust_missing_and_unexpected_keys", None)
    if adjust is None:
        return index
    known = model.state_dict().keys()
    built = built_names(model, index.tensors)
    unknown = {one for one in built.values() if one not in known}
    told = SimpleNamespace(missing_keys=set[str](), unexpected_keys=set(unknown))
    adjust(told)
    gone = unknown - told.unexpected_keys
    return replace(index, tensors={name: one for name, one in index.tensors.items() if built[name] not in gone})


def _renamed(one: nn.Module | None, first: TensorIndex, two: nn.Module | None, other: TensorIndex) -> TensorIndex:
    """The other's tensors under the first's names, where both classes can be built."""
    if first.tensors.keys() == other.tensors.keys() or one is None or two is None:
        return other
    models = (one, two)
    ties = [dict(getattr(model, "all_tied_weights_keys", None) or {}) for model in models]
    built = [built_names(models[0], first.tensors), built_names(models[1], other.tensors)]
    mine, yours = (
        {name: tied.get(one, one) for name, one in names.items()} for tied, names in zip(ties, built, strict=True)
    )
    _check_ties(first, other, ties[0], set(yours.values()) - set(mine.values()))
    _check_ties(other, first, ties[1], set(mine.values()) - set(yours.values()))
    # of a tied tensor that is stored twice, the one that the other is tied to counts: it comes last here
    by_key: dict[str, list[str]] = {}
    for name in sorted(yours, key=lambda name: built[1][name] == yours[name]):
        by_key.setdefault(yours[name], []).append(name)
    held: dict[str, TensorFacts] = {}
    for name, tensor in first.tensors.items():
        names = [name] if name in other.tensors and yours[name] == mine[name] else by_key.get(mine[name], [])
        if len({built[1][one] for one in names}) == len(names) and names:  # else the class makes one of several
            held[name] = replace(other.tensors[names[-1]], name=name, places=tensor.places)
    read = set(mine.values())
    rest = {name: tensor for name, tensor in other.tensors.items() if yours[name] not in read and name not in held}
    return replace(other, tensors={**held, **rest})


def _check_ties(tied: TensorIndex, own: TensorIndex, ties: Mapping[str, str], lacking: Set[str]) -> None:
    """Refuse what one checkpoint holds and the other ties to something else; larger differences are said first."""
    for name in sorted(lacking & ties.keys()):
        said = "".join(f"{one}. " for one in sizes_that_differ(tied, own))
        if architecture(tied.config) != architecture(own.config):
            raise RequestError(f"{said}Give checkpoints of one architecture.")
        raise RequestError(
            f"{said}{name} is a tensor of its own in {own.source} and is tied to {ties[name]} in {tied.source}. "
            f"{'Give checkpoints of one size; where sizes may differ, untie it' if said else 'Untie it'} there: "
            "open the model, set `model.config.tie_word_embeddings = False` and "
            f"`model.{name} = torch.nn.Parameter(model.{ties[name]}.detach().clone())`, and save it."
        )


def differences(sources: Sequence[Source]) -> list[str]:
    """What the configs of checkpoints say differently, a sentence each; dtypes and versions aside."""
    first, *others = (facts_of(source) for source in sources)
    ours = _flat(first.config)
    said: list[str] = []
    for other in others:
        theirs = _flat(other.config)
        for key in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(key, _MISSING), theirs.get(key, _MISSING)
            if a != b and key.rpartition(".")[2] not in _UNIMPORTANT | _TOLD_BY_SHAPES:
                x, y = ("not given" if value is _MISSING else json.dumps(value) for value in (a, b))
                said.append(f"{key} is {x} in {first.source} and {y} in {other.source}")
    return [*said[:_SAID], f"{len(said) - _SAID} more"] if len(said) > _SAID else said


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def check_words(indexes: Sequence[TensorIndex], needed: Sequence[TensorFacts]) -> None:
    """Refuse tokenizers that give one number to different words, if rows of words are among what is needed.

    Raises:
        RequestError: they do; it names a word.
    """
    first, *others = indexes
    rows = vocabulary(first.config)
    if first.folder is None or not any(tensor.shape[:1] == (rows,) and not tensor.rows for tensor in needed):
        return
    for other in others:
        if other.folder is None or same_tokenizer_file(first.folder, other.folder):
            continue
        if differing := differing_words(words(first.folder), words(other.folder)):
            raise RequestError(
                f"The tokenizers of {first.source} and {other.source} number {len(differing)} words differently: "
                f"{differing[0]}, so their embeddings do not correspond. {BY_WORDS} {LEAVE_WORDS}, "
                "or write `any_words=True`."
            )


def differing_words(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[str]:
    """Each number that two tokenizers give to different words, with these words. Words that one of them lacks are none."""
    return [
        f"{number} is {ours[number]!r} in one and {theirs[number]!r} in the other"
        for number in sorted(ours.keys() & theirs.keys())
        if ours[number] != theirs[number]
    ]


def same_tokenizer_file(one: Path, other: Path) -> bool:
    """Whether both folders hold the same tokenizer.json, so that nothing needs to be compared."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    return all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes()
