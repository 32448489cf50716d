"""Checkpoints whose linear layers are quantised, written as the formats' libraries lay them out: number by number."""

import json

import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(integers: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """int32 [.., n / per] of integers [.., n]: the k-th of a word is integer `order[k]`, in bits from k * bits on."""
    per = 32 // bits
    integers = torch.nn.functional.pad(integers.long(), (0, -integers.shape[-1] % per))
    grouped = integers.unflatten(-1, (-1, per))
    word = torch.zeros(grouped.shape[:-1], dtype=torch.long)
    for k in range(per):
        word |= grouped[..., order[k] if order else k] << (k * bits)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def rounded(weight, bits, group, symmetric=False, dtype=torch.float16, index=None):
    """q [outputs, inputs] in [0, 2^bits), s and z [outputs, groups], g [inputs], and the matrix that they mean."""
    inputs = weight.shape[1]
    g = torch.arange(inputs) // group if index is None else index
    groups, top = int(g.max()) + 1, (1 << bits) - 1
    low, high = (
        torch.stack([pick(weight[:, g == k], 1).values for k in range(groups)], 1)
        for pick in (torch.min, torch.max)
    )
    if symmetric:
        s, z = (
            2 * torch.maximum(high, -low) / top,
            torch.full_like(low, 1 << (bits - 1)).long(),
        )
    else:
        s = (high - low) / top
        z = (-low / s).round().clamp(0, top).long()
    s = s.to(dtype)
    q = (weight / s.float()[:, g] + z[:, g]).round().clamp(0, top).long()
    return q, s, z, g, (q - z[:, g]).to(dtype) * s[:, g]


def gptq(weight, bits=4, group=32, symmetric=False, act_order=False, version=1):
    inputs = weight.shape[1]
    index = torch.randperm(inputs) // group if act_order else None
    q, s, z, g, meant = rounded(weight, bits, group, symmetric, index=index)
    parts = {
        "qweight": words(q, bits).T,
        "qzeros": words((z.T - (2 - version)) % (1 << bits), bits),
        "scales": s.T,
        "g_idx": g.int(),
    }
    return parts, meant


def awq(weight, group=32):
    q, s, z, _, meant = rounded(weight, 4, group)
    return {
        "qweight": words(q.T, 4, AWQ_ORDER),
        "qzeros": words(z.T, 4, AWQ_ORDER),
        "scales": s.T,
    }, meant


def packed(weight, bits=4, group=32, symmetric=True, act_order=False, old=False):
    inputs = weight.shape[1]
    index = torch.randperm(inputs) // group if act_order else None
    q, s, z, g, meant = rounded(
        weight, bits, group or inputs, symmetric, dtype=torch.bfloat16, index=index
    )
    parts = {
        "weight_packed": words(q, bits),
        "weight_scale": s,
        "weight_shape": torch.tensor(weight.shape),
    }
    plain = (z - (1 << (bits - 1))).to(torch.int8)
    zeros = plain if old else words(z.T, bits).T
    parts |= {} if symmetric else {"weight_zero_point": zeros}
    parts |= {"weight_g_idx": g.int()} if act_order else {}
    return parts, meant


def plain(weight, group=None, symmetric=True):
    q, s, z, _, meant = rounded(weight, 8, group or weight.shape[1], symmetric, torch.bfloat16)
    parts = {"weight": (q - 128).to(torch.int8), "weight_scale": s}
    return parts | ({} if symmetric else {"weight_zero_point": (z - 128).to(torch.int8)}), meant


def scheme(bits, group=32, symmetric=True, **more):
    """compressed-tensors' section of config.json for weights of this kind."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group,
        "strategy": "group" if group else "channel",
        "dynamic": False,
    } | more.pop("weights", {})
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group_0 | more.pop("group_0", {})},
    } | more


def section(method, bits=4, group=32, **more):
    return {"quant_method": method, "bits": bits, "group_size": group} | more


FORMATS = {
    "gptq": (lambda w: gptq(w), section("gptq")),
    "gptq symmetric": (lambda w: gptq(w, symmetric=True), section("gptq", sym=True)),
    "gptq act-order": (lambda w: gptq(w, act_order=True), section("gptq", desc_act=True)),
    "gptq 8 bits": (lambda w: gptq(w, 8), section("gptq", 8, checkpoint_format="gptq")),
    "gptq 2 bits": (lambda w: gptq(w, 2), section("gptq", 2)),
    "gptq version 2": (
        lambda w: gptq(w, version=2),
        section("gptq", checkpoint_format="gptq_v2"),
    ),
    "gptq one group": (lambda w: gptq(w, group=w.shape[1]), section("gptq", group=-1)),
    "awq": (lambda w: awq(w), section("awq", version="gemm", zero_point=True)),
    "packed": (lambda w: packed(w), scheme(4)),
    "packed asymmetric": (lambda w: packed(w, symmetric=False), scheme(4, symmetric=False)),
    "packed channels": (lambda w: packed(w, group=None), scheme(4, None)),
    "packed 8 bits": (
        lambda w: packed(w, 8, None, symmetric=False),
        scheme(8, None, symmetric=False),
    ),
    "packed asymmetric 0.9.2": (
        lambda w: packed(w, 8, symmetric=False, old=True),
        scheme(8, symmetric=False),
    ),
    "packed act-order": (
        lambda w: packed(w, act_order=True),
        scheme(4, weights={"actorder": "group"}),
    ),
    "int8": (lambda w: plain(w), scheme(8, None, format="int-quantized")),
    "int8 groups": (
        lambda w: plain(w, 32, symmetric=False),
        scheme(8, 32, symmetric=False, format="int-quantized"),
    ),
}
"""name -> (how a matrix becomes tensors, and what these mean; what config.json says)"""


def save_quantised(folder, tensors, config: dict, form: str, leave_out=(), shards=2):
    """Write a checkpoint whose `tensors` (by checkpoint names) of 2 dimensions in layers are quantised, but for those
    that `leave_out` names; return all by their plain names, as they are meant.

    A layer's tensors lie in different shards."""
    make, about = FORMATS[form]
    written, meant = {}, {}
    for name, tensor in tensors.items():
        matrix = ".layers." in name and tensor.dim() == 2 and ".gate.weight" not in name
        if matrix and name.removesuffix(".weight") not in leave_out:
            parts, meant[name] = make(tensor.float())
            module = name.removesuffix("weight")
            written |= {module + leaf: part.contiguous() for leaf, part in parts.items()}
        else:
            written[name] = meant[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {name: f"model-{k % shards}.safetensors" for k, name in enumerate(written)}
    for shard in set(weight_map.values()):
        own = {name: t for name, t in written.items() if weight_map[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return meant
