"""This module compiles LLVM code for the processor at hand and runs it.

llvmlite compiles it, ctypes calls it, and the threads that torch has share the work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

LANES = 8
"""A vector has so many float32 numbers: a 256-bit register, or two of 128 bits."""


@cache
def available() -> bool:
    """Return whether llvmlite is here and the processor multiplies and adds in one instruction."""
    if importlib.util.find_spec("llvmlite") is None:
        return False
    import llvmlite.binding as llvm

    return platform.machine() in ("aarch64", "arm64") or bool(
        llvm.get_host_cpu_features().get("fma")
    )


_compiling = threading.Lock()
_engines: list[Any] = []  # they own the code


def compiled(assembly: str) -> Callable[[str], int]:
    """Compile a module; return a function from its functions' names to their addresses."""
    import llvmlite.binding as llvm

    with _compiling:
        team()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        module = llvm.parse_assembly(assembly)
        module.verify()
        # the code is written as it is to be: more optimising takes longer and brings nothing
        tuning = llvm.create_pipeline_tuning_options(speed_level=1)
        tuning.loop_unrolling = tuning.loop_interleaving = tuning.loop_vectorization = (
            tuning.slp_vectorization
        ) = False
        builder = llvm.create_pass_builder(machine, tuning)
        builder.getModulePassManager().run(module, builder)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _engines.append(engine)
    return engine.get_function_address


@cache
def team() -> Callable | None:
    """Return GOMP_parallel(function, data, threads, flags) of the OpenMP that torch brings.

    It is None where torch brings another OpenMP. After this LLVM code can call the functions by
    which code asks for its share."""
    found = next(iter((Path(torch.__file__).parent / "lib").glob("libgomp*")), None)
    if found is None:
        return None
    import llvmlite.binding as llvm

    library = ctypes.CDLL(str(found))
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    library.GOMP_parallel.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    )
    library.GOMP_parallel.restype = None
    return library.GOMP_parallel


class Shared:
    """A Shared is a function `name(job, begin, end)` of LLVM code.

    It runs in one piece, or threads share it by `name_part(job)`."""

    def __init__(self, address: Callable[[str], int], name: str):
        self._whole = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
            address(name)
        )
        self._part = address(f"{name}_part") if team() else 0

    def __call__(self, job: ctypes.Structure, count: int, worth_threads: bool) -> None:
        threads = torch.get_num_threads() if worth_threads and self._part else 1
        if threads == 1:
            self._whole(ctypes.addressof(job), 0, count)
        else:
            together = team()
            assert together is not None
            together(self._part, ctypes.addressof(job), threads, 0)


def part(name: str, fields: str, count: int) -> str:
    """Return the LLVM code of `{name}_part`, a thread's share of `{name}(job, begin, end)`.

    The end of the whole is the job's field number `count`."""
    if team() is None:
        return ""
    return "\n".join([
        "declare i32 @omp_get_thread_num()", "declare i32 @omp_get_num_threads()",
        f"define void @{name}_part(ptr %job) {{",
        f"%at = getelementptr {fields}, ptr %job, i32 0, i32 {count}", "%count = load i64, ptr %at",
        "%me32 = call i32 @omp_get_thread_num()", "%all32 = call i32 @omp_get_num_threads()",
        "%me = zext i32 %me32 to i64", "%all = zext i32 %all32 to i64", "%after = add i64 %me, 1",
        "%a = mul i64 %count, %me", "%begin = udiv i64 %a, %all", "%b = mul i64 %count, %after", "%end = udiv i64 %b, %all",
        f"call void @{name}(ptr %job, i64 %begin, i64 %end)", "ret void", "}",
    ])  # fmt: skip
