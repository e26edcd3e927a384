"""Stage 1 in a loop of one's own: the collector behind :func:`dba_kernels.collect_global_gradient`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .base_model import Fingerprint, fingerprint, named_once
from .calibration import Loss, calibrate, mean_over_ranks
from .curvature import curvature_sums
from .curvature_records import check_kept, factor_format
from .distributed import fsdp_sharding, same_on_ranks
from .files import try_to_write
from .formats import check_count, check_iterable, check_name, check_path, check_tensor_of_one, check_type
from .global_gradient import GlobalGradient, Provenance, TensorStatistics, save_or_hand_over
from .identity import announce_unknown, dtypes_of, following
from .passes import MicroBatch, ShardedModel, Untouched, WholeModel
from .records import check_rank
from .snapshots import Snapshots
from .sums import GradientSums
from .tensor_files import check_name_of_file, to_json

WEIGHTINGS = ("tokens", "batch")


class GlobalGradientCollector:
    """Sums gradients at learning rate zero, in a loop of one's own; see :func:`collect_global_gradient`.

    Within ``with collector:`` the model is in evaluation mode (dropout off; modules' modes are restored one by one) and
    every trainable parameter has a hook that adds its gradient to an fp32 sum as soon as it is complete, and releases
    it. Memory beside the weights and activations: 4 bytes per parameter and one layer's gradients. Tied parameters are
    one parameter; a parameter that a batch does not use counts as a gradient of zero. (Hugging Face models checkpoint
    activations in training mode only, so not here: take smaller micro-batches instead.)

    A micro-batch with a non-finite loss is dropped before backward; a non-finite gradient drops this micro-batch from
    that tensor alone, sum and weight. Both are counted, stored and, at the end, warned about.

    With ``snapshot_path``, sums and counts are written there (whole or not at all) every ``snapshot_every``
    micro-batches, when the pass ends, and when an exception ends it between two micro-batches. If the file exists when
    the collector is made, it goes on from there, to the same bits as without the interruption: :meth:`remaining` skips
    what was consumed, which takes the same batches in the same order, and refuses others. So a finished collection is
    extended by giving more batches. The file takes 4 bytes per parameter and stays until you delete it. Other weights,
    dtypes or ``settings`` are refused. Batches are compared by their tensors, arrays, numbers and texts, through
    containers and attributes; where an object shows none of these, a warning says so before the first micro-batch.

    Several processes: with a whole model each (not wrapped in DistributedDataParallel), they accumulate on their own
    and call :meth:`reduce` once. A model sharded by FSDP2 stays sharded: sums are kept of the rows that a rank has, and
    one micro-batch is what all ranks together hand to :meth:`backward`, as many times each. FSDP2 averages gradients
    over ranks; losses are weighted before that, so that the result is the mean per token over all ranks' data (leave
    its ``set_gradient_divide_factor`` alone). Where one rank's loss is not finite, or one rank's rows of a gradient,
    all ranks' are dropped. Gradients stay until the backward pass ends. Each rank keeps two snapshots, named after
    ``snapshot_path`` and the rank, and the ranks go on from the last that all of them have.

    Args:
        model: the base model, as above.
        weighting, data, snapshot_path, snapshot_every, curvature: see :func:`collect_global_gradient`. Curvature takes
            4 bytes times (in + out) · (r + 16) of memory per linear map, and a whole model.
        settings: what else must be the same, by name, where a snapshot is continued: the loss, autocast, and so on.

    Raises:
        ValueError: a bad argument, a model without trainable parameters, flattened by FSDP1 or ZeRO or sharded by
            anything but FSDP2, or a snapshot of another collection.

    Example:
        >>> model = nn.Linear(8, 1)
        >>> collector = GlobalGradientCollector(model)
        >>> with collector:
        ...     for x in collector.remaining(torch.randn(3, 4, 8)):
        ...         collector.backward(model(x).square().mean(), tokens=4)
        >>> collector.finish(format="fp32").provenance.tokens
        12
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weighting: str = "tokens",
        data: str | Iterable[str] = (),
        snapshot_path: str | os.PathLike[str] | None = None,
        snapshot_every: int = 100,
        curvature: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        check_type("model", model, nn.Module)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("model: expected the bare model, got DistributedDataParallel; pass model.module")
        self.model = model
        self.weighting = check_name("weighting", weighting, WEIGHTINGS)
        self.data = (data,) if isinstance(data, str) else tuple(map(str, check_iterable("data", data, "names")))
        everything = named_once(model.named_parameters())
        self._params = {name: param for name, param in everything.items() if param.requires_grad}
        if not self._params:
            raise ValueError("model: expected parameters that require gradients, got none; unfreeze what to collect")
        sharding = fsdp_sharding(model)
        self._fingerprint: Fingerprint = fingerprint(everything.items())
        identity: dict[str, Any] = {"weighting": self.weighting, "data": list(self.data)}
        identity["fingerprint"] = self._fingerprint
        identity["settings"] = {"weight dtypes": dtypes_of(everything), **(settings or {})}
        second_order = None
        if curvature is not None:
            second_order = curvature_sums(model, self._params, curvature, sharding)
            identity["curvature"] = curvature
        self._sums = GradientSums(self._params, second_order)
        self._snapshots = Snapshots(snapshot_path, snapshot_every, identity, sharding)
        strategy = WholeModel if sharding.mesh is None else ShardedModel
        self._pass = strategy(self._params, self._sums, sharding)
        self._active = contextlib.ExitStack()
        self._untouched = Untouched(model, self._params)
        self._entered = False
        self._whole = True  # no micro-batch is half counted
        self._handed_out = ""  # digest of the data up to the micro-batch that remaining() has given last
        self._reduced = False
        self._finished = False
        self._snapshots.resume(self._sums)

    @property
    def consumed(self) -> int:
        """Micro-batches so far, dropped ones included."""
        return self._sums.progress.consumed

    # --- the pass -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> GlobalGradientCollector:
        self._active.enter_context(self._untouched)
        self._entered = True
        self._pass.watch(self._active)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._entered = False
        self._active.close()
        if kind is None:
            self._save(self._snapshots.save_rest)
        elif self._whole and self._pass.alone:  # other ranks need not have come as far
            with contextlib.suppress(RuntimeError, OSError):  # the exception that ends the pass is the one to see
                self._save(self._snapshots.save_rest)

    def _save(self, save: Callable[[GradientSums], None]) -> None:
        """A snapshot, of gradients at the weights that the collection began with."""
        self._untouched.check_content()
        save(self._sums)

    def backward(self, loss: torch.Tensor, tokens: int | torch.Tensor | None = None) -> None:
        """Add the gradient of one micro-batch; stands in for ``loss.backward()``.

        Args:
            loss: scalar, the micro-batch's mean loss.
            tokens: its number of target tokens; None counts the micro-batch as 1. 0 leaves it out. Of a sharded model
                it counts what this rank has; with 0 its loss must still be finite, or all ranks' are dropped.

        Raises:
            RuntimeError: outside of ``with``, after an earlier backward pass failed half-way, or the weights changed.
            ValueError: a number of tokens for some micro-batches and none for others.
        """
        self._check_usable()
        if not self._entered:
            raise RuntimeError(
                "backward(): expected to be called within 'with collector:', which makes it see gradients"
            )
        self._check_not_reduced("backward()")
        self._untouched.check(replaced=self._pass.alone)
        check_tensor_of_one("loss", loss)
        tokens = None if tokens is None else check_count("tokens", tokens)
        if tokens != 0 and not loss.requires_grad:
            raise ValueError("loss: expected one that depends on the model's parameters, got one without a gradient")
        if tokens is None and self._sums.curvature is not None:
            raise ValueError(
                "tokens: expected the number of target tokens, by which the curvature is scaled, got None; return "
                "(loss, number of tokens) from loss_fn"
            )
        here = MicroBatch(loss, tokens, self._weight_of(tokens), bool(torch.isfinite(loss)))
        batch = self._pass.agreed(here)
        progress = self._sums.progress
        self._whole = False
        progress.consumed += 1
        progress.data_digest = self._handed_out or progress.data_digest
        if batch.tokens == 0:
            progress.empty += 1
        elif not batch.finite:
            progress.dropped += 1
        else:
            progress.batches += 1
            progress.tokens += batch.tokens or 0
            self._pass.backward(batch)
        self._whole = True
        if self._snapshots.due(self._sums):
            self._save(self._snapshots.save)

    def _check_usable(self) -> None:
        if self._finished:
            raise RuntimeError("the collector is finished; make a new one")
        if self._pass.weight is not None:
            raise RuntimeError(
                "an earlier backward pass failed half-way; make a new collector, from the snapshot if any"
            )

    def _weight_of(self, tokens: int | None) -> float:
        if self.weighting == "batch":
            return 1.0
        progress = self._sums.progress
        if tokens != 0 and progress.batches > 0 and (progress.tokens > 0) != (tokens is not None):
            raise ValueError("tokens: expected a number for every micro-batch or for none; or use weighting='batch'")
        return 1.0 if tokens is None else float(tokens)

    def remaining(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches that were not consumed before the snapshot; each must go through :meth:`backward` once.

        Raises:
            ValueError: the skipped batches are not those of the snapshot.
            RuntimeError: a batch was left out.
        """
        path, done = self._snapshots.path, self.consumed
        if path is not None:
            batches = announce_unknown(batches)
        for position, batch, digest in following(batches, done, self._sums.progress.data_digest, path):
            self._handed_out = digest
            yield batch
            if self.consumed != position + 1:
                raise RuntimeError(f"batch {position}: expected one call of backward(), got {self.consumed - position}")

    # --- the result ---------------------------------------------------------------------------------------------------

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the sums of all ranks, once, after each has seen its part of the data; nothing with one process.

        Args:
            group: None for the default group.

        Raises:
            RuntimeError: a second time.
            ValueError: the model is sharded: its gradients are summed over the ranks already; or the ranks have
                different weights.
        """
        self._check_usable()
        self._check_not_reduced("reduce()")
        self._pass.check_reducible()
        digest = hashlib.sha256(to_json(self._fingerprint).encode()).digest()
        if not same_on_ranks(digest, next(iter(self._params.values())).device, group):
            raise ValueError(
                "reduce(): expected the same weights on every rank, got different ones; load the same checkpoint on "
                "all of them, or seed them alike"
            )
        self._sums.reduce(group)
        self._reduced = True

    def _check_not_reduced(self, what: str) -> None:
        if self._reduced:
            raise RuntimeError(
                f"{what}: expected before reduce(), got after it: sums of all ranks would be counted anew"
            )

    def finish(
        self, format: str | None = "int8", rank: int | None = None, *, save_to: str | os.PathLike[str] | None = None
    ) -> GlobalGradient:
        """Divide, compress and describe; the sums are freed as they are consumed.

        Of a sharded model one parameter is gathered at a time; the first rank compresses it and writes the file.

        Args:
            save_to: see :func:`collect_global_gradient`.

        Raises:
            ValueError: no micro-batch, or none with a finite gradient for some tensor; no ``save_to`` for a sharded
                model; see :meth:`GlobalGradient.from_tensors` too.
            OSError: the file cannot be written; the error's ``global_gradient`` is the result, in memory.
            RuntimeError: the weights changed meanwhile, or the rank that writes failed; with its message.
        """
        self._check_usable()
        self._untouched.check_content()
        check_kept(format, None if self._sums.curvature is None else self._sums.curvature.rank)
        shapes = {name: tuple(param.shape) for name, param in self._params.items()}
        if rank is not None:
            check_rank(rank, shapes)
        self.check_destination(save_to)
        self._sums.check_complete()
        self._sums.warn_dropped()
        self._finished = True
        self._pass.complete()
        statistics: dict[str, TensorStatistics] = {}
        means = self._sums.means(statistics)
        describe = functools.partial(self._describe, means, statistics, shapes, format, rank)
        if save_to is None:
            return describe()
        self._pass.where_written(lambda: save_or_hand_over(describe(), save_to), means)
        return GlobalGradient.load(save_to)

    def calibrate(
        self, found: GlobalGradient, batches: list[Any], loss_of: Loss, group: dist.ProcessGroup | None = None
    ) -> None:
        """Measure κ on some of the micro-batches and note it in what :meth:`finish` returned; see :mod:`.calibration`.

        Args:
            batches: about eight, the same each time for the same file.
            loss_of: micro-batch → (mean loss, number of target tokens).
            group: ranks, each with batches of its own, over which to take the mean.
        """
        own = calibrate(self.model, self._params, found.curvature, batches, loss_of)
        found.calibration = mean_over_ranks(own, next(iter(self._params.values())).device, group)

    def check_destination(self, save_to: str | os.PathLike[str] | None) -> None:
        """Refuse, before the long part, what :meth:`finish` would refuse after it: a file is made and removed there.

        Raises:
            ValueError: none for a sharded model, or a name that does not end in ``.safetensors``.
            OSError: nothing can be written there.
        """
        self._pass.check_destination(save_to)
        if save_to is not None:
            check_path("save_to", save_to)
            check_name_of_file(save_to, "save_to")
            self._pass.where_written(functools.partial(try_to_write, save_to))

    def _describe(
        self,
        means: Iterator[tuple[str, torch.Tensor]],
        statistics: dict[str, TensorStatistics],
        shapes: dict[str, tuple[int, ...]],
        format: str | None,
        rank: int | None,
    ) -> GlobalGradient:
        progress, second_order = self._sums.progress, self._sums.curvature
        found = () if second_order is None else second_order.curvatures(factor_format(format))
        return GlobalGradient.from_tensors(
            *((), "int8", None) if format is None else (means, format, rank),
            shapes=shapes,
            fingerprint=self._fingerprint,
            provenance=Provenance(
                batches=progress.batches,
                tokens=progress.tokens,
                weighting="tokens" if self.weighting == "tokens" and progress.tokens > 0 else "batch",
                data=self.data,
                data_digest=progress.data_digest,
                dropped_batches=progress.dropped,
                empty_batches=progress.empty,
            ),
            statistics=statistics,
            curvatures={name: (shapes[name], curvature) for name, curvature in found},
        )
