"""Concept vectors: exact traces, controls that are what they say, vectors put back, and what is refused."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import examples_for, tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit
from contract import Case, Held, as_recipe, some_facts
from families import FAMILIES
from overhaul.checkpoints import facts
from overhaul.data.encode import encode_text
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.inspect.concept_vectors import concept_vectors
from overhaul.inspect.concept_vectors.ablation import ablated, matched, rises
from overhaul.inspect.concept_vectors.traces import Trace, jaccard, normalised, traces
from overhaul.models import save
from overhaul.objectives import token_nll
from overhaul.recipe.run import run
from overhaul.value_vectors import Location, ValueVectors

PLACES = [Location(0, 3), Location(2, 17), Location(3, 40)]


def of_uneven_norms(seed: int = 0) -> nn.Module:
    """A Llama whose final norm's gain is not the same for all features."""
    torch.manual_seed(seed)
    model = tiny_llama()
    norm: Any = model.get_submodule("model.norm")
    nn.init.normal_(norm.weight, 1.0, 0.5)
    return model


@functools.cache
def edited_folder() -> Path:
    """Another Llama of the same shape, which stays as long as the tests run."""
    return save(of_uneven_norms(4), tiny_tokenizer(), Path(tempfile.mkdtemp()) / "edited")


CASE = {
    "method": concept_vectors,
    "materials": lambda: {
        "model": of_uneven_norms(), "concept": some_facts(0, 8), "others": some_facts(8, 8), "after": edited_folder(),
    },
    "knobs": {"k": 8, "contrast": 1.05, "count": 4, "controls": 2},
    "varied": {
        "words": ("", "a, b"), "at": ("", "1:3"), "count": (2, 4), "k": (8, 16), "contrast": (1.05, 1.3),
        "norm": ("none", "gain"), "controls": (2, 3),
    },
    "idle": {"batch_size": "texts that run together do not change what vectors fire with"},
    "apart": {"peak": "the battery widens the model and leaves the other one as it is; tested below without it"},
}  # fmt: skip


def compared(before: nn.Module, after: nn.Module, k: int = 8, draws: int = 2, **more: Any) -> list[Trace]:
    ours, theirs = ValueVectors.of(before, "test"), ValueVectors.of(after, "test")
    options = {"gain": False, "words": None, **more}
    return traces(ours, theirs, PLACES, [1, -1, 1], k, draws, torch.Generator().manual_seed(0), **options)[0]


def twins(change: Callable[[Tensor], Any]) -> tuple[nn.Module, nn.Module]:
    """A model, and a copy in which something is done to the vectors at PLACES."""
    before, after = tiny_llama(), tiny_llama()
    after.load_state_dict(before.state_dict())
    own = ValueVectors.of(after, "test")
    for place in PLACES:
        writer = own.writers[place.layer]
        with torch.no_grad():
            change(own.weight(writer.parameter)[writer.place(place)])
    return before, after


# traces


def test_what_did_not_change_keeps_all_of_its_trace() -> None:
    words = torch.ones(64, dtype=torch.bool)
    for one in compared(*twins(lambda v: None), words=words):
        assert (one.distance, one.relative, one.jaccard, one.jaccard_own, one.kept) == (0.0, 0.0, 1.0, 1.0, 1.0)
        assert one.cosine == pytest.approx(1.0, abs=1e-12) and one.cosine <= 1
        assert one.retained == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [0.25, 4.0, -1.0])
def test_a_vector_that_is_scaled_moves_by_its_length_and_keeps_its_tokens(factor: float) -> None:
    for one in compared(*twins(lambda v: v.mul_(factor))):
        assert one.cosine == pytest.approx(1.0 if factor > 0 else -1.0)
        assert one.relative == pytest.approx(abs(factor - 1), rel=1e-5)
        if factor > 0:
            assert one.jaccard == one.jaccard_own == 1.0
            assert (one.retained == pytest.approx(1.0)) == (factor > 1) and one.retained > 0.5
        else:
            assert one.jaccard == 0.0 and one.retained == 0.0


def test_a_vector_that_is_zero_has_lost_all() -> None:
    words = torch.ones(64, dtype=torch.bool)
    for one in compared(*twins(lambda v: v.zero_()), words=words):
        assert (one.cosine, one.jaccard, one.jaccard_own, one.kept, one.retained) == (0.0, 0.0, 0.0, 0.0, 0.0)
        assert one.relative == pytest.approx(1.0)
    before, after = twins(lambda v: v.zero_())
    assert all(one.relative is None for one in compared(after, before))


def test_the_concepts_words_that_are_left_are_counted_among_those_that_were_there() -> None:
    before, after = twins(lambda v: v.copy_(torch.randn(32, generator=torch.Generator().manual_seed(5))))
    words = torch.zeros(64, dtype=torch.bool)
    words[::2] = True
    tops = {}
    for name, model in (("before", before), ("after", after)):
        own = ValueVectors.of(model, "test")
        tops[name] = set(own.unembedding().top(own.vector(PLACES[0])[None], 8)[0][0].tolist())
    there = {token for token in tops["before"] if token % 2 == 0}
    one = compared(before, after, words=words)[0]
    assert one.kept == len(there & tops["after"]) / len(there)
    assert one.jaccard == len(tops["before"] & tops["after"]) / len(tops["before"] | tops["after"])
    assert compared(before, after, words=torch.zeros(64, dtype=torch.bool))[0].kept is None


def test_a_turned_output_head_is_no_erasure() -> None:
    before = tiny_llama(tie_word_embeddings=False)
    after = tiny_llama(tie_word_embeddings=False)
    after.load_state_dict(before.state_dict())
    head: Any = after.get_submodule("lm_head")
    with torch.no_grad():
        head.weight.copy_(head.weight.flip(0))
    for one in compared(before, after):
        assert one.jaccard == 1.0 and one.jaccard_own < 0.5 and one.retained == pytest.approx(1.0)


def test_another_basis_of_the_stream_leaves_every_measure() -> None:
    turn, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    models = (tiny_llama(tie_word_embeddings=False), tiny_llama(tie_word_embeddings=False))
    plain = compared(*models)
    for model in models:
        own = ValueVectors.of(model, "test")
        with torch.no_grad():
            for writer in own.writers.values():
                weight = own.weight(writer.parameter)
                weight.copy_(turn @ weight.double())
            head = own.weight(own.head)
            head.copy_(head.double() @ turn.T)
    for one, other in zip(plain, compared(*models), strict=True):
        assert one.cosine == pytest.approx(other.cosine, abs=1e-5)
        assert one.distance == pytest.approx(other.distance, rel=1e-5)
        assert (one.jaccard, one.jaccard_own) == (other.jaccard, other.jaccard_own)


def test_random_vectors_share_tokens_as_often_as_random_sets_do() -> None:
    model, k, words = tiny_llama(vocab_size=400), 20, 400
    own = ValueVectors.of(model, "test")
    _, chances = traces(own, own, PLACES, [1, 1, 1], k, 400, torch.Generator().manual_seed(0), False, None)
    found = sum(one.jaccard for one in chances) / len(chances)
    assert found == pytest.approx(k / (2 * words - k), abs=0.012)
    # of the positive part of a cosine between random directions
    assert sum(one.cosine for one in chances) / len(chances) == pytest.approx(1 / (2 * torch.pi * 32) ** 0.5, rel=0.15)


def test_the_one_number_is_one_for_the_same_and_zero_for_chance_and_less() -> None:
    assert [normalised(x, 0.2) for x in (1.0, 0.2, 0.1)] == [1.0, 0.0, 0.0]
    assert normalised(0.6, 0.2) == pytest.approx(0.5)
    assert jaccard(torch.tensor([1, 2, 3]), torch.tensor([3, 4, 1])) == 0.5


# ablation and its controls


def test_ablated_vectors_are_zero_and_come_back_bit_for_bit() -> None:
    for build in (tiny_llama, tiny_gpt2, FAMILIES["Mixtral"].build):
        model = build()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        own = ValueVectors.of(model, "test")
        places = [own.at(1, 5), own.at(3, 50)]
        with pytest.raises(KeyboardInterrupt), ablated(own, places):
            moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
            assert moved == {own.writers[place.layer].parameter for place in places}
            assert not any(bool(own.vector(place).any()) for place in places)
            raise KeyboardInterrupt
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_controls_are_other_vectors_of_the_same_block_and_about_as_long() -> None:
    model = tiny_llama(intermediate_size=512)
    own = ValueVectors.of(model, "test")
    with torch.no_grad():  # lengths from short to long
        own.weight(own.writers[1].parameter).mul_(torch.linspace(0.1, 5, 512))
    places = [Location(1, 500), Location(1, 10), Location(1, 501)]
    drawn = matched(own, places, torch.Generator().manual_seed(0))
    assert len({*drawn, *places}) == 6 and {one.layer for one in drawn} == {1}
    for place, control in zip(places, drawn, strict=True):
        assert float(own.vector(control).norm()) == pytest.approx(float(own.vector(place).norm()), rel=0.5)
    assert drawn != matched(own, places, torch.Generator().manual_seed(1))


def test_what_a_text_costs_more_is_counted_at_the_words_of_its_concept() -> None:
    model, text = tiny_llama(), examples_for("llama", 5)
    own = ValueVectors.of(model, "test")
    words = torch.zeros(64, dtype=torch.bool)
    words[20:50] = True

    def nats() -> float:
        total, count = 0.0, 0
        for item in text.items:
            labels = item["labels"][None]
            with torch.no_grad():
                nll = token_nll(model(item["input_ids"][None]).logits, labels)
            chosen = (labels[:, 1:] >= 20) & (labels[:, 1:] < 50)
            total, count = total + float(nll[chosen].sum()), count + int(chosen.sum())
        return total / count

    before = nats()
    with ablated(own, PLACES):
        after = nats()
    found = rises(own, {"set": PLACES, "none": []}, {"text": (text, words)}, 2)
    assert found["set"]["text"] == pytest.approx(after - before, abs=1e-5) and after != before
    assert found["none"]["text"] == 0.0
    with pytest.raises(RequestError, match="of the 0 words of `text` none carries loss"):
        rises(own, {}, {"text": (text, torch.zeros(64, dtype=torch.bool))}, 2)


# the method


def test_no_second_model_is_held_beside_the_first(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=768)
    folder, texts = folder_of(model, tmp_path / "after"), (some_facts(0, 4), some_facts(8, 4))
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    with Held({"model": model}) as held:
        concept_vectors(model, *texts, after=facts(folder), k=8, contrast=1.05, controls=1)
    assert held.peak < 1.5 * size, held.peak / size


def folder_of(model: nn.Module, place: Path) -> Path:
    return save(model, tiny_tokenizer(), place)


def test_before_and_after_are_two_views_of_one_pair(tmp_path: Path) -> None:
    before, after = twins(lambda v: v.add_(0.02 * torch.randn(32, generator=torch.Generator().manual_seed(1))))
    folders = [folder_of(model, tmp_path / name) for model, name in ((before, "before"), (after, "after"))]
    at = "0:3, 2:17, 3:40"
    one = concept_vectors(before, at=at, after=facts(folders[1]), k=8)
    other = concept_vectors(after, at=at, before=facts(folders[0]), k=8)
    assert one.facts == other.facts and one.tables == other.tables
    assert 0 < one.facts["trace_retained"] < 1 and one.facts["trace_retained_by_random_vectors"] == pytest.approx(1.0)
    assert [row["layer"] for row in one.made["vectors"]] == [0, 2, 3]


def test_what_is_found_is_read_again_by_its_places(tmp_path: Path) -> None:
    model, texts = tiny_llama(), (some_facts(0, 8), some_facts(8, 8))
    found = concept_vectors(model, *texts, k=8, contrast=1.05, count=3, controls=2)
    again = concept_vectors(model, *texts, found.made["vectors"], k=8, contrast=1.05, controls=2)
    assert again.made == found.made and again.tables["vectors"] == found.tables["vectors"]
    assert again.facts["concept_nats_without"] == found.facts["concept_nats_without"]
    scores = [row["score"] for row in found.made["vectors"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == found.facts["best_score"]
    grid = found.tables["score of the best vectors of each block"]
    assert scores[0] in [row[1] for row in grid.rows] and len(grid.rows) == 4


def test_tokens_are_shown_so_that_nothing_in_them_means_anything() -> None:
    text = encode_text([{"text": "a\nb"}] * 2, tiny_tokenizer(), length=8)
    found = concept_vectors(tiny_llama(), text, some_facts(0, 4), words="\n, b", at="0:0", k=60, controls=1)
    (row,) = found.tables["vectors"].rows
    assert "\n" not in str(row[-1])
    listed = found.tables["words of the concept"].rows
    assert repr("b") in [word for word, *_ in listed] and not any("\n" in str(word) for word, *_ in listed)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing says which vectors are meant"),
        ({"concept": some_facts(0, 4)}, "`concept` is given without `others`"),
        ({"others": some_facts(0, 4)}, "`others` is given without `concept`"),
        ({"concept": some_facts(0, 4), "others": some_facts(0, 4)}, "nothing tells `concept` from `others`"),
        ({"at": "7:0"}, "block 7 is none of the blocks 0 to 3"),
        ({"at": "0:0", "k": 64}, "only 64 tokens"),
        ({"vectors": [{"layer": 0, "index": 48}]}, "none 48"),
        ({"vectors": [], "at": "0:0"}, "`vectors` has no rows"),
    ],
)
def test_what_leaves_open_what_is_meant_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        concept_vectors(tiny_llama(), **{"k": 8, **given})


def test_a_pair_that_does_not_correspond_is_refused(tmp_path: Path) -> None:
    other = facts(folder_of(tiny_llama(num_hidden_layers=3), tmp_path / "shorter"))
    with pytest.raises(RequestError, match="has 4 blocks and after .* 3"):
        concept_vectors(tiny_llama(), at="0:0", k=8, after=other)
    with pytest.raises(RequestError, match="both given"):
        concept_vectors(tiny_llama(), at="0:0", k=8, after=other, before=other)
    with pytest.raises(RequestError, match="those of the original"):
        concept_vectors(tiny_llama(), some_facts(0, 4), some_facts(4, 4), before=other)
    with pytest.raises(RequestError, match="reads no tokens"):
        concept_vectors(tiny_vit(), Examples([], []), Examples([], []))


def test_weights_that_are_not_finite_are_refused_in_memory_and_in_files(tmp_path: Path) -> None:
    place = folder_of(tiny_llama(), tmp_path / "other")
    weights = load_file(place / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RequestError, match=r"other: model.layers.2.mlp.down_proj.weight holds values that are not finite"
    ):
        concept_vectors(tiny_llama(), at="0:0", k=8, after=facts(place))
    model = tiny_llama()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(RequestError, match=r"not finite .* 'model.layers.0.mlp.up_proj.weight'"):
        concept_vectors(model, some_facts(0, 4), some_facts(4, 4), k=8, contrast=1.05)


@pytest.mark.smoke
def test_a_recipe_finds_vectors_edits_them_and_compares(tmp_path: Path) -> None:
    recipe = as_recipe(Case(**CASE), tmp_path)
    del recipe["materials"]["after"]
    recipe["materials"] |= {"found": {"made": "1", "name": "vectors"}, "original": {"after": "start"}}
    compared = {"inspect.concept_vectors": {"k": 8, "contrast": 1.05, "vectors": "found", "before": "original"}}
    recipe["steps"] += [{"forget.needle": {"vectors": "found", "edit": "zero"}}, compared]
    steps = run(recipe, tmp_path / "run").report["steps"]
    assert steps[1]["facts"]["numbers_changed"] == 4 * 32
    assert steps[2]["facts"]["trace_retained"] == 0.0 and steps[2]["facts"]["trace_relative"] == pytest.approx(1.0)
    assert steps[2]["facts"]["trace_retained_by_random_vectors"] == pytest.approx(1.0)
    assert "<table" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
