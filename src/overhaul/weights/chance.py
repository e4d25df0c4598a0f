"""Random numbers that belong to places of a tensor: the same whatever the size of a piece, the order or the thread.

Each number is a function of the seed, the model's number, the tensor's name and the place alone: a generator is begun for
every tensor and set forward to where a piece begins.
"""

from __future__ import annotations

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
    generator = PCG64DXSM(SeedSequence([seed, model, *tensor.name.encode()]))
    spare = tensor.start % 2  # two numbers are made of each step of the generator
    drawn = Generator(generator.advance(tensor.start // 2)).random(like.numel() + spare, dtype=numpy.float32)
    return torch.from_numpy(drawn[spare:]).view(like.shape)
