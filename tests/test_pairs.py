"""Pairs: what does not correspond is refused with both numbers before a weight is read; one model is in memory at a time."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_resnet, tiny_tokenizer
from overhaul.errors import RequestError
from overhaul.models import facts, save
from overhaul.pairs import corresponding, differences


def saved(model: nn.Module, place: Path, tokenizer: Any = None) -> Path:
    return save(model, tokenizer or tiny_tokenizer(), place, dtype="float32")


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3, tiny_qwen3, tiny_resnet])
def test_two_models_of_one_kind_correspond_and_others_do_not(build: Any) -> None:
    pair = corresponding("it", {"base": build(), "post": build()})
    assert list(pair) == ["base", "post"] and pair["base"].facts == pair["post"].facts
    other = tiny_gpt2() if build is tiny_llama else tiny_llama()
    with pytest.raises(RequestError, match=rf"is a {type(build()).__name__} and post .* a {type(other).__name__}"):
        corresponding("it", {"base": build(), "post": other})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, r"has 4 blocks and post .* 3"),
        ({"hidden_size": 16}, r"has 32 features in its stream and post .* 16"),
        ({"vocab_size": 70}, r"has 64 rows of words .* and post .* 70.*resize_token_embeddings\(70\)"),
        ({"intermediate_size": 40}, r"block 0, mlp.down_proj.weight, is \[32, 48\] in base .* and \[32, 40\] in post"),
    ],
)
def test_the_message_names_both_numbers(changes: dict[str, int], said: str, tmp_path: Path) -> None:
    base, post = saved(tiny_llama(), tmp_path / "base"), saved(tiny_llama(**changes), tmp_path / "post")
    (post / "model.safetensors").write_bytes((post / "model.safetensors").read_bytes()[:-8] + b"\0" * 8)
    for given in ({"base": base, "post": post}, {"base": tiny_llama(), "post": facts(post)}):
        with pytest.raises(RequestError, match=said):
            corresponding("it", given)


def test_words_that_are_numbered_otherwise_are_refused_and_added_ones_are_not(tmp_path: Path) -> None:
    more, swapped = tiny_tokenizer(), tiny_tokenizer()
    more.add_tokens(["<turn>"])
    base = saved(tiny_llama(), tmp_path / "base")
    corresponding("it", {"base": base, "post": saved(tiny_llama(), tmp_path / "more", more)})
    post = saved(tiny_llama(), tmp_path / "swapped", swapped)
    told = json.loads((post / "tokenizer.json").read_text())
    told["model"]["vocab"] |= {"a": told["model"]["vocab"]["b"], "b": told["model"]["vocab"]["a"]}
    (post / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(RequestError, match="number 2 words differently: 6 is 'a' in one and 'b' in the other"):
        corresponding("it", {"base": base, "post": post})
    assert corresponding("it", {"base": base, "post": post}, words_matter=False)


def test_one_model_is_no_pair_and_three_may_be_compared(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least two"):
        corresponding("it", {"base": tiny_llama()})
    three = {
        "base": tiny_llama(),
        "sft": saved(tiny_llama(), tmp_path / "sft"),
        "post": tiny_llama(num_hidden_layers=2),
    }
    with pytest.raises(RequestError, match="4 blocks and post .* 2"):
        corresponding("it", three)


def test_a_checkpoint_is_let_go_and_a_model_in_memory_stays(tmp_path: Path) -> None:
    here = tiny_llama().train()
    pair = corresponding("it", {"base": saved(tiny_llama(), tmp_path / "base"), "post": here})
    with pair["base"].opened() as model:
        storage = weakref.ref(model.get_parameter("model.layers.0.mlp.up_proj.weight").untyped_storage())
        assert not model.training and storage() is not None
    gc.collect()
    assert next(model.parameters()).is_meta  # though this test still holds it
    with pair["post"].opened() as model:
        assert model is here and not here.training
    assert here.training and not next(here.parameters()).is_meta
    with pair["base"].opened("bfloat16") as model:
        assert next(model.parameters()).dtype == torch.bfloat16


def test_what_configs_say_differently_is_told(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    post = saved(tiny_llama(rms_norm_eps=1e-5), tmp_path / "post")
    (said,) = differences(corresponding("it", {"base": base, "post": post}))
    assert "rms_norm_eps is 1e-06" in said and "1e-05" in said
