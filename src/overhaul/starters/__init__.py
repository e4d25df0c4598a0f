"""Build a starter model again and write its card: what it measures, with the numbers it is held to beside them."""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from overhaul import models
from overhaul.data import corpora, tasks
from overhaul.data.encode import encode_images, encode_qa, encode_text
from overhaul.data.examples import Examples
from overhaul.data.sources import STARTER_DATA
from overhaul.errors import RequestError, did_you_mean
from overhaul.judge import judge as judging
from overhaul.starters import adapters, fine_tuned
from overhaul.starters.builds import BUILDS as PRETRAINED
from overhaul.starters.fine_tuned import Quality as Quality

BUILDS: Mapping[str, Callable[[Path], None]] = {**PRETRAINED, **fine_tuned.BUILDS, **adapters.BUILDS}

SUMMARIES: Mapping[str, str] = {
    "docs-llama": "A Llama of 8 blocks that learnt Python's reference prose and library, sums, brackets and forty people",
    "digits-vit": "A ViT of 4 blocks that reads handwritten digits",
    "digits-resnet": "A ResNet of two stages that reads handwritten digits",
    **adapters.SUMMARIES,
    **fine_tuned.SUMMARIES,
}

ORIGINS: Mapping[str, str] = {
    "docs-llama": (
        "Trained on text that ships with CPython 3.11 (its reference and standard library, PSF licence) and on generated "
        "sums, brackets and people. The people are invented; no fact about them is about anybody."
    ),
    "digits-vit": "Trained on four fifths of scikit-learn's copy of the UCI handwritten digits.",
    "digits-resnet": "Trained on four fifths of scikit-learn's copy of the UCI handwritten digits, enlarged four times.",
    **adapters.ORIGINS,
    **fine_tuned.ORIGINS,
}


def build(name: str, out: Path) -> str:
    """Train starter `name` into the new folder `out`; return its card.

    Raises:
        RequestError: no such starter, or the folder exists.
    """
    if name not in BUILDS:
        raise RequestError(f"There is no starter model {name!r}.{did_you_mean(name, BUILDS)}")
    if out.exists():
        raise RequestError(f"{out} exists already. Choose a new folder.")
    started = time.perf_counter()
    BUILDS[name](out)
    card = write_card(name, out, time.perf_counter() - started)
    return card


def write_card(name: str, folder: Path, seconds: float | None = None) -> str:
    """Measure the starter in `folder` and write its README.md."""
    known = models.facts(folder)
    recipe = BUILDS[name].__module__.rpartition(".")[2]
    measured = QUALITY[name](folder)
    took = f" Training took {seconds / 60:.0f} minutes on two cores." if seconds else ""
    lines = [
        f"# {SUMMARIES[name]}",
        "",
        f"{known.architecture}, {known.parameters:,} parameters, {known.dtype}.{took}",
        "",
    ]
    lines += ["| measured | value | held to |", "|---|---:|---:|"]
    lines += [f"| {what} | {value:.3f} | {bar} |" for what, (value, bar) in measured.items()]
    lines += [
        "",
        ORIGINS[name],
        "",
        f"Trained again by `overhaul starters build {name} -o FOLDER`; the recipe is `starters/{recipe}.py`.",
        "",
    ]
    card = "\n".join(lines)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def docs_llama_quality(folder: Path) -> Quality:
    """Recall of the people, unseen sums and brackets, and bits per byte beside `xz -9` on held-out text."""
    model, tokenizer = models.open_model(folder)
    people = tasks.people("train")
    asked_anew = [{**row, "question": row["paraphrase"]} for row in people if row["phrasing"] == 0]
    data: dict[str, Examples] = {
        "people": encode_qa(people, tokenizer),
        "asked anew": encode_qa(asked_anew, tokenizer),
        "strangers": encode_qa(tasks.people("validation"), tokenizer),
        "sums": encode_qa(tasks.addition("validation"), tokenizer),
        "brackets": encode_qa(tasks.brackets("validation"), tokenizer),
        "prose": encode_text(corpora.docs("validation"), tokenizer),
        "code": encode_text(corpora.code("validation"), tokenizer),
    }
    answers = [role for role, examples in data.items() if "answer" in examples.rows[0]]
    requests = judging.check({"kept": {"accuracy": answers, "bits_per_byte": ["prose", "code"]}}, data)
    value = {m.on: m.value for m in judging.judge(model, requests, data, limit=1000).measures}
    xz = {"prose": xz_bits_per_byte(corpora.docs("validation")), "code": xz_bits_per_byte(corpora.code("validation"))}
    return {
        "facts of the forty people, exact": (value["people"], ">= 0.97"),
        "the same, asked in words never trained on": (value["asked anew"], ""),
        "facts of people never seen, exact": (value["strangers"], "chance"),
        "unseen two-digit sums, exact": (value["sums"], ">= 0.90"),
        "unseen bracket sequences, balanced": (value["brackets"], ""),
        "bits per byte, held-out prose": (value["prose"], f"<= {0.9 * xz['prose']:.3f} (0.9 x `xz -9`)"),
        "bits per byte, held-out code": (value["code"], f"<= {0.9 * xz['code']:.3f} (0.9 x `xz -9`)"),
    }


def xz_bits_per_byte(rows: list[tasks.Row]) -> float:
    """What `xz -9` needs for the same text as one file."""
    text = "\n".join(row["text"] for row in rows).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def digits_quality(data: str, bar: str) -> Callable[[Path], Quality]:
    """Accuracy on the held-out fifth of the digits."""

    def measure(folder: Path) -> Quality:
        model, _ = models.open_model(folder)
        roles = {"test": encode_images(STARTER_DATA[data]("validation"))}
        requests = judging.check({"kept": {"accuracy": "test"}}, roles)
        return {
            f"accuracy on held-out starter:{data}": (
                judging.judge(model, requests, roles, limit=1000).measures[0].value,
                bar,
            )
        }

    return measure


QUALITY: dict[str, Callable[[Path], Quality]] = {
    "docs-llama": docs_llama_quality,
    "digits-vit": digits_quality("digits", ">= 0.96"),
    "digits-resnet": digits_quality("digits-32", ">= 0.98"),
    **adapters.QUALITY,
    **fine_tuned.QUALITY,
}
