"""Compiles the Triton kernels for a GPU that need not be here, and says what each takes.

    python tests/lora/compiled_kernels.py [90]

prints a JSON object a kernel: registers a thread, bytes of stack (spilt registers) and shared memory a program, the
bytes that a thread loads at once from the tables, whether the tensor cores multiply.
"""

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from lora_edu.lora import triton_kernels as kernels

WIDTH = 4096
CASES = [
    *itertools.product(("forward", "backward"), (torch.bfloat16,), (8, 64, 256)),
    *itertools.product(("forward", "backward"), (torch.float32, torch.float64), (16,)),
    ("deterministic", torch.float16, 16),
]
MIXED = [  # a table and factors of other dtypes, which the interpreter can't tell from one dtype
    *itertools.product(("forward", "backward"), (torch.float64, torch.bfloat16), (16,), (torch.float32,)),
    ("forward", torch.float32, 16, torch.bfloat16),
]


class Absent:
    """Stands in Triton for the driver of a card that is not here: it says what to compile for, and runs nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list]:
    """Inside, look_up and gradients compile what they would launch on such a card; yields the list of it.

    Whatever they return is left unwritten. What is compiled lands in Triton's cache, under the key that a launch on
    the card asks for.
    """
    compiled: list = []
    launch = kernels.launch
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        kernel.device_caches.clear()  # made for the card of an earlier call
    kernels.launch = lambda kernel, programs, **arguments: compiled.append(
        kernel.warmup(grid=(programs,), **arguments)
    )
    triton.runtime.driver.set_active(Absent(capability))
    try:
        yield compiled
    finally:
        kernels.launch = launch


def compile_kernel(
    name: str,
    dtype: torch.dtype,
    rank: int,
    capability: int = 90,
    width: int = WIDTH,
    blocks: kernels.Blocks | None = None,
    factor_dtype: torch.dtype | None = None,
):
    """The kernel as look_up ("forward") or gradients ("backward", "deterministic") would launch it.

    dtype: of the table and the output; factor_dtype: of A and B (default: the same).
    """
    tokens = torch.zeros(16, dtype=torch.int64)
    factor_dtype = factor_dtype or dtype
    W, G = (torch.empty(16, width, dtype=dtype) for _ in range(2))
    A, B = (torch.empty(side, rank, dtype=factor_dtype) for side in (16, width))
    with compiling(capability) as compiled:
        if name == "forward":
            kernels.look_up(tokens, W, A, B, 1.0, blocks=blocks)
        else:
            kernels.gradients(G, tokens, A, B, 1.0, deterministic=name == "deterministic", blocks=blocks)
    return compiled[0]


def resources(compiled) -> dict[str, int]:
    """What ptxas gave the kernel, read from the machine code by the tool that Triton's wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True).stdout
    used = {key: int(re.search(rf"{key}:(\d+)", told)[1]) for key in ("REG", "STACK")}
    return {"registers": used["REG"], "stack": used["STACK"], "shared": compiled.metadata.shared}


def load_bytes(compiled) -> dict[int, int]:
    """How many loads from memory move so many bytes a thread, straight to registers or past them (cp.async)."""
    ptx = compiled.asm["ptx"]
    found = [
        int(lanes or 1) * int(bits) // 8
        for lanes, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    found += [
        int(size, 0)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+|\d+)", ptx)
    ]
    return {size: found.count(size) for size in sorted(set(found))}


if __name__ == "__main__":
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for name, dtype, rank, *factors in [*CASES, *MIXED]:
        with contextlib.redirect_stdout(sys.stderr):
            compiled = compile_kernel(name, dtype, rank, capability, factor_dtype=(*factors, None)[0])
        dtypes = "/".join(str(each).removeprefix("torch.") for each in (dtype, *factors))
        row = {"kernel": name, "dtype": dtypes, "rank": rank, "sm": capability}
        row |= resources(compiled) | {"load bytes": load_bytes(compiled)}
        print(json.dumps(row | {"tensor cores": "mma" in compiled.asm["ptx"]}))
