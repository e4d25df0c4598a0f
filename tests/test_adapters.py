"""Adapters over a base in low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import examples_for, tiny_llama
from overhaul.adapters import adapters
from overhaul.fit import fit
from overhaul.objectives import cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_and_train_over_a_base_that_stays_what_it_is(dtype: torch.dtype) -> None:
    model = tiny_llama(initializer_range=0.2).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with adapters(model, rank=4, alpha=8, dropout=0.0) as wrapped:
        trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        assert len(trained) == 56 and all(p.dtype is torch.float32 for p in trained.values())
        lessons = {"a": examples_for("llama", 8)}
        ledger = fit(wrapped, [cross_entropy("a")], lessons, steps=20, batch_size=8, lr=1e-2)
        assert all(p.dtype is torch.float32 for p in trained.values())
    assert ledger.curves["loss"][-1] < 0.7 * ledger.curves["loss"][0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "_proj" in name}


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2}
FINE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "mlp_only_layers": [0]},
    "Glm4Moe": {**FINE, "head_dim": 8},
    "DeepseekV3": {**FINE, **LATENT, "qk_nope_head_dim": 4},
    "Llama4": {"num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
}  # fmt: skip


def mixture(family: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}{'Text' * (family == 'Llama4')}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(**{**SIZES, **MIXTURES[family]})).eval()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_adapted_each_by_a_product_of_the_rank_beside_dense_blocks(family: str) -> None:
    model: Any = mixture(family)
    before, kind = {name: p.detach().clone() for name, p in model.named_parameters()}, model.config.model_type
    ids = torch.arange(3, 15)[None]
    with adapters(model, rank=2, alpha=4, dropout=0.1) as wrapped:
        assert model.config.model_type == kind
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name
                nn.init.normal_(parameter.data, std=0.05)
        wrapped.eval()
        with torch.no_grad():
            said = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, said, atol=1e-5, rtol=1e-4)
    stacks = [name for name, p in before.items() if p.ndim == 3]
    changed = {name: p.detach() - before[name] for name, p in model.named_parameters() if not p.equal(before[name])}
    assert stacks and set(stacks) <= changed.keys(), "experts are adapted"
    assert all(int(rank) == 2 for name in stacks for rank in torch.linalg.matrix_rank(changed[name], rtol=1e-3))
    left = [name for name in before.keys() - changed.keys() if before[name].ndim > 1 and not name.endswith("bias")]
    others = {name.rpartition(".")[0].rpartition(".")[2] for name in left}
    assert others <= {"gate", "router", "embed_tokens", "lm_head"}
    assert all(p.requires_grad for p in model.parameters()) and "lora" not in "".join(model.state_dict())
