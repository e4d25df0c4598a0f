"""Post-training: what must hold exactly of a model and itself, numbers worked out by hand, and what is refused."""

from __future__ import annotations

import functools
import gc
import statistics
import tempfile
import weakref
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer
from overhaul import models
from overhaul.errors import RequestError
from overhaul.inspect.post_training import post_training
from overhaul.inspect.post_training.asking import Asker, Asking, shots_of
from overhaul.inspect.post_training.confidence import Confidence, Confident, last_norm, neurons_of
from overhaul.inspect.post_training.knowledge import Knowledge, aligned, binned, pearson, spearman
from overhaul.inspect.post_training.refusal import REFUSALS, _written, refuses, writing_sites
from overhaul.inspect.post_training.truth import Probe, Pushing, Truth, nie, step
from overhaul.models import save
from overhaul.stack import LayerStack
from overhaul.trace import ProjectOut, intervene, measure

Rows = list[dict[str, Any]]


def lively(**changes: Any) -> nn.Module:
    """Weights as large as that states and answers differ from each other."""
    return tiny_llama(num_hidden_layers=3, initializer_range=0.3, **changes)


@functools.cache
def folder(seed: int, build: Callable[..., nn.Module] = lively) -> Path:
    """A checkpoint, which stays as long as the tests run."""
    torch.manual_seed(seed)
    return save(build(), tiny_tokenizer(), Path(tempfile.mkdtemp()) / str(seed), dtype="float32")


def facts() -> Rows:
    return [{"true": f"{x}a is {x}.", "false": f"{y}c is {x}.", "object": x} for x, y in zip("abc", "ghi", strict=True)]


def statements() -> Rows:
    return [
        {"statement": f"{x} is {t}.", "label": t == "x", "topic": "one" if x in "abc" else "two", "object": t}
        for x in "abcdef"
        for t in "xz"
    ]


def instructions(word: str) -> Rows:
    return [{"instruction": f"{word} {x}"} for x in "abcdefgh"]


def asked() -> dict[str, Any]:
    return {
        "facts": facts(),
        "statements": statements(),
        "harmful": instructions("bad"),
        "harmless": instructions("good"),
    }


QUICK: dict[str, Any] = {"question": "q:", "shots": 2, "new_tokens": 3, "neurons": 3, "held_out": 0.25}

CASE = {
    "method": post_training,
    "materials": lambda: {"post": models.facts(folder(2)), "base": models.facts(folder(1)), **asked()},
    "knobs": {
        **QUICK, "true_word": "TRUE", "false_word": "FALSE", "probe_layer": 1, "probe_at": "question", "push_blocks": 1,
        "strength": 1.0, "push_length": "source", "test_topic": "two", "prompt": "{instruction}", "refusal_layer": 1,
        "addition": 5.0, "phrases": list("abcdefghijklm"), "loudest": 0.25, "most": 100, "dtype": "float32",
    },
    "varied": {
        "question": ("q:", "so:"), "true_word": ("TRUE", "yes"), "false_word": ("FALSE", "no"), "shots": (2, 0),
        "probe_layer": (1, 2), "probe_at": ("question", "statement"), "push_blocks": (1, 2), "strength": (1.0, 3.0),
        "push_length": ("source", "receiver"),
        "test_topic": ("two", "one"), "prompt": ("{instruction}", "do {instruction} so"), "refusal_layer": (1, 2),
        "addition": (5.0, 0.01), "phrases": (list("abcdefghijklm"), list(".:0123456789\"'")), "held_out": (0.25, 0.5),
        "neurons": (3, 5), "loudest": (0.25, 0.9), "most": (100, 1), "dtype": ("float32", "bfloat16"),
        "new_tokens": (3, 1, {"phrases": ["aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh", "ii", "jj", "kk", "ll", "mm"]}),
    },
    "idle": {"batch_size": "texts that run together do not change the values"},
    "apart": {"peak": "a plan counts no tokens of rows, and the states of some texts are more than a model of 200 kB"},
}  # fmt: skip


def test_a_model_compared_with_itself_is_the_same_in_every_part() -> None:
    outcome = post_training(folder(1), folder(1), **asked(), **QUICK, phrases=list("abcdefghijklmno"))
    told = outcome.facts
    for name in (
        "facts_map_pearson",
        "facts_map_spearman",
        "facts_map_pearson_binned",
        "truth_cosine",
        "refusal_cosine",
    ):
        assert told[name] == pytest.approx(1, abs=1e-5), name
    assert told["refusal_norm_ratio"] == pytest.approx(1, abs=1e-5) and told["confidence_iou"] == 1
    assert told["facts_map_largest_difference_binned"] == 0 and told["left_out"] == told["differences"] == []
    for name, table in outcome.tables.items():
        if name.startswith(("truth: effect", "refusal")):
            alike = [[row[1]] * 2 for row in table.rows]
        elif name.startswith("truth: share"):
            alike = [[row[1], row[1], row[3], row[3]] for row in table.rows]
        else:
            continue
        assert [list(row[1:]) for row in table.rows] == [pytest.approx(row, abs=1e-5) for row in alike], name
        assert name.startswith("refusal") or list(table.rows[0][1:]) == pytest.approx(list(table.rows[1][1:]), abs=1e-5)


def test_the_grid_ends_where_it_must() -> None:
    outcome = post_training(folder(2), folder(1), facts(), **QUICK)
    clean = {(row[0], row[1]): row for row in outcome.tables["facts: logit TRUE - FALSE"].rows}
    for role in ("base", "post"):
        table = outcome.tables[f"facts: true states of {role} in {role}"]
        assert table.along == "after block" and table.across == "patched token" and table.drawn == "heat"
        assert table.columns[1:] == (
            "subject", "last subject token", "between", "object", "end of statement", "question", "last token",
        )  # fmt: skip
        _, _, false, true, *_ = clean[f"true states of {role}", role]
        *others, last = table.rows[-1][1:]  # of the last block only its last token is read
        assert last == pytest.approx(true, abs=1e-4) and others == pytest.approx([false] * len(others), abs=1e-4)
    assert outcome.facts["left_out"] == ["statements", "harmful", "harmless"]


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_qwen3, tiny_gemma3])
def test_other_families_go_through_every_part(build: Callable[..., nn.Module]) -> None:
    outcome = post_training(folder(2, build), folder(1, build), **asked(), **QUICK)
    assert {name.partition(":")[0] for name in outcome.tables} == {"facts", "truth", "refusal", "confidence"}
    assert outcome.facts["left_out"] == []


def test_no_two_models_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    load = models.load_weights

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        gc.collect()
        assert not any(one() is not None for one in opened), "another model is still there"
        model = load(*args, **kwargs)
        opened.append(weakref.ref(model.get_parameter("model.layers.0.mlp.up_proj.weight").untyped_storage()))
        return model

    monkeypatch.setattr(models, "load_weights", watched)
    post_training(folder(2), folder(1), **asked(), **QUICK)
    assert len(opened) == 3


def test_what_runs_together_does_not_change_a_value() -> None:
    one, other = (post_training(folder(2), folder(1), **asked(), **QUICK, batch_size=size) for size in (1, 16))
    for name, table in one.tables.items():
        for ours, theirs in zip(table.rows, other.tables[name].rows, strict=True):
            assert list(ours) == [
                pytest.approx(value, abs=1e-3) if isinstance(value, float) else value for value in theirs
            ], name


# facts


def test_binning_is_the_papers() -> None:
    two = torch.tensor([[-3.0, 5.0], [5.0, -3.0]])
    assert torch.equal(binned(two), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    ramp = binned(torch.arange(20.0))
    assert ramp.tolist() == pytest.approx([0.0] * 10 + [n / 10 for n in range(1, 11)])
    assert not binned(torch.ones(3, 3)).any()


def test_correlations_of_maps() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 10.0]])
    assert pearson(one, -2 * one) == pytest.approx(-1) and spearman(one, one.exp()) == pytest.approx(1)
    assert pearson(one, one.exp()) != pytest.approx(1, abs=0.01)
    assert pearson(one, torch.ones(2, 2)) is None and spearman(torch.ones(2, 2), one) is None


def test_tokens_are_found_by_offsets_whatever_stands_before() -> None:
    asker = Asker(tiny_tokenizer(), Asking(question="q:", shots=0))
    for shots in ((), (("z is y.", True),)):
        true, false = (asker.prompt(text, "b", shots) for text in ("abc is b.", "xyc is b."))
        pair = aligned(true, false)
        assert pair is not None
        assert list(pair.labels) == [
            "subject", "last subject token", "between", "between", "between", "between", "between", "object",
            "end of statement", "question", "question", "question", "last token",
        ]  # fmt: skip
        words = tiny_tokenizer()
        assert words.decode([true.ids[n] for n in true.statement]) == "abc is b."
        assert [words.decode([one]) for one in (true.yes, true.no)] == ["t", "f"] and true.ids[true.last] == 5
    assert aligned(asker.prompt("abc is b."), asker.prompt("ab is b.")) is None


def test_shots_are_half_true_and_drawn_by_the_seed() -> None:
    known = [(f"{n}", n % 2 == 0) for n in range(10)]
    torch.manual_seed(0)
    orders = [shots_of(known, 4, tag) for tag in range(6)]
    assert all(sum(truth for _, truth in one) == 2 and len(set(one)) == 4 for one in orders)
    assert len({tuple(truth for _, truth in one) for one in orders}) > 1
    assert orders[3] == shots_of(known, 4, 3)
    with pytest.raises(RequestError, match="3 could be found"):
        shots_of([("a", True), ("b", True), ("c", False)], 4, 0)


# truth


def test_a_probe_is_the_difference_of_means() -> None:
    states = torch.tensor([[2.0, 1.0], [4.0, 3.0], [0.0, 1.0], [-2.0, -1.0]])
    truth = torch.tensor([True, True, False, False])
    probe = Probe.of(states, truth)
    assert torch.equal(probe.direction, torch.tensor([4.0, 2.0]))
    assert torch.allclose(step(probe.direction, 3 * probe.direction), probe.direction)  # all of it lies along itself
    assert torch.equal(step(probe.direction, torch.tensor([0.0, 2.0])), torch.tensor([0.0, 2.0]))
    assert probe.right(states, truth) == 1 and probe.right(states, ~truth) == 0


def test_nie_is_0_without_effect_and_1_at_the_goal() -> None:
    assert nie(0.3, 0.3, -1) == 0 and nie(-1.0, 0.3, -1) == 1 and nie(0.0, -0.5, 1) == pytest.approx(1 / 3)
    assert nie(0.5, 0.97, 1) is None


def test_one_topic_is_halved_and_both_halves_are_told() -> None:
    rows = [{"statement": one["statement"], "label": one["label"]} for one in statements()]
    outcome = post_training(folder(2), folder(1), None, rows, **QUICK)
    assert outcome.facts["truth_test_topic"] == "all, other half"
    assert all(0 <= value <= 1 for values in outcome.layers.values() for value in values.values())


# refusal


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3])
@torch.no_grad()
def test_nothing_of_a_removed_direction_is_left_at_any_site(build: Callable[..., nn.Module]) -> None:
    stack, inputs = LayerStack.of(build()), {"input_ids": torch.randint(4, 60, (2, 9))}
    places = writing_sites(stack)
    assert len(places) == 2 + len(stack)
    draw = torch.randn(2, 32)
    direction = draw[0] / draw[0].norm()
    across = draw[1] - (draw[1] @ direction) * direction

    def part(state: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        return [state @ direction]

    whole = measure(stack, inputs, ["entering", "leaving"], part)
    with intervene(stack, {place: ProjectOut(3 * direction) for place in places}):
        removed = measure(stack, inputs, ["entering", "leaving", *places[2:]], part)
    assert max(float(values[0].abs().max()) for values in removed.values()) < 1e-5
    with intervene(stack, {"entering.1": ProjectOut(across)}):
        kept = measure(stack, inputs, ["entering.1"], part)
    assert torch.allclose(kept["entering.1"][0], whole["entering.1"][0], atol=1e-6)


def test_a_prompt_ends_where_the_model_answers_and_no_refusal_at_all_is_said() -> None:
    tokenizer = models.load_processor(models.facts("starter:docs-llama-chat"))
    rows = [{"instruction": f"{verb} the lamp"} for verb in "burn paint".split() * 5]
    (ids, *_) = _written(tokenizer, [rows[0]["instruction"]], "")
    turns = [{"role": "user", "content": rows[0]["instruction"]}]
    assert ids.tolist() == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    chat, base = "starter:docs-llama-chat", "starter:docs-llama"
    outcome = post_training(chat, base, harmful=rows, harmless=rows, phrases=["never said"], new_tokens=2)
    assert "refused no harmful instruction" in outcome.facts["advice"]


def test_refusals_are_told_by_how_they_begin() -> None:
    assert refuses("I\u2019m sorry, but no", REFUSALS) and refuses("i cannot help", REFUSALS)
    assert not refuses("Of course. I'm sorry that", REFUSALS) and not refuses("I don't mind", REFUSALS)


# confidence


@pytest.mark.parametrize(
    ("build", "centred", "offset"), [(tiny_llama, False, 0.0), (tiny_gemma3, False, 1.0), (tiny_gpt2, True, 0.0)]
)
def test_the_last_norms_gain_is_told_by_what_it_does(build: Callable[..., Any], centred: bool, offset: float) -> None:
    model = build()
    norm = model.transformer.ln_f if centred else model.model.norm
    nn.init.normal_(norm.weight)
    if centred:
        nn.init.normal_(norm.bias)
    gain, takes_mean = last_norm(LayerStack.of(model))
    assert torch.allclose(gain, norm.weight.detach() + offset, atol=1e-4) and takes_mean == centred


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3])
@torch.no_grad()
def test_a_loud_neuron_across_all_words_is_the_first_entropy_neuron(build: Callable[..., Any], tmp_path: Path) -> None:
    words = {"vocab_size": 60, "hidden_size": 64} if build is not tiny_gpt2 else {"vocab_size": 60, "n_embd": 64}
    model = build(tie_word_embeddings=False, **words)
    head = model.get_output_embeddings().weight
    gain, centred = last_norm(LayerStack.of(model))
    rows = head * gain
    rows = rows - rows.mean(1, keepdim=True) if centred else rows
    silent = torch.linalg.svd(rows.double())[2][-1].float()
    down = model.transformer.h[-1].mlp.c_proj if build is tiny_gpt2 else model.model.layers[-1].mlp.down_proj
    (down.weight[7] if build is tiny_gpt2 else down.weight[:, 7]).copy_(50 * silent)
    norms, variances = neurons_of(model)
    assert int(norms.argmax()) == 7 == int(variances.argmin()) and float(variances[7]) < 1e-8
    place = save(model, tiny_tokenizer(), tmp_path / "model", dtype="float32")
    outcome = post_training(place, place)
    first = outcome.tables["confidence: entropy neurons of the last block"].rows
    assert 7 in [row[0] for row in first] and outcome.facts["confidence_iou"] == 1


def test_the_overlap_by_chance_is_that_of_sets_drawn_each_from_its_models_own_loudest_neurons() -> None:
    """Against every way to draw two of each model's four loudest; of eight neurons two are loud in both."""
    loud = {"post": [0, 1, 2, 3], "base": [2, 3, 4, 5]}
    part = Confidence(Confident(neurons=2, loudest=0.5))
    for role, places in loud.items():
        part.norms[role] = torch.tensor([float(n in places) for n in range(8)])
        part.variances[role] = torch.arange(8.0)
    drawn = [set(two) for two in combinations(loud["post"], 2)], [set(two) for two in combinations(loud["base"], 2)]
    overlap = statistics.fmean(len(one & other) for one in drawn[0] for other in drawn[1])
    assert part.facts()["confidence_iou_by_chance"] == pytest.approx(overlap / (4 - overlap))


# bad input


def test_the_number_0_is_a_topic_and_an_object_like_any_other() -> None:
    rows = [
        {"statement": f"{x} is {t}.", "label": t == 0, "topic": n % 2, "object": t}
        for n, x in enumerate("abcdef")
        for t in (0, 1)
    ]
    tokenizer = models.load_processor(models.facts(folder(1)))
    truth = Truth.of(rows, Asker(tokenizer, Asking(question="q:", shots=0)), Pushing(test_topic="0"), 3, 9, 4)
    assert truth.objects == ["0", "1"] * 6 and set(truth.topics) == {"0", "1"}
    pairs = [{"true": f"{x}a is 0.", "false": f"{y}c is 0.", "object": 0} for x, y in zip("abc", "ghi", strict=True)]
    found = Knowledge.of(pairs, Asker(tokenizer, Asking(question="q:", shots=0)), 9, 4)
    assert all(pair.true.object for group in found.groups for pair in group.pairs)


@pytest.mark.parametrize("phrases", [[], [""], ["I cannot", " "]])
def test_phrases_that_every_or_no_answer_begins_with_are_refused(phrases: list[str]) -> None:
    given = {"harmful": instructions("bad"), "harmless": instructions("good")}
    with pytest.raises(RequestError, match="Write how refusals begin"):
        post_training(folder(2), folder(1), **given, **QUICK, phrases=phrases)


def test_pairs_that_do_not_align_are_counted_and_none_left_is_refused() -> None:
    odd = {"true": "abc is b.", "false": "ab is b."}
    outcome = post_training(folder(2), folder(1), [*facts(), odd], **QUICK)
    assert (outcome.facts["facts_pairs"], outcome.facts["facts_pairs_not_aligned"]) == (3, 1)
    with pytest.raises(RequestError, match="in none of 2 rows of 'facts'"):
        post_training(folder(2), folder(1), [odd, odd], question="q:", shots=0)


@pytest.mark.parametrize(
    ("role", "rows", "said"),
    [
        ("facts", [{"true": "a is b."}], "row 1 of 'facts' has no 'false'"),
        ("facts", [{"true": "a.", "false": "a."}] * 3, "the same statement"),
        ("facts", [{"true": "a b.", "false": "c b.", "object": "q"}] * 3, "the object 'q' is not in"),
        ("facts", facts()[:1], "shots=2 needs"),
        ("statements", [{"statement": "a.", "label": "maybe"}], "the label 'maybe'"),
        ("statements", statements()[:3], r"has \d true and \d false"),
        ("harmful", instructions("bad"), "'harmful' is given without 'harmless'"),
        ("harmless", instructions("good"), "'harmless' is given without 'harmful'"),
        (
            "facts",
            [{"true": f"{'a' * 150} {n}", "false": f"{'b' * 150} {n}"} for n in range(3)],
            "end at 128 positions",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused_in_words(role: str, rows: Rows, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        post_training(folder(2), folder(1), **{role: rows}, **QUICK)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"probe_layer": 3}, "probe_layer=3, and the models have the blocks 0 to 2"),
        ({"probe_layer": 2, "probe_at": "statement"}, "reaches nothing"),
        ({"refusal_layer": 3}, "refusal_layer=3, and the models have the blocks 0 to 2"),
        ({"test_topic": "three"}, "is no topic of 'statements': one, two"),
        ({"prompt": "say it"}, "has no {instruction} in it"),
        ({"true_word": "true", "false_word": "true"}, "does not tell 'true' from 'true'"),
        ({"held_out": 0.01}, "would hold out 0"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_in_words(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        post_training(folder(2), folder(1), **asked(), **{**QUICK, **knobs})


def test_models_that_do_not_correspond_are_refused_with_numbers(tmp_path: Path) -> None:
    other = save(tiny_llama(), tiny_tokenizer(), tmp_path / "other", dtype="float32")
    with pytest.raises(RequestError, match=r"base .* has 4 blocks and post .* 3"):
        post_training(folder(2), other, facts())
