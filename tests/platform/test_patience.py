"""Storage that fails for a while is tried again; an answer is taken at once."""

from __future__ import annotations

import pytest

from genescale.platform.errors import NotFoundError, SettingsError, StorageError
from genescale.platform.patience import Patience, patiently

QUICK = Patience(total_s=0.2, first_pause_s=0.01, longest_pause_s=0.04)


class Flaky:
    """Fails some times, then answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "done"


def test_a_failure_that_passes_is_outlived() -> None:
    flaky = Flaky(3, StorageError("the bucket does not answer."))
    assert patiently(flaky, patience=QUICK, what="reading") == "done"
    assert flaky.calls == 4


def test_a_failure_that_stays_is_raised() -> None:
    with pytest.raises(StorageError, match="does not answer"):
        patiently(Flaky(1_000, StorageError("the bucket does not answer.")), patience=QUICK, what="reading")


@pytest.mark.parametrize("error", [NotFoundError("nothing there."), ValueError("a fault of ours")])
def test_what_is_an_answer_is_not_asked_again(error: Exception) -> None:
    flaky = Flaky(1, error)
    with pytest.raises(type(error)):
        patiently(flaky, patience=QUICK, what="reading")
    assert flaky.calls == 1


def test_pauses_grow_and_end() -> None:
    pauses = list(Patience(total_s=10, first_pause_s=1, longest_pause_s=4).pauses_s())
    assert pauses == [1, 2, 4, 3]
    assert list(Patience(total_s=0).pauses_s()) == []
    with pytest.raises(SettingsError):
        Patience(first_pause_s=0)
