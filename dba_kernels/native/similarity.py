"""The read-only reduction before an update (inputs of eq. 4)."""

from __future__ import annotations

import torch

from ..stepdata import TensorBatch
from .descriptors import structs_of
from .library import address, execution, load


def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor) -> None:
    """⟨g_D, ĝ_G⟩ and ‖g_D‖² of every parameter of the batch (eq. 4's sums); one pass, 3 B/param for bf16 and int8."""
    structs, kept = structs_of([batch], [grads], with_state=False)
    load().dba_similarity(*execution(), structs, len(kept), address("sums", sums, torch.float64))
