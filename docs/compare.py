"""Compare all forget methods on three seeds and store what docs/forgetting.md shows: `make comparisons`, about an hour.

1. Each seed trains its own original, and its own retrained model from the same first weights, so a spread is that of the
   whole experiment and not of one checkpoint.
2. Methods that must be used from the start (shards, prompts) begin from the first weights, all others from the original.
3. Every method for a model that has learnt is first tried at a few settings on a seed of its own. Of those that forget as
   much as the retrained model (the first measure of `forgotten`, to 0.05), the one that keeps most (the first of `kept`)
   is used on the three seeds; where none gets there, the one that forgets most.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import overhaul as oh
from overhaul import method
from overhaul.claims import _people
from overhaul.claims.ssd import PEAK_RATE
from overhaul.data.materials import examples
from overhaul.files import write_json
from overhaul.report.comparison import Comparison, Row, mean
from overhaul.starters.builds import learn_images, new_vit

SEEDS = (0, 1, 2)
TUNING_SEED = 3
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RETAIN_WEIGHTS = (1, 8)
NEAR = 0.05
FORGOTTEN_DIGIT, TRAINING_STEPS = 3, 500
STORED = Path(__file__).parent / "comparisons"
Entry = dict[str, dict[str, Any]]
Settings = list[list[Entry]]
"""For every method, all that is tried."""


@dataclass(frozen=True)
class Setup:
    """What is compared: a recipe without steps, the methods that begin from the original and those from first weights."""

    recipe: dict[str, Any]
    late: Settings
    early: list[Entry]


def people(seed: int, folder: Path) -> Setup:
    """Forget six of sixty fictitious people whom a Llama of two blocks learnt by heart."""
    world = _people.build(seed)
    models = {
        "original": world.original,
        "retrained": world.retrained,
        "fresh": _people.new_model(world.tokenizer, seed, world.size),
    }
    _save(models, world.tokenizer, folder)
    for role, data in world.roles().items():
        lines = [json.dumps({k: v for k, v in row.items() if k != "prompt"}) for row in data.rows]
        (folder / f"{role}.jsonl").write_text("\n".join(lines))
    recipe: dict[str, Any] = {
        "title": "Six of sixty people",
        "seed": seed,
        "materials": {
            role: {"from": str(folder / f"{role}.jsonl"), "as": "qa", "prompt": "{question}"} for role in world.roles()
        }
        | {"retrained": {"model": str(folder / "retrained")}},
        "judge": {
            "forgotten": {
                "answer_probability": "forget",
                "extraction": "forget",
                "forget_quality": "forget",
                "membership": {"members": "forget", "others": "holdout"},
            },
            "kept": {"answer_probability": "retain", "accuracy": "retain", "model_utility": "retain"},
        },
    }
    trained = ("gradient_ascent", "grad_diff", "npo", "simnpo", "dpo", "blur")
    start_again = {"epochs": 64, "batch_size": 64, "lr": 3e-3, "weights": "all"}
    return Setup(
        recipe,
        [
            _ssd(),
            *(_at_rates(name, steps=60, batch_size=16, warmup=0.1) for name in trained),
            [
                {"forget.first_epoch": {"gradients": "live", "unseen": "holdout", "step": step}}
                for step in (0.02, 0.05, 0.1)
            ],
        ],
        [{"forget.sisa": {**start_again, "shards": 3, "slices": 2}}],
    )


def digits(seed: int, folder: Path) -> Setup:
    """Forget one of ten digits that a small ViT learnt."""
    images = {
        "full": {},
        "forget": {"where": {"label": FORGOTTEN_DIGIT}},
        "retain": {"unless": {"label": FORGOTTEN_DIGIT}},
    }
    models: dict[str, nn.Module] = {}
    for name, role in (("fresh", None), ("original", "full"), ("retrained", "retain")):
        torch.manual_seed(seed)
        models[name] = new_vit()
        if role is not None:
            learn_images(models[name], examples("starter:digits", **images[role]), TRAINING_STEPS, PEAK_RATE, name)
    _save(models, None, folder)
    unseen = {"from": "starter:digits", "split": "validation"}
    recipe: dict[str, Any] = {
        "title": "One of ten digits",
        "seed": seed,
        "materials": {role: {"from": "starter:digits", **which} for role, which in images.items()}
        | {f"unseen-{role}": {**unseen, **images[role]} for role in ("forget", "retain")}
        | {"retrained": {"model": str(folder / "retrained")}},
        "judge": {
            "forgotten": {
                "accuracy": ["unseen-forget", "forget"],
                "membership": {"members": "forget", "others": "unseen-forget"},
                "retrained_kl": "unseen-forget",
            },
            "kept": {"accuracy": "unseen-retain", "answer_probability": "unseen-retain"},
        },
    }
    trained = ("gradient_ascent", "grad_diff", "npo", "simnpo", "blur")
    return Setup(
        recipe,
        [
            _ssd(),
            *(_at_rates(name, steps=60, batch_size=64, warmup=0.1) for name in trained),
            [{"forget.vertical": {"recovery": "retain", "lr": lr}} for lr in (0.003, 0.01, 0.03)],
        ],
        [
            {"forget.sisa": {"shards": 3, "slices": 2, "epochs": 30, "batch_size": 64, "lr": 1e-3, "weights": "all"}},
            {"forget.prompt_tokens": {"epochs": 20, "batch_size": 64, "weights": "all"}},
        ],
    )


def _save(models: dict[str, nn.Module], processor: Any, folder: Path) -> None:
    for name, model in models.items():
        oh.save(model, processor, folder / name)


def _ssd() -> list[Entry]:
    return [{"forget.ssd": {"alpha": alpha}} for alpha in ("adaptive", 10, 5, 2)]


def _at_rates(name: str, **knobs: Any) -> list[Entry]:
    known = {knob.name for knob in method.find(f"forget.{name}").knobs}
    # gradient ascent retains nothing
    weights = [{knob: w} for w in RETAIN_WEIGHTS for knob in ("retain_weight", "alpha") if knob in known] or [{}]
    return [{f"forget.{name}": {**knobs, "lr": lr, **weight}} for lr, weight in itertools.product(RATES, weights)]


def tuned(setup: Setup, folder: Path) -> list[Entry]:
    """The setting of every method that rule 3 picks."""
    tried = [entry for entries in setup.late for entry in entries]
    recipe = {**setup.recipe, "model": str(folder / "original"), "compare": tried}
    found = Comparison.from_json(oh.compare(recipe, out=folder / "tuning").report)
    goal, price = (
        next(n for n, m in enumerate(found.measures) if m["group"] == group) for group in ("forgotten", "kept")
    )
    limit = (mean(found["retrained"].values[goal]) or 0.0) + NEAR

    def worth(row: Row) -> tuple[bool, float]:
        forgotten, kept = (mean(row.values[place]) or 0.0 for place in (goal, price))
        return (True, kept) if forgotten <= limit else (False, -forgotten)

    return [
        max((row for row in found.rows if row.facts["step"] in entries), key=worth).facts["step"]
        for entries in setup.late
    ]


def measured(setup: Setup, folder: Path, late: Sequence[Entry]) -> Comparison:
    """One comparison: methods for a model that has learnt, and those that had to be there from the start."""
    recipe = {**setup.recipe, "model": str(folder / "original"), "compare": list(late)}
    found = Comparison.from_json(oh.compare(recipe, out=folder / "late").report)
    for entry in setup.early:
        (name,) = entry
        alone = oh.run({**setup.recipe, "model": str(folder / "fresh"), "steps": [entry]}, folder / name).report
        values = [[measure["values"][-1]] for measure in alone["measures"]]
        (step,) = alone["steps"]
        spent = step["seconds"], step["peak_bytes"]
        found.rows.append(Row(f"{name}, from the start", "method", values, *spent, {"step": entry}))
    return found


def merged(seeds: Sequence[Comparison]) -> Comparison:
    """One comparison of several seeds: values side by side, seconds as a mean, the largest peak."""
    first = seeds[0]
    rows = []
    for n, row in enumerate(first.rows):
        same = [each.rows[n] for each in seeds]
        times, peaks = ([getattr(one, name) for one in same] for name in ("seconds", "peak_bytes"))
        values = [[value for one in same for value in one.values[m]] for m in range(len(first.measures))]
        peak = None if row.peak_bytes is None else max(peaks)
        rows.append(Row(row.label, row.kind, values, mean(times), peak, {"step": row.facts.get("step")}))
    # paths of a folder that is gone tell nobody anything
    model = {**first.facts["model"], "source": first.title}
    facts = {**first.facts, "model": model, "recipe": "", "seeds": [each.facts["seeds"][0] for each in seeds]}
    return Comparison(first.title, first.measures, rows, facts)


if __name__ == "__main__":
    for compared in (people, digits):
        if sys.argv[1:] and compared.__name__ not in sys.argv[1:]:
            continue
        reports: list[Comparison] = []
        chosen: list[Entry] = []
        for seed in (TUNING_SEED, *SEEDS):
            with tempfile.TemporaryDirectory() as place:
                setup = compared(seed, Path(place))
                if seed == TUNING_SEED:
                    chosen = tuned(setup, Path(place))
                else:
                    reports.append(measured(setup, Path(place), chosen))
        write_json(STORED / f"{compared.__name__}.json", merged(reports).to_json())
