"""A folder's tokenizer or image processor, and how many words it has."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

from overhaul.checkpoints import Checkpoint, read_json
from overhaul.errors import OverhaulError, RequestError

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.txt", "vocab.json"),
)
"""Files of which any one is a tokenizer, fast or slow."""


def count_tokens(known: Checkpoint) -> int | None:
    """How many tokens the folder's tokenizer has, told from its file where that can be; None without a tokenizer.

    Raises:
        RequestError: it cannot be read, or it has more tokens than the model has rows for.
    """
    path = known.folder / "tokenizer.json"
    if not any((known.folder / name).exists() for name in TOKENIZERS):
        return count_tokens(known.base) if known.base else None
    options = known.folder / "tokenizer_config.json"
    if not path.exists() or (options.exists() and "auto_map" in read_json(options)):
        return len(load_processor(known))
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise RequestError(f"{path} is no tokenizer that can be read: {error}.") from None
    words = tokenizer.get_vocab(with_added_tokens=True)
    _check_vocabulary(known, words, tokenizer.get_added_tokens_decoder())
    return len(words)


def _check_vocabulary(known: Checkpoint, words: Mapping[str, int], added: Container[int]) -> None:
    """Whether the model has a row for every token of the tokenizer's own.

    More rows than tokens are what padding to a round number leaves. Tokens that were added behind the rows (a `[PAD]`) are
    let be: the model stays as it is, and a text that holds one is refused when it is encoded.
    """
    config = known.config
    text = config.get("text_config")
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    if not isinstance(rows, int):
        return
    beyond = sorted((number, word) for word, number in words.items() if number >= rows and number not in added)
    if beyond:
        number, word = beyond[0]
        raise RequestError(
            f"{known.source}: the tokenizer has {len(words)} tokens but the model only {rows} (vocab_size): {word!r} is "
            f"number {number}, for which there is no row. They do not belong together."
        )


def load_processor(known: Checkpoint) -> Any:
    """The folder's tokenizer, else its image processor, else what an adapter's base has, else None.

    Raises:
        RequestError: it cannot be read, or its code comes with the folder and is not trusted.
    """
    with quiet_transformers():
        if any((known.folder / name).exists() for name in TOKENIZERS):
            from transformers import AutoTokenizer

            with _in_words(known, "tokenizer", "tokenizer_config.json"):
                tokenizer = AutoTokenizer.from_pretrained(known.folder, trust_remote_code=known.trusted)
            _check_vocabulary(known, tokenizer.get_vocab(), tokenizer.added_tokens_decoder)
            return tokenizer
        if (known.folder / "preprocessor_config.json").exists():
            from transformers import AutoImageProcessor

            with _in_words(known, "image processor", "preprocessor_config.json"):
                return AutoImageProcessor.from_pretrained(known.folder, trust_remote_code=known.trusted)
    return load_processor(known.base) if known.base else None


@contextlib.contextmanager
def _in_words(known: Checkpoint, what: str, file: str) -> Iterator[None]:
    """What the library raises at a damaged file, or at code that is not trusted, as one sentence."""
    try:
        yield
    except OverhaulError:
        raise
    except Exception as error:  # the library raises whatever it comes across in the files
        said = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in said and not known.trusted:
            raise RequestError(
                f"{known.source}: the {what} is Python code of the folder (`auto_map` in {file} or config.json), "
                "which was not run. If you have read that code and trust it, say `trust_remote_code: true`."
            ) from None
        raise RequestError(
            f"{known.folder}: the {what} cannot be read: {type(error).__name__}: {said[:400].rstrip('.')}. Fetch or save "
            "its files again."
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide loading bars: a run shows its own progress."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
