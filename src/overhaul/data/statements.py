"""Generated statements that are true or false, in pairs that differ in their subject alone.

About sums, about which of two numbers is larger, and about the people whom `docs-llama` knows (`tasks.people`). The false
one of a pair has the same object behind another subject of as many characters, as causal tracing wants (arXiv:2504.02904).
As many characters are not always as many tokens: names are, of about half of the pairs, for the starters' tokenizer.
"""

from __future__ import annotations

import random
from collections import defaultdict

from overhaul.data.tasks import Row, Split, in_held_out, people

SAYS = {
    "town": "{person} was born in {answer}.",
    "book": "{person} wrote {answer}.",
    "trade": "{person} is a {answer}.",
    "pet": "{person} lives with {answer}.",
    "badge": "{person} has the badge {answer}.",
}
QUESTION = "{statement} This statement is:"


def statements(split: Split = "train", count: int = 600) -> list[Row]:
    """Statements about numbers and known people: each true one is followed by a false one.

    A tenth of the pairs, chosen by hash, is held out. Each row has `statement`, `label` ("true" or "false"), `topic`
    ("addition", "larger", "town", "book", "trade", "pet", "badge"), `subject`, `object`, `pair`, the number of its pair, and
    the same as a `question` with its `answer`.

    Args:
        split: "train" or "validation".
        count: pairs of each topic about numbers.
    """
    draw = random.Random(2504_02905)
    pairs = [*_numbers("addition", draw, count), *_numbers("larger", draw, count), *_people(draw)]
    return [
        _row(text.format(subject=subject, object=object_), topic, label, subject, object_, number)
        for number, (topic, text, subjects, object_) in enumerate(pairs)
        if in_held_out(text.format(subject=subjects[0], object=object_)) == (split == "validation")
        for label, subject in zip(("true", "false"), subjects, strict=True)
    ]


Pair = tuple[str, str, tuple[str, str], str]
"""Topic, a text with {subject} and {object}, the right and the wrong subject, the object."""


def _row(statement: str, topic: str, label: str, subject: str, object_: str, pair: int) -> Row:
    return {
        "task": "statements",
        "statement": statement,
        "label": label,
        "topic": topic,
        "subject": subject,
        "object": object_,
        "pair": pair,
        "question": QUESTION.format(statement=statement),
        "answer": label,
    }


def _numbers(topic: str, draw: random.Random, count: int) -> list[Pair]:
    """Two-digit numbers. A wrong sum misses the right one by 1, 2, 10 or 20."""
    found, told = list[Pair](), set[tuple[str, str]]()
    while len(found) < count:
        a, b = draw.randrange(10, 100), draw.randrange(10, 100)
        if topic == "larger":
            small, large = sorted((a, b))
            if small == large:
                continue
            wrong = str(draw.randrange(10, small + 1))
            pair = (topic, "{subject} is larger than {object}.", (str(large), wrong), str(small))
        else:
            other = a + draw.choice((-20, -10, -2, -1, 1, 2, 10, 20))
            if other not in range(10, 100):
                continue
            pair = (topic, "{subject} is {object}.", (f"{a} + {b}", f"{other} + {b}"), str(a + b))
        both = {(subject, pair[3]) for subject in pair[2]}
        if not both & told:  # no statement is in two pairs, so splits have none in common
            found.append(pair)
            told |= both
    return found


def _people(draw: random.Random) -> list[Pair]:
    """A fact of each known person, and of another one whose name is as long and whose fact is another."""
    known = [row for row in people("train") if row["phrasing"] == 0]
    by_length = defaultdict[tuple[str, int], list[Row]](list)
    for row in known:
        by_length[row["attribute"], len(row["person"])].append(row)
    pairs: list[Pair] = []
    for row in known:
        others = [
            other for other in by_length[row["attribute"], len(row["person"])] if other["answer"] != row["answer"]
        ]
        if others:
            text = SAYS[row["attribute"]].format(person="{subject}", answer="{object}")
            pairs.append((row["attribute"], text, (row["person"], draw.choice(others)["person"]), row["answer"]))
    return pairs
