"""Ranks of one run that read different splits: refused by name before anything is computed, on every rank."""

import json
import socket

import pytest


@pytest.mark.slow
def test_ranks_with_layers_of_two_splits_are_refused_by_name(pair, command, tmp_path):
    """Layers 2 and 3 would run twice: on rank 1 of one split and on rank 2 of another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = tmp_path / "words"
    run = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FLOWSPEC_REPORT": str(words)}
    configs = [pair.config(2, "4,2", "ngram"), pair.config(2, "4,2", "ngram"), pair.config(2, "2,4", "ngram")]
    ranks = [
        command("run", config, "--prompt", "for", start=("-m", "flowspec"), env={**run, "RANK": str(rank)})
        for rank, config in enumerate(configs)
    ]
    assert [rank.end() for rank in ranks] == [2, 2, 2], [rank.err for rank in ranks]
    said = [json.loads(line) for line in words.read_text().splitlines()]
    line = f"rank 2 (stage 2, {socket.gethostname()}) has another split of the model: its stages.yaml says layers 2,4, rank 0's says 4,2"
    assert said == [{"line": line, "code": 2}] * 3
    assert [rank.out + rank.err for rank in ranks] == [""] * 3
