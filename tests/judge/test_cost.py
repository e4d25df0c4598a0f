"""What a model costs, against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_resnet
from overhaul.judge.cost import cost, flops, times
from overhaul.judge.measure import Measure


def by_name(measures: list[Measure]) -> dict[str, Measure]:
    return {measure.metric: measure for measure in measures}


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_equal_two_per_weight_and_attention_by_hand(blocks: int, attention: str) -> None:
    model = tiny_llama(num_hidden_layers=blocks, attn_implementation=attention)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the tied embedding once, as the head
    tokens, width = 16, 32
    scores_and_values = 2 * 2 * tokens * tokens * width * blocks
    assert flops(model, {"input_ids": torch.arange(tokens)[None]}) == 2 * weights * tokens + scores_and_values


def test_image_flops_of_a_convolution_by_hand() -> None:
    class Small(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 10)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.head(self.convolution(pixel_values).flatten(1))

    sample = {"pixel_values": torch.zeros(1, 8, 8), "labels": torch.tensor(0)}
    measured = by_name(cost(Small(), sample=sample))
    assert measured["flops"].value == 2 * (4 * 36 * 9) + 2 * (4 * 36 * 10)
    assert measured["flops"].unit == "FLOPs/image"
    assert {one.metric for one in times({"a": Small()}, sample)["a"]} == {"latency"}


def test_every_family_has_a_cost(family: str) -> None:
    model: Any = FAMILIES[family]().train()
    sample = examples_for(family, 1)[0]
    measured = by_name([*cost(model, 1234, sample), *times({"it": model}, sample)["it"]])
    assert measured["parameters"].value == len(nn.utils.parameters_to_vector(model.parameters()))
    assert measured["bytes_on_disk"].value == 1234
    assert measured["flops"].value > 0
    assert measured["latency"].value > 0
    assert ("decode_latency" in measured) == (family in ("llama", "gpt2"))
    assert {(one.group, one.on, one.wanted) for one in measured.values()} == {("cost", "model", "down")}
    assert model.training


def test_of_what_is_not_stored_nothing_is_said_about_the_disk() -> None:
    assert "bytes_on_disk" not in by_name(cost(tiny_llama()))


def test_what_cannot_be_run_is_not_known() -> None:
    model = tiny_resnet()
    measured = by_name([*cost(model), *times({"it": model})["it"]])
    assert measured["parameters"].value and measured["parameters"].value > 0
    assert measured["flops"].value is None and measured["latency"].value is None


def test_a_network_of_another_kind_is_run_on_the_sample_it_is_given() -> None:
    class Denoiser(nn.Module):
        """As a UNet of diffusers: no `input_ids`, no `main_input_name`, an output without logits."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.time = nn.Conv2d(1, 4, 3), nn.Linear(1, 4)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
        ) -> dict[str, torch.Tensor]:
            return {"sample": self.convolution(sample) + self.time(timestep[:, None].float())[..., None, None]}

    sample = {"sample": torch.zeros(1, 8, 8), "timestep": torch.tensor(3), "labels": torch.tensor(0)}
    measured = by_name([*cost(Denoiser(), sample=sample), *times({"it": Denoiser()}, sample)["it"]])
    assert measured["flops"].value == 2 * (4 * 36 * 9) + 2 * 4
    assert measured["flops"].unit == "FLOPs/example" and measured["latency"].value
    assert by_name(cost(Denoiser()))["flops"].value is None
