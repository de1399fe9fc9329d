"""Checks for the exercises of chapter 00: what an adapter trains, and what merging costs.

Every right and every typical wrong answer is computed here, from shapes and from the shipped files.
"""

from lora_edu import counting
from lora_edu.data import adapter_folder
from lora_edu.data.shipped import data_file
from lora_edu.exercises.answers import judge


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
