from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from conftest import tiny_llama, tiny_resnet
from families import FAMILIES, Family
from more_families import MORE
from overhaul.errors import RequestError
from overhaul.groups import Group, cut, cut_copy, groups, masked
from overhaul.models import open_model, save
from overhaul.stack import LayerStack
from overhaul.stack.calls import invoke

ALL = {**FAMILIES, **MORE}


def said(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        result = invoke(model, inputs)
    leaves = tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def some(group: Group, seed: int = 0) -> Tensor:
    """Three quarters of the units stay, or all but one."""
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(group.size, dtype=torch.bool)
    keep[order[: max(1, group.size * 3 // 4 if group.size > 2 else group.size - 1)]] = True
    return keep


def found_in(family: Family, model: nn.Module, unit: Any) -> list[Group]:
    return groups(LayerStack.at(model, family.stack), unit, inputs=family.inputs())


def by_name(group: Group) -> dict[tuple[str, int], list[int]]:
    return {(part.tensor, part.axis): part.units.tolist() for part in group.slices}


# what belongs together


def test_neurons_heads_and_stream_of_a_llama() -> None:
    model = tiny_llama()
    block = "model.layers.2."
    neurons = groups(model, "mlp.neuron")
    assert [group.depth for group in neurons] == [0, 1, 2, 3]
    numbers = list(range(48))
    assert by_name(neurons[2]) == {
        (f"{block}mlp.gate_proj.weight", 0): numbers,
        (f"{block}mlp.up_proj.weight", 0): numbers,
        (f"{block}mlp.down_proj.weight", 1): numbers,
    }
    assert [part.reads for part in neurons[2].slices] == [False, False, True]
    heads = groups(model, "attention.head")[2]  # four queries, two keys: of two each, none can leave alone
    assert by_name(heads) == {
        (f"{block}self_attn.q_proj.weight", 0): [0] * 16 + [1] * 16,
        (f"{block}self_attn.k_proj.weight", 0): [0] * 8 + [1] * 8,
        (f"{block}self_attn.v_proj.weight", 0): [0] * 8 + [1] * 8,
        (f"{block}self_attn.o_proj.weight", 1): [0] * 16 + [1] * 16,
    }
    (stream,) = groups(model, "residual.channel")
    widths = {
        (name, axis)
        for name, tensor in model.named_parameters()
        for axis, size in enumerate(tensor.shape)
        if size == 32 and (name, axis) not in _inside_attention(model)
    }
    assert stream.depth is None and by_name(stream) == {key: list(range(32)) for key in widths}


def _inside_attention(model: nn.Module) -> set[tuple[str, int]]:
    """Axes of 32 that are 4 heads of 8."""
    found = {(name, 0) for name, _ in model.named_parameters() if "q_proj" in name}
    return found | {(name, 1) for name, _ in model.named_parameters() if "o_proj" in name}


def test_rows_of_fused_layers_are_told_apart() -> None:
    def first(name: str, unit: Any) -> dict[tuple[str, int], list[int]]:
        return by_name(found_in(ALL[name], ALL[name].build(), unit)[0])

    numbers = list(range(48))
    assert first("Phi3", "mlp.neuron")["model.layers.0.mlp.gate_up_proj.weight", 0] == numbers * 2
    assert first("Phi3", "attention.head")["model.layers.0.self_attn.qkv_proj.weight", 0] == (
        [0] * 16 + [1] * 16 + ([0] * 8 + [1] * 8) * 2
    )
    neox = first("GPT-NeoX", "attention.head")
    of_heads = [head for head in range(4) for _ in range(24)]
    assert neox["gpt_neox.layers.0.attention.query_key_value.weight", 0] == of_heads
    assert neox["gpt_neox.layers.0.attention.query_key_value.bias", 0] == of_heads
    gpt2 = first("GPT-2", "attention.head")  # transposed
    assert gpt2["transformer.h.0.attn.c_attn.weight", 1] == [head for head in range(4) for _ in range(8)] * 3
    oss = first("gpt-oss", "mlp.neuron")
    alternating = [n for n in range(48) for _ in range(2)]
    assert oss["model.layers.0.mlp.experts.gate_up_proj", 2] == alternating
    assert oss["model.layers.0.mlp.experts.gate_up_proj_bias", 1] == alternating
    assert oss["model.layers.0.mlp.experts.down_proj", 1] == numbers


class Residual(nn.Module):
    """Two convolutions around which the input goes on; one that takes channels apart reads the sum and what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.apart = nn.Conv2d(11, 11, 3, groups=11)
        self.head = nn.Linear(11 * 4, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # pyright: ignore[reportArgumentType]

    def forward(self, pixel_values: Tensor) -> Tensor:
        state = self.norm(self.stem(pixel_values)).relu()
        inner = self.inner(state).relu()
        state = state + self.outer(inner)
        return self.head(self.apart(torch.cat([inner, state], 1)).flatten(1))


PIXELS = {"pixel_values": torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))}


def test_channels_that_are_added_or_laid_side_by_side_leave_with_all_that_is_theirs() -> None:
    model = Residual().eval()
    found = {group.size: by_name(group) for group in groups(model, "channel", inputs=PIXELS)}
    none, of_four = -1, [n for n in range(6) for _ in range(4)]
    numbers = list(range(6))
    assert found[6] == {
        ("stem.weight", 0): numbers, ("stem.bias", 0): numbers, ("norm.weight", 0): numbers, ("norm.bias", 0): numbers,
        ("norm.running_mean", 0): numbers, ("norm.running_var", 0): numbers, ("inner.weight", 1): numbers,
        ("outer.weight", 0): numbers, ("outer.bias", 0): numbers, ("apart.weight", 0): [none] * 5 + numbers,
        ("apart.bias", 0): [none] * 5 + numbers, ("head.weight", 1): [none] * 20 + of_four,
    }  # fmt: skip
    assert found[5]["head.weight", 1] == of_four[:20] + [none] * 24
    assert found.keys() == {5, 6}, "neither the pixels nor the classes can leave"


def test_the_channels_of_a_resnet_are_those_of_its_stages_and_those_inside_its_blocks() -> None:
    sizes = [group.size for group in groups(tiny_resnet(), "channel")]
    assert sorted(sizes) == [8] * 4 + [16] * 4  # a stream and three blocks in each of two stages


# masked equals cut

PLAIN = {
    "mlp.neuron": ["Llama", "Mixtral", "BERT", "ViT", "Phi3", "gpt-oss"],
    "attention.head": ["Llama"],
    "residual.channel": ["Llama"],
}


@pytest.mark.parametrize(("unit", "name"), [(unit, name) for unit, names in PLAIN.items() for name in names])
def test_what_is_cut_says_what_was_masked_and_is_a_plain_model(unit: Any, name: str, tmp_path: Path) -> None:
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    whole = said(model, inputs)
    keep = {group: some(group, seed) for seed, group in enumerate(found_in(family, model, unit))}
    with masked(model, keep):
        expected = said(model, inputs)
    assert apart(whole, said(model, inputs)) == 0, "the mask left something behind"
    assert apart(whole, expected) > 1e-3, "nothing was masked"
    before = sum(parameter.numel() for parameter in model.parameters())
    cut(model, keep, inputs=inputs)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert apart(said(model, inputs), expected) < 1e-5
    again, _ = open_model(save(model, None, tmp_path / "cut"))
    assert type(again) is type(model) and apart(said(again, inputs), expected) < 1e-5


def test_a_network_without_a_config_is_cut_too() -> None:
    model = Residual().eval()
    keep = {group: some(group) for group in groups(model, "channel", inputs=PIXELS)}
    with masked(model, keep):
        expected = said(model, PIXELS)
    cut(model, keep, inputs=PIXELS)
    assert model.stem.out_channels == model.norm.num_features == 4 and model.inner.out_channels == 3
    assert model.apart.groups == model.apart.in_channels == 7 and model.head.in_features == 28
    assert apart(said(model, PIXELS), expected) < 1e-6
    after = groups(model, "channel", inputs=PIXELS)
    assert sorted(group.size for group in after) == [3, 4]


def test_the_stages_of_a_resnet_are_cut_with_what_is_inside_their_blocks(tmp_path: Path) -> None:
    model = tiny_resnet()
    inputs = {"pixel_values": torch.randn(2, 1, 8, 8)}
    found = groups(model, "channel", inputs=inputs)
    half = {group: torch.arange(group.size) % 2 == 0 for group in found}
    with masked(model, half):
        expected = said(model, inputs)
    stream = next(group for group in found if len(group.slices) > 10)
    with pytest.raises(RequestError, match="No config of ResNetForImageClassification describes"):
        cut(model, {stream: half[stream]}, inputs=inputs)
    alone = cut_copy(model, {stream: half[stream]}, inputs=inputs)  # in memory
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in model.parameters())
    cut(model, half, inputs=inputs)
    assert model.config.hidden_sizes == [4, 8] and model.config.embedding_size == 4  # pyright: ignore
    again, _ = open_model(save(model, None, tmp_path / "cut"))
    assert apart(said(again, inputs), expected) < 1e-6


def test_a_masked_norm_takes_its_statistics_over_what_stays() -> None:
    family = ALL["ViT"]
    model, inputs = family.build(), family.inputs()
    (stream,) = groups(model, "residual.channel", inputs=inputs)
    keep = torch.arange(32) % 4 != 0
    with masked(model, {stream: keep}):
        expected = said(model, inputs)
    small = family.build()
    cut(small, {stream: keep}, inputs=inputs)
    assert small.config.hidden_size == 24  # pyright: ignore
    assert apart(said(small, inputs), expected) < 1e-6
    for part in stream.slices:  # zeros alone are another network: a mean of 24 numbers is none of 32
        if not part.reads:
            tensor = model.get_parameter(part.tensor).data
            tensor.index_fill_(part.axis, (~keep).nonzero()[:, 0], 0)
    assert apart(said(model, inputs), expected) > 1e-3


def test_a_masked_neuron_is_one_of_which_nothing_is_written() -> None:
    model = tiny_llama()
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    group = groups(model, "mlp.neuron")[1]
    keep = torch.ones(48, dtype=torch.bool)
    keep[[5, 40]] = False
    with masked(model, {group: keep}):
        expected = said(model, inputs)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[:, [5, 40]] = 0
    assert apart(said(model, inputs), expected) == 0


def test_scores_are_summed_over_all_that_a_unit_owns() -> None:
    model = tiny_llama()
    group = groups(model, "attention.head")[3]
    layer = model.model.layers[3].self_attn  # pyright: ignore
    ours = group.sums(model, lambda _, tensor: tensor.abs())
    rows = [layer.q_proj.weight[16:], layer.k_proj.weight[8:], layer.v_proj.weight[8:], layer.o_proj.weight[:, 16:]]
    assert float(ours[1]) == pytest.approx(sum(float(part.detach().abs().sum()) for part in rows), rel=1e-5)


# what is refused

FIXED = {
    ("GPT-2", "attention.head"): "No config of GPT2LMHeadModel describes",  # a head is as wide as width / heads
    ("Gemma2", "residual.channel"): "would not say what it says masked",  # its embeddings are scaled by the width
    ("Bloom", "attention.head"): "No config of BloomForCausalLM describes",
}


@pytest.mark.parametrize(("name", "unit"), FIXED)
def test_what_no_plain_model_can_be_is_refused_and_nothing_is_changed(name: str, unit: Any) -> None:
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    keep = {group: torch.arange(group.size) % 2 == 0 for group in found_in(family, model, unit)}
    whole, config = said(model, inputs), model.config.to_dict()  # pyright: ignore
    with pytest.raises(RequestError, match=FIXED[name, unit]):
        cut(model, keep, inputs=inputs)
    assert apart(said(model, inputs), whole) == 0 and model.config.to_dict() == config  # pyright: ignore


def test_what_does_not_fit_is_refused_in_words() -> None:
    model = tiny_llama()
    first, second, *_ = groups(model, "mlp.neuron")
    some_of_them = torch.arange(48) < 40
    with pytest.raises(RequestError, match="Keep as many in every block"):
        cut(model, {first: some_of_them, second: torch.arange(48) < 44})
    with pytest.raises(RequestError, match=r"of the 48 units \(mlp.neuron of block 0\) is said by 48 booleans"):
        cut(model, {first: some_of_them[:7]})
    with (
        pytest.raises(RequestError, match="Nothing of the 48 units"),
        masked(model, {first: torch.zeros(48, dtype=torch.bool)}),
    ):
        pass
    with pytest.raises(RequestError, match="There is no unit 'mlp.neurons'. Did you mean 'mlp.neuron'"):
        groups(model, "mlp.neurons")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="No channel of Linear can leave on its own"):
        groups(nn.Linear(3, 3), "channel", inputs={"input": torch.randn(2, 3)})
    with pytest.raises(RequestError, match="has no list of repeated blocks"):
        groups(Residual(), "mlp.neuron", inputs=PIXELS)


def test_a_group_of_another_network_or_of_one_that_was_cut_is_refused_in_words() -> None:
    model, shallow = tiny_llama(), tiny_llama(num_hidden_layers=1)
    found = groups(model, "mlp.neuron")
    keep = {group: torch.arange(48) < 40 for group in found}
    with pytest.raises(RequestError, match="block 1.*another LlamaForCausalLM.*is not there. Find its own"):
        cut(shallow, keep)
    cut(model, keep)
    for use in (cut, cut_copy):
        with pytest.raises(RequestError, match=r"before it was cut: .*had 48 along axis .*, and here it is \[.*40"):
            use(model, keep)
    with pytest.raises(RequestError, match="before it was cut"), masked(model, keep):
        pass
    with pytest.raises(RequestError, match="before it was cut"):
        found[0].sums(model, lambda name, tensor: tensor)


def test_a_failing_forward_leaves_the_weights_as_they_were() -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Exception, match="index out of range"):
        groups(model, "residual.channel", inputs={"input_ids": torch.tensor([[70, 71, 72]])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
