"""Several target servers over processes."""

import json

import pytest

from flowspec.text import Text

PROMPT = "for i in range"


@pytest.mark.slow
@pytest.mark.parametrize("stages,members,drafter", [(1, 1, "lm"), (2, 1, "eagle")])
def test_servers_write_the_text_of_plain_decoding(pair, command, stages, members, drafter, tmp_path):
    config, results = pair.config(stages, None, drafter, members), tmp_path / "r.jsonl"
    words = ["--prompt", PROMPT, "--method", "dsi", "dsi.servers=2", "--json", results]
    run = command(config, *words)
    assert run.end() == 0, run.err
    [result] = [json.loads(line) for line in results.open()]
    assert result["token_ids"] == pair.greedy(Text(pair.target).encode(PROMPT), 40)
    assert result["world_size"] == 1 + 2 * stages * members and result["method"] == "dsi"
    assert "rank 2 of " in run.err
