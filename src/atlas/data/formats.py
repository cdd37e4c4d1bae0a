"""One row of a source as a conversation, or the reason why it is none."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas.config.schema import TEXT
from atlas.console import one_line
from atlas.errors import UserError

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
        """The turns before the first answer, without the system prompt. Rows that share it are all trained on, or none is."""
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
    """How a data set writes conversations: the columns that tell the format, and those that it reads where they are there."""

    name: str
    columns: tuple[str, ...]
    """A list of messages, or a prompt and its answer."""
    system: str | None = None
    """Optional column of the system prompt."""
    input: str | None = None
    """Optional column that is added to the prompt after an empty line."""
    optional: tuple[str, ...] = ()
    """Other columns that it reads where they are there."""

    @property
    def known(self) -> set[str]:
        """All columns that it reads."""
        tools = None if self.name == TEXT else "tools"
        return {column for column in (*self.columns, self.system, self.input, tools, *self.optional) if column}

    def messages(self, row: Mapping[str, Any]) -> Any:
        """The messages of a row that has the columns. They are not checked yet: what is no list is given as it is."""
        first = row[self.columns[0]]
        system = _said("system", row[self.system]) if self.system and row.get(self.system) else []
        if self.name == "sharegpt":
            return system + [sharegpt_turn(turn) for turn in first] if is_list_of_objects(first) else first
        if len(self.columns) == 1:
            return first
        prompt, more = joined(first), joined(row.get(self.input)) if self.input else None
        if isinstance(prompt, str) and isinstance(more, str) and more:
            prompt = f"{prompt}\n\n{more}"
        return system + _said("user", prompt) + _said("assistant", row[self.columns[1]])


FORMATS = {
    known.name: known
    for known in (
        Format("messages", ("messages",)),
        Format("sharegpt", ("conversations",), system="system"),
        Format("alpaca", ("instruction", "output"), input="input"),
        Format("dolly", ("instruction", "response"), input="context"),
        Format("openorca", ("question", "response"), system="system_prompt"),
        Format("prompt-response", ("prompt", "response"), system="system"),
        Format("prompt-completion", ("prompt", "completion")),
        Format("preference", ("prompt", "chosen", "rejected")),
        Format(TEXT, ("text",)),
    )
}


def is_list_of_objects(value: Any) -> bool:
    """As messages are written."""
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _said(role: str, content: Any) -> list[Any]:
    """A text as one message; a list of messages as it is."""
    if is_list_of_objects(content) and (not content or "role" in content[0]):
        return list(content)
    return [{"role": role, "content": content}]


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def sharegpt_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with `from` and `value` as a message. Raises `BadRowError`."""
    role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role != "function_call":
        return {"role": _SHAREGPT_ROLES.get(str(role), role), "content": value}
    call = _decode(value) if isinstance(value, str) else value  # JSON text, as LLaMA-Factory and Glaive write it
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise BadRowError("not text", f"a function_call is not an object with a name: {short(value)}")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def refuse_columns(
    columns: Mapping[str, str], format_name: str | None, formats: Mapping[str, Format] = FORMATS
) -> None:
    """Raise `UserError` for a format that is none of the phase's `formats`, and where a name in `columns` is none that a format
    reads, or none of the format that is asked for."""
    if format_name is not None and format_name not in formats:
        raise UserError(f"data: format: this phase reads no {format_name!r}; it reads {', '.join(formats)}")
    asked = [formats[format_name]] if format_name is not None else formats.values()
    known = sorted({column for one in asked for column in one.known})
    for name, column in columns.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            if column in known and not near:
                meant = f"write it the other way round, {{{column}: {name}}}"
            raise UserError(f"data: columns: {name!r} is no name that {format_name or 'a format'} reads; {meant}")


def renamed(row: str | Mapping[str, Any], columns: Mapping[str, str]) -> str | Mapping[str, Any]:
    """`row` (JSON text or columns) with the names that formats read; `columns` says under which name each stands in the source.

    A text that is no JSON object stays as it is: it is counted when it is labelled.
    """
    if isinstance(row, str):
        try:
            row = _decode(row)
        except BadRowError:
            return row
    return _rename(row, columns) if columns else row


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = {*columns, *columns.values()}
    others = {name: value for name, value in row.items() if name not in taken}
    return others | {name: row[column] for name, column in columns.items() if column in row}


def detect(
    rows: Iterable[str | Mapping[str, Any]],
    place: str,
    columns: Mapping[str, str] | None = None,
    format_name: str | None = None,
    formats: Mapping[str, Format] = FORMATS,
) -> str:
    """The one of `formats` whose columns most of these (first) rows of a source have; `format_name`, where the config gives it.

    Raises `UserError` where no format fits, or more than one, and where no row has a column that `columns` names.
    """
    columns = columns or {}
    refuse_columns(columns, format_name, formats)
    readable = [row for row in (renamed(row, {}) for row in rows) if not isinstance(row, str)]
    if not readable:
        return format_name or next(iter(formats))  # the ledger will say of every row that it cannot be read
    seen = {key for row in readable for key in row}
    columns_seen = f"Columns seen: {one_line(', '.join(map(repr, sorted(seen)))) or 'none'}"
    if absent := [column for column in columns.values() if column not in seen]:
        raise UserError(f"data: {place} has no column {absent[0]!r}, which its `columns` name. {columns_seen}")
    if format_name is not None:
        return format_name
    given = [_rename(row, columns) for row in readable]
    present = Counter(name for row in given for name in row)
    # A column that is null everywhere says nothing: where tables were joined, each has the other's columns so.
    filled = {name for row in given for name, value in row.items() if value is not None}
    usual = {name for name in filled if 2 * present[name] > len(given)}
    found = [f.name for f in formats.values() if usual.issuperset(f.columns) and f.known.issuperset(columns)]
    for name in (TEXT, "prompt-response"):  # many data sets keep the rendered conversation, or prompt, beside its parts
        if len(found) > 1 and name in found:
            found.remove(name)
    if len(found) == 1:
        return found[0]
    all_known = "; ".join(f"{known.name} ({', '.join(known.columns)})" for known in formats.values())
    if found:
        what, remedy = f"fits several formats ({', '.join(sorted(found))})", "Name one with `format:` in the source"
    else:
        what, advice = "fits no known format", _advice(place, readable[0], formats)
        remedy = f"Say in the source (here of data.train) what they are:\n{advice}"
    raise UserError(f"data: {place} {what}. {columns_seen}. Known: {all_known}. {remedy}")


_ASKED = ("prompt", "question", "query", "instruction", "user", "input", "human", "request")
_ANSWERED = ("response", "answer", "output", "completion", "reply", "target", "assistant", "gpt")
_BETTER = ("chosen", "better", "accept", "prefer", "win", "positive", "good")
_WORSE = ("reject", "worse", "lose", "dispreferred", "negative", "bad")


def _advice(place: str, row: Mapping[str, Any], formats: Mapping[str, Format]) -> str:
    """The YAML to write for a source of such rows, with the columns that are the likeliest by their names."""

    def column_of(words: Sequence[str], else_: str) -> str:
        return next((name for word in words for name in row if word in str(name).lower()), else_)

    turns = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    if "messages" not in formats:
        columns = {"prompt": column_of(_ASKED, "COLUMN"), "chosen": column_of(_BETTER, "GOOD_COLUMN")}
        columns |= {"rejected": column_of(_WORSE, "BAD_COLUMN")}
    elif turns:
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
    wanted = FORMATS[format_name]
    row = opened(row, wanted)
    if format_name == TEXT:
        text = row["text"]
        if not isinstance(text, str):
            raise BadRowError("not text", f"'text' is {short(text)}, not text")
        if not text.strip():
            raise BadRowError("empty", "'text' holds no character but white space")
        return Conversation([], text=text)
    messages = wanted.messages(row)
    if not is_list_of_objects(messages):
        what = f"{wanted.columns[-1]!r} is not a list of objects with role and content"
        raise BadRowError("no messages", f"{what}: {short(messages)}")
    if not messages:
        raise BadRowError("empty", f"{wanted.columns[0]!r} is an empty list")
    messages = [checked(message, index) for index, message in enumerate(messages)]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no assistant turn", f"roles: {', '.join(message['role'] for message in messages)}")
    if not any(answer.get("tool_calls") or answer["content"].strip() for answer in answers):
        raise BadRowError("empty", "all answers are empty: the row would teach the model to say nothing")
    return Conversation(messages, tools_of(row.get("tools")))


def opened(row: str | Mapping[str, Any], wanted: Format) -> Mapping[str, Any]:
    """The columns of a row, among them all that the format needs. Raises `BadRowError`."""
    if isinstance(row, str):
        row = _decode(row)
    _refuse_depth(row, "the row")
    missing = [column for column in wanted.columns if row.get(column) is None]
    if missing:
        seen = ", ".join(map(repr, row)) or "none"
        raise BadRowError("no messages", f"no column {missing[0]!r} (format {wanted.name}) among {seen}")
    return row


def joined(content: Any) -> Any:
    """OpenAI's content parts as their text, where all of them are text; anything else as it is."""
    if not content or not is_list_of_objects(content):
        return content
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
        return content
    return "".join(part["text"] for part in content)


def refused(reason: str, detail: str) -> str:
    """A note in place of a row's JSON text: the row cannot be read, and is counted under this reason."""
    return f"{_REFUSED}{reason}: {detail}"


def _decode(line: str) -> Mapping[str, Any]:
    if line.startswith(_REFUSED):
        reason, _, detail = line.removeprefix(_REFUSED).partition(": ")
        raise BadRowError(reason, detail)
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number of more than 4,300 digits
        raise BadRowError("not JSON", f"{error}: {short(line)}") from None
    if not isinstance(row, dict):
        raise BadRowError("not JSON", f"expected an object, got {type(row).__name__}: {short(line)}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two equal keys json.loads would keep the last and drop the first without a message."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRowError("not JSON", f"the key {twice!r} occurs twice in one object")
    return found


_REFUSED = "\0refused: "
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # json.loads makes one for every call


def checked(message: Mapping[str, Any], index: int, of: str = "messages") -> dict[str, Any]:
    """A message with a known role and a text, or a call, in it. `of`: the list's name. Raises `BadRowError`."""
    role, content = message.get("role"), joined(message.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ROLES)}"
        raise BadRowError("unknown role", f"{of}[{index}].role is {role!r}; {meant}")
    is_call = content is None and role == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not is_call:
        raise BadRowError("not text", f"{of}[{index}].content of the {role} turn is {short(content)}, not text")
    return {**message, "content": content} if "content" in message else dict(message)


def refuse_special_tokens(parsed: Conversation, special: Sequence[str]) -> None:
    """Raise `BadRowError` where a message or a tool holds the text of a special token: it would be encoded as that token, so
    that data could forge a turn or a stop."""
    texts = [parsed.text or "", *(message["content"] for message in parsed.messages if message.get("content"))]
    calls = [message["tool_calls"] for message in parsed.messages if "tool_calls" in message]
    if parsed.tools or calls:
        texts.append(json.dumps([parsed.tools, calls], ensure_ascii=False, default=str))
    whole = "\n".join(texts)
    for token in special:
        if token in whole:
            at = whole.index(token)
            around = short(whole[max(0, at - 30) : at + 50])
            raise BadRowError("injected", f"the text of the special token {token!r}: {around}")


def tools_of(tools: Any) -> list[Any] | None:
    """The schemas in a row's column `tools`. Raises `BadRowError`."""
    if isinstance(tools, str):  # Arrow cannot hold free-form schemas, so many data sets keep them as JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRowError("not JSON", f"'tools' is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRowError("not text", f"'tools' is not a list of schemas: {short(tools)}")
    _refuse_depth(tools, "'tools'")
    return tools


_DEEPEST = 100


def _refuse_depth(value: Any, where: str) -> None:
    """Libraries that a row passes through fail at some depth, each in its own way."""
    level = [value]
    for _ in range(_DEEPEST):
        nested = [item for item in level if isinstance(item, list | Mapping)]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, Mapping) else item)]
        if not level:
            return
    raise BadRowError("too deep", f"{where} is nested more than {_DEEPEST} levels deep")


def short(value: object) -> str:
    """The beginning of a value, for a message."""
    text = value if isinstance(value, str) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= 80 else text[:77] + "..."
