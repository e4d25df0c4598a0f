"""Overhaul's `merge CONFIG.yml` against mergekit itself, tensor by tensor, on tiny random models of several families.

    python benchmarks/against_mergekit.py FOLDER --peer /path/to/venv/bin/python

The peer's environment has mergekit (0.1.5 for the table in docs/merging.md) and is a process of its own: nothing of it is
imported here. What `dare_*` and `della*` draw is replaced by one mask on both sides, since their generators differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

LAYERS = 4
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
ADAPTED = ("Llama", "Qwen2", "Mistral")
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def networks() -> dict[str, Any]:
    """A tiny model of each family, by (depth)."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    def sized(depth: int) -> dict[str, Any]:
        return {**SIZES, **HEADS, "num_hidden_layers": depth, "bos_token_id": 1, "eos_token_id": 2}

    gpt2: dict[str, Any] = {"vocab_size": 96, "n_positions": 64, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "Llama": lambda depth: LlamaForCausalLM(LlamaConfig(**sized(depth), tie_word_embeddings=False)),
        "GPT-2": lambda depth: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=depth, **gpt2)),
        "Qwen2": lambda depth: Qwen2ForCausalLM(Qwen2Config(**sized(depth), tie_word_embeddings=True)),
        "Gemma2": lambda depth: Gemma2ForCausalLM(Gemma2Config(**sized(depth), head_dim=8)),
        "Mistral": lambda depth: MistralForCausalLM(MistralConfig(**sized(depth), sliding_window=None)),
    }


def words(count: int, shift: int = 0) -> Any:
    """A tokenizer of `count` words, of which another one with another shift shares most under other numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    named = [*marks, *(f"w{n + shift}" for n in range(count - len(marks)))]
    if shift:
        named[4:] = named[4:][::-1]
    whole: Any = Tokenizer(models.WordLevel({word: n for n, word in enumerate(named)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marked = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **marked)


def make(folder: Path, family: str) -> None:
    """A: base; B, C: tuned from it; D: deeper; E: B with another tokenizer; all in both dtypes; lora: an adapter."""
    build = networks()[family]
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        base = build(LAYERS)
        for number, name in enumerate("ABCDE"):
            torch.manual_seed(number)
            model = build(LAYERS + 2) if name == "D" else build(LAYERS)
            held = base.state_dict()
            with torch.no_grad():
                for key, one in model.state_dict().items():
                    if key in held and one.is_floating_point():
                        one.copy_(held[key] + (0.01 * torch.randn_like(one) if name != "A" else 0))
                    elif one.is_floating_point():
                        one.add_(0.01 * torch.randn_like(one))
            model.to(getattr(torch, dtype)).save_pretrained(folder / dtype / name)
            words(96, 10 if name == "E" else 0).save_pretrained(folder / dtype / name)
    if family in ADAPTED:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(9)
        wrapped: Any = get_peft_model(build(LAYERS), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for key, one in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(one, std=0.02)
        wrapped.save_pretrained(folder / "float32" / "lora")


def configs() -> dict[str, Any]:
    """What is compared, by a name."""
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))


def placed(value: Any, folder: Path) -> Any:
    """A configuration with the models' letters replaced by their folders."""
    if isinstance(value, dict):
        return {key: placed(one, folder) for key, one in value.items()}
    if isinstance(value, list):
        return [placed(one, folder) for one in value]
    if isinstance(value, str) and value in {*"ABCDE", "A+lora"}:
        return "+".join(str(folder / one) for one in value.split("+"))
    return value


def same_draws(start: int, count: int) -> Tensor:
    """Numbers in [0, 1) that belong to places of a tensor, for both sides."""
    places = torch.arange(start, start + count, dtype=torch.int64)
    return ((places * 2654435761 + 12345) % 2**24).double() / 2**24


def peer(folder: Path) -> None:
    """In the peer's environment: carry out every configuration with mergekit."""
    from mergekit.config import MergeConfiguration  # pyright: ignore
    from mergekit.merge import run_merge  # pyright: ignore
    from mergekit.options import MergeOptions  # pyright: ignore

    def drawn(p: Tensor, *_: Any, **__: Any) -> Tensor:
        return (same_draws(0, p.numel()).view(p.shape) < p.double()).to(p.dtype)

    torch.bernoulli = drawn
    for path in sorted(folder.glob("*/*/configs/*.yml")):
        out = path.parents[1] / "theirs" / path.stem
        if not out.exists():
            options = MergeOptions(quiet=True, lora_merge_cache=str(path.parents[1] / "cache"), device="cpu")
            try:
                run_merge(MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(out), options)
            except Exception as error:
                print(path, f"{type(error).__name__}: {error}", file=sys.stderr)


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def by_word(folder: Path, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of words in the order of the words, so that unions that number them differently can be compared."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(folder).get_vocab()
    order = torch.tensor([known[word] for word in sorted(known)])
    return {k: v[order] if k.split(".")[-2] in ("embed_tokens", "lm_head", "wte") else v for k, v in held.items()}


def compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """How many tensors are the same bit for bit, and how far apart the others are."""
    a, b = tensors(ours), tensors(theirs)
    if "okenizer" in ours.name:
        a, b = by_word(ours, a), by_word(theirs, b)
    if a.keys() != b.keys():
        return {"error": f"names: {sorted(a.keys() ^ b.keys())[:3]}"}
    odd = [name for name in a if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype]
    if odd:
        return {"error": f"{odd[0]}: {a[odd[0]].shape} {a[odd[0]].dtype}, {b[odd[0]].shape} {b[odd[0]].dtype}"}
    same = sum(torch.equal(a[name], b[name]) for name in a)
    apart = {name: (a[name].double() - b[name].double()).abs() for name in a}
    worst = max(apart, key=lambda name: float(apart[name].max()))
    configs = [json.loads((one / "config.json").read_text()) for one in (ours, theirs)]
    differing = [k for k in configs[0].keys() | configs[1].keys() if configs[0].get(k) != configs[1].get(k)]
    return {
        "same": same, "of": len(a), "largest": float(apart[worst].max()), "where": worst,
        "entries": sum(int((one > 0).sum()) for one in apart.values()) / sum(one.numel() for one in apart.values()),
        "config": [k for k in differing if k not in ("transformers_version", "_name_or_path")],
    }  # fmt: skip


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Carry out every configuration here, and compare."""
    from overhaul.errors import OverhaulError
    from overhaul.mergekit import formulas, merge_config

    def drawn(_: int, __: int, tensor: Any, like: Tensor) -> Tensor:
        return same_draws(tensor.start, like.numel()).view(like.shape)

    formulas.uniform = drawn
    for path in sorted(folder.glob("*/*/configs/*.yml")):
        family, dtype = path.parents[2].name, path.parents[1].name
        ours, theirs = (path.parents[1] / side / path.stem for side in ("ours", "theirs"))
        row: dict[str, Any] = {"family": family, "dtype": dtype, "file": path.stem}
        if not (theirs / "config.json").exists():
            yield {**row, "error": "mergekit made nothing"}
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merge_config(path, ours)
            yield {**row, **compared(ours, theirs)}
        except OverhaulError as error:
            yield {**row, "error": str(error)}


def main() -> None:
    """Build, run both sides, print a line for each comparison."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("folder", type=Path)
    asked.add_argument("--peer", help="a Python that has mergekit")
    asked.add_argument("--as-peer", action="store_true")
    given = asked.parse_args()
    if given.as_peer:
        peer(given.folder)
        return
    for family in networks():
        if not (given.folder / family).exists():
            make(given.folder / family, family)
        for dtype in ("float32", "bfloat16"):
            place = given.folder / family / dtype
            (place / "configs").mkdir(exist_ok=True)
            for name, config in configs().items():
                if "adapter" not in name or (dtype == "float32" and family in ADAPTED):
                    text = yaml.safe_dump(placed(config, place), sort_keys=False)
                    (place / "configs" / f"{name.replace(': ', '=').replace('/', '-')}.yml").write_text(text)
    if given.peer:
        subprocess.run([given.peer, __file__, str(given.folder), "--as-peer"], check=True)
    for row in rows(given.folder):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
