"""Models with other tokenizers: rows go by their words, whatever their numbers, and a union knows the words of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_llama
from overhaul import models, session
from overhaul.errors import RequestError
from overhaul.merge.breadcrumbs import breadcrumbs
from overhaul.merge.dare import dare
from overhaul.merge.della import della
from overhaul.merge.slerp import slerp
from overhaul.merge.wise_ft import wise_ft
from overhaul.weights import one_vocabulary, pieces, stream
from overhaul.weights.vocabularies import Rule, Vocabulary
from tiny_checkpoints import same_bits, tensors

MARKS = ["<pad>", "<s>", "</s>", "<unk>"]
BASE = [*MARKS, "ada", "lives", "in", "marrowick"]
OTHER = [*MARKS, "in", "marrowick", "likes", "ada", "tea"]
THIRD = ["tea", *MARKS, "ada", "cake"]
ROWS = {"base": 10, "other": 9, "third": 12}
"""Two rows of the base and five of the third are of no word."""


def tokenizer(words: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole: Any = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def three(folder: Path, tied: bool = False) -> list[Path]:
    made: list[Path] = []
    for seed, (name, words) in enumerate({"base": BASE, "other": OTHER, "third": THIRD}.items()):
        torch.manual_seed(seed)
        model = tiny_llama(vocab_size=ROWS[name], tie_word_embeddings=tied)
        made.append(models.save(model, tokenizer(words), folder / name))
    return made


def rows(folder: Path, words: Sequence[str], name: str) -> dict[str, Tensor]:
    held = tensors(folder)[name]
    return {word: held[n] for n, word in enumerate(words)}


def filled(word: str, own: dict[str, Tensor], base: dict[str, Tensor], every: Sequence[dict[str, Tensor]]) -> Tensor:
    """mergekit's rule for a model's row of a word."""
    if word in own:
        return own[word]
    if word in base:
        return base[word]
    return torch.stack([one[word] for one in every if word in one]).mean(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["base", "union"])
def test_rows_go_by_their_words(mode: Any, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other, third = three(tmp_path, tied)
    done = dare(
        base, [other, third], density=1.0, scale=0.5, tokenizer=mode, out=tmp_path / "out"
    )  # fmt: skip
    made = tensors(done.model)
    words = [*BASE, *["likes", "tea", "cake"] * (mode == "union")]
    told = AutoTokenizer.from_pretrained(done.model)
    assert [told.convert_ids_to_tokens(n) for n in range(len(words))] == words
    size = 11 if mode == "union" else 10
    assert AutoModelForCausalLM.from_pretrained(done.model).config.vocab_size == size
    for name in ["model.embed_tokens.weight", *["lm_head.weight"] * (not tied)]:
        every = [rows(base, BASE, name), rows(other, OTHER, name), rows(third, THIRD, name)]
        assert made[name].shape == (size, 32)
        for number, word in enumerate(words):
            b, o, t = (filled(word, one, every[0], every) for one in every)
            assert torch.allclose(made[name][number], b + 0.5 * (o - b) + 0.5 * (t - b), atol=1e-6), word
        if mode == "base":
            assert torch.equal(made[name][8:], tensors(base)[name][8:]), "rows of no word are the base's"
    inside = "model.layers.1.mlp.up_proj.weight"
    b, o, t = (tensors(path)[inside] for path in (base, other, third))
    assert torch.allclose(made[inside], b + 0.5 * (o - b) + 0.5 * (t - b), atol=1e-6)
    monkeypatch.setattr(pieces, "PIECE", 70)
    again = dare(base, [other, third], density=1.0, scale=0.5, tokenizer=mode, out=tmp_path / "again").model
    assert same_bits(tensors(again), made)


@pytest.mark.parametrize("method", [wise_ft, slerp])
def test_a_word_that_one_model_alone_knows_is_taken_from_it(method: Any, tmp_path: Path) -> None:
    base, other, _ = three(tmp_path)
    done = method(base, other, scale=0.5, tokenizer="union", out=tmp_path / "out")
    name = "model.embed_tokens.weight"
    made, theirs, ours = tensors(done.model)[name], rows(other, OTHER, name), rows(base, BASE, name)
    if method is wise_ft:
        assert torch.equal(made[8], theirs["likes"]) and torch.equal(made[9], theirs["tea"])
        assert torch.allclose(made[5], ours["lives"]), "the other model lacks it"
        assert torch.allclose(made[6], (ours["in"] + theirs["in"]) / 2)
    opened: Any = models.open_model(done.model)
    model, told = opened
    said = model.generate(told("ada likes tea", return_tensors="pt").input_ids, max_new_tokens=3, pad_token_id=0)
    assert told("likes").input_ids == [8] and said.shape[1] > 3


def test_ranks_and_rows_see_the_words_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same merge of models that were brought to one vocabulary by hand."""
    base, other, _ = three(tmp_path)
    held = tensors(other)
    moved: Any = tiny_llama(vocab_size=10, tie_word_embeddings=False)
    moved.load_state_dict({name: one for name, one in held.items() if one.shape[0] != 9}, strict=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, theirs = rows(base, BASE, name), rows(other, OTHER, name)
        new = torch.stack([theirs.get(word, ours[word]) for word in BASE])
        with torch.no_grad():
            moved.get_parameter(name).copy_(torch.cat([new, tensors(base)[name][8:]]))
        assert held[name].shape[0] == 9
    by_hand = models.save(moved, tokenizer(BASE), tmp_path / "by hand")
    for method, knobs in ((breadcrumbs, {"density": 0.3}), (della, {"rescale": "norm"}), (dare, {"rescale": "norm"})):
        call: Any = method
        expected = tensors(call(base, [by_hand], **knobs, out=tmp_path / f"{call.__name__}-hand").model)
        monkeypatch.setattr(pieces, "PIECE", 70)
        made = call(base, [other], **knobs, tokenizer="base", out=tmp_path / f"{call.__name__}-base").model
        monkeypatch.undo()
        assert all(torch.allclose(one, expected[name], atol=1e-6) for name, one in tensors(made).items()), method


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    base, other, _ = three(tmp_path)
    with (
        session.using(planning=True),
        pytest.raises(RequestError, match=r"In a merge, write tokenizer: base \(or union\)"),
    ):
        wise_ft(base, other, out=tmp_path / "out")
    silent = models.save(tiny_llama(vocab_size=10, tie_word_embeddings=False), None, tmp_path / "silent")
    with session.using(planning=True), pytest.raises(RequestError, match=r"silent has no tokenizer.json"):
        wise_ft(base, silent, tokenizer="union", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rule_says_where_a_words_row_comes_from_and_rows_of_no_word_can_go(tmp_path: Path) -> None:
    base, other, third = (models.facts(path) for path in three(tmp_path))
    rules = {
        "ada": Rule(1, OTHER.index("tea"), force=True),
        "lives": Rule(None),
        "new": Rule(2, THIRD.index("cake")),
    }
    for of, words_ in ((None, BASE), (other, OTHER)):
        known = one_vocabulary([base, other, third], Vocabulary(of=of, cut=True, rules=rules))
        done = stream(known, lambda _, held: held[2], tmp_path / f"out{len(words_)}")
        words = [*words_, *(word for word in rules if word not in words_)]
        told = AutoTokenizer.from_pretrained(done)
        assert [told.convert_ids_to_tokens(n) for n in range(len(words))] == words
        name = "model.embed_tokens.weight"
        made = rows(done, words, name)
        assert len(made) == len(tensors(done)[name]) == len(words), "no rows of no word"
        b, o, t = (rows(path.folder, list_, name) for path, list_ in ((base, BASE), (other, OTHER), (third, THIRD)))
        assert torch.equal(made["ada"], o["tea"]) and torch.equal(made["new"], t["cake"]) and not made["lives"].any()
        assert torch.equal(made["in"], b["in"]) and torch.equal(made["tea"] if "tea" in made else t["tea"], t["tea"])
        assert AutoModelForCausalLM.from_pretrained(done).config.vocab_size == len(words)


def test_without_a_favourite_a_row_that_lacks_is_the_mean(tmp_path: Path) -> None:
    base, other, third = (models.facts(path) for path in three(tmp_path))
    known = one_vocabulary([base, other, third], Vocabulary(prefer_first=False))
    done = stream(known, lambda _, held: held[2], tmp_path / "out")
    name = "model.embed_tokens.weight"
    b, o = rows(base.folder, BASE, name), rows(other.folder, OTHER, name)
    assert torch.allclose(tensors(done)[name][BASE.index("in")], (b["in"] + o["in"]) / 2)
