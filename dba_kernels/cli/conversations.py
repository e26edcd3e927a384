"""Records to documents: text, or a conversation in the form that chat templates take, whatever form it came in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .output import InputError

KEYS = ("messages", "conversations", "conversation")
"""Where records keep a conversation: OpenAI's and transformers' name, ShareGPT's, and a common misspelling of it."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names ("from") of the roles."""

TEXT_PARTS = ("text", "input_text", "output_text")
LEARNED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Parts of a message beside its content that a model is to learn: a template that passes them over is noticed."""


@dataclass(frozen=True)
class Conversation:
    """Turns in order.

    Args:
        messages: ``{"role": …, "content": text, …}`` per turn; see :func:`conversation`.
        tools: descriptions of functions that the assistant may call, as chat templates take them.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


Document = str | Conversation


def is_record(data: dict[str, Any], field: str) -> bool:
    """Whether an object is one record, rather than a mapping of records."""
    return field in data or any(isinstance(data.get(key), list) for key in KEYS)


def as_document(record: Any, field: str) -> Document:
    """What a record says.

    Args:
        record: a text, a list of messages, or an object with one of :data:`KEYS` or ``field``.
        field: where its text (or its conversation) is.

    Raises:
        InputError: it holds neither; without the record's place, which the caller knows.
    """
    if isinstance(record, str):
        return record
    if _is_talk(record):
        return conversation(record)
    if not isinstance(record, dict):
        raise InputError(
            f"expected text in field {field!r}, or 'messages', got {_kind(record)}; give an object for each record"
        )
    text = record.get(field)
    for key in KEYS:
        found = record.get(key)
        if isinstance(found, list) and (_is_talk(found) or (key == "messages" and found) or not isinstance(text, str)):
            return _conversation_of(record, key)
    if _is_talk(text):
        return _conversation_of(record, field)
    if isinstance(text, str):
        return text
    if field in record:
        raise InputError(
            f"expected text in field {field!r}, got {_kind(text)}; leave such records out, or name another field with "
            "--field"
        )
    if unfit := [key for key in KEYS if key in record]:
        raise InputError(f"expected a list of messages in field {unfit[0]!r}, got {_kind(record[unfit[0]])}")
    got = ", ".join(repr(key)[:80] for key in list(record)[:12]) or "an empty object"
    raise InputError(
        f"expected text in field {field!r}, or 'messages', got {got}; name the field with --field, or write "
        "conversations as 'messages'"
    )


def _conversation_of(record: dict[str, Any], key: str) -> Conversation:
    if record.get("functions"):
        raise InputError("expected tools in field 'tools', got 'functions'; write them as tools")
    tools, messages = record.get("tools"), record[key]
    if isinstance(tools, str):  # as columns of one type hold them
        tools = _from_json("tools", tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"expected a list in field 'tools', got {_kind(tools)}")
    system = record.get("system")
    if isinstance(system, str) and system and not (_is_talk(messages) and _role(messages[0]) == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return conversation(messages, tools or None, key)


def conversation(messages: Any, tools: list[Any] | None = None, name: str = "messages") -> Conversation:
    """Messages in OpenAI's or ShareGPT's form, as chat templates take them: content parts joined to one text, arguments
    of tool calls as objects.

    Args:
        name: of the field that they come from.

    Raises:
        InputError: naming the message that has another form, or a part that is no text.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{name}: expected a list of messages, got {_kind(messages)}")
    return Conversation([_message(f"{name}[{i}]", message) for i, message in enumerate(messages)], tools)


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        deep = "; the conversation is nested once too deep" if isinstance(message, list) else ""
        raise InputError(f"{where}: expected an object with 'role' and 'content', got {_kind(message)}{deep}")
    role = _role(message)
    if not isinstance(role, str) or not role:
        speaker = message.get("role", message.get("from"))
        got = f"from {speaker!r}" if isinstance(speaker, str) else ", ".join(map(repr, list(message)[:12])) or "nothing"
        known = ", ".join(sorted(SPEAKERS))
        raise InputError(f"{where}: expected a 'role', or 'from' one of {known}, got {got[:200]}")
    made = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    content = message.get("content", message.get("value"))
    if made.get("tool_calls"):
        made["tool_calls"] = _tool_calls(f"{where}.tool_calls", made["tool_calls"])
    if content is None and any(made.get(key) for key in LEARNED):
        content = ""  # as OpenAI writes a turn that only calls tools
    return {"role": role, "content": _text(f"{where}.content", content), **made}


def _role(message: Any) -> Any:
    if "role" in message:
        return message["role"]
    speaker = message.get("from")
    return SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None


def _text(where: str, content: Any) -> str:
    """One text, of a text or of content parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}: expected text, got {_kind(content)}; leave such records out")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            got = f"type {part.get('type')!r}" if isinstance(part, dict) else _kind(part)
            raise InputError(f"{where}[{i}]: expected a part of type 'text', got {got[:200]}; only text is learned")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(where: str, calls: Any) -> list[Any]:
    """Calls with their arguments as objects: OpenAI writes them as JSON, and a template would quote that once more."""
    if not isinstance(calls, list):
        raise InputError(f"{where}: expected a list, got {_kind(calls)}")
    made = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = _from_json(f"{where}[{i}].function.arguments", function["arguments"] or "{}")
            call = {**call, "function": {**function, "arguments": arguments}}
        made.append(call)
    return made


def _from_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON: {error}") from error


def _is_talk(record: Any) -> bool:
    """Whether a list starts with a message."""
    first = record[0] if isinstance(record, list) and record else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _kind(value: Any) -> str:
    """In JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (list, dict)):
        name = "a list" if isinstance(value, list) else "an object"
        return name if value else f"{name} with nothing in it"
    return type(value).__name__
