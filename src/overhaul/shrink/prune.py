"""Prune: set to zero the weights that matter least, block by block, and keep the mask.

The criteria that PERP (Zimmer et al., arXiv:2312.15230) retrains after; Wanda is Sun et al.'s (arXiv:2306.11695), SparseGPT
Frantar and Alistarh's (arXiv:2301.00774). A layer's weights are W [out, in], x_j its input j over all calibration tokens:

    magnitude   score_ij = |W_ij|
    wanda       score_ij = |W_ij| * ||x_j||
    sparsegpt   score_ij = (W_ij / U_jj)^2           U^T U = (X^T X + d I)^-1, U upper triangular
                W_i,j: -= (W_ij / U_jj) * U_j,j:     for each W_ij that goes, column after column: the others make up for it

with d = dampening * mean_j ||x_j||^2. The lowest scores go: of a whole matrix (magnitude), of each output (wanda), of 128
inputs and all outputs, scored anew before each 128 (sparsegpt), or of each run of M inputs with an N:M pattern.

How it differs from the papers' codes:

1. Exactly floor(sparsity * n) weights of n are pruned. The codes for magnitude and SparseGPT compare with <= and take one
   more, and PERP's takes a threshold over the whole matrix for Wanda too (`scope: matrix`).
2. "2:4" keeps 2 of 4 and zeroes 2 of 4. (At other ratios than a half the codes' N counts the zeros, most tools' the kept.)
3. Padding does not count; each token counts the same, whatever sample it is in.
4. A weight whose input was always zero goes first (its score is zero) but not beyond the sparsity asked for.
5. The mask is kept and not read from zeros: a weight that is zero by chance was not pruned.
6. GPT-2's transposed layers are pruned like others; mixtures of experts, whose weights are no layers, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool, Float
from torch import Tensor, nn

from overhaul.blockwise import blockwise
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError
from overhaul.method import Outcome, method
from overhaul.selectors import select
from overhaul.stack import LayerStack
from overhaul.trace import counted
from overhaul.trace.readers import is_linear

Matrix = Float[Tensor, "out in"]
Mask = Bool[Tensor, "out in"]
"""True for what is pruned."""


@method(
    verb="shrink",
    paper="2312.15230",
    changes="weights",
    memory="forward",
    makes={"masks": "tensors"},
    alone={"criterion": ("wanda", "sparsegpt")},
    headless=lambda knobs: True,
)
def prune(
    model: nn.Module,
    text: Examples | None = None,
    *,
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = "wanda",
    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.5,
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured",
    scope: Literal["paper", "row", "matrix"] = "paper",
    targets: str = "projections",
    blocks: str = "all",
    samples: Annotated[int, Ge(1)] = 128,
    batch_size: Annotated[int, Ge(1)] = 8,
    dampening: Annotated[float, Ge(0)] = 0.01,
    columns: Annotated[int, Ge(1)] = 128,
) -> Outcome:
    """Zero the weights of linear layers that matter least, each block after what its pruned predecessors make of the data.

    Nothing is trained. Zeros make a model neither smaller nor faster by themselves: files and dense kernels keep them.

    Args:
        model: a transformer; one block at a time lies on the device with what enters it.
        text: calibration data: texts, answers, or images; not needed for "magnitude".
        criterion: "magnitude", "wanda", or "sparsegpt", which also changes the weights that stay.
        sparsity: the share of each matrix that goes.
        pattern: "unstructured", or the same number of zeros in each run of inputs: "2:4", "4:8" (half of the weights).
        scope: among which weights the lowest scores are taken without a pattern: as in each criterion's "paper", of each
            "row" (an output's weights), or of the "matrix"; SparseGPT decides for `columns` inputs at a time in any case.
        targets: roles of the layers, as in `overhaul.selectors`: "projections" is every linear layer of the blocks.
        blocks: "all", "3", "1-4", "first:10,last:2".
        samples: how many examples of `text` are used at most, drawn by the seed.
        batch_size: examples in one forward; does not change the choice.
        dampening: of SparseGPT's Hessian, as a share of its mean diagonal.
        columns: of a matrix for which SparseGPT decides at once.

    Returns:
        The model, changed in place. Facts: share and number of pruned weights, of the pruned matrices and of the model.
        Layers: the share at each depth. `made["masks"]` has 0 for each pruned weight and 1 for the others (uint8, by the
        parameter's name and in its shape), so that a later training can keep the zeros.

    Raises:
        RequestError: `text` is missing, a target is no linear layer, or pattern and sizes do not go together.
        RunError: nothing changed, what enters a layer is not finite, or the Hessian cannot be inverted.
    """
    stack = LayerStack.of(model)
    batches = None if criterion == "magnitude" else _batches(text, criterion, samples, batch_size)
    rule = Rule(sparsity, pattern, (criterion == "wanda") if scope == "paper" else scope == "row", dampening, columns)
    layers = _layers(stack, targets, blocks)
    _check(rule, criterion, layers)
    masks: dict[str, Tensor] = {}
    changed = 0

    def apply(name: str, known: Tensor | None) -> None:
        nonlocal changed
        mask, cut = _pruned(layers[name], criterion, known, rule, name)
        changed += cut
        masks[f"{name}.weight"] = (~mask).to("cpu", torch.uint8)

    if batches is None:
        for name in layers:
            apply(name, None)
    else:
        measured = _squares if criterion == "wanda" else _gram
        _calibrate(stack, layers, batches, measured, apply)
    if not changed:
        raise RunError(
            f"shrink.prune: all {sum(int((mask == 0).sum()) for mask in masks.values()):,} weights that {criterion} chose "
            "were zero before, so nothing changed. The model is this sparse already: write a larger sparsity."
        )
    return Outcome(model, *_report(stack, masks, rule), made={"masks": masks})


@dataclass(frozen=True)
class Rule:
    """How much is pruned of what.

    Attributes:
        sparsity: share of zeros.
        pattern: "unstructured", or "N:M".
        by_row: whether each output has the same number of zeros.
        dampening: SparseGPT's.
        columns: SparseGPT's.
    """

    sparsity: float
    pattern: str = "unstructured"
    by_row: bool = False
    dampening: float = 0.01
    columns: int = 128

    @property
    def run(self) -> int:
        """How many inputs an N:M pattern goes over; 0 without one."""
        return 0 if self.pattern == "unstructured" else int(self.pattern.partition(":")[2])

    def count(self, of: int) -> int:
        """How many of so many weights go."""
        return int(of * self.sparsity + 1e-9)  # 0.29 * 100 is a little less than 29


# the criteria


def lowest(score: Matrix, rule: Rule) -> Mask:
    """The lowest scores, as many as the rule asks for; of equal ones the first."""
    shape = score.shape
    if rule.run:
        score, count = score.reshape(-1, rule.run), rule.count(rule.run)
    elif rule.by_row:
        count = rule.count(shape[1])
    else:
        score, count = score.reshape(1, -1), rule.count(score.numel())
    order = score.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True).view(shape)


def magnitude(weight: Matrix, rule: Rule) -> Mask:
    """Small weights."""
    return lowest(weight.abs(), rule)


def wanda(weight: Matrix, squares: Float[Tensor, " in"], rule: Rule) -> Mask:
    """Small weights on small inputs; `squares` are the inputs' squares, summed over tokens."""
    return lowest(weight.abs() * squares.sqrt().to(weight), rule)


def sparsegpt(weight: Matrix, gram: Float[Tensor, "in in"], rule: Rule) -> tuple[Matrix, Mask]:
    """Weights that others can stand in for, and the others as they stand in; `gram` is X^T X.

    Raises:
        torch.linalg.LinAlgError: the dampened Hessian cannot be inverted.
    """
    inverse = inverse_root(gram, rule.dampening)
    weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    dead = gram.diagonal() == 0
    for start in range(0, weight.shape[1], rule.columns):
        end = min(start + rule.columns, weight.shape[1])
        part, root = weight[:, start:end], inverse[start:end, start:end]  # `part` is a view
        errors = torch.zeros_like(part)
        # an input that was always zero has no say: its weights go first
        scale = torch.where(dead[start:end], 0, 1 / root.diagonal())
        if not rule.run:
            mask[:, start:end] = lowest((part * scale).square(), rule)
        for j in range(end - start):
            if rule.run and j % rule.run == 0:
                these = slice(j, j + rule.run)
                mask[:, start:end][:, these] = lowest((part[:, these] * scale[these]).square(), rule)
            errors[:, j] = torch.where(mask[:, start + j], part[:, j] / root[j, j], 0)
            part[:, j:] -= errors[:, j, None] * root[j, j:]
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight.masked_fill(mask, 0), mask


def inverse_root(gram: Float[Tensor, "in in"], dampening: float) -> Float[Tensor, "in in"]:
    """U, upper triangular, with U^T U = (gram + d I)^-1; an input that was always zero depends on no other."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += dampening * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


# layers and data


def _layers(stack: LayerStack, targets: str, blocks: str) -> dict[str, Any]:
    """The layers by name, in the order of their blocks."""
    layers = {name: stack.model.get_submodule(name) for name in select(stack, targets, blocks).modules}
    for name, layer in layers.items():
        if not is_linear(layer) or not 0 <= stack.depth(name) < len(stack):
            raise RequestError(
                f"shrink.prune: targets={targets!r} has {name} ({type(layer).__name__}), which is no linear layer inside a "
                'block. Take roles of linear layers: "projections", "attention, mlp", "mlp.down".'
            )
    return dict(sorted(layers.items(), key=lambda layer: stack.depth(layer[0])))


def _matrix(layer: Any) -> Matrix:
    """A layer's weight as [out, in], a view."""
    return layer.weight.data.T if _transposed(layer) else layer.weight.data


def _transposed(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D"


def _check(rule: Rule, criterion: str, layers: Mapping[str, Any]) -> None:
    """Refuse a rule that these layers cannot follow, before anything is changed."""
    if rule.run and rule.sparsity != 0.5:
        raise RequestError(
            f"shrink.prune: pattern {rule.pattern!r} zeroes half of the weights, and sparsity={rule.sparsity:g} asks for "
            "another share. Leave sparsity out, or write pattern: unstructured."
        )
    if rule.run and criterion == "sparsegpt" and rule.columns % rule.run:
        raise RequestError(
            f"shrink.prune: columns={rule.columns} cuts runs of {rule.run} in two; take a multiple of {rule.run}."
        )
    most = 0
    for name, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise RequestError(f"shrink.prune: the weights of {name} are quantised; prune before quantising.")
        outputs, given = _matrix(layer).shape
        if rule.run and given % rule.run:
            raise RequestError(
                f"shrink.prune: {name} has {given} inputs, which are no whole runs of {rule.run}; leave it out of "
                "`targets`, or write pattern: unstructured."
            )
        together = min(given, rule.columns) if criterion == "sparsegpt" else given
        most = max(most, together * (1 if rule.by_row else outputs))
    if not rule.count(most):
        raise RequestError(
            f"shrink.prune: sparsity={rule.sparsity:g} is less than one weight of the {most:,} among which the lowest are "
            "taken, so nothing would be pruned. Write a larger one."
        )


def _batches(text: Examples | None, criterion: str, samples: int, batch_size: int) -> Any:
    if text is None or not len(text):
        raise RequestError(
            f"shrink.prune: {criterion!r} is measured on what enters the layers, but the role `text` is missing or empty. "
            "Give it, or write criterion: magnitude."
        )
    return text.shuffled(torch.initial_seed())[:samples].batches(batch_size)


def _squares(state: Tensor, mask: Tensor) -> Tensor:
    return counted(state, mask).square().sum(0)


def _gram(state: Tensor, mask: Tensor) -> Tensor:
    rows = counted(state, mask)
    return rows.T @ rows


def _calibrate(
    stack: LayerStack,
    layers: Collection[str],
    batches: Any,
    measured: Any,
    apply: Callable[[str, Tensor | None], None],
) -> None:
    """Block after block: see what enters its layers as the blocks before it are now, then prune them."""
    names = {module: name for name, module in stack.model.named_modules()}
    last = max(map(stack.depth, layers))
    with closing(blockwise(stack, batches, "changed", targets=False)) as flow:
        for site in flow:
            prefix = f"{names[site.block]}."
            own = [name for name in layers if name.startswith(prefix)]
            into = site.measure([f"into.{name.removeprefix(prefix)}" for name in own], measured) if own else {}
            for name in own:
                apply(name, into.pop(f"into.{name.removeprefix(prefix)}"))
            if site.place == last:
                return


@torch.no_grad()
def _pruned(layer: Any, criterion: str, known: Tensor | None, rule: Rule, name: str) -> tuple[Mask, int]:
    """Prune one layer: its mask in the shape of its parameter, and how many weights were not zero before."""
    stored = _matrix(layer)
    weight = stored.float()
    if known is not None and not bool(known.isfinite().all()):
        raise RunError(f"shrink.prune: what enters {name} is not finite, or too large for its square; take bfloat16.")
    if criterion == "sparsegpt":
        assert known is not None
        try:
            new, mask = sparsegpt(weight, known, rule)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            raise RunError(
                f"shrink.prune: what enters {name} has too few directions for SparseGPT: its Hessian cannot be inverted "
                f"with dampening={rule.dampening:g}. Write a larger one (0.1), or give more text."
            ) from None
    else:
        new, mask = None, magnitude(weight, rule) if known is None else wanda(weight, known, rule)
    cut = int((stored[mask] != 0).sum())
    if new is not None:
        stored.copy_(new)
    stored.masked_fill_(mask, 0)
    return mask.T.contiguous() if _transposed(layer) else mask, cut


def _report(
    stack: LayerStack, masks: dict[str, Tensor], rule: Rule
) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    pruned: dict[int, int] = {}
    size: dict[int, int] = {}
    for name, mask in masks.items():
        depth = stack.depth(name)
        pruned[depth] = pruned.get(depth, 0) + int((mask == 0).sum())
        size[depth] = size.get(depth, 0) + mask.numel()
    total = sum(pruned.values())
    dense = "zeros alone make neither a file smaller nor dense kernels faster"
    sparse = f"zeros alone make no file smaller, and only engines with kernels for {rule.pattern} faster"
    facts = {
        "sparsity": total / sum(size.values()),
        "sparsity_of_model": total / sum(parameter.numel() for parameter in stack.model.parameters()),
        "pruned_weights": total,
        "pruned_matrices": len(masks),
        "speed": sparse if rule.run else dense,
    }
    return facts, {"pruned share": {depth: pruned[depth] / size[depth] for depth in sorted(size)}}
