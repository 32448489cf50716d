"""`flowspec trace FILE` says where the time of a traced run went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flowspec.bench.timeline import MISSING, SHOWN, can_draw, draw, in_words, stages_of, window
from flowspec.output import Parser
from flowspec.trace import read


def _parser() -> Parser:
    parser = Parser(
        prog="flowspec trace", description="Say where the time of a traced run went, and draw it."
    )
    parser.add_argument("file", metavar="FILE", help="what a run wrote with trace=FILE")
    parser.add_argument(
        "--png", metavar="OUT", help="the picture (default: FILE with the suffix .png)"
    )
    parser.add_argument(
        "--from",
        dest="first",
        type=float,
        metavar="S",
        help="draw from this second on (default: where decoding begins)",
    )
    parser.add_argument(
        "--to",
        dest="last",
        type=float,
        metavar="S",
        help=f"draw until this second (default: {SHOWN} s later)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the in_words and draw the picture; raise UserError for bad input."""
    options = _parser().parse_args(argv)
    spans, facts = read(options.file)
    print(in_words(spans, facts))
    if options.png is None and not can_draw():
        print(f"no picture: {MISSING}", file=sys.stderr)
        return 0
    path = options.png or Path(options.file).with_suffix(".png")
    draw(spans, path, facts, window(spans, options.first, options.last, stages_of(facts)))
    print(f"drawn: {path}", file=sys.stderr)
    return 0
