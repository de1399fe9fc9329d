# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 05 · LoRA for a linear layer
#
# **Afterwards you can** write LoRA for a linear layer in a dozen lines; say what a step of *A* and *B* does
# to ΔW, and what it cannot do; explain the two inits, alpha / *r* and the dropout; average two adapters
# without ruining both; say what alpha is good for; merge, and unmerge exactly.
#
# **You should know** what a rank is (chapter 01), what a linear layer, a gradient and Adam are, and how to
# read PyTorch. **Time:** 60 minutes to read, less than one to run.
#
# The layer we work on is a real one: *W_q* of the first block of the course's base model, 100 × 100. What
# goes into it depends on the token alone, so we can have all there is: one input for each of the 10 000
# tokens.

# %% tags=["setup"]
import copy
import math

import torch
from matplotlib import cbook
from matplotlib.image import imread
from torch import nn

from lora_edu import exercises, explore, plots
from lora_edu.data import load_checkpoint, load_corpus
from lora_edu.lora import LoRALinear, add_lora, merge_lora, remove_lora, trainable_parameters, unmerge_lora
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit

base = TinyLM.from_state_dict(load_checkpoint("base"))
query = copy.deepcopy(base.blocks[0].attention.query).double().requires_grad_(False)
with torch.no_grad():
    inputs = base.blocks[0].attention_norm(base.embedding.weight).double()
W = query.weight.detach().clone()

# %% [markdown]
# ## 1 · A dozen lines
#
# LoRA leaves *W* and the bias as they are, and adds a product of two thin matrices:
#
# > **h = W x + b + s · B A x**, *A*: (*r*, in), *B*: (out, *r*), *s* = alpha / *r*.
#
# *A* starts random and *B* at zero. Here it is, dropout included.


# %%
class LoRA(nn.Module):
    """h = W x + b + s · B A x; W and b are frozen, A and B are trained."""

    def __init__(self, layer, rank, alpha, dropout=0.0):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        outputs, inputs = layer.weight.shape
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=layer.weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=layer.weight.dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        return self.layer(x) + self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)


# %% [markdown]
# **Predict before you run.** By how much does a fresh LoRA layer change what the layer computes? And how many
# numbers of it can be trained?

# %%
torch.manual_seed(0)
lora = LoRA(copy.deepcopy(query), rank=8, alpha=16)
change = (lora(inputs) - query(inputs)).abs().max().item()
trained = sum(each.numel() for each in lora.parameters() if each.requires_grad)
print(f"largest change of any output: {change}")
print(f"numbers to train: {trained} of {W.numel()} in W, and s = {lora.scaling:g}")
assert change == 0 and trained == 8 * (100 + 100) == 1600

# %% [markdown]
# **Why.** *B* = 0, so *BA* = 0: training starts from the model as it is, not from a damaged one. The two
# products go from right to left: first *r* numbers *Ax*, then *B* times those. That takes *r*(in + out)
# multiplications a token; putting *BA* together first would take out · in, and a matrix of *W*'s size.
#
# ## 2 · Everybody's numbers
#
# Does the package compute the same? And loralib, the authors' own code, and PEFT, which most people use? All
# four get the same *W*, *A* and *B* (with a *B* that is not zero), in double precision. We compare what comes
# out *and* the gradients of *A*, of *B* and of the input.

# %%
import loralib
from peft import LoraConfig, get_peft_model


def four_layers(rank, alpha):
    """The layer `query` with LoRA: written above, the package's, loralib's, PEFT's."""
    authors = loralib.Linear(100, 100, r=rank, lora_alpha=alpha, merge_weights=False).double()
    authors.load_state_dict(query.state_dict(), strict=False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    peft = get_peft_model(nn.Sequential(copy.deepcopy(query)), config).double()
    return {
        "from scratch": LoRA(copy.deepcopy(query), rank, alpha),
        "lora_edu": LoRALinear.from_layer(copy.deepcopy(query), rank, alpha),
        "loralib": authors,
        "PEFT": peft.base_model.model[0],
    }


def factors(layer):
    """(A, B) of any of them; PEFT keeps several adapters a layer, by name."""
    A, B = layer.lora_A, layer.lora_B
    return (A["default"].weight, B["default"].weight) if isinstance(A, nn.ModuleDict) else (A, B)


# %%
def everything(layer, A, B, x, weights):
    """Output and gradients for given factors, input and weights of the outputs."""
    for factor, value in zip(factors(layer), (A, B), strict=True):
        factor.data.copy_(value)
    x = x.clone().requires_grad_(True)
    h = layer(x)
    (h * weights).sum().backward()
    return [h.detach(), *(factor.grad for factor in factors(layer)), x.grad]


worst = 0.0
for rank, alpha in [(1, 1), (8, 16), (32, 8), (100, 100)]:
    random = [torch.randn(*shape, dtype=torch.float64) for shape in ((rank, 100), (100, rank), (50, 100))]
    first, *others = (
        everything(each, *random[:2], inputs[:50], random[2]) for each in four_layers(rank, alpha).values()
    )
    for other in others:
        for one, same in zip(first, other, strict=True):
            worst = max(worst, float((one - same).abs().max() / one.abs().max()))
print("outputs and gradients of all four agree to", "12 digits" if worst < 1e-12 else f"{worst:.1e}")
assert worst < 1e-12

# %% [markdown]
# To the last digits, at four pairs of *r* and alpha. There is no more to the method than the dozen lines;
# what packages add is everything around it.
#
# ## 3 · Two inits and a dropout
#
# **What does *A* start as?** The paper says Gaussian (§4.1), and not of which width. loralib and PEFT draw
# uniformly, as PyTorch does for any linear layer ('Kaiming-uniform'). PEFT can also do a Gaussian, of
# standard deviation 1 / *r*.
#
# **Predict before you run.** Same rank, same alpha: does it matter which? We measure *r* · variance, the mean
# squared length of a column of *A*; section 4 will show that this is what a step is proportional to.

# %%
torch.manual_seed(0)
strength = {}
for name, how in {"Kaiming-uniform": True, "Gaussian": "gaussian"}.items():
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=how)
    models = [get_peft_model(nn.Sequential(nn.Linear(100, 100)), config) for _ in range(30)]
    A = torch.stack([factors(model.base_model.model[0])[0] for model in models]).detach()
    strength[name] = 8 * A.var().item()
    print(f"{name:16} largest entry {A.abs().max():.2f}, r · variance {strength[name]:.3f}")
assert f"{(1 / 8) / (8 / 300):.1f}" == "4.7"
print(f"by formula: uniform r / (3 · in) = {8 / 300:.3f}, Gaussian r / r² = {1 / 8:.3f}")
assert abs(strength["Kaiming-uniform"] * 300 / 8 - 1) < 0.02 and abs(strength["Gaussian"] * 8 - 1) < 0.03

# %% [markdown]
# **Why it matters.** Uniform from −1/√in to 1/√in has the variance 1 / (3 in). So the Gaussian is 4.7 times
# as strong here, and at another width or rank it is another factor: its variance depends on *r* only, that of
# the uniform one on the width only. The shape of the distribution hardly matters, its variance does. Two runs
# that both 'use LoRA with *r* = 8, alpha = 16' may differ by that factor in their first step.
#
# **Why is *B* the zero one, and not both?** If both were zero, neither would ever move; section 4 shows why.
# If neither were, the model would start out damaged. *A* = 0 and a random *B* would start as well; chapter 06
# does that, for embeddings.
#
# **What does the dropout hide?** Entries of *x*, from the update only: *W x* sees all of it.

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
noisy = LoRA(copy.deepcopy(query), rank=8, alpha=16, dropout=0.5).train()
x = inputs[:4]
print("B = 0, dropout 0.5: output unchanged?", torch.equal(noisy(x), query(x)))
nn.init.normal_(noisy.lora_B)
with torch.no_grad():
    mean = sum(noisy(x) for _ in range(2000)) / 2000
    quiet = noisy.eval()(x)
off = float((mean - quiet).norm() / (quiet - query(x)).norm())
print(f"mean of 2000 passes against the layer in eval(): {off:.1%} of the update apart")
assert off < 0.05

# %% [markdown]
# In training a fresh mask falls at each pass; on average it changes nothing, because what remains is scaled
# up (here by 2). So dropout is no part of ΔW: a merged layer has none.

# %% [markdown]
# ## 4 · What does a step do to ΔW?
#
# 'The exact mathematics is unclear, but anyway backpropagation updates the parameters approximately': so says
# the study note that this series grew out of. The mathematics is three lines, and nothing in it is
# approximate.
#
# We need a task that can be taken apart. Here is one: full tuning changed this layer's *W* by some *D*
# (chapter 03; it ships with the course). **Let LoRA imitate it**: the loss is how far *s BA* is from doing
# the same to all 10 000 inputs, as a share of what it is at ΔW = 0.

# %% tags=["setup"]
D = load_checkpoint("reference_seed_0")["blocks.0.attention.query.weight"].double()
C = inputs.T @ inputs / len(inputs)  # all that the loss needs to know of the inputs


def loss_of(update):
    """mean ‖(ΔW − D) x‖² over all inputs, as a share of mean ‖D x‖²."""
    missing = update - D
    return ((missing @ C) * missing).sum() / ((D @ C) * D).sum()


# %%
update = torch.zeros(100, 100, dtype=torch.float64, requires_grad=True)
loss_of(update).backward()
G = update.grad  # the gradient of the loss by W itself: what full tuning would use

outputs = (inputs @ (torch.zeros_like(D) - D).T).square().sum() / (inputs @ D.T).square().sum()
assert abs(loss_of(torch.zeros_like(D)) - outputs) < 1e-12 and loss_of(D) == 0

# %% [markdown]
# **Predict before you run.** A fresh layer, *B* = 0. One backward pass. Which gradient is zero: that of *A*,
# that of *B*, both, neither?

# %%
torch.manual_seed(0)
r, alpha = 8, 16
s = alpha / r
A = nn.init.kaiming_uniform_(torch.empty(r, 100, dtype=torch.float64), a=math.sqrt(5)).requires_grad_(True)
B = torch.zeros(100, r, dtype=torch.float64, requires_grad=True)
loss_of(s * B @ A).backward()
print(f"gradient of A: all zero? {not A.grad.any()}")
print(f"gradient of B: s G Aᵀ?   {torch.allclose(B.grad, s * G @ A.T)}")
assert not A.grad.any() and torch.allclose(B.grad, s * G @ A.T) and B.grad.any()

# %% [markdown]
# **Why.** *W* would get the gradient *G*. The chain rule through ΔW = *s BA* gives
#
# > **∂L/∂B = s G Aᵀ**, **∂L/∂A = s Bᵀ G**.
#
# The factor that stands beside is what the gradient passes through. *B* = 0 blocks *A*'s; *A* ≠ 0 lets *B*'s
# pass. *B* moves first, and from the second step on *A* moves too. With both at zero, both would be blocked
# for good.
#
# Now take one step of plain gradient descent (SGD, learning rate η). *A* stays, *B* becomes −η *s G Aᵀ*, and
# so
#
# > **ΔW = s BA = −η s² G AᵀA**.

# %%
eta = 0.01
with torch.no_grad():
    first = s * (B - eta * B.grad) @ (A - eta * A.grad)
    print("first step = −η s² G AᵀA?", torch.allclose(first, -eta * s**2 * G @ A.T @ A))
    print("its rank:", int(torch.linalg.matrix_rank(first)))
assert torch.allclose(first, -eta * s**2 * G @ A.T @ A)
assert torch.linalg.matrix_rank(first) == 8

# %% [markdown]
# Full tuning would step by −η *G*. **LoRA steps by the same gradient, seen through *A*.** Were the rows of
# *A* at right angles and of length 1, *AᵀA* would be the projection onto them: each row of *G* (one for each
# output) would be replaced by its shadow on those *r* directions. Random rows are nearly that, up to a common
# factor. What lies at right angles to all of them is gone. This is the precise meaning of 'it is
# backpropagation anyway': the gradient is exact, but the direction is not free.
#
# And later, when neither is zero? Multiply out one step of both; nothing is left off:

# %%
torch.manual_seed(1)
A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((r, 100), (100, r)))
W_now = (s * B @ A).detach().requires_grad_(True)
loss_of(W_now).backward()
loss_of(s * B @ A).backward()
G_now = W_now.grad
with torch.no_grad():
    step = s * (B - eta * B.grad) @ (A - eta * A.grad) - s * B @ A
    through_A, through_B = G_now @ A.T @ A, B @ B.T @ G_now
    both = eta**2 * s**3 * G_now @ A.T @ B.T @ G_now
    print(
        "step = −η s² (G AᵀA + BBᵀ G) + η² s³ G AᵀBᵀ G?",
        torch.allclose(step, both - eta * s**2 * (through_A + through_B)),
    )
assert torch.allclose(step, both - eta * s**2 * (through_A + through_B))

# %% [markdown]
# So a step has two parts, the gradient seen through *A* from the side of the inputs, and through *B* from the
# side of the outputs, and a rest of second order in η. As *A* itself moves, by multiples of *Bᵀ G*, it turns
# towards the directions that matter. It is not stuck with those it was born with.
#
# ### What does *AᵀA* look like?
#
# It is a 100 × 100 matrix of rank *r*. **Predict before you run.** How much of *G* is left: what is the
# cosine between *G* and *G AᵀA* at *r* = 8? And if you average *AᵀA* over many draws of *A*, what do you get?


# %%
def kaiming(r, generator):
    """Uniform between −1/√in and 1/√in, as kaiming_uniform_(a=√5) draws it."""
    return (2 * torch.rand(r, 100, generator=generator, dtype=torch.float64) - 1) / 10


generator = torch.Generator().manual_seed(0)
for r in (1, 8, 32, 100):
    seen = [G @ A.T @ A for A in (kaiming(r, generator) for _ in range(200))]
    cosine = sum(float((G * each).sum() / (G.norm() * each.norm())) for each in seen) / 200
    expected = math.sqrt(r / (r + 101))
    print(f"r = {r:3}: mean cosine {cosine:.2f}, √(r / (r + in + 1)) = {expected:.2f}")
    assert abs(cosine - expected) < 0.03

draws = 5000
mean = sum(A.T @ A for A in (kaiming(8, generator) for _ in range(draws))) / draws
away = mean - 8 / 300 * torch.eye(100)
print(f"mean of AᵀA: diagonal {mean.diagonal().mean():.4f}, where r / (3 in) = {8 / 300:.4f};")
print(f"away from that by at most {away.abs().max():.4f}")
assert abs(mean.diagonal().mean() * 300 / 8 - 1) < 0.01 and away.abs().max() < 0.002

# %% [markdown]
# **Why.** The shorter the shadow, the larger the angle: its cosine is about √(*r* / (*r* + in + 1)). In expectation
# *AᵀA*
# is *r* · variance · **identity**: no direction is preferred. So *on average over draws* LoRA's first step is
# SGD's, with the learning rate η *s*² *r* / (3 in). But one draw sees *r* directions of 100, and its step is
# nearly at right angles to the gradient (cosine 0.27 at *r* = 8). It still goes downhill if η is small: *G*
# and *G AᵀA* have the product ‖*G Aᵀ*‖², which is never negative. LoRA has one draw. It lives on the fact
# that a few directions suffice, and that *A* turns.
#
# A gradient is a matrix like any other, so here is one in which you can see what is lost: the photograph of
# chapter 01. Raise *r*, or the number of draws that are averaged. Only their product counts.

# %%
photograph = torch.from_numpy(imread(cbook.get_sample_data("grace_hopper.jpg")).mean(axis=-1) / 255)
explore.seen_through((photograph - photograph.mean())[::4, ::4])

# %% [markdown]
# ### The two gradients along a run
#
# A whole run needs a loop. This one is Adam with weight decay 0, in double precision, and its ε so small that
# it does nothing. `rate` and `start` are factors on the learning rate and on *A*₀; section 6 needs them.


# %% tags=["setup"]
RATES = {"adam": 0.004, "sgd": 0.01}


def train(r=8, alpha=16, rate=1.0, start=1.0, seed=0, steps=50, rate_B=1.0, optimiser="adam"):
    """Imitate D; returns losses, norms of both gradients at each step, and the factors (B, A)."""
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(r, 100, generator=generator, dtype=torch.float64) - 1) / 10 * start
    B = torch.zeros(100, r, dtype=torch.float64)
    lr = rate * RATES[optimiser]
    groups = [
        {"params": [A.requires_grad_(True)], "lr": lr},
        {"params": [B.requires_grad_(True)], "lr": lr * rate_B},
    ]
    adam = optimiser == "adam"
    optimizer = torch.optim.Adam(groups, eps=1e-300) if adam else torch.optim.SGD(groups)
    losses, of_A, of_B = [], [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(alpha / r * B @ A)
        loss.backward()
        for values, value in ((losses, loss), (of_A, A.grad.norm()), (of_B, B.grad.norm())):
            values.append(value.item())
        optimizer.step()
    return losses, of_A, of_B, (B.detach(), A.detach())


# %% [markdown]
# **Predict before you move anything.** At the first step, what does doubling alpha do to *B*'s gradient? What
# does doubling *r* do? (It is *s G Aᵀ*, with *s* = alpha / *r*, and *A* has *r* rows.)


# %%
def along_the_run(r, alpha):
    losses, of_A, of_B, _ = train(r, alpha, steps=30)
    return of_A, of_B, losses


explore.gradient_norms(along_the_run)


# %%
def first_gradient(r, alpha):
    """Norm of B's gradient at the first step, mean of 40 draws of A."""
    return sum(train(r, alpha, seed=seed, steps=1)[2][0] for seed in range(40)) / 40


usual = first_gradient(8, 16)
print(f"alpha from 16 to 32: times {first_gradient(8, 32) / usual:.2f}")
print(f"r from 8 to 16:      times {first_gradient(16, 16) / usual:.1f}")
assert abs(first_gradient(8, 32) / usual - 2) < 1e-9
assert abs(first_gradient(16, 16) / usual * math.sqrt(2) - 1) < 0.08

# %% [markdown]
# **What came out.** *A*'s gradient always starts at 0 and rises as *B* grows. *B*'s is proportional to alpha,
# and to 1/√*r*: *s* is halved, and twice as many rows bring √2 times the norm. So at one alpha, a larger *r*
# has smaller gradients, which SGD feels and Adam does not.
#
# ## 5 · *B* and *A* are not the update
#
# ΔW = *s BA*. For any invertible *r* × *r* matrix *M*, the pair (*BM*, *M*⁻¹*A*) has the same product: the
# same update, hence the same model. Physicists call such a freedom a **gauge**. It costs *r*² of the numbers
# (chapter 01), and it makes a trap.
#
# **Predict before you run.** Somebody gives you the same adapter twice, the second time with all signs of *A*
# and of *B* flipped. What is the mean of the two, factor by factor?

# %%
losses, _, _, (B, A) = train(steps=200)
B_mean, A_mean = (B + -B) / 2, (A + -A) / 2
print("flipped: same update?", torch.equal(B @ A, -B @ -A))
print("norm of the update made of the mean factors:", float((B_mean @ A_mean).norm()))
assert torch.equal(B @ A, -B @ -A) and not (B_mean @ A_mean).any()

M = torch.eye(8, dtype=torch.float64) + torch.ones(8, 8, dtype=torch.float64)
assert torch.allclose((B @ M) @ (torch.linalg.inv(M) @ A), B @ A)

# %% [markdown]
# Nothing. Two perfect copies of one adapter, and the mean of their factors is the zero adapter. Real adapters
# differ by a gauge that nobody chose: the seed did. Two runs from different seeds, the same task:

# %%
runs = [train(seed=seed, steps=200) for seed in (0, 1)]
(B1, A1), (B2, A2) = (run[3] for run in runs)
s = 16 / 8
with_factors = s * (B1 + B2) / 2 @ (A1 + A2) / 2
with_updates = s * (B1 @ A1 + B2 @ A2) / 2
losses = {f"seed {seed}": loss_of(s * run[3][0] @ run[3][1]) for seed, run in enumerate(runs)}
losses |= {"factors averaged": loss_of(with_factors), "updates averaged": loss_of(with_updates)}
for name, value in losses.items():
    print(f"{name:17} loss {value:.2f}")
lost = (losses["factors averaged"] - losses["seed 0"]) / (1 - losses["seed 0"])
assert 0.15 < lost < 0.35  # share of the gain
cosine = lambda one, other: float((one * other).sum() / (one.norm() * other.norm()))
print(f"cosine of the two updates {cosine(B1 @ A1, B2 @ A2):.2f}, of the two Bs {cosine(B1, B2):.1f}")
assert cosine(B1 @ A1, B2 @ A2) > 0.8 and 0.2 < cosine(B1, B2) < 0.4
assert (
    losses["updates averaged"] <= (losses["seed 0"] + losses["seed 1"]) / 2 < losses["factors averaged"] - 0.1
)

# %% [markdown]
# **What came out.** The two runs found nearly the same *update*; their *factors* have little in common. The
# mean of the updates is as good as either. The mean of the factors has lost a quarter of the gain.
#
# **Why.** ¼(*B*₁ + *B*₂)(*A*₁ + *A*₂) = ¼(*B*₁*A*₁ + *B*₂*A*₂) + ¼(*B*₁*A*₂ + *B*₂*A*₁). The first part is
# half of what was wanted. The second pairs a *B* with an *A* that it never met. **Average updates, not
# factors.** The mean of two updates has rank up to 2*r*, and can be written as an adapter of that rank: *B*₁
# beside *B*₂, *A*₁ above *A*₂, with a half (exercise 3). The same holds for whatever else is done to factors
# one by one: comparing them, subtracting them, federated averaging.

# %%
print("rank of the mean update:", int(torch.linalg.matrix_rank(with_updates)))
stacked = s / 2 * torch.cat([B1, B2], dim=1) @ torch.cat([A1, A2])
assert torch.linalg.matrix_rank(with_updates) == 16 and torch.allclose(stacked, with_updates)

# %% [markdown]
# ## 6 · The slider that does nothing
#
# alpha is the setting that everybody asks about. **Predict before you run.** Multiply alpha by *c* = 4. At
# the same time halve the learning rate, and halve *A*₀. Adam, 50 steps. What does the loss curve do?

# %%
usual = train(alpha=16)
for c in (4, 1 / 16, 2):
    other = train(alpha=16 * c, rate=1 / math.sqrt(c), start=1 / math.sqrt(c))
    apart = max(abs(one - two) for one, two in zip(usual[0], other[0], strict=True))
    print(
        f"alpha · {c:<6g} learning rate and A₀ · {1 / math.sqrt(c):<7.4g} loss apart by",
        apart if apart == 0 else "rounding only",
    )
    assert apart == 0 if c != 2 else apart < 1e-9

# %% [markdown]
# Not similar: **the same run**. At *c* = 4 and 1/16, 0 apart in double precision after 50 steps. (√2 cannot
# be written down exactly, so at *c* = 2 something remains in the last digits.) Move alpha; then, with the
# upper slider, set one of its two companions free, so that it stays where it was.

# %%
explore.alpha_that_does_nothing(lambda alpha, rate, start: train(alpha=alpha, rate=rate, start=start)[0])

# %% [markdown]
# **Why.** ΔW = *s BA*. If *s* is *c* times as large and *A* and *B* are both 1/√*c* of what they were, ΔW is
# the same. *A*₀ was made so, *B*₀ = 0 is so anyway. The gradients change size, but **Adam does not look at
# the size of a gradient**, only at its history: each step has a length set by the learning rate. With that at
# 1/√*c* too, all stays in proportion, step after step.
#
# The paper says it in passing, with a 'roughly': 'When optimizing with Adam, tuning α is roughly the same as
# tuning the learning rate if we scale the initialization appropriately' (§4.1). It is exact.
#
# (That is, without weight decay and with a negligible ε. Under SGD, whose steps do grow with the gradient,
# the learning rate must be divided by *c* instead.)
#
# What, then, does alpha do alone? The same argument: alpha · *c* **is a learning rate *c* times as large, for
# *B* only**.

# %%
alone = train(alpha=64)
faster_B = train(alpha=16, rate_B=4)
apart = max(abs(one - two) for one, two in zip(alone[0], faster_B[0], strict=True))
print("alpha · 4, or B's learning rate · 4: loss apart by", apart)
assert apart == 0

sgd = train(optimiser="sgd")[0], train(optimiser="sgd", alpha=64, rate=1 / 4, start=1 / 2)[0]
assert sgd[0] == sgd[1] and sgd[0][-1] < sgd[0][0]

# %% tags=["nbval-ignore-output"]
best = {
    alpha: min(train(alpha=alpha, rate=rate, start=1)[0][-1] for rate in (1 / 4, 1 / 2, 1, 2, 4))
    for alpha in (4, 16, 64)
}
print("best loss over five learning rates:", {alpha: f"{value:.2f}" for alpha, value in best.items()})
assert max(best.values()) - min(best.values()) < 0.05

# %% [markdown]
# So alpha is no knob of its own. Three things can be set, alpha, the learning rate and the size of *A*₀, and
# two of them suffice. Tune the learning rate, and what is left of alpha is how fast *B* moves compared with
# *A*: here it makes next to no difference between 4 and 64. What is said about 'the best alpha' is mostly
# said about a learning rate. (Two learning rates on purpose: LoRA+, see 'Where to read on'.) And why alpha / *r*, or
# alpha / √*r* as in rsLoRA? Only to carry *one* learning rate from one rank to the next:
#
# ## 7 · Twice the rank, the same alpha
#
# **Predict before you run.** From *r* = 8 to 16, alpha stays 16. The first step of SGD, ΔW = −η *s*² *G AᵀA*:
# does it grow, shrink, or stay? And Adam's?


# %%
def first_step(r, optimiser, seeds=40):
    """Mean norm of ΔW after one step."""
    total = 0.0
    for seed in range(seeds):
        B, A = train(r, seed=seed, steps=1, optimiser=optimiser)[3]
        total += float((16 / r * B @ A).norm())
    return total / seeds


sizes = {way: {r: first_step(r, way) for r in (2, 4, 8, 16, 32, 64)} for way in ("sgd", "adam")}
print("norm of the first ΔW, r = 8 taken as 1")
for r in sizes["sgd"]:
    sgd, adam = (sizes[way][r] / sizes[way][8] for way in ("sgd", "adam"))
    print(f"r = {r:2}: SGD {sgd:5.2f}   Adam {adam:5.2f}")
assert 0.3 < sizes["sgd"][16] / sizes["sgd"][8] < 0.45
assert 0.65 < sizes["adam"][16] / sizes["adam"][8] < 0.95

# %% [markdown]
# **Why.** SGD: *s*² falls to a quarter, *AᵀA* has twice as many terms. In expectation a step is halved; the
# norm falls even more, by 2√2 while *r* is small, because the terms point in different directions. Adam:
# *B*'s step has a fixed length, so *s* counts once: 2√2 becomes √2, or less where the terms agree. Either way
# **more rank, smaller steps**: a comparison of ranks at one alpha and one learning rate is also a comparison
# of learning rates. alpha / √*r* removes that √2 under Adam. If you tune the learning rate at each rank, it
# does not matter.
#
# For a finished adapter the matter is simpler: same *BA*, *s* = alpha / *r*. Whoever doubles *r* and keeps
# alpha has halved ΔW (exercise 2).

# %% [markdown]
# ## 8 · Merge, and back
#
# A trained LoRA layer can be **merged**: *W* + ΔW is put in *W*'s place, and the layer costs what the plain
# one costs. To swap adapters, one wants *W* back. loralib and PEFT subtract ΔW again.
#
# **Predict before you run.** Add ΔW to a float32 weight and subtract it again. What share of the 10 000
# entries is no longer what it was?


# %%
def mergeable(way, dtype):
    """(layer, how to merge it, how to unmerge it), with the factors trained above."""
    layer = copy.deepcopy(query).to(dtype)
    if way == "lora_edu":
        lora = LoRALinear.from_layer(layer, 8, 16)
        ways = lora.merge, lora.unmerge
    elif way == "loralib":
        lora = loralib.Linear(100, 100, r=8, lora_alpha=16).to(dtype)
        lora.load_state_dict(layer.state_dict(), strict=False)
        ways = lora.eval, lora.train
    else:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
        lora = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
        ways = lora.merge, lora.unmerge
    for factor, value in zip(factors(lora), (A1, B1), strict=True):
        factor.data.copy_(value)
    return lora, *ways


# %%
def merged_and_back(way, dtype, rounds):
    """Share of entries of W that differ after so many rounds, and the largest difference."""
    lora, merge, unmerge = mergeable(way, dtype)
    weight = lambda: getattr(lora, "base_layer", lora).weight.detach().double()
    before = weight().clone()
    for _ in range(rounds):
        merge(), unmerge()
    return float((weight() != before).double().mean()), float((weight() - before).abs().max())


# %% tags=["nbval-ignore-output"]
print("share of the entries changed, and the largest change")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for way in ("lora_edu", "loralib", "PEFT"):
        results = [merged_and_back(way, dtype, rounds) for rounds in (1, 100)]
        texts = [f"{share:6.1%} {largest:8.1e}" for share, largest in results]
        print(f"{str(dtype)[6:]:9} {way:9} after 1 round {texts[0]}   after 100 {texts[1]}")
        assert not any(map(any, results)) if way == "lora_edu" else min(results)[0] > 0.01

# %% [markdown]
# **Why.** *W* + ΔW is rounded, and what the rounding took is not given back by a subtraction. Nobody will
# miss the last bit of a float32, though checksums will notice. In bfloat16 a change can be a few thousandths,
# and in both half precisions PEFT's grew from round to round when we ran this (the last column). The package
# keeps the original beside the merged weight, so `unmerge` is **exact, bit for bit, however often**. That
# costs as many bytes as *W*, while merged; the report says how many.

# %%
layer = LoRALinear.from_layer(copy.deepcopy(query).to(torch.bfloat16), 8, 16)
layer.lora_A.data.copy_(A1), layer.lora_B.data.copy_(B1)
report = layer.merge()
print(f"bytes while merged: {report.extra_bytes}; bytes of W: {W.numel() * 2}")
assert report.extra_bytes == W.numel() * 2

# %% [markdown]
# Also, merging happens **only when asked**. In loralib, `eval()` merges: whoever saves a checkpoint in an
# evaluation saves *W* + ΔW under the name of *W*.

# %%
changes = {}
for lora in (loralib.Linear(100, 100, r=8, lora_alpha=16), LoRALinear(100, 100, rank=8, alpha=16)):
    nn.init.normal_(lora.lora_B)
    before = lora.weight.detach().clone()
    lora.eval()
    changes[type(lora).__module__.partition(".")[0]] = not torch.equal(lora.weight, before)
print("eval() changes the weight:", changes)
assert changes == {"loralib": True, "lora_edu": False}

# %% [markdown]
# ### What rounding swallows
#
# The merged weight has the format of *W*. bfloat16 keeps 8 significant bits: the next number after 1 is
# 1.0078. **Predict before you run.** ΔW is a thousandth of *W* in norm. How much of it survives the merge
# into bfloat16?


# %% tags=["nbval-ignore-output"]
def swallowed(dtype, size):
    """The share of ΔW, in norm, that is lost when it is merged; ‖ΔW‖ = size · ‖W‖."""
    layer = LoRALinear.from_layer(copy.deepcopy(query).to(dtype), 8, 16, lora_dtype=torch.float32)
    layer.lora_A.data.copy_(A1)
    layer.lora_B.data.copy_(B1 * (size * W.norm() / (2 * B1 @ A1).norm()))
    return layer.merge().swallowed


sizes = [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]
lost = {
    str(dtype)[6:]: [swallowed(dtype, size) for size in sizes]
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
for name, shares in lost.items():
    print(
        f"{name:9}" + "".join(f"   {size:g}: {share:4.0%}" for size, share in zip(sizes, shares, strict=True))
    )
assert 0.7 < lost["bfloat16"][4] < 0.9 and 0.1 < lost["float16"][4] < 0.3 and lost["float32"][-1] < 0.01
print(f"full tuning changed this W by ‖D‖ / ‖W‖ = {D.norm() / W.norm():.2f}")

# %%
figure, axes = plots.subplots(size=(7.2, 2.8))
series = {name: (sizes, shares) for name, shares in lost.items()}
labels = {"xlabel": "‖ΔW‖ / ‖W‖", "ylabel": "share of ΔW lost"}
with plots.style():
    plots.curves(axes, series, xscale="log", **labels)
    axes.set_title("A small update drowns in a coarse format")
plots.plain_ticks(axes.xaxis, sizes)
plots.show(
    figure, "Share of ΔW that merging loses against its size: most in bfloat16, nearly none in float32."
)

# %% [markdown]
# At a thousandth, about four fifths of ΔW are gone in bfloat16, and a fifth in float16. (Chapter 03's three quarters
# at 0.003 came from rounding *both* files; here *W* is already in the format.) An entry of ΔW that
# is less than half a step of *W*'s format vanishes altogether, others are rounded up to a whole step. Our
# tuned *W* changes by far more than a thousandth, so it is safe; a gentle tuning of a large model may not be.
# Not merging avoids it: the update is then added to the *output*, at its own precision. Read
# `merge().swallowed` before you ship a merged model.

# %% [markdown]
# ### GPT-2's Conv1D
#
# GPT-2 in `transformers` keeps its linear layers in a class called `Conv1D`, with the weight stored **(in,
# out)**. *A* is still (*r*, in) and *B* (out, *r*), so ΔW there is *s* (*BA*)ᵀ. On a square weight nothing
# complains if you forget: the shapes agree, the values do not.

# %%
from transformers.pytorch_utils import Conv1D

torch.manual_seed(0)
fused = LoRALinear.from_layer(Conv1D(2304, 768), rank=8, alpha=16)  # Conv1D names its outputs first
print("c_attn:", {name: tuple(each.shape) for name, each in fused.named_parameters() if name != "bias"})

square = LoRALinear.from_layer(Conv1D(768, 768), rank=8, alpha=16).eval()
nn.init.normal_(square.lora_B, std=0.02)
BA, x = square.lora_B @ square.lora_A, torch.randn(50, 768)
with torch.no_grad():
    right, forgotten = x @ (2 * BA.T), x @ (2 * BA)
    update = square(x) - (x @ square.weight + square.bias)
    print("s (BA)ᵀ is what the layer adds:", torch.allclose(update, right, atol=1e-4))
    print("s BA is not:", not torch.allclose(update, forgotten, atol=1e-2))
    before = square(x)
    square.merge()
assert torch.allclose(update, right, atol=1e-4) and not torch.allclose(update, forgotten, atol=1e-2)
assert torch.allclose(square.delta_weight(), 2 * BA.T, atol=1e-6)
assert torch.allclose(square(x), before, atol=1e-4)

# %% [markdown]
# ## 9 · In the whole model
#
# `add_lora` does to a model what we did to one layer: it finds the layers by name, puts LoRA in their places
# and freezes everything else. Then comes a short training, 25 steps on docstrings of numpy and matplotlib.
# (The base model was trained on code.)
#
# **Predict before you run.** Which weights have changed at the end? How far apart are the merged and the
# unmerged model?

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
corpus = load_corpus("reference")
held_out = corpus.validation[: 16 * 256 + 1]
before = base.state_dict()
model = add_lora(
    copy.deepcopy(base), rank=8, alpha=16, targets=["query", "key", "value", "output", "up", "down"]
)
start = evaluate(model, held_out)
optimizer = torch.optim.AdamW(trainable_parameters(model), lr=5e-3, weight_decay=0.0)
history = fit(model, Batches(corpus.train, batch=8, context=128), optimizer, steps=25, progress=False)
end = evaluate(model, held_out)
print(f"held-out loss: {start:.2f} before, {end:.2f} after {len(history.steps)} steps")
assert end < start - 0.3

# %%
after = model.state_dict()
changed = {
    name.rpartition(".")[2]
    for name, value in after.items()
    if name not in before or not torch.equal(value, before[name])
}
numbers = sum(each.numel() for each in trainable_parameters(model))
print(
    "changed:", sorted(changed), f"({numbers} numbers of {sum(value.numel() for value in before.values())})"
)
assert changed == {"lora_A", "lora_B"}
assert numbers == 6 * 8 * (4 * 200 + 2 * 500) == 86_400

# %% tags=["nbval-ignore-output"]
tokens = held_out[:256][None]
with torch.no_grad():
    unmerged = model(tokens)
    reports = merge_lora(model)
    merged = model(tokens)
print(f"{len(reports)} layers merged; logits at most {(merged - unmerged).abs().max():.1e} apart")
assert len(reports) == 6 * 6 and torch.allclose(merged, unmerged, atol=1e-3)
unmerge_lora(model)
with torch.no_grad():
    assert torch.equal(model(tokens), unmerged)
remove_lora(model)
assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

# %% [markdown]
# The loss fell, and only *A*s and *B*s have changed: *W* has not moved by a bit. Merged and unmerged agree up
# to the order of summation in float32. And after `remove_lora` the base model is the very one it was. (Was it
# worth it? How good does LoRA get, and at what rank? That is chapter 07.)

# %% [markdown]
# ## What to remember
#
# - **h = W x + b + s · B A x**, *s* = alpha / *r*, *B* = 0 at the start. A dozen lines; the package, loralib
#   and PEFT compute the same, gradients included.
# - ∂L/∂*B* = *s G Aᵀ*, ∂L/∂*A* = *s Bᵀ G*. At *B* = 0 only *B* moves, and the first SGD step is **ΔW = −η
#   *s*² *G AᵀA***: the exact gradient, seen through *A*. On average over draws *AᵀA* is a multiple of the
#   identity; one draw sees *r* directions.
# - **BA = (BM)(M⁻¹A)**: average updates, never factors.
# - Under Adam, alpha · *c* with learning rate and *A*₀ divided by √*c* is the same run. alpha alone is a
#   learning rate of *B*.
# - Same alpha, larger *r*: smaller steps; and for a finished adapter, a smaller ΔW.
# - Merging rounds. Subtracting does not undo it, keeping the original does. bfloat16 swallows four fifths of a ΔW
#   that is a thousandth of *W*.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of `None` and run the cell. The check says what is wrong with it, not only that it
# is wrong.

# %% [markdown] tags=["exercise"]
# **1.** A layer with two outputs and three inputs, *r* = 1, alpha = 3, *A* = [[1, 0, 1]] and *B* = 0. The
# gradient of the loss by *W* is *G* = [[1, 2, 0], [0, 1, −1]]. By hand: what are the gradients of *A* and of
# *B*?

# %% tags=["exercise"]
answer = None  # (gradient of A, gradient of B), each a list of rows
print(exercises.check_05_1(answer))

# %% tags=["solution"]
G_small = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
A_small, B_small, s_small = torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(2, 1), 3 / 1
answer = (s_small * B_small.T @ G_small, s_small * G_small @ A_small.T)
print(exercises.check_05_1(answer))

# %% [markdown] tags=["exercise"]
# **2.** An adapter was trained at *r* = 8 and alpha = 16. Your server wants *r* = 16, so you append eight
# rows of zeros to *A* and eight columns of zeros to *B*. Which alpha do you write into its config, so that ΔW
# is what it was?

# %% tags=["exercise"]
answer = None  # alpha
print(exercises.check_05_2(answer))

# %% tags=["solution"]
answer = 16 / 8 * 16  # the old s times the new r
print(exercises.check_05_2(answer))

# %% [markdown] tags=["exercise"]
# **3.** Write `average(B1, A1, B2, A2)`, which returns (*B*, *A*) such that *BA* is the mean of the two
# updates. Both have the same *s*.

# %% tags=["exercise"]
average = None  # def average(B1, A1, B2, A2): ...
print(exercises.check_05_3(average))


# %% tags=["solution"]
def average(B1, A1, B2, A2):
    return torch.cat([B1, B2], dim=1) / 2, torch.cat([A1, A2])


print(exercises.check_05_3(average))

# %% [markdown] tags=["exercise"]
# **4.** Write `merge_conv1d(weight, A, B, scaling)` for GPT-2's Conv1D, whose weight is (in, out). It returns
# the merged weight and leaves the given one alone.

# %% tags=["exercise"]
merge_conv1d = None  # def merge_conv1d(weight, A, B, scaling): ...
print(exercises.check_05_4(merge_conv1d))


# %% tags=["solution"]
def merge_conv1d(weight, A, B, scaling):
    return weight + scaling * (B @ A).T


print(exercises.check_05_4(merge_conv1d))

# %% [markdown] tags=["exercise"]
# **5.** A run with Adam, learning rate 10⁻³, alpha = 16. You set alpha to 64 and multiply *A*₀ by ½. Which
# learning rate gives the same run?

# %% tags=["exercise"]
answer = None  # a learning rate
print(exercises.check_05_5(answer))

# %% tags=["solution"]
answer = 1e-3 / math.sqrt(64 / 16)
print(exercises.check_05_5(answer))

# %% [markdown] tags=["exercise"]
# **6.** Plain SGD this time, and a fresh layer. You double alpha and change nothing else. By what factor does
# ΔW after the first step grow?

# %% tags=["exercise"]
answer = None  # a factor
print(exercises.check_05_6(answer))

# %% tags=["solution"]
once, twice = (train(alpha=alpha, steps=1, optimiser="sgd")[3] for alpha in (16, 32))
answer = (32 / 8 * twice[0] @ twice[1]).norm() / (16 / 8 * once[0] @ once[1]).norm()
print(exercises.check_05_6(answer))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA* (arXiv 2106.09685): §4.1 for the method, the init, alpha and 'no additional
#   inference latency'; §7 for what a trained ΔW looks like.
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA* (arXiv 2312.03732),
#   §3: why alpha / √*r*.
# - Hayou et al. 2024, *LoRA+* (arXiv 2402.12354): two learning rates, for *A* and for *B*; and *The Impact of
#   Initialization on LoRA Finetuning Dynamics* (arXiv 2406.08447): random *A* and zero *B*, or the other way
#   round.
# - Hao et al. 2024, *Flora* (arXiv 2402.03293), §2: LoRA as a compressor of gradients, with the step of
#   section 4.
# - Next here: chapter 06, LoRA for an embedding; chapter 07, training with it.
