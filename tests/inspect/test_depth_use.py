"""Depth use: equal to plain forwards with plain hooks, exact where the answer is known, the same in every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import families
from conftest import examples_for, tiny_gemma3, tiny_llama, tiny_qwen3, tiny_resnet, tiny_tokenizer, tiny_vit
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.inspect.depth_use import depth_use
from overhaul.inspect.depth_use.contributions import written
from overhaul.method import Outcome
from overhaul.stack import LayerStack
from plain_hooks import LANGUAGE, awake, first, parts, texts
from tracing import hooks_of

QUICK: dict[str, Any] = {"futures": 2, "stride": 4, "maps": 1, "gradient_steps": 4}


CASE = {
    "method": depth_use,
    "materials": lambda: {
        "model": awake(tiny_llama()),
        "text": encode_qa(people()[:4], tiny_tokenizer(), prompt="{question}"),
    },
    "knobs": {"examples": 2, "stride": 4, "maps": 1, "gradient_steps": 2},
    "varied": {
        "examples": (1, 3),
        "by": (None, "attribute"),
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
        "gradient_steps": (2, 3),
        "gradients_of": ("probability", "log_probability"),
    },
    "idle": {"batch_size": "copies that run together do not change the values"},
}


def found_in(outcome: Outcome) -> Any:
    return outcome.facts, outcome.layers, outcome.tables


# skips


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


@pytest.mark.parametrize("name", LANGUAGE)
def test_attributions_sum_to_the_change_of_the_answer_with_more_steps_ever_better(name: str) -> None:
    model, text = awake(LANGUAGE[name]()), texts(14, prompt=6)

    def gap(steps: int) -> float:
        knobs = {**QUICK, "futures": 0, "gradient_steps": steps, "gradients_of": "log_probability"}
        return depth_use(model, text, **knobs).facts["integration_gap"]

    few, many = gap(2), gap(32)
    assert few > 1e-4
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


@torch.no_grad()
def test_in_a_parallel_block_the_mlp_stands_beside_what_attention_read() -> None:
    model, text = awake(families.FAMILIES["GPT-NeoX"].build()), texts(18)
    layers = depth_use(model, text, **{**QUICK, "maps": 0}).layers
    seen: list[Tensor] = []
    block = model.gpt_neox.layers[2]
    with ExitStack() as undo:
        undo.callback(block.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
        undo.callback(block.mlp.register_forward_hook(lambda *call: seen.append(call[2])).remove)
        model(input_ids=text[0]["input_ids"][None], use_cache=False)
    h, m = seen
    expected = float((m.norm(dim=-1) / h.norm(dim=-1)).mean())
    assert layers["relative contribution, MLP"][2] == pytest.approx(expected, rel=1e-4)


def test_post_norm_blocks_are_measured_as_wholes() -> None:
    outcome = depth_use(families.FAMILIES["BERT"].build(), texts(18), **QUICK)
    assert [name for name in outcome.layers if name.startswith("relative")] == ["relative contribution, block"]
    assert not any("attention" in name for name in [*outcome.layers, *outcome.tables])


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
