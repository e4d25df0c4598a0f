"""What restoration reports: rates by arm, layer and alpha, what steering cannot tell, and a sentence on how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overhaul.inspect.restoration.passes import Material, Original, Run, Steered, Unlearned, tensors
from overhaul.inspect.restoration.states import Tally
from overhaul.inspect.restoration.steering import RANDOM, RANDOM_ALONE, READ, Arm, arms, rate
from overhaul.judge.representation import Probe
from overhaul.method import Outcome, Table

IDENTICAL = 1e-6
"""A relative distance of states below which there is nothing to steer: rounding."""

HIGH, ALIKE = 0.5, 0.1
"""A rate from which on much has come back, and how much less a control may restore and still do as well."""

SWAP = "tail swap"


@dataclass(frozen=True)
class Reader:
    """The results with what they are measured by."""

    data: Material
    run: Run
    unlearned: Unlearned
    source: Original
    steered: Steered
    measure: str
    value: str
    same_basis: float

    def rate(self, tally: Tally) -> float | None:
        """The restoration rate of what a model says of the group."""
        own, original = (one.forget.value(self.measure) for one in (self.unlearned, self.source))
        return rate(tally.value(self.measure), own, original)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All that were run, the paper's first."""
        return arms(self.unlearned.read)

    def arm(self, layer: int, arm: Arm, alpha: float) -> float | None:
        """The rate of an arm."""
        return self.rate(self.steered.forget[layer, arm, alpha])

    @property
    def identical(self) -> list[int]:
        """Layers up to which the models are the same."""
        return [layer for layer, distance in self.source.distance.items() if distance <= IDENTICAL]

    @property
    def other_basis(self) -> list[int]:
        """Layers at which the models' features do not correspond."""
        return [layer for layer, value in self.source.correlation.items() if value < self.same_basis]

    @property
    def best(self) -> tuple[int, float]:
        """Layer and alpha at which the paper's arm restores most; the first of equals.

        The last block counts only where it is alone: behind it, the head is handed the original's own state.
        """
        inner = [layer for layer in self.unlearned.layers if layer < self.unlearned.depth - 1]
        places = [(layer, alpha) for layer in inner or self.unlearned.layers for alpha in self.run.alphas]
        return max(places, key=lambda at: self.steered.forget[at[0], self.arms[0], at[1]].value(self.measure))

    def recall(self, probe: Probe, layer: int) -> float:
        """Of the group, behind a block."""
        found = next(recall for label, recall in probe.recall.items() if str(label) == self.value)
        return found[layer + 1]


def outcome(
    data: Material, run: Run, unlearned: Unlearned, source: Original, steered: Steered, *,
    measure: str, value: str | int, same_basis: float,
) -> Outcome:  # fmt: skip
    """All of it as an Outcome."""
    reader = Reader(data, run, unlearned, source, steered, measure, str(value), same_basis)
    made = {layer: feature.autoencoder for layer, feature in source.features.items()}
    return Outcome(
        facts=_facts(reader),
        layers=_layers(reader),
        tables=_tables(reader),
        made={
            "autoencoders": tensors(made),
            "experts": {str(layer): feature.selected for layer, feature in source.features.items()},
        },
    )


def _facts(reader: Reader) -> dict[str, Any]:
    layer, alpha = reader.best
    facts: dict[str, Any] = {"reading": reading(reader)}
    for name, made in (("original", reader.source), ("unlearned", reader.unlearned)):
        facts[f"{name}_on_the_group"] = made.forget.value(reader.measure)
        facts[f"{name}_on_others"] = made.retain.value(reader.measure)
    facts |= {"best_layer": layer, "best_alpha": alpha, "restoration_rate": reader.arm(layer, reader.arms[0], alpha)}
    facts |= {f"rate_of_{arm.name(reader.unlearned.read)}": reader.arm(layer, arm, alpha) for arm in reader.arms[1:]}
    facts["rate_of_tail_swap"] = reader.rate(reader.source.swapped[layer])
    facts["others_under_label_free_steering"] = reader.steered.retain[layer, alpha].value(reader.measure)
    if reader.data.forgotten_class is not None:
        facts["others_then_called_the_group"] = reader.steered.taken[layer, alpha] / len(reader.data.retain)
    return facts | {
        "nothing_to_restore": reader.rate(reader.unlearned.forget) is None,
        "identical_up_to_layers": reader.identical,
        "another_basis_at_layers": reader.other_basis,
    }


def _layers(reader: Reader) -> dict[str, dict[int, float]]:
    source = reader.source
    found = {
        "variance explained by the autoencoder": {
            layer: share for layer, share in source.explained.items() if share is not None
        },
        "dead latents, share": {
            layer: float((one.autoencoder.neuron_activity == 0).float().mean())
            for layer, one in source.features.items()
        },
        "distance of the models, relative": source.distance,
        "correlation of their features": source.correlation,
    }
    for name, probe in (("unlearned", reader.unlearned.probe), ("original", source.probe)):
        if probe is not None:
            layers = reader.unlearned.layers
            found[f"probe recall of the group, {name}"] = {layer: reader.recall(probe, layer) for layer in layers}
    return found


def _tables(reader: Reader) -> dict[str, Table]:
    layers, read = reader.unlearned.layers, reader.unlearned.read
    swapped = [reader.rate(reader.source.swapped[layer]) for layer in layers]
    tables: dict[str, Table] = {}
    for alpha in reader.run.alphas:
        lines = [[reader.arm(layer, arm, alpha) for layer in layers] for arm in reader.arms]
        tables[f"restoration rate at alpha {alpha:g}"] = Table.grid(
            [*lines, swapped],
            [*(arm.name(read) for arm in reader.arms), SWAP],
            layers,
            along="what is steered",
            across="behind block",
            unit="share restored",
        )
    columns = ("what is steered", "alpha", *(f"block {layer}" for layer in layers))
    for measure in ("accuracy", "probability"):
        rows: list[tuple[Any, ...]] = [
            (arm.name(read), alpha, *(reader.steered.forget[layer, arm, alpha].value(measure) for layer in layers))
            for arm in reader.arms
            for alpha in reader.run.alphas
        ]
        rows.append((SWAP, None, *(reader.source.swapped[layer].value(measure) for layer in layers)))
        tables[f"{measure} on the group"] = Table(columns, tuple(rows))
    known = reader.data.forgotten_class is not None
    others = [
        (
            *at,
            reader.unlearned.retain.value("accuracy"),
            tally.value("accuracy"),
            reader.steered.taken[at] / len(reader.data.retain) if known else None,
        )
        for at, tally in reader.steered.retain.items()
    ]
    tables["all others, steered as well"] = Table(
        ("behind block", "alpha", "accuracy before", "accuracy", "called the forgotten class"), tuple(others)
    )
    return tables


def reading(reader: Reader) -> str:
    """How the numbers are to be read, with the controls."""
    if reader.rate(reader.unlearned.forget) is None:
        return "The unlearned model is as good on the group as the original: nothing was forgotten, or nothing known."
    layer, alpha = reader.best
    told = [one for one in reader.unlearned.layers if one not in reader.identical]
    swap = reader.rate(reader.source.swapped[layer]) or 0.0
    if not told:
        return (
            "Both models are identical up to every chosen layer, so there is nothing to steer and a low rate says nothing: "
            f"what was changed lies behind. The original's tail restores {swap:.2f} of the group from the unlearned states."
        )
    restored = reader.arm(layer, reader.arms[0], alpha) or 0.0
    at = f"behind block {layer} at alpha {alpha:g}"
    if restored >= HIGH:
        controls = [RANDOM, READ] if reader.unlearned.read else [RANDOM_ALONE]
        rates = {one.name(reader.unlearned.read): reader.arm(layer, one, alpha) or 0.0 for one in controls}
        alike = [f"{name} ({value:.2f})" for name, value in rates.items() if value >= restored - ALIKE]
        if alike:
            return (
                f"{restored:.2f} of the group comes back {at}, but as much does with {' and with '.join(alike)}: the "
                "decision was suppressed, and the selected features are no evidence of where."
            )
        return f"{restored:.2f} of the group comes back {at}, and less under every control: suppressed, not deleted."
    behind = [one for one in told if one != reader.unlearned.layers[-1]] or told
    if (rest := max(reader.rate(reader.source.swapped[one]) or 0.0 for one in behind)) >= HIGH:
        return (
            f"At most {restored:.2f} of the group comes back by steering, {at}, but the original's tail restores {rest:.2f} "
            "of it from the unlearned states: they still hold the group, and what was changed lies behind."
        )
    probes = [
        f"{reader.recall(one, layer):.2f} ({name})"
        for name, one in (("unlearned", reader.unlearned.probe), ("original", reader.source.probe))
        if one is not None
    ]
    probed = f" Probes tell the group with a recall of {' and '.join(probes)} there." if probes else ""
    if set(told) <= set(reader.other_basis):
        return (
            f"At most {restored:.2f} of the group comes back, which proves nothing: the models' features do not correspond "
            f"at any layer that differs.{probed}"
        )
    return f"At most {restored:.2f} of the group comes back, {at}.{probed}"
