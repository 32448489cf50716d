"""`flowspec serve` as a command: its options, and a server of processes."""

import importlib.util
import signal
import urllib.error
import urllib.request

import pytest

from flowspec import UserError
from flowspec.commands.serve import SERVE, _settings
from flowspec.http.settings import Settings, warn_if_open
from tests.cluster.conftest import LONG
from tests.dist.conftest import command  # noqa: F401

pytest.importorskip("fastapi", reason="fastapi is not installed (requirements_serve.txt)")


def settings(*words: str, demo) -> Settings:
    return _settings(SERVE.parser("serve", "").parse_args([str(demo), *words]))


def test_it_listens_on_loopback_and_serves_the_configurations_name(demo):
    found = settings(demo=demo)
    assert (found.host, found.port, found.name, found.key, found.log) == (
        "127.0.0.1",
        8000,
        "tiny",
        None,
        False,
    )


def test_the_key_comes_from_the_environment_a_file_or_the_command_line(demo, tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from a file\nmore\n")
    assert settings("--api-key-file", str(file), demo=demo).key == "from a file"
    monkeypatch.setenv("FLOWSPEC_API_KEY", "from outside")
    assert settings(demo=demo).key == "from outside"
    assert settings("--api-key", "given", demo=demo).key == "given"
    assert settings("--api-key-file", str(file), demo=demo).key == "from a file"


@pytest.mark.parametrize(
    "words,said",
    [
        (["--port", "many"], "--port is 'many'"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-requests", "0"], "--max-requests is 0"),
        (["--api-key", " "], "--api-key holds an empty key"),
        (["--api-key-file", "/nowhere/key"], "--api-key-file /nowhere/key: cannot read it"),
        (["--api-key-file", "x", "--api-key", "y"], "give one of them"),
    ],
)
def test_wrong_options_are_named(demo, words, said):
    with pytest.raises(UserError, match=said):
        settings(*words, demo=demo)


def test_what_is_not_installed_is_named_with_its_extra(demo, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    with pytest.raises(UserError, match=r"uvicorn is not installed: .*requirements_serve\.txt"):
        settings(demo=demo)


def test_a_port_that_is_taken_is_named():
    from flowspec.http.server import Server

    first = Server(Settings(name="tiny", port=0))
    with pytest.raises(UserError, match=f"--port {first.port}: .*in use"):
        Server(Settings(name="tiny", port=first.port))
    first.stop("the test is over")


def test_a_server_for_everybody_says_so(capsys):
    warn_if_open(Settings(name="tiny"))
    warn_if_open(Settings(name="tiny", host="0.0.0.0", key="k"))
    assert capsys.readouterr().err == ""
    warn_if_open(Settings(name="tiny", host="0.0.0.0"))
    assert "no --api-key" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        pytest.param(signal.SIGKILL, id="a rank is killed"),
        pytest.param(signal.SIGINT, id="interrupted", marks=LONG),
    ],
)
def test_processes_serve_until_their_end(demo, command, end):  # noqa: F811
    run = command("serve", demo, "--port", "0")
    run.wait_until(lambda: "is served at" in run.err)
    url = run.err.split("is served at ")[1].split()[0].removesuffix("/v1")
    assert urllib.request.urlopen(f"{url}/health").status == 200
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(
        f"{url}/v1/completions", b'{"prompt": "def", "max_tokens": 3}', headers
    )
    assert b'"finish_reason"' in urllib.request.urlopen(asked).read()
    if end == signal.SIGKILL:
        run.signal(2, end)
    else:
        run.process.send_signal(end)
    code = run.end()
    last = run.err.splitlines()[-1]
    if end == signal.SIGKILL:
        assert (
            code == 1
            and last.startswith("flowspec: rank 2 (stage 2")
            and "died: killed by signal 9" in last
        )
    else:
        assert (code, last) == (130, "flowspec: interrupted")
    assert "Traceback" not in run.err
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health")


def test_prompts_are_refused(demo):
    options = SERVE.parser("serve", "").parse_args([str(demo), "--prompt", "x"])
    with pytest.raises(UserError, match="clients send them"):
        SERVE.prompts(options, demo)
