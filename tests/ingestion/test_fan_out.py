"""Fan-out: every item is answered once, whatever happens to the worker that holds it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.fan_out import fan_out
from genescale.platform.errors import ClusterError

pytestmark = pytest.mark.usefixtures("ray_local")
MEGABYTE = 1024 * 1024


def square(item: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    return {**item, "square": item["n"] ** 2}, bytes([item["n"]])


def perhaps_die(item: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Die always, or the first time only, as the item says."""
    with Path(item["diary"]).open("a") as diary:
        diary.write(f"{item['n']}\n")
    if item["dies"] == "always" or (item["dies"] == "once" and not _marked(item["mark"])):
        os.kill(os.getpid(), signal.SIGKILL)
    return square(item)


def die_beside_others(item: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Die as a process does that needs more memory than is left: only while another task runs."""
    busy = Path(item["busy"])
    (busy / str(os.getpid())).touch()
    time.sleep(0.3)
    others = [p for p in busy.iterdir() if p.name != str(os.getpid()) and Path("/proc", p.name).exists()]
    if item["greedy"] and others:
        (busy / str(os.getpid())).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    (busy / str(os.getpid())).unlink()
    return square(item)


def payload_of_megabytes(item: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    return item, bytes([item["n"] % 251]) * (8 * MEGABYTE)


def unknown_on_workers(item: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    raise RuntimeError("no such package on this worker")


def _marked(mark: str) -> bool:
    if Path(mark).exists():
        return True
    Path(mark).touch()
    return False


def items_that_die(folder: Path, dies: dict[int, str], n: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "n": i,
            "unit": {"uri": f"s3://atlas/{i}.h5ad", "start": 1_000 * i, "stop": 1_000 * i + 1_000},
            "dies": dies.get(i, ""),
            "mark": str(folder / f"mark{i}"),
            "diary": str(folder / "diary"),
        }
        for i in range(n)
    ]


def test_every_item_is_answered_once() -> None:
    answers = list(fan_out([{"n": i} for i in range(23)], square))
    assert sorted((answer["n"], answer["square"], payload) for answer, payload in answers) == [
        (i, i * i, bytes([i])) for i in range(23)
    ]
    assert list(fan_out([], square)) == []


def test_a_poisonous_item_fails_alone_and_an_unlucky_one_succeeds(tmp_path: Path) -> None:
    items = items_that_die(tmp_path, {3: "always", 7: "once"})
    answers = {answer["n"]: answer for answer, _ in fan_out(items, perhaps_die)}
    assert sorted(answers) == list(range(12))
    assert {n for n, answer in answers.items() if "failure" in answer} == {3}
    assert all(answers[n]["square"] == n * n for n in range(12) if n != 3)
    failed = answers[3]
    assert failed == {**items[3], "failure": failed["failure"], "seconds": 0.0}
    assert failed["failure"]["code"] == "cluster"
    message = failed["failure"]["message"]
    for part in ("s3://atlas/3.h5ad", "died 3 times", "cells 3,000 to 3,999", "memory", "--unit-nonzeros", "download"):
        assert part in message
    runs = Counter((tmp_path / "diary").read_text().split())
    assert runs["3"] == 3, "bounded: no more workers die than are named"
    assert runs["7"] == 2
    assert {n: times for n, times in runs.items() if n not in "37"} == {str(n): 1 for n in range(12) if n not in (3, 7)}


def test_one_item_alone_may_be_poisonous(tmp_path: Path) -> None:
    ((answer, payload),) = fan_out(items_that_die(tmp_path, {0: "always"}, n=1), perhaps_die)
    assert answer["failure"]["code"] == "cluster"
    assert payload == b""


def test_units_of_a_file_that_is_refused_kill_no_more_workers(tmp_path: Path) -> None:
    items = items_that_die(tmp_path, dict.fromkeys(range(3), "always"), n=4)
    for item in items[:3]:
        item["unit"]["uri"] = "s3://atlas/poison.h5ad"
    answers = {answer["n"]: answer for answer, _ in fan_out(items, perhaps_die)}
    assert {n for n, answer in answers.items() if "failure" in answer} == {0, 1, 2}
    runs = Counter((tmp_path / "diary").read_text().split())
    assert sum(runs[str(n)] for n in range(3)) == 3 * 2 + 1


def test_what_dies_only_beside_others_succeeds_alone(tmp_path: Path) -> None:
    items = [{"n": i, "greedy": i in (1, 2), "busy": str(tmp_path)} for i in range(6)]
    answers = [answer for answer, _ in fan_out(items, die_beside_others)]
    assert sorted(answer["n"] for answer in answers) == list(range(6))
    assert not [answer for answer in answers if "failure" in answer]


@pytest.mark.slow
def test_workers_that_die_on_everything_are_the_clusters_fault(tmp_path: Path) -> None:
    items = items_that_die(tmp_path, dict.fromkeys(range(9), "always"), n=9)
    with pytest.raises(ClusterError, match="died on each of 8 files"):
        list(fan_out(items, perhaps_die))


def test_an_error_of_the_installation_ends_the_run() -> None:
    with pytest.raises(ClusterError, match="no such package on this worker"):
        list(fan_out([{"n": 1}], unknown_on_workers))


def test_large_payloads_flow_through_a_small_store() -> None:
    """48 payloads of 8 MB (384 MB) pass while the consumer holds one at a time."""
    seen = set()
    for answer, payload in fan_out([{"n": i} for i in range(48)], payload_of_megabytes):
        assert len(payload) == 8 * MEGABYTE
        assert payload[-1] == answer["n"] % 251
        seen.add(answer["n"])
    assert len(seen) == 48
