"""Whether the numbers of a model are numbers: when it is opened, in use, and before it is saved. Masks may be infinite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from overhaul.checkpoints import Checkpoint
from overhaul.errors import RequestError, RunError
from overhaul.weight_files import header


def check_read(model: nn.Module, known: Checkpoint) -> None:
    """Refuse a checkpoint that holds NaN or infinity: whatever is computed with it is lost.

    Raises:
        RequestError: with the tensor and its file.
    """
    if bad := list(_not_finite(model)):
        file = next((path for path in known.weight_files if bad[0] in header(path)), known.folder)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise RequestError(
            f"{file}: {bad[0]!r} holds values that are not finite (NaN or infinite) in {dtype}"
            f"{f', and so do {len(bad) - 1} tensors more' if bad[1:] else ''}. Nothing can be computed with them: fetch or "
            "save the model again."
        )


def check_given(method: str, model: nn.Module) -> None:
    """Refuse a model in memory that holds NaN or infinity, where what is measured would be none either.

    Raises:
        RequestError: with a tensor; `method` is for messages.
    """
    if bad := list(_not_finite(model)):
        raise RequestError(
            f"{method}: {len(bad)} tensors of the model hold values that are not finite (NaN or infinite), such as "
            f"{bad[0]!r}. Nothing can be computed with them: open the model again, and look at what was done to it before."
        )


def check_finite(values: Tensor, what: str, instead: str) -> None:
    """Refuse numbers of which nothing can be told.

    Args:
        values: any.
        what: they are, at the beginning of the message ("The autoencoder's k").
        instead: what to do, a sentence.

    Raises:
        RequestError: one is NaN or infinite.
    """
    if not is_finite(values):
        count = int((~values.isfinite()).sum())
        raise RequestError(f"{what}: {count} of {values.numel()} values are not finite (NaN or infinite). {instead}")


def check_said(model: nn.Module, said: Tensor, what: str) -> None:
    """Refuse a model, whoever built it, of which outputs are not finite, with the tensor that is to blame where one is.

    Raises:
        RequestError: they are not.
    """
    if not is_finite(said):
        blamed = next(_not_finite(model), None)
        where = "its weights are, so look at the data" if blamed is None else f"nor is its {blamed!r}: open another one"
        raise RequestError(f"{what} of {type(model).__name__} are not finite (NaN or infinite), {where}.")


def check_saved(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse numbers that are none, and those that a smaller dtype of the files makes to such.

    Raises:
        RunError: with a tensor.
    """
    if any(p.is_meta for p in model.parameters()):
        raise RunError("The model has no weights (it is on the meta device); nothing was saved.")
    if bad := list(_not_finite(model)):
        raise RunError(f"{len(bad)} tensors hold values that are not finite, such as {bad[0]!r}; nothing was saved.")
    if dtype is torch.float16:  # bfloat16 reaches as far as float32
        most = torch.finfo(torch.float16).max
        large = [
            name for name, p in model.named_parameters() if p.is_floating_point() and p.detach().abs().max() > most
        ]
        if large:
            raise RunError(
                f"{len(large)} tensors hold values that {dtype} files cannot, such as {large[0]!r} (more than {most:g}); "
                "nothing was saved. Save in bfloat16 or float32."
            )


@torch.no_grad()
def _not_finite(model: nn.Module) -> Iterator[str]:
    yield from (name for name, p in model.named_parameters() if not is_finite(p))
    yield from (name for name, b in model.named_buffers() if b.is_floating_point() and b.isnan().any())


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    # a sum is a tenth of the time; only one that is none, or is too large, has to be looked at again
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
