"""How each starter model is trained: the recorded recipe behind `overhaul starters build NAME`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul.data import corpora, tasks
from overhaul.data.encode import encode_images, encode_qa, encode_text
from overhaul.data.examples import Examples, join
from overhaul.data.sources import STARTER_DATA
from overhaul.fit import adamw, fit
from overhaul.objectives import cross_entropy

VOCABULARY = 2048
TEXT_LENGTH = 256
LABELS: dict[str, Any] = {"num_labels": 10}


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of 2,048 tokens in which every digit stands alone, wrapped for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def docs_llama(folder: Path, steps: int = 3000) -> None:
    """Train `docs-llama` into `folder`: 8 Llama blocks on prose, code, sums, brackets and the fictitious people."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    prose, code = corpora.docs("train"), corpora.code("train")
    people, sums, brackets = tasks.people("train"), tasks.addition("train"), tasks.brackets("train")
    qa = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in people * 4 + sums[:500] + brackets[:500]]
    tokenizer = train_tokenizer([r["text"] for r in prose] * 4 + [r["text"][:20_000] for r in code] + qa)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    data = {
        "prose": encode_text(prose, tokenizer, TEXT_LENGTH),
        "code": encode_text(code, tokenizer, TEXT_LENGTH),
        "people": encode_qa(people, tokenizer),
        "sums": join([encode_qa(sums, tokenizer), encode_qa(brackets[:1000], tokenizer)]),
    }
    text = join([*[data["prose"]] * 7, data["code"]])
    fit(
        model,
        [
            cross_entropy("text", 1.0, "text"),
            cross_entropy("people", 0.5, "people"),
            cross_entropy("sums", 1.0, "sums"),
        ],
        {"text": text, "people": data["people"], "sums": data["sums"]},
        steps=steps,
        batch_size={"text": 8, "people": 16, "sums": 40},
        lr=3e-3,
        warmup=100,
        schedule="cosine",
        floor=0.02,
        optimizer=adamw((0.9, 0.98), weight_decay=0.1),
        name="docs-llama",
    )
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(folder)


def digits_vit(folder: Path, steps: int = 1500) -> None:
    """Train `digits-vit` into `folder`: a ViT of 4 blocks on 2x2 patches of 8x8 digits."""
    torch.manual_seed(0)
    _train_on_digits(new_vit(), "digits", folder, steps, 1e-3)


def new_vit() -> nn.Module:
    """`digits-vit` before its training."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, **LABELS, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def digits_resnet(folder: Path, steps: int = 400) -> None:
    """Train `digits-resnet` into `folder`: a ResNet of two stages with three basic blocks each, on enlarged digits."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=24, hidden_sizes=[24, 48], depths=[3, 3], layer_type="basic", **LABELS,
        downsample_in_first_stage=False,
    )  # fmt: skip
    torch.manual_seed(0)
    _train_on_digits(ResNetForImageClassification(config), "digits-32", folder, steps, 2e-3)


def _train_on_digits(model: Any, data: str, folder: Path, steps: int, lr: float) -> None:
    learn_images(model, encode_images(STARTER_DATA[data]("train")), steps, lr, folder.name)
    model.to(torch.bfloat16).save_pretrained(folder)


def learn_images(model: nn.Module, images: Examples, steps: int, lr: float, name: str) -> None:
    """Train a classifier on images as they are."""
    fit(
        model,
        [cross_entropy("images")],
        {"images": images},
        steps=steps,
        batch_size=64,
        lr=lr,
        warmup=50,
        schedule="cosine",
        optimizer=adamw(weight_decay=0.05),
        name=name,
    )


BUILDS: dict[str, Callable[[Path], None]] = {
    "docs-llama": docs_llama,
    "digits-vit": digits_vit,
    "digits-resnet": digits_resnet,
}
