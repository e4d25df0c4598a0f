"""A folder's tokenizer or image processor, and how many words it has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from overhaul.checkpoints import Checkpoint
from overhaul.errors import RequestError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def count_tokens(known: Checkpoint) -> int | None:
    """How many tokens the folder's tokenizer has, told from its file where that can be; None without a tokenizer.

    Raises:
        RequestError: more than the model has rows for.
    """
    if not any((known.folder / name).exists() for name in TOKENIZERS):
        return count_tokens(known.base) if known.base else None
    if (known.folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        try:
            count = Tokenizer.from_file(str(known.folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
        except Exception as error:  # the library raises nothing more special
            raise RequestError(
                f"{known.folder / 'tokenizer.json'} is no tokenizer that can be read: {error}."
            ) from None
    else:
        count = len(load_processor(known))
    _check_vocabulary(known, count)
    return count


def _check_vocabulary(known: Checkpoint, tokens: int) -> None:
    rows = known.config.get("vocab_size")
    if rows is not None and tokens > rows:
        raise RequestError(
            f"{known.source}: the tokenizer has {tokens} tokens but the model only {rows} (vocab_size). "
            "They do not belong together, or tokens were added without resizing the embeddings."
        )


def load_processor(known: Checkpoint) -> Any:
    """The folder's tokenizer, else its image processor, else what an adapter's base has, else None."""
    with quiet_transformers():
        if any((known.folder / name).exists() for name in TOKENIZERS):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(known.folder)
            _check_vocabulary(known, len(tokenizer))
            return tokenizer
        if (known.folder / "preprocessor_config.json").exists():
            from transformers import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(known.folder)
    return load_processor(known.base) if known.base else None


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
