"""`flowspec doctor` says whether a run can start on this machine, or on the hosts of a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from flowspec.cluster.doctor import FAULT, can_start, judge
from flowspec.cluster.hosts import load_cluster
from flowspec.cluster.report import Report
from flowspec.cluster.visit import examine, sites_here, sites_of
from flowspec.output import Parser
from flowspec.preflight import check_writable


def _parser() -> Parser:
    parser = Parser(
        prog="flowspec doctor",
        description="Say what is well with the hosts of a run, what is not, and what to do. Exit "
        "code 1: a run cannot start.",
    )
    parser.add_argument(
        "cluster",
        nargs="?",
        metavar="CLUSTER.yaml",
        help="the hosts, as run_cluster.sh takes them (default: this machine)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure neither the hosts' speed nor their links"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write what was found out, for flowspec plan"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    check_writable(options.json)
    sites, report = sites_of(load_cluster(options.cluster)) if options.cluster else sites_here()
    if len(sites) > 1:
        print(f"asking {len(sites)} hosts ...", file=sys.stderr, flush=True)
    report = examine(sites, report, not options.quick)
    findings = judge(report)
    for finding in findings:
        print(f"{finding.state:<8} {finding.line}")
    for line in _matrix(report):
        print(line)
    faults = sum(finding.state == FAULT for finding in findings)
    print("a run can start" if can_start(findings) else f"no run can start: {faults} to mend")
    if options.json:
        report.save(options.json)
    return 0 if can_start(findings) else 1


def _matrix(report: Report) -> Iterator[str]:
    """Yield the lines of the table of the links, ms one way and Mbps."""
    names = list(dict.fromkeys(link.source for link in report.links))
    if not names:
        return
    cells = {
        (link.source, link.target): "no way" if link.error else f"{link.ms:.2f} {link.mbps:.0f}"
        for link in report.links
    }
    width = max(len(cell) for cell in (*names, *cells.values())) + 2
    yield "ms one way and Mbps, from the left to the top"
    yield " " * width + "".join(f"{name:>{width}}" for name in names)
    for source in names:
        row = (cells.get((source, target), "-") for target in names)
        yield f"{source:<{width}}" + "".join(f"{cell:>{width}}" for cell in row)
