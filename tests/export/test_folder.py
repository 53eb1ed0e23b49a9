"""A folder is replaced as a whole: at every moment the old content or the new, however the process ends."""

import os
import socket

import pytest

from grit_optim.export import atomic_folder


def fill(path, text):
    for name in ("a", "b"):
        (path / name).write_text(text)


def content(path):
    return {p.name: p.read_text() for p in path.iterdir()}


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    fill(path, "old")
    (path / "deep").mkdir()
    (path / "deep" / "c").write_text("kept")
    path.chmod(0o750)
    return path


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
def test_new_files_take_the_place_and_others_stay(old, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic_folder, "exchange", lambda one, other: False)
    with atomic_folder.replaced(old, drop=["b"]) as new:
        (new / "a").write_text("new")
    assert (old / "a").read_text() == "new"
    assert (old / "deep" / "c").read_text() == "kept"
    assert not (old / "b").exists()
    assert old.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in old.parent.iterdir()] == ["x"]


def test_a_new_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "x"
    with atomic_folder.replaced(path) as new:
        fill(new, "new")
        assert not path.exists()
    assert content(path) == {"a": "new", "b": "new"}
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_link_to_a_folder_stays_a_link(old):
    link = old.parent / "link"
    link.symlink_to(old)
    with atomic_folder.replaced(link) as new:
        (new / "a").write_text("new")
    assert link.is_symlink()
    assert (old / "a").read_text() == "new"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder.replaced(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "mine"


def test_without_hard_links_files_are_copied(old, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with atomic_folder.replaced(old) as new:
        (new / "a").write_text("new")
    assert (old / "b").read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("place", ["body", "carry_over", "flush", "take_the_place", "after"])
def test_a_killed_process_leaves_old_or_new(old, place):
    """``os._exit`` runs no ``finally``, as SIGKILL does not."""
    child = os.fork()
    if child == 0:
        if place not in ("body", "after"):
            setattr(atomic_folder, place, lambda *args: os._exit(9))
        with atomic_folder.replaced(old) as new:
            (new / "a").write_text("new")
            if place == "body":
                os._exit(9)
            (new / "b").write_text("new")
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    expected = "new" if place == "after" else "old"
    assert [(old / name).read_text() for name in ("a", "b")] == [expected] * 2


@pytest.mark.parametrize("why", ["working directory", "mount point", "parent"])
def test_a_folder_that_has_to_stay_gets_the_new_files(tmp_path, monkeypatch, why):
    path = tmp_path / "adapter"
    path.mkdir()
    for name in ("weights", "stale", "other"):
        (path / name).write_text("old")
    if why == "working directory":
        monkeypatch.chdir(path)
    elif why == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda place: place == path)
    else:
        monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    inode = path.stat().st_ino
    with pytest.raises(IsADirectoryError), atomic_folder.replaced(path) as new:
        new.write_text("fails")
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "weights": "old",
        "stale": "old",
        "other": "old",
    }
    with atomic_folder.replaced(path, drop=["stale"]) as new:
        (new / "weights").write_text("new weights")
        (new / "config").write_text("new")
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "weights": "new weights",
        "config": "new",
        "other": "old",
    }
    assert path.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_whose_working_directory_is_gone_can_save(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with atomic_folder.replaced(tmp_path / "adapter") as new:
        (new / "weights").write_text("new")
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


def test_pipes_and_sockets_in_the_folder_are_carried_over(old):
    os.mkfifo(old / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(old / "socket"))
        with atomic_folder.replaced(old) as new:
            (new / "weights").write_text("new")
    assert {"pipe", "socket", "weights"} <= set(os.listdir(old))


def test_the_longest_of_names_can_be_saved_to_twice(tmp_path):
    path = tmp_path / ("ü" * 127)
    for text in ("old", "new"):
        with atomic_folder.replaced(path) as new:
            (new / "weights").write_text(text)
    assert (path / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]


def test_two_first_saves_at_once(tmp_path):
    """The other one ends between the look whether there is a folder, and the renaming."""

    class Late(type(tmp_path)):
        def exists(self):
            found = super().exists()
            if not found:
                self.mkdir()
                (self / "weights").write_text("other")
            return found

    new = tmp_path / "new"
    new.mkdir()
    (new / "weights").write_text("mine")
    atomic_folder.take_the_place(new, Late(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "weights").read_text() == "mine"
