"""Attention residuals: what a sublayer reads is a learned mixture of what earlier ones wrote, instead of their sum.

Kimi Team, "Attention Residuals", arXiv:2603.15031. A layer is one sublayer (attention or MLP), f_l with its norm; v_0 is the
embedding, v_i = f_i(h_i). Layers come in blocks of S; a finished block counts as the sum of its layers, an unfinished one as
the sum so far. With the sources k_0 .. k_{n-1} that are there when layer l reads:

    h_l = sum_i a_i k_i,      a = softmax_i( w_l . RMSNorm(k_i) )        w_l, and the norm's gain, in R^d; w_l starts at 0

The head reads so too. S = 1 is "Full", with every layer a source of its own.

How it differs from the paper:

1. A checkpoint can be converted. At w = 0 the sources' plain mean is 1/n of the residual stream, and what reads it is a
   norm; with `scaled` a read is multiplied by n, so that eps makes no difference and the converted model says what it said.
   The paper trains from scratch and does not scale: `scaled=False`, on a `new:` start.
2. Blocks may begin before any sublayer; the paper's loop files them before attention only (an even S).
3. Which norms read the stream, and which modules write to it, is found by running the model. The sum still runs along.
4. One softmax over all sources, in float32, without their stack; the paper's two phases give the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from overhaul import session
from overhaul.conversions import convert
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.fit import Ledger, OptimizerFactory, Schedule, fit
from overhaul.forward import forward
from overhaul.method import Outcome, method
from overhaul.modes import at_rest
from overhaul.objectives import check_learnable, cross_entropy
from overhaul.outcome import Table
from overhaul.rewire.attention_residuals.layout import layout_of
from overhaul.rewire.attention_residuals.reads import Routing
from overhaul.stack import LayerStack

SHOWN = 16
"""Examples on which depth weights are averaged."""


@method(verb="rewire", paper="2603.15031", changes="architecture", memory="training", alone=True)
def attention_residuals(
    model: nn.Module,
    text: Examples,
    *,
    size: Annotated[int, Ge(1)] | None = None,
    scaled: bool = True,
    steps: Annotated[int, Ge(0)] = 200,
    batch_size: Annotated[int, Ge(1)] = 8,
    lr: Annotated[float, Gt(0)] = 5e-4,
    query_lr: Annotated[float, Gt(0)] = 2e-2,
    warmup: Annotated[int, Ge(0)] = 0,
    schedule: Schedule = "constant",
    weight_decay: Annotated[float, Ge(0)] = 0.0,
) -> Outcome:
    """Let every sublayer read a learned mixture of what earlier sublayers wrote, and train.

    A trained checkpoint starts as what it was, but its gradients are others: train it at a small rate.

    Args:
        model: a pre-norm transformer (Llama, Qwen, Gemma, GPT-2, ViT, ...), trained or `new:`.
        text: what it is trained on, and where depth weights are shown (on 16 examples).
        size: sublayers in a block; 1 is Full; about eight blocks, as the paper advises, if None.
        scaled: multiply a read by the number of its sources, so that a checkpoint starts as the identity.
        steps: optimizer steps; 0 converts and does not train.
        batch_size: examples in one step.
        lr: peak rate of AdamW.
        query_lr: peak rate of the queries and their gains.
        warmup: steps of linear warm-up.
        schedule: what follows.
        weight_decay: of matrices.

    Returns:
        The same model, converted: saved, it opens with Overhaul. The table is a heat map of the mean weight of each source
        (the embedding, then blocks) in each read. Layers: distance from uniform mixing (total variation), and the
        weight of the embedding. Facts: sublayers in a block, sources of the head, parameters added, steps, and the largest
        difference of an output at step 0.

    Raises:
        RequestError: `text` is empty, or the network is not pre-norm (post-norm, parallel).
        RunError: training diverged (the last good weights are kept).
    """
    if not len(text):
        raise RequestError("rewire.attention_residuals: the role `text` is empty.")
    if steps:
        check_learnable("text", text)
    stack = LayerStack.of(model)
    inputs = {k: v for k, v in collate(text.items[:1]).items() if k in ("input_ids", "pixel_values")}
    layout = layout_of(stack, inputs)
    size = size or math.ceil(2 * len(stack) / 8)
    before = sum(p.numel() for p in model.parameters())
    difference = convert(
        model, "attention_residuals", starts_as_identity=scaled, inputs=inputs, size=size, scaled=scaled, **layout
    )
    added = sum(p.numel() for p in model.parameters()) - before
    ledger = Ledger()
    if steps:
        session.begins(lambda: model)
        ledger = fit(
            model,
            [cross_entropy("text")],
            {"text": text},
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            warmup=warmup,
            schedule=schedule,
            optimizer=two_rates(query_lr / lr, weight_decay),
            name="attention residuals",
        )
    rows = depth_weights(model, text)
    facts: dict[str, Any] = {
        "sublayers_in_a_block": size,
        "sources": len(rows[-1]),
        "added_parameters": added,
        "steps": ledger.step,
    }
    facts["difference_at_step_0"] = difference
    return Outcome(model, facts, _layers(rows), ledger.curves, {"depth weights": _table(rows)})


def two_rates(factor: float, weight_decay: float) -> OptimizerFactory:
    """AdamW with `factor` times the rate for what reads over depth; matrices decay, vectors do not."""

    def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        deep = [p for name, p in trained.items() if "depth_read" in name]
        rest = [p for name, p in trained.items() if "depth_read" not in name]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": deep, "weight_decay": 0.0, "lr": factor},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0)

    return build


@torch.no_grad()
def depth_weights(model: nn.Module, text: Examples) -> list[Float[Tensor, " n"]]:
    """The mean weight of each source over the tokens of some examples, for each read in order, the head's last.

    Raises:
        RequestError: the model has no attention residuals.
    """
    routing = next((module for module in model.modules() if isinstance(module, Routing)), None)
    if routing is None:
        raise RequestError(f"This {type(model).__name__} has no attention residuals.")
    total: list[Tensor] = []
    tokens = 0
    with at_rest(model):
        for item in text.items[:SHOWN]:
            routing.noted = []
            try:
                batch = {name: value.to(next(model.parameters()).device) for name, value in collate([item]).items()}
                forward(model, batch)
                count = batch["input_ids"].shape[1] if "input_ids" in batch else 1
                new = [count * row.cpu() for row in routing.noted]
            finally:
                routing.noted = None
            total = [a + b for a, b in zip(total, new, strict=True)] if total else new
            tokens += count
    return [row / tokens for row in total]


def _layers(rows: list[Tensor]) -> dict[str, dict[int, float]]:
    """Of each block the mean over its two reads; of the head its own."""
    depths = [[rows[2 * n], rows[2 * n + 1]] for n in range(len(rows) // 2)] + [[rows[-1]]]

    def mean(of: Any) -> dict[int, float]:
        return {depth: sum(float(of(row)) for row in its) / len(its) for depth, its in enumerate(depths)}

    return {
        "distance from uniform mixing": mean(lambda row: (row - 1 / len(row)).abs().sum() / 2),
        "weight of the embedding": mean(lambda row: row[0]),
    }


def _table(rows: list[Tensor]) -> Table:
    names = [f"{n // 2} {('attention', 'mlp')[n % 2]}" for n in range(len(rows) - 1)] + ["head"]
    width = max(map(len, rows))
    values = [[*map(float, row), *[None] * (width - len(row))] for row in rows]
    columns = ["embedding", *range(1, width)]
    return Table.grid(
        values, names, columns, along="what reads", across="source: embedding, then blocks", unit="weight"
    )
