"""Checks of the exercises: one module a chapter, `check_NN_k(answer)` → a sentence a student can act on."""

from lora_edu.exercises.chapter_00 import check_00_1, check_00_2
from lora_edu.exercises.chapter_01 import (
    check_01_1,
    check_01_2,
    check_01_3,
    check_01_4,
    check_01_5,
    check_01_6,
    hidden_matrix,
)
from lora_edu.exercises.chapter_02 import check_02_1, check_02_2, check_02_3, check_02_4, wishes
from lora_edu.exercises.chapter_03 import (
    check_03_1,
    check_03_2,
    check_03_3,
    check_03_4,
    check_03_5,
    rounded_pair,
)
from lora_edu.exercises.chapter_04 import (
    check_04_1,
    check_04_2,
    check_04_3,
    check_04_4,
    check_04_5,
    check_04_6,
)
from lora_edu.exercises.chapter_05 import (
    check_05_1,
    check_05_2,
    check_05_3,
    check_05_4,
    check_05_5,
    check_05_6,
)
from lora_edu.exercises.chapter_06 import (
    check_06_1,
    check_06_2,
    check_06_3,
    check_06_4,
    check_06_5,
    loralib_factors,
)
from lora_edu.exercises.chapter_07 import (
    check_07_1,
    check_07_2,
    check_07_3,
    check_07_4,
    check_07_5,
)

__all__ = [
    "check_00_1",
    "check_00_2",
    "check_01_1",
    "check_01_2",
    "check_01_3",
    "check_01_4",
    "check_01_5",
    "check_01_6",
    "check_02_1",
    "check_02_2",
    "check_02_3",
    "check_02_4",
    "check_03_1",
    "check_03_2",
    "check_03_3",
    "check_03_4",
    "check_03_5",
    "check_04_1",
    "check_04_2",
    "check_04_3",
    "check_04_4",
    "check_04_5",
    "check_04_6",
    "check_05_1",
    "check_05_2",
    "check_05_3",
    "check_05_4",
    "check_05_5",
    "check_05_6",
    "check_06_1",
    "check_06_2",
    "check_06_3",
    "check_06_4",
    "check_06_5",
    "check_07_1",
    "check_07_2",
    "check_07_3",
    "check_07_4",
    "check_07_5",
    "hidden_matrix",
    "loralib_factors",
    "rounded_pair",
    "wishes",
]
