"""One pass serves all: membership attacks, truth ratio and extraction together, against a pass for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from _timing import alternate, median_ratio, rounds, show
from torch import Tensor

from overhaul.data.examples import Batch, collate
from overhaul.data.materials import examples
from overhaul.judge.evidence import Evidence
from overhaul.judge.likelihood import answer_logits, batches_within, budget, score
from overhaul.judge.metrics import METRICS
from overhaul.judge.metrics.membership import ATTACKS
from overhaul.models import open_model
from overhaul.modes import at_rest
from overhaul.objectives import evaluate

ROWS = 80

ASKED: Sequence[Sequence[str]] = [
    *([name, f"{name}_tpr_1e_2", f"{name}_tpr_1e_3"] for name in ATTACKS),
    ["truth_ratio", "truth_ratio_arithmetic", "truth_preference"],
    ["extraction", "memorisation"],
]
"""What one pass each would be made for."""


def log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """What the loss attack alone needs."""
    chosen, targets = answer_logits(logits, batch["labels"])
    chosen = chosen.float()
    return chosen.gather(1, targets[:, None])[:, 0] - chosen.logsumexp(dim=1)


def main() -> None:
    times = rounds(9)
    model, tokenizer = open_model("starter:docs-llama")
    forget = examples("starter:people", tokenizer, limit=ROWS)
    strangers = examples("starter:people", tokenizer, split="validation", limit=ROWS)
    batches = [collate([forget.items[i] for i in places]) for places in batches_within(forget, budget(model))]

    def measure(names: Sequence[str]) -> None:
        roles = [Evidence(model, role, ROWS) for role in (forget, strangers)]
        with at_rest(model):
            for name in names:
                METRICS[name].call(*roles[: len(METRICS[name].roles)])

    everything = [name for names in ASKED for name in names]
    seconds = alternate(
        {
            "one pass for all": lambda: measure(everything),
            "a pass for each": lambda: [measure(names) for names in ASKED],
            "scores with moments": lambda: score(model, forget),
            "log-probabilities alone": lambda: evaluate(model, log_probabilities, batches),
        },
        times,
    )
    each = median_ratio(seconds["a pass for each"], seconds["one pass for all"])
    moments = median_ratio(seconds["scores with moments"], seconds["log-probabilities alone"])
    show(f"{len(everything)} measures of {ROWS} answers and {ROWS} of strangers on starter:docs-llama", seconds, 1, "run", [
        (f"{each:.2f} times faster together than one by one (target: at least 2)", each >= 2),
        (f"{moments:.3f} times the log-probabilities alone, moments included (target: at most 1.15)", moments <= 1.15),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
