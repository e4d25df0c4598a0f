"""Skips, erasure and integrated gradients: equal to whole forwards with plain hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import tiny_llama, tiny_qwen3
from overhaul.data.encode import answered
from overhaul.inspect.depth_use.answers import attribution, erasure
from overhaul.inspect.depth_use.skips import Skip, depth_score, effects, futures, on_later
from overhaul.stack import LayerStack
from overhaul.trace import Replace, Where, intervene
from overhaul.trace.sites import sites
from plain_hooks import LANGUAGE, awake, plainly, texts


@pytest.mark.parametrize("name", LANGUAGE)
def test_effects_are_those_of_whole_forwards_with_plain_hooks(name: str) -> None:
    model, text = awake(LANGUAGE[name]()), texts(19, 14)
    stack = LayerStack.of(model)
    tried = [Skip(part, end) for part in ("block", "attention", "MLP") for end in (None, 8)]
    known = sites(stack, {"input_ids": text[0]["input_ids"][None]})
    both = effects(stack, known, text.items, [tried, tried], keep_first=1, rows=100)
    for item, found in zip(text.items, both, strict=True):
        clean, said = plainly(model, item["input_ids"], 0, "", None)
        for skip in tried:
            seen = slice(skip.before, None)
            for place in range(4):
                added, says = plainly(model, item["input_ids"], place, skip.part, skip.before)
                change = [
                    ((a - b)[0, seen].norm(dim=-1) / a[0, seen].norm(dim=-1)).max()
                    for a, b in zip(clean, added, strict=True)
                ]
                got = found[skip.kind]
                assert got.later[place, place + 1 :].tolist() == pytest.approx(
                    torch.stack(change)[place + 1 :].tolist() if place < 3 else [], rel=1e-3, abs=1e-5
                )
                moved = (said - says)[0, seen].norm(dim=-1).max()
                assert float(got.output[place]) == pytest.approx(float(moved), rel=1e-3, abs=1e-6)
    assert both[0]["block", False].later.max() > 0.05 < both[0]["attention", True].later.max()


def test_the_largest_effect_over_several_futures_is_kept() -> None:
    stack, text = LayerStack.of(awake(tiny_llama())), texts(19)
    known = sites(stack, {"input_ids": text[0]["input_ids"][None]})

    def of(*ends: int) -> Tensor:
        (found,) = effects(stack, known, text.items, [[Skip("block", end) for end in ends]], keep_first=1, rows=1)
        return found["block", True].later

    assert torch.allclose(of(4, 9), torch.maximum(of(4), of(9)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(of(4), of(9), rtol=1e-2)


def test_a_direct_effect_is_that_of_a_clean_stream_without_the_contribution() -> None:
    model, (item,) = awake(tiny_llama()), texts(15).items
    stack, end = LayerStack.of(model), 6
    known = sites(stack, {"input_ids": item["input_ids"][None]})
    (found,) = effects(stack, known, [item], [[Skip("direct", end)]], keep_first=1, rows=1)
    with torch.no_grad():
        states = model(input_ids=item["input_ids"][None], output_hidden_states=True).hidden_states
        clean, _ = plainly(model, item["input_ids"], 0, "", None)
        changed = states[2].clone()
        changed[:, 1:end] -= (states[1] - states[0])[:, 1:end]
        with intervene(stack, {"entering.2": Replace(changed)}):
            added, _ = plainly(model, item["input_ids"], 0, "", None)
    moved = ((clean[2] - (added[2]))[0, end:].norm(dim=-1) / clean[2][0, end:].norm(dim=-1)).max()
    assert float(found["direct", True].later[0, 2]) == pytest.approx(float(moved), rel=1e-3)


def test_depth_scores_by_hand() -> None:
    assert depth_score(torch.ones(7)) == 3
    assert depth_score(F.one_hot(torch.tensor(5), 8).float()) == 5
    assert depth_score(torch.zeros(4)) is None
    later = torch.tensor([[9.0, 1.0, 3.0], [9.0, 9.0, 4.0], [9.0, 9.0, 9.0]])
    assert on_later(later).tolist() == [2.0, 4.0, 0.0]


def test_futures_begin_in_the_text_or_in_the_answer() -> None:
    labels = answered(list(range(10)), list(range(20)), None)["labels"]
    assert futures(labels, 8, 1, in_answer=False) == [8, 16, 24]
    assert futures(labels, 4, 1, in_answer=True) == [9, 13, 17, 21]
    assert futures(labels[:12], 4, 1, in_answer=True) == [9]
    assert futures(labels[:12], 4, 5, in_answer=False) == []


def test_erasure_is_a_whole_forward_with_one_state_replaced() -> None:
    model, (item,) = awake(tiny_qwen3()), texts(11, prompt=6).items
    stack, ids = LayerStack.of(model), item["input_ids"][None]
    means = [torch.randn(32, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    found = erasure(stack, item, means, rows=4)
    assert found.shape == (5, 11)
    with torch.no_grad():
        clean = model(input_ids=ids).logits.softmax(-1)[0, 5:10]
        for layer, position in ((0, 0), (0, 4), (2, 7), (4, 9), (4, 3)):
            site = f"leaving.{layer - 1}" if layer else "entering.0"
            with intervene(stack, {site: Replace(means[layer], Where(positions=position))}):
                p = model(input_ids=ids, use_cache=False).logits.softmax(-1)[0, 5:10]
            assert float(found[layer, position]) == pytest.approx(float((clean - p).norm(dim=-1).max()), abs=1e-5)
    assert found[4, 3] < 1e-6 < 1e-2 < found[4, 9]  # at the last layer, only predicting positions are read


def test_integrated_gradients_are_those_of_whole_forwards() -> None:
    model, (item,) = awake(tiny_llama()), texts(9, prompt=4).items
    stack, ids = LayerStack.of(model), item["input_ids"][None]
    module = "model.layers.1.mlp"
    found = attribution(stack, item, [None, module, None, None], 3, "log_probability", rows=2)
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda *call: seen.append(call[2].detach()))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    (x,) = seen
    baseline, total = x.mean(dim=1, keepdim=True), torch.zeros_like(x)
    for alpha in (1 / 6, 3 / 6, 5 / 6):
        point = (baseline + alpha * (x - baseline)).requires_grad_()
        with intervene(stack, {module: Replace(point)}):
            logp = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, 3:8]
        logp.gather(-1, ids[0, 4:, None]).sum().backward()
        assert point.grad is not None
        total += point.grad / 3 * (x - baseline)
    model.zero_grad()
    assert found.values[1].tolist() == pytest.approx(total.sum(-1)[0].tolist(), rel=1e-3, abs=1e-6)
    assert found.values[0].isnan().all()
