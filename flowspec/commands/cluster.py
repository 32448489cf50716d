"""`flowspec cluster` (run_cluster.sh) is `flowspec run` over the hosts of a cluster file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from flowspec.cluster.hosts import Cluster, load_cluster
from flowspec.cluster.launch import Job, describe, run
from flowspec.cluster.shipping import TRACE, of_text
from flowspec.commands.options import configuration, split_demo
from flowspec.commands.run import RUN, restarts
from flowspec.config import Config
from flowspec.errors import need
from flowspec.models.manifest import FILE_NAME, Manifest
from flowspec.output import sigterm_interrupts
from flowspec.preflight import manifest_of
from flowspec.secret import own_secret

PROMPTS, RESULTS = "prompts.jsonl", "results.jsonl"
"""These are names in the folder of rank 0's host."""
ABOUT = (
    "Generate text over the hosts of a cluster file: CLUSTER [CONFIG] and the words of `flowspec "
    "run`. Each host gets the files of its own ranks by ssh."
)


def main(words: Sequence[str]) -> int:
    parser = RUN.parser("cluster", ABOUT)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done on each host, and contact none",
    )
    options = parser.parse_intermixed_args(words)
    cluster = _cluster(options)
    path, config = configuration(options)
    if options.dry_run and not (config.stages_path / FILE_NAME).exists():
        return _describe(_job(options, cluster, config, RUN.prompts(options, path)), None)
    split_demo(config)
    cluster.check_ranks(manifest_of(config).topology)
    config, manifest, prompts = RUN.checked(options)
    job = _job(options, cluster, config, prompts)
    if options.dry_run:
        return _describe(job, manifest)
    own_secret()  # a wrong one is said before any host is contacted
    with sigterm_interrupts():
        return run(job, manifest)


def _describe(job: Job, manifest: Manifest | None) -> int:
    for line in describe(job, manifest):
        print(line)
    return 0


def _cluster(options: argparse.Namespace) -> Cluster:
    """Return the cluster of a command line, whose words then are those of `flowspec run`."""
    files = [word for word in options.words if "=" not in word]
    need(1 <= len(files) <= 2, "give a cluster file, and perhaps the run's configuration")
    cluster = load_cluster(files[0])
    config = Path(files[1]) if files[1:] else cluster.config_path
    need(config is not None, f"{cluster.path} names no config: give the run's YAML file behind it")
    stages = cluster.stages_path
    named = [] if stages is None else [f"stages={json.dumps(str(stages))}"]
    given = [word for word in options.words if "=" in word]
    options.words = [str(config), *named, *given]
    options.words += _devices(cluster, configuration(options)[1])
    return cluster


def _devices(cluster: Cluster, config: Config) -> list[str]:
    """Return the override for hosts that say on which device their ranks compute."""
    if all(host.device is None for host in cluster.hosts):
        return []
    base = config.device
    need(
        isinstance(base, str),
        f"device lists ranks, and so do hosts of {cluster.path}: say it in one place",
    )
    return [f"device={json.dumps([cluster.host_of(r).device or base for r in cluster.ranks])}"]


def _job(
    options: argparse.Namespace, cluster: Cluster, config: Config, prompts: Sequence[str]
) -> Job:
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    results = {RESULTS: Path(options.json)} if options.json else {}
    results |= {TRACE: config.trace_path} if config.trace else {}
    first = [word for text in options.stop for word in ("--stop", text)]
    first += ["--prompt-file", PROMPTS] if prompts else []
    first += ["--json", RESULTS] if options.json else []
    first += [f"--{name}" for name in ("chat", "explain") if getattr(options, name)]
    return Job(
        cluster=cluster,
        config=config,
        words=("--log-level", options.log_level),
        first=tuple(first),
        files=(of_text(PROMPTS, lines),) if prompts else (),
        results=results,
        talks=options.chat and not prompts,
        # a conversation is not gone on with
        restart=0 if options.chat else restarts(options) or cluster.restart,
    )
