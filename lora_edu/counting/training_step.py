"""What one training step needs on paper: bytes of weights, gradients, optimiser states and activations; FLOPs."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lora_edu.counting.adapters import count
from lora_edu.counting.architectures import Architecture, Matrix
from lora_edu.counting.formulas import BYTES, dtype_name, optimiser_bytes, size
from lora_edu.counting.models import architecture
from lora_edu.text import whole_number


class Memory(NamedTuple):
    """Bytes that a training step needs at once, apart from temporaries."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


class Flops(NamedTuple):
    """FLOPs of one training step's matrix products (an addition and a multiplication are two)."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def training_memory(
    model: str | Architecture,
    method: str = "full",
    rank: int | None = None,
    targets: str | Iterable[str] = ("query", "value"),
    *,
    dtype: str = "float32",
    trainable_dtype: str | None = None,
    optimiser: str = "adamw",
    batch: int = 1,
    sequence: int | None = None,
) -> Memory:
    """Bytes for weights, gradients, optimiser states and activations of one training step.

    method: "full" (every parameter is trained) or "lora" (only A and B of `targets`, at `rank`).
    dtype: of the model's weights and activations; trainable_dtype: of A and B, their gradients and their
    optimiser states, `dtype` unless you say so (float32 on packed weights, whose activations are bfloat16).
    sequence: tokens in each of the `batch` texts (default: the model's context).
    Activations are what autograd keeps for the backward pass (`saved_numbers`); temporaries of a single
    operation, such as the logits beside their softmax, come on top while they live. Raises ValueError where
    they are not worked out (DeBERTa).
    """
    model = architecture(model)
    dtype = dtype_name(dtype)
    trainable_dtype = trainable_dtype and dtype_name(trainable_dtype)
    packed = BYTES[dtype] < 2
    _check_method(method, rank)
    if method == "full" and (packed or trainable_dtype not in (None, dtype)):
        raise ValueError(
            f"full tuning trains the weights themselves, in 16 bits or more and in one dtype; got {dtype!r}, "
            f"trainable_dtype {trainable_dtype!r}: use method 'lora' to keep a packed base frozen"
        )
    trainable_dtype = trainable_dtype or ("float32" if packed else dtype)
    activation_dtype = "bfloat16" if packed else dtype
    base = model.parameters
    if method == "full":
        adapter, trained, tensors = 0, base, model.tensor_count
    else:
        counted = count(model, targets, rank)
        adapter, trained, tensors = counted.parameters, counted.parameters, counted.tensors
    tokens = _tokens(model, batch, sequence)
    saved = saved_numbers(model, method, rank, targets)
    softmax = saved.pop("softmax", 0)  # kept in float32, whatever the rest is in
    return Memory(
        weights=size(base, dtype) + size(adapter, trainable_dtype),
        gradients=size(trained, trainable_dtype),
        optimiser=optimiser_bytes(trained, tensors, trainable_dtype, optimiser),
        activations=tokens * (size(sum(saved.values()), activation_dtype) + 4 * softmax),
    )


def saved_numbers(
    model: str | Architecture,
    method: str = "full",
    rank: int | None = None,
    targets: str | Iterable[str] = ("query", "value"),
) -> dict[str, int]:
    """Numbers that autograd keeps for each token of a training step, by what they are.

    A matrix's input is kept if the matrix (or the A beside it) is trained, once for all matrices that read
    it; x A always, for B's gradient. Whatever is trained, these are kept wherever a gradient passes: inputs
    of norms and of the nonlinearity, q, k, v and the result of attention, the softmax over the vocabulary.
    Before the first trained weight no gradient passes and nothing is kept. Assumes attention that never
    stores its scores (PyTorch's scaled_dot_product_attention) and no dropout (a mask is a byte a number).
    """
    total: dict[str, int] = {}
    for operation in _operations(architecture(model), method, rank, targets):
        total[operation.kind] = total.get(operation.kind, 0) + operation.kept
    return total


def training_flops(
    model: str | Architecture,
    method: str = "full",
    rank: int | None = None,
    targets: str | Iterable[str] = ("query", "value"),
    *,
    batch: int = 1,
    sequence: int | None = None,
) -> Flops:
    """FLOPs of one forward and backward pass: all matrix products, attention's two over the whole square."""
    model = architecture(model)
    tokens = _tokens(model, batch, sequence)
    forward = backward = 0
    for operation in _operations(model, method, rank, targets):
        times = tokens // batch if operation.kind == "attention" else 1
        forward, backward = forward + times * operation.forward, backward + times * operation.backward
    return Flops(tokens * forward, tokens * backward)


def _check_method(method: str, rank: int | None) -> None:
    if method not in ("full", "lora"):
        raise ValueError(f"method must be 'full' or 'lora'; got {method!r}")
    if method == "lora" and rank is None:
        raise ValueError("method 'lora' needs a rank; got None")


def _tokens(model: Architecture, batch: int, sequence: int | None) -> int:
    """Tokens in a step; raises ValueError for a batch or a sequence that holds none."""
    sequence = model.context if sequence is None else whole_number("sequence", sequence)
    return whole_number("batch", batch) * sequence


# --- one operation after the other --------------------------------------------------------------------------


class _Operation(NamedTuple):
    """What an operation keeps for the backward pass, in numbers, and its FLOPs, all for one token.

    Attention's FLOPs are those of one token against one other.
    """

    kind: str
    kept: int
    forward: int = 0
    backward: int = 0


def _operations(
    model: Architecture, method: str, rank: int | None, targets: str | Iterable[str]
) -> Iterator[_Operation]:
    """The operations of a training step in their order. Raises ValueError where they are not worked out."""
    if not model.understood:
        raise ValueError(f"activations and FLOPs of {model.name} are not worked out here; its parameters are")
    _check_method(method, rank)
    adapters: dict[str, list[Matrix]] = {}
    for row in () if method == "full" else count(model, targets, rank).rows:
        adapters.setdefault(row.name, []).append(Matrix(*row[:5]))
    return _Step(model, method == "full", rank or 0, adapters).operations()


class _Step:
    """A walk through a model's layers. Its state: `flows`, whether a gradient passes at this point.

    Before the first trained weight none does, and nothing is kept.
    """

    def __init__(self, model: Architecture, full: bool, rank: int, adapters: dict[str, list[Matrix]]):
        self.model, self.full, self.rank, self.adapters = model, full, rank, adapters
        self.by_role = {matrix.role: matrix for matrix in model.matrices()}
        self.flows = full

    def operations(self) -> Iterator[_Operation]:
        model, width = self.model, self.model.width
        queries, others = model.heads * model.head_width, model.key_value_heads * model.head_width
        yield from self.embedding()
        if not model.norm_first:
            yield self.norm(width)
        for _ in range(model.layers):
            if model.norm_first:
                yield self.norm(width)
            yield from self.product(width, "query_key_value", "query", "key", "value")
            if model.norm_heads:
                yield self.norm(model.head_width, model.heads + model.key_value_heads)
            # q, k, v, the result, and a sum of exponentials a head
            kept = 2 * queries + 2 * others + model.heads
            yield _Operation("attention", self.where_flows(kept), 4 * queries, self.where_flows(8 * queries))
            yield from self.product(queries, "output", kept_already=self.flows)  # the result of attention
            if model.norm_both:
                yield self.norm(width)
            yield self.norm(width)
            yield from self.product(width, "gate", "up")
            yield _Operation("nonlinearity", self.where_flows(model.nonlinearity * model.mlp))
            yield from self.product(model.mlp, "down")
            if model.norm_both or not model.norm_first:
                yield self.norm(width)
        if "pooler" in self.by_role:
            return  # an encoder's head depends on the task; a pooler reads one token of each text
        yield self.norm(width)
        yield from self.product(width, "head")
        yield _Operation("softmax", self.where_flows(model.vocabulary))

    def where_flows(self, number: int) -> int:
        return number if self.flows else 0

    def embedding(self) -> Iterator[_Operation]:
        """A look-up, which costs nothing; with LoRA the product of a row of A with B."""
        adapted = any(matrix.role == "embedding" for group in self.adapters.values() for matrix in group)
        if self.full or adapted:
            product = 0 if self.full else 2 * self.rank * self.model.width
            yield _Operation("x A", 0 if self.full else self.rank, product, 2 * product)
            self.flows = True

    def norm(self, width: int, copies: int = 1) -> _Operation:
        """Its input and one or two statistics; RMSNorm as transformers writes it also what its gain multiplies."""
        kept = width + 2 if self.model.norm == "layer" else width + 1 + (width if self.full else 0)
        return _Operation("inputs of norms", self.where_flows(copies * kept))

    def product(self, inputs: int, *roles: str, kept_already: bool = False) -> Iterator[_Operation]:
        """Matrices that read the same input, which is kept once, unless it is kept already."""
        present = [self.by_role[role] for role in roles if role in self.by_role]
        trained = self.full
        for matrix in present:
            io = matrix.rows * matrix.columns
            kept, forward, backward = 0, 2 * io, self.where_flows(2 * io) + (2 * io if self.full else 0)
            for adapter in self.adapters.get(matrix.name, ()):
                total = self.rank * (adapter.rows + adapter.columns)
                kept += self.rank
                forward += 2 * total
                # without a gradient for the input, A's product with it falls away
                backward += 4 * total - (0 if self.flows else 2 * self.rank * inputs)
                trained = True
            yield _Operation("x A", kept, forward, backward)
        keeps = trained and present and not kept_already
        yield _Operation("inputs of trained matrices", inputs if keeps else 0)
        self.flows = self.flows or trained
