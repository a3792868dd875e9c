from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autodeco.disk_space import require_space
from autodeco.errors import EnvironmentProblem


def test_what_fits_passes_and_what_does_not_is_refused_with_both_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    target = tmp_path / "not" / "yet" / "there"
    require_space(target, 1 << 20, "the copy")
    with pytest.raises(EnvironmentProblem, match=r"the copy needs .* GiB are free") as error:
        require_space(target, free + 1, "the copy")
    assert str(target) in str(error.value)
    assert not (tmp_path / "not").exists()
