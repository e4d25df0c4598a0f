from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama
from overhaul.data.examples import IGNORED, Batch, Examples, collate
from overhaul.fit import fit
from overhaul.forward import forward
from overhaul.references import COLUMN, cache_outputs, reference_nll


def test_nll_is_that_of_each_answer_alone() -> None:
    model, examples = tiny_llama(), examples_for("llama", 7)
    alone = []
    for item in examples.items:
        logits = model(input_ids=item["input_ids"][None]).logits[0].log_softmax(-1)
        labels = item["labels"]
        alone.append(-sum(logits[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != IGNORED))
    assert torch.allclose(reference_nll(model, examples, 3), torch.stack(alone), atol=1e-5)


def test_nll_does_not_depend_on_padding_batch_size_or_order() -> None:
    model, examples = tiny_llama(), examples_for("llama", 9)
    expected = reference_nll(model, examples, 9)
    order = [4, 1, 8, 0, 2, 7, 3, 6, 5]
    assert torch.allclose(reference_nll(model, examples, 1), expected, atol=1e-5)
    assert torch.allclose(reference_nll(model, examples.select(order), 4), expected[order], atol=1e-5)


def test_outputs_are_the_logits_of_the_model_before_it_changed(family: str) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 6)
    batch = collate(examples.items[1:5])
    with torch.no_grad():
        expected = forward(model, batch)
        reference = cache_outputs(model, examples, batch_size=4)
        for parameter in model.parameters():
            parameter.mul_(0.5)
    got = reference.logits(collate(reference.examples.items[1:5]))
    assert torch.allclose(got, counted(expected, batch), atol=1e-5)
    assert not torch.allclose(counted(forward(model, batch), batch), counted(expected, batch), atol=1e-3)


def counted(logits: Tensor, batch: Batch) -> Tensor:
    """The logits that predict what carries loss."""
    return logits[:, :-1][batch["labels"][:, 1:] != IGNORED] if logits.ndim == 3 else logits


def test_only_what_is_asked_for_is_run_and_kept() -> None:
    model, examples = tiny_llama(), examples_for("llama", 9)
    whole = cache_outputs(model, examples, batch_size=4)
    rows: list[int] = []
    hook = model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True)
    part = cache_outputs(model, examples, batch_size=4, places={7, 2, 5})
    hook.remove()
    assert sum(rows) == 3
    for place in (7, 2, 5):
        own = part.examples.items[place][COLUMN]
        assert torch.allclose(own, whole.examples.items[place][COLUMN], atol=1e-5)
        assert len(own) == int((examples.items[place]["labels"][1:] != IGNORED).sum())
    with pytest.raises(ValueError, match="not kept for these examples"):
        part.logits(collate(part.examples.items[:4]))


def test_language_keeps_the_heads_input_and_images_keep_logits(family: str) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 3)
    reference = cache_outputs(model, examples, batch_size=2)
    kept = reference.examples.items[0][COLUMN]
    if examples.kind == "images":
        assert reference.head is None
        assert kept.shape == (10,)
    else:
        assert reference.head is not None
        assert not any(p.requires_grad for p in reference.head.parameters())
        assert kept.shape == (int((examples.items[0]["labels"][1:] != IGNORED).sum()), 32)


def test_cached_outputs_have_the_dtype_of_the_model() -> None:
    model = tiny_llama().to(torch.bfloat16)
    reference = cache_outputs(model, examples_for("llama", 3), batch_size=2)
    assert reference.head is not None
    assert reference.examples.items[0][COLUMN].dtype == torch.bfloat16


class Softcapped(nn.Module):
    """A model whose logits are more than its head's output, as in Gemma 2."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.inner(input_ids=input_ids, attention_mask=attention_mask).logits * 10)


def test_logits_are_kept_where_the_head_alone_does_not_give_them() -> None:
    model, examples = Softcapped(tiny_llama()), examples_for("llama", 5)
    reference = cache_outputs(model, examples, batch_size=3)
    assert reference.head is None
    assert reference.examples.items[0][COLUMN].shape == (int((examples.items[0]["labels"][1:] != IGNORED).sum()), 64)
    batch = collate(reference.examples.items[:1])
    assert torch.allclose(reference.logits(batch), counted(forward(model, batch), batch), atol=1e-5)


def test_gemma2_softcap_is_noticed() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        intermediate_size=48, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    assert cache_outputs(Gemma2ForCausalLM(config), examples_for("llama", 3), batch_size=2).head is None


def test_kl_to_itself_is_zero_with_zero_gradient(family: str) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 5)
    reference = cache_outputs(model, examples, batch_size=5)
    batch, term = collate(reference.examples.items), reference.kl_term("retain")
    loss = term.loss(forward(model, batch), batch)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.parameters())


def by_hand(model: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """KL(reference || model) summed over the positions that predict a label."""
    total = torch.zeros(())
    for row, place in ((labels[:, 1:]) != IGNORED).nonzero().tolist():
        p, q = reference[row, place].softmax(-1), model[row, place].softmax(-1)
        total = total + (p * (p / q).log()).sum()
    return total


def test_kl_term_is_kl_of_reference_and_model_over_labels() -> None:
    model, other = tiny_llama(initializer_range=0.3), tiny_llama(initializer_range=0.3)
    examples = examples_for("llama", 6)
    reference = cache_outputs(other, examples, batch_size=4)
    batch, term = collate(reference.examples.items), reference.kl_term("retain", weight=2.0)
    with torch.no_grad():
        expected = by_hand(forward(model, batch), forward(other, batch), batch["labels"])
        got = term.loss(forward(model, batch), batch)
    assert expected > 0.1
    assert torch.allclose(got, expected, rtol=1e-4)
    assert term.count(batch) == int((batch["labels"] != IGNORED).sum())
    assert (term.role, term.weight) == ("retain", 2.0)


def test_training_on_the_kl_term_brings_a_model_back() -> None:
    model, examples = tiny_llama(initializer_range=0.3), examples_for("llama", 8)
    reference = cache_outputs(model, examples, batch_size=8)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    ledger = fit(model, [reference.kl_term("text", name="kl")], {"text": reference.examples}, steps=30, lr=1e-2)
    assert ledger.curves["kl"][-1] < 0.5 * ledger.curves["kl"][0]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    cache_outputs(model, examples_for("llama", 3), batch_size=2)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = tiny_llama()
    broken = Examples([{"input_ids": torch.tensor([-1]), "labels": torch.tensor([0])}], [{}])
    with pytest.raises(IndexError):
        cache_outputs(model, broken, batch_size=1)
    assert not any(module._forward_pre_hooks for module in model.modules())
