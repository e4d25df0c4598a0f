from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import examples_for, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_resnet, tiny_vit
from families import FAMILIES, GROUPED, NAMED
from overhaul.adapters import adapters
from overhaul.errors import RequestError
from overhaul.fit import fit
from overhaul.objectives import cross_entropy
from overhaul.parts import is_norm
from overhaul.selectors import blocks_of, select
from overhaul.stack import LayerStack
from tracing import hooks_of

Names = dict[str, str]
"""Role -> names in a block."""

LLAMA: Names = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
VIT: Names = {
    "attention.q": "attention.q_proj", "attention.k": "attention.k_proj", "attention.v": "attention.v_proj",
    "attention.out": "attention.o_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip
CLIP: Names = {
    **{f"attention.{role}": f"self_attn.{role}_proj" for role in ("q", "k", "v", "out")},
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip
EXPERTS: Names = {**{role: name for role, name in LLAMA.items() if role[0] == "a"}, "experts": "mlp.experts"}
NEOX: Names = {
    "attention.qkv": "attention.query_key_value", "attention.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip
T5: Names = {
    **{f"attention.{role}": f"layer.0.SelfAttention.{role}" for role in "qkv"},
    "attention.out": "layer.0.SelfAttention.o",
}
EXPECTED: dict[str, Names] = {
    **dict.fromkeys(["Llama", "Mistral", "Qwen2", "Qwen3, alternating windows", "Gemma2", "Gemma3"], LLAMA),
    "Phi3": {"attention.qkv": "self_attn.qkv_proj", "attention.out": "self_attn.o_proj", "mlp.gate_up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj"},
    "Mixtral": EXPERTS,
    "OLMoE": EXPERTS,
    "GPT-2": {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj"},
    "OPT": {**{role: name for role, name in CLIP.items() if role[0] == "a"}, "mlp.up": "fc1", "mlp.down": "fc2"},
    "GPT-NeoX": NEOX,
    "Bloom": {**NEOX, "attention.qkv": "self_attention.query_key_value", "attention.out": "self_attention.dense"},
    "BERT": {"attention.q": "attention.self.query", "attention.k": "attention.self.key",
        "attention.v": "attention.self.value", "attention.out": "attention.output.dense", "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense"},
    "T5, encoder": {**T5, "mlp.up": "layer.1.DenseReluDense.wi", "mlp.down": "layer.1.DenseReluDense.wo"},
    "T5, decoder": {**T5, **{f"cross_attention.{role}": f"layer.1.EncDecAttention.{role}" for role in "qkv"},
        "cross_attention.out": "layer.1.EncDecAttention.o", "mlp.up": "layer.2.DenseReluDense.wi",
        "mlp.down": "layer.2.DenseReluDense.wo"},
    "ViT": VIT,
    "DINOv2": VIT,
    "CLIP, text": CLIP,
    "CLIP, vision": CLIP,
    "UNet": {**{f"{term}.{role}": f"{name}.to_{role}" for term, name in (("attention", "attn1"),
        ("cross_attention", "attn2")) for role in "qkv"}, "attention.out": "attn1.to_out.0",
        "cross_attention.out": "attn2.to_out.0", "mlp.gate_up": "ff.net.0.proj", "mlp.down": "ff.net.2"},
}  # fmt: skip
UNKNOWN = sorted(set(FAMILIES) - set(EXPECTED))
TERMS = ["attention", "cross_attention", "mlp"]


def rows_of(model: nn.Module, role: str, place: int = 0) -> list[tuple[int, int, int]]:
    (part,) = select(model, role, [place]).parts
    assert part.rows is not None
    return [(rows.start, rows.stop, rows.step) for rows in part.rows]


# roles in blocks


@pytest.mark.parametrize("name", EXPECTED)
def test_attention_and_mlp_are_what_they_do(name: str) -> None:
    family = FAMILIES[name]
    stack = LayerStack.at(family.build(), family.stack)
    terms = [
        term for term in TERMS if any(r.startswith(term) or (r, term) == ("experts", "mlp") for r in EXPECTED[name])
    ]
    found = select(stack, terms, "1,2", inputs=family.inputs())
    names = {module: name for name, module in stack.model.named_modules()}
    expected = {
        (role, place, f"{names[stack.blocks[place]]}.{path}")
        for role, path in EXPECTED[name].items()
        for place in (1, 2)
    }
    assert {(part.role, part.depth, part.module) for part in found.parts} == expected
    assert all(part.rows is None for part in found.parts)
    modules = [stack.model.get_submodule(part.module) for part in found.parts]
    assert [part.axis for part in found.parts] == [int(type(module).__name__ == "Conv1D") for module in modules]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_is_refused(name: str) -> None:
    stack = LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)
    with pytest.raises(RequestError, match=r"cannot be told there. \"projections\" is every linear layer"):
        select(stack, "attention.out", inputs=FAMILIES[name].inputs())


def test_a_fused_layer_is_told_by_rows_and_taken_whole() -> None:
    gpt2 = tiny_gpt2()
    assert [rows_of(gpt2, f"attention.{role}") for role in "qkv"] == [[(0, 32, 1)], [(32, 64, 1)], [(64, 96, 1)]]
    assert select(gpt2, "attention.q", [0]).parts[0].axis == 1  # Conv1D
    with pytest.raises(
        RequestError, match=r"attention.v of block 0 is only a part of transformer.h.0.attn.c_attn: its"
    ):
        _ = select(gpt2, "attention.v").parameters
    for roles in ("attention.qkv", "attention.q, attention.k, attention.v"):
        assert select(gpt2, roles, [0]).modules == ["transformer.h.0.attn.c_attn"]
    neox = FAMILIES["GPT-NeoX"].build()  # head by head: query, key, value
    assert [rows_of(neox, "attention.k")[head] for head in range(4)] == [(24 * n + 8, 24 * n + 16, 1) for n in range(4)]
    phi = FAMILIES["Phi3"].build()
    assert [rows_of(phi, role) for role in ("mlp.gate", "mlp.up")] == [[(0, 48, 1)], [(48, 96, 1)]]


@pytest.mark.parametrize("new", [True, False])
def test_falcon_whose_groups_hold_queries_then_a_key_then_a_value(new: bool) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    options: dict[str, Any] = {**NAMED, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = FalconForCausalLM(
        FalconConfig(**options, num_kv_heads=2, new_decoder_architecture=new, multi_query=True)
    ).eval()
    keys = [(16, 24, 1), (48, 56, 1)] if new else [(32, 40, 1)]
    assert rows_of(model, "attention.k") == keys
    assert rows_of(model, "attention.v") == [(start + 8, stop + 8, step) for start, stop, step in keys]


def test_trained_and_half_precision_models_are_told_alike() -> None:
    import overhaul

    for dtype in (torch.float32, torch.bfloat16):
        model = overhaul.open("starter:docs-llama")[0].to(dtype)
        found = select(model, "attention, mlp", "0,last:1")
        assert {part.role: part.module.rpartition("layers.0.")[2] for part in found.parts if part.depth == 0} == LLAMA
        assert len(found.parts) == 14


def test_queries_alone_change_only_where_they_stand() -> None:
    """The oracle of the roles, by hand: keys and values of the first position reach the last, its query does not."""
    model: Any = tiny_llama(initializer_range=0.3)
    ids = torch.randint(3, 64, (1, 6))
    with torch.no_grad():
        for role, reaches in (("q", False), ("k", True), ("v", True)):
            layer = model.get_submodule(select(model, f"attention.{role}", "last:1").modules[0])
            clean = model(ids).logits
            hook = layer.register_forward_hook(lambda _, __, out: out + torch.eye(6)[0][None, :, None])
            moved = (model(ids).logits - clean).abs()
            hook.remove()
            assert bool(moved[:, -1].any()) == reaches and bool(moved[:, 0].any()) == (role == "v")


# roles without a run


def test_norms_biases_embedding_and_head() -> None:
    gpt2 = tiny_gpt2()
    assert select(gpt2, "norms").modules[-1] == "transformer.ln_f"
    assert len(select(gpt2, "norms").modules) == 9 and len(select(gpt2, "norms", "first:2").modules) == 4
    assert select(gpt2, "biases", "0").parameters == [
        f"transformer.h.0.{name}.bias" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert select(gpt2, "embedding").modules == ["transformer.wte", "transformer.wpe"]
    assert select(gpt2, "head").modules == ["lm_head"] and select(gpt2, "head").parameters == ["transformer.wte.weight"]
    assert select(tiny_llama(tie_word_embeddings=False), "head").parameters == ["lm_head.weight"]
    vit = tiny_vit()
    assert select(vit, "embedding").parameters == [
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.patch_embeddings.projection.bias",
    ]  # fmt: skip
    assert select(vit, "head").modules == ["classifier"]
    resnet = tiny_resnet()
    assert select(resnet, "embedding").modules == ["resnet.embedder.embedder.convolution"]
    assert select(resnet, "head").modules == ["classifier.1"]
    assert "resnet.embedder.embedder.normalization" in select(resnet, "norms").modules


@pytest.mark.parametrize("model", [tiny_qwen3, tiny_gemma3])
def test_norms_of_queries_and_keys_are_norms(model: Any) -> None:
    built = model()
    of_block = [name.rpartition(".")[2] for name in select(built, "norms", "0").modules]
    assert {"q_norm", "k_norm", "input_layernorm"} <= set(of_block)
    vectors = {name for name, parameter in built.named_parameters() if parameter.ndim == 1}
    assert set(select(built, "norms").parameters) == vectors


def test_a_scale_is_no_norm() -> None:
    dino = FAMILIES["DINOv2"].build()
    assert not is_norm(dino.get_submodule("dinov2.encoder.layer.0.layer_scale1"))
    assert is_norm(dino.get_submodule("dinov2.encoder.layer.0.norm1"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_a_network_with_one_stack_has_a_role(name: str) -> None:
    model = FAMILIES[name].build()
    if len(LayerStack.find(model)) > 1:
        with pytest.raises(RequestError, match=r"has several stacks of blocks"):
            select(LayerStack.at(model, FAMILIES[name].stack), "embedding")
        return
    covered: set[str] = set()
    for role in ("embedding", "all", "norms", "head"):
        try:
            covered |= set(select(model, role).parameters)
        except RequestError:  # adaptive norms of diffusion models have no weights
            assert role == "norms"
    assert covered == {name for name, _ in model.named_parameters()}


# blocks


def test_blocks_are_named_by_places_ends_and_runs() -> None:
    stack = LayerStack.of(tiny_llama(num_hidden_layers=12))
    given: dict[Any, list[int]] = {
        "all": [*range(12)], "3": [3], "1-4": [1, 2, 3, 4], "first:2": [0, 1], "last:1": [11],
        "first:2,last:2": [0, 1, 10, 11],
        "2, 0 ,2": [0, 2], (5, 3): [3, 5],
    }  # fmt: skip
    assert {text: blocks_of(stack, text) for text in given} == given


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("12", r"has the blocks 0 to 3; there is no block 12"),
        ("2-1", r"'2-1' asks for none, or for others"),
        ("first:9", r"'first:9' asks for none, or for others"),
        ("last:0", r"'last:0' asks for none, or for others"),
        ("last:5", r"'last:5' asks for none, or for others"),
        ("frist:2", r"Did you mean 'first'"),
        ([-1], r"'-1' names no blocks"),
        ("1.5", r"'1.5' names no blocks"),
        ([], r"names no block of model.layers, which has 4"),
    ],
)
def test_other_blocks_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        select(tiny_llama(), "norms", blocks)


def test_unknown_and_absent_roles_are_refused() -> None:
    with pytest.raises(RequestError, match=r"no role 'attention.o'. Did you mean 'attention.out'"):
        select(tiny_llama(), "attention.o")
    with pytest.raises(RequestError, match=r"GPT2LMHeadModel has no mlp.gate .* What is found there: .*mlp.up"):
        select(tiny_gpt2(), "attention, mlp.gate")
    with pytest.raises(RequestError, match=r"LlamaForCausalLM has no biases"):
        select(tiny_llama(), "biases")
    with pytest.raises(RequestError, match=r"no weights yet"), torch.device("meta"):
        select(tiny_llama(), "attention")


# nothing stays behind, and what selections are for


def test_weights_modes_hooks_and_random_state_are_as_before() -> None:
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    select(model, "attention, mlp")
    assert torch.equal(torch.get_rng_state(), state) and not hooks_of(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.0.self_attn.q_proj.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_selection_trains_alone_with_a_rate_for_each_role() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.named_parameters()}
    chosen = select(model, "attention.out, norms", "last:2")
    fit(
        model,
        [cross_entropy("text")],
        {"text": examples_for("llama", 8)},
        steps=1,
        batch_size=8,
        lr=1e-2,
        trainable=chosen,
    )
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert changed == chosen.parameters and len(changed) == 6
    rates = {"attention": 1e-2, "mlp": 1e-3}
    groups = [{"params": [*select(model, role).tensors.values()], "lr": lr} for role, lr in rates.items()]
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == 4 * 7


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_adapters_on_a_selection_change_it_and_nothing_else(model: Any) -> None:
    built = model()
    chosen = select(built, "attention.out", "first:1,last:1")
    before = {name: value.clone() for name, value in built.named_parameters()}
    with adapters(built, 2, 2, 0.0, chosen.modules) as wrapped:
        inner: Any = wrapped.model
        found = select(inner, "adapters, attention.out")
        assert {part.role for part in found.parts if "lora" in str(part.parameters)} == {"adapters"}
        for name in select(inner, "adapters").parameters:
            nn.init.normal_(inner.get_parameter(name))
    changed = [name for name, value in built.named_parameters() if not torch.equal(value, before[name])]
    assert changed == [f"{module}.weight" for module in chosen.modules]


def test_pruned_heads_go_with_their_neighbours() -> None:
    model: Any = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[8:16] = 0  # nothing of the second head comes through
    assert [rows_of(model, f"attention.{role}") for role in "qkv"] == [[(0, 32, 1)], [(32, 64, 1)], [(64, 96, 1)]]


def test_a_mixed_stack_is_told_block_by_block() -> None:
    options = {**GROUPED, "num_experts_per_tok": 2, "num_experts": 4, "mlp_only_layers": [1], "head_dim": 8}
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, moe_intermediate_size=16)).eval()
    roles = {place: {part.role for part in select(model, "mlp", [place]).parts} for place in (0, 1)}
    assert roles == {0: {"experts"}, 1: {"mlp.gate", "mlp.up", "mlp.down"}}
