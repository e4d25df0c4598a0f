"""How likely a model finds given answers: one forward per example, and what is computed from its token log-probabilities.

    P(y|x) = exp(mean_t log p_t)        EM = mean_t [argmax = y_t]        ES = 1 - k*/T
    loss = mean_t log p_t               zlib = loss / len(zlib(y))        Min-K = mean of the least likely K of log p_t
    Min-K++ = the same of z_t = (log p_t - mu_t) / sigma_t, with mu_t, sigma_t^2 the moments of log p(v), v ~ p_t

Formulas of TOFU (Maini et al., arXiv:2401.06121), Open-Unlearning (Dorna et al., arXiv:2506.12618), Min-K (Shi et al.,
arXiv:2310.16789) and Min-K++ (Zhang et al., arXiv:2404.02936). How it differs from Open-Unlearning's code:
1. Extraction strength is 0 where no token is predicted; the released code returns 1/T there.
2. Extraction strength, exact memorisation, Min-K and Min-K++ are meant for answers without the closing EOS
   (`Scored.without`); the released code leaves out the last token, whatever it is.
3. A membership score is high for members (the released scores are negated), so an AUC above 0.5 means remembered.
4. The output head is run where answers are and nowhere else, if that gives the model's own logits there, which is tried on
   a short example: of a large vocabulary it costs as much as several blocks, and most of a question is prompt.
5. The moments of Min-K++ are taken around the largest logit and the variance around its mean, so that a uniform model
   scores exactly 0; the released code subtracts two large numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from overhaul import session
from overhaul._batching import same
from overhaul.data.examples import IGNORED, Batch, Encoded, Examples, collate, right_classes
from overhaul.errors import RequestError, RunError
from overhaul.forward import forward
from overhaul.modes import at_rest
from overhaul.objectives import check_positions, one_class
from overhaul.references import head_only_at, output_head

BATCH_TOKENS, CPU_BATCH_TOKENS = 4096, 1024
"""Tokens in one forward. On a CPU larger batches leave the cache and take longer."""

IMAGE_TOKENS = 16
"""What an image counts for when batches are filled."""

LOGITS = 2**26
"""Most logits that a batch may make: 256 MiB in float32."""

CHUNK = 2**22
"""Most logits that are read at a time: what their moments take stays small beside the batch."""

LEAST_VARIANCE = 1e-6
"""What a variance of log-probabilities counts as at least in Min-K++ (Open-Unlearning)."""


@dataclass(frozen=True)
class Scored:
    """An answer as one model sees it. An image's label is an answer of one token.

    Attributes:
        logp: log-probability of each answer token given all before it, in nats, float32.
        hits: whether that token was the most probable one.
        targets: the token itself.
        mean: what the model expected that log-probability to be: its mean over all tokens, weighted by their probability.
        variance: the variance of the same.
    """

    logp: Float[Tensor, " t"]
    hits: Bool[Tensor, " t"]
    targets: Int[Tensor, " t"]
    mean: Float[Tensor, " t"]
    variance: Float[Tensor, " t"]

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
        return Scored(self.logp[:-1], self.hits[:-1], self.targets[:-1], self.mean[:-1], self.variance[:-1])


def score(model: nn.Module, examples: Examples, batch_tokens: int | None = None) -> list[Scored]:
    """One `Scored` per example, in order. Neither batch size, padding nor order changes a value beyond rounding.

    Args:
        model: any module that `overhaul.forward` can call; runs in eval mode, its mode is put back.
        examples: sequences whose labels mark the answer, or images.
        batch_tokens: most tokens in one forward, padding included; what suits the model's device if None.

    Raises:
        RequestError: an example has no answer tokens, or more tokens than the model has positions.
        RunError: the model's outputs are not finite.
    """
    check_positions(model, examples)
    session.begins()
    found: dict[int, Scored] = {}
    for places, _, logits, labels in answers_of(model, examples, budget(model, batch_tokens)):
        flat = _answer_scores(logits, labels).cpu()
        if not bool(flat.isfinite().all()):
            raise RunError("The model's outputs are not finite (NaN or infinite), so there is nothing to measure.")
        targets = [_targets(examples.items[i]) for i in places]
        if not all(map(len, targets)):
            raise RequestError("An example has no token that carries loss, so its likelihood says nothing.")
        parts = flat.split([len(target) for target in targets], dim=1)
        for i, part, target in zip(places, parts, targets, strict=True):
            logp, hits, mean, variance = part
            found[i] = Scored(logp, hits > 0, target, mean, variance)
    return [found[i] for i in range(len(examples))]


def ranks(model: nn.Module, examples: Examples, batch_tokens: int | None = None) -> list[int]:
    """How many classes a classifier finds more probable than the right one, by example: 0 is right, below 5 in the top 5.

    Where several classes are right (`label_set`), the most probable of them counts. Ties go to the first, as in an argmax.

    Args:
        model: a classifier; runs in eval mode, its mode is put back.
        examples: images or texts with a class.
        batch_tokens: as in `score`.

    Raises:
        RequestError: a label is no class of the model.
        RunError: the model's outputs are not finite.
    """
    session.begins()
    found: dict[int, int] = {}
    for places, batch, logits, _ in answers_of(model, examples, budget(model, batch_tokens)):
        if not bool(logits.isfinite().all()):
            raise RunError("The model's outputs are not finite (NaN or infinite), so there is nothing to measure.")
        if logits.ndim != 2:
            raise RequestError(one_class(of_data=True))
        best = logits.masked_fill(~right_classes(batch, logits.shape[1]), -torch.inf).max(dim=1, keepdim=True)
        earlier = torch.arange(logits.shape[1], device=logits.device) < best.indices
        before = (logits > best.values) | ((logits == best.values) & earlier)
        found.update(zip(places, before.sum(dim=1).tolist(), strict=True))
    return [found[i] for i in range(len(examples))]


def budget(model: nn.Module, batch_tokens: int | None = None) -> int:
    """How many tokens one forward may take, so that neither they nor their logits are too many."""
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if next(model.parameters()).device.type == "cpu" else BATCH_TOKENS
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return min(batch_tokens, LOGITS // vocabulary)


def batches_within(examples: Examples, tokens: int) -> Iterator[list[int]]:
    """Places of batches that stay within so many tokens, longest examples first, so that little is padding."""
    batch: list[int] = []
    for i in examples.by_length():
        widest = examples.items[batch[0] if batch else i].get("input_ids")
        if batch and (IMAGE_TOKENS if widest is None else len(widest)) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def answers_of(
    model: nn.Module, examples: Examples, tokens: int
) -> Iterator[tuple[list[int], Batch, Float[Tensor, "n v"], Int[Tensor, " n"]]]:
    """The logits behind every answer token (or image), batch by batch; the model is in eval mode for each.

    Args:
        model: any module that `overhaul.forward` can call.
        examples: sequences whose labels mark the answer, or images.
        tokens: most tokens in one forward, padding included.

    Yields:
        Places of a batch in `examples`, the batch on the model's device, logits and tokens of its answers, one example after
        the other.
    """
    head = None if examples.classified else output_head(model)
    device = next(model.parameters()).device
    plan = list(batches_within(examples, tokens))
    trial = None if head is None else _trial(examples)
    if trial is None:
        head = None
    else:
        others = ([i for i in places if i != trial] for places in plan)
        plan = [[trial], *(places for places in others if places)]
    for n, places in enumerate(plan):
        batch = {k: v.to(device) for k, v in collate([examples.items[i] for i in places]).items()}
        labels = batch["labels"]
        with at_rest(model):
            if head is not None and n:
                yield places, batch, _at_answers(model, head, batch), labels[:, 1:][labels[:, 1:] != IGNORED]
                continue
            logits, targets = answer_logits(forward(model, batch), labels)
            if head is not None and len(plan) > 1 and not _will_do(model, head, batch, logits):
                head = None
        yield places, batch, logits, targets


def _trial(examples: Examples) -> int | None:
    """The shortest example with a prompt before its answer: it tells whether logits depend on where they stand."""
    prompted = (
        i for i in reversed(examples.by_length()) if not bool((examples.items[i]["labels"][:2] != IGNORED).any())
    )
    return next(prompted, None)


def _at_answers(model: nn.Module, head: nn.Module, batch: Batch) -> Float[Tensor, "n v"]:
    with head_only_at(head, batch["labels"][:, 1:] != IGNORED):
        return forward(model, batch)[0]


def _will_do(model: nn.Module, head: nn.Module, batch: Batch, logits: Tensor) -> bool:
    """Whether the head, run on the answers' positions alone, gives these logits."""
    try:
        return bool(len(logits)) and same(_at_answers(model, head, batch), logits)
    except (RuntimeError, ValueError, IndexError):  # the model does more with logits than one position at a time
        return False


def _targets(item: Encoded) -> Tensor:
    labels = item["labels"]
    return labels[None] if labels.ndim == 0 else labels[1:][labels[1:] != IGNORED]


def answer_logits(logits: Tensor, labels: Tensor) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"]]:
    """The logits behind every answer token (or image) of a batch, one example after the other, and the tokens."""
    if labels.ndim > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORED
    return logits[keep], labels[keep]


def _answer_scores(chosen: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> Float[Tensor, "4 n"]:
    """Log-probability, hit (0 or 1), mean and variance of every answer token."""
    rows = max(1, CHUNK // chosen.shape[1])
    parts = [_moments(*pair) for pair in zip(chosen.split(rows), targets.split(rows), strict=True)]
    return torch.cat(parts, dim=1)


def _moments(logits: Tensor, targets: Tensor) -> Float[Tensor, "4 n"]:
    logits = logits.float()
    top = logits.max(dim=1)
    shifted = logits - top.values[:, None]
    scale = shifted.logsumexp(dim=1)
    logp = shifted.gather(1, targets[:, None])[:, 0] - scale
    shares = (shifted - scale[:, None]).exp_()
    # a share so far below the largest is 0 in float32; a logit of minus infinity times 0 would not be
    shifted = shifted.clamp_(min=-200)
    mean = (shares * shifted).sum(dim=1)
    variance = shifted.sub_(mean[:, None]).square_().mul_(shares).sum(dim=1)
    return torch.stack([logp, (top.indices == targets).float(), mean - scale, variance])


def exact_memorisation(hits: Bool[Tensor, " t"]) -> float:
    """EM: share of answer tokens that are the most probable ones, teacher-forced."""
    return hits.float().mean().item()


def extraction_strength(hits: Bool[Tensor, " t"]) -> float:
    """ES = 1 - k*/T: the share of the answer, counted from its end, that needs no further hint.

    k* is the smallest k such that every prediction from position k on is right; T where there is none.
    """
    needed = (~hits).nonzero()
    return 1.0 - (int(needed[-1]) + 1 if len(needed) else 0) / len(hits)


def loss_score(one: Scored) -> float:
    """Mean log-probability of the answer's tokens: the LOSS attack, high for members."""
    return -one.nll / len(one.logp)


def zlib_score(one: Scored, text: str) -> float:
    """`loss_score` per byte that zlib needs for what was scored: what is likely only by being simple counts less."""
    return loss_score(one) / len(zlib.compress(text.encode()))


def min_k(logp: Float[Tensor, " t"], share: float = 0.2) -> float:
    """Mean log-probability of the answer's least likely tokens: max(1, floor(share * T)) of them."""
    count = max(1, math.floor(share * len(logp)))
    return logp.double().topk(count, largest=False).values.mean().item()


def min_k_plus_plus(one: Scored, share: float = 0.2) -> float:
    """`min_k` of each token's log-probability in deviations from what the model expected of its own choice there."""
    deviation = one.variance.double().clamp(min=LEAST_VARIANCE).sqrt()
    return min_k((one.logp.double() - one.mean.double()) / deviation, share)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Probability that a member's score lies above another's, ties counted half: the area under the ROC curve."""
    ranked = torch.tensor(others, dtype=torch.float64).sort().values
    scores = torch.tensor(members, dtype=torch.float64)
    below = torch.searchsorted(ranked, scores)
    not_above = torch.searchsorted(ranked, scores, right=True)
    return ((below + not_above).double().mean() / (2 * len(ranked))).item()


def roc(members: Sequence[float], others: Sequence[float]) -> list[tuple[float, float]]:
    """The ROC curve: (false, true) positive rate where all scores of at least each distinct value count as members.

    Starts at (0, 0), ends at (1, 1), rises in both.
    """
    ours, theirs = (torch.tensor(scores, dtype=torch.float64).sort().values for scores in (members, others))
    thresholds = torch.cat([ours, theirs]).unique().flip(0)
    true, false = (1 - torch.searchsorted(scores, thresholds).double() / len(scores) for scores in (ours, theirs))
    return [(0.0, 0.0), *zip(false.tolist(), true.tolist(), strict=True)]


def tpr_at_fpr(members: Sequence[float], others: Sequence[float], fpr: float) -> float:
    """The largest share of members found at a threshold above which at most a share `fpr` of the others lies.

    Nothing is interpolated: with fewer than 1 / fpr others, not one of them may lie above.
    """
    return max(true for false, true in roc(members, others) if false <= fpr + 1e-12)
