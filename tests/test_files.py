"""Files under attack: planted links, modes, second writers, forged descriptions, files that change while in use."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dba_kernels import GlobalGradient, files, tensor_files
from dba_kernels.base_model import fingerprint
from dba_kernels.global_gradient import Provenance
from dba_kernels.records import parts
from dba_kernels.tensor_files import index_of


def made(seed: int = 0, **options: Any) -> GlobalGradient:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"w": torch.randn(80, 90, generator=generator), "b": torch.randn(5, generator=generator)}
    options.setdefault("fingerprint", fingerprint(tensors.items()))
    return GlobalGradient.from_tensors(tensors, "int8", **options)


# --- names and modes --------------------------------------------------------------------------------------------------


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    """Protects against a planted file or link: names differ every time, and one that exists is never opened."""
    names = []
    for _ in range(3):
        with files.atomic_writer(tmp_path / "x") as file:
            names += [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
            file.write(b"1")
    assert len(set(names)) == 3
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    token = files.secrets.token_hex
    (tmp_path / f".y.{files.socket.gethostname()}.{os.getpid()}.{'0' * 16}.tmp").symlink_to(victim)
    try:
        files.secrets.token_hex = lambda size: "0" * 16  # somebody who guessed it all the same
        with (
            pytest.raises(OSError, match=r"cannot write .*y: File exists"),
            files.atomic_writer(tmp_path / "y") as file,
        ):
            file.write(b"2")
    finally:
        files.secrets.token_hex = token
    assert victim.read_text() == "untouched"


def test_link_at_the_destination_is_replaced(tmp_path: Path) -> None:
    """Protects what a planted link points to: the link goes, its target stays."""
    victim, path = tmp_path / "victim.safetensors", tmp_path / "gg.safetensors"
    victim.write_text("untouched")
    path.symlink_to(victim)
    made().save(path)
    assert victim.read_text() == "untouched" and not path.is_symlink()
    GlobalGradient.load(path).verify()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_mode_of_a_replaced_file_stays(tmp_path: Path, mode: int) -> None:
    """Protects private files: replacing one does not open it to others; a new one follows the umask."""
    path = tmp_path / "gg.safetensors"
    made().save(path)
    old = os.umask(0)
    os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~old
    path.chmod(mode)
    made(1).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_longest_names_can_be_written(tmp_path: Path) -> None:
    """Protects long names: a temporary file's is not longer than file systems take."""
    name = "ü" * 121 + ".safetensors"  # 254 bytes; 255 is the limit
    made().save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


# --- two writers ------------------------------------------------------------------------------------------------------


def write_again_and_again(path: Path, seed: int, max_shard_bytes: int | None) -> None:
    gg = GlobalGradient.from_tensors({f"w{i}": torch.full((70, 70), float(seed + i)) for i in range(6)}, "fp32")
    for _ in range(8):
        gg.save(path, max_shard_bytes)


@pytest.mark.parametrize("seeds", [(100, 200), (100, 100), (100, 300)], ids=["other", "same", "other and single"])
def test_writers_at_one_place_leave_one_whole_set(tmp_path: Path, seeds: tuple[int, int]) -> None:
    """Protects sharded sets: of two processes that save to one name again and again, one's set is there, no more."""
    path = tmp_path / "gg.safetensors"
    fork = multiprocessing.get_context("fork")
    sizes = [None if seed == 300 else 20_000 for seed in seeds]
    writers = [fork.Process(target=write_again_and_again, args=(path, *job)) for job in zip(seeds, sizes, strict=True)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists() or index_of(path).exists():
            try:
                gg = GlobalGradient.load(path)
            except FileNotFoundError as error:  # a single file that was replaced by shards, between the two looks
                assert str(path) in str(error)
                continue
            gg.verify()
            seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0] and seen > 0
    gg = GlobalGradient.load(path)
    gg.verify()
    assert float(gg["w0"][0, 0]) in seeds
    kept = {path.name} if path.exists() else {index_of(path).name}
    if not path.exists():
        kept |= set(json.loads(index_of(path).read_text())["weight_map"].values())
    assert set(os.listdir(tmp_path)) == kept


def test_a_shard_replaced_while_it_is_opened_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a reader from a false alarm: what is noted of a shard is of the file that was mapped, not of the one
    that it replaced, whose inode may be used again."""
    path = tmp_path / "gg.safetensors"
    gg = GlobalGradient.from_tensors({f"w{i}": torch.full((70, 70), float(i)) for i in range(3)}, "fp32")
    gg.save(path, 20_000)
    opened, safe_open = [], tensor_files.safe_open

    def replaced_before(name: str, **options: Any) -> Any:
        opened.append(name)
        if len(opened) == 1:  # somebody else saves the same, and has come to this shard
            (tmp_path / "new").write_bytes(Path(name).read_bytes())
            os.replace(tmp_path / "new", name)
        return safe_open(name, **options)

    monkeypatch.setattr(tensor_files, "safe_open", replaced_before)
    saved = tensor_files.SavedTensors(path)
    assert len(opened) > 3 and len(set(opened)) == 3
    assert saved._opened == {Path(name): tensor_files._identity(Path(name)) for name in set(opened)}
    assert all(float(saved[f"w{i}/codes"][0, 0]) == i for i in range(3))


def test_failing_writer_leaves_the_other_ones_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a set from a second writer of the same content that fails in the middle of the exchange."""
    path = tmp_path / "gg.safetensors"
    gg = GlobalGradient.from_tensors({f"w{i}": torch.full((70, 70), float(i)) for i in range(6)}, "fp32")
    gg.save(path, 20_000)
    before = sorted(os.listdir(tmp_path))
    replace, calls = os.replace, []

    def fail_at_the_third(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    for other in (gg, GlobalGradient.from_tensors({f"w{i}": torch.ones(70, 70) for i in range(6)}, "fp32")):
        calls.clear()
        with pytest.raises(OSError, match="cannot write"):
            other.save(path, 20_000)
        assert sorted(os.listdir(tmp_path)) == before
        GlobalGradient.load(path).verify()


# --- descriptions -----------------------------------------------------------------------------------------------------

Forgery = Callable[[dict[str, Any]], Any]


def at(*keys: Any) -> Callable[[Any], Forgery]:
    """A forgery that sets one field, however deep."""

    def with_value(value: Any) -> Forgery:
        def forge(content: dict[str, Any]) -> None:
            inner = content
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value

        return forge

    return with_value


def without(*keys: str) -> Forgery:
    def forge(content: dict[str, Any]) -> None:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return forge


W = ("tensors", "w")
FORGERIES: dict[str, tuple[Forgery, str]] = {
    "no version": (without("format_version"), "expected format version 1 or 2, got None"),
    "version as text": (at("format_version")("1"), "expected format version 1 or 2, got 1"),
    "version true": (at("format_version")(True), "expected format version 1 or 2, got True"),
    "version 1.0": (at("format_version")(1.0), "expected format version 1 or 2, got 1.0"),
    "newer version": (at("format_version")(3), "expected format version 1 or 2, got 3"),
    "version of curvature": (at("format_version")(2), "expected a field 'curvature'"),
    "curvature of nonsense": (lambda c: c.update(format_version=2, curvature={"w": 3}, calibration=None), "curvature"),
    "newer field": (at("curvature_of_tomorrow")({}), "'curvature_of_tomorrow'; a newer version may know it"),
    "newer field of a tensor": (at(*W, "zeros")(1), "tensor 'w': expected no field 'zeros'; a newer version may know"),
    "no tensors": (without("tensors"), "expected a field 'tensors'"),
    "tensors as a list": (at("tensors")([]), "expected an object as 'tensors'"),
    "tensor as a number": (at(*W)(3), "tensor 'w': expected an object, got 3"),
    "no library": (without("library_version"), "expected a field 'library_version'"),
    "another digest": (at("digest")("0" * 64), "expected digest .*, as its tensors have"),
    "digest as a number": (at("digest")(7), "expected a SHA-256"),
    "no shape": (without(*W, "shape"), "tensor 'w': expected a field 'shape'"),
    "negative shape": (at(*W, "shape")([-80, 90]), "tensor 'w': expected a shape"),
    "shape of texts": (at(*W, "shape")(["80", "90"]), "tensor 'w': expected a shape"),
    "enormous shape": (at(*W, "shape")([2**62, 90]), "tensor 'w': expected a shape"),
    "other shape": (at(*W, "shape")([90, 80]), "expected shape|expected digest|expected .*'I8'"),
    "unknown format": (at(*W, "format")("int3"), "tensor 'w': expected one of 'fp32', .* as 'format', got 'int3'"),
    "format as a list": (at(*W, "format")(["int8"]), "tensor 'w': expected one of"),
    "rank 0": (at(*W, "rank")(0), "tensor 'w': expected a rank or null"),
    "rank true": (at(*W, "rank")(True), "tensor 'w': expected a rank or null"),
    "rank too large": (at(*W, "rank")(70), "tensor 'w': expected a rank that saves bytes"),
    "small tensor compressed": (at("tensors", "b", "format")("int8"), "tensor 'b': expected format 'fp32'"),
    "norm of another": (at(*W, "squared_norm")(1.0), r"tensor 'w' in .*expected a squared norm of \d"),
    "norm negative": (at(*W, "squared_norm")(-1.0), "tensor 'w': expected a finite number >= 0 as 'squared_norm'"),
    "norm as text": (at(*W, "squared_norm")("1"), "tensor 'w': expected a finite number >= 0"),
    "norm enormous": (at(*W, "squared_norm")(10**400), "tensor 'w': expected a finite number >= 0"),
    "cosine of 3": (at(*W, "cosine")(3.0), r"tensor 'w': expected a number in \[-1, 1\] as 'cosine'"),
    "energy negative": (at(*W, "energy")(-0.5), r"tensor 'w': expected a number in \[0, 1\]"),
    "noise as text": (at(*W, "noise")("none"), "tensor 'w': expected a finite number or null"),
    "dropped negative": (at(*W, "dropped")(-1), "tensor 'w': expected a count as 'dropped'"),
    "name with a prefix": (lambda c: c["tensors"].update({"module.w": c["tensors"].pop("w")}), "the bare name 'w'"),
    "no provenance": (without("provenance"), "expected a field 'provenance'"),
    "batches negative": (at("provenance", "batches")(-3), "provenance: expected a count as 'batches'"),
    "data as a number": (at("provenance", "data")(3), "provenance: expected texts as 'data'"),
    "weighting unknown": (at("provenance", "weighting")("mood"), "provenance: expected one of 'tokens', 'batch'"),
    "fingerprint as a list": (at("fingerprint")([1]), "expected an object as 'fingerprint'"),
    "fingerprint without bits": (without("fingerprint", "w", "bf16"), "fingerprint of 'w': expected a field 'bf16'"),
    "fingerprint not hex": (at("fingerprint", "w", "bf16")("zz" * 32), "fingerprint of 'w': expected four hexadecimal"),
    "fingerprint too short": (at("fingerprint", "w", "bf16")("0000"), "fingerprint of 'w': expected 16 samples, got 1"),
    "fingerprint's shape": (at("fingerprint", "w", "shape")([90, 80]), "fingerprint of 'w': expected shape"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_descriptions_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Protects every field of the description, whose own digest anybody can compute: each forgery is named."""
    forge, message = FORGERIES[kind]
    gg = made(provenance=Provenance(batches=2, tokens=9, data=("x",)))
    content = json.loads(json.dumps(gg._content()))
    stored = {f"{name}/{part}": tensor for name in gg for part, tensor in parts(gg.stored(name)).items()}
    path = tmp_path / "gg.safetensors"
    tensor_files.save_tensors(path, stored, content)
    GlobalGradient.load(path).verify()  # negative control: as it is, it loads
    forged = copy.deepcopy(content)
    forge(forged)
    tensor_files.save_tensors(path, stored, forged)
    with pytest.raises(ValueError, match=message):
        GlobalGradient.load(path).verify()


@pytest.mark.parametrize(
    "text", ["[1]", "3", '{"kind": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000]
)
def test_descriptions_that_are_no_objects_are_refused(tmp_path: Path, text: str) -> None:
    """Protects the parser: lists, NaN, a name twice, depth and enormous numbers end in an error that names the file."""
    path = tmp_path / "gg.safetensors"
    metadata = {tensor_files.METADATA_KEY: text, tensor_files.DIGEST_KEY: tensor_files.text_digest(text)}
    with files.atomic_writer(path) as file:
        tensor_files._write(file, {"w": torch.ones(2)}, metadata)
    with pytest.raises(ValueError, match=r"gg.safetensors: expected a whole file as this library wrote it"):
        GlobalGradient.load(path)


@pytest.mark.parametrize("name", ["../gg.safetensors", "/etc/passwd", "", ".", 3, None, ["x"], "a/b.safetensors"])
def test_index_names_files_beside_it(tmp_path: Path, name: Any) -> None:
    """Protects other folders: an index whose shards are paths, or no names at all, is refused."""
    index = index_of(tmp_path / "gg.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w/codes": name}}))
    with pytest.raises(ValueError, match="is not the name of a shard"):
        GlobalGradient.load(index)


def test_no_regular_file_is_refused(tmp_path: Path) -> None:
    """Protects from waiting: a FIFO or a folder in the file's place is refused, not read."""
    fifo = tmp_path / "gg.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="not a regular file"):
        GlobalGradient.load(fifo)
    with pytest.raises(ValueError, match="not a regular file"):
        GlobalGradient.load(tmp_path)


# --- a file that changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_file_written_to_while_it_is_open_is_refused(tmp_path: Path, how: str) -> None:
    """Protects a run: reading on from a file that was cut short would kill the process by a signal."""
    path = made().save(tmp_path / "gg.safetensors")
    gg = GlobalGradient.load(path)
    other = made(1).save(tmp_path / "other.safetensors").read_bytes()
    with open(path, "r+b") as file:
        if how == "truncated":
            file.truncate(100)
        else:
            file.write(other)
    with pytest.raises(ValueError, match="it was written to since it was opened"):
        gg["w"]


def test_replaced_file_is_still_readable(tmp_path: Path) -> None:
    """Protects a run from a second save: what was opened stays mapped, whole, as it was."""
    path = made().save(tmp_path / "gg.safetensors")
    gg, digest = GlobalGradient.load(path), made().digest
    made(1).save(path)
    gg.verify()
    assert gg.digest == digest and torch.equal(gg["w"], made()["w"])
