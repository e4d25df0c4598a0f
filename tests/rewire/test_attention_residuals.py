"""Attention residuals: the equation, the wiring, and what is kept, on tiny models of several families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_vit
from contract import Case
from families import FAMILIES
from guarantees import output
from overhaul import models
from overhaul.conversions import convert
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError
from overhaul.rewire.attention_residuals import attention_residuals, depth_weights
from overhaul.rewire.attention_residuals.layout import layout_of
from overhaul.rewire.attention_residuals.reads import Read, Routing
from overhaul.stack import LayerStack

CASE = Case(
    method=attention_residuals,
    materials=lambda: {"model": tiny_llama(), "text": examples_for("llama", 8)},
    knobs={"size": 2, "steps": 3, "batch_size": 4, "lr": 1e-3},
    varied={
        "size": (1, 3), "scaled": (True, False), "steps": (2, 3), "batch_size": (2, 4), "lr": (1e-3, 1e-2),
        "query_lr": (1e-3, 1e-1), "warmup": (0, 2), "schedule": ("constant", "linear"), "weight_decay": (0.0, 0.5),
    },
    apart={"hooks": "what was built reads and writes through hooks, for good"},
)  # fmt: skip

IDS = torch.arange(3, 21).reshape(2, 9)
BUILD = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen3": tiny_qwen3}
STREAMS = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(n)) for n in range(5)]


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def converted(model: Any, size: int, *, scaled: bool = True, spread: float = 0.0) -> Any:
    """With queries and gains drawn at random."""
    convert(model, "attention_residuals", size=size, scaled=scaled, **layout_of(LayerStack.of(model)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Read):
                module.query.normal_(0, spread) if spread else module.query.zero_()
                module.gain.normal_(1, spread) if spread else module.gain.fill_(1)
    return model


def read(spread: float, *, scaled: bool = False) -> Read:
    made = Read(8, Routing(2, scaled, "layers"))
    with torch.no_grad():
        made.query.normal_(0, spread)
        made.gain.normal_(1, spread)
    return made


# the equation


@torch.no_grad()
def test_a_zero_query_reads_the_mean_or_scaled_the_sum() -> None:
    mean = torch.stack(STREAMS).mean(dim=0)
    torch.testing.assert_close(read(0.0)(STREAMS), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(read(0.0, scaled=True)(STREAMS), 5 * mean, atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_are_a_distribution_that_ignores_the_length_of_a_source() -> None:
    made = read(1.0)
    weights = made.weights(STREAMS)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 5))
    longer = [STREAMS[0], 7 * STREAMS[1], *STREAMS[2:]]
    torch.testing.assert_close(made.weights(longer), weights, atol=1e-5, rtol=0)
    expected = made(STREAMS) + 6 * weights[1].unsqueeze(-1) * STREAMS[1]
    torch.testing.assert_close(made(longer), expected, atol=1e-4, rtol=0)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(made([STREAMS[n] for n in order]), made(STREAMS), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_papers_two_phases_give_the_same() -> None:
    """Finished blocks first, with their maximum and plain sum, then the unfinished one merged in."""
    made = read(1.0)
    key = made.query * made.gain

    def score(source: Tensor) -> Tensor:
        return (source * (source.square().mean(-1, keepdim=True) + made.eps).rsqrt()) @ key

    first = torch.stack([score(source) for source in STREAMS[:-1]])
    m1 = first.max(dim=0).values
    o1 = sum((s - m1).exp().unsqueeze(-1) * v for s, v in zip(first, STREAMS[:-1], strict=True))
    l1 = (first - m1).exp().sum(dim=0)
    m2 = score(STREAMS[-1])
    m = torch.maximum(m1, m2)
    above = (m1 - m).exp().unsqueeze(-1) * o1 + (m2 - m).exp().unsqueeze(-1) * STREAMS[-1]
    below = (m1 - m).exp() * l1 + (m2 - m).exp()
    torch.testing.assert_close(made(STREAMS), above / below.unsqueeze(-1), atol=1e-5, rtol=0)


# the wiring


def reference(model: Any, size: int, scaled: bool) -> Tensor:
    """The paper's definition of Block, written out for a Llama: sets of sources from the outputs v_0 .. v_L."""
    body = model.model
    v = [body.embed_tokens(IDS)]
    position = body.rotary_emb(v[0], torch.arange(IDS.shape[1]).unsqueeze(0))

    def sources(layer: int) -> list[Any]:  # layers count from 1; L + 1 is the head
        done = (layer - 1) // size
        blocks = [sum(v[1 + n * size : 1 + (n + 1) * size]) for n in range(done)]
        rest = v[1 + done * size : layer]
        return [v[0], *blocks, *([sum(rest)] if rest else [])]

    def mixture(module: Read, layer: int) -> Tensor:
        stacked = torch.stack(sources(layer))
        unit = stacked * (stacked.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * module.gain
        weights = (unit @ module.query).softmax(dim=0).unsqueeze(-1)
        return (weights * stacked).sum(dim=0) * (len(stacked) if scaled else 1)

    def norm(module: Any, hidden: Tensor) -> Tensor:
        return hidden * (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    for n, block in enumerate(body.layers):
        hidden = norm(block.input_layernorm, mixture(block.depth_read_1, 2 * n + 1))
        v.append(block.self_attn.forward(hidden, position_embeddings=position, attention_mask=None)[0])
        v.append(block.mlp.forward(norm(block.post_attention_layernorm, mixture(block.depth_read_2, 2 * n + 2))))
    return model.lm_head(norm(body.norm, mixture(body.depth_read, len(v))))


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("scaled", [True, False])
def test_blocks_of_every_size_are_the_papers_definition(size: int, scaled: bool) -> None:
    model = converted(tiny_llama(), size, scaled=scaled, spread=0.5)
    torch.testing.assert_close(logits(model), reference(model, size, scaled), atol=2e-5, rtol=1e-4)


def test_the_papers_sets_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama(num_hidden_layers=2)
    written: list[Tensor] = []
    for block in model.model.layers:
        for name in ("self_attn", "mlp"):
            block.get_submodule(name).register_forward_hook(
                lambda _, __, out: written.append(out[0] if isinstance(out, tuple) else out)
            )
    converted(model, 2)
    sets: list[list[Tensor]] = []
    real = Read.forward
    monkeypatch.setattr(Read, "forward", lambda self, sources: sets.append(sources) or real(self, sources))
    written.clear()
    logits(model)
    v0, (v1, v2, v3, v4) = model.model.embed_tokens(IDS), written
    expected = [[v0], [v0, v1], [v0, v1 + v2], [v0, v1 + v2, v3], [v0, v1 + v2, v3 + v4]]
    assert [len(one) for one in sets] == [len(one) for one in expected]
    assert all(
        torch.equal(a, b) for one, other in zip(sets, expected, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("family", BUILD)
def test_weights_of_one_are_the_plain_network_bit_for_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = BUILD[family]()
    before = logits(model)
    converted(model, 1, scaled=False)
    monkeypatch.setattr(Read, "weights", lambda _, sources: torch.ones(len(sources), *sources[0].shape[:2]))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", [*BUILD, "Gemma2", "OPT", "Bloom", "Mixtral", "ViT"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_starts_as_what_it_was(family: str, size: int) -> None:
    model = BUILD[family]() if family in BUILD else FAMILIES[family].build()
    inputs = {"input_ids": IDS} if family in BUILD else FAMILIES[family].inputs()
    before = output(model, inputs)
    layout = layout_of(LayerStack.of(model), inputs)
    convert(model, "attention_residuals", starts_as_identity=True, inputs=inputs, size=size, scaled=True, **layout)
    torch.testing.assert_close(output(model, inputs), before, atol=1e-5, rtol=1e-5)


def test_unscaled_only_the_norms_epsilon_is_between_them() -> None:
    plain: Any = tiny_llama()
    model = converted(copy.deepcopy(plain), 1, scaled=False)
    for module in [*plain.modules(), *model.modules()]:
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)
    layout = layout_of(LayerStack.of(coarse := tiny_llama(rms_norm_eps=1e-2)))
    with pytest.raises(RunError, match="should start as the identity"):
        convert(coarse, "attention_residuals", starts_as_identity=True, size=1, scaled=False, **layout)


def test_later_tokens_change_nothing_and_all_queries_but_the_first_learn() -> None:
    model = converted(tiny_llama(), 2, spread=0.5)
    changed = IDS.clone()
    changed[:, 6:] = 5
    torch.testing.assert_close(logits(model)[:, :6], logits(model, changed)[:, :6])
    start = converted(tiny_llama(), 2)
    start(IDS).logits.square().sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in start.named_parameters() if name.endswith("query")}
    assert norms.pop("model.layers.0.depth_read_1.query") == 0
    assert len(norms) == 8 and all(norm > 0 for norm in norms.values())


# what is kept


@pytest.mark.parametrize("family", BUILD)
def test_it_is_saved_opened_and_generates_with_a_cache(family: str, tmp_path: Path) -> None:
    model = converted(BUILD[family](), 3, spread=0.5)
    again: Any
    again, _ = models.open_model(models.save(model, None, tmp_path / "m"))
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(BUILD[family]()), atol=1e-3)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, without = (again.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, without)


def test_a_copy_has_its_own_reads_and_nothing_of_a_forward_is_held() -> None:
    model = converted(tiny_llama(), 2, spread=0.5)
    before = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[1].depth_read_1.query.add_(1)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    for one in (model, twin):
        routing = one.model.depth_routing
        assert not routing.running and not routing.finished and routing.partial is None
        assert one.model.layers[0].depth_read_1.routing is routing


def test_the_method_trains_and_shows_where_each_sublayer_reads() -> None:
    model: Any = tiny_llama()
    text = examples_for("llama", 8)
    outcome = attention_residuals(model, text, size=3, steps=3, batch_size=4)
    assert outcome.model is model and outcome.facts["sources"] == 4 and outcome.facts["added_parameters"] == 9 * 64
    assert float(outcome.facts["difference_at_step_0"]) < 1e-5
    assert len(outcome.curves["loss"]) == 3
    table: Any = outcome.tables["depth weights"]
    assert [row[0] for row in table.rows] == [f"{n} {part}" for n in range(4) for part in ("attention", "mlp")] + [
        "head"
    ]
    for row, sources in zip(table.rows, (1, 2, 2, 2, 3, 3, 3, 4, 4), strict=True):
        assert sum(value for value in row[1:] if value is not None) == pytest.approx(1, abs=1e-5)
        assert sum(value is not None for value in row[1:]) == sources
    assert outcome.layers["distance from uniform mixing"].keys() == {0, 1, 2, 3, 4}
    assert outcome.layers["weight of the embedding"][0] == pytest.approx((1 + float(table.rows[1][1])) / 2)
    uniform = attention_residuals(tiny_llama(), text, steps=0)
    assert uniform.facts["sublayers_in_a_block"] == 1 and uniform.facts["steps"] == 0
    assert max(uniform.layers["distance from uniform mixing"].values()) < 1e-6


def test_it_works_on_images_and_from_a_config_alone(tmp_path: Path) -> None:
    outcome = attention_residuals(tiny_vit(), examples_for("vit", 8), size=2, steps=1, batch_size=4)
    assert outcome.facts["sources"] > 2
    folder = models.save(tiny_llama(), None, tmp_path / "m")
    new = models.facts(f"new:{folder}").open()
    attention_residuals(new, examples_for("llama", 8), size=2, scaled=False, steps=2, batch_size=4)
    again, _ = models.open_model(models.save(new, None, tmp_path / "out"))
    assert torch.equal(logits(again), logits(new))


def test_what_it_cannot_do_is_refused_in_words() -> None:
    text = examples_for("llama", 4)
    for family in ("BERT", "GPT-NeoX"):
        with pytest.raises(RequestError, match="not all pre-norm"):
            attention_residuals(FAMILIES[family].build(), text, steps=0)
    with pytest.raises(RequestError, match="`text` is empty"):
        attention_residuals(tiny_llama(), Examples([], []))
    with pytest.raises(RequestError, match="has no attention residuals"):
        depth_weights(tiny_llama(), text)
    model = converted(tiny_llama(), 2)
    with pytest.raises(RequestError, match="cannot be run by itself"):
        model.model.layers[1](torch.zeros(1, 3, 32), position_embeddings=None)
    model.activation_checkpointing_enable()
    with pytest.raises(RequestError, match="switch gradient checkpointing off"):
        model.train()(IDS)
    assert isinstance(model.eval(), nn.Module) and logits(model).isfinite().all()
