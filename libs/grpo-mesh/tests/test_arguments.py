"""What cannot be meant is refused in the library's own words."""

# Arguments of wrong types are what these tests are about.
# pyright: reportArgumentType=false

import pytest

from grpo_mesh import HostsError, MeshError, force_cpu_devices, parse_mesh, use_compilation_cache


def test_an_axis_of_thousands_of_digits_is_refused():
    with pytest.raises(MeshError, match="dp"):
        parse_mesh("dp:" + "9" * 5000, 8)


@pytest.mark.parametrize("folder", [5, None, "a" * 5000, "a\0b", "~nobody-of-this-name/x/\0"], ids=range(5))
def test_a_cache_that_no_folder_can_be_is_refused(folder):
    with pytest.raises(HostsError, match="the compilation cache must be"):
        use_compilation_cache(folder)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_a_number_of_devices_that_is_none_is_refused(count):
    with pytest.raises(HostsError, match="must be at least 1"):
        force_cpu_devices(count)
