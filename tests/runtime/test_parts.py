"""`flowspec generate --out`: processes share the prompts, and what is finished is not written again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flowspec.cli import main as cli
from flowspec.commands.parts import Parts
from flowspec.errors import UserError
from flowspec.files import ROOT

PROMPTS = [f"def f{k}(a):" for k in range(7)]


@pytest.fixture
def words(pair, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["generate", "--target", pair.target, "--draft", pair.draft, "--prompts", prompts]
    words += ["--max-new-tokens", 8, "--seed", 3, "--temperature", 0.8]
    return [str(word) for word in words]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(records):
    return [record["token_ids"] for record in records]


@pytest.fixture
def want(words, tmp_path):
    assert cli([*words, "--json", str(tmp_path / "want.jsonl")]) == 0
    return texts(lines(tmp_path / "want.jsonl"))


def test_processes_share_a_list_and_the_first_makes_it_whole(words, want, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert not out.exists()
        assert cli([*words, "--out", str(out), "--batch-size", "2"]) == 0
    records = lines(out)
    assert texts(records) == want and [r["prompt"] for r in records] == [*range(7)]
    assert not (tmp_path / "o.jsonl.parts").exists()


def test_what_is_finished_is_not_written_again(words, want, tmp_path, monkeypatch):
    """A kill after three prompts, in the midst of the fourth's line; then two processes go on."""
    out, keep, kept = tmp_path / "o.jsonl", Parts.keep, []

    def until_the_fourth(self, k, record):
        if len(kept) == 3:
            self._file.write(b'{"prompt": 3, "tok')
            self._file.flush()
            raise KeyboardInterrupt
        kept.append(k)
        keep(self, k, record)

    monkeypatch.setattr(Parts, "keep", until_the_fourth)
    assert cli([*words, "--out", str(out)]) == 130
    part = tmp_path / "o.jsonl.parts" / "0.jsonl"
    before = part.read_text().splitlines()[:3]
    again = []
    monkeypatch.setattr(Parts, "keep", lambda self, k, r: (again.append(k), keep(self, k, r)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert cli([*words, "--out", str(out)]) == 0
    assert kept == [0, 1, 2] and sorted(again) == [3, 4, 5, 6]
    assert texts(lines(out)) == want and out.read_text().splitlines()[:3] == before


def test_parts_of_another_run_are_not_gone_on_with(words, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    Parts(str(out), {"method": "ar"}, 3, 1, 2).keep(1, {})
    assert cli([*words, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "o.jsonl.parts was begun with another" in said and said.count("\n") == 1
    assert (tmp_path / "o.jsonl.parts" / "1.jsonl").exists()


def test_two_runs_do_not_write_the_same_part(tmp_path):
    first = Parts(str(tmp_path / "o"), {}, 3, 0, 1)
    with pytest.raises(UserError, match="another run is writing it"):
        Parts(str(tmp_path / "o"), {}, 3, 0, 1)
    assert first.mine() == [0, 1, 2]


@pytest.mark.parametrize(
    "more,line",
    [(["--out", "{folder}"], "is a folder"), (["--out", "o", "--json", "p"], "leave one out")],
)
def test_what_is_wrong_is_one_line(words, tmp_path, more, line, capsys):
    assert cli([*words, *(word.format(folder=tmp_path) for word in more)]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_killed_launch_is_gone_on_with(words, want, tmp_path):
    """torchrun's processes are killed when the first texts are there, and started anew."""
    out, parts = tmp_path / "o.jsonl", tmp_path / "o.jsonl.parts"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    launch += ["-m", "flowspec", *words, "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(launch, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not any(part.stat().st_size for part in parts.glob("*.jsonl")):
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    # torchrun's processes are in sessions of their own
    while subprocess.run(["pkill", "-9", "-f", str(out)], check=False).returncode == 0:
        time.sleep(0.1)
    assert subprocess.run(launch, env=env, stderr=subprocess.DEVNULL, timeout=240).returncode == 0
    assert texts(lines(out)) == want and not parts.exists()
