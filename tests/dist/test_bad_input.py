"""Bad input is one line that names the field or the file, and exit code 2, before any rank is started."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from flowspec import cli
from flowspec.commands import ring
from tests.dist.conftest import PATIENCE, PATIENT, ROOT


@pytest.fixture
def refused(capsys, monkeypatch):
    """`refused(*words)`: the one line that the command prints."""
    monkeypatch.setattr(ring, "launch", lambda *_: pytest.fail("ranks were about to be started"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words: object) -> str:
        capsys.readouterr()
        code = cli.main(["run", *map(str, words)])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("flowspec: ") and "Traceback" not in err, err
        return err

    return run


def test_what_is_right_is_not_refused(pair, monkeypatch):
    started = []
    monkeypatch.setattr(ring, "launch", lambda argv, world_size, restart: started.append(world_size) or 0)
    for words in [
        ["--prompt", "a"],
        ["--chat"],
        ["--prompt", "a", "--temperature", "0.5", "device=[cpu, cpu, cpu]", "emulate.stage_ms=[1, 2]"],
    ]:
        assert cli.main(["run", str(pair.config(2)), *words]) == 0  # the draft pads its vocabulary otherwise than its tokenizer
    assert [topology.world_size for topology in started] == [3, 3, 3]


@pytest.mark.parametrize(
    "words,named",
    [
        (["tree.bugdet=3"], ["tree.bugdet", "tree.budget"]),
        (["metod=ar"], ["metod", "method"]),
        (["emulate.speed=3"], ["emulate.speed", "stage_ms"]),
        (["--method", "fast"], ["method", "fast", "flowspec"]),
        (["--method", "flowspce"], ["method", "did you mean flowspec"]),
        (["dsi.servers=0"], ["dsi.servers is 0", "at least 1"]),
        (["drafter.kind=ngrma"], ["drafter.kind", "did you mean ngram"]),
        (["drafter.kind=oracle"], ["drafter.kind", "oracle", "ngram"]),
        (["drafter.path=no/where"], ["drafter.path", "no/where"]),
        (["drafter={kind: lm}"], ["drafter.path"]),
        (["drafter={path: demo/draft}"], ["drafter.kind", "missing", "eagle3"]),
        (["sampling={seed: 1, top_k: 2, seed: 3}"], ["sampling=", "seed is given twice"]),
        (["tree.top_k=21"], ["tree.top_k is 21", "20"]),
        (["drafter=lm"], ["drafter"]),
        (["drafter=[{kind: ngram}]", "drafter.path=x"], ["drafter.path=x", "drafter is a list"]),
        (["stages=no/where"], ["no/where"]),
        (["stages=3"], ["stages", "3"]),
        (["dtype=float8"], ["dtype", "float8", "float16"]),
        (["verify_on=first"], ["verify_on", "first"]),
        (["threads=0"], ["threads"]),
        (["cache_mb=0"], ["cache_mb"]),
        (["tree.budget=many"], ["tree.budget", "many"]),
        (["tree.budget=0"], ["tree.budget"]),
        (["sampling=3"], ["sampling", "3"]),
        (["sampling.seed=-1"], ["sampling.seed", "-1"]),
        (["emulate.stage_ms=[1, 2, 3]"], ["emulate.stage_ms", "3", "2"]),
        (["emulate.link_ms=-1"], ["emulate.link_ms", "-1"]),
        (["emulate.link_mbps=0"], ["emulate.link_mbps"]),
        (["device=[cpu, cpu]"], ["device", "2", "3"]),
        (["tree.budget={"], ["tree.budget={", "YAML"]),
        (["=3"], ["=3", "key=value"]),
        (["tree.budget"], ["tree.budget"]),
        (["--prompt", ""], ["prompt 2", "empty"]),
        (["--prompt", "a\n" * 400], ["prompt 2", "160"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--temperature", "warm"], ["--temperature", "warm"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-p", "1.5"], ["top_p", "1.5"]),
        (["--top-k", "-3"], ["top_k", "-3"]),
        (["--top-k", "2.5"], ["--top-k", "2.5", "whole number"]),
        (["--min-p", "2"], ["min_p", "2"]),
        (["--seed", "lucky"], ["--seed", "lucky"]),
        (["--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (["--max-new-tokens"], ["--max-new-tokens"]),
        (["--colour"], ["--colour"]),
        (["--log-level", "loud"], ["--log-level", "loud"]),
        (["--prompt-file", "no/prompts.txt"], ["--prompt-file", "no/prompts.txt"]),
        (["--prompt-file", "prompts.csv"], ["--prompt-file", "prompts.csv", ".jsonl"]),
        (["--json", "no/where/results.jsonl"], ["--json", "no/where"]),
        (["--json", "/proc/results.jsonl"], ["--json", "/proc"]),  # a folder that nobody can write to, root included
        (["--json", "/"], ["--json", "/"]),
    ],
    ids=lambda value: " ".join(value)[:40].strip() if isinstance(value, list) else None,
)
def test_a_wrong_word_is_refused_by_name(pair, refused, words, named):
    line = refused(pair.config(2), "--prompt", "for", *words)
    assert [name for name in named if name not in line] == [], line


@pytest.mark.parametrize(
    "argv,named",
    [
        ([], "command"),
        (["fly"], "fly"),
        (["verify", "--chat"], "--chat"),
        (["bench", "compare", "--without", "refresh,nonsense"], "--without: 'nonsense'"),
        (["bench", "compare", "--without", ""], "--without: ''"),
        (["bench", "compare", "--max-new-tokens", "1"], "max_new_tokens is 1"),
        (["bench", "load", "--requests", "1,0"], "--requests is 1,0"),
        (["bench", "load", "--requests", "many"], "--requests"),
        (["bench", "load", "--repeats", "0"], "--repeats is 0"),
        (["bench", "laod"], "compare, load, sampling and specexec"),
        (["bench", "load", "--output", "no/where/runs.jsonl"], "--output: cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_is_refused_by_name(capsys, argv, named):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("flowspec: ") and named in err


@pytest.mark.parametrize(
    "text,named",
    [
        (None, "cannot read"),
        (b"", "no mapping"),
        (b"- 1\n- 2\n", "no mapping"),
        (b"stages: [1\nmethod: ar\n", "not valid YAML (line"),
        (b"stages: 'a\n\tb: {", "not valid YAML"),
        (b"\xff\xfe\x00stages", "not valid YAML"),
        (b"method: ar\n", "stages is missing"),
    ],
)
def test_a_wrong_configuration_file_is_refused_by_name(tmp_path, refused, text, named):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_bytes(text)
    line = refused(path, "--prompt", "for")
    assert named in line and ("mine.yaml" in line or "stages" in named)


@pytest.mark.parametrize("which,named", [("no/where", "no such folder"), ("empty", "config.json"), ("draft", "another embedding")])
def test_a_wrong_reference_is_refused_by_name(pair, tmp_path, capsys, monkeypatch, which, named):
    monkeypatch.setattr(ring, "launch", lambda *_: pytest.fail("ranks were about to be started"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = {"empty": tmp_path, "draft": pair.draft}.get(which, which)
    config = str(pair.config(2))
    capsys.readouterr()  # what the split says
    assert cli.main(["verify", config, "--prompt", "for", "--reference", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("flowspec: --reference") and str(folder) in err
    assert named in err


def test_a_folder_and_two_files_are_no_configuration(tmp_path, pair, refused):
    assert str(tmp_path) in refused(tmp_path, "--prompt", "for")
    assert "one configuration at a time" in refused(pair.config(2), pair.config(3), "--prompt", "for")


def test_a_run_wants_a_prompt(pair, refused):
    assert "--prompt" in refused(pair.config(2))


@pytest.mark.parametrize(
    "name,text,named",
    [
        ("none.txt", b"\n\n", "none.txt holds no prompt"),
        ("bytes.txt", b"\xff\xfe\xfd", "bytes.txt is not UTF-8"),
        ("word.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "word.jsonl line 2"),
        ("number.jsonl", b'{"prompt": 5}\n', "number.jsonl line 1"),
        ("list.jsonl", b'["prompt"]\n', "list.jsonl line 1"),
        ("text.jsonl", b'{"prompt": "a"}\n\nprompt\n', "text.jsonl line 3"),
        ("empty.jsonl", b'{"prompt": ""}\n', "prompt 1 is empty"),
    ],
)
def test_a_wrong_prompt_file_is_refused_by_name_and_line(tmp_path, pair, refused, name, text, named):
    (tmp_path / name).write_bytes(text)
    assert named in refused(pair.config(2), "--prompt-file", tmp_path / name)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, cut_in_half, remove])
@pytest.mark.parametrize(
    "file", ["rank_00/tokenizer.json", "rank_01/model.safetensors", "rank_02/model.safetensors", "rank_02/config.json"]
)
def test_a_damaged_file_of_the_split_is_refused_by_name(damaged, refused, file, damage):
    config, split, _ = damaged
    damage(split / file)
    assert str(split / file) in refused(config, "--prompt", "for")


@pytest.mark.parametrize("damage", [cut_in_half, remove])
@pytest.mark.parametrize("file", ["split/stages.yaml", "draft/tokenizer.json", "draft/config.json", "draft/model.safetensors"])
def test_a_damaged_manifest_or_draft_is_refused_by_name(damaged, refused, file, damage):
    config, _, _ = damaged
    damage(config.parent / file)
    line = refused(config, "--prompt", "for")
    assert file.split("/")[1] in line or (damage is remove and str(config.parent / "draft") in line)


def test_a_manifest_of_a_newer_version_is_refused(damaged, refused):
    config, split, _ = damaged
    path = split / "stages.yaml"
    path.write_text(path.read_text().replace("format: 1", "format: 3"))
    assert "newer flowspec (format 3" in refused(config, "--prompt", "for")


@pytest.mark.parametrize("verify_on,folder", [("coordinator", "rank_00"), ("last", "rank_02")])
def test_only_the_lm_head_that_will_be_used_is_checked(damaged, refused, monkeypatch, verify_on, folder):
    config, split, _ = damaged
    heads = {path.parent.name: path for path in split.glob("rank_*/lm_head.safetensors")}
    assert sorted(heads) == ["rank_00", "rank_02"]
    flip_a_byte(heads.pop(folder))
    words = [config, "--prompt", "for", f"verify_on={verify_on}"]
    assert f"{folder}/lm_head.safetensors" in refused(*words)
    [(_, other)] = heads.items()
    (split / folder / "lm_head.safetensors").write_bytes(other.read_bytes())
    other.unlink()
    monkeypatch.setattr(ring, "launch", lambda *_: 0)
    assert cli.main(["run", *map(str, words)]) == 0


def test_a_draft_with_other_tokens_is_refused(damaged, refused):
    config, _, draft = damaged
    path = draft / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    line = refused(config, "--prompt", "for")
    assert "drafter.path" in line and "tokens 2 differ" in line and "'a'" in line


@pytest.mark.slow
def test_a_world_of_the_wrong_size_is_named_by_both_numbers(pair, command):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    run = command(pair.config(2), "--prompt", "for", start=(*torchrun, "launch/run.py"))
    assert run.end() != 0
    [line] = {line for line in run.err.splitlines() if line.startswith("flowspec: ")}  # said once, or by both ranks
    assert "wrong world size" in line and "3 ranks" in line and "started 2" in line


def with_copy_of(head, kind, pair, folder):
    copy, config = folder / head.name, folder / f"{kind}.yaml"
    shutil.copytree(head, copy)
    config.write_text(f"stages: {pair.split(2)}\ndrafter: {{kind: {kind}, path: {copy.name}}}\n")
    return config, copy


@pytest.fixture
def eagle(pair, tmp_path):
    """A configuration with a copy of the pair's EAGLE head: (config, head), free to be damaged."""
    return with_copy_of(pair.head, "eagle", pair, tmp_path)


@pytest.fixture
def eagle3(deep, tmp_path):
    """The same with an EAGLE-3 head of the deep pair."""
    return with_copy_of(deep.head3, "eagle3", deep, tmp_path)


@pytest.fixture
def started(monkeypatch):
    """`started(*words)`: the command gets as far as to start ranks."""
    monkeypatch.setattr(ring, "launch", lambda *_: 0)
    return lambda *words: cli.main(["run", *map(str, words), "--prompt", "for"]) == 0


def test_a_head_that_fits_is_not_refused(eagle, eagle3, started):
    assert started(eagle[0]) and started(eagle3[0])


def changed(head, **keys) -> None:
    content = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(content | keys))


@pytest.mark.parametrize(
    "key,value,named",
    [
        ("hidden_size", 64, ["config.json", "hidden_size is 64", "the target's is 48", "trained for this target"]),
        ("vocab_size", 4096, ["config.json", "vocab_size is 4096", "320"]),
        ("num_hidden_layers", 6, ["num_hidden_layers is 6", "drafter.kind: lm"]),
        ("draft_vocab_size", 100, ["EAGLE-3", "set drafter.kind: eagle3"]),
        ("model_type", "rwkv", ["model_type 'rwkv' is not supported"]),
    ],
)
def test_a_head_of_another_target_is_refused(eagle, refused, key, value, named):
    config, head = eagle
    changed(head, **{key: value})
    line = refused(config, "--prompt", "for")
    assert [name for name in named if name not in line] == [], line


READS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    "key,value,named",
    [
        ("hidden_size", 64, ["hidden_size is 64", "the target's is 48", "trained for this target"]),
        ("target_hidden_size", 64, ["target_hidden_size is 64", "the target's is 48"]),
        ("vocab_size", 4096, ["vocab_size is 4096", "320"]),
        ("draft_vocab_size", 100, ["lm_head.weight has shape [200, 48]", "for kind eagle3 it must be [100, 48]"]),
        ("norm_before_fc", True, ["norm_before_fc", "not supported"]),
        ("fc_norm", True, ["fc_norm", "not supported"]),
        ("eagle_config", {"use_aux_hidden_state": False}, ["the last layer alone"]),
        ("eagle_config", {READS: [1, 2, 3]}, [f"{READS} is [1, 2, 3]", "layers [2, 4, 5] of this target"]),
        (READS, [1, 2, 3], [f"{READS} is [1, 2, 3]"]),
    ],
)
def test_an_eagle3_head_of_another_target_or_kind_is_refused(eagle3, refused, key, value, named):
    config, head = eagle3
    changed(head, **{key: value})
    line = refused(config, "--prompt", "for")
    assert [name for name in named if name not in line] == [], line


@pytest.mark.parametrize("reads", [[2, 4, 5], [1, 3, 4]])
def test_layers_may_be_counted_by_what_enters_or_by_what_leaves(eagle3, started, reads):
    config, head = eagle3
    changed(head, eagle_config={READS: reads, "use_aux_hidden_state": True}, num_hidden_layers=8, draft_vocab_size=200)
    assert started(config)


@pytest.mark.parametrize("name", ["fc.weight", "norm.weight", "lm_head.weight", "d2t"])
def test_an_eagle3_head_that_lacks_something_is_refused_by_name(eagle3, refused, name):
    config, head = eagle3
    tensors = load_file(head / "model.safetensors")
    del tensors[name]
    save_file(tensors, head / "model.safetensors")
    assert f"{head} has no tensor {name}" in refused(config, "--prompt", "for")


def test_heads_of_one_kind_given_as_the_other_are_refused(eagle, eagle3, pair, deep, refused):
    assert "set drafter.kind: eagle3" in refused(eagle3[0], "--prompt", "for", "drafter.kind=eagle")
    assert "for kind eagle3 it must be [48, 144]" in refused(eagle3[0], "--prompt", "for", f"drafter.path={deep.head}")
    assert "the target has 6 layers, EAGLE-3 needs 7 or more" in refused(eagle3[0], "--prompt", "for", f"stages={pair.split(2)}")


@pytest.mark.parametrize("kind", ["lm", "eagle", "eagle3"])
def test_a_path_may_be_a_name_on_the_hub(pair, deep, started, refused, monkeypatch, kind):
    asked = []
    config, place = {"lm": (pair, "draft"), "eagle": (pair, "head"), "eagle3": (deep, "head3")}[kind]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(getattr(config, place)))
    words = [config.config(2, None, kind), "--prompt", "for"]
    monkeypatch.setattr(ring, "launch", lambda *_: 0)
    assert started(words[0], f"drafter.path=somebody/{kind}-of-the-pair") and asked == [f"somebody/{kind}-of-the-pair"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: 1 / 0)
    line = refused(*words, f"drafter.path=somebody/{kind}-that-is-not-there")
    assert f"drafter.path somebody/{kind}-that-is-not-there: no such folder, and the Hugging Face hub did not give it: division" in line


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [cut_in_half, remove])
def test_a_damaged_head_is_refused_by_name(eagle, refused, file, damage):
    config, head = eagle
    damage(head / file)
    assert file in refused(config, "--prompt", "for")


def test_what_is_no_head_is_refused_by_name(eagle, refused, pair):
    config, head = eagle
    assert "kind eagle needs the folder of a head" in refused(config, "--prompt", "for", "drafter={kind: eagle}")
    assert "drafter.path nowhere: no such folder" in refused(config, "--prompt", "for", "drafter.path=nowhere")
    assert "is an EAGLE head" in refused(config, "--prompt", "for", "drafter.kind=lm")
    shutil.copy(pair.draft / "model.safetensors", head)
    assert f"{head} has no tensor fc.weight" in refused(config, "--prompt", "for")


@pytest.mark.parametrize("verify_on,heads", [("last", ["rank_00", "rank_02"]), ("coordinator", ["rank_00"])])
def test_an_eagle_head_needs_the_lm_head_beside_rank_0(damaged, pair, refused, verify_on, heads):
    config, split, _ = damaged
    words = [config, "--prompt", "for", f"drafter={{kind: eagle, path: {pair.head}}}", f"verify_on={verify_on}"]
    for folder in heads:
        flip_a_byte(split / folder / "lm_head.safetensors")
        assert f"{folder}/lm_head.safetensors" in refused(*words)
        flip_a_byte(split / folder / "lm_head.safetensors")


def test_a_key_given_twice_is_refused_by_name_and_line(pair, refused, tmp_path):
    text = pair.config(2).read_text()
    for more, named in (("method: ar\nmethod: flowspec\n", "method"), ("sampling:\n  seed: 1\n  seed: 2\n", "seed")):
        rest = "".join(line for line in text.splitlines(True) if not line.startswith((more.split(":")[0], " ")))
        path = tmp_path / "twice.yaml"
        path.write_text(rest + more)
        line = refused(path, "--prompt", "a")
        assert f"{path}: the key {named} is given twice (line {len((rest + more).splitlines())})" in line


# ---- standard output ---------------------------------------------------------------------------------
def said(words, stdout, closed: bool = False) -> tuple[int, str]:
    """Exit code and stderr of `python -m flowspec *words`."""
    start = [sys.executable, "-m", "flowspec", *map(str, words)]
    if closed:
        start = ["sh", "-c", 'exec "$@" >&-', "sh", *start]
    env = {**os.environ, **PATIENT, "PYTHONUNBUFFERED": ""}  # argparse does not mind that its help cannot be written
    done = subprocess.run(start, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=PATIENCE, env=env)
    return done.returncode, done.stderr


@pytest.fixture
def unread():
    """The writing end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def ring_words(pair):
    return ["run", pair.config(1), "--prompt", "for", "--max-new-tokens", "4"]


@pytest.mark.slow
def test_output_that_nobody_reads_ends_a_command_quietly(pair, unread):
    assert said(["--help"], unread) == (141, "")
    code, err = said(ring_words(pair), unread)
    assert code == 141 and "Traceback" not in err and "died" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.slow
def test_output_that_takes_no_more_is_one_line(pair):
    line = "flowspec: cannot write the output: No space left on device\n"
    with open("/dev/full", "w") as full:
        assert said(["--help"], full) == (2, line)
        code, err = said(ring_words(pair), full)
        assert code == 2 and err.endswith(line) and "Traceback" not in err


@pytest.mark.slow
def test_output_that_was_closed_before_is_no_matter(pair):
    assert said(["--help"], None, closed=True) == (0, "")
    code, err = said(ring_words(pair), None, closed=True)
    assert code == 0 and "Traceback" not in err and "4 new" in err
