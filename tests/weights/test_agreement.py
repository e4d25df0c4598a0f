"""Checkpoints that differ in names, ties, words or configs: read as their class reads them, said, or refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from overhaul import models, weights
from overhaul.errors import RequestError
from tiny_checkpoints import VISION_LANGUAGE, make, rewrite, same_bits, tensors, two_llamas


def test_facts_that_are_known_already_are_a_source(tmp_path: Path) -> None:
    two = two_llamas(tmp_path)
    known = [models.facts(folder) for folder in two]
    by_facts = weights.blend(known, [0.5, 0.5], tmp_path / "facts")
    assert same_bits(tensors(by_facts), tensors(weights.blend(two, [0.5, 0.5], tmp_path / "folders")))
    assert weights.delta_norms(*known).total == weights.delta_norms(*two).total > 0


# names


def renamed(folder: Path, change: Callable[[str], str], out: Path) -> Path:
    shutil.copytree(folder, out)
    rewrite(out, lambda held: [held.update({change(name): held.pop(name)}) for name in list(held)])
    return out


def reads_alike(folder: Path, other: Path, out: Path) -> None:
    """Whichever comes first, a blend of two spellings of one model is that model after opening."""
    expected = models.open_model(folder)[0].state_dict()
    for number, pair in enumerate(((folder, other), (other, folder))):
        made = weights.blend(pair, [0.5, 0.5], out / str(number))
        opened = models.open_model(made)[0].state_dict()
        assert all(torch.equal(tensor, opened[name]) for name, tensor in expected.items())
        assert weights.delta_norms(*pair).total == 0.0


def test_with_and_without_the_prefix_of_the_body(tmp_path: Path) -> None:
    with_it = make("gpt2", tmp_path / "with", 0)
    reads_alike(with_it, renamed(with_it, lambda name: name.removeprefix("transformer."), tmp_path / "bare"), tmp_path)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("start", ["", "bert."])
def test_berts_with_and_without_their_prefix_and_with_a_buffer_that_is_no_longer_stored(
    kind: str, start: str, tmp_path: Path
) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    model = getattr(transformers, kind)(transformers.BertConfig(num_hidden_layers=2, **sizes))
    today = models.save(model, None, tmp_path / "today")
    heads = ("cls.", "classifier.")
    rename = lambda name: name if name.startswith(heads) else start + name.removeprefix("bert.")  # noqa: E731
    older = renamed(today, rename, tmp_path / "older")
    rewrite(older, lambda held: held.update({f"{start}embeddings.position_ids": torch.arange(512)[None]}))
    reads_alike(today, older, tmp_path)
    assert not any("position_ids" in name for n in "01" for name in tensors(tmp_path / n))


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_old_and_new_names_of_a_vision_language_model(family: str, tmp_path: Path) -> None:
    model: Any = VISION_LANGUAGE[family]()
    as_saved = models.save(model, None, tmp_path / "saved")
    live = tmp_path / "live"
    shutil.copytree(as_saved, live)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert state.keys() != tensors(as_saved).keys(), "the library writes other names than the model has"
    save_file(state, live / "model.safetensors", {"format": "pt"})
    reads_alike(as_saved, live, tmp_path)


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    once = models.save(tiny_llama(tie_word_embeddings=True), None, tmp_path / "once")
    twice = tmp_path / "twice"
    shutil.copytree(once, twice)
    rewrite(twice, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in tensors(once)
    reads_alike(once, twice, tmp_path)


def test_a_head_of_its_own_and_a_tied_one_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tied = models.save(tiny_llama(tie_word_embeddings=True), None, tmp_path / "tied")
    own = models.save(tiny_llama(tie_word_embeddings=False), None, tmp_path / "own")
    for pair in ((tied, own), (own, tied)):
        said = r"lm_head\.weight is a tensor of its own in .*own and is tied .* in .*tied\. Untie"
        with pytest.raises(RequestError, match=said):
            weights.blend(pair, [0.5, 0.5], tmp_path / "out")
    model: Any = models.open_model(tied)[0]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    untied = models.save(model, None, tmp_path / "untied")
    assert (weights.blend([untied, own], [0.5, 0.5], tmp_path / "out") / "config.json").exists(), "the way out works"


STRANGERS: dict[str, tuple[Callable[[], Any], str]] = {
    "architecture": (tiny_gpt2, r" is a .*, .* a .*\. Give checkpoints of one architecture\.$"),
    "depth": (
        lambda: tiny_llama(num_hidden_layers=3),
        r"^num_hidden_layers is .*one size; where sizes may differ, untie",
    ),
    "width": (lambda: tiny_llama(hidden_size=48), r"hidden_size is .*lm_head.*Give checkpoints of one size"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_architecture_or_size_is_said_before_a_tie(stranger: str, tmp_path: Path) -> None:
    make_tied, said = STRANGERS[stranger]
    own = models.save(tiny_llama(tie_word_embeddings=False), None, tmp_path / "own")
    tied = models.save(make_tied(), None, tmp_path / "tied")
    for pair in ((tied, own), (own, tied)):
        with pytest.raises(RequestError, match=said):
            weights.blend(pair, [0.5, 0.5], tmp_path / "out")


# words and configs


def reordered(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    content = json.loads((out / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (out / "tokenizer.json").write_text(json.dumps(content))
    return out


def test_words_numbered_differently_are_refused_unless_asked_for(tmp_path: Path) -> None:
    first = models.save(tiny_llama(), tiny_tokenizer(), tmp_path / "first")
    other = reordered(first, tmp_path / "other")
    said = r"number 2 words differently: \d+ is 'a' in one and 'b' in the other"
    with pytest.raises(RequestError, match=said):
        weights.blend([first, other], [0.5, 0.5], tmp_path / "out")
    weights.blend([first, other], [0.5, 0.5], tmp_path / "any", any_words=True)
    weights.blend([first, other], [0.5, 0.5], tmp_path / "blocks", only={0, 1})
    content = json.loads((first / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(content, indent=4))
    weights.blend([first, other], [0.5, 0.5], tmp_path / "same", dtype="float32")


def test_what_configs_say_differently_is_said(tmp_path: Path) -> None:
    two = two_llamas(tmp_path)
    config = json.loads((two[1] / "config.json").read_text())
    changed = {**config, "num_attention_heads": 2, "transformers_version": "0", "new": {"depth": 1}}
    (two[1] / "config.json").write_text(json.dumps(changed))
    said = weights.differences(two)
    heads = config["num_attention_heads"]
    assert said == [
        f"new.depth is not given in {two[0]} and 1 in {two[1]}",
        f"num_attention_heads is {heads} in {two[0]} and 2 in {two[1]}",
    ]
    with pytest.warns(UserWarning, match=r"the result follows the first: .*num_attention_heads is"):
        weights.blend(two, [0.5, 0.5], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == heads


# what lies beside the weights


def test_an_adapter_beside_the_model_is_not_copied_and_parts_of_sentence_transformers_are(tmp_path: Path) -> None:
    two = two_llamas(tmp_path)
    (two[0] / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    listed = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Dense"}]
    (two[0] / "modules.json").write_text(json.dumps([*listed, {"idx": 2, "name": "2", "path": "../m2"}]))
    (two[0] / "1_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, two[0] / "1_Dense" / "model.safetensors")
    (two[0] / "checkpoint-10").mkdir()
    out = weights.blend(two, [0.5, 0.5], tmp_path / "out")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"1_Dense"}
    assert load_file(out / "1_Dense" / "model.safetensors")["linear.weight"].sum() == 4
    assert not (out / "adapter_config.json").exists()
    models.open_model(out)


# what the result says of itself


def test_a_blend_carries_a_model_card_and_its_lineage(tmp_path: Path) -> None:
    two = two_llamas(tmp_path)
    (two[0] / "README.md").write_text("---\nlicense: apache-2.0\ntags: [mine]\n---\n# One\n")
    (two[1] / "lineage.json").write_text('{"steps": [{"name": "forget.npo"}]}')
    config = json.loads((two[1] / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (two[1] / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="rope_theta is"):
        out = weights.blend(two, [0.25, lambda t: t.share], tmp_path / "out")
    told = json.loads((out / "lineage.json").read_text())
    assert told["steps"][0]["name"] == "weights.blend" and told["steps"][0]["knobs"]["coefficients"][0] == 0.25
    assert [one["source"] for one in told["made_of"]] == [str(folder) for folder in two]
    assert told["made_of"][1]["lineage"]["steps"][0]["name"] == "forget.npo"
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["tags"] == ["overhaul", "merge"]
    assert front["base_model"] == [str(folder) for folder in two]
    assert "rope_theta is 10000.0" in card and "weights.blend" in card


def test_a_blend_with_a_head_of_another_task_opens_as_its_first_model_does(tmp_path: Path) -> None:
    two = two_llamas(tmp_path)
    rewrite(two[0], lambda held: held.update({"score.weight": torch.ones(2, 32)}))
    rewrite(two[1], lambda held: held.update({"score.weight": torch.ones(2, 32)}))
    out = weights.blend(two, [0.5, 0.5], tmp_path / "out")
    with pytest.warns(UserWarning, match=r"also holds score\.weight: heads of other tasks"):
        models.open_model(out)


def test_codes_of_quantised_weights_are_not_counted_with(tmp_path: Path) -> None:
    two = two_llamas(tmp_path)
    config = json.loads((two[1] / "config.json").read_text())
    (two[1] / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RequestError, match="is quantised .*its numbers are codes"):
        weights.blend(two, [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()
