"""LoRALinear, LoRAEmbedding, LoRAQuantisedLinear: a frozen layer with a low-rank update, merged only when asked.

Not for whole models (inject.py), the mathematics (functional.py) or what is refused (checks.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.text import check_rank

from .checks import (
    check_alpha,
    check_dropout,
    check_merged,
    check_options,
    check_shape,
    is_conv1d,
    refuse_layer,
    refuse_tokens,
    refuse_training,
)
from .functional import (
    INTERPRETED,
    clip_norm,
    delta,
    lora_embedding,
    lora_linear,
    low_rank_part,
    merged_weight,
)
from .quant import Quantised, QuantisedLinear, dequantise, quantise_like, quantised_linear, weight_like


class MergeReport(NamedTuple):
    """What merging did: the share of ΔW that rounding swallowed, and the bytes it costs while merged."""

    swallowed: float
    extra_bytes: int


class LowRank:
    """What the layers do alike: ΔW from their factors, merged into W and taken out, saved and described.

    A class to be mixed in, since torch calls `extra_repr` and the two methods of state_dict by name: as functions they
    would need a method each in every layer again.
    """

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / √r if `rank_stabilised`."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def reset_lora(self) -> None:
        """Start again: A Kaiming-uniform, B zero (the paper says Gaussian; loralib and PEFT do this)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW, scaling included, in the weight's own shape and dtype."""
        return delta(*self._factors(), self.scaling, self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> MergeReport:
        """Put W + ΔW in W's place, so that the layer costs what the plain one costs, until `unmerge`.

        The original W is kept beside the merged one: that is what gives it back bit for bit, and it costs as many
        bytes as W has (`extra_bytes`). Merging a merged layer changes nothing. While merged:
        - inference works and costs what the plain layer costs; a forward pass in training mode with gradients
          raises;
        - `state_dict()` holds the *unmerged* weights and the factors, the same as before merging, so that loading
          it never counts ΔW twice; `load_state_dict` unmerges first;
        - `.to(...)` converts W, W + ΔW and the factors; `deepcopy` copies a merged layer;
        - whatever else holds the same Parameter (a tied head) sees W + ΔW too.
        In half precision W + ΔW is rounded once; `swallowed` is ‖ΔW − (merged − W)‖_F / ‖ΔW‖_F.
        Raises ValueError if W + ΔW has an entry that isn't finite; the layer is then unchanged.
        """
        if not self.merged:
            merged, swallowed = merged_weight(self.weight, *self._factors(), self.scaling)
            check_merged(merged, self.weight)
            self._report = MergeReport(swallowed, merged.numel() * merged.element_size())
            self.unmerged_weight = self.weight.data
            self._put_weight(merged)
        return self._report

    def unmerge(self) -> None:
        """Put W back, bit for bit. Does nothing if not merged."""
        if self.merged:
            self._put_weight(self.unmerged_weight)
            self.unmerged_weight = None

    def extra_repr(self) -> str:
        stabilised = ", rank_stabilised=True" if self.rank_stabilised else ""
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}{stabilised}{merged}"

    def _put_weight(self, data: Tensor) -> None:
        """Swap what the Parameter holds. A backward pass through the old weight raises: it would use the new."""
        self.weight.data = data
        torch.autograd.graph.increment_version(self.weight)

    def _add_factors(self, rank: int, alpha: float, rank_stabilised: bool, dtype: torch.dtype) -> None:
        """Give the torch layer its factors, fresh, and freeze the rest."""
        embedding = isinstance(self, nn.Embedding)
        A = (self.num_embeddings, rank) if embedding else (rank, self.in_features)
        B = (self.embedding_dim if embedding else self.out_features, rank)
        self.requires_grad_(False)
        device = weight_like(self).device
        self.lora_A = nn.Parameter(torch.empty(A, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(B, dtype=dtype, device=device))
        self.rank, self.alpha, self.rank_stabilised = rank, alpha, rank_stabilised
        self.register_buffer("unmerged_weight", None, persistent=False)
        self._original = ()
        self.reset_lora()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.unmerged_weight

    def _load_from_state_dict(self, *args):
        self.unmerge()
        super()._load_from_state_dict(*args)


class LoRALinear(LowRank, nn.Linear):
    """h = W x + b + s · B A x with s = alpha / r; W and b are frozen, A and B are trained.

    x: (..., in) → (..., out). `weight` W: (out, in); `lora_A`: (r, in), starts Kaiming-uniform; `lora_B`:
    (out, r), starts at zero, so that the layer starts as the plain one. `dropout` hides entries of x from the
    update while training. `rank_stabilised` takes s = alpha / √r (Kalajdzievski 2023).

    `from_layer` shares the weights of an existing nn.Linear or of Hugging Face's Conv1D, whose weight is
    stored (in, out): then `transposed` is True and `weight` and `delta_weight()` keep that shape.

    See `merge` for what holds while merged.
    """

    transposed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        bias: bool = True,
        rank_stabilised: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        rank = check_rank(rank, (out_features, in_features))
        check_alpha(alpha)
        check_dropout(dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_factors(rank, alpha, rank_stabilised, self.weight.dtype)
        self.dropout = dropout

    @classmethod
    def from_layer(
        cls,
        layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        lora_dtype: torch.dtype | None = None,
        any_rank: bool = False,
    ) -> "LoRALinear":
        """The layer with LoRA: its weight and bias are shared, not copied, and frozen.

        `lora_dtype`: the factors' dtype (default: the weight's). `any_rank` lets a rank above the smaller
        side pass. Raises TypeError for a layer that LoRALinear can't stand in for, ValueError for a bad rank
        or alpha.
        """
        refuse_layer(layer, (nn.Linear,))
        rows, columns = layer.weight.shape
        rank = check_rank(rank, (rows, columns), bounded=not any_rank)
        transposed = is_conv1d(layer)
        sides = (rows, columns) if transposed else (columns, rows)
        lora = cls(*sides, 1, alpha, dropout, layer.bias is not None, rank_stabilised, device="meta")
        lora.transposed = transposed
        lora.weight, lora.bias = layer.weight, layer.bias
        lora._add_factors(rank, alpha, rank_stabilised, lora_dtype or layer.weight.dtype)
        lora._original = (layer,)
        lora.training = layer.training
        return lora

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self)
        weight = self.weight.T if self.transposed else self.weight
        if self.merged:
            refuse_training(self)
            return F.linear(x, weight, self.bias)
        return lora_linear(x, weight, self.lora_A, self.lora_B, self.scaling, self.bias, self._dropout_now())

    def low_rank_part(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(s · A x, B), whose product `forward` adds to W x; None while merged: then W + ΔW is in W's place.

        x: (..., in); returns (..., r) and (out, r), with dropout, and refuses what `forward` refuses. For a loss that
        never holds the whole output.
        """
        check_shape(self)
        if self.merged:
            refuse_training(self)
            return None
        return low_rank_part(x, self.lora_A, self.scaling, self._dropout_now()), self.lora_B

    def _factors(self) -> tuple[Tensor, Tensor]:
        return (self.lora_A.T, self.lora_B.T) if self.transposed else (self.lora_B, self.lora_A)


class LoRAQuantisedLinear(LowRank, QuantisedLinear):
    """h = W x + b + s · B A x with W frozen in four bits: QLoRA (Dettmers et al. 2023, eq. 5). A and B are as
    LoRALinear's, in `lora_dtype`, and only they are trained.

    W is decoded a few rows at a time, forwards and backwards (`quantised_linear`). Made by `from_layer`, which shares
    the layer's tensors, and by `add_lora`. While merged, what `LowRank.merge` says of state_dict, training and
    deepcopy holds here, too.
    """

    transposed = False

    @classmethod
    def from_layer(
        cls,
        layer: QuantisedLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        lora_dtype: torch.dtype | None = None,
        any_rank: bool = False,
    ) -> "LoRAQuantisedLinear":
        """The layer with LoRA: its tensors are shared, not copied. Options as LoRALinear's; `lora_dtype` is the
        layer's dtype unless given.

        Raises TypeError for another layer, ValueError for a bad rank, alpha or dropout.
        """
        refuse_layer(layer, (QuantisedLinear,))
        rank = check_rank(rank, (layer.out_features, layer.in_features), bounded=not any_rank)
        check_alpha(alpha)
        check_dropout(dropout)
        lora = cls.from_quantised(layer.quantised, layer.bias, layer.dtype)
        lora._add_factors(rank, alpha, rank_stabilised, lora_dtype or layer.dtype)
        lora.dropout = dropout
        lora._original = (layer,)
        lora.training = layer.training
        return lora

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            refuse_training(self)
            return quantised_linear(x, self.quantised, self.bias)
        low = low_rank_part(x, self.lora_A, self.scaling, self._dropout_now())
        return quantised_linear(x, self.quantised, self.bias).add_(F.linear(low, self.lora_B))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW, scaling included, (out, in), in the dtype that the layer stands for."""
        return delta(self.lora_B, self.lora_A, self.scaling, self.dtype)

    @torch.no_grad()
    def merge(self, requantise: bool = False) -> MergeReport:
        """Refused, unless `requantise`: then W + ΔW is quantised anew, in W's format, until `unmerge`.

        W + ΔW does not lie on W's levels, so that nearly all of the rounding to four bits happens again, and it is
        mostly larger than ΔW. `swallowed`, ‖ΔW − (merged − W)‖_F / ‖ΔW‖_F, says how much of ΔW that cost; above 1, the
        merged layer is farther from W + ΔW than W was. While this runs, W stands in float32.
        Raises ValueError without `requantise`, and where an entry of W + ΔW isn't finite; nothing is changed then.
        """
        if not requantise and not self.merged:
            raise ValueError(
                f"W is quantised ({self.quantised.format}): W + ΔW has to be rounded to four bits again, and that may "
                "cost more than ΔW is. merge(requantise=True) does it and reports the loss; without loss: keep the "
                "adapter beside its base (save_adapter), or load it on the base in float and merge there"
            )
        if not self.merged:
            old = self.quantised
            W = dequantise(old)
            delta_W = delta(self.lora_B, self.lora_A, self.scaling, torch.float32)
            check_merged(W + delta_W, W)
            new = quantise_like(W + delta_W, old)
            norm = float(delta_W.norm())
            off = float((dequantise(new) - W).sub_(delta_W).norm())
            self._report = MergeReport(off / norm if norm else 0.0, new.nbytes)
            self._take(new)
            for name, tensor in old.tensors.items():
                self._buffers[_UNMERGED[name]] = tensor
        return self._report

    def unmerge(self) -> None:
        """Put W back, bit for bit. Does nothing if not merged."""
        if self.merged:
            self._take(self._unmerged())
            for name in self._stored:
                self._buffers[_UNMERGED[name]] = None

    def _unmerged(self) -> Quantised:
        return Quantised(*self._about, **{name: self._buffers[_UNMERGED[name]] for name in self._stored})

    def _add_factors(self, *options) -> None:
        super()._add_factors(*options)
        for name in self._stored:
            self.register_buffer(_UNMERGED[name], None, persistent=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super(LowRank, self)._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name, tensor in self._unmerged().tensors.items():
                destination[prefix + name] = tensor


# Where a merged layer keeps W; the codes' place is the one that tells of all layers whether they are merged.
_UNMERGED = {name: f"unmerged_{name}" for name in Quantised._fields} | {"codes": "unmerged_weight"}


class LoRAEmbedding(LowRank, nn.Embedding):
    """out[t] = W[t] + s · A[t] Bᵀ with s = alpha / r; the table W is frozen, A and B are trained.

    tokens: any shape, integers below V → (*tokens.shape, d). `weight` W: (V, d); `lora_A`: (V, r), starts at
    zero; `lora_B`: (d, r), starts normal. loralib and PEFT store A transposed, (r, V); here a token's row is
    contiguous, so that a look-up reads r numbers and the gradient can be sparse.

    What torch's options mean here:
    - `padding_idx`: the output there is W's row alone, merged or not, and that row of A gets no gradient.
      (loralib and PEFT add ΔW there; the two agree as long as that row of A is zero, where it starts.)
    - `max_norm`: an *output* row longer than this is scaled down to it. W and A are never changed in place.
    - `scale_grad_by_freq`: a row's gradient is divided by how often the token occurs in the batch.
    - `sparse`: A's gradient holds only the rows looked up, so a step's cost doesn't grow with V. It needs an
      optimiser that takes sparse gradients: `pair_optimizers` picks them. Refused with `scale_grad_by_freq`,
      as torch has no such gradient. Not for DistributedDataParallel, which expects every parameter of a
      sparse embedding, B too, to have a sparse gradient, and says so.
    - `check_tokens`: a token outside the vocabulary raises an IndexError that names it. On a CPU this is free,
      as torch looks anyway. On a GPU, where it would not, it costs a pass over the tokens and a wait for the
      result; switch it off where that matters, in a CUDA graph, and for `torch.compile(fullgraph=True)`. Such a
      token's output is then NaN where Triton does the look-up (see `lora_embedding`).

    See `merge` for what holds while merged.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        alpha: float,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        check_tokens: bool = True,
        rank_stabilised: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        rank = check_rank(rank, (num_embeddings, embedding_dim))
        check_alpha(alpha)
        check_options(max_norm, scale_grad_by_freq, sparse)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            device=device,
            dtype=dtype,
        )
        self._add_factors(rank, alpha, rank_stabilised, self.weight.dtype)
        self.check_tokens = check_tokens

    @classmethod
    def from_layer(
        cls,
        layer: nn.Embedding,
        rank: int,
        alpha: float,
        sparse: bool | None = None,
        check_tokens: bool = True,
        rank_stabilised: bool = False,
        lora_dtype: torch.dtype | None = None,
        any_rank: bool = False,
    ) -> "LoRAEmbedding":
        """The layer with LoRA: its table is shared, not copied, and frozen; its options are kept.

        `sparse`, `lora_dtype`, `any_rank`: as the layer's, the table's and no, unless given.
        Raises TypeError for a layer that LoRAEmbedding can't stand in for, ValueError for bad options.
        """
        refuse_layer(layer, (nn.Embedding,))
        rank = check_rank(rank, layer.weight.shape, bounded=not any_rank)
        lora = cls(
            layer.num_embeddings,
            layer.embedding_dim,
            1,
            alpha,
            layer.padding_idx,
            layer.max_norm,
            layer.norm_type,
            layer.scale_grad_by_freq,
            layer.sparse if sparse is None else sparse,
            check_tokens,
            rank_stabilised,
            device="meta",
        )
        lora.weight = layer.weight
        lora._add_factors(rank, alpha, rank_stabilised, lora_dtype or layer.weight.dtype)
        lora._original = (layer,)
        lora.training = layer.training
        return lora

    def reset_lora(self) -> None:
        """Start again: A zero, B normal (so that rows never looked up stay zero)."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, tokens: Tensor) -> Tensor:
        check_shape(self)
        if self.check_tokens and (INTERPRETED or not tokens.is_cpu):
            refuse_tokens(tokens, self.num_embeddings)
        try:
            if self.merged:
                refuse_training(self)
                out = F.embedding(tokens, self.weight)
            else:
                out = lora_embedding(
                    tokens,
                    self.weight,
                    self.lora_A,
                    self.lora_B,
                    self.scaling,
                    self.padding_idx,
                    self.scale_grad_by_freq,
                    self.sparse,
                )
        except IndexError:  # from torch, on a CPU: it names neither the token nor the vocabulary
            if self.check_tokens:
                refuse_tokens(tokens, self.num_embeddings)
            raise
        return out if self.max_norm is None else clip_norm(out, self.max_norm, self.norm_type)

    def _factors(self) -> tuple[Tensor, Tensor]:
        lora_A = self.lora_A
        if self.padding_idx is not None:
            lora_A = lora_A.detach().clone()
            lora_A[self.padding_idx] = 0.0
        return lora_A, self.lora_B.T
