"""How a model compares with another one, by default with one that was retrained without the data (`anchor:`)."""

from __future__ import annotations

from overhaul.judge import likelihood, standards
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.judge.metrics import Value, mean, metric
from overhaul.judge.metrics.membership import by_min_k


@metric(
    "forget quality (log10 p)",
    "whether truth ratios look like the retrained model's; above -1.3 they do",
    unit="log10 p",
    better="down",
    forgotten="anchor",
    reads=("answers",),
    columns=("wrong",),
)
def forget_quality(role: Evidence, anchor_role: Evidence) -> Value:
    """log10 p of a Kolmogorov-Smirnov test of truth ratios against the retrained model's; above -1.3 they look alike (TOFU).

    A destroyed model may pass it: name `model_utility` on what is to be kept beside it. It falls with the number of
    questions, so it is compared between models on one role only.
    """
    ratios = truth_ratios(role)
    return standards.forget_quality(ratios, truth_ratios(anchor_role)), len(ratios)


@metric(
    "PrivLeak (%)",
    "privacy leakage: 0 as retrained, below it remembered, above it shunned",
    better="down",
    forgotten="anchor",
    reads=("answers", "text"),
)
def privacy_leakage(members: Evidence, others: Evidence, anchor_members: Evidence, anchor_others: Evidence) -> Value:
    """How far the AUC of Min-40% is from the retrained model's, in per cent (MUSE).

    0 as retrained, towards -100 where the members are remembered, above 0 where they are shunned.
    """
    ours, theirs, their_ours, their_theirs = (
        by_min_k(role, 0.4) for role in (members, others, anchor_members, anchor_others)
    )
    leakage = standards.privacy_leakage(likelihood.auc(ours, theirs), likelihood.auc(their_ours, their_theirs))
    return leakage, len(ours) + len(theirs)


@metric(
    "KL from the retrained model (nats)",
    "how far outputs are from those of a model that never saw it",
    better="down",
    forgotten="anchor",
    reads=("answers", "text", "images"),
)
def retrained_kl(role: Evidence, anchor_role: Evidence) -> Value:
    """Mean over examples of KL(retrained || model) per answer token, or image."""
    return mean([kl for kl, _ in role.distances_from(anchor_role)])


@metric(
    "JS from the retrained model (nats)",
    "the same, at most log 2",
    better="down",
    forgotten="anchor",
    reads=("answers", "text", "images"),
)
def retrained_js(role: Evidence, anchor_role: Evidence) -> Value:
    """As `retrained_kl`, by the Jensen-Shannon divergence, which is at most log 2."""
    return mean([js for _, js in role.distances_from(anchor_role)])
