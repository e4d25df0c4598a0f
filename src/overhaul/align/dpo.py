"""Direct preference optimisation: make the chosen answer likelier than the rejected one, measured from where it began.

Rafailov et al., NeurIPS 2023, arXiv:2305.18290; the length-normalised form of Tulu 3 (Lambert et al., arXiv:2411.15124).

    L = mean over pairs of -log sigmoid( beta [ (lp(y_w) - lp_ref(y_w)) - (lp(y_l) - lp_ref(y_l)) ] )

    sum                lp(y) = sum over the answer's tokens of log p
    length_normalised  lp(y) = that sum divided by |y|, the tokens of this answer, its end included

How it differs from open-instruct's code and from trl:

1. The reference is run once before training, on the pairs that will be drawn; its log-likelihoods are cached, and no second
   model is held.
2. Both answers of a pair go through one forward, and logits are made where answers are alone.
3. An answer without a token is divided by 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch, Encoded, Examples
from overhaul.errors import RequestError
from overhaul.fit import Draw, Regime, fit
from overhaul.method import Outcome, method
from overhaul.objectives import Term, pair_nll, sequences
from overhaul.references import reference_nll

Loss = Literal["length_normalised", "sum"]
TULU = Regime(steps=2000, batch_size=128, lr=5e-7, warmup=0.1, schedule="linear")


@method(verb="align", paper="2411.15124", changes="weights", memory="training")
def dpo(
    model: nn.Module,
    preferences: Examples,
    *,
    loss: Loss = "length_normalised",
    beta: Annotated[float, Gt(0)] = 5.0,
    training: Regime = TULU,
) -> Outcome:
    """Train a language model to prefer the chosen answers.

    Rate and beta are those of Tulu 3 for 8B; a model of some millions of parameters wants a rate of 1e-5 to 1e-4. With
    loss "sum" beta is usually 0.1: log-ratios of whole answers are larger than those of a token.

    Args:
        model: a causal language model, already taught to answer.
        preferences: prompts with a chosen and a rejected answer (`as: preference`).
        loss: "length_normalised" compares log-probabilities a token, "sum" those of whole answers, which a longer answer
            moves more.
        beta: how strongly a difference counts; a large one keeps the model nearer to where it began.
        training: how long and how fast.

    Returns:
        The same model, with curves of the loss and of the share of pairs whose chosen answer has gained more. Facts: that
        share and the loss over the last tenth of the steps.

    Raises:
        RequestError: `preferences` are no pairs, or there are none.
        RunError: training diverged (the last good weights are kept).
    """
    if preferences.kind != "pairs":
        raise RequestError(
            "align.dpo: `preferences` must be prompts with a chosen and a rejected answer (as: preference), and these are "
            f"{preferences.kind if len(preferences) else 'none'}."
        )
    data = with_reference(model, preferences, "preferences", training)
    terms = [dpo_term("preferences", loss, beta), won_term("preferences", loss)]
    ledger = fit(model, terms, {"preferences": data}, **training.fit, name="dpo")
    last = max(1, ledger.step // 10)
    facts = {
        "steps": ledger.step,
        "pairs": ledger.examples["preferences"],
        "chosen_gained_more": sum(ledger.curves["chosen gained more"][-last:]) / last,
        "loss_at_the_end": sum(ledger.curves["DPO"][-last:]) / last,
    }
    return Outcome(model, facts=dict(facts), curves=ledger.curves)


def with_reference(model: nn.Module, preferences: Examples, role: str, training: Regime) -> Examples:
    """The pairs of a role with the model's nats of both answers, which are 0 for those that no step will draw."""
    drawn = min(len(preferences), training.steps * training.batch_size)
    places = sorted(set(Draw(role, len(preferences), torch.initial_seed()).indices(0, drawn)))
    asked = preferences.select(places)
    chosen, rejected = (Examples([_side(item, prefix) for item in asked], asked.rows) for prefix in ("", "other_"))
    for name, examples in (("reference_nll", chosen), ("other_reference_nll", rejected)):
        values = torch.zeros(len(preferences))
        values[places] = reference_nll(model, examples, training.batch_size)
        preferences = preferences.with_column(name, values)
    return preferences


def _side(item: Encoded, prefix: str) -> Encoded:
    return {name: item[prefix + name] for name in ("input_ids", "labels")}


def dpo_term(role: str, loss: Loss, beta: float) -> Term:
    """The mean of the loss over pairs, which carry `reference_nll` and `other_reference_nll`."""

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        return -F.logsigmoid(beta * margins(logits, batch, loss)).sum()

    return Term(role, summed, sequences, name="DPO", answers_only=True)


def won_term(role: str, loss: Loss) -> Term:
    """A watch: the share of pairs whose chosen answer has gained more than the rejected one."""

    def won(logits: Tensor, batch: Batch) -> Tensor:
        return (margins(logits, batch, loss) > 0).float().sum()

    return Term(role, won, sequences, 0.0, "chosen gained more", answers_only=True)


def margins(logits: Tensor, batch: Batch, loss: Loss) -> Float[Tensor, " b"]:
    """How much more lp - lp_ref grew for the chosen answer of each pair than for the rejected one."""
    chosen, rejected = pair_nll(logits, batch)
    first, other = batch["reference_nll"] - chosen, batch["other_reference_nll"] - rejected
    if loss == "length_normalised":
        first, other = first / lengths(batch["labels"]), other / lengths(batch["other_labels"])
    return first - other


def lengths(labels: Tensor) -> Float[Tensor, " b"]:
    """Tokens of each answer, at least 1."""
    return (labels[:, 1:] != IGNORED).sum(dim=1).clamp(min=1).float()
