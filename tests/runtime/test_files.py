"""Files that are there whole or not at all."""

from __future__ import annotations

import pytest

from vitfast.runtime.files import whole_file


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_new_takes_the_name_at_the_end(tmp_path, on_disk):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path, on_disk=on_disk) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_after_an_exception_nothing_has_changed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
