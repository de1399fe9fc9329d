"""What LoRA costs on paper: parameters, bytes and FLOPs, for any shape and for those of well-known models.

Plain Python, no torch: it starts at once and runs anywhere. It measures nothing; chapter 04 does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

# Bytes a number takes. int4 is the packed weight alone: the scales that come with it depend on the format.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "int4": 0.5}

# Optimiser → numbers it keeps for each trained number; bytes of each (None: as wide as the trained number);
# bytes of its step counter, which torch's Adam keeps for each trained tensor as a float32 scalar.
OPTIMISERS = {
    "sgd": (0, None, 0),
    "momentum": (1, None, 0),
    "adam": (2, None, 4),
    "adamw": (2, None, 4),
    "adamw-8bit": (2, 1, 0),
}


# ------------------------------------------------------------------------------------------------ one matrix


def lora_parameters(rows: int, columns: int, rank: int) -> int:
    """|Θ| = r (rows + columns): the numbers in A and B of one adapted matrix.

    For the paper's square matrices this is its 2 · d_model · r (Hu et al. 2021, §5.1).
    Raises ValueError for a rank that no rows × columns matrix can need.
    """
    _check_rank(rows, columns, rank)
    return rank * (rows + columns)


def share(rows: int, columns: int, rank: int) -> float:
    """r (rows + columns) / (rows · columns): the adapter's numbers as a share of the matrix's own."""
    return lora_parameters(rows, columns, rank) / (rows * columns)


def break_even_rank(rows: int, columns: int) -> float:
    """rows · columns / (rows + columns): the r at which A and B hold as many numbers as the matrix itself.

    Half the width for a square matrix; close to the smaller side for a long one, and always below it.
    """
    _check_shape(rows, columns)
    return rows * columns / (rows + columns)


def forward_flops(rows: int, columns: int, rank: int = 0) -> int:
    """FLOPs of one input vector through W, and through A and B beside it when rank > 0: 2 io + 2 r (i + o).

    A multiplication and an addition count as two. The sum of the two paths, the bias and the scaling are left
    out: they grow with i + o, not with io. A look-up in an embedding costs none; there LoRA adds 2 r d.
    """
    _check_shape(rows, columns)
    return 2 * rows * columns + (2 * lora_parameters(rows, columns, rank) if rank else 0)


def backward_flops(rows: int, columns: int, rank: int = 0) -> int:
    """FLOPs of the backward pass for one input vector; rank 0 means that W itself is trained.

    Full tuning: 2 io for the gradient of the input and 2 io for that of W. LoRA: 2 io for the gradient of the
    input through W, and 4 r (i + o) for A and B; the second 2 io is what it saves.
    """
    _check_shape(rows, columns)
    if not rank:
        return 4 * rows * columns
    return 2 * rows * columns + 4 * lora_parameters(rows, columns, rank)


def spaced(number: float, digits: int = 0) -> str:
    """A number as the course prints it: 80 800."""
    return f"{number:,.{digits}f}".replace(",", " ")


def size(parameters: int, dtype: str = "float32") -> float:
    """Bytes of so many numbers."""
    return parameters * _bytes(dtype)


def optimiser_bytes(parameters: int, tensors: int, dtype: str = "float32", optimiser: str = "adamw") -> float:
    """Bytes of an optimiser's state for so many trained numbers in so many tensors."""
    states, width, counter = _lookup(OPTIMISERS, optimiser, "optimiser")
    return parameters * states * (_bytes(dtype) if width is None else width) + tensors * counter


def _check_shape(rows: int, columns: int) -> None:
    for name, value in (("rows", rows), ("columns", columns)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}")


def _check_rank(rows: int, columns: int, rank: int, what: str = "weight") -> None:
    _check_shape(rows, columns)
    smaller = min(rows, columns)
    if not isinstance(rank, int) or not 1 <= rank <= smaller:
        raise ValueError(
            f"rank must be between 1 and {smaller} (the smaller side of the {rows} × {columns} {what}); "
            f"got {rank!r}"
        )


def _lookup(table: dict, name: str, what: str):
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}{_near(name, table)} There are: {', '.join(table)}")


def _near(name: str, known: Iterable[str]) -> str:
    """What the reader may have meant, as the middle of an error message."""
    import difflib  # here, because it costs as much as all the rest of this module

    spelt = {str(one).lower(): one for one in known}
    near = [spelt[one] for one in difflib.get_close_matches(str(name).lower(), spelt, n=3, cutoff=0.5)]
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _bytes(dtype: str) -> float:
    return _lookup(BYTES, str(dtype).removeprefix("torch."), "dtype")


# ---------------------------------------------------------------------------------------------- architectures


class Tensor(NamedTuple):
    """One parameter of a model; "{}" in the name stands for the number of the layer."""

    name: str
    shape: tuple[int, ...]
    role: str = ""  # of a matrix that LoRA can adapt; "" for biases, norms and tables of positions
    parts: tuple[tuple[str, int, int], ...] = ()  # of a fused matrix: (role, rows, columns) of each


class Matrix(NamedTuple):
    """A matrix that an adapter sits on, and how many of it the model has."""

    role: str
    name: str
    rows: int
    columns: int
    copies: int


class Architecture(NamedTuple):
    """A model's shapes, each as its own state dict has it, and what is needed to count memory and FLOPs."""

    name: str
    built_by: str  # the class that makes exactly these tensors
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    mlp: int
    vocabulary: int
    context: int
    tensors: tuple[Tensor, ...]
    tied: bool  # the head is the embedding: one tensor, counted once
    norm: str = "layer"  # or "rms"
    norm_first: bool = True  # False: after the residual sum, as in BERT
    nonlinearity: int = 1  # tensors of the MLP's width that its backward pass keeps (chapter 04)
    understood: bool = True  # False: activations and FLOPs of this attention are not worked out here

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter: name → shape."""
        return {
            tensor.name.format(layer): tensor.shape
            for tensor in self.tensors
            for layer in range(self.copies(tensor))
        }

    def copies(self, tensor: Tensor) -> int:
        return self.layers if "{}" in tensor.name else 1

    @property
    def parameters(self) -> int:
        return sum(self.copies(tensor) * _product(tensor.shape) for tensor in self.tensors)

    @property
    def tensor_count(self) -> int:
        return sum(self.copies(tensor) for tensor in self.tensors)

    def matrices(self) -> Iterator[Matrix]:
        """All that LoRA can adapt, a tied head included (an adapter on it is one of its own)."""
        for tensor in self.tensors:
            if tensor.role:
                yield Matrix(tensor.role, _module(tensor.name), *tensor.shape, self.copies(tensor))
        if self.tied:
            yield Matrix("head", "lm_head", self.vocabulary, self.width, 1)

    def __repr__(self) -> str:
        return (
            f"{self.name}: {spaced(self.parameters)} parameters, {self.layers} layers of width {self.width}"
        )


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _linear(name: str, rows: int, columns: int, role: str, bias: bool = True) -> list[Tensor]:
    weight = Tensor(f"{name}.weight", (rows, columns), role)
    return [weight, Tensor(f"{name}.bias", (rows,))] if bias else [weight]


def _norm(name: str, width: int, bias: bool = True) -> list[Tensor]:
    return [Tensor(f"{name}.{end}", (width,)) for end in (("weight", "bias") if bias else ("weight",))]


def _conv1d(name: str, inputs: int, outputs: int, role: str, parts=()) -> list[Tensor]:
    """GPT-2's Conv1D stores its weight as (in, out), the transpose of a linear layer's."""
    return [Tensor(f"{name}.weight", (inputs, outputs), role, parts), Tensor(f"{name}.bias", (outputs,))]


def gpt2(name: str, layers: int, width: int, heads: int, vocabulary: int = 50_257, context: int = 1024):
    """GPT-2 (Radford et al. 2019): q, k, v fused into c_attn of shape (d, 3d); head tied to the embedding."""
    block = "transformer.h.{}"
    tensors = [
        Tensor("transformer.wte.weight", (vocabulary, width), "embedding"),
        Tensor("transformer.wpe.weight", (context, width)),
        *_norm(f"{block}.ln_1", width),
        *_conv1d(
            f"{block}.attn.c_attn",
            width,
            3 * width,
            "query_key_value",
            tuple((role, width, width) for role in ("query", "key", "value")),
        ),
        *_conv1d(f"{block}.attn.c_proj", width, width, "output"),
        *_norm(f"{block}.ln_2", width),
        *_conv1d(f"{block}.mlp.c_fc", width, 4 * width, "up"),
        *_conv1d(f"{block}.mlp.c_proj", 4 * width, width, "down"),
        *_norm("transformer.ln_f", width),
    ]
    # transformers writes this GELU out with pow and tanh: autograd keeps x, x / 2, tanh(…) and 1 + tanh(…).
    return Architecture(
        name,
        "transformers.GPT2LMHeadModel",
        layers,
        width,
        heads,
        heads,
        width // heads,
        4 * width,
        vocabulary,
        context,
        tuple(tensors),
        tied=True,
        nonlinearity=4,
    )


def gpt3(name: str, layers: int, width: int, heads: int, vocabulary: int = 50_257, context: int = 2048):
    """GPT-3 (Brown et al. 2020, table 2.1): as GPT-2, but W_q, W_k, W_v apart, as the LoRA paper counts."""
    block = "blocks.{}"
    tensors = [
        Tensor("embedding.weight", (vocabulary, width), "embedding"),
        Tensor("positions.weight", (context, width)),
        *_norm(f"{block}.attention_norm", width),
        *(
            tensor
            for role in ("query", "key", "value", "output")
            for tensor in _linear(f"{block}.attention.{role}", width, width, role)
        ),
        *_norm(f"{block}.mlp_norm", width),
        *_linear(f"{block}.mlp.up", 4 * width, width, "up"),
        *_linear(f"{block}.mlp.down", width, 4 * width, "down"),
        *_norm("norm", width),
    ]
    return Architecture(
        name,
        "from the papers",
        layers,
        width,
        heads,
        heads,
        width // heads,
        4 * width,
        vocabulary,
        context,
        tuple(tensors),
        tied=True,
    )


def tinylm(
    vocabulary: int = 10_000,
    width: int = 100,
    layers: int = 6,
    heads: int = 5,
    context: int = 256,
    name: str = "TinyLM",
):
    """The course's base model (lora_edu.tinylm): rotary positions, so no table of them; a head of its own."""
    block = "blocks.{}"
    tensors = [
        Tensor("embedding.weight", (vocabulary, width), "embedding"),
        *_norm(f"{block}.attention_norm", width),
        *(
            tensor
            for role in ("query", "key", "value", "output")
            for tensor in _linear(f"{block}.attention.{role}", width, width, role)
        ),
        *_norm(f"{block}.mlp_norm", width),
        *_linear(f"{block}.mlp.up", 4 * width, width, "up"),
        *_linear(f"{block}.mlp.down", width, 4 * width, "down"),
        *_norm("norm", width),
        *_linear("head", vocabulary, width, "head", bias=False),
    ]
    return Architecture(
        name,
        "lora_edu.tinylm.TinyLM",
        layers,
        width,
        heads,
        heads,
        width // heads,
        4 * width,
        vocabulary,
        context,
        tuple(tensors),
        tied=False,
    )


def bert(
    name: str,
    layers: int,
    width: int,
    heads: int,
    mlp: int,
    vocabulary: int,
    positions: int,
    types: int,
    built_by: str = "transformers.BertModel",
):
    """BERT, RoBERTa and the encoders made from them: norms after the residual sums, a pooler on top."""
    layer = "encoder.layer.{}"
    tensors = [
        Tensor("embeddings.word_embeddings.weight", (vocabulary, width), "embedding"),
        Tensor("embeddings.position_embeddings.weight", (positions, width)),
        Tensor("embeddings.token_type_embeddings.weight", (types, width)),
        *_norm("embeddings.LayerNorm", width),
        *(
            tensor
            for role in ("query", "key", "value")
            for tensor in _linear(f"{layer}.attention.self.{role}", width, width, role)
        ),
        *_linear(f"{layer}.attention.output.dense", width, width, "output"),
        *_norm(f"{layer}.attention.output.LayerNorm", width),
        *_linear(f"{layer}.intermediate.dense", mlp, width, "up"),
        *_linear(f"{layer}.output.dense", width, mlp, "down"),
        *_norm(f"{layer}.output.LayerNorm", width),
        *_linear("pooler.dense", width, width, "pooler"),
    ]
    return Architecture(
        name,
        built_by,
        layers,
        width,
        heads,
        heads,
        width // heads,
        mlp,
        vocabulary,
        positions,
        tuple(tensors),
        tied=False,
        norm_first=False,
    )


def deberta(name: str, layers: int, width: int, heads: int, mlp: int, vocabulary: int, buckets: int):
    """DeBERTa v2 (He et al. 2021): content and position attend apart; one table of relative positions."""
    layer = "encoder.layer.{}"
    tensors = [
        Tensor("embeddings.word_embeddings.weight", (vocabulary, width), "embedding"),
        *_norm("embeddings.LayerNorm", width),
        *(
            tensor
            for role in ("query", "key", "value")
            for tensor in _linear(f"{layer}.attention.self.{role}_proj", width, width, role)
        ),
        *_linear(f"{layer}.attention.output.dense", width, width, "output"),
        *_norm(f"{layer}.attention.output.LayerNorm", width),
        *_linear(f"{layer}.intermediate.dense", mlp, width, "up"),
        *_linear(f"{layer}.output.dense", width, mlp, "down"),
        *_norm(f"{layer}.output.LayerNorm", width),
        Tensor("encoder.rel_embeddings.weight", (2 * buckets, width)),
        *_norm("encoder.LayerNorm", width),
        Tensor("encoder.conv.conv.weight", (width, width, 3)),
        Tensor("encoder.conv.conv.bias", (width,)),
        *_norm("encoder.conv.LayerNorm", width),
    ]
    return Architecture(
        name,
        "transformers.DebertaV2Model",
        layers,
        width,
        heads,
        heads,
        width // heads,
        mlp,
        vocabulary,
        512,
        tuple(tensors),
        tied=False,
        norm_first=False,
        understood=False,
    )


def llama(
    name: str,
    layers: int,
    width: int,
    heads: int,
    key_value_heads: int,
    mlp: int,
    vocabulary: int,
    context: int,
    *,
    head_width: int | None = None,
    tied: bool = False,
    attention_bias: bool = False,
    built_by: str = "transformers.LlamaForCausalLM",
):
    """Llama and what is built like it (Qwen 2.5, Gemma 1, SmolLM): grouped queries, a gated MLP, RMSNorm.

    With grouped queries W_k and W_v are (key_value_heads · head_width, d): shorter than W_q.
    """
    head_width = head_width or width // heads
    block = "model.layers.{}"
    tensors = [
        Tensor("model.embed_tokens.weight", (vocabulary, width), "embedding"),
        *_linear(f"{block}.self_attn.q_proj", heads * head_width, width, "query", attention_bias),
        *_linear(f"{block}.self_attn.k_proj", key_value_heads * head_width, width, "key", attention_bias),
        *_linear(f"{block}.self_attn.v_proj", key_value_heads * head_width, width, "value", attention_bias),
        *_linear(f"{block}.self_attn.o_proj", width, heads * head_width, "output", bias=False),
        *_linear(f"{block}.mlp.gate_proj", mlp, width, "gate", bias=False),
        *_linear(f"{block}.mlp.up_proj", mlp, width, "up", bias=False),
        *_linear(f"{block}.mlp.down_proj", width, mlp, "down", bias=False),
        *_norm(f"{block}.input_layernorm", width, bias=False),
        *_norm(f"{block}.post_attention_layernorm", width, bias=False),
        *_norm("model.norm", width, bias=False),
        *([] if tied else _linear("lm_head", vocabulary, width, "head", bias=False)),
    ]
    # silu(gate) · up: autograd keeps the gate before and after silu, and up.
    return Architecture(
        name,
        built_by,
        layers,
        width,
        heads,
        key_value_heads,
        head_width,
        mlp,
        vocabulary,
        context,
        tuple(tensors),
        tied=tied,
        norm="rms",
        nonlinearity=3,
    )


_QWEN, _GEMMA = "transformers.Qwen2ForCausalLM", "transformers.GemmaForCausalLM"
_ROBERTA = "transformers.RobertaModel"

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        tinylm(),
        gpt2("GPT-2", 12, 768, 12),
        gpt2("GPT-2 M", 24, 1024, 16),
        gpt2("GPT-2 L", 36, 1280, 20),
        gpt2("GPT-2 XL", 48, 1600, 25),
        gpt3("GPT-3 175B", 96, 12_288, 96),
        bert("RoBERTa base", 12, 768, 12, 3072, 50_265, 514, 1, _ROBERTA),
        bert("RoBERTa large", 24, 1024, 16, 4096, 50_265, 514, 1, _ROBERTA),
        deberta("DeBERTa-XXL", 48, 1536, 24, 6144, 128_100, 256),
        bert("all-MiniLM-L6-v2", 6, 384, 12, 1536, 30_522, 512, 2),
        llama("Llama-2-7B", 32, 4096, 32, 32, 11_008, 32_000, 4096),
        llama("Llama-3-8B", 32, 4096, 32, 8, 14_336, 128_256, 8192),
        llama("Llama-3-70B", 80, 8192, 64, 8, 28_672, 128_256, 8192),
        llama("SmolLM2-135M", 30, 576, 9, 3, 1536, 49_152, 8192, tied=True),
        llama(
            "Qwen2.5-0.5B",
            24,
            896,
            14,
            2,
            4864,
            151_936,
            32_768,
            tied=True,
            attention_bias=True,
            built_by=_QWEN,
        ),
        llama("Qwen2.5-7B", 28, 3584, 28, 4, 18_944, 152_064, 32_768, attention_bias=True, built_by=_QWEN),
        llama("Gemma-2B", 18, 2048, 8, 1, 16_384, 256_000, 8192, head_width=256, tied=True, built_by=_GEMMA),
        llama(
            "Gemma-7B", 28, 3072, 16, 16, 24_576, 256_000, 8192, head_width=256, tied=True, built_by=_GEMMA
        ),
    )
}


def architecture(name: str | Architecture) -> Architecture:
    """By name, in any case, with spaces or hyphens as you like ("gpt-2-xl"); an Architecture is passed on."""
    if isinstance(name, Architecture):
        return name
    plain = {_plain(known): known for known in ARCHITECTURES}
    if _plain(name) in plain:
        return ARCHITECTURES[plain[_plain(name)]]
    return _lookup(ARCHITECTURES, name, "architecture")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")


# ------------------------------------------------------------------------------------------- which matrices

GROUPS = {
    "attention": ("query_key_value", "query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
    "linear": ("query_key_value", "query", "key", "value", "output", "gate", "up", "down"),
    "all": ("embedding", "query_key_value", "query", "key", "value", "output", "gate", "up", "down", "head"),
}


def adapted(model: str | Architecture, targets: str | Iterable[str]) -> list[Matrix]:
    """The matrices that `targets` names, in the model's order.

    A target is a role ("query", "embedding" …), a group ("attention", "mlp", "linear": both, "all": with the
    embedding and the head) or the end of a module's own name ("c_attn", "mlp.c_proj"). "query", "key" and
    "value" of a fused matrix count apart, as in loralib's MergedLinear; the module itself, or a group, counts
    as one, as in PEFT.
    """
    model = architecture(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ValueError('targets must name at least one matrix, e.g. ("query", "value"); got none')
    chosen: dict[tuple[str, str], Matrix] = {}
    for target in targets:
        found = list(_matching(model, target))
        if not found:
            known = sorted({end for matrix in _choices(model) for end in (matrix.role, _end(matrix.name))})
            raise ValueError(
                f"{model.name} has no matrix {target!r}{_near(target, known)} There are: {', '.join(known)}; "
                f"groups: {', '.join(GROUPS)}"
            )
        chosen |= {(matrix.role, matrix.name): matrix for matrix in found}
    fused = {name for role, name in chosen if role == "query_key_value"}
    twice = [role for role, name in chosen if name in fused and role != "query_key_value"]
    if twice:
        raise ValueError(
            f"{twice[0]!r} is a part of {fused.pop()}, which is also a target: name the whole or its parts"
        )
    order = {(matrix.role, matrix.name): place for place, matrix in enumerate(_choices(model))}
    return sorted(chosen.values(), key=lambda matrix: order[matrix.role, matrix.name])


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _choices(model: Architecture) -> Iterator[Matrix]:
    """Matrices, and the parts of the fused ones."""
    fused = {_module(tensor.name): tensor for tensor in model.tensors if tensor.parts}
    for matrix in model.matrices():
        yield matrix
        if matrix.name in fused:
            for role, rows, columns in fused[matrix.name].parts:
                yield Matrix(role, matrix.name, rows, columns, matrix.copies)


def _matching(model: Architecture, target: str) -> Iterator[Matrix]:
    roles = GROUPS.get(target, (target,))
    for matrix in _choices(model):
        whole = matrix in model.matrices()
        by_role = matrix.role in roles and (whole or target == matrix.role)
        by_name = whole and f".{matrix.name}".endswith(f".{target}")
        if by_role or by_name:
            yield matrix


class Row(NamedTuple):
    """One kind of adapted matrix."""

    role: str
    name: str
    rows: int
    columns: int
    copies: int
    rank: int

    @property
    def parameters(self) -> int:
        return self.copies * lora_parameters(self.rows, self.columns, self.rank)

    @property
    def share(self) -> float:
        return share(self.rows, self.columns, self.rank)


class Count(NamedTuple):
    """What an adapter holds: a row for each kind of matrix, and the size of the model it sits on."""

    architecture: Architecture
    rank: int
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def tensors(self) -> int:
        return sum(2 * row.copies for row in self.rows)

    @property
    def share(self) -> float:
        """Of the model's own parameters."""
        return self.parameters / self.architecture.parameters

    def bytes(self, dtype: str = "float32") -> float:
        return size(self.parameters, dtype)

    def __str__(self) -> str:
        lines = [f"{'matrix':<16}{'shape':>17}{'copies':>8}{'parameters':>16}{'share of it':>13}"]
        lines += [
            f"{row.role:<16}{f'{row.rows} × {row.columns}':>17}{row.copies:>8}"
            f"{spaced(row.parameters):>16}{row.share:>13.2%}"
            for row in self.rows
        ]
        whole = self.architecture.parameters
        lines.append(f"{'adapter':<16}{f'rank {self.rank}':>17}{'':>8}{spaced(self.parameters):>16}")
        lines.append(f"{self.architecture.name:<41}{spaced(whole):>16}{self.share:>13.3%}")
        return "\n".join(lines)


def count(
    model: str | Architecture, targets: str | Iterable[str] = ("query", "value"), rank: int = 8
) -> Count:
    """Parameters of LoRA of one rank on the named matrices of a model (`adapted` says how to name them)."""
    model = architecture(model)
    rows = []
    for matrix in adapted(model, targets):
        _check_rank(matrix.rows, matrix.columns, rank, matrix.role)
        rows.append(Row(*matrix, rank))
    return Count(model, rank, tuple(rows))


# ------------------------------------------------------------------------------------------ memory and FLOPs


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
    if method not in ("full", "lora"):
        raise ValueError(f"method must be 'full' or 'lora'; got {method!r}")
    if method == "lora" and rank is None:
        raise ValueError("method 'lora' needs a rank; got None")
    if method == "full" and (_bytes(dtype) < 2 or trainable_dtype not in (None, dtype)):
        raise ValueError(
            f"full tuning trains the weights themselves, in 16 bits or more and in one dtype; got {dtype!r}, "
            f"trainable_dtype {trainable_dtype!r}: use method 'lora' to keep a packed base frozen"
        )
    trainable_dtype = trainable_dtype or (dtype if _bytes(dtype) >= 2 else "float32")
    activation_dtype = dtype if _bytes(dtype) >= 2 else "bfloat16"
    base = model.parameters
    if method == "full":
        adapter, trained, tensors = 0, base, model.tensor_count
    else:
        counted = count(model, targets, rank)
        adapter, trained, tensors = counted.parameters, counted.parameters, counted.tensors
    tokens = batch * (sequence or model.context)
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
    for kind, _, kept, _, _ in _walk(architecture(model), method, rank, targets):
        total[kind] = total.get(kind, 0) + kept
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
    sequence = sequence or model.context
    forward = backward = 0
    for kind, _, _, ahead, back in _walk(model, method, rank, targets):
        times = sequence if kind == "attention" else 1
        forward, backward = forward + times * ahead, backward + times * back
    return Flops(batch * sequence * forward, batch * sequence * backward)


def _walk(
    model: Architecture, method: str, rank: int | None, targets: str | Iterable[str]
) -> Iterator[tuple[str, int, int, int, int]]:
    """(kind, layer, numbers kept, forward FLOPs, backward FLOPs), each for one token, of each step in order.

    For attention the FLOPs are those of one token against one other.
    """
    if not model.understood:
        raise ValueError(f"activations and FLOPs of {model.name} are not worked out here; its parameters are")
    full = method == "full"
    if not full and rank is None:
        raise ValueError("method 'lora' needs a rank; got None")
    adapters: dict[str, list[Matrix]] = {}
    for row in () if full else count(model, targets, rank).rows:
        adapters.setdefault(row.name, []).append(Matrix(*row[:5]))
    by_role: dict[str, Matrix] = {matrix.role: matrix for matrix in model.matrices()}
    width, flows = model.width, full

    def product(layer: int, inputs: int, *roles: str) -> Iterator[tuple[str, int, int, int, int]]:
        """Matrices that read the same input."""
        nonlocal flows
        present = [by_role[role] for role in roles if role in by_role]
        trained = False
        for matrix in present:
            io = matrix.rows * matrix.columns
            ahead, back = 2 * io, (2 * io if flows else 0) + (2 * io if full else 0)
            kept = 0
            for adapter in adapters.get(matrix.name, ()):
                total = rank * (adapter.rows + adapter.columns)
                ahead += 2 * total
                back += 4 * total - (0 if flows else 2 * rank * inputs)
                kept += rank
                trained = True
            yield "x A", layer, kept, ahead, back
        trained = trained or full
        yield "inputs of trained matrices", layer, inputs if trained and present else 0, 0, 0
        flows = flows or trained

    def norm(layer: int) -> tuple[str, int, int, int, int]:
        # its input and one or two statistics; RMSNorm as transformers writes it also what its gain multiplies
        kept = width + 2 if model.norm == "layer" else width + 1 + (width if full else 0)
        return "inputs of norms", layer, kept if flows else 0, 0, 0

    if full or "embedding" in {matrix.role for group in adapters.values() for matrix in group}:
        own = 0 if full else 2 * rank * width
        yield "x A", 0, 0 if full else rank, own, 2 * own
        flows = True
    if not model.norm_first:
        yield norm(0)
    queries, others = model.heads * model.head_width, model.key_value_heads * model.head_width
    for layer in range(model.layers):
        if model.norm_first:
            yield norm(layer)
        yield from product(layer, width, "query_key_value", "query", "key", "value")
        kept = 2 * queries + 2 * others + model.heads  # q, k, v, result, and a sum of exponentials a head
        yield "attention", layer, kept if flows else 0, 4 * queries, 8 * queries if flows else 0
        flowed = flows
        for step in product(layer, queries, "output"):
            # its input is the result of attention, kept already if a gradient passed there
            keeps = 0 if step[0] == "inputs of trained matrices" and flowed else step[2]
            yield step[0], layer, keeps, *step[3:]
        yield norm(layer)
        yield from product(layer, width, "gate", "up")
        yield "nonlinearity", layer, model.nonlinearity * model.mlp if flows else 0, 0, 0
        yield from product(layer, model.mlp, "down")
        if not model.norm_first:
            yield norm(layer)
    if "pooler" in by_role:
        return  # an encoder's head depends on the task; a pooler reads one token of each text
    yield norm(model.layers)
    yield from product(model.layers, width, "head")
    yield "softmax", model.layers, model.vocabulary if flows else 0, 0, 0


# ------------------------------------------------------------------------------------------ published counts


class Published(NamedTuple):
    """A figure in print, the same figure from its own settings, and why they differ where they do."""

    source: str
    what: str
    printed: str
    ours: str
    reproduced: bool
    note: str


_LORA = "LoRA paper"  # Hu et al. 2021, arXiv 2106.09685v2


def published_counts() -> list[Published]:
    """Parameter counts and sizes in the LoRA paper and around it, recomputed from the shapes.

    A figure counts as reproduced when ours, rounded to the printed digits, is the printed one.
    """
    query_value = ("query", "value")
    gpt3 = ARCHITECTURES["GPT-3 175B"]
    budget = count(gpt3, query_value, 4).parameters

    def lora(model: str, rank: int, targets: Sequence[str] = query_value) -> int:
        return count(model, targets, rank).parameters

    def row(
        source: str, what: str, printed: float, ours: float, unit: str = "M", digits: int = 1, note: str = ""
    ):
        scale = {"": 1, "%": 0.01, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "TB": 1e12, "-fold": 1}[unit]
        same = round(ours / scale, digits) == printed
        gap = "" if unit in ("%", "-fold", "") else " "
        more = 0 if same or not gap else 2
        text = spaced(printed, digits) + gap + unit, spaced(ours / scale, max(digits, more)) + gap + unit
        return Published(source, what, *text, same, note)

    return [
        row("the study note", "10 000 × 100, r = 8", 80_800, lora_parameters(10_000, 100, 8), "", 0),
        row("the study note", "… of the matrix", 8.08, share(10_000, 100, 8), "%", 2),
        row(f"{_LORA}, table 2", "RoBERTa base, r = 8", 0.3, lora("RoBERTa base", 8)),
        row(f"{_LORA}, table 2", "RoBERTa large, r = 8", 0.8, lora("RoBERTa large", 8)),
        row(
            f"{_LORA}, table 2",
            "DeBERTa-XXL, r = 8",
            4.7,
            lora("DeBERTa-XXL", 8),
            note="appendix D.2 says r = 8; the authors' scripts (examples/NLU) set r = 16",
        ),
        row("LoRA code, examples/NLU", "DeBERTa-XXL, r = 16", 4.7, lora("DeBERTa-XXL", 16)),
        row(
            f"{_LORA}, table 3",
            "GPT-2 M, r = 4",
            0.35,
            lora("GPT-2 M", 4),
            digits=2,
            note="0.1 % of the 354.92 M printed above it is 0.35 M, the prefix-tuning row's figure",
        ),
        row(
            f"{_LORA}, table 3",
            "GPT-2 L, r = 4",
            0.77,
            lora("GPT-2 L", 4),
            digits=2,
            note="0.1 % of 774.03 M is 0.77 M, the prefix-tuning row's figure",
        ),
        row(
            f"{_LORA}, table 3",
            "GPT-2 M, all parameters",
            354.92,
            ARCHITECTURES["GPT-2 M"].parameters,
            digits=2,
            note="0.1 M more than the released model has; the figure is from Li & Liang (2021)",
        ),
        row(
            f"{_LORA}, table 3",
            "GPT-2 L, all parameters",
            774.03,
            ARCHITECTURES["GPT-2 L"].parameters,
            digits=2,
        ),
        row(f"{_LORA}, table 4", "GPT-3, r = 1", 4.7, lora("GPT-3 175B", 1)),
        row(f"{_LORA}, table 4", "GPT-3, r = 8", 37.7, lora("GPT-3 175B", 8)),
        row(
            f"{_LORA}, table 4",
            "GPT-3, all parameters",
            175_255.8,
            gpt3.parameters,
            note="Brown et al. (2020), table D.1, print 174 600 M; an untied head makes it 175 221.8 M",
        ),
        row("GPT-3 paper, table D.1", "GPT-3, all parameters", 174.6, gpt3.parameters, "B"),
        row(f"{_LORA}, app. D.4", "GPT-3, r = 2 on W_v alone", 4.7, lora("GPT-3 175B", 2, ("value",))),
        row(
            f"{_LORA}, app. D.4",
            "GPT-3, r = 2 on all four",
            37.7,
            lora("GPT-3 175B", 2, ("attention",)),
            note="r = 2 on all four is table 5's 18 M; 37.7 M needs r = 4",
        ),
        row(
            f"{_LORA}, table 5",
            "GPT-3, r = 8 · 1 = 4 · 2 = 2 · 4",
            18,
            budget,
            digits=0,
            note="cut, not rounded: 18 874 368",
        ),
        row(
            f"{_LORA}, §4.2",
            "GPT-3's adapter, r = 4, 16 bits",
            35,
            size(budget, "float16"),
            "MB",
            0,
            note="36.0 MiB; 35 MB is 10 000 times less than 350 GB",
        ),
        row(f"{_LORA}, §4.2", "175 B in 16 bits", 350, size(175 * 10**9, "float16"), "GB", 0),
        row(
            f"{_LORA}, §4.2",
            "… over the adapter",
            10_000,
            size(175 * 10**9, "float16") / size(budget, "float16"),
            "-fold",
            0,
            note="350 GB over 37.7 MB; the paper says 'roughly'",
        ),
        row(
            f"{_LORA}, §4.2",
            "GPT-3, tuned fully with Adam",
            1.2,
            8 * gpt3.parameters,
            "TB",
            1,
            note="weights, gradients and two states in 16 bits; how 1.2 TB divides is not said",
        ),
        row(
            "LoRA code, README",
            "RoBERTa base, r = 8",
            0.8,
            lora("RoBERTa base", 8),
            note="the figure of RoBERTa large",
        ),
        row(
            "GPT-2 paper, table 2",
            "GPT-2",
            117,
            ARCHITECTURES["GPT-2"].parameters,
            digits=0,
            note="OpenAI's repository says so itself: 'our original parameter counts were wrong'",
        ),
        row("GPT-2's repository", "GPT-2", 124, ARCHITECTURES["GPT-2"].parameters, digits=0),
        row("its model card", "all-MiniLM-L6-v2", 22.7, ARCHITECTURES["all-MiniLM-L6-v2"].parameters),
        row("its weights", "SmolLM2-135M", 134_515_008, ARCHITECTURES["SmolLM2-135M"].parameters, "", 0),
    ]


def published_table() -> str:
    """`published_counts` as text: what is printed, what the settings give, and why not where they differ."""
    lines = [f"{'where':<24}{'what':<32}{'printed':>13}{'counted':>14}"]
    for row in published_counts():
        lines.append(
            f"{row.source:<24}{row.what:<32}{row.printed:>13}{row.ours:>14}  {'=' if row.reproduced else '≠'}"
        )
        if not row.reproduced:
            lines.append(f"    why not: {row.note}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- command line


def megabytes(number: float) -> str:
    """Bytes as text, in units of 1000 (a MB is 10⁶ bytes; the MiB of 2²⁰ is 4.9 % more)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return (
                f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:,.0f} {unit}"
            )
    return f"{number:.0f} B"


def report(
    model: str | Architecture,
    targets: str | Iterable[str] = ("query", "value"),
    rank: int = 8,
    *,
    dtype: str = "bfloat16",
    optimiser: str = "adamw",
    batch: int = 1,
    sequence: int | None = None,
) -> str:
    """What `lora-edu count` prints: the adapter's parameters and file, a training step's memory and FLOPs."""
    model = architecture(model)
    counted = count(model, targets, rank)
    sequence = sequence or min(model.context, 512)
    own = dtype if _bytes(dtype) >= 2 else "float32"
    lines = [
        f"{model.name}: LoRA of rank {rank}",
        "",
        str(counted),
        "",
        f"the adapter on disk, {own}: {megabytes(counted.bytes(own))}",
    ]
    if not model.understood:
        return "\n".join([*lines, f"(memory and FLOPs of {model.name}'s attention are not worked out)"])
    step = {"dtype": dtype, "optimiser": optimiser, "batch": batch, "sequence": sequence}
    packed = _bytes(dtype) < 2
    ways = {} if packed else {"full tuning": training_memory(model, "full", **step)}
    ways["LoRA"] = training_memory(model, "lora", rank, targets, **step)
    lines += ["", f"a training step of {batch} × {sequence} tokens, {dtype}, {optimiser}:"]
    lines.append(f"{'':<13}" + "".join(f"{name:>13}" for name in (*Memory._fields, "total", "FLOPs")))
    for name, memory in ways.items():
        method = "full" if name == "full tuning" else "lora"
        work = training_flops(model, method, rank, targets, batch=batch, sequence=sequence).total
        cells = [megabytes(part) for part in (*memory, memory.total)] + [f"{work:.2e}"]
        lines.append(f"{name:<13}" + "".join(f"{cell:>13}" for cell in cells))
    if packed:
        lines.append("(full tuning needs weights of 16 bits or more)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`lora-edu count ARCHITECTURE --rank R --targets …`; returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="lora-edu count", description="Parameters, bytes and FLOPs of LoRA on a model's real shapes."
    )
    parser.add_argument("architecture", nargs="?", help="e.g. 'GPT-2 XL' or llama-3-8b; without it: the list")
    parser.add_argument("--rank", type=int, default=8, help="default 8")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["query", "value"],
        metavar="TARGET",
        help="query value embedding …, a group (attention, mlp, linear, all) or a module's name (c_attn); "
        "default: query value",
    )
    parser.add_argument("--dtype", default="bfloat16", help=f"of the weights: {', '.join(BYTES)}")
    parser.add_argument("--optimiser", default="adamw", help=", ".join(OPTIMISERS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--sequence", type=int, default=None, help="tokens in a text; default 512 or the context"
    )
    parser.add_argument("--published", action="store_true", help="the counts in print, recomputed")
    options = parser.parse_args(arguments)
    if options.published:
        print(published_table())
        return 0
    if options.architecture is None:
        print("\n".join(map(repr, ARCHITECTURES.values())))
        return 0
    try:
        print(
            report(
                options.architecture,
                [part for target in options.targets for part in target.split(",") if part],
                options.rank,
                dtype=options.dtype,
                optimiser=options.optimiser,
                batch=options.batch,
                sequence=options.sequence,
            )
        )
    except ValueError as error:
        print(f"lora-edu count: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
