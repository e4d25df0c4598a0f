"""The field's headline numbers for unlearning, each from plain lists of numbers.

    forget quality  = log10 p of the two-sample Kolmogorov-Smirnov test, truth ratios of the model against the retrained one
    model utility   = harmonic mean of its parts
    privacy leakage = 100 (a - r) / r,  a = P(a stranger is likelier than a forgotten answer), r = the same, retrained

TOFU (Maini et al., arXiv:2401.06121) and MUSE (Shi et al., arXiv:2407.06460). How it differs from the released codes:
1. Forget quality is the logarithm of p, at least -307: p itself spans two hundred orders of magnitude, and depends so much
   on the number of questions that it may only be compared between models on one forget set.
2. Privacy leakage is never taken against 0.5: the AUC of a retrained model is whatever the data makes it. Open-Unlearning
   falls back to 0.5 where the retrained model is missing.
3. Distances are means over answer tokens (or images), then over examples.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RequestError, RunError
from overhaul.judge.likelihood import CHUNK, answers_of, batches_within, budget
from overhaul.references import Reference, cache_outputs

LEAST_SHARE = 1e-10
"""What the retrained model's share counts as at least in privacy leakage (Open-Unlearning)."""


def forget_quality(ratios: Sequence[float], retrained_ratios: Sequence[float]) -> float:
    """log10 of the two-sided Kolmogorov-Smirnov p-value; above -1.3 (p = 0.05) the two models cannot be told apart.

    A destroyed model may pass: never read it without `model_utility`. Any monotone map of the ratios gives the same.

    Args:
        ratios: truth ratios of the model, from `metrics.truth_ratios`.
        retrained_ratios: the same questions, asked the model that was trained without them.
    """
    from scipy.stats import ks_2samp

    p = float(ks_2samp(ratios, retrained_ratios).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return math.log10(max(p, sys.float_info.min))


def model_utility(parts: Sequence[float]) -> float:
    """Harmonic mean: one part of 0 makes it 0. Equal numbers of parts may be combined by it group by group.

    Args:
        parts: shares; in TOFU probability, ROUGE-L and max(0, 1 - R) on retained, real and general knowledge.

    Raises:
        RequestError: there are none.
    """
    if not parts:
        raise RequestError("Model utility is a mean of parts, and there are none; give at least one share.")
    return statistics.harmonic_mean(parts)


def privacy_leakage(auc: float, retrained_auc: float) -> float:
    """PrivLeak in per cent: 0 as retrained, negative where something is remembered, positive where it is shunned.

    Args:
        auc: how far members' scores lie above others' (`likelihood.auc`, 1 = surely remembered) in the model.
        retrained_auc: the same in the model that was trained without them.
    """
    reference = max(1 - retrained_auc, LEAST_SHARE)
    return 100 * (retrained_auc - auc) / reference


def outputs(model: nn.Module, examples: Examples) -> Reference:
    """What a model says about these examples, kept so that another can be compared with it later."""
    session.begins()
    longest = next(batches_within(examples, budget(model)))
    return cache_outputs(model, examples, batch_size=len(longest))


def distances(model: nn.Module, reference: Reference) -> list[tuple[float, float]]:
    """How far a model's outputs are from another's, in nats, for each of the reference's examples in order.

    Args:
        model: of the same vocabulary or classes; runs in eval mode, its mode is put back.
        reference: from `outputs`.

    Returns:
        (KL(reference || model), Jensen-Shannon divergence) per example, each the mean over its answer tokens. The second
        lies between 0 and log 2.

    Raises:
        RequestError: the models have different vocabularies or classes.
        RunError: the model's outputs are not finite.
    """
    examples = reference.examples
    found: dict[int, tuple[float, float]] = {}
    for places, batch, logits, _ in answers_of(model, examples, budget(model)):
        flat = _distances(logits, batch, reference).double().cpu()
        if not bool(flat.isfinite().all()):
            raise RunError("The model's outputs are not finite (NaN or infinite), so there is nothing to compare.")
        labels = batch["labels"]
        counts = [1] * len(places) if labels.ndim == 1 else (labels[:, 1:] != IGNORED).sum(dim=1).tolist()
        for i, part in zip(places, flat.split(counts, dim=1), strict=True):
            kl, js = part.mean(dim=1).tolist()
            found[i] = (kl, js)
    return [found[i] for i in range(len(examples))]


def _distances(ours: Tensor, batch: Batch, reference: Reference) -> Tensor:
    """KL and Jensen-Shannon divergence of every answer token of the batch, [2, n], from the logits behind them."""
    cached = reference.kept(batch)
    rows = max(1, CHUNK // ours.shape[1])
    parts: list[Tensor] = []
    for start in range(0, len(ours), rows):
        theirs = reference.logits_of(cached[start : start + rows])
        if theirs.shape[1] != ours.shape[1]:
            raise RequestError(
                f"The models have outputs of different sizes ({ours.shape[1]} and {theirs.shape[1]}), so their "
                "distance is not defined; compare models of one vocabulary."
            )
        q, p = (x.float().log_softmax(dim=1) for x in (ours[start : start + rows], theirs))
        middle = torch.logaddexp(p, q) - math.log(2)
        parts.append(torch.stack([_kl(p, q), (_kl(p, middle) + _kl(q, middle)) / 2]))
    return torch.cat(parts, dim=1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, row by row; what has probability 0 under p counts nothing."""
    share = p.exp()
    return torch.where(share > 0, share * (p - q), 0.0).sum(dim=1)
