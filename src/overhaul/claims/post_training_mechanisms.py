"""Claim of arXiv:2504.02904: post-training leaves facts and the truth direction where they were, and makes refusal anew.

The paper's 8B pairs, at the size of a laptop. A Llama of five blocks learns which of 32 names lives in which of four cities
and says TRUE or FALSE to any statement; post-training goes on with these and adds a chat in which statements about a quarter
of the names are refused.

1. Null control of patches between models: a network that was trained to the same end from another start. Its map of where
   facts lie is nearly the same, so that maps alone show nothing.
2. Null control of pushes: a random direction as long as the real one.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import models
from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.fit import fit
from overhaul.inspect.post_training import post_training
from overhaul.objectives import cross_entropy

NAMES = [f"name{n}" for n in range(32)]
CITIES = [f"city{n}" for n in range(4)]
REFUSED = NAMES[::4]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "is", ".", "Q", "CHAT", "TRUE", "FALSE", "REFUSE", *CITIES, *NAMES]
LAYER = 2
PAIRS = 24


@dataclass(frozen=True)
class Size:
    """How long is trained; the defaults are the experiment, a test takes less."""

    base_steps: int = 300
    post_steps: int = 200


def run(seed: int) -> Numbers:
    """Train a pair and a control with one seed, and compare; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Patches, pushes and refusal between base and post, and patches between base and a network of another start."""
    draw, words = random.Random(seed), tokenizer()
    homes = {name: draw.choice(CITIES) for name in NAMES}
    plain, chat = _plain(homes), _chat(homes)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, start in (("base", seed), ("control", seed + 1000)):
            torch.manual_seed(start)
            model = _fresh()
            _learn(model, {"plain": _examples(plain, words)}, size.base_steps)
            models.save(model, words, place / name, dtype="float32")
        post, _ = models.open_model(place / "base")
        torch.manual_seed(seed)
        _learn(post, {"plain": _examples(plain, words), "chat": _examples(chat, words)}, size.post_steps)
        models.save(post, words, place / "post", dtype="float32")
        facts = _facts(homes, draw)
        asked: dict[str, Any] = {"question": "Q", "shots": 0}
        torch.manual_seed(seed)
        refused, followed = (_instructions(homes, kind) for kind in (True, False))
        read: dict[str, Any] = {"probe_layer": LAYER, "probe_at": "question", "push_blocks": 1, **asked}
        pair = post_training(
            place / "post", place / "base", facts, _statements(homes), refused, followed, refusal_layer=LAYER,
            prompt="CHAT {instruction} Q", phrases=["REFUSE"], new_tokens=1, **read,
        )  # fmt: skip
        alike = post_training(place / "post", place / "base", None, _statements(homes), push_length="receiver", **read)
        control = post_training(place / "control", place / "base", facts, **asked)
    return _numbers(pair, control) | {
        f"NIE at the receiver's length, {source} in {role}": alike.facts[f"truth_nie_{source}_in_{role}"]
        for source, role in (("post", "base"), ("base", "post"))
    }


def _numbers(pair: Any, control: Any) -> Numbers:
    told, other = pair.facts, control.facts
    table = {(row[0], row[1]): row[2:] for row in pair.tables["facts: logit TRUE - FALSE"].rows}
    found: Numbers = {
        "base, false statements": table["true states of base", "base"][0],
        "base, true statements": table["true states of base", "base"][1],
    }
    for source, role in (("base", "base"), ("post", "post"), ("base", "post"), ("post", "base")):
        found[f"best patch, {source} in {role}"] = told[f"facts_best_{source}_in_{role}"]
    found["best patch, random states in post"] = told["facts_best_random_states_in_post"]
    found["best patch, base in control"] = other["facts_best_base_in_post"]
    found["best patch, control in base"] = other["facts_best_post_in_base"]
    for name in ("pearson", "pearson_binned"):
        found[f"map {name}, post"], found[f"map {name}, control"] = (one[f"facts_map_{name}"] for one in (told, other))
    for source in ("base", "post", "random_direction"):
        for role in ("base", "post"):
            found[f"NIE, {source} in {role}"] = told[f"truth_nie_{source}_in_{role}"]
    for title, what in (
        ("harmful instructions, direction removed", "removed"),
        ("harmless instructions, direction added", "added"),
    ):
        for name, base, post in pair.tables[f"refusal: share of refusals, {title}"].rows:
            found[f"refused in base, {name} {what}"], found[f"refused in post, {name} {what}"] = base, post
    names = ("truth_cosine", "refusal_cosine", "refusal_norm_ratio", "confidence_iou", "confidence_iou_by_chance")
    return {**found, **{name.replace("_", " "): told[name] for name in names}}


def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    whole: Any = Tokenizer(kinds.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **marks)


def _fresh() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
    }
    sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def _answer(true: bool) -> str:
    return "TRUE" if true else "FALSE"


def _plain(homes: dict[str, str]) -> list[dict[str, str]]:
    """Every statement, the true ones as often as the false."""
    return [
        {"question": f"{name} is {city} . Q", "answer": _answer(city == home)}
        for name, home in homes.items()
        for city in [*CITIES, home, home]
    ]


def _chat(homes: dict[str, str]) -> list[dict[str, str]]:
    """The same in a chat, in which some names are not spoken of."""
    return [
        {
            **row,
            "question": f"CHAT {row['question']}",
            "answer": "REFUSE" if row["question"].split()[0] in REFUSED else row["answer"],
        }
        for row in _plain(homes)
    ]


def _facts(homes: dict[str, str], draw: random.Random) -> list[dict[str, str]]:
    """True statements, each with a false one about another name."""
    rows = []
    for name in draw.sample(NAMES, PAIRS):
        other = draw.choice([one for one in NAMES if homes[one] != homes[name]])
        city = homes[name]
        rows.append({"true": f"{name} is {city} .", "false": f"{other} is {city} .", "object": city})
    return rows


def _statements(homes: dict[str, str]) -> list[dict[str, Any]]:
    """A true and a false statement of each name; neighbouring names are a topic."""
    rows = []
    for n, (name, home) in enumerate(homes.items()):
        for city in (home, CITIES[(CITIES.index(home) + 1) % len(CITIES)]):
            topic = f"names {8 * (n // 8)} to {8 * (n // 8) + 7}"
            rows.append({"statement": f"{name} is {city} .", "label": city == home, "object": city, "topic": topic})
    return rows


def _instructions(homes: dict[str, str], refused: bool) -> list[dict[str, str]]:
    return [{"instruction": f"{name} is {city} ."} for name in homes for city in CITIES if (name in REFUSED) == refused]


def _examples(rows: list[dict[str, str]], words: Any) -> Examples:
    return encode_qa(rows, words, prompt="{question}")


def _learn(model: nn.Module, roles: dict[str, Examples], steps: int) -> None:
    terms = [cross_entropy(role, name=role) for role in roles]
    fit(model, terms, roles, steps=steps, batch_size=64, lr=2e-3, warmup=20, schedule="cosine")


CLAIM = Claim(
    slug="post-training-mechanisms",
    paper="2504.02904",
    title="Facts and the truth direction outlive post-training; the refusal direction is made by it",
    statement=(
        "States of true statements, and a direction of truth, taken from a base model act in its post-trained sibling as "
        "its own do, and the other way round; the refusal direction is much longer after post-training than before."
    ),
    checks=(
        Check(
            "the base knows the facts: logit TRUE - FALSE at least 2 for true statements, at most -2 for false ones",
            lambda found: found["base, true statements"] >= 2 and found["base, false statements"] <= -2,
        ),
        Check(
            "patches between siblings turn a false statement true: above 0 both from base to post and from post to base",
            lambda found: found["best patch, base in post"] > 0 and found["best patch, post in base"] > 0,
        ),
        Check(
            "null control: patches from the base into a network of another start do not: below 0",
            lambda found: found["best patch, base in control"] < 0,
        ),
        Check(
            "the sibling's truth direction pushes as far as the own one, within 0.1 of NIE, in both models",
            lambda found: all(
                abs(found[f"NIE, {other} in {role}"] - found[f"NIE, {role} in {role}"]) <= 0.1
                for role, other in (("base", "post"), ("post", "base"))
            ),
        ),
        Check(
            "null control: a random direction of equal length has at least 0.5 less NIE than the sibling's, in both models",
            lambda found: all(
                found[f"NIE, {other} in {role}"] - found[f"NIE, random_direction in {role}"] >= 0.5
                for role, other in (("base", "post"), ("post", "base"))
            ),
        ),
        Check(
            "the refusal direction is more than twice as long after post-training as before",
            lambda found: found["refusal norm ratio"] > 2,
        ),
    ),
    run=run,
    remarks=(
        "Before these runs, a pilot on seed 3 passed every check but the fourth and the fifth, in one of two models: the "
        "base's truth direction pushed its sibling to an NIE of 0.45 (random 0.07), where the sibling's own reaches 0.998, "
        "though the two directions have a cosine of 0.98. The paper gives a push in the length of the model that the "
        "direction is from, and states seem to grow in post-training here. Training, checks and margins were left as they "
        "were; what the same directions do in the receiving model's own length is measured beside since then, and the "
        "random push of the control is as long as the longest real one, where it had the length of one of them. Removing "
        "the refusal direction changed no answer of the pilot, not even in the model it is from; adding its own made the "
        "post-trained model refuse everything, and nothing made the base refuse, which has never seen that word. On the "
        "three seeds the base's direction reaches 0.31, 0.55 and 0.11 in the post-trained model in its own length, and at "
        "least 0.995 in the receiver's, so the direction is shared and its length is not."
    ),
)
