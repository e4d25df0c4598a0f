from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from claims.test_blur_claim import toy
from conftest import examples_for
from contract import Case
from forget.unlearning import BRIEF, EASY, TRAINING, knowing, taught
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import Combine, Gradients, OptimizerFactory, Training, adamw, sgd
from overhaul.fit.projection import Metric, bilevel, penalty, products, project, share
from overhaul.forget.blur import blur
from overhaul.forget.npo import npo_term
from overhaul.objectives import cross_entropy

TRACES = ["forget gradient squared", "forget times retain gradient", "retain gradient squared"]


CASE = Case(
    method=blur,
    materials=knowing,
    knobs=BRIEF,
    varied={
        **TRAINING,
        "loss": ("npo", "ga"),
        "beta": (0.1, 2.0),
        "retain_term": ("gdr", "klr"),
        "gamma": (1.0, 2.0),
        "alpha": (1.0, 2.0),
        "optimizer": ("adamw", "sgd"),
        "metric": ("euclidean", "adam"),
    },
)


def two() -> tuple[list[Tensor], list[Tensor]]:
    """Two gradients of three parameters."""
    draw = torch.Generator().manual_seed(3)
    shapes = [(40, 5), (7,), (3, 9, 2)]
    first, second = ([torch.randn(shape, generator=draw) for shape in shapes] for _ in range(2))
    return first, second


def gradients(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Gradients:
    parameters = [nn.Parameter(torch.zeros_like(f)) for f in forget]
    parts = {"forget": list(forget), "retain": list(retain)}
    return Gradients(parameters, parts, torch.optim.SGD(parameters), math.inf, sharded=False)


def along(combine: Combine, forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Tensor:
    return flat(combine(gradients(forget, retain)).direction)


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def orthogonal(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Tensor:
    both = gradients(forget, retain)
    return flat(project(both, share(products(both))))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


def test_check_1_what_is_left_is_orthogonal() -> None:
    f, r = two()
    left = orthogonal(f, r)
    assert abs(float(left @ flat(f))) < 1e-6 * float(left.norm() * flat(f).norm())
    assert float(left.norm()) <= float(flat(r).norm())


@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_check_2_along_the_forget_gradient_it_goes_gamma_times_that(gamma: float) -> None:
    f, r = two()
    d = along(bilevel(gamma, 2.0), f, r)
    assert float(d @ flat(f)) == pytest.approx(gamma * float(flat(f) @ flat(f)), rel=1e-5)


@pytest.mark.parametrize("factor", [-3.0, 0.01, 2.0])
def test_check_3_of_a_parallel_retain_gradient_nothing_is_left(factor: float) -> None:
    f, _ = two()
    assert close(along(bilevel(1.5), f, [factor * part for part in f]), 1.5 * flat(f))


def test_check_4_an_orthogonal_retain_gradient_is_followed_whole() -> None:
    f, r = two()
    left, places = orthogonal(f, r), [part.numel() for part in r]
    r = [part.view_as(old) for part, old in zip(left.split(places), r, strict=True)]
    assert close(along(bilevel(1.0, 3.0), f, r), along(penalty(1.0, 3.0), f, r))
    assert close(along(penalty(1.0, 3.0), f, r), flat(f) + 3.0 * flat(r))


def test_check_5_with_its_own_share_as_gamma_it_is_the_retain_gradient() -> None:
    f, r = two()
    gamma = float(flat(f) @ flat(r)) / float(flat(f) @ flat(f))
    assert close(along(bilevel(gamma), f, r), flat(r))


def test_check_6_scaling_a_loss_scales_its_part_alone() -> None:
    f, r = two()
    left = orthogonal(f, r)
    assert close(along(bilevel(), [7.0 * part for part in f], r), 7.0 * flat(f) + left)
    assert close(along(bilevel(), f, [7.0 * part for part in r]), flat(f) + 7.0 * left)


def test_check_7_descent_ends_at_the_bilevel_optimum_to_the_order_of_its_rate() -> None:
    found = toy()
    assert found["toy, BLUR at rate 0.001"] < found["toy, BLUR at rate 0.01"] / 3 < 0.1
    for smaller, larger in ((0.01, 0.1), (0.1, 1.0)):  # a penalty ends elsewhere, whatever the rate
        assert found[f"toy, penalty of weight {larger:g}"] > 3 * found[f"toy, penalty of weight {smaller:g}"] > 1e-3


def test_check_7_the_forget_loss_falls_in_the_transient() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix, a, b = torch.randn(3, 10, generator=draw), torch.randn(10, generator=draw), torch.randn(10, generator=draw)
    x, losses = 3.0 * torch.ones(10), []
    for _ in range(60):
        losses.append(float((matrix @ (x - a)).square().sum()) / 2)
        x = x - 1e-2 * along(bilevel(), [matrix.T @ matrix @ (x - a)], [x - b])
    assert all(after < before for before, after in pairwise(losses))


def test_check_8_all_parameters_share_one_number() -> None:
    f, r = two()
    whole = along(bilevel(1.0, 2.0), [flat(f)], [flat(r)])
    assert close(along(bilevel(1.0, 2.0), f, r), whole)
    by_parameter = torch.cat([along(bilevel(1.0, 2.0), [a], [b]) for a, b in zip(f, r, strict=True)])
    assert not close(by_parameter, whole, 1e-2)


def test_a_forget_gradient_that_is_nothing_takes_nothing_away() -> None:
    f, r = two()
    for scale in (0.0, 1e-30):
        assert torch.equal(along(bilevel(), [scale * part for part in f], r), flat(r))
    almost = along(bilevel(), [1e-5 * part for part in f], r)
    assert close(almost, orthogonal(f, r), 1e-4)


def one_step(make: OptimizerFactory, metric: Metric) -> tuple[float, float]:
    """Of a step after four others: <g_f, step>, and what it should be, gamma <g_f, g_f> in the metric of that very step."""
    model, forget, _ = taught("llama")
    retain = examples_for("llama", 8, seed=9)  # not learnt yet, so that its gradient is no smaller
    model.double()  # so that the difference of weights is the step
    torch.manual_seed(0)
    data = {"forget": forget.with_column("reference_nll", torch.ones(len(forget))), "retain": retain}
    terms = [npo_term("forget", 0.1), cross_entropy("retain", name="retain")]
    seen: list[tuple[list[Tensor], list[Tensor], Tensor]] = []
    combine = bilevel(1.0, 3.0, metric)

    def look(now: Gradients) -> Any:
        f = [part.double() for part in now.of("forget")]
        d = [part.double() for part in combine(now).direction]
        seen.append((f, d, flat(p.detach().clone() for p in now.parameters)))
        return combine(now)

    with Training(model, data, steps=5, lr=1e-3, optimizer=make, clip=None) as training:
        for each in training:
            each.take(terms, 8, combine=look)
    f, d = flat(seen[-1][0]), flat(seen[-1][1])
    step = (seen[-1][2] - flat(p.detach() for p in model.parameters())) / 1e-3
    scales = torch.where(d.abs() > 1e-12, step / d, torch.zeros(()))
    return float(f @ step), float((f * f * scales).sum())


def test_plain_descent_lowers_the_forget_loss_by_rate_gamma_and_the_gradient_squared() -> None:
    moved, promised = one_step(sgd(), "euclidean")
    assert moved == pytest.approx(promised, rel=2e-3)


def test_adamw_breaks_that_and_its_own_metric_puts_it_right() -> None:
    """Up to the running mean, which is off here."""
    make = adamw(betas=(0.0, 0.999))
    moved, promised = one_step(make, "euclidean")
    assert abs(moved - promised) > 0.1 * abs(promised)
    moved, promised = one_step(make, "adam")
    assert moved == pytest.approx(promised, rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"loss": "ga"}, {"loss": "simnpo"}, {"retain_term": "klr"}, {"metric": "adam"},
                                     {"optimizer": "sgd", "lr": 2.0}])  # fmt: skip
def test_every_form_forgets_and_leaves_traces(options: dict[str, Any]) -> None:
    model, forget, retain = taught("llama")
    outcome = blur(model, forget, retain, steps=12, stop_at=None, **{**EASY, **options})
    facts: Any = outcome.facts
    assert facts["forget_nll_after"] > 1.2 * facts["forget_nll_before"]
    for name in TRACES:
        assert len(outcome.curves[name]) == 12
    squared, both, other = (outcome.curves[name] for name in TRACES)
    assert all(
        a >= 0 and c >= 0 and b * b <= 1.001 * a * c + 1e-12 for a, b, c in zip(squared, both, other, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "adam", "optimizer": "sgd"}, "write optimizer: adamw, or metric: euclidean"),
        ({"loss": "ga", "beta": 0.1}, "Leave beta out"),
    ],
)
def test_knobs_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    model, forget, retain = taught("llama")
    with pytest.raises(RequestError, match=f"(?i){said}"):
        blur(model, forget, retain, **options)


def test_retain_is_needed() -> None:
    model, forget, _ = taught("llama")
    with pytest.raises(RequestError, match=r"forget\.blur: .*`retain` is missing or empty"):
        blur(model, forget, Examples([], []))
