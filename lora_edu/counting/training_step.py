"""What one training step needs on paper: bytes of weights, gradients, optimiser states and activations; FLOPs."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lora_edu.counting.adapters import count
from lora_edu.counting.architectures import Architecture, Matrix
from lora_edu.counting.formulas import BYTES, dtype_name, optimiser_bytes
from lora_edu.counting.formulas import size as size_of
from lora_edu.counting.methods import PREFIXES, PROMPTS, check_method, trained
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
    size: int | None = None,
    dtype: str = "float32",
    trainable_dtype: str | None = None,
    optimiser: str = "adamw",
    batch: int = 1,
    sequence: int | None = None,
) -> Memory:
    """Bytes for weights, gradients, optimiser states and activations of one training step.

    method: one of `METHODS`: "full" (every parameter is trained), "lora" (only A and B of `targets`, at `rank`), or
    another with its `size`, as `trained` says, which counts what each trains.
    dtype: of the model's weights and activations; trainable_dtype: of what the method trains, its gradients and its
    optimiser states, `dtype` unless you say so (float32 on packed weights, whose activations are bfloat16).
    sequence: tokens of text in each of the `batch` texts (default: the model's context, less the virtual tokens).
    Activations are what autograd keeps for the backward pass (`saved_numbers`); temporaries of a single
    operation, such as the logits beside their softmax, come on top while they live. Raises ValueError where
    they are not worked out (DeBERTa).
    """
    model = architecture(model)
    dtype = dtype_name(dtype)
    trainable_dtype = trainable_dtype and dtype_name(trainable_dtype)
    packed = BYTES[dtype] < 2
    check_method(model, method, rank, size)
    if method == "full" and (packed or trainable_dtype not in (None, dtype)):
        raise ValueError(
            f"full tuning trains the weights themselves, in 16 bits or more and in one dtype; got {dtype!r}, "
            f"trainable_dtype {trainable_dtype!r}: use method 'lora' to keep a packed base frozen"
        )
    trainable_dtype = trainable_dtype or ("float32" if packed else dtype)
    activation_dtype = "bfloat16" if packed else dtype
    numbers = trained(model, method, rank, targets, size=size)
    times = _Positions(model, method, size, batch, sequence)
    kept = softmax = 0
    for operation in _operations(model, method, rank, targets, size):
        number = times.of(operation) * operation.kept
        if operation.kind == "softmax":  # kept in float32, whatever the rest is in
            softmax += number
        else:
            kept += number
    frozen = model.parameters - (numbers.parameters - numbers.added)
    return Memory(
        weights=size_of(frozen, dtype) + size_of(numbers.parameters, trainable_dtype),
        gradients=size_of(numbers.parameters, trainable_dtype),
        optimiser=optimiser_bytes(numbers.parameters, numbers.tensors, trainable_dtype, optimiser),
        activations=size_of(kept, activation_dtype) + 4 * softmax,
    )


def saved_numbers(
    model: str | Architecture,
    method: str = "full",
    rank: int | None = None,
    targets: str | Iterable[str] = ("query", "value"),
    *,
    size: int | None = None,
    of: str = "text",
) -> dict[str, int]:
    """Numbers that autograd keeps for each token of a training step, by what they are.

    A matrix's input is kept if the matrix (or the A beside it) is trained, once for all matrices that read
    it; x A always, for B's gradient. Whatever is trained, these are kept wherever a gradient passes: inputs
    of norms and of the nonlinearity, q, k, v and the result of attention, the softmax over the vocabulary.
    Before the first trained number no gradient passes and nothing is kept. A bias needs no input of its own; a vector
    of (IA)³ what it scales; a bottleneck what it is given and twice its inside.
    of: "text", for each token of the text; "virtual", for each virtual token of each text, all that the layers keep of
    it (a prompt) or its keys and values (a prefix); "step", once a step: what the MLP keeps that makes virtual tokens;
    "pair", for each pair of a token of the text and another one, virtual ones included: the masks that attention needs
    with a prefix, where `is_causal` doesn't say who sees whom (in TinyLM one for all texts, in transformers one each).
    Assumes attention that never stores its scores (PyTorch's scaled_dot_product_attention) and no dropout (a mask is a
    byte a number).
    """
    if of not in ("text", "virtual", "step", "pair"):
        raise ValueError(f'of must be "text", "virtual", "step" or "pair"; got {of!r}')
    model, total = architecture(model), {}
    inside = {
        "text": ("token", "text"),
        "virtual": ("token", "virtual") if method in PROMPTS else ("virtual",),
    }
    for operation in _operations(model, method, rank, targets, size):
        if operation.of in inside.get(of, (of,)):
            total[operation.kind] = total.get(operation.kind, 0) + operation.kept
    return total


def training_flops(
    model: str | Architecture,
    method: str = "full",
    rank: int | None = None,
    targets: str | Iterable[str] = ("query", "value"),
    *,
    size: int | None = None,
    batch: int = 1,
    sequence: int | None = None,
) -> Flops:
    """FLOPs of one forward and backward pass: all matrix products, attention's two over the whole square.

    The arguments are `training_memory`'s; with virtual tokens the square is larger.
    """
    model = architecture(model)
    check_method(model, method, rank, size)
    times = _Positions(model, method, size, batch, sequence)
    forward = backward = 0
    for operation in _operations(model, method, rank, targets, size):
        number = times.pairs if operation.kind == "attention" else times.of(operation)
        forward, backward = forward + number * operation.forward, backward + number * operation.backward
    return Flops(forward, backward)


class _Positions:
    """How often a step does an operation. Raises ValueError for a batch or a sequence that holds no token."""

    def __init__(self, model: Architecture, method: str, size: int | None, batch: int, sequence: int | None):
        virtual = size if method in (*PROMPTS, *PREFIXES) else 0
        text = model.context - virtual if sequence is None else whole_number("sequence", sequence)
        batch = whole_number("batch", batch)
        through = text + (virtual if method in PROMPTS else 0)  # of each text, through all layers
        self.pairs = batch * through * (text + virtual)  # of a query and a key
        masks = 1 if model.built_by.startswith("lora_edu") else batch  # TinyLM has one for all texts
        self.number = {"token": batch * through, "text": batch * text, "virtual": batch * virtual, "step": 1}
        self.number["pair"] = masks * text * (text + virtual)

    def of(self, operation: "_Operation") -> int:
        return self.number[operation.of]


# --- one operation after the other --------------------------------------------------------------------------


class _Operation(NamedTuple):
    """What an operation keeps for the backward pass, in numbers, and its FLOPs, all for one token.

    Attention's FLOPs are those of one token against one other. of: which tokens: "token", all that go through the
    layers; "text", those of the text alone; "virtual", the virtual ones alone; "step": it is done once; "pair": a
    token of the text with each token that its mask is about.
    """

    kind: str
    kept: int
    forward: int = 0
    backward: int = 0
    of: str = "token"


def _operations(
    model: Architecture, method: str, rank: int | None, targets: str | Iterable[str], size: int | None
) -> Iterator[_Operation]:
    """The operations of a training step in their order. Raises ValueError where they are not worked out."""
    check_method(model, method, rank, size)
    if not model.understood:
        raise ValueError(f"activations and FLOPs of {model.name} are not worked out here; its parameters are")
    adapters: dict[str, list[Matrix]] = {}
    for row in count(model, targets, rank).rows if method == "lora" else ():
        adapters.setdefault(row.name, []).append(Matrix(*row[:5]))
    return _Step(model, method, rank or 0, size or 0, adapters).operations()


class _Step:
    """A walk through a model's layers. Its state: `flows`, whether a gradient passes at this point.

    Before the first trained weight none does, and nothing is kept.
    """

    def __init__(
        self, model: Architecture, method: str, rank: int, size: int, adapters: dict[str, list[Matrix]]
    ):
        self.model, self.method, self.rank, self.size, self.adapters = model, method, rank, size, adapters
        self.full = method == "full"
        self.by_role = {matrix.role: matrix for matrix in model.matrices()}
        self.biased = {entry.module for entry in model.entries if entry.name.endswith("bias")}
        self.flows = self.full

    def operations(self) -> Iterator[_Operation]:
        model, width = self.model, self.model.width
        queries, others = model.heads * model.head_width, model.key_value_heads * model.head_width
        yield from self.virtual_tokens(others)
        yield from self.embedding()
        if not model.norm_first:
            yield self.norm(width)
        for _ in range(model.layers):
            if model.norm_first:
                yield self.norm(width)
            yield from self.product(width, "query_key_value", "query", "key", "value")
            # of a fused matrix's output the part that is scaled is a view, which holds the whole
            yield from self.scaled(2 * others + (queries if "query_key_value" in self.by_role else 0))
            if model.norm_heads:
                yield self.norm(model.head_width, model.heads + model.key_value_heads)
            yield from self.attention(queries, others)
            yield from self.product(queries, "output", kept_already=self.flows)  # the result of attention
            yield from self.bottleneck()
            if model.norm_both:
                yield self.norm(width)
            yield self.norm(width)
            yield from self.product(width, "gate", "up")
            yield _Operation("nonlinearity", self.where_flows(model.nonlinearity * model.mlp))
            yield from self.scaled(model.mlp)
            yield from self.product(model.mlp, "down")
            yield from self.bottleneck()
            if model.norm_both or not model.norm_first:
                yield self.norm(width)
        if "pooler" in self.by_role:
            return  # an encoder's head depends on the task; a pooler reads one token of each text
        yield self.norm(width)
        for operation in self.product(width, "head"):
            yield operation._replace(of="text")
        yield _Operation("softmax", self.where_flows(model.vocabulary), of="text")

    def virtual_tokens(self, keys: int) -> Iterator[_Operation]:
        """What makes them, once for all texts. A prompt's gradient passes everywhere, a prefix's from attention on."""
        tokens, width = self.size, self.model.width
        if self.method == "p-tuning":
            product = 3 * 2 * tokens * width**2
            yield _Operation("virtual tokens' MLP", 2 * tokens * width, product, 2 * product, of="step")
        elif self.method == "prefix through an MLP":
            product = 2 * tokens * keys**2 * (1 + 2 * self.model.layers)
            yield _Operation("virtual tokens' MLP", tokens * keys, product, 2 * product, of="step")
        self.flows = self.flows or self.method in PROMPTS

    def attention(self, queries: int, others: int) -> Iterator[_Operation]:
        """q, k, v, the result, and a sum of exponentials a head; with a prefix a mask, too."""
        prefix = self.method in PREFIXES
        self.flows = self.flows or prefix
        kept, keys = queries + self.model.heads, others
        if prefix:
            keys = queries  # beside a mask transformers repeats grouped keys and values for every head
            # q is a view of a fused matrix's output and holds the whole, of which k and v are copied behind the prefix
            kept += 2 * others if "query_key_value" in self.by_role else 0
            yield _Operation("attention", 2 * keys, of="virtual")
            yield _Operation("attention's mask", 1, of="pair")
        kept = self.where_flows(kept + queries + 2 * keys)
        yield _Operation("attention", kept, 4 * queries, self.where_flows(8 * queries))

    def scaled(self, numbers: int) -> Iterator[_Operation]:
        """(IA)³: what a vector scales."""
        if self.method == "ia3":
            yield _Operation("what vectors scale", numbers)
            self.flows = True

    def bottleneck(self) -> Iterator[_Operation]:
        """h, and its inside before and after GELU: h + W_up GELU(W_down h)."""
        if self.method == "bottleneck":
            width, product = self.model.width, 2 * self.model.width * self.size
            backward = 4 * product - (0 if self.flows else product)
            yield _Operation("bottlenecks", width + 2 * self.size, 2 * product, backward)
            self.flows = True

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
        self.flows = self.flows or (self.method == "bitfit" and self.model.norm == "layer")
        return _Operation("inputs of norms", self.where_flows(copies * kept))

    def product(self, inputs: int, *roles: str, kept_already: bool = False) -> Iterator[_Operation]:
        """Matrices that read the same input, which is kept once, unless it is kept already."""
        present = [self.by_role[role] for role in roles if role in self.by_role]
        reads = self.full
        for matrix in present:
            io = matrix.rows * matrix.columns
            kept, forward, backward = 0, 2 * io, self.where_flows(2 * io) + (2 * io if self.full else 0)
            for adapter in self.adapters.get(matrix.name, ()):
                total = self.rank * (adapter.rows + adapter.columns)
                kept += self.rank
                forward += 2 * total
                # without a gradient for the input, A's product with it falls away
                backward += 4 * total - (0 if self.flows else 2 * self.rank * inputs)
                reads = True
            yield _Operation("x A", kept, forward, backward)
        keeps = reads and present and not kept_already
        yield _Operation("inputs of trained matrices", inputs if keeps else 0)
        self.flows = self.flows or reads or self.has_trained_bias(present)

    def has_trained_bias(self, matrices: list[Matrix]) -> bool:
        return self.method == "bitfit" and any(matrix.name in self.biased for matrix in matrices)
