"""Every form that users' records and files come in: read right, or refused by file, record and reason."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from dba_kernels.cli import corpora  # noqa: E402
from dba_kernels.cli.conversations import Conversation, as_document, conversation  # noqa: E402
from dba_kernels.cli.output import InputError  # noqa: E402
from dba_kernels.cli.packing import IGNORED, Batches, Encoder  # noqa: E402
from dba_kernels.cli.text import Corpus  # noqa: E402

from .support.cli_inputs import CHATML, MARKED, make_tokenizer, write_jsonl  # noqa: E402

USER, ANSWER = {"role": "user", "content": "stir"}, {"role": "assistant", "content": "bake it"}
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['arguments'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_ALTERNATION = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML


def learned(document: Any, template: str = CHATML, **options: Any) -> str:
    tokenizer = make_tokenizer(template)
    labels = Encoder(tokenizer, **options)(document).labels
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def rendered(document: Any, template: str = CHATML) -> str:
    tokenizer = make_tokenizer(template)
    return str(tokenizer.decode(Encoder(tokenizer)(document).ids))


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation marks"])
def test_content_parts_are_their_text(template: str) -> None:
    """Protects what is learned: OpenAI's content parts are joined texts, never a Python list in brackets."""
    talk = [{"role": "user", "content": parts("stir")}, {"role": "assistant", "content": parts("bake ", "it")}]
    assert learned(talk, template) == learned([USER, ANSWER], template) == "bake it<|im_end|>"
    assert rendered(talk, template) == rendered([USER, ANSWER], template)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"content\[0\]: expected a part of type 'text', got type"),
        ([*parts("a"), "b"], r"content\[1\]: expected a part of type 'text', got str"),
        (None, r"messages\[0\]\.content: expected text, got null"),
        (3, r"messages\[0\]\.content: expected text, got int"),
        ({"text": "a"}, r"messages\[0\]\.content: expected text, got an object"),
    ],
)
def test_other_contents_are_refused_by_name(content: Any, message: str) -> None:
    """Protects what is learned: a part that is no text, and no text at all, are refused with their place."""
    with pytest.raises(InputError, match=message):
        conversation([{"role": "user", "content": content}, ANSWER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([[USER, ANSWER]], r"messages\[0\]: expected an object with 'role' and 'content', got a list.*nested once too"),
        (["stir"], r"messages\[0\]: expected an object with 'role' and 'content', got str"),
        ([], "expected a list of messages, got a list with nothing in it"),
        ([{"content": "x"}], r"messages\[0\]: expected a 'role'.*got 'content'"),
        ([{"from": "narrator", "value": "x"}], r"messages\[0\]: expected a 'role', or 'from' one of .*from 'narrator'"),
    ],
)
def test_other_forms_of_messages_are_refused_by_name(messages: Any, message: str) -> None:
    """Protects against raw tracebacks: messages of another form are refused with their place and what they are."""
    with pytest.raises(InputError, match=message):
        Encoder(make_tokenizer())(messages)


def test_sharegpt_records_are_conversations() -> None:
    """Protects ShareGPT's data: its names become roles, its system prompt the first turn."""
    turns = [{"from": "human", "value": "stir"}, {"from": "gpt", "value": "bake it"}]
    assert as_document({"conversations": turns}, "text") == Conversation([USER, ANSWER])
    assert as_document({"conversations": turns}, "conversations") == Conversation([USER, ANSWER])
    with_system = as_document({"conversations": turns, "system": "salt"}, "text")
    assert with_system == Conversation([{"role": "system", "content": "salt"}, USER, ANSWER])
    assert as_document({"talk": [USER, ANSWER]}, "talk") == Conversation([USER, ANSWER])
    assert as_document([USER, ANSWER], "text") == Conversation([USER, ANSWER])
    assert learned(as_document({"conversations": turns}, "text")) == "bake it<|im_end|>"


def test_tools_reach_the_template_or_are_refused() -> None:
    """Protects tool use: a record's tools and calls are rendered, and refused where the template leaves them out."""
    record = {"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {"name": "oven"}}]}
    assert '"name": "oven"' in rendered(as_document(record, "text"), TOOLS)
    assert as_document(record | {"tools": json.dumps(record["tools"])}, "text") == as_document(record, "text")
    assert "oven" not in rendered(as_document(record | {"tools": []}, "text"), TOOLS)  # control
    assert learned(as_document(record, "text"), TOOLS) == "bake it<|im_end|>"
    with pytest.raises(InputError, match=r"conversation with 'tools': expected a chat template that has a place"):
        learned(as_document(record, "text"), CHATML)
    call = {"type": "function", "function": {"name": "oven", "arguments": '{"heat": 200}'}}
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert learned(talk, TOOLS) == '{"heat": 200}<|im_end|>'  # not quoted once more
    with pytest.raises(InputError, match="conversation with 'tool_calls'"):
        learned(talk, CHATML)
    with pytest.raises(InputError, match=r"tool_calls\[0\]\.function\.arguments: expected JSON"):
        conversation([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}])
    with pytest.raises(InputError, match="got 'functions'"):
        as_document({"messages": [USER, ANSWER], "functions": [{}]}, "text")
    with pytest.raises(InputError, match="expected a list in field 'tools', got int"):
        as_document({"messages": [USER, ANSWER], "tools": 3}, "text")


def test_a_greeting_first_is_a_conversation() -> None:
    """Protects conversations that the assistant opens: both of its turns are learned, and nothing else."""
    talk = [ANSWER, USER, {"role": "assistant", "content": "salt"}]
    assert learned(talk) == learned(talk, MARKED) == "bake it<|im_end|>salt<|im_end|>"
    with pytest.raises(InputError, match=r"roles \['assistant', .*it says: user first"):
        learned(talk, NO_ALTERNATION)
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # writes nothing before an answer
    assert (learned([USER, ANSWER], bare), learned([ANSWER, USER], bare)) == (
        "bake it",
        " it",
    )  # the first token never is


def test_a_turn_of_weight_0_is_not_learned() -> None:
    """Protects OpenAI's ``weight``: a turn that is not to be learned is no target, or refused where marks decide."""
    talk = [USER, ANSWER | {"weight": 0}, USER, {"role": "assistant", "content": "salt", "weight": 1}]
    assert learned(talk) == "salt<|im_end|>"
    with pytest.raises(InputError, match="message of weight 0"):
        learned(talk, MARKED)


def test_a_lone_surrogate_is_refused_by_name(tmp_path: Path) -> None:
    """Protects against a raw UnicodeEncodeError: half a character is refused with its record, in text and in chats."""
    for records in (["fine", "a\ud800"], [{"messages": [USER, ANSWER | {"content": "\udfff"}]}]):
        path = tmp_path / "a.jsonl"
        write_jsonl(path, records)
        corpus = Corpus([str(path)])
        with pytest.raises(
            InputError, match=rf"a\.jsonl, record {len(records)}: expected text in Unicode, got the lone"
        ):
            list(Batches(corpus, Encoder(make_tokenizer()), length=32, size=1, seed=0))
        with pytest.raises(InputError, match=r"a\.jsonl: expected text in Unicode"):
            corpora.load_documents(str(path))


def test_tokens_outside_the_embedding_are_refused() -> None:
    """Protects against an IndexError in the model: a token without an embedding is named."""
    tokenizer = make_tokenizer()
    inside = Encoder(tokenizer, vocabulary=len(tokenizer))
    assert inside("stir the flour").ids
    with pytest.raises(InputError, match=r"token '.*': expected an id below 260, the rows of the model's embedding"):
        Encoder(tokenizer, vocabulary=260)("stir the flour")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"messages": [USER, {"role": "bot", "content": "x"}]}], "no turn is the role 'assistant' .*'bot', 'user'"),
        ([{"messages": [USER | {"content": "stir " * 99}, ANSWER]}], "the first 32 tokens of each .*; raise --length"),
        ([{"text": ""}], "every document is empty"),
    ],
)
def test_data_without_targets_say_why(tmp_path: Path, records: list[Any], message: str) -> None:
    """Protects the user's time: the reason why there is nothing to learn is named, with the fix."""
    corpus = Corpus([str(write_jsonl(tmp_path / "a.jsonl", records))])
    with pytest.raises(InputError, match=f"expected targets, found none: {message}"):
        next(iter(Batches(corpus, Encoder(make_tokenizer()), length=32, size=1, seed=0)))


def test_a_text_beside_another_list_is_the_text() -> None:
    """Protects records of several columns: a list that is no conversation does not hide the text in --field."""
    assert as_document({"text": "stir", "conversation": [3, 4], "messages": []}, "text") == "stir"
    assert as_document({"text": "stir", "conversations": [USER, ANSWER]}, "text") == Conversation([USER, ANSWER])


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None}, "expected text in field 'text', got null"),
        ({"text": 3.5}, "expected text in field 'text', got float"),
        ({"text": True}, "expected text in field 'text', got true"),
        ({"text": {"a": 1}}, "expected text in field 'text', got an object"),
        ({"text": ["a", "b"]}, "expected text in field 'text', got a list"),
        ({"conversations": ["a"]}, "conversations[0]: expected an object with 'role' and 'content', got str"),
        ({"prompt": "a", "completion": "b"}, "name the field with --field, or write conversations as 'messages'"),
        ({"messages": None, "id": 1}, "expected a list of messages in field 'messages', got null"),
        ({"conversations": "hello"}, "expected a list of messages in field 'conversations', got str"),
        ({"body": "x"}, "expected text in field 'text', or 'messages', got 'body'; name the field with --field"),
        ({}, "got an empty object"),
        (None, "expected text in field 'text', or 'messages', got null"),
        ([3], "expected text in field 'text', or 'messages', got a list"),
    ],
)
def test_a_record_without_text_says_what_it_holds(record: Any, message: str) -> None:
    """Protects the message: what stands in the field is named, not the field's own name."""
    with pytest.raises(InputError) as caught:
        as_document(record, "text")
    assert message in caught.value.message


def test_the_first_bad_record_of_the_file_is_named(tmp_path: Path) -> None:
    """Protects who corrects a file: of several bad records the first is named, whatever the shuffled order."""
    records: list[Any] = [{"text": "stir"}] * 40
    records[7] = records[23] = records[31] = {"text": None}
    corpus = Corpus([str(write_jsonl(tmp_path / "a.jsonl", records))])
    for seed in range(4):
        with pytest.raises(InputError, match=r"a\.jsonl, record 8: expected text in field 'text', got null"):
            list(Batches(corpus, Encoder(make_tokenizer()), length=32, size=1, seed=seed))


# --- files ------------------------------------------------------------------------------------------------------------

LINES = '{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.json", b"\xef\xbb\xbf" + b'["one", "two"]'),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(b'["one", "two"]', mtime=0)),
        ("a.csv", 'text,label\n"one",1\ntwo,2\n'),
        ("a.tsv", "label\ttext\n1\tone\n2\ttwo\n"),
        ("a.csv.gz", gzip.compress(b"text\none\ntwo\n", mtime=0)),
        ("a.csv", b"\xef\xbb\xbf" + b"text\none\ntwo\n"),
    ],
)
def test_files_are_read_by_their_kind(tmp_path: Path, name: str, content: str | bytes) -> None:
    """Protects against JSON or tables taught as plain text: each kind gives its records."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(Corpus([str(tmp_path / name)]).in_order(0)) in (["one", "two"], ["two", "one"])
    assert sorted(corpora.load_documents(str(tmp_path / name))[0], key=lambda t: t.find("two"))[0].find("one") >= 0


def test_long_texts_in_a_table_are_read(tmp_path: Path) -> None:
    """Protects tables of long texts: a value above 128 KiB, the csv module's own limit, is read whole."""
    (tmp_path / "a.csv").write_text(f'text\n"{"long " * 40_000}"\n')
    assert Corpus([str(tmp_path / "a.csv")]).document(0) == "long " * 40_000


def test_plain_text_loses_its_mark_and_may_be_packed(tmp_path: Path) -> None:
    """Protects plain text: a byte order mark is not learned, and .gz is unpacked."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    corpus = Corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz")])
    assert [corpus.document(i) for i in range(2)] == ["one", "two"]


def test_one_record_is_no_mapping_of_records(tmp_path: Path) -> None:
    """Protects against fields learned as documents: a .json that holds a single record is that record."""
    (tmp_path / "a.json").write_text('{"text": "one", "source": "web"}')
    (tmp_path / "b.json").write_text(json.dumps({"messages": [USER, ANSWER], "id": "x"}))
    corpus = Corpus([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert [corpus.document(i) for i in range(len(corpus))] == ["one", Conversation([USER, ANSWER])]


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", LINES, "its lines are JSON records; let its name end in .jsonl"),
        ("a.log", LINES, "its lines are JSON records; let its name end in .jsonl"),
        ("a.txt", "a\0b", "got binary data"),
        ("a.txt", "one".encode("utf-16"), "got UTF-16; save it as UTF-8"),
        ("a.jsonl", LINES.encode("utf-16"), "got UTF-16; save it as UTF-8"),
        ("a.jsonl", "[\n1\n]\n", "Then name it .json"),
        ("a.jsonl", DEEP, "record 1: expected a line of JSON in UTF-8: it is nested too deep"),
        ("a.json", DEEP, "as JSON: it is nested too deep"),
        ("a.json", '{"text": "one"}\n{"text": ', "as JSON: Extra data"),
        ("a.csv", "text,label\none\n", "record 1: expected 2 values, as many as the first row names"),
        ("a.csv", 'text\n"one', "expected a table of quoted values"),
        ("a.parquet", "PAR1", ".parquet files are not read; read it with datasets.load_dataset"),
        ("a.pdf", "%PDF", ".pdf files are not read; save it as plain text"),
        ("a.zip", "PK", ".zip files are not read; unpack it first"),
        ("a.txt.gz", "no gzip", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-20], "end-of-stream marker"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """Protects the user's time: files that cannot be read say so, with the fix, in every command that reads text."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        corpus = Corpus([str(tmp_path / name)])
        list(map(corpus.document, range(len(corpus))))
    assert message in caught.value.message and name in caught.value.message
    with pytest.raises(InputError) as caught:
        corpora.load_documents(str(tmp_path / name))
    assert name in caught.value.message


def test_pipes_and_forbidden_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against waiting for ever and raw errors: a FIFO, and what may not be looked into, are named."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for read in (lambda name: Corpus([name]), corpora.load_documents):
        with pytest.raises(InputError, match=r"pipe\.jsonl': expected a regular file, got a pipe"):
            read(str(tmp_path / "pipe.jsonl"))

    def forbidden(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    for read in (lambda name: Corpus([name]), corpora.load_documents):
        with pytest.raises(InputError, match=rf"cannot read '{tmp_path}': Permission denied"):
            read(str(tmp_path))
        with pytest.raises(InputError, match=r"cannot read .*name too long|expected a file, a folder"):
            read("x" * 5000)
