"""The memory that a process may use: the machine's or its container's."""

from __future__ import annotations

import pytest

from vitfast.runtime import memory

GIB = 1 << 30
UNLIMITED_1 = "9223372036854771712"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes files of a machine of 64 GiB; returns its root."""
    monkeypatch.setattr(memory, "_machine", lambda: 64 * GIB)

    def made(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return made


CASES = {
    "nothing": ({}, 64),
    "v2": ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": 2 * GIB}, 2),
    "v2_parent": (
        {
            "proc/self/cgroup": "0::/a/b/c",
            "sys/fs/cgroup/a/b/c/memory.max": "max",
            "sys/fs/cgroup/a/b/memory.max": 8 * GIB,
            "sys/fs/cgroup/a/memory.max": 3 * GIB,
            "sys/fs/cgroup/other/memory.max": GIB,
        },
        3,
    ),
    "v2_own_root": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 4 * GIB}, 4),
    "v2_mounted_as_root": (
        {"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/memory.max": 4 * GIB},
        4,
    ),
    "v2_outside_the_root": (
        {"proc/self/cgroup": "0::/../../x", "sys/fs/cgroup/memory.max": 5 * GIB},
        5,
    ),
    "v1": (
        {
            "proc/self/cgroup": "9:cpu,cpuacct:/a\n5:memory:/docker/1f\n1:name=systemd:/a",
            "sys/fs/cgroup/memory/docker/1f/memory.limit_in_bytes": 6 * GIB,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_1,
            "sys/fs/cgroup/cpu/a/memory.limit_in_bytes": GIB,
        },
        6,
    ),
    "v1_mounted_as_root": (
        {
            "proc/self/cgroup": "5:memory:/docker/1f",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 7 * GIB,
        },
        7,
    ),
    "both": (
        {
            "proc/self/cgroup": "5:memory:/a\n0::/b",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 9 * GIB,
            "sys/fs/cgroup/unified/b/memory.max": "max",
        },
        9,
    ),
    "unlimited": (
        {
            "proc/self/cgroup": "5:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_1,
        },
        64,
    ),
    "more_than_there_is": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 99 * GIB}, 64),
    "strange": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "?"}, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_containers(case, machine):
    files, gib = CASES[case]
    assert memory.available(machine(files)) == gib * GIB


def test_of_this_machine():
    assert 0 < memory.available() <= memory._machine()
