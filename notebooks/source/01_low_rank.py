# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 01 · Low rank
#
# LoRA bets that what tuning adds to a weight matrix can be replaced by a matrix of low rank. Before you take a bet
# like that, you should know what rank is, what a lower rank keeps, and how to tell a matrix that has something to
# keep from one that has not. This chapter settles that on a photograph and on a map, where you can see what is lost.
# Chapter 03 then asks the same questions of real weights.
#
# **Afterwards you can** say what the rank of a matrix is and what it costs; read a spectrum of singular values; state
# the theorem of Eckart and Young, and check it by trying to beat it; tell structure from noise, and say how faint a
# structure may be before noise hides it; compare two subspaces and know what chance gives; decide when a randomised
# SVD will do.
#
# **You should know** what a matrix product is, and enough PyTorch to read `A @ B`.
#
# **Time**: 40 minutes to read, about half of it for each half of the chapter; less than one to run.

# %% tags=["setup"]
import time

import torch
from matplotlib import cbook
from matplotlib.image import imread

from lora_edu import explore, lowrank, plots
from lora_edu.exercises import chapter_01 as exercises

photograph = torch.from_numpy(imread(cbook.get_sample_data("grace_hopper.jpg")).mean(axis=-1) / 255)
heights = torch.from_numpy(cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype("float64"))

# %% [markdown]
# Both come with matplotlib: Rear Admiral Grace Hopper in 600 × 512 grey values from 0 to 1, and the heights in metres
# of 344 × 403 points in the Appalachians, where Tennessee meets Kentucky. We subtract the mean from each. The mean
# alone is a matrix of rank 1 that has most of the sum of squares and shows nothing.

# %% tags=["setup"]
face = photograph - photograph.mean()
hills = heights - heights.mean()
assert face.shape == (600, 512) and hills.shape == (344, 403)
assert all(matrix.mean() ** 2 > 0.5 * matrix.square().mean() for matrix in (photograph, heights))

# %% [markdown]
# ## First half: one matrix and its cuts
#
# Three sections: what rank counts, what a lower rank keeps, and why no other matrix of that rank keeps more.
#
# ## 1 · What does rank count?
#
# The multiplication table up to 12 × 12 has 144 numbers, and nobody stores 144: row $i$ is $i$ times the first row.
# A table in which every row is a multiple of one row has **rank 1**. In general, the rank of an $m \times n$ matrix $M$
# is the smallest $r$ with
#
# $$M = B A, \qquad B \in \mathbb{R}^{m \times r}, \quad A \in \mathbb{R}^{r \times n}.$$
#
# The $r$ rows of $A$ are enough to mix all $m$ rows of $M$ from them, and $B$ says how much of each to take. Here are
# five tables of 12 × 12, with the row number $i$ and the column number $j$.

# %%
explore.predict(
    "One of these five tables has the full rank 12. Which one?",
    {
        "i · j": "Every row is a multiple of the first row, so it has the lowest rank of all.",
        "(i + j)²": "Squares look wild, but they can be multiplied out: i² + 2ij + j². Count the products of a part "
        "that knows only the row with a part that knows only the column.",
        "max(i, j)": "It looks as orderly as the others. But write it as a sum of products of a row part and a "
        "column part, and see how many you need.",
        "1 where i + j is odd": "That is a chessboard. Compare its rows: how many different ones are there?",
    },
)

# %%
i = torch.arange(1.0, 13.0)[:, None]
j = i.T
tables = {
    "i · j": i * j,
    "i + j": i + j,
    "(i + j)²": (i + j) ** 2,
    "max(i, j)": torch.maximum(i, j),
    "(i + j) odd": (i + j) % 2,
}
for name, table in tables.items():
    print(f"{name:12} rank {torch.linalg.matrix_rank(table)}")

# %% [markdown]
# The sum $i + j$ is $i \cdot 1 + 1 \cdot j$: two products of something that knows only the row with something that
# knows only the column. Its square is $i^2 \cdot 1 + 2i \cdot j + 1 \cdot j^2$: three. The chessboard has only two
# different rows. But $\max(i, j)$, as orderly as the others, has the full rank 12: rank is one kind of order among many.
#
# Here are $B$ and $A$ for the sum.

# %%
ones = torch.ones(12, 1)
B, A = torch.cat([i, ones], dim=1), torch.cat([ones.T, j])
assert torch.equal(B @ A, tables["i + j"])
assert [int(torch.linalg.matrix_rank(table)) for table in tables.values()] == [1, 2, 3, 12, 2]

# %% [markdown]
# **What does rank $r$ cost?** $B$ and $A$ together hold $r(m + n)$ numbers. Are all of them needed? For any
# invertible $r \times r$ matrix $G$, the factors $B G$ and $G^{-1} A$ have the same product $B A$. So some of the
# numbers are idle: they can change, and $B A$ does not. To count the others, ask in how many independent directions
# $B A$ moves when the entries of $B$ and $A$ move: that is the rank of the matrix of all derivatives.

# %%
explore.predict(
    "At r = 2, how many of the numbers in B and A are idle?",
    {
        "none": "Try it: double a column of B and halve the row of A that it meets. BA stays as it was.",
        "2": "One for each term: its column may be scaled if its row is scaled back. But the two terms can also be "
        "mixed with each other.",
        "4": "You counted the entries of G. The next cell checks whether that is all.",
    },
)


# %%
def free_directions(m, n, r):
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    by_B, by_A = torch.func.jacrev(torch.matmul, argnums=(0, 1))(B, A)
    return int(torch.linalg.matrix_rank(torch.cat([by_B.reshape(m * n, -1), by_A.reshape(m * n, -1)], dim=1)))


free = [free_directions(8, 6, r) for r in range(1, 7)]
for r, count in enumerate(free, 1):
    print(f"8 × 6 at r = {r}: {r * (8 + 6)} numbers stored, {count} free, {r * (8 + 6) - count} idle")

# %% [markdown]
# One, four, nine: $r^2$ are idle, as many as $G$ has entries. A matrix of rank $r$ has **$r(m + n - r)$ degrees of
# freedom**. At full rank ($r = 6$) that is all 48 of an 8 × 6 matrix, as it must be. For small $r$ the idle part
# is negligible, and everybody counts $r(m + n)$, chapter 04 included.

# %%
assert free == [r * (8 + 6 - r) for r in range(1, 7)] and free[-1] == 8 * 6

# %% [markdown]
# ## 2 · What does rank r keep?
#
# Hardly any matrix of measurements has a low rank exactly. So look for the matrix of rank 1 that is *closest* to the
# photograph $M$. Start from any row $v$. The best column to go with it is $M v$, up to its length; the best row for a
# column $u$ is $M^\top u$. Go back and forth until nothing changes. That is the **power iteration**. Subtract what it
# found, and do the same to the rest.


# %%
def strongest_term(matrix, rounds=300):
    v = torch.ones(matrix.shape[1], dtype=matrix.dtype)
    for _ in range(rounds):
        u = torch.nn.functional.normalize(matrix @ v, dim=0)
        v = matrix.T @ u
        sigma = v.norm()
        v = v / sigma
    return sigma, u, v


rest, found = face.clone(), []
for _ in range(4):
    sigma, u, v = strongest_term(rest)
    rest -= sigma * torch.outer(u, v)
    found.append(sigma)
print("strengths σ of the first four terms:", "  ".join(f"{sigma:.2f}" for sigma in found))

# %% [markdown]
# `torch.linalg.svd` finds all terms at once, the strongest first:
#
# $$M = \sigma_1 u_1 v_1^\top + \sigma_2 u_2 v_2^\top + \dots$$
#
# The $\sigma_k$ are the **singular values**; in a row they are the **spectrum** of $M$. Its first four are the ones that
# we found.

# %%
U, S, Vh = torch.linalg.svd(face, full_matrices=False)
assert torch.allclose(torch.stack(found), S[:4])
print(f"{len(S)} singular values, from {S[0]:.1f} to {S[-1]:.3f}")

# %% [markdown]
# All $u_k$ are at right angles to each other, and so are all $v_k$. So squares add up, as in Pythagoras' theorem. The
# sum of all squared entries of $M$ is called its **energy** here, and it is the square of its Frobenius norm:
#
# $$\lVert M \rVert_F^2 = \sum_k \sigma_k^2.$$
#
# A cut after $r$ terms keeps the share $(\sigma_1^2 + \dots + \sigma_r^2) / \sum_k \sigma_k^2$ of the energy. What is
# missing has the norm $\sqrt{\sigma_{r+1}^2 + \sigma_{r+2}^2 + \dots}$.

# %%
r = 16
truncated = (U[:, :r] * S[:r]) @ Vh[:r]
kept = S[:r].square().sum() / S.square().sum()
stored = r * sum(face.shape) / face.numel()
print(f"rank {r} keeps {kept:.1%} of the energy in {stored:.1%} of the numbers")

missing = torch.linalg.matrix_norm(face - truncated)
assert torch.isclose(S.square().sum(), face.square().sum())
assert torch.isclose(missing, S[r:].square().sum().sqrt())
assert 0.89 < kept < 0.90 and stored < 0.06 and 0.49 < S[:2].square().sum() / S.square().sum() < 0.50

# %%
explore.predict(
    "At which rank will you recognise the face?",
    {
        "about 2": "Half of the energy is there at r = 2. Look whether half of the face is, too.",
        "about 8": "At r = 8 four fifths of the energy are there. Go to 8 and look; then go to 16.",
        "16 to 32": "At r = 16 nine tenths of the energy are there. Look what the last tenth holds.",
        "about 100": "At r = 96 more than 99 % of the energy is there. See how far down you can go from it.",
    },
)

# %% [markdown]
# Move the slider, or use the arrow keys. The picture in the middle shows what is missing.

# %%
explore.photograph_rank(photograph)

# %% [markdown]
# At $r = 2$ half of the energy is kept, and the *missing* half is the better portrait. At 16 somebody is there, at 32
# it is Grace Hopper. Energy counts squared grey values; eyes look for edges. Keep this in mind for chapter 03, where
# neither of the two is the judge: what counts there is what the model does.
#
# The spectrum on the right has no step at which to cut. It falls steeply at first, and then slowly, to the end. "The
# rank of a photograph" is not a number, it is a curve.
#
# ### A map, and why a ridge is expensive
#
# Heights have a unit, so an error in them is easier to feel.

# %%
explore.predict(
    "A typical point lies 162 m from the mean height (root mean square). If 90 % of the energy is kept, how many metres "
    "is a typical point off?",
    {
        "about 16 m": "That is 10 % of 162 m. But energy is made of squares, and metres are not.",
        "about 50 m": "You took a root somewhere: √0.1 is 0.32.",
        "about 100 m": "Then almost nothing would be left of the map. Look at it at rank 8, below.",
    },
)

# %%
S_hills = torch.linalg.svdvals(hills)
off = {r: float((S_hills[r:].square().sum() / hills.numel()).sqrt()) for r in (8, 32)}
share = {r: float(S_hills[:r].square().sum() / S_hills.square().sum()) for r in (8, 32)}
print(f"a typical point lies {hills.square().mean().sqrt():.0f} m from the mean")
for r in off:
    print(f"rank {r:2}: {share[r]:.1%} of the energy, a typical point {off[r]:.0f} m off")
assert 51 < off[8] < 53 and 0.89 < share[8] < 0.90 and 0.985 < share[32] < 0.995

# %%
explore.elevation_rank(heights)

# %% [markdown]
# With nine tenths of the energy kept, points are still 52 m off, because $\sqrt{0.1}$ is about a third: **10 % of the
# energy is 32 % of the distance**. And the long ridge in the upper right, which anyone would draw first, is not there at
# rank 8. It appears between rank 16 and rank 32, with the last few percent.
#
# Why so late? Because it runs *at an angle* to rows and columns. A ridge along a row is one column profile times one row
# and has rank 1. A ridge along the diagonal is a different row each time; if it is infinitely thin, it is the identity
# matrix.

# %%
place = torch.arange(200.0, dtype=torch.float64)
for width in (1, 5, 20):
    along = torch.exp(-((place[:, None] - 100) ** 2) / (2 * width**2)).expand(200, 200)
    diagonal = torch.exp(-((place[:, None] - place) ** 2) / (2 * width**2))
    ranks = [lowrank.rank_for_energy(ridge, 0.9) for ridge in (along, diagonal)]
    print(f"width {width:2}: 90 % takes rank {ranks[0]} along a row, rank {ranks[1]:2} along the diagonal")
    assert ranks[0] == 1 and ranks[1] >= 75 // width

# %% [markdown]
# Rank sees order only along rows and columns. Turn the map by 45 degrees and its spectrum changes, though the hills
# do not. For a weight matrix that is the right kind of order, because rows and columns *are* something there: outputs
# and inputs. A matrix of rank 1 listens to one mixture of inputs and answers with one mixture of outputs.

# %% [markdown]
# ## 3 · Can anyone do better?
#
# Cutting the sum is one way to get a matrix of rank $r$. Eckart and Young proved in 1936, and Mirsky in 1960 for
# every norm that depends on the singular values only, that
#
# > **no matrix of rank $r$ is closer to $M$ than the first $r$ terms of its SVD.**
#
# Let us not believe it. We want a matrix of rank 8 that is closer to the hills than the truncated one, by any means.
# First try: we mix the map from 8 of its own columns, or from 8 random columns, with the best possible coefficients;
# 300 tries each.

# %%
r = 8
best = S_hills[r:].square().sum().sqrt()
generator = torch.Generator().manual_seed(0)


def off_by(columns):  # the distance of the hills to the best that can be mixed from these columns
    Q = torch.linalg.qr(columns).Q
    return float(torch.linalg.matrix_norm(hills - Q @ (Q.T @ hills)) / best)


own = min(off_by(hills[:, torch.randperm(403, generator=generator)[:r]]) for _ in range(300))
random = min(off_by(torch.randn(344, r, generator=generator, dtype=torch.float64)) for _ in range(300))
print(f"best of 300: own columns {own:.1f} ×, random ones {random:.1f} × the truncation's distance")
assert 1.25 < own < 1.4 and 2.8 < random < 3.1

# %% [markdown]
# The best of the own columns is a third farther off, the best of the random ones three times as far. Second try:
# optimise. *Alternating least squares* starts from a random $A$, solves for the best $B$, then for the best $A$, and so
# on. *Gradient descent* starts as LoRA does, from a random $A$ and $B = 0$, and lets the optimiser Adam reduce
# $\lVert \text{hills} - B A \rVert_F^2$.

# %%
explore.predict(
    "What will the two optimisers do?",
    {
        "get stuck in a poor local minimum": "The problem is not convex, so this is the fear to have. Watch for curves "
        "that go flat high up, and see whether they stay there.",
        "stop at the truncation": "You believe the theorem, and also that descent finds the way. The theorem does not "
        "promise the second: watch the curves.",
        "pass it": "Then Eckart and Young are wrong. The cell below the picture would stop with an error.",
    },
)


# %%
def alternating(seed, rounds=200):
    A = torch.randn(r, 403, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(rounds):
        B = torch.linalg.lstsq(A.T, hills.T).solution.T
        A = torch.linalg.lstsq(B, hills).solution
        yield float(torch.linalg.matrix_norm(hills - B @ A) / best) - 1


def descent(seed, rounds=400, rate=0.1):
    scaled = hills / hills.std()
    A = torch.randn(r, 403, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 20
    B = torch.zeros(344, r, dtype=torch.float64)
    optimiser = torch.optim.Adam([A.requires_grad_(), B.requires_grad_()], lr=rate)
    for _ in range(rounds):
        loss = (scaled - B @ A).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield float(loss.detach().sqrt() * hills.std() / best) - 1


# %% [markdown]
# Three random starts each. The height of a curve is how far the rival is still behind the truncation.

# %%
rivals = {
    "alternating least squares": torch.tensor([list(alternating(seed)) for seed in range(3)]).T,
    "gradient descent (Adam)": torch.tensor([list(descent(seed)) for seed in range(3)]).T,
}
ninth = float((best.square() + S_hills[r - 1] ** 2 - S_hills[r] ** 2).sqrt() / best) - 1
figure, axes = plots.subplots()
lines = {name: (range(1, len(behind) + 1), 100 * behind.clamp(min=1e-9)) for name, behind in rivals.items()}
title = "Rivals of rank 8: all arrive at the truncation, none passes it"
plots.curves(axes, lines, yscale="log", xlabel="step", ylabel="behind the truncation (%)", title=title)
plots.mark_level(axes, 100 * ninth, "the 9th direction in place of the 8th")
plots.show(figure, "Six rivals fall to the truncation's distance, some by way of a plateau 2.2 % above it.")

# %%
nearest = min(float(behind.min()) for behind in rivals.values())
arrived = max(float(behind[-1].max()) for behind in rivals.values())
print(f"plateau: {ninth:.1%} behind")
assert nearest > -1e-9, "somebody beat Eckart and Young: check the code, then publish"
assert arrived < 1e-4 and 0.021 < ninth < 0.023

# %% [markdown]
# They neither pass it nor get stuck. Some rest for a while, always at one height, 2.2 %: that is the price of holding
# the ninth direction in the place of the eighth. Every point where the gradient vanishes is such a choice of at most $r$
# singular directions. Every choice but the best is a saddle, with a way down (Baldi & Hornik 1989). So if LoRA's two
# factors were trained to *copy a given* $\Delta W$, they would end at its truncation. What they do when they are trained
# on text is another question, for chapter 07.
#
# **Why can nobody pass?** Because a rival has too little rank to be good everywhere. Take any $X$ of rank $r$. The
# mixtures of the $r + 1$ strongest directions $v_1, \dots, v_{r+1}$ have $r + 1$ dimensions, and $X$ can tell only $r$
# apart. So $X$ sends one of these mixtures, call it $x$, to zero. But $M$ makes every such mixture at least
# $\sigma_{r+1}$ times as long. So on $x$ the rival is off by at least $\sigma_{r+1}$. We find that $x$ for one rival:

# %%
U, S, Vh = torch.linalg.svd(hills, full_matrices=False)
columns = hills[:, torch.randperm(403, generator=generator)[:r]]
rival = columns @ torch.linalg.lstsq(columns, hills).solution

mixture = torch.linalg.svd(rival @ Vh[: r + 1].T).Vh[-1]  # the mixture of v_1 … v_9 that the rival cannot see
x = Vh[: r + 1].T @ mixture
print(f"‖x‖ = {x.norm():.3f}, the rival makes of it {(rival @ x).norm() / S[0]:.3f} σ_1")
print(f"the hills make of it {(hills @ x).norm() / S[r]:.2f} σ_9, so there the rival is off by as much")
assert (rival @ x).norm() < 1e-8 * S[0] and (hills @ x).norm() >= S[r] * (1 - 1e-9)

# %% [markdown]
# This proves the theorem for the **spectral norm** $\lVert \cdot \rVert_2$, the error in the worst direction: it is
# $\sigma_{r+1}$ for the truncation and at least that for everyone. In the Frobenius norm the truncation is the only best
# one here; in the spectral norm there are others as good. Lower all eight kept $\sigma_k$ by anything up to $\sigma_9$,
# and the error in the worst direction stays the same.

# %%
lowered = (U[:, :r] * (S[:r] - 0.9 * S[r])) @ Vh[:r]
truncated = (U[:, :r] * S[:r]) @ Vh[:r]
for name, rival in (("truncated", truncated), ("lowered", lowered)):
    worst, whole = (torch.linalg.matrix_norm(hills - rival, norm) for norm in (2, "fro"))
    print(f"{name:9}: spectral {worst / S[r]:.3f} σ_9, Frobenius {whole / best:.3f} × the best")
assert torch.isclose(torch.linalg.matrix_norm(hills - lowered, 2), S[r])

# %% [markdown]
# ## Second half: what chapter 03 will need
#
# Chapter 03 subtracts the weights of a model before and after tuning, and asks questions about the difference
# $\Delta W$. Each of the five sections below opens with one of its questions, and settles on a photograph and a map
# how to answer it.
#
# ## 4 · Isn't r = rank(ΔW) the value that keeps the most information?
#
# > **Chapter 03 asks**: of what rank is $\Delta W$? And the files that I subtract are in half precision: does that matter?
#
# The study note that this course grew out of asks the question in the title. The photograph and the map can answer the
# first half of it.

# %%
explore.predict(
    "The map, cut to rank 8, is stored in half precision; that moves no height by more than 25 cm. What is its rank now?",
    {
        "8": "25 cm are not to be seen on any map. But rank does not ask how large a change is.",
        "about 20": "A little more than before, for a little change. But each row is rounded in its own way.",
        "344, all of it": "You expect that any noise, however small, makes the rows independent of each other.",
    },
)

# %%
rank = int(torch.linalg.matrix_rank(face))
rows, columns = face.shape
break_even = rows * columns / (rows + columns)
print(f"rank of the photograph: {rank}, to be stored in {rank * (rows + columns):,} numbers")
print(f"the photograph itself has {rows * columns:,}, so a rank pays below {break_even:.0f}")
assert rank == 512

truncated = lowrank.truncate(hills, 8)
halved = truncated.half().double()  # stored in half precision and read again
for name, stored in (("double precision", truncated), ("half precision", halved)):
    print(f"rank-8 map in {name}: rank {torch.linalg.matrix_rank(stored)}")
assert torch.linalg.matrix_rank(truncated) == 8 and torch.linalg.matrix_rank(halved) == 344

# %% [markdown]
# A matrix that was measured or rounded has full rank: the slightest noise makes every row independent of the others.
# Rounding to half precision moved no height by more than 25 cm, and took the rank from 8 to 344. The spectrum shows what
# happened, and how little.

# %%
rounded = torch.linalg.svdvals(halved)
floor = float(lowrank.rounding_floor(truncated, torch.float16, roundings=1)[0])
figure, axes = plots.subplots()
title = "A rank-8 map in half precision: 8 singular values, a cliff, 336 of rounding"
plots.spectrum(axes, rounded, kept=8, edge=floor, edge_name="edge of rounding, predicted", title=title)
assert rounded[7] > 5000 * rounded[8] and (truncated - halved).abs().max() <= 0.25
assert rounded[7] > 8000 and rounded[8] < 1.45 and abs(rounded[8] / floor - 1) < 0.1
plots.show(figure, "Eight singular values above 8 000, then a cliff to 1.4 and below, where rounding is.")

# %% [markdown]
# The dashed line is no fit. Half precision has 11 significant bits; from that alone `lowrank.rounding_floor` computes
# how large an error rounding makes in each entry, and how large a singular value such errors make together. What
# lies above the line is not rounding. Two checkpoints in half precision differ by rounding too, and chapter 03 draws
# the same line.
#
# **Is $r = \operatorname{rank}(\Delta W)$ the value that keeps the most information?** It keeps everything, and it is
# useless: the rank of any measured matrix is full, and at full rank $B$ and $A$ hold more numbers than the matrix itself.
# The question that helps is how much each *smaller* $r$ keeps. Eckart and Young answer it: the share
#
# $$\frac{\sigma_1^2 + \dots + \sigma_r^2}{\sum_k \sigma_k^2}$$
#
# of the energy, and no other matrix of rank $r$ keeps more. How much of the *behaviour* that is, chapter 03 measures;
# whether a *trained* rank $r$ does better, chapter 07.
#
# Where one number must do, there are better ones than the rank. None of them is the truth; say which one you use.
#
# - **rank for 90 % energy**: the smallest $r$ that keeps 90 % of $\sum_k \sigma_k^2$;
# - **stable rank** $\sum_k \sigma_k^2 / \sigma_1^2$: how many terms as strong as the first would have this energy;
# - **effective rank** $\exp(-\sum_k p_k \ln p_k)$ with $p_k = \sigma_k / \sum_l \sigma_l$ (Roy & Vetterli 2007): the
#   entropy of the spectrum as a count, so a long tail counts.

# %%
generator = torch.Generator().manual_seed(0)
order = torch.randperm(face.numel(), generator=generator)
shuffled = face.flatten()[order].reshape(face.shape)  # for section 5
subjects = {"photograph": face, "its pixels shuffled": shuffled, "map": hills}
subjects |= {"rank-8 map, rounded": halved}
print(f"{'':20} numerical  90 % energy  stable  effective")
for name, matrix in subjects.items():
    S = lowrank.svd(matrix).S
    ranks = lowrank.numerical_rank(matrix), lowrank.rank_for_energy(S, 0.9)
    stable, effective = lowrank.stable_rank(S), lowrank.effective_rank(S)
    print(f"{name:20} {ranks[0]:9} {ranks[1]:12} {stable:7.1f} {effective:10.0f}")
assert ranks == (344, 5) and 6 < effective < 8  # the rounded map's
assert lowrank.rank_for_energy(face, 0.9) == 17 and 123 < lowrank.effective_rank(face) < 125
assert 2.9 < lowrank.stable_rank(face) < 3.1

# %% [markdown]
# The rounded map's 344 says nothing about the map. The other three hardly notice the rounding: 5 of the 8 terms have
# 90 % of the energy, and the effective rank is 7. For the photograph the three disagree, 17, 3.0 and 124, because
# they ask about its bulk, its first term and its tail.

# %% [markdown]
# ## 5 · Structure, or chance?
#
# > **Chapter 03 asks**: a few directions hold a large share of $\Delta W$'s energy. Is that more than noise of the same
# > shape would have?
#
# Take the photograph with its 307 200 pixels in random order. It has the same grey values and the same energy, and it
# is noise.

# %%
explore.predict(
    "In the right order, 16 of 512 terms keep 90 % of the energy. How much do they keep when the pixels are shuffled?",
    {
        "90 %": "The energy is the same, to the last pixel. But does its share in the first terms depend on the order?",
        "about 10 %": "More than 16/512, you say, though nothing distinguishes one direction. Think why: which 16 of "
        "the 512 terms are counted?",
        "3 %": "That is 16/512, the share of sixteen terms that are all alike. But these are the sixteen strongest.",
    },
)

# %%
S_face, S_shuffled = torch.linalg.svdvals(face), torch.linalg.svdvals(shuffled)
kept = [float(lowrank.energy(S)[15]) for S in (S_face, S_shuffled)]
print(f"rank 16 keeps {kept[0]:.0%} of the photograph and {kept[1]:.0%} of the same pixels shuffled")
assert kept[0] > 0.89 and 0.09 < kept[1] < 0.11
assert torch.isclose(S_face.square().sum(), S_shuffled.square().sum())

# %% [markdown]
# Low rank is a property of the *order*, not of the numbers. Without order, the spectrum can be predicted from one
# number, the standard deviation of an entry. Call it $\sigma$: from here on, a $\sigma$ without an index is this one.
# The singular values of a large $m \times n$ matrix of independent entries with mean 0 end at the **edge**
#
# $$\sigma (\sqrt{m} + \sqrt{n}).$$
#
# Below it they are spread by the law of Marchenko and Pastur (1967), whatever the distribution of the
# entries (if it has no wild outliers). Test it on the shuffled pixels, which are far from Gaussian.


# %%
def marchenko_pastur(s, m, n, sigma):  # the density of the singular values at s
    lower, upper = sigma * abs(m**0.5 - n**0.5), sigma * (m**0.5 + n**0.5)
    inside = ((upper**2 - s**2) * (s**2 - lower**2)).clamp(min=0).sqrt()
    return inside / (torch.pi * sigma**2 * min(m, n) * s)


sigma = float(face.std())
edge = sigma * (rows**0.5 + columns**0.5)
places = torch.linspace(0.01, edge, 300, dtype=torch.float64)
law = marchenko_pastur(places, rows, columns, sigma)
print(f"largest singular value: predicted {edge:.1f}, of the shuffled pixels {S_shuffled[0]:.1f}")
above = [int((S > edge).sum()) for S in (S_face, S_shuffled)]
print(f"above the edge: {above[0]} of the photograph's, {above[1]} of the shuffled pixels'")
assert abs(S_shuffled[0] / edge - 1) < 0.02 and above[0] == 15 and above[1] <= 1

# %%
figure, (left, right) = plots.subplots(1, 2)
number = range(1, len(S_face) + 1)
both = {"photograph": (number, S_face), "pixels shuffled": (number, S_shuffled)}
labels = {"xlabel": "number k", "ylabel": "singular value", "title": "Same pixels, two orders"}
plots.curves(left, both, yscale="log", **labels)
labels = {"ylim": (0, 1.8 * float(law.max())), "title": "Shuffled: as the law says"}
plots.noise_histogram(right, S_shuffled, (places, law), edge, **labels)
plots.show(figure, "The shuffled pixels' singular values follow the law of Marchenko and Pastur to its edge.")

# %% [markdown]
# A spectrum in which nothing stands out, and which stops at the edge, is what *noise* looks like. And yet its first 16
# terms, 3 % of 512, have 10 % of the energy, because they were chosen for being large. A share of energy means little
# unless you compare it with the share that noise of the same shape has. For tall, thin matrices that is near the share
# of the terms: 8 of 100 terms of 10 000 × 100 noise keep 9 %.

# %%
tall = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(0))
share = float(lowrank.energy(torch.linalg.svdvals(tall))[7])
print(f"noise of 10 000 × 100: 8 of 100 terms keep {share:.0%}")
assert 0.09 < share < 0.095

# %% [markdown]
# ## 6 · How faint a structure can be found?
#
# > **Chapter 03 asks**: if I plant an update of low rank in a matrix, and training adds noise of its own, does the spectrum
# > of the result still show it?
#
# Hide one term $t \cdot u v^\top$ of strength $t$ in 400 × 400 noise of deviation 1. The noise reaches up to
# $2 \sqrt{400} = 40$.

# %%
explore.predict(
    "How strong must the hidden term be, so that the strongest direction of the sum tells something about u?",
    {
        "about 20": "Half as strong as the noise reaches! Then a term could be found before it stands out alone.",
        "about 40": "As strong as the noise reaches. But noise and term add up in the sum: look left of 40, too.",
        "about 80": "Twice as strong as the noise reaches. Look how much is found before that.",
    },
)

# %%
n, draws = 400, 4
strengths = [0, 10, 20, 24, 30, 40, 60, 80]
generator = torch.Generator().manual_seed(1)
largest, overlaps = torch.zeros(draws, len(strengths)), torch.zeros(draws, len(strengths))
for draw in range(draws):
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    u, v = torch.nn.functional.normalize(torch.randn(2, n, generator=generator, dtype=torch.float64), dim=1)
    for k, t in enumerate(strengths):
        left, S, _ = torch.linalg.svd(noise + t * torch.outer(u, v))
        largest[draw, k], overlaps[draw, k] = S[0], (left[:, 0] @ u) ** 2
print("strength   ", "".join(f"{t:7}" for t in strengths))
print("largest σ  ", "".join(f"{x:7.1f}" for x in largest.mean(0)), "  mean of four draws")
print("overlap    ", "".join(f"{x:7.2f}" for x in overlaps.mean(0)))

# %% [markdown]
# Theory says what to expect (Benaych-Georges & Nadakuditi 2012). With $\theta = t / \sqrt{n}$ there is no trace up to
# $\theta = 1$, here $t = 20$. Above, one singular value leaves the noise, and the overlap of its direction with $u$ (the
# squared cosine) grows:
#
# $$\sigma_1 \approx \Bigl(\theta + \frac{1}{\theta}\Bigr) \sqrt{n}, \qquad \text{overlap} \approx 1 - \frac{1}{\theta^2}.$$

# %%
fine = torch.linspace(0, 80, 321)
theta = (fine / n**0.5).clamp(min=1)  # below 1 the noise answers as if nothing were there
figure, (left, right) = plots.subplots(1, 2)
labels = {"xlabel": "strength t", "title": "Dots: four draws. Line: theory"}
plots.curves(
    left, {"theory": (fine, (theta + 1 / theta) * n**0.5)}, ylabel="largest singular value", **labels
)
labels |= {"title": "How true its direction is", "ylim": (0, 1.03)}
plots.curves(right, {"theory": (fine, 1 - 1 / theta**2)}, ylabel="overlap with u", **labels)
for axes, measured in ((left, largest), (right, overlaps)):
    axes.plot(strengths, measured.T, "o", color=plots.VERMILION, markersize=3)
plots.mark_level(left, 2 * n**0.5, "the noise alone", x=0.99)
plots.show(
    figure,
    "Below a strength of 20 nothing shows; above, the largest singular value and the overlap rise.",
)

# %%
theta = (torch.tensor(strengths) / n**0.5).clamp(min=1)
assert ((largest / ((theta + 1 / theta) * n**0.5) - 1).abs() < 0.04).all()
away = torch.tensor([t != 20 for t in strengths])
assert ((overlaps.mean(0) - (1 - 1 / theta**2)).abs() < 0.1)[away].all() and overlaps[:, :2].max() < 0.1
weak, strong = strengths.index(30), strengths.index(60)
assert 0.45 < overlaps.mean(0)[weak] < 0.65 and overlaps.mean(0)[strong] > 0.85

# %% [markdown]
# Below $t = \sqrt{n} = 20$ there is no trace; near 20 the draws differ. Above, the largest singular value leaves the noise, although the hidden
# term alone is only half as strong as the noise reaches: term and noise add up. The direction turns towards $u$ gradually:
# at $t = 30$, that is $1.5 \sqrt{n}$, theory gives an overlap of 0.56, and single draws lie around it. For an $m \times n$
# matrix the threshold is $\sqrt[4]{m n}$.
#
# Try both: the strength, and the size of the matrix. In larger matrices the edge is sharper.

# %%
explore.hidden_direction()

# %% [markdown]
# So a singular value above the edge says that *something* is there. How true its direction is depends on how far it
# stands out.
#
# ### Which rank is best, if there is noise?
#
# Add noise to the photograph, and cut. Every term that is kept brings back some photograph and some noise.

# %%
explore.predict(
    "Which terms of the noisy photograph should one keep, to come as close as possible to the clean one?",
    {
        "all that stand above the edge": "They all hold some photograph, that is true. But the last of them point "
        "almost anywhere: compare the two errors below.",
        "fewer": "You remember the overlap: barely above the edge, a direction is mostly noise.",
        "more": "Below the edge there is photograph, too, but its directions cannot be told from those of the noise.",
    },
)

# %%
level = 0.4
generator = torch.Generator().manual_seed(0)
noisy = face + level * torch.randn(face.shape, generator=generator, dtype=torch.float64)
U, S, Vh = torch.linalg.svd(noisy, full_matrices=False)
off = [float(((U[:, :r] * S[:r]) @ Vh[:r] - face).square().mean().sqrt()) for r in range(61)]
closest = min(range(61), key=off.__getitem__)
print(f"closest to the clean photograph: rank {closest}, off by {off[closest]:.2f} (the noisy one: {level})")

edge = lowrank.random_matrix_edge(rows, columns, level)
threshold = lowrank.denoising_threshold(rows, columns, level)
for name, limit in (("the edge", edge), ("Gavish and Donoho's threshold", threshold)):
    count = int((limit < S).sum())
    print(f"above {name}, {limit:.1f}: {count} terms, off by {off[count]:.2f}")
assert closest < int((edge < S).sum()) and abs(closest - count) <= 1

# %% [markdown]
# Fewer. A term that stands barely above the edge points in so wrong a direction that it brings more noise than
# photograph. Gavish and Donoho (2014) worked out how strong a term must be to be worth keeping: stronger than
# $4 / \sqrt{3} \approx 2.31$ times $\sigma \sqrt{n}$ for a square matrix, whose edge is at $2 \sigma \sqrt{n}$. Their
# threshold needs no clean photograph to compare with, only $\sigma$.

# %%
explore.noisy_photograph(photograph)

# %% [markdown]
# The threshold finds the best rank or comes near it. But look at $\sigma = 0.8$: the cut picture is closer to the
# truth, pixel for pixel, and *your eye still does better on the noisy one*. You know that neighbouring pixels belong
# together. The SVD does not: it would give the same answer with all rows and columns rearranged. Low rank is a weak
# assumption: it finds some structure, and misses other.

# %% [markdown]
# ## 7 · Are two subspaces alike?
#
# > **Chapter 03 asks**: do two runs, tuned on the same text in another order, find the same update?
#
# In numbers: do two matrices have their strongest directions in common? The LoRA paper asks it of two ranks (§7.2,
# equation 4). The measure is
#
# $$\varphi(i, j) = \frac{\lVert U^\top V \rVert_F^2}{\min(i, j)},$$
#
# where the columns of $U$ are the $i$ strongest right singular vectors of one matrix (directions in the space in which its
# rows lie), and those of $V$ the $j$ strongest of the other. It is 1 where the smaller subspace lies in the larger one.

# %%
explore.predict(
    "Two random subspaces of 8 and 64 dimensions in a space of 512: how large is φ(8, 64) on average?",
    {
        "near 0": "They share nothing, that is true. But 64 of 512 dimensions are no small part of the space.",
        "about 0.13": "You asked how much of a random vector falls into 64 of 512 dimensions.",
        "about 0.5": "Then half of each vector's square would lie in an eighth of the dimensions.",
    },
)


# %%
def similarity(A, B, i, j):
    U_A, U_B = (torch.linalg.svd(matrix, full_matrices=False).Vh for matrix in (A, B))
    return float((U_A[:i] @ U_B[:j].T).square().sum() / min(i, j))


generator = torch.Generator().manual_seed(0)
draws = [torch.randn(2, 64, 512, generator=generator, dtype=torch.float64) for _ in range(20)]
chance = sum(similarity(A, B, 8, 64) for A, B in draws) / len(draws)
print(f"random subspaces: φ(8, 64) = {chance:.3f} on average, max(i, j) / d = {64 / 512:.3f}")
assert abs(chance - 64 / 512) < 0.01

# %% [markdown]
# A unit vector has 64/512 of its square in a random subspace of 64 of 512 dimensions. So **chance gives
# $\max(i, j) / d$**, not 0. In a space of 100 dimensions, the width of TinyLM, that is 0.64: a high similarity that
# says nothing.
#
# There is another trap, and it is harder to see. Compare the directions of the photograph's rows with those of the map's
# rows, which have nothing to do with one another.

# %%
rows_about_mean = lambda matrix: matrix - matrix.mean(dim=1, keepdim=True)
portrait, relief = rows_about_mean(face[:, :403]), rows_about_mean(hills)  # equally wide
rearranged = relief[:, torch.randperm(403, generator=generator)]
found, destroyed = similarity(portrait, relief, 8, 8), similarity(portrait, rearranged, 8, 8)
print(f"photograph and map: φ(8, 8) = {found:.2f}; chance gives {8 / 403:.2f}")
print(f"photograph and map with its columns rearranged: φ(8, 8) = {destroyed:.2f}")
assert found > 20 * 8 / 403 and destroyed < 2 * 8 / 403

# %% [markdown]
# More than twenty times chance, for a portrait and a mountain range! Both are smooth: their strongest directions are
# slow waves from left to right, and there are few of those. When the map's columns are rearranged, its spectrum stays
# as it was, and the similarity falls to chance. So *a similarity above chance shows that two matrices share something; it
# need not be what you were looking for*. The honest floor is a comparison that shares everything except the thing in
# question. Chapter 03 takes this seriously: it sets beside two runs on one text a run on another text.

# %% [markdown]
# ## 8 · Must everything be computed?
#
# > **Chapter 03 asks**: my own two checkpoints have matrices thousands wide. How do I get at their spectra?
#
# The full SVD of an $n \times n$ matrix takes time in proportion to $n^3$, and gives $n$ terms when you want 16. Here is
# the trick of Halko, Martinsson and Tropp (2011). Multiply $M$ by a few random columns: each product is a mixture of
# $M$'s columns in which the strong directions are strong. Make the products orthonormal ($Q$), and take the SVD of the
# small matrix $Q^\top M$.

# %%
explore.predict(
    "The photograph is cut to rank 16 from 26 such products. How much larger than the smallest possible is the error?",
    {
        "by 0.1 %": "So well can a sketch do, but not this plain one: see what one more multiplication brings.",
        "by 1 %": "Near what one power iteration gives. The plain sketch has a harder time: 496 weaker terms are mixed "
        "into its products.",
        "by 30 %": "You do not trust 26 random columns to avoid the 496 weaker terms. See how that can be mended.",
    },
)


# %%
def sketched(M, r, extra=10, power=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(M.shape[1], r + extra, generator=generator, dtype=M.dtype)
    Q = torch.linalg.qr(M @ random).Q
    for _ in range(power):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    return Q @ (U[:, :r] * S[:r]) @ Vh[:r]


for name, matrix, S in (("photograph", face, S_face), ("shuffled", shuffled, S_shuffled)):
    best = S[16:].square().sum().sqrt()
    for power in (0, 1, 2):
        behind = float(torch.linalg.matrix_norm(matrix - sketched(matrix, 16, power=power)) / best) - 1
        print(f"{name}, power {power}: {behind:.1%} above the optimum")
        assert behind < (0.35 if name == "photograph" else 0.03, 0.02, 0.02)[power]
        assert behind > 0.25 or (name, power) != ("photograph", 0)

# %% [markdown]
# A plain sketch of the photograph has an error more than a quarter above the best: the 496 weak terms leak into the
# products. One **power
# iteration** multiplies by $M M^\top$ once more, so that a direction with a tenth of the strength counts for a thousandth,
# and the error is within 2 % of the best. On the shuffled pixels even the plain sketch is hardly behind, but only
# because there the best 16 terms hold only a tenth of the energy.
#
# `lowrank.randomized_svd` does as many power iterations as the spectrum asks for, and returns the error that it
# measured. It also takes a share of the energy, and then finds the rank.

# %%
factors = lowrank.randomized_svd(face, 16)
behind = factors.error / float(S_face[16:].square().sum().sqrt()) - 1
print(f"rank 16: error {factors.relative_error:.1%} of the norm")
found = lowrank.randomized_svd(face, share=0.9)
print(f"90 % of the energy: rank {len(found.S)}")
assert behind < 0.02 and factors.power_iterations >= 1
assert len(found.S) == lowrank.rank_for_energy(S_face, 0.9)

# %% [markdown]
# Is it worth it? On your machine, for 16 terms of 1000 × 1000:

# %% tags=["nbval-ignore-output"]
large = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
seconds = {}
for name, call in (("full", lowrank.svd), ("randomised", lambda matrix: lowrank.randomized_svd(matrix, 16))):
    began = time.perf_counter()
    factors = call(large)
    seconds[name] = time.perf_counter() - began
    print(f"{name:10}: {1000 * seconds[name]:.0f} ms")
error = torch.linalg.matrix_norm(large - (factors.U * factors.S) @ factors.Vh)
assert error <= 1.02 * torch.linalg.svdvals(large)[16:].square().sum().sqrt()

# %% [markdown]
# **Use the randomised SVD** when the matrix is large, the rank you want is small beside it ($r + 10$ below about half of
# the smaller side), and only the leading terms matter. **Use the full one** for anything that asks about the tail: the
# effective rank, the numerical rank, the shape of the noise. For TinyLM's matrices, 100 wide, the full one takes
# milliseconds; for a model of billions of weights it can take hours.
#
# ## The same from the package
#
# What you have written above is in `lora_edu.lowrank`, with the checks and corner cases for which a chapter has no room.
# Later chapters use it without explanation.

# %%
assert torch.allclose(lowrank.truncate(hills, 8), truncated)
assert torch.isclose(lowrank.energy(S_face)[15], S_face[:16].square().sum() / S_face.square().sum())
assert abs(lowrank.random_matrix_edge(rows, columns, sigma) - sigma * (rows**0.5 + columns**0.5)) < 1e-9
assert torch.allclose(lowrank.marchenko_pastur(places, rows, columns, sigma), law)
assert abs(lowrank.subspace_similarity(portrait, relief, 8, 8) - similarity(portrait, relief, 8, 8)) < 1e-9
assert lowrank.chance_similarity(8, 64, 512) == 64 / 512
print("lora_edu.lowrank gives the same")

# %% [markdown]
# ## What to remember
#
# - Rank $r$ means $M = B A$ with $r(m + n)$ numbers, $r^2$ of them idle.
# - The SVD sorts a matrix into terms by strength. Cut after $r$ of them: no matrix of rank $r$ is closer, and the error
#   is $\sqrt{\sigma_{r+1}^2 + \sigma_{r+2}^2 + \dots}$. Gradient descent on two factors finds the same.
# - Every measured or rounded matrix has full rank. Ask how the spectrum falls, and name the measure with the number.
# - With 90 % of the energy kept you are still a third of the distance away, and what was cut may be what you came for.
# - Noise fills the spectrum up to $\sigma(\sqrt{m} + \sqrt{n})$. A structure weaker than $\sigma \sqrt[4]{m n}$ leaves no
#   trace in it.
# - Similarity of subspaces begins at $\max(i, j) / d$, and what two matrices share by nature lifts it further.
# - For the leading terms of a large matrix a sketch with a power iteration or two is as good as the SVD, to a percent.

# %% [markdown]
# ## Exercises
#
# Fill in the open cell and run it. The check says what is wrong with a wrong answer. Five of the six ask for a function:
# the check calls it with matrices that you do not know, and wants your own work, not a call of `lora_edu.lowrank`.

# %% [markdown] tags=["exercise"]
# **Exercise 1.** TinyLM's embedding is 10 000 × 100. How many degrees of freedom has an update of it of rank 8?

# %% tags=["exercise"]
answer = None  # a whole number
print(exercises.check_01_1(answer))

# %% tags=["solution"]
m, n, r = 10_000, 100, 8
answer = r * (m + n) - r**2
print(exercises.check_01_1(answer))

# %% [markdown] tags=["solution"]
# $B$ and $A$ store $r(m + n) = 80 800$ numbers. Replacing $B$ by $B G$ and $A$ by $G^{-1} A$ changes all of them and
# not the product; $G$ has $r^2 = 64$ entries.

# %% [markdown] tags=["exercise"]
# **Exercise 2.** Write `rank_for(S, share)`: the smallest rank that keeps at least this share of the energy. `S` holds
# the singular values, the largest first.

# %% tags=["exercise"]
answer = None  # the function itself: answer = rank_for
print(exercises.check_01_2(answer))


# %% tags=["solution"]
def rank_for(S, share):
    kept = S.square().cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


answer = rank_for
print(exercises.check_01_2(answer))

# %% [markdown] tags=["solution"]
# Energy is $\sum \sigma_k^2$, not $\sum \sigma_k$. The ranks that keep too little are counted, and the answer is the next
# one.

# %% [markdown] tags=["exercise"]
# **Exercise 3.** Write `distances(S)`: from the singular values of $M$ alone, the distance
# $\lVert M - M_r \rVert_F$ to the best approximation of rank $r$, for every $r = 0, 1, \dots, n$. That is one number more
# than `S` has. Small distances must be right, too.

# %% tags=["exercise"]
answer = None  # the function itself: answer = distances
print(exercises.check_01_3(answer))


# %% tags=["solution"]
def distances(S):
    from_the_end = S.square().flip(0).cumsum(0).flip(0)
    return torch.cat([from_the_end, S.new_zeros(1)]).sqrt()


answer = distances
print(exercises.check_01_3(answer))

# %% [markdown] tags=["solution"]
# What was cut off is $\sigma_{r+1} u_{r+1} v_{r+1}^\top + \dots$; its terms are at right angles, so their squares add up.
# Adding from the small end matters: 'all minus what was kept' is the difference of two large numbers, and a small distance
# drowns in their rounding.

# %% [markdown] tags=["exercise"]
# **Exercise 4.** Section 7 compares what two matrices *read*: right singular vectors, directions among the inputs. Write
# `left_similarity(A, B, i, j)`, which compares what they *write*: $\varphi(i, j)$ of the left singular vectors. The two
# matrices have equally many rows.

# %% tags=["exercise"]
answer = None  # the function itself: answer = left_similarity
print(exercises.check_01_4(answer))


# %% tags=["solution"]
def left_similarity(A, B, i, j):
    U_A, U_B = (torch.linalg.svd(matrix, full_matrices=False).U for matrix in (A, B))
    return (U_A[:, :i].T @ U_B[:, :j]).square().sum() / min(i, j)


answer = left_similarity
print(exercises.check_01_4(answer))

# %% [markdown] tags=["solution"]
# The columns of $U$ are the directions, so the first $i$ *columns* are taken, where section 7 takes rows of `Vh`.

# %% [markdown] tags=["exercise"]
# **Exercise 5.** Write `near_best(matrix, rank)`: a matrix of exactly that rank, at most 2 % farther off than the best
# one, on a spectrum that you don't know in advance. No decomposition of the large matrix is allowed. (Section 8 has all
# the pieces. Can you do it without looking?) Stay in torch: while your function runs, the check watches every operation,
# and lets pass decompositions of thin matrices only, those whose smaller side is 64 or less.

# %% tags=["exercise"]
answer = None  # the function itself: answer = near_best
print(exercises.check_01_5(answer))


# %% tags=["solution"]
def near_best(matrix, rank):
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], rank + 10, dtype=matrix.dtype)).Q
    for _ in range(3):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ (U[:, :rank] * S[:rank]) @ Vh[:rank]


torch.manual_seed(0)
answer = near_best
print(exercises.check_01_5(answer))

# %% [markdown] tags=["solution"]
# Ten extra columns catch what the random ones miss; the power iterations push the tail down; cutting the *small* SVD
# brings the rank back to what was asked for.

# %% [markdown] tags=["exercise"]
# **Exercise 6.** Write `visible(matrix, sigma)`: how many singular values of a matrix you can be sure are not noise, if
# its entries carry noise of standard deviation `sigma`. Try it on `exercises.hidden_matrix()`: 300 × 200, noise of
# deviation 1, and six terms hidden in it. Does it find all six?

# %% tags=["exercise"]
answer = None  # the function itself: answer = visible
print(exercises.check_01_6(answer))


# %% tags=["solution"]
def visible(matrix, sigma):
    m, n = matrix.shape
    return int((torch.linalg.svdvals(matrix) > sigma * (m**0.5 + n**0.5)).sum())


S = torch.linalg.svdvals(exercises.hidden_matrix())
assert visible(exercises.hidden_matrix(), 1) == 5 and 31 < S[5] < 31.4
answer = visible
print(exercises.check_01_6(answer))

# %% [markdown] tags=["solution"]
# In the hidden matrix the noise alone reaches up to $\sqrt{300} + \sqrt{200} = 31.5$. Five values stand above. The sixth,
# 31.2, may be noise, and is: the sixth term has the strength 10, below $\sqrt[4]{300 \cdot 200} = 15.7$, and leaves no
# trace.

# %% [markdown]
# ## Where to read on
#
# - Eckart & Young, *The approximation of one matrix by another of lower rank*, Psychometrika 1 (1936), eight
#   pages. For the proof of section 3: Trefethen & Bau, *Numerical Linear Algebra* (1997), lectures 4 and 5.
# - Baldi & Hornik, *Neural networks and principal component analysis: learning from examples without local minima*,
#   Neural Networks 2 (1989): why gradient descent on two factors finds the truncation.
# - Halko, Martinsson & Tropp, *Finding structure with randomness* (2011, arXiv 0909.4061), sections 1.3 to 1.6 for the
#   idea, 4.5 for the power iteration.
# - Gavish & Donoho, *The optimal hard threshold for singular values is 4/√3* (2014, arXiv 1305.5870), section I;
#   Benaych-Georges & Nadakuditi, *The singular values and vectors of low rank perturbations of large rectangular random
#   matrices* (2012, arXiv 1103.2221), section 3.
# - Roy & Vetterli, *The effective rank* (2007). Hu et al., *LoRA* (2021, arXiv 2106.09685), §7.2 for the similarity of
#   subspaces; its figure 4 sets two random matrices beside two runs, as a floor.
#
# Next: chapter 02, in how few dimensions a model can be tuned; chapter 03 looks at $\Delta W$ of models that were really
# tuned.
