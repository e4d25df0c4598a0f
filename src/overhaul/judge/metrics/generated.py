"""What a model says: read from one greedy generation.

How they differ from the released code of MUSE:
1. `verbatim_memorisation` reads 32 tokens and continues by 32; MUSE continues by 128.
2. `knowledge_memorisation` generates a few tokens more than the longest expected answer, and its examples, if it is to
   have any, stand in the material's `prompt:`; MUSE generates 32 tokens after prompts of its own.
"""

from __future__ import annotations

import re
from typing import Annotated

from annotated_types import Ge

from overhaul.data.examples import LABEL_SET
from overhaul.data.verifiers import check_rows, verify
from overhaul.judge.evidence import Evidence
from overhaul.judge.generation import repeated_share, rouge_l, rouge_l_f1
from overhaul.judge.metrics import Value, mean, metric

NEXT_QUESTION = re.compile(r"\n\s*\n|\nQuestion|Question:")
"""Where a model that does not stop goes on by itself: what follows is no part of its answer (MUSE, Open-Unlearning)."""


@metric("accuracy", "right answers", unit="share", reads=("answers", "images", "prompts"))
def accuracy(role: Evidence) -> Value:
    """Share of greedy answers that the task's verifier accepts, or of images whose label is the most probable one.

    Where a row lists several labels, any of them will do.
    """
    if role.kind == "images":
        several = any(LABEL_SET in item for item in role.examples.items)
        return mean(
            [float(rank == 0) for rank in role.ranks] if several else [float(one.hits[0]) for one in role.scored]
        )
    return mean(list(map(float, right_answers(role).values())))


def right_answers(role: Evidence) -> dict[int, bool]:
    """Whether the verifier accepts the greedy answer, by the place of the example, for as many as are generated."""
    check_rows(role.examples.rows)
    return {one.place: verify(role.examples.rows[one.place], one.text) for one in role.answered}


@metric("top-k accuracy", "right class among the k most probable", unit="share", reads=("images",))
def top_k_accuracy(role: Evidence, *, k: Annotated[int, Ge(1)] = 5) -> Value:
    """Share of images, or texts with a class, of which a right class is among the k that the model finds most probable."""
    return mean([float(rank < k) for rank in role.ranks])


@metric("ROUGE-L recall", "words of the right answer that are said, in order", unit="share", reads=("answers", "text"))
def rouge(role: Evidence) -> Value:
    """Mean ROUGE-L recall of greedy answers, or of 32-token continuations of text."""
    return mean([rouge_l(one.expected, one.text) for one in role.answered])


@metric("VerbMem (ROUGE-L F1)", "text that is continued word by word", unit="share", reads=("text",))
def verbatim_memorisation(role: Evidence) -> Value:
    """Mean ROUGE-L F1 of 32-token continuations of text (MUSE)."""
    return mean([rouge_l_f1(one.expected, one.text) for one in role.answered])


@metric("KnowMem (ROUGE-L F1)", "what is known on being asked", unit="share", reads=("answers",))
def knowledge_memorisation(role: Evidence) -> Value:
    """Mean ROUGE-L F1 of greedy answers, each cut at a blank line, "Question" on a new line or "Question:" (MUSE)."""
    return mean([rouge_l_f1(one.expected, NEXT_QUESTION.split(one.text)[0]) for one in role.answered])


@metric("Rep-2", "token pairs that the answer repeats", unit="share", better="down", reads=("answers", "text"))
def repetition(role: Evidence) -> Value:
    """Mean Rep-2 of what is generated: the share of token pairs that occurred before in the same answer."""
    return mean([repeated_share(one.tokens, 2) for one in role.answered])
