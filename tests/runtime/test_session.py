"""What rank 0 says: results are written whole or kept beside."""

import errno
import json
import os
import threading
from types import SimpleNamespace

import pytest

from flowspec import Engine, UserError, files
from flowspec.commands import session
from flowspec.files import PARTIAL, beside_of, kept_lines, replacing
from flowspec.models.weights import write_file
from flowspec.preflight import check_writable


def test_results_get_their_name_when_all_are_there(pair, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    path.write_text("older")
    with Engine.from_config(pair.config(1)) as engine:
        session.run(engine, ["def", "for i"], [], str(path), chat=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 and all(line["new_tokens"] == 40 for line in lines)
    assert not beside_of(str(path)).exists()


def test_a_full_disk_keeps_what_was_written(pair, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("older")
    real, calls = files._add_line, []

    def refuse(line):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(file, *line):
        calls.append(line)
        real(
            file
            if len(calls) == 1
            else SimpleNamespace(write=refuse, close=file.close, name=file.name),
            *line,
        )

    with Engine.from_config(pair.config(1)) as engine:
        monkeypatch.setattr(files, "_add_line", full)
        with pytest.raises(
            UserError, match="No space left on device; what it holds so far is kept"
        ):
            session.run(engine, ["def", "for i"], [], str(path), chat=False)
    assert path.read_text() == "older" and len(beside_of(str(path)).read_text().splitlines()) == 1


def test_a_place_that_cannot_be_written_is_named_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="--json: cannot write"):
        check_writable(str(tmp_path / "no" / "out.jsonl"))
    check_writable("/dev/null")
    check_writable(str(tmp_path / "out.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_as_it_is_and_keeps_its_place(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with replacing(pipe) as beside:
        assert beside == pipe
    assert pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_that_is_full_is_named_in_one_line(pair):
    """A real one: what stays buffered fails again when the file is closed."""
    with (
        Engine.from_config(pair.config(1)) as engine,
        pytest.raises(UserError, match="--json: cannot write /dev/full: No space left"),
    ):
        session.run(engine, ["def"], [], "/dev/full", chat=False)


def test_a_link_at_the_partial_name_is_not_followed(tmp_path):
    mine, theirs = tmp_path / "results.jsonl", tmp_path / "theirs"
    theirs.write_text("precious")
    for path, writes in (
        (mine, lambda: _replace(mine)),
        (tmp_path / "lines", lambda: _keep(tmp_path / "lines")),
        (tmp_path / "weights", lambda: write_file(tmp_path / "weights", [b"new\n"], 4)),
    ):
        for ending in (PARTIAL, f"{PARTIAL}-{os.getpid()}-{threading.get_ident()}"):
            path.with_name(path.name + ending).symlink_to(theirs)
        writes()
        assert theirs.read_text() == "precious" and path.read_text() == "new\n"
        assert not path.is_symlink()
    beside_of(mine).unlink()
    beside_of(mine).symlink_to(tmp_path / "nothing yet")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(str(mine))
    assert not (tmp_path / "nothing yet").exists()


@pytest.mark.parametrize("writes", ["_replace", "_keep"])
def test_what_somebody_laid_at_the_partial_name_is_not_written_to(tmp_path, writes):
    """A link to a folder or a device, or a pipe, that has the name of the file beside."""
    path = tmp_path / "results.jsonl"
    for ending in (PARTIAL, f"{PARTIAL}-{os.getpid()}-{threading.get_ident()}"):
        path.with_name(path.name + ending).symlink_to("/dev/null")
    globals()[writes](path)
    assert path.read_text() == "new\n" and not path.is_symlink()


def _replace(path) -> None:
    with replacing(path) as beside:
        beside.write_text("new\n")


def _keep(path) -> None:
    with kept_lines(path, "--json") as write:
        write("new")


def test_what_fails_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "older" and [p.name for p in tmp_path.iterdir()] == ["table.md"]
