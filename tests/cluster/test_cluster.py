"""A run over five hosts (network namespaces with an sshd each): it starts, it writes the right text, and nothing of it is left."""

import re

from tests.cluster.conftest import tokens

PROMPT = ("--prompt", "def add(a, b):", "--max-new-tokens", "24")


def copied(err: str) -> dict[str, tuple[int, int]]:
    """Host -> files copied, and files that were there, as the run tells it."""
    found = re.findall(r"^(\w+): (\d+) files \([\d.]+ MB\) copied, (\d+) \(", err, re.MULTILINE)
    return {host: (int(new), int(old)) for host, new, old in found}


def test_from_empty_hosts_to_the_text_and_again_without_copying(site):
    alone = site.alone(*PROMPT)
    for again in (False, True):
        results = site.folder / "results.jsonl"
        command = site.start(*PROMPT, "--json", results)
        assert command.end() == 0, command.err
        assert tokens(results) == alone
        assert command.out.startswith("def add(a, b):")
        assert set(copied(command.err)) == set(site.rig.names)
        assert all(bool(new) is not again and bool(old) is again for new, old in copied(command.err).values())
        site.rig.wait_until_clean(10)
    own = [sorted(path.name for path in (site.home(name) / "stages").glob("rank_*")) for name in site.rig.names]
    assert own == [[f"rank_0{k}"] for k in range(5)]
