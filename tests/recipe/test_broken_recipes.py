"""Recipes that are broken, a hundred and more: `plan` stops each with a sentence that names what to mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from breaking import (
    HEAL,
    NPO,
    Change,
    base_recipe,
    both,
    drop,
    images,
    judge,
    lay_out,
    material,
    merged,
    model,
    npo,
    planned,
    source,
    steps,
    without,
)
from overhaul.errors import RequestError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("broken"))


BROKEN: dict[str, tuple[Change, str]] = {
    # fields
    "a field that no recipe has": (lambda r: r.update(modle="x"), "no field 'modle'"),
    "a device that is not there": (lambda r: r.update(device="cuda:9"), "device"),
    "a seed below zero": (lambda r: r.update(seed=-1), "seed"),
    "a seed beyond 2^63": (lambda r: r.update(seed=2**63), "seed"),
    "a seed in words": (lambda r: r.update(seed="many"), "seed"),
    "a dtype that is none": (lambda r: r.update(dtype="float8"), "dtype 'float8'"),
    "a title that is a list": (lambda r: r.update(title=["a"]), "title"),
    "trust in words": (lambda r: r.update(trust_remote_code="perhaps"), "trust_remote_code"),
    "materials in a list": (lambda r: r.update(materials=["forget"]), "materials"),
    "no steps": (steps(), "no steps"),
    "two methods in a step": (steps({"forget.npo": {}, "shrink.heal": {}}), "a step is"),
    "a step that is a number": (steps(3), "a step is"),
    "knobs in a list": (steps({"forget.npo": ["lr"]}), "the knobs of forget.npo must be a mapping"),
    "true for a number": (npo(batch_size=True), "batch_size=True is not possible"),
    "a batch that takes hours to draw": (npo(batch_size=1e18), "batch_size=1e\\+18 is not possible"),
    "a number that is none": (npo(lr=float("nan")), "lr: nan is no number"),
    # methods and knobs
    "a method that is not there": (steps("forget.nop"), "no method 'forget.nop'"),
    "a name of two methods": (steps("dpo"), "'dpo' may be"),
    "a knob that is not there": (npo(bta=1), "no knob 'bta'"),
    "a rate below zero": (npo(lr=-1), "lr=-1 is not possible"),
    "a rate in words": (npo(lr="fast"), "lr='fast' is not possible"),
    "steps of a half": (npo(steps=1.5), "steps=1.5 is not possible"),
    "a schedule that is none": (npo(schedule="zigzag"), "schedule='zigzag' is not possible"),
    "a knob that must be given": (steps("shrink.drop_layers"), "say how many blocks are to go"),
    "more blocks than there are": (steps(drop(9)), "count=9"),
    "as many blocks as there are": (steps(drop(4)), "count=4"),
    "more blocks than an earlier step leaves": (steps(drop(2), drop(2)), "Step 2.*count=2"),
    "a window wider than the stack": (steps(drop(4, criterion="window", keep_first=False)), "at least one must stay"),
    "a criterion without examples": (without("text", steps(drop(1))), "the role `text` is missing"),
    "what stays is missing": (without("retain", npo()), "the role `retain` is missing"),
    "what is watched is missing": (
        without("retain", npo(retain_term="none", retain_drop=0.1)), "retain_drop=0.1 watches the role `retain`"
    ),
    "no teacher": (steps({"shrink.heal": {"target": "teacher"}}), "no `teacher` is given"),
    "a teacher with other words": (
        both(material("teacher", {"model": "wide"}), steps({"shrink.heal": {"target": "teacher"}})),
        "the teacher has 96 outputs and the model 64",
    ),
    "a teacher that reads images": (
        both(material("teacher", {"model": "vit"}), steps({"shrink.heal": {"target": "teacher"}})),
        "The model 'teacher'.*'text' holds tokens, which ViTForImageClassification does not take",
    ),
    "another model that reads images": (
        both(material("other", {"model": "vit"}), steps("inspect.layer_map")), "The model 'other'.*does not take"
    ),
    "refusals beyond the context": (
        both(npo(), steps({"forget.dpo": {"steps": 2, "refusals": ["a" * 200]}})), "ends at 128 positions"
    ),
    "a teacher that is data": (
        steps({"shrink.heal": {"target": "teacher", "teacher": "text"}}), "teacher reads a model, but the material 'text'"
    ),
    "data that is a model": (both(material("text", {"model": "tuned"}), steps(HEAL)), "text reads data, but"),
    "the model is named": (npo(model="tuned"), "'model' is the model that the step before hands on"),
    "a role read from nowhere": (npo(retain="retian"), "'retian'.*Did you mean 'retain'"),
    "more shards than examples": (
        both(material("full", ["retain"]), steps({"forget.sisa": {"shards": 50}})), "shards"
    ),
    "levels by a column that is not there": (
        steps({"inspect.depth_use": {"text": "retain", "by": "level"}}), "no column 'level'"
    ),
    "text too short to look ahead in": (
        steps({"inspect.depth_use": {"text": "retain", "stride": 100}}), "no example is long enough"
    ),
    "blocks that read all before them": (
        steps({"rewire.attention_residuals": {"steps": 0}}, "inspect.depth_use"),
        "Step 2, inspect.depth_use.*attention_residuals",
    ),
    "preferences without pairs": (steps({"align.dpo": {"preferences": "retain"}}), "must be prompts with a chosen"),
    "prompts without a verifier": (
        both(material("prompts", {"from": "tasks.jsonl", "as": "prompt"}), steps({"align.rlvr": {"steps": 2}})), "verify"
    ),
    "prompts to which nobody knows how long an answer is": (
        both(
            material("prompts", {"from": "tasks.jsonl", "as": "prompt", "verify": "exact"}),
            steps({"align.rlvr": {"steps": 2, "batch_size": 2}}),
        ),
        "how long one may be",
    ),
    "answers drawn from images": (images("pictures.jsonl", {"align.rlvr": {"prompts": "text"}}), "prompts"),
    # what only forgetting knows
    "forgotten and kept": (material("retain", {"from": "people.jsonl"}), "are in `forget` and in `retain`"),
    "everything is forgotten": (
        both(material("full", {"from": "people.jsonl", "where": {"person": "a"}}), steps("forget.ssd")),
        "contains the whole training set",
    ),
    "most is forgotten": (
        both(
            material("full", {"from": "people.jsonl", "limit": 3}),
            material("forget", {"from": "people.jsonl", "limit": 2}),
            without("retain", steps("forget.ssd")),
            judge(),
        ),
        "are to be forgotten. When more than half",
    ),
    "nothing to hold against": (without("retain", steps("forget.ssd")), "needs the material 'full' or 'retain'"),
    # merges
    "merged with another width": (merged("merge.ties", "wide"), "wide"),
    "merged with another depth": (merged("merge.ties", "deep"), "deep"),
    "merged with other words": (merged({"merge.task_arithmetic": {}}, "other-words"), "number 2 words differently"),
    "one model and no alpha": (merged("merge.lines", "tuned"), "alpha has to be given"),
    "two models and no beta": (merged("merge.lines", "tuned", "llama"), "beta has to be given"),
    "ties among other shapes": (merged({"merge.lines": {"alpha": 0.5, "merge": "ties"}}, "wide"), "wide"),
    "weights for others": (
        merged({"merge.task_arithmetic": {"weights": [1, 1]}}, "tuned"), "1 tuned checkpoints and 2 weights"
    ),
    "a merge of nothing": (merged({"merge.task_arithmetic": {"scale": 0}}, "tuned"), "would change nothing"),
    "a density of nothing": (merged({"merge.ties": {"density": 0}}, "tuned"), "density=0 is not possible"),
    "no tuned model": (both(merged("merge.ties", "tuned"), without("tuned")), "needs a model 'tuned'"),
    "a list of no models": (both(merged("merge.ties", "tuned"), material("tuned", [])), "'tuned' is an empty list"),
    "a tuned model without weights": (merged("merge.ties", "no-weights"), "no-weights holds no"),
    "a tuned model that lost a shard": (merged("merge.ties", "lost-shard"), "lacks"),
    "a tuned model that is cut short": (merged("merge.ties", "cut-short"), "cut short"),
    "a tuned model with another config": (merged("merge.ties", "narrow"), "narrow"),
    # files of rows
    "a file that is not there": (source("nowhere.jsonl"), "nowhere.jsonl does not exist"),
    "a file outside": (source("../people.jsonl"), r"../people.jsonl does not exist"),
    "a data set of the hub": (source("owner/name"), "'owner/name' is no file here"),
    "a folder of nothing": (source("folder"), "folder is empty"),
    "a file of another kind": (source("strange.xyz"), ".xyz"),
    "an empty file": (source("empty.jsonl"), "empty.jsonl is empty"),
    "a line that is no JSON": (source("broken.jsonl"), "broken.jsonl, line 3"),
    "lines that are no objects": (source("numbers.jsonl"), "numbers.jsonl, line 1"),
    "a mapping for rows": (source("mapping.json"), "mapping.json"),
    "a starter that is none": (source("starter:doks"), "no starter data 'doks'"),
    "a split that is none": (source("starter:people", split="test"), "no split 'test'"),
    "columns that tell nothing": (source("other.jsonl"), "do not tell what it is"),
    "columns of another form": (source("people.jsonl", **{"as": "preference"}), "no column 'prompt'"),
    "a form that is none": (source("people.jsonl", **{"as": "question"}), "no form 'question'"),
    "a column under a name that is none": (
        source("people.jsonl", columns={"answer": "solution"}, **{"as": "qa"}), "no column 'solution'"
    ),
    # options of rows
    "an option that is none": (source("people.jsonl", wher={}), "no option 'wher'"),
    "a filter by no column": (source("people.jsonl", where={"name": "a"}), "no column 'name'"),
    "nothing is left": (source("people.jsonl", where={"person": "q"}), "none of its 6 rows is left"),
    "a value in other letters": (
        source("people.jsonl", where={"person": "A"}, unless={"person": ["b"]}),
        r"is left after `where: {person: A}, unless: {person: \[b\]}`. Filters compare whole values; "
        "a list means any of them. Known: a, b, c",
    ),
    "all is left out": (source("people.jsonl", unless={"person": list("abcdef")}), "none of its 6 rows is left"),
    "a limit of none": (source("people.jsonl", limit=0), "limit"),
    "pieces too short": (source("text.jsonl", length=4), "length"),
    "pieces longer than the context": (source("text.jsonl", length=200), "Write `length: 128`"),
    "a question longer than the context": (source("long.jsonl"), "'text' has an example of"),
    "an answer of blanks": (source("blank.jsonl"), "line 3: .answer. is empty"),
    "a preference for nothing": (
        both(material("preferences", {"from": "pairs.jsonl"}), steps({"align.dpo": {"steps": 2}})),
        "line 1: .rejected. is empty",
    ),
    "a text of nothing": (source("nothing.jsonl"), "no example is left"),
    "braces that do not close": (source("people.jsonl", prompt="{question"), "prompt"),
    "a verifier that is none": (source("tasks.jsonl", verify="gsm9k", **{"as": "prompt"}), "no verifier 'gsm9k'"),
    "a verifier without its column": (
        source("chats.jsonl", verify="gsm8k", columns={"prompt": "messages"}, **{"as": "prompt"}), "no column 'answer'"
    ),
    "a chat without a template": (source("told.jsonl"), "chat template"),
    "a template that divides by zero": (source("told.jsonl", chat_template="{{ 1/0 }}"), "refuses its messages: division"),
    "a template without end": (
        source("told.jsonl", chat_template="{% for n in range(999999999) %}x{% endfor %}"), "Range too big"
    ),
    "a chat without an answer": (model("chatting", source("chats.jsonl")), "assistant"),
    "text and images in one": (
        both(material("text", [{"from": "text.jsonl"}, {"from": "pictures.jsonl"}]), steps(HEAL)), "cannot mix"
    ),
    # names of materials
    "a material that says nothing": (material("text", 3), "'text' must say where it comes from"),
    "a material that includes a later one": (material("text", ["late"]), "includes 'late', which is not a material above"),
    "a product of no step": (both(material("text", {"made": "npo", "name": "kept"}), steps(HEAL)), "no step before"),
    "a product of no step that nobody reads": (
        material("kept", {"made": "pretrain.recycle", "name": "kept"}), "'kept' is made by 'pretrain.recycle'"
    ),
    "a product without a name": (material("text", {"made": "forget.npo"}), "must say which product"),
    "a product that is not made": (
        both(material("text", {"made": "npo", "name": "kept"}), steps(NPO, HEAL)), "makes no 'kept'"
    ),
    "after a step that is none": (material("uncut", {"after": "shrink.heal"}), "is no step"),
    "after a step that comes later": (
        both(material("teacher", {"after": "npo"}), steps({"shrink.heal": {"target": "teacher"}}, NPO)), "before that"
    ),
    # models
    "no such model": (model("nowhere/"), "does not exist"),
    "a model without config": (model("no-config"), "no config.json"),
    "a config that is no JSON": (model("no-json"), "not valid JSON"),
    "a model of no class": (model("no-class"), "names no `architectures`"),
    "a model of a strange class": (model("strange-class"), "LlamaForEverything"),
    "a config with fewer layers": (model("shallow"), "a model without that block"),
    "a config with other widths": (model("narrow"), "config.json describes"),
    "a config without heads": (model("other-heads"), "config.json"),
    "a config with words for numbers": (model("wrong-type"), "config.json"),
    "a model without weights": (model("no-weights"), "holds no"),
    "pickled weights": (model("pickled"), "pickled weights"),
    "weights cut short": (model("cut-short"), "cut short"),
    "weights without a header": (model("no-header"), "damaged"),
    "a shard that is lost": (model("lost-shard"), "lacks"),
    "a tensor that is lost": (model("lossy"), "the weights lack 1 tensors.*layers.1.mlp.up_proj"),
    "a teacher that lost a tensor": (
        both(material("teacher", {"model": "lossy"}), steps({"shrink.heal": {"target": "teacher"}})),
        "lossy: the weights lack",
    ),
    "a tuned model that lost a tensor": (merged("merge.ties", "lossy"), "up_proj"),
    "rows that lack a column": (source("ragged.jsonl"), "answer"),
    "a column that is not in every row": (source("people.jsonl", prompt="{name}: {question}"), "name"),
    "a model with an adapter beside": (model("adapted"), "adapter"),
    "text for a model without words": (model("no-words"), "has no tokenizer"),
    "a tokenizer that lacks a file": (model("half-words"), "the tokenizer cannot be read"),
    "words that the model has not": (model("few-words"), "the tokenizer has 60 tokens but the model only 32"),
    # heads
    "images for a language model": (both(source("pictures.jsonl"), judge()), "'text' holds images, which LlamaForCausalLM"),
    "text for an image model": (model("vit"), "has no tokenizer"),
    "images of another size": (images("wide.jsonl"), "'text' holds images, which ViTForImageClassification"),
    "a label beyond the classes": (images("eleven.jsonl"), "line 3: .label. is 11"),
    "a label below the classes": (images("negative.jsonl"), "line 2: .label. is -1"),
    "labels in words": (images("words.jsonl"), "cat"),
    "a model that says nothing": (model("headless", judge(kept={"perplexity": "text"}), steps(drop(1))), "has no head"),
    # judge
    "a judge without metrics": (judge(kept=["accuracy"]), "judge"),
    "a group that is none": (judge(forgoten={"accuracy": "forget"}), "no group 'forgoten'"),
    "a metric that is none": (judge(kept={"acuracy": "retain"}), "no metric 'acuracy'"),
    "a limit on a metric that is none": (judge(kept={"speed": {"on": "retain", "at_least": 1}}), "no metric 'speed'"),
    "a metric on no material": (judge(kept={"accuracy": "retian"}), "Did you mean 'retain'"),
    "a metric twice": (judge(forgotten={"rouge": "forget"}, kept={"rouge": "forget"}), "named twice"),
    "bits per byte of questions": (judge(kept={"bits_per_byte": "retain"}), "reads text, but 'retain' holds answers"),
    "accuracy of text": (judge(kept={"accuracy": "text"}), "'text' holds text"),
    "an attack on one role": (judge(forgotten={"membership": "forget"}), "members"),
    "an attack on itself": (judge(forgotten={"membership": {"members": "forget", "others": "forget"}}), "with itself"),
    "groups by no column": (judge(kept={"accuracy": {"on": "retain", "by": "region"}}), "`by: region`"),
    "an anchor that is none": (judge(kept={"accuracy": {"on": "retain", "anchor": "bsae"}}), "anchor 'bsae'"),
    "a limit in words": (judge(kept={"accuracy": {"on": "retain", "at_least": "much"}}), "`at_least` must be a number"),
    "limits that exclude each other": (
        judge(kept={"accuracy": {"on": "retain", "at_least": 0.9, "at_most": 0.1}}), "at least 0.9 and at most 0.1"
    ),
    "an option that no metric has": (judge(kept={"accuracy": {"on": "retain", "k": 3}}), "'k'"),
    "no tries": (judge(kept={"pass_at_k": {"on": "retain", "k": 0}}), "k=0 is not possible"),
    "a truth ratio without wrong answers": (judge(forgotten={"truth_ratio": "forget"}), "'wrong'"),
    "prompts that no verifier can judge": (
        both(
            material("asked", {"from": "pairs.jsonl", "as": "prompt"}), judge(kept={"accuracy": "asked"}),
        ),
        "reads the column 'answer'",
    ),
    "tries that no verifier can judge": (
        both(material("asked", {"from": "pairs.jsonl", "as": "prompt"}), judge(kept={"pass_at_k": "asked"})),
        "reads the column 'answer'",
    ),
    "wrong answers beyond the context": (
        both(material("asked", {"from": "wrong.jsonl"}), judge(forgotten={"truth_ratio": "asked"})),
        "ends at 128 positions",
    ),
    "paraphrases beyond the context": (
        both(material("asked", {"from": "wrong.jsonl"}), judge(forgotten={"paraphrase_probability": "asked"})),
        "ends at 128 positions",
    ),
    "an anchor that reads images": (
        both(material("other", {"model": "vit"}), judge(kept={"perplexity": {"on": "text", "anchor": "other"}})),
        "The model 'other'.*does not take",
    ),
    "an anchor that says nothing": (
        both(material("other", {"model": "headless"}), judge(kept={"perplexity": {"on": "text", "anchor": "other"}})),
        "The model 'other'.*no output head",
    ),
    "quality against nobody": (judge(forgotten={"forget_quality": "forget"}), "retrained"),
    "an anchor with fewer words": (
        both(material("retrained", {"model": "few-words"}), judge(forgotten={"answer_probability": "forget"})),
        "beyond the 32 of the retrained model",
    ),
}  # fmt: skip


def test_the_recipe_is_in_order_before_it_is_broken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(base_recipe(place), monkeypatch, place)
    assert len(BROKEN) >= 100


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_stopped_by_plan(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = base_recipe(place)
    change, said = BROKEN[name]
    change(recipe)
    with pytest.raises(RequestError, match=f"(?s){said}") as caught:
        planned(recipe, monkeypatch, place)
    assert len(str(caught.value)) < 1000
