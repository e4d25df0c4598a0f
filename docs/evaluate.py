"""Print the table of docs/evaluating.md: the field's measures of forgetting, on one small world of invented people.

`python docs/evaluate.py` takes some minutes. Settings are those that docs/forgetting.md found for each method.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import overhaul as oh
from overhaul.claims import _people
from overhaul.judge.representation import depth
from overhaul.report.comparison import read

SEED = 0
METHODS = ("npo", "simnpo", "dpo")
STORED = Path(__file__).parent / "comparisons" / "people.json"


def main() -> None:
    """Build the world, let each method forget, and judge all of them."""
    world = _people.build(SEED)
    found = [step for row in read(STORED).rows if (step := row.facts["step"])]
    knobs = {name.removeprefix("forget."): knobs for step in found for name, knobs in step.items()}
    models: dict[str, nn.Module] = {"original": world.original, "retrained": world.retrained}
    for name in METHODS:
        torch.manual_seed(SEED)
        changed = getattr(oh.forget, name)(copy.deepcopy(world.original), world.forget, world.retain, **knobs[name])
        models[name] = changed.model
    models["fine-tuned on retain"] = oh.retain_only(copy.deepcopy(world.original), world.retain)
    attacks = oh.Attacks(by="person", shots=world.retain)
    table = oh.unlearning_table(
        models, forget=world.forget, retain=world.retain, holdout=world.holdout, by="person", attacks=attacks,
        null="fine-tuned on retain",
    )  # fmt: skip
    print(table.to_markdown())
    for name, model in models.items():
        if name != "original":
            print(f"depth of {name}: {depth(model, world.original, world.forget)}")


if __name__ == "__main__":
    main()
