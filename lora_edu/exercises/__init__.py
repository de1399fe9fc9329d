"""Checks of the exercises: one module a chapter, `check_NN_k(answer)` → a sentence a student can act on."""

from lora_edu.exercises.chapter_01 import (
    check_01_1,
    check_01_2,
    check_01_3,
    check_01_4,
    check_01_5,
    check_01_6,
    hidden_matrix,
)
from lora_edu.exercises.chapter_04 import (
    check_04_1,
    check_04_2,
    check_04_3,
    check_04_4,
    check_04_5,
    check_04_6,
)

__all__ = [
    "check_01_1",
    "check_01_2",
    "check_01_3",
    "check_01_4",
    "check_01_5",
    "check_01_6",
    "check_04_1",
    "check_04_2",
    "check_04_3",
    "check_04_4",
    "check_04_5",
    "check_04_6",
    "hidden_matrix",
]
