"""The contract sheet: registered operators, checks at the door, low rank above the backends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dba_kernels import operators, ops
from dba_kernels.formats import STORAGE_FORMATS, EncodedTensor
from dba_kernels.stepdata import Coefficient, Hyper, ParamTensors, Summary, TensorBatch

ROWS, COLS = 66, 70


def random_table(n: int) -> torch.Tensor:
    table = torch.zeros(n, Coefficient.COUNT, dtype=torch.float64)
    for column, value in (
        (Coefficient.GRAD_WEIGHT, 0.7),
        (Coefficient.GLOBAL_WEIGHT, 0.3),
        (Coefficient.BETA1, 0.9),
        (Coefficient.ONE_MINUS_BETA1, 0.1),
        (Coefficient.BETA2, 0.99),
        (Coefficient.ONE_MINUS_BETA2, 0.01),
        (Coefficient.STEP_SIZE, 1e-3),
        (Coefficient.INV_SQRT_BIAS_CORRECTION2, 2.0),
        (Coefficient.EPS, 1e-8),
        (Coefficient.STEP, 3.0),
    ):
        table[:, column] = value
    return table


def make_batch(global_grads: list, global_format: str, n: int = 2) -> tuple[TensorBatch, list[torch.Tensor]]:
    torch.manual_seed(0)
    params, exp_avgs = ([torch.randn(ROWS, COLS) for _ in range(n)] for _ in range(2))
    tensors = [
        ParamTensors(i, params[i], exp_avg=exp_avgs[i], exp_avg_sq=torch.rand(ROWS, COLS), global_grad=global_grads[i])
        for i in range(n)
    ]
    batch = TensorBatch("native", "fp32", global_format, tensors)
    return batch, [torch.randn(ROWS, COLS) for _ in range(n)]


OPCHECK = ("test_schema", "test_faketensor", "test_autograd_registration")


def test_opcheck_accumulate() -> None:
    """Protects ``torch.compile``: schema, fake and mutation of accumulate are what torch is told."""
    args = ([torch.zeros(4, 5)], [torch.randn(4, 5)], 1.0, torch.zeros(1, dtype=torch.float64), "reference")
    torch.library.opcheck(torch.ops.dba_kernels.accumulate, args, test_utils=OPCHECK)


@pytest.mark.parametrize("format", STORAGE_FORMATS)
def test_opcheck_encode_and_decode(format: str) -> None:
    """Protects ``torch.compile``: schema and fakes of encode and decode hold for every format."""
    tensor = torch.randn(ROWS, COLS)
    torch.library.opcheck(torch.ops.dba_kernels.encode, (tensor, format, "reference"), test_utils=OPCHECK)
    stored = ops.encode(tensor, format, backend="reference")
    args = (stored.codes, stored.scales, [ROWS, COLS], format, "reference")
    torch.library.opcheck(torch.ops.dba_kernels.decode, args, test_utils=OPCHECK)


def test_opcheck_similarity_and_step() -> None:
    """Protects ``torch.compile``: schemas, fakes and mutations of similarity and step are what torch is told."""
    stored = [ops.encode(torch.randn(ROWS, COLS), "int8", backend="reference") for _ in range(2)]
    batch, grads = make_batch(stored, "int8")
    sums = torch.zeros(2, 2, dtype=torch.float64)
    args = (*operators.flat(batch), grads, sums, "reference")
    torch.library.opcheck(torch.ops.dba_kernels.similarity, args, test_utils=OPCHECK)
    args = (*operators.flat(batch), grads, random_table(2), "reference")
    torch.library.opcheck(torch.ops.dba_kernels.step, args, test_utils=OPCHECK)


def test_opcheck_coefficients() -> None:
    """Protects ``torch.compile``: schema, fake and mutations of coefficients are what torch is told."""
    n = 3
    tensors = (
        torch.rand(n, 2, dtype=torch.float64),
        torch.ones(n, dtype=torch.float64),
        torch.tensor([[1e-5, 0.9, 0.99, 1e-8, 0.0, 1.0]], dtype=torch.float64),
        torch.zeros(n, dtype=torch.int64),
        torch.arange(n),
        torch.zeros(n),
        torch.zeros(n, 2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(n, Coefficient.COUNT, dtype=torch.float64),
        torch.zeros(n, 2, dtype=torch.float64),
        torch.zeros(Summary.COUNT, dtype=torch.float64),
    )
    assert tensors[2].shape[1] == Hyper.COUNT
    scalars = (0.2, 1000, 0.5, "cosine", "tensor", (0.0, 2.0), 1.0, True, 0.0, 1, "reference")
    args = (*tensors, None, None, None, None, *scalars)
    torch.library.opcheck(torch.ops.dba_kernels.coefficients, args, test_utils=OPCHECK)


def test_registered_operator_equals_the_eager_call() -> None:
    """Tracing takes another door into the same computation: the same bits."""
    stored = [ops.encode(torch.randn(ROWS, COLS), "int4", backend="reference") for _ in range(2)]
    eager, grads = make_batch(stored, "int4")
    traced, _ = make_batch(stored, "int4")
    ops.step(eager, grads, random_table(2), backend="reference")
    operators.step(traced, grads, random_table(2), "reference")
    assert all(torch.equal(a, b) for a, b in zip(eager.all("param"), traced.all("param"), strict=True))


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_low_rank_equals_its_dense_rebuild(backend: str) -> None:
    """A low-rank ĝ_G is rebuilt tensor by tensor into one buffer; similarity and step see the dense tensor."""
    exact = [torch.randn(ROWS, 8) @ torch.randn(8, COLS) for _ in range(2)]
    low = [ops.factorize(tensor, 16, "fp32") for tensor in exact]
    dense = [EncodedTensor("fp32", (ROWS, COLS), ops.decode(stored, "reference")) for stored in low]
    one, grads = make_batch(low, "lowrank")
    two, _ = make_batch(dense, "fp32")
    sums = torch.zeros(2, 2, 2, dtype=torch.float64)
    for i, batch in enumerate((one, two)):
        ops.similarity(batch, grads, sums[i], backend=backend)
        ops.step(batch, grads, random_table(2), backend=backend)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
    for a, b, tensor in zip(one.all("param"), two.all("param"), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (a - b).abs().max() < 1e-3 * tensor.abs().max()
    # Negative control: another rank is another gradient.
    worse, _ = make_batch([ops.factorize(tensor, 4, "fp32") for tensor in exact], "lowrank")
    ops.step(worse, grads, random_table(2), backend=backend)
    assert (worse.tensors[0].param - two.tensors[0].param).abs().max() > 1e-4


@pytest.mark.parametrize("place", ["dba_kernels/reference", "dba_kernels/kernels", "csrc"])
def test_every_equation_is_tagged_in_every_backend(place: str) -> None:
    """A reader finds eq. 3 of the README at the same step of reference, Triton and C++."""
    root = Path(__file__).resolve().parent.parent
    text = "".join(path.read_text() for path in sorted((root / place).iterdir()) if path.is_file())
    assert {int(n) for n in re.findall(r"\beq\. (\d)", text)} >= {1, 2, 3, 4, 5, 7, 8}


def test_wrong_shapes_dtypes_and_ranks_are_named() -> None:
    """Protects the caller: wrong shapes, dtypes, formats and ranks are refused by name."""
    norms = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape \(4,\), got \(5,\)"):
        ops.accumulate([torch.zeros(4)], [torch.zeros(5)], 1.0, norms)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected float32, bfloat16 or float16, got torch.float64"):
        ops.accumulate([torch.zeros(4)], [torch.zeros(4, dtype=torch.float64)], 1.0, norms)
    with pytest.raises(ValueError, match=r"format: expected one of 'fp32', .* got 'int2'"):
        ops.encode(torch.zeros(4, 4), "int2")
    with pytest.raises(ValueError, match=r"rank: expected 1 <= rank <= 4 for shape .*, got 5"):
        ops.factorize(torch.zeros(4, 6), 5, "fp32")
