"""`fit` against a raw PyTorch loop (at most 3 ms per step over it) and against transformers' Trainer (faster)."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from _timing import alternate, median_difference, median_ratio, rounds, show
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from overhaul.data.examples import Examples, collate
from overhaul.data.materials import examples
from overhaul.fit import Draw, fit
from overhaul.models import open_model
from overhaul.objectives import answer_tokens, cross_entropy, cross_entropy_sum, forward

STEPS = 20
BATCH = 16
RATE = 1e-5


def by_fit(model: nn.Module, data: Examples) -> None:
    fit(model, [cross_entropy("text")], {"text": data}, steps=STEPS, batch_size=BATCH, lr=RATE)


def by_hand(model: nn.Module, data: Examples) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    draw = Draw("text", len(data), torch.initial_seed())
    model.train()
    for step in range(STEPS):
        batch = collate([data.items[i] for i in draw.indices(step * BATCH, BATCH)])
        loss = cross_entropy_sum(forward(model, batch), batch) / answer_tokens(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(model: nn.Module, data: Examples, folder: str) -> None:
    options = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, report_to="none",
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
    models = {name: copy.deepcopy(original) for name in ("fit", "raw loop", "Trainer")}
    with tempfile.TemporaryDirectory() as folder:
        seconds = alternate(
            {
                "fit": lambda: by_fit(models["fit"], data),
                "raw loop": lambda: by_hand(models["raw loop"], data),
                "Trainer": lambda: by_trainer(models["Trainer"], data, folder),
            },
            times,
        )
    over = 1e3 * median_difference(seconds["fit"], seconds["raw loop"]) / STEPS
    faster = median_ratio(seconds["Trainer"], seconds["fit"])
    title = f"{STEPS} steps of {BATCH} questions on starter:docs-llama, set-up included"
    show(title, seconds, STEPS, "step", [
        (f"{over:.2f} ms per step over the raw loop (target: at most 3)", over <= 3.0),
        (f"{faster:.2f} times as fast as Trainer (target: above 1)", faster > 1.0),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
