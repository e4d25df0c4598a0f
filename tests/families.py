"""Tiny random models of every family that a stack is verified on: a new family joins by one entry of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["causal", "encoder", "seq2seq", "image", "two towers", "diffusion", "audio"]
Dropped = tuple[int, ...] | str
"""Blocks that are dropped for good, or why none can be."""


@dataclass(frozen=True)
class Family:
    """One stack of one model class.

    Attributes:
        stack: where the stack lies.
        blocks: how many blocks it has.
        kind: what the model reads, and whether it decodes with a cache.
        builder: class name and config class name in transformers, or class name in diffusers.
        options: for the config.
        pinned: blocks that must stay in their place.
        drop: what is dropped for good; if empty, the second of the blocks that can be.
    """

    stack: str
    blocks: int
    kind: Kind
    builder: tuple[str, str] | str
    options: dict[str, Any]
    pinned: tuple[int, ...] = ()
    drop: Dropped = ()

    def build(self) -> nn.Module:
        """The model, random, in eval mode, the same at each call."""
        torch.manual_seed(0)
        if isinstance(self.builder, str):
            import diffusers

            model = getattr(diffusers, self.builder)(**self.options)
        else:
            import transformers

            name, config = self.builder
            model = getattr(transformers, name)(getattr(transformers, config)(**self.options))
        for parameter in model.parameters():
            # fresh norms and gates are ones and zeros, behind which a wrong path could hide
            if parameter.ndim < 2 or not parameter.any():
                nn.init.normal_(parameter, float(parameter.mean().detach()), 0.1)
        return model.eval()

    @property
    def decodes(self) -> bool:
        """Whether the stack decodes with a key-value cache."""
        if self.builder[0] in _READS_PROMPTS_WHOLE:
            return False
        return self.kind == "causal" or ".decoder." in f".{self.stack}"

    @property
    def checkpoints(self) -> bool:
        """Whether the model's library offers activation checkpointing for it."""
        return self.stack != "resnet.encoder.stages"

    @property
    def lists_states(self) -> bool:
        """Whether the model's library returns a hidden state for each block (a ResNet returns one for each stage)."""
        return self.kind != "diffusion" and self.checkpoints

    @property
    def returns_tuples(self) -> bool:
        """Whether a block returns a tuple that begins with the hidden states."""
        return self.stack == "transformer.h" and "n_embd" not in self.options

    @property
    def alone(self) -> bool:
        """Whether the stack is the main one of its model, so that it need not be named."""
        return self.kind not in ("seq2seq", "two towers") and self.builder not in _OF_TWO_STACKS

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model, with two rows; the second one is padded where the model reads text."""
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        ids = torch.randint(3, 64, (2, 9), generator=draw)
        if self.kind == "causal":
            return {"input_ids": ids}
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
        if self.kind == "encoder":
            return {"input_ids": ids, "attention_mask": mask}
        if self.kind == "audio":
            return {"input_values": normal(2, 400)}
        if "num_mel_bins" in self.options:
            return {"input_features": normal(2, 8, 32), "decoder_input_ids": ids}
        if self.kind == "seq2seq":
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
        if self.kind == "two towers":
            return {"input_ids": ids, "attention_mask": mask, "pixel_values": normal(2, 3, 8, 8)}
        if self.kind == "image":
            return {"pixel_values": normal(2, 3, 8, 8)}
        return {name: value(normal) for name, value in DIFFUSION[str(self.builder)].items()}


_READS_PROMPTS_WHOLE = (
    "PaliGemmaForConditionalGeneration",
)  # in both directions, which a token on its own cannot be told
_OF_TWO_STACKS = ("FluxTransformer2DModel", "UNet2DConditionModel")

NAMED: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LM: dict[str, Any] = {
    **NAMED, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
GROUPED = {**LM, "num_key_value_heads": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3}
GEMMA = {**GROUPED, **SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}
MOE = {**GROUPED, "num_experts_per_tok": 2}
VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "num_channels": 3, "num_labels": 5,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
CLIP = {
    "text_config": {
        **TOWER,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
    "projection_dim": 8,
}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4}
LATENT = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
JOINT = {"joint_attention_dim": 16, "pooled_projection_dim": 16}
FLUX = {
    **HEADS,
    **JOINT,
    "in_channels": 4,
    "patch_size": 1,
    "num_layers": 3,
    "num_single_layers": 4,
    "axes_dims_rope": (2, 2, 4),
}
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 4, "transformer_layers_per_block": 3,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "Llama": Family("model.layers", 4, "causal", ("LlamaForCausalLM", "LlamaConfig"), GROUPED),
    "Mistral": Family("model.layers", 4, "causal", ("MistralForCausalLM", "MistralConfig"),
        {**GROUPED, "sliding_window": 4}),
    "Qwen2": Family("model.layers", 4, "causal", ("Qwen2ForCausalLM", "Qwen2Config"), GROUPED),
    "Qwen3, alternating windows": Family("model.layers", 4, "causal", ("Qwen3ForCausalLM", "Qwen3Config"),
        {**GROUPED, **SLIDING, "head_dim": 8, "use_sliding_window": True}),
    "Gemma2": Family("model.layers", 4, "causal", ("Gemma2ForCausalLM", "Gemma2Config"), GEMMA),
    "Gemma3": Family("model.layers", 4, "causal", ("Gemma3ForCausalLM", "Gemma3TextConfig"), GEMMA),
    "Phi3": Family("model.layers", 4, "causal", ("Phi3ForCausalLM", "Phi3Config"), GROUPED),
    "Mixtral": Family("model.layers", 4, "causal", ("MixtralForCausalLM", "MixtralConfig"),
        {**MOE, "num_local_experts": 4}),
    "OLMoE": Family("model.layers", 4, "causal", ("OlmoeForCausalLM", "OlmoeConfig"), {**MOE, "num_experts": 4}),
    "GPT-2": Family("transformer.h", 4, "causal", ("GPT2LMHeadModel", "GPT2Config"),
        {**NAMED, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "OPT": Family("model.decoder.layers", 4, "causal", ("OPTForCausalLM", "OPTConfig"),
        {**LM, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.0}),
    "GPT-NeoX": Family("gpt_neox.layers", 4, "causal", ("GPTNeoXForCausalLM", "GPTNeoXConfig"), LM),
    "Bloom": Family("transformer.h", 4, "causal", ("BloomForCausalLM", "BloomConfig"),
        {**NAMED, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "BERT": Family("bert.encoder.layer", 4, "encoder", ("BertForMaskedLM", "BertConfig"), LM),
    "T5, encoder": Family("encoder.block", 3, "seq2seq", ("T5ForConditionalGeneration", "T5Config"), T5, (0,)),
    "T5, decoder": Family("decoder.block", 4, "seq2seq", ("T5ForConditionalGeneration", "T5Config"), T5, (0,)),
    "ViT": Family("vit.layers", 4, "image", ("ViTForImageClassification", "ViTConfig"), VIT),
    "DINOv2": Family("dinov2.encoder.layer", 4, "image", ("Dinov2ForImageClassification", "Dinov2Config"), VIT),
    "CLIP, text": Family("text_model.encoder.layers", 3, "two towers", ("CLIPModel", "CLIPConfig"), CLIP),
    "CLIP, vision": Family("vision_model.encoder.layers", 3, "two towers", ("CLIPModel", "CLIPConfig"), CLIP),
    "ResNet": Family("resnet.encoder.stages", 6, "image", ("ResNetForImageClassification", "ResNetConfig"),
        {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "layer_type": "basic",
         "num_labels": 5}, (0, 3)),
    "DiT": Family("transformer_blocks", 4, "diffusion", "DiTTransformer2DModel",
        {**HEADS, **LATENT, "out_channels": 8, "num_embeds_ada_norm": 10}, (0,)),
    "PixArt": Family("transformer_blocks", 4, "diffusion", "PixArtTransformer2DModel",
        {**HEADS, **LATENT, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16}),
    "SD3": Family("transformer_blocks", 4, "diffusion", "SD3Transformer2DModel",
        {**HEADS, **LATENT, **JOINT, "out_channels": 4, "caption_projection_dim": 16, "pos_embed_max_size": 16}, (3,)),
    "Flux, two streams": Family("transformer_blocks", 3, "diffusion", "FluxTransformer2DModel", FLUX),
    "Flux, one stream": Family("single_transformer_blocks", 4, "diffusion", "FluxTransformer2DModel", FLUX),
    "UNet": Family("mid_block.attentions.0.transformer_blocks", 3, "diffusion", "UNet2DConditionModel", UNET,
        drop="no entry of its config counts the blocks of this stack alone"),
}  # fmt: skip

Draw = Callable[..., torch.Tensor]
STEP = {"timestep": lambda _: torch.tensor([3, 7])}
IMAGE = {"hidden_states": lambda normal: normal(2, 4, 8, 8), **STEP}
TEXT = {"encoder_hidden_states": lambda normal: normal(2, 5, 16)}
DIFFUSION: dict[str, dict[str, Callable[[Draw], Any]]] = {
    "DiTTransformer2DModel": {**IMAGE, "class_labels": lambda _: torch.tensor([1, 2])},
    "PixArtTransformer2DModel": {**IMAGE, **TEXT, "added_cond_kwargs": lambda _: {"resolution": None, "aspect_ratio": None}},
    "SD3Transformer2DModel": {**IMAGE, **TEXT, "pooled_projections": lambda normal: normal(2, 16)},
    "FluxTransformer2DModel": {
        "hidden_states": lambda normal: normal(2, 6, 4), "encoder_hidden_states": lambda normal: normal(2, 5, 16),
        "pooled_projections": lambda normal: normal(2, 16), "timestep": lambda _: torch.tensor([0.3, 0.7]),
        "img_ids": lambda _: torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], 1),
        "txt_ids": lambda _: torch.zeros(5, 3),
    },
    "UNet2DConditionModel": {"sample": lambda normal: normal(2, 4, 8, 8), **STEP, **TEXT},
}  # fmt: skip
