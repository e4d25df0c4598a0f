"""Model soups: the mean, what the greedy choice keeps by the paper's rule, and shares learnt by gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama, tiny_tokenizer
from contract import Case, pictures, some_facts
from merging import base_and_two
from overhaul import models, session
from overhaul.data.examples import collate
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.judge import judge as judging
from overhaul.merge.soup import soup
from overhaul.merge.soup.learned import LearntSoup
from overhaul.objectives import cross_entropy_sum
from overhaul.recipe.check import check
from overhaul.recipe.plan import STREAMED_BYTES, plan
from overhaul.recipe.spec import read
from overhaul.weights import TensorIndex, blend, corresponding, mapped
from tiny_checkpoints import make, rewrite, same_bits, tensors

LEARNED = {"kind": "learned"}
CASE = Case(
    method=soup,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=lambda folder: {**_with_words(base_and_two(folder)), "held_out": some_facts(0, 8)},
    knobs={"steps": 4, "batch_size": 4},
    varied={
        "kind": ("uniform", "learned"),
        "metric": ("perplexity", "answer_probability", {"kind": "greedy"}),
        "per": ("model", "block", LEARNED),
        "scale": (1.0, 0.5),
        "beta": (0.0, 0.3),
        "outside": ("alpha", "by_position", {"beta": 0.3}),
        "steps": (2, 4, LEARNED),
        "batch_size": (2, 4, LEARNED),
        "lr": (0.01, 0.1, LEARNED),
        "warmup": (0, 2, LEARNED),
        "schedule": ("constant", "linear", LEARNED),
        "weight_decay": (0.0, 0.5, LEARNED),
        "clip": (None, 1e-6, LEARNED),
    },
)


def _with_words(given: dict[str, Any]) -> dict[str, Any]:
    for one in (given["base"], *given["tuned"]):
        tiny_tokenizer().save_pretrained(one.folder)
    return given


def three(folder: Path, family: str = "llama") -> list[Path]:
    return [make(family, folder / f"m{seed}", seed) for seed in range(3)]


def test_a_uniform_soup_is_the_mean_and_the_base_has_no_part_in_it(tmp_path: Path) -> None:
    base, *tuned = three(tmp_path)
    done = soup(base, tuned, out=tmp_path / "out")
    t, u, made = map(tensors, (*tuned, done.model))
    assert all(torch.allclose(made[name], (t[name] + u[name]) / 2, atol=1e-6) for name in made)
    assert done.facts["shares"] == [0.5, 0.5]
    models.open_model(done.model)
    half = tensors(soup(base, tuned, scale=0.5, out=tmp_path / "half").model)
    b = tensors(base)
    assert all(torch.allclose(half[n], 0.5 * b[n] + 0.25 * (t[n] + u[n]), atol=1e-6) for n in b)


def test_what_no_model_changed_stays_bit_for_bit(tmp_path: Path) -> None:
    base, *tuned = three(tmp_path)
    frozen = tensors(base)["model.embed_tokens.weight"]
    for path in tuned:
        rewrite(path, lambda held: held.update({"model.embed_tokens.weight": frozen}))
    made = tensors(soup(base, tuned, out=tmp_path / "out").model)
    assert torch.equal(made["model.embed_tokens.weight"], frozen)


def worth(folder: Path, examples: Any, metric: str) -> float:
    requests = judging.check({"learned": {metric: "x"}}, {"x"})
    value = judging.judge(models.open_model(folder)[0], requests, {"x": examples}).measures[0].value
    assert value is not None
    return value


def by_the_paper(tuned: Sequence[Path], examples: Any, metric: str, sign: int, place: Path) -> list[int]:
    """Recipe 1 of the paper: in order of worth, and each is kept that does no harm."""
    alone = [sign * worth(path, examples, metric) for path in tuned]
    order = sorted(range(len(tuned)), key=lambda n: alone[n], reverse=True)
    chosen, best = order[:1], alone[order[0]]
    for n in order[1:]:
        parts = [tuned[m] for m in (*chosen, n)]
        value = sign * worth(blend(parts, [1 / len(parts)] * len(parts), place / f"{n}"), examples, metric)
        if value >= best:
            chosen, best = [*chosen, n], value
    return chosen


@pytest.mark.parametrize(("metric", "sign"), [("perplexity", -1), ("answer_probability", 1)])
def test_a_greedy_soup_is_the_papers(metric: str, sign: int, tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(4))
    examples = some_facts(0, 4)
    chosen = by_the_paper(tuned, examples, metric, sign, tmp_path)
    before = sorted(tmp_path.iterdir())
    done = soup(base, tuned, examples, kind="greedy", metric=metric, out=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"]), "no soup that was tried is left"
    assert done.facts["chosen"] == [str(tuned[n]) for n in chosen]
    assert done.facts["shares"] == [1 / len(chosen) if n in chosen else 0.0 for n in range(3)]
    mean = sum((tensors(tuned[n])["model.embed_tokens.weight"] for n in chosen), torch.zeros(())) / len(chosen)
    assert torch.allclose(tensors(done.model)["model.embed_tokens.weight"], mean, atol=1e-6)
    assert done.facts["soup"] == pytest.approx(worth(done.model, examples, metric), rel=1e-4)


def test_a_spoilt_model_is_left_out(tmp_path: Path) -> None:
    base, *tuned = three(tmp_path)
    rewrite(tuned[1], lambda held: held.update({name: 8 * t for name, t in held.items()}))
    done = soup(base, tuned, some_facts(0, 6), kind="greedy", out=tmp_path / "out")
    assert done.facts["shares"] == [1.0, 0.0] and same_bits(tensors(done.model), tensors(tuned[0]))
    (table,) = done.tables.values()
    assert [row[2] for row in table.rows] == [True, False]


def test_the_gradient_of_the_shares_is_that_of_the_mixture(tmp_path: Path) -> None:
    base, *tuned = three(tmp_path)
    model = models.open_model(base)[0]
    mixture = LearntSoup(model, corresponding([base, *tuned])[1:], "block")
    with torch.no_grad():
        mixture.scores.normal_(generator=torch.Generator().manual_seed(0))
    batch = collate(some_facts(0, 4).items)
    loss = cross_entropy_sum(forward(mixture, batch), batch)
    (ours,) = torch.autograd.grad(loss, mixture.scores)
    states = [tensors(path) for path in tuned]

    def plainly(scores: Tensor) -> Tensor:
        shares = scores.softmax(1)
        mixed = {
            name: sum((share * state[name] for share, state in zip(shares[row], states, strict=True)), torch.zeros(()))
            for name, (row, _) in mixture.stored.items()
        }
        logits = torch.func.functional_call(
            model, mixed, kwargs={"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        ).logits
        return cross_entropy_sum(logits, batch)

    scores = mixture.scores.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(plainly(scores), scores)
    assert mixture.scores.shape == (6, 2) and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per", ["model", "block", "tensor"])
def test_learnt_shares_are_better_than_even_ones_beside_a_spoilt_model(per: Any, tmp_path: Path) -> None:
    base, *tuned = three(tmp_path)
    rewrite(tuned[1], lambda held: held.update({name: 3 * t for name, t in held.items()}))
    done = soup(
        base, tuned, some_facts(0, 4), kind="learned", per=per, steps=8, batch_size=4, lr=0.4, out=tmp_path / "out"
    )
    first, second = done.facts["shares"]
    assert first + second == pytest.approx(1)
    even = soup(base, tuned, out=tmp_path / "even").model
    assert worth(done.model, some_facts(0, 4), "perplexity") < worth(even, some_facts(0, 4), "perplexity")
    assert done.curves["loss"][-1] < done.curves["loss"][0]
    t, u, made = map(tensors, (*tuned, done.model))
    if per == "model":
        assert first > 0.55
        assert all(torch.allclose(made[n], first * t[n] + second * u[n], atol=1e-5) for n in made)
    elif per == "tensor":
        shares: dict[Any, Any] = {row[0]: row[1:] for row in done.tables["shares of the tensors"].rows}
        assert all(torch.allclose(made[n], shares[n][0] * t[n] + shares[n][1] * u[n], atol=1e-5) for n in made)
    else:
        assert len(set(done.layers["coefficient of model 1"].values())) == 6
    models.open_model(done.model)


def test_images_and_batch_norms_can_be_in_a_soup(tmp_path: Path) -> None:
    base, *tuned = three(tmp_path, "vit")
    held_out = pictures([0, 1] * 6)
    learnt = soup(base, tuned, held_out, kind="learned", steps=3, batch_size=6, out=tmp_path / "learnt")
    assert sum(learnt.facts["shares"]) == pytest.approx(1)
    chosen = soup(base, tuned, held_out, kind="greedy", metric="accuracy", out=tmp_path / "chosen")
    assert 0 <= chosen.facts["best_alone"] <= chosen.facts["soup"] <= 1


def test_what_is_mapped_is_what_is_stored_and_cannot_be_written_to(tmp_path: Path) -> None:
    folder = make("gpt2", tmp_path / "m", 0, "bfloat16")
    held = tensors(folder)
    for name, facts in TensorIndex.of(folder).tensors.items():
        view = mapped(facts)
        assert view.dtype == held[name].dtype and torch.equal(view, held[name])
        view.zero_()
    assert same_bits(tensors(folder), held)


def test_what_cannot_be_is_refused_before_work(tmp_path: Path) -> None:
    base, *tuned = three(tmp_path)
    for kind in ("greedy", "learned"):
        with pytest.raises(RequestError, match=r"the role `held_out` is missing or empty"):
            soup(base, tuned, kind=kind, out=tmp_path / "out")  # pyright: ignore[reportArgumentType]
    with (
        session.using(planning=True),
        pytest.raises(RequestError, match=r"there is no metric 'perplexty'. Did you mean"),
    ):
        soup(base, tuned, some_facts(0, 4), kind="greedy", metric="perplexty", out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"membership compares with other data.*answer_probability"):
        soup(base, tuned, some_facts(0, 4), kind="greedy", metric="membership", out=tmp_path / "out")
    with pytest.raises(RequestError, match="`metric: bits_per_byte` does not fit answers"):
        soup(base, tuned, some_facts(0, 4), kind="greedy", metric="bits_per_byte", out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"measures all models with one tokenizer.*kind: \"uniform\""):
        soup(base, tuned, some_facts(0, 4), kind="greedy", tokenizer="union", out=tmp_path / "out")
    other = models.save(tiny_llama(), None, tmp_path / "other")
    rewrite(other, lambda held: held.pop("model.norm.weight"))
    with pytest.raises(RequestError, match=r"do not have the same tensors"):
        soup(base, [tuned[0], other], some_facts(0, 4), kind="greedy", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_what_each_kind_holds(tmp_path: Path) -> None:
    base, *tuned = (models.save(tiny_llama(), tiny_tokenizer(), tmp_path / f"m{n}") for n in range(3))
    (tmp_path / "rows.jsonl").write_text('{"question": "who?", "answer": "a"}\n' * 8)
    peaks: dict[str, int] = {}
    for kind in ("uniform", "greedy", "learned"):
        (step,) = plan(
            check(
                read(
                    {
                        "model": str(base),
                        "materials": {
                            "tuned": [{"model": str(path)} for path in tuned],
                            "held_out": {"from": str(tmp_path / "rows.jsonl")},
                        },
                        "steps": [{"merge.soup": {"kind": kind}}],
                    }
                )
            ),
            1e9,
        )
        peaks[kind] = step.peak_bytes
    numbers = models.facts(base).parameters
    assert peaks["uniform"] == STREAMED_BYTES, "pieces of tensors, whatever the models are"
    assert 4 * numbers < peaks["greedy"] < peaks["learned"]
