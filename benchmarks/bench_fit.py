"""A step of `fit` against a raw PyTorch loop (at most 3 ms over it) and against transformers' Trainer (no slower).

A step is the difference between a long and a short training of the same code, divided by the steps between them: what comes
before the first step (accelerate, data loaders, a first checkpoint) is stated apart.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from functools import partial
from typing import Any

import torch
from _timing import alternate, median_difference, median_ratio, rounds, show
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from overhaul.data.examples import Examples, collate
from overhaul.data.materials import examples
from overhaul.fit import Draw, fit
from overhaul.forward import forward
from overhaul.models import open_model
from overhaul.objectives import answer_tokens, cross_entropy, cross_entropy_sum

SHORT, LONG = 5, 25
RATE = 1e-5


def by_fit(model: nn.Module, data: Examples, steps: int, batch: int) -> None:
    fit(model, [cross_entropy("text")], {"text": data}, steps=steps, batch_size=batch, lr=RATE)


def by_hand(model: nn.Module, data: Examples, steps: int, batch_size: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    draw = Draw("text", len(data), torch.initial_seed())
    model.train()
    for step in range(steps):
        batch = collate([data.items[i] for i in draw.indices(step * batch_size, batch_size)])
        loss = cross_entropy_sum(forward(model, batch), batch) / answer_tokens(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(model: nn.Module, data: Examples, steps: int, batch: int, folder: str) -> None:
    options = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=RATE, report_to="none",
        lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, optim="adamw_torch_fused", dataloader_pin_memory=False,
    )  # fmt: skip
    items: Any = data.items
    trainer = Trainer(model=model, args=options, train_dataset=items, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main() -> None:
    times = rounds(9)
    original, tokenizer = open_model("starter:docs-llama")
    data = examples("starter:people", tokenizer)
    ways = {"fit": by_fit, "raw loop": by_hand, "Trainer": by_trainer}
    with tempfile.TemporaryDirectory() as folder:
        for batch in (16, 4):
            models = {name: copy.deepcopy(original) for name in ways}
            runs = {
                (name, steps): partial(
                    way, models[name], data, steps, batch, **({"folder": folder} if name == "Trainer" else {})
                )
                for name, way in ways.items()
                for steps in (SHORT, LONG)
            }
            taken = alternate({f"{name} {steps}": run for (name, steps), run in runs.items()}, times)
            between = LONG - SHORT
            step = {
                name: [
                    (b - a) / between for a, b in zip(taken[f"{name} {SHORT}"], taken[f"{name} {LONG}"], strict=True)
                ]
                for name in ways
            }
            over = 1e3 * median_difference(step["fit"], step["raw loop"])
            faster = median_ratio(step["Trainer"], step["fit"])
            before = {
                name: statistics.median(taken[f"{name} {SHORT}"]) - SHORT * statistics.median(step[name])
                for name in ways
            }
            said = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in before.items())
            show(f"one step of {batch} questions on starter:docs-llama", step, 1, "step", [
                (f"{over:.2f} ms over the raw loop (target: at most 3)", over <= 3.0),
                (f"{faster:.2f} times as fast as Trainer (target: at least 1)", faster >= 1.0),
                (f"before the first step: {said}", None),
            ])  # fmt: skip


if __name__ == "__main__":
    main()
