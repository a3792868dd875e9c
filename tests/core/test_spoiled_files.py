"""Everything that reads a user's file is given spoiled ones: it reads them, or says what is wrong.

``tools/fuzz.py`` does the same for as long as it is told to; its findings have tests of their own
in ``test_bugs_of_foreign_files.py``.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from fuzz import attempt, spoiled
from fuzz_targets import targets

TARGETS = {target.name: target for target in targets()}
QUICK = [name for name, t in TARGETS.items() if not t.slow]
SEEDS = st.integers(0, 2**48)
BOUNDED = settings(max_examples=30, deadline=None, database=None, derandomize=True)
LONG = settings(max_examples=300, deadline=None, database=None)

Prepared = Callable[[str], Path]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    @cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        (root / "good").mkdir()
        TARGETS[name].make(root / "good")
        return root

    return make


def read_spoiled(name: str, root: Path, seed: int) -> None:
    """An AutodecoError, or nothing; any other exception fails the test."""
    good, work = root / "good", root / "work" / "given"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work)
    file, content = spoiled(TARGETS[name], good, random.Random(seed))
    (work / file).write_bytes(content)
    refusal = attempt(TARGETS[name], work)
    if refusal is not None:
        assert str(refusal) and refusal.exit_code > 1
        assert refusal.fix


@pytest.mark.parametrize("name", QUICK)
def test_every_target_names_files_that_it_makes(name: str, prepared: Prepared) -> None:
    good = prepared(name) / "good"
    assert all((good / file).is_file() for file in TARGETS[name].files)
    assert attempt(TARGETS[name], good) is None


@pytest.mark.parametrize("name", QUICK)
def test_a_spoiled_file_is_read_or_refused(name: str, prepared: Prepared) -> None:
    root = prepared(name)

    @BOUNDED
    @given(SEEDS)
    def check(seed: int) -> None:
        read_spoiled(name, root, seed)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TARGETS))
def test_a_spoiled_file_is_read_or_refused_long(name: str, prepared: Prepared) -> None:
    root = prepared(name)
    profile = settings(LONG, max_examples=60) if TARGETS[name].slow else LONG

    @profile
    @given(SEEDS)
    def check(seed: int) -> None:
        read_spoiled(name, root, seed)

    check()
