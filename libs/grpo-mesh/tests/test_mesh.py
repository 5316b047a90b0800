import dataclasses

import jax
import numpy as np
import pytest

from grpo_mesh import AXES, MeshError, batch_sharding, make_mesh, parse_mesh, reshape_mesh


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("dp:1,fsdp:-1,tp:1", (1, 8, 1)),
        ("tp:2, fsdp:-1", (1, 4, 2)),
        ("tp:8", (1, 1, 8)),
        ("1,-1,1", (1, 8, 1)),
        ("2,2,2", (2, 2, 2)),
        ("auto", (1, 8, 1)),
        ("tp:-1,dp:4", (4, 1, 2)),
        ({"tp": 2, "fsdp": -1}, (1, 4, 2)),
        ({"dp": 8}, (8, 1, 1)),
    ],
)
def test_a_specification_resolves_to_three_sizes(spec, sizes):
    assert parse_mesh(spec, 8) == dict(zip(AXES, sizes))


def test_auto_spreads_weights_inside_a_slice_and_copies_over_slices():
    assert parse_mesh("auto", 16, slice_count=2) == {"dp": 2, "fsdp": 8, "tp": 1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dp:3,fsdp:4", r"dp·fsdp·tp = 3·4·1 = 12 but 8 devices"),
        ("tp:2", r"dp·fsdp·tp = 1·1·2 = 2 but 8 devices"),
        ("dp:3,fsdp:-1", r"fsdp = 8 devices / \(dp·tp = 3\) is not a whole number.*one of \[1, 2, 4, 8\]"),
        ("dp:-1,fsdp:-1", "one axis at -1: got dp and fsdp"),
        ("4,2", "three sizes, dp,fsdp,tp: got 2"),
        ("model:8", "unknown axis 'model'"),
        ("dp:2,dp:4", "dp is given twice"),
        ("dp:0,fsdp:8", "dp must be a positive whole number or -1: got '0'"),
        ("dp:x", "dp must be a positive whole number or -1: got 'x'"),
        ("", "must name an axis.*got nothing"),
        ({}, "must name an axis.*got nothing"),
        ({"model": 8}, "unknown axis 'model'"),
        ({"dp": 0}, "dp must be a positive whole number or -1: got '0'"),
        (8, "must be text such as .*, or a mapping: got int"),
    ],
)
def test_a_wrong_specification_shows_the_arithmetic(spec, message):
    with pytest.raises(MeshError, match=message):
        parse_mesh(spec, 8)


def test_auto_refuses_uneven_slices():
    with pytest.raises(MeshError, match="9 devices in 2 slices"):
        parse_mesh("auto", 9, slice_count=2)


def test_every_axis_is_present_on_one_device():
    mesh = make_mesh("dp:1", jax.devices()[:1])
    assert dict(mesh.shape) == {"dp": 1, "fsdp": 1, "tp": 1}
    assert batch_sharding(mesh).spec == jax.sharding.PartitionSpec(("dp", "fsdp"))


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    platform: str = "tpu"
    process_index: int = 0


def two_slices_of_four():
    chips = np.array([Chip(number, number // 4) for number in range(8)], dtype=object)
    return jax.sharding.Mesh(chips.reshape(2, 4, 1), AXES)


def test_a_reshaped_mesh_keeps_the_order_of_the_devices():
    mesh = two_slices_of_four()
    reshaped = reshape_mesh(mesh, "dp:-1,tp:4")
    assert dict(reshaped.shape) == {"dp": 2, "fsdp": 1, "tp": 4}
    assert list(reshaped.devices.flat) == list(mesh.devices.flat)
    assert reshape_mesh(mesh, "auto").shape == mesh.shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [("tp:8", "tp = 8 must stay inside one slice"), ("dp:2,tp:2", r"dp·fsdp·tp = 2·1·2 = 4 but 8 devices")],
)
def test_a_mesh_is_reshaped_within_its_devices_and_slices(spec, message):
    with pytest.raises(MeshError, match=message):
        reshape_mesh(two_slices_of_four(), spec)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [(3, "got int"), (jax.make_mesh((1,), ("model",), devices=jax.devices()[:1]), "got axes model")],
)
def test_a_batch_needs_the_mesh_s_axes(mesh, message):
    with pytest.raises(MeshError, match=f"a batch needs a mesh with axes dp and fsdp .*{message}"):
        batch_sharding(mesh)


def test_no_devices_are_refused():
    with pytest.raises(MeshError, match="at least one device"):
        make_mesh("auto", [])
