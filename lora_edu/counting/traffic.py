"""Bytes that LoRA layers move and operations they do, on paper: what a GPU's time is made of. Plain Python, no torch.

Each operation reads its inputs from memory and writes its results there, unless a way is said to keep them in
registers. Not for memory that is held (training_step.py), and it measures nothing: chapter 06 checks it against layers.
"""

# Published by NVIDIA: bytes a second from and to memory, dense bfloat16 operations a second in the tensor cores
CARDS = {
    "RTX 4090": (1.008e12, 165e12),
    "A100 80 GB": (2.039e12, 312e12),
    "H100 SXM": (3.35e12, 989e12),
    "H200 SXM": (4.8e12, 989e12),
}


def traffic(vocabulary: int, tokens: int, width: int = 64, rank: int = 8) -> dict[str, int]:
    """Bytes that one step (forward, backward, SGD) of an embedding reads and writes, float32, int64 ids, by way.

    A place in the batch counts even if its token occurs before. 'minimum' reads each thing needed once a pass and
    keeps the rest in registers.
    """
    out, rows, ids = 4 * tokens * width, 4 * tokens * rank, 8 * tokens
    lora_B, lora_A = 4 * width * rank, 4 * vocabulary * rank
    peer = 12 * out + 8 * rows + 3 * ids + 6 * lora_B + 6 * lora_A
    return {
        "loralib": peer,
        "PEFT": peer,
        "ours": 8 * out + 12 * rows + 3 * ids + 6 * lora_B + 4 * lora_A,
        "ours, sparse": 8 * out + 14 * rows + 5 * ids + 6 * lora_B,
        "minimum": 3 * out + 6 * rows + 2 * ids + 6 * lora_B,
    }


def look_up_bytes(tokens: int, width: int, rank: int, each: int = 2) -> dict[str, int]:
    """Bytes of an embedding's forward pass by way, `each` bytes a number (2: bfloat16), 8 an id."""
    out, rows, ids, lora_B = each * tokens * width, each * tokens * rank, 8 * tokens, each * width * rank
    return {
        "loralib, PEFT": 8 * out + 3 * rows + 2 * ids + lora_B,
        "PyTorch, ours": 6 * out + 5 * rows + 2 * ids + lora_B,
        "one pass": 2 * out + rows + ids + lora_B,
    }


def look_up_operations(tokens: int, width: int, rank: int) -> int:
    """Multiplications and additions of out = W[t] + s · A[t] Bᵀ: the product's, and two for s and the sum."""
    return 2 * tokens * width * (rank + 1)


def gradient_bytes(vocabulary: int, tokens: int, width: int, rank: int, each: int = 2) -> int:
    """Least bytes of an embedding's backward pass: ids, G, A's rows and B read; dense dA and dB written."""
    return 8 * tokens + each * (tokens * (width + rank) + vocabulary * rank + 2 * width * rank)


def linear_bytes(tokens: int, inputs: int, outputs: int, rank: int, each: int = 2) -> dict[str, int]:
    """Bytes of h = W x + s · B A x, forward, by way, `each` bytes a number; x: (tokens, inputs).

    'PyTorch, ours' scales the (tokens, rank) rows, loralib and PEFT the (tokens, outputs) product. 'summed in the
    product' lets the product with B start from W x (torch.addmm). 'one pass' reads x once and writes h once.
    """
    x, h, low = each * tokens * inputs, each * tokens * outputs, each * tokens * rank
    plain = x + each * inputs * outputs + h
    down, up = x + each * inputs * rank + low, low + each * outputs * rank + h
    return {
        "plain": plain,
        "loralib, PEFT": plain + down + up + 2 * h + 3 * h,
        "PyTorch, ours": plain + down + 2 * low + up + 3 * h,
        "summed in the product": plain + down + 2 * low + up + h,
        "one pass": plain + each * rank * (inputs + outputs),
    }


def linear_operations(tokens: int, inputs: int, outputs: int, rank: int) -> dict[str, int]:
    """Multiplications and additions of the same: of W x, and of what LoRA adds to it, without s and the sum."""
    return {"plain": 2 * tokens * inputs * outputs, "LoRA": 2 * tokens * rank * (inputs + outputs)}
