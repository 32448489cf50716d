"""`flowspec split` and split_models.py cut a checkpoint into a folder for each rank."""

from __future__ import annotations

from collections.abc import Sequence

from flowspec.errors import need
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
    need(
        args.stages is not None or args.tensor_parallel is not None,
        "give --stages N, --tensor-parallel T or both",
    )
    with sigterm_interrupts():
        split(
            args.model,
            1 if args.stages is None else args.stages,
            args.output,
            members=1 if args.tensor_parallel is None else args.tensor_parallel,
            layers=args.layers,
            dtype=args.dtype,
            progress=Screen(),
        )
    return 0
