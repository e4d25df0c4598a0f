"""Tiny random models of several families, and the seed that every test starts from."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, for module fixtures and started processes too: tiny products

import pytest
import torch
from torch import Tensor, nn

import learnt
from overhaul.data.encode import answered
from overhaul.data.examples import Examples, collate
from overhaul.judge import cost
from overhaul.objectives import cross_entropy_sum, evaluate, units
from overhaul.stack import LayerStack

torch.set_num_threads(1)

CPU_SECONDS = 5.0
REFERENCE = 0.06  # seconds that `_loop` takes where the limit was set; a slower machine has as much more time


def _loop() -> float:
    began = time.process_time()
    sum(n * n % 7 for n in range(1_000_000))
    return time.process_time() - began


def _allowed() -> float:
    return CPU_SECONDS * max(1.0, min(_loop() for _ in range(3)) / REFERENCE)


ALLOWED = _allowed()
"""What one test may take of a processor, unless it is marked `slow`, or `smoke` because it starts processes."""

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}


def tiny_llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {**TINY, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}
    options |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


def tiny_gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "n_positions": 128}
    options |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**options, **changes})).eval()


def tiny_vit(**changes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    options |= {k: v for k, v in TINY.items() if k != "vocab_size"} | {"intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**{**options, **changes})).eval()


def tiny_resnet(**changes: Any) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    options: dict[str, Any] = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3]}
    options |= {"layer_type": "basic", "num_labels": 10}
    return ResNetForImageClassification(ResNetConfig(**{**options, **changes})).eval()


ALTERNATING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 3, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
"""Blocks of two attention types, so that a type which stays at a position instead of following its block shows."""


def tiny_qwen3(**changes: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {**TINY, **ALTERNATING, "use_sliding_window": True}
    return Qwen3ForCausalLM(Qwen3Config(**{**options, **changes})).eval()


def tiny_gemma3(**changes: Any) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**{**TINY, **ALTERNATING, **changes})).eval()


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "vit": tiny_vit,
    "resnet": tiny_resnet,
}


def examples_for(family: str, count: int, seed: int = 0) -> Examples:
    """Random examples a tiny model of the family can read: answers of 1 to 5 tokens to prompts of 1 to 8, or images."""
    draw = torch.Generator().manual_seed(seed)
    if family in ("vit", "resnet"):
        pixels = torch.randn(count, 1, 8, 8, generator=draw)
        labels = torch.randint(10, (count,), generator=draw)
        return Examples([{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)], [{}] * count)
    items = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(1, most, (1,), generator=draw)) for most in (9, 6))
        tokens = torch.randint(3, 64, (prompt + answer,), generator=draw).tolist()
        items.append(answered(tokens[:prompt], tokens[prompt:], None))
    return Examples(items, [{}] * count)


def hidden_states(stack: LayerStack, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What enters and what leaves every block in one forward pass, by hooks and nothing of ours."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        seen.append((entering, output[0] if isinstance(output, tuple) else output))

    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in stack.blocks]
    evaluate(stack.model, lambda logits, _: logits, [dict(batch)])
    for hook in hooks:
        hook.remove()
    return seen


def mean_loss(model: nn.Module, examples: Examples) -> float:
    """Cross-entropy per answer token or image, in nats."""
    batch = collate(examples.items)
    (loss,) = evaluate(model, cross_entropy_sum, [batch])
    return float(loss) / units(batch)


CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;?!+-='\"()[]{}_"


def tiny_tokenizer() -> Any:
    """One token a lower-case character, 60 in all; <pad>, <s>, </s> are 0, 1, 2 as in `tiny_llama`; decodes exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS]
    whole: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    whole.normalizer = normalizers.Lowercase()
    whole.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    whole.decoder = decoders.Fuse()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=128, **marks)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny Llama in bfloat16, with a tokenizer."""
    from overhaul.models import save

    torch.manual_seed(0)
    return save(tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("model") / "tiny", dtype="bfloat16")


@pytest.fixture(scope="session", autouse=True)
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trained models are kept in a folder that all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    learnt.place = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run times its models; here the numbers of runs and of tokens are nobody's concern."""
    for name, value in {"FORWARDS": 1, "GENERATIONS": 1, "NEW_TOKENS": 2}.items():
        monkeypatch.setattr(cost, name, value)


def cpu_seconds() -> float:
    """Of this process and those that it has waited for; a busy machine does not add to it as it does to the clock."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    began = cpu_seconds()
    result = yield
    taken = cpu_seconds() - began
    marked = any(map(item.get_closest_marker, ("slow", "smoke")))
    # a processor that others share is slower at one time than at another
    if taken > ALLOWED and not marked and taken > (most := max(ALLOWED, 1.3 * _allowed())):
        pytest.fail(f"it took {taken:.1f} s of CPU time; {most:.1f} is the most here, or mark it `slow`", pytrace=False)
    return result


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
