# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 04 · Counting: what LoRA costs
#
# **Afterwards you can** count the parameters, bytes and FLOPs of LoRA for any shape and rank; say from which
# rank on it saves nothing; recompute the counts in the LoRA paper, and name those that do not come out;
# predict the memory of a training step on paper, and check the prediction on a live model.
#
# **You should know** what a rank is (chapter 01), what a linear layer, an embedding and Adam are, and how to
# read PyTorch. **Time:** 45 minutes to read, less than one to run.
#
# Nothing here is trained. It is arithmetic, but arithmetic that decides whether a model fits into your
# machine. A model from `transformers` is built near the end, with random weights and no download; everything
# else needs only PyTorch.

# %% tags=["setup"]
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_edu import counting, exercises, explore, plots
from lora_edu.tinylm import TinyLM

# %% [markdown]
# ## How many numbers?
#
# Our base model has a table *W* of 10 000 tokens × 100 numbers. LoRA leaves *W* as it is and adds the product
# of two thin matrices, *s* · *BA*: *A* has only *r* rows, *B* only *r* columns. (Here *BA* is 100 × 10 000
# and is added transposed, because the table has a token a row; chapter 06. For the count it makes no
# difference.)
#
# **Predict before you run.** At *r* = 8: how many numbers are in *A* and *B* together, and how much is that
# of the million in *W*? Half a percent, eight percent, sixteen?

# %%
i, o, r = 10_000, 100, 8
A, B = torch.empty(r, i), torch.empty(o, r)
trained = A.numel() + B.numel()
print(f"A {tuple(A.shape)}, B {tuple(B.shape)}: {trained} numbers, {trained / (i * o):.2%} of {i * o}")
assert trained == r * (i + o) == 80_800
assert f"{trained / (i * o):.2%}" == "8.08%"

# %% [markdown]
# **Why.** *A* has *r* rows of *i* numbers and *B* has *o* rows of *r*: together *r*(*i* + *o*). The matrix
# has *i* · *o*. A sum against a product: the larger the matrix, the smaller the share. And the count is
# proportional to *r*: double the rank, double the numbers.
#
# `lora_edu.counting` has the same formula. It is plain Python without PyTorch, so it also runs where nothing
# else does.

# %%
print(counting.lora_parameters(10_000, 100, rank=8), f"{counting.share(10_000, 100, rank=8):.2%}")
assert counting.lora_parameters(i, o, r) == trained
assert counting.share(i, o, r) == trained / (i * o)

# %% [markdown]
# ## From which rank on is it no saving?
#
# At *r* = 100 the product *BA* can be any 10 000 × 100 matrix at all. Somewhere on the way there, *A* and *B*
# hold more numbers than *W* itself.
#
# **Predict before you run.** Where: near *r* = 50, or near 100?

# %%
for rows, columns in [(10_000, 100), (100, 100), (4096, 4096), (1600, 4800)]:
    first = next(r for r in range(1, min(rows, columns) + 1) if r * (rows + columns) >= rows * columns)
    even = counting.break_even_rank(rows, columns)
    print(f"{rows:>6} × {columns:<5} first r without saving: {first:>5}    io / (i + o) = {even:.2f}")
    assert first - 1 < even <= first

# %% [markdown]
# **Why.** *r*(*i* + *o*) = *io* gives **r = io / (i + o)**, the break-even rank. Each rank costs one row and
# one column, *i* + *o* numbers. For a square matrix that is two of its *d* columns' worth, so *d*/2 ranks use
# it up. For our table it is 10 100 numbers, hardly more than the 10 000 of a single column of *W*: 99 ranks
# fit into the million, 100 do not. The break-even rank always lies between half the short side and the short
# side.
#
# Move the sliders. The blue area is what LoRA trains, the grey one what is there.

# %%
explore.rank_and_shape()

# %% [markdown]
# ### So why *r* ≪ min(*i*, *o*)?
#
# The paper asks for *r* ≪ min(*d*, *k*) (§4.1). Three reasons; two of them are counting, the third is not.
#
# 1. **It must save something.** Above io / (i + o) it costs more than tuning *W* itself. To cost a tenth, *r*
#    must be a tenth of that.
# 2. **It must restrict something.** At *r* = min(*i*, *o*) the product can be any matrix: LoRA is then full
#    tuning, written down in a more expensive way. Of the *r*(*i* + *o*) numbers *r*² are spent on nothing,
#    because (*BM*)(*M*⁻¹*A*) is the same product for every invertible *r* × *r* matrix *M* (chapter 01).
# 3. **It must suffice.** Whether the change that a task needs fits into a small *r* is no matter of counting:
#    chapters 03 and 07 measure it.

# %%
free = {r: r * (i + o) - r**2 for r in (1, 8, 50, 100)}
for r, number in free.items():
    print(
        f"r = {r:>3}: {r * (i + o):>8} numbers, {number:>8} of them free: {number / (i * o):>6.1%} of a million"
    )
assert free[100] == i * o

# %% [markdown]
# At *r* = 100 exactly a million are free, as many as *W* has; the other 10 000 are the price of writing it as
# a product.
#
# ## The embedding: a small share, a large number
#
# 8.08 % sounds like a lot. Papers speak of a tenth of a percent. Is the embedding an expensive place for
# LoRA?
#
# **Predict before you run.** A table of *V* × *d* and a square matrix of *d* × *d*, both at the same *r*:
# which adapter is the larger *share* of its matrix? And which holds the larger *number*?

# %%
print(f"{'V':>8} {'d':>6}   {'table: share':>12} {'number':>10}   {'square: share':>13} {'number':>8}")
for V, d in [(10_000, 100), (50_257, 768), (128_256, 4096), (256_000, 3072)]:
    table, square = counting.share(V, d, 8), counting.share(d, d, 8)
    numbers = counting.lora_parameters(V, d, 8), counting.lora_parameters(d, d, 8)
    print(f"{V:>8} {d:>6}   {table:>12.2%} {numbers[0]:>10}   {square:>13.2%} {numbers[1]:>8}")
    assert 8 / d < table < square and numbers[0] > numbers[1]
assert f"{counting.share(128_256, 4096, 8):.2%} {counting.share(4096, 4096, 8):.2%}" == "0.20% 0.39%"

# %% [markdown]
# **Why.** The table's share is *r*(*V* + *d*) / (*Vd*) = *r*/*d* + *r*/*V*. The second term vanishes for a
# large vocabulary, so it tends to *r*/*d*. A square matrix has 2*r*/*d*, twice that. So the embedding's share
# is the *smaller* one, and our 8.08 % says only that *d* = 100 is narrow: with Llama-3's 128 256 × 4096 it is
# 0.20 %, and a square matrix of that width has 0.39 %.
#
# The *number* is another matter: *r*(*V* + *d*) against 2*rd*. It grows with the vocabulary.

# %%
explore.table_and_square()

# %%
for model in counting.ARCHITECTURES.values():
    embedding = counting.count(model, "embedding", rank=1).parameters
    others = [row.parameters / row.copies for row in counting.count(model, "linear", rank=1).rows]
    assert embedding > max(others), model.name
llama = {name: counting.count("Llama-3-8B", name, 8).parameters for name in ("embedding", "query", "linear")}
print(len(counting.ARCHITECTURES), "architectures: the embedding's adapter is the largest single one in each")
print("Llama-3-8B at r = 8:", llama)
assert 16 < llama["embedding"] / counting.lora_parameters(4096, 4096, 8) < 17
assert 19.5 < llama["linear"] / llama["embedding"] < 20

# %% [markdown]
# In every model we know the shapes of, the embedding's adapter is the largest of all single ones. In
# Llama-3-8B it costs as much as *W_q* in sixteen layers. What follows for **which matrices to adapt**:
#
# - Not 'never the embedding': it is one matrix, the linear layers are hundreds. In Llama-3-8B all of them
#   together take almost twenty times its number.
# - But the same numbers spent there reach only the tokens that occur. Column *t* of *A* is read and
#   trained when token *t* is in the batch, and a tuning text uses a part of the vocabulary. Chapter 06 counts
#   which rows move.
# - So adapt the embedding when the *tokens* have to mean something new (added tokens, another language, a
#   code), and otherwise spend the budget on the blocks. The paper never adapted embeddings at all.

# %% [markdown]
# ## The counts in print
#
# With the shapes of real models the published counts can be recomputed. The paper adapts *W_q* and *W_v* of
# each layer, all *d* × *d*: 2 · layers · 2*dr* numbers.
#
# **Predict before you run.** GPT-3 has 96 layers of width 12 288. How many numbers at *r* = 1: forty
# thousand, five million, two hundred million?

# %%
for name, layers, d, r in [
    ("RoBERTa base", 12, 768, 8),
    ("RoBERTa large", 24, 1024, 8),
    ("GPT-3 175B", 96, 12_288, 1),
]:
    numbers = 2 * layers * r * (d + d)
    print(f"{name:<14} r = {r}: {counting.spaced(numbers):>9}")
    assert numbers == counting.count(name, ("query", "value"), r).parameters

# %% [markdown]
# The paper prints 0.3 M, 0.8 M and 4.7 M. Here is everything we found in print; a figure counts as equal if
# ours, rounded to the printed digits, is the printed one.

# %%
print(counting.published_table())

# %%
published = {(row.source, row.what): row for row in counting.published_counts()}
assert sum(row.reproduced for row in published.values()) == 14 and len(published) == 26
GPT2 = counting.ARCHITECTURES["GPT-2 M"], counting.ARCHITECTURES["GPT-2 L"]
assert [counting.count(model, ("query", "value"), 4).parameters for model in GPT2] == [393_216, 737_280]
budget = counting.count("GPT-3 175B", ("query", "value"), 4).parameters
assert f"{0.001 * 354.92:.2f} {0.001 * 774.03:.2f}" == "0.35 0.77"
assert budget == counting.count("GPT-3 175B", "query", 8).parameters
assert budget == counting.count("GPT-3 175B", "attention", 2).parameters
print(f"{budget} numbers, {2 * budget / 1e6:.1f} MB or {2 * budget / 2**20:.1f} MiB")
print(f"350 GB is {350e9 / (2 * budget):.0f} times as much")
assert f"{2 * budget / 1e6:.1f} {2 * budget / 2**20:.1f} {350e9 / (2 * budget):.0f}" == "37.7 36.0 9272"

# %% [markdown]
# Fourteen of the 26 come out, and the twelve that do not are instructive.
#
# - **GPT-2 M and L.** At the stated *r* = 4 the counts are 0.39 M and 0.74 M. Printed are 0.35 M and 0.77 M,
#   once less and once more, so no other rank explains both. The same two figures stand in the prefix-tuning
#   rows of that table, and each is a tenth of a percent of the model's size as printed there. That looks like
#   where they come from; the paper does not say.
# - **DeBERTa-XXL.** 4.7 M needs *r* = 16. The appendix says 8, the authors' own training scripts 16: the
#   scripts agree with the count.
# - **Appendix D.4** offers *r* = 2 on all four attention matrices as a way to spend 37.7 M. That is 18.9 M; the
#   paper's own table 5 has it too, cut to 18 M.
# - **35 MB and 10 000-fold.** The adapter of GPT-3 at *r* = 4 has 18 874 368 numbers: 37.7 MB in half
#   precision, or 36.0 MiB. 350 GB is 9 272 times as much. The paper says 'roughly', and it is.
#
# None of this touches a result. But a count can be checked in a minute, and the habit pays: a count that does
# not come out often means that something else was adapted than you think.

# %% [markdown]
# ### Real shapes are not always square
#
# Two things make real counts differ from 2*dr* a matrix. GPT-2 keeps *W_q*, *W_k* and *W_v* in **one fused
# matrix**, `c_attn`. And newer models have **fewer keys and values than queries** ('grouped queries'), so
# *W_k* and *W_v* are short.
#
# **Predict before you run.** LoRA on the fused matrix of GPT-2 (768 × 2304): does it take as many numbers as
# on the three parts, more, or fewer?

# %%
print(counting.count("GPT-2", "c_attn", rank=8), end="\n\n")
print(counting.count("GPT-2", ("query", "key", "value"), rank=8), end="\n\n")
print(counting.count("Qwen2.5-7B", "attention", rank=8))
fused, apart = (
    counting.count("GPT-2", names, 8).parameters for names in ("c_attn", ("query", "key", "value"))
)
assert fused / apart == 2 / 3

# %% [markdown]
# **Why.** Fused: *r*(768 + 2304) = 3072 *r*. Apart: 3 · *r*(768 + 768) = 4608 *r*. The fused adapter has
# *one* *A*: the updates of *W_q*, *W_k* and *W_v* read the same *r* directions of the input. That is a real
# restriction, not only a saving. (PEFT adapts the module as it is, hence fused; loralib's `MergedLinear`
# keeps the parts apart.) 'LoRA on attention at *r* = 8' is therefore not yet a full description.
#
# Now choose matrices in five real models. On the left what each kind costs, in blue what you chose; on the
# right the memory of a training step, which the rest of the chapter is about.

# %%
explore.which_matrices()

# %% [markdown]
# ## FLOPs: how much work is saved?
#
# LoRA on *W_q* and *W_v* at *r* = 8 trains 0.24 % of GPT-2. **Predict before you run.** How much of the *work* of a
# training step does it save: almost all, two thirds, one third, or nothing?
#
# Here is LoRA for a linear layer, written out. *B* starts at zero, so that the layer begins as it was
# (chapter 05 asks why).


# %%
class LoRA(nn.Module):
    """y = W x + b + s · B (A x); W and b are frozen."""

    def __init__(self, layer, rank, alpha=16):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        inputs, outputs = sides(layer)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def sides(layer):
    """(in, out) of a layer; nn.Linear stores its weight as (out, in), GPT-2's Conv1D as (in, out)."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, nn.Linear) else (first, second)


# %% [markdown]
# PyTorch can count the FLOPs of what really runs (a multiplication and an addition are two). One layer of 768
# × 768, 100 inputs:


# %%
def flops(layer, x):
    """FLOPs of (forward, backward) as PyTorch counts them."""
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


x = torch.randn(100, 768, requires_grad=True)  # its gradient is wanted: there are layers below
full, lora = flops(nn.Linear(768, 768), x), flops(LoRA(nn.Linear(768, 768), rank=8), x)
print(f"full tuning: forward {full[0]:>11}, backward {full[1]:>11}")
print(f"LoRA, r = 8: forward {lora[0]:>11}, backward {lora[1]:>11}")
print(f"a step of LoRA is {sum(lora) / sum(full):.1%} of the work")
assert f"{counting.count('GPT-2').share:.2%} {counting.share(768, 768, 8):.1%}" == "0.24% 2.1%"


# %% [markdown]
# Now the same on paper. **Forward**, *W* takes 2 · *io* and LoRA adds 2 · *r*(*i* + *o*). **Backward**, full
# tuning needs two products: the gradient of the input (2 *io*, for the layers below) and that of *W* (2
# *io*). LoRA needs the first one too, since the gradient still has to pass through *W*; it saves the second,
# and adds 4 · *r*(*i* + *o*) for *A* and *B*.

# %%
io, both = 768 * 768, 8 * (768 + 768)
assert full == (100 * 2 * io, 100 * 4 * io)
assert lora == (100 * (2 * io + 2 * both), 100 * (2 * io + 4 * both))
assert lora == (100 * counting.forward_flops(768, 768, 8), 100 * counting.backward_flops(768, 768, 8))
gpt3 = [counting.training_flops("GPT-3 175B", *way, sequence=512).total for way in (("full",), ("lora", 8))]
print(f"GPT-3, 512 tokens: full {gpt3[0]:.3g}, LoRA {gpt3[1]:.3g} FLOPs, {gpt3[1] / gpt3[0]:.1%}")
assert 0.66 < gpt3[1] / gpt3[0] < 0.68

# %% [markdown]
# **Why only a third?** In units of *io* a step of full tuning is six: two forward, two for the gradient of
# the input, two for that of *W*. LoRA leaves out the last two. It trains 2.1 % of this layer's numbers, and a
# far smaller share of a wide model's, but the signal has to travel through all of *W* in both directions. So
# by saving work LoRA makes a step at most 1.5 times as fast. The paper reports 25 % more speed on GPT-3
# (§4.2), within that bound. Where LoRA is faster than the bound, memory is the reason: no swapping, larger
# batches, fewer machines.

# %% [markdown]
# ## Memory, on paper
#
# A training step must hold four things at once:
#
# | | full tuning | LoRA |
# | --- | --- | --- |
# | **weights** | all | all, and *A* and *B* |
# | **gradients** | one for each weight | one for each number in *A* and *B* |
# | **optimiser** | Adam: two for each weight | two for each number in *A* and *B* |
# | **activations** | what the backward pass will need | nearly the same |
#
# The last row is the one that people forget. Autograd keeps the input of a matrix only if that matrix is
# trained, and there LoRA saves. But it also keeps the inputs of norms and of the nonlinearity, *q*, *k*, *v*
# and the result of attention, and the softmax over the vocabulary. These it needs to send the gradient
# through, whatever is trained.
#
# **Predict before you run.** TinyLM as it is built here, with four layers and 2.5 million numbers (the base model of
# the other chapters has six layers and 2.7 million); 16 texts of 256 tokens, float32, AdamW. Full tuning against
# LoRA at *r*
# = 8 on *W_q* and *W_v*: how much memory does LoRA save? And which of the four is the largest?


# %%
def table(ways):
    """Memory of each way in MB, a row a way."""
    print(f"{'MB':<22}" + "".join(f"{name:>12}" for name in (*counting.Memory._fields, "total")))
    for name, memory in ways.items():
        print(f"{name:<22}" + "".join(f"{part / 1e6:>12.1f}" for part in (*memory, memory.total)))


STEP = {"batch": 16, "sequence": 256}
tiny = {
    "TinyLM, full": counting.training_memory("TinyLM", "full", **STEP),
    "TinyLM, LoRA": counting.training_memory("TinyLM", "lora", 8, ("query", "value"), **STEP),
}
table(tiny)

# %%
softmax = 16 * 256 * 10_000 * 4
saved = tiny["TinyLM, full"].total - tiny["TinyLM, LoRA"].total
print(f"LoRA saves {saved / tiny['TinyLM, full'].total:.0%}; the softmax alone takes {softmax / 1e6:.0f} MB")
for name, number in counting.saved_numbers("TinyLM").items():
    print(f"{name:<28}{number:>6} numbers a token")
assert 0.2 < saved / tiny["TinyLM, full"].total < 0.22 and round(softmax / 1e6) == 164

# %% [markdown]
# A fifth, and not the two thirds that the paper speaks of. Gradients and Adam's state do shrink, from 30 MB
# to 0.2 MB. But they never were the problem: TinyLM is a small model with a large vocabulary, and 10 000
# numbers for each of 4 096 tokens, 164 MB, outweigh everything else. **The logits hide what LoRA saves.**
#
# ## Memory, measured
#
# Is that what a live model holds? Weights, gradients and Adam's state can be added up tensor by tensor. For
# activations, PyTorch has a hook that sees each tensor that autograd keeps: we add up their storages, each
# once, and leave out those that are weights.


# %%
def adam_state(trained):
    """Every tensor that AdamW keeps after a step."""
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    return [value for entry in optimiser.state.values() for value in entry.values()]


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# %%
def measure(model, tokens):
    """Bytes that one training step of a model on these tokens holds, read off the live tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), tokens]}
    kept = {}

    def see(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        logits = getattr(output := model(tokens), "logits", output)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    activations = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = model.parameters(), (parameter.grad for parameter in trained), adam_state(trained)
    return counting.Memory(*map(nbytes, parts), activations)


# %%
def adapt(model, suffixes, rank=8):
    """Freeze the model and put LoRA on each layer whose name ends so."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.endswith(suffixes):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRA(layer, rank))
    return model


# %% [markdown]
# The first three must agree to the byte. For the activations we allow 10 %: now and then a kernel keeps a
# copy more or less. Temporaries that live for a moment, such as the logits beside their softmax, are in
# neither column.

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
tokens = torch.randint(10_000, (16, 256))
live = {
    "TinyLM, full": measure(TinyLM(), tokens),
    "TinyLM, LoRA": measure(adapt(TinyLM(), ("query", "value")), tokens),
}
table(live)
for name, memory in live.items():
    assert memory[:3] == tiny[name][:3]  # weights, gradients, Adam's state: to the byte
    assert abs(memory.activations / tiny[name].activations - 1) < 0.10
    print(f"{name}: activations {memory.activations / tiny[name].activations:.3f} times the prediction")

# %% [markdown]
# To the byte, down to Adam's step counters (4 bytes for each trained tensor). The dozen lines of LoRA above
# are nothing special: the package's own layers hold the same.

# %% tags=["nbval-ignore-output"]
from lora_edu.lora import add_lora

packaged = measure(add_lora(TinyLM(), rank=8, alpha=16, targets=["query", "value"]), tokens)
print(f"add_lora: {packaged.gradients} bytes of gradients, {packaged.optimiser} of Adam's state")
assert packaged[:3] == tiny["TinyLM, LoRA"][:3]
assert abs(packaged.activations / tiny["TinyLM, LoRA"].activations - 1) < 0.10

# %% [markdown]
# ## Where the saving shows
#
# GPT-2 is fifty times as large as this TinyLM, with a vocabulary only five times TinyLM's. **Predict before you
# run.** Two
# texts of 64 tokens, LoRA at *r* = 8 on `c_attn`, everything else as before: how much does LoRA save now?

# %%
STEP = {"batch": 2, "sequence": 64}
paper = {
    "GPT-2, full": counting.training_memory("GPT-2", "full", **STEP),
    "GPT-2, LoRA": counting.training_memory("GPT-2", "lora", 8, ("c_attn",), **STEP),
}
table(paper)
saved = 1 - paper["GPT-2, LoRA"].total / paper["GPT-2, full"].total
print(f"LoRA saves {saved:.0%}")
assert 0.70 < saved < 0.71
assert round(counting.ARCHITECTURES["GPT-2"].parameters / counting.ARCHITECTURES["TinyLM"].parameters) == 50

# %% [markdown]
# 70 %: of 2.15 GB, one and a half were gradients and Adam's state. Again on a live model, of GPT-2's size and
# with random weights, built from its config. (Without `transformers`, which the extra `course` brings, the
# cell says so and leaves the prediction unchecked.) Dropout is off: each mask would be one more tensor to
# keep.

# %% tags=["nbval-ignore-output"]
try:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False)
    gpt2, tokens = GPT2LMHeadModel(config), torch.randint(50_257, (2, 64))
    live = {"GPT-2, full": measure(gpt2, tokens)}
    gpt2.zero_grad()
    live["GPT-2, LoRA"] = measure(adapt(gpt2, ("c_attn",)), tokens)
    table(live)
    for name, memory in live.items():
        assert memory[:3] == paper[name][:3]
        assert abs(memory.activations / paper[name].activations - 1) < 0.10
    del gpt2
except ImportError:
    print(
        "transformers is not installed (pip install 'lora-edu[course]'): the prediction stays unchecked here"
    )

# %% [markdown]
# The picture of both models. Grey stays, red and orange are what LoRA takes away, blue it hardly touches.


# %%
def megabytes(ways):
    """name of the bar → part → MB; the names without the model's."""
    return {
        name.split(", ")[1]: {part: n / 1e6 for part, n in way._asdict().items()}
        for name, way in ways.items()
    }


panels = {
    "TinyLM, 16 × 256 tokens: 21 % less": megabytes(tiny),
    "GPT-2, 2 × 64 tokens: 70 % less": megabytes(paper),
}
sentence = (
    "Memory of a training step: LoRA saves a fifth on TinyLM, where activations dominate, and 70 % on GPT-2."
)
less = [1 - lora.activations / full.activations for full, lora in (tiny.values(), paper.values())]
assert f"{less[0]:.0%} {less[1]:.0%}" == "13% 15%"
plots.show(plots.stacked_panels(panels, "MB"), sentence)

# %% [markdown]
# **What follows.** LoRA does not shrink the weights, and the activations by little: 13 % and 15 % here. What
# it removes is gradients and optimiser state, with Adam three times the weights. So it helps most where the
# model is large and the batch small; and once it has helped, the weights themselves are what is left. That is
# where a packed base comes in (QLoRA: Dettmers et al. 2023).

# %%
STEP = {"batch": 1, "sequence": 512, "dtype": "bfloat16"}
targets = ("query", "value")
packed = STEP | {"dtype": "int4"}
ways = {
    "Llama-3-8B, full": counting.training_memory("Llama-3-8B", "full", **STEP),
    "Llama-3-8B, LoRA": counting.training_memory("Llama-3-8B", "lora", 8, targets, **STEP),
    "…, 4-bit base": counting.training_memory("Llama-3-8B", "lora", 8, targets, **packed),
}
table(ways)
gpt3 = counting.ARCHITECTURES["GPT-3 175B"].parameters * 2 / 1e9
print(f"GPT-3 in 16 bits: weights {gpt3:.0f} GB; with gradients and Adam's two states {4 * gpt3:.0f} GB")
assert round(gpt3) == 349 and round(4 * gpt3) == 1397

# %% [markdown]
# For GPT-3 the paper says that memory falls from 1.2 TB to 350 GB (§4.2). The 350 GB are the weights alone,
# in 16 bits: everything else has become small beside them. The 1.2 TB we cannot reproduce: four numbers of 16
# bits for each weight make 1.4 TB, and how the 1.2 TB divide is not said.

# %% [markdown]
# ## Your own numbers
#
# Any shape, rank, dtype and optimiser. This one asks Python at each change; everything above was drawn ahead.

# %%
explore.calculator()

# %% [markdown]
# On the command line, `lora-edu count` says the same of a whole model:

# %%
print(counting.report("Llama-3-8B", ("attention", "mlp"), rank=16))

# %% [markdown]
# ## What to remember
#
# - *A* and *B* hold ***r*(*i* + *o*)** numbers; the matrix has *io*. They break even at ***r* = *io* / (*i* +
#   *o*)**: half the width of a square matrix, almost the short side of a long one.
# - 10 000 × 100 at *r* = 8: 80 800 numbers, 8.08 %, because 100 is narrow. A table's *share* tends to
#   *r*/*d*, half of a square matrix's 2*r*/*d*; its *number* *r*(*V* + *d*) is the largest of all single
#   adapters.
# - '*r* = 8 on attention' is not yet a count: fused matrices, grouped queries and tied heads change it.
# - LoRA saves the gradient of *W*, **one third of the FLOPs** of a step, not more.
# - LoRA saves gradients and optimiser state. Weights stay, activations nearly. Large model, small batch: it
#   saves most of the memory. Small model, large vocabulary: a fifth.
# - Check counts in print. It takes a minute, and twelve of these 26 did not come out as printed.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of `None` and run the cell. The check says what is wrong with it, not only that it
# is wrong.

# %% [markdown] tags=["exercise"]
# **1.** *W_k* of Llama-3-8B is 1024 × 4096 (eight key heads of width 128 read an input of width 4096). What
# is its break-even rank?

# %% tags=["exercise"]
answer = None  # a number
print(exercises.check_04_1(answer))

# %% tags=["solution"]
answer = 1024 * 4096 / (1024 + 4096)
print(exercises.check_04_1(answer))

# %% [markdown] tags=["exercise"]
# **2.** GPT-3 (96 layers, *W_q* and *W_v* of 12 288 × 12 288) with LoRA at *r* = 4. How many **bytes** does
# the adapter take in half precision?

# %% tags=["exercise"]
answer = None  # bytes
print(exercises.check_04_2(answer))

# %% tags=["solution"]
layers, matrices, d, r, bytes_each = 96, 2, 12_288, 4, 2
answer = layers * matrices * r * (d + d) * bytes_each
print(exercises.check_04_2(answer))

# %% [markdown] tags=["exercise"]
# **3.** GPT-2 XL has 48 layers of width 1600 and keeps queries, keys and values in one fused matrix,
# `c_attn`. How many numbers does LoRA at *r* = 8 on `c_attn` train, in all layers?

# %% tags=["exercise"]
answer = None  # a number
print(exercises.check_04_3(answer))

# %% tags=["solution"]
answer = 48 * 8 * (1600 + 4800)
print(exercises.check_04_3(answer))

# %% [markdown] tags=["exercise"]
# **4.** GPT-2 (124 439 808 parameters), float32, AdamW, LoRA at *r* = 8 on `c_attn` (12 layers, 768 × 2304),
# two texts of 64 tokens. How many bytes does a training step hold? Add the parts up yourself; for the
# activations you may take `sum(counting.saved_numbers("GPT-2", "lora", 8, "c_attn").values())` numbers a
# token.

# %% tags=["exercise"]
answer = None  # bytes
print(exercises.check_04_4(answer))

# %% tags=["solution"]
adapter = 12 * 8 * (768 + 2304)
activations = 2 * 64 * sum(counting.saved_numbers("GPT-2", "lora", 8, "c_attn").values())
answer = 4 * (124_439_808 + adapter + adapter + 2 * adapter + activations)
print(exercises.check_04_4(answer))

# %% [markdown] tags=["solution"]
# Weights of the model and of the adapter, the adapter's gradients, two of Adam's numbers for each, and the
# activations. (Adam's 24 step counters, 96 bytes, are missing; nobody will miss them.)

# %% [markdown] tags=["exercise"]
# **5.** Your adapter for Llama-3-8B may take 10 MB (10 000 000 bytes) in bfloat16. You adapt *W_q* and *W_v*
# in all 32 layers; the width is 4096, with 32 heads of width 128 for the queries and 8 for keys and values.
# What is the largest *r*?

# %% tags=["exercise"]
answer = None  # a rank
print(exercises.check_04_5(answer))

# %% tags=["solution"]
bytes_at_rank_1 = 2 * 32 * ((4096 + 4096) + (8 * 128 + 4096))
answer = 10_000_000 // bytes_at_rank_1
print(exercises.check_04_5(answer))

# %% [markdown] tags=["exercise"]
# **6.** Write `rank_for_budget(rows, columns, budget)`: the largest useful rank whose *A* and *B* hold at
# most `budget` numbers.

# %% tags=["exercise"]
rank_for_budget = None  # def rank_for_budget(rows, columns, budget): ...
print(exercises.check_04_6(rank_for_budget))


# %% tags=["solution"]
def rank_for_budget(rows, columns, budget):
    return min(budget // (rows + columns), rows, columns)


print(exercises.check_04_6(rank_for_budget))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685): §4.1 for *r* ≪
#   min(*d*, *k*), §4.2 for memory, §5.1 for the count |Θ| = 2 · L · d · r, tables 2 to 5 and appendix D for
#   what is recomputed here.
# - Rajbhandari et al. 2020, *ZeRO* (arXiv 1910.02054), §3: where the memory of a training step goes, in mixed
#   precision.
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models* (arXiv
#   2205.05198), §4: the activations of a transformer layer counted term by term.
# - Next here: chapter 05, LoRA for a linear layer; chapter 03, whether a small *r* suffices.
