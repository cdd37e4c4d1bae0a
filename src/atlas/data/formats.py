"""One row of a source as a conversation, or the reason why it is none."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages (`role`, `content`, perhaps `tool_calls`) and the JSON schemas of the tools that they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class BadRowError(Exception):
    """This row cannot be trained on: `reason` is what it is counted under, `detail` what a person sees of it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def conversation(row: str | Mapping[str, Any]) -> Conversation:
    """A row (a JSON text or a mapping of columns) as a conversation. The text of a message is never changed.

    Raises `BadRowError` under one of: not JSON, no messages, empty, not text, unknown role, no assistant turn.
    """
    if isinstance(row, str):
        row = _decode(row)
    if row.get("messages") is None:
        raise BadRowError("no messages", f"no column 'messages' among {', '.join(map(repr, row)) or 'none'}")
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise BadRowError(
            "no messages", f"'messages' is not a list of objects with role and content: {_short(messages)}"
        )
    if not messages:
        raise BadRowError("empty", "'messages' is an empty list")
    for index, message in enumerate(messages):
        _check(message, index)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError("no assistant turn", f"roles: {', '.join(message['role'] for message in messages)}")
    return Conversation([dict(message) for message in messages], _tools(row.get("tools")))


def _decode(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRowError("not JSON", f"{error}: {_short(line)}") from None
    if not isinstance(row, dict):
        raise BadRowError("not JSON", f"expected an object, got {type(row).__name__}: {_short(line)}")
    return row


def _check(message: Mapping[str, Any], index: int) -> None:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ROLES)}"
        raise BadRowError("unknown role", f"messages[{index}].role is {role!r}; {meant}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise BadRowError("not text", f"messages[{index}].content of the {role} turn is {_short(content)}, not text")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError:
            raise BadRowError(
                "not text", f"messages[{index}].content holds a lone surrogate, which is no character"
            ) from None


def refuse_special_tokens(parsed: Conversation, special: Sequence[str]) -> None:
    """Raise `BadRowError` where a message or a tool holds the text of a special token: it would be encoded as that token, so
    that data could forge a turn or a stop."""
    texts = [message["content"] for message in parsed.messages if message.get("content")]
    if parsed.tools or any("tool_calls" in message for message in parsed.messages):
        texts.append(
            json.dumps([parsed.tools, [message.get("tool_calls") for message in parsed.messages]], ensure_ascii=False)
        )
    whole = "\n".join(texts)
    for token in special:
        if token in whole:
            at = whole.index(token)
            raise BadRowError(
                "injected", f"the text of the special token {token!r}: {_short(whole[max(0, at - 30) : at + 50])}"
            )


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):  # Arrow cannot hold free-form schemas, so many data sets keep them as JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise BadRowError("not JSON", f"'tools' is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRowError("not text", f"'tools' is not a list of schemas: {_short(tools)}")
    return tools


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= 80 else text[:77] + "..."
