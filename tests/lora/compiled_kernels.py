"""Compiles the Triton kernels for a GPU that need not be here, and says what each takes.

    python tests/lora/compiled_kernels.py [90]

prints a JSON object a kernel: registers a thread, bytes of stack (spilt registers) and shared memory a program.
"""

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_edu.lora import triton_kernels as kernels

WIDTH = 4096
KERNELS = {
    "forward": (kernels.forward_kernel, kernels.forward_blocks),
    "backward": (kernels.backward_kernel, kernels.backward_blocks),
    "deterministic": (kernels.backward_kernel, kernels.backward_blocks),
}
CASES = [
    *itertools.product(("forward", "backward"), (torch.bfloat16,), (8, 64, 256)),
    *itertools.product(("forward", "backward"), (torch.float32, torch.float64), (16,)),
    ("deterministic", torch.float16, 16),
]


def compile_kernel(name: str, dtype: torch.dtype, rank: int, capability: int = 90):
    """The kernel for d = 4096 as look_up and gradients would launch it, with pointers and strides aligned."""
    function, blocks_for = KERNELS[name]
    total = torch.promote_types(dtype, torch.float32)
    constants = kernels.constants(rank, blocks_for(WIDTH, rank, dtype), dtype, total)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    if function is kernels.backward_kernel:
        constants["DETERMINISTIC"] = name == "deterministic"
    kinds = {"tokens": "*i64", "scaling": "fp64"} | dict.fromkeys(("dA_rows", "dB"), pointer(total))
    kinds |= dict.fromkeys(("W", "A", "B", "G", "out"), pointer(dtype)) | dict.fromkeys(
        constants, "constexpr"
    )
    signature = {argument: kinds.get(argument, "i32") for argument in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in ("width", "W_stride", "A_stride")
    }
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def pointer(dtype: torch.dtype) -> str:
    return {2: "*bf16", 4: "*fp32", 8: "*fp64"}[dtype.itemsize] if dtype != torch.float16 else "*fp16"


def resources(compiled) -> dict[str, int]:
    """What ptxas gave the kernel, read from the machine code by the tool that Triton's wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True).stdout
    used = {key: int(re.search(rf"{key}:(\d+)", told)[1]) for key in ("REG", "STACK")}
    return {"registers": used["REG"], "stack": used["STACK"], "shared": compiled.metadata.shared}


if __name__ == "__main__":
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for name, dtype, rank in CASES:
        with contextlib.redirect_stdout(sys.stderr):
            compiled = compile_kernel(name, dtype, rank, capability)
        row = {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "rank": rank, "sm": capability}
        print(json.dumps(row | resources(compiled) | {"tensor cores": "mma" in compiled.asm["ptx"]}))
