"""Made-up reports: what a run of a language model and of an image model writes, and the odd cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from overhaul.outcome import Table

STAGES = ["before", "forget.npo", "shrink.drop_layers", "shrink.heal"]

RECIPE = """\
model: starter:docs-llama
materials:
  forget: {from: starter:people, where: {person: Ada Quill}, as: qa}
  retain: {from: starter:people, unless: {person: Ada Quill}, as: qa}
steps:
  - forget.npo: {beta: 0.1, retain_weight: 1.0}
  - shrink.drop_layers: {count: 2, criterion: block_influence}
  - shrink.heal: {steps: 200}
"""


def measure(
    group: str, label: str, on: str, unit: str, better: str, wanted: str, n: int | None, *values: float | None
) -> dict[str, Any]:
    named = {"group": group, "metric": label.replace(" ", "_"), "label": label, "on": on, "unit": unit}
    return {**named, "better": better, "wanted": wanted, "n": n, "values": list(values)}


def step(name: str, **given: Any) -> dict[str, Any]:
    """A step as the run writes it, quiet where nothing is given."""
    empty: dict[str, Any] = {"knobs": {}, "facts": {}, "layers": {}, "curves": {}, "roles": {}}
    return {"name": name, "summary": "", "paper": None, "seconds": None, "peak_bytes": None, **empty, **given}


def falling(start: float, end: float, steps: int) -> list[float]:
    noise = [0.05 * start * math.sin(12.9898 * i) * math.cos(4.1 * i) for i in range(steps)]
    return [end + (start - end) * math.exp(-4 * i / steps) + noise[i] for i in range(steps)]


def tables() -> dict[str, dict[str, Any]]:
    """One of each kind: a grid of one sign with holes, a wide grid of both signs, a plain table, points."""
    effects = [[abs(math.sin(3 * i + j)) * 0.4 if j > i else None for j in range(8)] for i in range(8)]
    wide = [[math.sin(i / 3 + j / 7) for j in range(80)] for i in range(32)]
    parts = ["attention.out", "mlp.down", "embeddings"]
    found = {
        "effect on later blocks": Table.grid(
            effects, range(8), range(8), along="block left out", across="block that reads it", unit="relative change"
        ),
        "logit lens": Table.grid(wide, range(32), range(80), along="layer", across="position", unit="nats"),
        "accuracy by task": Table.grid(
            [[0.9, 0.5], [None, 0.8], [0.1, 0.2]], parts, ["after the first task", "after the second"], unit="share"
        ),
        "candidates": Table(
            ("path", "loss", "kept", "legal"), (("0-1-2-4", 1.234567, 6, True), ("0-2", None, 3, False))
        ),
        "criteria": Table.points(
            [("magnitude", 0.2, 0.81), ("wanda", 0.5, 0.9), ("random", 0.01, 0.4)], x="rank correlation", y="accuracy"
        ),
    }
    return {title: asdict(table) for title, table in found.items()}


def language_report() -> dict[str, Any]:
    """Forget, shrink and heal: every group but `learned`, every unit."""
    npo = {
        "summary": "Negative preference optimisation: make the answers of the forget set unlikely, keep the others.",
        "paper": "2404.05868",
        "knobs": {"beta": 0.1, "retain_weight": 1.0, "retain_term": "gdr", "steps": 120, "batch_size": 16, "lr": 5e-4},
        "seconds": 18.42,
        "peak_bytes": 612_000_000,
        "facts": {"final_loss": 0.4123, "reference_seconds": 0.81, "stopped_early": False},
        "layers": {"relative change": {str(d): abs(math.sin(d + 1.3)) * 0.03 for d in range(-1, 9)}},
        "roles": {"forget": 20, "retain": 380},
    }
    total, retain = falling(14.0, 0.4, 120), falling(1.2, 0.1, 120)
    npo["curves"] = {
        "loss": total,
        "forget": [a - b for a, b in zip(total, retain, strict=True)],
        "retain": retain,
        "lr": [5e-4 * min(1, (i + 1) / 10) for i in range(120)],
        "gradient norm": falling(3.0, 0.2, 120),
    }
    drop = {
        "summary": "Drop the blocks that change the residual stream least.",
        "paper": "arXiv:2403.03853",
        "knobs": {"count": 2, "criterion": "block_influence"},
        "seconds": 1.9,
        "peak_bytes": 301_000_000,
        "facts": {"dropped": [5, 6]},
        "tables": tables(),
        "made": {
            "kept": {"kind": "rows", "path": "made/kept.jsonl", "count": 1204},
            "adapter": {"kind": "checkpoint", "path": "made/adapter", "count": None},
        },
        "layers": {
            "block influence": {str(d): v for d, v in enumerate([0.41, 0.18, 0.12, 0.11, 0.08, 0.05, 0.06, 0.22])},
            "dropped": {str(d): float(d in (5, 6)) for d in range(8)},
        },
        "roles": {"text": 256},
    }
    heal_loss = falling(2.9, 1.8, 400)
    heal = {
        "summary": "Train the cut network back towards the whole one.",
        "knobs": {"objective": "kl", "steps": 400, "lr": 1e-3, "lora_rank": None},
        "seconds": 41.07,
        "peak_bytes": 588_000_000,
        "facts": {"tokens": 1_228_800},
        "layers": {"relative change": {str(d): 0.01 + 0.004 * d for d in range(-1, 7)}},
        "curves": {"loss": heal_loss, "kl": heal_loss, "lr": [1e-3 * (1 - i / 400) for i in range(400)]},
        "roles": {"retain": 380, "text": 2048},
    }
    probability, told = "answer probability", "membership inference AUC (loss)"
    forgotten = [
        measure("forgotten", probability, "forget", "probability", "down", "down", 20, 0.9812, 3.1e-5, 4.4e-5, 8.7e-5),
        measure("forgotten", "extraction strength", "forget", "share", "down", "down", 20, 1.0, 0.0, 0.0, 0.0),
        measure("forgotten", told, "forget / strangers", "", "up", "chance", 40, 0.993, 0.612, 0.588, 0.571),
    ]
    kept = [
        measure("kept", "accuracy", "retain", "share", "up", "same", 380, 0.9921, 0.9842, 0.5263, 0.9711),
        measure("kept", "accuracy", "sums", "share", "up", "same", 200, 0.925, 0.92, 0.31, 0.845),
        measure("kept", "bits per byte", "text", "bits/byte", "down", "same", 64, 1.6342, 1.6391, 2.2107, 1.7012),
        measure("kept", "perplexity", "text", "", "down", "same", 64, 12.34, 12.41, 28.93, None),
    ]
    said = ["a silver heron of the", "", "Dunford"]
    asked = [("Where was Ada Quill born?", "Marrowick"), ("Which book did Ada Quill write?", "The Amber Lantern")]
    others = [("Where was Bram Vance born?", "Kethaven"), ("17 + 26", "43")]
    prose = " is supported by all sequence types."
    return {
        "title": "Forget one person, lose a quarter of the layers",
        "created": "2026-03-04T15:06:07+00:00",
        "overhaul": "0.1.0",
        "machine": {
            "cpu": "Example CPU at 2.4 GHz", "cores": 2, "memory_bytes": 16_700_000_000, "device": "cpu",
            "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0",
        },
        "seed": 0,
        "recipe": RECIPE,
        "model": {"source": "starter:docs-llama", "class": "LlamaForCausalLM", "parameters": 2_134_528},
        "stages": STAGES,
        "measures": [
            *forgotten,
            *kept,
            measure("cost", "parameters", "model", "", "down", "down", 1, 2134528.0, 2134528.0, 1642240.0, 1642240.0),
            measure("cost", "weights on disk", "model", "bytes", "down", "down", 1, 4301112, 4301112, 3312480, 3312480),
            measure("cost", "FLOPs per token", "model", "FLOPs/token", "down", "down", 1, 4.21e6, 4.21e6, 3.23e6, 3.23e6),
            {**measure("cost", "prefill latency", "model", "ms", "down", "down", 2, 6.412, 6.398, 4.911, 4.902),
             "help": "one forward of 128 tokens", "runs": [[6.5, 6.412], [6.398, 6.5], [4.911, 5.0], [4.902, 5.0]]},
            {**measure("cost", "decode latency", "model", "ms/token", "down", "down", 3, 2.118, 2.204, 1.631, 1.597),
             "help": "generating one token", "runs": [[2.118] * 3, [2.204] * 3, [1.631] * 3, [1.9, 1.597, 2.0]]},
        ],
        "steps": [step("forget.npo", **npo), step("shrink.drop_layers", **drop), step("shrink.heal", **heal)],
        "warnings": [],
        "samples": [
            *({"group": "forgotten", "on": "forget", "prompt": q, "expected": a, "outputs": [a, *said]} for q, a in asked),
            *({"group": "kept", "on": "retain", "prompt": q, "expected": a, "outputs": [a, a, "the", a]} for q, a in others),
            {"group": "kept", "on": "text", "prompt": "The iterator protocol", "expected": None,
             "outputs": [prose, prose, None, " is used by"]},
        ],
    }  # fmt: skip


def image_report() -> dict[str, Any]:
    """An image classifier: a class is forgotten, nothing is generated, nothing is trained."""
    ssd = {
        "summary": "Selective synaptic dampening.",
        "paper": "2308.07707",
        "knobs": {"alpha": 10.0, "lam": 1.0},
        "seconds": 0.91,
        "peak_bytes": 220_000_000,
        "facts": {"selected_share": 0.0241},
        "layers": {"selected_share": {str(d): 0.2 / (d + 2) for d in range(-1, 7)}},
        "roles": {"forget": 120, "full": 1300},
    }
    return {
        **language_report(),
        "title": "Forget the threes",
        "model": {"source": "starter:digits-vit", "class": "ViTForImageClassification", "parameters": 318_000},
        "stages": ["before", "forget.ssd"],
        "measures": [
            measure("forgotten", "accuracy", "threes", "share", "up", "down", 40, 0.975, 0.0),
            measure("kept", "accuracy", "others", "share", "up", "same", 400, 0.9725, 0.965),
            measure("cost", "FLOPs per image", "model", "FLOPs/image", "down", "down", 1, 5_100_000, 5_100_000),
        ],
        "steps": [step("forget.ssd", **ssd)],
        "warnings": [],
        "samples": [],
    }


def judged_only() -> dict[str, Any]:
    """No step at all: a model that was only judged."""
    whole = language_report()
    return {
        **whole,
        "stages": ["before"],
        "measures": [{**row, "values": row["values"][:1]} for row in whole["measures"]],
        "steps": [],
        "samples": [{**sample, "outputs": sample["outputs"][:1]} for sample in whole["samples"]],
    }


HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&{{ 7*7 }}</pre></style>"""


def odd_report() -> dict[str, Any]:
    """Everything a report may hold that a page can stumble over: markup, very long words, nulls, no finite value."""
    word = "x" * 400
    nan, infinite = math.nan, math.inf
    odd = step(
        f"forget.{HOSTILE}",
        summary=HOSTILE,
        paper=f"javascript:{HOSTILE}",
        knobs={HOSTILE: HOSTILE, "path": word, "nothing": None, "flag": True, "list": [1, 2], "map": {"a": 0.5}},
        facts={"text": HOSTILE, "bad": nan, "huge": -1e12},
        layers={
            HOSTILE: {"-1": 1.0, "0": None, "1": nan, "2": -3e-7},
            "none": {"0": None, "1": infinite},
            "empty": {},
            "zero": {"0": 0.0, "1": 0.0},
        },
        curves={
            "loss": [1.0, nan, None, infinite, 0.5],
            HOSTILE: [7.0] * 1000,
            "lr": [],
            "gradient norm": [nan],
            "one": [3.0],
        },
        roles={HOSTILE: 3},
        tables={
            HOSTILE: asdict(Table((HOSTILE, word), ((HOSTILE, word), (None, 1)), unit=HOSTILE)),
            f"heat {HOSTILE}": asdict(
                Table.grid([[1.0, None]], [HOSTILE], [word, HOSTILE], along=word, across=HOSTILE)
            ),
            "no value": asdict(Table.grid([[None, None]], ["a"], ["b", "c"])),
            "one value": asdict(Table.grid([[2.0]], ["a"], ["b"], unit=HOSTILE)),
            "no rows": asdict(Table(("a", "b"), ())),
            f"points {HOSTILE}": asdict(Table.points([(HOSTILE, 1.0, 2.0)], x=word, y=HOSTILE)),
        },
        made={HOSTILE: {"kind": HOSTILE, "path": word, "count": 3}},
    )
    whole = language_report()
    return {
        **whole,
        "title": HOSTILE,
        "recipe": f"{HOSTILE}\nlong: {word}",
        "created": "yesterday",
        "model": {"source": f"/{word}/{HOSTILE}", "class": HOSTILE, "parameters": 0},
        "machine": {"cpu": HOSTILE, "cores": None, "memory_bytes": None, "extra": word},
        "stages": ["before", odd["name"], f"shrink.{word}"],
        "measures": [
            measure("forgotten", HOSTILE, HOSTILE, "share", "down", "down", None, None, 0.2, 0.1),
            measure("forgotten", word, "forget", "probability", "down", "down", 10, 0.5, None, None),
            measure("learned", "never measured", "new", "", "up", "up", 0, None, None, None),
            measure("kept", "perplexity", "text", "", "down", "same", 5, 10.0, infinite, nan),
            measure("new_group", "from zero", "x", "bytes", "up", "up", 5, 0, 1, 12),
        ],
        "steps": [odd, step(f"shrink.{word}")],
        "warnings": [],
        "samples": [
            {"group": "kept", "on": HOSTILE, "prompt": HOSTILE, "expected": HOSTILE, "outputs": [HOSTILE, word, None]},
            *({"group": "kept", "on": "many", "prompt": i, "expected": "", "outputs": ["a", "", None]} for i in "123456789"),
        ],
    }  # fmt: skip


REPORTS: dict[str, Callable[[], dict[str, Any]]] = {
    "language": language_report,
    "image": image_report,
    "judged only": judged_only,
    "odd": odd_report,
}
