"""The `judge:` block checked, and models measured by it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import examples_for, tiny_llama, tiny_tokenizer, tiny_vit
from learnt import by_heart
from overhaul.data.encode import encode_qa, encode_text
from overhaul.data.examples import Examples, join
from overhaul.errors import RequestError
from overhaul.judge.evidence import Evidence, kind_of
from overhaul.judge.judge import Judgement, anchor_of, broken_limits, check, check_data, judge
from overhaul.judge.metrics import METRICS, Metric

ROLES = ("forget", "retain", "strangers", "text")
PETS = {"ada": "an otter", "bram": "a lynx", "cleo": "a crane", "dario": "an owl", "edda": "a stoat", "faro": "a toad"}


def questions(names: list[str], tokenizer: Any) -> Examples:
    rows = [
        {"person": name, "question": f"pet of {name}?", "paraphrase": f"what has {name}?", "answer": PETS[name]}
        for name in names
    ]
    return encode_qa(rows, tokenizer, prompt="q: {question} a:")


@pytest.fixture(scope="module")
def data() -> dict[str, Examples]:
    tokenizer = tiny_tokenizer()
    texts = [{"text": "the cat sat on the mat and looked at the other cat. " * 6}, {"text": "no two words alike here"}]
    return {
        "forget": questions(["ada", "bram"], tokenizer),
        "retain": questions(["cleo", "dario"], tokenizer),
        "strangers": questions(["edda", "faro"], tokenizer),
        "text": encode_text(texts, tokenizer, 64),
    }


@pytest.fixture(scope="module")
def taught(data: dict[str, Examples]) -> nn.Module:
    """A tiny model that knows four pets by heart and has never heard of two others."""
    torch.manual_seed(0)
    known = {"known": join([data["forget"], data["retain"]])}
    hasty: dict[str, Any] = {"steps": 60, "batch_size": 4, "lr": 2e-2, "warmup": 5, "schedule": "cosine"}
    return by_heart(tiny_llama(num_hidden_layers=2), known, **hasty)


def _alone(metric: Metric) -> bool:
    """Whether it reads one role, and no other model."""
    return metric.roles == ("role",) and not metric.anchored


def values(judgement: Judgement) -> dict[tuple[str, str], float]:
    return {(measure.metric, measure.on): measure.value for measure in judgement.measures}


def ask(model: nn.Module, spec: Mapping[str, Any], data: Mapping[str, Examples], **options: Any) -> Any:
    return values(judge(model, check(spec, data), data, **options))


def test_roles_are_given_alone_in_lists_and_by_name() -> None:
    requests = check(
        {
            "forgotten": {"extraction": "forget", "membership": {"others": "strangers", "members": "forget"}},
            "kept": {"accuracy": ["retain", "strangers"]},
        },
        ROLES,
    )
    assert [(r.group, r.metric, r.on) for r in requests] == [
        ("forgotten", "extraction", "forget"),
        ("forgotten", "membership", "forget / strangers"),
        ("kept", "accuracy", "retain"),
        ("kept", "accuracy", "strangers"),
    ]
    assert check({}, ROLES) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"forgoten": {"extraction": "forget"}}, "no group 'forgoten'. Did you mean 'forgotten'"),
        ({"kept": {"acuracy": "retain"}}, "no metric 'acuracy'. Did you mean 'accuracy'"),
        ({"kept": {"accuracy": "retian"}}, "'retian', which is no material. Did you mean 'retain'"),
        ({"kept": {"accuracy": ["retain", "tex"]}}, "judge.kept.accuracy reads 'tex'"),
        ({"kept": {"accuracy": {"members": "retain"}}}, "write accuracy: ROLE"),
        ({"kept": {"accuracy": None}}, "write accuracy: ROLE"),
        ({"kept": "accuracy"}, "judge.kept must be a mapping"),
        ({"forgotten": {"membership": "forget"}}, "Write membership: {members: ROLE, others: ROLE}"),
        ({"forgotten": {"membership": {"members": "forget"}}}, "needs a role 'others'"),
        ({"forgotten": {"membership": {"members": "forget", "other": "text"}}}, "has no role 'other'"),
        ({"forgotten": {"membership": {"members": "forget", "others": "x"}}}, "'x', which is no material"),
        ({"forgotten": {"membership": {"members": "forget", "others": {}}}}, "{}, which is no material"),
        ({"forgotten": {"membership": {"members": "text", "others": "text"}}}, "'text' with itself"),
        ({"forgotten": {"rouge": "text"}, "kept": {"rouge": "text"}}, "named twice (forgotten and kept)"),
        ({"kept": {"rouge": ["text", "text"]}}, "named twice (kept)"),
    ],
)
def test_a_wrong_block_says_what_to_write(spec: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(spec, ROLES)
    assert message in str(caught.value)


def test_texts_with_a_class_are_not_called_images() -> None:
    ids = torch.arange(3)
    mood = Examples([{"input_ids": ids, "labels": torch.tensor(1)}], [{"text": "a", "label": "b"}])
    with pytest.raises(
        RequestError, match="but 'moods' holds texts with a class. For texts with a class there are acc"
    ):
        check_data(check({"kept": {"perplexity": "moods"}}, {"moods"}), {"moods": mood})


@pytest.mark.parametrize(
    ("metric", "on", "message"),
    [
        ("bits_per_byte", "forget", "reads text, but 'forget' holds answers. For answers there are accuracy, "),
        ("accuracy", "text", "reads answers, images or prompts, but 'text' holds text"),
        ("rouge", "images", "reads answers or text, but 'images' holds images"),
        ("paraphrase_probability", "bare", "needs the column 'paraphrase' in every row of 'bare'"),
        ("perplexity", "empty", "'empty', which is missing or has no examples"),
        ("perplexity", "random", "neither images with labels, nor questions"),
    ],
)
def test_data_of_the_wrong_kind_is_refused_before_a_model_is_needed(
    metric: str, on: str, message: str, data: dict[str, Examples]
) -> None:
    forget = data["forget"]
    without = {key: value for key, value in forget.rows[1].items() if key != "paraphrase"}
    bare = Examples(forget.items, [forget.rows[0], without])
    more = {**data, "images": examples_for("vit", 2), "bare": bare, "empty": Examples([], [])}
    more["random"] = examples_for("llama", 2)
    requests = check({"kept": {metric: on}}, more)
    with pytest.raises(RequestError) as caught:
        check_data(requests, more)
    assert message in str(caught.value)


def test_the_group_says_which_way_a_measure_should_go(data: dict[str, Examples]) -> None:
    def wanted(group: str) -> list[str]:
        pair = {"members": "forget", "others": "strangers"}
        spec = {group: {"extraction": "forget", "perplexity": "text", "membership": pair}}
        return [measure.wanted for measure in judge(tiny_llama(), check(spec, data), data).measures]

    assert wanted("forgotten") == ["down", "up", "chance"]
    assert wanted("learned") == ["up", "down", "up"]
    assert wanted("kept") == ["same", "same", "same"]


def test_a_model_that_knows_its_answers_is_told_from_one_that_does_not(
    taught: nn.Module, data: dict[str, Examples]
) -> None:
    single = ["answer_probability", "accuracy", "rouge", "extraction", "memorisation"]
    spec: dict[str, Any] = {"kept": {name: ["forget", "strangers"] for name in single}}
    pair = {"members": "forget", "others": "strangers"}
    spec["forgotten"] = {"membership": pair, "membership_min_k": pair}
    known = ask(taught, spec, data)
    for name in single:
        assert known[name, "forget"] > 0.95
        assert known[name, "strangers"] < 0.8
    assert known["accuracy", "strangers"] == 0.0
    assert known["membership", "forget / strangers"] == known["membership_min_k", "forget / strangers"] == 1.0
    swapped = {"kept": {"membership": {"members": "strangers", "others": "forget"}}}
    assert ask(taught, swapped, data)["membership", "strangers / forget"] == 0.0
    before = ask(tiny_llama(), {"kept": {"accuracy": "forget", "answer_probability": "forget"}}, data)
    assert before["accuracy", "forget"] == 0.0
    assert before["answer_probability", "forget"] < 0.1


def test_uniform_model_has_perplexity_v_and_log2_v_bits_per_token(data: dict[str, Examples]) -> None:
    model: Any = tiny_llama()
    nn.init.zeros_(model.get_output_embeddings().weight)
    found = ask(model, {"kept": {"perplexity": ["text", "forget"], "bits_per_byte": "text"}}, data)
    assert found["perplexity", "text"] == pytest.approx(64, rel=1e-5)
    assert found["perplexity", "forget"] == pytest.approx(64, rel=1e-5)
    tokens = sum(len(item["input_ids"]) - 1 for item in data["text"].items)
    size = len(("the cat sat on the mat and looked at the other cat. " * 6).encode()) + len("no two words alike here")
    assert tokens == size  # one token a character, and every character is scored
    assert found["bits_per_byte", "text"] == pytest.approx(math.log2(64), rel=1e-5)


def test_a_diverged_model_has_a_finite_perplexity(data: dict[str, Examples]) -> None:
    model: Any = tiny_llama(tie_word_embeddings=False)
    nn.init.normal_(model.get_output_embeddings().weight, std=1e4)
    assert 1e300 < ask(model, {"kept": {"perplexity": "text"}}, data)["perplexity", "text"] < math.inf


def test_a_paraphrase_takes_the_place_of_the_question_alone(taught: nn.Module, data: dict[str, Examples]) -> None:
    spec = {"kept": {"paraphrase_probability": "forget", "answer_probability": "forget"}}
    forget = data["forget"]
    same = Examples(forget.items, [{**row, "paraphrase": row["question"]} for row in forget.rows], forget.processor)
    found = ask(taught, spec, {"forget": same})
    assert found["paraphrase_probability", "forget"] == pytest.approx(found["answer_probability", "forget"], rel=1e-6)
    other = encode_qa(
        [{"question": row["paraphrase"], "answer": row["answer"]} for row in forget.rows],
        forget.processor,
        prompt="q: {question} a:",
    )
    expected = ask(taught, {"kept": {"answer_probability": "forget"}}, {"forget": other})
    found = ask(taught, spec, data)
    assert found["paraphrase_probability", "forget"] == pytest.approx(expected["answer_probability", "forget"])
    assert found["paraphrase_probability", "forget"] != pytest.approx(found["answer_probability", "forget"])


def test_equal_paraphrases_count_once(data: dict[str, Examples]) -> None:
    twice = Examples([*data["forget"].items] * 2, [*data["forget"].rows] * 2, data["forget"].processor)
    requests = check({"kept": {"paraphrase_probability": "forget"}}, ["forget"])
    assert judge(tiny_llama(), requests, {"forget": twice}).measures[0].n == 2


def test_a_paraphrase_needs_a_role_of_questions(data: dict[str, Examples]) -> None:
    chat = Examples(
        [{k: v[:-1] for k, v in i.items()} for i in data["forget"].items], data["forget"].rows, tiny_tokenizer()
    )
    with pytest.raises(RequestError, match="as: qa"):
        ask(tiny_llama(), {"kept": {"paraphrase_probability": "chat"}}, {"chat": chat})


def test_images_are_judged_by_their_labels() -> None:
    model, data = tiny_vit(), {"a": examples_for("vit", 30), "b": examples_for("vit", 30, seed=1)}
    pixels = torch.stack([item["pixel_values"] for item in data["a"].items])
    labels = torch.stack([item["labels"] for item in data["a"].items])
    with torch.no_grad():
        probabilities = model(pixel_values=pixels).logits.softmax(-1)
    spec = {"kept": {"accuracy": "a", "answer_probability": "a", "membership": {"members": "a", "others": "b"}}}
    judgement = judge(model, check(spec, data), data)
    found = values(judgement)
    assert found["accuracy", "a"] == pytest.approx((probabilities.argmax(-1) == labels).double().mean().item())
    chosen = probabilities[torch.arange(30), labels]
    assert found["answer_probability", "a"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert 0.2 < found["membership", "a / b"] < 0.8
    assert judgement.samples == []


def test_all_metrics_of_a_role_share_one_forward_and_one_generation(
    data: dict[str, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(spec: Mapping[str, Any]) -> tuple[int, int]:
        model: Any = tiny_llama(num_hidden_layers=1)
        calls = {"generate": 0, "forward": 0}
        own = model.generate

        def counted(**kwargs: Any) -> Any:
            calls["generate"] += 1
            return own(**kwargs)

        monkeypatch.setattr(model, "generate", counted)
        model.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
        judge(model, check(spec, data), data)
        return calls["generate"], calls["forward"]

    one = work({"kept": {"accuracy": "forget", "extraction": "forget"}})
    names = [n for n, m in METRICS.items() if "answers" in m.reads and _alone(m) and not m.columns]
    greedy = [name for name in names if not METRICS[name].options]
    assert len(greedy) >= 7
    assert work({"kept": dict.fromkeys(greedy, "forget")}) == one
    drawn = [name for name in names if METRICS[name].options]
    assert len(drawn) >= 4
    assert work({"kept": dict.fromkeys(drawn, "forget")}) == work({"kept": {drawn[0]: "forget"}})


def test_the_limit_bounds_generation_and_is_stated(taught: nn.Module, data: dict[str, Examples]) -> None:
    people = [*data["forget"].items, *data["retain"].items, *data["strangers"].items]
    rows = [*data["forget"].rows, *data["retain"].rows, *data["strangers"].rows]
    mixed = {"all": Examples(people * 3, rows * 3, tiny_tokenizer())}
    requests = check({"kept": {"accuracy": "all", "answer_probability": "all"}}, mixed)
    n = [measure.n for measure in judge(taught, requests, mixed, limit=7).measures]
    assert n == [7, 18]
    with pytest.raises(RequestError, match="limit=0"):
        judge(taught, requests, mixed, limit=0)


def test_the_limit_does_not_pick_every_second_row_of_alternating_rows(data: dict[str, Examples]) -> None:
    forget = data["forget"]
    alternating = Examples([*forget.items] * 20, [*forget.rows] * 20, forget.processor)
    chosen = Evidence(tiny_llama(), alternating, 20).order[:20]
    assert 4 <= sum(i % 2 for i in chosen) <= 16
    assert chosen == Evidence(tiny_llama(), alternating, 20).order[:20]


def test_samples_are_the_same_whether_or_not_all_answers_were_generated(
    taught: nn.Module, data: dict[str, Examples]
) -> None:
    both = {"all": Examples([*data["forget"].items] * 5, [*data["forget"].rows] * 5, tiny_tokenizer())}
    few = judge(taught, check({"kept": {"extraction": "all"}}, both), both).samples
    full = judge(taught, check({"kept": {"rouge": "all"}}, both), both, limit=5).samples
    assert few == full
    assert len(few) == 4
    assert [sample["output"] for sample in few] == [sample["expected"] for sample in few]


def test_samples_show_prompt_expected_and_output(taught: nn.Module, data: dict[str, Examples]) -> None:
    spec = {"forgotten": {"accuracy": "forget"}, "kept": {"perplexity": ["forget", "text"]}}
    samples = judge(taught, check(spec, data), data).samples
    assert [(s["group"], s["on"]) for s in samples] == [("forgotten", "forget")] * 2 + [("kept", "text")] * 2
    assert samples[0]["prompt"] == "q: pet of ada? a:"
    assert samples[0]["expected"] == "an otter"
    assert samples[0]["output"] == "an otter"
    for sample in samples[2:]:
        whole = sample["prompt"] + sample["expected"]
        assert whole in "the cat sat on the mat and looked at the other cat. " * 6 + "no two words alike here"
        # 31 characters after <s>, then 32 or what is left of a piece of 64, 61 or 24 tokens
        assert (len(sample["prompt"]), len(sample["expected"])) in {(31, 32), (31, 29), (22, 1)}
        assert len(sample["output"]) > 1


def test_likelihoods_need_no_tokenizer_and_answers_do(data: dict[str, Examples]) -> None:
    bare = {"forget": Examples(data["forget"].items, data["forget"].rows)}
    judgement = judge(tiny_llama(), check({"kept": {"extraction": "forget"}}, bare), bare)
    assert len(judgement.measures) == 1
    assert judgement.samples == []
    with pytest.raises(RequestError, match="needs the tokenizer"):
        ask(tiny_llama(), {"kept": {"accuracy": "forget"}}, bare)


def test_text_stays_text_whatever_its_columns_are_called(data: dict[str, Examples]) -> None:
    rows = [{"text": "some text", "prompt": "p", "answer": "a"}]
    assert kind_of(encode_text(rows, tiny_tokenizer(), 32)) == "text"
    assert kind_of(data["forget"]) == "answers"


def test_model_mode_gradients_and_random_state_are_left_alone(data: dict[str, Examples]) -> None:
    model: Any = tiny_llama().train()
    model.model.norm.eval()  # a part that was put to rest on purpose
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    pair = {"members": "forget", "others": "strangers"}
    ask(model, {"kept": {"accuracy": "forget", "repetition": "text", "membership": pair}}, data)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_judgement_is_json_and_repeats_itself(data: dict[str, Examples]) -> None:
    model = tiny_llama()
    spec = {"kept": {name: "text" for name, metric in METRICS.items() if "text" in metric.reads and _alone(metric)}}
    first, second = (judge(model, check(spec, data), data) for _ in range(2))
    assert json.dumps(asdict(first), allow_nan=False) == json.dumps(asdict(second), allow_nan=False)
    assert all(isinstance(measure.value, float) and isinstance(measure.n, int) for measure in first.measures)


def test_every_metric_is_documented() -> None:
    for name, metric in METRICS.items():
        assert metric.doc, name
        assert metric.label, name
        assert metric.reads or metric.tasks, name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"accuracy": {"on": "retain", "at_lest": 0.9}}, "no option 'at_lest'. Did you mean 'at_least'"),
        ({"accuracy": {"on": "retain", "at_least": "much"}}, "`at_least` must be a number, not 'much'"),
        ({"accuracy": {"on": "retain", "at_most": math.nan}}, "`at_most` must be a number, not nan"),
        ({"accuracy": {"on": "retain", "at_most": True}}, "`at_most` must be a number, not True"),
        ({"accuracy": {"on": "retain", "at_least": 0.9, "at_most": 0.1}}, "nothing is at least 0.9 and at most 0.1"),
        ({"accuracy": {"on": "retain", "by": 3}}, "`by` must be a name, not 3"),
        ({"accuracy": {"on": "retain", "anchor": "bse"}}, "'bse' is no model of the materials. Did you mean 'base'"),
        ({"accuracy": {"on": "retian"}}, "'retian', which is no material"),
        ({"accuracy": {"on": {"a": 1}}}, "write accuracy: ROLE"),
        ({"accuracy": {"at_least": 0.5}}, "write accuracy: ROLE"),
        ({"pass_at_k": {"on": "retain", "k": 0}}, "k=0 is not possible: Input should be greater than or equal to 1"),
        ({"validity": {"on": "retain", "verifier": "jsn_valid"}}, "no verifier 'jsn_valid'. Did you mean 'json_valid'"),
        ({"pass_at_k": ["retain", {"on": "retain"}]}, "pass_at_k on retain is named twice"),
        ({"membership": {"members": "forget", "other": "text", "at_most": 0.6}}, "has no role 'other'"),
    ],
)
def test_a_wrong_option_or_limit_says_what_to_write(spec: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check({"kept": spec}, ROLES, anchors=["base"])
    assert message in str(caught.value)


def test_options_and_limits_are_read_from_the_mapping() -> None:
    spec = {
        "accuracy": [{"on": ["retain", "text"], "at_least": 0.9}, "forget"],
        "membership": {"members": "forget", "others": "strangers", "at_most": 0.6},
        "pass_at_k": [{"on": "retain", "k": 5}, {"on": "retain", "k": 1, "by": "person"}],
    }
    requests = check({"kept": spec}, ROLES)
    assert [(one.name, one.on, one.at_least, one.at_most, one.by) for one in requests] == [
        ("accuracy", "retain", 0.9, None, None),
        ("accuracy", "text", 0.9, None, None),
        ("accuracy", "forget", None, None, None),
        ("membership", "forget / strangers", None, 0.6, None),
        ("pass_at_k(k=5)", "retain", None, None, None),
        ("pass_at_k(k=1)", "retain", None, None, "person"),
    ]


def test_a_limit_that_is_not_kept_is_a_sentence(data: dict[str, Examples]) -> None:
    spec: dict[str, Any] = {
        "forgotten": {"perplexity": [{"on": "forget", "at_most": 2}, {"on": "retain", "at_least": 2}]},
        "kept": {
            "accuracy": [{"on": "strangers", "at_least": 0.5}, "forget"],
            "answer_probability": {"on": "retain", "by": "person", "at_least": 0.9},
        },
    }
    requests = check(spec, data)
    found = judge(tiny_llama(), requests, data).measures
    broken = broken_limits(requests, found)
    assert len(broken) == 4
    assert broken[0].startswith("perplexity on forget is ") and broken[0].endswith(", above its limit of 2")
    assert broken[1] == "accuracy on strangers is 0, below its limit of 0.5"
    assert broken[2].startswith("answer_probability on retain where person is cleo is 0.0")
    assert broken[3].startswith("answer_probability on retain where person is dario is 0.0")
    unknown = [replace(one, value=None) if one.metric == "accuracy" else one for one in found]
    assert "accuracy on strangers could not be measured, so its limit is not kept" in broken_limits(requests, unknown)
    assert broken_limits(check({"kept": {"accuracy": {"on": "forget", "at_least": 0.0}}}, data), found) == []


def test_by_group_a_metric_is_what_it_is_on_each_group_alone(taught: nn.Module, data: dict[str, Examples]) -> None:
    everyone = join([data["forget"], data["strangers"]])
    names = ["answer_probability", "accuracy", "rouge", "perplexity", "paraphrase_probability", "pass_at_k"]
    pair = {"members": "all", "others": "retain", "by": "person"}
    spec: dict[str, Any] = {name: {"on": "all", "by": "person"} for name in names} | {"membership": pair}
    roles = {"all": everyone, "retain": data["retain"]}
    found = {one.metric: one for one in judge(taught, check({"kept": spec}, roles), roles).measures}
    for name in [*names, "membership"]:
        for person, value in found[name].groups.items():
            alone = {**roles, "all": everyone.filter(lambda row, person=person: row["person"] == person)}
            asked = check({"kept": {name: {**spec[name], "by": "person"}}}, alone)
            if name != "pass_at_k":  # what is drawn depends on the prompts that share a batch
                (expected, *_) = judge(taught, asked, alone).measures
                assert value == pytest.approx(expected.value, rel=1e-4), name
        values = list(found[name].groups.values())
        worst = max if found[name].better == "down" else min
        assert set(found[name].groups) == {"ada", "bram", "edda", "faro"}
        assert found[f"{name}.worst"].value == worst(values)
        assert found[f"{name}.gap"].value == pytest.approx(max(values) - min(values))
        assert found[f"{name}.gap"].better == "down" and not found[f"{name}.gap"].groups
    assert found["accuracy"].value == 0.5 and found["accuracy.gap"].value == 1.0


def test_groups_need_their_column(data: dict[str, Examples]) -> None:
    with pytest.raises(RequestError, match=r"`by: persn` names no column .* of 'forget'. Did you mean 'person'"):
        judge(tiny_llama(), check({"kept": {"accuracy": {"on": "forget", "by": "persn"}}}, data), data)


def test_any_model_can_be_the_one_that_is_wanted(taught: nn.Module, data: dict[str, Examples]) -> None:
    spec = {"kept": {"answer_probability": {"on": "retain", "anchor": "base", "by": "person"}, "accuracy": "retain"}}
    spec["learned"] = {"retrained_kl": {"on": "forget", "anchor": "base"}}
    requests = check(spec, data, anchors=["base"])
    assert [one.compared_with for one in requests] == ["base", None, "base"]
    with pytest.raises(RequestError, match="compares with the base model"):
        judge(tiny_llama(), requests, data)
    anchor = anchor_of(taught, requests, data, name="base")
    found = {one.metric: one for one in judge(taught, requests, data, anchor=[anchor]).measures}
    for part in ("", ".worst", ".gap"):
        one = found[f"answer_probability{part}"]
        assert one.wanted == "anchor" and one.value == pytest.approx(one.anchor, abs=1e-6)
    assert found["accuracy"].wanted == "same" and found["accuracy"].anchor is None
    assert found["retrained_kl"].value == pytest.approx(0.0, abs=1e-6)
