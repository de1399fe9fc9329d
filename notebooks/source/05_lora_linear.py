# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 05 · LoRA for a linear layer
#
# **Afterwards you can** write LoRA for a linear layer in a dozen lines; say what a step of $A$ and $B$ does to
# $\Delta W$, and what it cannot do; explain the two inits, alpha / $r$ and the dropout; average two adapters without
# ruining both; say what alpha is good for; merge, and unmerge exactly.
#
# **You should know** what a rank is (chapter 01), what a linear layer, a gradient and Adam are, and how to read
# PyTorch. **Time:** 60 minutes to read, one to run.
#
# The layer we work on is a real one: $W_q$ of the first block of the course's base model, 100 × 100. What goes into it
# depends on the token alone, so we can have all there is: one input for each of the 10 000 tokens.

# %% tags=["setup"]
import copy
import itertools
import math

import torch
from matplotlib import cbook
from matplotlib.image import imread
from torch import nn

from lora_edu import explore, plots
from lora_edu.data import load_checkpoint, load_corpus
from lora_edu.exercises import chapter_05 as exercises
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
# LoRA leaves $W$ and the bias $b$ as they are, and adds a product of two thin matrices:
#
# $$h = W x + b + s\, B A\, x, \qquad s = \alpha / r$$
#
# $A$ is ($r$, in) and $B$ is (out, $r$). $A$ starts random and $B$ at zero. $\alpha$ is a number that you choose, `alpha`
# in code. Here it is, dropout included.


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


# %%
explore.predict(
    "By how much does a fresh LoRA layer change what the layer computes?",
    {
        "not at all": "Yes. B is zero, and so is BA, whatever A is. Training starts from the model as it is.",
        "a little, at random": "A is random, that is true. But what A makes of x goes through B, and B starts at zero.",
        "it depends on alpha": "alpha is a factor on BA. A factor on zero is zero; look at the largest change below.",
    },
)

# %%
torch.manual_seed(0)
lora = LoRA(copy.deepcopy(query), rank=8, alpha=16)
change = (lora(inputs) - query(inputs)).abs().max().item()
trained = sum(each.numel() for each in lora.parameters() if each.requires_grad)
print(f"largest change of any output: {change}")
print(f"numbers to train: {trained} of {W.numel()} in W, and s = {lora.scaling:g}")
assert change == 0 and trained == 8 * (100 + 100) == 1600

# %% [markdown]
# **Why.** $B = 0$, so $B A = 0$: training starts from the model as it is, not from a damaged one. The two products go
# from right to left: first $r$ numbers $A x$, then $B$ times those. That takes $r\,(\text{in} + \text{out})$
# multiplications a token. With $B A$ put together first, it would be $\text{in} \cdot \text{out}$, and a second matrix
# of $W$'s size.
#
# ## 2 · Everybody's numbers
#
# Does the package compute the same? And loralib, the authors' own code, and PEFT, which most people use? All four get
# the same $W$, $A$ and $B$ (with a $B$ that is not zero), in double precision. We compare what comes out *and* the
# gradients of $A$, of $B$ and of the input.

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
# They agree to twelve digits, at four pairs of $r$ and $\alpha$. There is no more to the method than the dozen lines;
# what packages add is everything around it.
#
# ## 3 · Two inits and a dropout
#
# **What does $A$ start as?** The paper says Gaussian (§4.1), and not of which width. loralib and PEFT draw uniformly,
# as PyTorch does for any linear layer ('Kaiming-uniform'). PEFT can also draw a Gaussian, of standard deviation $1/r$.

# %%
explore.predict(
    "PEFT's two inits at r = 8, same alpha: how much larger is the first step of SGD with the Gaussian one?",
    {
        "the same": "The name sounds like a matter of taste. But the two have different variances: the uniform one "
        "looks at the width, the Gaussian one at r.",
        "about 2 times": "That is the ratio of the standard deviations. A is in SGD's first step twice, once in the "
        "gradient of B and once in BA, so it is the variance that counts.",
        "about 5 times": "Yes, 4.7 times at width 100 and r = 8. Another width or rank makes it another factor.",
    },
)

# %% [markdown]
# We measure $r$ times the variance, which is the mean squared length of a column of $A$. Section 4 will show that the
# first step of plain gradient descent (SGD) is proportional to it.

# %%
torch.manual_seed(0)
strength = {}
for name, how in {"Kaiming-uniform": True, "Gaussian": "gaussian"}.items():
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=how)
    models = [get_peft_model(nn.Sequential(nn.Linear(100, 100)), config) for _ in range(30)]
    A = torch.stack([factors(model.base_model.model[0])[0] for model in models]).detach()
    strength[name] = 8 * A.var().item()
    print(f"{name:16} largest entry {A.abs().max():.2f}, r · variance {strength[name]:.3f}")
print(f"by formula: uniform r / (3 · in) = {8 / 300:.3f}, Gaussian r / r² = {1 / 8:.3f}")
assert abs(strength["Kaiming-uniform"] * 300 / 8 - 1) < 0.02 and abs(strength["Gaussian"] * 8 - 1) < 0.03
assert 4.5 < strength["Gaussian"] / strength["Kaiming-uniform"] < 4.9

# %% [markdown]
# **Why it matters.** A uniform number from $-1/\sqrt{\text{in}}$ to $1/\sqrt{\text{in}}$ has the variance
# $1/(3\,\text{in})$. So the Gaussian is 4.7 times as strong here, and at another width or rank it is another factor: its
# variance depends on $r$ only, that of the uniform one on the width only. Two runs that both 'use LoRA with $r = 8$,
# alpha = 16' may differ by that factor in their first SGD step. (Under Adam by its root, 2.2: there $B$'s step does not
# depend on the size of $A$. Section 4 also compares the two *shapes* at one variance.)
#
# **Why is $B$ the zero one, and not both?** If both were zero, neither would ever move; section 4 shows why. If neither
# were, the model would start out damaged. $A = 0$ and a random $B$ would work as well; chapter 06 does that, for
# embeddings.
#
# **What does the dropout hide?** Entries of $x$, from the update only: $W x$ sees all of it.

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
print(f"mean of 2000 passes against eval(): {off:.1%} of the update apart")
assert off < 0.05

# %% [markdown]
# In training a new mask falls at each pass. On average over masks it does not change the output of this layer, because
# what remains is scaled up (here by 2). So dropout is no part of $\Delta W$: a merged layer has none.

# %% [markdown]
# ## 4 · What does a step do to ΔW?
#
# 'The exact mathematics is unclear, but anyway backpropagation updates the parameters approximately': so says the study
# note that this series grew out of. The mathematics is three lines, and nothing in it is approximate.
#
# We need a task that can be taken apart. Here is one: full tuning changed this layer's $W$ by some $D$ (chapter 03; it
# ships with the course). **Let LoRA imitate it**: the loss is how far $s B A$ is from doing the same to all 10 000 inputs,
# as a share of what it is at $\Delta W = 0$. Everything in sections 4 to 7 is true of this one layer and this task; where
# a result is a theorem, we say so.

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

# %%
explore.predict(
    "A fresh layer, B = 0, and one backward pass. Which gradient is zero?",
    {
        "that of A": "Yes. A's gradient has to pass through B, and B is zero.",
        "that of B": "B itself is zero, but its gradient need not be: it passes through A, and A is random. Look at both "
        "below.",
        "both": "Then LoRA would never start to move. It does move, so one of them cannot be zero.",
        "neither": "One of the two gradients has a factor of zero in it. Which one passes through B?",
    },
)

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
# **Why.** $W$ would get the gradient $G$. The chain rule through $\Delta W = s B A$ gives
#
# $$\frac{\partial L}{\partial B} = s\, G A^\top, \qquad \frac{\partial L}{\partial A} = s\, B^\top G$$
#
# The gradient of one factor passes through the other one. $B = 0$ stops $A$'s; $A \ne 0$ lets $B$'s pass. $B$ moves
# first, and from the second step on $A$ moves too. With both at zero, both would be stopped for good.
#
# Now take one step of plain gradient descent (SGD, learning rate $\eta$). $A$ stays, $B$ becomes $-\eta s\, G A^\top$,
# and so
#
# $$\Delta W = s B A = -\eta s^2\, G A^\top A$$

# %%
eta = 0.01
with torch.no_grad():
    first = s * (B - eta * B.grad) @ (A - eta * A.grad)
    print("first step = −η s² G AᵀA?", torch.allclose(first, -eta * s**2 * G @ A.T @ A))
    print("its rank:", int(torch.linalg.matrix_rank(first)))
assert torch.allclose(first, -eta * s**2 * G @ A.T @ A)
assert torch.linalg.matrix_rank(first) == 8

# %% [markdown]
# Full tuning would step by $-\eta G$. **LoRA steps by the same gradient, seen through $A$.** If the rows of $A$ were at
# right angles and of length 1, $A^\top A$ would be the projection onto them: each row of $G$ (one for each output)
# would be replaced by its shadow on those $r$ directions. Eight random rows are nearly that, up to a common factor. What
# lies at right angles to all of them is lost. So 'it is backpropagation anyway' has a precise meaning: the gradient is
# exact, but the direction is not free.
#
# And later, when neither is zero? Multiply out one step of both; nothing is left out:
#
# $$-\eta s^2 \left( G A^\top A + B B^\top G \right) + \eta^2 s^3\, G A^\top B^\top G$$

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
# So a step has two parts, the gradient seen through $A$ from the side of the inputs, and through $B$ from the side of the
# outputs, and a rest of second order in $\eta$. $A$ itself moves, by multiples of $B^\top G$. Whether it turns towards the
# directions that matter, we measure further down.
#
# ### What does AᵀA look like?
#
# It is a 100 × 100 matrix of rank $r$.

# %%
explore.predict(
    "How much of G is left in G AᵀA at r = 8? What is the cosine between the two?",
    {
        "about 0.08": "8 directions of 100 hold 8 % of the length squared. A cosine goes with the length, so take the root.",
        "about 0.27": "Yes, about √(8 / 109). The step makes an angle of 74° with the gradient, and goes downhill still.",
        "about 0.9": "That would be nearly the gradient itself. But 92 of 100 directions are at right angles to all rows "
        "of A, and what G has there is lost.",
    },
)


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
# **Why.** The shorter the shadow, the larger the angle. The cosine is about $\sqrt{r / (r + \text{in} + 1)}$. In
# expectation
#
# $$\mathbb{E}\left[ A^\top A \right] = r \cdot \text{variance} \cdot I$$
#
# with the identity $I$: no direction is preferred. So *on average over draws* LoRA's first step is SGD's, with the
# learning rate $\eta s^2 r / (3\,\text{in})$. But one draw sees $r$ directions of 100, and at $r = 8$ its step makes an
# angle of 74° with the gradient. It still goes downhill if $\eta$ is small: the inner product of $G$ and $G A^\top A$ is
# $\lVert G A^\top \rVert_F^2$, which is never negative.
#
# A gradient is a matrix like any other, so here is one in which you can see what is lost: the photograph of chapter 01.
# Raise $r$, or the number of draws that are averaged. Only their product counts.

# %%
photograph = torch.from_numpy(imread(cbook.get_sample_data("grace_hopper.jpg")).mean(axis=-1) / 255)
explore.seen_through((photograph - photograph.mean())[::4, ::4])

# %% [markdown]
# ### The two gradients along a run
#
# A whole run needs a loop. This one is Adam with weight decay 0, in double precision, and its ε so small that it does
# nothing. `rate` and `start` are factors on the learning rate and on $A_0$, the $A$ that a run starts with; `rate_A` and
# `rate_B` are factors on the learning rate of one of the two.


# %% tags=["setup"]
RATES = {"adam": 0.004, "sgd": 0.01}


def train(r=8, alpha=16, rate=1.0, start=1.0, seed=0, steps=50, rate_A=1.0, rate_B=1.0, optimiser="adam"):
    """Imitate D; returns losses, norms of both gradients at each step, and the factors (B, A)."""
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(r, 100, generator=generator, dtype=torch.float64) - 1) / 10 * start
    B = torch.zeros(100, r, dtype=torch.float64)
    lr = rate * RATES[optimiser]
    groups = [
        {"params": [A.requires_grad_(True)], "lr": lr * rate_A},
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


# %%
explore.predict(
    "At the first step, what does doubling r do to the gradient of B, at the same alpha? (It is s G Aᵀ, with "
    "s = alpha / r, and A has r rows.)",
    {
        "it doubles": "There are twice as many rows, and each brings its part. But s = alpha / r is halved.",
        "it stays": "s is halved and there are twice as many rows. But their squares add up, not their lengths: twice "
        "as many rows make the norm √2 times as large.",
        "it shrinks by √2": "Yes: s is halved, and twice as many rows bring √2 times the norm.",
        "it is halved": "s is halved, that is true. But A has twice as many rows, and they bring √2 times the norm.",
    },
)


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
# **What came out.** $A$'s gradient always starts at 0. It rises while $B$ grows, and falls again with the loss. $B$'s
# is proportional to $\alpha$, and to $1/\sqrt{r}$. So at one $\alpha$, a larger $r$ has smaller gradients. SGD's steps of $B$
# shrink with them; Adam's do not, since Adam divides by the gradient's size.
#
# ### Does A turn?
#
# The first step sees eight random directions. Is LoRA stuck with them? Of all matrices of rank 8, one imitates $D$ best on
# these inputs (Eckart and Young, chapter 01; the inputs weigh the directions). It reads eight directions of the input. We
# ask at each step how much of these eight the rows of $A$ cover, and what happens if $A$ is not trained.

# %% tags=["nbval-ignore-output"]
values, directions = torch.linalg.eigh(C)
U = torch.linalg.svd(D @ directions * values.clamp(min=0).sqrt()).U[:, :8]
best_of_rank_8 = U @ U.T @ D
aim = torch.linalg.qr(best_of_rank_8.T @ U).Q  # the eight directions of the input that it reads


def covered(A):
    """How much of those directions the rows of A cover, from 0 to 1."""
    return float((torch.linalg.qr(A.T).Q.T @ aim).square().sum() / 8)


STEPS = [0, 5, 10, 20, 35, 50, 100, 200]
seeds = range(3)
turned = [[covered(train(seed=seed, steps=steps)[3][1]) for steps in STEPS] for seed in seeds]
free = [train(seed=seed, steps=201)[0] for seed in seeds]
frozen = [train(seed=seed, steps=201, rate_A=0.0)[0] for seed in seeds]
floor = float(loss_of(best_of_rank_8))
print(f"loss after 200 steps; the best matrix of rank 8 has {floor:.2f}")
for name, runs in {"A trained": free, "A frozen": frozen}.items():
    print(f"  {name}:", ", ".join(f"{run[-1]:.2f}" for run in runs))
print("best directions that A covers:", ", ".join(f"{each[0]:.2f} → {each[-1]:.2f}" for each in turned))
assert max(each[0] for each in turned) < 0.15 and min(each[-1] for each in turned) > 0.95
assert min(run[-1] for run in frozen) > 0.75 and max(run[-1] for run in free) < floor + 0.01

# %%
figure, (left, right) = plots.subplots(1, 2, size=(7.2, 2.8))
runs = {"A frozen": torch.tensor(frozen).T, "A trained": torch.tensor(free).T}
plots.curves(left, {name: (range(201), each) for name, each in runs.items()}, xlabel="step", ylim=(0, 1.05))
left.set(ylabel="loss, share of the first")
plots.mark_level(left, floor, "the best of rank 8", 0.98)
plots.curves(right, {"A": (STEPS, torch.tensor(turned).T)}, xlabel="step", ylim=(0, 1.05))
plots.mark_level(right, 0.08, "eight random directions", 0.98)
with plots.style():
    left.set_title("three draws of A")
    right.set_title("best directions that A covers")
plots.show(figure, "With A frozen the loss stays above 0.75; trained, A turns to the eight best directions.")

# %% [markdown]
# **What came out.** $A$ begins with 7 to 10 % of the right directions, as chance would have it, and has 98 % of them after
# 200 steps. With $A$ frozen the loss stays near 0.8; with $A$ trained it comes within 0.01 of the best that *any* matrix of
# rank 8 can do. (One layer, Adam, three draws. Chapter 02 freezes $A$ in a whole model.) So the first step is bound to
# eight random directions, and the run is not.
#
# Now that we have a run, we can also ask what the *shape* of the first draw does, at one variance:


# %% tags=["nbval-ignore-output"]
def normal_start(seed, variance):
    """The loss after 50 steps from a Gaussian A₀ of this variance."""
    generator = torch.Generator().manual_seed(seed)
    A = (torch.randn(8, 100, generator=generator, dtype=torch.float64) * variance**0.5).requires_grad_(True)
    B = torch.zeros(100, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([A, B], lr=RATES["adam"], eps=1e-300)
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_of(2 * B @ A)
        loss.backward()
        optimizer.step()
    return loss.item()


shapes = {
    "uniform, variance 1 / 300": [train(seed=seed)[0][-1] for seed in range(5)],
    "Gaussian, variance 1 / 300": [normal_start(seed, 1 / 300) for seed in range(5)],
    "Gaussian, variance 1 / 64": [normal_start(seed, 1 / 64) for seed in range(5)],
}
for name, ends in shapes.items():
    print(f"{name:27} loss after 50 steps {min(ends):.3f} to {max(ends):.3f}")
means = [sum(ends) / 5 for ends in shapes.values()]
assert abs(means[0] - means[1]) < 0.015 < means[2] - means[0]

# %% [markdown]
# At one variance uniform and Gaussian end alike; the wider Gaussian is behind here after 50 steps at this learning rate.
# (At another learning rate it need not be: section 6.)
#
# ## 5 · B and A are not the update
#
# The update is $\Delta W = s B A$. For any invertible $r \times r$ matrix $M$, the pair $(B M, M^{-1} A)$ has the same
# product: the same update, hence the same model. Physicists call such a freedom a **gauge**. It costs $r^2$ of the
# numbers (chapter 01), and it makes a trap.

# %%
explore.predict(
    "Somebody gives you the same adapter twice, the second time with all signs of A and of B flipped. You average the "
    "two, factor by factor. What do you get?",
    {
        "the same adapter": "The two updates are the same, so their mean is, too. But you averaged the factors: B and "
        "−B, A and −A.",
        "an adapter half as strong": "Add B and −B, and halve the sum.",
        "the zero adapter": "Yes: B and −B average to nothing. And flipping signs is only one of very many M.",
    },
)

# %% tags=["nbval-ignore-output"]
_, _, _, (B, A) = train(steps=200)
eye = torch.eye(8, dtype=torch.float64)
turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
gauges = {
    "nothing": eye,
    "all signs flipped": -eye,
    "directions reordered": eye.roll(1, 0),
    "a rotation": turn,
}
alone = float(loss_of(2 * B @ A))
for name, M in gauges.items():
    twin_B, twin_A = B @ M, torch.linalg.inv(M) @ A
    mean = float(loss_of(2 * (B + twin_B) / 2 @ (A + twin_A) / 2))
    print(f"{name:21} twin: loss {loss_of(2 * twin_B @ twin_A):.2f}   mean of the factors: loss {mean:.2f}")
    assert torch.allclose(twin_B @ twin_A, B @ A)
    assert name == "nothing" or mean > alone + 0.15

# %% [markdown]
# Each twin is a perfect copy, and the mean of the factors is worse than either; with flipped signs it is the zero adapter,
# whose loss is 1. Real adapters differ by a gauge that nobody chose: the seed did. Six runs from six seeds, the same task,
# all fifteen pairs:

# %% tags=["nbval-ignore-output"]
cosine = lambda one, other: float((one * other).sum() / (one.norm() * other.norm()))
runs = [train(seed=seed, steps=200)[3] for seed in range(6)]
single = [float(loss_of(2 * B @ A)) for B, A in runs]
pairs = []
for (B1, A1), (B2, A2) in itertools.combinations(runs, 2):
    pairs.append(
        {
            "updates": cosine(B1 @ A1, B2 @ A2),
            "Bs": cosine(B1, B2),
            "factors averaged": float(loss_of(2 * (B1 + B2) / 2 @ (A1 + A2) / 2)),
            "updates averaged": float(loss_of(2 * (B1 @ A1 + B2 @ A2) / 2)),
        }
    )
span = lambda key: f"{min(pair[key] for pair in pairs):.2f} to {max(pair[key] for pair in pairs):.2f}"
print(f"loss of one run             {min(single):.2f} to {max(single):.2f}")
for key in ("updates averaged", "factors averaged"):
    print(f"loss with {key}  {span(key)}")
for key in ("updates", "Bs"):
    print(f"cosine of the two {key:10}{span(key)}")
assert min(pair["updates"] for pair in pairs) > 0.9 and max(abs(pair["Bs"]) for pair in pairs) < 0.5
assert min(pair["factors averaged"] for pair in pairs) > max(single) + 0.1
assert max(pair["updates averaged"] for pair in pairs) < max(single) + 0.01
together = torch.tensor([[pair["Bs"], pair["factors averaged"]] for pair in pairs]).T
assert torch.corrcoef(together)[0, 1] < -0.7  # the less alike the Bs, the more is lost

# %%
figure, axes = plots.subplots(size=(7.2, 2.8))
with plots.style():
    for key, colour in (("factors averaged", plots.VERMILION), ("updates averaged", plots.BLUE)):
        axes.plot([each["Bs"] for each in pairs], [each[key] for each in pairs], "o", color=colour, label=key)
    axes.set(xlabel="cosine of the two Bs", ylabel="loss, share of the first", ylim=(0, 1), xlim=(-0.5, 0.5))
    axes.legend(loc="upper right")
    axes.set_title("The mean of two adapters, fifteen pairs of seeds")
plots.mark_level(axes, max(single), "the worst single run", 0.98)
plots.show(
    figure, "Averaged updates are as good as one run; averaged factors are worse in all fifteen pairs."
)

# %% [markdown]
# **What came out.** All runs found nearly the same *update*; their *factors* have little in common. The mean of two
# updates is as good as one run. (This loss is quadratic in $\Delta W$, so the mean can never be worse than the mean of the
# two losses. A whole model promises no such thing.) The mean of the factors loses between a quarter and two thirds of the
# gain, and the less alike the two matrices $B$, the more.
#
# **Why.**
#
# $$\tfrac14 (B_1 + B_2)(A_1 + A_2) = \tfrac14 (B_1 A_1 + B_2 A_2) + \tfrac14 (B_1 A_2 + B_2 A_1)$$
#
# The first part is half of what was wanted. The second pairs a $B$ with an $A$ that it never met. **Average updates, not
# factors.** The mean of two updates has rank up to $2r$, and can be written as an adapter of that rank: $B_1$ beside
# $B_2$, $A_1$ above $A_2$, with a half (exercise 3). The same holds for whatever else is done to factors one by one:
# comparing them, subtracting them, averaging them over the participants of a federated training.

# %%
(B1, A1), (B2, A2) = runs[:2]
with_updates = 2 * (B1 @ A1 + B2 @ A2) / 2
print("rank of the mean update:", int(torch.linalg.matrix_rank(with_updates)))
stacked = 2 / 2 * torch.cat([B1, B2], dim=1) @ torch.cat([A1, A2])
assert torch.linalg.matrix_rank(with_updates) == 16 and torch.allclose(stacked, with_updates)

# %% [markdown]
# ## 6 · The slider that does nothing
#
# alpha is the setting that everybody asks about. We multiply it by $c = 4$. At the same time we halve the learning rate,
# and halve $A_0$. Adam, 50 steps.

# %%
explore.predict(
    "alpha times 4, learning rate and A₀ halved: what does the loss curve do?",
    {
        "it falls faster": "s is four times as large, that is true. But A starts at half its size and every step of A and "
        "of B is half as long; multiply these out.",
        "it is similar": "Stronger than that. Look at how far the two curves are apart, in double precision.",
        "it is exactly the same": "Yes: half of B times half of A times four. And Adam's steps do not depend on the size "
        "of the gradients, so this stays so at every step.",
    },
)

# %%
usual = train(alpha=16)
for c in (4, 1 / 16, 2):
    other = train(alpha=16 * c, rate=1 / math.sqrt(c), start=1 / math.sqrt(c))
    apart = max(abs(one - two) for one, two in zip(usual[0], other[0], strict=True))
    print(
        f"alpha · {c:<6g} rate and A₀ · {1 / math.sqrt(c):<7.4g} loss apart by",
        apart if apart == 0 else "rounding only",
    )
    assert apart == 0 if c != 2 else apart < 1e-9

# %% [markdown]
# Not similar: **the same run**. At $c = 4$ and $1/16$ the two are 0 apart in double precision after 50 steps. (A computer
# cannot hold $\sqrt{2}$ exactly, so at $c = 2$ something remains in the last digits.) Move alpha. Then, with the upper
# slider, set one of its two companions free, so that it stays where it was.

# %%
explore.alpha_that_does_nothing(lambda alpha, rate, start: train(alpha=alpha, rate=rate, start=start)[0])

# %% [markdown]
# **Why.** If $s$ is $c$ times as large and $A$ and $B$ are both $1/\sqrt{c}$ of what they were, $\Delta W = s B A$ is the
# same. $A_0$ was made so, and $B_0 = 0$ is so anyway. The gradients change size, but **Adam does not look at the size of a
# gradient**: it divides a running mean of gradients by the root of a running mean of their squares. So a step's length is
# set by the learning rate. With that at $1/\sqrt{c}$ too, all stays in proportion, step after step.
#
# The paper says it in passing, with a 'roughly': 'When optimizing with Adam, tuning α is roughly the same as tuning the
# learning rate if we scale the initialization appropriately' (§4.1). It is exact in any model, as long as only the matrices $A$ and
# $B$ are trained, without weight decay, without clipping of gradients (they do change size), and with an ε that is
# negligible beside them. (Under SGD, whose steps do grow with the gradient, the learning rate must be divided by $c$
# instead, and $A_0$ again by $\sqrt{c}$.)
#
# What, then, does alpha do alone? The same argument shows it: alpha times $c$ **is a learning rate $c$ times as large, for
# $B$ only**.

# %%
alone = train(alpha=64)
faster_B = train(alpha=16, rate_B=4)
apart = max(abs(one - two) for one, two in zip(alone[0], faster_B[0], strict=True))
print("alpha · 4, or B's learning rate · 4: loss apart by", apart)
assert apart == 0

sgd = train(optimiser="sgd")[0], train(optimiser="sgd", alpha=64, rate=1 / 4, start=1 / 2)[0]
assert sgd[0] == sgd[1] and sgd[0][-1] < sgd[0][0]

# %% [markdown]
# So is there a best alpha? We give each its own best learning rate, on a grid wide enough that no best one lies at its
# end.

# %% tags=["nbval-ignore-output"]
grid = [2.0**k for k in range(-1, 7)]  # times the usual learning rate
ends = {
    alpha: {
        factor: sum(train(alpha=alpha, rate=factor, seed=seed)[0][-1] for seed in range(3)) / 3
        for factor in grid
    }
    for alpha in (4, 16, 64)
}
best = {alpha: min(losses, key=losses.get) for alpha, losses in ends.items()}
print(
    "best loss, mean of three seeds:",
    {alpha: f"{ends[alpha][best[alpha]]:.3f} at {best[alpha]:g}" for alpha in best},
)
assert all(grid[0] < factor < grid[-1] for factor in best.values())
lowest = [ends[alpha][factor] for alpha, factor in best.items()]
assert max(lowest) - min(lowest) < 0.01 and best[4] > best[64]
figure, axes = plots.subplots(size=(7.2, 2.8))
named = {f"alpha = {alpha}": losses for alpha, losses in ends.items()}
plots.rate_curves(axes, named, xlabel="learning rate, times 0.004", ylabel="loss after 50 steps")
axes.set(ylim=(0.2, 0.8))
with plots.style():
    axes.set_title("Three alphas, each at every learning rate")
plots.plain_ticks(axes.xaxis, grid)
plots.show(figure, "Three alphas reach the same loss, the larger alpha at the smaller learning rate.")

# %% [markdown]
# So alpha is no knob of its own. Three things can be set, alpha, the learning rate and the size of $A_0$, and two of them
# suffice. If you tune the learning rate, what is left of alpha is how fast $B$ moves compared with $A$. In this task the
# three alphas then end within 0.01 of each other, and the larger alpha wants the smaller rate: comparing them at *one*
# learning rate would have compared learning rates. (Two learning rates on purpose: LoRA+, see 'Where to read on'.) And why
# $\alpha / r$, or $\alpha / \sqrt{r}$ as in rsLoRA? Only to carry *one* learning rate from one rank to the next:
#
# ## 7 · Twice the rank, the same alpha
#
# We go from $r = 8$ to 16, and alpha stays 16. The first step of SGD is $\Delta W = -\eta s^2\, G A^\top A$.

# %%
explore.predict(
    "Twice the rank at the same alpha: what does the first ΔW of SGD do?",
    {
        "it grows": "A has more rows, and AᵀA more terms. But s = alpha / r is halved, and it is in the step twice.",
        "it stays": "s² falls to a quarter, and AᵀA has twice as many terms. That does not even out.",
        "it is about a third as long": "Yes, 0.36: s² falls to a quarter, and twice as many terms that point in different "
        "directions bring √2.",
    },
)


# %%
def first_step(r, optimiser, alpha=16.0, seeds=40):
    """Mean norm of ΔW after one step."""
    total = 0.0
    for seed in range(seeds):
        B, A = train(r, alpha, seed=seed, steps=1, optimiser=optimiser)[3]
        total += float((alpha / r * B @ A).norm())
    return total / seeds


RANKS = [2, 4, 8, 16, 32, 64]
sizes = {
    "SGD, alpha / r": [first_step(r, "sgd") for r in RANKS],
    "Adam, alpha / r": [first_step(r, "adam") for r in RANKS],
    "Adam, alpha / √r": [first_step(r, "adam", 16 * math.sqrt(r / 8)) for r in RANKS],
}
sizes = {name: [norm / norms[2] for norm in norms] for name, norms in sizes.items()}
print("norm of the first ΔW, r = 8 taken as 1")
print(f"{'r':20}" + "".join(f"{r:>7}" for r in RANKS))
for name, norms in sizes.items():
    print(f"{name:20}" + "".join(f"{norm:7.2f}" for norm in norms))
assert 0.3 < sizes["SGD, alpha / r"][3] < 0.45 and 0.65 < sizes["Adam, alpha / r"][3] < 0.8
assert all(0.9 < norm < 1.25 for norm in sizes["Adam, alpha / √r"])

# %%
figure, axes = plots.subplots(size=(7.2, 2.8))
plots.curves(axes, {name: (RANKS, norms) for name, norms in sizes.items()}, xscale="log", yscale="log")
axes.set(xlabel="rank r", ylabel="times that at r = 8")
with plots.style():
    axes.set_title("The first step of ΔW, at one learning rate")
plots.plain_log(axes, RANKS, (0.1, 1, 10))
plots.show(
    figure, "The first ΔW shrinks with the rank under alpha / r; under Adam, alpha / √r keeps its length."
)

# %% [markdown]
# **Why.** SGD: $s^2$ falls to a quarter, and $A^\top A$ has twice as many terms. In expectation a step is halved; but the
# norm of one draw falls by $2\sqrt{2}$ while $r$ is small against the width, because the terms point in different
# directions. Adam: $B$'s step has a fixed length, so $s$ counts once: $2\sqrt{2}$ becomes $\sqrt{2}$, or less where the
# terms agree. Either way **more rank, smaller first steps**: a comparison of ranks at one alpha and one learning rate is
# also a comparison of learning rates. $\alpha / \sqrt{r}$ takes that $\sqrt{2}$ away under Adam. If you tune the learning
# rate at each rank, as chapter 07 does, it does not matter.
#
# For a finished adapter the matter is simpler: same $B A$, $s = \alpha / r$. If you double $r$ and keep alpha, you halve
# $\Delta W$ (exercise 2).

# %% [markdown]
# ## 8 · Merge, and back
#
# A trained LoRA layer can be **merged**: $W + \Delta W$ is put in $W$'s place, and the layer costs what the plain one
# costs. To swap adapters, one wants $W$ back. loralib and PEFT subtract $\Delta W$ again.

# %%
explore.predict(
    "Add ΔW to a float32 weight and subtract it again. What share of the 10 000 entries is no longer what it was?",
    {
        "none": "On paper, yes. But W + ΔW is rounded, and subtracting does not give back what the rounding took. Look "
        "at the line of loralib in float32 below.",
        "a few percent": "Yes, about 8 % here: an entry whose sum has a larger exponent loses its last bit.",
        "nearly all": "Only where the rounding of W + ΔW took something: mostly where the sum is larger than W was.",
    },
)


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
    """After each of these rounds: share of entries of W that differ, and the largest difference."""
    lora, merge, unmerge = mergeable(way, dtype)
    weight = lambda: getattr(lora, "base_layer", lora).weight.detach().double()
    before, results = weight().clone(), []
    for number in range(1, max(rounds) + 1):
        merge(), unmerge()
        if number in rounds:
            results.append(
                (float((weight() != before).double().mean()), float((weight() - before).abs().max()))
            )
    return results


# %% tags=["nbval-ignore-output"]
ROUNDS = [1, 3, 10, 30, 100]
WAYS = ("lora_edu", "loralib", "PEFT")
back = {
    dtype: {way: merged_and_back(way, dtype, ROUNDS) for way in WAYS}
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}
figure, row = plots.subplots(1, 2, size=(7.2, 2.8))
for axes, dtype in zip(row, (torch.float16, torch.bfloat16), strict=True):
    series = {way: (ROUNDS, [largest for _, largest in back[dtype][way]]) for way in WAYS}
    plots.curves(axes, series, xscale="log", xlabel="rounds of merging and unmerging")
    plots.plain_ticks(axes.xaxis, ROUNDS)
    axes.set(ylabel="largest change of W")
    with plots.style():
        axes.set_title(str(dtype)[6:])
    assert back[dtype]["PEFT"][-1][1] > 3 * back[dtype]["PEFT"][0][1]  # it grows
    assert back[dtype]["loralib"][-1] == back[dtype]["loralib"][0]  # it does not
plots.show(figure, "The largest change of W against rounds: none with the original kept; PEFT's grows.")

# %% tags=["nbval-ignore-output"]
print("rounds, share of the entries changed, and the largest change")
for dtype, ways in back.items():
    for way, results in ways.items():
        texts = [f"{share:6.1%} {largest:8.1e}" for share, largest in (results[0], results[-1])]
        print(f"{str(dtype)[6:]:9}{way:9} 1: {texts[0]}   100: {texts[1]}")
        assert not any(map(any, results)) if way == "lora_edu" else min(results)[0] > 0.01

# %% [markdown]
# **Why.** $W + \Delta W$ is rounded, and a subtraction does not give back what the rounding took. The last bit of a
# float32 is hardly ever missed, though checksums will notice. In bfloat16 a change can be a few thousandths (the largest
# entry of this $W$ is 0.67). In both half precisions PEFT's change grew from round to round when we ran this, and
# loralib's did not. The package keeps the original beside the merged weight, so `unmerge` is **exact, bit for bit,
# however often**. That costs as many bytes as $W$, while merged; the report says how many.

# %%
layer = LoRALinear.from_layer(copy.deepcopy(query).to(torch.bfloat16), 8, 16)
layer.lora_A.data.copy_(A1), layer.lora_B.data.copy_(B1)
report = layer.merge()
print(f"bytes while merged: {report.extra_bytes}; bytes of W: {W.numel() * 2}")
assert report.extra_bytes == W.numel() * 2

# %% [markdown]
# Also, merging happens **only when asked**. In loralib, `eval()` merges: if you save a checkpoint during an evaluation,
# you save $W + \Delta W$ under the name of $W$.

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
# The merged weight has the format of $W$. bfloat16 keeps 8 significant bits: the next number after 1 is 1.0078.

# %%
explore.predict(
    "ΔW is a thousandth of W in norm. How much of it, in norm, is lost when it is merged into bfloat16?",
    {
        "nothing worth noting": "That is so in float32. In bfloat16 two neighbouring numbers are up to 1/128 of their size "
        "apart, and ΔW is a thousandth.",
        "about a fifth": "That is float16, which keeps three bits more. See the middle curve.",
        "about four fifths": "Yes. Most entries of ΔW are smaller than half a step of W's format, and vanish.",
    },
)


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
print(f"{'‖ΔW‖ / ‖W‖':11}" + "".join(f"{size:>9g}" for size in sizes))
for name, shares in lost.items():
    print(f"{name:11}" + "".join(f"{share:>9.0%}" for share in shares))
assert 0.7 < lost["bfloat16"][4] < 0.9 and 0.1 < lost["float16"][4] < 0.3 and lost["float32"][-1] < 0.01
own = float(D.norm() / W.norm())
print(
    f"full tuning changed this W by ‖D‖ / ‖W‖ = {own:.2f}; bfloat16 loses {swallowed(torch.bfloat16, own):.1%} there"
)
assert 0.3 < own < 0.45 and swallowed(torch.bfloat16, own) < 0.01

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
# At a thousandth, about four fifths of $\Delta W$ are gone in bfloat16, and a fifth in float16. An entry of $\Delta W$ that
# is less than half a step of $W$'s format vanishes altogether; the others are rounded to whole steps, some up, some down.
# Our tuned $W$ changes by 0.38 of its norm, so it is safe: 0.5 % is lost. A tuning that changes $W$ by a hundredth loses a
# sixth. If you do not merge, nothing is lost this way: the update is then added to the *output*, at its own precision.
# Read `merge().swallowed` before you ship a merged model.

# %% [markdown]
# ### GPT-2's Conv1D
#
# GPT-2 in `transformers` keeps its linear layers in a class called `Conv1D`, with the weight stored **(in, out)**. $A$ is
# still ($r$, in) and $B$ (out, $r$), so $\Delta W$ there is $s\,(B A)^\top$. On a square weight nothing complains if you
# forget: the shapes agree, the values do not.

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
# `add_lora` does to a model what we did to one layer: it finds the layers by name, puts LoRA in their places and freezes
# everything else. Then comes a short training, 25 steps of AdamW on docstrings of numpy and matplotlib, one seed. (The
# base model was trained on code.)

# %%
explore.predict(
    "Which tensors of the model have changed at the end of the training?",
    {
        "only A and B": "Yes, to the bit. The cell after the training compares every tensor with what it was.",
        "also norms and biases": "Many recipes do train them. add_lora freezes all that was there before.",
        "all, but W only a little": "W is not trained at all: it has no gradient, and no optimiser state.",
    },
)

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
# The loss fell, and only the matrices $A$ and $B$ have changed: $W$ has not moved by a bit. Merged and unmerged agree up to the order
# of summation in float32. And after `remove_lora` the base model is the very one it was. (Was it worth it? How good does
# LoRA get, and at what rank? That is chapter 07.)

# %% [markdown]
# ## What to remember
#
# - $h = W x + b + s\, B A x$, with $s = \alpha / r$ and $B = 0$ at the start. A dozen lines; the package, loralib and PEFT
#   compute the same, gradients included.
# - The gradients are $s\, G A^\top$ for $B$ and $s\, B^\top G$ for $A$. At $B = 0$ only $B$ moves, and the first SGD step is
#   $\Delta W = -\eta s^2\, G A^\top A$: the exact gradient, seen through $A$. On average over draws $A^\top A$ is a multiple
#   of the identity; one draw sees $r$ directions. In our runs $A$ then turned to the right ones: from about 8 % to
#   98 %.
# - $B A = (B M)(M^{-1} A)$: average updates, never factors.
# - Under Adam, alpha times $c$ with learning rate and $A_0$ divided by $\sqrt{c}$ is the same run. alpha alone is a learning
#   rate of $B$.
# - Same alpha, larger $r$: smaller first steps; and for a finished adapter, a smaller $\Delta W$.
# - Merging rounds. Subtracting does not undo it, keeping the original does. bfloat16 swallows four fifths of a $\Delta W$
#   that is a thousandth of $W$.

# %% [markdown]
# ## Exercises
#
# Each answer is a function. Put it in place of `None` and run the cell. The check tries it on matrices that are drawn
# anew each time, and says what is wrong with it, not only that it is wrong.

# %% [markdown] tags=["exercise"]
# **1.** Write `gradients(G, A, B, s)`: a layer's loss has the gradient $G$ by $W$. Return the pair (gradient of $A$,
# gradient of $B$). The check compares with autograd.

# %% tags=["exercise"]
gradients = None  # def gradients(G, A, B, s): ...
print(exercises.check_05_1(gradients))


# %% tags=["solution"]
def gradients(G, A, B, s):
    return s * B.T @ G, s * G @ A.T


print(exercises.check_05_1(gradients))

# %% [markdown] tags=["exercise"]
# **2.** Your server wants adapters of a higher rank. Write `widen(A, B, alpha, rank)`: return $(A, B, \alpha)$ of that
# rank, with the same $\Delta W = (\alpha / r)\, B A$. And further training must be able to use the new directions (section
# 4 says when a direction never moves).

# %% tags=["exercise"]
widen = None  # def widen(A, B, alpha, rank): ...
print(exercises.check_05_2(widen))


# %% tags=["solution"]
def widen(A, B, alpha, rank):
    new = rank - A.shape[0]
    wide_A = torch.cat([A, torch.randn(new, A.shape[1], dtype=A.dtype) / A.shape[1] ** 0.5])
    wide_B = torch.cat([B, torch.zeros(B.shape[0], new, dtype=B.dtype)], dim=1)
    return wide_A, wide_B, alpha / A.shape[0] * rank  # the old s times the new r


print(exercises.check_05_2(widen))

# %% [markdown] tags=["exercise"]
# **3.** Write `average(B1, A1, B2, A2)`, which returns an adapter $(B, A)$ such that $B A$ is the mean of the two updates.
# Both have the same $s$ and the same rank $r$; yours may have $2r$, and no more.

# %% tags=["exercise"]
average = None  # def average(B1, A1, B2, A2): ...
print(exercises.check_05_3(average))


# %% tags=["solution"]
def average(B1, A1, B2, A2):
    return torch.cat([B1, B2], dim=1) / 2, torch.cat([A1, A2])


print(exercises.check_05_3(average))

# %% [markdown] tags=["exercise"]
# **4.** Write `merge_conv1d(weight, A, B, scaling)` for GPT-2's Conv1D, whose weight is (in, out). It returns the merged
# weight and leaves the given one alone.

# %% tags=["exercise"]
merge_conv1d = None  # def merge_conv1d(weight, A, B, scaling): ...
print(exercises.check_05_4(merge_conv1d))


# %% tags=["solution"]
def merge_conv1d(weight, A, B, scaling):
    return weight + scaling * (B @ A).T


print(exercises.check_05_4(merge_conv1d))

# %% [markdown] tags=["exercise"]
# **5.** Write `same_run(c, optimiser)`: alpha is multiplied by $c$, and the run must stay the same. Return the two factors,
# on the learning rate and on $A_0$, for `optimiser` 'adam' and 'sgd'. The check trains with them.

# %% tags=["exercise"]
same_run = None  # def same_run(c, optimiser): ...
print(exercises.check_05_5(same_run))


# %% tags=["solution"]
def same_run(c, optimiser):
    start = 1 / math.sqrt(c)
    return (start if optimiser == "adam" else 1 / c), start


print(exercises.check_05_5(same_run))

# %% [markdown] tags=["solution"]
# Under SGD, with $A$ and $B$ both $1/\sqrt{c}$ of what they were and $s$ grown by $c$, each gradient is
# $c / \sqrt{c} = \sqrt{c}$ times as large. A step must be $1/\sqrt{c}$ of what it was, so the rate is $1/c$ of what it was.

# %% [markdown] tags=["exercise"]
# **6.** Write `lost_in_merge(W, update)`: which share of the update, in norm, is lost when it is merged into $W$?
# `update` is in float32, the merged weight has the dtype of $W$. The share is
# $\lVert \Delta W - (\text{merged} - W) \rVert_F / \lVert \Delta W \rVert_F$, a plain number.

# %% tags=["exercise"]
lost_in_merge = None  # def lost_in_merge(W, update): ...
print(exercises.check_05_6(lost_in_merge))


# %% tags=["solution"]
def lost_in_merge(W, update):
    merged = (W.float() + update).to(W.dtype)
    changed = merged.float() - W.float()
    return float((update - changed).norm() / update.norm())


print(exercises.check_05_6(lost_in_merge))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA* (arXiv 2106.09685): §4.1 for the method, the init, alpha and 'no additional inference latency';
#   §7 for what a trained $\Delta W$ looks like.
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA* (arXiv 2312.03732), §3: why
#   $\alpha / \sqrt{r}$.
# - Hayou et al. 2024, *LoRA+* (arXiv 2402.12354): two learning rates, for $A$ and for $B$; and *The Impact of
#   Initialization on LoRA Finetuning Dynamics* (arXiv 2406.08447): random $A$ and zero $B$, or the other way round.
# - Hao et al. 2024, *Flora* (arXiv 2402.03293), §2: LoRA as a compressor of gradients, with the step of
#   section 4.
# - Next here: chapter 06, LoRA for an embedding; chapter 07, training with it.
