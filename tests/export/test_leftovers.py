"""The next save clears up what killed ones left; what is alive, read-only or another's it leaves alone."""

import os
import signal
import stat
import time
import uuid

import pytest

from grit_optim.export import atomic_folder, temporary
from grit_optim.export.atomic_folder import replaced

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "a.b"
    path.mkdir()
    (path / "weights").write_text("old")
    (path / "notes").write_text("mine")
    return path


def save(path, text="new"):
    with replaced(path) as new:
        (new / "weights").write_text(text)


def killed_in_a_save(path):
    """A process is killed by SIGKILL after it has written its file, before that has taken its place."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with replaced(path) as new:
            (new / "weights").write_text("half")
            os.write(writer, b"x")
            time.sleep(60)
            os._exit(1)
    os.read(reader, 1)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    yield None
    os.close(reader), os.close(writer)


def killed_after(rename):
    """A rename that kills the process instead, where the new folder is to come in."""
    return lambda self, target: os._exit(9) if ".tmp" in self.name else rename(self, target)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize("stays", [False, True], ids=["beside", "inside"])
def test_the_next_save_removes_what_killed_ones_left(adapter, monkeypatch, stays):
    if stays:
        monkeypatch.setattr(os.path, "ismount", lambda place: place == adapter)
    place = adapter if stays else adapter.parent
    for _ in range(3):
        killing = killed_in_a_save(adapter)
        next(killing)
        (alive,) = hidden(place)
        save(adapter, "while another is at work")
        assert hidden(place) == [alive], "a living process's folder is not touched"
        assert (place / alive / "weights").read_text() == "half"
        next(killing)
        assert hidden(place) == [alive]
    save(adapter)
    assert hidden(place) == []
    assert (adapter / "weights").read_text() == "new"
    assert (adapter / "notes").read_text() == "mine"


def test_two_saves_of_one_process_do_not_disturb_each_other(adapter):
    with replaced(adapter) as outer:
        (outer / "weights").write_text("outer")
        save(adapter, "inner")
        assert (adapter / "weights").read_text() == "inner"
    assert (adapter / "weights").read_text() == "outer"
    assert hidden(adapter.parent) == []


@pytest.mark.parametrize("age", [0, 2])
def test_folders_of_other_machines_and_earlier_versions_go_after_a_day(adapter, age):
    names = [f".a.b.{uuid.uuid4().hex}.tmp", f".a.b.00000000-{uuid.uuid4().hex}.tmp"]
    for name in names:
        left = adapter.with_name(name)
        left.mkdir()
        (left / "weights").write_text("half")
        for entry in (left / "weights", left):
            os.utime(entry, (time.time() - age * 86400,) * 2)
    save(adapter)
    assert hidden(adapter.parent) == ([] if age else sorted(names))


def test_names_that_are_not_of_ours_stay(adapter):
    others = [".a.b.tmp", f".axb.{uuid.uuid4().hex}.tmp", f".a.b.{uuid.uuid4().hex}.tmp.old", ".a.tmp"]
    for name in others:
        adapter.with_name(name).mkdir()
        os.utime(adapter.with_name(name), (0, 0))
    elsewhere = adapter.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    link = adapter.with_name(f".a.b.{uuid.uuid4().hex}.tmp")
    link.symlink_to(elsewhere)
    save(adapter)
    assert hidden(adapter.parent) == sorted([*others, link.name])
    assert (elsewhere / "file").read_text() == "kept"


def test_without_locks_saves_work_and_nothing_is_removed(adapter, monkeypatch):
    killing = killed_in_a_save(adapter)
    next(killing), next(killing)
    monkeypatch.setattr(temporary, "fcntl", None)
    save(adapter)
    assert len(hidden(adapter.parent)) == 1
    assert (adapter / "weights").read_text() == "new"


def test_an_old_folder_that_a_killed_save_had_set_aside_is_put_back(adapter, monkeypatch):
    """Where there is no exchange, a process may be killed between the two renames."""
    monkeypatch.setattr(atomic_folder, "exchange", lambda one, other: False)
    child = os.fork()
    if child == 0:
        with replaced(adapter) as new:
            (new / "weights").write_text("half")
            monkeypatch.setattr(type(new), "rename", killed_after(type(new).rename))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not adapter.exists()
    with pytest.raises(KeyboardInterrupt), replaced(adapter):
        raise KeyboardInterrupt
    assert (adapter / "weights").read_text() == "old"
    save(adapter)
    assert (adapter / "notes").read_text() == "mine"
    assert hidden(adapter.parent) == []


@pytest.mark.parametrize("what", ["folder", "file", "parent"])
def test_what_its_owner_made_read_only_is_refused(adapter, what):
    protected = {"folder": adapter, "file": adapter / "weights", "parent": adapter.parent}[what]
    target = adapter.parent / "another" if what == "parent" else adapter
    before = stat.S_IMODE(protected.stat().st_mode)
    protected.chmod(before & ~0o222)
    try:
        with pytest.raises(PermissionError, match=r"read-only, so nothing was saved.*chmod") as caught:
            save(target)
        assert caught.value.filename == str(protected)
    finally:
        protected.chmod(before)
    assert (adapter / "weights").read_text() == "old"
    assert [p.name for p in adapter.parent.iterdir()] == ["a.b"]


def test_a_read_only_file_of_somebody_else_is_carried_over(adapter):
    (adapter / "notes").chmod(0o444)
    save(adapter)
    assert (adapter / "notes").read_text() == "mine"
    assert stat.S_IMODE((adapter / "notes").stat().st_mode) == 0o444


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_another_users_stays_theirs(adapter, what):
    theirs = adapter if what == "folder" else adapter / "notes"
    os.chown(theirs, 12345, 12345)
    inode = theirs.stat().st_ino
    save(adapter)
    assert (adapter / "weights").read_text() == "new"
    assert (theirs.stat().st_uid, theirs.stat().st_ino) == (12345, inode)
    assert hidden(adapter) == hidden(adapter.parent) == []
