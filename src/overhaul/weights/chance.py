"""Random numbers that belong to places of a tensor: the same whatever the size of a piece, the order or the thread.

Each number is a function of the seed, the model's number, the tensor's name and the place alone: a generator is begun for
every tensor and set forward to where a piece begins.
"""

from __future__ import annotations

import math

import numpy
import torch
from numpy.random import PCG64DXSM, Generator, SeedSequence
from torch import Tensor

from overhaul.weights.index import TensorFacts


def uniform(seed: int, model: int, tensor: TensorFacts, like: Tensor) -> Tensor:
    """Numbers in [0, 1) for a piece of a tensor, float32, multiples of 2**-24.

    Args:
        seed: of the whole draw, not negative.
        model: a number that tells several models' draws apart.
        tensor: of which the piece is, from `tensor.start` on.
        like: the piece, whose shape they get.
    """
    generator, spare = _begun(seed, model, tensor)
    drawn = generator.random(like.numel() + spare, dtype=numpy.float32)
    return torch.from_numpy(drawn[spare:]).view(like.shape)


def chosen(seed: int, model: int, tensor: TensorFacts, like: Tensor, share: float) -> Tensor:
    """Where `uniform` is below a share, in a third of its time: the bits are compared before they are numbers.

    Args:
        seed: as in `uniform`.
        model: as in `uniform`.
        tensor: as in `uniform`.
        like: as in `uniform`.
        share: above 0, at most 1; rounded to float32.
    """
    generator, spare = _begun(seed, model, tensor)
    steps = -(-(like.numel() + spare) // 2)
    bits = generator.integers(0, 2**64 - 1, steps, numpy.uint64, endpoint=True).astype("<u8", copy=False).view("<u4")
    below = math.ceil(float(numpy.float32(share)) * 2**24)  # of the upper 24 bits, which make the number
    found = bits[spare : spare + like.numel()] <= numpy.uint32((below << 8) - 1)
    return torch.from_numpy(found).view(like.shape)


def _begun(seed: int, model: int, tensor: TensorFacts) -> tuple[Generator, int]:
    """The generator where a piece begins, and how many numbers too early that is: it makes two of each step."""
    generator = PCG64DXSM(SeedSequence([seed, model, *tensor.name.encode()]))
    return Generator(generator.advance(tensor.start // 2)), tensor.start % 2
