from __future__ import annotations

import torch

from overhaul.claims.attention_residuals import CLAIM, LENGTH, Size, _fresh, _windows, experiment, growth, loss


def test_one_short_experiment_gives_every_number_that_the_checks_read() -> None:
    found = experiment(0, Size(steps=1, batch=2, judged=8))
    assert {type(check.passes(found)) for check in CLAIM.checks} == {bool}
    assert CLAIM.checks[4].passes(found) and not CLAIM.checks[2].passes(found)  # converted at once, and not yet trained
    trained = {f"{label}, {what}" for label in ("plain", "block", "full") for what in ("loss", "growth")}
    uniform = {"block, distance from uniform", "full, distance from uniform", "block with zero queries, loss"}
    converted = {f"converted to {label}{how}, loss" for label in ("block", "full") for how in ("", ", random queries")}
    assert set(found) == trained | uniform | converted


def test_the_text_is_split_and_a_fresh_model_knows_nothing() -> None:
    train, held_out = _windows("train"), _windows("validation")
    assert len(train) > 1000 and len(held_out) > 50 and train[0]["input_ids"].shape == (LENGTH,)
    model = _fresh()
    assert 5.4 < loss(model, held_out[:16]) < 5.8
    with torch.no_grad():
        for block in model.model.layers:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert growth(model, held_out[:16]) == 1
