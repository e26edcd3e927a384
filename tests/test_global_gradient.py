"""The stored global gradient: what is written is what is read, and everything else is refused with a fix."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dba_kernels import ops, tensor_files
from dba_kernels.base_model import check_weights
from dba_kernels.formats import STORAGE_FORMATS
from dba_kernels.global_gradient import GlobalGradient, Provenance, TensorStatistics, fingerprint, normalize_name
from dba_kernels.records import digest, squared_norm

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = [(name, None) for name in STORAGE_FORMATS] + [("bf16", 12), ("int8", 12)]


def gradients(seed: int = 0) -> dict[str, torch.Tensor]:
    """Matrices, a kernel, ragged rows, a vector, a scalar, nothing, and zeros; of low rank plus noise where 2-D."""
    g = torch.Generator().manual_seed(seed)
    low_rank = torch.randn(130, 6, generator=g) @ torch.randn(6, 200, generator=g)
    return {
        "layers.0.weight": low_rank + 0.1 * torch.randn(130, 200, generator=g),
        "layers.1.weight": 1e-5 * torch.randn(67, 101, generator=g),
        "conv.weight": torch.randn(40, 17, 3, 3, generator=g),
        "norm.weight": torch.randn(300, generator=g),
        "scale": torch.tensor(-2.5),
        "nothing": torch.zeros(0, 4),
        "unused.weight": torch.zeros(80, 80),
    }


def model_of(tensors: dict[str, torch.Tensor], seed: int = 1, dtype: torch.dtype = torch.float32) -> dict:
    """Named parameters of the shapes of ``tensors``."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(t.shape, generator=g, dtype=torch.float32).to(dtype))
        for name, t in tensors.items()
    }


def small() -> GlobalGradient:
    tensors = {"a.weight": torch.randn(64, 66, generator=torch.Generator().manual_seed(3)), "b": torch.arange(5.0)}
    return GlobalGradient.from_tensors(
        tensors, "int4", fingerprint=fingerprint(model_of(tensors).items()), provenance=Provenance(3, 40, data=("x",))
    )


def folder_state(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize(("format", "rank"), VARIANTS)
def test_round_trip(tmp_path: Path, format: str, rank: int | None, shard_bytes: int | None) -> None:
    """Protects the file: every code, record and digest comes back bit for bit, single and sharded."""
    gg = GlobalGradient.from_tensors(gradients(), format, rank)
    path = gg.save(tmp_path / "gg.safetensors", shard_bytes)
    loaded = GlobalGradient.load(path)
    loaded.verify()
    assert loaded.path == path and (path.suffix == ".json") == (shard_bytes is not None)
    assert loaded.records == gg.records and loaded.digest == gg.digest and loaded.nbytes == gg.nbytes
    assert loaded.names == list(gradients())
    for name, exact in gradients().items():
        assert torch.equal(loaded[name], gg[name]) and loaded[name].dtype == torch.float32
        assert loaded[name].shape == exact.shape
        assert digest(loaded.stored(name)) == digest(gg.stored(name))
    assert GlobalGradient.from_tensors(gradients(1), format, rank).digest != gg.digest  # negative control


def test_readable_by_the_safetensors_package(tmp_path: Path) -> None:
    """Protects the format: its own package reads every code, and the shards are the hub's layout."""
    gg = GlobalGradient.from_tensors(gradients(), "int8")
    whole = load_file(gg.save(tmp_path / "a.safetensors"))
    index_path = gg.save(tmp_path / "b.safetensors", 20_000)
    index = json.loads(index_path.read_text())
    shards = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert len(shards) >= 3 and set(index["weight_map"]) == set(whole)
    for key, shard in index["weight_map"].items():
        assert torch.equal(shards[shard][key], whole[key])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values()) == gg.nbytes
    stored = gg.stored("layers.0.weight")
    assert torch.equal(whole["layers.0.weight/codes"], stored.codes)
    assert torch.equal(whole["layers.0.weight/scales"], stored.scales)
    sizes = [(tmp_path / name).stat().st_size for name in shards]
    assert max(sizes) < 30_000  # 20,000 or one tensor (26,000 codes), and a header


def test_same_content_same_bytes(tmp_path: Path) -> None:
    """Protects reproducibility: no timestamps, no map order, no dependence on the number of threads."""
    g = torch.Generator().manual_seed(0)
    many = {f"{i}": torch.randn(50, 1000, generator=g) for i in range(40)}
    written = []
    threads = torch.get_num_threads()
    for count in (1, 3, 4):
        torch.set_num_threads(count)
        gg = GlobalGradient.from_tensors(many, "int8", provenance=Provenance(2, 7, data=("wiki",)))
        written.append(gg.save(tmp_path / f"{len(written)}.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert written[0] == written[1] == written[2]
    other = GlobalGradient.from_tensors(many, "int8", provenance=Provenance(3, 7, data=("wiki",)))
    assert other.save(tmp_path / "other.safetensors").read_bytes() != written[0]
    assert other.digest == gg.digest  # what is stored is the same, its description is not


def test_loading_is_lazy(tmp_path: Path) -> None:
    """Protects memory: opening 16 MiB maps it; only touching a tensor reads it (resident pages as the witness)."""
    path = GlobalGradient.from_tensors({"w": torch.ones(2048, 2048)}, "fp32").save(tmp_path / "big.safetensors")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    gg = GlobalGradient.load(path)
    assert gg.global_sq("w") == 2048**2
    opened = resident()
    gg.stored("w")
    touched = resident()
    assert opened - before < 2 << 20
    assert touched - opened > 12 << 20  # negative control: verification reads it all


@pytest.mark.parametrize(("format", "rank"), VARIANTS)
def test_rows_of_a_shard(format: str, rank: int | None) -> None:
    """Protects row sharding: any rows decode to those rows of the whole."""
    gg = GlobalGradient.from_tensors(gradients(), format, rank)
    for name in ("layers.0.weight", "layers.1.weight", "conv.weight", "norm.weight"):
        whole = gg[name]
        rows = len(whole)
        for start, stop in ((0, rows), (0, 1), (rows // 3, rows // 2), (rows - 1, rows), (5, 5)):
            part = ops.decode(gg.stored(name, rows=(start, stop)))
            limit = 0.0 if rank is None else 1e-5 * whole.abs().max().item()  # the order of a product's sum
            assert part.shape == whole[start:stop].shape
            assert part.numel() == 0 or (part - whole[start:stop]).abs().max() <= limit
        assert not torch.equal(ops.decode(gg.stored(name, rows=(1, 2))), whole[:1])


def test_mapping() -> None:
    """Protects look-up: wrapped names find the bare tensor, and a decoded tensor is the caller's own."""
    gg = GlobalGradient.from_tensors({"module.norm.weight": torch.ones(8)})
    assert list(gg) == ["norm.weight"] and "module._orig_mod.norm.weight" in gg and len(gg) == 1
    gg["module.norm.weight"].zero_()
    assert torch.equal(gg["norm.weight"], torch.ones(8)) and gg.global_sq("norm.weight") == 8.0
    with pytest.raises(KeyError, match=r"expected one of 1 stored names, got 'norm.bias'"):
        gg.stored("norm.bias")


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.a.weight", "a.weight"),
        ("module.module.a.weight", "a.weight"),
        ("_orig_mod.a.weight", "a.weight"),
        ("module._orig_mod.a.weight", "a.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("a._checkpoint_wrapped_module.b.weight", "a.b.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("module.base_model.model.a.base_layer.weight", "a.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.score.modules_to_save.my_adapter.dense.bias", "score.dense.bias"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.original_module.weight"),
        ("modules_to_save.weight", "modules_to_save.weight"),
        ("a.weight", "a.weight"),
        ("a.module.weight", "a.module.weight"),
        ("base_model.weight", "base_model.weight"),
        ("module", "module"),
    ],
)
def test_normalize_name(name: str, bare: str) -> None:
    """Protects binding by name: wrappers' parts go, the model's own stay."""
    assert normalize_name(name) == bare
    assert normalize_name(bare) == bare


# --- what is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "rank"), VARIANTS)
def test_recorded_measures(format: str, rank: int | None) -> None:
    """Protects the metadata: norm, error, cosine and energy against numpy in float64."""
    gg = GlobalGradient.from_tensors(gradients(), format, rank)
    for name, tensor in gradients().items():
        exact, stored, record = tensor.double().numpy(), gg[name].double().numpy(), gg.records[name]
        assert record.squared_norm == pytest.approx((stored**2).sum(), rel=1e-12, abs=0.0)
        if not exact.any():
            assert (record.relative_error, record.cosine, record.energy) == (0.0, 1.0, 1.0)
            continue
        error = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
        cosine = (stored * exact).sum() / np.linalg.norm(stored) / np.linalg.norm(exact)
        # low rank: the product's rows are summed in another order when it is made by parts
        close = {"rel": 1e-9 if rank is None else 1e-4, "abs": 0.0 if rank is None else 1e-7}
        assert record.relative_error == pytest.approx(error, **close)
        assert record.cosine == pytest.approx(cosine, rel=1e-9 if rank is None else 1e-6)
        if record.rank is None:
            assert record.energy == 1.0
        else:
            sigma = np.linalg.svd(exact.reshape(len(exact), -1), compute_uv=False)
            assert record.energy == pytest.approx((sigma[:rank] ** 2).sum() / (sigma**2).sum(), rel=1e-5)
            assert record.energy != pytest.approx((sigma[: rank - 1] ** 2).sum() / (sigma**2).sum(), rel=1e-5)
    assert gg.records["norm.weight"].format == gg.records["scale"].format == "fp32"


def test_squared_norm_is_of_what_is_stored() -> None:
    """Protects the similarity: with 4 bits the stored norm is another one than the exact norm."""
    exact = gradients()["layers.1.weight"]
    gg = GlobalGradient.from_tensors({"w": exact}, "int4")
    assert abs(gg.global_sq("w") / squared_norm(exact) - 1) > 1e-4
    assert gg.global_sq("w") == pytest.approx(float(gg["w"].double().square().sum()), rel=1e-12)


def test_rank_only_where_it_is_smaller() -> None:
    """Protects r < m·n / (m + n): larger matrices are factorised, smaller ones stay dense, none at all is an error."""
    gg = GlobalGradient.from_tensors(gradients(), "int8", rank=40)
    ranks = {name: r.rank for name, r in gg.records.items() if r.rank}
    assert ranks == {"layers.0.weight": 40, "layers.1.weight": 40}  # 130·200/330 = 78.8, 67·101/168 = 40.3
    assert GlobalGradient.from_tensors(gradients(), "int8", rank=41).records["layers.1.weight"].rank is None
    with pytest.raises(ValueError, match=r"rank: .* got 79; the largest rank that saves bytes is 78, for 'layers.0"):
        GlobalGradient.from_tensors(gradients(), "int8", rank=79)
    with pytest.raises(ValueError, match=r"rank: .* got 1; no tensor is a large matrix"):
        GlobalGradient.from_tensors({"norm": torch.ones(9)}, rank=1)
    with pytest.raises(ValueError, match=r"rank: .* got 0"):
        GlobalGradient.from_tensors(gradients(), rank=0)


def test_statistics_are_kept(tmp_path: Path) -> None:
    """Protects the noise estimate's way into the file."""
    known = {"w": TensorStatistics(3.0, 0.5, 2), "v": TensorStatistics(-1.0, 2.0)}
    gg = GlobalGradient.from_tensors({"w": torch.ones(3), "v": torch.ones(2)}, statistics=known)
    loaded = GlobalGradient.load(gg.save(tmp_path / "gg.safetensors"))
    assert (loaded.records["w"].signal_to_noise, loaded.records["w"].dropped) == (6.0, 2)
    assert loaded.records["w"].split_half_cosine == 0.75
    assert loaded.records["v"].split_half_cosine == -1 / 3
    assert loaded.signal_to_noise == 2.0 / 2.5
    unknown = GlobalGradient.from_tensors({"w": torch.ones(3)})
    assert unknown.signal_to_noise is None and unknown.records["w"].split_half_cosine is None


# --- the base model ---------------------------------------------------------------------------------------------------


def test_fingerprint_agrees_across_dtypes() -> None:
    """Protects fp32 collection with bf16 or fp16 fine-tuning, whichever way the weights were rounded; 3,200 samples
    over 10 decades, fp16's subnormals and zeros among them. Two bf16 ulps away is another model."""
    g = torch.Generator().manual_seed(0)
    params = {
        f"p{i}": torch.randn(16, generator=g) * 10.0 ** (torch.rand(16, generator=g) * 10 - 9) for i in range(200)
    }
    stored = fingerprint(params.items())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_weights(stored, {name: p.to(dtype) for name, p in params.items()})
    differ = sum(int((p.half().bfloat16() != p.bfloat16()).sum()) for p in params.values())
    assert differ > 50  # double rounding does happen, so the tolerance is needed
    refused = 0
    for name, p in params.items():
        bits = p.bfloat16().view(torch.int16) + 2  # two ulps further from zero
        with contextlib.suppress(ValueError):
            check_weights(stored, {name: bits.view(torch.bfloat16)})
            refused -= 1
        refused += 1
    assert refused == 200


def test_check_model_accepts() -> None:
    """Protects the start of a run: wrappers' names, frozen extras, ties and moved weights of a resumed run."""
    tensors = gradients()
    model = model_of(tensors)
    gg = GlobalGradient.from_tensors(tensors, fingerprint=fingerprint(model.items()))
    gg.check_model(model.items())
    gg.check_model([(f"module._orig_mod.{name}", p.data.bfloat16()) for name, p in model.items()])
    gg.check_model([*model.items(), *model.items()])  # tied: one tensor under its name twice
    gg.check_model([*model.items(), ("frozen", torch.ones(3))])
    gg.check_model(model_of(tensors, seed=9).items(), weights=False)
    without = {name: p for name, p in model.items() if name != "scale"}
    gg.check_model(without.items(), extra="ignore")
    gg.check_model([*model.items(), ("new", torch.nn.Parameter(torch.ones(3)))], missing="ignore")


def test_check_model_refuses() -> None:
    """Protects against the wrong model; each error names the tensor, both sides and the fix."""
    tensors = gradients()
    model = model_of(tensors)
    gg = GlobalGradient.from_tensors(tensors, fingerprint=fingerprint(model.items()))
    with pytest.raises(ValueError, match=r"expected weight .* got .* sampled weights differ.*collect again"):
        gg.check_model(model_of(tensors, seed=9).items())
    one_moved = dict(model) | {"norm.weight": torch.nn.Parameter(model["norm.weight"].detach() * 1.02)}
    with pytest.raises(ValueError, match=r"'norm.weight': expected weight"):
        gg.check_model(one_moved.items())
    with pytest.raises(ValueError, match=r"'layers.2.weight': .* \(1 of 8 are missing; the closest name is 'layers"):
        gg.check_model([*model.items(), ("layers.2.weight", torch.nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match=r"'scale': expected a parameter of that name, .* pass all of model.named"):
        gg.check_model([(name, p) for name, p in model.items() if name != "scale"])
    reshaped = dict(model) | {"norm.weight": torch.nn.Parameter(torch.ones(301))}
    with pytest.raises(ValueError, match=r"'norm.weight': expected shape \(300,\) .* got \(301,\); load the model"):
        gg.check_model(reshaped.items(), weights=False)
    with pytest.raises(ValueError, match=r"expected unique names, got a second 'scale'"):
        gg.check_model([*model.items(), ("module.scale", torch.ones(()))])
    with pytest.raises(ValueError, match="missing: expected one of 'error', 'ignore'; got 'warn'"):
        gg.check_model(model.items(), missing="warn")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_refused(bad: float) -> None:
    """Protects every later step: NaN and Inf are refused when the gradient is made."""
    tensor = torch.ones(70, 70)
    tensor[3, 4] = bad
    with pytest.raises(ValueError, match=r"tensor 'w': expected finite values, got 1 of 4900 NaN or infinite"):
        GlobalGradient.from_tensors({"w": tensor})


def test_non_finite_in_a_file_is_refused(tmp_path: Path) -> None:
    """Protects against files of other writers: NaN is refused even where every digest fits."""
    gg = GlobalGradient.from_tensors({"w": torch.ones(8)})
    gg.stored("w").codes[2] = math.nan
    record = gg.records["w"]
    gg.records["w"] = type(record)(**{**vars(record), "digest": digest(gg.stored("w"))})
    path = gg.save(tmp_path / "gg.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'w' in .*expected finite codes, got NaN or Inf"):
        GlobalGradient.load(path).stored("w")


def test_bad_arguments() -> None:
    """Protects from_tensors: format, dtype, names and range."""
    with pytest.raises(ValueError, match=r"format: expected one of 'fp32', .* got 'int3'"):
        GlobalGradient.from_tensors(gradients(), "int3")
    with pytest.raises(ValueError, match=r"tensor 'w': expected a floating-point dtype, got torch.int32"):
        GlobalGradient.from_tensors({"w": torch.ones(3, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"tensor 'module.w': expected unique names, got a second 'w'"):
        GlobalGradient.from_tensors({"w": torch.ones(3), "module.w": torch.ones(3)})
    with pytest.raises(ValueError, match=r"tensor 'w': values beyond the range of format 'fp16'"):
        GlobalGradient.from_tensors({"w": torch.full((70, 70), 1e6)}, "fp16")


def test_bad_paths(tmp_path: Path) -> None:
    """Protects load and save from names and files of another kind."""
    with pytest.raises(ValueError, match=r"expected a name that ends in '.safetensors', got .*gg.bin"):
        small().save(tmp_path / "gg.bin")
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1"):
        small().save(tmp_path / "gg.safetensors", 0)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gg.safetensors"):
        GlobalGradient.load(tmp_path / "gg.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign.safetensors: .*no description by this library"):
        GlobalGradient.load(tmp_path / "foreign.safetensors")
    tensor_files.save_tensors(tmp_path / "other.safetensors", {}, {"kind": "collection snapshot"})
    with pytest.raises(ValueError, match="expected a global gradient, got a collection snapshot"):
        GlobalGradient.load(tmp_path / "other.safetensors")
    newer = {"kind": "global gradient", "format_version": 3, "library_version": "9.9"}
    tensor_files.save_tensors(tmp_path / "newer.safetensors", {}, newer)
    with pytest.raises(ValueError, match=r"expected format version 1 or 2, got 3, written by dba_kernels 9.9; install"):
        GlobalGradient.load(tmp_path / "newer.safetensors")


def test_description_must_fit_the_tensors(tmp_path: Path) -> None:
    """Protects against a file whose header names other tensors, or other shapes, than it holds."""
    content = small()._content()
    tensors = {key: t for key, t in load_file(small().save(tmp_path / "good.safetensors")).items()}
    path = tmp_path / "bad.safetensors"
    tensor_files.save_tensors(path, {key: t for key, t in tensors.items() if key != "b/codes"}, content)
    with pytest.raises(ValueError, match=r"tensor 'b/codes' is missing"):
        GlobalGradient.load(path)
    tensor_files.save_tensors(path, tensors | {"c/codes": torch.ones(2)}, content)
    with pytest.raises(ValueError, match=r"tensor 'c/codes' is not described"):
        GlobalGradient.load(path)
    tensor_files.save_tensors(path, tensors | {"b/codes": torch.ones(6)}, content)
    with pytest.raises(ValueError, match=r"'b/codes': expected \('F32', \(5,\)\), got \('F32', \(6,\)\)"):
        GlobalGradient.load(path)
    tensor_files.save_tensors(path, tensors | {"b/codes": torch.ones(5)}, content)
    with pytest.raises(ValueError, match=r"tensor 'b' in .*expected content with digest"):
        GlobalGradient.load(path).verify()
    tensor_files.save_tensors(path, tensors, content)
    GlobalGradient.load(path).verify()  # negative control: only the tampering was refused


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    """Protects against partial copies: every 37th length below the whole is refused when it is opened."""
    path = small().save(tmp_path / "gg.safetensors")
    whole = path.read_bytes()
    lengths = [*range(0, len(whole), 37), len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"gg.safetensors: .* truncated, corrupt or of another kind"):
            GlobalGradient.load(path)
    assert len(lengths) > 100
    path.write_bytes(whole)
    GlobalGradient.load(path).verify()


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    """Protects every byte of the file, header and padding included: one flipped bit in each, at a random place in the
    byte, is refused on opening or when the tensors are read."""
    path = small().save(tmp_path / "gg.safetensors")
    whole = path.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8, len(whole))
    accepted = []
    with open(path, "r+b", buffering=0) as file:
        for position, bit in enumerate(bits.tolist()):
            os.pwrite(file.fileno(), bytes([whole[position] ^ 1 << bit]), position)
            with contextlib.suppress(ValueError):
                GlobalGradient.load(path).verify()
                accepted.append((position, bit))
            os.pwrite(file.fileno(), whole[position : position + 1], position)
    assert accepted == [] and len(whole) > 4000
    assert path.read_bytes() == whole
    GlobalGradient.load(path).verify()


def test_shards_are_checked(tmp_path: Path) -> None:
    """Protects sharded files: a missing, exchanged or lone shard and a damaged index are refused."""
    path = tmp_path / "gg.safetensors"
    index = GlobalGradient.from_tensors(gradients(), "int8").save(path, 20_000)
    shards = sorted(tmp_path.glob("gg-*.safetensors"))
    assert GlobalGradient.load(path).path == index  # the name given to save() finds the index
    with pytest.raises(ValueError, match=r"expected a whole set, got one shard; load gg.safetensors.index.json"):
        GlobalGradient.load(shards[0])
    content = shards[0].read_bytes()
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[0].name}; copy all shards beside the index"):
        GlobalGradient.load(index)
    shutil.copy(shards[1], shards[0])
    with pytest.raises(ValueError, match="is not in its shard"):
        GlobalGradient.load(index)
    shards[0].write_bytes(content)
    text = index.read_text()
    assert '"batches\\":0' in text
    for damaged in (text[:-20], "{}", "[]", text.replace('"batches\\":0', '"batches\\":1')):
        index.write_text(damaged)
        with pytest.raises(ValueError, match="truncated, corrupt or of another kind"):
            GlobalGradient.load(index)
    index.write_text(text)
    GlobalGradient.load(index).verify()


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_replacing_cleans_up(tmp_path: Path) -> None:
    """Protects the folder: shards of the replaced gradient go, whichever way it changes; strangers stay."""
    path = tmp_path / "gg.safetensors"
    (tmp_path / "gg-notes.safetensors").write_bytes(b"mine")
    first, second = (GlobalGradient.from_tensors(gradients(seed), "int8") for seed in (0, 1))
    first.save(path, 20_000)
    before = set(folder_state(tmp_path))
    second.save(path, 20_000)
    after = set(folder_state(tmp_path))
    assert len(after) == len(before) and len(before & after) == 2  # the index and the stranger
    assert GlobalGradient.load(path).digest == second.digest
    first.save(path)
    assert set(folder_state(tmp_path)) == {"gg.safetensors", "gg-notes.safetensors"}
    assert GlobalGradient.load(path).digest == first.digest
    second.save(path, 20_000)
    assert not path.exists() and GlobalGradient.load(path).digest == second.digest
    GlobalGradient.load(path).save(path, 20_000)  # onto the files that it is mapped from
    assert set(folder_state(tmp_path)) == after


@contextlib.contextmanager
def file_size_limit(limit: int):
    """No file may grow beyond ``limit`` bytes: writes fail with EFBIG, as they fail with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("limit", [0, 10_000, 27_500])
def test_full_disk_leaves_the_old_file(tmp_path: Path, shard_bytes: int | None, limit: int) -> None:
    """Protects the older gradient: a write that fails, at the start, in the middle or in a later shard, changes nothing
    and leaves nothing. Without the limit the same call replaces it."""
    path = tmp_path / "gg.safetensors"
    last_is_largest = [dict(reversed(gradients(seed).items())) for seed in (0, 1)]
    old, new = (GlobalGradient.from_tensors(tensors, "fp32") for tensors in last_is_largest)
    old.save(path, shard_bytes)
    before = folder_state(tmp_path)
    with (
        file_size_limit(limit),
        pytest.raises(OSError, match=r"cannot write .*gg.*; an older file is untouched; choose"),
    ):
        new.save(path, shard_bytes)
    assert folder_state(tmp_path) == before
    assert GlobalGradient.load(path).digest == old.digest
    new.save(path, shard_bytes)
    assert GlobalGradient.load(path).digest == new.digest and folder_state(tmp_path) != before


def test_failure_after_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against errors that only fsync reports, and against an interruption at that point."""
    path = small().save(tmp_path / "gg.safetensors")
    before = folder_state(tmp_path)
    for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):

        def fail(descriptor: int, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(type(error)):
                GlobalGradient.from_tensors(gradients()).save(path)
        assert folder_state(tmp_path) == before


FULL_DISK = """
mount -t tmpfs -o size=64k tmpfs "$1" && "$2" - "$1" <<'END'
import errno, os, sys, torch
from dba_kernels.global_gradient import GlobalGradient
path = sys.argv[1] + "/gg.safetensors"
old = GlobalGradient.from_tensors({"w": torch.ones(70, 70)}, "fp32")
old.save(path)
try:
    GlobalGradient.from_tensors({"w": torch.ones(200, 200)}, "fp32").save(path)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert os.listdir(sys.argv[1]) == ["gg.safetensors"] and GlobalGradient.load(path).digest == old.digest
    GlobalGradient.from_tensors({"w": torch.zeros(70, 70)}, "fp32").save(path)
    assert GlobalGradient.load(path).digest != old.digest
    print("refused and intact")
END
"""


def test_really_full_disk(tmp_path: Path) -> None:
    """Protects against ENOSPC itself, on a 64 KiB tmpfs in a user namespace, where those are allowed."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["sh", "-c", 'mount -t tmpfs tmpfs "$1"', "sh", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*unshare, *mount], capture_output=True).returncode:
        pytest.skip("no user namespaces here: test_full_disk_leaves_the_old_file covers it by RLIMIT_FSIZE")
    command = [*unshare, "sh", "-c", FULL_DISK, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "refused and intact\n", done.stderr


@pytest.mark.parametrize("kind", ["no folder", "a file in its place", "not writable"])
def test_unwritable_output(tmp_path: Path, kind: str) -> None:
    """Protects the message: which file, why, and what to do."""
    folder = tmp_path / "out"
    if kind == "a file in its place":
        folder.write_text("")
    if kind == "not writable":
        folder.mkdir(mode=0o555)
        if os.access(folder, os.W_OK):
            folder = Path("/proc/self")  # root may write anywhere but here
    with pytest.raises(OSError, match=r"cannot write .*gg.safetensors: .*choose a folder that exists, is writable"):
        small().save(folder / "gg.safetensors")


KILLED = """
import os, signal, sys
import torch
from dba_kernels.global_gradient import GlobalGradient
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
GlobalGradient.from_tensors({"w": torch.ones(100, 100)}, "fp32").save(sys.argv[1])
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Protects the older gradient from SIGKILL in mid-write; what the dead process left goes with the next write."""
    path = small().save(tmp_path / "gg.safetensors")
    before = folder_state(tmp_path)
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = folder_state(tmp_path)
    assert left.pop("gg.safetensors") == before["gg.safetensors"] and len(left) == 1
    alive = tmp_path / f".gg.safetensors.another-host.{2**22 + 1}.tmp"
    alive.write_bytes(b"of a process that cannot be asked")
    small().save(path)
    assert set(folder_state(tmp_path)) == {"gg.safetensors", alive.name}
