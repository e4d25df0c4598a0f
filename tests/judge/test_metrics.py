"""Truth ratios, memorisation, utility and membership as a recipe names them, on a tiny model that knows some answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_llama, tiny_tokenizer
from learnt import by_heart
from overhaul.data.encode import encode_qa, encode_text
from overhaul.data.examples import Examples, join
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.judge.generation import rouge_l_f1
from overhaul.judge.judge import check, judge
from overhaul.judge.likelihood import auc, min_k, min_k_plus_plus, score, tpr_at_fpr, zlib_score
from overhaul.judge.metrics import METRICS
from overhaul.judge.metrics.generated import NEXT_QUESTION
from overhaul.judge.metrics.membership import ATTACKS, by_min_k

PETS = {"ada": "an otter", "bram": "a lynx", "cleo": "a crane", "dario": "an owl", "edda": "a stoat", "faro": "a toad"}
PROMPT = "q: {question} a:"
PAIR = {"members": "known", "others": "strangers"}


class Uniform(nn.Module):
    """Every token is as probable as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logit.expand(*input_ids.shape, 64)


def questions(names: list[str], **columns: Any) -> Examples:
    rows = [
        {
            "person": name,
            "question": f"pet of {name}?",
            "paraphrase": f"what has {name}?",
            "answer": PETS[name],
            "wrong": [pet for other, pet in PETS.items() if other != name][:3],
            **columns,
        }
        for name in names
    ]
    return encode_qa(rows, tiny_tokenizer(), prompt=PROMPT)


@pytest.fixture(scope="module")
def data() -> dict[str, Examples]:
    texts = [{"text": "the cat sat on the mat and looked at the other cat. " * 2}]
    return {
        "known": questions(["ada", "bram", "cleo"]),
        "strangers": questions(["edda", "faro"]),
        "text": encode_text(texts, tiny_tokenizer(), 64),
    }


@pytest.fixture(scope="module")
def taught(data: dict[str, Examples]) -> nn.Module:
    """A tiny model that knows three pets by heart, asked in either way, and a text."""
    torch.manual_seed(0)
    known = data["known"]
    again = encode_qa([{**row, "question": row["paraphrase"]} for row in known.rows], known.processor, prompt=PROMPT)
    lessons = {"all": join([known, again, data["text"]])}
    hasty: dict[str, Any] = {"steps": 60, "batch_size": 8, "lr": 2e-2, "warmup": 5, "schedule": "cosine"}
    return by_heart(tiny_llama(num_hidden_layers=2), lessons, **hasty)


def ask(model: nn.Module, metric: str, on: Any, data: Mapping[str, Examples]) -> tuple[float, int]:
    (measure,) = judge(model, check({"kept": {metric: on}}, data), data).measures
    return measure.value, measure.n


def log_probability(model: nn.Module, question: str, answer: str) -> float:
    """Mean log-probability of an answer's tokens and EOS, by a forward of its own."""
    (one,) = score(
        model, encode_qa([{"question": question, "answer": answer}], tiny_tokenizer(), prompt="q: {question} a:")
    )
    return -one.nll / len(one.logp)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_the_ratio_is_one_where_right_and_wrong_are_equally_likely(mean: Any, data: dict[str, Examples]) -> None:
    assert truth_ratios(Evidence(Uniform(), data["known"], 9), mean) == pytest.approx([1.0] * 3, rel=1e-6)


def test_the_ratio_is_the_mean_of_wrong_answers_over_the_right_one(
    taught: nn.Module, data: dict[str, Examples]
) -> None:
    evidence = Evidence(taught, data["strangers"], 9)
    geometric, arithmetic = truth_ratios(evidence), truth_ratios(evidence, "arithmetic")
    for n, row in enumerate(data["strangers"].rows):
        right = log_probability(taught, row["question"], row["answer"])
        wrong = [log_probability(taught, row["question"], answer) for answer in row["wrong"]]
        assert geometric[n] == pytest.approx(math.exp(sum(wrong) / 3 - right), rel=1e-3)
        assert arithmetic[n] == pytest.approx(sum(map(math.exp, wrong)) / 3 / math.exp(right), rel=1e-3)
        assert arithmetic[n] >= geometric[n]


def test_the_original_question_is_asked_and_its_answer_alone_is_paraphrased(
    taught: nn.Module, data: dict[str, Examples]
) -> None:
    # TOFU and Open-Unlearning: question_key "question", answer_key "paraphrased_answer"
    row = data["known"].rows[0]
    (ratio,) = truth_ratios(Evidence(taught, questions(["ada"], paraphrased_answer="otter"), 9))
    right = log_probability(taught, row["question"], "otter")
    wrong = [log_probability(taught, row["question"], answer) for answer in row["wrong"]]
    assert ratio == pytest.approx(math.exp(sum(wrong) / 3 - right), rel=1e-3)
    other = math.exp(
        sum(log_probability(taught, row["paraphrase"], answer) for answer in row["wrong"]) / 3
        - log_probability(taught, row["paraphrase"], "otter")
    )
    assert ratio != pytest.approx(other, rel=1e-2)


def test_aggregates_of_the_ratio(taught: nn.Module, data: dict[str, Examples]) -> None:
    ratios = truth_ratios(Evidence(taught, data["strangers"], 9))
    found = {name: ask(taught, name, "strangers", data)[0] for name in ("truth_ratio", "truth_preference")}
    assert found["truth_ratio"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / 2)
    assert found["truth_preference"] == pytest.approx(sum(max(0.0, 1 - r) for r in ratios) / 2)
    assert ask(taught, "truth_ratio", "known", data)[0] < 0.3
    assert ask(taught, "truth_preference", "known", data)[0] > 0.7
    assert ask(Uniform(), "truth_ratio", "known", data)[0] == pytest.approx(1.0)


def test_equal_questions_count_once_and_are_scored_once(data: dict[str, Examples]) -> None:
    known = data["known"]
    twice = {"known": Examples([*known.items] * 2, [*known.rows] * 2, known.processor)}
    assert ask(tiny_llama(), "truth_ratio", "known", twice)[1] == 3
    asked: list[int] = []
    model = tiny_llama()
    model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True)
    evidence = Evidence(model, twice["known"], 9)
    assert len(evidence.choices) == 3
    # one right and three wrong answers, and the shortest once more to try the head alone
    assert sum(asked) == 3 * 4 + 1
    assert len(evidence.choices) == 3 and sum(asked) == 3 * 4 + 1


def test_a_destroyed_model_has_a_finite_ratio(data: dict[str, Examples]) -> None:
    model: Any = tiny_llama(tie_word_embeddings=False)
    nn.init.normal_(model.get_output_embeddings().weight, std=1e4)
    assert all(0 < ratio < math.inf for ratio in truth_ratios(Evidence(model, data["known"], 9)))
    assert 0 <= ask(model, "truth_ratio", "known", data)[0] <= 1


@pytest.mark.parametrize("wrong", [[], "an owl", None])
def test_wrong_answers_are_a_list(wrong: Any) -> None:
    with pytest.raises(RequestError, match="`wrong` must be a list"):
        truth_ratios(Evidence(tiny_llama(), questions(["ada"], wrong=wrong), 9))


def test_the_fictitious_people_have_what_truth_ratios_need() -> None:
    examples = encode_qa(people()[:20], tiny_tokenizer())
    ratios = truth_ratios(Evidence(tiny_llama(), examples, 9))
    assert len(ratios) == 20
    assert all(0.5 < ratio < 2 for ratio in ratios)


def test_utility_is_the_harmonic_mean_of_its_parts(taught: nn.Module, data: dict[str, Examples]) -> None:
    parts = [ask(taught, name, "known", data)[0] for name in ("answer_probability", "rouge", "truth_preference")]
    assert ask(taught, "model_utility", "known", data)[0] == pytest.approx(3 / sum(1 / part for part in parts))
    assert ask(tiny_llama(), "model_utility", "known", data)[0] == 0.0  # no word of any answer is found


def test_a_text_known_by_heart_is_continued(taught: nn.Module, data: dict[str, Examples]) -> None:
    evidence = Evidence(taught, data["text"], 9)
    expected = [rouge_l_f1(one.expected, one.text) for one in evidence.answered]
    assert ask(taught, "verbatim_memorisation", "text", data)[0] == pytest.approx(sum(expected) / len(expected))
    assert ask(taught, "verbatim_memorisation", "text", data)[0] > 0.5
    assert ask(tiny_llama(), "verbatim_memorisation", "text", data)[0] < 0.2


def test_an_answer_ends_where_the_model_asks_itself_on(
    data: dict[str, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    says = iter(["an otter\n\nan owl", "a lynx Question: pet of", "a crane\nQuestion 2"])
    evidence = Evidence(tiny_llama(), data["known"], 9)
    answered = [one.__class__(**{**vars(one), "text": next(says)}) for one in evidence.answered]
    monkeypatch.setattr(Evidence, "answered", answered)
    assert ask(tiny_llama(), "knowledge_memorisation", "known", data)[0] == 1.0


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Question of Baku", "Question of Baku"),  # nothing in the field's code cuts at the word alone
        ("no Question is asked", "no Question is asked"),
        ("Baku\nQuestion: where", "Baku"),
        ("Baku\nQuestions", "Baku"),
        ("Baku Question: where", "Baku"),
        ("Baku\n\nParis", "Baku"),
    ],
)
def test_an_answer_is_cut_as_the_field_cuts_it(text: str, kept: str) -> None:
    assert NEXT_QUESTION.split(text)[0].strip() == kept


def test_every_attack_is_an_auc_and_two_true_positive_rates(taught: nn.Module, data: dict[str, Examples]) -> None:
    for name, (_, attack, _) in ATTACKS.items():
        ours, theirs = (attack(Evidence(taught, data[role], 9)) for role in PAIR.values())
        assert ask(taught, name, PAIR, data) == (auc(ours, theirs), 5)
        assert ask(taught, f"{name}_tpr_1e_2", PAIR, data) == (tpr_at_fpr(ours, theirs, 0.01), 5)
        assert ask(taught, f"{name}_tpr_1e_3", PAIR, data) == (tpr_at_fpr(ours, theirs, 0.001), 5)
        assert ask(taught, name, PAIR, data)[0] == 1.0
        assert METRICS[name].forgotten == "chance"
        assert METRICS[f"{name}_tpr_1e_2"].forgotten == "down"


def test_attacks_read_each_answer_with_its_own_text(taught: nn.Module, data: dict[str, Examples]) -> None:
    evidence = Evidence(taught, data["known"], 9)
    _, by_zlib, _ = ATTACKS["membership_zlib"]
    _, by_min_k, _ = ATTACKS["membership_min_k_plus_plus"]
    # the scored text begins with the space that stands before an answer, and ends before EOS
    expected = [zlib_score(one, f" {PETS[n]}") for one, n in zip(evidence.scored, PETS, strict=False)]
    assert by_zlib(evidence) == expected
    assert by_min_k(evidence) == [min_k_plus_plus(one.without(2), 0.2) for one in evidence.scored]
    pieces = Evidence(taught, data["text"], 9).texts
    assert "".join(pieces) == "the cat sat on the mat and looked at the other cat. " * 2
    bare = Examples(data["text"].items, data["text"].rows)
    with pytest.raises(RequestError, match="needs the tokenizer"):
        Evidence(taught, bare, 9).texts  # noqa: B018 (reading it computes it)


def test_min_k_and_privacy_leakage_leave_the_closing_eos_out(taught: nn.Module, data: dict[str, Examples]) -> None:
    evidence = Evidence(taught, data["strangers"], 9)
    by_hand = [min_k(one.logp[:-1], 0.4) for one in evidence.scored]
    assert all(int(one.targets[-1]) == 2 for one in evidence.scored)
    assert by_min_k(evidence, 0.4) == by_hand
    # min_k of all tokens is another number for at least one of them
    assert by_hand != [min_k(one.logp, 0.4) for one in evidence.scored]


def test_everything_on_one_role_takes_one_pass(data: dict[str, Examples]) -> None:
    calls = {"forward": 0}
    model = Uniform()
    model.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    names = [f"{name}{end}" for name in ATTACKS for end in ("", "_tpr_1e_2", "_tpr_1e_3")]
    judge(model, check({"kept": dict.fromkeys(names, PAIR) | {"extraction": "known"}}, data), data)
    assert calls["forward"] == 2  # one for each role
