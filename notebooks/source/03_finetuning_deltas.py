# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 03 · What fine-tuning changes
#
# LoRA replaces the update of a weight matrix by a matrix of low rank. The usual reason given is that the update *is* of
# low rank. Is it? Few tutorials look: some build an update of rank 8 and then find rank 8. Here is a small language
# model that was really trained on code (half an hour on a laptop) and then really tuned, every weight of it, on the
# documentation of numpy and matplotlib. We subtract one from the other and look. Then we look at gentler tunings of the
# same model, and at a fine-tune that others made and published: the answer to 'is it of low rank?' has a *when* in it.
#
# **Afterwards you can** compute $\Delta W$ between two checkpoints and compare kinds of layers; say how much of the
# *weights* and how much of the *behaviour* each rank keeps; compare two runs by subspace without taking chance for a
# finding; tell rounding, and rows that nobody reads, from signal; plant a rank and look for it; do all of it on two
# checkpoints of your own.
#
# **You should know** chapter 01: singular values, energy, truncation.
#
# **Time**: 75 minutes to read, one to two to run.

# %% tags=["setup"]
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from lora_edu import explore, lowrank, plots
from lora_edu.data import load_checkpoint, load_corpus, load_deltas, load_regimes, published
from lora_edu.data.shipped import manifest
from lora_edu.exercises import chapter_03 as exercises
from lora_edu.five_cases import at_rank, cases
from lora_edu.paths import user_folder, write_atomically
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

# %% [markdown]
# ## 1 · Two checkpoints, one subtraction
#
# The base is a transformer with 6 layers, a vocabulary of 10 000 and a width of 100. `reference_seed_0` holds
# $\Delta W$, the weights after tuning minus the weights before, for every tensor. (Why ship $\Delta W$ and not the tuned
# model? Section 8.) With $W_o$ the weights before tuning and $W_f$ the weights after tuning all of them,
#
# $$\Delta W = W_f - W_o .$$
#
# **How it was tuned.** 260 steps on 16 windows of 256 tokens, with AdamW (section 6 says what that is) at a learning rate
# of $6 \cdot 10^{-3}$: of five rates, the one with the lowest loss on text that was held apart. That is *steep*. It is
# more than the rate of pre-training ($4 \cdot 10^{-3}$), and the text is far from the one before. Keep this in mind: what
# sections 2 to 6 find, they find for this tuning. Section 3 shows its gentler neighbours.

# %% tags=["setup"]
base = load_checkpoint("base")
delta = load_checkpoint("reference_seed_0")
tuned = {name: base[name] + delta[name] for name in base}
print(f"{len(base)} tensors, {sum(W.numel() for W in base.values()):,} numbers, for instance")
for name in ("embedding.weight", "blocks.3.attention.query.weight", "blocks.3.mlp.up.weight", "head.weight"):
    print(f"{name:32} {tuple(base[name].shape)}")

# %% [markdown]
# First, did tuning do anything? The measure is the loss on docstrings that neither model has seen: the mean of $-\ln p$
# of the right next token, in nats. No run of 13 words of them stands in any training text. To save time this chapter
# reads an eighth of them, spread over all documents.

# %% tags=["setup", "nbval-ignore-output"]
code, reference = load_corpus("code"), load_corpus("reference")
held_out = reference.test.unfold(0, 256, 2048).flatten()


def loss(state):
    return evaluate(TinyLM.from_state_dict(state), held_out)


before, after = loss(base), loss(tuned)
print(f"held-out docstrings, nats a token: {before:.2f} before tuning, {after:.2f} after")
assert before - after > 1.5

# %% [markdown]
# The **gain** of this tuning is more than two nats: where the base gave the right token a probability $p$, the tuned model
# gives it $e^2 p \approx 7 p$ and more, in the geometric mean. And you can read it. Both models continue the same three
# words, drawing from their own predictions. One writes what stands in source files, the other an entry of a reference
# manual. Neither means anything by it: 2.7 million weights are too few for meaning.

# %% tags=["nbval-ignore-output"]
prompt = torch.tensor(reference.tokenizer.encode("Return the array").ids)
for name, state in {"base": base, "tuned": tuned}.items():
    model = TinyLM.from_state_dict(state)
    written = model.generate(prompt, 60, temperature=0.7, seed=2)
    print(f"--- {name}:\n{reference.tokenizer.decode(written.tolist())}\n")
assert before > after + 1.5

# %% [markdown]
# ## 2 · Of what rank is ΔW?

# %%
explore.predict(
    "No matrix of this model can have a rank above 100, its width. Of what rank are the updates?",
    {
        "about 8": "That is what 'the update is of low rank' seems to say, and it is why people choose r = 8. "
        "The next cell counts the singular values that are not zero.",
        "about 50": "A fair guess between a low rank and none. Read the column 'rank of ΔW' in the next cell, "
        "then ask how fast the singular values fall.",
        "100": "Yes. A sum of steps on random batches leaves no direction untouched, so no singular value is "
        "exactly zero. The better question is how fast they fall.",
    },
)

# %% tags=["setup"]
kinds = ["embedding", "query", "key", "value", "output", "up", "down", "head"]
blocks = kinds[1:7]


def kind_of(name):
    return name.split(".")[-2]


def by_kind(state):
    return {k: [W for name, W in state.items() if W.dim() == 2 and kind_of(name) == k] for k in kinds}


weights, updates = by_kind(base), by_kind(delta)
mean = lambda values: sum(values) / len(values)

# %%
print(f"{'':10}{'shape':>12}{'‖ΔW‖/‖W_o‖':>13}{'rank of ΔW':>12}")
for kind in kinds:
    rows, columns = updates[kind][0].shape
    sizes = [float(dW.norm() / W.norm()) for W, dW in zip(weights[kind], updates[kind])]
    ranks = [lowrank.numerical_rank(dW) for dW in updates[kind]]
    print(f"{kind:10}{rows:>6} × {columns:<3}{mean(sizes):13.2f}{min(ranks):12}")
    assert min(ranks) == 100

# %% [markdown]
# **Full**, every one of them. So 'choose $r = \operatorname{rank}(\Delta W)$, it keeps everything' is true and useless:
# it says $r = 100$, which saves nothing. Rank counts the singular values that are not zero, and after 260 steps on random
# batches none is.
#
# The useful question is how fast they fall. Chapter 01 has three ways to put a number on that: the stable rank
# $\lVert \Delta W \rVert_F^2 / \sigma_1^2$, the effective rank, and the rank that holds 90 % of the energy. Beside
# $\Delta W$ stands $W_o$, since 'large models are of low rank' is sometimes said of the weights and sometimes of the
# update, and these are two statements. Noise of the same shape stands there, too. Each dot is a layer.

# %%
generator = torch.Generator().manual_seed(0)
noise = {kind: [torch.randn(updates[kind][0].shape, generator=generator)] for kind in kinds}
spectra = {
    what: {kind: [torch.linalg.svdvals(W) for W in group[kind]] for kind in kinds}
    for what, group in {"ΔW": updates, "W_o": weights, "noise": noise}.items()
}
measures = {
    "stable rank": lowrank.stable_rank,
    "effective rank": lowrank.effective_rank,
    "rank for 90 % of the energy": lambda S: lowrank.rank_for_energy(S, 0.9),
}
figure, all_three = plots.subplots(1, 3, size=(7.2, 3.4), sharey=True)
for axes, (title, measure) in zip(all_three, measures.items()):
    dots = {
        what.replace("_o", "$_o$"): {k: list(map(measure, spectra[what][k])) for k in kinds}
        for what in spectra
    }
    plots.dots_by_kind(axes, dots, legend=title.startswith("effective"), title=title, xlim=(0, 100))
plots.show(
    figure, "Three ranks of ΔW, of W_o and of noise of the same shape, by kind of matrix, a dot a layer."
)

# %% [markdown]
# On all three measures noise is the flattest: $\Delta W$ has structure. But it is no low rank. In the attention matrices
# 90 % of its energy takes a rank of 33 to 40 of 100, in the MLP and the embedding 60 to 68.
#
# Is $\Delta W$ of lower rank than the weights it changes? **The three measures do not agree.** By 90 % of the energy and
# by effective rank, yes, by a little, everywhere but in the head. By the stable rank $\Delta W$ is the *flatter* of the
# two in five of eight kinds: its largest singular value stands out less than that of $W_o$. So say which number you mean.
#
# One row does not fit. The head's $\Delta W$ has a stable rank of 1.4, so a single direction holds 70 % of its energy.
# Section 6 asks what that direction is. (The head of the *base* is odder still: rank 2 holds 90 %.)

# %%
average = {
    m: {w: {k: mean(list(map(measures[m], spectra[w][k]))) for k in kinds} for w in spectra} for m in measures
}
stable, effective, ninety = average.values()
for values in (effective, ninety):
    assert all(values["ΔW"][kind] < values["W_o"][kind] for kind in kinds[:7])
    assert all(values["ΔW"][kind] < values["noise"][kind] for kind in kinds)
flatter = [kind for kind in kinds if stable["ΔW"][kind] > stable["W_o"][kind]]
print("by stable rank ΔW is flatter than W_o in:", ", ".join(flatter))
assert flatter == ["embedding", "query", "key", "up", "head"]
assert all(30 < ninety["ΔW"][kind] < 72 for kind in kinds) and ninety["W_o"]["head"] == 2
assert 0.65 < lowrank.energy(spectra["ΔW"]["head"][0])[0] < 0.75

# %% [markdown]
# Look at the spectra themselves. Each line is a layer. Use the slider (or the arrow keys) to go through the kinds.

# %%
explore.spectra_by_kind(weights, updates)

# %% [markdown]
# ## 3 · What does each rank keep of the behaviour?
#
# Energy is about weights. Nobody uses weights; what counts is what the model does. So cut *every* $\Delta W$ to rank $r$
# (biases and norms, which are no matrices, keep all of theirs), put it back on $W_o$, and measure the held-out loss $L$:
#
# $$\text{share of the gain kept} = \frac{L(W_o) - L(W_o + \Delta W_r)}{L(W_o) - L(W_o + \Delta W)} .$$

# %%
explore.predict(
    "Cut every ΔW of this tuning to rank 8. All the matrices together keep 65 % of their energy. Which share of the "
    "gain stays?",
    {
        "about 45 %": "Yes, and that is less than the energy. Most of the energy sits in the head, in a direction that "
        "does little; look at r = 1 in the coming cells.",
        "about 65 %": "Then a share of the energy would buy the same share of the gain. Look at r = 1: it holds more than "
        "half of the energy. How much of the gain does it hold?",
        "about 90 %": "That is what one hopes for when one chooses r = 8, and for gentler tunings of the same model it is "
        "nearly true (the map below). For this one the next cell says otherwise.",
    },
)

# %% tags=["nbval-ignore-output"]
ranks = [1, 2, 4, 8, 16, 32, 64]
factors = {name: lowrank.svd(dW) for name, dW in delta.items() if dW.dim() == 2}


def cut(factors, r, only=kinds):
    """name → ΔW cut to rank r, for the matrices of the kinds named."""
    return {n: (U[:, :r] * S[:r]) @ Vh[:r] for n, (U, S, Vh) in factors.items() if kind_of(n) in only}


def add(update):
    return {name: W + update.get(name, 0) for name, W in base.items()}


def gain_of(update):
    return (before - loss(add(update))) / (before - after)


gain = {r: gain_of(delta | cut(factors, r)) for r in ranks}
for r in ranks:
    print(f"r = {r:3}: {gain[r]:4.0%} of the gain")
assert 0.25 < gain[8] < 0.6 and gain[32] < 0.9 < gain[64]

# %% tags=["nbval-ignore-output"]
squares = {name: S.double().square() for name, (U, S, Vh) in factors.items()}
total = sum(S.sum() for S in squares.values())
energy = {r: float(sum(S[:r].sum() for S in squares.values()) / total) for r in ranks}
assert energy[1] > 0.5 and gain[1] < 0.3 and energy[8] > gain[8] + 0.1
explore.truncation(
    updates, {r: before - share * (before - after) for r, share in gain.items()}, before, after
)

# %% [markdown]
# **In this tuning** (TinyLM, from code to documentation, AdamW at $6 \cdot 10^{-3}$, 260 steps; two seeds, section 4)
# **rank 8 keeps less than half of the gain**, and 90 % of it takes more than rank 32. Here 'a rank-8 matrix can hold the
# update' is wrong. Its gentler neighbours on the map below keep more than four fifths.
#
# And **energy is not behaviour**. Rank 1 holds more than half of all the energy and a fifth of the gain. The energy of
# all matrices together is mostly that of the head, which is large; what a direction of it is worth is another matter.
# (Biases and norms, which were not cut, bring little of the gain.)

# %% tags=["nbval-ignore-output"]
vectors = gain_of({name: dW for name, dW in delta.items() if dW.dim() == 1})
print(f"biases and norms alone: {vectors:.0%} of the gain")
assert 0 < vectors < 0.12

# %% [markdown]
# ### One kind of matrix at a time

# %%
explore.predict(
    "At rank 8 the head's ΔW keeps 77 % of its energy and a query's ΔW 48 %. Cut only one of the two kinds to rank 8 and "
    "leave all else whole. Which cut costs more of the gain?",
    {
        "the head": "Yes, by far, although it keeps more of its energy. What it loses are small directions that tell "
        "tokens apart; what it keeps is mostly one large direction (section 6).",
        "query": "It loses more of its energy, so one would think so. The coming picture has lost energy beside lost gain "
        "for each kind: look at how little a query's cut costs.",
        "both alike": "Then what is cut off would be worth the same everywhere. Compare the two bars of each kind in the "
        "coming picture.",
    },
)

# %% tags=["nbval-ignore-output"]
lost_energy, lost_gain = {}, {}
for kind in kinds:
    mine = [S for name, S in squares.items() if kind_of(name) == kind]
    lost_energy[kind] = 1 - float(sum(S[:8].sum() for S in mine) / sum(S.sum() for S in mine))
    lost_gain[kind] = 1 - gain_of(delta | cut(factors, 8, only=[kind]))
assert lost_gain["head"] > 0.2 > lost_energy["query"] / 5 and lost_energy["head"] < 0.3
assert lost_gain["query"] < 0.03 and lost_energy["query"] > 0.45
figure, axes = plots.subplots(size=(7.2, 3.8))
lost = {"energy lost": lost_energy, "gain lost": lost_gain}
plots.paired_bars(axes, lost, xlabel="share", title="one kind of matrix cut to rank 8, everything else whole")
plots.show(figure, "Energy and gain that are lost when one kind of matrix alone is cut to rank 8.")

# %% [markdown]
# The head loses a quarter of its energy and a third of the gain. The query matrices lose half of their energy and next to
# nothing of the gain. **A share of energy does not say what a cut costs; the kind of matrix does.** So one rank for all
# kinds is not the best way to spend numbers (chapter 07 spends them otherwise).
#
# Which matrices carry the gain? Put back the full $\Delta W$ of one group and leave the rest of the base alone.

# %% tags=["nbval-ignore-output"]
groups = {"embedding": ["embedding"], "head": ["head"], "attention": kinds[1:5], "MLP": ["up", "down"]}
share = {}
for title, members in groups.items():
    part = {name: dW for name, dW in delta.items() if dW.dim() == 2 and kind_of(name) in members}
    share[title] = gain_of(part)
assert share["attention"] < 0.15 and sum(share.values()) < 0.9 and max(share.values()) < 0.45
figure, axes = plots.subplots(size=(7.2, 1.9))
labels = {"title": "ΔW of one group alone, the rest of the base untouched", "xlabel": "share of the gain"}
texts = [f"{value:.0%}" for value in share.values()]
plots.bars(axes, list(share), list(share.values()), [plots.BLUE] * 4, texts, **labels)
plots.show(figure, f"Of the gain, each alone: {', '.join(f'{t} {v:.0%}' for t, v in share.items())}.")

# %% [markdown]
# No group does it alone, and together the four parts bring much less than the whole: an update of one layer fits the
# updates of the others. The attention's share alone is next to nothing, though its matrices changed as much as the rest
# (0.4 to 0.5 of their norm). Do not conclude that attention need not be tuned: tuned *alone*, it would have moved
# elsewhere.

# %% [markdown]
# ### Other rates, other lengths, a nearer text
#
# All this was *one* tuning. So the same base was tuned again, every weight of it, at other learning rates and for other
# numbers of steps (4 × 256 tokens each). Every run has a schedule of its own: up during the first twentieth, then straight
# down to zero. Two tasks: the **far** one is ours, from code to documentation; for the **near** one the tuned model of
# section 1 was tuned once more, to documentation of files that it had not seen. The runs are recorded; this section shows
# one seed.

# %%
explore.predict(
    "The same model, the same far text, 100 steps, but the rate is 0.0003 in place of 0.006. Cut to rank 8, does the "
    "gentle update keep a smaller, an equal or a larger share of its own gain?",
    {
        "smaller": "A gentle update is small, so one might think that little can be cut from it. But what is small is its "
        "norm. Look at the share of the gain in the map.",
        "equal": "If the rank were a property of the two texts alone, it would be equal. The map says how much the rate and "
        "the number of steps decide.",
        "larger": "Yes, by far. Large steps fill weak directions that the result then depends on. Look also at what the "
        "gentle tuning gives up: its gain is smaller.",
    },
)

# %%
rows = [row for row in load_regimes(seed=0) if "cut" in row and row["before"] - row["after"] > 0.1]
far = {(row["rate"], row["steps"]): row for row in rows if row["task"] == "far"}
rates = sorted({rate for rate, _ in far})
steps = [n for n in sorted({n for _, n in far}) if all((rate, n) in far for rate in rates)]
tables = {
    "gain in nats": lambda row: row["before"] - row["after"],
    "‖ΔW‖ / ‖W$_o$‖": lambda row: row["spectra"]["all"]["size"],
    "of the gain kept at r = 8": lambda row: explore.share_kept(row)[8],
}
figure, three = plots.subplots(1, 3, size=(7.2, 2.5), sharey=True)
for axes, (title, value), high in zip(three, tables.items(), (2, 0.6, 1)):
    grid = [[value(far[rate, n]) for n in steps] for rate in rates]
    plots.level_grid(axes, grid, [f"{rate:g}" for rate in rates], steps, high, title=title, xlabel="steps")
plots.show(
    figure,
    "Far text: gain, size of ΔW and share of the gain kept at rank 8, by learning rate (down) and steps.",
)

# %% [markdown]
# The sliders go through the map. On the left the energy that each rank of $\Delta W$ keeps, in four kinds of matrix of the
# middle layer; on the right the gain, with all other places of the map in grey, and the near text where it was recorded
# and its gain is over 0.1 nats (a share of less would say little).

# %%
explore.regimes(rows)

# %% [markdown]
# What would you cut? Not the share counts in the end, but the loss: here is the loss after the cut, for the four rates at
# 100 steps.

# %%
at_100 = {
    rate: {int(r): loss for r, loss in far[rate, 100]["cut"].items()} | {100: far[rate, 100]["after"]}
    for rate in rates
}
best = {r: min(rates, key=lambda rate: at_100[rate][r]) for r in (1, 8, 32, 100)}
figure, axes = plots.subplots(size=(7.2, 2.8))
lines = {f"rate {rate:g}": (list(values), list(values.values())) for rate, values in at_100.items()}
plots.curves(
    axes,
    lines,
    xscale="log",
    xlabel="rank r of the cut (100: all of ΔW)",
    ylabel="held-out loss, nats a token",
)
plots.plain_ticks(axes.xaxis, [*at_100[rates[0]]])
plots.show(
    figure,
    f"Loss after the cut by rank. The best rate: {', '.join(f'{b:g} at r = {r}' for r, b in best.items())}.",
)

# %%
eight = {key: explore.share_kept(row)[8] for key, row in far.items()}
print("cut to rank 8, 100 steps:", ", ".join(f"rate {rate:g} keeps {eight[rate, 100]:.0%}" for rate in rates))
assert min(eight, key=eight.get) == (0.006, 200) and eight[0.006, 200] < 0.6 and max(eight.values()) > 0.8
assert all(eight[rate, steps[0]] > eight[rate, steps[-1]] for rate in rates)
assert all(eight[rate, 100] > 0.75 for rate in (0.0003, 0.001)) and eight[0.006, 100] < 0.65
assert best[8] == 0.001 and best[100] == 0.003
cuts_to_8 = [{kind: losses["8"] for kind, losses in row["one_kind_cut"].items()} for row in far.values()]
assert all(max(losses, key=losses.get) == "head" for losses in cuts_to_8)
near = {(row["rate"], row["steps"]): explore.share_kept(row)[8] for row in rows if row["task"] == "near"}
for (rate, n), kept in near.items():
    print(
        f"rate {rate:g}, {n} steps, cut to rank 8: far text {eight[rate, n]:.0%} of the gain, near text {kept:.0%}"
    )
    assert kept < eight[rate, n] - 0.1

# %% [markdown]
# So **how much a cut keeps is a property of the tuning**, as much as of the model and the texts. Cut to rank 8, the updates
# of this map keep from about half of their gain (rate 0.006, 200 steps) to almost nine tenths. At every rate, the longer
# run keeps less; at every length but the shortest, so does the higher rate. $\Delta W$ grows, its spectrum falls more
# slowly, and more of the gain hangs on weak directions. Everywhere the head is the kind that a cut costs most.
#
# Is a near task of lower rank? Here it is the other way round: the update to the near text is the smaller one, and it loses
# more by the same cut. A small correction of a model that already knows such text need not be a simple one.
#
# A gentle tuning has its price: at 0.0003 the gain is smaller. But it is no simple exchange. Of the four rates 0.003 ends
# lowest when nothing is cut; 0.006 ends higher *and* keeps less. And the best rate *for a cut to rank 8* is 0.001: whoever
# wants to cut afterwards does better to tune more gently than the uncut loss says. Two cautions: one seed, and one small
# model. Is it so in larger ones, too? Chapters 11 and 12 tune a sentence encoder (22.7 million parameters, width 384) and a
# language model (135 million, width 576), gently and steeply:

# %%
beyond = {row["name"]: row["cut"] for row in at_rank(cases(), 8)}
for name, at_8 in beyond.items():
    print(f"{name:22} cut to rank 8: " + ", ".join(f"{how} {share:.0%}" for how, share in at_8.items()))
larger = [
    [round(100 * share) for share in beyond[name].values()]
    for name in ("MiniLM, search", "SmolLM2, docstrings")
]
assert larger == [[89, 100], [98, 104]] and beyond["TinyLM, far text"]["steep"] < 0.6

# %% [markdown]
# No. There the gentle tunings keep 89 and 98 % of their gain in nats, and the steep ones no less: 100 and 104 %, with the second
# seed 98 and 101 %. (Shares of each run's own gain. Where it is more than 100 %, what is cut away had done harm.) The gain of
# these updates lies in fewer directions, and the advice to tune gently before a cut is advice for a tuning like TinyLM's, which goes far from what the model
# knew. Chapter 12 sets the five cases side by side.

# %% [markdown]
# And is truncation the fair test of a rank? It answers 'how much of *this* update fits into rank $r$?'. A rank-8 update
# that is *trained* as such may do better than the best rank-8 cut of another update. That is LoRA's real claim. It needs
# training, not subtraction: chapter 07.
#
# ## 4 · Do two runs find the same update?
#
# `reference_seed_1` was tuned like seed 0, from the same base on the same text, only in another order. The measure is the
# LoRA paper's (equation 4): how far do the $i$ strongest right directions of one $\Delta W$, the columns of $V_i$, lie in
# the $j$ strongest of the other?
#
# $$\varphi(i, j) = \frac{\lVert V_i^\top V'_j \rVert_F^2}{\min(i, j)} ,$$
#
# from 0 to 1. Random subspaces of $\mathbb{R}^d$ get $\max(i, j) / d$ on average, not 0.

# %%
explore.predict(
    "Two seeds, one text. What is φ(8, 8) of their ΔW in a block, in 100 dimensions, where chance gives 0.08?",
    {
        "about 0.1": "Then the eight strongest directions would come from the order of the batches. The coming cells say "
        "whether they do, and compare with a third run on another text.",
        "about 0.5": "Yes: half of the strongest directions are found again. But do they come from the text, or from the "
        "base that all runs share? The third run, on another text, tells.",
        "about 0.95": "Then tuning would have one answer and find it. In the embedding it is nearly so. In the blocks "
        "something else fills half of the strongest directions.",
    },
)

# %%
delta_1 = load_checkpoint("reference_seed_1")
updates_1 = by_kind(delta_1)
middle, middle_1 = ({k: group[k][len(group[k]) // 2] for k in kinds} for group in (updates, updates_1))
pairs = {kind: list(zip(updates[kind], updates_1[kind])) for kind in kinds}
eight = {k: [lowrank.subspace_similarity(dW, other, 8, 8) for dW, other in pairs[k]] for k in kinds}
cosine = {
    k: [float(F.cosine_similarity(dW.flatten(), other.flatten(), dim=0)) for dW, other in pairs[k]]
    for k in kinds
}
for kind in kinds:
    print(
        f"{kind:10} φ(8, 8) = {mean(eight[kind]):.2f}, cosine of the two ΔW {mean(cosine[kind]):.2f} (mean of the layers)"
    )
assert all(min(eight[kind]) > 0.08 + 0.15 for kind in kinds) and min(eight["embedding"]) > 0.85
assert all(max(eight[kind]) < 0.75 for kind in blocks) and all(
    0.5 < mean(cosine[kind]) < 0.75 for kind in blocks
)

# %%
explore.two_seeds(middle, middle_1)

# %% [markdown]
# Far above chance, everywhere. In the embedding the two runs agree most: a row cannot move before its token has come up.
# In the blocks the other run has a third to two thirds of the eight strongest directions.
#
# But is chance the right floor? All runs start from one base, whose hidden states have strong directions of their own,
# and *any* tuning may move along these. The honest floor is a $\Delta W$ of **another text**. So three more tunings were
# made, shorter and of one length (100 steps of 8 × 256 tokens at $6 \cdot 10^{-3}$): the reference text, the same in
# another order, and the language manual of Python. Their weights do not ship; their overlaps do.

# %%
tunings = load_deltas()["another text"]
print(f"recorded: full tuning at {tunings['rate']:g}, {tunings['steps']} steps of {tunings['batch']} tokens")
figure, both = plots.subplots(1, 2, size=(7.2, 3.4), sharey=True)
level = {}
for axes, (place, i) in zip(both, ((0, 1), (3, 8))):
    level[i] = {
        what: {kind: [row["right"][place] for row in rows[kind]] for kind in kinds}
        for what, rows in tunings["overlaps"].items()
    }
    plots.dots_by_kind(axes, level[i], legend=i == 1, title=f"φ({i}, {i})", xlim=(0, 1))
    axes.axvline(i / 100, color=plots.GREY, linestyle="--", linewidth=1)
plots.show(
    figure, "φ(1, 1) and φ(8, 8) of two tunings on one text, and of two on different texts; dashed: chance."
)

# %%
seen = {what: {kind: mean(level[8][what][kind]) for kind in kinds} for what in level[8]}
for kind in kinds:
    same, other = (seen[what][kind] for what in ("same text", "another text"))
    print(
        f"{kind:10} φ(8, 8): same text {same:.2f}, another text {other:.2f}; of what is above chance {(other - 0.08) / (same - 0.08):.0%} stays"
    )
    assert 0.08 < other < same and (other - 0.08) / (same - 0.08) < 0.85
above = [(seen["another text"][kind] - 0.08) / (seen["same text"][kind] - 0.08) for kind in blocks]
assert 0.3 < mean(above) < 0.6
cosines = {
    what: mean([row["cosine"] for kind in blocks for row in rows[kind]])
    for what, rows in tunings["overlaps"].items()
}
print(
    f"cosine of the two ΔW, mean of the blocks: same text {cosines['same text']:.2f}, another text {cosines['another text']:.2f}"
)
assert cosines["same text"] > 3 * cosines["another text"]

# %% [markdown]
# So chance alone is not the floor. Of the overlap above chance, more than two fifths in the blocks, and three quarters in
# the embedding, is there for *another* text too: it belongs to the base, not to what was learnt. What the text adds is the
# distance between the two colours: it is there in every kind, and clearest in the MLP's second matrix. The cosine of the
# whole updates tells the texts apart better (0.47 against 0.13). And the one strongest direction, $\varphi(1, 1)$, is no
# good witness: from layer to layer it is anything from 0 to 0.95. (One run of each kind, 100 steps at $6 \cdot 10^{-3}$.)

# %% [markdown]
# Does the part that is not shared matter? Each of the two updates is their mean, plus or minus half of their difference.
# First, is that difference of full rank, and flat like noise?

# %%
for kind in kinds:
    rest = [(dW - other) / 2 for dW, other in pairs[kind]]
    kept = [lowrank.rank_for_energy(torch.linalg.svdvals(dW), 0.9) for dW in rest]
    part = [float(dW.square().sum() / one.square().sum()) for dW, (one, _) in zip(rest, pairs[kind])]
    print(
        f"{kind:10} numerical rank {min(map(lowrank.numerical_rank, rest))}, {mean(kept):3.0f} for 90 % of its energy "
        f"(ΔW {ninety['ΔW'][kind]:.0f}, noise {ninety['noise'][kind]:.0f}); {mean(part):.0%} of ΔW's energy"
    )
    assert (
        ninety["ΔW"][kind] < mean(kept) < ninety["noise"][kind]
        and min(map(lowrank.numerical_rank, rest)) == 100
    )

# %% [markdown]
# It has full rank, and it is flatter than $\Delta W$ everywhere; but it is not as flat as noise. The order of the batches
# moves the weights in directions that the model prefers, too. Now leave it out: take the mean of the two updates.

# %% tags=["nbval-ignore-output"]
after_1 = loss(add(delta_1))
averaged = loss(add({name: (delta[name] + delta_1[name]) / 2 for name in delta}))
print(f"seed 0: {after:.2f}, seed 1: {after_1:.2f}, mean of the two updates: {averaged:.2f} nats a token")
assert abs(after - after_1) < 0.1 and averaged < min(after, after_1) - 0.01
factors_1 = {name: lowrank.svd(dW) for name, dW in delta_1.items() if dW.dim() == 2}
gain_1 = {r: (before - loss(add(delta_1 | cut(factors_1, r)))) / (before - after_1) for r in (1, 8, 32)}
for r, value in gain_1.items():
    print(f"r = {r:2}: {gain[r]:4.0%} (seed 0) and {value:4.0%} (seed 1) of the gain")
assert all(abs(gain[r] - value) < 0.1 for r, value in gain_1.items())

# %% [markdown]
# The mean is *better* than either: the difference between the two runs was not needed, and without it the loss is lower.
# What each rank keeps is the same for both seeds within some per cent, so the answer of section 3 is no accident of one
# run of this tuning.
#
# ## 5 · Is ΔW something new, or more of the same?
#
# The LoRA paper (§7.3) asks whether $\Delta W$ repeats what $W_o$ does already. Take the $r$ strongest directions of
# $\Delta W$, the columns of $U_r$ and $V_r$, and look at what $W_o$ has there. The **amplification factor** is
#
# $$\frac{\lVert \Delta W_r \rVert_F}{\lVert U_r^\top W_o V_r \rVert_F} ,$$
#
# with $\Delta W$ cut to the same rank. (The paper's $\Delta W$ has rank $r$ already; without the cut the factor of a fully
# tuned one grows with everything that is left out below.) The paper finds 21.5 in one matrix of GPT-3 at $r = 4$
# (table 7) and reads it so: directions that the model has in a small way are made louder.

# %%
explore.predict(
    "Take a ΔW with the same singular values and random directions. Is its amplification factor smaller than the real "
    "one's, alike, or larger?",
    {
        "smaller": "One would think so: a real ΔW should amplify what is there, a random one nothing. But the factor "
        "divides by what W_o has in those directions. How much has W_o in random ones?",
        "alike": "Then the factor would say nothing about ΔW at all. The coming picture has both, for every layer.",
        "larger": "Yes. In random directions W_o has next to nothing, so the factor grows. A large factor by itself "
        "is no sign of amplification.",
    },
)


# %%
def inside(W, U, Vh, r=4):
    """What W has in r given directions: an r × r matrix."""
    return U[:, :r].T @ W @ Vh[:r].T


factor, sign = {"ΔW": {}, "random directions": {}}, {}
for kind in kinds:
    rows = {"ΔW": [], "random directions": [], "cosine": []}
    for W, dW in zip(weights[kind], updates[kind]):
        U, S, Vh = lowrank.svd(dW)
        there = inside(W, U, Vh)
        rows["ΔW"].append(float(S[:4].norm() / there.norm()))
        rows["cosine"].append(float((there.diagonal() * S[:4]).sum() / (there.norm() * S[:4].norm())))
        draws = [lowrank.svd(torch.randn(dW.shape, generator=generator)) for _ in range(3)]
        rows["random directions"].append(
            mean([float(S[:4].norm() / inside(W, Q.U, Q.Vh).norm()) for Q in draws])
        )
    for title in factor:
        factor[title][kind] = rows[title]
    sign[kind] = rows["cosine"]
U, S, Vh = lowrank.svd(updates["up"][3])
assert abs(lowrank.amplification_factor(updates["up"][3], weights["up"][3], 4) - factor["ΔW"]["up"][3]) < 1e-3

# %%
figure, (left, right) = plots.subplots(1, 2, size=(7.2, 3.4), sharey=True)
plots.dots_by_kind(left, factor, title="factor at r = 4", xscale="log")
plots.plain_ticks(left.xaxis, (1, 3, 10, 30, 100))
plots.dots_by_kind(
    right, {"cosine": sign}, legend=False, title="cosine of ΔW₄ and W$_o$'s part there", xlim=(-1, 1)
)
right.axvline(0, color=plots.GREY, linewidth=1)
plots.show(
    figure,
    "Amplification factor of ΔW and of a random ΔW with its singular values, and the cosine, by layer.",
)

# %% [markdown]
# In every kind the *random* $\Delta W$ has the larger factor: 4 to 12 in the blocks, 40 and more outside, where the real
# one has 0.8 to 7. So the factor alone does not show that $\Delta W$ amplifies anything. What it shows, turned round, is that
# $W_o$ has several times as much in the directions of $\Delta W$ as in random ones. $\Delta W$ lies where $W_o$ is at work.
#
# Louder or softer? That is a question of sign: the cosine of $\Delta W_4$ and what $W_o$ has in the same directions. By
# chance it is within ±0.25 in two of three cases. Here it is positive in nearly all matrices, and mostly above 0.4:
# **this tuning strengthens what $W_o$ does there**, in nearly every layer. The first layer's value and output matrices
# are weakened, and the head's $\Delta W$ has nothing to do with its $W_o$.

# %%
per_kind = {title: {kind: mean(values[kind]) for kind in kinds} for title, values in factor.items()}
assert all(per_kind["random directions"][kind] > 2 * per_kind["ΔW"][kind] for kind in kinds)
assert all(3 < value < 14 for kind in blocks for value in factor["random directions"][kind])
assert min(per_kind["random directions"][kind] for kind in ("embedding", "head")) > 25
cosines = [value for kind in kinds for value in sign[kind]]
print(
    f"positive in {sum(value > 0 for value in cosines)} of {len(cosines)}, above 0.4 in {sum(value > 0.4 for value in cosines)}"
)
assert sum(value > 0 for value in cosines) >= 35 and sum(value > 0.4 for value in cosines) >= 28
assert sign["value"][0] < 0 and sign["output"][0] < 0 and abs(sign["head"][0]) < 0.1

# %% [markdown]
# ## 6 · Where does the head's energy live?
#
# The head's update looked the most low-rank of all in section 2. Before believing it, ask *where* its energy is. The head
# has a row for each of the 10 000 tokens. The tuning text does not have all of them.
#
# Here the optimiser matters, so here is what it does. Let $g$ be the gradient of one weight in one step.
#
# - **SGD with momentum** keeps a running sum of gradients, $m \leftarrow 0.9\, m + g$, and steps by $-\eta\, m$ ($\eta$ is
#   the learning rate). Steps in one direction add up, steps back and forth cancel. A small gradient makes a small step.
# - **AdamW** keeps a running mean $m$ of $g$ and a running mean $v$ of $g^2$, for every weight its own, and steps by
#   $-\eta\, m / \sqrt{v}$. It divides each weight's gradient by its usual size. So a weight whose gradient is always
#   tiny, and always of one sign, takes *full* steps, as all the others do. (The W is for weight decay, which is 0 here.)
#
# The same tuning was made with SGD, with momentum 0.9, at three rates. The best of them, 0.3, ends a little higher than
# AdamW: at 3.94 nats a token on all held-out docstrings, where AdamW reaches 3.73.

# %%
by_rate = {rate: run["held_out"][-1][1] for rate, run in manifest()["stages"]["sgd"]["trials"].items()}
print("SGD, validation loss by rate:", ", ".join(f"{rate}: {loss:.2f}" for rate, loss in by_rate.items()))
assert min(by_rate, key=by_rate.get) == "0.3" and list(by_rate) == ["0.1", "0.3", "1.0"]

# %%
explore.predict(
    "Which rows of the head move most under AdamW: those of tokens that the tuning text has often, seldom, or never?",
    {
        "often": "That is what learning should look like, and with SGD it does. The coming picture has a dot for each "
        "token, both optimisers side by side.",
        "seldom": "They get few updates as the right token. But think of what softmax does to a token that is wrong at "
        "every place; then look at the left end of the coming picture.",
        "never": "Yes. Such a token is wrong at every place, so its logit is pushed down a little at every step, always "
        "in about the same direction, and AdamW makes full steps of that.",
    },
)

# %% tags=["nbval-ignore-output"]
counts = torch.bincount(reference.train, minlength=10_000)
unseen = counts == 0
heads = {"AdamW": delta["head.weight"], "SGD": load_checkpoint("head_sgd")["head.weight"]}
part = {name: float(dW[unseen].square().sum() / dW.square().sum()) for name, dW in heads.items()}
figure, both = plots.subplots(1, 2, sharey=True)
for axes, (name, dW) in zip(both, heads.items(), strict=True):
    title = f"{name}: {part[name]:.0%} of ‖ΔW‖² in rows never read"
    plots.norm_against_count(axes, counts, {name: dW.norm(dim=1)}, title=title)
never, always = (heads["AdamW"][rows].norm(dim=1).median() for rows in (unseen, counts >= 1000))
assert part["AdamW"] > 0.4 and part["SGD"] < 0.1
assert never > 2 * always and never > 20 * heads["SGD"][unseen].norm(dim=1).median()
plots.show(
    figure, "Norm of each row of the head's ΔW against how often its token occurs, for AdamW and for SGD."
)

# %% [markdown]
# Each dot is a token. With SGD the rows move the more, the more often their token occurs. With AdamW **the rows that the
# text never reads moved most**, and more than half of the energy is in them. Same model, same text, same loss: this part
# of the head's 'low rank' comes from the optimiser. Are those rows of any use? Put them back to what they were.

# %% tags=["nbval-ignore-output"]
without = delta | {"head.weight": delta["head.weight"] * ~unseen[:, None]}
kept = gain_of(without)
print(f"with those rows put back to W_o: {kept:.0%} of the gain")
assert kept > 0.9

# %% [markdown]
# Nearly nothing is lost. And there is a part of the update that *cannot* do anything: a vector that is added to all rows
# raises all logits by the same amount, and softmax takes it off again. How much of the energy is that?

# %% tags=["nbval-ignore-output"]
common = {}
for name, dW in heads.items():
    common[name] = float(len(dW) * dW.mean(dim=0).square().sum() / dW.square().sum())
    print(f"{name:5}: {common[name]:4.0%} of the energy is one vector, added to every row")
unmoved = loss(add(delta | {"head.weight": heads["AdamW"] - heads["AdamW"].mean(dim=0)}))
assert abs(unmoved - after) < 1e-3 and 0.4 < common["AdamW"] < 0.5 and common["SGD"] < 1e-6

# %% [markdown]
# 45 % of what AdamW did to the head changes nothing at all: take it out, and the loss is the same to the third decimal.
# Under SGD there is no such part, and there can be none: the gradient of row $t$ is $(p_t - y_t)$ times the hidden state,
# and over all rows $p - y$ sums to zero. AdamW rescales entry by entry, and the zero is lost.
#
# So of what rank is the rest? The slider drops the rows of tokens that occur fewer than $n$ times, and the common row is
# taken off. Move it to both sides.


# %% tags=["nbval-ignore-output"]
def stable_rank_from(name, n):
    rows = heads[name][counts >= n]
    return lowrank.stable_rank(rows - rows.mean(dim=0))


found = {name: [stable_rank_from(name, n) for n in (1, 10, 30)] for name in heads}
assert found["AdamW"][0] < 5 and abs(found["AdamW"][1] - found["SGD"][1]) < 1.5 and found["AdamW"][2] > 12
assert max(found["SGD"]) < 10
explore.rare_rows(heads, counts)

# %% [markdown]
# For SGD the stable rank stays near 8 as long as the rows kept hold most of the energy. For AdamW it goes from 2 to 20,
# without a level place. At $n = 10$ the two lines cross, but nothing makes that threshold better than 3 or 30: **there is
# no one rank of the head's update under AdamW; the answer depends on the rows that are counted.** What stays true is the
# warning. A spectrum concentrated in one direction may be a fact about the optimiser: look at row norms against counts
# before you explain one.
#
# ## 7 · The planted rank
#
# Here is a case where the right answer is known. Take the base and add to one matrix an update of rank 2, half as large
# as the matrix itself. Call the result the teacher. Then tune the *base* towards the teacher, with all six matrices of
# that block free and nothing said about rank (AdamW, 800 steps of 4 × 256 tokens of code). The loss is the KL divergence
# of the student's next-token probabilities $q$ from the teacher's $p$, the mean of $\sum_t p_t \ln (p_t / q_t)$: 0 where
# they agree.

# %%
explore.predict(
    "Of what rank is the update that tuning finds in the planted matrix, and does its spectrum show the 2?",
    {
        "rank 2": "That would be the shortest way. But a sum of hundreds of steps leaves something in every direction. "
        "Look at the size of the third singular value, not only at whether it is zero.",
        "rank 100, and the 2 is seen": "Yes: full rank as always, and a step after the second singular value. Read on to "
        "what noise in the labels does to the step.",
        "rank 100, and the 2 is not seen": "Hundreds of random batches could well hide it. Look at the third singular value, "
        "with and without noise in the labels.",
    },
)

# %%
planted = load_checkpoint("planted")
name, goal = "blocks.3.mlp.up.weight", planted.pop("planted")
found = planted[name]
noisy = load_deltas()["planted with labels"]
S = torch.linalg.svdvals(found)
print(
    f"planted: rank {lowrank.numerical_rank(goal, 0.01)}, ‖planted‖/‖W_o‖ = {goal.norm() / base[name].norm():.2f}"
)
print(
    f"found:   rank {lowrank.numerical_rank(found)}, {lowrank.rank_for_energy(S, 0.9)} for 90 % of its energy"
)
right = lowrank.subspace_similarity(found, goal, 2, 2)
left = lowrank.subspace_similarity(found, goal, 2, 2, side="left")
print(f"overlap with the planted directions: {right:.2f} of the inputs, {left:.2f} of the outputs")
assert lowrank.rank_for_energy(S, 0.9) == 2 and S[1] > 8 * S[2] and min(right, left) > 0.9

# %% [markdown]
# Rank 100 again, as always. But two singular values stand out, nobody told the optimiser, and the two directions are the
# planted ones up to a few per cent.
#
# Now the same with **noise**. In real tuning no teacher gives probabilities: the text has one token at each place. So let
# the student see one token *drawn* from the teacher's probabilities at each place, with the usual next-token loss. On
# average its gradient is the same; in each step it is noisy. (This run is recorded: same steps, rate and batches.)

# %%
figure, axes = plots.subplots(size=(7.2, 2.6))
noisy_S = torch.tensor(noisy["singular_values"])
number = range(1, 31)
series = {
    "teacher's probabilities": (number, S[:30]),
    "tokens drawn from the teacher (recorded)": (number, noisy_S[:30]),
}
plots.curves(
    axes, series, xlabel="number k", ylabel="σ$_k$", title="singular values of the ΔW that was found"
)
for line in axes.lines:
    line.set_marker("o")
plots.show(
    figure, "Singular values of the ΔW found in the planted matrix, with and without noise in the labels."
)

# %%
rank_of_noisy = lowrank.rank_for_energy(noisy_S, 0.9)
print(
    f"with noise: {noisy_S[0]:.1f}, {noisy_S[1]:.1f}, then {noisy_S[2]:.1f}; rank {rank_of_noisy} for 90 % of the energy;"
)
print(f"the first two hold {lowrank.energy(noisy_S)[1]:.0%} of it; without noise {lowrank.energy(S)[1]:.0%}")
print(
    "overlap with the planted directions: {:.2f} of the inputs, {:.2f} of the outputs".format(
        *noisy["overlap"]
    )
)
assert noisy_S[1] > 2 * noisy_S[2] and rank_of_noisy > 40 and lowrank.energy(noisy_S)[1] < 0.5
assert 0.7 < min(noisy["overlap"]) < min(left, right)

# %% [markdown]
# The step is still there, but it has shrunk from tenfold to threefold, and a long tail has come up beside it: 90 % of the
# energy now takes more than half of all directions, where it took two. The two strongest directions are the planted ones
# to about 84 %. So full tuning finds a low rank that is there; **how clearly the spectrum shows it depends on the noise in
# the labels** (one run of 800 steps each).


# %% [markdown]
# Now the behaviour. How far from the teacher is the tuned model (in KL divergence) when its update is cut to rank $r$: in
# the planted matrix alone, in all six that were free to move, and, with noise in the labels, in all six?

# %% tags=["nbval-ignore-output"]
text = code.test[: 8 * 256].view(8, 256)
with torch.no_grad():
    aim = TinyLM.from_state_dict(add({name: goal}))(text).log_softmax(-1)


@torch.no_grad()
def distance(update):
    guess = TinyLM.from_state_dict(add(update))(text).log_softmax(-1)
    return F.kl_div(guess, aim, log_target=True, reduction="none").sum(-1).mean().item()


far_away, near = distance({}), distance(planted)
print(f"KL from the teacher: base {far_away:.4f}, tuned {near:.4f}")
assert near < 0.1 * far_away

# %% tags=["nbval-ignore-output"]
student = {n: lowrank.svd(dW) for n, dW in planted.items()}
one, six = {}, {}
for r in (1, 2, 4, 16, 64):
    one[r] = 1 - distance({name: lowrank.truncate(found, r)}) / far_away
    six[r] = 1 - distance(cut(student, r)) / far_away
assert one[1] < 0.75 and 0.85 < one[2] and six[2] > 0.85 and six[64] - six[2] < 0.1
figure, axes = plots.subplots(size=(7.2, 2.4))
remaining = noisy["divergence"]
noise = {r: 1 - remaining[str(r)] / remaining["base"] for r in six}
lines = {
    "no noise, all six matrices cut": (list(six), list(six.values())),
    "no noise, the planted one alone": (list(one), list(one.values())),
    "tokens drawn, all six cut (recorded)": (list(noise), list(noise.values())),
}
plots.curves(axes, lines, xscale="log", xlabel="rank r", ylabel="share of the way", ylim=(0, 1.03))
plots.plain_ticks(axes.xaxis, list(six))
plots.show(
    figure,
    f"Share of the way to the teacher at r = 1, 2, 64, all six cut: {six[1]:.0%}, {six[2]:.0%}, {six[64]:.0%}.",
)

# %% [markdown]
# Without noise: rank 1 is not enough, rank 2 is, and the 62 directions after it add a few per cent. With noise the right
# rank is 2 as well, and **the cut is better than the whole update**: 71 % of the way with two directions, 55 % with all of
# them. What the student learnt in the other directions is the noise of its labels, and the cut takes it away.

# %%
whole = 1 - remaining["tuned"] / remaining["base"]
print(
    f"with noise: {noise[1]:.0%} of the way at r = 1, {noise[2]:.0%} at r = 2, {noise[16]:.0%} at r = 16, {whole:.0%} uncut"
)
assert noise[2] == max(noise.values()) and noise[2] > whole + 0.1

# %% [markdown]
# The update found without noise is *smaller* than the one planted. Why?

# %% tags=["nbval-ignore-output"]
U, _, Vh = lowrank.svd(goal)
along = U[:, :2] @ inside(found, U, Vh, 2) @ Vh[:2]
print(
    f"‖found‖ = {found.norm() / goal.norm():.2f} ‖planted‖, of it {along.norm() / goal.norm():.2f} in the planted directions"
)
print(f"KL from the teacher: base {far_away:.4f}, tuned {near:.4f}")
print(f"  all six as tuned, but the whole planted ΔW in its place: {distance(planted | {name: goal}):.4f}")
print(f"  only what was found in the planted matrix:               {distance({name: found}):.4f}")
print(f"  of that, only the part in the planted directions:        {distance({name: along}):.4f}")
assert distance(planted | {name: goal}) > 3 * near and distance({name: along}) > 2 * distance({name: found})

# %% [markdown]
# Because the rest of the block does a part of the work. With the five other matrices as tuned, the *whole* planted update
# is too much: the divergence grows to five times what it was. And in the planted matrix itself the directions beside the
# two planted ones help, too. There are many ways to the same behaviour; tuning took one that is spread out, and stopped
# when 2 % of the way were left. The rank that is *found* is not the rank that is *needed*.
#
# Now go back to the slider of section 2 and look for a step. There is none, in any kind of matrix but the head, whose step
# section 6 explained. Noise in the labels, which real text has, could make a step small. But then the cut would be better
# than the whole, and in section 3 the gain goes on rising up to rank 64. **The steep update from code to documentation
# shows neither sign of a low-rank update with noise on top.** Cut afterwards, it has no rank that is enough. Whether
# another update of low rank would do as well, only training one can tell (chapter 07).
#
# ## 8 · Rounding has full rank
#
# Checkpoints are stored in half precision, so $\Delta W$ from two *files* carries the rounding of both. Rounding errors
# are independent from entry to entry: noise, of full rank. Take an update of rank 8 exactly, store both models in three
# formats, subtract, and look.

# %%
explore.predict(
    "An update of rank 8, with ‖ΔW‖/‖W_o‖ = 0.003, is read back from two bfloat16 files. Which rank holds 90 % of the "
    "energy of the difference?",
    {
        "7 or 8": "In float32 and in float16, yes. bfloat16 keeps 8 significant bits, so its steps are larger than most "
        "entries of this update. See the next cell.",
        "about 30": "Some of it is noise, you think. Compare the size of the update with the step of the format: half of a "
        "256th part of each number, at the most.",
        "more than 45": "Yes. Most of the difference is rounding, and rounding has full rank. Had you compared two bfloat16 "
        "files after a gentle fine-tune, you would have found a 'high-rank' update.",
    },
)

# %%
W = base["blocks.2.mlp.up.weight"]
update = lowrank.truncate(delta["blocks.2.mlp.up.weight"], 8)
update *= 0.003 * W.norm() / update.norm()
read_back = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    difference = (W + update).to(dtype).float() - W.to(dtype).float()
    read_back[dtype] = lowrank.rank_for_energy(torch.linalg.svdvals(difference), 0.9)
    wrong = (difference - update).norm() / update.norm()
    print(f"{str(dtype):15}: rank {read_back[dtype]:2} for 90 % of the energy, off by {wrong:.0%} of ‖ΔW‖")
assert read_back[torch.float32] == read_back[torch.float16] == 7 and read_back[torch.bfloat16] > 45

# %% [markdown]
# bfloat16 keeps 8 significant bits of each number. An update of 0.3 % is smaller than most of its steps: many weights do
# not move at all, others move too far, and the difference of the files is off by three quarters of $\Delta W$. Its rank is
# that of the rounding. This is why our base was rounded *before* it was tuned, and why $\Delta W$ ships instead of $W_f$.
#
# But the floor can be computed. A rounding error is uniform within half a step of the format at each entry's size, so one
# can draw such noise and take its largest singular value. What stands above that line, rounding did not make. In the
# figure it is dashed; go through sizes and formats, and watch the eight true directions sink below it.

# %%
floor = lowrank.rounding_floor(W, torch.bfloat16)[0]
difference = (W + update).bfloat16().float() - W.bfloat16().float()
assert int((torch.linalg.svdvals(difference) > 1.05 * floor).sum()) == 8
explore.rounding(W, update)

# %% [markdown]
# ## 9 · A fine-tune that others made
#
# So far every $\Delta W$ was ours. Here is one that we had no hand in: a BERT for chemical reactions, written as text
# (SMILES), and two full fine-tunes of it, published by Schwaller et al. (2021) in the Python package rxnfp. 12 layers,
# width 256, 6.7 million numbers, stored in float32. One fine-tune sorts reactions into 50 classes; the other comes without
# its classifier.
#
# The weights do not ship with the course; what was measured on them does. `lora-edu data --published rxnfp` gets them
# (75 MB through pip, without installing the package), and then this section measures anew.

# %% tags=["nbval-ignore-output"]
recorded = published.load_recorded("rxnfp")
if published.is_fetched("rxnfp"):
    from lora_edu.recording.published import measure

    recorded = measure("rxnfp")
    print("Measured just now, on the models in your folder.")
else:
    print(
        "The models are not on this machine: recorded figures. `lora-edu data --published rxnfp` gets them."
    )
figures, facts = {name: value.float() for name, value in recorded.tensors.items()}, recorded.facts
for title, which in {"50 classes": "tuned_50", "the other": "tuned"}.items():
    sizes = [figures[f"{which}/{k}"].norm() / figures[f"base/{k}"].norm() for k in blocks]
    pooler = figures["cosine/pooler"][0, 2 if which == "tuned_50" else 1]
    print(
        f"{title:10}: ‖ΔW‖/‖W_o‖ in the blocks {min(sizes):.2f} to {max(sizes):.2f}; cosine of the poolers {pooler:.2f}"
    )
    assert max(sizes) < 0.3 and pooler < 0.6

# %% [markdown]
# Both are gentler than our tuning of TinyLM (0.4 to 0.5 in the blocks). One matrix does not belong: the **pooler**, which
# stands between the encoder and the classifier. The tuned pooler has little to do with the base's (a cosine of about a
# half and of a third; all other matrices have 0.96 and more): it was trained from scratch, and so was the classifier. A
# difference of two unrelated matrices is no update. Both stay whole in what follows.
#
# Spectra by kind and depth, beside $W_o$ and beside TinyLM's steep $\Delta W$. The widths differ (256 and 100), so ranks
# are shown as shares of the full rank.

# %%
ours = {kind: torch.stack(spectra["ΔW"][kind]) for kind in blocks}
theirs = {w: {kind: figures[f"{w}/{kind}"] for kind in blocks} for w in ("base", "tuned_50", "tuned")}
two = {"ΔW, 50 classes": theirs["tuned_50"], "ΔW, the other": theirs["tuned"]}
for kind in blocks:
    share = {
        w: mean([lowrank.rank_for_energy(S, 0.9) / S.numel() for S in group[kind]])
        for w, group in {**theirs, "TinyLM": ours}.items()
    }
    assert share["tuned_50"] < share["tuned"] < share["base"] and share["tuned"] < share["TinyLM"]
explore.published_spectra(theirs["base"], two, ("TinyLM's ΔW", ours))

# %% [markdown]
# In every kind, 90 % of the energy takes a smaller share of the full rank in both published updates than in TinyLM's steep
# one, and a smaller one than in their own $W_o$. The gentler of the two ($\lVert \Delta W \rVert / \lVert W_o \rVert$ of
# 0.07 to 0.11) is the lower: 33 to 76 of 256. Both are still far from 8.
#
# Do two fine-tunes of one base move along the same directions? Beside chance, $8/256 = 0.03$, stands the overlap with the
# strongest directions of $W_o$ itself, which both tunings know.

# %%
figure, both = plots.subplots(1, 2, size=(7.2, 3.2), sharey=True)
at = facts["sizes"].index(8)
for axes, side in zip(both, ("right", "left")):
    overlap = {
        title: {kind: figures[f"{which}/{kind}/{side}"][:, at].tolist() for kind in blocks}
        for title, which in {"the two ΔW": "overlap", "ΔW and W$_o$": "overlap_base"}.items()
    }
    title = f"φ(8, 8), {side} directions ({'inputs' if side == 'right' else 'outputs'})"
    plots.dots_by_kind(axes, overlap, legend=side == "right", xlim=(0, 0.8), title=title)
    axes.axvline(8 / 256, color=plots.GREY, linestyle="--", linewidth=1)
    averages = [[mean(overlap[title][kind]) for title in overlap] for kind in blocks]
    assert all(two_updates > max(with_base, 0.04) for two_updates, with_base in averages)
cosines = torch.cat([figures[f"cosine/{kind}"][:, 0] for kind in blocks])
assert 0 < cosines.mean() < 0.15
plots.show(
    figure, "φ(8, 8) of the two published ΔW, and of one of them with W_o, by kind and layer; dashed: chance."
)

# %% [markdown]
# On average over the layers of each kind, the two updates overlap more than chance, and more than the second one overlaps
# with the base: they share something of their own. But it is 5 to 36 %, and the cosine of the two is about 0.1. Two tasks,
# two updates. (Two orders of *one* text gave TinyLM about a half, section 4.)
#
# Now the behaviour, of the one whose classifier was published: 125 reactions of the textbooks, and the class that the
# tuned model gives to each. Cut every $\Delta W$ to rank $r$ and count how many keep their class.

# %%
explore.predict(
    "Every ΔW of the published fine-tune cut to rank 8 of 256: 43 % of the energy is left. How many of its 125 decisions "
    "stay the same?",
    {
        "about 45 %": "As many as the energy says. In section 3 the gain fell short of the energy; here look at the two "
        "lines in the coming figure, and at which of them is higher.",
        "about 70 %": "Yes, within the interval. More than the energy, so here the weak directions matter less than their "
        "share, the other way round than in TinyLM's steep tuning.",
        "about 95 %": "That is the figure for rank 32. A class stays as long as it is the most probable one, so decisions "
        "forgive a lot; but eight directions of 256 are too few for a quarter of them.",
    },
)

# %% tags=["nbval-ignore-output"]
from lora_edu.recording.published import interval

cuts = [0, *facts["ranks"]]
classes, whole = figures["classes"], len(cuts)
changed = {r: (classes[row] != classes[whole]).tolist() for row, r in enumerate(cuts)}
names = list(published.load_reactions().values())
bounds = {r: interval(len(names) - sum(row), len(names)) for r, row in changed.items()}
assert bounds[0][1] < 0.15 and 0.6 < bounds[8][0] and bounds[8][1] < 0.85 and bounds[64][0] > 0.9
assert facts["energy"][cuts.index(8)] < 0.5 < bounds[8][0]
explore.decisions_kept(names, changed, bounds, dict(zip(cuts, facts["energy"])))

# %% [markdown]
# At $r = 0$ only pooler, classifier, biases and norms are tuned, and 7 % of the decisions stay: about as many as always
# naming the most frequent class would get. **At rank 8, 43 % of the energy carries about three decisions of four** (73 %; the
# band is Wilson's 95 % interval, 64 to 80 %); rank 32 carries 94 %. So a third regime, and again no fixed exchange rate
# between energy and behaviour: TinyLM's steep tuning keeps 65 % of its energy at rank 8 and less than half of its gain.
#
# Two cautions. A class stays as long as it is the most probable one, so it forgives more than a loss does: at rank 8 the
# probabilities are 0.8 nats of KL divergence away. And 125 short reactions, written down for this course, are no sample
# of chemistry. Thirty of them would have been too few to say much:

# %% tags=["nbval-ignore-output"]
for n in (30, 125):
    kept = n - sum(changed[8][:n])
    low, high = interval(kept, n)
    print(
        f"r = 8, the first {n:3} reactions: {kept:3} decisions stay, {kept / n:.0%} ({low:.0%} to {high:.0%})"
    )
divergence = figures["divergence"].mean(dim=1)
print(
    f"KL divergence from the tuned model at r = 8: {divergence[cuts.index(8)]:.2f} nats; at r = 32: {divergence[cuts.index(32)]:.2f}"
)
assert 0.5 < divergence[cuts.index(8)] < 1.1 and divergence[cuts.index(32)] < 0.15
most_frequent = float(torch.bincount(classes[whole].long()).max() / len(names))
assert abs(most_frequent - (1 - sum(changed[0]) / len(names))) < 0.03
kept_by_kind = {
    kind: float((classes[whole + 1 + row] == classes[whole]).float().mean())
    for row, kind in enumerate(blocks)
}
assert min(kept_by_kind, key=kept_by_kind.get) == "up" and min(kept_by_kind.values()) > 0.8

# %%
figure, axes = plots.subplots(size=(7.2, 2.3))
labels = {
    "title": "one kind of matrix cut to rank 8, everything else whole",
    "xlabel": "share of the decisions kept",
    "xlim": (0, 1.15),
}
texts = [f"{value:.0%}" for value in kept_by_kind.values()]
plots.bars(axes, list(kept_by_kind), list(kept_by_kind.values()), [plots.BLUE] * 6, texts, **labels)
plots.show(
    figure,
    f"Decisions kept with one kind cut to 8: {', '.join(f'{k} {v:.0%}' for k, v in kept_by_kind.items())}.",
)

# %% [markdown]
# One kind at a time, every cut to rank 8 keeps more than four decisions of five; the first matrix of the MLP costs most.
# What is lost when all are cut is more than these losses can explain one by one.
#
# ## 10 · Your own two checkpoints
#
# The first cell writes an example, TinyLM before and after tuning in bfloat16, into your folder of the course. It never
# writes anywhere else, and you need not touch it.

# %%
example = user_folder("chapter_03")
for name, state in {"before": base, "after": tuned}.items():
    write_atomically(example / f"{name}.safetensors", save({key: W.bfloat16() for key, W in state.items()}))

# %% [markdown]
# The second cell only *reads*. Put the paths of your own two files in place of the two on the right (safetensors, two
# versions of one model), for instance `Path("/where/it/is/model.safetensors")`. The rest of this section is then about
# your model.

# %%
BEFORE = example / "before.safetensors"
AFTER = example / "after.safetensors"
old, new = (load(Path(path).read_bytes()) for path in (BEFORE, AFTER))
print(f"{len(old)} and {len(new)} tensors read")

# %%
print(f"{'':34}{'‖ΔW‖/‖W‖':>9}{'stable':>8}{'90 %':>6}{'above rounding':>16}")
for name, dW in sorted(lowrank.deltas(old, new, matrices_only=True).items())[::5]:
    W, S = old[name].float(), torch.linalg.svdvals(dW)
    floor = lowrank.rounding_floor(W, old[name].dtype)[0]
    row = f"{dW.norm() / W.norm():9.2f}{lowrank.stable_rank(S):8.1f}{lowrank.rank_for_energy(S, 0.9):6}"
    print(f"{name:34}{row}{int((S > floor).sum()):10} of {len(S)}")

# %% [markdown]
# Our tuning was steep ($\lVert \Delta W \rVert / \lVert W \rVert$ is 0.4), so nearly everything stands above rounding. In
# a large model that was tuned for a short time at a small rate it may be otherwise: read the last column before the
# others.
#
# For a whole model there is a command, `lora-edu delta BEFORE AFTER`. It reads one tensor at a time, shards and adapters
# too, finds out where one side has a prefix before its names (as rxnfp's checkpoints have), and marks by itself every
# figure that rounding could have made.
#
# ## What to remember
#
# - A fully tuned $\Delta W$ has full rank. '$r = \operatorname{rank}(\Delta W)$' is no recipe.
# - Whether a cut to rank 8 keeps most of what tuning did depends on the tuning. TinyLM tuned steeply, far from its first
#   text: less than half of the gain. Gently (a rate of 0.001 or less, 100 steps): more than four fifths. Two larger models
#   (chapters 11 and 12): nine tenths or all of it, and no less after steep tuning.
# - Energy is not behaviour. One direction of the head holds half of all energy and little of the gain. Cut one kind of
#   matrix at a time and look at what it costs.
# - A floor is not always chance: another text, a random $\Delta W$ with the same singular values, another threshold.
# - Two runs on one text share about half of their strongest directions; their mean is better than either.
# - Where an update of rank 2 is the right answer, full tuning finds it, and the spectrum shows it. Noise in the labels
#   shrinks the step and adds a long tail; then the cut is *better* than the whole update. The real $\Delta W$ shows neither.
# - One strong direction may be the optimiser's (rows nobody reads, a vector common to all rows), and a long flat tail may
#   be the file format's. Look at row norms, and compute the rounding floor.
# - If LoRA at rank 8 works, it is not because full tuning's update *is* of rank 8. A trained rank-8 update is another
#   matrix than the truncated one.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# **Exercise 1.** `exercises.rounded_pair()` returns one matrix before and after an update of low rank, both stored in
# bfloat16. Of what rank was the update?

# %% tags=["exercise"]
old_matrix, new_matrix = exercises.rounded_pair()
rank_of_the_update = None
print(exercises.check_03_1(rank_of_the_update))

# %% tags=["solution"]
old_matrix, new_matrix = exercises.rounded_pair()
S = torch.linalg.svdvals(new_matrix.float() - old_matrix.float())
floor = lowrank.rounding_floor(old_matrix.float(), torch.bfloat16)[0]
print("singular values over the floor:", [round(float(s / floor), 2) for s in S[:8]])
rank_of_the_update = int((S > floor).sum())
print(exercises.check_03_1(rank_of_the_update))

# %% [markdown] tags=["exercise"]
# **Exercise 2.** A base has a held-out loss of 5.60 nats a token, its fully tuned version 3.60, and the version with every
# $\Delta W$ cut to rank 4 has 4.10. What share of the gain does rank 4 keep?

# %% tags=["exercise"]
share_kept = None
print(exercises.check_03_2(share_kept))

# %% tags=["solution"]
share_kept = (5.60 - 4.10) / (5.60 - 3.60)
print(exercises.check_03_2(share_kept))

# %% [markdown] tags=["exercise"]
# **Exercise 3.** By how much do the 20 strongest right directions of the two seeds' `blocks.3.attention.value.weight`
# overlap *beyond chance*?

# %% tags=["exercise"]
value_0 = load_checkpoint("reference_seed_0")["blocks.3.attention.value.weight"]
value_1 = load_checkpoint("reference_seed_1")["blocks.3.attention.value.weight"]
beyond_chance = None
print(exercises.check_03_3(beyond_chance))

# %% tags=["solution"]
value_0 = load_checkpoint("reference_seed_0")["blocks.3.attention.value.weight"]
value_1 = load_checkpoint("reference_seed_1")["blocks.3.attention.value.weight"]
beyond_chance = lowrank.subspace_similarity(value_0, value_1, 20, 20) - 20 / 100
print(exercises.check_03_3(beyond_chance))

# %% [markdown] tags=["exercise"]
# **Exercise 4.** Write a function `stable_rank_of_rows(update, counts, least)`: the stable rank of the rows of a head's
# $\Delta W$ whose tokens occur at least `least` times, after the row that these rows have in common was taken off.
# `update` is (V, d), `counts` is (V,). It is tried on matrices that you have not seen.

# %% tags=["exercise"]
stable_rank_of_rows = None
print(exercises.check_03_4(stable_rank_of_rows))


# %% tags=["solution"]
def stable_rank_of_rows(update, counts, least):
    rows = update[counts >= least]
    return lowrank.stable_rank(rows - rows.mean(dim=0))


print(exercises.check_03_4(stable_rank_of_rows))

# %% [markdown] tags=["exercise"]
# **Exercise 5.** Write a function `amplification(W, dW, r)`: the amplification factor of section 5, from the singular
# vectors, without `lowrank.amplification_factor`.

# %% tags=["exercise"]
amplification = None
print(exercises.check_03_5(amplification))


# %% tags=["solution"]
def amplification(W, dW, r):
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    return S[:r].norm() / (U[:, :r].T @ W @ Vh[:r].T).norm()


print(exercises.check_03_5(amplification))

# %% [markdown] tags=["exercise"]
# **Exercise 6.** Write a function `cut_one_kind(delta, kind, r)`: a new dictionary, name → $\Delta W$, in which the
# matrices of one kind (`"up"`, say: the last part but one of the name) are cut to rank $r$ and everything else is as it
# was. Biases are no matrices.

# %% tags=["exercise"]
cut_one_kind = None
print(exercises.check_03_6(cut_one_kind))


# %% tags=["solution"]
def cut_one_kind(delta, kind, r):
    wanted = {name for name, dW in delta.items() if dW.dim() == 2 and name.split(".")[-2] == kind}
    return {name: lowrank.truncate(dW, r) if name in wanted else dW for name, dW in delta.items()}


print(exercises.check_03_6(cut_one_kind))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA* (arXiv 2106.09685v2): §7.2 and appendix H on subspace similarity, §7.3 on amplification.
# - Aghajanyan et al. 2020 (arXiv 2012.13255): low intrinsic *dimension*, which is not low rank.
# - Roy & Vetterli 2007, *The effective rank*; Rudelson & Vershynin 2007 for the stable rank.
# - Schwaller et al. 2021, *Mapping the space of chemical reactions using attention-based neural networks*, Nature Machine
#   Intelligence 3: the model of section 9.
# - Biderman et al. 2024, *LoRA Learns Less and Forgets Less*: the spectra of full tuning's $\Delta W$ in models of 7
#   billion parameters.
