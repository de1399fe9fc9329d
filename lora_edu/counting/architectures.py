"""The shapes of real models: every parameter by its own name. No files, no counting of adapters."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from lora_edu.counting.formulas import spaced


class Entry(NamedTuple):
    """One parameter of a model, as its state dict has it; "{}" in the name stands for the number of the layer."""

    name: str
    shape: tuple[int, ...]
    role: str = ""  # of a matrix that LoRA can adapt; "" for biases, norms and tables of positions
    parts: tuple[tuple[str, int, int], ...] = ()  # of a fused matrix: (role, rows, columns) of each

    @property
    def module(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]


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
    entries: tuple[Entry, ...]
    tied: bool  # the head is the embedding: one tensor, counted once
    norm: str = "layer"  # or "rms"
    norm_first: bool = True  # False: after the residual sum, as in BERT
    norm_both: bool = False  # True: after each half of a layer, too, as in Gemma 2 and 3
    norm_heads: bool = False  # True: q and k have norms of their own, as in Qwen 3 and Gemma 3
    nonlinearity: int = 1  # tensors of the MLP's width that its backward pass keeps (chapter 04)
    understood: bool = True  # False: activations and FLOPs of this attention are not worked out here

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter: name → shape."""
        return {
            entry.name.format(layer): entry.shape
            for entry in self.entries
            for layer in range(self.copies(entry))
        }

    def copies(self, entry: Entry) -> int:
        return self.layers if "{}" in entry.name else 1

    @property
    def parameters(self) -> int:
        return sum(self.copies(entry) * math.prod(entry.shape) for entry in self.entries)

    @property
    def tensor_count(self) -> int:
        return sum(self.copies(entry) for entry in self.entries)

    def matrices(self) -> Iterator[Matrix]:
        """All that LoRA can adapt, a tied head included (an adapter on it is one of its own)."""
        for entry in self.entries:
            if entry.role:
                yield Matrix(entry.role, entry.module, *entry.shape, self.copies(entry))
        if self.tied:
            yield Matrix("head", "lm_head", self.vocabulary, self.width, 1)

    def __repr__(self) -> str:
        return (
            f"{self.name}: {spaced(self.parameters)} parameters, {self.layers} layers of width {self.width}"
        )


def _linear(name: str, rows: int, columns: int, role: str, bias: bool = True) -> list[Entry]:
    weight = Entry(f"{name}.weight", (rows, columns), role)
    return [weight, Entry(f"{name}.bias", (rows,))] if bias else [weight]


def _norm(name: str, width: int, bias: bool = True) -> list[Entry]:
    return [Entry(f"{name}.{end}", (width,)) for end in (("weight", "bias") if bias else ("weight",))]


def _conv1d(name: str, inputs: int, outputs: int, role: str, parts=()) -> list[Entry]:
    """GPT-2's Conv1D stores its weight as (in, out), the transpose of a linear layer's."""
    return [Entry(f"{name}.weight", (inputs, outputs), role, parts), Entry(f"{name}.bias", (outputs,))]


def gpt2(
    name: str,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int = 50_257,
    context: int = 1024,
    *,
    mlp: int | None = None,
    tied: bool = True,
) -> Architecture:
    """GPT-2 (Radford et al. 2019): q, k, v fused into c_attn of shape (d, 3d); head tied to the embedding."""
    block, mlp = "transformer.h.{}", mlp or 4 * width
    parts = tuple((role, width, width) for role in ("query", "key", "value"))
    entries = [
        Entry("transformer.wte.weight", (vocabulary, width), "embedding"),
        Entry("transformer.wpe.weight", (context, width)),
        *_norm(f"{block}.ln_1", width),
        *_conv1d(f"{block}.attn.c_attn", width, 3 * width, "query_key_value", parts),
        *_conv1d(f"{block}.attn.c_proj", width, width, "output"),
        *_norm(f"{block}.ln_2", width),
        *_conv1d(f"{block}.mlp.c_fc", width, mlp, "up"),
        *_conv1d(f"{block}.mlp.c_proj", mlp, width, "down"),
        *_norm("transformer.ln_f", width),
        *([] if tied else _linear("lm_head", vocabulary, width, "head", bias=False)),
    ]
    return Architecture(
        name,
        built_by="transformers.GPT2LMHeadModel",
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=heads,
        head_width=width // heads,
        mlp=mlp,
        vocabulary=vocabulary,
        context=context,
        entries=tuple(entries),
        tied=tied,
        # transformers writes this GELU out with pow and tanh: autograd keeps x, x / 2, tanh(…) and 1 + tanh(…)
        nonlinearity=4,
    )


def _plain_transformer(
    name: str,
    built_by: str,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    context: int,
    positions: list[Entry],
    head: list[Entry],
) -> Architecture:
    """Separate W_q, W_k, W_v, an MLP of four times the width, norms before: GPT-3 and the course's own model."""
    block = "blocks.{}"
    entries = [
        Entry("embedding.weight", (vocabulary, width), "embedding"),
        *positions,
        *_norm(f"{block}.attention_norm", width),
        *(
            entry
            for role in ("query", "key", "value", "output")
            for entry in _linear(f"{block}.attention.{role}", width, width, role)
        ),
        *_norm(f"{block}.mlp_norm", width),
        *_linear(f"{block}.mlp.up", 4 * width, width, "up"),
        *_linear(f"{block}.mlp.down", width, 4 * width, "down"),
        *_norm("norm", width),
        *head,
    ]
    return Architecture(
        name,
        built_by=built_by,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=heads,
        head_width=width // heads,
        mlp=4 * width,
        vocabulary=vocabulary,
        context=context,
        entries=tuple(entries),
        tied=not head,
    )


def gpt3(
    name: str, layers: int, width: int, heads: int, vocabulary: int = 50_257, context: int = 2048
) -> Architecture:
    """GPT-3 (Brown et al. 2020, table 2.1): as GPT-2, but W_q, W_k, W_v apart, as the LoRA paper counts."""
    positions = [Entry("positions.weight", (context, width))]
    sizes = (layers, width, heads, vocabulary, context)
    return _plain_transformer(name, "from the papers", *sizes, positions=positions, head=[])


def tinylm(
    vocabulary: int = 10_000,
    width: int = 100,
    layers: int = 6,
    heads: int = 5,
    context: int = 256,
    name: str = "TinyLM",
) -> Architecture:
    """The course's base model (lora_edu.tinylm): rotary positions, so no table of them; a head of its own."""
    head = _linear("head", vocabulary, width, "head", bias=False)
    sizes = (layers, width, heads, vocabulary, context)
    return _plain_transformer(name, "lora_edu.tinylm.TinyLM", *sizes, positions=[], head=head)


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
) -> Architecture:
    """BERT, RoBERTa and the encoders made from them: norms after the residual sums, a pooler on top."""
    layer = "encoder.layer.{}"
    entries = [
        Entry("embeddings.word_embeddings.weight", (vocabulary, width), "embedding"),
        Entry("embeddings.position_embeddings.weight", (positions, width)),
        Entry("embeddings.token_type_embeddings.weight", (types, width)),
        *_norm("embeddings.LayerNorm", width),
        *_encoder_layer(layer, width, mlp, ("query", "key", "value")),
        *_linear("pooler.dense", width, width, "pooler"),
    ]
    return Architecture(
        name,
        built_by=built_by,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=heads,
        head_width=width // heads,
        mlp=mlp,
        vocabulary=vocabulary,
        context=positions,
        entries=tuple(entries),
        tied=False,
        norm_first=False,
    )


def _encoder_layer(layer: str, width: int, mlp: int, names: tuple[str, str, str]) -> list[Entry]:
    """BERT's layer, whose q, k and v are called `names`."""
    roles = zip(names, ("query", "key", "value"), strict=True)
    return [
        *(
            entry
            for end, role in roles
            for entry in _linear(f"{layer}.attention.self.{end}", width, width, role)
        ),
        *_linear(f"{layer}.attention.output.dense", width, width, "output"),
        *_norm(f"{layer}.attention.output.LayerNorm", width),
        *_linear(f"{layer}.intermediate.dense", mlp, width, "up"),
        *_linear(f"{layer}.output.dense", width, mlp, "down"),
        *_norm(f"{layer}.output.LayerNorm", width),
    ]


def deberta(
    name: str, layers: int, width: int, heads: int, mlp: int, vocabulary: int, buckets: int
) -> Architecture:
    """DeBERTa v2 (He et al. 2021): content and position attend apart; one table of relative positions."""
    layer = "encoder.layer.{}"
    entries = [
        Entry("embeddings.word_embeddings.weight", (vocabulary, width), "embedding"),
        *_norm("embeddings.LayerNorm", width),
        *_encoder_layer(layer, width, mlp, ("query_proj", "key_proj", "value_proj")),
        Entry("encoder.rel_embeddings.weight", (2 * buckets, width)),
        *_norm("encoder.LayerNorm", width),
        Entry("encoder.conv.conv.weight", (width, width, 3)),
        Entry("encoder.conv.conv.bias", (width,)),
        *_norm("encoder.conv.LayerNorm", width),
    ]
    return Architecture(
        name,
        built_by="transformers.DebertaV2Model",
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=heads,
        head_width=width // heads,
        mlp=mlp,
        vocabulary=vocabulary,
        context=512,
        entries=tuple(entries),
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
    biased: tuple[str, ...] = (),
    norm_both: bool = False,
    norm_heads: bool = False,
    understood: bool = True,
    built_by: str = "transformers.LlamaForCausalLM",
) -> Architecture:
    """Llama and what is built like it (Mistral, Qwen, Gemma, SmolLM): grouped queries, a gated MLP, RMSNorm.

    With grouped queries W_k and W_v are (key_value_heads · head_width, d): shorter than W_q.
    biased: the roles whose matrices have a bias ("query", "key", "value" in Qwen 2).
    """
    head_width = head_width or width // heads
    block = "model.layers.{}"
    queries, others = heads * head_width, key_value_heads * head_width

    def linear(module: str, rows: int, columns: int, role: str) -> list[Entry]:
        return _linear(f"{block}.{module}", rows, columns, role, role in biased)

    norms = ["input_layernorm", "post_attention_layernorm"]
    if norm_both:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    ends = ("q_norm", "k_norm") if norm_heads else ()
    entries = [
        Entry("model.embed_tokens.weight", (vocabulary, width), "embedding"),
        *linear("self_attn.q_proj", queries, width, "query"),
        *linear("self_attn.k_proj", others, width, "key"),
        *linear("self_attn.v_proj", others, width, "value"),
        *linear("self_attn.o_proj", width, queries, "output"),
        *(entry for end in ends for entry in _norm(f"{block}.self_attn.{end}", head_width, bias=False)),
        *linear("mlp.gate_proj", mlp, width, "gate"),
        *linear("mlp.up_proj", mlp, width, "up"),
        *linear("mlp.down_proj", width, mlp, "down"),
        *(entry for end in norms for entry in _norm(f"{block}.{end}", width, bias=False)),
        *_norm("model.norm", width, bias=False),
        *([] if tied else _linear("lm_head", vocabulary, width, "head", bias=False)),
    ]
    return Architecture(
        name,
        built_by=built_by,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        mlp=mlp,
        vocabulary=vocabulary,
        context=context,
        entries=tuple(entries),
        tied=tied,
        norm="rms",
        norm_both=norm_both,
        norm_heads=norm_heads,
        nonlinearity=3,  # act(gate) · up: autograd keeps the gate before and after the activation, and up
        understood=understood,
    )


# What the builders above need to be told of each family, beside the sizes.
MISTRAL = {"built_by": "transformers.MistralForCausalLM"}
QWEN_2 = {"built_by": "transformers.Qwen2ForCausalLM", "biased": ("query", "key", "value")}
QWEN_3 = {"built_by": "transformers.Qwen3ForCausalLM", "norm_heads": True}
GEMMA = {"built_by": "transformers.GemmaForCausalLM"}
# Gemma 2 caps its attention scores, which keeps PyTorch from fusing the attention: not worked out here.
GEMMA_2 = {"built_by": "transformers.Gemma2ForCausalLM", "norm_both": True, "understood": False}
GEMMA_3 = {"built_by": "transformers.Gemma3ForCausalLM", "norm_both": True, "norm_heads": True}
ROBERTA = {"built_by": "transformers.RobertaModel"}


def _qwen3(name: str, layers: int, width: int, heads: int, mlp: int, tied: bool = False) -> Architecture:
    return llama(name, layers, width, heads, 8, mlp, 151_936, 40_960, head_width=128, tied=tied, **QWEN_3)


def _gemma3(
    name: str,
    layers: int,
    width: int,
    heads: int,
    groups: int,
    mlp: int,
    *,
    vocabulary: int = 262_208,
    context: int = 131_072,
    head_width: int = 256,
) -> Architecture:
    """The text model; the larger ones have a vision tower beside it, which LoRA usually leaves alone."""
    sizes = (layers, width, heads, groups, mlp, vocabulary, context)
    return llama(name, *sizes, head_width=head_width, tied=True, **GEMMA_3)


_TEXT_ONLY = {"vocabulary": 262_144, "context": 32_768}

# Sizes from each model's own config.json.
ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        tinylm(),
        gpt2("GPT-2", 12, 768, 12),
        gpt2("GPT-2 M", 24, 1024, 16),
        gpt2("GPT-2 L", 36, 1280, 20),
        gpt2("GPT-2 XL", 48, 1600, 25),
        gpt3("GPT-3 175B", 96, 12_288, 96),
        bert("RoBERTa base", 12, 768, 12, 3072, 50_265, 514, 1, **ROBERTA),
        bert("RoBERTa large", 24, 1024, 16, 4096, 50_265, 514, 1, **ROBERTA),
        deberta("DeBERTa-XXL", 48, 1536, 24, 6144, 128_100, 256),
        bert("all-MiniLM-L6-v2", 6, 384, 12, 1536, 30_522, 512, 2),
        llama("Llama-2-7B", 32, 4096, 32, 32, 11_008, 32_000, 4096),
        llama("Llama-3-8B", 32, 4096, 32, 8, 14_336, 128_256, 8192),
        llama("Llama-3-70B", 80, 8192, 64, 8, 28_672, 128_256, 8192),
        llama("Llama-3.1-8B", 32, 4096, 32, 8, 14_336, 128_256, 131_072),
        llama("Llama-3.1-70B", 80, 8192, 64, 8, 28_672, 128_256, 131_072),
        llama("Llama-3.2-1B", 16, 2048, 32, 8, 8192, 128_256, 131_072, tied=True),
        llama("Llama-3.2-3B", 28, 3072, 24, 8, 8192, 128_256, 131_072, tied=True),
        llama("Mistral-7B-v0.1", 32, 4096, 32, 8, 14_336, 32_000, 32_768, **MISTRAL),
        llama("Mistral-7B-v0.3", 32, 4096, 32, 8, 14_336, 32_768, 32_768, **MISTRAL),
        llama("SmolLM2-135M", 30, 576, 9, 3, 1536, 49_152, 8192, tied=True),
        llama("Qwen2.5-0.5B", 24, 896, 14, 2, 4864, 151_936, 32_768, tied=True, **QWEN_2),
        llama("Qwen2.5-7B", 28, 3584, 28, 4, 18_944, 152_064, 32_768, **QWEN_2),
        _qwen3("Qwen3-0.6B", 28, 1024, 16, 3072, tied=True),
        _qwen3("Qwen3-1.7B", 28, 2048, 16, 6144, tied=True),
        _qwen3("Qwen3-4B", 36, 2560, 32, 9728, tied=True),
        _qwen3("Qwen3-8B", 36, 4096, 32, 12_288),
        _qwen3("Qwen3-14B", 40, 5120, 40, 17_408),
        _qwen3("Qwen3-32B", 64, 5120, 64, 25_600),
        llama("Gemma-2B", 18, 2048, 8, 1, 16_384, 256_000, 8192, head_width=256, tied=True, **GEMMA),
        llama("Gemma-7B", 28, 3072, 16, 16, 24_576, 256_000, 8192, head_width=256, tied=True, **GEMMA),
        _gemma3("Gemma-3-270M", 18, 640, 4, 1, 2048, **_TEXT_ONLY),
        _gemma3("Gemma-3-1B", 26, 1152, 4, 1, 6912, **_TEXT_ONLY),
        _gemma3("Gemma-3-4B", 34, 2560, 8, 4, 10_240),
        _gemma3("Gemma-3-12B", 48, 3840, 16, 8, 15_360),
        _gemma3("Gemma-3-27B", 62, 5376, 32, 16, 21_504, head_width=128),
    )
}
