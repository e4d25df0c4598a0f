"""Paths that cannot run, paths that are saved, and a network that no library knows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_llama
from families import FAMILIES
from guarantees import output
from overhaul import models
from overhaul.errors import RequestError
from overhaul.stack import LayerStack
from overhaul.stack.arrangement import shell
from overhaul.stack.calls import Calls


def stack_of(name: str) -> LayerStack:
    return LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)


@pytest.mark.parametrize(
    ("family", "path", "message"),
    [
        ("Llama", [0, 1, 4], "blocks 0 to 3; there is no block 4"),
        ("Llama", [0, -1], "no block -1"),
        ("Llama", [], "at least one must stay"),
        ("T5, encoder", [1, 2], r"Block 0 of encoder.block must stay first and run once: it alone holds layer.0.Self"),
        ("T5, decoder", [1, 0, 2, 3], "Block 0 of decoder.block must stay first"),
        ("T5, decoder", [0, 0, 1, 2, 3], "Block 0 of decoder.block must stay first and run once"),
        ("SD3", [0, 1, 3, 2], r"Block 3 of transformer_blocks must stay last and run once: it lacks attn.to_add_out"),
        ("SD3", [0, 1, 2, 3, 3], "Block 3 of transformer_blocks must stay last and run once"),
        ("DiT", [1, 2, 3], "must stay first and run once: the model's own code addresses it by its number"),
        ("ResNet", [0, 1, 2, 4, 5], "Block 3 of resnet.encoder.stages must stay first and run once: it opens a stage"),
        ("ResNet", [0, 1, 3, 2, 4], "leaves a stage of resnet.encoder.stages and comes back"),
    ],
)
def test_paths_that_cannot_run_are_refused_with_the_reason(family: str, path: list[int], message: str) -> None:
    stack = stack_of(family)
    before, said = list(stack.blocks), output(stack.model, FAMILIES[family].inputs())
    with pytest.raises(RequestError, match=message):
        stack.following(path)
    assert stack.blocks == before
    assert torch.equal(output(stack.model, FAMILIES[family].inputs()), said)


def test_a_repeated_block_can_be_followed_but_not_taken_for_good() -> None:
    stack = stack_of("Llama")
    with pytest.raises(RequestError, match="visits a block twice"):
        stack.take([0, 1, 1, 2, 3])
    parameters = sum(p.numel() for p in stack.model.parameters())
    with stack.following([0, 1, 1, 2, 3]):
        assert len(stack) == 5
        assert sum(p.numel() for p in stack.model.parameters()) == parameters


def test_taking_another_order_leaves_a_plain_model(tmp_path: Path) -> None:
    stack = stack_of("Qwen3, alternating windows")
    model: Any = stack.model
    with stack.following([3, 0, 2]):
        said = output(model, FAMILIES["Llama"].inputs())
    stack.take([3, 0, 2])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    again, loading = type(model).from_pretrained(models.save(model, None, tmp_path / "m"), output_loading_info=True)
    assert not any(loading.values()) and "overhaul" not in (tmp_path / "m" / "config.json").read_text()
    assert torch.equal(output(again.eval(), FAMILIES["Llama"].inputs()), said)


@pytest.mark.parametrize("family", ["Flux, one stream", "PixArt", "SD3", "CLIP, vision", "Bloom"])
def test_dropping_is_saved_in_whatever_entry_declares_the_depth(family: str, tmp_path: Path) -> None:
    stack, inputs = stack_of(family), FAMILIES[family].inputs()
    stack.drop([1])
    said = output(stack.model, inputs)
    again, _ = models.open_model(models.save(stack.model, None, tmp_path / "m", dtype="float32"))
    assert len(LayerStack.at(again, stack.path)) == FAMILIES[family].blocks - 1
    assert torch.equal(output(again, inputs), said)


def test_paths_over_paths_are_saved_as_one(tmp_path: Path) -> None:
    stack, inputs = stack_of("Llama"), FAMILIES["Llama"].inputs()
    with stack.following([3, 2, 1]), stack.following([0, 0, 2]):
        said = output(stack.model, inputs)
        folder = models.save(stack.model, None, tmp_path / "m")
    (record,) = json.loads((folder / "config.json").read_text())["overhaul"]["conversions"]
    assert record["arguments"] == {"stack": "model.layers", "blocks": [3, 3, 1]}
    assert torch.equal(output(models.open_model(folder)[0], inputs), said)


def test_a_path_through_another_model_cannot_be_saved(tmp_path: Path) -> None:
    stack, other = stack_of("Llama"), stack_of("Llama")
    with stack.following([0, (1, other.blocks[1]), 2]), pytest.raises(RequestError, match="modules of another model"):
        models.save(stack.model, None, tmp_path / "m")
    assert not list(tmp_path.iterdir()) and len(stack) == 4
    assert [block.self_attn.layer_idx for block in other.blocks] == [0, 1, 2, 3]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stack": "model.layers", "blocks": [0, 9]}, "there is no block 9"),
        ({"stack": "model.layer", "blocks": [0]}, "no list of modules at 'model.layer'"),
        ({"stack": "model.layers", "blocks": "0"}, "it is no list of places"),
        ({"stack": "model.layers", "blocks": 3}, "records a path of model.layers"),
    ],
)
def test_a_recorded_path_that_does_not_fit_is_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with LayerStack.of(model).following([1, 0]):
        folder = models.save(model, None, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["overhaul"]["conversions"][0]["arguments"] = arguments
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message):
        models.open_model(folder)


def test_a_path_in_a_file_of_its_own_is_no_longer_followed_and_said_to_be(tmp_path: Path) -> None:
    folder = models.save(tiny_llama(), None, tmp_path / "m")
    (folder / "overhaul_path.json").write_text("{}")
    with pytest.raises(RequestError, match="Without that file it opens as the plain model"):
        models.open_model(folder)


def test_a_copy_made_along_a_path_is_independent() -> None:
    stack, inputs = stack_of("Llama"), FAMILIES["Llama"].inputs()
    with stack.following([0, 1, 1, 3]):
        twin = copy.deepcopy(stack.model)
        said = output(stack.model, inputs)
    assert torch.equal(output(twin, inputs), said)
    assert len(LayerStack.of(twin)) == 4 and len(stack) == 4


def test_a_shell_shares_tensors_and_hooks_and_nothing_else() -> None:
    block: Any = stack_of("Llama").blocks[1]
    calls: list[int] = []
    block.mlp.register_forward_hook(lambda *_: calls.append(1))
    twin: Any = shell(block)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in block.parameters()]
    assert not {id(m) for m in twin.modules()} & {id(m) for m in block.modules()}
    twin.mlp(torch.zeros(1, 1, 32))
    assert calls == [1]
    twin.self_attn.layer_idx = 7
    assert block.self_attn.layer_idx == 1


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.mixed(x).chunk(3, dim=-1)
        scores = query @ key.transpose(1, 2) / x.shape[-1] ** 0.5 + bias
        return self.out(scores.softmax(dim=-1) @ value)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.look, self.think = Attention(width), nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.look(self.first(x), bias)
        return x + self.think(self.second(x))


class Outsider(nn.Module):
    """A decoder that nobody has heard of: no config, no known class, names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.tower, self.say = (
            nn.Embedding(64, 16),
            nn.ModuleList(Layer(16) for _ in range(5)),
            nn.Linear(16, 64),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x, length = self.words(input_ids), input_ids.shape[1]
        bias = torch.full((length, length), float("-inf")).triu(1)
        for layer in self.tower:
            x = layer(x, bias)
        return self.say(x)


@torch.no_grad()
def test_a_network_of_no_library_is_handled_by_its_structure() -> None:
    model, ids = Outsider().eval(), torch.arange(12).reshape(2, 6)
    stack, said = LayerStack.of(model), model(torch.arange(12).reshape(2, 6))
    assert (stack.path, len(stack), stack.droppable) == ("tower", 5, [0, 1, 2, 3, 4])
    assert (stack.depth("words.weight"), stack.depth("tower.3.look.out.weight"), stack.depth("say.bias")) == (-1, 3, 5)
    calls = Calls.record(stack, {"input_ids": ids})
    for path in ([4, 0, 0, 2], [1, 3], [0, 1, 2, 3, 4]):
        state = calls.entering
        for place in path:
            state = calls.run(place, state)
        with stack.following(path):
            assert torch.equal(model(ids), calls.finish(state))
    assert torch.equal(model(ids), said)
    stack.drop([2])
    assert len(model.tower) == 4 and not torch.equal(model(ids), said)


def test_a_stack_can_be_named_by_hand() -> None:
    model = nn.Module()
    model.parts = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)])
    with pytest.raises(RequestError, match=r'no list of repeated blocks.*LayerStack.at\(model, "PATH"\)'):
        LayerStack.of(model)
    assert len(LayerStack.at(model, "parts")) == 3
    with pytest.raises(RequestError, match="no list of modules at 'prts'. Did you mean 'parts'"):
        LayerStack.at(model, "prts")


def test_blocks_whose_stream_is_changed_in_between_cannot_be_run_by_hand() -> None:
    class Scaled(Outsider):
        def forward(self, input_ids: Tensor) -> Tensor:
            x, bias = self.words(input_ids), torch.zeros(())
            for layer in self.tower:
                x = layer(x, bias) * 0.5
            return self.say(x)

    with pytest.raises(RequestError, match="what block 0 of tower returns is not what enters block 1"):
        Calls.record(LayerStack.of(Scaled()), {"input_ids": torch.arange(4)[None]})
