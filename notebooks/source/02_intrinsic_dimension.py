# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 02 · Intrinsic dimension
#
# A model with 2.7 million weights is tuned. Must all of them be chosen, or would a few thousand numbers do, if each of
# them moved every weight a little? Li et al. (2018) found a way to ask: train in a *random* subspace of $d$ dimensions,
# and look for the smallest $d$ that gives a good result. Aghajanyan et al. (2020) asked it of fine-tuning, and the
# answer (200 numbers, in one case) is what the LoRA paper starts from. It then goes on to low *rank*. This chapter
# measures the dimension, and shows that it is another thing than rank.
#
# **Afterwards you can** train any model in a random subspace; find its intrinsic dimension $d_{90}$ and say of what it
# is 90 %; project into millions of dimensions without storing the projection; tell low dimension from low rank.
#
# **You should know** chapter 01 (rank and spectra), and what a gradient is.
#
# **Time**: 40 minutes to read, one to two to run.

# %% tags=["setup"]
import math

import torch
from IPython.display import clear_output

from lora_edu import explore, lowrank, plots
from lora_edu.data import load_base_losses, load_checkpoint, load_corpus, load_sweeps
from lora_edu.data.runs import around, by_dimension, levels, tuned_runs
from lora_edu.exercises import chapter_02 as exercises
from lora_edu.lora import add_lora, lora_layers
from lora_edu.loss import next_token_loss
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit
from lora_edu.tuning import adjoint, project, sparse_projection, subspace

# %% [markdown]
# ## 1 · A problem of dimension ten
#
# This one is Li et al.'s own (their section 2; they start from a random $\theta_0$, we from zero). There are
# $D = 1\,000$ parameters $\theta$, and ten wishes: the first hundred
# shall sum to 1, the next hundred to 2, …, the last hundred to 10. The loss is the squared error of the ten sums.

# %%
torch.set_default_dtype(torch.float64)  # for the small problems
D = 1000
sums = torch.kron(torch.eye(10), torch.ones(1, 100))  # (10, D): row k sums the k-th hundred
goal = torch.arange(1.0, 11.0)
θ_0 = torch.zeros(D)


def loss(θ):
    return (sums @ θ - goal).square().sum()


print(f"loss at the start: {loss(θ_0):.0f}")

# %% [markdown]
# Now do not train $\theta$. Draw $d$ random directions once, the columns of $P$, and train only how far to go along
# each:
#
# $$\theta = \theta_0 + P z$$
#
# with $P$ of shape $(D, d)$, random and fixed, and $z$ of shape $(d,)$, trained, from zero.
#
# Autograd needs nothing new for it. By the chain rule the gradient of $z$ is $P^\top$ times the gradient of $\theta$:
# what a step in the subspace sees of the full gradient is its shadow on $d$ directions.


# %%
def random_directions(D, d, seed):
    """Columns of length 1; the first k columns are the same for every d ≥ k, so the subspaces lie in one another."""
    P = torch.randn(d, D, generator=torch.Generator().manual_seed(seed)).T
    return P / P.norm(dim=0)


P = random_directions(D, 5, seed=0)
z = torch.zeros(5, requires_grad=True)
loss(θ_0 + P @ z).backward()
θ = θ_0.clone().requires_grad_()
loss(θ).backward()
assert torch.allclose(z.grad, P.T @ θ.grad)

# %% [markdown]
# In this problem we need not wait for training to converge: the loss is quadratic in $z$, and least squares gives the
# $z$ where training would end.

# %%
explore.predict(
    "There are a thousand parameters and ten wishes. What is the smallest d at which the loss reaches zero?",
    {
        "10": "Ten wishes ask for ten things, whatever the number of parameters. The table shows whether every one of "
        "200 random draws manages it, and what is left at half of ten.",
        "some 500": "Half of the parameters seems a safe guess if each wish needs its own hundred. But one direction "
        "moves all ten sums at once. Compare with the last line of the table.",
        "1000": "Every parameter matters to some sum, so one may think that all must be free. What counts is how many "
        "different things are asked. Compare with the last line of the table.",
    },
)

# %% [markdown]
# Two hundred draws of $P$ for each $d$:


# %%
def best_gain(questions, goal, P):
    """(share of the squared error that the best P z removes, that P z), from θ₀ = 0."""
    z = torch.linalg.lstsq(questions @ P, goal[:, None], driver="gelsd").solution[:, 0]
    left = (questions @ (P @ z) - goal).square().sum() / goal.square().sum()
    return 1 - left.item(), P @ z


many = range(200)  # seeds
for d in (1, 5, 9, 10):
    gains = torch.tensor([best_gain(sums, goal, random_directions(D, d, seed))[0] for seed in many])
    print(f"d = {d:2}: {gains.mean():.2f} of the loss removed on average, {gains.min():.2f} at the worst")
    assert abs(gains.mean() - d / 10) < 0.06
assert gains.min() > 1 - 1e-9

# %%
figure, axes = plots.subplots(1, 1, size=(5.4, 2.6))
dimensions = list(range(1, 13))
shares = [
    torch.tensor([best_gain(sums, goal, random_directions(D, d, seed))[0] for seed in range(40)])
    for d in dimensions
]
plots.curves(
    axes,
    {
        "mean of 40 draws": (dimensions, [float(each.mean()) for each in shares]),
        "the worst of them": (dimensions, [float(each.min()) for each in shares]),
    },
    xlabel="dimension d",
    ylabel="share of the loss removed",
)
axes.set_title("Ten wishes, a thousand parameters")
axes.legend()
assert shares[8].min() < 0.999 and shares[9].min() > 1 - 1e-9
plots.show(
    figure,
    "Share of the loss removed against d: it rises by a tenth with each direction and is whole at d = 10.",
)

# %% [markdown]
# At $d = 10$, for every draw of $P$. The problem has $D$ parameters, but it only asks ten things of them; the solutions
# fill a space of $D - 10 = 990$ dimensions, and a random subspace of $d$ dimensions meets it as soon as
# $d + 990 \ge D$. Below that, $d$ random directions take $d$ tenths of the loss away, on average. **The intrinsic
# dimension counts what the task asks, not what the model has.** Make D a million: the answer stays ten.
#
# On real data no loss reaches zero, and a threshold is needed. Li et al. set it relative to full training, at 90 %:
# **$d_{90}$ is the smallest $d$ with at least 90 % of the performance of full training**. Subspaces that lie in one
# another (more columns of the same $P$) can only do better with larger $d$, so $d_{90}$ can be found by bisection, in
# $\log_2 D$ trainings instead of $D$.


# %%
def bisect(good_enough, low, high):
    """The smallest d in (low, high] that is good enough, given that high is and every larger one is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good_enough(middle) else (middle, high)
    return high


def d_90(questions, goal, seed, directions=random_directions):
    D = questions.shape[1]
    return bisect(lambda d: best_gain(questions, goal, directions(D, d, seed))[0] >= 0.9, 0, D)


found = [d_90(sums, goal, seed) for seed in range(8)]
print("d₉₀ for eight draws of P:", found)
assert set(found) <= {6, 7, 8, 9, 10} and 8 <= sum(found) / len(found) <= 9.5

# %% [markdown]
# ## 2 · Low dimension is not low rank
#
# From "few numbers are enough" it is a short step to "so the update is of low rank". Is it? Here are two tasks for one
# weight matrix $W$ of 24 × 18, so $D = 432$.
#
# - *Twenty questions*: each is a random matrix $Q$, and the answer $\langle Q, W \rangle = \sum Q_{ij} W_{ij}$ shall be a
#   given number.
# - *Copy*: $W$ shall be equal to a given matrix, and that matrix is of rank 1.

# %%
explore.predict(
    "Copy has an answer of rank 1, which 24 + 18 numbers describe. How large is its d₉₀ in a random subspace?",
    {
        "about 1": "That is the rank of the answer. A random subspace does not know the answer, nor that it has rank 1. "
        "Look at the second line.",
        "about 42": "That many numbers describe the answer, if one may choose the two vectors. A random subspace offers "
        "fixed mixtures of all entries. Look at the second line.",
        "about 390": "The task asks for each of the 432 entries, and d random directions take d/432 of the error away: "
        "nine tenths of 432 is 389. So rank says nothing here about dimension.",
    },
)

# %%
rows, columns = 24, 18
generator = torch.Generator().manual_seed(1)
questions = torch.randn(20, rows * columns, generator=generator)
answers = torch.randn(20, generator=generator)
target = torch.outer(torch.randn(rows, generator=generator), torch.randn(columns, generator=generator))
tasks = {"twenty questions": (questions, answers), "copy": (torch.eye(rows * columns), target.flatten())}

d_of, rank_of = {}, {}
for name, (Q, wanted) in tasks.items():
    d_of[name] = d_90(Q, wanted, seed=0)
    gain, update = best_gain(Q, wanted, random_directions(rows * columns, d_of[name], seed=0))
    rank_of[name] = lowrank.numerical_rank(update.view(rows, columns))
    print(f"{name:17} d₉₀ = {d_of[name]:3} of 432; P z reshaped to 24 × 18 has rank {rank_of[name]} of 18")
assert rank_of == {"twenty questions": 18, "copy": 18}
assert 14 <= d_of["twenty questions"] <= 20 and abs(d_of["copy"] - 389) < 15

# %% [markdown]
# - *Twenty questions* has a low dimension, at most 20. The update that answers them has **full rank**: $P z$ is a mixture
#   of $d$ random matrices, and each of these alone has full rank already.
# - *Copy* has an answer of the lowest rank there is, described by 24 + 18 numbers. Its $d_{90}$ is **nine tenths of** $D$: the
#   task asks for every entry, a random subspace does not know that rank 1 would do, and takes $d / D$ of the error away.
#
# So neither implies the other. Dimension is about the *task* (how much does it ask?), with subspaces that know nothing;
# rank is about one *update* (how much is there in it?).
#
# And now LoRA's side of it: updates of rank $r$. Freeze a random $A$ of shape $(r, 18)$ and train $B$ alone:
# $\Delta W = B A$ is then linear in $B$, a subspace like the others, of $24 r$ dimensions, with $P = I \otimes A^\top$,
# a copy of $A^\top$ for each row of $B$. How large must $r$ be for 90 %?


# %%
def frozen_A_directions(r, seed):
    A = torch.randn(r, columns, generator=torch.Generator().manual_seed(seed))
    return torch.kron(torch.eye(rows), A).T  # (432, 24 r): flattened B → flattened BA


def smallest_rank(Q, wanted, seed):
    return bisect(lambda r: best_gain(Q, wanted, frozen_A_directions(r, seed))[0] >= 0.9, 0, columns)


rank_needed = {name: smallest_rank(*task, seed=0) for name, task in tasks.items()}
for name, r in rank_needed.items():
    print(f"{name:17} frozen A needs rank {r:2} of 18, which is {rows * r:3} dimensions")
assert rank_needed["twenty questions"] == 1 and 13 <= rank_needed["copy"] <= 18

# %% [markdown]
# The twenty questions, answered a moment ago by an update of rank 18, are answered by one of **rank 1** as well: with
# $A$ given it has 24 numbers to choose, and 20 are enough. So which rank a method *finds* and which rank *exists* are
# two questions: that an update has full rank (chapter 03 will find one) does not show that a low-rank one would fail.
#
# Does a low dimension always allow a low rank, then? No. Here is a third task: **the smallest singular value of** $W$
# **shall be 1**. It asks one thing. A random line, $d = 1$, meets it: the smallest singular value of $t M$ is
# $\lvert t \rvert \sigma_{\min}(M)$, so some $t$ is right. But no matrix below full rank can, since its smallest
# singular value is zero.

# %%
smallest = lambda W: torch.linalg.svdvals(W)[-1]
M = random_directions(rows * columns, 1, seed=0).view(rows, columns)  # the one direction of a random line
answer = M / smallest(M)
nearly = lowrank.truncate(answer, columns - 1)
print(
    f"on a random line: smallest singular value {smallest(answer):.3f}, rank {lowrank.numerical_rank(answer)}"
)
print(f"cut to rank {columns - 1}: smallest singular value {smallest(nearly):.3f}")
assert abs(smallest(answer) - 1) < 1e-9 and smallest(nearly) < 1e-9

# %% [markdown]
# The copy needs nearly all ranks with $A$ frozen at random, and a single one with $A$ *chosen*: truncation gives it
# exactly (chapter 01). That is what LoRA adds by training $A$ as well: its $\Delta W$ is not linear in what is trained,
# the family of all matrices of rank $r$ is no subspace, and it need not be random.

# %%
one = lowrank.truncate(target, 1)
assert torch.allclose(one, target)

# %% [markdown]
# ## 3 · A projection that is never stored
#
# For the language model $D$ is 2 728 000.

# %%
explore.predict(
    "How large is a dense P for d = 10 000, in float32?",
    {
        "as large as the model, 11 MB": "That is one column of it: each of the d directions moves every weight. Multiply "
        "by ten thousand.",
        "about 1 GB": "A hundred times the model. P has D rows and d columns of four bytes each: work it out, then look.",
        "about 100 GB": "D × d × 4 bytes: 2.7 million times ten thousand times four. More than any laptop holds.",
    },
)

# %%
D, d = 2_728_000, 10_000
print(f"dense P: {4 * D * d / 1e9:.0f} GB in float32")

# %% [markdown]
# Nobody stores that. Li et al. also use a sparse $P$, and Fastfood (Le et al. 2013), a product of diagonal matrices, a
# permutation and fast Hadamard transforms, which Aghajanyan et al. use. Ours is sparser still: **one number in each
# row**.
# Every weight is tied to one of $d$ dials and turns with it, forwards or backwards, by a random sign. It is the
# *count sketch* of Charikar et al. (2002), with as many weights on each dial as on any other.

# %%
generator = torch.Generator().manual_seed(0)
dial = torch.randperm(D, generator=generator) % d  # each dial has ⌊D/d⌋ weights or one more
sign = torch.randint(0, 2, (D,), generator=generator) * 2.0 - 1
scale = dial.bincount(minlength=d).rsqrt()  # 1/√n for a dial of n weights: columns of length 1


def P_times(z):  # (d,) → (D,)
    return sign * (scale * z)[dial]


def P_transposed_times(g):  # (D,) → (d,)
    return scale * torch.zeros(d).index_add(0, dial, sign * g)


z, g = torch.randn(d, generator=generator), torch.randn(D, generator=generator)
print(f"‖P z‖ / ‖z‖ = {P_times(z).norm() / z.norm():.6f}")
print(f"⟨P z, g⟩ / ⟨z, Pᵀg⟩ = {(P_times(z) @ g) / (z @ P_transposed_times(g)):.6f}")
assert torch.allclose(P_transposed_times(P_times(z)), z)

# %% [markdown]
# Two columns never touch the same row, so they are orthogonal, exactly; with the right scale $P$ keeps lengths.
# (Random columns of a dense $P$ are orthogonal on average.) It costs one look-up a weight, and at $d = D$ it is a
# permutation with signs: training $z$ is then full tuning.
#
# `lora_edu.tuning` has the same in eight bytes a weight. Dials and signs come from a hash of the seed, so that the same
# $P$ comes out on every machine. (One difference to section 1: a sparse $P$ for a larger $d$ does not contain that for
# a smaller one. These subspaces do not lie in one another.)

# %%
dial, factor = sparse_projection(D, d, seed=0)  # factor: ±1/√n, sign and scale in one
print(f"{(dial.nbytes + factor.nbytes) / 1e6:.0f} MB for P")
moved = project(z, dial, factor)  # differentiable in z, by `adjoint`
assert torch.allclose(moved.norm(), z.norm()) and torch.allclose(adjoint(moved, dial, factor, d), z)
assert torch.allclose(moved @ g, z @ adjoint(g, dial, factor, d))

# %% [markdown]
# Is it as good as a dense one? With the twenty questions, yes: the same gain at the same $d$, up to the luck of the
# draw.


# %%
def sparse_directions(D, d, seed):
    dial, factor = sparse_projection(D, d, seed)
    return torch.stack([project(unit, dial, factor) for unit in torch.eye(d)], 1)


for d in (10, 20):
    dense, sparse = (
        [best_gain(*tasks["twenty questions"], directions(rows * columns, d, seed))[0] for seed in range(40)]
        for directions in (random_directions, sparse_directions)
    )
    print(f"twenty questions, d = {d}: gain {sum(dense) / 40:.2f} dense, {sum(sparse) / 40:.2f} sparse")
    assert abs(sum(dense) - sum(sparse)) / 40 < 0.1
assert min(dense) > 1 - 1e-9 and min(sparse) > 1 - 1e-9

# %% [markdown]
# But there is a price, and it shows where a task asks for *single* weights. Two such weights on one dial can't both be
# right.

# %%
explore.predict(
    "Twenty of the 432 weights shall have given values, and d = 20. What share of that does each P manage?",
    {
        "both all of it": "Twenty numbers for twenty wishes: true of the dense P, whose columns mix all weights. On a sparse "
        "one two of the twenty may hang on the same dial. Look at the first line.",
        "dense all, sparse less": "Two weights on one dial can only move together, so they can't both be right. The table "
        "shows how much that costs, and how it fades with more dials.",
        "both little": "A random subspace of twenty dimensions seems small beside 432. But only twenty numbers are asked "
        "for. Look at the dense column.",
    },
)

# %%
chosen = torch.randperm(rows * columns, generator=generator)[:20]
single = torch.eye(rows * columns)[chosen]
for d in (20, 60, 180):
    dense, sparse = (
        [best_gain(single, answers, directions(rows * columns, d, seed))[0] for seed in range(10)]
        for directions in (random_directions, sparse_directions)
    )
    print(
        f"twenty single weights, d = {d:3}: gain {sum(dense) / 10:.2f} dense, {sum(sparse) / 10:.2f} sparse"
    )
    assert min(dense) > 1 - 1e-9 and sum(sparse) / 10 < 0.99

# %% [markdown]
# With a language model nobody can compare: the dense $P$ does not fit. One thing can be looked at, how much of a real
# gradient $g$ each draw of $P$ sees, since that is what a first step has to go by. Any $P$ like these sees
# $\lVert P^\top g \rVert^2 / \lVert g \rVert^2 = d / D$ on average; from draw to draw a dense one would scatter around
# it by a share of $\sqrt{2 / d}$.

# %%
torch.set_default_dtype(torch.float32)
base = load_checkpoint("base")
reference = load_corpus("reference")
batches = Batches(reference.train, batch=8, context=128)

# %% tags=["nbval-ignore-output"]
model = TinyLM.from_state_dict(base)
next_token_loss(model, *batches(0)).backward()
g = torch.cat([p.grad.flatten() for p in model.parameters()])
seen = torch.tensor([adjoint(g, *sparse_projection(D, 1000, seed), 1000).norm() ** 2 for seed in range(8)])
share = seen / g.norm() ** 2 * D / 1000
print(
    f"seen of the gradient, in units of d/D: {share.mean():.2f}, from {share.min():.2f} to {share.max():.2f}"
)
print(f"standard deviation {share.std():.3f}; a dense P would have {math.sqrt(2 / 1000):.3f}")
assert abs(share.mean() - 1) < 0.08 and share.std() < 0.08

# %% [markdown]
# It scatters no more than a dense $P$ would. So no draw is a bad one to start from, and one seed will do for a first
# look.
#
# ## 4 · The language model, live
#
# Base and text are those of the rest of the course: TinyLM, pre-trained on Python code, tuned on docstrings of numpy
# and matplotlib. Twenty-five steps of 1 024 tokens, so this is a taste; the next section has whole runs. `subspace`
# changes the model so that every weight, where it is read, is $\theta_0$ plus its part of $P z$. The optimiser gets $z$
# and nothing else.
#
# **What learning rate?** An entry of $P$ is about $\sqrt{d / D}$, so an Adam step of size $\eta$ in $z$ moves a weight
# by $\eta \sqrt{d / D}$. If a weight is to move as far as in full tuning, $\eta$ has to be some $0.004 \sqrt{D / d}$.
# (Adam divides each gradient by its usual size, so a step is about as long as the learning rate, whatever the gradient.
# AdamW is Adam with weight decay kept apart; here the decay is zero.)

# %%
explore.predict(
    "Of what full tuning gains in 25 steps, how much do 10 000 random dials gain?",
    {
        "next to nothing": "Each dial turns 273 weights at once, in random directions: how could that fit? It need not fit "
        "each weight, only lower the loss. See what it reaches, and what 100 dials reach.",
        "about a tenth": "Ten thousand of 2.7 million is 0.4 %. But the loss does not ask for every weight. Look at the "
        "second line of the table.",
        "more than half": "So few numbers, so much of the gain: that is the finding of Li et al. Keep in mind that 25 steps "
        "are little for full tuning; section 5 has whole runs.",
    },
)

# %% tags=["nbval-ignore-output"]
held_out = reference.test.unfold(0, 256, 4096).flatten()  # a sixteenth of it, spread over all its documents


def tune(d):
    model = TinyLM.from_state_dict(base)
    trained, rate = list(model.parameters()), 0.004
    if d is not None:
        trained, rate = [subspace(model, d).z], 0.004 * math.sqrt(D / d)
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.95), weight_decay=0.0)
    fit(model, batches, optimizer, steps=25, progress=f"d = {d or D:,}")
    return model


before = evaluate(TinyLM.from_state_dict(base), held_out)
tuned = {d: tune(d) for d in (100, 10_000, 1_000_000, None)}
clear_output()  # the progress bars have done their work
losses = {d: evaluate(model, held_out) for d, model in tuned.items()}
for d, value in losses.items():
    print(f"{f'{d or D:,}':>9} numbers trained: {before:.2f} → {value:.2f} nats a token")
assert before + 0.05 > losses[100] > losses[10_000] > losses[1_000_000]

# %% tags=["nbval-ignore-output"]
gain = {d: (before - value) / (before - losses[None]) for d, value in losses.items()}
for d, share in gain.items():
    print(f"{f'{d or D:,}':>9} numbers trained: {share:4.0%} of what full tuning gained in these 25 steps")
assert gain[100] < 0.25 and 0.5 < gain[10_000] < 0.9 < gain[1_000_000] + 0.05

# %% tags=["nbval-ignore-output"]
figure, axes = plots.subplots(1, 1, size=(6, 2))
labels = [f"{d or D:,} numbers" for d in gain]
plots.bars(axes, labels, list(gain.values()), plots.PALETTE[: len(gain)], [f"{g:.0%}" for g in gain.values()])
axes.set(xlim=(0, 1.3), xlabel="share of full tuning's gain", title="25 steps: what so many numbers gain")
assert gain[100] < gain[10_000]
plots.show(figure, "Share of full tuning's gain in 25 steps, by how many numbers are trained.")

# %% [markdown]
# Ten thousand numbers, each turning 273 weights at random, do most of what 2.7 million did; a hundred do next to
# nothing. (A million did a little better than all: twenty-five steps at one learning rate are no verdict; in whole
# runs, section 5, it stays just below.)
# But twenty-five steps are little, and full tuning would go on from there.
#
# ## 5 · Whole runs
#
# A whole run is 200 steps of 2 048 tokens and takes minutes, so these are recorded; `make data` makes them anew (each
# row in data/sweeps.json has its seed, here 0). Every run has the same text, steps and schedule. Full tuning's learning
# rate was chosen from several trials on validation text. In the subspaces it is $c \sqrt{D / d}$: at the round dimensions
# $c = 0.003$ (a weight's step is then full tuning's best), 0.006, 0.012, and further where the best lay at an end. At
# each of them 0.006 was the best or within 0.02 nats of it, and the dimensions in between have 0.006 alone. (Chapter 03's $\Delta W$ come from longer training, so its losses are lower.)
#
# What is 90 % *of*? The papers take **performance**, an accuracy that counts from zero. Ours is the share of held-out
# tokens for which the right one is the model's likeliest guess. A fine-tuner may care more about the **gain**, which
# counts from where the base stands. (In this section and in section 7 it is counted in accuracy, elsewhere in the
# course in nats.)

# %%
recorded = [row for row in load_sweeps(text="reference", steps=200) if row["test"] is not None]
validation = lambda row: row["evaluations"][-1]["loss"]
chosen = {"all weights": by_dimension(recorded, "all"), "blocks alone": by_dimension(recorded, "blocks")}
full = chosen["all weights"][D]
assert full["embedding"] == 1.0  # one rate for all weights: full tuning is the subspace of all D dimensions
accuracy = {"base": load_base_losses()["reference"]["accuracy"], "full": full["accuracy"]}
print(f"right next tokens: base {accuracy['base']:.1%}, fully tuned {accuracy['full']:.1%}")
same = {key: full[key] for key in ("method", "rate", "embedding")}
alike = [row["accuracy"] for row in recorded if same.items() <= row.items()]
print("fully tuned, by seed:", ", ".join(f"{value:.1%}" for value in alike))
assert max(alike) - min(alike) < 0.01
print(", ".join(f"90 % of the {what}: {level:.1%}" for what, level in levels(*accuracy.values()).items()))
for scope, runs in chosen.items():
    for d, row in runs.items():
        middle = 0.006 * math.sqrt((D if scope == "all weights" else 727_800) / d)
        near = [each for each in recorded if each["dimension"] == d and abs(each["rate"] / middle - 1) < 0.01]
        near = [each for each in near if each["targets"] == row["targets"] and each["seed"] == 0]
        assert all(validation(each) - validation(row) < 0.02 for each in near) and (near or d == D)

# %% [markdown]
# The base, which has never seen a docstring of numpy, has 57 % of full tuning's *performance* already. From there to 90
# % is three quarters of the gain; 90 % of the *gain* is the stricter wish.
#
# For RoBERTa on one task, Aghajanyan et al. report 200 for the first.

# %%
explore.predict(
    "What is d₉₀ of the performance here, of 2 728 000 weights?",
    {
        "about 200": "The famous figure, of a model a hundred times as large, a yes-or-no task and another measure. Look at "
        "the row of 1,000 in the table: is it near 90 %?",
        "about 65 000": "A small share, one number for 42 weights, and no small number. The next cells find it by bisection, "
        "and show how far the stricter wish, 90 % of the gain, lies above it.",
        "most of them": "A language model gives an answer at every place of a text, so one may expect that it asks for much. "
        "It does ask for more than 200. See how much.",
    },
)

# %%
explore.random_subspaces(
    {name: {d: row["accuracy"] for d, row in runs.items()} for name, runs in chosen.items()},
    before=accuracy["base"],
    full=accuracy["full"],
    sizes={"all weights": D, "blocks alone": 727_800},
)

# %% [markdown]
# And every run in a row of a table. The per cents are of full tuning of all weights.

# %%
for name, runs in chosen.items():
    print(f"{name:14}  nats a token  right  of the performance  of the gain")
    for d, row in runs.items():
        gain = (row["accuracy"] - accuracy["base"]) / (accuracy["full"] - accuracy["base"])
        print(
            f"{d:14,}{row['test']:14.2f}{row['accuracy']:7.1%}{row['accuracy'] / accuracy['full']:20.0%}{gain:13.0%}"
        )

# %% [markdown]
# Where do the curves cross the two levels? By bisection, as in section 1, but in $\log d$ and until the ends of the
# interval are within a factor of 1.4: that is why the recorded dimensions crowd in some places. For the blocks alone,
# 90 % is meant of what full tuning of the blocks alone reaches, their largest $d$.

# %%
d_90s = {}
for name, runs in chosen.items():
    for what, level in levels(accuracy["base"], runs[max(runs)]["accuracy"]).items():
        below, above = d_90s[name, what] = around(runs, level)
        share = math.sqrt(below * above) / max(runs)
        print(
            f"{name}: d₉₀ of the {what:11} ({level:.1%}) between {below:,} and {above:,}, {share:.0%} of the weights"
        )

# %%
assert all(above / below < 1.4 for below, above in d_90s.values())
within = {what: d_90s["all weights", what] for what in ("performance", "gain")}
assert 40_000 < within["performance"][0] < within["performance"][1] < 110_000
assert 200_000 < within["gain"][0] < within["gain"][1] < 400_000
assert (
    d_90s["blocks alone", "performance"][1] < 60_000 and 100_000 < d_90s["blocks alone", "gain"][0] < 200_000
)
blocks = chosen["blocks alone"][727_800]["accuracy"]
assert 0.75 < (blocks - accuracy["base"]) / (accuracy["full"] - accuracy["base"]) < 0.87

# %% [markdown]
# Bisection takes it that a larger $d$ does better. These subspaces do not lie in one another: each $d$ has a draw of
# $P$ of its own, so an interval may belong to one draw. Here are two more seeds at both ends of each interval and at the
# next recorded $d$ above it: another draw of $P$, and another order of the texts. That order moves full tuning, too, so
# each seed is held against 90 % of what full tuning reached with *that* seed.

# %%
SCOPES = {"all weights": {"method": "full"}, "blocks alone": {"method": "subspace", "dimension": 727_800}}


def by_seed(row, **about):
    """Seed → accuracy of the runs that differ from a row in their seed alone."""
    about |= {key: row[key] for key in ("method", "targets", "dimension", "rate", "embedding")}
    return {each["seed"]: each["accuracy"] for each in recorded if about.items() <= each.items()}


reached = {}
print("per cent of the words above (+) or below (-)      d    seed 0  seed 1  seed 2")
for (name, what), (below, above) in d_90s.items():
    most = by_seed(chosen[name][max(chosen[name])], **SCOPES[name])
    for d in (below, above, min(k for k in chosen[name] if k > above)):
        drawn = by_seed(chosen[name][d])
        ahead = [drawn[s] - levels(accuracy["base"], most[s])[what] for s in (0, 1, 2)]
        reached[name, what, d] = sum(each >= 0 for each in ahead)
        told = "  ".join(f"{100 * each:+6.2f}" for each in ahead)
        print(f"{f'{name}, {what}':40}{d:11,}    {told}")

# %%
for (name, what), (below, above) in d_90s.items():
    further = min(k for k in chosen[name] if k > above)
    counts = [reached[name, what, d] for d in (below, above, further)]
    assert counts[0] == 0 and counts[1] >= 2 and counts[2] == 3

# %% [markdown]
# No seed reaches the level at the lower end of an interval, and all three do at the next recorded dimension above it. At
# the upper end itself all three do in two of the four cases, and two of three in the others. So these intervals do not
# belong to one draw; but where the curve is this flat, their upper end may lie a third higher.
#
# With all weights in the subspace, $d_{90}$ of the performance is some **65 000** (between 57 000 and 75 000), one
# number for 42 weights, and $d_{90}$ of the gain some **280 000**, a tenth of the model. A thousand numbers, each
# turning 2 728 weights, do next to nothing. (In the 25 steps of section 4 ten thousand seemed to do most of the work:
# full tuning had only begun.) Take the two figures with a margin of a third.
#
# Why not 200? It is the figure of RoBERTa-Large (207 in their table 1), by a variant that spends some of its numbers on
# a scale for each layer. The papers' measure is kind (a model that always says yes has a good part of the accuracy on a
# yes-or-no task, as our base has 57 %), a yes or no for each pair of sentences asks less than one token of 10 000 at
# every place, and the larger the model, the fewer dimensions it tends to need, by Aghajanyan et al.; ours is tiny.
# Which of these weighs most, these runs do not tell. They do tell that **a low intrinsic dimension is a finding about a
# task, a model and a measure, and no law**.
#
# The blocks alone, fully tuned, reach 31 %, four fifths of the gain: the rest is in embedding and head, and no subspace
# of the blocks contains it. 90 % of the performance that *they* can reach takes some 37 000 numbers, and 90 % of their
# gain some 145 000. That is fewer than for all weights, but a larger share of the blocks' 727 800.
#
# ## 6 · What does such an update look like?
#
# Section 2 found that an update from a random subspace has full rank. Here is that of section 4's run with
# $d = 10\,000$, beside noise of the same shape and the $\Delta W$ of section 4's full tuning: the same text, the same
# 25 steps.
#
# Which of the two will its spectrum resemble?

# %% tags=["nbval-ignore-output"]
names = ["embedding.weight", "blocks.3.attention.query.weight", "blocks.3.mlp.up.weight", "head.weight"]
found = tuned[10_000].subspace.deltas()
of_full = {name: W.detach() - base[name] for name, W in tuned[None].state_dict().items()}
generator = torch.Generator().manual_seed(0)
ninety = {}
print(f"{'rank, and rank for 90 % of the energy':33}{'P z':>10}{'noise':>10}{'full tuning':>13}")
for name in names:
    noise = torch.randn(of_full[name].shape, generator=generator)
    three = [found[name], noise, of_full[name]]
    ninety[name] = [lowrank.rank_for_energy(torch.linalg.svdvals(dW), 0.9) for dW in three]
    texts = [f"{lowrank.numerical_rank(dW)}, {r}" for dW, r in zip(three, ninety[name])]
    print(f"{name:33}{texts[0]:>10}{texts[1]:>10}{texts[2]:>13}")
    assert lowrank.numerical_rank(found[name]) == 100 and abs(ninety[name][0] - ninety[name][1]) <= 4
    assert ninety[name][2] < ninety[name][1] - 5

# %% [markdown]
# Noise. Full rank, and a flat spectrum. Full tuning's needs fewer directions in every one of the four (chapter 03 takes
# such spectra apart). And yet the update from the subspace lowered the loss. **An update can be useful and look like
# noise in its spectrum.**
#
# So what does such an update keep when it is cut to rank $r$, as in chapter 01? Take its matrices (biases and norms
# moved too, and are left out here), and keep the $r$ strongest directions of each; for comparison, eight directions
# drawn at random.
#
# What share of their gain is left at $r = 8$ of 100?

# %% tags=["nbval-ignore-output"]
matrices = {name: dW for name, dW in found.items() if dW.dim() == 2}


def loss_with(update):
    state = {name: W + update.get(name, 0) for name, W in base.items()}
    return evaluate(TinyLM.from_state_dict(state), held_out)


uncut, kept = loss_with(matrices), {}
for r in (1, 8, 32):
    cut = {name: lowrank.truncate(dW, r) for name, dW in matrices.items()}
    kept[r] = (before - loss_with(cut)) / (before - uncut)
    print(f"every P z cut to rank {r:2}: {kept[r]:4.0%} of its gain")
assert kept[1] < 0.3 and kept[1] < kept[8] < 0.6 and kept[8] < kept[32] < 0.95

# %% tags=["nbval-ignore-output"]
eight = {
    name: torch.linalg.qr(torch.randn(dW.shape[1], 8, generator=generator)).Q for name, dW in matrices.items()
}
chance = (before - loss_with({n: dW @ eight[n] @ eight[n].T for n, dW in matrices.items()})) / (
    before - uncut
)
print(f"every P z on eight random directions: {chance:.0%} of its gain")
assert -0.05 < chance < 0.2 < kept[8]

# %% [markdown]
# At rank 8 about half of the gain or more is gone, and there is no rank at which it is suddenly enough. So here is an
# update of 10 000 numbers that no low rank holds: **low dimension is not low rank**, in a language model too. (The
# eight strongest do better than eight random ones since more of the update's energy lies along them.)

# %% [markdown]
# ### Full rank beside low rank
#
# LoRA trains $\Delta W = B A$ of rank $r$: whatever the task, its answer has low rank. With one rank in every matrix of
# TinyLM it trains 31 000 numbers for each rank. So for some ranks there is a recorded run in a random subspace of about
# as many numbers. One answer has full rank, the other has rank $r$. How good is each of them, and how do they look?
#
# How good they are is recorded: whole runs of 200 steps, at the best of their learning rates, seed 0. Their $P z$ is
# not stored. So how they look comes from ten short runs, live: twelve steps of 512 tokens each.

# %%
by_rank = {r: row for (r, seed), row in tuned_runs(recorded).items() if seed == 0}
rank_beside = {}  # d → rank r of the LoRA that trains about as many numbers
for r in (1, 2, 4, 8, 32):
    d = min(chosen["all weights"], key=lambda d: abs(math.log(d / by_rank[r]["parameters"])))
    rank_beside[d] = r
    assert max(d, by_rank[r]["parameters"]) < 1.3 * min(d, by_rank[r]["parameters"])
assert all(by_rank[r]["parameters"] == 31_000 * r for r in rank_beside.values())
for d, r in rank_beside.items():
    one, other = chosen["all weights"][d], by_rank[r]
    print(f"d = {d:9,}: {one['accuracy']:.1%} right; LoRA of r = {r:2}: {other['accuracy']:.1%}")


# %%
def short_run(model, groups):
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    losses = fit(model, Batches(reference.train, 4, 128), optimizer, steps=12, progress=False).steps
    assert losses[-1]["loss"] < losses[0]["loss"]


def two_updates(d, r):
    """ΔW by name, after a short run: from a random subspace of d dimensions, and from LoRA of rank r, with s = 1."""
    free, low = TinyLM.from_state_dict(base), TinyLM.from_state_dict(base)
    short_run(free, [{"params": [subspace(free, d).z], "lr": chosen["all weights"][d]["rate"]}])
    torch.manual_seed(0)
    kinds = ["embedding", "head", "query", "key", "value", "output", "up", "down"]
    layers = lora_layers(add_lora(low, r, alpha=r, targets=kinds))
    row = by_rank[r]  # its rate, of which the embedding has a share
    rates = {name: row["rate"] * (row["embedding"] if name == "embedding" else 1) for name in layers}
    short_run(low, [{"params": [W.lora_A, W.lora_B], "lr": rates[name]} for name, W in layers.items()])
    return free.subspace.deltas(), {f"{name}.weight": W.delta_weight().detach() for name, W in layers.items()}


# %% tags=["nbval-ignore-output"]
updates = {name: {} for name in names}
for d, r in rank_beside.items():
    in_subspace, in_lora = two_updates(d, r)
    for name in names:
        updates[name][d] = in_subspace[name], in_lora[name]
        assert lowrank.numerical_rank(in_subspace[name]) == 100 and lowrank.numerical_rank(in_lora[name]) == r
right = {
    "random subspace": {d: row["accuracy"] for d, row in chosen["all weights"].items()},
    "LoRA": {row["parameters"]: row["accuracy"] for r, row in by_rank.items() if r},
}
numbers_beside = {d: by_rank[r]["parameters"] for d, r in rank_beside.items()}
short = dict(zip(names, ("embedding", "query, block 3", "up, block 3", "head"), strict=True))
explore.full_rank_beside_low_rank(right, numbers_beside, {short[name]: updates[name] for name in names})

# %% [markdown]
# Move $d$, then change the matrix. In the subspace $\Delta W$ has rank 100 at every $d$, and up to $d = 100\,000$ its
# spectrum lies on that of noise. At a million dimensions a dial turns fewer than three weights, and in the two matrices
# of block 3 the spectrum falls faster than noise. (At $d = D$ it would be that of full tuning.) LoRA's $\Delta W$ ends
# at its rank: there is no direction number $r + 1$. And yet both kinds of answer work. In these recorded runs (TinyLM,
# 200 steps on docstrings, seed 0, one draw of $P$, LoRA with one rank in all matrices) the one of full rank is ahead, by
# 0.3 to 1.3 points. So low rank is not what makes an answer good, and full rank does not make it bad. (Do not compare
# how good the short runs are: they have the learning rates of the whole runs, and nobody chose these for twelve steps.)

# %%
ahead = [right["random subspace"][d] - right["LoRA"][n] for d, n in numbers_beside.items()]
assert all(0.002 < each < 0.014 for each in ahead) and D / max(rank_beside) < 3
for name in names:
    ninety_of = {
        d: lowrank.rank_for_energy(torch.linalg.svdvals(both[0]), 0.9) for d, both in updates[name].items()
    }
    assert all(abs(ninety_of[d] - ninety[name][1]) <= 4 for d in rank_beside if d < 150_000)
    assert "blocks" not in name or ninety_of[max(rank_beside)] < ninety[name][1] - 2

# %% [markdown]
# ## 7 · A fair rival
#
# "A random subspace needs so many dimensions, LoRA needs fewer numbers" is no fair comparison: LoRA chooses its
# subspace, since it trains $A$. The fair rival is section 2's: $A$ **frozen at random**, $B$ trained (in the embedding,
# where the random factor is on the other side, that one is frozen). This is a linear subspace like the others, drawn at
# random like the others, but every update in it is of low rank. Which is better at the same number of trained numbers?


# %%
def interpolated(runs, d):
    """Accuracy at d, on a straight line in log d between the recorded dimensions around it."""
    low, high = max(k for k in runs if k <= d), min(k for k in runs if k >= d)
    share = math.log(d / low) / math.log(high / low) if high > low else 0
    return (1 - share) * runs[low]["accuracy"] + share * runs[high]["accuracy"]


rivals, beside = {}, {}
for row in sorted(recorded, key=lambda row: -validation(row)):  # the best rate comes last
    if row["method"] == "frozen A" and row["seed"] == 0:
        rivals[{"all": "all weights", "blocks": "blocks alone"}[row["targets"]], row["rank"]] = row
print("                      numbers   frozen A: nats, right   random subspace of as many numbers: right")
for (name, rank), row in sorted(rivals.items()):
    same = interpolated(chosen[name], row["parameters"])
    beside[name, rank] = row["accuracy"] - same
    print(
        f"{name:13}r = {rank:2}{row['parameters']:11,}{row['test']:16.2f}{row['accuracy']:8.1%}{same:20.1%}"
    )
others = {key: by_seed(row, rank=row["rank"]) for key, row in rivals.items()}
lower = [drawn[0] - drawn[seed] for drawn in others.values() for seed in (1, 2)]
whole = by_seed(full)
print(f"frozen A with two more draws, of other seeds: {min(lower):.1%} to {max(lower):.1%} below the first")
print(f"full tuning with those seeds: {', '.join(f'{whole[0] - whole[seed]:.1%}' for seed in (1, 2))} below")

# %%
assert -0.035 < beside["all weights", 8] < -0.01 and -0.015 < beside["blocks alone", 8] < 0.01
assert abs(beside["all weights", 64]) < 0.01 and all(0.001 < each < 0.006 for each in lower)

# %% [markdown]
# Each row has the best of four to six learning rates of frozen $A$, none of them at an end of its grid, beside the
# subspaces at the best of up to four; 200 steps of TinyLM on docstrings, seed 0. (Two more draws of $A$, with two more
# orders of the texts, end at most half a point lower, and full tuning with those orders ends lower, too.) In the blocks alone
# it hardly matters **which** random subspace is taken, one of full rank or one of rank 8. With embedding and head in it,
# the one of full rank is ahead by two points of rank 8, and level with rank 64, where both have more than half as many
# numbers as the model. So low rank as such is no advantage here. Does LoRA, which *chooses* $A$, do better than this? Chapter 07
# trains it, and puts its numbers beside these.
#
# ## What to remember
#
# - $\theta = \theta_0 + P z$: train $d$ numbers, each of which moves all weights a little. Its gradient is $P^\top$ times the
#   full one.
# - The intrinsic dimension of a task counts what the task asks. $d_{90}$ is the smallest $d$ with 90 % of the performance; of
#   the *gain* is stricter. Say which, and say what the measure is.
# - $P$ need not be stored: one $\pm 1 / \sqrt{n}$ a row has orthonormal columns and costs a look-up.
# - Here (TinyLM, 200 steps on docstrings; bisected with one seed, two more at the crossings) $d_{90}$ is some 65 000 of
#   2.7 million weights for the performance, and some 280 000 for the gain: a small share, no small number. 200 was another task, another model and another measure.
# - Tune the learning rate for each $d$; $c \sqrt{D / d}$ keeps the step of a weight the same.
# - Low dimension and low rank are two things, and neither implies the other: a task met on a random line may be met by no
#   matrix below full rank. The update that a random subspace *finds* has full rank, and at as many numbers it did no worse
#   here than one of rank 8 with $A$ drawn at random.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# **Exercise 1.** `exercises.wishes()` holds eight sums of 120 parameters, a row each. What is the intrinsic dimension of
# the task to give each sum a value (values that can be met)?

# %% tags=["exercise"]
wanted_sums = exercises.wishes()
dimension = None
print(exercises.check_02_1(dimension))

# %% tags=["solution"]
wanted_sums = exercises.wishes()
dimension = lowrank.numerical_rank(wanted_sums)
print(exercises.check_02_1(dimension))

# %% [markdown] tags=["exercise"]
# **Exercise 2.** A matrix of 64 × 48 shall be equal to a given matrix of rank 2. What is $d_{90}$ (90 % of the squared error
# gone, from zero) in a random subspace?

# %% tags=["exercise"]
d_for_the_copy = None
print(exercises.check_02_2(d_for_the_copy))

# %% tags=["solution"]
d_for_the_copy = 0.9 * 64 * 48
print(exercises.check_02_2(d_for_the_copy))

# %% [markdown] tags=["exercise"]
# **Exercise 3.** A base has 20 % of the next tokens right, its fully tuned version 40 %. In random subspaces:
#
# | d | 100 | 300 | 1 000 | 3 000 | 10 000 | 30 000 |
# | --- | --- | --- | --- | --- | --- | --- |
# | right | 24 % | 28 % | 33 % | 36.5 % | 38.3 % | 39 % |
#
# Which of these $d$ is $d_{90}$ of the performance, and which is $d_{90}$ of the gain?

# %% tags=["exercise"]
of_performance_and_of_gain = None
print(exercises.check_02_3(of_performance_and_of_gain))

# %% tags=["solution"]
table = {100: 0.24, 300: 0.28, 1_000: 0.33, 3_000: 0.365, 10_000: 0.383, 30_000: 0.39}
levels = (0.9 * 0.40, 0.20 + 0.9 * (0.40 - 0.20))
of_performance_and_of_gain = [min(d for d, right in table.items() if right >= level) for level in levels]
print(exercises.check_02_3(of_performance_and_of_gain))

# %% [markdown] tags=["exercise"]
# **Exercise 4.** Write $P^\top g$ for the $P$ of section 3: `dial`, of shape $(D,)$, says which of $d$ dials each weight
# follows, `sign`, of the same shape, whether forwards (1) or backwards (−1), and the columns of $P$ have length 1.

# %% tags=["exercise"]
your_adjoint = None  # a function of (gradient, dial, sign, d), or of names of your own
print(exercises.check_02_4(your_adjoint))


# %% tags=["solution"]
def your_adjoint(gradient, dial, sign, d):
    weights_on_dial = dial.bincount(minlength=d)
    return torch.zeros(d).index_add(0, dial, sign * gradient) / weights_on_dial.sqrt()


print(exercises.check_02_4(your_adjoint))

# %% [markdown]
# ## Where to read on
#
# - Li, Farkhoor, Liu & Yosinski 2018, *Measuring the Intrinsic Dimension of Objective Landscapes* (arXiv 1804.08838): the
#   method, the toy of section 1 (its section 2), $d_{90}$, and the three projections.
# - Aghajanyan, Zettlemoyer & Gupta 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model
#   Fine-Tuning* (arXiv 2012.13255): 200 numbers tune RoBERTa to 90 % of full performance on MRPC, and larger models
#   tend to need fewer (abstract).
# - Le, Sarlós & Smola 2013, *Fastfood*; Charikar, Chen & Farach-Colton 2002, the count sketch.
# - Hu et al. 2021, *LoRA* (arXiv 2106.09685v2), §1: from intrinsic dimension to the hypothesis of a low intrinsic rank.
# - Zhang et al. 2023, *LoRA-FA* (arXiv 2308.03303): A frozen, to save memory.
