"""Facts of counting.py: formulas against live tensors, every shape against the model's own, memory and FLOPs.

Models come from transformers where it is installed (extra `course`); their configs are written out here.
"""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_edu import counting
from lora_edu.tinylm import TinyLM

SIDES = st.integers(1, 300)


@st.composite
def shapes_and_ranks(draw):
    rows, columns = draw(SIDES), draw(SIDES)
    return rows, columns, draw(st.integers(1, min(rows, columns)))


# ---------------------------------------------------------------------------------------------- one matrix


@settings(deadline=None)
@given(shapes_and_ranks())
def test_parameters_are_the_numbers_in_a_and_b(shape):
    rows, columns, rank = shape
    A, B = torch.empty(rank, columns, device="meta"), torch.empty(rows, rank, device="meta")
    assert counting.lora_parameters(rows, columns, rank) == A.numel() + B.numel()
    assert (B @ A).shape == (rows, columns)
    assert counting.share(rows, columns, rank) == pytest.approx((A.numel() + B.numel()) / (rows * columns))


@settings(deadline=None)
@given(shapes_and_ranks())
def test_break_even_is_where_the_share_passes_one_and_lies_below_the_smaller_side(shape):
    rows, columns, rank = shape
    even = counting.break_even_rank(rows, columns)
    assert min(rows, columns) / 2 <= even < min(rows, columns)
    assert (rank < even) == (counting.share(rows, columns, rank) < 1) or rank == pytest.approx(even)


def test_the_note_s_example():
    assert counting.lora_parameters(10_000, 100, 8) == 80_800
    assert counting.share(10_000, 100, 8) == pytest.approx(0.0808)
    assert counting.break_even_rank(10_000, 100) == pytest.approx(99.01, abs=0.005)
    assert counting.break_even_rank(4096, 4096) == 2048


@settings(deadline=None, max_examples=25)
@given(shapes_and_ranks())
def test_flops_of_one_layer_are_those_that_torch_counts(shape):
    rows, columns, rank = shape
    x = torch.ones(7, columns, requires_grad=True)
    W, A, B = torch.ones(rows, columns), torch.ones(rank, columns), torch.ones(rows, rank)
    for trained, own in ((W, 0), (A, rank)):
        for tensor in (W, A, B):
            tensor.requires_grad_(tensor is trained or (own > 0 and tensor is B))
        with FlopCounterMode(display=False) as forward:
            y = x @ W.T + (x @ A.T @ B.T if own else 0)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert forward.get_total_flops() == 7 * counting.forward_flops(rows, columns, own)
        assert backward.get_total_flops() == 7 * counting.backward_flops(rows, columns, own)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: counting.lora_parameters(10_000, 100, 128),
            "rank must be between 1 and 100 (the smaller side of the 10000 × 100 weight); got 128",
        ),
        (lambda: counting.share(10, 10, 0), "rank must be between 1 and 10"),
        (lambda: counting.lora_parameters(10, 10, 2.5), "got 2.5"),
        (lambda: counting.break_even_rank(0, 3), "rows must be a whole number, 1 or more; got 0"),
        (lambda: counting.architecture("lama-3-8b"), "did you mean Llama-3-8B"),
        (lambda: counting.count("GPT-2", "c_atn"), "did you mean c_attn"),
        (lambda: counting.count("GPT-2", ()), "targets must name at least one matrix"),
        (lambda: counting.count("GPT-2", ("c_attn", "query")), "name the whole or its parts"),
        (
            lambda: counting.count("TinyLM", "embedding", 101),
            "between 1 and 100 (the smaller side of the 10000",
        ),
        (lambda: counting.size(3, "float23"), "unknown dtype 'float23'; did you mean float32"),
        (lambda: counting.optimiser_bytes(3, 1, optimiser="adan"), "did you mean adam"),
        (lambda: counting.training_memory("GPT-2", "ful"), "method must be 'full' or 'lora'; got 'ful'"),
        (lambda: counting.training_memory("GPT-2", "lora"), "needs a rank"),
        (lambda: counting.training_memory("GPT-2", "full", dtype="int4"), "use method 'lora'"),
        (lambda: counting.training_flops("DeBERTa-XXL"), "not worked out"),
    ],
)
def test_bad_inputs_are_told_the_value_the_rule_and_the_way_out(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_import_costs_no_torch():
    """Nor numpy, nor widgets: the module is for any Python, at once."""
    code = (
        "import sys, lora_edu.counting; print({'torch', 'numpy', 'ipywidgets', 'difflib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -------------------------------------------------------------------------------------------- architectures


def gpt2(layers, width, heads):
    return "GPT2LMHeadModel", "GPT2Config", {"n_layer": layers, "n_embd": width, "n_head": heads}


def roberta(layers, width, heads, mlp):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    rest = {
        "intermediate_size": mlp,
        "vocab_size": 50_265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    }
    return "RobertaModel", "RobertaConfig", sizes | rest


def llama(layers, width, heads, groups, mlp, vocabulary, kind="Llama", **more):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    rest = {"num_key_value_heads": groups, "intermediate_size": mlp, "vocab_size": vocabulary}
    return f"{kind}ForCausalLM", f"{kind}Config", sizes | rest | more


DEBERTA = {
    "num_hidden_layers": 48,
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "vocab_size": 128_100,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "max_relative_positions": -1,
}
MINILM = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30_522,
}
GEMMA = {"head_dim": 256, "kind": "Gemma"}

# name → (class, config class, config), as published with each model's weights
MODELS = {
    "GPT-2": gpt2(12, 768, 12),
    "GPT-2 M": gpt2(24, 1024, 16),
    "GPT-2 L": gpt2(36, 1280, 20),
    "GPT-2 XL": gpt2(48, 1600, 25),
    "RoBERTa base": roberta(12, 768, 12, 3072),
    "RoBERTa large": roberta(24, 1024, 16, 4096),
    "DeBERTa-XXL": ("DebertaV2Model", "DebertaV2Config", DEBERTA),
    "all-MiniLM-L6-v2": ("BertModel", "BertConfig", MINILM),
    "Llama-2-7B": llama(32, 4096, 32, 32, 11_008, 32_000),
    "Llama-3-8B": llama(32, 4096, 32, 8, 14_336, 128_256),
    "Llama-3-70B": llama(80, 8192, 64, 8, 28_672, 128_256),
    "SmolLM2-135M": llama(30, 576, 9, 3, 1536, 49_152, tie_word_embeddings=True),
    "Qwen2.5-0.5B": llama(24, 896, 14, 2, 4864, 151_936, "Qwen2", tie_word_embeddings=True),
    "Qwen2.5-7B": llama(28, 3584, 28, 4, 18_944, 152_064, "Qwen2", tie_word_embeddings=False),
    "Gemma-2B": llama(18, 2048, 8, 1, 16_384, 256_000, **GEMMA),
    "Gemma-7B": llama(28, 3072, 16, 16, 24_576, 256_000, **GEMMA),
}


def build(name, device="meta", **changes):
    transformers = pytest.importorskip("transformers", reason="extra `course` is not installed")
    model, config, options = MODELS[name]
    with torch.device(device):
        return getattr(transformers, model)(getattr(transformers, config)(**options | changes))


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_is_the_model_s_own(name):
    """A tied head is one parameter with the embedding: named_parameters lists it once, and so do we."""
    model = build(name)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = counting.ARCHITECTURES[name]
    assert ours.shapes() == theirs
    assert ours.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ours.built_by == f"transformers.{type(model).__name__}"


@pytest.mark.parametrize("size", [{}, {"vocabulary": 640, "width": 48, "layers": 3, "heads": 4}])
def test_every_shape_of_tinylm(size):
    with torch.device("meta"):
        model = TinyLM(**size)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert counting.tinylm(**size).shapes() == shapes


def test_all_architectures_are_compared_with_a_model_but_gpt_3():
    assert set(counting.ARCHITECTURES) - set(MODELS) == {"TinyLM", "GPT-3 175B"}


def test_gpt_3_differs_from_gpt_2_only_in_keeping_q_k_v_apart():
    one, other = (
        counting.gpt2("x", 96, 12_288, 96, context=2048).parameters,
        counting.ARCHITECTURES["GPT-3 175B"],
    )
    assert one == other.parameters


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("gpt-2-xl", "c_attn", 8, 48 * 8 * (1600 + 4800)),  # fused, as PEFT adapts it
        ("gpt-2-xl", ("query", "key", "value"), 8, 48 * 8 * 3 * (1600 + 1600)),  # apart, as loralib does
        ("GPT-2 XL", "c_proj", 1, 48 * (1600 + 1600 + 6400 + 1600)),  # a name that two modules end in
        ("gpt-2-xl", "attn.c_proj", 1, 48 * 3200),
        (
            "llama 3 8b",
            ("query", "value"),
            8,
            32 * 8 * (4096 + 4096 + 1024 + 4096),
        ),  # W_v is short
        ("llama-3-8b", "embedding", 8, 8 * (128_256 + 4096)),
        ("gpt-2", ("embedding", "head"), 8, 2 * 8 * (50_257 + 768)),  # tied: one weight, yet two adapters
        ("TinyLM", "all", 8, 248_000),
    ],
)
def test_counts(name, targets, rank, expected):
    assert counting.count(name, targets, rank).parameters == expected


def test_groups_are_what_they_say():
    for name in counting.ARCHITECTURES:
        parts = [counting.count(name, part, 1).parameters for part in ("attention", "mlp")]
        assert counting.count(name, "linear", 1).parameters == sum(parts)
        both = sum(counting.count(name, part, 1).parameters for part in ("linear", "embedding"))
        head = counting.count(name, "head", 1).parameters if name not in ENCODERS else 0
        assert counting.count(name, "all", 1).parameters == both + head


ENCODERS = ("RoBERTa base", "RoBERTa large", "DeBERTa-XXL", "all-MiniLM-L6-v2")


def test_tied_head_is_counted_once_in_the_model():
    tied, apart = counting.ARCHITECTURES["GPT-2"], build("GPT-2", tie_word_embeddings=False)
    assert sum(p.numel() for p in apart.parameters()) == tied.parameters + 50_257 * 768


# ------------------------------------------------------------------------------------------ memory and FLOPs


class Adapted(nn.Module):
    """The dozen lines of LoRA that a count is about: y = W x + s B A x."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Embedding):
            outputs, inputs = base.weight.shape[1], base.weight.shape[0]
        else:
            outputs, inputs = base.weight.shape if isinstance(base, nn.Linear) else base.weight.shape[::-1]
        self.lora_A = nn.Parameter(torch.randn(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        if isinstance(self.base, nn.Embedding):
            return self.base(x) + 2 * (F.embedding(x, self.lora_A.T) @ self.lora_B.T)
        return self.base(x) + 2 * (x @ self.lora_A.T @ self.lora_B.T)


def adapt(model, names, rank):
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if any(f".{path}".endswith(f".{name}") for name in names):
            parent, _, end = path.rpartition(".")
            setattr(model.get_submodule(parent), end, Adapted(module, rank))


def loss_of(model, tokens):
    output = model(tokens)
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state.square().mean()
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def saved_bytes(model, tokens):
    """Bytes that autograd keeps for the backward pass, each storage once, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), tokens]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no later tensor gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, tokens)
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def small(kind):
    """(model, its architecture, tokens): the family's real code, small enough for a test."""
    if kind == "tinylm":
        return TinyLM(900, 60, 3, 5), counting.tinylm(900, 60, 3, 5)
    transformers = pytest.importorskip("transformers", reason="extra `course` is not installed")
    if kind == "gpt2":
        off = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0, "use_cache": False}
        config = transformers.GPT2Config(vocab_size=900, n_layer=3, n_embd=60, n_head=5, **off)
        return transformers.GPT2LMHeadModel(config), counting.gpt2("small", 3, 60, 5, 900)
    if kind == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
        more = {"num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
        config = transformers.LlamaConfig(vocab_size=900, max_position_embeddings=512, **sizes, **more)
        return transformers.LlamaForCausalLM(config), counting.llama("small", 3, 64, 8, 4, 176, 900, 512)
    sizes = {"hidden_size": 60, "intermediate_size": 240, "num_hidden_layers": 3, "num_attention_heads": 5}
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = transformers.BertConfig(vocab_size=900, **sizes, **off)
    return transformers.BertModel(config), counting.bert("small", 3, 60, 5, 240, 900, 512, 2)


MODULES = {
    "tinylm": {
        "value": ("query", "value"),
        "down": ("down",),
        "all": ("query", "key", "value", "output", "up", "down", "head", "embedding"),
    },
    "gpt2": {"value": ("c_attn",), "down": ("mlp.c_proj",), "all": ("c_attn", "c_proj", "c_fc", "wte")},
    "llama": {
        "value": ("q_proj", "v_proj"),
        "down": ("down_proj",),
        "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"),
    },
    "bert": {
        "value": ("query", "value"),
        "down": ("intermediate.dense",),
        "all": ("query", "key", "value", "intermediate.dense", "word_embeddings"),
    },
}


@pytest.mark.parametrize("method", ["full", "value", "down", "all"])
@pytest.mark.parametrize("kind", MODULES)
def test_training_memory_is_what_a_live_model_holds(kind, method):
    """Weights, gradients and Adam's state to the byte; activations within 10 %."""
    torch.manual_seed(0)
    model, ours = small(kind)
    names = MODULES[kind].get(method, ())
    if method != "full":
        adapt(model, names, 4)
    tokens = torch.randint(900, (3, 32))
    kept = saved_bytes(model, tokens)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "bert":  # the pooler took no part
        trained = [parameter for parameter in trained if parameter.grad is not None]
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    state = [value for entry in optimiser.state.values() for value in entry.values()]
    way = {"method": "full"} if method == "full" else {"method": "lora", "rank": 4, "targets": names}
    paper = counting.training_memory(ours, **way, batch=3, sequence=32)

    def nbytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    unused = nbytes(model.pooler.parameters()) if kind == "bert" and method == "full" else 0
    assert paper.weights == nbytes(model.parameters())
    assert paper.gradients == nbytes(parameter.grad for parameter in trained) + unused
    assert paper.optimiser == nbytes(state) + 2 * unused + (8 if unused else 0)
    assert paper.activations == pytest.approx(kept, rel=0.10)


@pytest.mark.parametrize("method", ["full", "value", "down", "all"])
@pytest.mark.parametrize("kind", ["tinylm", "gpt2", "llama"])
def test_flops_of_the_matrix_products_are_those_that_torch_counts(kind, method):
    """Attention apart: torch's counter does not see into the fused attention of a CPU."""
    model, ours = small(kind)
    names = MODULES[kind].get(method, ())
    if method != "full":
        adapt(model, names, 4)
    tokens = torch.randint(900, (2, 16))
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(model, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    way = {"method": "full"} if method == "full" else {"method": "lora", "rank": 4, "targets": names}
    paper = counting.training_flops(ours, **way, batch=2, sequence=16)
    longer = counting.training_flops(ours, **way, batch=1, sequence=32)  # as many tokens, twice the attention
    assert matrix_products(forward) == 2 * paper.forward - longer.forward
    assert matrix_products(backward) == 2 * paper.backward - longer.backward


def matrix_products(counter):
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if "attention" not in str(operation))


def test_lora_saves_a_third_of_the_matrix_products():
    """Full tuning: 2 io forward, 4 io backward. LoRA at small r: 2 io and 2 io."""
    for name in ("GPT-3 175B", "Llama-3-70B"):
        full = counting.training_flops(name, sequence=128).total
        lora = counting.training_flops(name, "lora", 8, sequence=128).total
        assert lora / full == pytest.approx(2 / 3, abs=0.01)


def test_mixed_dtypes_and_optimisers():
    lora = counting.count("Llama-2-7B", ("query", "value"), 8).parameters
    base = counting.ARCHITECTURES["Llama-2-7B"].parameters
    packed = counting.training_memory("Llama-2-7B", "lora", 8, dtype="int4")
    assert packed.weights == base / 2 + 4 * lora  # A and B stay in float32 on a packed base
    mixed = counting.training_memory(
        "Llama-2-7B", "lora", 8, dtype="bfloat16", trainable_dtype="float32", optimiser="momentum"
    )
    assert mixed.weights == 2 * base + 4 * lora
    assert mixed.gradients == mixed.optimiser == 4 * lora
    assert counting.training_memory("GPT-2", optimiser="sgd").optimiser == 0
    assert counting.training_memory("GPT-2", optimiser="adamw-8bit").optimiser == 2 * 124_439_808


# ------------------------------------------------------------------------------------------ published counts


def test_published_counts_are_reproduced_or_the_reason_is_given():
    rows = counting.published_counts()
    assert all(row.reproduced or row.note for row in rows)
    found = {(row.source, row.what): row for row in rows}
    for source, what, equal in [
        ("the study note", "10 000 × 100, r = 8", True),
        ("LoRA paper, table 2", "RoBERTa base, r = 8", True),
        ("LoRA paper, table 2", "RoBERTa large, r = 8", True),
        ("LoRA paper, table 2", "DeBERTa-XXL, r = 8", False),
        ("LoRA code, examples/NLU", "DeBERTa-XXL, r = 16", True),
        ("LoRA paper, table 3", "GPT-2 M, r = 4", False),
        ("LoRA paper, table 3", "GPT-2 L, r = 4", False),
        ("LoRA paper, table 4", "GPT-3, r = 1", True),
        ("LoRA paper, table 4", "GPT-3, r = 8", True),
        ("LoRA paper, §4.2", "GPT-3's adapter, r = 4, 16 bits", False),
        ("LoRA paper, §4.2", "… over the adapter", False),
    ]:
        assert found[source, what].reproduced is equal
    assert found["LoRA paper, table 3", "GPT-2 M, r = 4"].ours == "0.39 M"
    assert found["LoRA paper, table 3", "GPT-2 L, r = 4"].ours == "0.74 M"
    assert found["LoRA paper, §4.2", "… over the adapter"].ours == "9 272-fold"
    lines = counting.published_table().splitlines()
    assert len(lines) == 1 + len(rows) + sum(not row.reproduced for row in rows)
    assert max(map(len, lines)) <= 100


def test_command_line(capsys):
    assert counting.main(["gpt-2-xl", "--rank", "8", "--targets", "c_attn"]) == 0
    printed = capsys.readouterr().out
    assert "1600 × 4800" in printed and "2 457 600" in printed
    assert counting.main(["TinyLM", "--targets", "embedding,head", "--dtype", "float32"]) == 0
    assert "161 600" in capsys.readouterr().out
    assert counting.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(counting.ARCHITECTURES)
    assert counting.main(["--published"]) == 0
    assert "9 272-fold" in capsys.readouterr().out
    assert counting.main(["deberta-xxl"]) == 0
    assert "not worked out" in capsys.readouterr().out
    assert counting.main(["gtp-2"]) == 2
    assert "did you mean GPT-2" in capsys.readouterr().err
