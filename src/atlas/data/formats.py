"""One row of a source as a conversation, or the reason why it is none."""

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas.console import one_line
from atlas.errors import UserError

TEXT = "text"  # the format of plain documents
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages (`role`, `content`, perhaps `tool_calls`) and the JSON schemas of the tools that they may call; or plain `text`
    to be continued, as in pretraining, without messages."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    text: str | None = None

    @property
    def prompt(self) -> str:
        """What the first answer answers, without the system prompt: two rows that share it are not held out from each other."""
        if self.text is not None:
            return self.text
        end = next(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return "\0".join(str(m["content"]) for m in self.messages[:end] if m["role"] != "system")


class BadRowError(Exception):
    """This row cannot be trained on: `reason` is what it is counted under, `detail` what a person sees of it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Format:
    """How a data set writes conversations: the columns that tell it, a row as (unchecked) messages, and the columns that it reads
    where they are there."""

    name: str
    columns: tuple[str, ...]
    messages: Callable[[Mapping[str, Any]], Any]
    optional: tuple[str, ...] = ("tools",)

    @property
    def known(self) -> set[str]:
        """All columns that it reads."""
        return {*self.columns, *self.optional}


def _turns(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def _with(text: Any, more: Any) -> Any:
    """`text` with the optional `more` after an empty line; both as they are where they cannot be joined."""
    text, more = _joined(text), _joined(more)
    return f"{text}\n\n{more}" if isinstance(text, str) and isinstance(more, str) and more else text


def _sharegpt(row: Mapping[str, Any]) -> Any:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return turns
    return _system(row, "system") + [_sharegpt_turn(turn) for turn in turns]


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def _sharegpt_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role == "function_call":  # the call as JSON text, as LLaMA-Factory and Glaive write it
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": _call(value)}]}
    return {"role": _SHAREGPT_ROLES.get(str(role), role), "content": value}


def _call(value: Any) -> Any:
    call = _decode(value) if isinstance(value, str) else value
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise BadRowError("not text", f"a function_call is not an object with a name: {_short(value)}")
    return {"name": call["name"], "arguments": call.get("arguments", {})}


def _either(prompt: Any, answer: Any) -> Any:
    """A prompt and its answer, each a text or a list of messages."""
    prompt = prompt if isinstance(prompt, list) else _turns(("user", prompt))
    return prompt + (answer if isinstance(answer, list) else _turns(("assistant", answer)))


def _system(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    return _turns(("system", row[column])) if row.get(column) else []


def _openorca(row: Mapping[str, Any]) -> Any:
    return _system(row, "system_prompt") + _turns(("user", row["question"]), ("assistant", row["response"]))


FORMATS = {
    known.name: known
    for known in (
        Format("messages", ("messages",), lambda row: row["messages"]),
        Format("sharegpt", ("conversations",), _sharegpt, ("system", "tools")),
        Format(
            "alpaca",
            ("instruction", "output"),
            lambda row: _turns(("user", _with(row["instruction"], row.get("input"))), ("assistant", row["output"])),
            ("input", "tools"),
        ),
        Format(
            "dolly",
            ("instruction", "response"),
            lambda row: _turns(("user", _with(row["instruction"], row.get("context"))), ("assistant", row["response"])),
            ("context", "tools"),
        ),
        Format("openorca", ("question", "response"), _openorca, ("system_prompt", "tools")),
        Format(
            "prompt-response",
            ("prompt", "response"),
            lambda row: _system(row, "system") + _either(row["prompt"], row["response"]),
            ("system", "tools"),
        ),
        Format("prompt-completion", ("prompt", "completion"), lambda row: _either(row["prompt"], row["completion"])),
        Format("preference", ("prompt", "chosen", "rejected"), lambda row: _either(row["prompt"], row["chosen"])),
        Format(TEXT, ("text",), lambda row: row["text"], ()),
    )
}


COLUMNS = sorted({column for known in FORMATS.values() for column in known.known})


def refuse_columns(columns: Mapping[str, str], format_name: str | None) -> None:
    """Raise `UserError` where a name in `columns` is none that a format reads, or none of the format that is asked for."""
    known = sorted(FORMATS[format_name].known) if format_name in FORMATS else COLUMNS
    for name, column in columns.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            if column in known and not near:
                meant = f"write it the other way round, {{{column}: {name}}}"
            raise UserError(f"data.train: columns: {name!r} is no name that {format_name or 'a format'} reads; {meant}")


def renamed(row: str | Mapping[str, Any], columns: Mapping[str, str]) -> str | Mapping[str, Any]:
    """`row` with the names that formats read; `columns` says under which name each stands in the source.

    A text that is no JSON object stays as it is, to be counted when it is labelled.
    """
    if not columns:
        return row
    if isinstance(row, str):
        try:
            row = _decode(row)
        except BadRowError:
            return row
    return _rename(row, columns)


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = {*columns, *columns.values()}
    others = {name: value for name, value in row.items() if name not in taken}
    return others | {name: row[column] for name, column in columns.items() if column in row}


def detect(
    rows: Iterable[str | Mapping[str, Any]],
    place: str,
    columns: Mapping[str, str] | None = None,
    format_name: str | None = None,
) -> str:
    """The name of the format of which most of these (first) rows, as they stand in the source, have the columns; or
    `format_name`, where the config says it.

    Raises `UserError` where there is none or more than one, with what was seen and what to write, and where no row has one of the
    columns that `columns` names.
    """
    columns = columns or {}
    refuse_columns(columns, format_name)
    readable = []
    for row in rows:
        try:
            readable.append(_decode(row) if isinstance(row, str) else row)
        except BadRowError:
            continue  # counted when the rows are labelled
    if not readable:
        return format_name or "messages"  # no row is readable in any format, which the ledger will say row by row
    seen = {key for row in readable for key in row}
    if absent := [column for column in columns.values() if column not in seen]:
        raise UserError(
            f"data: {place} has no column {absent[0]!r}, which `columns` of the source names. Columns seen: "
            f"{', '.join(map(repr, sorted(seen))) or 'none'}"
        )
    if format_name is not None:
        return format_name
    given = [_rename(row, columns) for row in readable]
    # A column that is null everywhere says nothing: tables that were joined have the other's columns so.
    filled = {key for row in given for key, value in row.items() if value is not None}
    fits: Counter[str] = Counter()
    for row in given:
        present = filled & row.keys()
        fits.update(
            known.name
            for known in FORMATS.values()
            if present.issuperset(known.columns) and known.known.issuperset(columns)
        )
    found = [name for name, count in fits.items() if 2 * count > len(given)]
    for name in (TEXT, "prompt-response"):  # many data sets keep the rendered conversation, or prompt, beside its parts
        if len(found) > 1 and name in found:
            found.remove(name)
    if len(found) == 1:
        return found[0]
    formats = "; ".join(f"{known.name} ({', '.join(known.columns)})" for known in FORMATS.values())
    what = f"fits several formats ({', '.join(sorted(found))})" if found else "fits no known format"
    raise UserError(
        f"data.train: {place} {what}. Columns seen: {one_line(', '.join(sorted(seen))) or 'none'}. Known: {formats}. "
        + (
            "Name one with `format:` in the source"
            if found
            else f"Say in the source what they are:\n{_advice(place, readable[0])}"
        )
    )


_ASKED = ("prompt", "question", "query", "instruction", "user", "input", "human", "request")
_ANSWERED = ("response", "answer", "output", "completion", "reply", "target", "assistant", "gpt")


def _advice(place: str, row: Mapping[str, Any]) -> str:
    """The YAML to write for a source of such rows, with the columns that are the likeliest by their names."""

    def column_of(words: Sequence[str], else_: str) -> str:
        return next((name for word in words for name in row if word in str(name).lower()), else_)

    turns = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    if turns:
        columns = {"messages": turns[0]}
    elif len(row) == 1:
        columns = {"text": next(iter(row))}
    else:
        columns = {"prompt": column_of(_ASKED, "COLUMN"), "response": column_of(_ANSWERED, "OTHER_COLUMN")}
    written = ", ".join(f"{name}: {json.dumps(column, ensure_ascii=False)}" for name, column in columns.items())
    return f"data:\n  train:\n    - name: {json.dumps(place, ensure_ascii=False)}\n      columns: {{{written}}}"


def conversation(row: str | Mapping[str, Any], format_name: str = "messages") -> Conversation:
    """A row (a JSON text or a mapping of columns) as a conversation. The text of a message is never changed.

    Raises `BadRowError` under one of: not JSON, not CSV, too deep, no messages, empty, not text, unknown role, no assistant turn.
    """
    if isinstance(row, str):
        row = _decode(row)
    _refuse_depth(row, "the row")
    wanted = FORMATS[format_name]
    missing = [column for column in wanted.columns if row.get(column) is None]
    if missing:
        seen = ", ".join(map(repr, row)) or "none"
        raise BadRowError("no messages", f"no column {missing[0]!r} (format {wanted.name}) among {seen}")
    messages = wanted.messages(row)
    if format_name == TEXT:
        return _document(messages)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise BadRowError(
            "no messages", f"{wanted.columns[-1]!r} is not a list of objects with role and content: {_short(messages)}"
        )
    if not messages:
        raise BadRowError("empty", f"{wanted.columns[0]!r} is an empty list")
    messages = [dict(message) for message in messages]
    for index, message in enumerate(messages):
        if isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"])
        _check(message, index)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no assistant turn", f"roles: {', '.join(message['role'] for message in messages)}")
    if not any(answer.get("tool_calls") or answer["content"].strip() for answer in answers):
        raise BadRowError("empty", "no answer holds a word: it would teach to say nothing")
    return Conversation(messages, _tools(row.get("tools")))


def _joined(content: Any) -> Any:
    """OpenAI's content parts as their text, where all of them are text; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return content
        texts.append(part["text"])
    return "".join(texts)


def _document(text: Any) -> Conversation:
    if not isinstance(text, str):
        raise BadRowError("not text", f"'text' is {_short(text)}, not text")
    if not text.strip():
        raise BadRowError("empty", "'text' holds no character but white space")
    refuse_surrogates(text, "'text'")
    return Conversation([], text=text)


def refused(reason: str, detail: str) -> str:
    """What stands in the place of a row's JSON text that its file does not hold: a bad row, for this reason."""
    return f"{_REFUSED}{reason}: {detail}"


def _decode(line: str) -> Mapping[str, Any]:
    if line.startswith(_REFUSED):
        reason, _, detail = line.removeprefix(_REFUSED).partition(": ")
        raise BadRowError(reason, detail)
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number of more than 4,300 digits
        raise BadRowError("not JSON", f"{error}: {_short(line)}") from None
    if not isinstance(row, dict):
        raise BadRowError("not JSON", f"expected an object, got {type(row).__name__}: {_short(line)}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; json.loads would keep the last of two equal keys and lose the first without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRowError("not JSON", f"the key {twice!r} occurs twice in one object")
    return found


_REFUSED = "\0refused: "
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # json.loads makes one for every call


def refuse_surrogates(text: str, where: str) -> None:
    """Raise `BadRowError` for half of a UTF-16 pair, which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRowError("not text", f"{where} holds a lone surrogate, which is no character") from None


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
    refuse_surrogates(content, f"messages[{index}].content")


def refuse_special_tokens(parsed: Conversation, special: Sequence[str]) -> None:
    """Raise `BadRowError` where a message or a tool holds the text of a special token: it would be encoded as that token, so
    that data could forge a turn or a stop."""
    texts = [message["content"] for message in parsed.messages if message.get("content")]
    texts.append(parsed.text or "")
    if parsed.tools or any("tool_calls" in message for message in parsed.messages):
        texts.append(
            json.dumps(
                [parsed.tools, [message.get("tool_calls") for message in parsed.messages]],
                ensure_ascii=False,
                default=str,
            )
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
        except (ValueError, RecursionError) as error:
            raise BadRowError("not JSON", f"'tools' is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRowError("not text", f"'tools' is not a list of schemas: {_short(tools)}")
    _refuse_depth(tools, "'tools'")
    return tools


_DEEPEST = 100


def _refuse_depth(value: Any, where: str) -> None:
    """Every library on the way of a row gives up at some depth, each in its own manner."""
    level = [value]
    for _ in range(_DEEPEST):
        nested = [item for item in level if isinstance(item, list | Mapping)]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, Mapping) else item)]
        if not level:
            return
    raise BadRowError("too deep", f"{where} is nested more than {_DEEPEST} levels deep")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= 80 else text[:77] + "..."
