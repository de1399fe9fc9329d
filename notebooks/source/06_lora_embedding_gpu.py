# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 06 · LoRA for an embedding
#
# A layer that multiplies nothing and only looks things up: what is there to factorise? This chapter finds the matrix
# product in the look-up, takes care never to compute it, and ends with a kernel that does the rest in one pass over a
# GPU's memory.
#
# **Afterwards you can** write LoRA for an embedding in a dozen lines, in anybody's letters; say which rows of the table
# a step moves, and why `lora_A` starts at zero here and `lora_B` in a linear layer; read loralib's `Embedding` line by
# line and know what torch's options do in it; count the bytes that a step has to move, and those that an
# implementation does move; merge when the output layer shares the table, or know why not to; place a look-up on a
# card's roofline; read and change a fused Triton kernel, its masks and its padded rank.
#
# **You should know** LoRA for a linear layer (LoRA paper §4.1, or chapter 05), and how to count $A$ and $B$ (chapter
# 04). **Time:** 75 minutes to read, two to run.
#
# Everything here runs on a CPU. Sections 7 to 9 are about a GPU. Without one, Triton's interpreter runs their kernels
# in NumPy; where there is no Triton either (it has wheels for Linux only) they show what was recorded.

# %% tags=["setup"]
import inspect
import json
import os
import statistics
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu import explore, plots
from lora_edu.data import load_checkpoint, load_corpus
from lora_edu.exercises import chapter_06 as exercises
from lora_edu.explore.lora_embedding import first_move
from lora_edu.lora import LoRAEmbedding, add_lora, trainable_parameters
from lora_edu.lora.functional import triton_version
from lora_edu.paths import REPOSITORY
from lora_edu.text import format_bytes
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit

# %% tags=["setup"]
if not torch.cuda.is_available():  # for section 8; Triton reads it when it is imported, and PEFT imports it
    os.environ["TRITON_INTERPRET"] = "1"
import loralib
import peft

from lora_edu.counting.traffic import (
    CARDS,
    linear_bytes,
    linear_operations,
    look_up_bytes,
    look_up_operations,
    traffic,
)

# %% [markdown]
# ## 1 · A look-up is a one-hot product
#
# The table $W$ has a row of $d$ numbers for each of $V$ tokens, and the layer returns row $t$ for token $t$. Write the
# token as a row of $V$ numbers, all zero except a one at place $t$: a *one-hot* row.

# %%
explore.predict(
    "A one-hot row with its one at place t, times the table W: what comes out?",
    {
        "row t of W": "Yes: the one picks row t, and every other row is multiplied by 0. Check below that it is equal to the last bit.",
        "column t of W": "W times a one-hot column would give that. A row on the left picks rows.",
        "the sum of all rows": "A row of ones would give that. Here V − 1 of the V factors are 0.",
    },
)

# %%
torch.manual_seed(0)
V, d, r, alpha = 12, 6, 2, 4
W = torch.randn(V, d)
tokens = torch.tensor([3, 7, 3])
one_hot = F.one_hot(tokens, V).float()
print(one_hot.int())
assert torch.equal(one_hot @ W, F.embedding(tokens, W)) and torch.equal(W[tokens], F.embedding(tokens, W))

# %%
panels = {"tokens 3, 7, 3": one_hot, "W: (V, d)": W, "their rows": one_hot @ W}
plots.show(
    plots.product(panels, ["×", "="]), "Three one-hot rows times the table give rows 3, 7 and 3 of it."
)

# %% [markdown]
# Every product in it is with 0 or 1, and all except one are with 0. So an embedding *is* a linear layer whose input is
# one-hot. If you know the place of the one, you need not multiply: reading row $t$ gives the same numbers, to the last
# bit. So an embedding can have LoRA too, and its cost is different from a linear layer's.
#
# ### The paper's letters, the note's, loralib's, PEFT's, ours
#
# The paper writes columns: $h = W x$ with $W$ of shape (out, in), and $\Delta W = B A$ with $B$ of shape (out, $r$) and
# $A$ of shape ($r$, in). For the embedding as a linear layer, in = $V$ and out = $d$, so $B A$ has the shape $(d, V)$.
# But the table is stored with a token a row, $(V, d)$. So a transpose is needed, the one that puzzles readers of the
# code:
#
# $$ \Delta W = s \, (B A)^\top = s \, A^\top B^\top, \qquad s = \alpha / r $$
#
# | | on the token side | on the other side | $\Delta W$ of the $(V, d)$ table |
# | --- | --- | --- | --- |
# | paper, as a linear layer | $A$: $(r, V)$ | $B$: $(d, r)$ | $s \, (B A)^\top$ |
# | loralib | `lora_A`: $(r, V)$ | `lora_B`: $(d, r)$ | `scaling * (lora_B @ lora_A).T` |
# | PEFT | `lora_embedding_A`: $(r, V)$ | `lora_embedding_B`: $(d, r)$ | `scaling * (lora_embedding_B @ lora_embedding_A).T` |
# | this course | `lora_A`: $(V, r)$ | `lora_B`: $(d, r)$ | `scaling * lora_A @ lora_B.T` |
# | who writes rows, $h = x W$ (the study note behind this course) | $B$: $(i, r)$, $i = V$ | $A$: $(r, o)$, $o = d$ | $B A$ |
#
# Look at the last line: in row vectors the letters change places, and 'B starts at zero' is then a statement about the
# token side. Our `lora_A` is stored as $A^\top$, so that a token's $r$ numbers lie next to each other in memory.
# Section 5 shows what that is worth. **From here on $A$ means our `lora_A`, of shape $(V, r)$,** and $A[t]$ is its row
# for token $t$.

# %%
A, B = torch.randn(V, r), torch.randn(d, r)  # our layout
s = alpha / r
papers = s * (B @ A.T).T
note_B, note_A = A, B.T
assert torch.equal(s * (A @ B.T), papers) or torch.allclose(s * (A @ B.T), papers, atol=1e-6)
assert torch.allclose(s * (note_B @ note_A), papers, atol=1e-6)
assert torch.allclose((W + papers)[tokens], W[tokens] + s * A[tokens] @ B.T, atol=1e-6)

# %% [markdown]
# The last line is the whole method. Row $t$ of $W + \Delta W$ is
#
# $$ \text{out}[t] = W[t] + s \, A[t] \, B^\top $$
#
# Look up $r$ numbers, turn them into $d$, add. The $(V, d)$ product is never formed. A token has $r$ numbers of its
# own, its coordinates, and $B$ holds the $r$ directions that all tokens share.
#
# ## 2 · From scratch, and equal to all others


# %%
class LoRAFromScratch(nn.Module):
    """out[t] = W[t] + s · A[t] Bᵀ; the table W is frozen."""

    def __init__(self, embedding, rank, alpha):
        super().__init__()
        self.embedding = embedding.requires_grad_(False)
        vocabulary, width = embedding.weight.shape
        self.lora_A = nn.Parameter(torch.zeros(vocabulary, rank))
        self.lora_B = nn.Parameter(torch.randn(width, rank))
        self.scaling = alpha / rank

    def forward(self, tokens):
        return self.embedding(tokens) + self.scaling * F.embedding(tokens, self.lora_A) @ self.lora_B.T

    def delta_weight(self):
        return self.scaling * self.lora_A @ self.lora_B.T


# %% [markdown]
# Is that what the libraries do? Give the same $W$, $A$ and $B$ to `lora_edu.lora.LoRAEmbedding`, to
# `loralib.Embedding` and to PEFT. Compare the values, both gradients, and the merged table.

# %%
explore.predict(
    "Which of lora_edu, loralib and PEFT store A as (r, V), a token a column?",
    {
        "none of them": "Then no transpose would be needed in loralib's forward pass. Section 4 finds one.",
        "loralib alone": "PEFT took over loralib's layout. Look at the column of shapes that the second cell prints.",
        "loralib and PEFT": "Right. It is the paper's shape for a linear layer. The column of shapes below shows it.",
        "all three": "lora_edu stores (V, r), so that a token's numbers lie side by side. See the shapes below.",
    },
)


# %%
def four_layers(W, A, B, alpha):
    """The same LoRA embedding four times: name → (layer, its A, its B, is A stored as (r, V)?)."""
    (V, d), r = W.shape, A.shape[1]
    scratch = LoRAFromScratch(nn.Embedding(V, d, _weight=W.clone()), r, alpha)
    ours = LoRAEmbedding.from_layer(nn.Embedding(V, d, _weight=W.clone()), r, alpha)
    theirs = loralib.Embedding(V, d, r=r, lora_alpha=alpha, _weight=W.clone())
    theirs.weight.data = W.clone()  # its constructor fills the table anew
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["table"])
    model = nn.ModuleDict({"table": nn.Embedding(V, d, _weight=W.clone())})
    hf = peft.inject_adapter_in_model(config, model)["table"]
    hf_A, hf_B = hf.lora_embedding_A["default"], hf.lora_embedding_B["default"]
    layers = {
        "from scratch": (scratch, scratch.lora_A, scratch.lora_B, False),
        "lora_edu": (ours, ours.lora_A, ours.lora_B, False),
        "loralib": (theirs, theirs.lora_A, theirs.lora_B, True),
        "PEFT": (hf, hf_A, hf_B, True),
    }
    for _, its_A, its_B, transposed in layers.values():
        its_A.data, its_B.data = (A.T.contiguous() if transposed else A.clone()), B.clone()
    return layers


# %%
torch.manual_seed(1)
V, d, r, alpha = 1000, 100, 8, 16
W, A, B = torch.randn(V, d), torch.randn(V, r), torch.randn(d, r)
tokens, wanted = torch.randint(V, (4, 32)), torch.randn(4, 32, d)
layers, results = four_layers(W, A, B, alpha), {}
for name, (layer, its_A, its_B, transposed) in layers.items():
    out = layer(tokens)
    (out * wanted).sum().backward()
    results[name] = out.detach(), its_A.grad.T if transposed else its_A.grad, its_B.grad
first = results["from scratch"]
print(f"{'':14} lora_A as stored   values  gradients  (largest difference)")
for name, its in results.items():
    apart = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(its, first, strict=True)]
    words = ["equal" if each < 1e-5 else f"{each:.1e}" for each in apart]
    print(f"{name:14} {tuple(layers[name][1].shape)!s:18} {words[0]:7} A {words[1]}, B {words[2]}")
    assert max(apart) < 1e-5

# %% [markdown]
# 'Equal' means up to the last digits of float32, which depend on the order of a sum (here: within a hundred-thousandth
# of the largest entry). Now merge: put $W + \Delta W$ in the place of $W$, so that inference costs what a plain
# embedding costs. lora_edu and PEFT have a method for it; loralib does it in `eval()`.

# %%
merged = {"from scratch": W + layers["from scratch"][0].delta_weight().detach()}
layers["lora_edu"][0].merge()
layers["PEFT"][0].merge()
layers["loralib"][0].eval()  # there is no other way to say it
merged["lora_edu"] = layers["lora_edu"][0].weight
merged["loralib"] = layers["loralib"][0].weight
merged["PEFT"] = layers["PEFT"][0].base_layer.weight
for table in merged.values():
    assert torch.allclose(table, merged["from scratch"], atol=1e-4)
for _ in range(100):
    layers["loralib"][0].train()
    layers["loralib"][0].eval()
    layers["lora_edu"][0].unmerge()
    layers["lora_edu"][0].merge()
layers["loralib"][0].train()
layers["lora_edu"][0].unmerge()
assert not torch.equal(layers["loralib"][0].weight, W) and torch.equal(layers["lora_edu"][0].weight, W)
print("merged tables agree; after 101 rounds of merging and unmerging")
print("lora_edu has W back bit for bit, loralib has not")

# %% [markdown]
# **Why.** loralib and PEFT unmerge by subtracting what they added, and floating-point numbers do not promise that
# $(W + \Delta W) - \Delta W$ is $W$. We keep $W$ beside the merged table: exact, at the price of $4 V d$ bytes in
# float32 while merged.
#
# ## 3 · Why does `lora_A` start at zero here?
#
# The paper starts with $B = 0$ and a Gaussian $A$. So do linear layers everywhere, except that loralib and PEFT draw
# $A$ from another distribution (Kaiming-uniform). For an embedding loralib does it the other way round, and PEFT and we
# follow. Readers have reported it as a mistake more than once. The authors gave two answers:
#
# - it is *intended*, to keep $A$ sparse, because adaptation may see only a small part of the vocabulary
#   (microsoft/LoRA, pull request 14);
# - it should make *no meaningful difference* which of the two is zero, as long as the other is not; and the paper never
#   adapted embeddings (issues 76 and 98).
#
# Both can't be the whole truth. Before training, think it through for one step of SGD: $V = 1000$ rows, and a batch
# with a few dozen different tokens.

# %%
explore.predict(
    "How many of the 1000 rows of ΔW are not zero after one step: if A started at zero, and if B did?",
    {
        "only those seen, both times": "True for A = 0. But for B = 0 ask which factor gets a gradient, and who uses that factor.",
        "all of them, both times": "True for B = 0. But for A = 0 a row of A moves only if its token was in the batch.",
        "A = 0: those seen; B = 0: all": "Right. The cell counts both; the text below it says which factor moves each time.",
        "A = 0: all; B = 0: those seen": "The other way round: A's rows belong to single tokens, B belongs to all of them.",
    },
)


# %%
def rows_moved(zero, layer_tokens):
    """Rows of ΔW that are not zero after one SGD step from the given start."""
    A = torch.zeros(V, r) if zero == "A" else torch.randn(V, r)
    B = torch.randn(d, r) if zero == "A" else torch.zeros(d, r)
    A.requires_grad_(), B.requires_grad_()
    out = W[layer_tokens] + s * A[layer_tokens] @ B.T
    (out * wanted).sum().backward()
    with torch.no_grad():
        return int(((A - 0.1 * A.grad) @ (B - 0.1 * B.grad).T).ne(0).any(dim=1).sum())


torch.manual_seed(2)
few = torch.randint(V, (40,))[torch.randint(40, (4, 32))]
different = len(few.unique())
moved = {zero: rows_moved(zero, few) for zero in "AB"}
assert moved["A"] == different < 41 and moved["B"] == V
print(f"{different} different tokens; A = 0: {moved['A']} rows move; B = 0: {moved['B']} rows move")

# %% [markdown]
# **Why.** Let $G$ be the gradient of the layer's output, a row for each place in the batch. The gradient of $B$ is
# $s \, G^\top A[\text{tokens}]$, and row $t$ of $A$ receives $s \, G B$ from each place where $t$ stands. With $A = 0$
# the first is zero, and the second is not, but only in rows of tokens that were seen. With $B = 0$ it is the other way
# round: $A$ stays, $B$ moves, and $B$ belongs to everybody. A token that was never seen has a random row in $A$, so its
# row of $\Delta W$ moves in a random direction while $B$ learns from the others.
#
# In a *linear* layer nothing like this can happen: its input is dense, each column of $A$ is used at every step, and
# there is no 'row never seen'. There the second answer can hold.
#
# ### Trained both ways
#
# Now the course's base model, pre-trained on code, tuned on docstrings by LoRA on the embedding alone: $r = 8$, 40
# steps of Adam. To compare fairly, the factor that is not zero is drawn from $N(0, 1)$ in both, so that Adam's first
# step moves a row that was seen equally far. (Adam divides each gradient by its usual size, so a number moves by about
# one learning rate a step, however small its gradient is.)

# %%
explore.predict(
    "Tuned on docstrings: which start harms the model's loss on code more?",
    {
        "A = 0": "Its rows for tokens not seen stay where they were, so code that uses them is left alone. Look at 'never seen' in the output.",
        "B = 0": "Right, at both rates and in all three seeds we tried. The cells after it ask whether the rows never seen are the reason.",
        "no difference": "The authors' second answer. On docstrings at the smaller rate the two are close. Compare the losses on code.",
    },
)

# %% tags=["setup", "nbval-ignore-output"]
base = load_checkpoint("base")
code, reference = load_corpus("code"), load_corpus("reference")
held_out = {"docstrings": reference.test[: 8 * 256 + 1], "code": code.test[: 8 * 256 + 1]}


def losses(update):
    """Nats a token on both held-out texts, with this ΔW added to the base's embedding."""
    state = base | {"embedding.weight": base["embedding.weight"] + update}
    return {name: evaluate(TinyLM.from_state_dict(state), text) for name, text in held_out.items()}


before = losses(0)
print("the base:", {name: f"{value:.2f}" for name, value in before.items()}, "nats a token")
assert before["code"] < before["docstrings"]


# %%
def tune(zero, rate, steps=40, seed=0):
    """(ΔW of the embedding, how often each token was seen) after tuning from A = 0 or from B = 0."""
    torch.manual_seed(seed)
    model = add_lora(TinyLM.from_state_dict(base), rank=8, alpha=16, targets="embedding")
    layer = model.embedding
    if zero == "B":
        nn.init.normal_(layer.lora_A)
        nn.init.zeros_(layer.lora_B)
    batches = Batches(reference.train, batch=4, context=128, seed=seed)
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=rate)
    fit(model, batches, optimizer, steps, progress=False)
    seen = torch.cat([batches(step)[0].flatten() for step in range(steps)])
    return layer.delta_weight(), seen.bincount(minlength=10_000)


# %% tags=["nbval-ignore-output"]
update, tuned = {}, {}
for rate in (3e-4, 1e-3):
    for zero in "AB":
        update[zero], counts = tune(zero, rate)
        tuned[rate, zero] = losses(update[zero])
        size, seen = update[zero].norm(dim=1), counts > 0
        print(f"rate {rate:g}, {zero} = 0: rows seen moved {size[seen].mean():.2f}, never seen", end=" ")
        print(f"{size[~seen].mean():.2f};", ", ".join(f"{k} {v:.3f}" for k, v in tuned[rate, zero].items()))
    assert tuned[rate, "B"]["code"] > tuned[rate, "A"]["code"] + 0.003
    assert update["A"][~seen].eq(0).all() and 0.8 < size[~seen].mean() / size[seen].mean() < 1.25
print(f"{int(seen.sum())} of 10 000 tokens were seen")
rise = {zero: tuned[1e-3, zero]["code"] - before["code"] for zero in "AB"}
assert rise["B"] > 1.5 * rise["A"] and tuned[1e-3, "A"]["docstrings"] < before["docstrings"] - 0.03
assert 0.15 < seen.float().mean() < 0.45

# %% tags=["nbval-ignore-output"]
figure, axes = plots.subplots()
norms = {f"{zero} starts at zero": update[zero].norm(dim=1) for zero in "BA"}
title = "B = 0 moves every row, also those of tokens it never saw"
plots.norm_against_count(axes, counts, norms, title=title)
sizes = [float(update[zero][~seen].norm(dim=1).max()) for zero in "AB"]
assert sizes[0] == 0 < sizes[1]
plots.show(
    figure, "Rows never seen stay at zero if A starts there (not drawn) and move as others do if B does."
)

# %% [markdown]
# When $A$ starts at zero, rows never seen stay exactly where they were. When $B$ does, they move on average as far as
# those that were seen. (Rows seen also move two to three times as far as from $A = 0$: $B$ moves at every step, a row
# of $A$ only when its token comes up.) The tuning text has had about three tokens of ten. Code uses the others, too,
# and loses more from $B = 0$ at both learning rates: at 0.001 its loss rises three to six times as much, over three
# seeds. On docstrings $A = 0$ is ahead as well. But at 0.0003 it is ahead by about 0.01 nats only, and a reader who
# looks only there may see 'no meaningful difference'.
#
# Are the rows never seen the reason? Put just those back to $W$ and measure again.

# %% tags=["nbval-ignore-output"]
restored = losses(update["B"] * seen[:, None])
print("B = 0, rows never seen put back:", {name: f"{value:.2f}" for name, value in restored.items()})
rises = [each["code"] - before["code"] for each in (tuned[1e-3, "B"], restored)]
print(f"of the harm on code, {1 - rises[1] / rises[0]:.0%} is undone")
assert restored["code"] < tuned[1e-3, "B"]["code"] - 0.003
assert restored["docstrings"] < tuned[1e-3, "B"]["docstrings"]
assert 0.1 < 1 - rises[1] / rises[0] < 0.6

# %% [markdown]
# Both losses improve, also on the held-out docstrings, which have tokens that this little tuning text has not. But only
# about three tenths of the harm on code are undone (one seed, rate 0.001): rows never seen are a part of it, and not
# the larger one. The rest must lie in rows that *were* seen, and so in what each start lets a token learn. Here is an
# explanation that we have not tested. In 40 steps at 0.001 Adam moves a number by 0.04 at most, or a little more. So
# the factor that began at $N(0, 1)$ hardly changes, and the one that began at zero does the learning. With $A = 0$
# every token finds its own $r$ coordinates, in $r$ fixed directions. With $B = 0$ the tokens keep random coordinates,
# and the 800 numbers of $B$ have to serve all of them at once. So for this model and this task the first answer was the
# better one; the second can hold where all inputs are in use at every step.
#
# A factor from $N(0, 1)$ has one more consequence. Adam's first step moves each number of the zero factor by one
# learning rate, whatever the gradient's size. How far that moves a *weight* depends on the other factor. In an
# embedding that is $B \sim N(0, 1)$; in a linear layer it is $A \sim U(-1/\sqrt{d}, 1/\sqrt{d})$, whose standard
# deviation is $1 / \sqrt{3 d}$. The gradients below are those of the base model on docstrings.

# %%
explore.predict(
    "At d = 100 and the same learning rate: how much farther does an embedding's entry move in the first step than a linear weight's?",
    {
        "equally far": "Both zero factors move by one learning rate. But the other factor is 17 times as large in the embedding.",
        "about 17 times as far": "Right: √(3 · 100) = 17.3, the ratio of the two standard deviations. The slider shows whether r or alpha change it.",
        "about 100 times as far": "d enters through a standard deviation, 1 / √(3d), so under a root.",
        "it depends on r": "Each move does, like alpha / √r. Watch their ratio when you move the slider for r.",
    },
)

# %% tags=["nbval-ignore-output"]
model = TinyLM.from_state_dict(base)
inputs, targets = Batches(reference.train, batch=4, context=128)(0)
F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
table, query = model.embedding.weight.grad, model.blocks[0].attention.query.weight.grad
rows = table[inputs.unique()]
moves = {zero: first_move(G, 8, zero) for zero, G in (("A", rows), ("B", query))}
print(f"{moves['A'] / moves['B']:.0f} times as far; √(3 · 100) = {300**0.5:.1f}")
assert abs(moves["A"] / moves["B"] / 300**0.5 - 1) < 0.15

# %% tags=["nbval-ignore-output"]
explorer = explore.first_step(rows, query)
assert len(explorer.pictures) == 35
explorer

# %% [markdown]
# The ratio is $\sqrt{3 d}$, about 17 at $d = 100$, at every $r$ and alpha: both moves are proportional to
# $s \sqrt{r} = \alpha / \sqrt{r}$, so the ratio depends on neither. At one common learning rate a fresh embedding moves
# far ahead of the linear layers beside it. Give it a rate of its own, several times smaller, before you conclude that
# adapting embeddings harms a model.
#
# ## 4 · loralib's forward pass, line by line
#
# The package is installed, so read its source there. (`print(source)` in a cell of your own shows it: a dozen
# lines.)

# %%
source = inspect.getsource(loralib.Embedding.forward)
steps = {
    "unless rank 0 or merged": "if self.r > 0 and not self.merged",
    "the plain look-up in W": "nn.Embedding.forward(self, x)",
    "a look-up in A transposed": "self.lora_A.transpose(0, 1)",
    "with torch's options once more": "self.padding_idx, self.max_norm",
    "and the rest of them": "self.norm_type, self.scale_grad_by_freq, self.sparse",
    "times B transposed, times s, added": "(after_A @ self.lora_B.transpose(0, 1)) * self.scaling",
    "else the plain look-up": "else",
}
places = [source.index(fragment) for fragment in steps.values()]
assert places == sorted(places)
print("\n".join(f"{number}. {words}" for number, words in enumerate(steps, 1)))

# %% [markdown]
# 1. The guard: if merged, $W$ is $W + \Delta W$ already. Who merges? `train(False)`, which is `eval()`, as a side effect.
# 2. `nn.Embedding.forward` looks up $W[t]$, with all of torch's options applied to the frozen table.
# 3. $A$ is stored as $(r, V)$, and `F.embedding` wants a row a token: so it gets a transposed view. The $r$ numbers of a
#    token now lie $V$ places apart.
# 4. The options of an `nn.Embedding` are handed on to this second look-up, two of them here
# 5. and the rest here. They were made for a table whose rows are the output. Here the rows are coordinates: $r$ numbers
#    that still have to pass through $B$.
# 6. $r$ numbers become $d$, and $s$ is applied to all $d$ of them.
# 7. Merged, or $r = 0$: a plain look-up.
#
# What do the four options `padding_idx`, `max_norm`, `scale_grad_by_freq` and `sparse` do then?

# %%
explore.predict(
    "How many of the four options keep a sensible meaning when they are handed to a look-up in A?",
    {
        "all four": "Then max_norm would bound the output, and sparse would run. Two of the cells below try that.",
        "two: padding_idx and scale_grad_by_freq": "Right: both are about the gradient of a token's row, and A has one. The other two break; see how.",
        "only sparse": "It would be the most useful one. But a gradient that is sparse in rows cannot go back through a transpose.",
        "none": "Two are about the gradient of a token's row. A has such rows, if only stored as columns.",
    },
)


# %%
def pair(**options):
    """loralib's layer and ours with the same W (12 × 6), A and B, r = 2, s = 2."""
    torch.manual_seed(3)
    W, A, B = 2 * torch.randn(12, 6), torch.randn(12, 2), torch.randn(6, 2)
    theirs = loralib.Embedding(12, 6, r=2, lora_alpha=4, **options)
    ours = LoRAEmbedding(12, 6, rank=2, alpha=4, **options)
    theirs.weight.data, theirs.lora_A.data, theirs.lora_B.data = W.clone(), A.T.clone(), B.clone()
    ours.weight.data, ours.lora_A.data, ours.lora_B.data = W.clone(), A.clone(), B.clone()
    return theirs, ours, W, A, B


tokens = torch.tensor([3, 7, 3, 0])
theirs, ours, W, A, B = pair(padding_idx=0)
rows = {"loralib": theirs(tokens), "ours": ours(tokens)}
for name, out in rows.items():
    out.sum().backward()
    print(f"{name:8} at the padding: W's row alone? {torch.equal(out[3], W[0])}")
print(
    "gradient of A's padding row is zero in both:",
    not theirs.lora_A.grad[:, 0].any() | ours.lora_A.grad[0].any(),
)
assert torch.equal(rows["ours"][3], W[0]) and not torch.equal(rows["loralib"][3], W[0])
assert theirs.lora_A.grad[:, 0].eq(0).all() and ours.lora_A.grad[0].eq(0).all()

# %% [markdown]
# **`padding_idx`** keeps a gradient from that row of $A$, in both. $A$ starts at zero, so the row stays zero. Nobody
# then notices that loralib (and PEFT) would add $\Delta W$ there if the row were not zero, as above, where $A$ is
# random. In ours the padding's output is $W$'s row, always.

# %%
theirs, ours, W, A, B = pair(max_norm=1.5)
plain = W[tokens] + 2 * A[tokens] @ B.T
outs = {"loralib": theirs(tokens), "ours": ours(tokens)}
for name, layer in (("loralib", theirs), ("ours", ours)):
    its_A = layer.lora_A.T if name == "loralib" else layer.lora_A
    kept = [torch.equal(layer.weight, W), torch.equal(its_A, A)]
    longest = outs[name].norm(dim=1).max()
    print(f"{name:8} W as it was: {kept[0]!s:5}  A as it was: {kept[1]!s:5}  longest output {longest:.2f}")
    assert kept == [name == "ours"] * 2 and (longest > 1.51) == (name == "loralib")
assert plain.norm(dim=1).max() > 1.51

# %% [markdown]
# **`max_norm`** is applied twice, to the rows of $W$ and to the rows of $A^\top$, in place. A *forward pass* rescales
# the frozen table and clips the $r$ coordinates of a token, while nothing bounds the length of the output. In ours the
# output's row is scaled down to `max_norm`, in a new tensor; $W$ and $A$ are never touched.

# %%
theirs, ours, W, A, B = pair(scale_grad_by_freq=True)
plain = pair()[1]
for layer in (theirs, ours, plain):
    layer(tokens).sum().backward()
ratio = plain.lora_A.grad[[3, 7]] / ours.lora_A.grad[[3, 7]]
print("A's gradient is divided by", [round(float(each)) for each in ratio[:, 0]], "for tokens 3 and 7")
assert torch.allclose(theirs.lora_A.grad.T, ours.lora_A.grad, atol=1e-6)
assert torch.allclose(plain.lora_B.grad, ours.lora_B.grad, atol=1e-6)

theirs, ours, W, A, B = pair(sparse=True)
ours(tokens).sum().backward()
print("ours: A's gradient is sparse:", ours.lora_A.grad.is_sparse)
try:
    theirs(tokens).sum().backward()
    crashed = False
except RuntimeError:
    crashed = True
print("loralib's backward pass with sparse=True", "raises RuntimeError" if crashed else "works")
assert crashed and ours.lora_A.grad.is_sparse

# %% [markdown]
# **`scale_grad_by_freq`** divides a token's gradient by its count in the batch (3 stands twice): a fair meaning for
# $A$, the same in both, and none for $B$, which all tokens share.
#
# **`sparse`** can't work in loralib (nor in PEFT). The gradient of $A^\top$ would be sparse in its rows; going back
# through the transpose would make it sparse in its columns, and torch has no format for that. Stored as $(V, r)$, $A$
# needs no transpose. That is worth more than it seems: the next section counts it.
#
# ## 5 · What a step must move
#
# A look-up multiplies next to nothing. What takes time is moving bytes between memory and processor. So count them:
# one step (forward, backward, SGD) on $N$ tokens, in float32, with 8 bytes for a token's id.
#
# **What it must do.** Forward: read the ids, a row of $W$ and a row of $A$ for each token, and $B$; write the output.
# Backward: read the ids, the gradient $G$ of the output, $A$'s rows and $B$; write the gradients of $B$ and of $A$'s
# rows. SGD: read and write the rows of $A$ that have a gradient, and $B$. Write $n = 4 N d$ for the bytes of a batch of
# rows, $\rho = 4 N r$ for their coordinates, $i = 8 N$ for the ids and $b = 4 d r$ for $B$:
#
# $$ \text{minimum} = 3 n + 6 \rho + 2 i + 6 b $$

# %%
explore.predict(
    "The minimum has no V in it. What brings V into loralib's step?",
    {
        "the look-up in W": "A look-up reads the rows it is asked for, N of them, whatever V is.",
        "the gradient of A": "Right: a dense gradient has a number for each of A's V · r, nearly all of them zero, and it is copied and added too.",
        "the transpose in the forward pass": "The forward transpose is a view and moves nothing. Its backward does, as a part of A's gradient.",
    },
)

# %% [markdown]
# PyTorch lets us watch every operation, the backward pass included, and add up its inputs and outputs.


# %%
def size(tensor):
    """Bytes that a tensor holds; of a sparse one its indices and values."""
    parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
    return sum(part.numel() * part.element_size() for part in parts)


# %%
class Watch(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes; views and empty tensors move none."""

    moved = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, name = op(*args, **(kwargs or {})), op.overloadpacket.__name__
        sizes = [size(each) for each in args if isinstance(each, torch.Tensor)]
        if name == "embedding":  # the ids, and for each a row: read and written
            self.moved += sizes[1] + 2 * size(out)
        elif name == "embedding_dense_backward":  # zeros everywhere, then rows are added
            self.moved += size(out) + 3 * sizes[0] + sizes[1]
        elif name == "add_" and args[1].is_sparse:  # the rows: read and written
            self.moved += sizes[1] + 2 * size(args[1]._values())
        elif name in ("mm", "mul", "add", "add_", "clone", "copy_"):
            self.moved += sum(sizes) + (0 if name == "copy_" else size(out))
        return out


# %% [markdown]
# The same on paper. loralib and PEFT do the same operations. They apply $s$ to rows of $d$ numbers. The dense gradient
# of $A^\top$ is filled with zeros ($V r$ numbers) and copied into the transposed order, and SGD reads it and $A$, and
# writes all of $A$. With $T = 4 V r$ bytes for $A$:
#
# | | bytes a step |
# | --- | --- |
# | loralib, PEFT | $12 n + 8 \rho + 3 i + 6 b + \mathbf{6 T}$ |
# | ours | $8 n + 12 \rho + 3 i + 6 b + \mathbf{4 T}$ |
# | ours, `sparse=True` | $8 n + 14 \rho + 5 i + 6 b$ |
# | minimum | $3 n + 6 \rho + 2 i + 6 b$ |

# %%
V, d, r, N = 20_000, 64, 8, 512
torch.manual_seed(4)
W, A, B, tokens = torch.randn(V, d), torch.zeros(V, r), torch.randn(d, r), torch.randint(V, (N,))
layers = {name: layer for name, (layer, *_) in four_layers(W, A, B, 16).items() if name != "from scratch"}
layers["ours"] = layers.pop("lora_edu")
layers["ours, sparse"] = LoRAEmbedding.from_layer(nn.Embedding(V, d, _weight=W), r, 16, sparse=True)
paper = traffic(V, N, d, r)
for name, layer in layers.items():
    optimizer = torch.optim.SGD(trainable_parameters(layer), lr=0.1, foreach=False)
    G = torch.ones(N, d)
    with Watch() as watch:
        layer(tokens).backward(G)
        optimizer.step()
    assert abs(watch.moved / paper[name] - 1) < 0.02, (name, watch.moved, paper[name])
    print(
        f"{name:13} {format_bytes(paper[name]):>8}, {paper[name] / paper['minimum']:5.1f} times the minimum"
    )

# %% [markdown]
# What was watched is within 2 % of the formula for each. (It counts what each operation touches, as if nothing stayed
# in the cache between two of them; with large batches little does.) Move the sliders: the vocabulary pushes three of
# the bars, and leaves two alone.

# %%
explore.bytes_moved()

# %% [markdown]
# **Why.** $T$ is in it because a dense gradient has a number for every number in $A$, nearly all of them zero, and the
# optimiser adds zero to nearly all of $A$. With Adam it is worse: it keeps two numbers for each number of $A$, and
# reads and writes them too. And a token's $r$ numbers that lie $V$ apart are fetched in $r$ cache lines of 64 bytes,
# where $4 r$ bytes side by side (32 at $r = 8$) need one; the count above doesn't show that.
#
# The sparse gradient moves $8 n$, the minimum $3 n$. Between them lie results that are written only to be read again:
# the looked-up rows, and $B$ times the coordinates, before the two are added. Only code that does all of it for a row
# while the row is in registers can avoid them.
#
# ### Measured
#
# By the bytes, a step with a sparse gradient at $V = 400\,000$ should be 60 times as fast as loralib's.

# %%
explore.predict(
    "At V = 400 000 and 512 tokens on this CPU: how many times as fast as loralib's is the step with a sparse gradient?",
    {
        "about 60 times": "Yes, if bytes were all. But a step has dozens of operations, and starting each one takes microseconds.",
        "about 10 times": "Near what we measured on a quiet machine (9 times). The bytes win, but starting dozens of small operations takes its time too.",
        "equally fast": "That is about what comes out at V = 10 000, where starting the operations takes most of the time.",
    },
)


# %%
def stopwatch(V, N=512, rounds=9):
    """Median milliseconds of a step by name, all layers taking turns."""
    W, A, B = torch.randn(V, 64), torch.zeros(V, 8), torch.randn(64, 8)
    layers = {name: layer for name, (layer, *_) in four_layers(W, A, B, 16).items() if name != "from scratch"}
    layers["ours"] = layers.pop("lora_edu")
    layers["ours, sparse"] = LoRAEmbedding.from_layer(nn.Embedding(V, 64, _weight=W), 8, 16, sparse=True)
    tokens, G, times = torch.randint(V, (N,)), torch.ones(N, 64), {name: [] for name in layers}
    optimizers = {n: torch.optim.SGD(trainable_parameters(layer), lr=0.1) for n, layer in layers.items()}
    for _ in range(rounds):
        for name, layer in layers.items():
            began = time.perf_counter()
            optimizers[name].zero_grad()
            layer(tokens).backward(G)
            optimizers[name].step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(each[2:]) for name, each in times.items()}


# %% tags=["nbval-ignore-output"]
small, large = stopwatch(10_000), stopwatch(400_000)
for name in small:
    print(f"{name:13} {small[name]:7.2f} ms at V = 10 000, {large[name]:7.2f} ms at V = 400 000")
for name in ("loralib", "PEFT"):
    assert large[name] > 2 * large["ours, sparse"] and large[name] > 2 * small[name], name
assert large["ours, sparse"] < large["ours"]

# %%
by_bytes = traffic(400_000, 512)
print(f"by the bytes: {by_bytes['loralib'] / by_bytes['ours, sparse']:.0f} times")
assert round(by_bytes["loralib"] / by_bytes["ours, sparse"]) == 60

# %% [markdown]
# The gain is smaller than the bytes say, and at $V = 10\,000$ there is hardly any: a step of a few hundred tokens has
# dozens of operations, and starting one costs microseconds, however little it moves. Where the vocabulary is large the
# bytes win: the dense ways take several times as long at 400 000 as at 10 000, and the sparse one grows far less.
#
# A sparse gradient needs an optimiser that takes it: SGD without momentum, or `SparseAdam`. (With *momentum* a step
# follows a running mean of the gradients. That mean has a number for every number of $A$, and it goes on moving rows
# that have no gradient now.) `SparseAdam` moves only rows of the present batch and is therefore *another method* than
# Adam, which also has such a mean. `lora_edu.lora.pair_optimizers` gives `lora_A` the one and the rest the other.
#
# ## 6 · When the head shares the table
#
# Many models have **one** table for the embedding and for the output layer (*tied*): logits $= h W^\top$. LoRA on the
# embedding changes the table with which tokens are *read*.

# %%
explore.predict(
    "The model is tied, the adapter was trained on the embedding alone. What happens to the output when the adapter is merged into the table?",
    {
        "nothing": "That is what merging promises. It holds as long as nobody else uses the table.",
        "it changes: the head now uses W + ΔW too": "Right. Unmerged, tokens are written with W; merged, with W + ΔW. The cell measures how much that changes.",
        "an error": "It would be the better answer, and add_lora gives it below. loralib merges and says nothing.",
    },
)


# %%
def tied_model():
    torch.manual_seed(5)
    model = TinyLM(vocabulary=1000, width=100, layers=1)
    model.head.weight = model.embedding.weight
    return model.requires_grad_(False)


text = torch.randint(1000, (4, 64), generator=torch.Generator().manual_seed(6))
A = 0.01 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(7))
model = tied_model()
theirs = loralib.Embedding(1000, 100, r=8, lora_alpha=16)
theirs.weight = model.embedding.weight  # the shared table
theirs.lora_A.data = A.T.clone()
model.embedding = theirs
with torch.no_grad():
    unmerged = model(text)
    model.eval()  # merges, in place
    after = model(text)
same = (unmerged.argmax(-1) == after.argmax(-1)).float().mean()
apart = float((after - unmerged).norm() / unmerged.norm())
print("the head's table has changed with it:", model.head.weight is theirs.weight)
assert apart > 0.2 and same < 0.9

# %% [markdown]
# `model.eval()` was meant to switch to inference, and it changed what the model says: the logits are off by more than a
# fifth, and more than one prediction in ten is another one. Unmerged, tokens were read with $W + \Delta W$ and written
# with $W$. Merged, the one table is $W + \Delta W$, and so they are also *written* with it. The adapter was trained for
# the first, not for the second.
#
# A table of its own for the embedding repairs this in memory. But a model whose config says 'tied' is tied again when
# it is saved and loaded, and one of the two tables overwrites the other (huggingface/transformers #45127; PEFT's users
# know it as huggingface/peft #1750). `add_lora` refuses, with the reason:

# %%
try:
    add_lora(tied_model(), rank=8, alpha=16, targets="embedding")
except ValueError as error:
    message = str(error)
print(message)
assert "tied" in message and "head.weight" in message

# %%
model = add_lora(tied_model(), rank=8, alpha=16, targets="embedding", tied="separate").eval()
model.embedding.lora_A.data = A.clone()
with torch.no_grad():
    unmerged = model(text)
    model.embedding.merge()
    after = model(text)
print("separate: merging leaves the output as it was:", torch.allclose(after, unmerged, atol=1e-4))
assert torch.allclose(after, unmerged, atol=1e-4)
assert not torch.equal(model.embedding.weight, model.head.weight)

# %% [markdown]
# `tied="separate"` says that you know: the embedding gets $\Delta W$, the head keeps $W$, merged or not. The price is a
# second table while merged, and a model that must be saved as *untied*, or with its adapter apart. There is a third
# way, in which both see $W + \Delta W$ from the start. Then it has to be trained so, and a row never read still gets a
# gradient, from the head's softmax.

# %% [markdown]
# ## 7 · From bytes to a roofline
#
# Back to the bytes. On a GPU the forward pass alone, in bfloat16, with $n = 2 N d$, $\rho = 2 N r$, $i = 8 N$ and
# $b = 2 d r$:
#
# | | bytes |
# | --- | --- |
# | loralib, PEFT | $8 n + 3 \rho + 2 i + b$ |
# | ours in PyTorch | $6 n + 5 \rho + 2 i + b$ |
# | one pass | $2 n + \rho + i + b$ |
#
# The last line reads each row once, keeps everything in registers, and writes the output once. First, is the table
# right? `Watch` counts a forward pass of section 5's layers (in float32, so 4 bytes a number instead of 2).

# %%
paper = look_up_bytes(N, d, r, each=4)
for name in ("loralib", "PEFT", "ours"):
    with torch.no_grad(), Watch() as watch:
        layers[name](tokens)
    way = "PyTorch, ours" if name == "ours" else "loralib, PEFT"
    assert abs(watch.moved / paper[way] - 1) < 0.02, (name, watch.moved, paper[way])
    print(f"{name:8} {format_bytes(watch.moved)} watched, {format_bytes(paper[way])} on paper")
print(f"one pass {format_bytes(paper['one pass'])}, to be had by a kernel only")

# %% [markdown]
# A card has two speeds: bytes a second, from and to its memory, and operations a second. A pass that moves $Q$ bytes
# and does $F$ operations takes at least the larger of $Q$ / bandwidth and $F$ / peak. Drawn over $F / Q$, the
# **operations a byte**, this is a roof: a slope where bytes set the time, a flat top where operations do, and between
# them the ridge. A look-up does $2 d (r + 1)$ operations a token.

# %%
explore.predict(
    "In one pass, at d = 4096, r = 16 and 2 bytes a number: how many operations for each byte? An H100's ridge is at about 300.",
    {
        "about 8": "Right: 2 · d · 17 operations for 4 · d bytes, about r / 2. Far below the ridge, so bytes are the time.",
        "about 300, at the ridge": "A large matrix product is there and above. A look-up does only r + 1 multiplications for each number it writes.",
        "about 4000": "That is near d. But d enters the bytes as it enters the operations, and cancels.",
    },
)

# %%
explore.roofline()

# %%
bandwidth, peak = CARDS["H100 SXM"]


def rank_at_the_ridge(way):
    """The smallest rank whose forward pass does as many operations a byte as the ridge has; 65 536 tokens, d = 4096."""
    each = lambda rank: look_up_operations(65_536, 4096, rank) / look_up_bytes(65_536, 4096, rank)[way]
    return next(rank for rank in range(1, 10_000) if each(rank) >= peak / bandwidth)


ranks = {way: rank_at_the_ridge(way) for way in ("one pass", "loralib, PEFT")}
print("on an H100 the ridge is reached at r =", ranks)
assert 600 < ranks["one pass"] < 680 and 2900 < ranks["loralib, PEFT"] < 3200

# %% [markdown]
# About $r / 2$ operations a byte: $2 d r$ operations for $4 d$ bytes. At every usual rank the look-up is on the slope,
# where multiplying is free and moving is not. loralib's chain of operations is on it as well: it does the same
# multiplications, and moves four times the bytes. On an H100 one pass would meet the ridge only at a rank of about 640,
# the chain at about 3 000.
#
# The figures of the cards are those that NVIDIA **publishes**; no kernel reaches them. And nothing in this picture was
# **measured**: it says what cannot be beaten. (Section 9 says what has been measured so far.)
#
# ### And a linear layer?
#
# Most of a reader's LoRA is in linear layers, where a tensor core has real work: $2 N d^2$ operations for $W x$. What
# LoRA adds, $2 N r \cdot 2 d$, is less than a hundredth of it at $d = 4096$, $r = 16$.

# %%
explore.predict(
    "LoRA adds 0.8 % of operations to this linear layer. How much does it add to the time, at best, as PyTorch runs it: operation by operation?",
    {
        "about 1 %": "If operations set the time. But each of LoRA's small operations reads or writes whole arrays of N rows, far below the ridge.",
        "about 10 %": "More. Count the arrays of N × d that are read and written once more: x again, the product with B, and three for the sum.",
        "a third or more": "Right, by the bytes: 36 % for ours, half for loralib and PEFT. Nothing of it is measured; the cell says what cannot be beaten.",
    },
)

# %%
shape = {"tokens": 16_384, "inputs": 4096, "outputs": 4096, "rank": 16}
moved, operations = linear_bytes(**shape), linear_operations(**shape)
print(f"operations: LoRA adds {operations['LoRA'] / operations['plain']:.1%}")
added = {way: (each - moved["plain"]) / bandwidth for way, each in moved.items() if way != "plain"}
percent = {way: 100 * seconds / (operations["plain"] / peak) for way, seconds in added.items()}
figure, axes = plots.subplots(size=(7.2, 1.9))
plots.bars(
    axes, list(percent), list(percent.values()), plots.PALETTE, [f"{p:.0f} %" for p in percent.values()]
)
axes.set(xlabel="added to the time of W x at best, %", xlim=(0, 60))
axes.set_title("0.8 % more operations, up to half as much time again")
assert percent["one pass"] < 1 and 30 < percent["PyTorch, ours"] < 40 < percent["loralib, PEFT"]
plots.show(
    figure,
    "On an H100, by published figures, LoRA's bytes add 51 % to W x in loralib, 36 % in ours, 22 % if summed in the product.",
)

# %% [markdown]
# $W x$ is on the flat top of the roof, and LoRA's part on the slope: it reads $x$ again, writes $N d$ numbers of
# $B (A x)$, and reads and writes such arrays three more times to add them. Two ways to lose less. *Summed in the
# product*: the product with $B$ starts from $W x$ instead of from zero (`torch.addmm`), one write and two reads less.
# *One pass*: a kernel that multiplies $x$ by $W$ and by $A$ while it is there, and adds before it writes. This is a
# limit on paper, for one shape (16 384 tokens, 4096 × 4096, $r = 16$, bfloat16, an H100 as published). What
# `torch.compile` makes of the chain has to be measured, and so has whether a kernel would pay: on a card
# `python tools/on_a_gpu.py` does both.
#
# ## 8 · The kernel, block by block
#
# A kernel is a program that the GPU runs many times at once; each run knows its number and nothing of the others. In
# Triton a program works on *blocks*: it computes a block of addresses, loads them, computes, and stores. Our look-up
# cuts the output ($N$ tokens × $d$ columns) into tiles of `BLOCK_T` × `BLOCK_D`, and gives a program one tile.
#
# 1. **Which tile?** From the program's number: tokens $t$, columns $c$.
# 2. **Masks.** Blocks have sides that are powers of two, and $N$, $d$ and $r$ need not. What lies outside must be
#    neither read nor written.
# 3. **Gather.** The tokens' ids say which rows of $W$ and $A$ to load: addresses that the program has just loaded.
# 4. **`tl.dot` on a padded rank.** The tensor cores multiply blocks of at least 16, so $r = 3$ is padded to 16, with
#    zeros that a masked load gives.
# 5. **Store**, once.
#
# Below is one program of it in plain PyTorch: 6 tokens, $d = 10$, tiles of 4 × 8.

# %%
explore.predict(
    "6 tokens, d = 10, tiles of 4 tokens × 8 columns: how many programs, and how much of the last tile is real?",
    {
        "2 programs, all of it real": "60 numbers fit into two tiles of 32, but a tile is a rectangle. Round up along each side.",
        "4 programs, 4 of 32 places": "Right: 2 × 2 tiles, and the last one has two tokens and two columns left.",
        "4 programs, half of it real": "Four, yes: ⌈6 / 4⌉ × ⌈10 / 8⌉. In the last one 2 of 4 tokens and 2 of 8 columns are left.",
    },
)

# %%
torch.manual_seed(8)
V, d, r, s = 20, 10, 3, 2.0
W, A, B = torch.randn(V, d), torch.randn(V, r), torch.randn(d, r)
tokens = torch.tensor([3, 7, 3, 0, 19, 7])
right = W[tokens] + s * A[tokens] @ B.T

# %%
BLOCK_T, BLOCK_D, program = 4, 8, 3  # change them
columns = -(-d // BLOCK_D)  # rounded up
t = program // columns * BLOCK_T + torch.arange(BLOCK_T)
c = program % columns * BLOCK_D + torch.arange(BLOCK_D)
mask = (t < len(tokens))[:, None] & (c < d)
token = tokens[t.clamp(max=len(tokens) - 1)]  # a masked load reads nothing; here: something harmless
tile = W[token][:, c.clamp(max=d - 1)] + s * A[token] @ B[c.clamp(max=d - 1)].T
print("programs:", columns * -(-len(tokens) // BLOCK_T))
print(
    f"this one: tokens {t.tolist()}, columns {c.tolist()}; {int(mask.sum())} of {mask.numel()} places are real"
)
places = mask.nonzero(as_tuple=True)
assert torch.allclose(tile[places], right[t[places[0]], c[places[1]]], atol=1e-6)

# %% [markdown]
# Four places of 32 are real: at the edge a tile is mostly outside. Now the same in Triton, all five steps. (If Triton
# is not installed, the next cell defines what is never run.)

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
if triton_version() >= ((3, 5) if device == "cuda" else (3, 7)):
    import triton
    import triton.language as tl

    from lora_edu.lora import triton_kernels as kernels
else:
    triton, tl, kernels = None, SimpleNamespace(constexpr=None), None
jit = triton.jit if triton else lambda function: function


def interpreted(run, recorded):
    """What run() says; without Triton what it said when this notebook was built, and one line that tells so."""
    if triton is None:
        return f"No Triton 3.7 here (its wheels are for Linux). Recorded on its interpreter:\n{recorded}"
    return run()


# %%
@jit
def look_up_kernel(
    tokens, W, A, B, out, N, d, s, r: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, RANK_MASK: tl.constexpr = True, BATCH_MASK: tl.constexpr = True,
):  # fmt: skip
    columns = tl.cdiv(d, BLOCK_D)
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, R)
    in_batch, in_row, in_rank = t < N, c < d, k < r
    if not BATCH_MASK:
        in_batch = t >= 0
    if not RANK_MASK:
        in_rank = k >= 0

    token = tl.load(tokens + t, mask=in_batch, other=0)
    w = tl.load(W + token[:, None] * d + c, mask=in_batch[:, None] & in_row, other=0.0)
    a = tl.load(A + token[:, None] * r + k, mask=in_batch[:, None] & in_rank, other=0.0)
    b = tl.load(B + c * r + k[:, None], mask=in_rank[:, None] & in_row, other=0.0)
    update = tl.dot(a, b, input_precision="ieee")
    tl.store(out + t[:, None] * d + c, w + s * update, mask=in_batch[:, None] & in_row)


# %% [markdown]
# Read it against the list: the program's number gives $t$ and $c$; three masks; the ids, then rows at addresses made
# from them; `tl.dot` on $R \ge r$ columns; one store. `W + token[:, None] * d + c` is a block of addresses: a row a
# token.


# %%
def launch(tokens, W, A, B, out, BLOCK_T=16, BLOCK_D=16, **masks):
    """Fills out; returns the number of programs."""
    (d, r), R = B.shape, max(16, triton.next_power_of_2(B.shape[1]))
    programs = triton.cdiv(len(tokens), BLOCK_T) * triton.cdiv(d, BLOCK_D)
    look_up_kernel[(programs,)](tokens, W, A, B, out, len(tokens), d, s, r, R, BLOCK_T, BLOCK_D, **masks)
    return programs


def first_run():
    inputs = [each.to(device) for each in (tokens, W, A, B)]
    out = torch.empty(len(tokens), d, device=device)
    programs = launch(*inputs, out)
    return f"{programs} program; equal to PyTorch: {torch.allclose(out.cpu(), right, atol=1e-5)}"


# %% tags=["nbval-ignore-output"]
recorded = "1 program; equal to PyTorch: True"
print(said := interpreted(first_run, recorded))
assert said.endswith(recorded)

# %% [markdown]
# ### Change a block size
#
# 100 tokens, $d = 40$. Which tile wastes least? Which gives the GPU most programs to spread over its (say) 132
# multiprocessors? Change the tiles and see; the result must not change.


# %%
def try_tiles(tiles=((16, 16), (16, 64), (64, 32), (128, 128))):
    torch.manual_seed(9)
    W, B, tokens = torch.randn(V, 40), torch.randn(40, r), torch.randint(V, (100,))
    right, lines = W[tokens] + s * A[tokens] @ B.T, []
    for BLOCK_T, BLOCK_D in tiles:
        out = torch.empty(100, 40, device=device)
        programs = launch(*(each.to(device) for each in (tokens, W, A, B)), out, BLOCK_T, BLOCK_D)
        idle = 1 - 100 * 40 / (programs * BLOCK_T * BLOCK_D)
        equal = torch.allclose(out.cpu(), right, atol=1e-5)
        lines.append(
            f"{BLOCK_T:3} × {BLOCK_D:3}: {programs:2} programs, {idle:3.0%} of places idle, equal: {equal}"
        )
    return "\n".join(lines)


# %% tags=["nbval-ignore-output"]
recorded = """\
 16 ×  16: 21 programs, 26% of places idle, equal: True
 16 ×  64:  7 programs, 44% of places idle, equal: True
 64 ×  32:  4 programs, 51% of places idle, equal: True
128 × 128:  1 programs, 76% of places idle, equal: True"""
print(said := interpreted(try_tiles, recorded))
assert said.endswith(recorded)

# %% [markdown]
# Idle places cost no bytes, as a masked load fetches nothing, but they cost registers and time. Small tiles waste less
# and load $B$'s rows more often: it is a choice to be measured, on a card. Until then the package goes by a rule, which
# gives 64 × 128 at $d = 4096$ in bfloat16.
#
# ### Break a mask
#
# Two ways to be wrong. Leave out the mask on the **rank**, and the kernel loads 16 numbers where a token has $r = 3$.
# Leave out the mask on the **batch**, and the kernel writes behind the end of the output. So that nothing is harmed,
# all tensors below lie in larger ones of our own.

# %%
explore.predict(
    "Without the mask on the rank: what does the kernel multiply in the 13 places behind a token's 3 numbers of A?",
    {
        "zeros": "They would be zeros if the load were masked. Without the mask it reads what lies there.",
        "the rows of the next tokens": "Right: row t + 1 begins where row t ends. The cell rebuilds the wrong result from them.",
        "nothing: the GPU stops with an error": "Only outside all of the program's memory. Here the address is valid, so nobody notices.",
    },
)


# %%
def break_rank_mask():
    room_A, room_B = torch.zeros(V * r + 16), torch.zeros(d * r + 16)
    room_A[: V * r], room_B[: d * r] = A.flatten(), B.flatten()
    inputs = [each.to(device) for each in (tokens, W, room_A, room_B)]
    out = torch.empty(len(tokens), d, device=device)
    launch(*inputs[:3], inputs[3][: d * r].view(d, r), out, RANK_MASK=False)
    rows = room_A.unfold(0, 16, r)[tokens]  # 16 numbers from where the token's row begins
    wrong = W[tokens] + s * rows @ room_B.unfold(0, 16, r)[:d].T
    explained = torch.allclose(out.cpu(), wrong, atol=1e-4)
    return (
        f"right: {torch.allclose(out.cpu(), right, atol=1e-4)}; the neighbours' rows explain it: {explained}"
    )


def break_batch_mask():
    memory, ids = torch.full((16, d), -1.0, device=device), torch.zeros(16, dtype=torch.long)
    ids[: len(tokens)] = tokens
    launch(ids.to(device)[: len(tokens)], *(each.to(device) for each in (W, A, B)), memory, BATCH_MASK=False)
    kept = torch.allclose(memory[: len(tokens)].cpu(), right, atol=1e-5)
    overwritten = int((memory[len(tokens) :] != -1).sum())
    return f"the output is right: {kept}; {overwritten} numbers behind its end are overwritten"


# %% tags=["nbval-ignore-output"]
recorded = """\
right: False; the neighbours' rows explain it: True
the output is right: True; 100 numbers behind its end are overwritten"""
print(said := interpreted(lambda: f"{break_rank_mask()}\n{break_batch_mask()}", recorded))
assert said.endswith(recorded)

# %% [markdown]
# **Why.** Row 7 of $A$ is followed by row 8, and that by row 9: the padded product took the coordinates of more than
# five tokens for those of one. It would be enough to mask only $A$ or only $B$, as 0 times a number is 0, unless the
# other one reads a NaN: 0 · NaN is NaN. The second mistake is worse, because the output looks right: some other tensor
# has lost its numbers.
#
# ### The package's kernel
#
# It has these five steps, and what real use needs besides. Here is its source as installed:

# %%
source = Path(inspect.getfile(LoRAEmbedding)).with_name("triton_kernels.py").read_text(encoding="utf-8")
forward = source[source.index("def forward_kernel(") : source.index("def backward_kernel(")]
body = forward[forward.index("    column_blocks: ") : forward.rindex("@triton.jit")].rstrip()
print(textwrap.dedent(body))

# %% [markdown]
# It has more than ours:
#
# - offsets of 64 bits, as a table of 256 000 × 16 384 has more than $2^{31}$ numbers;
# - the rank in pieces of 16 or 32, so that $r = 256$ still fits into the registers;
# - sums in float32 whatever the dtype, rounded once, at the store;
# - the rows of $W$ are asked for before those of $A$: a load takes the GPU some hundred steps, and these two can wait
#   side by side;
# - sizes that never change ($d$, $r$) are compiled in, so that the compiler can prove that a thread may load 16 bytes at
#   once;
# - the padding row, for which $A$ is not read, and an unknown id, which reads nothing and makes its row **NaN**;
# - switches for what only a card can decide: the order of the tiles, programs that make several, hints to the cache.
#
# The NaN is for CUDA. A CPU's look-up refuses an id outside the vocabulary. On a GPU nothing checks it, unless you ask
# for it: `LoRAEmbedding(check_tokens=True)`, the default, looks first and raises an error that names the id. That is a
# pass over the ids, and a wait until the GPU has done all that it was given before. Without it (`check_tokens=False`,
# for `torch.compile` and CUDA graphs) a wrong id gives NaN and never another row's numbers.


# %%
def package_run():
    torch.manual_seed(10)
    W, A, B = torch.randn(50, 130), torch.randn(50, 20), torch.randn(130, 20)
    tokens, lines = torch.randint(50, (4, 25)), []
    for dtype, bound in ((torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        w, a, b = (each.to(device, dtype) for each in (W, A, B))
        out = kernels.look_up(tokens.to(device), w, a, b, s).cpu().double()
        exact = w.cpu().double()[tokens] + s * a.cpu().double()[tokens] @ b.cpu().double().T
        apart = float((out - exact).abs().max() / exact.abs().max())
        lines.append(f"{dtype}: {'within' if apart < bound else 'NOT within'} {bound:g} of float64")
    odd = kernels.look_up(torch.tensor([1, 50], device=device), w, a, b, s)
    return "\n".join([*lines, f"unknown token 50: NaN {odd.isnan().any(1).tolist()}"])


# %% tags=["nbval-ignore-output"]
recorded = """\
torch.float64: within 1e-15 of float64
torch.float32: within 1e-06 of float64
torch.bfloat16: within 0.01 of float64
unknown token 50: NaN [False, True]"""
print(said := interpreted(package_run, recorded))
assert said.endswith(recorded)

# %% [markdown]
# ## 9 · The way back
#
# With $G$, the gradient of the output, the backward pass needs two products: the rows $s \, G B$ for $A$, and
# $s \, G^\top A[\text{tokens}]$ for $B$. PyTorch does one after the other, and reads $G$ twice.
#
# Ours reads it once. A program owns `BLOCK_D` *columns* of $G$ and walks down its share of the tokens. It has loaded
# these columns' rows of $B$ before it starts, and it keeps *their* gradient in registers until it has passed all of its
# tokens: that is all of $B$'s part. Each block of tokens that it passes gives a piece of the rows for $A$, over these
# columns only; other programs add theirs.
#
# 'Add theirs' hides a choice. Additions in order of arrival (*atomic*) are fast and need no memory, but the order is
# another one each time. And in floating-point numbers order matters.

# %%
explore.predict(
    "In float32, with big = 100 000 000: are (big + 1) − big and (big − big) + 1 equal?",
    {
        "yes, both are 1": "In exact arithmetic. float32 keeps about seven digits, and big + 1 needs nine.",
        "no: 0 and 1": "Right: big + 1 is rounded back to big. The order of a sum decides what is rounded away.",
        "no: 1 and 0": "Ask which sum has to be rounded: big + 1 needs nine digits, and float32 keeps about seven.",
    },
)

# %%
big, one = torch.tensor(1e8), torch.tensor(1.0)
print("(big + 1) − big =", float((big + one) - big), "  (big − big) + 1 =", float((big - big) + one))
assert (big + one) - big != (big - big) + one

# %% [markdown]
# So `lora_embedding(…, deterministic=True)` lets each program write a result of its own, to be summed in a fixed order
# afterwards: the same bits every time, for more memory.
#
# Then the rows have to be added up for each token. Token 3 may stand in 65 536 places, and its row in $A$'s gradient is
# the sum over them. If all of them added to that one row by atomic additions, each would have to wait for the others.
# Sorting the ids first, and summing neighbours in a fixed order, takes as long for one token as for many; PyTorch has
# that operation, and an $(N, r)$ array is small. With `sparse=True` even this is left to the optimiser.


# %%
def gradients_run():
    torch.manual_seed(11)
    tokens, G = torch.randint(V, (200,)), torch.randn(200, d)
    given = [each.to(device) for each in (G, tokens, A, B)]
    lines = []
    for deterministic in (False, True):
        rows, dB = (each.cpu() for each in kernels.gradients(*given, s, deterministic=deterministic))
        dA = torch.zeros(V, r).index_add(0, tokens, rows)
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        (W[tokens] + s * a[tokens] @ b.T).backward(G)
        equal = torch.allclose(dA, a.grad, atol=1e-4), torch.allclose(dB, b.grad, atol=1e-4)
        lines.append(f"deterministic={deterministic}: A's gradient {equal[0]}, B's {equal[1]}")
    return "\n".join(lines)


# %% tags=["nbval-ignore-output"]
recorded = """\
deterministic=False: A's gradient True, B's True
deterministic=True: A's gradient True, B's True"""
print(said := interpreted(gradients_run, recorded))
assert said.endswith(recorded)

# %% [markdown]
# ### Measured?
#
# What has been checked without a GPU: the same source, on Triton's interpreter, agrees with float64 in hundreds of
# cases (shapes, dtypes, options); and Triton compiles it for an H100 into machine code that spills no register, loads
# 16 bytes a thread and uses the tensor cores for half precision (`tests/lora/compiled_kernels.py` prints what each
# kernel takes). What only a card can tell: the share of a copy's speed, the time beside loralib, PEFT and
# `torch.compile`, which tiles are best, and what `check_tokens` costs. One command asks for all of it; the cell shows
# what it found, or that it has not been run.

# %% tags=["nbval-ignore-output"]
record = REPOSITORY / "benchmarks" / "results" / "gpu_embedding.json"
measured = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
shown = explore.measured_on_a_gpu(measured)
assert isinstance(shown, str) == (measured is None)
print(shown) if measured is None else shown

# %% [markdown]
# ## What to remember
#
# - A look-up is a one-hot product. $\Delta W = s \, (B A)^\top$ for a $(V, d)$ table; row $t$ is $s \, A[t] B^\top$ with
#   our `lora_A`: $r + d$ numbers read, whatever $V$ is.
# - Starting at $A = 0$ leaves the rows of tokens never seen as they were. Starting at $B = 0$ moves all of them, at
#   random. In a linear layer there is no such row.
# - $B \sim N(0, 1)$ makes Adam's first step $\sqrt{3 d}$ times as long as a linear layer's: give the embedding its own
#   learning rate.
# - loralib hands `padding_idx`, `max_norm`, `scale_grad_by_freq` and `sparse` to a look-up in $A^\top$. Two of them break
#   there: `max_norm` rewrites $W$ and $A$, `sparse` crashes.
# - A dense gradient moves $6 T$ (or $4 T$) bytes a step, $T = 4 V r$. A sparse one moves none of them.
# - Tied table: merging into it changes the head. Refuse, or keep two tables.
# - A look-up does about $r / 2$ operations a byte, far below a card's ridge: **bytes are the time**, and one pass moves a
#   quarter of the chain's. A linear layer's LoRA part is on that slope as well.
# - A Triton program computes one tile: masks for what lies outside, a gather by ids, `tl.dot` on a padded rank, one
#   store. A mask left out reads a neighbour's numbers, or overwrites them.
# - In the backward pass a program owns columns of $G$; sums of many programs need atomic additions, or a fixed order.
#
# ## Exercises
#
# Put your answer in place of `None` and run the cell. The check says what is wrong with it, not only that it is wrong.

# %% [markdown] tags=["exercise"]
# **1.** `exercises.loralib_factors()` gives $W$ (20, 4), `lora_A` (3, 20) and `lora_B` (4, 3), as loralib stores them;
# alpha is 16. What is row 7 of $\Delta W$?

# %% tags=["exercise"]
table, lora_A, lora_B = exercises.loralib_factors()
answer = None  # a tensor of 4 numbers
print(exercises.check_06_1(answer))

# %% tags=["solution"]
table, lora_A, lora_B = exercises.loralib_factors()
answer = 16 / 3 * lora_B @ lora_A[:, 7]
print(exercises.check_06_1(answer))

# %% [markdown] tags=["exercise"]
# **2.** A fresh `LoRAEmbedding` of 20 tokens with `padding_idx=0` gets the batch [[3, 7, 3, 0], [7, 0, 12, 3]]. After
# the first backward pass: how many rows of `lora_A`'s gradient are not zero?

# %% tags=["exercise"]
answer = None  # a number of rows
print(exercises.check_06_2(answer))

# %% tags=["solution"]
layer = LoRAEmbedding(20, 4, rank=3, alpha=16, padding_idx=0)
layer(torch.tensor([[3, 7, 3, 0], [7, 0, 12, 3]])).square().sum().backward()
answer = int(layer.lora_A.grad.ne(0).any(dim=1).sum())
print(exercises.check_06_2(answer))

# %% [markdown] tags=["exercise"]
# **3.** Write `rows_that_move(tokens, zero, V)`: how many rows of $\Delta W$ are not zero after the first step of SGD?
# `tokens` is a list of ids (no padding), `zero` says which factor starts at zero, "A" or "B"; the other one is random.

# %% tags=["exercise"]
rows_that_move = None  # def rows_that_move(tokens, zero, V): ...
print(exercises.check_06_3(rows_that_move))


# %% tags=["solution"]
def rows_that_move(tokens, zero, V):
    return len(set(tokens)) if zero == "A" else V


print(exercises.check_06_3(rows_that_move))

# %% [markdown] tags=["solution"]
# From $A = 0$ the step changes $A$ alone, in the rows of the batch. From $B = 0$ the gradient of $A$, $s \, G B$, is
# zero, and that of $B$ is not: after the step $\Delta W = s \, A B^\top$ with all $V$ random rows of $A$.

# %% [markdown] tags=["exercise"]
# **4.** Write `bytes_a_token(d, r, each)`: how many bytes a forward pass must move for each token, with `each` bytes a
# number and ids of 8 bytes. ($B$ is read once for the whole batch: leave it out.)

# %% tags=["exercise"]
bytes_a_token = None  # def bytes_a_token(d, r, each): ...
print(exercises.check_06_4(bytes_a_token))


# %% tags=["solution"]
def bytes_a_token(d, r, each):
    return 8 + each * (d + r) + each * d  # the id, the rows of W and A, the output


print(exercises.check_06_4(bytes_a_token))

# %% [markdown] tags=["exercise"]
# **5.** Write `look_up(tokens, W, lora_A, lora_B, scaling)` for our layout, $(V, r)$ and $(d, r)$, without making a
# tensor that grows with $V$.

# %% tags=["exercise"]
look_up = None  # def look_up(tokens, W, lora_A, lora_B, scaling): ...
print(exercises.check_06_5(look_up))


# %% tags=["solution"]
def look_up(tokens, W, lora_A, lora_B, scaling):
    return W[tokens] + scaling * lora_A[tokens] @ lora_B.T


print(exercises.check_06_5(look_up))

# %% [markdown] tags=["exercise"]
# **6.** Section 8's kernel pads the rank to $R$, the smallest power of two that is at least $r$ and at least 16. Write
# `idle(r)`: what share of the $R$ numbers that `tl.dot` multiplies for each entry is padding?

# %% tags=["exercise"]
idle = None  # def idle(r): ...
print(exercises.check_06_6(idle))


# %% tags=["solution"]
def idle(r):
    R = 16
    while R < r:
        R *= 2
    return (R - r) / R


print(exercises.check_06_6(idle))

# %% [markdown] tags=["exercise"]
# **7.** Write `added_bytes(N, d, r)`: the bytes that LoRA adds to a *linear* layer's forward pass, $d$ in and $d$ out,
# in bfloat16, if PyTorch runs it in these four operations: `low = x @ A.T`, `low = s * low`, `up = low @ B.T`,
# `out.add_(up)`. Each reads its inputs and writes its result.

# %% tags=["exercise"]
added_bytes = None  # def added_bytes(N, d, r): ...
print(exercises.check_06_7(added_bytes))


# %% tags=["solution"]
def added_bytes(N, d, r):
    down = N * d + r * d + N * r  # x and A read, low written
    scale = 2 * N * r
    up = N * r + d * r + N * d
    add = 3 * N * d  # out and up read, out written
    return 2 * (down + scale + up + add)


print(exercises.check_06_7(added_bytes))

# %% [markdown] tags=["exercise"]
# **8.** $A$ is stored as $(V, 3)$, row after row. The kernel loads token 7's row at `A + 7 * 3 + k` for $k$ = 0 … 15,
# and its mask on the rank is left out. Which entry of $A$, (row, column), does it read at $k = 4$?

# %% tags=["exercise"]
answer = None  # (row, column), both counted from 0
print(exercises.check_06_8(answer))

# %% tags=["solution"]
answer = divmod(7 * 3 + 4, 3)
print(exercises.check_06_8(answer))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685), §4.1: $h = W_0 x + B A x$
#   and the start, for linear layers; §4.2 applies it to attention only.
# - microsoft/LoRA, `loralib/layers.py`, class `Embedding`; pull request 14 and issues 76 and 98 on its start.
# - Kingma & Ba 2015, *Adam* (arXiv 1412.6980), §2.1: why a step is about one learning rate long.
# - Williams, Waterman & Patterson 2009, *Roofline* (Communications of the ACM 52:4): when bytes, not multiplications, set
#   the time.
# - Tillet, Kung & Cox 2019, *Triton: an intermediate language and compiler for tiled neural network computations* (MAPL
#   2019), and the tutorials of triton-lang.org.
# - Others' kernels: axolotl's `LoRA_Embedding` writes the backward pass by hand, over PyTorch's operations; sglang's
#   `embedding_lora_a_fwd` looks up $A$ in Triton, for inference.
# - Here: chapter 04, what the embedding costs; chapter 03, on the rows that Adam moves although no token reads them.
