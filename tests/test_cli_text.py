"""Reading and packing: every document once, in a repeatable order, and a loss on exactly the tokens it should be on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console

transformers = pytest.importorskip("transformers")

from dba_kernels.cli import workload  # noqa: E402
from dba_kernels.cli.conversations import Conversation  # noqa: E402
from dba_kernels.cli.corpora import CORPORA, LONGEST_DOCUMENT  # noqa: E402
from dba_kernels.cli.output import InputError  # noqa: E402
from dba_kernels.cli.packing import IGNORED, Batches, Encoder, Rows  # noqa: E402
from dba_kernels.cli.text import Corpus  # noqa: E402

from .support.cli_inputs import CHATML, MARKED, conversation, make_tokenizer, sentences, write_inputs, write_jsonl  # noqa: E402

OPTIONS = {"Llama": {"intermediate_size": 64}, "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32}}


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def learned(tokenizer: transformers.PreTrainedTokenizerFast, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_data_is_read(tmp_path: Path) -> None:
    """Protects the documented kinds of data: each is read, in order, with the chosen field."""
    datasets = pytest.importorskip("datasets")
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}, "two", {"messages": conversation("q", "a"), "body": "x"}])
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps({"k": {"body": "three"}}))
    (tmp_path / "c.md").write_text("four\n")
    datasets.Dataset.from_list([{"body": "five"}, {"body": "six"}]).save_to_disk(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.txt").write_text("seven")
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.md", "d", "e")]
    corpus = Corpus(names, "body")
    found = [corpus.document(i) for i in range(len(corpus))]
    assert found == ["one", "two", Conversation(conversation("q", "a")), "three", "four", "five", "six", "seven"]


def test_a_folder_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    """Protects against silently missing data: a folder inside a folder is refused by name."""
    (tmp_path / "year").mkdir()
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match=r"expected a folder of files, found the folder 'year' in it; give .*/year"):
        Corpus([str(tmp_path)])


def test_the_order_depends_on_the_seed_alone(inputs: Path) -> None:
    """Protects repeatability: the same seed gives the same order, another seed the same documents in another."""
    corpus = Corpus([str(inputs / "general.jsonl")])
    first, again, other = (list(corpus.in_order(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, other)) == sorted(sentences(60, 1))


def test_long_plain_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    """Protects long texts: they are cut at line ends or spaces, and no word is lost."""
    lines = sentences(600, 0)
    (tmp_path / "long.txt").write_text("\n".join(lines))
    corpus = Corpus([str(tmp_path / "long.txt")])
    pieces = [str(corpus.document(i)) for i in range(len(corpus))]
    assert len(pieces) > 2 and max(map(len, pieces)) <= LONGEST_DOCUMENT
    assert "\n".join(pieces).splitlines() == lines
    words = [f"word{i:07}" for i in range(5000)]
    (tmp_path / "words.txt").write_text(" ".join(words))  # no line ends: cut between words, each time
    corpus = Corpus([str(tmp_path / "words.txt")])
    assert len(corpus) > 2
    assert [word for i in range(len(corpus)) for word in str(corpus.document(i)).split()] == words
    (tmp_path / "one-line.txt").write_text("x" * (2 * LONGEST_DOCUMENT + 1))
    assert len(Corpus([str(tmp_path / "one-line.txt")])) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wrong-field.jsonl", '{"body": "x"}\n', "record 1: expected text in field 'text', or 'messages', got 'body'"),
        ("number.jsonl", "3\n", "record 1: expected text in field 'text', or 'messages', got int"),
        ("broken.jsonl", '{"text": "a"}\n{\n', "record 2: expected a line of JSON"),
        ("broken.json", "{", "as JSON"),
        ("binary.txt", b"\xff\xfe\x00", "expected text in UTF-8"),
        ("empty.jsonl", "\n", "expected documents, found none"),
        ("missing.jsonl", None, "there is no such file"),
    ],
)
def test_bad_data_are_refused_by_name(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    """Protects the user's time: bad data are refused with file, record and reason."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        list(Corpus([str(tmp_path / name)]).in_order(0))
    assert name in str(caught.value) and message in str(caught.value)


def test_a_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    """Protects against a guessed split: a dataset of several is refused with their names."""
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list([{"text": "x"}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match=r"expected one split, found test, train; give .*/test"):
        Corpus([str(tmp_path / "d")])


# --- masks ------------------------------------------------------------------------------------------------------------


def test_text_is_learned_but_not_its_separator(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Protects the loss on text: every token is a target but the first and the separator."""
    text = "stir the butter into flour"
    example = Encoder(tokenizer)(text)
    assert tokenizer.decode(example.ids) == text + "<|im_end|>"
    assert example.labels == [IGNORED, *example.ids[1:-1], IGNORED]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation marks"])
def test_only_the_assistant_is_learned(template: str) -> None:
    """Protects the loss on conversations: only the assistant's turns are targets, with and without generation marks."""
    tokenizer = make_tokenizer(template)
    messages = [*conversation("stir the flour", "bake it"), *conversation("and then", "salt with butter")]
    example = Encoder(tokenizer)(messages)
    assert learned(tokenizer, example.labels) == "bake it<|im_end|>salt with butter<|im_end|>"
    assert tokenizer.decode(example.ids).count("<|im_start|>") == 4
    every = Encoder(tokenizer, loss_on="all")(messages)  # control: without the mask, the questions are learned too
    assert every.ids == example.ids and every.labels == [IGNORED, *every.ids[1:]]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """Protects the loss on conversations: where the turns cannot be found, the error says what to do."""
    only_last = "{% for message in messages[-1:] %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    messages = [*conversation("a", "b"), *conversation("c", "d")]
    with pytest.raises(InputError, match=r"rewrites earlier turns.*--loss-on all"):
        Encoder(make_tokenizer(only_last))(messages)
    with pytest.raises(InputError, match="expected a tokenizer with a chat template"):
        Encoder(make_tokenizer(None))(messages)
    picky = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"roles \['user', 'assistant', .*roles must alternate"):
        Encoder(make_tokenizer(picky))(messages)


# --- packing ----------------------------------------------------------------------------------------------------------


def test_rows_hold_every_token_once(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Protects packing: every token and label is there once, and positions restart exactly at documents."""
    encoder = Encoder(tokenizer)
    examples = [encoder(text) for text in sentences(30, 7)]
    rows = list(Rows(examples, 16, padding=0))
    stream = [token for example in examples for token in example.ids]
    packed = torch.stack([row["input_ids"] for row in rows]).flatten().tolist()
    assert packed[: len(stream)] == stream and len(packed) - len(stream) < 16
    labels = torch.stack([row["labels"] for row in rows]).flatten().tolist()
    assert labels[: len(stream)] == [label for example in examples for label in example.labels]
    assert set(labels[len(stream) :]) <= {IGNORED}
    for row in rows:  # positions count up, and start again exactly at documents and rows
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        assert starts[0] == 0 and all(row["input_ids"][i - 1] == tokenizer.eos_token_id for i in starts[1:])
        assert ((row["position_ids"].diff() == 1) | (row["position_ids"][1:] == 0)).all()


def test_conversations_are_never_cut_in_two(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Protects packing: a conversation stays in one row; what is cut or left out is counted."""
    encoder = Encoder(tokenizer)
    short = [encoder(conversation("stir", text)) for text in sentences(10, 8, words=4)]
    long = encoder(conversation("bake", " ".join(sentences(5, 9))))
    silent = encoder([{"role": "user", "content": "salt"}])
    rows = Rows([*short, long, silent], 40, padding=tokenizer.eos_token_id)
    found = list(rows)
    assert (rows.counts.truncated, rows.counts.empty) == (1, 1)
    assert all(row["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>") for row in found)
    answers = learned(tokenizer, torch.cat([row["labels"] for row in found]).tolist())
    assert answers.startswith("".join(f"{text}<|im_end|>" for text in sentences(10, 8, words=4)))
    assert "1 documents without anything to learn were left out; 1 conversations were cut" in str(rows.counts)


def test_documents_of_a_row_do_not_see_each_other(inputs: Path) -> None:
    """Protects packing: a packed document's logits are those of the document alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    model.config.use_cache = False
    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(inputs / "model"))
    examples = [encoder(text) for text in sentences(2, 6, words=6)]
    (row,) = Rows(examples, sum(len(example.ids) for example in examples), padding=0)
    second = len(examples[0].ids)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([examples[1].ids])).logits
        packed = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None]).logits[:, second:]
        joined = model(input_ids=row["input_ids"][None]).logits[:, second:]
    assert torch.allclose(packed, alone, atol=1e-5)
    assert not torch.allclose(joined, alone, atol=1e-3)  # control: without positions they do


@pytest.mark.parametrize("architecture, apart", [("Llama", True), ("OPT", False)])
def test_a_model_that_mixes_documents_is_told(
    architecture: str, apart: bool, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """OPT takes positions, and its attention mask ignores where they start again."""
    make = getattr(transformers, f"{architecture}Config")
    config = make(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **OPTIONS[architecture])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path)
    workload.load(str(tmp_path), "fp32", "cpu", Console())
    assert ("does not keep the documents of one row apart" in capsys.readouterr().out) != apart


def test_batches_repeat_in_another_order(inputs: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Protects repeated data: later epochs come in another order, the first one does not depend on them."""

    def batches(repeat: bool, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        corpus = Corpus([str(inputs / "general.jsonl"), str(inputs / "chat.jsonl")])
        made = Batches(corpus, Encoder(tokenizer), length=32, size=3, seed=seed, repeat=repeat)
        return list(islice(made, 200))

    once, again = batches(False), batches(True)
    assert len(once) < 200 == len(again)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(once[:-1], again, strict=False) for key in a)
    assert not any(torch.equal(once[0]["input_ids"], b["input_ids"]) for b in again[1:])  # no epoch starts alike
    assert not torch.equal(once[0]["input_ids"], batches(False, seed=1)[0]["input_ids"])


def test_nothing_to_learn_is_an_error_and_not_an_endless_search(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """Protects against hanging: data without targets are an error."""
    questions = [{"messages": [{"role": "user", "content": "stir"}]}]
    corpus = Corpus([str(write_jsonl(tmp_path / "q.jsonl", questions))])
    with pytest.raises(InputError, match=r"q\.jsonl: expected targets, found none"):
        next(iter(Batches(corpus, Encoder(tokenizer), length=32, size=3, seed=0, repeat=True)))


def test_real_text_is_packed(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Protects the bundled corpora: real text survives packing and decoding."""
    try:
        CORPORA["recipes"].locate()
    except InputError as missing:
        pytest.skip(str(missing))
    corpus = Corpus(["recipes"])
    batches = Batches(corpus, Encoder(tokenizer), length=64, size=2, seed=0)
    first = next(iter(batches))
    text = tokenizer.decode(first["input_ids"][0].tolist())
    assert str(next(corpus.in_order(0))).startswith(text.split("<|im_end|>")[0][:100])
