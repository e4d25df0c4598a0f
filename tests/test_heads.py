"""The last layer of classifiers of several families, and what enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_llama, tiny_resnet, tiny_vit
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.heads import head_of

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"vocab_size": 64, "num_labels": 3, "pad_token_id": 0}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**SIZES)).eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    sizes: dict[str, Any] = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 64,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    return GPT2ForSequenceClassification(GPT2Config(**sizes)).eval()


class Transposed(nn.Module):
    """A plain network that ends in GPT-2's `Conv1D`."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first: nn.Module = nn.Linear(64, 10)
        self.last: nn.Module = Conv1D(10, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.last(self.first(pixel_values.flatten(1)).relu())


def texts(count: int = 7) -> Examples:
    """Random tokens of different lengths, each with one of three classes."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=draw).tolist()
    items = [{"input_ids": torch.randint(3, 64, (n,), generator=draw), "labels": torch.tensor(n % 3)} for n in lengths]
    return Examples(items, [{}] * count)


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit": (tiny_vit, "classifier"),
    "resnet": (tiny_resnet, "classifier.1"),
    "bert": (bert, "classifier"),
    "roberta": (roberta, "classifier.out_proj"),
    "llama": (llama, "score"),
    "gpt2": (gpt2, "score"),
    "conv1d": (Transposed, "last"),
}


def data_for(name: str) -> Examples:
    return examples_for("vit", 7) if name in ("vit", "resnet", "conv1d") else texts()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_check_5_logits_are_the_layer_of_the_features(name: str) -> None:
    model, examples = CLASSIFIERS[name][0](), data_for(name)
    found = head_of(model, examples)
    assert found.name == CLASSIFIERS[name][1]
    features = found.features(examples, batch_size=3)
    bias = 0 if found.bias is None else found.bias
    with torch.no_grad():
        logits = torch.cat([forward(model.eval(), batch) for batch in examples.batches(1)])
    torch.testing.assert_close(features @ found.weight.T + bias, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_nothing_stays_behind(name: str) -> None:
    model, examples = CLASSIFIERS[name][0]().train(), data_for(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    head_of(model, examples).features(examples)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_layer_whose_output_is_changed_behind_it_is_not_taken() -> None:
    class Capped(Transposed):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values).tanh()

    with pytest.raises(RequestError, match="Capped ends in no linear layer that makes its 10 logits"):
        head_of(Capped(), examples_for("vit", 4))


def test_a_language_model_has_no_last_layer_to_refit() -> None:
    for data in (texts(), examples_for("llama", 4)):
        with pytest.raises(
            RequestError, match="LlamaForCausalLM has no last layer over classes.*the model is no classifier"
        ):
            head_of(tiny_llama(), data)
    with pytest.raises(RequestError, match="The model is a classifier"):
        head_of(llama(), examples_for("llama", 4))


def test_a_shared_weight_is_refused() -> None:
    model = Transposed()
    model.last = shared = nn.Linear(10, 10)
    model.again = nn.Linear(10, 10)
    model.again.weight = shared.weight
    with pytest.raises(RequestError, match=r"last, shares its weight with again\.weight"):
        head_of(model, examples_for("vit", 4))


def test_numbers_that_are_none_are_told_of_before_the_last_layer_is_looked_for() -> None:
    for name in ("vit.layers.3.mlp.fc2.weight", "classifier.weight"):
        model = tiny_vit()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = torch.nan
        with pytest.raises(RequestError, match=f"The logits of .* are not finite .*nor is its '{name}'"):
            head_of(model, examples_for("vit", 4))
