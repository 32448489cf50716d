"""The package as pip installs it: it brings its demo along and writes nothing where it lies."""

import os
import shutil
import subprocess
import sys

import pytest

from flowspec.files import ROOT
from flowspec.version import __version__

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements_plots.txt", "requirements_llama.txt", "requirements_deepspeed.txt", "requirements_offload.txt", "requirements_quant.txt", "requirements_serve.txt")


@pytest.mark.slow
def test_an_installed_package_runs_its_demo_from_an_empty_folder(tmp_path):
    source, place, empty, cache = (tmp_path / name for name in ("source", "place", "empty", "cache"))
    source.mkdir()
    empty.mkdir()
    for folder in ("flowspec", "configs", "demo"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(place), str(source)]
    subprocess.run(pip, check=True, timeout=300)
    files = sorted(place.rglob("*.safetensors"))
    assert len([*(place / "flowspec" / "shipped" / "configs" / "eval").glob("*.jsonl")]) == 6
    env = os.environ | {"PYTHONPATH": str(place), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}

    def said(*words) -> str:
        done = subprocess.run([*map(str, words)], cwd=empty, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    page = ("flowspec", "http", "assets")
    assert [*map(len, (p.read_bytes() for p in sorted(place.joinpath(*page).iterdir())))] == [*map(len, (p.read_bytes() for p in sorted(ROOT.joinpath(*page).iterdir())))]
    assert said(sys.executable, place / "bin" / "flowspec", "--version").strip() == f"flowspec {__version__}"
    assert said(sys.executable, "-m", "flowspec", "run", "--max-new-tokens", "8").startswith("import os")
    assert sorted(place.rglob("*.safetensors")) == files and not list(empty.iterdir()), "what it makes goes to the cache"
    assert (cache / "flowspec" / "demo" / "stages.yaml").exists()
