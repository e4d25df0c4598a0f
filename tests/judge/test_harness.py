"""Tasks of lm-evaluation-harness as metrics: lm-eval's own numbers, nothing disturbed, and what is wrong refused before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

import overhaul as oh
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from lm_tasks import CHOICE, directly, write
from lm_tasks import few as few
from overhaul import models
from overhaul.errors import RequestError
from overhaul.judge.judge import anchor_of, broken_limits, check, judge
from overhaul.judge.measure import Measure

ROWS = [
    {"question": f"what says {who}?", "choices": [says, "moo", "a long roar"], "answer": says, "gold": n % 3}
    for n, (who, says) in enumerate(
        {"ada": "baa", "bram": "woof", "cleo": "meow", "dario": "hoot", "edda": "oink"}.items()
    )
]
GENERATE: dict[str, Any] = {
    "output_type": "generate_until", "doc_to_target": "answer",
    "generation_kwargs": {"until": ["?"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}]},
    ],
}  # fmt: skip
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} {{answer}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}  # fmt: skip


CHAT = "{% for t in messages %}{{ t.role }}: {{ t.content }}. {% endfor %}{% if add_generation_prompt %}a: {% endif %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.3)
    return models.save(model, tokenizer, tmp_path_factory.mktemp("saved") / "model", dtype="float32")


@pytest.fixture(scope="module")
def tasks(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of every kind; two of five answers are what the model goes on to say."""
    folder = tmp_path_factory.mktemp("own") / "tasks"
    model, tokenizer = oh.open(saved)
    speaks: Any = model
    for row in ROWS[:2]:
        asked = tokenizer(f"q: {row['question']} a:", return_tensors="pt")
        said = speaks.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
        row["answer"] = tokenizer.decode(said, skip_special_tokens=True).split("?")[0]
    write(folder, "own_choice", ROWS, **CHOICE)
    write(folder, "own_generate", ROWS, **GENERATE)
    write(folder, "own_rolling", ROWS, **ROLLING)
    write(folder, "own_pair_a", ROWS, **CHOICE, tag="own_tag")
    write(folder, "own_pair_b", ROWS, **CHOICE | {"doc_to_text": "{{question}}"}, tag="own_tag")
    both = {"group": "own_group", "task": ["own_pair_a", "own_pair_b"]}
    both["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (folder / "own_group.yaml").write_text(yaml.safe_dump(both))
    return folder


@pytest.fixture
def opened(saved: Path) -> Iterator[tuple[Any, Any]]:
    yield oh.open(saved)


def ours(opened: tuple[Any, Any], tasks: Path, names: Any, group: str = "kept", **options: Any) -> list[Measure]:
    requests = check({group: {"lm_eval": names, "include_path": str(tasks), **options}}, ())
    return judge(opened[0], requests, {}, tokenizer=opened[1]).measures


def numbers(found: Mapping[str, Any], task: str) -> dict[str, tuple[Any, Any]]:
    """Every metric's value and error, under the names that we give."""
    values = found["results"][task]
    said = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values[f"{metric}_stderr,{filtered}"]
            name = metric if filtered == "none" else f"{metric}[{filtered}]"
            said[name] = value, None if error == "N/A" else error
    return said


OPTIONS: list[dict[str, Any]] = [
    {}, {"limit": 3}, {"num_fewshot": 2, "seed": 7}, {"limit": 4, "num_fewshot": 1, "chat": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "none")
def test_the_numbers_are_those_of_lm_eval_on_the_saved_folder(
    options: dict[str, Any], saved: Path, opened: tuple[Any, Any], tasks: Path
) -> None:
    names = ["own_choice", "own_generate", "own_rolling"]
    measures = ours(opened, tasks, names, **options)
    theirs = {key: value for key, value in options.items() if key in ("limit", "num_fewshot")}
    if "seed" in options:
        kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        theirs |= dict.fromkeys(kinds, options["seed"])
    found = directly(saved, tasks, names, apply_chat_template="chat" in options, **theirs)
    said = f"({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
    for name in names:
        own = {one.metric: (one.value, one.stderr) for one in measures if one.on == name}
        assert own == {f"lm_eval{said}.{key}": value for key, value in numbers(found, name).items()}
        assert {one.n for one in measures if one.on == name} == {options.get("limit", len(ROWS))}
    assert len(measures) == 6


def test_each_number_says_what_it_is(opened: tuple[Any, Any], tasks: Path) -> None:
    found = {one.metric.partition(".")[2]: one for one in ours(opened, tasks, ["own_generate", "own_rolling"])}
    assert [(one.unit, one.better) for one in found.values()] == [
        ("share", "up"), ("share", "up"), ("", "down"), ("bits/byte", "down"),
    ]  # fmt: skip
    assert found["exact_match[whole]"].value == 2 / 5, "what the model goes on to say by itself"
    assert found["exact_match[whole]"].stderr == pytest.approx((0.4 * 0.6 / 4) ** 0.5)
    assert found["bits_per_byte"].help.endswith(", 0-shot") and lm_eval.__version__ in found["bits_per_byte"].help


@pytest.mark.usefixtures("few")
def test_a_group_is_one_number_and_a_tag_is_its_tasks(opened: tuple[Any, Any], saved: Path, tasks: Path) -> None:
    (group,) = ours(opened, tasks, "own_group")
    assert (group.on, group.n) == ("own_group", 2 * len(ROWS))
    assert group.value == numbers(directly(saved, tasks, ["own_group"]), "own_group")["acc"][0]
    tag = ours(opened, tasks, {"on": "own_tag", "metric": "acc"})
    assert [(one.metric, one.on) for one in tag] == [
        ("lm_eval.acc", "own_tag / own_pair_a"), ("lm_eval.acc", "own_tag / own_pair_b"),
    ]  # fmt: skip
    assert group.value == pytest.approx(sum(one.value for one in tag) / 2)


def test_what_is_said_beside_holds_for_all_and_what_is_said_of_one_for_it(tasks: Path) -> None:
    beside = {"limit": 3, "include_path": str(tasks)}
    spec = {"learned": {"lm_eval": ["own_choice", {"on": ["own_rolling"], "limit": 2, "at_most": 9}], **beside}}
    first, second = check(spec, ())
    assert (first.task, first.options["limit"], first.at_most) == ("own_choice", 3, None)
    assert (second.task, second.options["limit"], second.at_most) == ("own_rolling", 2, 9)
    assert (first.name, first.on, first.roles) == ("lm_eval(limit=3)", "own_choice", {})
    elsewhere = check({"kept": {"lm_eval": "own_choice", "include_path": "tasks"}}, (), base=tasks.parent)
    assert elsewhere[0].options["include_path"] == str(tasks)


def test_model_tokenizer_and_random_states_are_as_they_were(opened: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = opened
    model.train()
    model.model.layers[0].eval()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # pyright: ignore
    config = model.generation_config.to_dict()
    requests = check({"kept": {"lm_eval": ["own_choice", "own_generate"], "include_path": str(tasks)}}, ())
    judge(model, requests, {}, tokenizer=tokenizer)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]  # pyright: ignore
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.generation_config.to_dict() == config


def test_the_model_is_held_once(
    opened: tuple[Any, Any], tasks: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    held: list[Any] = []
    begins = HFLM.__init__
    monkeypatch.setattr(
        HFLM, "__init__", lambda self, **given: held.append(given["pretrained"]) or begins(self, **given)
    )
    ours(opened, tasks, "own_choice")
    assert len(held) == 1 and held[0] is opened[0]
    assert capfd.readouterr() == ("", "")


def test_limits_hold_for_the_metric_that_is_named_else_for_all(opened: tuple[Any, Any], tasks: Path) -> None:
    def broken(**said: Any) -> list[str]:
        requests = check({"kept": {"lm_eval": {"on": "own_generate", "include_path": str(tasks), **said}}}, ())
        return broken_limits(requests, judge(opened[0], requests, {}, tokenizer=opened[1]).measures)

    assert broken(at_least=0.4, metric="exact_match") == [] or not broken(at_least=0.0)
    assert broken(at_least=0.41)[0] == ("lm_eval.exact_match[whole] on own_generate is 0.4, below its limit of 0.41")


def test_what_is_to_be_forgotten_becomes_as_in_the_retrained_model(opened: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = opened
    requests = check({"forgotten": {"lm_eval": "own_rolling", "include_path": str(tasks)}}, (), anchors=["retrained"])
    torch.manual_seed(9)
    retrained = tiny_llama(num_hidden_layers=2, max_position_embeddings=256).eval()
    anchor = anchor_of(retrained, requests, {}, tokenizer=tokenizer)
    measures = judge(model, requests, {}, anchor=anchor, tokenizer=tokenizer).measures
    alone = judge(retrained, requests, {}, tokenizer=tokenizer).measures
    assert [one.anchor for one in measures] == [one.value for one in alone]
    assert {(one.wanted, one.like) for one in measures} == {("anchor", "retrained")}
    assert {(one.better, one.wanted) for one in alone} == {("down", "up")}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"lm_eval": "own_chioce"}, "no task 'own_chioce'. Did you mean 'own_choice'"),
    "known to nobody": ({"lm_eval": "qqqqqqqq"}, "`lm-eval ls tasks` lists them"),
    "an empty list": ({"lm_eval": []}, "is an empty list"),
    "an empty list inside": ({"lm_eval": {"on": []}}, "is an empty list"),
    "no task": ({"lm_eval": {"limit": 3}}, "names tasks of lm-evaluation-harness"),
    "a number": ({"lm_eval": [3]}, "names tasks of lm-evaluation-harness, not 3"),
    "a limit of 0": ({"lm_eval": "own_choice", "limit": 0}, "limit=0 is not possible"),
    "a negative limit": ({"lm_eval": "own_choice", "limit": -5}, "limit=-5 is not possible"),
    "a share": ({"lm_eval": "own_choice", "limit": 0.5}, "limit=0.5 is not possible"),
    "shots below 0": ({"lm_eval": "own_choice", "num_fewshot": -1}, "num_fewshot=-1 is not possible"),
    "by": ({"lm_eval": {"on": "own_choice", "by": "person"}}, "has no `by`"),
    "an unknown option": ({"lm_eval": {"on": "own_choice", "limt": 3}}, "has no option 'limt'. Did you mean 'limit'"),
    "an unknown option beside": ({"lm_eval": "own_choice", "limt": 3}, "no metric 'limt'"),
    "options without tasks": ({"accuracy": "text", "limit": 3}, "no metric 'include_path'"),
    "twice": ({"lm_eval": ["own_choice", "own_choice"]}, "named twice"),
    "no folder": ({"lm_eval": "own_choice", "include_path": "not/there"}, "'not/there' is no folder"),
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_request_is_refused_in_words(name: str, tasks: Path) -> None:
    spec, said = REFUSED[name]
    with pytest.raises(RequestError) as refused:
        check({"kept": {"include_path": str(tasks), **spec}}, ("text",))
    assert said in str(refused.value)


CODE = "import pathlib\npathlib.Path({!r}).touch()\ndef asked(doc):\n    return 'q: ' + doc['question']\n"
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a column that is not there": (CHOICE | {"doc_to_text": "{{quest}}"}, {}, "'quest' is undefined"),
    "a split that is not there": (CHOICE | {"test_split": "final"}, {}, "cannot be loaded: KeyError: 'final'"),
    "a file that is not there": (
        CHOICE | {"dataset_kwargs": {"data_files": {"test": "lost.jsonl"}}}, {}, "Relative paths start where the command",
    ),
    "no room for an answer": (GENERATE | {"generation_kwargs": None}, {}, "up to 256 tokens, but the model ends at 256"),
    "shots that the task forbids": (CHOICE | {"num_fewshot": 0}, {"num_fewshot": 2}, "without examples by its own setting"),
    "a metric that it has not": (CHOICE, {"metric": "f1"}, "has no metric 'f1'; it has acc, acc_norm"),
    "pictures": (CHOICE | {"doc_to_image": ["question"]}, {}, "text alone"),
}  # fmt: skip


def refused(model: Any, tokenizer: Any, folder: Path, trust: bool = False, **options: Any) -> str:
    with pytest.raises(RequestError) as error:
        given = {"kept": {"lm_eval": "broken", "include_path": str(folder), **options}}
        judge(model, check(given, (), trust=trust), {}, tokenizer=tokenizer)
    return str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_task_is_refused_before_the_model_is_asked(name: str, opened: tuple[Any, Any], tmp_path: Path) -> None:
    task, options, said = BROKEN[name]
    write(tmp_path / "tasks", "broken", ROWS, **task)
    opened[0].forward = None  # whatever asks it fails
    assert said in refused(*opened, tmp_path / "tasks", **options)


def test_code_runs_only_where_it_is_asked_for(opened: tuple[Any, Any], tmp_path: Path) -> None:
    folder, ran = tmp_path / "tasks", tmp_path / "ran"
    write(folder, "broken", ROWS, **CHOICE)
    (folder / "own_code.py").write_text(CODE.format(str(ran)))
    path = folder / "broken.yaml"
    path.write_text(
        path.read_text().replace("doc_to_text: 'q: {{question}} a:'", "doc_to_text: !function own_code.asked")
    )
    assert "!function" in path.read_text()
    assert "trust_remote_code: true" in refused(*opened, folder) and not ran.exists()
    requests = check({"kept": {"lm_eval": "broken", "include_path": str(folder)}}, (), trust=True)
    assert not ran.exists(), "names alone run nothing"
    assert judge(opened[0], requests, {}, tokenizer=opened[1]).measures and ran.exists()
    write(folder, "broken", ROWS, **CHOICE, unsafe_code=True)
    assert "confirm_run_unsafe_code: true" in refused(*opened, folder, trust=True)
    requests = check({"kept": {"lm_eval": "broken", "include_path": str(folder), "confirm_run_unsafe_code": True}}, ())
    assert len(judge(opened[0], requests, {}, tokenizer=opened[1]).measures) == 2
    write(folder, "broken", ROWS, **CHOICE | {"metric_list": [{"metric": "of_the_hub"}]})
    assert "fetched from the hub with its code" in refused(*opened, folder)


def test_a_template_reaches_nothing_but_its_row(opened: tuple[Any, Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    reached = f"{{{{ cycler.__init__.__globals__.os.mkdir('{ran}') }}}}"
    write(tmp_path / "tasks", "broken", ROWS, **CHOICE | {"doc_to_text": reached})
    assert "unsafe" in refused(*opened, tmp_path / "tasks") and not ran.exists()


@pytest.mark.usefixtures("few")
def test_a_file_that_cannot_be_read_is_named_where_its_task_is_not_found(
    tmp_path: Path, opened: tuple[Any, Any]
) -> None:
    (tmp_path / "wrong.yaml").write_text("task: broken\n  x: [")
    assert f"{tmp_path / 'wrong.yaml'} cannot be read" in refused(*opened, tmp_path)


def test_rows_are_found_beside_their_task(
    opened: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tasks", "broken", ROWS, **CHOICE | {"dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}})
    assert ours(opened, tmp_path / "tasks", "broken")[0].n == len(ROWS)


def test_models_that_do_not_write_and_tokenizers_that_cannot_ask_are_refused(
    opened: tuple[Any, Any], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    requests = check({"kept": {"lm_eval": "own_choice", "include_path": str(tasks)}}, ())
    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(RequestError, match="BertModel does not continue text"):
        judge(BertModel(BertConfig(vocab_size=64, **small)), requests, {}, tokenizer=opened[1])
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(RequestError, match="encoder-decoder"):
        judge(t5, requests, {}, tokenizer=opened[1])
    with pytest.raises(RequestError, match="no tokenizer"):
        judge(opened[0], requests, {})
    opened[1].chat_template = None
    spoken = check({"kept": {"lm_eval": "own_choice", "include_path": str(tasks), "chat": True}}, ())
    with pytest.raises(RequestError, match="needs a chat template"):
        judge(opened[0], spoken, {}, tokenizer=opened[1])


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match=r"needs lm-evaluation-harness.*`overhaul\[eval\]` has it"):
        check({"kept": {"lm_eval": "arc_easy"}}, ())


@pytest.mark.slow  # reading lm-eval's index takes ten seconds
def test_lm_evals_own_tasks_are_known_by_name() -> None:
    (request,) = check({"kept": {"lm_eval": "arc_easy", "limit": 100}}, ())
    assert request.name == "lm_eval(limit=100)"
    for name, said in {"helaswag": "Did you mean 'hellaswag'", "humaneval": "`confirm_run_unsafe_code: true`"}.items():
        with pytest.raises(RequestError, match=said):
            check({"kept": {"lm_eval": name}}, ())


def test_what_lm_eval_only_logs_stands_beside_the_number(tmp_path: Path, opened: tuple[Any, Any]) -> None:
    write(tmp_path / "tasks", "broken", ROWS, **CHOICE | {"doc_to_text": "{{question}}" * 40})
    measures = ours(opened, tmp_path / "tasks", "broken", limit=1)
    assert measures[0].help.endswith("; 3 prompts too long for the model, of which the beginning was cut off")
    write(tmp_path / "tasks", "broken", ROWS, **CHOICE | {"doc_to_target": "answer"})
    measures = ours(opened, tmp_path / "tasks", "broken")
    assert measures[0].help.endswith("; 2 rows whose right answer is none of their choices, counted as wrong")


def test_gpt2_is_measured_too(tasks: Path) -> None:
    torch.manual_seed(0)
    assert len(ours((tiny_gpt2(), tiny_tokenizer()), tasks, "own_choice")) == 2
