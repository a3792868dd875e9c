from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from autodeco.disk_space import require_space, reserve
from autodeco.errors import EnvironmentProblem


def test_what_fits_passes_and_what_does_not_is_refused_with_both_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    target = tmp_path / "not" / "yet" / "there"
    require_space(target, 1 << 20, "the copy")
    with pytest.raises(EnvironmentProblem, match=r"the copy needs .* GiB are free") as error:
        require_space(target, free + 1, "the copy")
    assert str(target) in str(error.value)
    assert not (tmp_path / "not").exists()


def test_reserved_blocks_are_the_files(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        reserve(stream.fileno(), 1 << 20)
        reserve(stream.fileno(), 0)
    assert (tmp_path / "file").stat().st_size == 1 << 20


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_filesystem_that_cannot_reserve_is_no_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, "cannot")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "file").open("wb") as stream:
        reserve(stream.fileno(), 1 << 20)


def test_a_full_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (tmp_path / "file").open("wb") as stream, pytest.raises(OSError, match="No space"):
        reserve(stream.fileno(), 1 << 20)
