"""Chats as their template writes them, and where in what it writes the last answer stands.

1. The answer is found by difference: the chat is written again with a mark in place of it. What is common before is read,
   what is common behind (the end of a turn, a newline) is learnt, and is no part of the answer. So a template may rewrite
   earlier turns, strip their thoughts, or write an empty thought before an answer. The tag before a thought that is given is
   learnt with it, unless the template begins an answer with it in use too.
2. Where a template marks what the assistant says (`{% generation %}`), loss falls on that and on nothing else.
3. A template that leaves out a turn, or refuses the chat, is an error with the template's own reason.
4. A last turn that is not to be learnt (`weight: 0`, as OpenAI writes it, or `train: false`) is refused; turns before it
   carry no loss anyway.
5. Contents in parts become their text; a template that reads parts alone is given one. Arguments of tool calls that are
   JSON text become what they say, as templates expect.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from overhaul.data.boundary import Span
from overhaul.errors import MaterialWarning, RequestError, RowError

Turn = dict[str, Any]

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template says what is the assistant's."""

MARK = "ZqxxqZ"
"""What stands in place of a turn to see where the template writes it; `_mark` makes one that no turn holds."""

_TAG, _OPENED = re.compile(r"</?\w+>"), re.compile(r"<(\w+)>\s*\Z")

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What a turn may hold beside its content that is learnt with it."""

UNREAD = ("function_call", "images", "videos", "audio", "audios")
"""What a turn may hold beside its content that would be lost."""


def with_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with another chat template; itself if there is none."""
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def is_template(text: str) -> bool:
    """Whether a material's `chat_template:` is one, and no file with one."""
    return "{" in text


def turns_of(value: Any, place: int) -> list[Turn]:
    """The turns of a chat, which may be JSON text: each with a role, and with a content or tool calls.

    Raises:
        RowError: it is no list of such turns.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(place, f"its messages are text, and not JSON ({error.msg}): {value[:60]!r}.") from None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
        raise RowError(place, f"its messages must be a list of turns, not {value!r}.")
    return [_turn(turn, n, place) for n, turn in enumerate(value, 1)]


def tools_of(row: Mapping[str, Any], place: int) -> list[Turn] | None:
    """The tools that a row offers, as a list of schemas or the same as JSON text; None where it offers none.

    Raises:
        RowError: its `tools` are something else.
    """
    given: Any = row.get("tools")
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given) if given.strip() else None
        except ValueError:
            tools = given
    if tools is None or (isinstance(tools, Sequence) and not len(tools)):
        return None
    if isinstance(tools, str) or not isinstance(tools, Sequence) or not all(isinstance(x, Mapping) for x in tools):
        raise RowError(place, f"its tools must be a list of schemas, or JSON text of one, not {str(given)[:60]!r}.")
    return [dict(tool) for tool in tools]


def _turn(turn: Any, n: int, place: int) -> Turn:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise RowError(
            place, f'turn {n} of its messages is {turn!r}; write {{"role": "user", "content": "..."}} for each.'
        )
    said = {str(key): value for key, value in turn.items() if value is not None}
    if unread := next((name for name in UNREAD if said.get(name)), None):
        way_out = " Write it as `tool_calls`." if unread == "function_call" else " Parts of text alone are read."
        raise RowError(place, f"turn {n} of its messages has {unread!r}, which no template writes.{way_out}")
    if calls := said.get("tool_calls"):
        said["tool_calls"] = [_call(call, n, place) for call in calls]
    content = said.get("content")
    if content is None and not said.get("tool_calls"):
        raise RowError(place, f"turn {n} of its messages ({said['role']!r}) has no content.")
    if content is not None:
        said["content"] = _text(content, n, place)
    return said


def _check_learnt(last: Turn, place: int) -> None:
    """Whether the turn that is learnt says so: a part of a loss is none that can be asked for.

    Raises:
        RowError: it says otherwise.
    """
    for name in ("weight", "train"):
        if name in last and last[name] not in (1, True):
            raise RowError(
                place,
                f"the last turn of its messages says `{name}: {last[name]!r}`, and the last turn is what is learnt, "
                "with the weight 1. End the chat with the turn that is to be learnt, or leave the row out.",
            )


def _text(content: Any, n: int, place: int) -> str:
    """A content as text: its parts, one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RowError(place, f"turn {n} of its messages has the content {content!r}, which is no text.")
    texts: list[str] = []
    for part in content:
        said = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if not isinstance(said, str) or kind != "text":
            raise RowError(
                place, f"turn {n} of its messages has a part of the kind {kind!r}; parts of text alone are read."
            )
        texts.append(said)
    return "".join(texts)


def _call(call: Any, n: int, place: int) -> Turn:
    """A tool call with its arguments as a mapping."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(place, f"turn {n} of its messages has the tool call {call!r}, which names no function.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            raise RowError(
                place, f"turn {n} of its messages calls a tool with arguments that are no JSON: {arguments!r}."
            ) from None
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


class Writer:
    """A tokenizer's chat template at work. What it does with turns of some roles is tried once."""

    def __init__(self, tokenizer: Any, who: str = "`as: chat` needs") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError(
                f"{who} a tokenizer with a chat template; this one has none. Give one to the material (`chat_template: "
                "FILE.jinja`), or write questions and answers (`as: qa`)."
            )
        self._tokenizer = tokenizer
        self._parts: dict[tuple[Any, ...], bool] = {}

    def answer(self, turns: Sequence[Turn], place: int, tools: Any = None) -> tuple[str, Span]:
        """The chat as text, and where its last turn stands in it.

        Raises:
            RowError: the chat does not end with what the assistant says, or the template does not write it so.
        """
        *context, last = turns
        if last["role"] != "assistant":
            raise RowError(
                place, f"a chat must end with an assistant turn to learn from; this one ends with {last['role']!r}."
            )
        if not last.get("content", "").strip():
            raise RowError(place, "the last turn of its messages says nothing, so there is no answer to learn.")
        _check_learnt(last, place)
        give = _in_parts if self._takes_parts(turns, place, tools) else dict
        text, said = self._write(map(give, turns), place, tools, spans=True)
        bare = {key: value for key, value in last.items() if key not in THOUGHTS}
        mark = _mark(turns)
        other, _ = self._write(map(give, [*context, {**bare, "content": mark}]), place, tools)
        before, found, after = other.partition(mark)
        begin = len(commonprefix([text, before]))
        end = len(text) - len(commonprefix([text[begin:][::-1], after[::-1]]))
        thinks = "</" in last["content"] or bare != last
        if thinks and context:
            begin = self._with_tag(text, begin, end, self._write(map(give, context), place, tools, begin=True)[0])
        parts = [
            part.strip() for part in _TAG.split(last["content"])
        ]  # a template may write a thought in lines of its own
        if not found or mark in after or (begin < len(before) and not thinks) or parts[-1][-8:] not in text[begin:end]:
            raise RowError(place, "the chat template does not write its last answer as it is given.")
        if thinks and not all(part in text for part in parts):
            _warn("The chat template leaves out thoughts of an answer: what it writes is learnt and scored.")
        if said and said[-1][0] <= begin < said[-1][1]:  # the template itself says what is the assistant's
            begin, until = said[-1]
            return text, Span(begin, min(end, until), until)
        return text, Span(begin, end, len(text))

    @staticmethod
    def _with_tag(text: str, begin: int, end: int, begun: str) -> int:
        """Where an answer begins: with the tag before its thought, unless in use the template writes that (`begun`)."""
        opened = _OPENED.search(text, 0, begin)
        if opened is None or f"</{opened[1]}>" not in text[begin:end] or not text[: opened.start()].startswith(begun):
            return begin
        return opened.start()

    def prompt(self, turns: Sequence[Turn], place: int, tools: Any = None) -> str:
        """The turns, and the beginning of an answer."""
        give = _in_parts if self._takes_parts(turns, place, tools) else dict
        return self._write(map(give, turns), place, tools, begin=True)[0]

    def _takes_parts(self, turns: Sequence[Turn], place: int, tools: Any) -> bool:
        """Whether the template reads contents in parts alone; it must write each turn of chats like this one.

        Raises:
            RowError: it does not, with the reason that it gives.
        """
        shape = tuple((turn["role"], "content" in turn, bool(turn.get("tool_calls"))) for turn in turns)
        if shape in self._parts:
            return self._parts[shape]
        calling = next((n for n, turn in enumerate(turns, 1) if turn.get("tool_calls")), None)
        if calling is not None and "tool_calls" not in self._tokenizer.get_chat_template(tools=tools):
            raise RowError(
                place, f"turn {calling} of its messages calls a tool, and the chat template writes no tool calls."
            )
        marks = [f"{_mark(turns)}{n}." for n in range(len(turns))]
        marked = [_with_mark(turn, mark) for turn, mark in zip(turns, marks, strict=True)]
        reason: RowError | None = None
        for parts, give in ((False, dict), (True, _in_parts)):
            try:
                text, _ = self._write(map(give, marked), place, tools)
            except RowError as error:
                reason = reason or error
                continue
            missing = next((n for n, mark in enumerate(marks) if mark not in text), None)
            if missing is None:
                self._compare(list(map(give, marked)), text, tools)
                self._parts[shape] = parts
                return parts
            what = "tool calls" if turns[missing].get("tool_calls") else f"what {turns[missing]['role']!r} says"
            reason = reason or RowError(place, f"the chat template leaves out {what} (turn {missing + 1}).")
        raise reason or RowError(place, "the chat template does not write its messages.")

    def _compare(self, turns: Sequence[Turn], text: str, tools: Any) -> None:
        """Say where the template begins an answer in another way than it writes one that is given."""
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            return
        begun, _ = self._write(turns[:-1], 0, tools, begin=True)
        more = begun[len(commonprefix([begun, text])) :]
        if more.strip():
            _warn(
                f"The chat template begins an answer with {more!r}, and writes given answers without it: they are learnt, "
                "scored and continued as it writes them."
            )

    def _write(
        self, turns: Iterable[Turn], place: int, tools: Any, *, begin: bool = False, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """What the template writes, and what of it is the assistant's, where it says so and that is asked for."""
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        template = self._tokenizer.get_chat_template(tools=tools)
        try:
            written, said = render(
                [list(turns)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=spans and bool(MARKED.search(template)),
                add_generation_prompt=begin,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateSyntaxError as error:
            raise RequestError(f"The chat template cannot be read: line {error.lineno}: {error.message}.") from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = str(getattr(error, "message", None) or error).strip().rstrip(".")
            raise RowError(place, f"the chat template refuses its messages: {reason}.") from None
        return written[0], said[0] if said else []


def commonprefix(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _warn(message: str) -> None:
    warnings.warn(message, MaterialWarning, stacklevel=3)


def _mark(turns: Sequence[Turn]) -> str:
    """A mark that stands in none of these turns."""
    mark = MARK
    while mark in str(turns):
        mark += MARK[-1]
    return mark


def _with_mark(turn: Turn, mark: str) -> Turn:
    """The turn with a mark as what it says, or as the tool that it calls."""
    if not turn.get("tool_calls"):
        return {**turn, "content": mark}
    first, *rest = turn["tool_calls"]
    return {**turn, "tool_calls": [{**first, "function": {**first["function"], "name": mark}}, *rest]}


def _in_parts(turn: Turn) -> Turn:
    if not isinstance(turn.get("content"), str):
        return turn
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}
