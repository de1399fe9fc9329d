"""Slider explorers: one function a subject, each returns an Explorer to put last in a cell."""

from lora_edu.explore.explorer import Explorer
from lora_edu.explore.low_rank import elevation_rank, hidden_direction, noisy_photograph, photograph_rank

__all__ = ["Explorer", "elevation_rank", "hidden_direction", "noisy_photograph", "photograph_rank"]
