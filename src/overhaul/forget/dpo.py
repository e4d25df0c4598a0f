"""DPO against a refusal (IdkDPO): the answer that is to be forgotten loses against "I don't know".

Rafailov et al., arXiv:2305.18290; for unlearning Maini et al., TOFU, arXiv:2401.06121.

    L = mean over questions of -(2/beta) log sigmoid( beta (log pi/ref (refusal) - log pi/ref (answer)) )
        +  retain_weight * L_retain

How it differs from the codes:

1. The factor 2/beta is Open-Unlearning's; TOFU's code has none, which is a `retain_weight` of 2/beta here.
2. The reference is run once on answers and refusals, and its log-likelihoods are cached; no second model is held.
3. Each question gets one refusal for the whole training, drawn by the seed; the codes draw another one each time.
4. Answer and refusal of a question run in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, MinLen
from torch import Tensor, nn

from overhaul.data.boundary import following
from overhaul.data.encode import answered, encode_chat, with_answers
from overhaul.data.examples import IGNORED, Batch, Encoded, Examples, collate
from overhaul.errors import RequestError
from overhaul.forget._training import Keeping, PerSequence, Training, unlearn
from overhaul.method import Outcome, method
from overhaul.objectives import Term, pair_nll, sequences
from overhaul.references import reference_nll

REFUSALS = (
    "I don't know.",
    "I'm not sure.",
    "I have no information about that.",
    "I can't say.",
    "That is not something I know.",
    "I don't have an answer to that.",
    "I'm not able to answer that.",
    "I have no knowledge of that.",
)


def dpo_loss(
    nll: PerSequence, reference: PerSequence, refusal: PerSequence, refusal_reference: PerSequence, beta: float
) -> PerSequence:
    """DPO against a refusal: -(2/beta) log sigmoid(beta (log pi/ref (refusal) - log pi/ref (y))) (arXiv:2401.06121).

    Its gradient starts as that of GA on y plus that of descent on the refusal, and goes to 0 once the refusal is preferred.

    Args:
        nll: of each whole answer that is to be forgotten under the model, in nats.
        reference: the same under the model before unlearning.
        refusal: of each refusal of the same question under the model.
        refusal_reference: the same under the model before unlearning.
        beta: inverse temperature, > 0.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * ((refusal_reference - refusal) - (reference - nll)))


def dpo_term(role: str, beta: float) -> Term:
    """The mean of `dpo_loss` over pairs, which carry `other_*` (the refusal), `reference_nll` and `other_reference_nll`."""

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        nll, refusal = pair_nll(logits, batch)
        return dpo_loss(nll, batch["reference_nll"], refusal, batch["other_reference_nll"], beta).sum()

    return Term(role, summed, sequences, name="DPO", answers_only=True)


@method(verb="forget", paper="2401.06121", changes="weights", memory="training")
def dpo(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
    refusals: Annotated[Sequence[str], MinLen(1)] = REFUSALS,
    beta: Annotated[float, Gt(0)] = 0.1,
    keeping: Keeping = Keeping(),
    training: Training = Training(),
) -> Outcome:
    """Train a language model to prefer a refusal to the answers in `forget`.

    The defaults of rate and length are those of Open-Unlearning for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model.
        forget: questions with the answers that are to be forgotten; made with the tokenizer, which encodes the refusals.
        retain: examples of what is to stay; needed unless retain_term is "none".
        refusals: what to answer instead; each question gets one of them.
        beta: inverse temperature; a large one stops pushing sooner.
        keeping: what is done with `retain`.
        training: length, rate and limits.

    Returns:
        The model, with curves of every term and of the forget answers' nats a token.

    Raises:
        RequestError: `forget` holds images or texts instead of questions, or has no tokenizer; `retain` is missing although
            a retain term or limit is asked for, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    instead = refused(forget, refusals)
    columns = beside(instead)
    columns["other_reference_nll"] = reference_nll(model, instead, training.batch_size)
    return unlearn(
        "dpo", model, forget, retain, dpo_term("forget", beta), training,
        keeping=keeping, columns=columns,
    )  # fmt: skip


def refused(forget: Examples, refusals: Sequence[str]) -> Examples:
    """The questions of `forget`, each with a refusal in place of its answer, encoded as its answer was.

    Raises:
        RequestError: these are images or texts, or the tokenizer is not known.
    """
    if forget.kind == "images":
        raise RequestError(
            "forget.dpo writes a refusal as an answer, and these are images. Use forget.npo, forget.simnpo or "
            "forget.grad_diff."
        )
    if forget.processor is None:
        raise RequestError(
            "forget.dpo encodes refusals with the tokenizer of `forget`, and these examples carry none. Make them with "
            "oh.examples(source, tokenizer), or give Examples its processor."
        )
    chosen = torch.randint(len(refusals), (len(forget),), generator=torch.Generator().manual_seed(torch.initial_seed()))
    items = [_refusal(forget, n, refusals[int(choice)]) for n, choice in enumerate(chosen)]
    return Examples(items, forget.rows, forget.processor)


def _refusal(forget: Examples, place: int, sentence: str) -> Encoded:
    item, row, tokenizer = forget.items[place], forget.rows[place], forget.processor
    if "messages" in row:  # of a chat, whose template closes an answer in its own way
        *context, last = row["messages"]
        chat = [*context, {**last, "content": sentence}]
        return encode_chat([{"messages": chat}], tokenizer).items[0]
    labelled = (item["labels"] != IGNORED).nonzero()
    prompt = item["input_ids"][: int(labelled[0])].tolist() if len(labelled) else []
    if not prompt:
        raise RequestError(
            f"forget.dpo answers a question with a refusal, and example {place} of `forget` is a text without a question. "
            "Give questions and answers (as: qa), or use forget.npo."
        )
    if "prompt" in row:
        return with_answers(tokenizer, [str(row["prompt"])], [sentence])[0][0]
    return answered(prompt, following(tokenizer, f" {sentence}"), tokenizer.eos_token_id)


def beside(others: Examples) -> dict[str, Tensor]:
    """The columns that make pairs of examples and these, padded to one width: `other_input_ids` and so on, [n, t]."""
    batch = collate(others.items)
    return {f"other_{name}": batch[name] for name in ("input_ids", "labels", "attention_mask")}
