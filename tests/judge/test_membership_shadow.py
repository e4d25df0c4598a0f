"""LiRA and RMIA: equal to their formulas, exact at the ends, and better than guessing where something was memorised."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.judge.likelihood import auc
from overhaul.judge.membership import audit, lira_offline, lira_online, phi, phi_of_logp, rmia

SAMPLES, MODELS, FEATURES = 40, 24, 60


def test_phi_equals_the_log_odds() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64) * 5
    labels = torch.randint(7, (50,))
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(phi(logits, labels), (p / (1 - p)).log(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rest", [1e-12, 1e-30, 1e-300])
def test_phi_is_exact_where_the_probability_is_almost_one(rest: float) -> None:
    # two wrong classes that share `rest`, against a right one of weight 1
    logits = torch.tensor([[0.0, math.log(rest / 2), math.log(rest / 2)]], dtype=torch.float64)
    assert float(phi(logits, torch.tensor([0]))) == pytest.approx(-math.log(rest), abs=1e-6)
    assert float(phi(logits, torch.tensor([1]))) == pytest.approx(math.log(rest / 2), abs=1e-6)


def test_phi_of_logp_agrees_with_phi_and_stays_finite() -> None:
    logits, labels = torch.randn(50, 7, dtype=torch.float64) * 4, torch.randint(7, (50,))
    logp = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(phi_of_logp(logp), phi(logits, labels), atol=1e-9, rtol=1e-9)
    ends = phi_of_logp(torch.tensor([0.0, -1e-12, -800.0]))
    assert bool(ends.isfinite().all())
    assert float(ends[1]) == pytest.approx(-math.log(1e-12), rel=1e-6)
    assert float(ends[2]) == -800.0


def hand() -> tuple[Tensor, Tensor, Tensor]:
    """One sample, three models inside at 4, 5, 6 and two outside at -1, 1; the target stands at 3."""
    inside = torch.tensor([[True], [True], [True], [False], [False]])
    return torch.tensor([3.0]), torch.tensor([[4.0], [5.0], [6.0], [-1.0], [1.0]]), inside


def normal(value: float, mean: float, variance: float) -> float:
    return -0.5 * math.log(2 * math.pi * variance) - (value - mean) ** 2 / (2 * variance)


def test_online_lira_is_the_log_ratio_of_two_normal_densities() -> None:
    expected = normal(3, 5, 2 / 3) - normal(3, 0, 1)
    assert float(lira_online(*hand())) == pytest.approx(expected, abs=1e-12)


def test_one_shared_variance_is_the_mean_square_of_centred_confidences() -> None:
    _, shadows, inside = hand()
    two = shadows * torch.tensor([[1.0, 3.0]])
    # inside: squares 2 and 18 over 6; outside: 2 and 18 over 4
    expected = normal(3, 5, 20 / 6) - normal(3, 0, 20 / 4)
    found = lira_online(torch.tensor([3.0, 9.0]), two, inside.expand(5, 2), variance="shared")
    assert float(found[0]) == pytest.approx(expected, abs=1e-12)


def test_offline_lira_orders_as_the_probability_it_stands_for_and_does_not_saturate() -> None:
    _, shadows, inside = hand()
    targets = torch.tensor([-2.0, 0.0, 1.5, 50.0, 60.0], dtype=torch.float64)
    scores = torch.cat([lira_offline(target[None], shadows, inside) for target in targets])
    below = torch.special.ndtr(targets[:3])
    torch.testing.assert_close(1 - (-scores[:3]).exp(), below)
    assert scores[4] > scores[3] > scores[2]


def test_offline_lira_does_not_look_at_models_inside() -> None:
    target, shadows, inside = hand()
    changed = torch.where(inside, shadows * 7 - 3, shadows)
    assert torch.equal(lira_offline(target, shadows, inside), lira_offline(target, changed, inside))


def test_rmia_counts_the_strangers_whose_gain_is_beaten() -> None:
    gain = torch.tensor([0.5, 0.9])
    target, shadows = gain + math.log(0.2), torch.full((1, 2), math.log(0.2))
    strangers = torch.tensor([0.0, 0.4, 0.6, 1.0])
    population, theirs = strangers + math.log(0.3), torch.full((1, 4), math.log(0.3))
    assert rmia(target, shadows, population, theirs).tolist() == [0.5, 0.75]
    assert rmia(target, shadows, population, theirs, gamma=math.exp(0.25)).tolist() == [0.25, 0.75]


def test_rmia_with_gamma_zero_is_one() -> None:
    target, shadows = -torch.rand(9) * 50, -torch.rand(2, 9) * 50
    population, theirs = -torch.rand(7) * 50, -torch.rand(2, 7) * 50
    assert rmia(target, shadows, population, theirs, gamma=0).tolist() == [1.0] * 9


def test_rmia_falls_as_gamma_rises() -> None:
    parts = (-torch.rand(9), -torch.rand(2, 9), -torch.rand(7), -torch.rand(2, 7))
    scores = torch.stack([rmia(*parts, gamma=gamma) for gamma in (0.5, 1.0, 1.5, 2.0)])
    assert bool((scores[:-1] >= scores[1:]).all())
    assert bool((scores[0] > scores[-1]).any())


def test_rmia_prior_of_references_that_never_held_the_sample() -> None:
    # p_out = 0.2 and a = 0.5: p = (1.5 * 0.2 + 0.5) / 2 = 0.4; p(z) = (1.5 * 0.6 + 0.5) / 2 = 0.7
    target, shadows = torch.tensor([math.log(0.8)]), torch.tensor([[math.log(0.2)]])
    theirs = torch.full((1, 2), math.log(0.6))
    ratios = torch.tensor([1.9, 2.1]) * 0.7
    assert rmia(target, shadows, ratios.log(), theirs, offline=0.5).tolist() == [0.5]


def test_rmia_prior_is_the_mean_over_all_references() -> None:
    # inside 0.8 and 0.8, outside 0.2: p = 0.6, and the gain 0.8 / 0.6 lies between the strangers'
    shadows = torch.tensor([[0.8], [0.8], [0.2]]).log()
    inside = torch.tensor([[True], [True], [False]])
    population, theirs = torch.tensor([1.3, 1.4]).log(), torch.zeros(3, 2)
    assert rmia(torch.tensor([math.log(0.8)]), shadows, population, theirs, inside=inside).tolist() == [0.5]


def memorised(inside: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """phi of ridge classifiers, each trained on its half of random labels: more features than samples, so they memorise."""
    rows = []
    for held in inside:
        x, y = features[held], torch.nn.functional.one_hot(labels[held], 2).double() * 8 - 4
        weights = x.T @ torch.linalg.solve(x @ x.T + 0.5 * torch.eye(len(x), dtype=torch.float64), y)
        rows.append(phi(features @ weights, labels))
    return torch.stack(rows)


def pool(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(SAMPLES, FEATURES, generator=draw, dtype=torch.float64)
    labels = torch.randint(2, (SAMPLES,), generator=draw)
    inside = torch.stack([torch.randperm(SAMPLES, generator=draw) < SAMPLES // 2 for _ in range(MODELS)])
    return memorised(inside, labels, features), inside


def test_lira_finds_what_was_memorised_and_nothing_under_shuffled_membership() -> None:
    confidence, inside = pool(0)
    online, offline = audit(confidence, inside), audit(confidence, inside, lira_offline)
    assert sum(online.auc) / MODELS > 0.95
    assert sum(offline.auc) / MODELS > 0.8
    assert sum(online.tpr[0.01]) / MODELS > 0.5
    # the null control: who held what is drawn anew, so there is nothing to find
    shuffled = inside[:, torch.randperm(SAMPLES)][torch.randperm(MODELS)]
    assert abs(sum(audit(confidence, shuffled).auc) / MODELS - 0.5) < 0.1


def test_shadow_models_find_more_than_the_confidence_alone() -> None:
    confidence, inside = pool(1)
    hard = torch.linspace(-30, 30, SAMPLES)  # samples differ in how hard they are, whoever holds them
    alone = [auc(row[held].tolist(), row[~held].tolist()) for row, held in zip(confidence + hard, inside, strict=True)]
    informed = audit(confidence + hard, inside, functools.partial(lira_online, variance="shared"))
    assert sum(informed.auc) / MODELS > sum(alone) / MODELS + 0.2


def test_an_audit_attacks_each_model_with_all_others() -> None:
    confidence, inside = pool(2)
    found = audit(confidence, inside)
    assert found.scores.shape == (MODELS, SAMPLES)
    alone = lira_online(confidence[3], torch.cat([confidence[:3], confidence[4:]]), torch.cat([inside[:3], inside[4:]]))
    assert torch.equal(found.scores[3], alone)
    assert found.auc[3] == auc(alone[inside[3]].tolist(), alone[~inside[3]].tolist())


def test_too_few_models_on_a_side_are_refused() -> None:
    target, shadows, inside = hand()
    with pytest.raises(RequestError, match="two shadow models outside for every sample; sample 0 has 1"):
        lira_online(target, shadows[:4], inside[:4])
    with pytest.raises(RequestError, match="not trained on it"):
        rmia(target, shadows[:3], target, shadows[:3], inside=inside[:3])


def test_shapes_that_do_not_fit_and_infinite_confidences_are_refused() -> None:
    target, shadows, inside = hand()
    with pytest.raises(RequestError, match=r"\(1,\), the shadow models' \(5, 1\), the mask \(4, 1\)"):
        lira_online(target, shadows, inside[:4])
    with pytest.raises(RequestError, match="not finite"):
        lira_online(torch.tensor([math.inf]), shadows, inside)
    with pytest.raises(RequestError, match="gamma >= 0"):
        rmia(target, shadows, target, shadows, gamma=-1)


def test_a_model_that_holds_everything_cannot_be_audited() -> None:
    confidence, inside = pool(3)
    inside[0] = True
    with pytest.raises(RequestError, match="hold some of the samples and lack others"):
        audit(confidence, inside)
