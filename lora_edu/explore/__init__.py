"""Slider explorers and predictions: each function returns a widget to put last in a cell."""

from lora_edu.explore.counting import Calculator, calculator, rank_and_shape, table_and_square, which_matrices
from lora_edu.explore.deltas import (
    decisions_kept,
    published_spectra,
    rare_rows,
    regimes,
    rounding,
    share_kept,
    spectra_by_kind,
    truncation,
    two_seeds,
)
from lora_edu.explore.explorer import Explorer
from lora_edu.explore.intrinsic_dimension import full_rank_beside_low_rank, random_subspaces
from lora_edu.explore.lora_embedding import bytes_moved, first_step, measured_on_a_gpu, roofline
from lora_edu.explore.lora_linear import alpha_that_does_nothing, gradient_norms, seen_through
from lora_edu.explore.low_rank import elevation_rank, hidden_direction, noisy_photograph, photograph_rank
from lora_edu.explore.other_ways import methods_and_sizes, price_and_quality
from lora_edu.explore.prediction import Prediction, predict
from lora_edu.explore.real_encoder import how_low, rank_and_matrices, search_box
from lora_edu.explore.real_llm import docstring_writer, draw_cases, five_cases
from lora_edu.explore.serve import high_then_cut, rounded_away, spent_by_rule, two_adapters
from lora_edu.explore.start_here import what_each_rank_writes
from lora_edu.explore.train_with_lora import (
    equal_gain,
    rate_and_rank,
    shared_directions,
    trained_and_truncated,
)
from lora_edu.explore.variants import one_rate_for_all, variants_beside_lora

__all__ = [
    "Calculator",
    "Explorer",
    "Prediction",
    "alpha_that_does_nothing",
    "bytes_moved",
    "calculator",
    "decisions_kept",
    "docstring_writer",
    "draw_cases",
    "elevation_rank",
    "equal_gain",
    "first_step",
    "five_cases",
    "full_rank_beside_low_rank",
    "gradient_norms",
    "hidden_direction",
    "high_then_cut",
    "how_low",
    "measured_on_a_gpu",
    "methods_and_sizes",
    "noisy_photograph",
    "one_rate_for_all",
    "photograph_rank",
    "predict",
    "price_and_quality",
    "published_spectra",
    "random_subspaces",
    "rank_and_matrices",
    "rank_and_shape",
    "rare_rows",
    "rate_and_rank",
    "regimes",
    "roofline",
    "rounded_away",
    "rounding",
    "search_box",
    "seen_through",
    "share_kept",
    "shared_directions",
    "spectra_by_kind",
    "spent_by_rule",
    "table_and_square",
    "trained_and_truncated",
    "truncation",
    "two_adapters",
    "two_seeds",
    "variants_beside_lora",
    "what_each_rank_writes",
    "which_matrices",
]
