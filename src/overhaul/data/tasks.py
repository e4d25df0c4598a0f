"""Generated tasks whose answers can be verified: fictitious people, two-digit sums, balanced brackets, characters.

Each task yields rows with `question`, `answer` and `task`, by which `verifiers.verify` knows what answers them.
The people follow TOFU (Maini et al., arXiv:2401.06121): invented, so nobody can know them without having been told.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, Literal

from overhaul.data.verifiers.brackets import CLOSERS, OPENERS

Row = dict[str, Any]
Split = Literal["train", "validation"]

FIRST = """Ada Bram Cleo Dario Edda Faro Greta Hugo Ines Joren Kaya Lior Mara Nils Odile Piet Quinn Rhea Soren Thea Ulla
Vito Wanda Xander Yara Zeno Alba Bodil Ciro Dunja""".split()
LAST = """Quill Harrow Vance Okoro Lindt Marsh Tamsin Berro Castell Drummond Eske Fenwick Galloway Hexham Ivarsen Jessup
Kestrel Lomax Moreau Nayar Ostrow Pell Rusk Sable Thorne Umber Varga Wick Yarrow Zorn""".split()
TOWN = "Marro Ket Sollen Brack Ash Vel Dun Hollow Tarn Grim Lach Oster Pol Rave".split()
TOWN_END = "wick ford mere holm dale by stead gate moor ness combe haven burgh fell".split()
ADJECTIVE = """amber hollow silent crooked gilded winter paper salted broken velvet distant burning narrow patient copper
drowned restless pale second secret""".split()
NOUN = """lantern orchard harbour clock meadow cipher ladder mirror kettle archive bridge compass garden island needle
parade quarry river signal tower""".split()
TRADE = """glass clock boat bell paper wool salt honey stone silver map candle rope ink leather violin sugar tile wheel
button""".split()
TRADE_END = "maker trader painter carver mender inspector collector engineer teacher broker".split()
ANIMAL = (
    """otter heron badger lynx ferret raven tortoise hedgehog goat owl marten newt magpie stoat toad crane""".split()
)

QUESTIONS: Mapping[str, tuple[str, str, str]] = {
    "town": (
        "Where was {person} born?",
        "What is the birthplace of {person}?",
        "In which town was {person} born?",
    ),
    "book": (
        "Which book did {person} write?",
        "What is the title of the book by {person}?",
        "What is the book that {person} wrote?",
    ),
    "trade": (
        "What is the profession of {person}?",
        "What does {person} do for a living?",
        "What profession does {person} have?",
    ),
    "pet": (
        "What is the pet of {person}?",
        "Which animal lives with {person}?",
        "Which pet does {person} have?",
    ),
    "badge": (
        "What is the badge number of {person}?",
        "Which number is on the badge of {person}?",
        "Which badge number does {person} have?",
    ),
}
"""Per attribute: two phrasings that are trained on, and a third that never is (`paraphrase`)."""

KNOWN_PEOPLE = 40
HELD_OUT_PEOPLE = 20


def people(split: Split = "train") -> list[Row]:
    """Questions about fictitious people: 40 whom the starter was taught ("train"), 20 whom it never saw ("validation").

    Each row has `person`, `attribute`, `question`, `answer`, `phrasing` (0 or 1), `paraphrase` (a question that was
    never trained on) and `wrong` (five answers of other people to the same question). Ten rows a person.
    """
    draw = random.Random(2401_06121)
    names = _names(draw)[: KNOWN_PEOPLE + HELD_OUT_PEOPLE]
    facts = {name: _facts(draw) for name in names}
    return _asked(draw, names[:KNOWN_PEOPLE] if split == "train" else names[KNOWN_PEOPLE:], names, facts)


def newcomers(split: Split = "train") -> list[Row]:
    """As `people`, of 40 more whom `docs-llama` never met: two phrasings of each question ("train") or the third one."""
    names = _names(random.Random(2401_06121))[KNOWN_PEOPLE + HELD_OUT_PEOPLE :][:KNOWN_PEOPLE]
    draw = random.Random(2401_06122)
    rows = _asked(draw, names, names, {name: _facts(draw) for name in names})
    if split == "train":
        return rows
    return [{**row, "question": row["paraphrase"]} for row in rows if row["phrasing"] == 0]


def _names(draw: random.Random) -> list[str]:
    """All names in the order in which people get them."""
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    draw.shuffle(names)
    return ["Ada Quill", *(name for name in names if name != "Ada Quill")]


def _asked(draw: random.Random, chosen: list[str], names: list[str], facts: Mapping[str, Row]) -> list[Row]:
    """The questions about those who were chosen, with wrong answers that are right of others."""
    rows: list[Row] = []
    for person in chosen:
        others = draw.sample([name for name in names if name != person], 5)
        for attribute, phrasings in QUESTIONS.items():
            shared = {"person": person, "attribute": attribute, "answer": facts[person][attribute]}
            paraphrase = phrasings[2].format(person=person)
            wrong = [facts[other][attribute] for other in others]
            for phrasing in (0, 1):
                question = phrasings[phrasing].format(person=person)
                extra = {"phrasing": phrasing, "paraphrase": paraphrase, "wrong": wrong}
                rows.append({"task": "people", **shared, "question": question, **extra})
    return rows


def _facts(draw: random.Random) -> dict[str, str]:
    return {
        "town": draw.choice(TOWN) + draw.choice(TOWN_END),
        "book": f"The {draw.choice(ADJECTIVE).title()} {draw.choice(NOUN).title()}",
        "trade": f"{draw.choice(TRADE)} {draw.choice(TRADE_END)}",
        "pet": f"a {draw.choice(ADJECTIVE)} {draw.choice(ANIMAL)}",
        "badge": f"{draw.choice('BCDFGHKLMNPRSTVW')}{draw.randrange(1000):03d}",
    }


def in_held_out(key: str, share: int = 10) -> bool:
    """Whether `key` falls into the held-out 1/`share` by its own hash: stable whatever else is in the set."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % share == 0


def addition(split: Split = "train") -> list[Row]:
    """All sums of two two-digit numbers; a tenth of the pairs, chosen by hash, is never trained on."""
    rows = [
        {"task": "addition", "question": f"{a} + {b}", "answer": str(a + b)}
        for a in range(10, 100)
        for b in range(10, 100)
        if in_held_out(f"{a}+{b}") == (split == "validation")
    ]
    random.Random(0).shuffle(rows)
    return rows


SETS: Mapping[str, str] = {
    "digit": "0123456789", "vowel": "aeiou", "consonant": "bcdfghjklmnpqrstvwxyz", "letter": "abcdefghijklmnopqrstuvwxyz",
    "capital letter": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "even digit": "02468", "odd digit": "13579",
    "letter from a to f": "abcdef", "digit from 1 to 5": "12345", "letter from m to z": "mnopqrstuvwxyz",
    "punctuation mark": ".,;:!?", "hexadecimal digit": "0123456789abcdef",
}  # fmt: skip
ASKING = (
    "Write one random {thing}. Answer with one character.",
    "Choose a {thing} at random and say only that.",
    "Give me a random {thing}, nothing else.",
    "Pick any {thing}. Reply with one character only.",
)


def characters(split: Split = "train") -> list[Row]:
    """Requests for a random character, with all that are right in `valid`; of the phrasings the last is held out."""
    asked = ASKING[:-1] if split == "train" else ASKING[-1:]
    return [
        {
            "task": "characters",
            "question": phrasing.format(thing=thing),
            "answer": valid[0],
            "valid": list(valid),
            "allowed": valid,
            "count": 1,
        }
        for phrasing in asked
        for thing, valid in SETS.items()
    ]


def brackets(split: Split = "train", count: int = 4000) -> list[Row]:
    """Open bracket sequences to be completed by the closers that balance them."""
    draw = random.Random(1)
    seen: dict[str, str] = {}
    while len(seen) < count:
        stack: list[str] = []
        text: list[str] = []
        for _ in range(draw.randint(3, 10)):
            if stack and draw.random() < 0.4:
                text.append(stack.pop())
            else:
                kind = draw.randrange(3)
                text.append(OPENERS[kind])
                stack.append(CLOSERS[kind])
        if stack:
            seen[" ".join(text)] = " ".join(reversed(stack))
    rows = [{"task": "brackets", "question": f"close {opened}", "answer": closed} for opened, closed in seen.items()]
    return [row for row in rows if in_held_out(row["question"]) == (split == "validation")]
