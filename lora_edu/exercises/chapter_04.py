"""Checks for the exercises of chapter 04, counting: right, or which step of the reckoning went astray.

Every answer is a function. It is tried on cases whose mistakes are known by name, then on some drawn anew at each
check, so that a table of results is no answer. Right values are worked out here, or measured on live layers.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_edu import counting
from lora_edu.exercises.answers import no_function, tried
from lora_edu.tinylm import TinyLM

DRAWN = 20  # cases drawn at each check


def check_04_1(answer: object) -> str:
    """A function saving_rank(rows, columns): the largest r at which A and B hold fewer numbers than W."""
    hint = "A and B hold r (rows + columns) numbers: up to which whole r is that less than W holds?"
    shapes = [(1024, 4096), (10_000, 100), (100, 100), (1600, 4800), (3, 5), (1, 7)]
    shapes += [(random.randint(2, 5000), random.randint(2, 5000)) for _ in range(DRAWN)]

    def problem(got: object, right: int, rows: int, columns: int) -> str:
        more, even = right + 1, rows * columns / (rows + columns)
        smaller, numbers = min(rows, columns), more * (rows + columns)
        return _first(
            got,
            (smaller, "That is the largest rank there is. A and B hold more numbers than W there."),
            (
                more,
                f"At r = {more} A and B hold {numbers} numbers and W {rows * columns}: that saves nothing.",
            ),
            (even, "A rank is a whole number, below the break-even rank."),
            (
                smaller // 2,
                "Half the smaller side is the break-even rank of a square matrix; this is another.",
            ),
        )

    right = lambda rows, columns: (rows * columns - 1) // (rows + columns)
    return _judge_function(
        1,
        answer,
        "saving_rank",
        "rows, columns",
        shapes,
        right,
        problem,
        hint,
        "A rank costs one row and one column. Where A and B hold exactly as many numbers as W, nothing is saved.",
    )


def check_04_2(answer: object) -> str:
    """A function lora_numbers(model, names, rank): numbers that LoRA trains on the linear layers so named."""
    hint = "named_modules() gives names and layers. A is (rank, in_features), B is (out_features, rank)."
    if refused := no_function(2, answer, "model, names, rank", hint):
        return refused
    for what, model, names, rank in (
        ("query and value of a TinyLM", TinyLM(60, 20, 3, 5), ("query", "value"), 4),
        ("the MLP of a TinyLM", TinyLM(60, 20, 3, 5), ("up", "down"), random.randint(1, 8)),
        ("the head of a TinyLM", TinyLM(70, 20, 2, 5), ("head",), 2),
        ("W_q and W_k of grouped queries", _grouped(), ("q_proj", "k_proj"), random.randint(2, 4)),
    ):
        before = _described(model)
        got, problem = tried(2, answer, f"on {what}", model, names, rank)
        if problem:
            return problem
        if _described(model) != before:
            return f"Exercise 2: not yet: it changes the model ({what}). Count, and leave the model as it is."
        chosen = [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in names]
        right = sum(rank * (layer.in_features + layer.out_features) for layer in chosen)
        if not _equal(got, right):
            problem = _linear_problem(got, right, chosen, rank) or f"Hint: {hint}"
            return f"Exercise 2: not yet: on {what} at rank {rank} it gives {got!r}. {problem}"
    return (
        "Exercise 2: right. The count follows from the shapes of the layers, and these are not always square: "
        "so it pays to ask the model, not the paper."
    )


def _linear_problem(got: object, right: int, chosen: Sequence[nn.Linear], rank: int) -> str:
    """What a wrong count over these layers was most likely worked out from."""
    sides = [(layer.in_features, layer.out_features) for layer in chosen]
    biases = sum(layer.out_features for layer in chosen if layer.bias is not None)
    square = "That takes every matrix for a square"
    return _first(
        got,
        (None, "Does the function return its result?"),
        (0, "No layer was found. Compare the part of the name behind the last dot."),
        (right * rank, "The rank is in it twice."),
        (right // rank, "That is r = 1."),
        (right + biases, "The biases are frozen, as W is: only A and B are trained."),
        (right // len(chosen), "That is one layer. Every layer with such a name has its own A and B."),
        (sum(inputs * outputs for inputs, outputs in sides), "Those are the numbers in W itself."),
        (rank * sum(inputs for inputs, _ in sides), "A is there, B is missing."),
        (rank * sum(outputs for _, outputs in sides), "B is there, A is missing."),
        (2 * rank * sum(inputs for inputs, _ in sides), f"{square}: B has out_features rows."),
        (2 * rank * sum(outputs for _, outputs in sides), f"{square}: A has in_features columns."),
    )


def _grouped() -> nn.Module:
    """An attention of two layers with fewer keys than queries; one name ends like another."""
    layers = nn.ModuleList()
    for _ in range(2):
        layer = nn.Module()
        layer.q_proj, layer.k_proj = nn.Linear(48, 48, bias=False), nn.Linear(48, 12, bias=False)
        layer.rank_proj = nn.Linear(48, 24)  # 'rank_proj' ends in 'k_proj'
        layers.append(layer)
    return layers


def _described(model: nn.Module) -> list[tuple]:
    """What must not change when a model is only counted: its modules, its parameters, which are trained."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules + [(name, each.shape, each.requires_grad) for name, each in model.named_parameters()]


def check_04_3(answer: object) -> str:
    """A function ranks_that_explain(printed, digits, at_rank_1): the ranks whose count rounds to what is printed."""
    hint = (
        "rank r has r · at_rank_1 numbers. Bring that into the form in which it is printed, for r = 1 … 64."
    )
    cases = [  # millions as printed, digits behind the point, numbers at r = 1
        (4.7, 1, 4_718_592),  # GPT-3, table 4
        (0.3, 1, 36_864),  # RoBERTa base, table 2: several ranks round to it
        (4.7, 1, 294_912),  # DeBERTa-XXL
        (18, 0, 4_718_592),  # GPT-3, table 5: cut, not rounded
        (0.35, 2, 98_304),  # GPT-2 M, table 3
        (0.77, 2, 184_320),  # GPT-2 L
    ]
    cases += [
        (round(random.randint(1, 64) * at / 1e6, 1), 1, at)
        for at in (random.randint(20_000, 5_000_000) for _ in range(DRAWN))
    ]
    return _judge_function(
        3,
        answer,
        "ranks_that_explain",
        "printed, digits, at_rank_1",
        cases,
        lambda printed, digits, at: [r for r in range(1, 65) if round(r * at / 1e6, digits) == printed],
        _ranks_problem,
        hint,
        "No rank gives the printed figures of GPT-2 M and L. An empty list says more than a difference: "
        "something else was counted.",
        read=_listed,
    )


def _ranks_problem(got: object, right: list[int], printed: float, digits: int, at: int) -> str:
    """What a wrong list of ranks was most likely worked out from."""
    if not isinstance(got, list):
        return "The answer is a list of ranks; it is empty when none explains the figure."
    cut = [r for r in range(1, 65) if int(r * at / 1e6 * 10**digits) == round(printed * 10**digits)]
    if got == cut:
        return "That cuts the digits off. A printed figure is rounded: 18.87 is printed as 19."
    if right and len(right) > 1 and got and set(got) < set(right):
        return f"Not only {got[0]}: there are {len(right)} ranks that round to {printed}."
    if not right and len(got) == 1:
        return f"r = {got[0]} comes nearest, but it gives {got[0] * at / 1e6:.3g} M, which does not round to {printed}."
    if not got:
        return "None found. Is the count divided by a million, and the rank tried up to 64?"
    return ""


def _listed(got: object) -> object:
    """A tuple, set or range of ranks as a list in order; anything else as it is."""
    return sorted(got) if isinstance(got, tuple | set | range) else got


def check_04_4(answer: object) -> str:
    """A function largest_batch(budget, held, trained, kept, sequence): how many texts fit into so many bytes."""
    hint = (
        "what grows with the batch, and what does not? A trained number takes its own place, its gradient's, and two "
        "of Adam's."
    )
    gpt2 = counting.ARCHITECTURES["GPT-2"].parameters
    adapter = counting.count("GPT-2", "c_attn", 8).parameters
    kept = [sum(counting.saved_numbers("GPT-2", *way).values()) for way in (("full",), ("lora", 8, "c_attn"))]
    cases = [
        (16 * 10**9, gpt2, gpt2, kept[0], 128),
        (16 * 10**9, gpt2 + adapter, adapter, kept[1], 1024),
        (10**9, gpt2, gpt2, kept[0], 64),  # does not even hold the weights' gradients
    ]
    for _ in range(DRAWN):
        held = random.randint(10**4, 10**7)
        cases.append(
            (random.randint(10**8, 10**9), held, random.randint(1, held), random.randint(10, 10**4), 128)
        )
    return _judge_function(
        4,
        answer,
        "largest_batch",
        "budget, held, trained, kept, sequence",
        cases,
        lambda budget, held, trained, kept, sequence: _batch(budget, held, 3 * trained, kept * sequence, 4),
        _batch_problem,
        hint,
        "In 16 GB, full tuning of GPT-2 takes "
        f"{_batch(16 * 10**9, gpt2, 3 * gpt2, kept[0] * 1024, 4)} texts of 1024 tokens, LoRA on c_attn "
        f"{_batch(16 * 10**9, gpt2 + adapter, 3 * adapter, kept[1] * 1024, 4)}: what LoRA saves buys a larger batch.",
    )


def _batch(budget: int, held: int, extra: int, text: int, each: int) -> int:
    """Texts that fit beside held + extra numbers, when a text takes `text` numbers of `each` bytes."""
    return max(0, (budget - each * (held + extra)) // (each * text))


def _batch_problem(
    got: object, right: int, budget: int, held: int, trained: int, kept: int, sequence: int
) -> str:
    """What a wrong batch was most likely worked out from."""
    if isinstance(got, int | float) and got < 0:
        return "Less than nothing: when even the weights do not fit, the answer is 0."
    if isinstance(got, float) and int(got) == right and got != right:
        return "A batch is a whole number of texts: round down."
    text = kept * sequence
    return _first(
        got,
        (right + 1, "That is one text too many: round down."),
        (_batch(budget, held, 0, text, 4), "Gradients and Adam's state of what is trained are left out."),
        (_batch(budget, held, trained, text, 4), "Adam's two numbers for each trained number are left out."),
        (
            _batch(budget, held, 2 * trained, text, 4),
            "One of four is left out: the number itself, its gradient, two of Adam's.",
        ),
        (_batch(budget, 0, 3 * trained, text, 4), "The weights are left out. Frozen or not, they are held."),
        (
            _batch(budget, held, 3 * held, text, 4),
            "That trains everything. Only `trained` has gradients and state.",
        ),
        (
            _batch(budget, held, 3 * trained, kept, 4),
            "`kept` is for each token, and a text has `sequence` of them.",
        ),
        (_batch(budget, held, 3 * trained, text, 1), "float32 takes 4 bytes a number."),
    )


def check_04_5(answer: object) -> str:
    """A function rank_for_budget(shapes, budget, bytes_each): the largest useful r within so many bytes."""
    hint = "how many bytes do all A and B together take at r = 1? And is there a rank that no matrix needs?"
    llama = [(4096, 4096), (1024, 4096)] * 32  # W_q and W_v of Llama-3-8B
    cases = [
        (llama, 10_000_000, 2),
        (llama, 10_000_000, 4),
        ([(10_000, 100)], 80_800, 1),
        ([(64, 64), (64, 256)], 10**6, 2),
        ([(768, 768)], 1000, 4),
    ]
    for _ in range(DRAWN):
        shapes = [(random.randint(8, 900), random.randint(8, 900)) for _ in range(random.randint(1, 6))]
        cases.append((shapes, random.randint(10**3, 10**7), random.choice((1, 2, 4))))

    def problem(got: object, right: int, shapes: list, budget: int, each: int) -> str:
        sides, smallest = sum(map(sum, shapes)), min(map(min, shapes))
        if isinstance(got, float) and int(got) == right and got != right:
            return "A rank is a whole number: round down."
        within = lambda numbers_at_rank_1, bytes_each=each: min(
            budget // (bytes_each * numbers_at_rank_1), smallest
        )
        return _first(
            got,
            (budget // (each * sides), f"No update needs a rank above the smallest side, here {smallest}."),
            (right + 1, "That is one rank too many for the budget: round down."),
            (within(sides, 1), f"The budget is in bytes, and a number takes {each}."),
            (within(sum(shapes[0])), "That is the first matrix alone; all of them share the budget."),
            (
                within(sum(rows * columns for rows, columns in shapes)),
                "A and B hold r (rows + columns) numbers.",
            ),
            (within(sum(2 * max(shape) for shape in shapes)), "That takes every matrix for a square."),
        )

    right = lambda shapes, budget, each: min(budget // (each * sum(map(sum, shapes))), *map(min, shapes))
    return _judge_function(
        5,
        answer,
        "rank_for_budget",
        "shapes, budget, bytes_each",
        cases,
        right,
        problem,
        hint,
        f"10 MB in bfloat16 on W_q and W_v of Llama-3-8B: r = {right(*cases[0])}.",
    )


def check_04_6(answer: object) -> str:
    """A function backward_flops(rows, columns, rank, input_needed), compared with what PyTorch counts."""
    hint = (
        "follow the gradient back, product by product: to B, through B to A, and on to the input. Each product of an "
        "m × n matrix with one vector costs 2 · m · n."
    )
    cases = [(64, 48, 4, True), (768, 768, 0, True), (40, 16, 3, False), (40, 16, 0, False)]
    for _ in range(6):
        cases.append(
            (random.randint(5, 90), random.randint(5, 90), random.randint(0, 4), random.random() < 0.5)
        )

    def problem(got: object, right: int, rows: int, columns: int, rank: int, needed: bool) -> str:
        back_W, back_A, back_B = 2 * rows * columns, 2 * rank * columns, 2 * rank * rows
        mistakes = [(right / 2, "A multiplication and an addition are two FLOPs.")]
        if needed:
            why = "The layers below need the input's gradient, and it comes back through W."
            mistakes += [(right - back_W, why), (right - back_W - back_A, why)]
        else:
            why = "Nobody asks for the input's gradient here: nothing goes back through W."
            mistakes.append((right + back_W + back_A, why))
        if rank:
            mistakes += [
                (right + back_W, "W is frozen: its gradient costs nothing, since nobody computes it."),
                (
                    right - back_B,
                    "Two products have B's size: B's own gradient, and the way back through B to A.",
                ),
                (right - back_A, "One product of A's size is missing."),
            ]
        return _first(got, *mistakes)

    return _judge_function(
        6,
        answer,
        "backward_flops",
        "rows, columns, rank, input_needed",
        cases,
        _measured_backward,
        problem,
        hint,
        "PyTorch counts the same on live layers. In the lowest adapted layer nobody needs the input's gradient, and "
        "there LoRA's backward pass costs next to nothing.",
    )


def _measured_backward(rows: int, columns: int, rank: int, needed: bool) -> int:
    """FLOPs of the backward pass of one input vector through a live layer, as PyTorch counts them."""
    W = torch.randn(rows, columns, requires_grad=not rank)
    x = torch.randn(1, columns, requires_grad=needed)
    A, B = (torch.randn(*shape, requires_grad=True) for shape in ((rank, columns), (rows, rank)))
    y: Tensor = x @ W.T + (x @ A.T @ B.T if rank else 0)
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which chapter 06 sets up first

    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return counter.get_total_flops()


def _judge_function(
    k: int,
    answer: object,
    name: str,
    arguments: str,
    cases: Sequence[tuple],
    right: Callable[..., object],
    problem: Callable[..., str],
    hint: str,
    why: str,
    read: Callable[[object], object] = lambda got: got,
) -> str:
    """What to tell someone whose answer to exercise k is this function; `problem` names a wrong result's mistake.

    read: how a result is brought into the form that is compared.
    """
    if refused := no_function(k, answer, arguments, hint):
        return refused
    for case in cases:
        call = f"{name}({', '.join(map(_short, case))})"
        try:
            got = read(answer(*case))
        except Exception as error:
            return f"Exercise {k}: not yet: {call} raises {type(error).__name__}: {error}"
        expected = right(*case)
        if got is None:
            return f"Exercise {k}: not yet: {call} gives None. Does the function return its result?"
        if not _equal(got, expected):
            found = problem(got, expected, *case) or f"Hint: {hint}"
            return f"Exercise {k}: not yet: {call} gives {got!r}. {found}"
    return f"Exercise {k}: right. {why}"


def _first(got: object, *mistakes: tuple[object, str]) -> str:
    """What is said of the first of these mistaken results that this one equals; nothing if it equals none."""
    return next((why for result, why in mistakes if _equal(got, result)), "")


def _equal(got: object, expected: object) -> bool:
    try:
        return bool(got == expected)
    except (RuntimeError, ValueError):  # a tensor or an array of several numbers
        return False


def _short(argument: object) -> str:
    """An argument as it is shown in a reply; long lists by their beginning."""
    if isinstance(argument, list) and len(argument) > 2:
        return f"[{argument[0]}, {argument[1]}, … {len(argument)} shapes]"
    return repr(argument)
