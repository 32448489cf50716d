"""What can be known about a run is checked here, before torch is imported or a rank is started."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from flowspec.config import QUANTISED, Config
from flowspec.core.request import Sampling
from flowspec.core.topology import Topology
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError, need
from flowspec.files import beside_of
from flowspec.models.families import CONFIG, read_config
from flowspec.models.fingerprint import embedding_hash
from flowspec.models.heads import EAGLE_FC, check_head
from flowspec.models.hub import MODEL_FILES, local_folder
from flowspec.models.manifest import AGAIN, FILE_NAME, Manifest, verify_files
from flowspec.models.shard import copies
from flowspec.models.split import Source
from flowspec.models.weights import Checkpoint
from flowspec.text import Text, check_same_tokens, load_tokenizer

MODEL_FACTS = {
    "model_type": "model_type",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "max_positions": "max_position_embeddings",
}
"""This maps what the manifest says of the model to where its config.json says it."""


def manifest_of(config: Config) -> Manifest:
    """Return the manifest of the split model, for as many servers and drafters as are configured.

    Raise UserError if it is missing, damaged or too new."""
    drafters = sum(drafter.ranks for drafter in config.drafters)
    return Manifest.load(config.stages_path, config.dsi.servers, drafters)


def check_run(config: Config, ranks: Sequence[int] | None = None) -> Manifest:
    """Return the manifest of the split model, after checking it and all that the configuration
    names.

    `ranks` are those whose files lie on this machine; None means all. Raise UserError, which says
    what is wrong."""
    manifest = manifest_of(config)
    topology = manifest.topology
    ranks = topology.ranks if ranks is None else ranks
    config = config.found() if topology.COORDINATOR in ranks else config
    devices = 1 if isinstance(config.device, str) else len(config.device)
    split = f"the run is of {topology.world_size} (rank 0 and {topology.words})"
    need(devices in (1, topology.world_size), f"device lists {devices} ranks, {split}")
    check_dtypes(config, topology, ranks)
    config.emulate.check_stages(topology.stages, topology.servers)
    check_servers(config, topology)
    config.sampling.check(manifest.vocab_size)
    config.check_method(topology.members)
    if config.shares_by_autotp(topology):
        check_autotp(config, manifest)
    ranks = config.read_by(topology, ranks)
    verify_files(manifest, ranks, lm_head=config.head_ranks(topology))
    for rank in ranks:
        folder = manifest.folder(rank)
        check_same_model(manifest, read_config(folder), str(folder / CONFIG), AGAIN)
    for drafter in dict.fromkeys(d for rank in ranks for d in config.drafters_on(topology, rank)):
        check_drafter(drafter, config.folder, manifest)
    return manifest


def check_dtypes(config: Config, topology: Topology, ranks: Sequence[int]) -> None:
    """Raise UserError unless there is a dtype for each stage, and what these ranks' dtypes need."""
    need(
        not config.many_dtypes or len(config.dtypes) == topology.stages,
        f"dtype lists {len(config.dtypes)} stages, the split has {topology.stages}",
    )
    held = {config.dtype_of(topology, rank, "") for rank in ranks if topology.stage(rank)}
    need(
        "nf4" not in held or importlib.util.find_spec("bitsandbytes") is not None,
        "dtype is nf4, which needs bitsandbytes: .venv/bin/pip install -r requirements_quant.txt "
        "(the extra `quant`; on a Jetson: docs/jetson.md), or set it to int8 or float16",
    )


def check_servers(config: Config, topology: Topology) -> None:
    """Raise UserError for what several target servers cannot do."""
    if topology.servers == 1:
        return
    several = f"dsi.servers is {topology.servers}"
    need(
        all(drafter.kind != "eagle3" for drafter in config.drafters),
        f"{several}, and drafter.kind eagle3 reads layers of one target: take eagle or lm",
    )


def check_autotp(config: Config, manifest: Manifest) -> None:
    """Raise UserError unless DeepSpeed's AutoTP can share the layers as configured."""
    key = "tensor_parallel.backend is deepspeed"
    need(
        importlib.util.find_spec("deepspeed") is not None,
        f"{key}, which is not installed: .venv/bin/pip install -r requirements_deepspeed.txt (the "
        "extra `deepspeed`), or set it to native",
    )
    for dtype in config.dtypes:
        need(
            dtype not in QUANTISED,
            f"{key}, which has no {dtype} weights here: set another dtype, or native",
        )
    model, members = read_config(manifest.folder(0)), manifest.tensor_parallel
    need(
        copies(model, members) == 1,
        f"{key}, which shares no key/value heads: {members} members are more than the model has, "
        "set it to native",
    )


def check_same_model(manifest: Manifest, config: dict, where: str, advice: str) -> None:
    """Raise UserError, by field, unless the manifest is one of the model of this config.json.

    The config.json lies at `where`."""
    for field, key in MODEL_FACTS.items():
        said, found = getattr(manifest, field), config[key]
        need(
            said == found,
            f"{where}: {key} is {found}, {manifest.root / FILE_NAME} says {said}: {advice}",
        )


def check_reference(reference: str, manifest: Manifest, dtypes: Sequence[str]) -> Source:
    """Return the unsplit model, for a run whose stages compute in `dtypes`.

    Raise UserError unless it is a whole checkpoint and, as far as can be known, the one that was
    split."""
    option, advice = "--reference", "give the model that was split"
    itself = "without it the ring is compared with itself"
    for dtype in dtypes:
        need(
            dtype not in QUANTISED,
            f"{option}: the unsplit model has no {dtype} weights; {itself}",
        )
    need(
        len(set(dtypes)) == 1,
        f"{option}: the unsplit model has one dtype, the stages have several; {itself}",
    )
    folder = local_folder(reference, option, MODEL_FILES)
    try:
        source = Source.open(folder)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    check_same_model(manifest, source.config, f"{option}: {folder / CONFIG}", advice)
    same = manifest.embedding is None or manifest.embedding == embedding_hash(source.checkpoint)
    need(
        same,
        f"{option}: {folder} has another embedding than the model that "
        f"{manifest.root / FILE_NAME} is a split of: {advice}",
    )
    return source


def check_rivals(sampling: Sampling) -> None:
    """Raise UserError unless transformers' generate, as it is asked here, can sample like this."""
    need(
        not sampling.adjusts,
        "--against: transformers is asked for no penalties and no logit_bias, leave them out",
    )


def check_drafter(drafter: DrafterConfig, folder: Path, manifest: Manifest) -> None:
    if not drafter.computes:
        return
    path = drafter.checkpoint(folder)
    if drafter.reads_features:
        check_head(drafter.kind, path, manifest, drafter.setting)
        return
    head = EAGLE_FC in Checkpoint(path).names
    need(
        not head,
        f"{drafter.where}.path: {path} is an EAGLE head, no draft model: set "
        f"{drafter.where}.head: {drafter.path} instead of kind and path",
    )
    read_config(path)
    ours, theirs = Text(manifest.folder(0)).tokenizer, load_tokenizer(path)
    check_same_tokens(ours, theirs, f"{drafter.where}.path: {path}")


class Limits(Protocol):
    """Limits say which prompts a model takes; a manifest has them."""

    @property
    def max_positions(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


def check_prompt(tokens: Sequence[int], limits: Limits, name: str = "the prompt") -> None:
    """Raise UserError unless the prompt has a token, and the model room for one more."""
    need(len(tokens) > 0, f"{name} is empty: give at least one token of text")
    limit = limits.max_positions
    strange = [t for t in tokens if not 0 <= t < limits.vocab_size]
    need(not strange, f"{name} holds token {strange[:1]}; the vocabulary has {limits.vocab_size}")
    need(
        len(tokens) < limit,
        f"{name} has {len(tokens)} tokens; the model takes {limit} in all, so at most "
        f"{limit - 1} of prompt",
    )


def check_writable(path: str | None, name: str = "--json") -> None:
    """Raise UserError unless what `name` asks for can be written beside `path` and renamed to
    it."""
    if path is None:
        return
    need(not Path(path).is_dir(), f"{name}: {path} is a folder")
    beside = beside_of(path)
    known = os.path.lexists(beside)
    try:
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        raise UserError(f"{name}: cannot write {beside}: {error.strerror}") from None
    if not known:
        beside.unlink()


def read_prompts(path: str, flag: str = "--prompt-file") -> list[str]:
    """Return the prompts of a file: .txt holds one in a line, .jsonl an object with `prompt` in a
    line.

    Raise UserError, which names the flag that the path came from, if it cannot be read, or holds
    something else."""
    file = Path(path)
    need(
        file.suffix in (".txt", ".jsonl"),
        f"{flag} {path}: the name must end in .txt (a prompt a line) or .jsonl",
    )
    try:
        lines = [
            (n, line)
            for n, line in enumerate(file.read_text("utf-8-sig").split("\n"), 1)
            if line.strip()
        ]
    except OSError as error:
        raise UserError(f"cannot read {flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path} is not UTF-8 text") from None
    need(bool(lines), f"{flag} {path} holds no prompt")
    return [
        line.rstrip("\r") if file.suffix == ".txt" else _json_prompt(line, f"{path} line {n}")
        for n, line in lines
    ]


def _json_prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{where}: expected an object with a text under "prompt"')
    return prompt
