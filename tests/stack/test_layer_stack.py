from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from conftest import FAMILIES, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_resnet, tiny_vit
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.stack import LayerStack

LANGUAGE = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen3": tiny_qwen3, "gemma3": tiny_gemma3}
PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "vit": "vit.layers", "resnet": "resnet.encoder.stages"}


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def batch_for(family: str) -> dict[str, Tensor]:
    if family in ("vit", "resnet"):
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": ids()}


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    return forward(model, batch_for(family))


@torch.no_grad()
def token_by_token(model: Any, tokens: Tensor) -> Tensor:
    cache, out = None, []
    for t in range(tokens.shape[1]):
        step = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        out.append(step.logits)
    return torch.cat(out, dim=1)


def state_of(model: Any) -> tuple[Any, ...]:
    tensors = {name: (id(p), tuple(p.shape)) for name, p in model.state_dict(keep_vars=True).items()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    places = [(n, m.layer_idx) for n, m in model.named_modules() if hasattr(m, "layer_idx")]
    return tensors, modules, places, model.config.to_dict()


def silence(block: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        for parameter in block.get_submodule(name).parameters():
            nn.init.zeros_(parameter)


# finding


def test_finds_the_blocks_of_every_family(family: str) -> None:
    model = FAMILIES[family]()
    stack = LayerStack.of(model)
    assert stack.path == PATHS[family]
    assert len(stack) == len(stack.blocks) == (6 if family == "resnet" else 4)
    assert [found.path for found in LayerStack.find(model)] == [stack.path]


def test_a_stack_needs_no_config_and_no_known_class() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[Block() for _ in range(3)]), nn.Linear(4, 2))
    stack = LayerStack.of(model)
    second = stack.blocks[1]
    stack.drop([0, 2])
    assert stack.path == "1" and stack.blocks == [second]


def test_depth_of_every_kind_of_parameter() -> None:
    llama, gpt2, resnet = (LayerStack.of(FAMILIES[name]()) for name in ("llama", "gpt2", "resnet"))
    assert llama.depth("model.embed_tokens.weight") == -1
    assert llama.depth("model.layers.2.mlp.down_proj.weight") == 2
    assert llama.depth("model.layers.3") == 3
    assert llama.depth("model.norm.weight") == llama.depth("lm_head.weight") == 4
    assert (gpt2.depth("transformer.wpe.weight"), gpt2.depth("transformer.ln_f.bias")) == (-1, 4)
    assert resnet.depth("resnet.embedder.embedder.convolution.weight") == -1
    assert resnet.depth("resnet.encoder.stages.1.layers.2.layer.0.convolution.weight") == 5
    assert resnet.depth("classifier.1.weight") == 6


def test_depth_knows_a_norm_that_is_defined_before_the_blocks_it_follows() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16
    )
    stack = LayerStack.of(OPTForCausalLM(config))
    names = [name for name, _ in stack.model.named_parameters() if not name.startswith("model.decoder.layers.")]
    assert {name.split(".")[2] for name in names if stack.depth(name) == -1} == {
        "embed_tokens", "embed_positions", "project_in",
    }  # fmt: skip
    assert {name.split(".")[2] for name in names if stack.depth(name) == 2} == {"final_layer_norm", "project_out"}


def test_several_stacks_are_all_found_and_none_is_guessed() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    assert [stack.path for stack in LayerStack.find(model)] == ["encoder.block", "decoder.block"]
    with pytest.raises(RequestError, match=r"2 stacks.*encoder\.block \(2 x T5Block\), decoder\.block"):
        LayerStack.of(model)


def test_a_list_of_other_things_beside_the_declared_stack_does_not_confuse() -> None:
    model: Any = tiny_llama()
    model.extra = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    assert [stack.path for stack in LayerStack.find(model)] == ["model.layers", "extra"]
    assert LayerStack.of(model).path == "model.layers"


def test_an_unknown_architecture_says_what_was_found() -> None:
    model = nn.Module()
    model.convolutions = nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)])
    with pytest.raises(RequestError, match=r"no list of repeated blocks.*convolutions \(2 x Conv1d\)"):
        LayerStack.of(model)
    with pytest.raises(RequestError, match="no submodules"):
        LayerStack.of(nn.Linear(2, 2))


# dropping


def test_dropping_nothing_is_the_identity(family: str) -> None:
    model: Any = FAMILIES[family]()
    before, output = state_of(model), logits(model, family)
    LayerStack.of(model).drop([])
    assert state_of(model) == before
    assert torch.equal(logits(model, family), output)


@pytest.mark.parametrize(
    ("family", "outputs"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("vit", ("attention.o_proj", "mlp.fc2")),
    ],
)
@pytest.mark.parametrize("index", [0, 2, 3])
def test_dropping_a_block_whose_output_projections_are_zero_leaves_logits_bit_equal(
    family: str, outputs: tuple[str, ...], index: int
) -> None:
    model: Any = FAMILIES[family]()
    stack = LayerStack.of(model)
    silence(stack.blocks[index], outputs)
    before = logits(model, family)
    stack.drop([index])
    assert len(stack) == model.config.num_hidden_layers == 3
    assert torch.equal(logits(model, family), before)


def test_dropping_a_residual_block_that_adds_zero_leaves_resnet_logits_bit_equal() -> None:
    model: Any = tiny_resnet()
    stack = LayerStack.of(model)
    last: Any = stack.blocks[4].get_submodule("layer.1.normalization")
    nn.init.zeros_(last.weight)
    before = logits(model, "resnet")
    stack.drop([4])
    assert model.config.depths == [3, 2] and len(stack) == 5
    assert torch.equal(logits(model, "resnet"), before)


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("dropped", [[0], [1], [3], [0, 2]])
def test_after_a_drop_decoding_with_the_cache_equals_the_full_forward(family: str, dropped: list[int]) -> None:
    model: Any = LANGUAGE[family]()
    LayerStack.of(model).drop(dropped)
    tokens = ids()
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        prefix = model(input_ids=tokens[:, :4], use_cache=True)
        rest = model(input_ids=tokens[:, 4:], past_key_values=prefix.past_key_values).logits
    torch.testing.assert_close(token_by_token(model, tokens), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat([prefix.logits, rest], dim=1), whole, atol=1e-4, rtol=0)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(tokens)}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_gemma3])
def test_the_attention_type_follows_the_block(build: Callable[..., nn.Module]) -> None:
    model: Any = build()
    silence(model.model.layers[1], ("self_attn.o_proj", "mlp.down_proj"))
    before = logits(model, "llama")
    LayerStack.of(model).drop([1])
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "vit", "resnet"])
def test_saved_and_loaded_plainly_it_gives_equal_logits(name: str, tmp_path: Path) -> None:
    model: Any = {**LANGUAGE, "vit": tiny_vit, "resnet": tiny_resnet}[name]()
    LayerStack.of(model).drop([1, 4] if name == "resnet" else [0, 2])
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits(again.eval(), name), logits(model, name))


def test_the_librarys_own_hidden_states_keep_count() -> None:
    model: Any = tiny_llama()
    model(input_ids=ids(), output_hidden_states=True)
    LayerStack.of(model).drop([1])
    assert len(model(input_ids=ids(), output_hidden_states=True).hidden_states) == 4


def test_lists_of_places_in_the_config_are_renumbered() -> None:
    model: Any = tiny_llama()
    model.config.mlp_only_layers = [1, 3]
    model.config.no_rope_layers = [1, 0, 1, 0]
    model.config.eos_token_id = [5, 6, 7, 8]
    LayerStack.of(model).drop([2])
    assert model.config.mlp_only_layers == [1, 2]
    assert model.config.no_rope_layers == [1, 0, 0]
    assert model.config.eos_token_id == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("indices", "message"),
    [([4], "blocks 0 to 3; there is no block 4"), ([-1], "no block -1"), ([0, 1, 2, 3], "at least one must stay")],
)
def test_impossible_drops_are_refused_and_change_nothing(indices: list[int], message: str) -> None:
    model: Any = tiny_llama()
    before = state_of(model)
    with pytest.raises(RequestError, match=message):
        LayerStack.of(model).drop(indices)
    assert state_of(model) == before


def test_a_block_that_opens_a_stage_cannot_be_dropped() -> None:
    stack = LayerStack.of(tiny_resnet())
    assert stack.droppable == [1, 2, 4, 5]
    with pytest.raises(RequestError, match=r"Block 3.*opens a stage.*\[1, 2, 4, 5\]"):
        stack.drop([3])


def test_a_model_that_its_config_could_not_describe_is_refused_and_left_as_it_was() -> None:
    model: Any = tiny_gpt2(scale_attn_by_inverse_layer_idx=True)  # the scale depends on the place a block was built at
    before, output = state_of(model), logits(model, "gpt2")
    with pytest.raises(RequestError, match=r"would not load again: block 1: attn\.scaling"):
        LayerStack.of(model).drop([0])
    assert state_of(model) == before
    assert torch.equal(logits(model, "gpt2"), output)


def test_a_depth_that_only_another_name_of_the_config_declares_is_found(tmp_path: Path) -> None:
    model: Any = families.FAMILIES["T5, encoder"].build()
    LayerStack.at(model, "encoder.block").drop([1])
    LayerStack.at(model, "decoder.block").drop([3, 1])
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 2)
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    inputs = families.FAMILIES["T5, encoder"].inputs()
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_a_stack_whose_length_no_config_declares_cannot_be_changed() -> None:
    model = families.FAMILIES["UNet"].build()
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(RequestError, match=r"No entry in the config of UNet2DConditionModel says how many blocks"):
        LayerStack.at(model, "mid_block.attentions.0.transformer_blocks").drop([1])
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_dropping_consumes_no_randomness() -> None:
    model = tiny_llama()
    before = torch.get_rng_state()
    LayerStack.of(model).drop([1])
    assert torch.equal(torch.get_rng_state(), before)


# skipping


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "vit", "resnet"])
def test_skipping_equals_dropping_and_restores_exactly(name: str) -> None:
    model: Any = {**LANGUAGE, "vit": tiny_vit, "resnet": tiny_resnet}[name]()
    skipped = [1, 4] if name == "resnet" else [0, 2]
    shorter = copy.deepcopy(model)
    LayerStack.of(shorter).drop(skipped)
    before, output = state_of(model), logits(model, name)
    with LayerStack.of(model).skipping(skipped) as stack:
        assert torch.equal(logits(model, name), logits(shorter, name))
        assert len(stack) == len(LayerStack.of(shorter))
        if name in LANGUAGE:
            assert torch.equal(token_by_token(model, ids()), token_by_token(shorter, ids()))
    assert state_of(model) == before
    assert torch.equal(logits(model, name), output)


def test_skipping_restores_after_an_exception_and_when_nested(family: str) -> None:
    model = FAMILIES[family]()
    stack = LayerStack.of(model)
    before, output = state_of(model), logits(model, family)
    with pytest.raises(ZeroDivisionError), stack.skipping([1]), stack.skipping([1]):
        raise ZeroDivisionError
    assert state_of(model) == before
    assert torch.equal(logits(model, family), output)


def test_hooks_stay_on_their_blocks() -> None:
    model = tiny_llama()
    stack = LayerStack.of(model)
    calls: list[int] = []
    for n, block in enumerate(stack.blocks):
        block.register_forward_hook(lambda *_, n=n: calls.append(n))
    with stack.skipping([1]):
        logits(model, "llama")
    assert calls == [0, 2, 3]
