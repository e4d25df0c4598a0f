from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from conftest import tiny_llama
from families import FAMILIES, GROUPED, LM
from overhaul.errors import RequestError
from overhaul.stack import LayerStack
from overhaul.trace import Skip, Zero, capture, intervene, measure
from overhaul.trace.sites import BlockSites, Contribution, sites
from tracing import batch, hooks_of, keep, llama, outputs

Expected = tuple[str, str, str, str, str]
"""Norms, placement, attention, cross-attention and MLP: module, then projection and orientation if there is one."""

LLAMA = (
    "input_layernorm post_attention_layernorm", "pre", "self_attn self_attn.o_proj.weight out,in", "",
    "mlp mlp.down_proj.weight out,in",
)  # fmt: skip
GEMMA = (
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm", "sandwich",
    "post_attention_layernorm self_attn.o_proj.weight out,in", "",
    "post_feedforward_layernorm mlp.down_proj.weight out,in",
)  # fmt: skip
EXPERTS = (*LLAMA[:4], "mlp mlp.experts.down_proj out,in")
CLIP = (
    "layer_norm1 layer_norm2", "pre", "self_attn self_attn.out_proj.weight out,in", "", "mlp mlp.fc2.weight out,in",
)  # fmt: skip
EXPECTED: dict[str, Expected] = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3, alternating windows": LLAMA,
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Phi3": LLAMA,
    "Mixtral": EXPERTS,
    "OLMoE": EXPERTS,
    "GPT-2": ("ln_1 ln_2", "pre", "attn attn.c_proj.weight in,out", "", "mlp mlp.c_proj.weight in,out"),
    "OPT": ("self_attn_layer_norm final_layer_norm", "pre", "self_attn self_attn.out_proj.weight out,in", "",
        "fc2 fc2.weight out,in"),
    "GPT-NeoX": ("input_layernorm post_attention_layernorm", "pre", "attention attention.dense.weight out,in", "",
        "mlp mlp.dense_4h_to_h.weight out,in"),
    "Bloom": ("input_layernorm post_attention_layernorm", "pre",
        "self_attention.dense self_attention.dense.weight out,in", "", "mlp.dense_4h_to_h mlp.dense_4h_to_h.weight out,in"),
    "BERT": ("attention.output.LayerNorm output.LayerNorm", "post",
        "attention.output.dense attention.output.dense.weight out,in", "", "output.dense output.dense.weight out,in"),
    "T5, encoder": ("layer.0.layer_norm layer.1.layer_norm", "pre",
        "layer.0.SelfAttention layer.0.SelfAttention.o.weight out,in", "",
        "layer.1.DenseReluDense layer.1.DenseReluDense.wo.weight out,in"),
    "T5, decoder": ("layer.0.layer_norm layer.1.layer_norm layer.2.layer_norm", "pre",
        "layer.0.SelfAttention layer.0.SelfAttention.o.weight out,in",
        "layer.1.EncDecAttention layer.1.EncDecAttention.o.weight out,in",
        "layer.2.DenseReluDense layer.2.DenseReluDense.wo.weight out,in"),
    "ViT": ("layernorm_before layernorm_after", "pre", "attention attention.o_proj.weight out,in", "",
        "mlp mlp.fc2.weight out,in"),
    "DINOv2": ("norm1 norm2", "pre", "layer_scale1 attention.o_proj.weight out,in", "",
        "layer_scale2 mlp.fc2.weight out,in"),
    "CLIP, text": CLIP,
    "CLIP, vision": CLIP,
    "UNet": ("norm1 norm2 norm3", "pre", "attn1 attn1.to_out.0.weight out,in", "attn2 attn2.to_out.0.weight out,in",
        "ff ff.net.2.weight out,in"),
}  # fmt: skip
UNKNOWN = {"ResNet", "DiT", "PixArt", "SD3", "Flux, two streams", "Flux, one stream"}
"""Gates outside of modules, and convolutions."""


def stack_of(name: str) -> LayerStack:
    return LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)


def built(model: str, config: str, **options: Any) -> LayerStack:
    """The last stack of a model that is in no matrix."""
    import transformers

    torch.manual_seed(0)
    network = getattr(transformers, model)(getattr(transformers, config)(**options))
    for parameter in network.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, float(parameter.mean().detach()), 0.1)
    return LayerStack.find(network.eval())[-1]


def described(found: BlockSites) -> Expected:
    def short(name: str) -> str:
        return name.removeprefix(f"{found.block}.")

    def of(part: Contribution | None) -> str:
        if part is None:
            return ""
        written = part.projection
        ends = [short(written.parameter), written.orientation.replace(" ", "")] if written else []
        return " ".join([short(part.module), *ends])

    norms = " ".join(map(short, found.norms))
    return norms, found.placement or "", of(found.attention), of(found.cross_attention), of(found.mlp)


def contributions(found: BlockSites) -> list[str]:
    return [part.module for part in (found.attention, found.cross_attention, found.mlp) if part]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_contributions_of_each_block_are_found_and_add_up(name: str) -> None:
    stack = stack_of(name)
    found = sites(stack, FAMILIES[name].inputs())
    assert [block.block for block in found] == [f"{stack.path}.{n}" for n in range(FAMILIES[name].blocks)]
    for block in found:
        assert described(block) == EXPECTED[name]
        assert block.verified and block.error is not None and 0 < block.error <= 1e-6
        assert block.parallel == (name == "GPT-NeoX")


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_where_no_sum_fits_only_the_stream_is_known(name: str) -> None:
    for block in sites(stack_of(name), FAMILIES[name].inputs()):
        assert not block.verified and block.error is None and block.parallel is None and block.placement is None
        assert not contributions(block)


def test_every_family_is_one_or_the_other() -> None:
    assert {*EXPECTED} | UNKNOWN == {*FAMILIES} and not {*EXPECTED} & UNKNOWN


@pytest.mark.parametrize("name", EXPECTED)
def test_the_sum_holds_on_inputs_that_were_not_used_to_find_it(name: str) -> None:
    stack, inputs = stack_of(name), FAMILIES[name].inputs()
    found = sites(stack, inputs)[1]
    other = {
        key: value.flip(1) if value.ndim > 1 and key != "attention_mask" else value for key, value in inputs.items()
    }
    names = contributions(found)
    seen = measure(stack, [other], ["entering.1", "leaving.1", *names], keep)
    state = {site: kept[0][0] for site, kept in seen.items()}
    start = state["entering.1"]
    if found.placement == "post":
        (first, last), (attention, mlp) = map(stack.model.get_submodule, found.norms), names
        expected = last(first(start + state[attention]) + state[mlp])
    else:
        expected = start + torch.stack([state[site] for site in names]).sum(0)
    torch.testing.assert_close(expected, state["leaving.1"])


@pytest.mark.parametrize("name", [name for name, known in EXPECTED.items() if known[1] != "post"])
def test_a_block_whose_contributions_are_zero_leaves_its_input_as_it_is(name: str) -> None:
    stack, inputs = stack_of(name), FAMILIES[name].inputs()
    found = sites(stack, inputs)[1]
    with intervene(stack, dict.fromkeys(contributions(found), Zero())):
        silent = outputs(stack, inputs)
    with intervene(stack, {"leaving.1": Skip()}):
        skipped = outputs(stack, inputs)
    assert silent and all(map(torch.equal, silent, skipped))


# where a norm follows, it mixes the features
@pytest.mark.parametrize("name", [name for name, known in EXPECTED.items() if known[1] != "sandwich"])
def test_a_slice_of_a_projection_writes_one_feature(name: str) -> None:
    stack, inputs = stack_of(name), FAMILIES[name].inputs()
    block = sites(stack, inputs)[1]
    for part in (block.attention, block.cross_attention, block.mlp):
        if part is None:
            continue
        assert part.projection is not None
        weight = stack.model.get_parameter(part.projection.parameter).data
        before = measure(stack, [inputs], [part.module], keep)[part.module][0][0]
        weight.select(-2 if part.projection.orientation == "out, in" else -1, 5).mul_(3)
        after = measure(stack, [inputs], [part.module], keep)[part.module][0][0]
        moved = (after - before).abs().amax(dim=(0, 1)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("model", "config", "options", "expected"),
    [
        ("Olmo2ForCausalLM", "Olmo2Config", LM, ("post_attention_layernorm post_feedforward_layernorm", "output",
            "post_attention_layernorm self_attn.o_proj.weight out,in", "",
            "post_feedforward_layernorm mlp.down_proj.weight out,in")),
        ("OPTForCausalLM", "OPTConfig", {**LM, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            ("self_attn_layer_norm final_layer_norm", "post", "self_attn self_attn.out_proj.weight out,in", "",
            "fc2 fc2.weight out,in")),
        # Falcon adds attention to what the MLP returned, in place
        ("FalconForCausalLM", "FalconConfig",
            {name: LM[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            ("input_layernorm", "pre", "self_attention self_attention.dense.weight out,in", "",
            "mlp mlp.dense_4h_to_h.weight out,in")),
        # experts stored as (in, out)
        ("GptOssForCausalLM", "GptOssConfig", {**GROUPED, "num_local_experts": 4, "head_dim": 8, "rope_parameters":
            {"rope_type": "default", "rope_theta": 10000.0}}, (*LLAMA[:4], "mlp mlp.experts.down_proj in,out")),
        # a multiplier between MLP and sum: no sum fits, and none is assumed
        ("GraniteForCausalLM", "GraniteConfig", {**LM, "residual_multiplier": 0.2},
            ("input_layernorm post_attention_layernorm", "", "", "", "")),
    ],
)  # fmt: skip
def test_other_arrangements(model: str, config: str, options: dict[str, Any], expected: Expected) -> None:
    stack = built(model, config, **options)
    assert all(described(block) == expected for block in sites(stack, batch()))


def test_names_play_no_part() -> None:
    class Block(nn.Module):
        """Its "attention" is an MLP and its "mlp" carries from position to position."""

        def __init__(self) -> None:
            super().__init__()
            self.layer_norm = nn.Linear(8, 8)
            self.attention, self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.layer_norm(x))
            return x + self.mlp(x.cumsum(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(64, 8), nn.ModuleList(Block() for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    for found in sites(LayerStack.of(Model()), {"input_ids": batch()["input_ids"]}):
        assert described(found) == ("", "", "mlp mlp.weight out,in", "", "attention attention.2.weight out,in")


def test_the_map_changes_nothing_and_draws_nothing() -> None:
    stack = LayerStack.of(tiny_llama(attention_dropout=0.5).train())
    stack.blocks[1].register_forward_hook(lambda *_: None)
    weights = {name: value.clone() for name, value in stack.model.state_dict().items()}
    hooks, random = hooks_of(stack.model), torch.get_rng_state()
    assert all(block.verified for block in sites(stack, batch(padded=3)))
    assert all(torch.equal(value, weights[name]) for name, value in stack.model.state_dict().items())
    assert stack.model.training and hooks_of(stack.model) == hooks and torch.equal(torch.get_rng_state(), random)


def test_it_works_in_bfloat16_with_padding_on_either_side_and_on_a_path() -> None:
    inputs = batch(length=16, padded=5)
    left = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    for stack in (llama(), LayerStack.of(tiny_llama().bfloat16())):
        for found in (*sites(stack, inputs), *sites(stack, left)):
            assert described(found) == LLAMA
    stack = llama()
    with stack.following([1, 0, 3]):
        assert [found.block for found in sites(stack, inputs)] == [f"model.layers.{n}" for n in range(3)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_projection_under_an_adapter_is_the_weight_itself() -> None:
    import peft

    model: Any = tiny_llama()
    options: Any = {"target_modules": ["o_proj", "down_proj"], "r": 2, "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    found = sites(LayerStack.of(wrapped), batch())[1]
    assert found.block == "base_model.model.model.layers.1"
    assert described(found)[2] == "self_attn self_attn.o_proj.base_layer.weight out,in"
    assert described(found)[4] == "mlp mlp.down_proj.base_layer.weight out,in"


def test_names_are_those_that_capture_and_intervene_take() -> None:
    stack = llama()
    names = [name for block in sites(stack, batch()) for name in contributions(block)]
    with intervene(stack, dict.fromkeys(names, Zero())), capture(stack, windows_of(stack), keep) as seen:
        outputs(stack, batch())
    assert all(torch.equal(*kept[0][:2]) for kept in seen.values())


def windows_of(stack: LayerStack) -> list[tuple[str, str]]:
    return [(f"entering.{n}", f"leaving.{n}") for n in range(len(stack))]


def test_inputs_that_show_nothing_are_refused() -> None:
    stack = llama()
    with pytest.raises(RequestError, match="two positions or more"):
        sites(stack, batch(length=1))
    with pytest.raises(RequestError, match="LlamaForCausalLM calls its blocks with a cache"):
        sites(stack, {**batch(), "past_key_values": DynamicCache()})
