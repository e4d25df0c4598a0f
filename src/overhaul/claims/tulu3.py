"""Claims of arXiv:2411.15124 (Tulu 3): length-normalised DPO does not reward length, and verifiable rewards raise success.

The paper's stages at the size of a laptop: a character-level Llama of two blocks is taught sums of two-digit numbers, digits
reversed, until half of what it says when it is sampled is right. It may say a sum one to four times, as often each
("570", "570+570", ...): so an answer has a length that has nothing to do with being right.

1. DPO: the chosen answer of a pair is right and the rejected one wrong, and the rejected one is also shorter. Both losses
   train on the same pairs at one rate, each with its usual beta (0.1 for sums, 5 for means), until as many pairs are won.
   Null control: the same pairs with both answers of one length.
2. RLVR: GRPO with the exact verifier from the same start. Null control: the same rewards, shuffled over the answers of a
   step: chance is what a group earns by luck.
3. Length and success are those of 400 answers sampled at temperature 1 to sums that no stage has seen.
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
from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.claims.layer_pruning_limits import Characters
from overhaul.data.encode import answered
from overhaul.data.examples import Examples
from overhaul.fit import Regime, Training, TrainingState, fit
from overhaul.objectives import cross_entropy
from overhaul.rollouts import rollouts

REPEATS = 4
LONGEST = 4 * REPEATS
WON = 0.95
TAUGHT = 0.5
BETAS: Mapping[Loss, float] = {"sum": 0.1, "length_normalised": 5.0}


@dataclass(frozen=True)
class Size:
    """How much is trained and judged; the defaults are the experiment, a test takes less."""

    teaching_parts: int = 24
    steps_in_part: int = 50
    pairs: int = 3000
    dpo_steps: int = 100
    rlvr_steps: int = 60
    rlvr_prompts: int = 24
    samples: int = 8
    judged: int = 400
    watched: int = 150


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
    watched, known = known[: size.watched], known[size.watched :]
    start = _taught([_example(a, b, draw.randint(1, REPEATS)) for a, b in known], watched, size)
    found: Numbers = {}

    def note(label: str, model: nn.Module) -> None:
        found[f"{label}: success"], found[f"{label}: repeats"] = sampled(model, judged, seed)

    note("start", start)
    for kind in ("length differs", "one length"):
        pairs = _pairs(known[: size.pairs], kind == "length differs", draw)
        for loss, beta in BETAS.items():
            model, label = copy.deepcopy(start), f"DPO {loss}, {kind}"
            found[f"{label}: steps"], found[f"{label}: pairs won"] = _preferred(model, pairs, loss, beta, size)
            note(label, model)
    for label, reward in (("RLVR", right), ("RLVR, shuffled rewards", Shuffled(seed, size))):
        model = copy.deepcopy(start)
        regime = Regime(steps=size.rlvr_steps, batch_size=size.rlvr_prompts, lr=3e-4, warmup=0.0, schedule="constant")
        learn_from(reward, model, _questions(known), size.samples, 1, 0.01, 0.2, 1.0, LONGEST, regime)
        note(label, model)
    return found


def sampled(model: nn.Module, sums: Sequence[tuple[int, int]], seed: int) -> tuple[float, float]:
    """The share of sampled answers that are right, and how often they say the sum in the mean."""
    said = rollouts(model, _questions(sums), new_tokens=LONGEST, seed=seed, logprobs=False)
    success = sum(right(row, row["rollout"]) * row["ended"] for row in said.rows)
    return success / len(said), sum(row["rollout"].count("+") + 1 for row in said.rows) / len(said)


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
    """The null control: each answer gets the reward of one of the answers before it, whichever that is."""

    def __init__(self, seed: int, size: Size) -> None:
        self.draw, self.earlier = random.Random(seed), list[float]()
        self.window = size.rlvr_prompts * size.samples

    def __call__(self, row: Mapping[str, Any], text: str) -> float:
        """A reward that has nothing to do with the answer, and is given as often."""
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


def _taught(examples: Sequence[tuple[str, str, str]], watched: Sequence[tuple[int, int]], size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(Characters.alphabet) + 2, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=None,
        eos_token_id=Characters.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lessons, state = {"sums": _encode(examples)}, TrainingState()
    for _ in range(size.teaching_parts):
        fit(
            model, [cross_entropy("sums")], lessons, steps=size.steps_in_part, batch_size=64, lr=2e-3, state=state,
            name=f"sft {state.step}",
        )  # fmt: skip
        if sampled(model, watched, 0)[0] >= TAUGHT:
            break
    return model


def _longer(found: Mapping[str, float], loss: Loss, kind: str = "length differs") -> float:
    return found[f"DPO {loss}, {kind}: repeats"] - found["start: repeats"]


CLAIM = Claim(
    slug="tulu3",
    paper="2411.15124",
    title="Length-normalised DPO lengthens answers less, and verifiable rewards raise success",
    statement=(
        "DPO on log-probabilities a token does not answer at greater length merely because rejected answers were shorter; "
        "reinforcement from a program that checks answers makes a taught model right more often."
    ),
    checks=(
        Check(
            "the taught model is sampled right between 0.3 and 0.8 of the time",
            lambda found: 0.3 <= found["start: success"] <= 0.8,
        ),
        Check(
            "where rejected answers are shorter, plain DPO lengthens answers by at least 0.2 repeats",
            lambda found: _longer(found, "sum") >= 0.2,
        ),
        Check(
            "length-normalised DPO lengthens them by at least 0.1 repeats less than plain DPO",
            lambda found: _longer(found, "length_normalised") <= _longer(found, "sum") - 0.1,
        ),
        Check(
            "null control: on pairs of one length neither changes the length by more than 0.2 repeats",
            lambda found: all(abs(_longer(found, loss, "one length")) <= 0.2 for loss in BETAS),
        ),
        Check(
            "RLVR raises the success by at least 0.1",
            lambda found: found["RLVR: success"] >= found["start: success"] + 0.1,
        ),
        Check(
            "null control: shuffled rewards raise it by at most 0.05, and RLVR is at least 0.1 above them",
            lambda found: (
                found["RLVR, shuffled rewards: success"] <= found["start: success"] + 0.05
                and found["RLVR: success"] >= found["RLVR, shuffled rewards: success"] + 0.1
            ),
        ),
    ),
    run=run,
    remarks=(
        "At as many pairs won, plain DPO lengthens answers by 0.9 to 1.4 repeats on every seed and the normalised loss by "
        "less, but on one seed by only 0.08 less. With beta 5 it also gets there in half of the steps, and on two seeds "
        "it then is right in 1 to 10 of 100 answers (plain: 17 to 57); why is open. RLVR raises success by 0.13 to "
        "0.24; shuffled rewards destroy it. Two earlier designs were seen on another seed, in which both losses lengthened "
        "answers alike; where training stops (0.95 of the pairs won) was chosen after them, the margins before these runs."
    ),
)
