from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_gemma3, tiny_llama, tiny_qwen3
from overhaul.data.examples import IGNORED, collate
from overhaul.forward import forward, output_head
from overhaul.objectives import (
    answer_tokens,
    cross_entropy,
    cross_entropy_sum,
    evaluate,
    forward_answers,
    kl_sum,
    pair_nll,
    sequence_nll,
    sequences,
    token_nll,
    units,
)


def test_token_nll_predicts_the_next_token_and_skips_what_is_ignored() -> None:
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[IGNORED, 3, IGNORED, 5], [2, 1, 6, IGNORED]])
    nll = token_nll(logits, labels)
    logp = logits.log_softmax(-1)
    expected = torch.tensor([[-logp[0, 0, 3], 0.0, -logp[0, 2, 5]], [-logp[1, 0, 1], -logp[1, 1, 6], 0.0]])
    assert torch.allclose(nll, expected, atol=1e-6)
    assert torch.allclose(sequence_nll(logits, labels), expected.sum(dim=1), atol=1e-6)


def test_the_mean_is_what_transformers_computes() -> None:
    model: Any = tiny_llama()
    batch = collate(examples_for("llama", 6).items)
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    ours = cross_entropy_sum(forward(model, batch), batch) / answer_tokens(batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_losses_are_float32_whatever_the_logits() -> None:
    logits, labels = torch.randn(1, 5, 9).to(torch.bfloat16), torch.tensor([[1, 2, 3, 4, 5]])
    assert token_nll(logits, labels).dtype == torch.float32
    assert kl_sum(logits, logits, labels).dtype == torch.float32


def test_counts_are_tokens_that_are_predicted_or_images() -> None:
    text = {"labels": torch.tensor([[4, 3, IGNORED], [IGNORED, 1, 2]])}
    assert (answer_tokens(text), sequences(text), units(text)) == (3, 2, 3)
    images = {"labels": torch.tensor([1, 2, 3])}
    assert (sequences(images), units(images)) == (3, 3)


def test_image_cross_entropy_is_a_sum_over_images() -> None:
    logits, labels = torch.randn(5, 10), torch.randint(10, (5,))
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(cross_entropy_sum(logits, {"labels": labels}), expected)


def test_uniform_logits_cost_log_of_the_vocabulary() -> None:
    labels = torch.tensor([[1, 2, 3]])
    assert sequence_nll(torch.zeros(1, 3, 64), labels).item() == pytest.approx(2 * math.log(64))


def test_kl_is_zero_to_itself_positive_otherwise_and_directed() -> None:
    labels = torch.tensor([[IGNORED, 1, 2]])
    model, reference = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    assert kl_sum(model, model, labels).item() == pytest.approx(0.0, abs=1e-6)
    p, q = reference[0, :2].softmax(-1), model[0, :2].softmax(-1)
    expected = (p * (p / q).log()).sum().item()
    assert kl_sum(model, reference, labels).item() == pytest.approx(expected, rel=1e-5)
    assert kl_sum(reference, model, labels).item() != pytest.approx(expected, rel=1e-2)


def test_kl_counts_the_positions_that_predict_an_answer_and_neither_prompt_nor_padding() -> None:
    labels = torch.tensor([[IGNORED, IGNORED, 3, 5, IGNORED], [IGNORED, 2, IGNORED, IGNORED, IGNORED]])
    counted = [(0, 1), (0, 2), (1, 0)]
    model, reference = (torch.randn(2, 5, 7, requires_grad=True) for _ in range(2))
    expected = torch.zeros(())
    for row, place in counted:
        p, q = reference[row, place].softmax(-1), model[row, place].softmax(-1)
        expected = expected + (p * (p / q).log()).sum()
    found = kl_sum(model, reference, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert model.grad is not None
    felt = {(row, place) for row in range(2) for place in range(5) if model.grad[row, place].any()}
    assert felt == set(counted)
    with torch.no_grad():
        wild = model.clone()
        for row, place in {(row, place) for row in range(2) for place in range(5)} - set(counted):
            wild[row, place] = 100 * torch.randn(7)
        assert torch.equal(kl_sum(wild, reference, labels), kl_sum(model, reference, labels))


def test_kl_of_images_is_over_all_classes() -> None:
    model, reference = torch.randn(4, 10), torch.randn(4, 10)
    expected = F.kl_div(model.log_softmax(-1), reference.softmax(-1), reduction="sum")
    assert kl_sum(model, reference, torch.zeros(4, dtype=torch.long)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_forward_takes_models_with_and_without_an_output_object(family: str) -> None:
    model, batch = FAMILIES[family](), collate(examples_for(family, 3).items)
    logits = forward(model, batch)

    class Bare(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return model(**inputs).logits

    assert isinstance(logits, Tensor)
    assert torch.equal(forward(Bare(), batch), logits)


def test_evaluate_needs_no_gradients_and_puts_the_mode_back() -> None:
    model = FAMILIES["gpt2"](resid_pdrop=0.5).train()
    batches = list(examples_for("gpt2", 5).batches(2))
    first = evaluate(model, lambda logits, _: logits, batches)
    again = evaluate(model, lambda logits, _: logits, batches)
    assert [len(logits) for logits in first] == [2, 2, 1]
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, again, strict=True))
    assert model.training


def test_terms_carry_role_weight_and_name() -> None:
    term = cross_entropy("text", 0.5, "prose")
    assert (term.role, term.weight, term.name) == ("text", 0.5, "prose")
    assert term.count is units


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3"])
def test_logits_where_answers_are_give_the_same_losses_and_gradients(family: str) -> None:
    build = {"qwen3": tiny_qwen3, "gemma3": tiny_gemma3, **FAMILIES}[family]
    model, examples = build(), examples_for("llama", 9)
    batch, seen = collate(examples.items), list[tuple[int, ...]]()
    head: Any = output_head(model)
    hook = head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    found = []
    for way in (lambda: (forward(model, batch), batch), lambda: forward_answers(model, batch)):
        model.zero_grad()
        logits, its = way()
        loss = cross_entropy_sum(logits, its) + sequence_nll(logits, its["labels"]).square().sum()
        loss.backward()
        found.append((loss.detach(), sequence_nll(logits, its["labels"]), [p.grad for p in model.parameters()]))
        assert answer_tokens(its) == answer_tokens(batch)
    hook.remove()
    assert seen[0][1] == batch["labels"].shape[1] and seen[1][1] == 6 < seen[0][1]  # answers have at most 5 tokens
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5) and torch.allclose(found[0][1], found[1][1], atol=1e-4)
    for ours, theirs in zip(found[1][2], found[0][2], strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.allclose(ours, theirs, atol=1e-4))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pairs_of_unequal_widths_give_the_same_losses() -> None:
    model = tiny_llama()
    first, other = examples_for("llama", 6, seed=1), examples_for("llama", 6, seed=2)
    wide = [
        {"input_ids": F.pad(item["input_ids"], (20, 0), value=5), "labels": F.pad(item["labels"], (20, 0), value=-100)}
        for item in other
    ]
    for left, right in ((first, wide), (wide, first)):
        items = [
            {**one, "other_input_ids": two["input_ids"], "other_labels": two["labels"]}
            for one, two in zip(left, right, strict=True)
        ]
        batch = collate(items)
        whole, (logits, its) = pair_nll(forward(model, batch), batch), forward_answers(model, batch)
        assert logits.shape[:2] == (12, 6)
        for ours, theirs in zip(pair_nll(logits, its), whole, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_where_logits_depend_on_more_than_one_position_all_are_made() -> None:
    """Plain text, of which every position counts; a head that is not one of positions; a model without one."""
    model: Any = tiny_llama()
    text = collate([{"input_ids": torch.arange(3, 20), "labels": torch.arange(3, 20)}])
    logits, batch = forward_answers(model, text)
    assert batch is text and logits.shape[1] == 17

    class Bare(torch.nn.Module):
        def __init__(self, head: bool) -> None:
            super().__init__()
            self.inner, self.named = tiny_llama(), head
            self.other = torch.nn.Linear(32, 64)

        def get_output_embeddings(self) -> torch.nn.Module | None:
            return self.other if self.named else None

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            out: Any = self.inner(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
            return out.logits + self.other(out.hidden_states[-1].mean(dim=1))[:, None]

    answers = collate(examples_for("llama", 5).items)
    for head in (True, False):
        bare = Bare(head)
        logits, batch = forward_answers(bare, answers)
        assert batch is answers and torch.allclose(logits, forward(bare, answers))


def test_a_model_is_given_the_columns_that_its_signature_names() -> None:
    from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

    batch = collate(examples_for("llama", 3).items)
    sizes: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 16, "d_kv": 8}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).eval()
    answered = {**batch, "decoder_input_ids": batch["input_ids"][:, :2], "reference": batch["input_ids"]}
    with torch.no_grad():
        read = {name: answered[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        assert torch.equal(forward(t5, answered), t5(**read).logits)
    inside: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**inside, "vocab_size": 64, "eos_token_id": 63}
    vision = {**inside, "image_size": 8, "patch_size": 4, "num_channels": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    both = {**batch, **{k: v for k, v in collate(examples_for("vit", 2).items).items() if k == "pixel_values"}}
    with torch.no_grad():
        assert forward(clip, both).shape == (2, 3)
    diffused = Denoiser()
    assert forward(diffused, {"sample": torch.ones(2, 1), "timestep": torch.ones(2), "noise": torch.ones(2)}).shape == (
        2,
        1,
    )


class Denoiser(nn.Module):
    """Called as a network of diffusers."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": sample * timestep[:, None]}
