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
# Nothing here is trained. It is arithmetic, but it decides whether a model fits into your machine. Near the
# end a model from `transformers` is built, with random weights and no download. Everything else needs only
# PyTorch.

# %% tags=["setup"]
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_edu import counting, explore, plots
from lora_edu.exercises import chapter_04 as exercises
from lora_edu.tinylm import TinyLM

# %% [markdown]
# ## How many numbers?
#
# Our base model has a table $W$ of 10 000 tokens × 100 numbers. LoRA leaves $W$ as it is and adds the product
# of two thin matrices, $s B A$: $A$ has only $r$ rows, $B$ only $r$ columns. (Here $B A$ is 100 × 10 000 and is
# added transposed, because the table has a token a row; chapter 06. For the count it makes no difference.)

# %%
explore.predict(
    "At r = 8, A and B together hold how much of the million numbers in W?",
    {
        "half a percent": "A share of this size is usual in large models. Their matrices are wider than ours, and that "
        "is the reason: look at what the 100 does in the next cell.",
        "eight percent": "Yes. A has 8 rows of 10 000 numbers and B has 100 rows of 8. Nearly all of it is A.",
        "sixteen percent": "That is what a square matrix of width 100 would have. This one has a long side, and the "
        "long side makes the share smaller; the next cell counts.",
    },
)

# %%
i, o, r = 10_000, 100, 8
A, B = torch.empty(r, i), torch.empty(o, r)
trained = A.numel() + B.numel()
print(f"A {tuple(A.shape)}, B {tuple(B.shape)}: {trained} numbers, {trained / (i * o):.2%} of {i * o}")
assert trained == 80_800

# %% [markdown]
# **Why.** $A$ has $r$ rows of $i$ numbers and $B$ has $o$ rows of $r$. The matrix has $i \cdot o$ numbers.
#
# $$\text{numbers in } A \text{ and } B = r\,(i + o)$$
#
# A sum against a product: the larger the matrix, the smaller the share. And the count is proportional to $r$:
# double the rank, double the numbers.
#
# `lora_edu.counting` has the same formula. It is plain Python without PyTorch, so it also runs where nothing
# else does.

# %%
print(counting.lora_parameters(10_000, 100, rank=8), f"{counting.share(10_000, 100, rank=8):.2%}")
assert counting.lora_parameters(i, o, r) == trained
assert counting.share(i, o, r) == trained / (i * o)

# %% [markdown]
# ## From which rank on does it save nothing?
#
# At $r = 100$ the product $B A$ can be any 10 000 × 100 matrix at all. Somewhere on the way there, $A$ and $B$
# begin to hold more numbers than $W$ itself.

# %%
explore.predict(
    "Where do A and B of a 10 000 × 100 matrix hold as many numbers as W?",
    {
        "near r = 50": "Half the width is right for a square matrix. Here one rank costs one row of 10 000 and one "
        "column of 100, hardly more than a column of W. Compare the first two lines of the next cell.",
        "near r = 100": "Yes, just below it. One rank costs 10 100 numbers, and a column of W has 10 000 of them.",
        "never": "A and B look thin, but each rank adds 10 100 numbers, and W has only a million.",
    },
)

# %%
for rows, columns in [(10_000, 100), (100, 100), (4096, 4096), (1600, 4800)]:
    first = next(r for r in range(1, min(rows, columns) + 1) if r * (rows + columns) >= rows * columns)
    even = counting.break_even_rank(rows, columns)
    print(f"{rows:>6} × {columns:<5} first r without saving: {first:>5}    io / (i + o) = {even:.2f}")
    assert first - 1 < even <= first
    assert min(rows, columns) / 2 <= even < min(rows, columns)

# %% [markdown]
# **Why.** Setting $r\,(i + o) = i\,o$ gives the **break-even rank**
#
# $$r = \frac{i\,o}{i + o}$$
#
# Each rank costs one row and one column, $i + o$ numbers. A $d \times d$ matrix has $d$ columns, and a rank
# costs as much as two of them, so $d/2$ ranks use them up. In our table a rank costs 10 100 numbers, hardly more
# than the 10 000 of one column of $W$: 99 ranks fit into the million, 100 do not. The break-even rank is at least
# half the short side and always below the short side.
#
# Move the sliders. The blue area is what LoRA trains, the grey one what is there.

# %%
explore.rank_and_shape()

# %% [markdown]
# ### So why must r be much smaller than both sides?
#
# The paper asks for $r \ll \min(d, k)$ (§4.1). There are three reasons. Two of them are counting, the third is
# not.
#
# 1. **It must save something.** Above $i\,o / (i + o)$ it costs more than tuning $W$ itself. To cost a tenth,
#    $r$ must be a tenth of that.
# 2. **It must restrict something.** At $r = \min(i, o)$ the product can be any matrix: LoRA can then reach
#    everything that full tuning can, written down in a more expensive way. Of the $r\,(i + o)$ numbers, $r^2$
#    are spent on nothing, because $(B M)(M^{-1} A)$ is the same product for every invertible $r \times r$ matrix
#    $M$ (chapter 01).
# 3. **It must suffice.** Whether the change that a task needs fits into a small $r$ cannot be counted. Chapters
#    03 and 07 measure it.

# %%
free = {r: r * (i + o) - r**2 for r in (1, 8, 50, 100)}
for r, number in free.items():
    print(
        f"r = {r:>3}: {r * (i + o):>8} numbers, {number:>8} of them free: {number / (i * o):>6.1%} of a million"
    )
assert free[100] == i * o

# %% [markdown]
# At $r = 100$ exactly a million are free, as many as $W$ has. The other 10 000 are the price of writing it as a
# product.
#
# ## The embedding: a small share, a large number
#
# 8.08 % sounds like a lot. On RoBERTa base the paper trains 0.3 of 125 million numbers, a quarter of a percent.
# Is the embedding an expensive place for LoRA?

# %%
explore.predict(
    "A table V × d and a square d × d matrix, both at the same r, with V larger than d. Which adapter is the larger "
    "share of its matrix, and which has more numbers?",
    {
        "the table, in both": "More numbers, yes: A has a column for each token. But the table itself grows with V, too. "
        "Look at the column of shares.",
        "the table has the larger share, the square more numbers": "It is the other way round. A grows with V, "
        "and so does the table that it is divided by.",
        "the square has the larger share, the table more numbers": "Yes. The table's share is r/d + r/V, that of a "
        "square 2r/d; but the table's number r (V + d) grows with V.",
    },
)

# %%
print(f"{'V':>8} {'d':>6}   {'table: share':>12} {'number':>10}   {'square: share':>13} {'number':>8}")
for V, d in [(10_000, 100), (50_257, 768), (128_256, 4096), (256_000, 3072)]:
    table, square = counting.share(V, d, 8), counting.share(d, d, 8)
    numbers = counting.lora_parameters(V, d, 8), counting.lora_parameters(d, d, 8)
    print(f"{V:>8} {d:>6}   {table:>12.2%} {numbers[0]:>10}   {square:>13.2%} {numbers[1]:>8}")
    assert 8 / d < table < square and numbers[0] > numbers[1]

# %% [markdown]
# **Why.** The table's share is
#
# $$\frac{r\,(V + d)}{V d} = \frac{r}{d} + \frac{r}{V}$$
#
# For a large vocabulary the second term is small, so the share tends to $r/d$. A square matrix has $2r/d$. So,
# wherever $V > d$, the embedding's share is the *smaller* one, and our 8.08 % says only that $d = 100$ is narrow:
# with Llama-3's 128 256 × 4096 it is 0.20 %, and a square matrix of that width has 0.39 %.
#
# The *number* is another matter: $r\,(V + d)$ against $2 r d$. It grows with the vocabulary.

# %%
explore.table_and_square()

# %%
for model in counting.ARCHITECTURES.values():
    embedding = counting.count(model, "embedding", rank=1).parameters
    every = [row for row in counting.count(model, "all", rank=1).rows if row.role != "embedding"]
    larger = [row.role for row in every if row.parameters / row.copies >= embedding]
    assert larger in ([], ["head"]), model.name
llama = {name: counting.count("Llama-3-8B", name, 8).parameters for name in ("embedding", "query", "linear")}
print("the largest adapter of a single matrix: the embedding's, or the head's too")
print("Llama-3-8B at r = 8:", ", ".join(f"{name} {counting.spaced(n)}" for name, n in llama.items()))
assert 16 < llama["embedding"] / counting.lora_parameters(4096, 4096, 8) < 17
assert 19.5 < llama["linear"] / llama["embedding"] < 20

# %% [markdown]
# In every model whose shapes the package knows, no single matrix costs more than the embedding. Only the head,
# which has the same shape, costs as much. In Llama-3-8B the embedding's adapter costs as much as that of $W_q$ in
# sixteen layers. What follows for **which matrices to adapt**:
#
# - Not 'never the embedding': it is one matrix, and Llama-3-8B has 224 linear layers in its blocks. Together, at
#   the same $r$, they take almost twenty times the embedding's number.
# - But nearly all of these numbers belong to single tokens. Column $t$ of $A$ is read and trained only when token
#   $t$ is in the batch, and a tuning text uses a part of the vocabulary. Chapter 06 counts which rows move.
# - Counting says what a place costs, not what it is worth. Chapter 07 compares places at about the same number of
#   trained numbers, on our model and our task. The paper itself puts LoRA on attention matrices only (§4.2).

# %% [markdown]
# ## The counts in print
#
# With the shapes of real models we can recompute the published counts. The paper adapts $W_q$ and $W_v$ of each
# layer, all $d \times d$. With $L$ layers that makes $2 \cdot L \cdot 2 d r$ numbers.

# %%
explore.predict(
    "GPT-3 has 96 layers of width 12 288. How many numbers has LoRA on W_q and W_v at r = 1?",
    {
        "about forty thousand": "That is less than one layer: a single adapted matrix takes 24 576, and each layer has "
        "two.",
        "about five million": "Yes: 2 matrices × 96 layers × 24 576. The paper prints 4.7 M.",
        "about two hundred million": "At r = 1 one adapted matrix takes 24 576 numbers, and there are 192 of them. "
        "Multiply these two.",
    },
)

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
# The paper prints 0.3 M, 0.8 M and 4.7 M. What about everything else that we found in print? Here is each figure:
# our count as a multiple of the printed one. It is blue where ours, rounded to the printed digits, is the printed
# one.

# %%
published = counting.published_counts()


def number(text):
    """4.7 of '4.7 M', 10000 of '10 000-fold'."""
    return float("".join(sign for sign in text if sign.isdigit() or sign == "."))


ratios = [number(row.ours) / number(row.printed) for row in published]
figure, axes = plots.subplots(size=(7.2, 5.6))
names = [f"{row.source.replace('LoRA paper', 'paper')}: {row.what}" for row in published]
with plots.style():
    for line, (ratio, row) in enumerate(zip(ratios, published, strict=True)):
        colour = plots.BLUE if row.reproduced else plots.VERMILION
        axes.plot([1, ratio], [line, line], color=colour)
        axes.plot(ratio, line, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set(
        xlabel="our count, as a multiple of the printed figure", xlim=(0, 1.5), ylim=(len(names) - 0.5, -0.5)
    )
    axes.axvline(1, color=plots.GREY, linewidth=1)
reproduced = sum(row.reproduced for row in published)
sentence = f"{reproduced} of {len(published)} printed figures come out; the others lie between {min(ratios):.2f} and "
plots.show(figure, sentence + f"{max(ratios):.2f} times what is printed.")

# %% [markdown]
# The figures themselves, and what we know about those that do not come out:

# %%
import textwrap

print(f"{'printed':>11}{'counted':>13}")
for name, row in zip(names, published, strict=True):
    print(f"{row.printed:>11}{row.ours:>13} {'=' if row.reproduced else '≠'} {name}")
    if not row.reproduced:
        print(textwrap.fill(row.note, 74, initial_indent=27 * " ", subsequent_indent=27 * " "))

# %%
GPT2 = counting.ARCHITECTURES["GPT-2 M"], counting.ARCHITECTURES["GPT-2 L"]
for model, printed in zip(GPT2, (0.35, 0.77), strict=True):
    counts = {r: counting.count(model, ("query", "value"), r).parameters / 1e6 for r in range(1, 17)}
    fits = [r for r, millions in counts.items() if round(millions, 2) == printed]
    print(f"{model.name}: {counts[4]:.2f} M at r = 4, printed {printed} M; ranks that would give it: {fits}")
    assert not fits
budget = counting.count("GPT-3 175B", ("query", "value"), 4).parameters
assert budget == counting.count("GPT-3 175B", "query", 8).parameters
assert budget == counting.count("GPT-3 175B", "attention", 2).parameters
print(f"GPT-3 at r = 4: {budget} numbers, {2 * budget / 1e6:.1f} MB or {2 * budget / 2**20:.1f} MiB")
print(f"350 GB is {350e9 / (2 * budget):.0f} times as much")
assert reproduced == 14 and len(published) == 26

# %% [markdown]
# Fourteen of the 26 come out. The other twelve are instructive.
#
# - **GPT-2 M and L.** At the stated $r = 4$ the counts are 0.39 M and 0.74 M. Printed are 0.35 M and 0.77 M, and
#   no rank gives either. The same two figures stand in the prefix-tuning rows of that table, and each is a tenth of
#   a percent of the model's size as printed there. That looks like where they come from; the paper does not say.
# - **DeBERTa-XXL.** 4.7 M needs $r = 16$. The appendix says 8, the authors' own training scripts 16: the scripts
#   agree with the count.
# - **Appendix D.4** offers $r = 2$ on all four attention matrices as a way to spend 37.7 M. That is 18.9 M; the
#   paper's own table 5 has it too, cut to 18 M.
# - **35 MB and 10 000-fold.** The adapter of GPT-3 at $r = 4$ has 18 874 368 numbers: 37.7 MB in half precision, or
#   36.0 MiB. 350 GB is 9 272 times as much. The paper says 'roughly', and it is.
#
# None of this touches a result. But a count can be checked in a minute, and a count that does not come out often
# means that something else was adapted than you think.

# %% [markdown]
# ### Real shapes are not always square
#
# Two things make real counts differ from $2 d r$ a matrix. GPT-2 keeps $W_q$, $W_k$ and $W_v$ in **one fused
# matrix**, `c_attn`. And newer models have **fewer keys and values than queries** ('grouped queries'), so $W_k$ and
# $W_v$ are short.

# %%
explore.predict(
    "LoRA at r = 8 on the fused matrix of GPT-2 (768 × 2304): how many numbers, compared with LoRA on its three parts?",
    {
        "fewer": "Yes, two thirds. One A of r × 768 serves all three parts; apart, each part has an A of its own.",
        "the same": "W itself has as many numbers either way. But the three parts have three A's, the fused matrix "
        "has one. The next cell counts both.",
        "more": "The fused matrix is larger, and so is its B. But B has as many rows as the three B's together, and "
        "there is only one A.",
    },
)

# %%
fused, apart = (
    counting.count("GPT-2", names, 8).parameters for names in ("c_attn", ("query", "key", "value"))
)
print(f"GPT-2 at r = 8: fused {counting.spaced(fused)}, apart {counting.spaced(apart)}", end="\n\n")
print(counting.count("Qwen2.5-7B", "attention", rank=8))
assert fused / apart == 2 / 3

# %% [markdown]
# **Why.** Fused: $r\,(768 + 2304) = 3072\,r$ in each layer. Apart: $3 \cdot r\,(768 + 768) = 4608\,r$. The fused
# adapter has *one* $A$: the updates of $W_q$, $W_k$ and $W_v$ read the same $r$ directions of the input. That is a
# real restriction, not only a saving. (PEFT adapts the module as it is, hence fused; loralib's `MergedLinear` keeps
# the parts apart.) 'LoRA on attention at $r = 8$' is therefore not yet a full description. In Qwen2.5-7B, printed below it,
# $W_k$ and $W_v$ have 512 rows and not 3584.
#
# Now choose matrices in five real models. On the left you see what each kind costs, in blue what you chose; on the
# right the memory of a training step, which the rest of the chapter is about.

# %%
explore.which_matrices()

# %% [markdown]
# ## FLOPs: how much work is saved?
#
# Here is LoRA for a linear layer, written out. $B$ starts at zero, so that the layer begins as it was (chapter 05
# asks why).


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


# %%
explore.predict(
    "LoRA on W_q and W_v at r = 8 trains 0.24 % of GPT-2. How much of the work of a training step does it save?",
    {
        "almost all": "So it would be if work were only the updating of trained numbers. But the signal has to go "
        "forward through all of W, and the gradient back through it. Count these two in the picture below.",
        "two thirds": "Count the products of a step: one forward, one back to the input, one for the gradient of W. "
        "LoRA leaves out only one of the three.",
        "one third": "Yes, at most: of three products as large as W, LoRA leaves out the gradient of W.",
        "nothing": "The forward pass is even a little dearer, that is true. But nobody computes the gradient of W.",
    },
)

# %% [markdown]
# PyTorch can count the FLOPs of what really runs (a multiplication and an addition are two). One layer of 768 ×
# 768, 100 inputs:


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


# %% [markdown]
# Now the same on paper. **Forward**, $W$ takes $2\,i\,o$ and LoRA adds $2\,r\,(i + o)$. **Backward**, full tuning
# needs two products: the gradient of the input ($2\,i\,o$, for the layers below) and that of $W$ ($2\,i\,o$). LoRA
# needs the first one too, since the gradient still has to pass through $W$. It saves the second, and adds
# $4\,r\,(i + o)$ for $A$ and $B$.

# %%
io, both = 768 * 768, 8 * (768 + 768)
assert full == (100 * 2 * io, 100 * 4 * io)
assert lora == (100 * (2 * io + 2 * both), 100 * (2 * io + 4 * both))
assert lora == (100 * counting.forward_flops(768, 768, 8), 100 * counting.backward_flops(768, 768, 8))
parts = {
    "forward through W": [2, 2],
    "gradient of the input": [2, 2],
    "gradient of W": [2, 0],
    "A and B": [0, 6 * both / io],
}
figure, axes = plots.subplots(size=(7.2, 2.1))
plots.stacked_bars(axes, ["full tuning", "LoRA, r = 8"], parts, "FLOPs of a step, in units of io a token")
figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside lower center")
plots.show(
    figure,
    "Work of a step in a 768 × 768 layer: LoRA leaves out one of three products and adds 2 % for A and B.",
)

# %%
gpt3 = [counting.training_flops("GPT-3 175B", *way, sequence=512).total for way in (("full",), ("lora", 8))]
print(f"GPT-3, 512 tokens: full tuning {gpt3[0]:.3g} FLOPs")
print(f"LoRA on W_q and W_v    {gpt3[1]:>16.3g} FLOPs, {gpt3[1] / gpt3[0]:.1%}")
assert 0.66 < gpt3[1] / gpt3[0] < 0.68

# %% [markdown]
# **Why only a third?** LoRA at $r = 8$ trains 2.1 % of this layer's numbers, and a far smaller share of a wide
# model's, but the signal has to travel through all of $W$ in both directions. So, with adapters from the lowest
# layer on, saving work makes a step at most 1.5 times as fast. (If only the upper layers are adapted, the backward
# pass stops at the lowest adapter, and more is saved.) The paper reports 25 % more speed on GPT-3 (§4.2), within
# that bound. Where LoRA is faster than the bound, memory can be the reason: no swapping, larger batches, fewer
# machines.

# %% [markdown]
# ## Memory, on paper
#
# A training step must hold four things at once:
#
# | | full tuning | LoRA |
# | --- | --- | --- |
# | **weights** | all | all, and $A$ and $B$ |
# | **gradients** | one for each weight | one for each number in $A$ and $B$ |
# | **optimiser** | Adam: two for each weight | two for each number in $A$ and $B$ |
# | **activations** | what the backward pass will need | a part of it less |
#
# People forget the last row. Autograd keeps the input of a matrix only if that matrix is trained, and there LoRA
# saves. But it also keeps the inputs of norms and of the nonlinearity, $q$, $k$, $v$ and the result of attention,
# and the softmax over the vocabulary. It needs these to send the gradient through, whatever is trained.
#
# We take the base model of this course: six layers, 2.7 million numbers. A step has 16 texts of 256 tokens, in
# float32, with AdamW, which keeps two running means for each trained number.

# %%
explore.predict(
    "TinyLM, 16 texts of 256 tokens: how much of the memory does LoRA at r = 8 on W_q and W_v save?",
    {
        "about a quarter": "Yes. Weights, gradients and Adam's state of so small a model are 44 MB of 369; the rest "
        "are activations, and of those LoRA saves only a part.",
        "about two thirds": "That is what the paper says of GPT-3, where gradients and Adam's state are most of the "
        "memory. Here the model is small and the batch is large: look at the column of activations.",
        "almost everything": "Gradients and Adam's state do almost vanish. Look at how large they were, compared with "
        "the activations.",
    },
)


# %%
def table(ways):
    """Memory of each way in MB, a row a way."""
    print(f"{'MB':<16}" + "".join(f"{name:>12}" for name in counting.Memory._fields) + f"{'total':>10}")
    for name, memory in ways.items():
        print(
            f"{name:<16}"
            + "".join(f"{part / 1e6:>12.1f}" for part in memory)
            + f"{memory.total / 1e6:>10.1f}"
        )


STEP = {"batch": 16, "sequence": 256}
tiny = {
    "TinyLM, full": counting.training_memory("TinyLM", "full", **STEP),
    "TinyLM, LoRA": counting.training_memory("TinyLM", "lora", 8, ("query", "value"), **STEP),
}
table(tiny)

# %%
full, lora = tiny.values()
saved = {part: (getattr(full, part) - getattr(lora, part)) / 1e6 for part in full._fields}
print(f"LoRA saves {1 - lora.total / full.total:.0%} of the memory. In MB:")
print(", ".join(f"{part} {mb:.1f}" for part, mb in saved.items()))
softmax = 16 * 256 * 10_000 * 4
print(f"the softmax alone: {softmax / 1e6:.0f} MB, {softmax / full.total:.0%} of the step")
kept = [counting.saved_numbers("TinyLM", *way) for way in (("full",), ("lora", 8, ("query", "value")))]
print(f"\nkept for each token{'full':>16}{'LoRA':>8}")
for name, numbers in kept[0].items():
    print(f"{name:<28}{numbers:>7}{kept[1][name]:>8}")
assert 0.20 < 1 - lora.total / full.total < 0.25 and 0.40 < softmax / full.total < 0.50
assert saved["activations"] > saved["gradients"] + saved["optimiser"] > 30

# %% [markdown]
# Less than a quarter, and not the two thirds that the paper speaks of. Gradients and Adam's state do shrink, from
# 32.7 MB to 0.2 MB. But they never were the problem. TinyLM is a small model with a large vocabulary: the softmax
# has 10 000 numbers for each of 4 096 tokens, 164 MB, as much as all other activations together, and LoRA cannot
# save it. More than half of what LoRA does save here are inputs of frozen matrices, which autograd need not keep:
# 51 MB of activations.
#
# ## Memory, measured
#
# Is that what a live model holds? Weights, gradients and Adam's state can be added up tensor by tensor. For
# activations, PyTorch has a hook that sees each tensor that autograd keeps: we add up their storages, each once,
# and leave out those that are weights.


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
# The first three must agree to the byte. For the activations we allow 10 %: now and then a kernel keeps a copy more
# or less. Tensors that live for a moment only, such as the logits beside their softmax, are in neither column.

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
# They agree to the byte, down to Adam's step counters (4 bytes for each trained tensor). The dozen lines of LoRA
# above are nothing special: the package's own layers hold the same.

# %% tags=["nbval-ignore-output"]
from lora_edu.lora import add_lora

packaged = measure(add_lora(TinyLM(), rank=8, alpha=16, targets=["query", "value"]), tokens)
print(f"add_lora: {packaged.gradients} bytes of gradients, {packaged.optimiser} of Adam's state")
assert packaged[:3] == tiny["TinyLM, LoRA"][:3]
assert abs(packaged.activations / tiny["TinyLM, LoRA"].activations - 1) < 0.10

# %% [markdown]
# ## Where the saving shows
#
# GPT-2 is 46 times as large as TinyLM, and its vocabulary only five times TinyLM's. Two texts of 64 tokens, LoRA at
# $r = 8$ on `c_attn`, everything else as before:

# %%
explore.predict(
    "How much of the memory does LoRA save on GPT-2, with 2 texts of 64 tokens?",
    {
        "about a quarter, as before": "Nothing in LoRA has changed, but the proportions have: 46 times the weights, a "
        "32nd of the tokens. Compare gradients and Adam's state with the activations in the next cell.",
        "about two thirds": "Close: it is 70 %. With few tokens a step is mostly weights, gradients and Adam's state, "
        "four numbers for each weight, and LoRA removes three of the four.",
        "about nine tenths": "Of four numbers for each weight LoRA removes three, so three quarters is the most there "
        "is; the activations take a little of that back.",
    },
)

# %%
STEP = {"batch": 2, "sequence": 64}
paper = {
    "GPT-2, full": counting.training_memory("GPT-2", "full", **STEP),
    "GPT-2, LoRA": counting.training_memory("GPT-2", "lora", 8, ("c_attn",), **STEP),
}
table(paper)
less = 1 - paper["GPT-2, LoRA"].total / paper["GPT-2, full"].total
print(f"LoRA saves {less:.0%}")
assert 0.70 < less < 0.71
assert round(counting.ARCHITECTURES["GPT-2"].parameters / counting.ARCHITECTURES["TinyLM"].parameters) == 46

# %% [markdown]
# 70 %: of 2.15 GB, one and a half were gradients and Adam's state. Again on a live model, of GPT-2's size and with
# random weights, built from its config. (Without `transformers`, which the extra `course` brings, the cell says so
# and leaves the prediction unchecked.) Dropout is off: each mask would be one more tensor to keep.

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
# The picture of both models. Red and orange are what LoRA takes away almost entirely; grey stays, and of the blue it
# takes a part.


# %%
def megabytes(ways):
    """name of the bar → part → MB; the names without the model's."""
    return {
        name.split(", ")[1]: {part: n / 1e6 for part, n in way._asdict().items()}
        for name, way in ways.items()
    }


totals = [1 - lora.total / full.total for full, lora in (tiny.values(), paper.values())]
panels = {
    f"TinyLM, 16 × 256 tokens: {totals[0]:.0%} less": megabytes(tiny),
    f"GPT-2, 2 × 64 tokens: {totals[1]:.0%} less": megabytes(paper),
}
sentence = (
    f"Memory of a training step: LoRA saves {totals[0]:.0%} on TinyLM, where activations are most of it, and "
    f"{totals[1]:.0%} on GPT-2 with few tokens."
)
plots.show(plots.stacked_panels(panels, "MB"), sentence)

# %% [markdown]
# **What follows.** LoRA does not shrink the weights. It removes gradients and optimiser state, with Adam three times
# the weights, and of the activations a part that depends on the model and on which matrices are adapted. So it helps
# most where the model is large and the batch small. And then the weights themselves are what is left. That is where
# a packed base comes in (QLoRA: Dettmers et al. 2023).

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
full, wide = ways["Llama-3-8B, full"], counting.training_memory("Llama-3-8B", "lora", 8, "linear", **STEP)
pairs = {
    "TinyLM, W_q and W_v": [way.activations for way in tiny.values()],
    "GPT-2, c_attn": [way.activations for way in paper.values()],
    "Llama-3-8B, W_q and W_v": (full.activations, ways["Llama-3-8B, LoRA"].activations),
    "Llama-3-8B, all linear layers": (full.activations, wide.activations),
}
fewer = {name: f"{1 - lora / full:.0%}" for name, (full, lora) in pairs.items()}
print("\nactivations that LoRA need not keep:")
print("\n".join(f"{share:>5} {name}" for name, share in fewer.items()))
assert list(fewer.values()) == ["16%", "15%", "27%", "8%"]

# %% [markdown]
# These are numbers on paper, and they leave something out. Full tuning is counted here with everything in bfloat16.
# In mixed precision, as ZeRO counts it (§3), it takes 16 bytes for each parameter, or 128 GB. The 4-bit row packs
# every weight. In practice the table and the head usually stay in 16 bits: 1.6 GB more.

# %%
llama = counting.ARCHITECTURES["Llama-3-8B"].parameters
print(f"Llama-3-8B at 16 bytes a parameter: {16 * llama / 1e9:.0f} GB")
print(f"its table and head in 16 bits instead of 4: {2 * 128_256 * 4096 * 1.5 / 1e9:.1f} GB more")
gpt3 = counting.ARCHITECTURES["GPT-3 175B"].parameters * 2 / 1e9
print(f"GPT-3 in 16 bits: weights {gpt3:.0f} GB, with gradients and Adam {4 * gpt3:.0f} GB")

# %% [markdown]
# For GPT-3 the paper says that memory falls from 1.2 TB to 350 GB (§4.2). The 350 GB are the weights alone, in 16
# bits: everything else has become small beside them. The 1.2 TB we cannot reproduce: four numbers of 16 bits for each
# weight make 1.4 TB, and how the 1.2 TB divide is not said.

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
# - $A$ and $B$ hold $r\,(i + o)$ numbers; the matrix has $i\,o$. They break even at $r = i\,o / (i + o)$: half the
#   width of a square matrix, almost the short side of a long one.
# - 10 000 × 100 at $r = 8$: 80 800 numbers, 8.08 %, because 100 is narrow. A table's *share* tends to $r/d$, half of
#   a square matrix's $2r/d$. Its *number* $r\,(V + d)$ is the largest of all single adapters, the head's alone being
#   as large.
# - '$r = 8$ on attention' is not yet a count: fused matrices, grouped queries and tied heads change it.
# - LoRA leaves out the gradient of $W$: **one third of the FLOPs** of a step, not more, when the lowest layer is
#   adapted.
# - LoRA saves gradients and optimiser state, no weights, and 8 to 27 % of the activations in the four cases counted
#   here. Large model, few tokens: 70 % of the memory. Small model, large vocabulary, many tokens: less than a quarter.
# - Check counts in print. It takes a minute, and twelve of these 26 did not come out as printed.

# %% [markdown]
# ## Exercises
#
# Each answer is a function. Put it in place of `None` and run the cell. The check tries it on many cases, and says
# what is wrong with it, not only that it is wrong.

# %% [markdown] tags=["exercise"]
# **1.** Write `saving_rank(rows, columns)`: the largest rank at which $A$ and $B$ hold *fewer* numbers than the matrix
# itself. (0, if there is none.)

# %% tags=["exercise"]
saving_rank = None  # def saving_rank(rows, columns): ...
print(exercises.check_04_1(saving_rank))


# %% tags=["solution"]
def saving_rank(rows, columns):
    return (rows * columns - 1) // (rows + columns)


print(exercises.check_04_1(saving_rank))

# %% [markdown] tags=["solution"]
# Without the $-1$ it would be wrong where the break-even rank is a whole number: at $r = 50$ a 100 × 100 matrix has
# exactly as many numbers as its $A$ and $B$.

# %% [markdown] tags=["exercise"]
# **2.** Write `lora_numbers(model, names, rank)`: how many numbers LoRA of this rank would train in a live model, if
# it were put on every `nn.Linear` whose own name (the part behind the last dot, such as `query`) is in `names`. The
# function leaves the model as it is.

# %% tags=["exercise"]
lora_numbers = None  # def lora_numbers(model, names, rank): ...
print(exercises.check_04_2(lora_numbers))


# %% tags=["solution"]
def lora_numbers(model, names, rank):
    total = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in names:
            total += rank * (layer.in_features + layer.out_features)
    return total


print(exercises.check_04_2(lora_numbers))

# %% [markdown] tags=["exercise"]
# **3.** Somebody prints '4.7 M trainable parameters'. Which rank was that? Write `ranks_that_explain(printed, digits,
# at_rank_1)`: a list of all ranks from 1 to 64 whose count, in millions and rounded to `digits` digits behind the
# point, is the printed figure. `at_rank_1` is how many numbers the adapter has at $r = 1$.

# %% tags=["exercise"]
ranks_that_explain = None  # def ranks_that_explain(printed, digits, at_rank_1): ...
print(exercises.check_04_3(ranks_that_explain))


# %% tags=["solution"]
def ranks_that_explain(printed, digits, at_rank_1):
    return [r for r in range(1, 65) if round(r * at_rank_1 / 1e6, digits) == printed]


print(exercises.check_04_3(ranks_that_explain))

# %% [markdown] tags=["exercise"]
# **4.** How many texts fit into a batch? Write `largest_batch(budget, held, trained, kept, sequence)`, in float32 and
# with AdamW. `budget` is the memory in bytes; `held` the number of weights in memory, those of an adapter included;
# `trained` how many of them are trained; `kept` the numbers that autograd keeps for each token; and each text has
# `sequence` tokens. (Adam's step counters may be forgotten. If nothing fits, the answer is 0.)

# %% tags=["exercise"]
largest_batch = None  # def largest_batch(budget, held, trained, kept, sequence): ...
print(exercises.check_04_4(largest_batch))


# %% tags=["solution"]
def largest_batch(budget, held, trained, kept, sequence):
    fixed = 4 * (held + trained + 2 * trained)  # the weights; gradients; Adam's two numbers
    return max(0, (budget - fixed) // (4 * kept * sequence))


print(exercises.check_04_4(largest_batch))

# %% [markdown] tags=["exercise"]
# **5.** Write `rank_for_budget(shapes, budget, bytes_each)`: the largest useful rank at which an adapter on all these
# matrices, a list of (rows, columns), takes at most `budget` bytes. All get the same rank, and none needs one above
# its smaller side.

# %% tags=["exercise"]
rank_for_budget = None  # def rank_for_budget(shapes, budget, bytes_each): ...
print(exercises.check_04_5(rank_for_budget))


# %% tags=["solution"]
def rank_for_budget(shapes, budget, bytes_each):
    at_rank_1 = bytes_each * sum(rows + columns for rows, columns in shapes)
    return min(budget // at_rank_1, *(min(shape) for shape in shapes))


print(exercises.check_04_5(rank_for_budget))

# %% [markdown] tags=["exercise"]
# **6.** Write `backward_flops(rows, columns, rank, input_needed)`: the FLOPs of the backward pass of one input vector
# through $W x + s B A x$, where $W$ is rows × columns and frozen. At `rank=0` there is no adapter, and $W$ itself is
# trained. `input_needed` says whether the layers below need the gradient of $x$. The check compares with what PyTorch
# counts.

# %% tags=["exercise"]
backward_flops = None  # def backward_flops(rows, columns, rank, input_needed): ...
print(exercises.check_04_6(backward_flops))


# %% tags=["solution"]
def backward_flops(rows, columns, rank, input_needed):
    if rank == 0:
        return 2 * rows * columns * (2 if input_needed else 1)
    adapter = (
        2 * rank * rows + 2 * rank * rows + 2 * rank * columns
    )  # B's gradient; back through B; A's gradient
    through = 2 * rank * columns + 2 * rows * columns  # back to x through A, and through W
    return adapter + (through if input_needed else 0)


print(exercises.check_04_6(backward_flops))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685): §4.1 for
#   $r \ll \min(d, k)$, §4.2 for memory, §5.1 for the count $2 \cdot L \cdot d \cdot r$, tables 2 to 5 and
#   appendix D for what is recomputed here.
# - Rajbhandari et al. 2020, *ZeRO* (arXiv 1910.02054), §3: where the memory of a training step goes, in mixed
#   precision.
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models* (arXiv 2205.05198), §4:
#   the activations of a transformer layer counted term by term.
# - Next here: chapter 05, LoRA for a linear layer; chapter 03, whether a small $r$ suffices.
