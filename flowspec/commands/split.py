"""`flowspec split` and split_models.py cut a checkpoint into a folder for each rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flowspec.cluster.plan import load_plan
from flowspec.errors import need
from flowspec.models.families import read_config
from flowspec.models.hub import MODEL_FILES, local_folder
from flowspec.models.split import Screen, split
from flowspec.output import Parser, command, sigterm_interrupts


def parser() -> Parser:
    each = Parser(
        prog="split_models.py", description="Cut a Hugging Face checkpoint into one folder a rank."
    )
    each.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="folder with a safetensors checkpoint, or a name on the Hugging Face hub",
    )
    each.add_argument(
        "--stages",
        type=int,
        metavar="N",
        help="number of stages; there is one rank more, the coordinator (default with "
        "--tensor-parallel: 1)",
    )
    each.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="T",
        help="number of ranks that share each stage (default: 1)",
    )
    each.add_argument(
        "--output",
        required=True,
        metavar="OUT",
        help="folder to write; an older split there is replaced",
    )
    each.add_argument(
        "--layers",
        metavar="8,8,8,8",
        help="layers of each stage (default: near equal, the later stages get the remainder)",
    )
    each.add_argument(
        "--plan",
        metavar="FILE",
        help="what flowspec plan --out wrote, instead of --stages, --layers and --tensor-parallel",
    )
    each.add_argument(
        "--dtype",
        default="auto",
        metavar="auto|float32|float16|bfloat16",
        help="dtype to store (default: auto, as it is)",
    )
    return each


@command
def main(argv: Sequence[str]) -> int:
    """Split and return the exit code: 0, 2 for bad input (one line on stderr), 130 when
    interrupted."""
    args = parser().parse_args(argv)
    stages, members, layers = _planned(args) if args.plan else _asked(args)
    with sigterm_interrupts():
        split(
            args.model,
            stages,
            args.output,
            members=members,
            layers=layers,
            dtype=args.dtype,
            progress=Screen(),
        )
    return 0


def _asked(args: argparse.Namespace) -> tuple[int, int, str | None]:
    """Return the number of stages, the ranks of each, and its layers, as flags say."""
    need(
        args.stages is not None or args.tensor_parallel is not None,
        "give --stages N, --tensor-parallel T or both, or --plan FILE",
    )
    stages, members = (
        1 if number is None else number for number in (args.stages, args.tensor_parallel)
    )
    return stages, members, args.layers


def _planned(args: argparse.Namespace) -> tuple[int, int, Sequence[int]]:
    """Return the same as a plan says. Raise UserError if it is one of another model."""
    for name in ("stages", "layers", "tensor_parallel"):
        flag = "--" + name.replace("_", "-")
        need(getattr(args, name) is None, f"--plan says it already: leave out {flag}")
    plan = load_plan(args.plan)
    plan.check_model(
        read_config(local_folder(args.model, "--model", MODEL_FILES)), f"--plan {args.plan}"
    )
    return len(plan.stages), plan.members, plan.layers
