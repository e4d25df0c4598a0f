"""Claims of arXiv:2411.15124 (Tulu 3): length-normalised DPO does not reward length, and verifiable rewards raise success.

The paper's stages at the size of a laptop: a character-level Llama of two blocks is taught sums of two-digit numbers, digits
reversed, until it is right about half of the time when it is sampled. It may say a sum one to four times, as often each
("570", "570+570", ...): so an answer has a length that has nothing to do with being right.

1. DPO: the chosen answer of a pair is right and the rejected one wrong, and the rejected one is also shorter. Both losses
   train on the same pairs, steps and rate, each with its usual beta (0.1 for sums, 5 for means). Null control: the same
   pairs with both answers of one length.
2. RLVR: GRPO with the exact verifier from the same start. Null control: the same rewards, shuffled over the answers of a
   step: chance is what a group earns by luck.
3. Length and success are those of 500 answers sampled at temperature 1 to sums that no stage has seen.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overhaul.align.dpo import Loss, dpo_term, with_reference, won_term
from overhaul.align.rlvr import learn_from
from overhaul.claims._claim import Numbers
from overhaul.claims.layer_pruning_limits import Characters
from overhaul.data.encode import answered
from overhaul.data.examples import Examples
from overhaul.fit import Regime, Training, fit
from overhaul.objectives import cross_entropy
from overhaul.rollouts import rollouts

REPEATS = 4
LONGEST = 4 * REPEATS
WON = 0.85
BETAS: Mapping[Loss, float] = {"sum": 0.1, "length_normalised": 5.0}


@dataclass(frozen=True)
class Size:
    """How much is trained and judged; the defaults are the experiment, a test takes less."""

    teaching_steps: int = 500
    pairs: int = 3000
    dpo_steps: int = 150
    rlvr_steps: int = 60
    rlvr_prompts: int = 24
    samples: int = 8
    judged: int = 500


def run(seed: int) -> Numbers:
    """Teach, align in every way and judge with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Success, repeats and pairs won by way of training ("DPO sum, length differs: repeats", "RLVR: success")."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    draw.shuffle(sums)
    judged, known = sums[: size.judged], sums[size.judged :]
    start = _taught([_example(a, b, draw.randint(1, REPEATS)) for a, b in known], size)
    found: Numbers = {}

    def note(label: str, model: nn.Module) -> None:
        said = rollouts(model, _questions(judged), new_tokens=LONGEST, seed=seed, logprobs=False)
        found[f"{label}: success"] = sum(right(row, row["rollout"]) * row["ended"] for row in said.rows) / len(said)
        found[f"{label}: repeats"] = sum(row["rollout"].count("+") + 1 for row in said.rows) / len(said)

    note("start", start)
    for kind in ("length differs", "one length"):
        pairs = _pairs(known[: size.pairs], kind == "length differs", draw)
        for loss, beta in BETAS.items():
            model, label = copy.deepcopy(start), f"DPO {loss}, {kind}"
            found[f"{label}: steps"], found[f"{label}: pairs won"] = _preferred(model, pairs, loss, beta, size)
            note(label, model)
    for label, reward in (("RLVR", right), ("RLVR, shuffled rewards", Shuffled(seed, size))):
        model = copy.deepcopy(start)
        regime = Regime(steps=size.rlvr_steps, batch_size=size.rlvr_prompts, lr=2e-4, warmup=0.0, schedule="constant")
        learn_from(reward, model, _questions(known), size.samples, 1, 0.01, 0.2, 1.0, LONGEST, regime)
        note(label, model)
    return found


def _preferred(model: nn.Module, pairs: Examples, loss: Loss, beta: float, size: Size) -> tuple[float, float]:
    """Train until so many pairs are won (mean of the last ten steps); the steps that took, and the share."""
    regime = Regime(steps=size.dpo_steps, batch_size=32, lr=1e-4, warmup=0.0, schedule="constant")
    terms = [dpo_term("pairs", loss, beta), won_term("pairs", loss)]
    won = 0.0
    with Training(model, {"pairs": with_reference(model, pairs, "pairs", regime)}, **regime.loop) as training:
        for step in training:
            if step.number >= 10 and (won := sum(training.ledger.curves["chosen gained more"][-10:]) / 10) >= WON:
                break
            step.take(terms, regime.batch_size)
    return training.ledger.step, won


def right(row: Mapping[str, Any], text: str) -> float:
    """Whether every repeat is the sum."""
    return float(bool(text) and set(text.split("+")) == {row["answer"]})


class Shuffled:
    """The null control: each answer gets the reward of the answer that came a random number of answers before."""

    def __init__(self, seed: int, size: Size) -> None:
        self.draw, self.earlier = random.Random(seed), list[float]()
        self.window = size.rlvr_prompts * size.samples

    def __call__(self, row: Mapping[str, Any], text: str) -> float:
        self.earlier = [*self.earlier[-self.window :], right(row, text)]
        return self.draw.choice(self.earlier)


def _spelt(value: int) -> str:
    return f"{value:03d}"[::-1]


def _example(a: int, b: int, repeats: int, value: int | None = None) -> tuple[str, str, str]:
    said = _spelt(a + b if value is None else value)
    return f"{a}+{b}=", "+".join([said] * repeats), _spelt(a + b)


def _encode(examples: Sequence[tuple[str, str, str]]) -> Examples:
    words = Characters()
    items = [answered(words.encode(question), words.encode(said), words.eos_token_id) for question, said, _ in examples]
    return Examples(items, [{"question": question, "answer": answer} for question, _, answer in examples], words)


def _questions(sums: Sequence[tuple[int, int]]) -> Examples:
    return _encode([_example(a, b, 1) for a, b in sums])


def _pairs(sums: Sequence[tuple[int, int]], length_differs: bool, draw: random.Random) -> Examples:
    """A right answer beside a wrong one, which is shorter by one to three repeats, or as long."""
    chosen, rejected = [], []
    for a, b in sums:
        first = draw.randint(2, REPEATS)
        other = draw.randint(1, first - 1) if length_differs else first
        wrong = a + b + draw.choice((-10, -1, 1, 10))
        chosen.append(_example(a, b, first))
        rejected.append(_example(a, b, other, wrong))
    good, bad = _encode(chosen), _encode(rejected)
    beside = [{f"other_{name}": value for name, value in item.items()} for item in bad.items]
    return Examples([{**one, **two} for one, two in zip(good.items, beside, strict=True)], good.rows, good.processor)


def _taught(examples: Sequence[tuple[str, str, str]], size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(Characters.alphabet) + 2, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=None,
        eos_token_id=Characters.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lessons = {"sums": _encode(examples)}
    fit(
        model,
        [cross_entropy("sums")],
        lessons,
        steps=size.teaching_steps,
        batch_size=48,
        lr=3e-3,
        warmup=50,
        name="sft",
    )
    return model
