"""The knob of merges of models whose tokenizers differ, documented once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from overhaul.models import Checkpoint
from overhaul.weights import one_vocabulary


@dataclass(frozen=True)
class Words:
    """Which words the merged model knows.

    Attributes:
        tokenizer: "same", where all have one tokenizer: others are refused. "base", its words, each with the row that a
            model has for it, whatever its number there; what only others know is lost. "union", also the words that only
            others know, with new numbers; a model that lacks a word has the base's row for it, or the mean of the others'.
    """

    tokenizer: Literal["same", "base", "union"] = "same"

    def read(self, base: Checkpoint, tuned: Sequence[Checkpoint]) -> tuple[Checkpoint, list[Checkpoint]]:
        """The models as they are to be merged.

        Raises:
            RequestError: the words of one are not known.
        """
        if self.tokenizer == "same":
            return base, list(tuned)
        base, *others = one_vocabulary([base, *tuned], self.tokenizer == "union")
        return base, others
