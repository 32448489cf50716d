"""Downloads the public questions of the paper's six datasets, for `flowspec eval --data FOLDER`.

Four of them are categories of Spec-Bench (arXiv 2401.07851); HumanEval and Alpaca are in the form
of the EAGLE authors (arXiv 2401.15077). Each file is written beside and renamed."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flowspec.errors import UserError, need
from flowspec.files import replacing
from flowspec.output import Parser, command

HOST = "https://raw.githubusercontent.com/"
SPEC_BENCH = HOST + "hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
EAGLE = HOST + "SafeAILab/EAGLE/main/eagle/data/{}/question.jsonl"
CONVERSATION = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
SOURCES = {
    "mt_bench": (SPEC_BENCH, CONVERSATION),
    "gsm8k": (SPEC_BENCH, ("math_reasoning",)),
    "cnn_dm": (SPEC_BENCH, ("summarization",)),
    "nq": (SPEC_BENCH, ("qa",)),
    "humaneval": (EAGLE.format("humaneval"), ()),
    "alpaca": (EAGLE.format("alpaca"), ()),
}
"""This maps a dataset to where it is, and to its categories there; none stands for all."""
PATIENCE = 30.0
"""In seconds; a server that says nothing for so long is given up."""


def download(url: str) -> str:
    """Return a text; raise UserError where there is no network, or no such file."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} is not there any more ({error.code} {error.reason})") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "reason", error)
        raise UserError(
            f"cannot download {url}: {why}. Without a network, copy a folder that was fetched "
            "elsewhere, or leave out --data: flowspec has questions of its own (configs/eval)"
        ) from None


def questions(text: str, categories: Sequence[str], url: str) -> list[str]:
    """Return the lines of these categories, in our form; raise UserError for another form."""
    lines = []
    for line in text.split("\n"):
        if line.strip():
            try:
                held = json.loads(line)
                kept = {name: held[name] for name in ("question_id", "category", "turns")}
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{url} has not the form of Spec-Bench any more: {line[:60]}"
                ) from None
            if not categories or kept["category"] in categories:
                lines.append(json.dumps(kept, ensure_ascii=False))
    need(bool(lines), f"{url} has no question of {', '.join(categories)}")
    return lines


@command
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the files go, NAME.jsonl each")
    folder, texts = Path(parser.parse_args(argv).folder), dict[str, str]()
    for url in dict.fromkeys(url for url, _ in SOURCES.values()):
        texts[url] = download(url)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (url, categories) in SOURCES.items():
        lines = questions(texts[url], categories, url)
        with replacing(folder / f"{name}.jsonl") as beside:
            beside.write_text("\n".join(lines) + "\n")
        print(f"{folder / name}.jsonl: {len(lines)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
