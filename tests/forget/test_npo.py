from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_llama
from contract import Case
from forget.unlearning import BRIEF, TRAINING, knowing
from learnt import by_heart
from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.forget._training import ANSWER_NLL
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forget.npo import npo, npo_loss, npo_term
from overhaul.forget.simnpo import simnpo_loss as simnpo
from overhaul.forget.simnpo import simnpo_term
from overhaul.forward import forward
from overhaul.objectives import Term, cross_entropy, sequence_nll
from overhaul.references import cache_outputs, reference_nll

EASY: dict[str, Any] = {"batch_size": 4, "lr": 3e-3, "warmup": 0, "schedule": "constant"}


CASE = Case(
    method=npo,
    materials=knowing,
    knobs=BRIEF,
    varied={**TRAINING, "beta": (0.1, 2.0), "retain_term": ("gdr", "klr"), "retain_weight": (1.0, 3.0)},
)


def small_llama() -> nn.Module:
    return tiny_llama(num_hidden_layers=2, initializer_range=0.2)


@pytest.fixture
def model() -> nn.Module:
    return small_llama()


@pytest.fixture
def forget() -> Examples:
    return examples_for("llama", 8, seed=1)


@pytest.fixture
def retain() -> Examples:
    return examples_for("llama", 8, seed=2)


def learnt(model: nn.Module, *parts: Examples) -> nn.Module:
    """The model after it has learnt the parts by heart, as an unlearning method expects to find it."""
    return by_heart(model, {str(n): part for n, part in enumerate(parts)}, steps=40, batch_size=8, lr=1e-2)


def with_reference(model: nn.Module, examples: Examples) -> Batch:
    return collate(examples.with_column("reference_nll", reference_nll(model, examples, 4)).items)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def close(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-4) -> bool:
    scale = max(g.abs().max().item() for g in theirs)
    return all(torch.allclose(a, b, rtol=rtol, atol=rtol * scale) for a, b in zip(ours, theirs, strict=True))


def padded(batch: Batch, by: int) -> Batch:
    wide = {"input_ids": 5, "labels": IGNORED, "attention_mask": 0}
    return {k: torch.nn.functional.pad(v, (0, by), value=wide[k]) if v.ndim == 2 else v for k, v in batch.items()}


def terms() -> dict[str, Term]:
    return {
        "ga": ga_term("forget"),
        "npo": npo_term("forget", 0.5),
        "simnpo": simnpo_term("forget", 2.5, 1.0),
        "simnpo summed": simnpo_term("forget", 1.0, per_token=False),
    }


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_check_3_npo_starts_at_its_constant_with_the_gradient_of_ascent(
    model: nn.Module, forget: Examples, beta: float
) -> None:
    batch, term = with_reference(model, forget), npo_term("forget", beta)
    loss = term.loss(forward(model, batch), batch) / term.count(batch)
    assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-5)
    ascent = -sequence_nll(forward(model, batch), batch["labels"]).mean()
    assert close(gradients(model, loss), gradients(model, ascent))


def test_check_4_npo_goes_to_ascent_of_the_summed_nll_as_beta_goes_to_0(model: nn.Module, forget: Examples) -> None:
    other = small_llama()  # away from the reference, so that the weight is not 1 by itself
    batch, term = with_reference(other, forget), npo_term("forget", 1e-5)
    loss = term.loss(forward(model, batch), batch)
    ascent = -sequence_nll(forward(model, batch), batch["labels"]).sum()
    assert close(gradients(model, loss), gradients(model, ascent), rtol=1e-3)


def test_check_4_simnpo_goes_to_ascent_per_token_as_beta_goes_to_0(model: nn.Module, forget: Examples) -> None:
    batch = collate(forget.items)
    lengths = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    term = simnpo_term("forget", 1e-5)
    loss = term.loss(forward(model, batch), batch)
    ascent = (-sequence_nll(forward(model, batch), batch["labels"]) / lengths).sum()
    assert close(gradients(model, loss), gradients(model, ascent), rtol=1e-3)


def test_check_5_klr_of_the_model_itself_is_zero_with_zero_gradient(model: nn.Module, retain: Examples) -> None:
    reference = cache_outputs(model, retain, batch_size=8)
    batch, term = collate(reference.examples.items), reference.kl_term("retain")
    loss = term.loss(forward(model, batch), batch)
    assert abs(loss.item()) < 1e-5
    assert max(g.abs().max().item() for g in gradients(model, loss)) < 1e-5


def test_check_6_simnpo_without_margin_is_npo_of_beta_over_length_without_reference() -> None:
    nll = torch.tensor([0.3, 4.0, 17.0], dtype=torch.float64)
    lengths, beta = torch.tensor([1, 3, 9]), 2.5
    for i in range(3):
        same = npo_loss(nll[i : i + 1], torch.zeros(1), beta / lengths[i].item()) / lengths[i]
        assert torch.allclose(simnpo(nll[i : i + 1], beta, lengths[i : i + 1]), same, rtol=1e-12)
    assert torch.allclose(simnpo(nll, beta), npo_loss(nll, torch.zeros(3), beta), rtol=1e-12)


@pytest.mark.parametrize("name", terms())
def test_check_7_padding_changes_no_loss(model: nn.Module, forget: Examples, name: str) -> None:
    batch, term = with_reference(model, forget), terms()[name]
    other = small_llama()
    expected = term.loss(forward(other, batch), batch)
    wider = padded(batch, 6)
    assert term.loss(forward(other, wider), wider).item() == pytest.approx(expected.item(), rel=1e-5)
    assert term.count(wider) == term.count(batch)


@pytest.mark.parametrize("name", terms())
def test_check_8_a_batch_is_the_sum_of_its_sequences_in_any_order(
    model: nn.Module, forget: Examples, name: str
) -> None:
    whole, term = with_reference(model, forget), terms()[name]
    other = small_llama()

    def loss(batch: Batch) -> float:
        return term.loss(forward(other, batch), batch).item()

    singles = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(len(forget))]
    reversed_ = {k: v.flip(0) for k, v in whole.items()}
    assert loss(whole) == pytest.approx(sum(map(loss, singles)), rel=1e-5)
    assert loss(whole) == pytest.approx(loss(reversed_), rel=1e-5)
    assert term.count(whole) == sum(map(term.count, singles))


def test_npo_pushes_less_the_more_is_forgotten() -> None:
    nll = torch.tensor([5.0, 50.0, 500.0], requires_grad=True)
    npo_loss(nll, torch.full((3,), 5.0), 0.1).sum().backward()
    assert nll.grad is not None
    weights = (-nll.grad).tolist()
    expected = [2 / (1 + math.exp(0.1 * forgotten)) for forgotten in (0.0, 45.0, 495.0)]
    assert weights == pytest.approx(expected, rel=1e-4)


def test_simnpo_divides_by_the_tokens_that_are_predicted() -> None:
    """Of a text, the first token is none of them, though it carries a label."""
    logits, nll = torch.zeros(1, 3, 64), torch.tensor([2 * math.log(64)])
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    expected = simnpo(nll, 0.3, torch.tensor([2])).item()
    assert simnpo_term("forget", 0.3).loss(logits, batch).item() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(simnpo(nll, 0.3, torch.tensor([3])).item(), rel=0.1)


@pytest.mark.parametrize("kind", ["gdr", "klr"])
def test_padding_changes_no_retain_term(model: nn.Module, retain: Examples, kind: str) -> None:
    """In a batch all but the longest are padded; alone, none is."""
    reference = cache_outputs(model, retain, batch_size=8)
    term = cross_entropy("retain") if kind == "gdr" else reference.kl_term("retain")
    items = (retain if kind == "gdr" else reference.examples).items
    other = small_llama()

    def loss(part: Any) -> float:
        batch = collate(part)
        return term.loss(forward(other, batch), batch).item()

    assert len({len(item["input_ids"]) for item in items}) > 1
    assert loss(items) == pytest.approx(sum(loss([item]) for item in items), rel=1e-5)
    assert loss(items) > 1.0, "there is something to be equal"


def test_simnpo_margin_moves_the_sigmoid() -> None:
    nll, lengths = torch.tensor([6.0]), torch.tensor([3])
    assert simnpo(nll, 2.0, lengths, margin=1.0).item() == pytest.approx(math.log1p(math.exp(-3.0)))


def test_forget_is_forgotten_and_retain_is_kept(model: nn.Module, forget: Examples, retain: Examples) -> None:
    learnt(model, forget, retain)
    outcome = npo(model, forget, retain, epochs=40, **EASY)
    assert outcome.model is model
    assert outcome.facts["forget_nll_before"] < 0.2  # pyright: ignore[reportOperatorIssue]
    assert outcome.facts["forget_nll_after"] > 3.0  # pyright: ignore[reportOperatorIssue]
    tokens = int((collate(retain.items)["labels"][:, 1:] != IGNORED).sum())
    assert reference_nll(model, retain, 8).sum() / tokens < 0.3


def test_klr_keeps_what_gdr_keeps(model: nn.Module, forget: Examples, retain: Examples) -> None:
    learnt(model, forget, retain)
    outcome = npo(model, forget, retain, retain_term="klr", steps=30, stop_at=None, **EASY)
    assert outcome.curves["retain"][0] == pytest.approx(0.0, abs=1e-5)
    assert reference_nll(model, forget, 8).mean() > 5 * reference_nll(model, retain, 8).mean()


def test_it_stops_where_answers_are_no_likelier_than_a_guess(model: nn.Module, forget: Examples) -> None:
    learnt(model, forget)
    outcome = npo(model, forget, retain_term="none", steps=200, **EASY)
    curve = outcome.curves[ANSWER_NLL]
    assert outcome.facts["stopped_early"] == "yes"
    assert outcome.facts["steps"] == len(curve) < 200
    assert sum(curve[-2:]) / 2 >= math.log(64) > sum(curve[-3:-1]) / 2


def test_stop_at_none_trains_to_the_end(model: nn.Module, forget: Examples) -> None:
    learnt(model, forget)
    outcome = npo(model, forget, retain_term="none", steps=60, stop_at=None, **EASY)
    assert (outcome.facts["steps"], outcome.facts["stopped_early"]) == (60, "no")
    assert outcome.curves[ANSWER_NLL][-1] > math.log(64)


def test_epochs_are_passes_over_forget(model: nn.Module, forget: Examples, retain: Examples) -> None:
    outcome = npo(model, forget, retain, epochs=1.5, batch_size=3, lr=1e-4, stop_at=None)
    assert outcome.facts["steps"] == 5  # 3 steps of 3 pass over 8 once


def test_the_reference_is_the_model_before_unlearning_also_after_a_resume(
    forget: Examples, retain: Examples, tmp_path: Any
) -> None:
    def run(scratch: Any, stop: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = small_llama()
        report = _raise_at(5) if stop else lambda *_: None
        with session.using(scratch=scratch, checkpoint_seconds=0.0, report=report):
            npo(model, forget, retain, steps=12, stop_at=None, **EASY)
        return [p.detach().clone() for p in model.parameters()]

    straight = run(None, stop=False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=True)
    resumed = run(tmp_path, stop=False)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def _raise_at(step: int) -> session.Report:
    def report(what: str, done: int, total: int, detail: str) -> None:
        if what == "npo" and done == step:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("kind", ["gdr", "klr"])
def test_a_missing_retain_role_says_what_to_do(model: nn.Module, forget: Examples, kind: Any) -> None:
    with pytest.raises(RequestError, match=r"`retain` is missing.*retain_term: \"none\""):
        npo(model, forget, retain_term=kind)


def test_empty_roles_are_refused(model: nn.Module, retain: Examples) -> None:
    with pytest.raises(RequestError, match="no answer to forget"):
        npo(model, Examples([], []), retain)


def test_answers_that_were_never_known_are_an_error(forget: Examples, retain: Examples) -> None:
    with pytest.raises(RunError, match=r"already cost .* nats a token.*does not know them"):
        npo(tiny_llama(initializer_range=0.5), forget, retain)


@pytest.mark.parametrize("knobs", [{"beta": 0.0}, {"retain_term": "KL"}, {"stop_at": -1.0}, {"lr": -1e-4}])
def test_knobs_out_of_range_are_refused(model: nn.Module, forget: Examples, knobs: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(knobs))):
        npo(model, forget, **knobs)
