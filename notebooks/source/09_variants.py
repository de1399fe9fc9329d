# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 09 · The variants, each with its own learning rate
#
# rsLoRA, LoRA+, DoRA, PiSSA, LoRA-GA, VeRA, AdaLoRA, LoRA-XS, a Riemannian step, Muon: each comes with a paper in which
# it beats LoRA, or does as well with less. Which of them survive a fair test, in which each has its own learning rate
# and the seeds are counted?
#
# **Afterwards you can** write each of these variants in a few lines; say before a comparison how large a difference must
# be to show over three seeds; say which claims appear at one learning rate for all and are gone when each is tuned;
# explain how the best rate goes with rank, scaling and start; tell which optimisers see only $\Delta W$, and which see
# its factors.
#
# **You should know** chapters 05 (LoRA, its inits, $\alpha / r$), 07 (choosing a learning rate) and 08 (what a fair
# comparison holds equal). **Time:** 60 minutes to read, two to run.

# %% tags=["setup"]
import itertools
import math

import torch
from torch.nn import functional as F

from lora_edu import explore, lowrank, plots
from lora_edu.data import load_checkpoint, load_corpus, load_variants
from lora_edu.data.runs import method_grid, validation_loss
from lora_edu.exercises import chapter_09 as exercises
from lora_edu.explore.variants import NAMES, TESTS, beside_lora, grids_in, size_in, tuned_in
from lora_edu.lora import add_lora, choose_ranks, lora_layers
from lora_edu.resampling import rank_correlation
from lora_edu.seeds import detectable, pooled, student
from lora_edu.tinylm import TinyLM
from lora_edu.tuning import variants

# %% tags=["setup"]
torch.set_num_threads(1)
base = load_checkpoint("base")
train = load_corpus("reference").train
text = train[: 4 * 97].view(4, 97)
BLOCKS = ("query", "key", "value", "output", "up", "down")
mean = lambda values: sum(values) / len(values)


def fresh():
    """The course's base model, as shipped."""
    return TinyLM.from_state_dict(base)


def trained(model):
    """The parameters that are trained."""
    return [each for each in model.parameters() if each.requires_grad]


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


# %% [markdown]
# ## 1 · What can be varied
#
# LoRA in one line: $h = W x + s\,B A x$ with $s = \alpha / r$, $W$ frozen, $A$ (r, in) random, $B$ (out, r) zero, and
# Adam on both. A variant changes one of four things:
#
# | what | variants |
# | --- | --- |
# | **the scaling** $s$ | rsLoRA |
# | **where $A$ and $B$ start** | PiSSA, LoRA-GA |
# | **what is computed** | DoRA, VeRA, LoRA-XS, AdaLoRA (and how the rank is spent) |
# | **the step** | LoRA+, scaled AdamW, Muon |
#
# ## 2 · Each in a few lines
#
# We write each for one matrix of TinyLM, `mlp.up` of the third block, 400 × 100, at $r = 4$, and compare with the
# package. Before a comparison all that is trained is moved at random, so that there is something to see.

# %% tags=["setup"]
NAME, r = "blocks.2.mlp.up", 4
W = base[f"{NAME}.weight"]


def on_one(put, *arguments, **options):
    """A fresh model with a variant on the one matrix, the numbers that it trains moved; and that layer."""
    torch.manual_seed(0)
    model = put(fresh(), *arguments, [NAME], **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in trained(model):
            each += 0.05 * torch.randn(each.shape, generator=generator)
    return model, model.get_submodule(NAME)


def same(ours, theirs):
    """Whether two matrices are equal up to rounding, and not both nothing."""
    assert ours.shape == theirs.shape and theirs.abs().max() > 1e-3
    return torch.allclose(ours, theirs, atol=1e-5)


# %% [markdown]
# ### The scaling: rsLoRA
#
# Kalajdzievski (2023) divides by $\sqrt r$ instead of $r$: $s = \alpha / \sqrt r$. Nothing else.

# %%
model, layer = on_one(add_lora, 16, 16, rank_stabilised=True)
B, A = layer.lora_B.detach(), layer.lora_A.detach()
assert layer.scaling == 16 / math.sqrt(16) and same(16 / math.sqrt(16) * B @ A, layer.delta_weight())
_, plain = on_one(add_lora, 16, 16)
print(f"α = 16, r = 16: LoRA has s = {plain.scaling:g}, rsLoRA s = {layer.scaling:g}")

# %% [markdown]
# ### The step: LoRA+
#
# Hayou et al. (2024) give $B$ a learning rate 16 times as large as $A$'s.

# %%
model, layer = on_one(add_lora, r, r)
ours = [{"params": [layer.lora_A], "lr": 1e-3}, {"params": [layer.lora_B], "lr": 16 * 1e-3}]
theirs = variants.lora_plus(model, 1e-3, 16)
assert [(group["params"], group["lr"]) for group in theirs] == [(g["params"], g["lr"]) for g in ours]
print("LoRA+ is two parameter groups:", ", ".join(f"{g['name']} at {g['lr']:g}" for g in theirs))

# %% [markdown]
# ### What is computed: DoRA
#
# Liu et al. (2024) split each row of $W$ into its length and its direction. LoRA turns the direction, and a vector $m$
# says how long each row is. $m$ starts as $W$'s own lengths, so that the model starts as the base:
#
# $$W' = m \odot \frac{W + s\,B A}{\lVert W + s\,B A \rVert}, \qquad \text{the norm of each row}$$

# %%
model, layer = on_one(variants.dora, r, r)
part = layer.dora
V = W + part.scaling * part.lora_B @ part.lora_A
W_new = part.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
assert same(W_new - W, part.delta_weight(layer))
untouched = variants.dora(fresh(), r, r, [NAME]).get_submodule(NAME).dora
assert torch.allclose(untouched.magnitude, W.norm(dim=1))
print(f"trained: {sum(p.numel() for p in trained(model)):,} numbers, {len(W)} of them lengths")
assert sum(p.numel() for p in trained(model)) == r * (400 + 100) + 400

# %% [markdown]
# (In the backward pass the norm counts as a constant, §4.3 of the paper: cheaper, and hardly different.)
#
# ### The start: PiSSA
#
# Meng et al. (2024) start $A$ and $B$ in the $r$ largest singular directions of $W$ itself, and freeze what is left:
# with $W = U \Sigma V^\top$, $B = U_r \sqrt{\Sigma_r / s}$, $A = \sqrt{\Sigma_r / s}\; V_r^\top$ and
# $W_{res} = W - s\,B A$.

# %%
U, S, Vh = lowrank.svd(W)
model = variants.pissa(fresh(), r, r, [NAME])
layer = model.get_submodule(NAME)
B, A = U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vh[:r]
assert same(B @ A, layer.delta_weight()) and same(W - B @ A, layer.weight)
assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.diag(S[:r]), atol=1e-4)
print(f"the first {r} of 100 directions hold {lowrank.energy(S)[r - 1]:.0%} of ‖W‖²")

# %%
explore.predict(
    "After training, someone wants to put this PiSSA on the base model, as plain LoRA: W + s · (something thin). How many "
    "numbers does that something have?",
    {
        "r (in + out), as LoRA": "W_res isn't W: what is added to W is s (BA − B₀A₀), and B₀A₀ is not small.",
        "2 r (in + out)": "Yes. BA − B₀A₀ is [B, −B₀] times [A; A₀], of rank 2r. The file is twice as large as LoRA's; or one "
        "ships A and B, and the reader computes an SVD of W to get W_res.",
        "in · out, as full tuning": "The difference of two matrices of rank r has at most rank 2r.",
    },
)

# %%
model, layer = on_one(variants.pissa, r, r)
learnt = variants.deltas(model)[NAME]
before = layer.lora_A.numel() + layer.lora_B.numel()
B2 = torch.cat([layer.lora_B, -layer.start_B], 1).detach()
A2 = torch.cat([layer.lora_A, layer.start_A], 0).detach()
assert same(B2 @ A2, learnt)
layer = variants.as_lora(model).get_submodule(NAME)
assert same(layer.delta_weight(), learnt) and torch.equal(layer.weight, W)
after = layer.lora_A.numel() + layer.lora_B.numel()
print(f"trained {before:,} numbers; as plain LoRA r = {layer.rank}, {after:,} numbers, and W is W again")
assert after == 2 * before

# %% [markdown]
# ### The start: LoRA-GA
#
# Wang et al. (2024) look at the first gradient $G = \partial L / \partial W$ and start in its singular directions, $A$ in
# the first $r$ on the right, $B$ in the next $r$ on the left, with $W_{res} = W - s\,B A$ again. The purpose: the *first
# step* should move $W$ as full tuning would.

# %%
batch = [(text[:, :-1], text[:, 1:])]
G = variants.first_gradient(fresh(), batch, [NAME])[NAME]
U, S, Vh = lowrank.svd(G)
c = 400**0.25 / math.sqrt(16)  # the paper's 'stable scale', out^¼ / √γ
model = variants.lora_ga(fresh(), {NAME: G}, r, math.sqrt(r))
layer = model.get_submodule(NAME)
assert same(layer.scaling * c * U[:, r : 2 * r] @ (c * Vh[:r]), layer.delta_weight())


def first_step(model, rate=1e-4):
    """ΔW of one step of SGD."""
    optimizer = torch.optim.SGD(trained(model), rate)
    loss_of(model, text).backward()
    optimizer.step()
    return variants.deltas(model)[NAME]


cosine = lambda one, other: float((one * other).sum() / one.norm() / other.norm())

# %% tags=["nbval-ignore-output"]
of_ga = cosine(first_step(model), -G)
torch.manual_seed(0)
of_lora = cosine(first_step(add_lora(fresh(), r, r, [NAME])), -G)
best = math.sqrt(float(lowrank.energy(S)[2 * r - 1]))
print(f"cosine of the first step with full tuning's: LoRA {of_lora:.2f}, LoRA-GA {of_ga:.2f}")
print(f"no matrix of rank 2r comes closer than {best:.2f} to this gradient")
assert 0.1 < of_lora < 0.35 and abs(of_ga - best) < 0.01 and best > 0.8

# %% [markdown]
# LoRA's first step is $-\eta s^2 G A^\top A$, the gradient seen through $r$ random directions out of 100; LoRA-GA's is
# the best that rank $2r$ allows. That is one step of SGD. How much of it is left after a hundred of Adam is what section
# 5 asks.
#
# ### What is computed: VeRA and LoRA-XS
#
# **VeRA** (Kopiczko et al. 2023) draws *one* pair $A$, $B$ for the whole model, never trains it, and trains two vectors
# per layer: $\Delta W = \mathrm{diag}(b)\,B\,\mathrm{diag}(d)\,A$. **LoRA-XS** (Bałazy et al. 2024) freezes $A$ and $B$
# as $W$'s own singular directions, and trains an $r \times r$ matrix between them: $\Delta W = s\,U_r R\,\Sigma_r
# V_r^\top$.

# %%
model, layer = on_one(variants.vera, 256)
part = layer.vera
ours = part.b[:, None] * part.shared.B @ (part.d[:, None] * part.shared.A)
assert same(ours, part.delta_weight(layer))
print(f"VeRA at r = 256 trains {sum(p.numel() for p in trained(model)):,} numbers")

model, layer = on_one(variants.lora_xs, 35, 35)
part, (U, S, Vh) = layer.lora_xs, lowrank.svd(W)
sign = torch.sign((U[:, :35] * part.B).sum(0))  # a pair of singular vectors may both change sign
ours = U[:, :35] * sign @ part.R @ (sign * S[:35])[:, None].mul(Vh[:35])
assert same(ours, part.delta_weight(layer))
print(f"LoRA-XS at r = 35 trains {part.R.numel():,} numbers, LoRA at r = 4 {r * (400 + 100):,}")

# %% [markdown]
# Both were made to train *fewer* numbers than any LoRA can. Here we give them as many as LoRA has, which is not what
# they are for, but it asks whether the numbers are as well placed.
#
# ### What is computed, and where the rank goes: AdaLoRA
#
# Zhang et al. (2023) write $\Delta W = s\,P \Lambda Q$ like an SVD, with a penalty that keeps $P$'s columns and $Q$'s
# rows near orthonormal, start with more triplets than they want, and set singular values of the least important ones to
# zero while training, *over all matrices together*. A number $w$ with gradient $g$ is important where $|w g|$, what the
# loss would change without it, is large and has varied.

# %%
model, layer = on_one(variants.adalora, 6, 6)
part, s = layer.adalora, 6 / (6 + 1e-5)
P, lam, Q = part.P, part.singular, part.Q
assert same(s * P @ (lam * Q), part.delta_weight(layer))
far = lambda rows: (rows @ rows.T - torch.eye(len(rows))).norm()
assert torch.isclose(mean([far(P.T), far(Q)]), variants.orthogonality(model))

budget = variants.RankBudget(model, 4, steps=100, start=10, end=30)
loss_of(model, text).backward()
budget.after_step(0)
first = lambda w: 0.15 * (w * w.grad).abs() * 0.15 * 0.85 * (w * w.grad).abs()  # β₁ = β₂ = 0.85, from zero
importance = first(lam)[:, 0] + first(P).mean(0) + first(Q).mean(1)
assert torch.allclose(importance, budget.importance()[NAME], rtol=1e-4)
print("triplets left after step", {step: budget.budget(step) for step in (10, 20, 30, 50, 69, 70, 99)})

# %% [markdown]
# ### The step: scaled AdamW and Muon
#
# **Scaled gradients** (Zhang and Pilanci 2024, 'Riemannian preconditioning') replace $\nabla_B$ by $\nabla_B (A
# A^\top)^{-1}$ and $\nabla_A$ by $(B^\top B)^{-1} \nabla_A$, and hand them to SGD or AdamW. **Muon** (Jordan et al. 2024)
# replaces a momentum $m = U \Sigma V^\top$ by about $U V^\top$: a step with all singular values alike. A polynomial does
# it without an SVD.

# %%
model, layer = on_one(add_lora, r, r)
loss_of(model, text).backward()
A, B = layer.lora_A.detach(), layer.lora_B.detach()
gradient_A, gradient_B, eye = layer.lora_A.grad.clone(), layer.lora_B.grad.clone(), 1e-6 * torch.eye(r)
variants.scale_gradients(model, damping=1e-6)
assert torch.allclose(layer.lora_A.grad, torch.linalg.solve(B.T @ B + eye, gradient_A), rtol=1e-3, atol=1e-6)
assert torch.allclose(layer.lora_B.grad.T, torch.linalg.solve(A @ A.T + eye, gradient_B.T), rtol=1e-3, atol=1e-6)

X = gradient_B.T / gradient_B.norm()
for _ in range(5):
    gram = X @ X.T
    X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
assert same(X.T, variants.orthogonalised(gradient_B))
values = lambda matrix: ", ".join(f"{each:.2f}" for each in torch.linalg.svdvals(matrix))
print(f"singular values of B's gradient: {values(gradient_B / gradient_B.norm())}; after five turns: {values(X)}")

# %% [markdown]
# That is all of them. None is more than ten lines away from LoRA.
