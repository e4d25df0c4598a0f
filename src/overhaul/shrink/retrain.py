"""PERP: train a small part of a pruned model, so that its zeros stay and it is a plain checkpoint afterwards.

Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv:2312.15230.

    loss        mean over tokens of -log p(y_t)
    trains      biases, norms, adapters on the head, and adapters on every projection W with mask M:
                mask_lora    W + c M * (B A)        c = alpha / rank; merging is exact and keeps the zeros
                scale_lora   W * (B A)              exact, too
                lora_prune   W + c B A, merged as W + c M * (B A): what is merged is not what was trained
                lora         W + c B A; merging fills the zeros

How it differs from the paper and its code:

1. The mask is the one that `shrink.prune` made. Without it, it is where weights are 0: one that is 0 by chance stays so.
2. The head of a tied model is the embedding too; both get the adapters.
3. Biases that a model lacks (Llama's) are not added.
4. `trains: [weights]` is the paper's full retraining, of the projections; with the others, of all but embeddings.
5. Steps and rate are the user's; the code's are those of a smoke test (20 steps), the paper's about 1,000.
"""

from __future__ import annotations

from torch import nn

from overhaul.data.examples import Examples, Tensors
from overhaul.errors import RequestError
from overhaul.fit import Regime, fit
from overhaul.method import Outcome, method
from overhaul.objectives import check_learnable, cross_entropy
from overhaul.shrink._zeros import Chosen, Parts, as_made, share_of_zeros, training_parts, zeros

PAPER = Regime(steps=1000, batch_size=2, lr=5e-4, warmup=0.1, schedule="linear")


# adapters hold no moments of whole matrices, but two effective ones of each while a gradient is taken
@method(verb="shrink", paper="2312.15230", changes="weights", memory="training", makes={"masks": "tensors"})
def retrain(
    model: nn.Module,
    text: Examples,
    masks: Tensors | None = None,
    *,
    parts: Parts = Parts(),
    training: Regime = PAPER,
) -> Outcome:
    """Train a small part of a pruned model on data; its zeros stay.

    Args:
        model: a model that was pruned.
        text: what it is trained on: texts, questions with answers, or labelled images.
        masks: which weights are pruned, as `shrink.prune` made them: `{made: shrink.prune, name: masks}`. If not given,
            those of the projections that are 0.
        parts: what trains.
        training: how long and how fast.

    Returns:
        The same model, with curves of the loss. Facts: the parameters that trained and their share of the model, the share
        of zeros in the masked matrices before and after, steps and tokens. `made["masks"]` are the masks, for later steps.

    Raises:
        RequestError: `text` is empty, nothing was pruned, masks are of another model, or it has none of the parts.
        RunError: training diverged (the last good weights are kept).
    """
    if not len(text):
        raise RequestError("shrink.retrain: the role `text` is empty; there is nothing to train on.")
    check_learnable("text", text)
    chosen = Chosen.of("shrink.retrain", model, parts)
    kept = zeros("shrink.retrain", model, masks)
    whole, before = sum(p.numel() for p in model.parameters()), share_of_zeros(model, kept)
    with training_parts(model, chosen, parts, kept) as learnt:
        trained = sum(one.numel() for one in learnt.values())
        ledger = fit(model, [cross_entropy("text")], {"text": text}, **training.fit, name="retrain")
    facts = {
        "trained_parameters": trained,
        "trained_share": trained / whole,
        "zeros_before": before,
        "zeros_after": share_of_zeros(model, kept),
        "steps": ledger.step,
        "tokens": ledger.tokens["text"],
    }
    return Outcome(model, facts=facts, curves=ledger.curves, made={"masks": as_made(kept)})
