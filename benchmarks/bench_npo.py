"""NPO with cached reference outputs against holding a second model: 1.25 times faster per step, half the model memory.

The target is for steps in which every term asks the reference. With the retain term gdr only one of two forwards does, so
that holding a second model costs one forward in seven at most; that case is shown without a target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from _timing import alternate, median_ratio, rounds, show
from torch import Tensor, nn

from overhaul.data.examples import Batch, Examples
from overhaul.data.materials import examples
from overhaul.fit import fit
from overhaul.forget._losses import npo as npo_loss
from overhaul.forget._losses import npo_term
from overhaul.models import open_model
from overhaul.objectives import Term, cross_entropy, forward, kl_sum, sequence_nll, sequences, units
from overhaul.references import cache_outputs, reference_nll

STEPS = 10
BATCH = 16
BETA = 0.1
FORGOTTEN = {"person": ["Ada Quill"]}


def size(*modules: nn.Module | None) -> int:
    return sum(p.numel() * p.element_size() for module in modules if module is not None for p in module.parameters())


def beside(reference: nn.Module, loss: Callable[[Tensor, Tensor, Batch], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    """A loss that asks a second model at every step, as most code does."""

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            theirs = forward(reference, batch)
        return loss(logits, theirs, batch)

    return summed


def npo_beside(logits: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
    nll, reference = (sequence_nll(each, batch["labels"]) for each in (logits, theirs))
    return npo_loss(nll, reference, BETA).sum()


def kl_beside(logits: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
    return kl_sum(logits, theirs, batch["labels"])


def trained(model: nn.Module, terms: list[Term], data: Mapping[str, Examples]) -> Callable[[], object]:
    return lambda: fit(model, terms, data, steps=STEPS, batch_size=BATCH, lr=1e-5)


def main() -> None:
    times = rounds(9)
    original, tokenizer = open_model("starter:docs-llama")
    forget = examples("starter:people", tokenizer, where=FORGOTTEN)
    retain = examples("starter:people", tokenizer, unless=FORGOTTEN)
    reference = cache_outputs(original, retain, 64)
    cached_forget = forget.with_column("reference_nll", reference_nll(original, forget, 64))
    second = copy.deepcopy(original).requires_grad_(False)
    asked_npo = Term("forget", beside(second, npo_beside), sequences, name="NPO")
    asked_kl = Term("retain", beside(second, kl_beside), units, name="retain")
    gdr, klr = cross_entropy("retain", name="retain"), reference.kl_term("retain", name="retain")
    for kind, ours, theirs in (("none", [], []), ("klr", [klr], [asked_kl]), ("gdr", [gdr], [gdr])):
        kept, held = copy.deepcopy(original), copy.deepcopy(original)
        data = {"forget": cached_forget, "retain": reference.examples if kind == "klr" else retain}
        seconds = alternate(
            {
                "cached": trained(kept, [npo_term("forget", BETA), *ours], data),
                "second model": trained(held, [asked_npo, *theirs], {"forget": forget, "retain": retain}),
            },
            times,
        )
        faster = median_ratio(seconds["second model"], seconds["cached"])
        small, large = size(kept, reference.head if kind == "klr" else None), size(held, second)
        speed = f"{faster:.2f} times as fast" + (" (target: at least 1.25)" if kind != "gdr" else "")
        memory = (
            f"{small / large:.2f} of the model memory, {small / 1e6:.1f} of {large / 1e6:.1f} MB (target: about half)"
        )
        title = f"NPO, retain term {kind}, batches of {BATCH} questions on starter:docs-llama"
        lines = [(speed, faster >= 1.25 if kind != "gdr" else None), (memory, small / large <= 0.6)]
        show(title, seconds, STEPS, "step", lines)


if __name__ == "__main__":
    main()
