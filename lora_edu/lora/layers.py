"""LoRALinear and LoRAEmbedding: torch's own layers with a low-rank update, merged only when asked.

Not for whole models (inject.py) and not for the mathematics (functional.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.text import check_rank

from .functional import INTERPRETED, clip_norm, delta, lora_embedding, lora_linear, merged_weight


class MergeReport(NamedTuple):
    """What merging did: the share of ΔW that rounding swallowed, and the bytes it costs while merged."""

    swallowed: float
    extra_bytes: int


class LoRALinear(nn.Linear):
    """h = W x + b + s · B A x with s = alpha / r; W and b are frozen, A and B are trained.

    x: (..., in) → (..., out). `weight` W: (out, in); `lora_A`: (r, in), starts Kaiming-uniform; `lora_B`:
    (out, r), starts at zero, so that the layer starts as the plain one. `dropout` hides entries of x from the
    update while training. `rank_stabilised` takes s = alpha / √r (Kalajdzievski 2023).

    `from_layer` shares the weights of an existing nn.Linear or of Hugging Face's Conv1D, whose weight is
    stored (in, out): then `transposed` is True and `weight` and `delta_weight()` keep that shape.

    See `merge_layer` for what holds while merged.
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
        _add_factors(self, rank, alpha, rank_stabilised, self.weight.dtype)
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
        _add_factors(lora, rank, alpha, rank_stabilised, lora_dtype or layer.weight.dtype)
        lora._original = (layer,)
        lora.training = layer.training
        return lora

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / √r if `rank_stabilised`."""
        return _scaling(self)

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def reset_lora(self) -> None:
        """Start again: A Kaiming-uniform, B zero (the paper says Gaussian; loralib and PEFT do this)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        if self.merged:
            _refuse_training(self)
            return F.linear(x, weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, weight, self.lora_A, self.lora_B, self.scaling, self.bias, dropout)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = s · B A in the weight's own shape and dtype (s · (B A)ᵀ where `transposed`)."""
        return delta(*self._factors(), self.scaling, self.weight.dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return (self.lora_A.T, self.lora_B.T) if self.transposed else (self.lora_B, self.lora_A)

    def merge(self) -> MergeReport:
        """Put W + ΔW in W's place, so that the layer costs what the plain one costs; see `merge_layer`."""
        return merge_layer(self, *self._factors())

    def unmerge(self) -> None:
        """Put W back, bit for bit. Does nothing if not merged."""
        unmerge_layer(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self)}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _save_unmerged(self, destination, prefix)

    def _load_from_state_dict(self, *args):
        self.unmerge()
        super()._load_from_state_dict(*args)


class LoRAEmbedding(nn.Embedding):
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

    See `merge_layer` for what holds while merged.
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
        _check_options(max_norm, scale_grad_by_freq, sparse)
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
        _add_factors(self, rank, alpha, rank_stabilised, self.weight.dtype)
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
        _add_factors(lora, rank, alpha, rank_stabilised, lora_dtype or layer.weight.dtype)
        lora._original = (layer,)
        lora.training = layer.training
        return lora

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / √r if `rank_stabilised`."""
        return _scaling(self)

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def reset_lora(self) -> None:
        """Start again: A zero, B normal (so that rows never looked up stay zero)."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.check_tokens:
            return self._look_up(tokens)
        if INTERPRETED or not tokens.is_cpu:
            _refuse_tokens(tokens, self.num_embeddings)
        try:
            return self._look_up(tokens)
        except IndexError:  # from torch, on a CPU: it names neither the token nor the vocabulary
            _refuse_tokens(tokens, self.num_embeddings)
            raise

    def _look_up(self, tokens: Tensor) -> Tensor:
        if self.merged:
            _refuse_training(self)
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
        return out if self.max_norm is None else clip_norm(out, self.max_norm, self.norm_type)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = s · A Bᵀ, (V, d), in the weight's dtype; its padding row is zero. Rows before `max_norm`."""
        return delta(*self._factors(), self.scaling, self.weight.dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        lora_A = self.lora_A
        if self.padding_idx is not None:
            lora_A = lora_A.detach().clone()
            lora_A[self.padding_idx] = 0.0
        return lora_A, self.lora_B.T

    def merge(self) -> MergeReport:
        """Put W + ΔW in W's place, so that the layer costs what the plain one costs; see `merge_layer`."""
        return merge_layer(self, *self._factors())

    def unmerge(self) -> None:
        """Put W back, bit for bit. Does nothing if not merged."""
        unmerge_layer(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self)}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _save_unmerged(self, destination, prefix)

    def _load_from_state_dict(self, *args):
        self.unmerge()
        super()._load_from_state_dict(*args)


# What the two layers do alike


def merge_layer(layer: LoRALinear | LoRAEmbedding, left: Tensor, right: Tensor) -> MergeReport:
    """Replace W by W + s · left right until `unmerge`. Merging a merged layer changes nothing.

    The original W is kept beside the merged one: that is what gives it back bit for bit, and it costs as many
    bytes as W has (`extra_bytes`). While merged:
    - inference works and costs what the plain layer costs; a forward pass in training mode with gradients
      raises;
    - `state_dict()` holds the *unmerged* weights and the factors, the same as before merging, so that loading
      it never counts ΔW twice; `load_state_dict` unmerges first;
    - `.to(...)` converts W, W + ΔW and the factors; `deepcopy` copies a merged layer;
    - whatever else holds the same Parameter (a tied head) sees W + ΔW too.
    In half precision W + ΔW is rounded once; `swallowed` is ‖ΔW − (merged − W)‖_F / ‖ΔW‖_F.
    Raises ValueError if W + ΔW has an entry that isn't finite; the layer is then unchanged.
    """
    with torch.no_grad():
        if layer.merged:
            return layer._report
        merged, swallowed = merged_weight(layer.weight, left, right, layer.scaling)
        if merged.device.type != "meta" and not torch.isfinite(merged).all():
            where = "the frozen weight" if not torch.isfinite(layer.weight).all() else "the update"
            raise ValueError(
                f"the merged weight must be finite in {merged.dtype}; {where} makes "
                f"{int((~torch.isfinite(merged)).sum())} of its entries infinite or NaN. Nothing was merged"
            )
        layer._report = MergeReport(swallowed, merged.numel() * merged.element_size())
        layer.unmerged_weight = layer.weight.data
        _put_weight(layer, merged)
    return layer._report


def unmerge_layer(layer: LoRALinear | LoRAEmbedding) -> None:
    """Put the original weight back."""
    if layer.merged:
        _put_weight(layer, layer.unmerged_weight)
        layer.unmerged_weight = None


def is_conv1d(layer: nn.Module) -> bool:
    """Is this Hugging Face's Conv1D, a linear layer whose weight is stored (in, out)?"""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") and hasattr(layer, "nf")


def refuse_layer(layer: nn.Module, kinds: tuple[type, ...] = (nn.Linear, nn.Embedding)) -> None:
    """Raise TypeError, with the reason, unless LoRA can be added to this layer."""
    kind = type(layer).__name__
    if isinstance(layer, LoRALinear | LoRAEmbedding):
        raise TypeError(f"{kind} has LoRA already; remove_lora it first, or train the adapter it has")
    conv1d = is_conv1d(layer) and nn.Linear in kinds
    family = next((each for each in kinds if isinstance(layer, each)), None)
    weight = getattr(layer, "weight", None)
    if family is None and not conv1d:
        quantised = "quant" in f"{type(layer).__module__}.{kind}".lower()
        problem = "is already quantised" if quantised else "is none of them"
        wanted = " or ".join(f"nn.{each.__name__}" for each in kinds)
        conv = ", or Conv1D of transformers" if nn.Linear in kinds else ""
        raise TypeError(f"LoRA can be added to {wanted}{conv}; {kind} {problem}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise TypeError(f"{kind} has no weight yet; run the model once, then add LoRA")
    if "weight" not in layer._parameters:
        raise TypeError(
            f"{kind} computes its weight (a parametrization or weight norm); remove that, then add LoRA"
        )
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(
            f"{kind} is already quantised ({weight.dtype}, {type(weight.data).__name__}); load it unquantised"
        )
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            "nn.MultiheadAttention reads out_proj's weight without calling the layer, so that LoRA there "
            "would never be used; adapt another layer, or write the attention with nn.Linear"
        )
    if not conv1d and (type(layer).forward is not family.forward or "forward" in vars(layer)):
        raise TypeError(
            f"{kind} changes what nn.{family.__name__} computes, which LoRA would undo; adapt another layer"
        )
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, name, None) for name in hooks):
        raise TypeError(
            f"{kind} has hooks, which would be lost; remove them, add LoRA, then register them again"
        )


def check_alpha(alpha: float) -> None:
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not math.isfinite(alpha)
        or alpha == 0
    ):
        raise ValueError(
            f"alpha must be a finite number other than 0 (at 0 nothing is learnt); got {alpha!r}"
        )


def check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout!r}")


def _check_options(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    if sparse and scale_grad_by_freq:
        raise ValueError(
            "sparse=True can't go with scale_grad_by_freq=True: torch has no sparse gradient scaled by "
            "frequency; choose one of them"
        )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0; got {max_norm!r}")


def _add_factors(layer, rank: int, alpha: float, rank_stabilised: bool, dtype: torch.dtype) -> None:
    """Give a torch layer the factors of LoRA, fresh, and freeze the rest."""
    embedding = isinstance(layer, nn.Embedding)
    rows, columns = (layer.num_embeddings, rank) if embedding else (rank, layer.in_features)
    outputs = layer.embedding_dim if embedding else layer.out_features
    for parameter in (layer.weight, getattr(layer, "bias", None)):
        if parameter is not None:
            parameter.requires_grad_(False)
    layer.lora_A = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=layer.weight.device))
    layer.lora_B = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device=layer.weight.device))
    layer.rank, layer.alpha, layer.rank_stabilised = rank, alpha, rank_stabilised
    layer.register_buffer("unmerged_weight", None, persistent=False)
    layer._original = ()
    layer.reset_lora()


def _scaling(layer) -> float:
    return layer.alpha / (math.sqrt(layer.rank) if layer.rank_stabilised else layer.rank)


def _put_weight(layer, data: Tensor) -> None:
    """Swap what the Parameter holds. A backward pass through the old weight raises: it would use the new."""
    layer.weight.data = data
    torch.autograd.graph.increment_version(layer.weight)


def _save_unmerged(layer, destination: dict, prefix: str) -> None:
    if layer.merged:
        destination[prefix + "weight"] = layer.unmerged_weight


def _refuse_training(layer) -> None:
    if (
        layer.training
        and torch.is_grad_enabled()
        and (layer.lora_A.requires_grad or layer.lora_B.requires_grad)
    ):
        raise RuntimeError(
            f"this {type(layer).__name__} is merged, so its lora_A and lora_B would get no gradient; "
            "unmerge() to train it, or call eval() (or torch.no_grad()) to use it"
        )


def _refuse_tokens(tokens: Tensor, vocabulary: int) -> None:
    if tokens.numel() and not tokens.is_meta:
        lowest, highest = torch.stack(tokens.aminmax()).tolist()  # one wait, not two
        if lowest < 0 or highest >= vocabulary:
            bad = lowest if lowest < 0 else highest
            raise IndexError(
                f"token ids must be between 0 and {vocabulary - 1} (vocabulary size {vocabulary}); got {bad}"
            )


def _describe(layer) -> str:
    stabilised = ", rank_stabilised=True" if layer.rank_stabilised else ""
    merged = ", merged" if layer.merged else ""
    return f"rank={layer.rank}, alpha={layer.alpha:g}{stabilised}{merged}"
