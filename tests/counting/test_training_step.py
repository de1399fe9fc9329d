"""Memory and FLOPs of a step against those of live models, small enough for a test."""

import pytest
import torch
from live_models import loss_of, matrix_products, saved_bytes, small
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_edu import counting


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


GATED = {
    "value": ("q_proj", "v_proj"),
    "down": ("down_proj",),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"),
}
MODULES = {
    "tinylm": {
        "value": ("query", "value"),
        "down": ("down",),
        "all": ("query", "key", "value", "output", "up", "down", "head", "embedding"),
    },
    "gpt2": {"value": ("c_attn",), "down": ("mlp.c_proj",), "all": ("c_attn", "c_proj", "c_fc", "wte")},
    "llama": GATED,
    "qwen3": GATED,
    "gemma3": GATED,
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
@pytest.mark.parametrize("kind", ["tinylm", "gpt2", "llama", "qwen3", "gemma3"])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be a whole number, 1 or more; got 0"),
        ({"sequence": -5}, "sequence must be a whole number, 1 or more; got -5"),
        ({"sequence": 0}, "sequence must be a whole number, 1 or more; got 0"),
        ({"batch": 1.5}, "batch must be a whole number, 1 or more; got 1.5"),
    ],
)
def test_a_step_without_tokens_is_refused(options, message):
    for what in (counting.training_memory, counting.training_flops):
        with pytest.raises(ValueError, match=message):
            what("GPT-2", **options)


def test_short_names_of_dtypes_and_other_names_of_optimisers():
    def memory(dtype, optimiser, trainable=None):
        return counting.training_memory(
            "GPT-2", "lora", 8, dtype=dtype, optimiser=optimiser, trainable_dtype=trainable, sequence=64
        )

    assert memory("bf16", "AdamW_torch") == memory("bfloat16", "adamw") == memory(torch.bfloat16, "adamw")
    assert memory("fp16", "paged_adamw_8bit", "fp32") == memory("float16", "adamw-8bit", "float32")
    assert memory("nf4", "sgd") == memory("int4", "sgd")
    with pytest.raises(ValueError, match=r"unknown dtype 'bf17'.* There are: float32, bfloat16"):
        memory("bf17", "adamw")
