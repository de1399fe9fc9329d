"""What a trained adapter makes of its rank, layer by layer: figures and a recommendation. No files, no printing."""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from lora_edu import lowrank
from lora_edu.lora.adapter_files import Adapter, Factors
from lora_edu.lora.resizing import pooled, singular_values

KEEP = 0.99  # share of ‖ΔW‖² below which nothing is recommended to be cut: an error of a tenth of ‖ΔW‖
WORTH = 0.75  # a cut is recommended where it leaves at most that share of the rank
FLAT = 0.5  # stable rank over r from which on all directions count as used: σ₁² is at most twice the average


DRAWS, FEW_DRAWS = 40, 5  # of noise; the second where min(m, n, r) is above 256


class Usage(NamedTuple):
    """What one layer makes of its rank r. Norms are Frobenius; ΔW = s · BA.

    status: "measured", "equal" (ΔW is 0), "not finite". sides: (rows, columns) of ΔW, of one expert where there are
    several.
    values: the singular values of ΔW, largest first; of a stack of experts √Σσ_k² over them, whose cuts are those of
    the whole stack, while stable and effective rank and `above` are medians over them.
    half, quarter: share of ‖ΔW‖² in the first ⌈r/2⌉ and ⌈r/4⌉ of them. edge: the largest singular value that noise
    of the norm of ΔW had (lowrank.product_noise_edge); above: how many of ΔW's are larger.
    recommended: the rank to cut to; r itself where there is no reason to.
    """

    status: str
    sides: tuple[int, int]
    experts: int
    rank: int
    scaling: float
    embedding: bool
    values: tuple[float, ...] = ()
    norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    rank_90: int | None = None
    rank_99: int | None = None
    half: float | None = None
    quarter: float | None = None
    edge: float | None = None
    above: int | None = None
    recommended: int | None = None

    @property
    def parameters(self) -> int:
        return self.cost * self.rank

    @property
    def cost(self) -> int:
        """Parameters of one direction more."""
        return self.experts * sum(self.sides)

    @property
    def flat(self) -> bool:
        """Whether no direction has more than twice the average energy."""
        most = min(self.rank, *self.sides)
        return self.stable_rank is not None and most > 2 and self.stable_rank >= FLAT * most


def use_of(factors: Factors) -> Usage:
    """The figures of one layer, from its factors alone: BA is never made."""
    known = Usage(
        "measured", factors.sides, factors.experts, factors.rank, factors.scaling, factors.embedding
    )
    if not (torch.isfinite(factors.lora_A).all() and torch.isfinite(factors.lora_B).all()):
        return known._replace(status="not finite")
    spectra = singular_values(factors)
    values = pooled(spectra)
    norm = float(torch.linalg.vector_norm(values))
    if not norm:
        return known._replace(status="equal", norm=0.0, recommended=0)
    shares = lowrank.energy(values)
    kept = lambda part: float(shares[min(math.ceil(factors.rank / part), len(shares)) - 1])
    edges = [_edge(factors, each) for each in spectra]
    used = known._replace(
        values=tuple(values.tolist()),
        norm=norm,
        stable_rank=statistics.median(map(lowrank.stable_rank, spectra)),
        effective_rank=statistics.median(map(lowrank.effective_rank, spectra)),
        rank_90=lowrank.rank_for_energy(values, 0.9),
        rank_99=lowrank.rank_for_energy(values, KEEP),
        half=kept(2),
        quarter=kept(4),
        edge=statistics.median(edges),
        above=statistics.median_high(
            int((each > edge).sum()) for each, edge in zip(spectra, edges, strict=True)
        ),
    )
    worth = used.rank_99 <= WORTH * factors.rank
    return used._replace(recommended=used.rank_99 if worth else factors.rank)


def _edge(factors: Factors, values: torch.Tensor) -> float:
    draws = DRAWS if len(values) <= 256 else FEW_DRAWS  # there each takes long, and they hardly differ
    edge = lowrank.product_noise_edge(*factors.sides, factors.rank, draws)
    return float(torch.linalg.vector_norm(values)) * edge


def uses_of(adapter: Adapter, progress: Callable[[list], object] = iter) -> dict[str, Usage]:
    """Layer → its figures, in the file's order. progress: wraps the list of names that is walked through."""
    return {name: use_of(adapter.layers[name]) for name in progress(list(adapter.layers))}


def kept_together(uses: Mapping[str, Usage], ranks: Callable[[Usage], int]) -> float | None:
    """Share of all layers' ‖ΔW‖² that cutting each to its rank keeps; None where all are 0."""
    kept = total = 0.0
    for each in uses.values():
        kept += sum(value**2 for value in each.values[: ranks(each)])
        total += sum(value**2 for value in each.values)
    return kept / total if total else None


def kept_at(part: int, uses: Mapping[str, Usage]) -> float | None:
    """`kept_together` where each layer is cut to ⌈r / part⌉."""
    return kept_together(uses, lambda each: math.ceil(each.rank / part))


def recommendation(uses: Mapping[str, Usage]) -> tuple[str, str]:
    """("resize", "higher", "keep" or "nothing", and why). By energy alone: the loss is not measured here."""
    measured = {name: each for name, each in uses.items() if each.status == "measured"}
    if not measured:
        return "nothing", "no layer has an update: lora_B is 0, as before training, or not finite"
    now = sum(each.parameters for each in uses.values())
    left = sum(each.cost * (each.recommended or 0) for each in measured.values())
    flat = [name for name, each in measured.items() if each.flat]
    if left <= WORTH * now:
        energy = kept_together(uses, lambda each: each.recommended or 0)
        return "resize", (
            f"{left} of {now} parameters ({100 * left / now:.0f} %) keep {100 * energy:.1f} % of ‖ΔW‖²: in "
            f"{sum((each.recommended or 0) < each.rank for each in uses.values())} of {len(uses)} layers 99 % stand in "
            "three quarters of the rank or fewer"
        )
    if 2 * len(flat) >= len(measured):
        return "higher", (
            f"in {len(flat)} of {len(measured)} layers no direction has more than twice the average energy: a cut "
            "loses about as much of ‖ΔW‖² as it saves, and the rank may have been a limit. Noise has such a spectrum, "
            "too: training with a higher rank and comparing the loss tells them apart"
        )
    return "keep", (
        f"99 % of ‖ΔW‖² in each layer takes {100 * left / now:.0f} % of the parameters, so a cut saves little"
    )
