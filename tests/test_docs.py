"""What the documentation shows must run: doctests of the public modules, the README's Python, the command in CI."""

from __future__ import annotations

import doctest
import importlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dba_kernels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "dba_kernels/integrations/README.md", "bench/README.md", "bench/quality/README.md")
MODULES = (
    "schedule",
    "backends",
    "batches",
    "base_model",
    "global_gradient",
    "collect",
    "optim",
    "integrations.transformers",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    """Protects the docstrings: every example in them gives what it shows."""
    module = importlib.import_module(f"dba_kernels.{name}")
    assert doctest.testmod(module).failed == 0


def test_some_docstring_examples_were_found() -> None:
    """Negative control of the test above: it would also pass without a single example."""
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"dba_kernels.{name}") for name in MODULES]
    examples = [example for module in modules for test in finder.find(module) for example in test.examples]
    assert len(examples) >= 10


def test_every_public_name_has_a_docstring() -> None:
    """Protects ``help()``: every public name says what it is."""
    for name in dba_kernels.__all__:
        assert (getattr(dba_kernels, name).__doc__ or "").strip(), name


def python_blocks() -> list[object]:
    """Every Python block of every document, named after its document and its first line."""
    blocks = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            blocks.append(pytest.param(block, id=f"{document}: {block.splitlines()[0][:40]}"))
    return blocks


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun sets for a job of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("fresh_accelerator", "one_rank")
@pytest.mark.parametrize("block", python_blocks())
def test_python_of_the_documents_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of the documents runs as written, in an empty folder, on a small model that it is given."""
    from bench.models import llama

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 128, (8, 2, 16))]
    model = llama(vocab_size=128, num_hidden_layers=1)
    dba_kernels.collect_global_gradient(model, text[:2]).save(tmp_path / "global_gradient.safetensors")
    scope = {"model": model, "general_batches": text, "domain_batches": text[:4]}
    scope["dataset"] = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 128, (8, 16))]
    before = [param.detach().clone() for param in model.parameters()]
    exec(compile(block, "README.md", "exec"), scope)
    if "train()" in block or "step()" in block:
        after = [getattr(param, "full_tensor", lambda p=param: p)() for param in model.parameters()]
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_ci_runs_the_readme_command() -> None:
    """.ci/run reads its command from the README: there is one, and it passes the tests."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    match = re.search(r"^# Pass the tests.*\n(.*)\n```$", README, re.MULTILINE)
    assert match and "pytest" in match[1] and "torch==" in match[1]
