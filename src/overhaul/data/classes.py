"""The numbers of classes: a model's own where it names its classes, so that "cat" is learnt as what the model calls cat.

1. A model that names its classes (`label2id`) must know every name. Names are compared as they stand.
2. One that does not (LABEL_0, LABEL_1, ...) takes numbers as they are where all are below its count. Where there are as many
   names as classes they are numbered from 0 in their order, and that is said: folders 1 to n as numbers, others by name.
3. Without a model, numbers are themselves, and names are numbered from 0 in their order.
4. In a column of a table a number is a number, also where the file can only hold text (CSV).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from overhaul.errors import RequestError

Labels = Mapping[str, int]
"""A model's `config.label2id`."""


@dataclass(frozen=True)
class Classes:
    """Names of classes with the numbers that the data gives them.

    Attributes:
        numbers: name -> number.
        stated: whether the data says these numbers, or only their order was taken.
    """

    numbers: Mapping[str, int]
    stated: bool

    @classmethod
    def named(cls, names: Collection[str]) -> Classes:
        """Classes of which only the names are known: numbers are stated by themselves."""
        if all(map(is_number, names)):
            return cls(
                {name: _whole(name) for name in sorted(names, key=lambda name: (_whole(name), name))}, stated=True
            )
        return cls({name: number for number, name in enumerate(sorted(names))}, stated=False)


def is_number(name: str) -> bool:
    """Whether a class is called by a number: 7, 07, or 7.0 as tables write it that have lost a cell."""
    return re.fullmatch(r"[0-9]{1,9}(\.0)?", name) is not None


def _whole(name: str) -> int:
    return int(name.removesuffix(".0"))


def labels_of(config: Mapping[str, Any]) -> Labels | None:
    """The names of a model's classes by its config; None for a model that has no classes.

    Raises:
        RequestError: the config does not number them.
    """
    named, numbers = config.get("id2label"), config.get("label2id")
    try:
        by_number = {str(v): int(k) for k, v in named.items()} if isinstance(named, Mapping) else {}
        by_name = {str(k): int(v) for k, v in numbers.items()} if isinstance(numbers, Mapping) else {}
        told = [each for each in (by_number, by_name) if each and not unnamed(each)] or [by_number, by_name]
        if told[0] and told[-1] and told[0] != told[-1]:
            raise RequestError(
                "The model's config.json gives its classes other numbers in `id2label` than in `label2id`. Correct the one "
                "that is wrong."
            )
        if found := told[0] or told[-1]:
            return found
        count = int(config.get("num_labels", 2))  # what transformers takes where a config says nothing
    except (TypeError, ValueError):
        raise RequestError("The model's config.json has an `id2label` or `label2id` that gives no numbers.") from None
    if any("Classification" in str(name) for name in config.get("architectures") or ()):
        return {f"LABEL_{n}": n for n in range(count)}
    return None


def unnamed(labels: Labels) -> bool:
    """Whether these are the names that transformers gives to classes without any."""
    return all(re.fullmatch("LABEL_[0-9]+", name) for name in labels)


def numbered(classes: Classes, labels: Labels | None, source: str) -> tuple[Mapping[str, int], str | None]:
    """The number of each class for a model, and what should be said about it.

    Raises:
        RequestError: the model does not know a class, or has another number of them.
    """
    names = classes.numbers
    for name, number in names.items():
        other = next(other for other, same in names.items() if same == number)
        if other != name:
            raise RequestError(f"{source}: the classes {other!r} and {name!r} are one number, {number}. Rename one.")
    if labels is None:
        return names, None
    if sorted(labels.values()) != list(range(len(labels))):
        raise RequestError(
            f"{source}: the model's config.json numbers its classes {sorted(labels.values())[:8]}, which are not 0 to "
            f"{len(labels) - 1}. Correct its `id2label` and `label2id`."
        )
    if all(name in labels for name in names):
        return {name: labels[name] for name in names}, None
    listed = ", ".join(sorted(labels, key=lambda name: labels[name])[:20])
    if not unnamed(labels):
        unknown = ", ".join(sorted(set(names) - set(labels))[:5])
        raise RequestError(f"{source}: the model has no class {unknown}. It has {listed}; name the data's classes so.")
    if classes.stated and all(0 <= number < len(labels) for number in names.values()):
        return names, None
    if len(names) != len(labels):
        raise RequestError(
            f"{source}: it has {len(names)} classes ({', '.join(list(names)[:20])}), but the model has {len(labels)} and no "
            "names for them. Give the model's config `id2label` and `label2id` with these names, or number the classes."
        )
    order = {name: number for number, name in enumerate(sorted(names, key=lambda name: names[name]))}
    said = ", ".join(f"{name} is {number}" for name, number in list(order.items())[:6]) + (", ..." * (len(order) > 6))
    return order, f"{source}: the model does not name its classes, so they are numbered in order: {said}."


def number_of(value: Any, numbers: Mapping[str, int], labels: Labels | None, place: str, column: str) -> int:
    """The number of one row's class.

    Raises:
        RequestError: it is no class, or a number that the model does not have.
    """
    if isinstance(value, str) and value in numbers:
        return numbers[value]
    if isinstance(value, str) and is_number(value):
        value = _whole(value)
    if not isinstance(value, str) and hasattr(value, "item") and not getattr(value, "shape", ()):  # numpy's and torch's
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:  # not so of NaN and infinity
        raise RequestError(f"{place}: {column!r} is {value!r}, and the name or the number of a class is needed.")
    if labels is not None and not 0 <= value < len(labels):
        raise RequestError(
            f"{place}: {column!r} is {int(value)}, but the model has {len(labels)} classes, from 0 to {len(labels) - 1}."
        )
    return int(value)
