"""A number at the end of a derivation.

As GSM8K (Cobbe et al., arXiv:2110.14168) is scored in Tülu 3's code and, flexibly, in lm-evaluation-harness: the last number
in the text is the answer. How it differs from them:
1. Numbers are compared by value: "42.0" and "$42" answer 42.
"""

from __future__ import annotations

import re
from decimal import Decimal

from overhaul.data.verifiers import Row, verifier

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@verifier("answer")
def gsm8k(row: Row, text: str) -> float:
    """The last number in the text is that of the row's `answer`: behind its "####", or its last one."""
    wanted, said = last_number(str(row["answer"]).rpartition("####")[2]), last_number(text)
    return float(wanted is not None and wanted == said)


def last_number(text: str) -> Decimal | None:
    """The value of the last number in a text, without thousands separators."""
    # "7-3" ends with 3: a sign belongs to a number only where no digit or letter stands before it
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    number, before = found[-1][0].replace(",", ""), text[: found[-1].start()]
    return Decimal(number.lstrip("+-") if before[-1:].isalnum() else number)
