"""The house: who may import whom, and what nobody may do. Reads the sources, runs nothing of them but their imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowspec.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "flowspec").rglob("*.py"))
SHIPPED = [
    *PACKAGE,
    *sorted((ROOT / "scripts").rglob("*.py")),
    *sorted((ROOT / "launch").rglob("*.py")),
    ROOT / "split_models.py",
]
LAYERS = [
    {
        "core",
        "errors",
        "version",
        "files",
        "output",
        "schema",
        "trace",
        "estimates",
        "journal",
        "secret",
    },
    {"models", "sampling", "rejection", "text", "comm", "sim"},
    {"draft"},
    {"runtime", "host"},
    {"config", "preflight", "rank", "generation", "engine", "lossless", "launcher"},
    {"bench", "cluster", "http", ""},  # "" is flowspec/__init__.py
    {"commands"},
    {"cli", "__main__"},
]
SIDEWAYS = {  # (room, room of the same layer that it may import); everything else goes down
    ("core", "errors"),
    ("models", "comm"),
    ("trace", "errors"),
    ("trace", "files"),
    ("files", "errors"),
    ("estimates", "errors"),
    ("estimates", "schema"),
    ("output", "errors"),
    ("schema", "errors"),
    ("secret", "errors"),
    ("preflight", "config"),
    ("rank", "config"),
    ("rank", "preflight"),
    ("engine", "rank"),
    ("engine", "generation"),
    ("lossless", "generation"),
    ("engine", "config"),
    ("engine", "preflight"),
    ("lossless", "engine"),
    ("__main__", "cli"),
}
STRANGERS = {  # rooms below that a room has no business with
    "config": {"models", "comm", "sampling", "runtime", "text"},
    "comm": {"errors", "version"},
    "draft": {"comm", "text", "sampling"},
}
DISTRIBUTED = {
    "flowspec/cluster/facts.py",  # asks which backends there are
    *("flowspec/comm/gloo.py", "flowspec/comm/group.py", "flowspec/comm/heartbeat.py"),
    "flowspec/models/zero.py",  # DeepSpeed wants a group of this one process
    "flowspec/comm/seal.py",
    *("flowspec/runtime/process.py", "flowspec/runtime/agreement.py", "flowspec/launcher.py"),
    "flowspec/runtime/trust.py",
}
LIGHT = [
    *(
        "flowspec.cli",
        "flowspec.config",
        "flowspec.preflight",
        "flowspec.launcher",
        "flowspec.models.split",
    ),
    *(f"flowspec.commands.{name}" for name in COMMANDS if name != "simulate"),
]
LONGEST = 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
    """flowspec.comm.gloo -> comm; flowspec -> ''."""
    return [*module.split("."), ""][1]


def room_of_file(path: Path) -> str:
    inside = path.relative_to(ROOT / "flowspec")
    return inside.parts[0].removesuffix(".py").replace("__init__", "")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(path: Path) -> list[str]:
    """Full names of the modules that a file imports, wherever in it; `from a import b` is a.b."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are written in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(path: Path) -> set[str]:
    return {room_of(name) for name in imports_of(path) if name.split(".")[0] == "flowspec"}


def layer_of(room: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def test_every_module_stands_in_a_layer():
    known = set().union(*LAYERS)
    assert {room_of_file(path) for path in PACKAGE} <= known


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_downward(path):
    room = room_of_file(path)
    for other in own_imports(path) - {room}:
        down = layer_of(other) < layer_of(room)
        assert down or (room, other) in SIDEWAYS, f"{name_of(path)} imports flowspec.{other}"
        assert other not in STRANGERS.get(room, ()), f"{name_of(path)} imports flowspec.{other}"


def test_no_exception_to_the_layers_is_out_of_use():
    used = {(room_of_file(path), other) for path in PACKAGE for other in own_imports(path)}
    assert used >= SIDEWAYS


@pytest.mark.parametrize("path", [p for p in PACKAGE if room_of_file(p) == "core"], ids=name_of)
def test_the_core_is_pure(path):
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top in {"numpy", "flowspec"} or top in sys.stdlib_module_names, (
            f"{name_of(path)} imports {name}"
        )


def test_every_room_is_in_the_wheel():
    """pyproject.toml lists them, since what is shipped beside them (the demo) has a name of its own there."""
    said = re.search(
        r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    listed = set(re.findall(r'"([^"]+)"', said[1]))
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE}
    assert {name for name in listed if ".shipped." not in name} == rooms


def test_the_number_of_ranks_is_reckoned_with_in_one_place():
    """core/topology.py says who is first, last and next; nobody else adds to, or counts up to, a number of stages or ranks."""
    sums = re.compile(
        r"world_size *[-+%]|[-+] *world_size|(num_)?stages *[-+] *1\b|range\(1, .*(stages|ranks|world)"
    )
    found = [
        path
        for path in PACKAGE
        if name_of(path) != "flowspec/core/topology.py" and sums.search(path.read_text())
    ]
    assert not found, [name_of(path) for path in found]


def test_torch_distributed_appears_where_ranks_meet_and_nowhere_else():
    found = set()
    for path in PACKAGE:
        spelled = [
            ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)
        ]
        if any(f"{name}.".startswith("torch.distributed.") for name in imports_of(path) + spelled):
            found.add(name_of(path))
    assert {name for name in found if not name.startswith("flowspec/models/tp")} == DISTRIBUTED


def offences(tree: ast.Module) -> list[str]:
    """What may not stand in a shipped file: ways to run what was read, and shells."""
    found = []
    for node in ast.walk(tree):
        name = (
            node.attr
            if isinstance(node, ast.Attribute)
            else node.id
            if isinstance(node, ast.Name)
            else ""
        )
        if re.search(r"(gather|scatter|broadcast|send|recv)_object(_list)?$", name):
            found.append(name)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.system", "os.popen"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("shell", "False") != "False":
                found.append("shell=True")
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_that_is_read_can_run(path):
    assert offences(tree_of(path)) == []
    assert {name.split(".")[0] for name in imports_of(path)} & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
    } == set()


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
        "dist.broadcast_object_list(x)",
        "dist.all_gather_object(x)",
    ],
)
def test_the_search_for_offences_finds_them(text):
    assert len(offences(ast.parse(text))) == 1


@pytest.mark.parametrize("module", LIGHT)
def test_what_checks_input_imports_no_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_functions_are_short_and_nothing_is_left_to_do(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST, (
                f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"
            )
    assert re.findall(r"\b(?:TODO|FIXME|XXX)\b", path.read_text()) == []
