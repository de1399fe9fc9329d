"""Checks for the exercises of chapter 00: what an adapter trains, what merging costs, and LoRA's formula.

Every right and every typical wrong answer is computed here, from shapes and from the shipped files.
"""

import torch
from torch import Tensor

from lora_edu import counting
from lora_edu.data import adapter_folder
from lora_edu.data.shipped import data_file
from lora_edu.exercises.answers import judge, no_function, same


def check_00_1(answer: object) -> str:
    """Numbers that LoRA of rank 4 trains beside the 400 × 100 matrix of TinyLM's MLP."""
    rows, columns, rank = 400, 100, 4
    right = counting.lora_parameters(rows, columns, rank)
    mistakes = {
        rank * rows * columns: "r multiplies the rows *plus* the columns. A and B are thin: neither has "
        "rows × columns numbers.",
        rows * columns: "that is W, which is frozen. Count what is trained: B and A.",
        rows * columns + right: "that counts W, too. W is frozen; only B and A are trained.",
        rank * rows: "that is B alone. A is trained, too.",
        rank * columns: "that is A alone. B is trained, too.",
        rows + columns: "that is r = 1. Each further rank costs another row and another column.",
        right / (rows * columns): "that is the share of W. Asked for is how many numbers.",
        100 * right / (rows * columns): "that is the share of W in per cent. Asked for is how many numbers.",
        2 * right: "that is twice as much. B has 400 rows and A 100 columns; each appears once.",
    }
    return judge(
        1,
        answer,
        right,
        mistakes,
        hint="B is 400 × r and A is r × 100.",
        why="r · (rows + columns): 1,600 in B and 400 in A, a twentieth of W's 40,000.",
        tolerance=1e-9,
    )


def check_00_2(answer: object) -> str:
    """Disk of 20 merged models, as a multiple of the disk of one base and 20 adapters of rank 8."""
    models = 20
    base = data_file("base.safetensors").stat().st_size
    adapter = (adapter_folder("reference_r8") / "adapter_model.safetensors").stat().st_size
    apart, merged = base + models * adapter, models * base
    mistakes = {
        base / adapter: "that leaves out the base, which the adapters need beside them, once for all.",
        apart / merged: "that is the wrong way round: how many times as much do the merged models take?",
        models
        * (base + adapter)
        / apart: "merging adds nothing to a model: W + sBA has W's size, not W's and the adapter's.",
        (models + 1) * base / apart: "the merged models do not need the base beside them.",
        merged / (models * (base + adapter)): "the base is needed once, not once for each adapter.",
        models: "that compares with one base alone. The 20 adapters take their place, too.",
        1: "a merged model is as large as the base, an adapter a tenth of it.",
        merged / 1e6: "those are the merged models' MB. Divide by the MB of the base and its 20 adapters.",
        apart / 1e6: "those are the MB of the base and its 20 adapters. How many times as much is the other?",
    }
    return judge(
        2,
        answer,
        merged / apart,
        mistakes,
        hint="20 models of the base's size, divided by one base and 20 adapters.",
        why=f"{merged / 1e6:.0f} MB against {apart / 1e6:.1f}. Merged, nothing is left to add at inference; apart, "
        "it all takes less disk. So keep the adapter, and merge where you serve.",
        tolerance=0.01,
    )


def check_00_3(answer: object) -> str:
    """A function (x, W, A, B, s) → W x + s · B A x for every row of x; tried on matrices of five different sizes."""
    hint = "the inputs are rows, so W x is written x @ W.T; do the same with A, then with B."
    if refused := no_function(3, answer, "x, W, A, B, s", hint):
        return refused
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (5, 7), "W": (11, 7), "A": (3, 7), "B": (11, 3)}
    x, W, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values())
    s = 0.5
    try:
        result = answer(x.clone(), W.clone(), A.clone(), B.clone(), s)
    except Exception as error:
        given = ", ".join(f"{name} {rows} × {columns}" for name, (rows, columns) in shapes.items())
        return (
            f"Exercise 3: not yet: with {given} it stops with {type(error).__name__}: {error}. Hint: {hint}"
        )
    if not isinstance(result, Tensor):
        return f"Exercise 3: not yet: the result is a tensor; got {type(result).__name__}."
    by_W, by_BA = x @ W.T, x @ A.T @ B.T
    if same(result, by_W + s * by_BA):
        return (
            "Exercise 3: right. x @ A.T comes first: r numbers for each input, so the product BA, which is as "
            "large as W, never has to be built."
        )
    mistakes = [
        ((by_W + s * by_BA).T, "the result lies on its side: an output in each row, (n, out)."),
        (by_W + by_BA, "s is missing."),
        (s * (by_W + by_BA), "s stands before BA only; W counts in full."),
        (by_W, "that is W alone: add s · BA."),
        (s * by_BA, "that is the update alone: add it to what W makes of x."),
        (by_W - s * by_BA, "the sign is wrong: the update is added."),
        (by_W + by_BA / s, "s multiplies; it does not divide."),
    ]
    for mistake, diagnosis in mistakes:
        if same(result, mistake):
            return f"Exercise 3: not yet: {diagnosis}"
    return f"Exercise 3: not yet: these are other numbers than W x + s · B A x. Hint: {hint}"
