"""Value vectors: what a unit of an MLP adds, in every family; read from files as from memory; found where planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit
from contract import some_facts
from families import FAMILIES, Family
from overhaul.checkpoints import facts
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples, collate
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.models import save
from overhaul.trace import capture
from overhaul.value_vectors import Location, ValueVectors, parsed
from overhaul.value_vectors.search import activities, best_of, concept_words, ranked

CAUSAL = {name: family for name, family in FAMILIES.items() if family.kind == "causal" and family.alone}
SINGLE = sorted(CAUSAL.keys() - {"Mixtral", "OLMoE"})
MIXED = ("Mixtral", "OLMoE")


def built(family: Family) -> ValueVectors:
    return ValueVectors.of(family.build(), "test")


def rows_of(vectors: ValueVectors, sites: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What passes some sites, [positions, features]."""
    with torch.no_grad(), capture(vectors.stack, sites, lambda state, _: [state.flatten(0, 1).clone()]) as seen:
        vectors.stack.model(tokens)
    return {site: torch.cat(states) for site, states in seen.items()}


@pytest.mark.parametrize("name", SINGLE)
def test_a_vector_is_what_its_unit_adds_for_each_unit_of_activation(name: str) -> None:
    vectors = built(CAUSAL[name])
    tokens = torch.randint(3, 64, (2, 7))
    assert sorted(vectors.writers) == list(range(CAUSAL[name].blocks))
    for place in (Location(0, 3), Location(2, 17)):
        writer = vectors.writers[place.layer]
        sites = [writer.module, f"into.{writer.module}"]
        whole, v = rows_of(vectors, sites, tokens), vectors.vector(place)
        with torch.no_grad():
            vectors.weight(writer.parameter)[writer.place(place)].zero_()
        without = rows_of(vectors, sites, tokens)
        added = whole[f"into.{writer.module}"][:, place.index, None] * v
        assert float(added.abs().max()) > 1e-5
        torch.testing.assert_close(whole[writer.module] - without[writer.module], added, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_what_an_experts_vector_fires_with_is_what_it_adds_with_the_routers_weight(name: str) -> None:
    vectors = built(CAUSAL[name])
    example = examples_for("llama", 1)
    layer, tokens = 1, example.items[0]["input_ids"][None]
    writer = vectors.writers[layer]
    active = activities(vectors, example, 1)[layer]
    counted = (active[0] - active[1]) * (tokens.shape[1] - 1)
    before = rows_of(vectors, [writer.module], tokens)[writer.module]
    busy = [int(n) for n in counted.abs().topk(2).indices]
    for number in busy:
        place = vectors.at(layer, number)
        column = vectors.weight(writer.parameter)[writer.place(place)]
        with torch.no_grad():
            column[0] += 1.0
        after = rows_of(vectors, [writer.module], tokens)[writer.module]
        with torch.no_grad():
            column[0] -= 1.0
        assert float((after - before)[1:, 0].sum()) == pytest.approx(float(counted[number]), rel=1e-3, abs=1e-6)
        assert place.expert is not None and writer.number(place) == number


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_activity_is_the_mean_of_each_sign_without_first_positions_and_padding(build: Any) -> None:
    vectors = ValueVectors.of(build(), "test")
    examples = examples_for("llama", 5)
    active = activities(vectors, examples, 3)
    site = f"into.{vectors.writers[2].module}"
    rows = torch.cat([rows_of(vectors, [site], item["input_ids"][None])[site][1:] for item in examples.items])
    torch.testing.assert_close(active[2], torch.stack([rows.clamp_min(0).mean(0), -rows.clamp_max(0).mean(0)]))
    for layer, halves in activities(vectors, examples, 1).items():
        torch.testing.assert_close(halves, active[layer])


@pytest.mark.parametrize("name", CAUSAL)
def test_vectors_and_tokens_read_from_files_are_those_in_memory(name: str, tmp_path: Path) -> None:
    vectors = built(CAUSAL[name])
    stored = vectors.stored(facts(save(vectors.stack.model, None, tmp_path / "saved")))
    experts = vectors.writers[1].experts
    for place in (Location(1, 7, 2 if experts else None), Location(3, 0, 0 if experts else None)):
        assert torch.equal(stored.vector(place), vectors.vector(place))
    assert torch.equal(stored.norms(2), vectors.norms(2))
    few = vectors.all(0)[:5]
    for gain in (False, True):
        assert torch.equal(stored.unembedding(gain).top(few, 7)[0], vectors.unembedding(gain).top(few, 7)[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_with_the_gain_a_vector_is_read_as_the_final_norm_scales_it(name: str) -> None:
    vectors = built(CAUSAL[name])
    norm = {path: module for path, module in vectors.stack.model.named_modules()}[_last_norm(vectors)]
    weight: Any = norm.weight
    wanted = 1 + weight if "Gemma" in name else weight
    torch.testing.assert_close(vectors.gain, wanted.detach(), rtol=1e-3, atol=1e-3)
    v = torch.randn(2, 32)
    plain, scaled = vectors.unembedding(), vectors.unembedding(gain=True)
    torch.testing.assert_close(scaled.logits(v), plain.logits(v * vectors.gain))


def _last_norm(vectors: ValueVectors) -> str:
    inside = f"{vectors.stack.path}."
    names = [name for name, module in vectors.stack.model.named_modules() if "norm" in type(module).__name__.lower()]
    return [name for name in names if not name.startswith(inside) and "embed" not in name][-1]


def test_both_ends_of_the_tokens_are_the_largest_and_smallest_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = ValueVectors.of(tiny_llama(tie_word_embeddings=False), "test")
    few = torch.randn(9, 32)
    logits = few @ vectors.weight(vectors.head).T
    monkeypatch.setattr("overhaul.value_vectors.LOGITS", 150)  # in parts, of vectors and of words
    up, down = vectors.unembedding().top(few, 5)
    assert torch.equal(up, logits.topk(5).indices) and torch.equal(down, (-logits).topk(5).indices)


def planted(model: nn.Module, concept: Examples, words: list[int], sign: int) -> tuple[ValueVectors, Location]:
    """Where a vector that fires on the concept's text was overwritten by the sum of some rows of the unembedding."""
    vectors = ValueVectors.of(model, "test")
    number = int(activities(vectors, concept, 4)[2][0 if sign > 0 else 1].argmax())
    place = vectors.at(2, number)
    rows = vectors.weight(vectors.head)[words].sum(dim=0)
    with torch.no_grad():
        vectors.weight(vectors.writers[2].parameter)[vectors.writers[2].place(place)].copy_(sign * 20 * rows)
    return vectors, place


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3, CAUSAL["Mixtral"].build])
def test_a_planted_vector_is_found_first_and_read_by_its_words(build: Any, sign: int) -> None:
    concept, words = examples_for("llama", 6), [7, 41]
    vectors, place = planted(build(), concept, words, sign)
    marks = torch.zeros(64, dtype=torch.bool)
    marks[words] = True
    (found,) = ranked(vectors, [marks], [activities(vectors, concept, 4)], k=8, keep=3)
    first = best_of(found, 1, "test")[0]
    assert (first.location, first.sign) == (place, sign)
    assert first.score == pytest.approx(first.overlap * first.norm * first.activation) and first.overlap == 0.25
    ends = vectors.unembedding().top(vectors.vector(place)[None], 8)
    assert set(words) <= set(ends[0 if sign > 0 else 1][0].tolist())


def test_the_words_of_a_concept_are_those_that_are_more_frequent_there_and_no_stop_words() -> None:
    told = tiny_tokenizer()
    ours = encode_qa([{"question": "zzz a !", "answer": "zq"}], told, prompt="{question}")
    theirs = encode_qa([{"question": "qq a a b", "answer": "b"}], told, prompt="{question}")

    def words(contrast: float, named: str = "") -> set[str]:
        marks = concept_words(ours, theirs, 64, contrast, named, "test")
        return {told.decode([n]) for n in marks.nonzero().flatten().tolist()}

    assert words(2.0) == {"z"}
    assert words(2.0, "b, q") == {"b", "q"}
    with pytest.raises(RequestError, match="nothing tells `concept` from `others`"):
        concept_words(theirs, theirs, 64, 2.0, "", "test")
    with pytest.raises(RequestError, match="has no token"):
        words(2.0, ", ,")


def test_of_a_word_that_is_several_tokens_the_longest_part_counts() -> None:
    told = tiny_tokenizer()
    text = some_facts(0, 2)
    marks = concept_words(text, text, 64, 2.0, "ab", "test")
    assert [told.decode([n]) for n in marks.nonzero().flatten().tolist()] == ["a"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"layer": 9, "index": 0}, "block 9 is none of the blocks 0 to 3"),
        ({"layer": 1, "index": 48}, "has the value vectors 0 to 47, and none 48"),
        ({"layer": 1, "index": -1}, "0 to 47, and none -1"),
        ({"layer": 1, "index": 2, "expert": 0}, "has no experts, so a vector in it is layer:index"),
        ({"layer": 1}, "no place of a value vector"),
        ({"layer": True, "index": 2}, "no place of a value vector"),
    ],
)
def test_a_place_outside_the_model_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ValueVectors.of(tiny_llama(), "test").located([row], "test")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"layer": 1, "index": 2}, "has 4 experts, so a vector in it is layer:expert:index"),
        ({"layer": 1, "index": 2, "expert": 4}, "the experts 0 to 3, and none 4"),
    ],
)
def test_a_place_in_a_mixture_names_an_expert_that_is_there(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        built(CAUSAL["Mixtral"]).located([row], "test")


def test_places_are_written_as_they_are_read() -> None:
    assert parsed("20:10513, 3:2:17", "at") == [
        {"layer": 20, "index": 10513},
        {"layer": 3, "expert": 2, "index": 17},
    ]
    assert [str(Location(20, 10513)), str(Location(3, 17, 2))] == ["20:10513", "3:2:17"]
    with pytest.raises(RequestError, match="'20' names no value vector"):
        parsed("20", "at")


def test_what_reads_no_tokens_is_refused_and_so_is_another_models_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="reads no tokens"):
        ValueVectors.of(tiny_vit(), "test")
    other = facts(save(tiny_llama(intermediate_size=40), None, tmp_path / "other"))
    with pytest.raises(RequestError, match=r"does not correspond .*down_proj.weight is \[32, 40\], and \[32, 48\]"):
        ValueVectors.of(tiny_llama(), "test").stored(other)


def test_nothing_is_left_behind_by_a_search() -> None:
    for model in (tiny_llama(), CAUSAL["Mixtral"].build()):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        next(model.parameters()).requires_grad_(False)
        activities(ValueVectors.of(model, "test"), examples_for("llama", 3), 2)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert all(p.grad is None for p in model.parameters())


def test_texts_of_one_token_have_no_activation() -> None:
    one = Examples([{"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}], [{}])
    for model in (tiny_llama(), CAUSAL["Mixtral"].build()):
        with pytest.raises(RequestError, match="longer"):
            activities(ValueVectors.of(model, "test"), one, 1)
    assert collate(one.items)["input_ids"].shape == (1, 1)


def test_a_question_of_people_gives_words_that_only_they_have() -> None:
    ours, theirs = (encode_qa(people()[n : n + 1], tiny_tokenizer(), prompt="{question}") for n in (0, 200))
    marks = concept_words(ours, theirs, 64, 1.5, "", "test")
    assert 0 < int(marks.sum()) < 30
