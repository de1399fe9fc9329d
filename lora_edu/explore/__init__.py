"""Slider explorers: one function a subject, each returns an Explorer to put last in a cell."""

from lora_edu.explore.explorer import Explorer

__all__ = ["Explorer"]
