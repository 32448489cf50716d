"""`flowspec cluster` (run_cluster.sh) is `flowspec run` over the hosts of a cluster file.

`flowspec cluster eval` (scripts/run_eval.sh) is `flowspec eval` over them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from flowspec.bench.answers import ANSWERS, CONFIG
from flowspec.cluster.hosts import Cluster, load_cluster
from flowspec.cluster.launch import Job, describe, run
from flowspec.cluster.shipping import TRACE, Parcel, of_text
from flowspec.commands.eval import EVAL, OWN_WORDS, report
from flowspec.commands.options import configuration, split_demo
from flowspec.commands.run import RUN, restarts
from flowspec.config import Config
from flowspec.errors import need
from flowspec.models.manifest import FILE_NAME, Manifest
from flowspec.output import sigterm_interrupts
from flowspec.preflight import manifest_of
from flowspec.secret import own_secret

PROMPTS, RESULTS, DATA = "prompts.jsonl", "results.jsonl", "questions"
"""These are names in the folder of rank 0's host."""
ABOUT = (
    "Generate text over the hosts of a cluster file: CLUSTER [CONFIG] and the words of `flowspec "
    "run`; or first the word `eval`, and those of `flowspec eval`. Each host gets the files of its "
    "own ranks by ssh."
)


def main(words: Sequence[str]) -> int:
    asks = list(words[:1]) == ["eval"]
    command = EVAL if asks else RUN
    parser = command.parser("cluster", ABOUT)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done on each host, and contact none",
    )
    options = parser.parse_intermixed_args(words[1:] if asks else words)
    cluster = _cluster(options)
    path, config = configuration(options)
    placed = cluster.placed(config)
    made = _eval_job if asks else _job
    if options.dry_run and not (config.stages_path / FILE_NAME).exists():
        return _describe(made(options, cluster, config, command.prompts(options, path)), None)
    split_demo(config)
    cluster.check_ranks(manifest_of(config).topology)
    manifest, prompts = command.checked(options, path, placed)
    job = made(options, cluster, config, prompts)
    if options.dry_run:
        return _describe(job, manifest)
    own_secret()  # a wrong one is said before any host is contacted
    for path in job.results.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with sigterm_interrupts():
        code = run(job, manifest)
    return report([Path(options.out)], Path(options.out)) if asks and code == 0 else code


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
    given = [word for word in options.words if "=" in word]
    options.words = [str(config), *cluster.overrides, *given]
    return cluster


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
        command="run",
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


def _eval_job(
    options: argparse.Namespace, cluster: Cluster, config: Config, prompts: Sequence[str]
) -> Job:
    """Return the job whose answers grow on rank 0's host, and come here when they are complete.

    So a run that was interrupted goes on there, if it is started again."""
    need(options.out is not None, "eval writes a folder: say which by --out DIR")
    here, there = Path(options.out), f"eval_{Path(options.out).resolve().name}"
    given = {name: getattr(options, name) for name in OWN_WORDS} | {"data": DATA, "out": there}
    words = [
        (f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None
    ]
    return Job(
        command="eval",
        cluster=cluster,
        config=config,
        words=("--log-level", options.log_level),
        first=tuple(word for pair in words for word in pair),
        files=tuple(_of_data(Path(options.data), options.datasets.split(","))),
        results={f"{there}/{name}": here / name for name in (CONFIG, ANSWERS)},
        talks=False,
        restart=cluster.restart,
    )


def _of_data(folder: Path, datasets: Sequence[str]) -> list[Parcel]:
    paths = [folder / f"{dataset}.jsonl" for dataset in datasets]
    return [of_text(f"{DATA}/{path.name}", path.read_text()) for path in paths]
