"""The words of what a mergekit file makes: `tokenizer_source`, `tokenizer` and `chat_template`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils import chat_template_utils

from overhaul.errors import RequestError
from overhaul.mergekit.document import Document, Tokenizer, TokenRule
from overhaul.models import Checkpoint, facts, load_processor
from overhaul.weights import one_vocabulary
from overhaul.weights.vocabularies import Reworded, Rule, Vocabulary, words_of


def with_words(document: Document, known: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models with the vocabulary that the file asks for; as they are where it asks for none.

    Raises:
        RequestError: a tokenizer is not there, a rule names what is not there, or rows would have to be made up.
    """
    file = document.file
    asked = file.tokenizer or (Tokenizer(source=file.tokenizer_source) if file.tokenizer_source else None)
    if asked is None:
        return dict(known)
    rules = {word: _rule(document, known, word, rule) for word, rule in (asked.tokens or {}).items()}
    of = None if asked.source in ("union", "base") else known.get(asked.source) or facts(document.place(asked.source))
    made = one_vocabulary(
        list(known.values()),
        Vocabulary(asked.source == "union", of, cut=True, prefer_first=file.base_model is not None, rules=rules),
    )
    first = made[0]
    assert isinstance(first, Reworded)
    if asked.pad_to_multiple_of and first.rows % asked.pad_to_multiple_of:
        raise RequestError(
            f"{document.called}, tokenizer.pad_to_multiple_of: the words take {first.rows} rows, and rows "
            "of no word are not made up here. Leave it out, and pad the result if you have to: "
            f"model.resize_token_embeddings(pad_to_multiple_of={asked.pad_to_multiple_of})."
        )
    return dict(zip(known, made, strict=True))


def _rule(document: Document, known: Mapping[str, Checkpoint], word: str, rule: TokenRule) -> Rule:
    where = f"{document.called}, tokenizer.tokens.{word}"
    source = {"kind": "model", "model": rule.source} if isinstance(rule.source, str) else rule.source or {}
    if source == {"kind": "zero"}:
        return Rule(None, force=rule.force)
    known_keys = {"kind", "model", "token", "token_id"}
    if source.get("kind") not in ("model", "model_token") or set(source) - known_keys:
        raise RequestError(
            f"{where}: source is a model, {{kind: zero}}, or {{kind: model_token, model: ..., token: ...}} (or token_id)."
        )
    name = str(source.get("model"))
    if name not in known:
        raise RequestError(f"{where}: {name!r} is not among the models of the file: {', '.join(known)}.")
    token = source.get("token", word)
    if not isinstance(token, str):
        raise RequestError(
            f"{where}: token: {token!r} is no word. Write a text in quotes, or `token_id:` and its number."
        )
    held = words_of(known[name])
    row = source.get("token_id", held.get(token))
    if type(row) is not int or not 0 <= row < known[name].config.get("vocab_size", row + 1):
        raise RequestError(f"{where}: {name} has no word {source.get('token_id', token)!r}.")
    return Rule(list(known).index(name), row, rule.force)


def chat_template(document: Document, known: Mapping[str, Checkpoint]) -> str | None:
    """The template that the file asks for: Jinja text, or what most of its models have.

    Raises:
        RequestError: it is the name of one, or no template.
    """
    asked = document.file.chat_template
    if asked is None:
        return None
    if asked == "auto":
        found = Counter(one.strip() for known_one in known.values() if (one := _template_of(known_one)))
        return found.most_common(1)[0][0] if found else None
    if "{" not in asked or len(asked) < 20:
        raise RequestError(
            f"{document.called}, chat_template: {asked!r} is no template. Write auto, or the template "
            "itself (Jinja); templates by name are not kept here."
        )
    try:
        chat_template_utils._compile_jinja_template(asked)  # pyright: ignore[reportPrivateUsage]
    except TemplateError as error:
        at = f", line {error.lineno} of it" if isinstance(error, TemplateSyntaxError) else ""
        raise RequestError(
            f"{document.called}, chat_template: it is not valid Jinja{at}: {error.message}. Correct it; `auto` takes "
            "that of most models."
        ) from None
    return asked


def _template_of(known: Checkpoint) -> str | None:
    template = getattr(load_processor(known), "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def write_words(folder: Path, first: Checkpoint, template: str | None) -> None:
    """Put tokenizer and template into a new folder, where they are not the first model's."""
    if isinstance(first, Reworded):
        first.write_words(folder)
    if template is not None:
        tokenizer: Any = first.tokenizer if isinstance(first, Reworded) else None
        tokenizer = tokenizer or load_processor(first)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
