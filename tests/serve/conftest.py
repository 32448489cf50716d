"""What the servers of these tests serve."""

import pytest

from flowspec import Engine, RankLost
from flowspec.files import ROOT
from flowspec.models.split import split


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A configuration of the shipped models, whose texts are text, that drafts all the time."""
    folder = tmp_path_factory.mktemp("demo")
    split(str(ROOT / "demo" / "target"), 2, folder / "split")
    path = folder / "tiny.yaml"
    draft = ROOT / "demo" / "draft"
    path.write_text(f"""
stages: split
method: serial
tree: {{budget: 16}}
drafter: {{kind: lm, path: {draft}}}
threads: 1
sampling: {{max_new_tokens: 6}}
""")
    return path


@pytest.fixture(scope="session")
def served(demo):
    from tests.serve.serving import serving

    with Engine.from_config(demo) as engine, serving(engine) as served:
        yield served


@pytest.fixture(scope="module")
def slow(pair):
    """One on which 150 tokens take seconds; two texts may be asked for at a time."""
    from tests.serve.serving import serving

    with Engine.from_config(pair.config(1), ["method=ar", "emulate.stage_ms=40"]) as engine:
        with serving(engine, most_texts=2) as served:
            yield served


@pytest.fixture
def fragile(pair):
    """One whose ring can be broken: `break_it()` loses rank 1."""
    from tests.serve.serving import serving

    engine = Engine.from_config(pair.config(1), ["method=ar", "emulate.stage_ms=40"])
    with serving(engine) as served:
        served.break_it = lambda: engine._transport.inbox.fail(
            RankLost("rank 1 (stage 1) died: a test")
        )
        yield served
