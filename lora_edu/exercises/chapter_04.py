"""Checks for the exercises of chapter 04, counting: right, or which step of the reckoning went astray.

Every right and every typical wrong answer is computed here from the shapes, none is written down.
"""

from lora_edu import counting
from lora_edu.exercises.answers import judge, no_function


def check_04_1(answer: object) -> str:
    """The break-even rank of Llama-3-8B's W_k, 1024 × 4096."""
    rows, columns = 1024, 4096
    mistakes = {
        rows / 2: "512 is the break-even rank of a square 1024 × 1024 matrix. Here i + o is 5120, not 2048.",
        columns / 2: "that is half the long side. The rank cannot even exceed the short one, 1024.",
        rows: "1024 is the largest rank there is. At r = 1024 A and B hold 1024 · 5120 numbers, more than W.",
        (rows + columns) / 2: "that is the mean of the sides. Set r (i + o) equal to i · o and solve for r.",
        (rows + columns) / (rows * columns): "that is its inverse, (i + o) / io: the share at r = 1.",
    }
    return judge(
        1,
        answer,
        counting.break_even_rank(rows, columns),
        mistakes,
        hint="at which r is r (i + o) equal to i · o?",
        why="A rank costs one row and one column, 5120 numbers, and W holds 819.2 times as many.",
    )


def check_04_2(answer: object) -> str:
    """Bytes of GPT-3's adapter at r = 4 on W_q and W_v in half precision."""
    right = counting.count("GPT-3 175B", ("query", "value"), 4).bytes("float16")
    mistakes = {
        right
        / 2: "that is half of it. Either one matrix a layer (W_q and W_v both have an A and a B), or one "
        "byte a number (half precision takes 2).",
        right / 4: "that is a quarter of it. Each of W_q and W_v has an A *and* a B, of 2 bytes a number.",
        right * 2: "that is twice as much. Half precision takes 2 bytes a number, and only two of the four "
        "attention matrices are adapted.",
        right / 96: "that is one layer. GPT-3 has 96.",
        35e6: "that is what the paper prints. Work it out from the shapes: it comes out a little larger.",
        right / 2**20: "that is the number of MiB. The answer is asked for in bytes.",
        right / 1e6: "that is the number of MB. The answer is asked for in bytes.",
    }
    return judge(
        2,
        answer,
        right,
        mistakes,
        hint="96 layers, W_q and W_v of 12 288 × 12 288 in each, A and B for both, 2 bytes a number.",
        why="37.7 MB, or 36.0 MiB, which the paper prints as 35 MB.",
        tolerance=1e-6,
    )


def check_04_3(answer: object) -> str:
    """Numbers in LoRA of rank 8 on GPT-2 XL's fused c_attn, all layers."""

    def numbers(*targets: str) -> int:
        return counting.count("GPT-2 XL", targets, 8).parameters

    fused = numbers("c_attn")
    mistakes = {
        numbers("query", "key", "value"): "that counts q, k and v apart, 9600 r a layer. c_attn is one "
        "1600 × 4800 matrix: one A reads the input for all three.",
        numbers("query", "value"): "that is W_q and W_v counted apart. c_attn is one 1600 × 4800 matrix.",
        fused / 48: "that is one layer. GPT-2 XL has 48.",
        numbers("output"): "that is a 1600 × 1600 matrix. c_attn is 1600 × 4800.",
        48 * 1600 * 4800: "that is the number in c_attn itself.",
        fused / 8: "that is r = 1.",
    }
    return judge(
        3,
        answer,
        fused,
        mistakes,
        hint="c_attn is one matrix of 1600 × 4800 in each of 48 layers.",
        why="r (1600 + 4800) a layer, two thirds of q, k and v apart: they share one A, so their updates "
        "read the same r directions of the input.",
        tolerance=1e-9,
    )


def check_04_4(answer: object) -> str:
    """Bytes for one training step of GPT-2 with LoRA, everything counted."""
    memory = counting.training_memory("GPT-2", "lora", 8, ("c_attn",), batch=2, sequence=64)
    full = counting.training_memory("GPT-2", batch=2, sequence=64)
    mistakes = {
        memory.total - memory.activations: "the activations are left out. LoRA keeps almost as many as full "
        "tuning.",
        memory.total - memory.weights: "the weights are left out. They are frozen, but they are still there.",
        memory.gradients + memory.optimiser: "that is only what training adds. The frozen weights and the "
        "activations need memory too.",
        memory.total - memory.optimiser: "Adam's two numbers for each trained number are left out.",
        memory.total
        - memory.gradients: "one of four is left out: each number in A and B takes its own place, "
        "its gradient's, and two of Adam's.",
        memory.total / 4: "that is the number of numbers. float32 takes 4 bytes each.",
        full.total: "that is full tuning. With LoRA only A and B have gradients and Adam's state.",
    }
    return judge(
        4,
        answer,
        memory.total,
        mistakes,
        hint="weights of the model and of A and B; gradients and Adam's two states of A and B; activations.",
        why=f"{memory.weights / memory.total:.0%} of it are weights, {memory.activations / memory.total:.0%} "
        "activations; what is trained takes less than 1 %.",
        tolerance=2e-4,
    )


def check_04_5(answer: object) -> str:
    """The largest r at which LoRA on W_q and W_v of Llama-3-8B takes at most 10 MB in bfloat16."""
    budget = 10_000_000
    each = counting.count("Llama-3-8B", ("query", "value"), 1).parameters
    square = 32 * 2 * (4096 + 4096)
    right = budget // (2 * each)
    mistakes = {
        budget // (2 * square): "that takes W_v for a square. Its 8 heads of width 128 make it 1024 × 4096.",
        budget // (4 * each): "that is 4 bytes a number. bfloat16 takes 2.",
        budget // each: "that is one byte a number. bfloat16 takes 2.",
        budget // (2 * each // 32): "that is one layer. Llama-3-8B has 32.",
        right + 1: "that is just too much: round down.",
        budget / (2 * each): "a rank is a whole number: round down.",
    }
    return judge(
        5,
        answer,
        right,
        mistakes,
        hint="W_q is 4096 × 4096 and W_v 1024 × 4096, in 32 layers; 10 MB are 10 000 000 bytes.",
        why=f"r = 1 takes {counting.spaced(2 * each)} bytes, so {right} fit and {right + 1} do not.",
        tolerance=1e-9,
    )


def check_04_6(answer: object) -> str:
    """A function rank_for_budget(rows, columns, budget): the largest useful r within the budget."""
    hint = "the largest whole r with r (rows + columns) ≤ budget, but never above the smaller side."
    if refused := no_function(6, answer, "rows, columns, budget", hint):
        return refused
    for rows, columns, budget in (
        (10_000, 100, 80_800),
        (10_000, 100, 80_799),
        (768, 768, 100_000),
        (64, 64, 10**6),
        (4096, 1024, 5119),
    ):
        call = f"rank_for_budget({rows}, {columns}, {budget})"
        try:
            got = answer(rows, columns, budget)
        except Exception as error:
            return f"Exercise 6: not yet: {call} raises {type(error).__name__}: {error}"
        right = min(budget // (rows + columns), rows, columns)
        if got != right:
            problem = _problem(got, right, rows, columns, budget) or f"Hint: {hint}"
            return f"Exercise 6: not yet: {call} gives {got!r}, not {right}. {problem}"
    return (
        "Exercise 6: right. A rank costs one row and one column, and none above the smaller side is needed."
    )


def _problem(got: object, right: int, rows: int, columns: int, budget: int) -> str:
    """What a wrong rank was most likely worked out from."""
    if got is None:
        return "Does the function return its result?"
    if got == budget / (rows + columns):
        return "A rank is a whole number: round down."
    if got == budget // (rows * columns):
        return "A and B hold r (rows + columns) numbers, not r · rows · columns."
    if got == budget // (rows + columns):
        return f"No update of a {rows} × {columns} matrix needs a rank above its smaller side."
    if got == right + 1:
        return "That is one rank too many for the budget: round down."
    return ""
