"""What post-training changed: where facts lie and whether they moved, the truth and refusal directions, and confidence.

Du, Li, Cai, Saraipour, Zhang, Lakkaraju, Sun and Zhang, "How Post-Training Reshapes LLMs: A Mechanistic View on Knowledge,
Truthfulness, Refusal, and Confidence", COLM 2025, arXiv:2504.02904.

    facts        D[l, i] = logit(TRUE) - logit(FALSE) of a false statement whose state after block l at token i is the true
                 one's: of the model itself, or of the other model (`knowledge`)
    truth        t = mean(true) - mean(false): as a probe and as a push, each on both models (`truth`)
    refusal      r = mean(harmful) - mean(harmless): removed and added, each in both models (`refusal`)
    confidence   neurons of the last MLP that write much and move no logit more than another (`confidence`)

What is done to both models is done from one into the other as well: maps of where facts lie correlate above 0.9 even between
models that were trained apart, and states of one mean nothing to the other.

How it differs from the paper and its released code:

1. Cells are the tokens' roles in the statement (subject, object, its end, ...), told by offsets and by comparing the two
   statements of a pair, so that statements of other lengths have a place in one map. The paper counts from the end.
2. Correlations of the raw maps stand beside those of the paper's normalised ones, in which most cells are 0 in both.
3. Patches run in batches from the patched block and the patched token on (`trace.patch_grid`).
4. Answers are told apart by the first token in which they differ; the released code takes the last of each.
5. The probe's threshold lies halfway between the means, instead of by logistic regression on h . t. Accuracies with held-out
   topics centred by the others' mean stand beside the paper's, in which each topic's own mean is taken away.
6. Where truth is read (block, and end of the statement or of the question) is chosen by how often both models' own probes
   are right on held-out topics, and is not the period of whatever text.
7. NIE is None where p lay within 0.05 of its goal already, and where it can be had in one way only.
8. The refusal direction is read at the last token of each model's own prompt, and added once, in lengths of the receiving
   model's difference of means. The released code adds it at three points of the block; its base direction, "subtracted", is
   in fact removed.
9. Removal is complete: what enters each block, what attention adds (where that can be told), what leaves.
10. The last norm's gain is folded into the head by what it does, also where it is stored as w - 1; of a norm that takes the
    mean away, so is the head's mean.
11. Controls: states or directions drawn at random, as long as the real ones, wherever something is put in; the overlap that
    two random sets of neurons would have.
12. The variants without a question and with noise in place of a false statement, and other probes, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import nn

from overhaul import session
from overhaul.data.examples import Rows
from overhaul.errors import RequestError
from overhaul.inspect.post_training.asking import NAME, Asker, Asking
from overhaul.inspect.post_training.confidence import Confidence, Confident
from overhaul.inspect.post_training.knowledge import Knowledge
from overhaul.inspect.post_training.refusal import Refusal, Refusing
from overhaul.inspect.post_training.truth import Pushing, Truth
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.pairs import Member, corresponding, differences
from overhaul.positions import declared

Part = Knowledge | Truth | Refusal | Confidence


@method(verb="inspect", paper="2504.02904", changes="nothing", memory="forward")
def post_training(
    post: Checkpoint,
    base: Checkpoint,
    facts: Rows | None = None,
    statements: Rows | None = None,
    harmful: Rows | None = None,
    harmless: Rows | None = None,
    *,
    asking: Asking = Asking(),
    pushing: Pushing = Pushing(),
    refusing: Refusing = Refusing(),
    confident: Confident = Confident(),
    most: Annotated[int, Ge(1)] = 100,
    batch_size: Annotated[int, Ge(1)] = 16,
    dtype: Literal["stored", "float32", "bfloat16"] = "float32",
) -> Outcome:
    """Say what post-training changed: where facts lie, which directions carry truth and refusal, and confidence.

    Each part needs its own material, and is left out without it; confidence needs none. One model is in memory at a time,
    and the base is opened twice. With L blocks and n tokens from a statement on, a pair of facts costs about 3 L n / 2
    forwards of these n tokens in each model.

    Args:
        post: the post-trained checkpoint; its tokenizer is used for statements.
        base: the checkpoint that it was trained from, of the same shape and vocabulary.
        facts: pairs of statements, a true and a false one that differ in their subject (columns `true`, `false`, and
            `object`, a part of both, where it is known). In a recipe, `as: rows`.
        statements: true and false statements (columns `statement`, `label`, and `topic` where there are several, `object`
            where it is known).
        harmful: instructions that the post-trained model refuses (column `instruction`).
        harmless: instructions that it follows (column `instruction`).
        asking: how statements are asked about.
        pushing: how truth is read and pushed.
        refusing: how refusal is read, removed and added.
        confident: which neurons count.
        most: pairs of facts that are patched, statements of either kind that are pushed, and instructions that are answered.
        batch_size: texts in one forward; does not change the values.
        dtype: of the weights while they are worked on; "stored" is as they lie in the checkpoint.

    Returns:
        No model. Facts: similarity of the maps and the best patches; cosines of the two directions, NIE of each push, ratio
        of the refusal directions' norms, overlap of the entropy neurons; what was left out, and how the configs differ.
        Layers: best patches, probe accuracies, cosine and norm ratio of the refusal directions. Tables: patch maps, each
        within a model and between the two; transfer of probes, pushes, and refusal; entropy neurons.

    Raises:
        RequestError: the checkpoints do not correspond; a row lacks a column; no pair of statements aligns; too few
            statements or instructions; or only one of `harmful` and `harmless` is given.
    """
    pair = corresponding(NAME, {"base": base, "post": post})
    tokenizers = {role: one.processor() for role, one in pair.items()}
    depth = pair["post"].depth
    given = {"facts": facts, "statements": statements, "harmful": harmful, "harmless": harmless}
    left_out = [name for name, rows in given.items() if rows is None]
    parts: dict[str, Part] = {}
    if facts is not None:
        parts["facts"] = Knowledge.of(facts, Asker(tokenizers["post"], asking), most, batch_size)
    if statements is not None:
        parts["truth"] = Truth.of(statements, Asker(tokenizers["post"], asking), pushing, depth, most, batch_size)
    if harmful is not None and harmless is not None:
        kinds = {"harmful": harmful, "harmless": harmless}
        parts["refusal"] = Refusal.of(kinds, tokenizers, refusing, depth, most, batch_size)
    elif harmful is not None or harmless is not None:
        one, other = ("harmless", "harmful") if harmful is None else ("harmful", "harmless")
        raise RequestError(
            f"{NAME}: {one!r} is given without {other!r}. Refusal is told by their difference: give both."
        )
    parts["confidence"] = Confidence(confident)
    _check_lengths(parts, pair["post"])
    session.begins()
    said = _measured(pair, parts, dtype)
    told: dict[str, Any] = {"left_out": left_out + said, "differences": differences(pair)}
    return Outcome(
        None,
        facts={name: value for part in parts.values() for name, value in part.facts().items()} | told,
        layers={name: values for part in parts.values() for name, values in part.layers().items()},
        tables={name: table for part in parts.values() for name, table in part.tables().items()},
    )


def _check_lengths(parts: Mapping[str, Part], post: Member) -> None:
    """Refuse prompts for which the models have no positions."""
    most = declared(post.config)
    for name, part in parts.items():
        longest = part.longest()
        if most is not None and longest > most:
            raise RequestError(
                f"{NAME}: a prompt of the part {name!r} has {longest} tokens, and the models end at {most} positions. Give "
                "shorter rows, or fewer `shots`."
            )


def _measured(pair: Mapping[str, Member], parts: dict[str, Part], dtype: str) -> list[str]:
    """Read both models, and put into each what was read of both; what this architecture does not have is said."""
    said: list[str] = []
    with pair["base"].opened(dtype) as model:
        said += _read(parts, "base", model)
    with pair["post"].opened(dtype) as model:
        _read(parts, "post", model)
        _act(parts, "post", model)
    if any(not isinstance(part, Confidence) for part in parts.values()):
        with pair["base"].opened(dtype) as model:
            _act(parts, "base", model)
    return said


def _read(parts: dict[str, Part], role: str, model: nn.Module) -> list[str]:
    said: list[str] = []
    for name, part in list(parts.items()):
        try:
            part.read(role, model)
        except RequestError as error:
            if not isinstance(part, Confidence) or len(parts) == 1:
                raise
            del parts[name]
            said.append(f"confidence: {error}")
    return said


def _act(parts: Mapping[str, Part], role: str, model: nn.Module) -> None:
    for part in parts.values():
        if not isinstance(part, Confidence):
            part.act(role, model)
