"""Families beyond those of `families`, each with what of it can be dropped for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from families import CLIP, GROUPED, LM, MOE, NAMED, T5, TOWER, VIT, Family, Kind

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@dataclass(frozen=True)
class More(Family):
    """A family, with the blocks that are dropped, or the reason why none can be."""

    drop: tuple[int, ...] | str = (1,)
    audio: str = ""

    @property
    def decodes(self) -> bool:
        return self.kind == "causal" or ".decoder." in f".{self.stack}"

    def inputs(self) -> dict[str, Any]:
        if self.audio:
            draw = torch.Generator().manual_seed(1)
            if self.audio == "input_values":
                return {"input_values": torch.randn(2, 400, generator=draw)}
            return {
                "input_features": torch.randn(2, 8, 32, generator=draw),
                "decoder_input_ids": torch.randint(3, 64, (2, 5), generator=draw),
            }
        return super().inputs()


def lm(name: str, stack: str = "model.layers", drop: Any = (1,), config: str = "", kind: Kind = "causal", blocks: int = 4, base: Any = GROUPED, **options: Any) -> More:
    config = config or name.partition("For")[0].removesuffix("LMHeadModel").removesuffix("Model") + "Config"
    return More(stack, blocks, kind, (name, config), {**base, **options}, drop=drop)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, **NAMED}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DEEP = {**GROUPED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 2, "n_shared_experts": 1}
TEXT = {**GROUPED}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
QWEN_VL_TEXT = {**GROUPED, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {"hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 4, "depth": 3, "patch_size": 4}

MORE: dict[str, More] = {
    "Qwen3": lm("Qwen3ForCausalLM", head_dim=8),
    "Qwen3-MoE": lm("Qwen3MoeForCausalLM", base=MOE, head_dim=8, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0, 2]),
    "Qwen2-MoE": lm("Qwen2MoeForCausalLM", base=MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "Qwen3-Next": lm("Qwen3NextForCausalLM", base=MOE, head_dim=8, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "Gemma": lm("GemmaForCausalLM", head_dim=8),
    "Phi": lm("PhiForCausalLM"),
    "Phi-MoE": lm("PhimoeForCausalLM", base=MOE, num_local_experts=4),
    "OLMo": lm("OlmoForCausalLM"),
    "OLMo2": lm("Olmo2ForCausalLM"),
    "OLMo3": lm("Olmo3ForCausalLM"),
    "Falcon": lm("FalconForCausalLM", "transformer.h", base=SMALL),
    "MPT": lm("MptForCausalLM", "transformer.blocks", base=NAMED, d_model=32, n_heads=4, n_layers=4, max_seq_len=128, expansion_ratio=2),
    "GPT-Neo": lm("GPTNeoForCausalLM", "transformer.h", base=NAMED, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, max_position_embeddings=128, attention_types=[[["global", "local"], 2]], window_size=4),
    "GPT-J": lm("GPTJForCausalLM", "transformer.h", base=NAMED, n_embd=32, n_layer=4, n_head=4, rotary_dim=4, n_positions=128),
    "GPT-BigCode": lm("GPTBigCodeForCausalLM", "transformer.h", base=NAMED, n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "CodeGen": lm("CodeGenForCausalLM", "transformer.h", base=NAMED, n_embd=32, n_layer=4, n_head=4, rotary_dim=4, n_positions=128),
    "StableLM": lm("StableLmForCausalLM"),
    "Cohere": lm("CohereForCausalLM"),
    "Cohere2": lm("Cohere2ForCausalLM", sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2),
    "Starcoder2": lm("Starcoder2ForCausalLM"),
    "Granite": lm("GraniteForCausalLM"),
    "Granite-MoE": lm("GraniteMoeForCausalLM", base=MOE, num_local_experts=4),
    "Granite-MoE-Hybrid": lm("GraniteMoeHybridForCausalLM", base=MOE, drop=(0,), num_local_experts=4, shared_intermediate_size=16, layer_types=["mamba", "attention", "mamba", "mamba"], **MAMBA),
    "DeepSeek-V2": lm("DeepseekV2ForCausalLM", base=DEEP, drop=(1, 2)),
    "DeepSeek-V3": lm("DeepseekV3ForCausalLM", base=DEEP, drop=(1, 2)),
    "GLM": lm("GlmForCausalLM", head_dim=8),
    "GLM-4": lm("Glm4ForCausalLM", head_dim=8),
    "GLM-4-MoE": lm("Glm4MoeForCausalLM", base=MOE, head_dim=8, n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1),
    "SmolLM3": lm("SmolLM3ForCausalLM"),
    "Nemotron": lm("NemotronForCausalLM"),
    "NemotronH": lm("NemotronHForCausalLM", drop=(3,), head_dim=8, layers_block_type=["mamba", "attention", "mlp", "mamba"], mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=8),
    "Mamba": lm("MambaForCausalLM", "backbone.layers", base=NAMED, hidden_size=32, num_hidden_layers=4, state_size=8),
    "Mamba2": lm("Mamba2ForCausalLM", "backbone.layers", base=NAMED, hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "Falcon-Mamba": lm("FalconMambaForCausalLM", "backbone.layers", base=NAMED, hidden_size=32, num_hidden_layers=4, state_size=8),
    "Falcon-H1": lm("FalconH1ForCausalLM", head_dim=8, mamba_d_ssm=64, **MAMBA),
    "Jamba": lm("JambaForCausalLM", base=MOE, drop=(2, 3), num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "Bamba": lm("BambaForCausalLM", attn_layer_indices=[1, 3], **MAMBA),
    "Zamba2": lm("Zamba2ForCausalLM", drop=(2,), layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, mamba_expand=2, mamba_ngroups=1, n_mamba_heads=4, chunk_size=8, num_mem_blocks=1, use_mem_rope=True, use_shared_attention_adapter=False),
    "Zamba": lm("ZambaForCausalLM", drop=(2,), n_mamba_heads=2, mamba_d_state=8, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], use_mamba_kernels=False),
    "RecurrentGemma": lm("RecurrentGemmaForCausalLM", drop=(0,), lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"], head_dim=8),
    "LFM2": lm("Lfm2ForCausalLM", layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "ERNIE 4.5": lm("Ernie4_5ForCausalLM"),
    "ERNIE 4.5 MoE": lm("Ernie4_5_MoeForCausalLM", base=MOE, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0, moe_layer_end_index=3, moe_num_shared_experts=1),
    "EXAONE 4": lm("Exaone4ForCausalLM", sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt-oss": lm("GptOssForCausalLM", base=MOE, num_local_experts=4, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=ROPE),
    "MiniMax": lm("MiniMaxForCausalLM", base=MOE, num_local_experts=4, head_dim=8, block_size=4, layer_types=["linear_attention", "full_attention"] * 2),
    "Hunyuan": lm("HunYuanDenseV1ForCausalLM", head_dim=8),
    "Seed-OSS": lm("SeedOssForCausalLM", head_dim=8),
    "Apertus": lm("ApertusForCausalLM"),
    "Arcee": lm("ArceeForCausalLM"),
    "Helium": lm("HeliumForCausalLM", head_dim=8),
    "dots.llm1": lm("Dots1ForCausalLM", base=MOE, head_dim=8, n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1),
    "Persimmon": lm("PersimmonForCausalLM"),
    "XGLM": lm("XGLMForCausalLM", base=NAMED, d_model=32, ffn_dim=48, num_layers=4, attention_heads=4, max_position_embeddings=128),
    "BioGPT": lm("BioGptForCausalLM", "biogpt.layers"),
    "Llama 4": lm("Llama4ForCausalLM", config="Llama4TextConfig", base=MOE, head_dim=8, num_local_experts=4, intermediate_size_mlp=48, moe_layers=[1, 3], attention_chunk_size=8, use_qk_norm=False),
    "RoBERTa": lm("RobertaForMaskedLM", "roberta.encoder.layer", kind="encoder", base=LM),
    "XLM-RoBERTa": lm("XLMRobertaForMaskedLM", "roberta.encoder.layer", kind="encoder", base=LM),
    "DistilBERT": lm("DistilBertForMaskedLM", "distilbert.transformer.layer", kind="encoder", base=NAMED, dim=32, hidden_dim=48, n_layers=4, n_heads=4),
    "ELECTRA": lm("ElectraForMaskedLM", "electra.encoder.layer", kind="encoder", base=LM, embedding_size=16),
    "MPNet": lm("MPNetForMaskedLM", "mpnet.encoder.layer", kind="encoder", base=LM),
    "ModernBERT": lm("ModernBertForMaskedLM", "model.layers", kind="encoder", base=LM, local_attention=4, cls_token_id=1, sep_token_id=2),
    "DeBERTa-v2": lm("DebertaV2ForMaskedLM", "deberta.encoder.layer", kind="encoder", base=LM, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8),
    "ALBERT": lm("AlbertForMaskedLM", "albert.encoder.albert_layer_groups", drop="its layers are one block that is run again and again", kind="encoder", blocks=1, base=LM, embedding_size=16),
    "ESM": lm("EsmForMaskedLM", "esm.encoder.layer", kind="encoder", base=LM),
    "NomicBERT": lm("NomicBertForMaskedLM", "nomic_bert.layers", kind="encoder", base=LM),
    "BERT, embeddings": lm("BertModel", "encoder.layer", kind="encoder", base=LM),
    "BART, decoder": lm("BartForConditionalGeneration", "model.decoder.layers", kind="seq2seq", base=NAMED, d_model=32, encoder_layers=3, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None, decoder_start_token_id=1),
    "BART, encoder": lm("BartForConditionalGeneration", "model.encoder.layers", kind="seq2seq", blocks=3, base=NAMED, d_model=32, encoder_layers=3, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None, decoder_start_token_id=1),
    "mT5, decoder": lm("MT5ForConditionalGeneration", "decoder.block", kind="seq2seq", base=T5),
    "Pegasus, decoder": lm("PegasusForConditionalGeneration", "model.decoder.layers", kind="seq2seq", base=NAMED, d_model=32, encoder_layers=3, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None),
    "Marian, decoder": lm("MarianMTModel", "model.decoder.layers", config="MarianConfig", kind="seq2seq", base=NAMED, d_model=32, encoder_layers=3, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, decoder_vocab_size=64, forced_eos_token_id=None),
    "DeiT": lm("DeiTForImageClassification", "deit.layers", kind="image", base=VIT),
    "BEiT": lm("BeitForImageClassification", "beit.layers", kind="image", base=VIT),
    "Swin": lm("SwinForImageClassification", "swin.encoder.layers", kind="image", base={}, image_size=16, patch_size=2, num_channels=3, embed_dim=8, depths=[2, 3], num_heads=[2, 2], window_size=2, num_labels=5),
    "ConvNeXt": lm("ConvNextForImageClassification", "convnext.encoder.stages", kind="image", base={}, num_channels=3, hidden_sizes=[8, 16], depths=[3, 3], num_stages=2, patch_size=2, num_labels=5),
    "SigLIP, text": lm("SiglipModel", "text_model.encoder.layers", config="SiglipConfig", kind="two towers", blocks=3, base={}, text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 16}, vision_config={**TOWER, "image_size": 8, "patch_size": 4}),
    "SigLIP, vision": lm("SiglipModel", "vision_model.encoder.layers", config="SiglipConfig", kind="two towers", blocks=3, base={}, text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 16}, vision_config={**TOWER, "image_size": 8, "patch_size": 4}),
    "Whisper, decoder": More("model.decoder.layers", 4, "seq2seq", ("WhisperForConditionalGeneration", "WhisperConfig"), {**NAMED, "d_model": 32, "encoder_layers": 3, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}, audio="input_features"),
    "wav2vec2": More("wav2vec2.encoder.layers", 4, "audio", ("Wav2Vec2ForCTC", "Wav2Vec2Config"), {**LM, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}, audio="input_values"),  # type: ignore
    "Gemma 3, with images": lm("Gemma3ForConditionalGeneration", "model.language_model.layers", config="Gemma3Config", base={}, text_config={**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=60),
    "Llava": lm("LlavaForConditionalGeneration", "model.language_model.layers", config="LlavaConfig", base={}, text_config={**GROUPED, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=60),
    "Qwen2-VL": lm("Qwen2VLForConditionalGeneration", "model.language_model.layers", config="Qwen2VLConfig", base={}, text_config=QWEN_VL_TEXT, vision_config=QWEN_VISION),
    "Qwen2.5-VL": lm("Qwen2_5_VLForConditionalGeneration", "model.language_model.layers", config="Qwen2_5_VLConfig", base={}, text_config=QWEN_VL_TEXT, vision_config={**QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1]}),
    "Qwen3-VL": lm("Qwen3VLForConditionalGeneration", "model.language_model.layers", config="Qwen3VLConfig", base={}, text_config={**QWEN_VL_TEXT, "head_dim": 8}, vision_config={**QWEN_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]}),
    "Mistral 3": lm("Mistral3ForConditionalGeneration", "model.language_model.layers", config="Mistral3Config", base={}, text_config={**GROUPED, "model_type": "mistral", "head_dim": 8}, vision_config={**VISION, "model_type": "pixtral", "head_dim": 8}, image_token_index=60),
    "Idefics3": lm("Idefics3ForConditionalGeneration", "model.text_model.layers", config="Idefics3Config", base={}, text_config={**GROUPED, "model_type": "llama"}, vision_config=VISION, image_token_id=60),
    "SmolVLM": lm("SmolVLMForConditionalGeneration", "model.text_model.layers", config="SmolVLMConfig", base={}, text_config={**GROUPED, "model_type": "llama"}, vision_config=VISION, image_token_id=60),
    "PaliGemma": lm("PaliGemmaForConditionalGeneration", "model.language_model.layers", config="PaliGemmaConfig", base={}, text_config={**GROUPED, "model_type": "gemma", "head_dim": 8}, vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32}, projection_dim=32, image_token_index=60),
    "InternVL": lm("InternVLForConditionalGeneration", "model.language_model.layers", config="InternVLConfig", base={}, text_config={**GROUPED, "model_type": "qwen2"}, vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, image_token_id=60),
    "Llama 4, with images": lm("Llama4ForConditionalGeneration", "language_model.model.layers", config="Llama4Config", base={}, text_config={**MOE, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "moe_layers": [1, 3], "attention_chunk_size": 8}, vision_config={**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
}
