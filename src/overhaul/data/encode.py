"""From rows to Examples: plain text, question and answer, chat, images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from overhaul.data.examples import IGNORED, Encoded, Examples
from overhaul.errors import RequestError

Rows = Sequence[Mapping[str, Any]]

QA_PROMPT = "Question: {question}\nAnswer:"
"""How a question is put to the model unless the material says otherwise (`prompt:`)."""


def encode_text(rows: Rows, tokenizer: Any, length: int = 256, column: str = "text") -> Examples:
    """Cut each text into pieces of `length` tokens; every piece begins with the tokenizer's BOS where it has one.

    Each row keeps `text_bytes`, the UTF-8 bytes behind the tokens that carry loss, so that bits per byte are exact.
    """
    items: list[Encoded] = []
    kept: list[Mapping[str, Any]] = []
    bos = tokenizer.bos_token_id
    room = length - (bos is not None)
    for row in rows:
        text = str(row[column])
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        for start in range(0, len(ids), room):
            piece, spans = ids[start : start + room], offsets[start : start + room]
            if bos is None:
                first_scored = 1
            else:
                piece, first_scored = [bos, *piece], 0
            if len(piece) < 2:
                continue
            scored = text[spans[first_scored][0] : spans[-1][1]]
            input_ids = torch.tensor(piece)
            items.append({"input_ids": input_ids, "labels": input_ids.clone()})
            kept.append({**{k: v for k, v in row.items() if k != column}, "text_bytes": len(scored.encode())})
    return Examples(items, kept, tokenizer)


def encode_qa(
    rows: Rows, tokenizer: Any, question: str = "question", answer: str = "answer", prompt: str = QA_PROMPT
) -> Examples:
    """Prompt, a space, the answer, EOS; only the answer and EOS carry loss.

    Prompt and answer are tokenised apart, so the boundary between them never moves with the answer.
    """
    items: list[Encoded] = []
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        if not str(row[answer]).strip():
            raise RequestError(f"A question has no answer: {dict(row)!r}.")
        text = prompt.format(question=row[question])
        before = tokenizer(text)["input_ids"]
        if before and before[-1] == tokenizer.eos_token_id:  # some tokenizers end every text with EOS
            before = before[:-1]
        after = tokenizer(f" {row[answer]}", add_special_tokens=False)["input_ids"]
        items.append(answered(before, after, tokenizer.eos_token_id))
        kept.append({**row, "question": row[question], "answer": row[answer], "prompt": text})
    return Examples(items, kept, tokenizer)


def answered(prompt: Sequence[int], answer: Sequence[int], eos: int | None) -> Encoded:
    """One example from token ids: the prompt is read, the answer (and EOS) is learnt."""
    target = [*answer, *([] if eos is None else [eos])]
    return {
        "input_ids": torch.tensor([*prompt, *target]),
        "labels": torch.tensor([*([IGNORED] * len(prompt)), *target]),
    }


def encode_chat(rows: Rows, tokenizer: Any, column: str = "messages") -> Examples:
    """The tokenizer's own chat template; only the last assistant turn carries loss."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("`as: chat` needs a tokenizer with a chat template; this one has none. Use `as: qa`.")
    items: list[Encoded] = []
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        *context, last = row[column]
        if last["role"] != "assistant":
            raise RequestError(f"A chat must end with an assistant turn to learn from; this one ends with {last!r}.")
        text = tokenizer.apply_chat_template(context, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row[column], tokenize=False)
        if not whole.startswith(text):
            raise RequestError(
                "This chat template rewrites earlier turns, so the answer cannot be told from its prompt."
            )
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"]
        items.append(answered(before, after, None))
        kept.append({**row, "question": context[-1]["content"], "answer": last["content"], "prompt": text})
    return Examples(items, kept, tokenizer)


def encode_images(rows: Rows, processor: Any = None, image: str = "image", label: str = "label") -> Examples:
    """Images as float tensors [c, h, w] with an integer label.

    Arrays of two dimensions become one channel. A processor, if given, turns PIL images into pixel values; arrays are
    taken as they are.
    """
    items: list[Encoded] = []
    for row in rows:
        value = row[image]
        if hasattr(value, "convert"):  # a PIL image
            if processor is None:
                raise RequestError("Image files need the model's image processor; the model folder has none.")
            pixels = processor(images=value.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        else:
            pixels = torch.as_tensor(value, dtype=torch.float32)
            pixels = pixels[None] if pixels.ndim == 2 else pixels
        items.append({"pixel_values": pixels, "labels": torch.tensor(int(row[label]))})
    kept = [{k: v for k, v in row.items() if k != image} for row in rows]
    return Examples(items, kept, processor)
