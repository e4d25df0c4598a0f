"""The index of a checkpoint: where tensors lie, at which depth, and what is refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import families
from conftest import tiny_llama, tiny_resnet
from overhaul import models, weights
from overhaul.errors import RequestError
from overhaul.stack import LayerStack
from overhaul.weights import depths, pieces
from overhaul.weights.index import TensorIndex
from tiny_checkpoints import (
    EVERY,
    VISION_LANGUAGE,
    bits,
    make,
    refused,
    rewrite,
    sharded,
    tensors,
    two_llamas,
)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_llamas(tmp_path)


# the index


def test_the_index_says_where_each_tensor_lies(two: list[Path]) -> None:
    index = TensorIndex.of(two[0])
    held = tensors(two[0])
    content = (two[0] / "model.safetensors").read_bytes()
    assert index.tensors.keys() == held.keys()
    for name, tensor in index.tensors.items():
        assert tensor.file == two[0] / "model.safetensors" and tensor.shape == tuple(held[name].shape)
        assert content[tensor.offset : tensor.offset + tensor.bytes] == bits(held[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_depth_is_what_the_stack_says(family: str, tmp_path: Path) -> None:
    index = TensorIndex.of(make(family, tmp_path / "m", 0))
    stack = LayerStack.of(EVERY[family]())
    assert {name: tensor.depth for name, tensor in index.tensors.items()} == {n: stack.depth(n) for n in index.tensors}
    assert index.stacks == {stack.path: len(stack)}


def test_stored_names_that_the_model_does_not_know_have_depths(tmp_path: Path) -> None:
    index = TensorIndex.of(make("vit", tmp_path / "m", 0))
    first = {name for name, tensor in index.tensors.items() if tensor.depth == 0}
    assert "vit.encoder.layer.0.attention.attention.key.bias" in first, "the library stores what it calls vit.layers.0"
    for depth in range(4):
        at = {name.replace(f".{depth}.", ".0.", 1) for name, tensor in index.tensors.items() if tensor.depth == depth}
        assert at == first
    assert index.tensors["classifier.weight"].depth == 4 and index.tensors["vit.embeddings.cls_token"].depth == -1
    mixtral = TensorIndex.of(make("mixtral", tmp_path / "moe", 0)).tensors
    assert mixtral["model.layers.1.block_sparse_moe.experts.0.w1.weight"].depth == 1


def test_a_body_without_its_prefix_has_depths(tmp_path: Path) -> None:
    def shorten(held: dict[str, Tensor]) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)

    gpt2 = make("gpt2", tmp_path / "m", 0)
    rewrite(gpt2, shorten)
    index = TensorIndex.of(gpt2).tensors
    depths = {name: index[name].depth for name in ("wte.weight", "h.0.ln_1.bias", "h.3.mlp.c_fc.bias", "ln_f.weight")}
    assert list(depths.values()) == [-1, 0, 3, 4]


def test_several_stacks_are_told_apart(tmp_path: Path) -> None:
    def place(index: TensorIndex, name: str) -> tuple[str, int, int]:
        tensor = index.tensors[name]
        return tensor.stack, tensor.depth, tensor.blocks

    t5 = TensorIndex.of(make("t5", tmp_path / "t5", 0))
    assert t5.stacks == {"encoder.block": 2, "decoder.block": 3}
    assert place(t5, "shared.weight") == ("encoder.block", -1, 2)
    assert place(t5, "encoder.final_layer_norm.weight") == ("encoder.block", 2, 2)
    assert place(t5, "decoder.block.1.layer.0.SelfAttention.k.weight") == ("decoder.block", 1, 3)
    assert place(t5, "decoder.final_layer_norm.weight") == ("decoder.block", 3, 3)
    clip = TensorIndex.of(make("clip", tmp_path / "clip", 0))
    text, vision = "text_model.encoder.layers", "vision_model.encoder.layers"
    assert place(clip, "vision_model.embeddings.class_embedding") == (vision, -1, 3)
    assert place(clip, "text_projection.weight") == (text, 2, 2)
    assert place(clip, "visual_projection.weight") == (vision, 3, 3)
    assert place(clip, "text_model.encoder.layers.1.mlp.fc1.bias") == (text, 1, 2)


def test_depths_of_an_unknown_class_come_from_the_names(two: list[Path]) -> None:
    known = {name: (t.stack, t.depth, t.blocks) for name, t in TensorIndex.of(two[0]).tensors.items()}
    config = json.loads((two[0] / "config.json").read_text())
    (two[0] / "config.json").write_text(json.dumps({**config, "architectures": ["OwnForCausalLM"]}))
    assert {name: (t.stack, t.depth, t.blocks) for name, t in TensorIndex.of(two[0]).tensors.items()} == known


def test_a_live_model_has_the_same_index(two: list[Path]) -> None:
    live = TensorIndex.of(tiny_llama()).tensors
    for name, tensor in TensorIndex.of(two[0]).tensors.items():
        assert (live[name].stack, live[name].depth, live[name].shape) == (tensor.stack, tensor.depth, tensor.shape)


CAUSAL = {name: family for name, family in families.FAMILIES.items() if family.kind == "causal"}


@pytest.mark.parametrize("name", CAUSAL)
def test_names_say_what_the_structure_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.save(CAUSAL[name].build(), None, tmp_path / "m", dtype="bfloat16")
    by_names = {name: (t.stack, t.depth, t.blocks) for name, t in TensorIndex.of(folder).tensors.items()}
    monkeypatch.setattr(depths, "_beyond_doubt", lambda *_: None)
    assert {name: (t.stack, t.depth, t.blocks) for name, t in TensorIndex.of(folder).tensors.items()} == by_names


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_the_text_stack_of_a_vision_language_model_keeps_its_final_norm(family: str, tmp_path: Path) -> None:
    model = VISION_LANGUAGE[family]()
    index = TensorIndex.of(models.save(model, None, tmp_path / "m"))
    stacks = {stack.path: stack for stack in LayerStack.find(model)}
    (text,) = [path for path in stacks if "language" in path]
    (final,) = [t for t in index.tensors.values() if t.name.endswith("model.norm.weight")]
    first = [t for t in index.tensors.values() if t.name.endswith(".layers.0.mlp.up_proj.weight")]
    assert {(t.stack, t.depth) for t in first} == {(text, 0)}
    assert (final.stack, final.depth) == (text, len(stacks[text]))


@pytest.mark.parametrize("family", VISION_LANGUAGE)
@pytest.mark.parametrize("names", ["as saved", "as in memory"])
def test_scaling_by_depth_leaves_the_final_norm_of_the_text_at_the_end(family: str, names: str, tmp_path: Path) -> None:
    folders = [models.save(VISION_LANGUAGE[family](), None, tmp_path / f"m{n}") for n in (0, 1)]
    if names == "as in memory":
        for folder in folders:
            state = models.open_model(folder)[0].state_dict()
            save_file(
                {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
            )
    seen: dict[str, float] = {}

    def ramp(tensor: weights.TensorFacts) -> float:
        seen[tensor.name] = tensor.share
        return tensor.share

    weights.scale_by_depth(folders[0], folders[1], ramp, tmp_path / "out")
    (final,) = [
        name for name in seen if name.endswith("model.norm.weight") or name.endswith("language_model.norm.weight")
    ]
    embedding = [name for name in seen if "embed_tokens" in name]
    assert seen[final] == 1.0 and [seen[name] for name in embedding] == [0.0] * len(embedding)


def test_a_ramp_begins_with_0_at_the_embeddings(two: list[Path]) -> None:
    told = {(t.depth, t.share) for t in TensorIndex.of(two[0]).tensors.values()}
    assert told == {(-1, 0.0), (0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)}


# what is refused before any weight is read


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(pieces.Workspace, "stored", refuse)


@pytest.mark.usefixtures("unread")
def test_models_with_other_tensors_or_shapes_are_refused(two: list[Path], tmp_path: Path) -> None:
    short = models.save(tiny_llama(num_hidden_layers=3), None, tmp_path / "short")
    refused([two[0], short], tmp_path / "out", r"short lacks model\.layers\.3\..* and 5 more")
    refused([short, two[0]], tmp_path / "out", r"short lacks model\.layers\.3\.")
    wide = models.save(tiny_llama(intermediate_size=64), None, tmp_path / "wide")
    refused(
        [two[0], wide], tmp_path / "out", r"shapes: model\.layers\.0\.mlp\.down_proj\.weight \[32, 48\] and \[32, 64\]"
    )
    with pytest.raises(RequestError, match="There is no model"):
        weights.stream([], lambda _, held: held[0], tmp_path / "out")


def test_differing_vocabularies_are_said_to_be_that_and_both_ways_out_work(two: list[Path], tmp_path: Path) -> None:
    model: Any = tiny_llama()
    model.resize_token_embeddings(70)
    larger = models.save(model, None, tmp_path / "larger")
    said = r"vocabularies of 64 and 70 tokens: model\.embed_tokens\.weight .*resize_token_embeddings\(70\).*only="
    refused([two[0], larger], tmp_path / "out", said)
    refused([larger, two[0]], tmp_path / "out", "vocabularies of 70 and 64 tokens")
    out = weights.blend([two[0], larger], [0.5, 0.5], tmp_path / "only", only=lambda t: 0 <= t.depth < t.blocks)
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors(out)[name], tensors(two[0])[name])
    restored = tensors(weights.restore(larger, two[0], {0, 1}, tmp_path / "restored"))
    assert torch.equal(restored[name], tensors(larger)[name])
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(restored[query], tensors(two[0])[query])


@pytest.mark.usefixtures("unread")
def test_another_number_of_classes_is_no_vocabulary(tmp_path: Path) -> None:
    ten = models.save(tiny_resnet(), None, tmp_path / "ten")
    five = models.save(tiny_resnet(num_labels=5), None, tmp_path / "five")
    refused([ten, five], tmp_path / "out", r"different shapes: classifier\.1\.bias \[10\] and \[5\]")


@pytest.mark.usefixtures("unread")
def test_damaged_files_are_refused(two: list[Path], tmp_path: Path) -> None:
    path = two[1] / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refused(two, tmp_path / "out", "cut short")
    path.write_bytes(content.replace(b'"shape":[64,32]', b'"shape":[64,31]'))
    refused(two, tmp_path / "out", r"damaged: 'model\.embed_tokens\.weight' is said to be F32 \[64, 31\]")


@pytest.mark.usefixtures("unread")
def test_an_index_that_lies_is_refused(two: list[Path], tmp_path: Path) -> None:
    bad = sharded(tiny_llama(), tmp_path / "bad", "20KB")
    index = bad / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    first, last = sorted(bad.glob("*.safetensors"))[:: len(list(bad.glob("*.safetensors"))) - 1]
    name = next(iter(load_file(first)))
    index.write_text(json.dumps({**told, "weight_map": {**told["weight_map"], name: last.name}}))
    refused([two[0], bad], tmp_path / "out", f"says that {last.name} holds {name}, which it does not")
    index.write_text(json.dumps({**told, "weight_map": {**told["weight_map"], name: "model-9.safetensors"}}))
    refused([two[0], bad], tmp_path / "out", "names model-9.safetensors, which the folder lacks")
    index.write_text("{}")
    refused([two[0], bad], tmp_path / "out", "is no index of weights")
    index.write_text(json.dumps(told))
    save_file({name: load_file(first)[name]}, bad / "model-extra.safetensors", {"format": "pt"})
    refused([two[0], bad], tmp_path / "out", f"{name} lies in both {first.name} and model-extra.safetensors")


def test_files_that_from_pretrained_would_not_read_are_not_read(two: list[Path], tmp_path: Path) -> None:
    save_file({"layers.0.wq": torch.zeros(2)}, two[0] / "consolidated.safetensors", {"format": "pt"})
    assert "layers.0.wq" not in TensorIndex.of(two[0]).tensors
    assert not (weights.blend(two, [0.5, 0.5], tmp_path / "out") / "consolidated.safetensors").exists()


@pytest.mark.usefixtures("unread")
def test_codes_instead_of_numbers_are_refused(two: list[Path], tmp_path: Path) -> None:
    name = "model.norm.weight"
    rewrite(two[1], lambda held: held.update({name: torch.zeros(32, dtype=torch.int8)}))
    refused(two, tmp_path / "out", f"{name} is torch.float32 in .* and torch.int8 in")
    rewrite(two[1], lambda held: held.update({name: torch.zeros(32, dtype=torch.float8_e4m3fn)}))
    refused(two, tmp_path / "out", f"{name} is stored as F8_E4M3.*dequantise")


@pytest.mark.usefixtures("unread")
def test_a_config_that_describes_no_model_is_refused_where_depth_is_asked_for(two: list[Path], tmp_path: Path) -> None:
    config = json.loads((two[0] / "config.json").read_text())
    (two[0] / "config.json").write_text(json.dumps({**config, "hidden_act": "no such", "num_hidden_layers": 3}))
    refused(two, tmp_path / "out", r"no LlamaForCausalLM can be built from config\.json", only={0})
