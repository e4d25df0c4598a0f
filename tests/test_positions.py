"""The longest text that a model reads: the last token has a position of its own, and one more has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from conftest import FAMILIES, examples_for, tiny_gpt2, tiny_llama
from contract import some_facts
from overhaul import models
from overhaul.data.lazy import View
from overhaul.data.materials import examples
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.generation import generate
from overhaul.objectives import check_positions
from overhaul.positions import most_positions
from overhaul.recipe.check import check
from overhaul.recipe.spec import read

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 34}


def behind_padding(name: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SIZES, **options)).eval()


MODELS = {
    "roberta": (lambda: behind_padding("Roberta"), 32),
    "roberta, another padding": (lambda: behind_padding("Roberta", pad_token_id=3), 30),
    "xlm-roberta": (lambda: behind_padding("XLMRoberta"), 32),
    "mpnet": (lambda: behind_padding("MPNet"), 32),
    "camembert": (lambda: behind_padding("Camembert"), 32),
    "longformer": (lambda: behind_padding("Longformer", attention_window=[8, 8]), 32),
    "bert": (lambda: behind_padding("Bert"), 34),
    "gpt-2": (lambda: tiny_gpt2(n_positions=34), 34),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_text_has_a_position_for_every_token_and_no_more(name: str) -> None:
    build, expected = MODELS[name]
    model, most = cast(Any, build()), expected
    assert most_positions(model) == most
    ids = torch.full((1, most + 1), 5)
    with torch.no_grad():
        assert model(ids[:, :most])[0].isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 9), 5) if name == "longformer" else ids)


def test_a_config_without_positions_has_no_end() -> None:
    assert most_positions(nn.Linear(2, 2)) is None and most_positions(tiny_llama()) == 128


def test_examples_and_answers_end_where_the_positions_do(tokenizer: Any) -> None:
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True, eos_token_id=2)).eval()
    check_positions(model, examples([{"text": "abc " * 80}], tokenizer, length=32))
    with pytest.raises(RequestError, match="has 33 tokens and the model ends at 32 positions"):
        check_positions(model, examples([{"text": "abc " * 80}], tokenizer, length=33))
    (said,) = generate(model, [torch.arange(3, 32)], 10, [])
    assert len(said) == 3


@pytest.mark.parametrize("length", [32, 33])
def test_plan_refuses_a_text_that_is_longer(length: int, tokenizer: Any, tmp_path: Path) -> None:
    place = models.save(behind_padding("XLMRoberta"), tokenizer, tmp_path / "m")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abc " * 80}))
    material = {"text": {"from": str(tmp_path / "a.jsonl"), "length": length}}
    checked = check(read({"model": str(place), "materials": material, "steps": [{"shrink.drop_layers": {"count": 1}}]}))
    if length == 32:
        assert max(len(item["input_ids"]) for item in checked.encode()["text"]) == 32
        return
    with pytest.raises(RequestError, match=r"example of 33 tokens .* ends at 32 positions: .*Write `length: 32`\."):
        checked.encode()


def test_the_longer_answer_of_a_pair_counts_by_itself(tokenizer: Any) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b" * 60},
        {"prompt": "q", "chosen": "a" * 40, "rejected": "b" * 40},
    ]
    pairs = examples(rows, tokenizer, prompt="{question}")
    sizes = [[len(item[name]) for name in ("input_ids", "other_input_ids")] for item in pairs.items]
    assert sum(sizes[1]) > sum(sizes[0]), "the longest pair is not that of the longest answer"
    assert pairs.beyond(max(sizes[1])) == (0, max(sizes[0])) and pairs.beyond(max(sizes[0])) is None


@pytest.mark.parametrize("lazy", [False, True])
def test_a_token_beyond_the_embedding_is_refused_wherever_it_stands(lazy: bool) -> None:
    given = some_facts(0, 8)
    last = given.largest_token()
    if lazy:
        given = replace(given, items=View(given.items.__getitem__, range(8), "key"))
    check_positions(tiny_llama(vocab_size=last + 1), given)
    with pytest.raises(
        RequestError, match=f"has the token {last}, and the embedding of LlamaForCausalLM ends at {last - 1}"
    ):
        check_positions(tiny_llama(vocab_size=last), given)


@pytest.mark.parametrize(
    ("model", "data", "said"), [("llama", "vit", "holds images"), ("vit", "llama", "holds tokens")]
)
def test_images_are_not_given_to_what_reads_tokens_nor_tokens_to_what_reads_images(
    model: str, data: str, said: str
) -> None:
    network, examples = FAMILIES[model](), examples_for(data, 2)
    with pytest.raises(RequestError, match=said):
        check_positions(network, examples)
    with pytest.raises(RequestError, match=said):
        forward(network, next(examples.batches(2)))
