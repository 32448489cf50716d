"""The rig of five hosts, once for all tests; the demo model in four stages on it."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.cluster.rig import Rig, lacking
from tests.dist.conftest import ROOT, Command

HOSTS = 5
LONG = pytest.mark.skipif(
    "FLOWSPEC_RIG" not in os.environ, reason="takes long; FLOWSPEC_RIG=1 runs it"
)


@pytest.fixture(scope="session")
def rig(tmp_path_factory):
    if why := lacking():
        pytest.skip(why)
    with Rig(tmp_path_factory.mktemp("rig"), HOSTS) as made:
        yield made


class Site:
    """A cluster file for the rig, whose hosts have folders of their own for this test, and commands that use it."""

    def __init__(self, rig: Rig, folder: Path, stack: ExitStack):
        self.rig, self.folder, self._stack = rig, folder, stack
        self.path = folder / "cluster.yaml"
        self.write()

    def write(self, stages: int = 4, spares: int = 0, **changed: dict) -> None:
        """Write the cluster file, for the demo model in so many stages, with spare hosts; `changed`: keys of hosts, by the host's name."""
        names = self.rig.names[: stages + 1 + spares]
        hosts = [
            {"name": name, "address": self.rig.address(name), "folder": str(self.home(name)), "python": sys.executable}
            | ({"ranks": [k]} if k <= stages else {"spare": True})
            | changed.get(name, {})
            for k, name in enumerate(names)
        ]  # fmt: skip
        run = {
            "stages": str(ROOT / "build" / f"demo_s{stages}"),
            "drafter": {"kind": "lm", "path": str(ROOT / "demo" / "draft")},
            "threads": 1,
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(run))
        ssh = str(self.rig.folder / "ssh_config")
        self.path.write_text(
            yaml.safe_dump({"config": "run.yaml", "ssh_config": ssh, "hosts": hosts})
        )

    def home(self, name: str) -> Path:
        return self.folder / name

    def start(
        self, *words: object, heartbeat: str = "0.5,30", first: tuple[str, ...] = ()
    ) -> Command:
        """What run_cluster.sh runs, at the desk; `first` are words before the cluster file."""
        enter = "import os, sys; os.execvp('ip', ['ip', 'netns', 'exec', *sys.argv[1:]])"
        run = (self.rig.space("desk"), sys.executable, "-m", "flowspec", "cluster", *first)
        env = {"FLOWSPEC_HEARTBEAT": heartbeat}
        command = Command(self.folder, self.path, *words, start=("-c", enter, *run), env=env)
        return self._stack.enter_context(command)

    def alone(self, *words: object) -> list[list[int]]:
        """The tokens that the same run writes on this machine alone."""
        results = self.folder / "alone.jsonl"
        argv = [
            sys.executable,
            "launch/run.py",
            self.folder / "run.yaml",
            *words,
            "--json",
            results,
        ]
        done = subprocess.run(
            list(map(str, argv)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return tokens(results)


def tokens(path: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in path.read_text().splitlines()]


@pytest.fixture
def site(rig, tmp_path):
    with ExitStack() as stack:
        yield Site(rig, tmp_path, stack)
    rig.wait_until_clean()


@pytest.fixture
def far_site(rig, tmp_path):
    """A site of three hosts, whose links delay, lose and are cut as a test says (`site.rig.change`)."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun")
    folder = tmp_path / "rig"
    folder.mkdir()
    with Rig(folder, 3, slow=True) as far, ExitStack() as stack:
        yield Site(far, tmp_path, stack)
        far.wait_until_clean()
