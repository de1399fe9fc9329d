# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 01 · Low rank
#
# LoRA bets that what tuning adds to a weight matrix can be replaced by a matrix of low rank. Before taking a bet
# like that, one should know what rank is, what a lower one keeps, and how to tell a matrix that has something to
# keep from one that has not. This chapter settles that on a photograph and on a map, where losses can be seen.
# Chapter 03 then asks the same questions of real weights.
#
# **Afterwards you can** say what the rank of a matrix is and what it costs; read a spectrum of singular values; state
# the theorem of Eckart and Young, and check it by trying to beat it; tell structure from noise, and say how faint a
# structure may be before noise hides it; compare two subspaces without being fooled by chance; decide when a
# randomised SVD will do.
#
# **You should know** what a matrix product is, and enough PyTorch to read `A @ B`.
#
# **Time**: 40 minutes to read, less than one to run.

# %% tags=["setup"]
import torch
from matplotlib import cbook
from matplotlib.image import imread

from lora_edu import exercises, explore, lowrank, plots

photograph = torch.from_numpy(imread(cbook.get_sample_data("grace_hopper.jpg")).mean(axis=-1) / 255)
heights = torch.from_numpy(cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype("float64"))

# %% [markdown]
# Both come with matplotlib: Rear Admiral Grace Hopper in 600 × 512 grey values from 0 to 1, and the heights in metres
# of 344 × 403 points in the Appalachians, where Tennessee meets Kentucky. We take the mean off each, because the mean
# alone is a matrix of rank 1 that has most of the squares and shows nothing.

# %% tags=["setup"]
face = photograph - photograph.mean()
hills = heights - heights.mean()
assert face.shape == (600, 512) and hills.shape == (344, 403)
assert all(matrix.mean() ** 2 > 0.5 * matrix.square().mean() for matrix in (photograph, heights))

# %% [markdown]
# ## 1 · What does rank count?
#
# The multiplication table up to 12 × 12 has 144 numbers, and nobody stores 144: row *i* is *i* times the first row.
# A table in which every row is a multiple of one row has **rank 1**. In general
#
# > the rank of an *m* × *n* matrix *M* is the smallest *r* with *M* = *BA*, where *B* is *m* × *r* and *A* is *r* × *n*:
# > *r* rows (those of *A*) from which all *m* rows can be mixed.
#
# **Predict** the ranks of these five tables of 12 × 12 before you run the cell.

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
# The sum *i* + *j* is *i* · 1 + 1 · *j*: two products of something that knows only the row with something that knows
# only the column. Its square is *i*² · 1 + 2*i* · *j* + 1 · *j*²: three. The chessboard has only two different rows.
# But max(*i*, *j*), as orderly as any of them, has the full rank 12: rank is one kind of order among many.
#
# Here are *B* and *A* for the sum.

# %%
ones = torch.ones(12, 1)
B, A = torch.cat([i, ones], dim=1), torch.cat([ones.T, j])
assert torch.equal(B @ A, tables["i + j"])
assert [int(torch.linalg.matrix_rank(table)) for table in tables.values()] == [1, 2, 3, 12, 2]

# %% [markdown]
# **What does rank *r* cost?** *B* and *A* together hold *r*(*m* + *n*) numbers. Are all of them needed? For any
# invertible *r* × *r* matrix *G*, the factors *BG* and *G*⁻¹*A* have the same product *BA*. So some of the freedom is
# idle. To count what is left, ask in how many independent directions *BA* moves when the entries of *B* and *A* do:
# that is the rank of the matrix of all derivatives. **Predict**: how much is idle at *r* = 1, at *r* = 2?


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
# One, four, nine: *r*² are idle, the entries of *G*. A matrix of rank *r* has ***r*(*m* + *n* − *r*) degrees of
# freedom**, and at full rank (*r* = 6) that is all 48 of an 8 × 6 matrix, as it must be. For small *r* the idle part
# is negligible, and *r*(*m* + *n*) is what everybody counts, chapter 04 included.

# %%
assert free == [r * (8 + 6 - r) for r in range(1, 7)] and free[-1] == 8 * 6

# %% [markdown]
# ## 2 · What does rank *r* keep?
#
# Hardly any matrix of measurements has low rank exactly. So look for the rank-one matrix that is *closest* to the
# photograph. Start from any row *v*; but for its length, the best column to go with it is *Mv*; the best row for a
# column *u* is *Mᵀu*. Go back and forth until nothing changes. That is the **power iteration**. Take what it found
# off, and do the same to the rest.


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
# `torch.linalg.svd` finds all terms at once, strongest first: *M* = σ₁*u*₁*v*₁ᵀ + σ₂*u*₂*v*₂ᵀ + … The σ are the
# **singular values**; in a row they are the **spectrum** of *M*. Its first four are ours.

# %%
U, S, Vh = torch.linalg.svd(face, full_matrices=False)
assert torch.allclose(torch.stack(found), S[:4])
print(f"{len(S)} singular values, from {S[0]:.1f} to {S[-1]:.3f}")

# %% [markdown]
# All *u* are at right angles to each other, and so are all *v*. So squares add up, as in Pythagoras' theorem: the sum
# of all squared entries, ‖*M*‖² in the Frobenius norm (call it **energy**), is Σσ². Cutting after *r* terms keeps the
# share (σ₁² + … + σᵣ²) / Σσ², and what is missing has the norm √(σᵣ₊₁² + σᵣ₊₂² + …).

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

# %% [markdown]
# **Predict**: at which *r* will you recognise the face: about 2, 8, 16 or 100? Then move the slider (or use the arrow
# keys). In the middle is what is missing.

# %%
explore.photograph_rank(photograph)

# %% [markdown]
# At *r* = 2 half of the energy is kept, and the *missing* half is the better portrait. At 16 somebody is there, at 32
# it is Grace Hopper. Energy counts squared grey values; eyes count edges. Keep this in mind for chapter 03, where
# the judge is neither: what counts there is what the model does.
#
# The spectrum on the right has no step at which to cut. It falls steeply, then for ever. "The rank of a
# photograph" is not a number, it is a curve.
#
# ### A map, and why a ridge is expensive
#
# Heights come with a unit, which makes an error easier to feel. **Predict**: a typical point lies 162 m from the
# mean (root mean square). With 90 % of the energy kept, how many metres is a typical point off?

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
# With nine tenths of the energy kept, points are still 52 m off, because √0.1 is about a third: **10 % of the energy
# is 32 % of the distance**. And the long ridge in the upper right, which anyone would draw first, is not there. It
# comes out between rank 16 and rank 32, with the last few percent.
#
# Why so late? Because it runs *slantwise* to rows and columns. A ridge along a row is one column profile times one row
# and has rank 1. A ridge along the diagonal is a different row each time; infinitely thin, it is the identity matrix.

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
# Cutting the sum is one way to get a matrix of rank *r*. Eckart and Young proved in 1936, and Mirsky in 1960 for
# every norm that looks at singular values only, that
#
# > no matrix of rank *r* is closer to *M* than the first *r* terms of its SVD.
#
# Let us not believe it. We want a matrix of rank 8 that is closer to the hills than the truncated one, by hook or by
# crook. First try: mixing the map from 8 of its own columns, or from 8 random columns, with the best possible
# coefficients; 300 tries each.

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
assert 1.2 < own < 1.6 and random > 2.5

# %% [markdown]
# A third farther off at best, and three times as far. Second try: optimise. *Alternating least squares* starts from a
# random *A*, solves for the best *B*, then for the best *A*, and so on. *Gradient descent* starts as LoRA does, from a
# random *A* and *B* = 0, and lets Adam reduce ‖hills − *BA*‖². **Predict**: will they get stuck in a poor local minimum,
# stop at the truncation, or pass it?


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
# They neither pass it nor get stuck. Whoever dawdles does so at one height, 2.2 %: the price of holding the ninth
# direction in the place of the eighth. Every point where the gradient vanishes is such a choice of at most *r* singular
# directions, and every choice but the best is a saddle with a way down (Baldi & Hornik 1989). So if LoRA's two factors
# were trained to *copy a given* Δ*W*, they would end at its truncation. What they do when they are trained on text is
# another question, for chapter 07.
#
# **Why can nobody pass?** Because a rival has too little rank to be good everywhere. Take any *X* of rank *r*. Among
# the mixtures of the *r* + 1 strongest directions *v*₁, …, *v*ᵣ₊₁ there are more dimensions than *X* can see, so
# *X* sends one of them, call it *x*, to zero. But *M* makes every such mixture at least σᵣ₊₁ times as long. So on *x* the
# rival is off by at least σᵣ₊₁. Find that *x* for a rival of your choice:

# %%
U, S, Vh = torch.linalg.svd(hills, full_matrices=False)
columns = hills[:, torch.randperm(403, generator=generator)[:r]]
rival = columns @ torch.linalg.lstsq(columns, hills).solution

mixture = torch.linalg.svd(rival @ Vh[: r + 1].T).Vh[-1]  # the mixture of v_1 … v_9 that the rival cannot see
x = Vh[: r + 1].T @ mixture
print(f"|x| = {x.norm():.3f}, the rival makes of it {(rival @ x).norm() / S[0]:.3f} σ_1")
print(f"the hills make of it {(hills @ x).norm() / S[r]:.2f} σ_9, so there the rival is off by as much")
assert (rival @ x).norm() < 1e-8 * S[0] and (hills @ x).norm() >= S[r] * (1 - 1e-9)

# %% [markdown]
# This proves the theorem for the **spectral norm** ‖·‖₂, the worst direction's error: it is σᵣ₊₁ for the truncation
# and at least that for everyone. In the Frobenius norm the truncation is the only best one here; in the spectral norm
# it has company. Lower all eight kept σ by anything up to σ₉, and the worst direction is no worse.

# %%
lowered = (U[:, :r] * (S[:r] - 0.9 * S[r])) @ Vh[:r]
truncated = (U[:, :r] * S[:r]) @ Vh[:r]
for name, rival in (("truncated", truncated), ("lowered", lowered)):
    worst, whole = (torch.linalg.matrix_norm(hills - rival, norm) for norm in (2, "fro"))
    print(f"{name:9}: spectral {worst / S[r]:.3f} σ_9, Frobenius {whole / best:.3f} × the best")
assert torch.isclose(torch.linalg.matrix_norm(hills - lowered, 2), S[r])

# %% [markdown]
# ## 4 · Isn't *r* = rank(Δ*W*) the value that keeps the most information?
#
# The study note that this course grew out of asks so, about the update Δ*W* of a fine-tuned weight. The photograph
# can answer the first half. **Predict** the rank of the photograph, and of a rank-8 map that has been stored in half
# precision.

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
# Measured or rounded, a matrix has full rank: the slightest noise makes every row independent of the others. Rounding
# to half precision moved no height by more than 25 cm, and took the rank from 8 to 344. The spectrum shows what
# happened, and that nothing happened.

# %%
rounded = torch.linalg.svdvals(halved)
floor = float(lowrank.rounding_floor(truncated, torch.float16, roundings=1)[0])
figure, axes = plots.subplots()
title = "A rank-8 map in half precision: 8 singular values, a cliff, 336 of rounding"
plots.spectrum(axes, rounded, kept=8, edge=floor, edge_name="edge of rounding, predicted", title=title)
assert rounded[7] > 5000 * rounded[8] and (truncated - halved).abs().max() <= 0.25
assert abs(rounded[8] / floor - 1) < 0.1
plots.show(figure, "Eight singular values above 8 000, then a cliff to 1.4 and below, where rounding is.")

# %% [markdown]
# The dashed line is no fit. Half precision has 11 significant bits; from that alone `lowrank.rounding_floor` works
# out how large an error rounding makes in each entry, and how large a singular value such errors make together. What
# lies above the line is not rounding. Chapter 03 needs this: two checkpoints in half precision differ by rounding too.
#
# > **Is *r* = rank(Δ*W*) the value that keeps the most information?** It keeps everything and is useless: the rank of
# > any measured matrix is full, so it costs more than the matrix itself. The question that helps is how much each
# > *smaller* r keeps, and Eckart–Young answers it: the share (σ₁² + … + σᵣ²) / Σσ² of the energy,
# > and no other matrix of rank *r* keeps more.
#
# How much of the *behaviour* that is, chapter 03 measures; whether a *trained* rank *r* does better, chapter 07.
#
# Where one number must do, there are softer ones than the rank. None is the truth; say which you use.
#
# - **rank for 90 % energy**: the smallest *r* that keeps 90 % of Σσ²;
# - **stable rank** Σσ² / σ₁²: how many terms as strong as the first would have this energy;
# - **effective rank** exp(−Σ *p* ln *p*) with *p* = σ / Σσ (Roy & Vetterli 2007): the spectrum's entropy as a count,
#   so a long tail counts.

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

# %% [markdown]
# The rounded map's 344 says nothing about the map. Its soft ranks are deaf to rounding: 5 of its 8 terms have 90 %
# of the energy, and they count as 7 in effect. For the photograph the three disagree, 17, 3.0 and 124, since they ask
# about its bulk, its first term and its tail.

# %% [markdown]
# ## 5 · Structure, or chance?
#
# *Shuffled* is the photograph with its 307 200 pixels in random order. Same grey values, same energy. **Predict**: how
# much of the energy do 16 terms keep now, if in the right order it was 90 %?

# %%
S_face, S_shuffled = torch.linalg.svdvals(face), torch.linalg.svdvals(shuffled)
kept = [float(lowrank.energy(S)[15]) for S in (S_face, S_shuffled)]
print(f"rank 16 keeps {kept[0]:.0%} of the photograph and {kept[1]:.0%} of the same pixels shuffled")
assert kept[0] > 0.85 and kept[1] < 0.12
assert torch.isclose(S_face.square().sum(), S_shuffled.square().sum())

# %% [markdown]
# Low rank is a property of the *order*, not of the numbers. What is left without order can be predicted from one
# number, the standard deviation of an entry. Call it σ: from here on a σ without an index is this one. The singular
# values of a large *m* × *n* matrix of independent entries
# with mean 0 end at
#
# > σ(√*m* + √*n*),
#
# and below this **edge** they are spread by the law of Marchenko and Pastur (1967), whatever the distribution of the
# entries (as long as it has no wild outliers). Test it on the shuffled pixels, which are far from Gaussian.


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
assert abs(S_shuffled[0] / edge - 1) < 0.02

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
# A flat spectrum that stops at the edge is what *nothing* looks like. And yet its first 16 terms, 3 % of 512, have 10 %
# of the energy, because they were picked for being large. A share of energy means little without the share that noise
# of the same shape would have. For tall, thin matrices that is near the share of the terms: 8 of 100 terms of
# 10 000 × 100 noise keep 9 %.

# %%
tall = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(0))
share = float(lowrank.energy(torch.linalg.svdvals(tall))[7])
print(f"noise of 10 000 × 100: 8 of 100 terms keep {share:.0%}")
assert 0.09 < share < 0.10

# %% [markdown]
# ## 6 · How faint a structure can be found?
#
# Hide one term *s* · *uv*ᵀ in 400 × 400 noise of deviation 1. Noise reaches up to 2√400 = 40. **Predict**: from which
# strength *s* on is the strongest direction of the sum any guide to *u*: 20, 40 or 80?

# %%
n = 400
generator = torch.Generator().manual_seed(1)
noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
u, v = torch.nn.functional.normalize(torch.randn(2, n, generator=generator, dtype=torch.float64), dim=1)
strengths = [0, 10, 20, 24, 30, 40, 60, 80]
largest, overlaps = [], []
for s in strengths:
    left, S, _ = torch.linalg.svd(noise + s * torch.outer(u, v))
    largest.append(float(S[0]))
    overlaps.append(float((left[:, 0] @ u) ** 2))
    print(f"strength {s:2}: largest singular value {largest[-1]:5.1f}, overlap with u {overlaps[-1]:.2f}")

# %% [markdown]
# Below *s* = √*n* = 20 there is no trace. Above, the largest singular value leaves the noise, although the hidden term
# alone is still only half as strong as the noise: signal and noise add up. And the direction turns gradually. With
# θ = *s*/√*n* theory says (Benaych-Georges & Nadakuditi 2012): nothing up to θ = 1; then a singular value at
# (θ + 1/θ)√*n*, with the overlap (the squared cosine) 1 − 1/θ². For *m* × *n* the threshold is ∜(*mn*).

# %%
for s, top, overlap in zip(strengths, largest, overlaps, strict=True):
    theta = max(s / n**0.5, 1)  # below 1 the noise answers as if nothing were there
    assert abs(top / ((theta + 1 / theta) * n**0.5) - 1) < 0.03
    assert abs(overlap - (1 - 1 / theta**2)) < 0.15

# %% [markdown]
# Turn both: the strength, and the size of the matrix. In larger matrices the edge is sharper.

# %%
explore.hidden_direction()

# %% [markdown]
# So a singular value above the edge says that *something* is there. How true its direction is depends on how far it
# stands out: hidden at 1.5√*n*, the overlap is a little over a half.
#
# ### Which rank is best, if there is noise?
#
# Add noise to the photograph and cut. Every term kept brings back some photograph and some noise. **Predict**: should
# one keep every term above the edge, fewer, or more?

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
# Fewer. A term barely above the edge points so far off that it brings more noise than photograph. From which size on
# a term is worth keeping was worked out by Gavish and Donoho (2014): 4/√3 ≈ 2.31 σ√*n* for a square matrix, whose edge
# is at 2 σ√*n*. Their threshold needs no clean photograph to compare with, only σ.

# %%
explore.noisy_photograph(photograph)

# %% [markdown]
# The threshold finds the best rank or comes near it. But mind what you see at σ = 0.8: the cut picture is closer to the
# truth, pixel for pixel, and *your eye still does better on the noisy one*. You know that neighbouring pixels belong
# together; the SVD would give the same answer with all rows and columns rearranged. Low rank is a weak assumption: it
# finds what it can, not all there is.

# %% [markdown]
# ## 7 · Are two subspaces alike?
#
# Do two matrices have their strongest directions in common? Chapter 03 asks it of two tuning runs, and the LoRA paper
# of two ranks (§7.2, equation 4). The measure is
#
# > φ(*A*, *B*, *i*, *j*) = ‖*U*ᵀ*V*‖² / min(*i*, *j*),
#
# where the columns of *U* are the *i* strongest right singular vectors of *A*, directions in the space that its rows
# live in, and those of *V* the *j* strongest of *B*. It is 1 where the smaller subspace lies in the
# larger one. **Predict**: what is it for random subspaces of 8 and 64 dimensions in a space of 512: near 0, or not?


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
# A unit vector has 64/512 of its square in a random subspace of 64 of 512 dimensions, so **chance gives
# max(*i*, *j*) / *d***, not 0. In a space of 100 dimensions, TinyLM's width, that is 0.64: a high similarity that
# says nothing.
#
# There is a subtler trap. Compare the directions of the photograph's rows with those of the map's rows, which have
# nothing to do with one another.

# %%
rows_about_mean = lambda matrix: matrix - matrix.mean(dim=1, keepdim=True)
portrait, relief = rows_about_mean(face[:, :403]), rows_about_mean(hills)  # equally wide
rearranged = relief[:, torch.randperm(403, generator=generator)]
found, destroyed = similarity(portrait, relief, 8, 8), similarity(portrait, rearranged, 8, 8)
print(f"photograph and map: φ(8, 8) = {found:.2f}; chance gives {8 / 403:.2f}")
print(f"photograph and map with its columns rearranged: φ(8, 8) = {destroyed:.2f}")
assert found > 0.4 and destroyed < 0.04

# %% [markdown]
# More than twenty times chance, for a portrait and a mountain range! Both are smooth: their strongest directions are
# slow waves from left to right, and there are few of those. Rearranging the map's columns leaves its spectrum as it was,
# and the similarity falls to chance. So *a similarity above chance shows that two matrices share something; it need
# not be what you were looking for*. The honest floor is a comparison that shares everything except the thing in
# question.

# %% [markdown]
# ## 8 · Must everything be computed?
#
# The full SVD of an *n* × *n* matrix takes time in proportion to *n*³, and gives *n* terms when you want 16. Here is the
# trick of Halko, Martinsson and Tropp (2011). Multiply *M* by a few random columns: each product is a mixture of
# *M*'s columns in which the strong directions are strong. Make the products orthonormal (*Q*), and do the SVD of the
# small matrix *Q*ᵀ*M*. **Predict**: how far above the optimum will the error be: 0.1 %, 1 %, 30 %?


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

# %% [markdown]
# A plain sketch of the photograph is more than a quarter off: the 496 weak terms leak into the products. One **power
# iteration** multiplies by *MM*ᵀ once more, so that a direction with a tenth of the strength counts for a thousandth,
# and the error is within 2 % of the best. On the shuffled pixels even the plain sketch is hardly behind, but only
# because there the best 16 terms hold no more than a tenth of the energy.
#
# `lowrank.randomized_svd` does as many power iterations as the spectrum asks for, and returns the error that it
# measured; asked for a share of the energy, it finds the rank.

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
import time

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
# **Use the randomised SVD** when the matrix is large, the rank wanted is small beside it (*r* + 10 below about half of
# the smaller side), and only the leading terms matter. **Use the full one** for anything that asks about the tail: the
# effective rank, the numerical rank, the shape of the noise. For TinyLM's matrices, 100 wide, the full one is a
# matter of milliseconds; for a model of billions it is not.
#
# ## The same from the package
#
# What you have written above is in `lora_edu.lowrank`, with the checks and corner cases that a chapter has no room
# for. Later chapters use it without a word.

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
# - Rank *r* means *M* = *BA* with *r*(*m* + *n*) numbers, *r*² of them idle.
# - The SVD sorts a matrix into terms by strength. Cut after *r* of them: no matrix of rank *r* is closer, and the error is
#   √(σᵣ₊₁² + σᵣ₊₂² + …). Gradient descent on two factors finds the same.
# - Every measured or rounded matrix has full rank. Ask how the spectrum falls, and give the measure with the number.
# - 90 % of the energy is a third of the distance away, and what was cut may be what you came for.
# - Noise fills the spectrum up to σ(√*m* + √*n*). A structure weaker than σ∜(*mn*) leaves no trace in it.
# - Similarity of subspaces begins at max(*i*, *j*) / *d*, and shared habits lift it further.
# - For the leading terms of a large matrix a sketch with a power iteration or two is as good as the SVD.

# %% [markdown]
# ## Exercises
#
# Fill in the open cell and run it. The check says what is wrong with a wrong answer.

# %% [markdown] tags=["exercise"]
# **1.** TinyLM's embedding is 10 000 × 100. How many degrees of freedom has an update of it of rank 8?

# %% tags=["exercise"]
answer = None  # a whole number
print(exercises.check_01_1(answer))

# %% tags=["solution"]
m, n, r = 10_000, 100, 8
answer = r * (m + n) - r**2
print(exercises.check_01_1(answer))

# %% [markdown] tags=["solution"]
# *B* and *A* store *r*(*m* + *n*) = 80 800 numbers. Replacing *B* by *BG* and *A* by *G*⁻¹*A* changes all of them and
# not the product; *G* has *r*² = 64 entries.

# %% [markdown] tags=["exercise"]
# **2.** What is the smallest rank that keeps 90 % of the energy of `hills`? Use nothing but `torch.linalg.svdvals`.

# %% tags=["exercise"]
answer = None  # a whole number
print(exercises.check_01_2(answer))

# %% tags=["solution"]
squares = torch.linalg.svdvals(hills).square()
enough = squares.cumsum(0) >= 0.9 * squares.sum()
answer = int(enough.nonzero()[0]) + 1
print(exercises.check_01_2(answer))

# %% [markdown] tags=["solution"]
# Energy is Σσ², not Σσ (which would ask for 64 terms); and the first index that is enough is one less than the rank,
# because Python counts from 0.

# %% [markdown] tags=["exercise"]
# **3.** How far is `hills` from its best approximation of rank 8, in the Frobenius norm? Use its singular values
# only; do not build the approximation.

# %% tags=["exercise"]
answer = None  # in metres
print(exercises.check_01_3(answer))

# %% tags=["solution"]
answer = torch.linalg.svdvals(hills)[8:].square().sum().sqrt()
print(exercises.check_01_3(answer))

# %% [markdown] tags=["solution"]
# What was cut off is σ₉*u*₉*v*₉ᵀ + σ₁₀*u*₁₀*v*₁₀ᵀ + … Its terms are at right angles, so their squares add up.

# %% [markdown] tags=["exercise"]
# **4.** Two tuning runs of a matrix whose rows have 100 entries share nothing at all. How large is φ(*A*, *B*, 8, 64) on
# average? Work it out, then check it with random matrices.

# %% tags=["exercise"]
answer = None  # between 0 and 1
print(exercises.check_01_4(answer))

# %% tags=["solution"]
generator = torch.Generator().manual_seed(0)
pairs = [torch.randn(2, 64, 100, generator=generator) for _ in range(50)]
answer = sum(lowrank.subspace_similarity(A, B, 8, 64) for A, B in pairs) / len(pairs)
print(exercises.check_01_4(answer))

# %% [markdown] tags=["solution"]
# Each of the 8 unit vectors has on average 64/100 of its square in the other subspace. That makes ‖UᵀV‖² = 8 · 64/100,
# and φ divides it by min(8, 64) = 8.

# %% [markdown] tags=["exercise"]
# **5.** Write `near_best(matrix, rank)`: a matrix of exactly that rank, at most 2 % farther off than the best one, on a
# spectrum that you don't know in advance. No decomposition of the large matrix is allowed. (Section 8 has all the
# pieces. Can you do it without looking?)

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
# **6.** `exercises.hidden_matrix()` is 300 × 200: noise of standard deviation 1 with some rank-one terms hidden in it.
# How many of them can you be sure of?

# %% tags=["exercise"]
answer = None  # a whole number
print(exercises.check_01_6(answer))

# %% tags=["solution"]
S = torch.linalg.svdvals(exercises.hidden_matrix())
answer = int((S > 300**0.5 + 200**0.5).sum())
assert 31 < S[5] < 31.4
print(exercises.check_01_6(answer))

# %% [markdown] tags=["solution"]
# The noise alone reaches up to √300 + √200 = 31.5. The sixth singular value, 31.2, may be noise, and is.

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
# Next: chapter 02, in how few dimensions a model can be tuned; chapter 03 looks at ΔW of a model that was really tuned.
