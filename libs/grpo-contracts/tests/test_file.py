"""Files: round trips, versions, and ContractError and nothing else from damaged or forged ones."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_contracts import ContractError, Rollout, TrainBatch, load_batch, save_batch, schema
from grpo_contracts import _file as file_module
from grpo_contracts.__main__ import main
from grpo_contracts._stages import Spec


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return type(one) is type(other) and one == other


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def saved(batch: TrainBatch, tmp_path: Path) -> Path:
    path = tmp_path / "batch.npz"
    save_batch(batch, path)
    return path


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_stage_comes_back_as_it_was(make_batch: Any, make_prompts: Any, tmp_path_factory: Any, seed: int) -> None:
    path = tmp_path_factory.mktemp("batches") / "batch.npz"
    batch = make_batch(seed)
    for stage in (make_prompts(seed), batch.scored.rollout, batch.scored, batch):
        save_batch(stage, path)
        back = load_batch(path)
        assert type(back) is type(stage)
        assert same(stage, back)


def test_numpy_and_json_read_a_file_without_our_code(saved: Path, batch: TrainBatch) -> None:
    with np.load(saved, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["scored.rollout.tokens_BT"], batch.scored.rollout.tokens_BT)
        header = json.loads(archive["header.json"])
    assert (header["format"], header["version"], header["stage"]) == ("grpo-contracts/batch", "2.0", "TrainBatch")
    assert header["batch"]["scored"]["rollout"]["policy"] == {"step": 7, "digest": "0a1b2c3d"}
    assert header["batch"]["advantage"] == {"array": "advantage"}


def test_the_same_batch_is_the_same_bytes(saved: Path, batch: TrainBatch, tmp_path: Path) -> None:
    save_batch(batch, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    saved: Path, batch: TrainBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_batch(batch, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def edit(saved: Path, **changes: Any) -> Path:
    content = members(saved)
    header = json.loads(content["header.json"]) | changes
    return write(saved, content | {"header.json": json.dumps(header)})


@pytest.mark.parametrize("version", ["1.0", "3.0", "2.1", "2", "two.zero", 2.0, None])
def test_an_unknown_version_is_refused(saved: Path, version: Any) -> None:
    with pytest.raises(ContractError) as caught:
        load_batch(edit(saved, version=version))
    assert (caught.value.field, caught.value.rule) == ("version", "version")


def test_a_file_of_format_1_is_refused_with_advice(saved: Path) -> None:
    with pytest.raises(ContractError, match="Format 1 was never released: make the batch again"):
        load_batch(edit(saved, version="1.0"))


def test_an_older_minor_version_is_read_with_defaults_for_newer_fields(
    saved: Path, batch: TrainBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True, eq=False, repr=False)
    class TrainBatchNext(TrainBatch):
        temperature_BT: Annotated[Any, Spec("a field that version 2.1 brings", "float32", "B T")] = None

    monkeypatch.setattr(file_module, "VERSION", (2, 1))
    assert same(batch, load_batch(saved))
    header = json.loads(members(saved)["header.json"])
    arrays = {name[:-4]: file_module._read_npy(name, data) for name, data in members(saved).items() if name[-1] == "y"}
    newer = file_module._decode(TrainBatchNext, header["batch"], (2, 0), dict(arrays))
    assert newer.temperature_BT is None
    with pytest.raises(ContractError, match="temperature_BT"):  # a file of the current version must be complete
        file_module._decode(TrainBatchNext, header["batch"], (2, 1), dict(arrays))


def npy(array: np.ndarray, **options: Any) -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array(data, array, **options)
    return data.getvalue()


def raw_npy(shape: str, data: bytes) -> bytes:
    """A .npy file with a shape that numpy would not write."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


FORGED: dict[str, Any] = {
    "a pickle for an array": lambda m: m | {"advantage.npy": npy(np.array([print], object))},
    "raw pickle bytes": lambda m: m | {"advantage.npy": pickle.dumps(print)},
    "another dtype": lambda m: m | {"advantage.npy": npy(np.zeros(4, np.int32))},
    "another endianness": lambda m: m | {"advantage.npy": npy(np.zeros(4, ">f4"))},
    "another rank": lambda m: m | {"advantage.npy": npy(np.zeros((), np.float32))},
    "a huge shape over little data": lambda m: (
        m | {"advantage.npy": m["advantage.npy"].replace(b"(4,), }" + b" " * 9, b"(" + b"9" * 10 + b",), }")}
    ),
    "code in the npy header": lambda m: m | {"advantage.npy": m["advantage.npy"].replace(b"False", b"exit()"[:5])},
    "an array too few": lambda m: {name: data for name, data in m.items() if name != "advantage.npy"},
    "an array too many": lambda m: m | {"extra.npy": npy(np.zeros(1))},
    "a member outside": lambda m: m | {"../../evil": b"x"},
    "no header": lambda m: {name: data for name, data in m.items() if name != "header.json"},
    "no JSON": lambda m: m | {"header.json": b"{"},
    "deep JSON": lambda m: m | {"header.json": b"[" * 100_000},
    "not an object": lambda m: m | {"header.json": b"[]"},
    "bytes that are no text": lambda m: m | {"header.json": b"\xff\xfe\x00"},
    "a header of two megabytes": lambda m: m | {"header.json": b" " * 2**21 + m["header.json"]},
    "an unknown stage": lambda m: m | {"header.json": m["header.json"].replace(b'"TrainBatch"', b'"Batch"')},
    "an unknown field": lambda m: m | {"header.json": m["header.json"].replace(b'"advantage": {', b'"adv": {')},
    "an unknown format": lambda m: m | {"header.json": m["header.json"].replace(b"contracts/batch", b"other")},
    "impossible sampling parameters": lambda m: (
        m | {"header.json": m["header.json"].replace(b'"top_p": 1.0', b'"top_p": NaN')}
    ),
    "a huge integer": lambda m: m | {"header.json": m["header.json"].replace(b'"step": 7', b'"step": ' + b"7" * 5000)},
    "sampling parameters that are a list": lambda m: (
        m | {"header.json": m["header.json"].replace(b'"sampling": {', b'"sampling": [], "x": {')}
    ),
    "an array of 65 axes": lambda m: m | {"advantage.npy": raw_npy("(" + "1, " * 65 + ")", bytes(4))},
    "an array of impossible size": lambda m: (
        m | {"advantage.npy": raw_npy("(0, 999999999999999999, 99999999999)", b"")}
    ),
    "wrong values": lambda m: m | {"advantage.npy": npy(np.ones(4, np.float32))},
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ContractError, match="must be a file: got a folder, a pipe or a device"):
        load_batch(tmp_path / "pipe.npz")


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_file_is_refused(saved: Path, how: str) -> None:
    forged = FORGED[how](members(saved))
    assert forged != members(saved)
    with pytest.raises(ContractError):
        load_batch(write(saved, forged))


def test_other_zips_and_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content = members(saved)
    path: Any
    for path in (
        write(tmp_path / "deflated.npz", content, zipfile.ZIP_DEFLATED),
        write(tmp_path / "empty.npz", {}),
        tmp_path / "missing.npz",
        tmp_path,
        "\0",
        None,
        7,
    ):
        with pytest.raises(ContractError):
            load_batch(path)
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("advantage.npy", content["advantage.npy"])
    with pytest.raises(ContractError, match="without duplicate names"):
        load_batch(saved)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_found_or_harmless(make_batch: Any, tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    batch = make_batch(0)
    save_batch(batch, path)
    raw = bytearray(path.read_bytes())
    for at in data.draw(
        st.lists(st.integers(0, len(raw) - 1) | st.integers(len(raw) - 2000, len(raw) - 1), max_size=3)
    ):
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(raw)))
    path.write_bytes(bytes(raw[:cut]))
    try:
        back = load_batch(path)
    except ContractError:
        return
    assert same(back, batch)  # the damage hit bytes that have no meaning


@given(content=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_refused(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.npz"
    path.write_bytes(content)
    with pytest.raises(ContractError):
        load_batch(path)


def test_a_wrong_batch_can_be_saved_for_inspection(batch: TrainBatch, tmp_path: Path) -> None:
    wrong = dataclasses.replace(batch, advantage=batch.advantage + np.float32(1))
    save_batch(wrong, tmp_path / "wrong.npz")
    assert same(wrong, load_batch(tmp_path / "wrong.npz", level="shapes"))


def test_check_says_ok_or_the_first_violation(
    saved: Path, batch: TrainBatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(saved)]) == 0
    assert capsys.readouterr().out.startswith("OK TrainBatch(")
    save_batch(dataclasses.replace(batch, advantage=batch.advantage + np.float32(1)), saved)
    assert main(["check", str(saved)]) == 1
    assert capsys.readouterr().err.startswith("TrainBatch.advantage[3] must be 0 on unscored rows: got 1.0")


def test_the_module_runs_as_a_program(saved: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "grpo_contracts", *words], capture_output=True, text=True)

    assert json.loads(run("schema").stdout) == schema()
    saved.write_bytes(saved.read_bytes()[:-30])
    damaged = run("check", str(saved))
    assert damaged.returncode == 1
    assert damaged.stderr.startswith("file must be a complete zip file")
    assert "Traceback" not in damaged.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_may_stop_early() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "grpo_contracts", "schema"], stdout=pipe, stderr=subprocess.PIPE)
    assert done.stderr == b""


def test_the_schema_lists_fields_rules_and_header() -> None:
    printed = schema()
    rollout = printed["stages"]["Rollout"]
    assert list(rollout["fields"]) == list(Rollout.specs())
    assert rollout["fields"]["logp_BT"]["dims"] == [["B", "T"]]
    assert printed["stages"]["TrainBatch"]["fields"]["advantage"]["dims"] == [["B"], ["B", "T"]]
    assert {"field": "logp_BT", "rule": "nonpositive", "expected": "<= 0"} in rollout["rules"]
    assert printed["finish_reasons"] == {"STOP": 0, "LENGTH": 1, "STOP_STRING": 2}
    assert set(printed["header"]["$defs"]["Rollout"]["required"]) == set(Rollout.specs())
