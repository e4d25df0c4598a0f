"""Chats: what a template writes is learnt, the answer alone is measured, and refusals give the true reason."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from made_tokenizers import TEMPLATES, Slow, byte_level, metaspace, talking
from overhaul.data import lazy
from overhaul.data.encode import encode_chat
from overhaul.data.examples import CLOSING, IGNORED, Examples, answers_alone
from overhaul.data.lazy import View
from overhaul.data.materials import examples
from overhaul.errors import MaterialWarning, RequestError
from overhaul.fit import fit
from overhaul.forget.dpo import refused
from overhaul.judge.evidence import Evidence
from overhaul.judge.likelihood import score
from overhaul.judge.robustness import probabilities
from overhaul.objectives import cross_entropy
from overhaul.rollouts import prompt_of, rollouts

ASKED = [{"role": "user", "content": "where does Ada live?"}, {"role": "assistant", "content": "In Marrowick."}]
LONGER = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nno\n</think>\n\nHello."},
    *ASKED,
]
SYSTEM = [{"role": "system", "content": "Say yes"}, *ASKED]
CALLING = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "live", "arguments": '{"who": "Ada"}'}}],
    },
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "In Marrowick."},
]
WRITTEN = {
    "llama-2": (" [/INST] ", " </s>"),
    "llama-3": ("<|im_start|>assistant\n\n", "<|im_end|>"),
    "chatml": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "qwen-3": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
    "deepseek-r1": ("<Assistant>", "</s>"),
    "gemma": ("<start_of_turn>model\n", "<end_of_turn>\n"),
    "zephyr": ("<|assistant|>\n", "</s>\n"),
    "phi-3": ("<|assistant|>\n", "<|end|>\n</s>"),
    "mistral": (" [/INST] ", "</s>"),
    "marked": ("<|im_start|>assistant\n", "<|im_end|>"),
    "tools": ("<|im_start|>assistant\n", "<|im_end|>\n"),
}
"""What each template writes before an answer, and behind it as far as it is learnt."""


def learnt(item: dict[str, torch.Tensor]) -> list[int]:
    return item["labels"][item["labels"] != IGNORED].tolist()


@pytest.fixture(scope="module", params=["byte level", "metaspace", "slow"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = {"byte level": byte_level, "metaspace": lambda: metaspace("always"), "slow": Slow}
    return made[request.param]()


@pytest.mark.filterwarnings("ignore::overhaul.errors.MaterialWarning")
@pytest.mark.parametrize("chat", [ASKED, LONGER], ids=["asked", "longer"])
@pytest.mark.parametrize("template", WRITTEN)
def test_what_the_template_writes_is_learnt_and_the_answer_measured(template: str, chat: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    made = encode_chat([{"messages": chat}], tokenizer)
    (item,), (row,) = made.items, made.rows
    assert item["input_ids"].tolist() == tokenizer.apply_chat_template(chat, return_dict=False)
    before, behind = WRITTEN[template]
    assert row["prompt"].endswith(before) and "In Marrowick" not in row["prompt"]
    said, closing = learnt(item), row[CLOSING]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    tail = text[len(row["prompt"]) + len("In Marrowick.") :]
    assert tail.startswith(behind) and closing >= 1
    assert "".join(tokenizer.decode(said[:-closing]).split()) == "InMarrowick."
    assert "".join(tokenizer.decode(said[-closing:]).split()) == "".join(behind.split())
    rest = item["input_ids"][(item["labels"] != IGNORED).nonzero()[-1] + 1 :]
    assert tokenizer.decode(rest).strip(" ") == ("\n" if template == "marked" else "")
    assert learnt(answers_alone(made).items[0]) == said[:-closing]
    assert row["question"] == ASKED[0]["content"] and row["answer"] == "In Marrowick."


def test_a_mask_of_the_template_says_what_carries_loss() -> None:
    tokenizer = talking("marked", byte_level())
    (item,) = encode_chat([{"messages": ASKED}], tokenizer).items
    mask = tokenizer.apply_chat_template(ASKED, return_assistant_tokens_mask=True, return_dict=True)["assistant_masks"]
    assert (item["labels"] != IGNORED).long().tolist() == mask


def test_thoughts_are_learnt_as_the_template_writes_them() -> None:
    thinking = [ASKED[0], {"role": "assistant", "content": "<think>\nno\n</think>\n\nIn Marrowick."}]
    apart = [ASKED[0], {"role": "assistant", "content": "In Marrowick.", "reasoning_content": "no"}]
    tokenizer = talking("qwen-3", byte_level())
    for chat in (thinking, apart):
        made = encode_chat([{"messages": chat}], tokenizer)
        assert tokenizer.decode(learnt(made.items[0])) == "<think>\nno\n</think>\n\nIn Marrowick.<|im_end|>\n"
        assert made.rows[0]["prompt"] == tokenizer.apply_chat_template(
            chat[:1], tokenize=False, add_generation_prompt=True
        )
        assert made.rows[0]["answer"].strip() == "<think>\nno\n</think>\n\nIn Marrowick."
    begins = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n"
    assert begins in TEMPLATES["qwen-3"]
    tokenizer.chat_template = TEMPLATES["qwen-3"].replace(begins, f"{begins}<think>\\n")
    made = encode_chat([{"messages": thinking}], tokenizer)
    assert tokenizer.decode(learnt(made.items[0])) == "no\n</think>\n\nIn Marrowick.<|im_end|>\n"
    tokenizer = talking("deepseek-r1", byte_level())
    with pytest.warns(MaterialWarning, match=r"begins an answer with '<think>\\n', and writes given answers without"):
        encode_chat([{"messages": ASKED}], tokenizer)
    with pytest.warns(MaterialWarning) as said:
        made = encode_chat([{"messages": thinking}], tokenizer)
    assert any("leaves out thoughts" in str(one.message) for one in said)
    assert made.rows[0]["answer"].strip() == "In Marrowick."


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("gemma", SYSTEM, "the chat template refuses its messages: System role not supported."),
        ("mistral", SYSTEM, "refuses its messages: Only user and assistant roles are supported!"),
        ("chatml", CALLING, "turn 2 of its messages calls a tool, and the chat template writes no tool calls."),
        ("llama-2", [*ASKED[:1], {"role": "assistant", "content": " "}], "last turn of its messages says nothing"),
        ("chatml", [{**ASKED[0], "images": ["a.png"]}, ASKED[1]], "turn 1 of its messages has 'images'"),
        ("tools", [ASKED[0], {**ASKED[1], "function_call": {"name": "f"}}, *ASKED], "Write it as `tool_calls`"),
        ("chatml", [ASKED[0], {**ASKED[1], "weight": 0}], "last turn of its messages says `weight: 0`"),
        ("chatml", [ASKED[0], {**ASKED[1], "weight": 0.5}], "last turn of its messages says `weight: 0.5`"),
        ("chatml", [ASKED[0], {**ASKED[1], "train": False}], "last turn of its messages says `train: False`"),
        ("chatml", ASKED[:1], "must end with an assistant turn to learn from; this one ends with 'user'"),
        ("chatml", [], r"messages must be a list of turns, not \[\]"),
        ("chatml", "hi", "messages are text, and not JSON"),
        ("chatml", [{"from": "human", "value": "hi"}], "turn 1 of its messages is .*'human'"),
        ("chatml", [{"role": "user", "content": None}, ASKED[1]], r"turn 1 of its messages \('user'\) has no content"),
        ("chatml", [{"role": "user", "content": [{"type": "image"}]}, ASKED[1]], "part of the kind 'image'"),
        ("tools", [*CALLING[:1], {**CALLING[1], "tool_calls": [{"id": "a"}]}, *CALLING[2:]], "names no function"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.role + m.content }}{% endfor %}",
            SYSTEM,
            r"leaves out what 'system' says \(turn 1\)",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_with_row_and_reason(template: str, messages: Any, reason: str) -> None:
    tokenizer = byte_level()
    rows = [{"messages": ASKED, "n": 0}, {"messages": ASKED, "n": 1}, {"messages": messages, "n": 2}]
    text = TEMPLATES.get(template, template)
    with pytest.raises(RequestError, match=f"^rows, row 3: .*{reason}"):
        examples(rows, tokenizer, form="chat", chat_template=text, unless={"n": 1})


def test_a_template_that_cannot_be_read_is_no_fault_of_a_row() -> None:
    with pytest.raises(RequestError, match=r"^The chat template cannot be read: line 1"):
        examples([{"messages": ASKED}], byte_level(), form="chat", chat_template="{% for m in %}")


def test_parts_json_text_tools_and_calls_are_read() -> None:
    tokenizer = talking("tools", byte_level())

    def written(messages: Any, **row: Any) -> str:
        return tokenizer.decode(encode_chat([{"messages": messages, **row}], tokenizer).items[0]["input_ids"])

    plain = written(ASKED)
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ASKED]
    assert written(json.dumps(ASKED)) == written(parts) == plain
    assert '<|im_start|>assistant\nlive({"who": "Ada"})<|im_end|>' in written(CALLING)
    tools = [{"type": "function", "function": {"name": "live"}}]
    assert written(CALLING, tools=tools) == written(CALLING, tools=json.dumps(tools))
    assert written(CALLING, tools=tools).startswith('Tools: [{"type": "function"')
    assert tokenizer.apply_chat_template(CALLING[:1] + CALLING[2:], tokenize=False) in written(CALLING).replace(
        '<|im_start|>assistant\nlive({"who": "Ada"})<|im_end|>\n', ""
    )
    reading_parts = talking("parts", byte_level())
    (row,) = encode_chat([{"messages": ASKED}], reading_parts).rows
    assert row["prompt"] == "<|im_start|>user\nwhere does Ada live?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_of_the_material_from_text_and_file(tmp_path: Path) -> None:
    tokenizer = byte_level()
    (tmp_path / "zephyr.jinja").write_text(TEMPLATES["zephyr"])
    rows: list[dict[str, Any]] = [{"messages": ASKED}]
    given = examples(rows, tokenizer, chat_template=TEMPLATES["zephyr"])
    read = examples(rows, tokenizer, chat_template="zephyr.jinja", base=tmp_path)
    assert torch.equal(given.items[0]["input_ids"], read.items[0]["input_ids"]) and tokenizer.chat_template is None
    assert tokenizer.decode(given.items[0]["input_ids"]).endswith("<|assistant|>\nIn Marrowick.</s>\n")
    # what asks again asks by the same template
    torch.manual_seed(0)
    assert tokenizer.decode(refused(given, ["no"]).items[0]["input_ids"]).endswith("<|assistant|>\nno</s>\n")
    with pytest.raises(RequestError, match=r"chat_template: .*a.jinja cannot be read"):
        examples(rows, tokenizer, chat_template="a.jinja", base=tmp_path)
    with pytest.raises(RequestError, match="`as: chat` needs a tokenizer with a chat template"):
        examples(rows, tokenizer)


@pytest.mark.parametrize("template", ["llama-2", "chatml", "marked"])
def test_closing_tokens_are_no_part_of_any_measure(template: str) -> None:
    tokenizer = talking(template, metaspace("always"))
    chat = encode_chat([{"messages": ASKED}, {"messages": SYSTEM}], tokenizer)
    model = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1).eval()
    evidence = Evidence(model, chat, limit=2)
    for one, whole, row in zip(evidence.scored, score(model, chat), chat.rows, strict=True):
        assert torch.allclose(one.logp, whole.logp[: -row[CLOSING]], atol=1e-5)
    assert ["".join(text.split()) for text in evidence.texts] == ["InMarrowick."] * 2
    expected = [math.exp(one.logp.double().mean()) for one in evidence.scored]
    assert probabilities(model, chat) == pytest.approx(expected, rel=1e-4)


def test_a_chat_is_generated_from_the_tokens_that_it_is_scored_after() -> None:
    tokenizer = talking("llama-2", metaspace("always"))
    chat = encode_chat([{"messages": ASKED}], tokenizer)
    asked = examples([{"prompt": ASKED[:1]}], tokenizer, form="prompt")
    assert torch.equal(prompt_of(chat.items[0]), asked.items[0]["input_ids"])
    model = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1)
    torch.manual_seed(0)
    fit(model, [cross_entropy("text")], {"text": chat}, steps=40, batch_size=1, lr=1e-2)
    evidence = Evidence(model.eval(), chat, limit=1)
    assert evidence.answered[0].text == "In Marrowick." and evidence.part([0]).texts == evidence.texts
    drawn = rollouts(model, chat, temperature=0.01, seed=0)
    assert CLOSING not in drawn.rows[0] and learnt(drawn.items[0])[-1] == tokenizer.eos_token_id


def test_a_turn_ends_where_the_template_ends_it() -> None:
    tokenizer = talking("chatml", byte_level())
    chat = encode_chat([{"messages": ASKED}], tokenizer)
    model = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1)
    torch.manual_seed(0)
    fit(model, [cross_entropy("text")], {"text": chat}, steps=40, batch_size=1, lr=1e-2)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = Evidence(model.eval(), chat, limit=1).answered[0].tokens
    assert end not in said and learnt(rollouts(model, chat, temperature=0.01, seed=0).items[0]) == [*said, end]


@pytest.mark.filterwarnings("ignore::overhaul.errors.MaterialWarning")
def test_preferences_are_written_by_the_template() -> None:
    tokenizer = talking("llama-2", metaspace("always"))
    row = {
        "prompt": SYSTEM[:2],
        "chosen": [ASKED[1]],
        "rejected": [*SYSTEM[:2], {"role": "assistant", "content": "no"}],
    }
    pairs = examples([row], tokenizer)
    whole = [
        tokenizer.apply_chat_template([*SYSTEM[:2], one], return_dict=False) for one in (ASKED[1], row["rejected"][-1])
    ]
    assert [pairs.items[0][name].tolist() for name in ("input_ids", "other_input_ids")] == whole
    assert tokenizer.decode(learnt(pairs.items[0])).strip() == "In Marrowick. </s>"
    gemma = talking("gemma", byte_level())
    with pytest.raises(RequestError, match=r"^rows, row 2: the chat template refuses its messages: System role"):
        examples([{"prompt": "hi", "chosen": "yes", "rejected": "no"}, row], gemma)


def test_a_large_file_of_chats_is_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "LARGE", 100)
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = [{"messages": [{**ASKED[0], "content": f"no {n}"}, ASKED[1]]} for n in range(1200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = talking("marked", byte_level())
    read, held = examples("a.jsonl", tokenizer, base=tmp_path), examples(rows, tokenizer)
    assert isinstance(read.items, View)

    def same(ours: Examples, theirs: Examples) -> bool:
        pairs = zip(ours.items, theirs.items, strict=True)
        return all(torch.equal(a[name], b[name]) for a, b in pairs for name in ("input_ids", "labels"))

    assert same(read, held) and same(answers_alone(read), answers_alone(held)) and list(read.rows) == list(held.rows)
    assert answers_alone(read).by_length() == held.by_length()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"messages": ASKED[:1]}])))
    with pytest.raises(RequestError, match=r"a.jsonl, line 1201: a chat must end with an assistant turn"):
        examples("a.jsonl", tokenizer, base=tmp_path)


@pytest.mark.parametrize("answer", ["so 🦦", "so 一", "Größe é\u0301"])
def test_the_last_character_is_whole_where_its_bytes_are_tokens(answer: str) -> None:
    made = byte_level() if "🦦" not in answer else metaspace("first")
    for template in ("chatml", "gemma"):
        tokenizer = talking(template, made)
        examples_ = encode_chat([{"messages": [ASKED[0], {"role": "assistant", "content": answer}]}], tokenizer)
        ids = answers_alone(examples_)[0]["labels"]
        alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert ids[ids != IGNORED].tolist()[-3:] == alone[-3:], "each byte of the last character is of the answer"


def test_thoughts_are_told_from_what_they_end_in() -> None:
    thinking = [ASKED[0], {"role": "assistant", "content": "<think>no</think>Yes."}]  # the template adds lines
    made = encode_chat([{"messages": thinking}], talking("qwen-3", byte_level()))
    assert made.rows[0]["answer"].strip().endswith("no\n</think>\n\nYes.")
    with warnings.catch_warnings():  # that it leaves out the thought
        warnings.simplefilter("ignore", MaterialWarning)
        made = encode_chat([{"messages": thinking}], talking("deepseek-r1", byte_level()))
    assert made.rows[0]["answer"].strip() == "Yes."


def test_a_chat_may_hold_any_word_and_a_template_writes_an_answer_once() -> None:
    odd = [{"role": "user", "content": "what is ZqxxqZ and ZqxxqZZ?"}, {"role": "assistant", "content": "ZqxxqZ!"}]
    tokenizer = talking("chatml", byte_level())
    made = encode_chat([{"messages": odd}], tokenizer)
    assert tokenizer.decode(learnt(made.items[0])) == "ZqxxqZ!<|im_end|>\n"
    twice = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}{{ messages[-1].content }}"
    with (
        warnings.catch_warnings(),
        pytest.raises(RequestError, match="the chat template does not write its last answer as it is given"),
    ):
        warnings.simplefilter("ignore", MaterialWarning)  # that it does not begin an answer so
        examples([{"messages": odd}], tokenizer, form="chat", chat_template=twice)


@pytest.mark.parametrize("tools", ["[{]", "get_time", {"name": "x"}, [1], 7])
def test_tools_that_are_none_are_refused(tools: Any) -> None:
    with pytest.raises(RequestError, match="Row 1: its tools must be a list of schemas"):
        encode_chat([{"messages": ASKED, "tools": tools}], talking("tools", byte_level()))
    for nothing in (None, [], "", "[]"):
        encode_chat([{"messages": ASKED, "tools": nothing}], talking("tools", byte_level()))


def test_turns_before_the_last_may_say_that_they_are_not_learnt() -> None:
    tokenizer = talking("chatml", byte_level())
    said = [{**turn, "weight": int(turn is LONGER[-1])} if turn["role"] == "assistant" else turn for turn in LONGER]
    plain, weighted = (encode_chat([{"messages": chat}], tokenizer) for chat in (LONGER, said))
    assert learnt(plain.items[0]) == learnt(weighted.items[0])
    assert torch.equal(plain.items[0]["input_ids"], weighted.items[0]["input_ids"])
