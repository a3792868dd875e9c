"""The built-in task: reproducible, correct, checkable, long-tailed."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from math import log
from pathlib import Path

import pytest

from autodeco import stories

COUNT = 400


@pytest.fixture(scope="module")
def clean() -> list[stories.Story]:
    return [stories.story(3, "train", index) for index in range(COUNT)]


def test_a_story_is_a_function_of_seed_split_and_index() -> None:
    again = stories.story(7, "evaluation", 123)
    assert stories.story(7, "evaluation", 123) == again
    assert stories.story(8, "evaluation", 123) != again
    assert stories.story(7, "evaluation", 124) != again


def test_the_stream_is_the_one_that_the_demo_model_was_trained_on() -> None:
    text = json.dumps(list(stories.records(0, "pretrain", 50, slips=0.06)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8b8451b219b014d7"


def test_a_range_is_the_same_in_pieces() -> None:
    whole = list(stories.records(1, "train", 10))
    assert whole == [*stories.records(1, "train", 4), *stories.records(1, "train", 6, start=4)]


def test_no_two_splits_share_a_problem() -> None:
    prompts = {
        split: {stories.story(seed, split, index).prompt for seed in (0, 1) for index in range(300)}
        for split in stories.SPLITS
    }
    assert sorted(itertools.chain(*stories.SPLITS.values())) == list(range(16))
    names = list(prompts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not prompts[one] & prompts[other]


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(KeyError):
        stories.story(0, "test", 0)


def test_every_story_computes_correctly(clean: list[stories.Story]) -> None:
    for one in clean:
        asked = [int(n) for n in re.findall(r"[+-]?\d+", one.prompt.replace(" ", ""))]
        assert tuple(asked) == one.numbers
        told = [int(n) for n in re.findall(r"\d+", one.completion)]
        total, expected = asked[0], [asked[0]]
        for change in asked[1:]:
            total += change
            expected += [abs(change), total]
        assert told == [*expected, total]
        assert one.answer == str(total) and not one.slipped
        assert one.completion.endswith(f" The answer is {total}.")
        assert min(one.totals) >= 11 and max(one.totals) <= 299


def test_slips_are_as_frequent_as_asked_and_carry_on() -> None:
    texts = [stories.story(0, "pretrain", index, slips=0.1) for index in range(2000)]
    slipped = [one for one in texts if one.slipped]
    assert 0.23 < len(slipped) / len(texts) < 0.31  # 1 - 0.9**3 = 0.271
    wrong = sum(not stories.check_answer(one.completion, one.answer) for one in slipped)
    assert wrong > 0.9 * len(slipped)  # two slips can cancel, one cannot
    for one in slipped[:100]:
        told = [int(n) for n in re.findall(r"\d+", one.completion)]
        stated = told[0]
        for size, total, change in zip(told[1::2], told[2::2], one.numbers[1:], strict=False):
            assert size == abs(change)
            assert total - (stated + change) in (0, 10, -10, 1, -1)
            stated = total


@pytest.mark.parametrize(
    ("text", "gt", "right"),
    [
        (" The answer is 42.", "42", True),
        (" There were 7, then 42", "42", True),
        (" The answer is 042.", "42", True),
        (" The answer is 42. Then 3 left.", "42", False),
        (" The answer is 421.", "42", False),
        (" The answer is 4 2.", "42", False),
        ("", "42", False),
        ("no number", "42", False),
    ],
)
def test_the_checker_takes_the_last_number(text: str, gt: str, right: bool) -> None:
    assert stories.check_answer(text, gt) is right


def test_the_checker_accepts_every_clean_story_and_refuses_another(
    clean: list[stories.Story],
) -> None:
    for one in clean:
        assert stories.check_answer(one.completion, one.answer)
        assert not stories.check_answer(one.completion, str(int(one.answer) + 1))


def test_free_words_are_long_tailed(clean: list[stories.Story]) -> None:
    names = Counter(
        match
        for one in clean
        for match in re.findall(r"\b[A-Z][a-z]+\b", one.completion)
        if match in stories._WORDS["name"]
    )
    ranked = [count for _, count in names.most_common()]
    total = sum(ranked)
    assert len(ranked) > 40  # the tail is there
    assert ranked[0] > 10 * ranked[len(ranked) // 2]  # and it is long
    # min-p 0.1 would cut away a large share of what is right to say.
    assert sum(count for count in ranked if count < 0.1 * ranked[0]) > 0.2 * total
    entropy = -sum(c / total * log(c / total) for c in ranked)
    assert 2.5 < entropy < log(len(stories._WORDS["name"])) - 0.5


def test_the_vocabulary_covers_every_story_and_splits_it_without_loss() -> None:
    known = set(stories.vocabulary())
    for split in stories.SPLITS:
        for row in stories.records(5, split, 150, slips=0.2):
            for text in row.values():
                tokens = re.findall(stories.TOKEN_PATTERN, text)
                assert "".join(tokens) == text
                assert set(tokens) <= known


def test_no_list_of_words_repeats_itself() -> None:
    for name, words in stories._WORDS.items():
        assert len(set(words)) == len(words), name


def test_files_hold_what_the_generator_gives(tmp_path: Path) -> None:
    stories.write_records(tmp_path / "train.jsonl", 2, "train", 5, start=3)
    stories.write_problems(tmp_path / "problems.jsonl", 2, "evaluation", 5)
    train, asked = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "problems.jsonl")
    )
    assert train == list(stories.records(2, "train", 5, start=3))
    assert asked == list(stories.problems(2, "evaluation", 5))
    assert all(set(row) == {"prompt", "completion"} for row in train)
    assert all(set(row) == {"problem", "gt"} and isinstance(row["gt"], str) for row in asked)


def test_the_generator_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, autodeco.stories; "
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
