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

    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "Llama": lambda depth: LlamaForCausalLM(LlamaConfig(**sized(depth), tie_word_embeddings=False)),
        "GPT-2": lambda depth: GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=depth, n_head=4, **ids)
        ),
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
    if family in ("Llama", "Qwen2", "Mistral"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(9)
        wrapped: Any = get_peft_model(build(LAYERS), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for key, one in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(one, std=0.02)
        wrapped.save_pretrained(folder / "float32" / "lora")


def configs(family: str) -> dict[str, Any]:
    """What is compared, by a name."""
    mlp = "mlp" if family != "GPT-2" else "mlp"
    two = [{"model": "A"}, {"model": "B"}, {"model": "C"}]

    def weighed(*weights: Any, **more: Any) -> list[Any]:
        return [
            {"model": "BC"[n], "parameters": {"weight": one, **{k: v[n] for k, v in more.items()}}}
            for n, one in enumerate(weights)
        ]

    def changes(method: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"merge_method": method, "base_model": "A", "models": weighed(0.7, 0.4, **more)}
        return {**made, "parameters": parameters} if parameters else made

    dense = {"density": [0.5, 0.3]}
    found: dict[str, Any] = {
        "linear": {"merge_method": "linear", "models": weighed(0.3, 0.9)},
        "linear, base_model": {"merge_method": "linear", "base_model": "A", "models": weighed(0.3, 0.9), "parameters": {"weight": 0.5}},
        "linear, normalize: false": {"merge_method": "linear", "models": weighed(0.3, 0.9), "parameters": {"normalize": False}},
        "linear, gradient and filter": {
            "merge_method": "linear",
            "models": weighed([0.1, 0.5, 0.9], [{"filter": mlp, "value": [1.0, 0.2]}, {"value": 0.7}]),
        },
        "slerp": {
            "merge_method": "slerp", "base_model": "A",
            "slices": [{"sources": [{"model": "A", "layer_range": [0, 4]}, {"model": "B", "layer_range": [0, 4]}]}],
            "parameters": {"t": [{"filter": "attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": mlp, "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]},
        },
        "slerp, models": {"merge_method": "slerp", "base_model": "A", "models": [{"model": "A"}, {"model": "D"[:0] + "B"}], "parameters": {"t": 0.4}},
        "nuslerp": {"merge_method": "nuslerp", "models": weighed(0.3, 0.9)},
        "nuslerp, base_model": {"merge_method": "nuslerp", "base_model": "A", "models": weighed(0.3, 0.9)},
        "task_arithmetic": changes("task_arithmetic", {"lambda": 0.8}),
        "task_arithmetic, normalize": changes("task_arithmetic", {"normalize": True}),
        "ties": changes("ties", {"int8_mask": True}, **dense),
        "ties, normalize: false, rescale": changes("ties", {"normalize": False, "rescale": True}, **dense),
        "ties, density by depth": changes("ties", {"density": [1, 0.7, 0.1]}),
        "dare_linear": changes("dare_linear", **dense),
        "dare_linear, rescale: false": changes("dare_linear", {"rescale": False, "normalize": True}, **dense),
        "dare_ties": changes("dare_ties", {"lambda": 1.2}, **dense),
        "della": changes("della", {"epsilon": 0.1}, **dense),
        "della_linear": changes("della_linear", **dense),
        "breadcrumbs": changes("breadcrumbs", {"gamma": 0.05}, **dense),
        "breadcrumbs_ties": changes("breadcrumbs_ties", **dense),
        "model_stock": {"merge_method": "model_stock", "base_model": "A", "models": two[1:]},
        "passthrough of slices": {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "A", "layer_range": [0, 3]}]},
                {"sources": [{"model": "D", "layer_range": [2, 6]}]},
                {"sources": [{"model": "B", "layer_range": [1, 2], "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"filter": "c_proj", "value": 0.0}, {"value": 1.0}]}}]},
            ],
        },
        "ties in a slice, then linear weights by slice": {
            "merge_method": "ties", "base_model": "A",
            "slices": [
                {"sources": [{"model": m, "layer_range": [0, 2], "parameters": {"weight": w, "density": 0.6}} for m, w in (("A", 0), ("B", 0.5))]},
                {"sources": [{"model": m, "layer_range": r} for m, r in (("A", [1, 4]), ("B", [1, 4]), ("D", [3, 6]))], "parameters": {"weight": [0.2, 0.8], "density": 0.5}},
            ],
        },
        "task_arithmetic, out_dtype": {**changes("task_arithmetic"), "dtype": "float32", "out_dtype": "bfloat16"},
        "tokenizer_source: base": {**changes("task_arithmetic"), "tokenizer_source": "base", "models": weighed(0.7, 0.4)[:1] + [{"model": "E", "parameters": {"weight": 0.4}}]},
        "tokenizer_source: union": {**changes("task_arithmetic"), "tokenizer_source": "union", "models": weighed(0.7, 0.4)[:1] + [{"model": "E", "parameters": {"weight": 0.4}}]},
        "tokenizer_source: a model": {**changes("task_arithmetic"), "tokenizer_source": "E", "models": [{"model": "E", "parameters": {"weight": 0.4}}]},
        "tokenizer with tokens": {
            **changes("linear"), "parameters": {"weight": 1.0},
            "models": [{"model": "A"}, {"model": "E"}],
            "tokenizer": {"source": "union", "tokens": {"w11": {"source": "E", "force": True}, "w1": {"source": {"kind": "zero"}}, "<pad>": {"source": {"kind": "model_token", "model": "A", "token": "<unk>"}, "force": True}, "new": {"source": {"kind": "model_token", "model": "E", "token_id": 7}}}},
        },
    }  # fmt: skip
    if family in ("Llama", "Qwen2", "Mistral"):
        found["passthrough of model+adapter"] = {"merge_method": "passthrough", "models": [{"model": "A+lora"}]}
        found["linear with model+adapter"] = {"merge_method": "linear", "models": [{"model": "A+lora", "parameters": {"weight": 0.4}}, {"model": "B", "parameters": {"weight": 0.6}}]}  # fmt: skip
    return found


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
        row: dict[str, Any] = {"family": family, "dtype": dtype, "config": path.stem}
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
            for name, config in configs(family).items():
                if dtype == "float32" or "adapter" not in name:
                    text = yaml.safe_dump(placed(config, place), sort_keys=False)
                    (place / "configs" / f"{name.replace(': ', '=').replace('/', '-')}.yml").write_text(text)
    if given.peer:
        subprocess.run([given.peer, __file__, str(given.folder), "--as-peer"], check=True)
    for row in rows(given.folder):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
