"""Compiling the kernels ahead, on all of a CPU's cores, into Triton's cache, where a launch on the card finds them.

A module of its own, as each compiling process imports it: it loads Triton and the kernels, and no library that they are
compared with.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import compiled_kernels
import kernel_cases
import torch

from lora_edu.lora import triton_kernels as kernels
from lora_edu.lora.triton_kernels import Blocks


class Variant(NamedTuple):
    """A kernel to compile: "forward", "backward" or "deterministic", with the tile that ships if none is named."""

    kernel: str
    dtype: str
    rank: int
    width: int
    blocks: Blocks | None = None


class Spent(NamedTuple):
    seconds: float  # on the wall
    cpu_seconds: float  # of this process and of the assembler that it calls


def clock() -> Spent:
    times = os.times()
    return Spent(time.perf_counter(), sum(times[:4]))


def spent(began: Spent) -> Spent:
    return Spent(*(now - then for now, then in zip(clock(), began, strict=True)))


def compile_variant(variant: Variant, capability: int) -> Spent:
    """What it takes; run in a process of its own, where nothing is interpreted and no card is asked for."""
    began = clock()
    blocks = Blocks(*variant.blocks) if variant.blocks else None
    dtype = getattr(torch, variant.dtype)
    compiled_kernels.compile_kernel(variant.kernel, dtype, variant.rank, capability, variant.width, blocks)
    return spent(began)


def compile_case(case: dict, capability: int) -> Spent:
    """The same for both kernels of a random case of kernel_cases.py."""
    began = clock()
    kernel_cases.ON = "cpu"
    tokens, W, A, B, G = kernel_cases.inputs(case)
    padding = -1 if case["padding_idx"] is None else case["padding_idx"] % case["vocabulary"]
    with compiled_kernels.compiling(capability):
        kernels.look_up(tokens, W, A, B, 1.7, padding)
        kernels.gradients(G, tokens, A, B, 1.7, padding, case["deterministic"])
    return spent(began)


def end_with_parent() -> None:
    """Linux ends this process when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


class Compiler:
    """A pool of processes that compile for a card of this capability, what is asked for first first."""

    def __init__(self, capability: int, processes: int):
        self.capability, self.futures = capability, {}
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=end_with_parent)

    def ask(self, variant: Variant) -> Future:
        if variant not in self.futures:
            self.futures[variant] = self.pool.submit(compile_variant, variant, self.capability)
        return self.futures[variant]

    def ask_case(self, number: int, case: dict) -> Future:
        if number not in self.futures:
            self.futures[number] = self.pool.submit(compile_case, case, self.capability)
        return self.futures[number]

    def forget(self) -> None:
        """Drop what is asked for and not begun: nobody waits for it any more, and it would disturb the clock."""
        for future in self.futures.values():
            future.cancel()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
