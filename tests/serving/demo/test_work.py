"""The demo's work folder and its bucket: a killed run goes on, and nothing foreign is touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.serving.demo.object_storage import load_bucket, save_bucket
from genescale.serving.demo.page import Page, shown
from genescale.serving.demo.work import open_work, plan_digest


def test_a_finished_stage_is_remembered_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_work(folder, "d1", fresh=False) as work:
        work.finish("ingest", {"cells": 5}, 1.5)
    with open_work(folder, "d1", fresh=False) as work:
        assert work.finished("ingest")
        assert work.stages["ingest"]["made"] == {"cells": 5}
        assert not work.finished("pretrain")


def test_other_choices_need_fresh(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_work(folder, "d1", fresh=False) as work:
        work.finish("ingest", {}, 1.0)
        (folder / "mlflow.db").touch()
    with pytest.raises(InputError, match="--fresh"), open_work(folder, "d2", fresh=False):
        pass
    with open_work(folder, "d2", fresh=True) as work:
        assert not work.finished("ingest")
        assert not (folder / "mlflow.db").exists()


def test_a_clearing_that_is_cut_off_leaves_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, remove = tmp_path / "w", shutil.rmtree
    with open_work(folder, "d1", fresh=False) as work:
        work.finish("ingest", {}, 1.0)
        work.folder("object-storage")

    def killed(path: Path, **options: bool) -> None:
        if path.name == "object-storage":
            raise KeyboardInterrupt
        remove(path, **options)

    # Folders come in any order; this one has the state last.
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name == "state.json")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        patch.setattr(Path, "iterdir", lambda path: iter(entries))
        with pytest.raises(KeyboardInterrupt), open_work(folder, "d1", fresh=True):
            pass
    with open_work(folder, "d1", fresh=False) as work:
        assert not work.finished("ingest")


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(InputError, match="not empty"), open_work(tmp_path, "d", fresh=fresh):
            pass
    assert (tmp_path / "thesis.doc").read_text() == "years of work"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        open_work(tmp_path / "w", "d", fresh=False),
        pytest.raises(InputError, match="another demo is running"),
        open_work(tmp_path / "w", "d", fresh=True),
    ):
        pass


def test_scratch_lies_inside_and_is_removed(tmp_path: Path) -> None:
    before = os.environ.get("TMPDIR")
    with open_work(tmp_path / "w", "d", fresh=False):
        assert Path(tempfile.gettempdir()) == (tmp_path / "w" / "tmp").resolve()
        assert Path(os.environ["MPLCONFIGDIR"]).is_dir()
    assert os.environ.get("TMPDIR") == before
    assert sorted(entry.name for entry in (tmp_path / "w").iterdir()) == [".genescale-demo"]


def test_plan_digest_follows_every_choice() -> None:
    assert plan_digest({"a": 1, "b": [2]}) == plan_digest({"b": [2], "a": 1})
    assert plan_digest({"a": 1}) != plan_digest({"a": 2})


def test_the_bucket_copy_follows_changes_and_comes_back(s3_store: tuple[Store, str], tmp_path: Path) -> None:
    store, bucket = s3_store
    store.write(f"{bucket}/a/one", b"1")
    store.write(f"{bucket}/two words", b"2")
    save_bucket(store, bucket, tmp_path / "copy")
    store.write(f"{bucket}/a/one", b"changed")
    store.delete(f"{bucket}/two words")
    store.write(f"{bucket}/a/three", b"3")
    save_bucket(store, bucket, tmp_path / "copy")
    # What an interrupted copy left behind is in the folder, but not in its index.
    (tmp_path / "copy" / "half").write_bytes(b"?")
    assert load_bucket(store, f"{bucket}-back", tmp_path / "copy") == 2
    back = {entry.uri.removeprefix(f"{bucket}-back/"): store.read(entry.uri) for entry in store.list(f"{bucket}-back")}
    assert back == {"a/one": b"changed", "a/three": b"3"}


def test_a_copy_that_is_cut_off_comes_back(
    s3_store: tuple[Store, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bucket = s3_store
    for name in ("kept", "passing"):
        store.write(f"{bucket}/{name}", b"1")
    save_bucket(store, bucket, tmp_path / "copy")
    store.delete(f"{bucket}/passing")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("write", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(*((store, step) if step == "write" else (Path, step)), killed)
            with pytest.raises(KeyboardInterrupt):
                save_bucket(store, bucket, tmp_path / "copy")
        assert load_bucket(store, f"{bucket}-back", tmp_path / "copy") in (1, 2)


def test_the_page_escapes_what_it_shows() -> None:
    page = Page("<b>", "lead & more")
    page.table(["gene", "shift"], [["<script>alert(1)</script>", 0.123456], ["b", None]])
    page.code("a < b")
    text = page.html()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "0.1235" in text
    assert "lead &amp; more" in text


@pytest.mark.parametrize(("value", "text"), [(12345, "12,345"), (0.00012345, "0.0001234"), (None, "–"), ("x", "x")])
def test_numbers_are_shown_for_reading(value: object, text: str) -> None:
    assert shown(value) == text  # type: ignore[arg-type]
