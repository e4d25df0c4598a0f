"""Whether members of the training data can be told from others: one attack each gives an AUC and two true positive rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from overhaul.judge import likelihood
from overhaul.judge.evidence import Evidence, Kind
from overhaul.judge.metrics import Value, metric

Attack = Callable[[Evidence], list[float]]
"""Membership scores of a role's examples, high for members."""


def by_loss(role: Evidence) -> list[float]:
    """The mean log-probability of each answer."""
    return [likelihood.loss_score(one) for one in role.scored]


def by_zlib(role: Evidence) -> list[float]:
    """The mean log-probability per byte that zlib needs for the answer."""
    return [likelihood.zlib_score(one, text) for one, text in zip(role.scored, role.texts, strict=True)]


def by_min_k(role: Evidence, share: float = 0.2) -> list[float]:
    """The mean log-probability of the `share` of the tokens that is least likely, the closing EOS left out (Min-K)."""
    return [likelihood.min_k(one.without(role.eos).logp, share) for one in role.scored]


def by_min_k_plus_plus(role: Evidence, share: float = 0.2) -> list[float]:
    """As `by_min_k`, in deviations from what the model expected at each token (Min-K++)."""
    return [likelihood.min_k_plus_plus(one.without(role.eos), share) for one in role.scored]


ATTACKS: Mapping[str, tuple[str, Attack, tuple[Kind, ...]]] = {
    "membership": ("loss", by_loss, ("answers", "text", "images")),
    "membership_zlib": ("zlib", by_zlib, ("answers", "text")),
    "membership_min_k": ("Min-20%", by_min_k, ("answers", "text")),
    "membership_min_k_plus_plus": ("Min-20%++", by_min_k_plus_plus, ("answers", "text")),
}
"""Each becomes three metrics: the AUC under its own name, and the TPR at two false positive rates."""

FALSE_POSITIVE_RATES: Mapping[str, float] = {"_tpr_1e_2": 0.01, "_tpr_1e_3": 0.001}


def _auc(name: str, label: str, attack: Attack) -> Callable[[Evidence, Evidence], Value]:
    def area(members: Evidence, others: Evidence) -> Value:
        ours, theirs = attack(members), attack(others)
        return likelihood.auc(ours, theirs), len(ours) + len(theirs)

    area.__name__ = name
    area.__doc__ = f"""AUC of {label}: how well a reader of it tells members from others the model never saw.

    0.5 is chance; below 0.5, members stand out by being too unlikely, which shows that something was removed.
    """
    return area


def _tpr(name: str, label: str, attack: Attack, fpr: float) -> Callable[[Evidence, Evidence], Value]:
    def found(members: Evidence, others: Evidence) -> Value:
        ours, theirs = attack(members), attack(others)
        return likelihood.tpr_at_fpr(ours, theirs, fpr), len(ours) + len(theirs)

    found.__name__ = name
    found.__doc__ = f"Share of members found by {label} while at most {fpr:.1%} of the others are taken for some."
    return found


TOLD = "told from examples that the model never saw; 0.5 is a guess"
FOUND = "members found while hardly any stranger is taken for one"

for _name, (_label, _attack, _reads) in ATTACKS.items():
    metric(f"membership inference AUC ({_label})", TOLD, forgotten="chance", reads=_reads)(_auc(_name, _label, _attack))
    for _suffix, _fpr in FALSE_POSITIVE_RATES.items():
        metric(f"membership inference TPR at {_fpr:.1%} FPR ({_label})", FOUND, unit="share", reads=_reads)(
            _tpr(_name + _suffix, _label, _attack, _fpr)
        )
