"""Large files: what comes out is what small ones give, and nothing is held."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from overhaul import models
from overhaul.data import arrow, encode, lazy, materials
from overhaul.data.encode import encode_text
from overhaul.data.examples import Encoded, Examples, collate, join
from overhaul.data.lazy import TextFile, View
from overhaul.data.materials import examples
from overhaul.errors import RequestError
from overhaul.fit import fit
from overhaul.objectives import cross_entropy

WORDS = "the heron und ère naïve Größe 橋 🦦 otter_42 x=3.14; \t\n  \n\n def  f(a):\n        return  a\n".split(" ")


def prose(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def same(ours: Examples, theirs: Examples) -> bool:
    """Whether two hold equal tensors and rows."""

    def equal(a: Encoded, b: Encoded) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    alike = len(ours) == len(theirs) and list(ours.rows) == list(theirs.rows)
    return alike and all(map(equal, ours.items, theirs.items))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, and files that count as large from 100 bytes on."""
    monkeypatch.setattr(lazy, "LARGE", 100)
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def bpe() -> Any:
    return models.load_processor(models.facts("starter:docs-llama"))


def with_metaspace() -> Any:
    """A tokenizer as Llama 2's: spaces become part of words, and a text begins with one that it does not have."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces: Any = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Fuse()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    pieces.train_from_iterator([prose(300, seed) for seed in range(5)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "characters", "metaspace"])
@pytest.mark.parametrize(("window", "overlap"), [(1000, 400), (700, 300), (2000, 500)])
def test_windows_give_the_tokens_of_the_whole(
    kind: str, window: int, overlap: int, bpe: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"bytes": bpe, "characters": tokenizer}.get(kind) or with_metaspace()
    rows = [{"text": prose(1500, seed), "n": seed} for seed in range(2)]
    whole = encode_text(rows, chosen, 32)
    monkeypatch.setattr(encode, "WINDOW", window)
    monkeypatch.setattr(encode, "OVERLAP", overlap)
    assert same(encode_text(rows, chosen, 32), whole)


def test_windows_that_never_agree_are_read_as_one(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": prose(1500)}]
    whole = encode_text(rows, bpe, 32)
    monkeypatch.setattr(encode, "WINDOW", 1000)
    monkeypatch.setattr(encode, "OVERLAP", 20)  # shorter than the run on which windows must agree
    assert same(encode_text(rows, bpe, 32), whole)


def test_many_texts_at_once_are_encoded_as_one_by_one(bpe: Any) -> None:
    rows = [{"text": prose(n, n), "n": n} for n in [3, 0, 200, 50, 1]]
    assert same(encode_text(rows, bpe, 32), join([encode_text([row], bpe, 32) for row in rows]))


def test_a_large_text_file_is_read_in_stretches(small: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(2000) + "\r\nend"
    (small / "a.txt").write_text(text, newline="")
    monkeypatch.setattr(encode, "WINDOW", 1000)
    monkeypatch.setattr(encode, "OVERLAP", 300)
    held = encode_text([{"title": "a.txt", "text": (small / "a.txt").read_text()}], tokenizer, 32)
    monkeypatch.setattr(TextFile, "__str__", lambda _: pytest.fail("the whole text was read"))
    read = examples("a.txt", tokenizer, base=small, length=32)
    assert isinstance(read.items, View) and same(read, held)
    assert sum(row["text_bytes"] for row in read.rows) == len(text.replace("\r\n", "\n").encode())


@pytest.mark.parametrize("form", ["qa", "preference", "prompt"])
def test_large_jsonl_gives_what_small_jsonl_gives(form: str, small: Path, tokenizer: Any) -> None:
    rows = [
        {"question": f"what is {n}?", "answer": f"it is {n}", "n": n, "more": {"a": [n, None, 0.1]}}
        for n in range(2500)
    ]
    columns = {"preference": {"chosen": "answer", "rejected": "question"}, "prompt": {}}
    named = {"prompt": "question", **columns[form]} if form != "qa" else {}
    options: dict[str, Any] = {"form": form, "columns": named, "unless": {"n": [0, 2]}}
    if form == "prompt":
        options["verify"] = "exact"  # which reads the answers
    (small / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    read = examples("a.jsonl", tokenizer, base=small, **options)
    held = examples(rows, tokenizer, **options)
    assert isinstance(read.items, View) and isinstance(read.rows, View) and same(read, held)
    assert read.by_length() == held.by_length() and read.kind == held.kind
    assert same(read[5:50:3], held[5:50:3]) and same(read.shuffled(3), held.shuffled(3))
    assert same(read.filter(lambda row: row["n"] % 7 == 0), held.filter(lambda row: row["n"] % 7 == 0))
    column = torch.arange(len(held)).float()
    assert same(read.with_column("x", column).shuffled(1), held.with_column("x", column).shuffled(1))
    assert same(join([read[:3], held[:2], read[7:9]]), join([held[:3], held[:2], held[7:9]]))
    assert join([read[:3], held[:2]]).by_length() == join([held[:3], held[:2]]).by_length()


def test_the_digest_follows_file_options_and_places(small: Path, tokenizer: Any, bpe: Any) -> None:
    rows = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(50)]
    (small / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (small / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (small / "c.jsonl").write_text("\n".join(map(json.dumps, [*rows[:-1], rows[0]])))

    def digest(name: str, processor: Any = tokenizer, **options: Any) -> str:
        return examples(name, processor, base=small, **options).digest()

    first = examples("a.jsonl", tokenizer, base=small)
    assert first.digest() == digest("a.jsonl") == digest("b.jsonl")
    others = [
        digest("c.jsonl"), digest("a.jsonl", bpe), digest("a.jsonl", prompt="{question}"), digest("a.jsonl", limit=49),
        digest("a.jsonl", verify="exact"), first[1:].digest(), first.shuffled(0).digest(), first.shuffled(1).digest(),
        first.with_column("x", torch.zeros(50)).digest(), first.with_column("x", torch.ones(50)).digest(),
        first.with_column("y", torch.zeros(50)).digest(), join([first, first]).digest(),
    ]  # fmt: skip
    assert len({first.digest(), *others}) == len(others) + 1


def test_what_was_encoded_is_not_encoded_again(small: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "a.txt").write_text(prose(500))
    first = examples("a.txt", tokenizer, base=small)
    monkeypatch.setattr(materials, "store", lambda *_: pytest.fail("encoded again"))
    assert same(examples("a.txt", tokenizer, base=small), first)


def test_a_stream_that_was_cut_off_does_not_count(small: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "a.jsonl").write_text("\n".join(json.dumps({"question": "a?", "answer": str(n)}) for n in range(2000)))
    made = arrow._record_batch
    written: list[Any] = []

    def fails_at_last(pa: Any, part: Examples) -> Any:
        if written:
            raise RequestError("cut off")
        written.append(part)
        return made(pa, part)

    monkeypatch.setattr(arrow, "_record_batch", fails_at_last)
    with pytest.raises(RequestError, match="cut off"):
        examples("a.jsonl", tokenizer, base=small)
    assert written and not list((small / "cache" / "encoded").iterdir())


def test_datasets_opens_the_stream(small: Path, tokenizer: Any) -> None:
    from datasets import Dataset

    (small / "a.txt").write_text(prose(500))
    read = examples("a.txt", tokenizer, base=small, length=32)
    (path,) = lazy.cache_folder().iterdir()
    opened = Dataset.from_file(str(path))
    assert [row["input_ids"] for row in opened] == [item["input_ids"].tolist() for item in read]  # pyright: ignore[reportArgumentType,reportCallIssue]


def test_errors_name_the_line_of_a_large_file(small: Path) -> None:
    lines = [json.dumps({"question": "a?", "answer": "b"})] * 20
    (small / "a.jsonl").write_text("\n".join([*lines, "{", *lines]))
    with pytest.raises(RequestError, match="line 21: not JSON"):
        examples("a.jsonl", None, base=small)


def test_training_on_a_large_file_is_training_on_its_rows(small: Path, tokenizer: Any) -> None:
    text = "the otter sat by the bridge and looked at the heron. " * 30
    (small / "a.txt").write_text(text)
    weights = []
    for data in (examples("a.txt", tokenizer, base=small, length=32), encode_text([{"text": text}], tokenizer, 32)):
        torch.manual_seed(0)
        model = tiny_llama(num_hidden_layers=1)
        fit(model, [cross_entropy("text")], {"text": data}, steps=3, batch_size=4, lr=1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_memory_does_not_grow_with_the_file(small: Path, tokenizer: Any) -> None:
    def peak(rows: int) -> int:
        line = json.dumps({"question": "what is the name of the heron by the bridge?", "answer": "it has none", "n": 1})
        (small / f"{rows}.jsonl").write_text((line + "\n") * rows)
        tracemalloc.start()
        read = examples(f"{rows}.jsonl", tokenizer, base=small)
        collate(read.items[:4])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(2_000), peak(8_000)
    assert many - few < 100 * 6_000  # what is held per row: the places of its line and its tokens, not the row
