"""Layers that do not fit are streamed: each comes before it is computed, and goes afterwards.

A forward computes the layers in turn, again and again, so they come in a ring: while one computes,
a thread of its own fetches the next, and behind the last layer comes the first. No more than two
are held. Nothing of that is in the model: this module attaches hooks of accelerate to the layers of
a StageModel. (accelerate's own offloading fetches a layer when it is called, not before, and
empties the GPU's allocator for each tensor, which has to wait for the GPU's work.) The embedding,
the norm and the lm_head stay where they are.

A layer that came is one of transformers, not packed for our kernels. On a CPU with kernels it
computes in float32 with weights of the asked dtype, as packed layers do (kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import get_max_memory, set_module_tensor_to_device
from torch import Tensor, nn

from flowspec.comm.base import Clock
from flowspec.errors import need
from flowspec.models.adapted import as_held
from flowspec.models.families import LAYER_NAME, family_of, layer_of, module_tensors, read_config
from flowspec.models.placement import Placement
from flowspec.models.quantised import plain
from flowspec.models.stage import Head, StageModel, load_whole, stored_as
from flowspec.models.weights import Checkpoint, Portion, torch_dtype

BUFFERS = 2
"""So many streamed layers hold weights: the one that computes, and the next."""


# ---- where layers are kept -----------------------------------------------------------------------
class Store(Protocol):
    """A store gives the tensors of a layer, by their names in it, as often as asked."""

    def read(self, layer: int) -> Iterable[tuple[str, Tensor]]: ...


class Disk:
    """The layers stay in the checkpoint's files: nothing is written, so nothing is left behind."""

    def __init__(self, folder: Path, dtype: torch.dtype, rooms: Sequence[Room] = ()):
        """Read tensors as `dtype`. Raise UserError if the checkpoint's index is damaged.

        If there are rooms, the layers that are read lie in them by turns."""
        self._where, self._config = str(folder), read_config(folder)
        self._checkpoint = Checkpoint(folder, family_of(self._config).named)
        self.dtype, self._rooms = dtype, cycle(rooms or [None])
        self._names: dict[int | None, list[str]] = {}
        for name in self._checkpoint.names:
            self._names.setdefault(layer_of(name), []).append(name)

    def read(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        prefix, names = f"layers.{layer}.", self._names.get(layer, [])
        lodged = _Lodged(self._checkpoint, names, next(self._rooms))
        file = plain(lodged, self._config, self._where)
        for name, tensor in module_tensors(file, 0, stored_as(self.dtype)):
            yield name.removeprefix(prefix), tensor


class Room:
    """A room is memory for a layer, which is used again: new pages cost more than what is read.

    For a GPU it is pinned."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._tensors: dict[object, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return where this tensor of any layer may lie."""
        match = LAYER_NAME.fullmatch(name)
        key = (match and match[2], *shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(tuple(shape), dtype=dtype, pin_memory=self._pinned)
        return self._tensors[key]


class _Lodged(Portion):
    """What is read of this portion lies in a room, if there is one."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], room: Room | None):
        super().__init__(checkpoint, names)
        self._room = room

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if self._room is None:
            return super().read(name, dtype)
        info = self.info(name)
        out = self._room.of(name, info.shape, dtype or torch_dtype(info.dtype))
        self.read_into(name, out)
        return out


class Host:
    """The layers are in host memory, which is pinned for a GPU that copies from it."""

    def __init__(self, source: Store, layers: Iterable[int], pinned: bool):
        self._tensors = {
            k: {name: t.pin_memory() if pinned else t for name, t in source.read(k)} for k in layers
        }

    def read(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        return self._tensors[layer].items()


def fill(
    layer: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: torch.device, source: str
) -> None:
    """Give a layer on the meta device its weights, on `device` and as its own dtype.

    Raise UserError, which names the source, if tensors are missing or of another shape."""
    waiting = layer.state_dict(keep_vars=True)
    for name, tensor in tensors:
        expected = waiting.pop(name, None)
        if expected is None:
            continue  # as in StageModel.load
        path, _, leaf = name.rpartition(".")
        tensor = as_held(layer.get_submodule(path), leaf, tensor)
        need(
            expected.shape == tensor.shape,
            f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks for "
            f"{tuple(expected.shape)}",
        )
        set_module_tensor_to_device(
            layer, name, device, value=tensor, non_blocking=True, clear_cache=False
        )
    need(
        not waiting,
        f"{source}: {len(waiting)} tensors are missing, such as {next(iter(waiting), '')}",
    )


def empty(layer: nn.Module) -> None:
    """Let go of a layer's weights."""
    for name in layer.state_dict():
        set_module_tensor_to_device(layer, name, "meta")


# ---- the ring ------------------------------------------------------------------------------------
class Link:
    """An emulated link carries one layer at a time, for so many seconds each.

    The real fetch counts as part of them; one that takes longer takes longer."""

    def __init__(self, seconds: float, clock: Clock | None = None):
        self._seconds, self.clock = seconds, clock or Clock()
        self._free_at = 0.0

    def carry(self, asked: float) -> None:
        """Return when a layer that was asked for at this time, and has really come, is here."""
        now = self.clock.now()
        self._free_at = max(max(self._free_at, asked) + self._seconds, now)
        self.clock.sleep(self._free_at - now)


class Streamed(NamedTuple):
    """A streamed layer can be fetched and let go of."""

    fetch: Callable[[], None]
    drop: Callable[[], None]


class Ring:
    """A ring fetches streamed layers in turn, each as soon as there is room for it.

    All fetches are made by one thread, one after the other. Whatever goes wrong there is raised
    where the layer is waited for."""

    def __init__(self, layers: Sequence[Streamed], device: torch.device, link: Link | None = None):
        self._layers, self._device, self._link = layers, device, link
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "offload")
        self._coming: dict[int, Future[None]] = {}
        self._ahead = min(BUFFERS, len(layers))
        for turn in range(self._ahead):
            self._coming[turn] = self._thread.submit(self._fetch, turn, self._now())

    def arrived(self, turn: int) -> None:
        """Wait for a layer's weights. The layers are waited for in turn."""
        self._coming.pop(turn).result()

    def let_go(self, turn: int) -> None:
        """Let go of a layer whose computation has been begun, and set off the next fetch.

        A GPU may be computing it still; the fetching thread waits for that."""
        computed = self._stream and torch.cuda.current_stream(self._device).record_event()
        following = (turn + self._ahead) % len(self._layers)
        self._coming[following] = self._thread.submit(
            self._replace, turn, following, self._now(), computed
        )

    def _replace(self, gone: int, following: int, asked: float, computed: Any) -> None:
        if computed is not None:
            computed.synchronize()
            asked = self._now()
        self._layers[gone].drop()
        self._fetch(following, asked)

    def _fetch(self, turn: int, asked: float) -> None:
        """Fetch a layer, on a GPU by a stream of its own, which nobody else allocates on."""
        if self._stream is None:
            self._layers[turn].fetch()
        else:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._layers[turn].fetch()
            self._stream.synchronize()
        if self._link:
            self._link.carry(asked)

    def _now(self) -> float:
        return self._link.clock.now() if self._link else 0.0


class Turn(AlignDevicesHook):
    """The hook of a streamed layer waits for its weights, and lets go of them afterwards.

    What enters the layer is sent to its device, as by accelerate's hook."""

    def __init__(self, ring: Ring, turn: int, device: torch.device):
        super().__init__(execution_device=device, skip_keys=OWN_PLACE)
        self._ring, self._turn = ring, turn

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module  # nothing of it is on a device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._ring.arrived(self._turn)
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._ring.let_go(self._turn)
        return output


OWN_PLACE = ["past_key_values", "layer_past"]
"""A layer's keys and values stay on its device."""


def stream(
    model: StageModel,
    layers: Mapping[int, Streamed],
    device: torch.device,
    weights: int,
    placement: Placement,
) -> None:
    """Stream these layers of a model; each has so many bytes of weights."""
    link = None
    if placement.gbps is not None:
        together = weights * len(layers) if placement.gb is None else placement.gb * 1e9
        link = Link(together / len(layers) / (placement.gbps * 1e9))
    ring = Ring([*layers.values()], device, link)
    for turn, k in enumerate(layers):
        add_hook_to_module(model.layers[k], Turn(ring, turn, device))


# ---- which layer goes where ----------------------------------------------------------------------
class Place(NamedTuple):
    """A place is where a layer computes, and what it is streamed from."""

    device: torch.device
    store: str | None = None
    """It is cpu or disk; None means that the layer stays."""

    def __str__(self) -> str:
        return f"{self.device} from {self.store}" if self.store else str(self.device)


class _Around(nn.ModuleList):
    """What is around the layers, which stays on the first device."""


def mapped(
    config: dict, dtype: torch.dtype, placement: Placement
) -> tuple[torch.device, list[Place]]:
    """Return what computes first, and where accelerate has each layer of a model.

    GPUs come first, then host memory, then the disk. Where there is a GPU, layers in host memory
    or on the disk are streamed to the first. Raise UserError if there is no room."""
    model = StageModel(config, config["num_hidden_layers"], first=True, last=True)
    assert model.embed_tokens is not None and model.norm is not None
    shell = nn.Module()
    with torch.device("meta"):
        head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    shell.around = _Around([model.embed_tokens, model.norm, head])
    shell.layers = model.layers
    memory = _room(placement)
    first = next(iter(memory))
    atoms = [type(model.layers[0]).__name__, _Around.__name__]
    for buffers in (1, BUFFERS):  # accelerate leaves room for one
        spare = (buffers - 1) * weights_of(model.layers[0], dtype)
        room = {**memory, first: max(0, memory[first] - spare)}
        found = infer_auto_device_map(shell, room, no_split_module_classes=atoms, dtype=dtype)
        places = [_place(_found(found, f"layers.{k}"), first) for k in range(len(model.layers))]
        if not any(place.store for place in places):
            break
    need(
        _found(found, "around") == first,
        f"--max-memory: the embedding, the lm_head and {BUFFERS} layers do not fit on {first}: "
        "allow more there",
    )
    left = sum(place.store == "disk" for place in places)
    need(
        not left or "disk" in (placement.memory or {}),
        f"--max-memory: there is no room for {left} of {len(places)} layers: allow more, or add "
        "disk to the list",
    )
    return _device(first), places


def _room(placement: Placement) -> dict[int | str, int]:
    """Return what layers may take of each device, the first of which computes what is streamed."""
    here = torch.cuda.device_count()
    asked = {name: size for name, size in (placement.memory or {}).items() if name != "disk"}
    for name in asked:
        need(name == "cpu" or int(name) < here, f"--max-memory names GPU {name}, torch sees {here}")
    found = get_max_memory(asked or None)
    return {"cpu" if name == "mps" else name: size for name, size in found.items()}


def _found(places: Mapping[str, int | str], module: str) -> int | str:
    """Return the place of a module, or of what it is part of."""
    while module not in places:
        module = module.rpartition(".")[0]
    return places[module]


def _place(device: int | str, first: int | str) -> Place:
    if device == "disk" or (device == "cpu" and first != "cpu"):
        return Place(_device(first), str(device))
    return Place(_device(device))


def _device(name: int | str) -> torch.device:
    return torch.device("cpu" if name == "cpu" else f"cuda:{name}")


def weights_of(layer: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of a layer's weights as `dtype`."""
    return sum(p.numel() for p in layer.parameters()) * dtype.itemsize


# ---- loading -------------------------------------------------------------------------------------
def main_device() -> torch.device:
    """Return what computes: the first GPU if there is one, as accelerate has it."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def load_placed(
    folder: Path, dtype: torch.dtype, placement: Placement
) -> tuple[StageModel, Head, list[str]]:
    """Return a whole checkpoint as one stage whose layers are where the placement says, its head
    and the places of its layers, in words.

    Raise UserError, which names the flag or the file, if that cannot be."""
    config, kind = read_config(folder), placement.offload
    if kind is None:
        device, places = mapped(config, dtype, placement)
    else:
        device = main_device()
        places = [Place(device, kind)] * config["num_hidden_layers"]
    apart = {k: place for k, place in enumerate(places) if place != Place(device)}
    model, head = load_whole(folder, dtype, str(device), apart=apart)
    disk = Disk(folder, dtype)
    streamed = (
        _by_deepspeed(model, disk, device, placement, folder)
        if kind == "deepspeed"
        else _put(model, apart, disk, device, folder)
    )
    if any(place.device != device for place in places):  # what comes from there
        add_hook_to_module(model.norm, AlignDevicesHook(device))
    need(
        bool(streamed) or not placement.emulated,
        "--offload-gbps: all layers fit, none is streamed",
    )
    if streamed:
        stream(model, streamed, device, weights_of(model.layers[0], dtype), placement)
    return model, head, [str(place) for place in places]


def _put(
    model: StageModel, apart: Mapping[int, Place], disk: Disk, device: torch.device, folder: Path
) -> dict[int, Streamed]:
    """Put layers where they stay, and return those that are streamed."""
    in_host = [k for k, place in apart.items() if place.store == "cpu"]
    pinned = device.type == "cuda"
    stores: dict[str, Store] = {
        "disk": Disk(folder, disk.dtype, [Room(pinned) for _ in range(BUFFERS)]),
        "cpu": Host(disk, in_host, pinned),
    }
    streamed = {}
    for k, place in apart.items():
        layer, source = model.layers[k], f"{folder}: layer {k}"
        if place.store:
            store = stores[place.store]
            streamed[k] = Streamed(
                partial(_fetch, layer, store, k, device, source), partial(empty, layer)
            )
        else:
            fill(layer, disk.read(k), place.device, source)
            add_hook_to_module(layer, AlignDevicesHook(place.device, skip_keys=OWN_PLACE))
    return streamed


def _fetch(layer: nn.Module, store: Store, k: int, device: torch.device, source: str) -> None:
    fill(layer, store.read(k), device, source)


def _by_deepspeed(
    model: StageModel, disk: Disk, device: torch.device, placement: Placement, folder: Path
) -> dict[int, Streamed]:
    """Give all layers to DeepSpeed; return what is left to stream, which is an emulated link."""
    from flowspec.models.zero import partition

    for k, layer in enumerate(model.layers):
        fill(layer, disk.read(k), torch.device("cpu"), f"{folder}: layer {k}")
    partition(model, device, placement.nvme)
    nothing = Streamed(lambda: None, lambda: None)
    return dict.fromkeys(range(len(model.layers)), nothing) if placement.emulated else {}
