"""How likely a model finds given answers: one forward per example, and what is computed from its token log-probabilities.

Formulas of TOFU (Maini et al., arXiv:2401.06121), Open-Unlearning (Dorna et al., arXiv:2506.12618) and Min-K (Shi et al.,
arXiv:2310.16789). How it differs from Open-Unlearning's code:
1. Extraction strength is 0 where no token is predicted; the released code returns 1/T there.
2. Extraction strength and exact memorisation leave out the closing EOS, where there is one; the released code leaves out
   the last token, whatever it is.
3. A membership score is high for members (the released scores are negated), so an AUC above 0.5 means remembered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch, Encoded, Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.objectives import evaluate

BATCH_TOKENS = 4096
IMAGE_TOKENS = 16
"""What an image counts for when batches are filled."""

LOGITS = 2**26
"""Most logits that a batch may make: 256 MiB in float32."""


@dataclass(frozen=True)
class Scored:
    """An answer as one model sees it. An image's label is an answer of one token.

    Attributes:
        logp: log-probability of each answer token given all before it, in nats, float32.
        hits: whether that token was the most probable one.
        targets: the token itself.
    """

    logp: Float[Tensor, " t"]
    hits: Bool[Tensor, " t"]
    targets: Int[Tensor, " t"]

    @property
    def nll(self) -> float:
        """Negative log-likelihood of the whole answer in nats."""
        return -self.logp.double().sum().item()

    @property
    def probability(self) -> float:
        """Geometric mean of the token probabilities, exp(-nll / T): TOFU's P(y|x)."""
        return math.exp(-self.nll / len(self.logp))

    def without(self, token: int | None) -> Scored:
        """The same answer without its last token where that is `token` (EOS) and not all there is."""
        if token is None or len(self.targets) < 2 or int(self.targets[-1]) != token:
            return self
        return Scored(self.logp[:-1], self.hits[:-1], self.targets[:-1])


def score(model: nn.Module, examples: Examples, batch_tokens: int = BATCH_TOKENS) -> list[Scored]:
    """One `Scored` per example, in order. Neither batch size, padding nor order changes a value beyond rounding.

    Args:
        model: any module that `objectives.forward` can call; runs in eval mode, its mode is put back.
        examples: sequences whose labels mark the answer, or images.
        batch_tokens: most tokens in one forward, padding included.

    Raises:
        RequestError: an example has no answer tokens.
        RunError: the model's outputs are not finite.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    plan = list(_plan(examples, min(batch_tokens, LOGITS // vocabulary)))
    found: dict[int, Scored] = {}
    batches = [collate([examples.items[i] for i in places]) for places in plan]
    for places, flat in zip(plan, evaluate(model, _answer_scores, batches), strict=True):
        flat = flat.cpu()
        if not bool(flat.isfinite().all()):
            raise RunError("The model's outputs are not finite (NaN or infinite), so there is nothing to measure.")
        targets = [_targets(examples.items[i]) for i in places]
        if not all(map(len, targets)):
            raise RequestError("An example has no token that carries loss, so its likelihood says nothing.")
        parts = flat.split([len(target) for target in targets], dim=1)
        for i, part, target in zip(places, parts, targets, strict=True):
            found[i] = Scored(part[0], part[1] > 0, target)
    return [found[i] for i in range(len(examples))]


def _plan(examples: Examples, budget: int) -> Iterator[list[int]]:
    """Places of batches that stay within `budget` tokens, longest examples first, so that little is padding."""
    batch: list[int] = []
    for i in examples.by_length():
        widest = examples.items[batch[0] if batch else i].get("input_ids")
        if batch and (IMAGE_TOKENS if widest is None else len(widest)) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _targets(item: Encoded) -> Tensor:
    labels = item["labels"]
    return labels[None] if labels.ndim == 0 else labels[1:][labels[1:] != IGNORED]


def _answer_scores(logits: Tensor, batch: Batch) -> Float[Tensor, "2 n"]:
    """Log-probability and hit (0 or 1) of every answer token of the batch, one example after the other."""
    labels = batch["labels"]
    if labels.ndim > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORED
    chosen, targets = logits[keep].float(), labels[keep]
    logp = chosen.gather(1, targets[:, None])[:, 0] - chosen.logsumexp(dim=1)
    return torch.stack([logp, (chosen.argmax(dim=1) == targets).float()])


def exact_memorisation(hits: Bool[Tensor, " t"]) -> float:
    """EM: share of answer tokens that are the most probable ones, teacher-forced."""
    return hits.float().mean().item()


def extraction_strength(hits: Bool[Tensor, " t"]) -> float:
    """ES = 1 - k*/T: the share of the answer, counted from its end, that needs no further hint.

    k* is the smallest k such that every prediction from position k on is right; T where there is none.
    """
    needed = (~hits).nonzero()
    return 1.0 - (int(needed[-1]) + 1 if len(needed) else 0) / len(hits)


def min_k(logp: Float[Tensor, " t"], share: float = 0.2) -> float:
    """Mean log-probability of the answer's least likely tokens: max(1, floor(share * T)) of them."""
    count = max(1, math.floor(share * len(logp)))
    return logp.double().topk(count, largest=False).values.mean().item()


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Probability that a member's score lies above another's, ties counted half: the area under the ROC curve."""
    ranked = torch.tensor(others, dtype=torch.float64).sort().values
    scores = torch.tensor(members, dtype=torch.float64)
    below = torch.searchsorted(ranked, scores)
    not_above = torch.searchsorted(ranked, scores, right=True)
    return ((below + not_above).double().mean() / (2 * len(ranked))).item()
