"""Depth use: equal to plain forwards with plain hooks, exact where the answer is known, the same in every batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import examples_for, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_resnet, tiny_tokenizer, tiny_vit
from overhaul.data.encode import answered
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.inspect.depth_use import depth_use
from overhaul.inspect.depth_use.answers import attribution, erasure
from overhaul.inspect.depth_use.contributions import written
from overhaul.inspect.depth_use.skips import Skip, depth_score, effects, futures, on_later
from overhaul.method import Outcome
from overhaul.stack import LayerStack
from overhaul.trace import Replace, Where, intervene
from overhaul.trace.sites import sites
from tracing import hooks_of

LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen3": tiny_qwen3,
    "gemma3": tiny_gemma3,
}
QUICK: dict[str, Any] = {"futures": 2, "stride": 4, "maps": 1, "gradient_steps": 4}


def awake(model: nn.Module) -> nn.Module:
    """With weights so large that every block says something."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.15)
    return model


def texts(*lengths: int, prompt: int = 0) -> Examples:
    """Random tokens that all carry loss but for a prompt; the levels are easy and hard by turns."""
    draw = torch.Generator().manual_seed(1)
    items = []
    for length in lengths:
        ids = torch.randint(4, 60, (length,), generator=draw).tolist()
        items.append(answered(ids[:prompt], ids[prompt:], None))
    rows = [{"level": ("easy", "hard")[n % 2]} for n in range(len(lengths))]
    return Examples(items, rows, tiny_tokenizer())


CASE = {
    "method": depth_use,
    "materials": lambda: {"model": awake(tiny_llama()), "text": texts(22, 17, 26, prompt=7)},
    "knobs": QUICK,
    # every knob but batch_size, which does not change the values
    "varied": {
        "examples": (1, 3),
        "by": (None, "level"),
        "futures": (1, 2),
        "stride": (4, 5),
        "within": ("text", "answer"),
        "keep_first": (1, 3),
        "count_first": (True, False),
        "sublayers": (True, False),
        "direct": (True, False),
        "over": ("max", "mean"),
        "top": (1, 5),
        "maps": (0, 1),
        "gradient_steps": (4, 8),
        "gradients_of": ("probability", "log_probability"),
    },
}


def found_in(outcome: Outcome) -> Any:
    return outcome.facts, outcome.layers, outcome.tables


def parts(model: nn.Module) -> tuple[Any, str, str]:
    """Blocks, and the names of what adds to the stream in them, as the released code names them."""
    if hasattr(model, "transformer"):
        return model.transformer.h, "attn", "mlp"
    sandwich = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    names = ("post_attention_layernorm", "post_feedforward_layernorm") if sandwich else ("self_attn", "mlp")
    return model.model.layers, *names


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def plainly(model: nn.Module, ids: Tensor, place: int, part: str, end: int | None) -> tuple[list[Tensor], Tensor]:
    """What every block adds, and the probabilities, in a whole forward in which positions 1 to `end` lose a part."""
    blocks, attention, mlp = parts(model)
    added: list[Tensor] = []

    def merged(changed: Tensor, own: Tensor) -> Tensor:
        own = own.clone()
        own[:, 1:end] = changed[:, 1:end]
        return own

    def zeroed(_: Any, args: Any, output: Any) -> Any:
        left = merged(torch.zeros_like(first(output)), first(output))
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def skipped(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        left = merged(args[0] if args else kwargs["hidden_states"], first(output))
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        added.append(first(output) - (args[0] if args else kwargs["hidden_states"]))

    with ExitStack() as undo:
        if part == "block":
            undo.callback(blocks[place].register_forward_hook(skipped, with_kwargs=True).remove)
        elif part:
            module = getattr(blocks[place], attention if part == "attention" else mlp)
            undo.callback(module.register_forward_hook(zeroed).remove)
        for block in blocks:
            undo.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        logits = model(input_ids=ids[None], use_cache=False).logits
    return added, logits.softmax(-1)


# skips


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


def test_a_block_that_adds_nothing_is_missed_by_nobody() -> None:
    model = awake(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    outcome = depth_use(model, texts(22, 17), **QUICK)
    assert outcome.layers["relative contribution, block"][1] == 0
    for name, values in outcome.layers.items():
        if name.startswith("effect"):
            assert (values[1] < 1e-5) is True, name
            assert values[0] > 1e-3, name


def test_without_attention_above_nothing_is_passed_on_to_the_future() -> None:
    model = awake(tiny_llama())
    with torch.no_grad():
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
    layers = depth_use(model, texts(22, 17), **{**QUICK, "maps": 0}).layers
    future = layers["effect on later blocks in the future without a block"]
    output = layers["effect on predictions in the future without a block"]
    # the attention of block 1 is the last that reads what went before
    assert max(future[1], future[2], output[1], output[2], output[3]) < 1e-5 < 1e-3 < min(future[0], output[0])
    assert layers["effect on predictions at all positions without a block"][3] > 1e-3
    assert layers["effect on later blocks at all positions without a block"][2] > 1e-3


def test_direct_and_passed_on_effects_are_one_on_the_next_block_and_differ_behind_it() -> None:
    tables = depth_use(awake(tiny_qwen3()), texts(22, 17), **{**QUICK, "maps": 0}).tables
    for where in ("in the future", "at all positions"):
        whole = tables[f"effect on later blocks {where} without a block"].rows
        direct = tables[f"effect on later blocks {where} without a block, direct reads alone"].rows
        for place in range(3):
            assert whole[place][place + 2] == pytest.approx(direct[place][place + 2], rel=1e-3)
            assert whole[place][1 : place + 2] == (None,) * (place + 1)
        assert abs(whole[0][4] - direct[0][4]) > 1e-3  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]


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
    assert futures(labels, 4, 1, in_answer=True) == [10, 14, 18, 22]
    assert futures(labels[:12], 4, 1, in_answer=True) == [10]
    assert futures(labels[:12], 4, 5, in_answer=False) == []


# contributions and lens


@pytest.mark.parametrize("name", LANGUAGE)
def test_contributions_by_hand(name: str) -> None:
    model, text = awake(LANGUAGE[name]()), texts(19, 14)
    blocks, attention, mlp = parts(model)
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def note(kind: str, place: int) -> Callable[..., None]:
        return lambda _, args, kwargs, output: seen.setdefault((kind, place), []).append(
            torch.stack([first(output)[0], (args[0] if args else kwargs["hidden_states"])[0]])
            if kind == "block"
            else first(output)[0]
        )

    with ExitStack() as undo, torch.no_grad():
        for place, block in enumerate(blocks):
            for kind, module in (("block", block), ("a", getattr(block, attention)), ("m", getattr(block, mlp))):
                undo.callback(module.register_forward_hook(note(kind, place), with_kwargs=True).remove)
        for item in text.items:
            model(input_ids=item["input_ids"][None], use_cache=False)
    layers = depth_use(model, text, **{**QUICK, "maps": 0}).layers
    for place in range(4):
        after, h = torch.cat(seen["block", place], dim=1)
        a, m = torch.cat(seen["a", place]), torch.cat(seen["m", place])
        assert torch.allclose(a + m, after - h, atol=1e-5)
        for part, added, read in (("attention", a, h), ("MLP", m, h + a), ("block", after - h, h)):
            norm, relative = added.norm(dim=1), added.norm(dim=1) / read.norm(dim=1)
            expected = {
                "norm": norm.mean(),
                "largest norm": norm.max(),
                "relative contribution": relative.mean(),
                "largest relative contribution": relative.max(),
                "cosine with the stream": F.cosine_similarity(added, read).mean(),
            }
            for label, value in expected.items():
                assert layers[f"{label}, {part}"][place] == pytest.approx(float(value), rel=1e-3, abs=1e-5)
        assert layers["norm, stream"][place] == pytest.approx(float(h.norm(dim=1).mean()), rel=1e-4)
        assert layers["cosine of input and output"][place] == pytest.approx(
            float(F.cosine_similarity(after, h).mean()), rel=1e-4
        )


def test_contributions_of_batches_add_up() -> None:
    draw = torch.Generator().manual_seed(0)
    stream, added = torch.randn(2, 3, 5, 4, generator=draw)
    whole = written(stream, added, torch.ones(3, 5, dtype=torch.bool))
    mask = torch.ones(1, 5, dtype=torch.bool)
    joined = written(stream[:1], added[:1], mask) + written(stream[1:], added[1:], mask.expand(2, 5))
    assert vars(joined) == pytest.approx(vars(whole))


def test_the_lens_is_what_the_model_says_without_the_blocks_behind() -> None:
    model, text = awake(tiny_llama()), texts(12)
    stack, ids = LayerStack.of(model), text[0]["input_ids"][None]
    layers = depth_use(model, text, **{**QUICK, "maps": 0}).layers
    divergence, overlap = layers["lens: KL to the output"], layers["lens: overlap of the most probable"]
    with torch.no_grad():
        last = model(input_ids=ids).logits.log_softmax(-1)[0]
        for layer in (0, 1, 2):
            with stack.skipping(range(layer + 1, 4)):
                logp = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
            kl = (logp.exp() * (logp - last)).sum(-1).mean()
            assert divergence[layer] == pytest.approx(float(kl), rel=1e-3)
            shared = [
                len(set(a.tolist()) & set(b.tolist())) / 5
                for a, b in zip(logp.topk(5).indices, last.topk(5).indices, strict=True)
            ]
            assert overlap[layer] == pytest.approx(sum(shared) / len(shared))
    assert sorted(divergence) == [-1, 0, 1, 2, 3]
    assert (divergence[3], overlap[3]) == (pytest.approx(0, abs=1e-6), 1)


# answers


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
        total += point.grad / 3 * (x - baseline)
    model.zero_grad()
    assert found.values[1].tolist() == pytest.approx(total.sum(-1)[0].tolist(), rel=1e-3, abs=1e-6)
    assert found.values[0].isnan().all()


@pytest.mark.parametrize("name", LANGUAGE)
def test_attributions_sum_to_the_change_of_the_answer_with_more_steps_ever_better(name: str) -> None:
    model, text = awake(LANGUAGE[name]()), texts(14, prompt=6)

    def gap(steps: int) -> float:
        knobs = {**QUICK, "futures": 0, "gradient_steps": steps, "gradients_of": "log_probability"}
        return depth_use(model, text, **knobs).facts["integration_gap"]

    few, many = gap(2), gap(32)
    assert 1e-4 < few
    assert many < few / 10


# what must not matter


def test_neither_padding_nor_the_batch_changes_a_value() -> None:
    model, text = awake(tiny_gemma3()), texts(22, 13, 26, prompt=6)
    once, together = (depth_use(model, text, **{**QUICK, "batch_size": size}) for size in (1, 64))
    assert once.facts == pytest.approx(together.facts, rel=1e-3, abs=1e-5)
    for name, values in once.layers.items():
        assert values == pytest.approx(together.layers[name], rel=1e-3, abs=1e-5), name
    for name, table in once.tables.items():
        for row, other in zip(table.rows, together.tables[name].rows, strict=True):
            ours, theirs = ([-1.0 if cell is None else cell for cell in cells[1:]] for cells in (row, other))
            assert row[0] == other[0] and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name


def test_a_cache_does_not_matter_and_nothing_is_left_behind() -> None:
    model, text = awake(tiny_llama()), texts(22, 17)
    model.model.layers[0].train()
    model.model.layers[1].mlp.requires_grad_(False)
    before = state_of(model)
    generator = torch.get_rng_state()
    outcome = depth_use(model, text, **QUICK)
    assert outcome.model is None
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    model.config.use_cache = not model.config.use_cache
    assert found_in(depth_use(model, text, **QUICK)) == found_in(outcome)


def test_nothing_is_left_behind_when_it_fails() -> None:
    model = awake(tiny_llama())
    before, broken = state_of(model), model.model.layers[3].mlp.forward

    def fail(*_: Any) -> None:
        raise ValueError("planted")

    model.model.layers[3].mlp.forward = fail
    with pytest.raises(ValueError, match="planted"):
        depth_use(model, texts(22), **QUICK)
    model.model.layers[3].mlp.forward = broken
    assert state_of(model) == before


def state_of(model: nn.Module) -> Any:
    weights = hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())).hexdigest()
    modes = [module.training for module in model.modules()]
    return weights, modes, hooks_of(model), [weight.requires_grad for weight in model.parameters()]


@pytest.mark.parametrize("knob", CASE["varied"])
def test_every_knob_changes_something(knob: str) -> None:
    one, other = (CASE["method"](**CASE["materials"](), **{**QUICK, knob: value}) for value in CASE["varied"][knob])
    assert found_in(one) != found_in(other)


# what it takes


def test_a_level_has_a_score_of_its_own() -> None:
    model, text = awake(tiny_llama()), texts(22, 17, 26, 20)
    table = depth_use(model, text, by="level", **{**QUICK, "maps": 0}).tables["depth score by level"]
    alone = [
        depth_use(model, text.filter(lambda row, level=level: row["level"] == level), **{**QUICK, "futures": 0}).facts
        for level in ("easy", "hard")
    ]
    assert [row[:2] for row in table.rows] == [("easy", 2), ("hard", 2)]
    by_level = depth_use(model, text, by="level", **{**QUICK, "futures": 0}).tables["depth score by level"].rows
    for row, facts in zip(by_level, alone, strict=True):
        assert row[2:] == pytest.approx((facts["depth_score"], facts["depth_score_of_predictions"]), rel=1e-4)


def test_images_have_no_future() -> None:
    outcome = depth_use(awake(tiny_vit()), examples_for("vit", 3), maps=1, gradient_steps=64)
    assert not any("future" in name for name in [*outcome.layers, *outcome.tables, *outcome.facts])
    assert outcome.layers["effect on predictions at all positions without a block"][3] > 1e-3
    assert outcome.layers["lens: KL to the output"][3] == pytest.approx(0, abs=1e-6)
    assert outcome.facts["integration_gap"] < 1e-2
    assert len(outcome.tables["example 1: change of the answer when a position is erased"].columns) == 1 + 5


def test_blocks_whose_parts_are_not_known_are_measured_as_wholes() -> None:
    import families

    outcome = depth_use(families.FAMILIES["GPT-NeoX"].build(), texts(18), **QUICK)  # parallel: m is beside h
    assert "relative contribution, MLP" in outcome.layers
    assert all(math.isfinite(value) for value in outcome.layers["relative contribution, MLP"].values())


@pytest.mark.parametrize(
    ("build", "text", "knobs", "said"),
    [
        (tiny_llama, lambda: texts(), {}, "empty"),
        (tiny_llama, lambda: texts(9), {}, "long enough"),
        (tiny_llama, lambda: texts(20), {"by": "lvel"}, "no column 'lvel'"),
        (tiny_resnet, lambda: examples_for("resnet", 2), {}, "stages"),
        (tiny_llama, lambda: texts(20, 12, prompt=12), {}, "no token that is predicted"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(
    build: Callable[[], nn.Module], text: Callable[[], Examples], knobs: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        depth_use(build(), text(), **knobs)
