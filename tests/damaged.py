"""Checkpoint folders damaged by code: each entry is a name and what it does to a good folder."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights() -> Iterator[tuple[str, Damage]]:
    """Damaged safetensors."""

    def written(change: Callable[[bytes], bytes]) -> Damage:
        return lambda place: (place / WEIGHTS).write_bytes(change((place / WEIGHTS).read_bytes()))

    def headed(change: Callable[[dict[str, Any]], Any]) -> Damage:
        def edit(content: bytes) -> bytes:
            header, data = split(content)
            found = change(header)
            return joined(header if found is None else found, data)

        return written(edit)

    for share in (0.0, 0.0001, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999):
        yield f"cut at {share}", written(lambda c, share=share: c[: int(share * len(c))])
    for size in (1, 4, 7, 8, 9, 16):
        yield f"first {size} bytes", written(lambda c, size=size: c[:size])
    for more in (b"\0", b"x" * 100, b"{}" * 999):
        yield f"{len(more)} bytes more", written(lambda c, more=more: c + more)
    for length in (0, 1, 2**16, 2**31, 2**32 + 7, 2**62, 2**63, 2**64 - 1):
        yield f"a header of {length}", written(lambda c, length=length: struct.pack("<Q", length) + c[8:])
    for seed in range(20):
        yield f"a bit of the header {seed}", written(partial(_flipped, seed))
    first = "model.embed_tokens.weight"
    for key, values in {
        "dtype": ("F64", "I8", "F99", "", None, 7, "BF16 "),
        "shape": ([], [-64, -32], [64], [64, 32, 1], [1e9, 1e9], ["64", 32], None, [64.0, 32.0], [[64], 32], [True, 2048]),
        "data_offsets": ([0, 0], [0], [-1, 4095], [4096, 0], [0, 2**63], None, "ab", [0, 4095], [1, 4097], [0.0, 4096.0]),
    }.items():  # fmt: skip
        for value in values:
            yield f"{key} {value}", headed(lambda h, key=key, value=value: h[first].update({key: value}))
    for key in ("dtype", "shape", "data_offsets"):
        yield f"no {key}", headed(lambda h, key=key: h[first].pop(key) and None)
    one, other = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    yield "overlapping", headed(lambda h: h[one].update(data_offsets=h[other]["data_offsets"]))
    yield "a hole", headed(lambda h: h.pop("model.layers.1.mlp.up_proj.weight") and None)
    yield "a name less", headed(lambda h: h.pop("model.norm.weight") and None)
    yield "another name", headed(lambda h: h.update({"model.morn.weight": h.pop("model.norm.weight")}))
    yield "no names", headed(lambda h: {})
    yield "metadata alone", headed(lambda h: {"__metadata__": {"format": "pt"}})
    yield "metadata of numbers", headed(lambda h: h.update(__metadata__={"format": 7}))
    yield "no format", headed(lambda h: h.pop("__metadata__") and None)
    yield "a list", headed(lambda h: [h])
    yield "nested", headed(lambda h: b"[" * 100_000)
    yield "twice a name", written(_twice)
    yield "no text", headed(lambda h: b"\xff\xfe" * 40)
    yield "a pipe", lambda place: ((place / WEIGHTS).unlink(), os.mkfifo(place / WEIGHTS))
    yield "a folder", lambda place: ((place / WEIGHTS).unlink(), (place / WEIGHTS).mkdir())
    yield "a dead link", lambda place: ((place / WEIGHTS).unlink(), (place / WEIGHTS).symlink_to("nowhere"))


def _flipped(seed: int, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    draw, held = random.Random(seed), bytearray(content)
    held[draw.randrange(8, 8 + length)] ^= 1 << draw.randrange(8)
    return bytes(held)


def _twice(content: bytes) -> bytes:
    header, data = split(content)
    text = json.dumps(header)
    return joined(f'{text[:-1]}, "model.norm.weight": {json.dumps(header["model.norm.weight"])}}}'.encode(), data)


def configs() -> Iterator[tuple[str, Damage]]:
    """Damaged configs."""

    def written(text: bytes) -> Damage:
        return lambda place: (place / CONFIG).write_bytes(text)

    def said(**changes: Any) -> Damage:
        def edit(place: Path) -> None:
            content = json.loads((place / CONFIG).read_text()) | changes
            (place / CONFIG).write_text(json.dumps(content))

        return edit

    for text in (b"", b"{", b"[]", b"7", b"null", b"\xff\xfe\0", b"{}", b"{'a': 1}", b"[" * 100_000, b'{"a":' * 50_000):
        yield f"config {text[:8]!r} of {len(text)}", written(text)
    wrong: tuple[Any, ...] = ("wide", None, -1, 0, 2.5, [], {}, True)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
        for value in wrong:
            yield f"{field} {value!r}", said(**{field: value})
    for field in ("num_key_value_heads", "rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings"):
        for value in ("odd", -1, [1], {"x": {}}):
            yield f"{field} {value!r}", said(**{field: value})
    for value in ("LlamaForCausalLM", [], [7], [None], ["NoSuchModel"], ["BertModel"], ["LlamaConfig"], ["torch"], {}):
        yield f"architectures {value!r}", said(architectures=value)
    for value in ("none", 7, None, ["llama"], "bert"):
        yield f"model_type {value!r}", said(model_type=value)
    for value in ("float7", 7, ["bfloat16"], {}):
        yield f"dtype {value!r}", said(dtype=value)
    for number in (200_000, 10**12, 10**30):
        yield f"{number} layers", said(num_hidden_layers=number)
    yield "a huge vocabulary", said(vocab_size=10**15)
    yield "a huge width", said(hidden_size=2**40, head_dim=2**40)
    yield (
        "NaN",
        lambda place: (place / CONFIG).write_text(
            (place / CONFIG).read_text().replace('"hidden_size": 32', '"rms_norm_eps": NaN, "hidden_size": 32')
        ),
    )
    yield "tied otherwise", said(tie_word_embeddings="yes")
    for value in (
        "everything",
        {"conversions": 7},
        {"class": 7, "conversions": []},
        {"conversions": [{}]},
        "overhaul.x",
    ):
        yield f"overhaul {value!r}", said(overhaul=value)
    for value in ("map", ["a"], {"AutoModel": 7}, {"AutoModelForCausalLM": None}):
        yield f"auto_map {value!r}", said(auto_map=value, architectures=["Own"])
    for value in ("gptq", 7, [1], {"quant_method": ["x"]}, {"bits": 4}):
        yield f"quantization_config {value!r}", said(quantization_config=value)
    yield "a pipe as config", lambda place: ((place / CONFIG).unlink(), os.mkfifo(place / CONFIG))
    yield "a folder as config", lambda place: ((place / CONFIG).unlink(), (place / CONFIG).mkdir())


def tokenizers() -> Iterator[tuple[str, Damage]]:
    """Damaged tokenizers."""

    def said(file: str, **changes: Any) -> Damage:
        def edit(place: Path) -> None:
            content = json.loads((place / file).read_text()) | changes
            (place / file).write_text(json.dumps(content))

        return edit

    for file in (TOKENIZER, "tokenizer_config.json"):
        for text in (b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe\0", b"[" * 100_000):
            yield (
                f"{file} {text[:4]!r} of {len(text)}",
                lambda place, file=file, text=text: (place / file).write_bytes(text),
            )
        yield f"half of {file}", lambda place, file=file: (place / file).write_bytes((place / file).read_bytes()[:200])
        yield f"{file} a pipe", lambda place, file=file: ((place / file).unlink(), os.mkfifo(place / file))
    for value in (
        None,
        {},
        {"type": "Nothing"},
        {"type": "BPE", "vocab": 7, "merges": []},
        {"type": "WordLevel", "vocab": []},
    ):
        yield f"model {value!r}", said(TOKENIZER, model=value)
    for value in (7, [7], [{"id": "x", "content": 3}], [{"id": 2**40, "content": "x"}]):
        yield f"added {value!r}", said(TOKENIZER, added_tokens=value)
    for value in ("NoSuchTokenizer", 7, ["x"]):
        yield f"class {value!r}", said("tokenizer_config.json", tokenizer_class=value)
    for value in (7, ["</s>"], {"content": 7}, "unheard of"):
        yield f"eos {value!r}", said("tokenizer_config.json", eos_token=value)
