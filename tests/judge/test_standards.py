"""The field's headline numbers: equal to their definitions, with the limits that make them readable."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_vit
from overhaul.data.examples import IGNORED
from overhaul.errors import RequestError, RunError
from overhaul.judge import standards
from overhaul.judge.likelihood import auc
from overhaul.judge.standards import distances, forget_quality, model_utility, outputs, privacy_leakage


def test_identical_samples_have_forget_quality_zero() -> None:
    ratios = [0.1 * i for i in range(1, 41)]
    assert forget_quality(ratios, ratios) == 0.0
    assert forget_quality(ratios, ratios[::-1]) == 0.0


def test_disjoint_supports_of_forty_give_the_exact_p() -> None:
    low, high = [0.01 * i for i in range(40)], [1 + 0.01 * i for i in range(40)]
    # both orders in which one sample lies wholly before the other, of all ways to mix them
    expected = math.log10(2 / math.comb(80, 40))
    assert forget_quality(low, high) == pytest.approx(expected, rel=1e-9)
    assert forget_quality(high, low) == pytest.approx(expected, rel=1e-9)


def test_forget_quality_is_the_same_under_monotone_maps() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(n, generator=draw).add(shift).tolist() for n, shift in ((40, 0.2), (37, 0.1)))
    plain = forget_quality(ours, theirs)
    assert forget_quality([math.log(r) for r in ours], [math.log(r) for r in theirs]) == pytest.approx(plain)
    assert forget_quality([1 / r for r in ours], [1 / r for r in theirs]) == pytest.approx(plain)


def test_forget_quality_stays_finite_where_p_ends() -> None:
    assert -308 < forget_quality([0.0] * 2000, [1.0] * 2000) < -300


def test_one_part_of_zero_makes_utility_zero() -> None:
    assert model_utility([0.9, 0.0, 0.8]) == 0.0
    assert model_utility([0.5, 0.5]) == 0.5
    assert model_utility([1.0, 0.25]) == pytest.approx(0.4)
    with pytest.raises(RequestError, match="there are none"):
        model_utility([])


def test_utility_of_nine_parts_is_the_utility_of_three_utilities() -> None:
    parts = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.95, 0.85, 0.3]
    assert model_utility([model_utility(parts[i : i + 3]) for i in (0, 3, 6)]) == pytest.approx(model_utility(parts))


def test_privacy_leakage_of_the_retrained_model_is_zero() -> None:
    assert privacy_leakage(0.359, 0.359) == 0.0


def test_privacy_leakage_reads_as_in_muse() -> None:
    # MUSE counts strangers above members: 1 - 0.5228 = 0.4772, its retrained model on News
    assert privacy_leakage(1.0, 0.5228) == pytest.approx(-100.0)
    assert privacy_leakage(0.0, 0.5228) == pytest.approx(100 * (1 - 0.4772) / 0.4772)
    assert privacy_leakage(0.5, 0.5228) != 0.0  # chance is not what is wanted
    assert math.isfinite(privacy_leakage(0.5, 1.0))


def test_swapping_members_and_others_mirrors_the_leakage() -> None:
    members, others = [0.2, 0.7, 0.4], [0.3, 0.6, 0.1]
    assert auc(members, others) == pytest.approx(1 - auc(others, members))
    assert privacy_leakage(auc(members, others), 0.5) == pytest.approx(-privacy_leakage(auc(others, members), 0.5))


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "resnet"])
def test_a_model_is_at_distance_zero_from_itself_and_not_from_another(family: str) -> None:
    torch.manual_seed(1)
    model, other = FAMILIES[family](), FAMILIES[family]()
    kept = outputs(model, examples_for(family, 9))
    assert [x for pair in distances(model, kept) for x in pair] == pytest.approx([0.0] * 18, abs=1e-6)
    for kl, js in distances(other, kept):
        assert kl > js > 1e-6
        assert js < math.log(2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_distances_equal_the_definition(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, examples = FAMILIES[family](), FAMILIES[family](), examples_for(family, 7)
    monkeypatch.setattr(standards, "CHUNK", 100)  # pieces of one token or ten images
    found = distances(other, outputs(model, examples))
    for item, (kl, js) in zip(examples.items, found, strict=True):
        inputs = {name: value[None] for name, value in item.items() if name != "labels"}
        with torch.no_grad():
            p, q = (each(**inputs).logits[0].double().log_softmax(-1) for each in (model, other))
        if family != "vit":
            keep = item["labels"][1:] != IGNORED
            p, q = p[:-1][keep], q[:-1][keep]
        p, q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
        middle = ((p.exp() + q.exp()) / 2).log()
        assert kl == pytest.approx(F.kl_div(q, p, log_target=True, reduction="sum").item() / len(p), rel=1e-3, abs=1e-6)
        halves = [F.kl_div(middle, x, log_target=True, reduction="sum").item() / len(p) for x in (p, q)]
        assert js == pytest.approx(sum(halves) / 2, rel=1e-3, abs=1e-6)


def test_models_of_different_sizes_are_not_compared() -> None:
    kept = outputs(tiny_vit(), examples_for("vit", 2))
    with pytest.raises(RequestError, match=r"different sizes \(7 and 10\)"):
        distances(tiny_vit(num_labels=7), kept)


def test_outputs_that_are_not_finite_cannot_be_compared() -> None:
    model = tiny_llama()
    kept = outputs(model, examples_for("llama", 3))
    nn.init.constant_(next(model.parameters()), math.nan)
    with pytest.raises(RunError, match="not finite"):
        distances(model, kept)
