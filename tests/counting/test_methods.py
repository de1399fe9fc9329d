"""What each way of tuning trains, keeps and computes: against hand counts, `lora_edu.tuning` and live models."""

import pytest
import torch
from live_models import matrix_products, saved_bytes, small
from torch.utils.flop_counter import FlopCounterMode

from lora_edu import counting
from lora_edu.lora import trainable_parameters
from lora_edu.tuning import (
    bitfit,
    bottleneck,
    ia3,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    stored_parameters,
    trained_parameters,
)

ON = {
    "bitfit": lambda model, size: bitfit(model),
    "ia3": lambda model, size: ia3(model),
    "bottleneck": bottleneck,
    "prefix": prefix_tuning,
    "prefix through an MLP": lambda model, size: prefix_tuning(model, size, reparametrise=True),
    "prompt": prompt_tuning,
    "p-tuning": p_tuning,
}
SIZES = {"bitfit": None, "ia3": None, "bottleneck": 8}
KINDS = ("tinylm", "gpt2", "llama", "qwen3", "gemma3")
CASES = [
    (kind, method)
    for kind in KINDS
    for method in ON
    if method != "bitfit" or kind in ("tinylm", "gpt2")  # the others have no biases
]


def test_the_methods_are_those_of_the_recorded_runs():
    recorded = pytest.importorskip("lora_edu.recording.methods")
    assert set(counting.METHODS) == set(recorded.SIZES) - {"lora everywhere"}


@pytest.mark.parametrize(
    ("method", "size", "parameters", "stored"),
    [
        ("full", None, 2_728_000, 2_728_000),
        ("bitfit", None, 6 * 1100 + 100, 6700),  # 11 d a block and the last norm's
        ("ia3", None, 6 * (100 + 100 + 400), 3600),
        ("bottleneck", 8, 12 * (1600 + 108), 20_496),
        ("prefix", 16, 16 * 12 * 100, 19_200),
        ("prefix through an MLP", 16, 1600 + 10_100 + 1200 * 101, 19_200),
        ("prompt", 64, 6400, 6400),
        ("p-tuning", 16, 1600 + 30_300, 1600),
    ],
)
def test_counts_of_tinylm_by_hand(method, size, parameters, stored):
    counted = counting.trained("TinyLM", method, size=size)
    assert (counted.parameters, counted.stored) == (parameters, stored)
    assert counted.added == (0 if method in ("full", "bitfit") else parameters)


def test_lora_is_counted_as_before():
    counted = counting.trained("GPT-3 175B", "lora", 4)
    assert counted == (
        18_874_368,
        2 * 2 * 96,
        18_874_368,
        18_874_368,
    )  # r = 4 on W_q and W_v: the paper's 18 M


def test_a_published_count():
    """PEFT's table on Llama-3.2-3B (data/peft_metamathqa.csv): (IA)³ 286 720, 200 tokens 614 400, a prefix of 50."""
    from lora_edu.data import load_peft_comparison

    trained = {(row["method"], row["run"]): row["trained"] for row in load_peft_comparison()}
    name = "llama-3.2-3B-"
    for method, row, size in (
        ("ia3", ("ia3", f"{name}default"), None),
        ("prompt", ("prompt_tuning", f"{name}default"), 200),
        ("prefix", ("prefixtuning", f"{name}tokens50-init_prefix-lr_0.005"), 50),
        ("p-tuning", ("ptuning", f"{name}default"), 20),
    ):
        assert counting.trained("Llama-3.2-3B", method, size=size).parameters == trained[row]


@pytest.mark.parametrize(
    ("kind", "method"),
    [*CASES, ("bert", "bitfit"), ("bert", "ia3"), ("bert", "bottleneck"), ("bert", "prompt")],
)
def test_numbers_are_those_that_the_methods_train_and_store(kind, method):
    model, ours = small(kind)
    size = SIZES.get(method, 12)
    ON[method](model, size)
    counted = counting.trained(ours, method, size=size)
    assert counted.parameters == trained_parameters(model)
    assert counted.tensors == len(list(trainable_parameters(model)))
    assert counted.stored == stored_parameters(model)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_training_memory_is_what_a_live_model_holds(kind, method):
    """Weights, gradients and Adam's state to the byte; activations within 10 %."""
    torch.manual_seed(0)
    model, ours = small(kind)
    before = sum(each.numel() for each in model.parameters())
    size = SIZES.get(method, 12)
    ON[method](model, size)
    tokens = torch.randint(900, (3, 32))
    kept = saved_bytes(model, tokens)
    trained = list(trainable_parameters(model))
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    state = sum(value.nbytes for entry in optimiser.state.values() for value in entry.values())
    paper = counting.training_memory(ours, method, size=size, batch=3, sequence=32)
    assert paper.weights == 4 * sum(each.numel() for each in model.parameters())
    assert paper.weights == 4 * (before + counting.trained(ours, method, size=size).added)
    assert paper.gradients == sum(each.grad.nbytes for each in trained)
    assert paper.optimiser == state
    assert paper.activations == pytest.approx(kept, rel=0.10)


@pytest.mark.parametrize(
    ("kind", "method"), [case for case in CASES if case[0] in ("tinylm", "gpt2", "llama")]
)
def test_flops_of_the_matrix_products_are_those_that_torch_counts(kind, method):
    model, ours = small(kind)
    size = SIZES.get(method, 12)
    ON[method](model, size)
    tokens = torch.randint(900, (2, 16))
    with FlopCounterMode(display=False) as forward:
        output = model(tokens)
        loss = getattr(output, "logits", output).logsumexp(-1).mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    paper = counting.training_flops(ours, method, size=size, batch=2, sequence=16)
    through = 16 + (size if method in ("prompt", "p-tuning") else 0)
    pairs = 2 * through * (16 + (size if method not in ("bitfit", "ia3", "bottleneck") else 0))
    attention = 4 * ours.layers * ours.heads * ours.head_width * pairs
    assert matrix_products(forward) == paper.forward - attention
    with_gradient = (
        ours.layers - (method == "bottleneck")
    ) / ours.layers  # the first bottleneck is after attention
    assert matrix_products(backward) == paper.backward - 2 * attention * with_gradient


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (("Lora", 8), "method must be one of 'full', 'lora'.*; got 'Lora'; did you mean lora"),
        (("bottleneck",), r"method 'bottleneck' needs a size \(numbers inside\); got None"),
        (("prompt",), r"method 'prompt' needs a size \(virtual tokens\); got None"),
        (("ia3", 16), "rank is LoRA's; method 'ia3' has none; got 16"),
        (("lora",), "method 'lora' needs a rank; got None"),
    ],
)
def test_a_method_without_what_it_needs_is_refused(way, message):
    for what in (counting.trained, counting.training_memory, counting.training_flops, counting.saved_numbers):
        with pytest.raises(ValueError, match=message):
            what("TinyLM", *way)


@pytest.mark.parametrize(
    ("model", "method", "options", "message"),
    [
        ("TinyLM", "prefix", {"size": 16, "rank": 4}, "rank is LoRA's; method 'prefix' has a size; got 4"),
        ("TinyLM", "prompt", {"size": 0}, "size must be a whole number, 1 or more; got 0"),
        ("TinyLM", "prompt", {"size": 256}, r"size must be below 256 \(the positions of TinyLM.*; got 256"),
        ("TinyLM", "lora", {"size": 4, "rank": 4}, "method 'lora' takes no size, LoRA's is its rank; got 4"),
        ("TinyLM", "bitfit", {"size": 4}, "method 'bitfit' takes no size, there is nothing to choose; got 4"),
        ("Llama-3-8B", "bitfit", {}, "Llama-3-8B has no biases, and BitFit trains nothing else"),
        ("RoBERTa base", "prefix", {"size": 4}, "RoBERTa base is an encoder.* a prompt doesn't"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(model, method, options, message):
    for what in (counting.trained, counting.training_memory):
        with pytest.raises(ValueError, match=message):
            what(model, method, **options)


def test_activations_begin_where_the_first_trained_number_is():
    """TinyLM, width 100: what each method keeps for a token of the text, softmax apart, by hand.

    A norm keeps 102, attention 405, GELU 400; the last norm 102. With all of them a block has 1009.
    """
    kept = {
        method: sum(counting.saved_numbers("TinyLM", method, size=size).values()) - 10_000
        for method, size in (
            ("bitfit", None),
            ("prompt", 16),
            ("bottleneck", 8),
            ("prefix", 16),
            ("ia3", None),
        )
    }
    assert kept["bitfit"] == kept["prompt"] == 6 * 1009 + 102  # from the first norm on
    assert (
        kept["bottleneck"] == 6 * (1009 + 2 * 116) + 102 - 102 - 405
    )  # the first norm and attention are before it
    assert kept["prefix"] == 6 * 1009 + 102 - 102
    assert kept["ia3"] == 6 * (1009 + 600) + 102 - 102
    virtual = [
        sum(counting.saved_numbers("TinyLM", method, size=16, of="virtual").values())
        for method in ("prompt", "prefix")
    ]
    assert virtual == [6 * 1009 + 102, 6 * 200]
    assert counting.saved_numbers("TinyLM", "p-tuning", size=16, of="step") == {
        "virtual tokens' MLP": 2 * 16 * 100
    }
    assert counting.saved_numbers("TinyLM", "prefix", size=16, of="pair") == {"attention's mask": 6}
    with pytest.raises(ValueError, match="of must be .*; got 'texts'"):
        counting.saved_numbers("TinyLM", of="texts")


def test_virtual_tokens_take_their_share_of_the_context():
    with_prompt = counting.training_memory("TinyLM", "prompt", size=64)
    assert with_prompt == counting.training_memory("TinyLM", "prompt", size=64, sequence=192)


def test_biases_of_a_packed_model_are_trained_in_full_precision():
    """And counted once: they are the model's own."""
    biases = counting.trained("GPT-2", "bitfit").parameters
    memory = counting.training_memory("GPT-2", "bitfit", dtype="int4", sequence=8)
    assert memory.weights == (124_439_808 - biases) / 2 + 4 * biases and memory.gradients == 4 * biases
