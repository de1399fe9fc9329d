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
# documentation of numpy and matplotlib. We subtract one from the other and look.
#
# **Afterwards you can** compute ΔW between two checkpoints and compare kinds of layers; say how much of the *weights* and
# how much of the *behaviour* each rank keeps; compare two runs by subspace without being fooled by chance; tell rounding
# and rows that nobody reads from signal; plant a rank and look for it; do all of it on two checkpoints of your own.
#
# **You should know** chapter 01: singular values, energy, truncation.
#
# **Time**: 60 minutes to read, one to two to run.

# %% tags=["setup"]
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from lora_edu import exercises, explore, lowrank, plots
from lora_edu.data import load_checkpoint, load_corpus
from lora_edu.paths import user_folder, write_atomically
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

# %% [markdown]
# ## 1 · Two checkpoints, one subtraction
#
# The base is a transformer with 6 layers, a vocabulary of 10 000 and a width of 100. `reference_seed_0` holds ΔW, the
# weights after tuning minus the weights before, for every tensor. (Why ship ΔW and not the tuned model? Section 8.)
#
# > W_o: the weights before tuning. W_f: after tuning all of them. **ΔW = W_f − W_o**.

# %% tags=["setup"]
base = load_checkpoint("base")
delta = load_checkpoint("reference_seed_0")
tuned = {name: base[name] + delta[name] for name in base}
print(f"{len(base)} tensors, {sum(W.numel() for W in base.values()):,} numbers, for instance")
for name in ("embedding.weight", "blocks.3.attention.query.weight", "blocks.3.mlp.up.weight", "head.weight"):
    print(f"{name:32} {tuple(base[name].shape)}")

# %% [markdown]
# First, did tuning do anything? The measure is the loss on docstrings that neither model has seen: the mean of −ln *p*
# of the right next token, in nats. No run of 13 words of them stands in any training text.

# %% tags=["setup", "nbval-ignore-output"]
code, reference = load_corpus("code"), load_corpus("reference")
held_out = reference.test.unfold(0, 256, 1024).flatten()  # a quarter of it, spread over all its documents


def loss(state):
    return evaluate(TinyLM.from_state_dict(state), held_out)


before, after = loss(base), loss(tuned)
print(f"held-out docstrings, nats a token: {before:.2f} before tuning, {after:.2f} after")
assert before - after > 1.5

# %% [markdown]
# More than two nats: where the base gave the right token a probability *p*, the tuned model gives it *p* · e² ≈ 7*p* and
# more, in the geometric mean. And you can read it. Both models continue the same three words, drawing from their own
# predictions. One writes what stands in source files, the other an entry of a reference manual. Neither means anything
# by it; with 2.7 million weights there is not much meaning to be had.

# %% tags=["nbval-ignore-output"]
prompt = torch.tensor(reference.tokenizer.encode("Return the array").ids)
for name, state in {"base": base, "tuned": tuned}.items():
    model = TinyLM.from_state_dict(state)
    written = model.generate(prompt, 60, temperature=0.7, seed=2)
    print(f"--- {name}:\n{reference.tokenizer.decode(written.tolist())}\n")
assert before > after + 1.5

# %% [markdown]
# ## 2 · Of what rank is ΔW?
#
# No matrix of this model can have a rank above 100, its width. **Predict** the rank of the updates: around 8, around 50,
# or 100?

# %% tags=["setup"]
kinds = ["embedding", "query", "key", "value", "output", "up", "down", "head"]


def by_kind(state):
    return {k: [W for name, W in state.items() if W.dim() == 2 and name.split(".")[-2] == k] for k in kinds}


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
# **Full**, every one of them. So "choose r = rank(ΔW), it keeps everything" is true and useless: it says r = 100, which
# is no saving at all. Rank counts the singular values that are not zero, and after 260 steps on random batches none is.
# The useful question is how fast they fall. Chapter 01 has three ways to put a number on that: the stable rank ‖·‖²_F / σ₁²,
# the effective rank, and the rank that holds 90 % of the energy. Beside it stands the same for noise of that shape, and
# for W_o: "large models are low-rank" is sometimes said of the weights and sometimes of the update, and these are two
# statements.

# %%
generator = torch.Generator().manual_seed(0)
ninety = {}
print(f"{'mean over the layers':21}stable  effective  | for 90 % of the energy: ΔW  W_o  noise")
for kind in kinds:
    spectra = [torch.linalg.svdvals(dW) for dW in updates[kind]]
    noise = torch.randn(updates[kind][0].shape, generator=generator)
    looked_at = {
        "ΔW": spectra,
        "W_o": map(torch.linalg.svdvals, weights[kind]),
        "noise": [torch.linalg.svdvals(noise)],
    }
    ninety[kind] = {
        what: mean([lowrank.rank_for_energy(S, 0.9) for S in group]) for what, group in looked_at.items()
    }
    stable, effective = (mean([f(S) for S in spectra]) for f in (lowrank.stable_rank, lowrank.effective_rank))
    print(
        f"{kind:21}{stable:6.1f}{effective:11.0f}{'':26}"
        + "".join(f"{r:5.0f}" for r in ninety[kind].values())
    )

# %% [markdown]
# Read the last three columns. In the attention matrices, 90 % of ΔW takes a rank of 33 to 40 of 100; in the MLP and the
# embedding 60 to 68. That is less than noise would take (52, 76, 89): ΔW has structure. But it is no low rank, and it is
# about the rank of the matrix that was changed: **ΔW is as low-rank as W_o is**, a little more so in the blocks.
#
# One row does not fit: the head has a stable rank of 1.4, so a single direction holds 70 % of its energy. Keep that in
# mind; section 6 asks what it is. (The head of the *base* is odder still: rank 2 for 90 %.)

# %%
blocks = kinds[1:7]
assert all(30 < ninety[kind]["ΔW"] < 72 for kind in kinds)
assert all(ninety[kind]["ΔW"] < ninety[kind]["noise"] - 8 for kind in kinds)
assert all(0.75 < ninety[kind]["ΔW"] / ninety[kind]["W_o"] < 1 for kind in [*blocks, "embedding"])
head_spectrum = torch.linalg.svdvals(delta["head.weight"])
assert 0.65 < lowrank.energy(head_spectrum)[0] < 0.75 and ninety["head"]["W_o"] == 2

# %% [markdown]
# Look at the spectra themselves. Each line is a layer. Use the slider (or the arrow keys) to go through the kinds.

# %%
explore.spectra_by_kind(weights, updates)

# %% [markdown]
# ## 3 · What does each rank keep of the behaviour?
#
# Energy is about weights. Nobody cares about weights; what counts is what the model does. So cut *every* ΔW to rank *r*
# (biases and norms, which are no matrices, keep all of theirs), put it back on W_o, and measure the held-out loss.
#
# > share of the gain kept = (loss(W_o) − loss(W_o + ΔW cut to *r*)) / (loss(W_o) − loss(W_o + ΔW))
#
# **Predict** the share at r = 8: about 30, 60 or 90 %?

# %% tags=["nbval-ignore-output"]
ranks = [1, 2, 4, 8, 16, 32, 64]


def cut(update, r):
    return {name: lowrank.truncate(dW, r) if dW.dim() == 2 else dW for name, dW in update.items()}


def add(update):
    return {name: W + update.get(name, 0) for name, W in base.items()}


losses = {r: loss(add(cut(delta, r))) for r in ranks}
gain = {r: (before - losses[r]) / (before - after) for r in ranks}
for r in ranks:
    print(f"r = {r:3}: {losses[r]:.2f} nats a token, {gain[r]:4.0%} of the gain")
assert 0.25 < gain[8] < 0.6 and gain[32] < 0.9 < gain[64]

# %% [markdown]
# Rank 8 keeps less than half of the gain. For 90 % of it you need more than 32. Whoever says "the update is of low rank,
# so a rank-8 matrix can hold it" is wrong about this update: **cut to rank 8, more than half of what tuning did is gone.**
# The gain runs along with the energy, so here the weights tell about the behaviour. (Biases and norms, which were not cut,
# bring little of it.)

# %% tags=["nbval-ignore-output"]
vectors = (before - loss(add({name: dW for name, dW in delta.items() if dW.dim() == 1}))) / (before - after)
print(f"biases and norms alone: {vectors:.0%} of the gain")
assert 0 < vectors < 0.12

# %% tags=["nbval-ignore-output"]
assert losses[64] < losses[8] < losses[1]
explore.truncation(updates, losses, before, after)

# %% [markdown]
# **Which matrices carry the gain?** Put back the full ΔW of one group and leave the rest of the base alone.

# %% tags=["nbval-ignore-output"]
groups = {"embedding": ["embedding"], "head": ["head"], "attention": kinds[1:5], "MLP": ["up", "down"]}
share = {}
for title, members in groups.items():
    part = {name: dW for name, dW in delta.items() if dW.dim() == 2 and name.split(".")[-2] in members}
    share[title] = (before - loss(add(part))) / (before - after)
for title, value in share.items():
    print(f"ΔW of the {title:10} alone: {value:4.0%} of the gain")
assert share["attention"] < 0.15 and sum(share.values()) < 0.9 and max(share.values()) < 0.45

# %% [markdown]
# No group does it alone, and together the four parts bring much less than the whole: an update of one layer is right for
# the updates of the others. The attention's share alone is next to nothing, though its matrices changed as much as the
# rest (0.4 to 0.5 of their norm). Do not conclude that attention need not be tuned: tuned *alone*, it would have moved
# elsewhere.
#
# And is truncation the fair test of a rank? It answers "how much of *this* update fits into rank *r*?". A rank-8 update
# that is *trained* as such may do better than the best rank-8 cut of another update. That is LoRA's real claim, and it
# needs training, not subtraction.

# %% [markdown]
# ## 4 · Do two runs find the same update?
#
# `reference_seed_1` was tuned like seed 0, from the same base on the same text, only in another order. What the two
# updates share must come from the text; what they do not share is a noise floor, and no method can be asked to
# reproduce it. The measure is the LoRA paper's (equation 4): how far do the *i* strongest right directions of one ΔW
# lie in the *j* strongest of the other?
#
# > φ(*i*, *j*) = ‖V_*i*ᵀ V′_*j*‖²_F / min(*i*, *j*), from 0 to 1. Random subspaces of ℝᵈ get max(*i*, *j*) / *d*, not 0.
#
# **Predict** φ(8, 8) in 100 dimensions, where chance gives 0.08.

# %%
delta_1 = load_checkpoint("reference_seed_1")
updates_1 = by_kind(delta_1)
middle, middle_1 = ({k: group[k][len(group[k]) // 2] for k in kinds} for group in (updates, updates_1))
similarity, cosine = {}, {}
for kind in kinds:
    similarity[kind] = lowrank.subspace_similarity(middle[kind], middle_1[kind], 8, 8)
    cosine[kind] = float(F.cosine_similarity(middle[kind].flatten(), middle_1[kind].flatten(), dim=0))
    chance = lowrank.chance_similarity(8, 8, middle[kind].shape[1])
    print(
        f"{kind:10} φ(8, 8) = {similarity[kind]:.2f}, chance {chance:.2f}; cosine of the two ΔW {cosine[kind]:.2f}"
    )

# %% [markdown]
# Far above chance, everywhere: the strongest directions belong to what the two runs have in common, the text and the
# base (whose hidden states have preferred directions of their own), and not to the order of the batches. In the
# embedding, where a row cannot move before its token has come up, the two runs agree most (0.92). And far below 1: of the
# eight strongest directions of a block's matrix, the other run has a third to a little more than half. The cosines,
# around 0.6 in the blocks, say the same of all directions at once.

# %%
assert all(similarity[kind] > lowrank.chance_similarity(8, 8, middle[kind].shape[1]) + 0.25 for kind in kinds)
assert similarity["embedding"] == max(similarity.values()) and all(similarity[kind] < 0.65 for kind in blocks)
assert all(0.5 < cosine[kind] < 0.75 for kind in blocks)

# %%
explore.two_seeds(middle, middle_1)

# %% [markdown]
# Does the part that is not shared matter? Take the mean of the two updates: what they share stays, and what they do not
# share is halved.

# %% tags=["nbval-ignore-output"]
after_1 = loss(add(delta_1))
losses_1 = {r: loss(add(cut(delta_1, r))) for r in ranks}
averaged = loss(add({name: (delta[name] + delta_1[name]) / 2 for name in delta}))
print(f"seed 0: {after:.2f}, seed 1: {after_1:.2f}, mean of the two updates: {averaged:.2f}")
gain_1 = {r: (before - value) / (before - after_1) for r, value in losses_1.items()}
for r in losses_1:
    print(f"r = {r:2}: {gain[r]:4.0%} (seed 0) and {gain_1[r]:4.0%} (seed 1) of the gain")
assert abs(after - after_1) < 0.1 and averaged < min(after, after_1) + 0.05
assert all(abs(gain[r] - gain_1[r]) < 0.1 for r in losses_1)

# %% [markdown]
# The mean is as good as either, and a little better: what the seeds do not share was not needed. It is in ΔW, it has
# energy and rank, and it is noise of training. What each rank keeps is the same for both seeds within some per cent, so
# the answer of section 3 is no accident of one run.
#
# ## 5 · Is ΔW something new, or more of the same?
#
# The LoRA paper (§7.3) asks whether ΔW repeats what W_o does already. Take ΔW's *r* strongest directions, U and V, and
# look at what W_o has there: UᵀW_oV. The **amplification factor** is ‖ΔW_r‖ / ‖UᵀW_oV‖, with ΔW cut to the same rank *r*
# (the paper's ΔW has rank *r* already; without the cut the factor of a fully tuned one grows with everything that is
# left out below). For comparison: what W_o has in its own *r* strongest directions, and in random ones.

# %%
factor, ratio = {}, {}
print("           factor at r = 4   at r = 64  | ‖UᵀW_oV‖ in ΔW's 4 directions  in W_o's own  in random ones")
for kind in kinds:
    W, dW = weights[kind][len(weights[kind]) // 2], middle[kind]
    factor[kind] = lowrank.amplification_factor(dW, W, 4)
    U, S, Vh = lowrank.svd(dW)
    noise = lowrank.svd(torch.randn(dW.shape, generator=generator))
    there = (U[:, :4].T @ W @ Vh[:4].T).norm()
    own = lowrank.svd(W).S[:4].norm()
    anywhere = (noise.U[:, :4].T @ W @ noise.Vh[:4].T).norm()
    wide = lowrank.amplification_factor(dW, W, 64)
    ratio[kind] = float(there / anywhere), float(there / own)
    print(f"{kind:10}{factor[kind]:16.1f}{wide:12.1f}{'':20}{there:11.1f}{own:14.1f}{anywhere:16.1f}")

# %% [markdown]
# W_o has more in ΔW's directions than in random ones, and much less than in its own strongest: a third at the most. So
# ΔW neither repeats W_o nor ignores it. It picks directions that the base has in a small way and makes them louder, by a
# factor of 1.2 to 7 at r = 4. The paper finds the same in GPT-3, with a larger factor (21.5 at r = 4, table 7).

# %%
assert all(to_random > 1.7 and to_own < 0.35 for to_random, to_own in ratio.values())
assert all(1.1 < f < 7.5 for f in factor.values())

# %% [markdown]
# ## 6 · Where does the head's energy live?
#
# The head's update looked the most low-rank of all in section 2. Before believing it, ask *where* its energy is. The
# head has a row for each of the 10 000 tokens. The tuning text has not all of them.

# %% tags=["nbval-ignore-output"]
counts = torch.bincount(reference.train, minlength=10_000)
unseen = counts == 0
heads = {"AdamW": delta["head.weight"], "SGD": load_checkpoint("head_sgd")["head.weight"]}
part, stable = {}, {}
for name, dW in heads.items():
    part[name] = float(dW[unseen].square().sum() / dW.square().sum())
    stable[name] = lowrank.stable_rank(dW), lowrank.stable_rank(dW[~unseen])
    print(
        f"{name:5}: {part[name]:4.0%} of the energy in the {int(unseen.sum()):,} rows of tokens that never occur; "
        f"stable rank {stable[name][0]:.1f}, on the other rows {stable[name][1]:.1f}"
    )
assert part["AdamW"] > 0.4 and part["SGD"] < 0.1 and stable["AdamW"][0] < 2 and stable["SGD"][0] > 4

# %% [markdown]
# More than half of the head's update sits in rows of tokens that the tuning text *never has*. Under SGD those rows hold
# next to nothing, and the stable rank is several times as high. Same model, same text, same loss function: the "low rank"
# of the head's ΔW is to a good part the optimiser's.
#
# What happens? Softmax pushes the logit of every wrong token down a little at every step, so a token that is never right
# gets a tiny gradient, always of about the same direction. SGD makes a tiny step of a tiny gradient. Adam divides each
# weight's gradient by its usual size, and so takes *full* steps on it. Thousands of rows go down together: one direction.

# %% tags=["nbval-ignore-output"]
figure, both = plots.subplots(1, 2, sharey=True)
for axes, (name, dW) in zip(both, heads.items(), strict=True):
    plots.norm_against_count(axes, counts, {name: dW.norm(dim=1)})
never, always = (heads["AdamW"][rows].norm(dim=1).median() for rows in (unseen, counts >= 1000))
assert never > 2 * always and never > 20 * heads["SGD"][unseen].norm(dim=1).median()
plots.show(
    figure, "Norm of each row of the head's ΔW against how often its token occurs, for AdamW and for SGD."
)

# %% [markdown]
# Each dot is a token. With SGD the rows move the more, the more often their token occurs. With AdamW it is the other way
# round: **the rows that the text never reads moved most.** Are they of any use? Put them back to what they were.

# %% tags=["nbval-ignore-output"]
without = delta | {"head.weight": delta["head.weight"] * ~unseen[:, None]}
kept = (before - loss(add(without))) / (before - after)
print(f"with those rows put back to W_o: {kept:.0%} of the gain")
assert kept > 0.9

# %% [markdown]
# Nothing is lost to speak of. And there is a part of the update that *cannot* do anything: a vector that is added to all
# rows raises all logits by the same amount, and softmax takes it off again. How much of the energy is that?

# %% tags=["nbval-ignore-output"]
common, often = {}, {}
for name, dW in heads.items():
    common[name] = float(len(dW) * dW.mean(dim=0).square().sum() / dW.square().sum())
    rows = dW[counts >= 10]
    often[name] = lowrank.stable_rank(rows - rows.mean(dim=0))
    print(
        f"{name:5}: {common[name]:4.0%} of the energy is one vector added to every row; stable rank of the rows of "
        f"tokens that occur 10 times or more, without their mean: {often[name]:.1f}"
    )
unmoved = loss(add(delta | {"head.weight": heads["AdamW"] - heads["AdamW"].mean(dim=0)}))
assert abs(unmoved - after) < 1e-3 and 0.4 < common["AdamW"] < 0.5 and common["SGD"] < 1e-6
assert 6 < often["SGD"] < 10 and 6 < often["AdamW"] < 10

# %% [markdown]
# 45 % of what AdamW did to the head does nothing whatever: take it out and the loss is the same to the third decimal.
# Under SGD there is no such part, and there can be none: the gradient of row *t* is (*p_t* − *y_t*) times the hidden
# state, and over all rows *p* − *y* sums to zero. Adam rescales entry by entry, and the zero is lost.
#
# Once both are out of the way, the two optimisers agree on the rank of the head's update: a stable rank of about 8.
# The slider drops the rows of tokens that occur fewer than *n* times.

# %% tags=["nbval-ignore-output"]
assert float(heads["AdamW"][counts < 10].square().sum() / heads["AdamW"].square().sum()) > 0.6
explore.rare_rows(heads, counts)

# %% [markdown]
# **A spectrum concentrated in one direction may be a fact about the optimiser.** Look at row norms against counts before
# you explain one.

# %% [markdown]
# ## 7 · The planted rank
#
# Here is a case where the right answer is known. Take the base and add to one matrix an update of rank 2, half as large
# as the matrix itself. Call the result the teacher. Then tune the *base* towards the teacher (its next-token
# probabilities on code; the loss is the KL divergence, the mean of ln(teacher's / student's probability) under the
# teacher, 0 where they agree), with all six matrices of that block free and nothing said about rank.
#
# **Predict**: of what rank is the update that tuning finds in the planted matrix, and will its spectrum show the 2?

# %%
planted = load_checkpoint("planted")
name = "blocks.3.mlp.up.weight"
goal, found = planted["planted"], planted[name]
S = torch.linalg.svdvals(found)
print(
    f"planted: rank {lowrank.numerical_rank(goal, 0.01)}, ‖planted‖/‖W_o‖ = {goal.norm() / base[name].norm():.2f}"
)
print(
    f"found:   rank {lowrank.numerical_rank(found)}, {lowrank.rank_for_energy(S, 0.9)} for 90 % of its energy, "
    f"‖found‖ = {found.norm() / goal.norm():.2f} ‖planted‖"
)
print("singular values:", "  ".join(f"{s:.1f}" for s in S[:6]), "…")

# %% [markdown]
# Rank 100 again, as always. But look at the singular values: two, then a cliff. Nobody told the optimiser, and the 2 is
# there to be read. The two directions are the planted ones, up to a few per cent:

# %%
right = lowrank.subspace_similarity(found, goal, 2, 2)
left = lowrank.subspace_similarity(found, goal, 2, 2, side="left")
print(f"overlap with the planted directions: {right:.2f} of the inputs, {left:.2f} of the outputs")
assert lowrank.rank_for_energy(S, 0.9) == 2 and S[1] > 8 * S[2] and min(right, left) > 0.9

# %% [markdown]
# Now the behaviour. How far from the teacher is the tuned model (in KL divergence) when its update is cut to rank *r*:
# in the planted matrix alone, and in all six that were free to move?

# %% tags=["nbval-ignore-output"]
text = code.test[: 8 * 256].view(8, 256)
with torch.no_grad():
    aim = TinyLM.from_state_dict(add({name: goal}))(text).log_softmax(-1)


@torch.no_grad()
def distance(update):
    guess = TinyLM.from_state_dict(add(update))(text).log_softmax(-1)
    return F.kl_div(guess, aim, log_target=True, reduction="none").sum(-1).mean().item()


student = {n: dW for n, dW in planted.items() if n != "planted"}
far, near = distance({}), distance(student)
print(f"KL from the teacher: base {far:.3f}, tuned {near:.4f}")
one, six = {}, {}
for r in (1, 2, 4, 16, 64):
    one[r] = 1 - distance({name: lowrank.truncate(found, r)}) / far
    six[r] = 1 - distance(cut(student, r)) / far
    print(
        f"r = {r:2}: {one[r]:.0%} of the way with the planted matrix alone, {six[r]:.0%} with all six cut to r"
    )
assert one[1] < 0.75 and 0.85 < one[2] and six[2] > 0.85 and six[64] - six[2] < 0.1 and near < 0.1 * far

# %% [markdown]
# Rank 1 is not enough, rank 2 is, and the 62 directions after it add a few per cent. So when an update of low rank *is*
# the answer, full tuning finds it, and both the spectrum and the behaviour show a step at the right place.
#
# Now go back to the slider of section 2 and look for such a step. There is none, in any kind of matrix but the head,
# whose step section 6 explained. And the behaviour in section 3 goes on rising up to rank 64, with no step. **The
# update from code to
# documentation is not a low-rank update with noise on top.** It is of a rank that this model has no room to call low.

# %% [markdown]
# ## 8 · Rounding has full rank
#
# Checkpoints are stored in half precision, so ΔW from two *files* carries the rounding of both. Rounding errors are
# independent from entry to entry: noise, of full rank. Take an update of rank 8 exactly, store both models in three
# formats, subtract, and look.

# **Predict** the rank of the difference (for 90 % of its energy) when ‖ΔW‖/‖W_o‖ is 0.003, in float32, float16 and
# bfloat16.

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
# bfloat16 keeps 8 significant bits of each number. An update of 0.3 % is smaller than most of its steps: many
# weights do not move at
# all, others move too far, and the difference of the files is off by three quarters of ΔW. Its rank is that of the
# rounding. (So would yours be, had you compared a bfloat16 checkpoint before and after a gentle fine-tune.) This is why
# our base was rounded *before* it was tuned, and why ΔW ships instead of W_f.
#
# But the floor can be computed. A rounding error is uniform within half a step of the format at each entry's size, so one
# can draw such noise and take its largest singular value. What stands above that line, rounding did not make. In the
# figure it is dashed; go through sizes and formats, and watch the eight true directions drown.

# %%
floor = lowrank.rounding_floor(W, torch.bfloat16)[0]
difference = (W + update).bfloat16().float() - W.bfloat16().float()
assert int((torch.linalg.svdvals(difference) > 1.05 * floor).sum()) == 8
explore.rounding(W, update)

# %% [markdown]
# ## 9 · Your own two checkpoints
#
# The cell below writes two files and reads them back. Put the paths of your own in their place (safetensors, two
# versions of one model, one layer or all), and the rest of this section is about your model.

# %%
folder = user_folder("chapter_03")
BEFORE, AFTER = folder / "before.safetensors", folder / "after.safetensors"
for path, state in {BEFORE: base, AFTER: tuned}.items():
    write_atomically(path, save({name: W.bfloat16() for name, W in state.items()}))

# %%
old, new = load(BEFORE.read_bytes()), load(AFTER.read_bytes())
print(f"{'':34}{'‖ΔW‖/‖W‖':>9}{'stable':>8}{'90 %':>6}{'above rounding':>16}")
for name, dW in sorted(lowrank.deltas(old, new, matrices_only=True).items())[::5]:
    W, S = old[name].float(), torch.linalg.svdvals(dW)
    floor = lowrank.rounding_floor(W, old[name].dtype)[0]
    row = f"{dW.norm() / W.norm():9.2f}{lowrank.stable_rank(S):8.1f}{lowrank.rank_for_energy(S, 0.9):6}"
    print(f"{name:34}{row}{int((S > floor).sum()):10} of {len(S)}")

# %% [markdown]
# Our tuning was no gentle one (‖ΔW‖/‖W‖ is 0.4), so nearly everything stands above rounding. In a large model that was
# tuned for a short time at a small rate it may be otherwise: read the last column before the others.
#
# For a whole model there is a command, `lora-edu delta BEFORE AFTER`. It reads one tensor at a time, shards and adapters
# too, and marks by itself every figure that rounding could have made.
#
# ## What to remember
#
# - A fully tuned ΔW has full rank. "r = rank(ΔW)" is no recipe.
# - Outside the head its spectrum falls only a little faster than that of the weights themselves: 90 % of the energy
#   takes a third to two thirds
#   of the full rank, and cut to rank 8 the update keeps less than half of its gain, in two seeds alike.
# - So if LoRA at rank 8 works, it is not because full tuning's update *is* of rank 8. A trained rank-8 update is another
#   matrix than the truncated one.
# - Two runs share about half of their strongest directions; their mean is as good as either. The rest is noise
#   of full rank.
# - Where an update of rank 2 is the right answer, full tuning finds one, and the spectrum has a step at 2 (with full rank
#   all the same). The real ΔW has no such step.
# - One strong direction may be the optimiser's (rows nobody reads, a vector common to all rows), and a long flat tail may
#   be the file format's. Look at row norms, and compute the rounding floor.
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
# ΔW cut to rank 4 has 4.10. What share of the gain does rank 4 keep?

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
# **Exercise 4.** What is the stable rank of the head's ΔW (seed 0) on the rows of tokens that *do* occur in the tuning
# text (`reference.train`)?

# %% tags=["exercise"]
stable_rank_of_rows_read = None
print(exercises.check_03_4(stable_rank_of_rows_read))

# %% tags=["solution", "nbval-ignore-output"]
occurs = torch.bincount(reference.train, minlength=10_000) > 0
stable_rank_of_rows_read = lowrank.stable_rank(delta["head.weight"][occurs])
print(exercises.check_03_4(stable_rank_of_rows_read))
assert exercises.check_03_4(stable_rank_of_rows_read).startswith("Exercise 4: right")

# %% [markdown] tags=["exercise"]
# **Exercise 5.** Compute the amplification factor of ΔW (seed 0) at r = 4 for `blocks.3.mlp.down.weight` from the
# singular vectors, without `lowrank.amplification_factor`.

# %% tags=["exercise"]
amplification = None
print(exercises.check_03_5(amplification))

# %% tags=["solution"]
W, dW = base["blocks.3.mlp.down.weight"], delta["blocks.3.mlp.down.weight"]
U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
amplification = S[:4].norm() / (U[:, :4].T @ W @ Vh[:4].T).norm()
print(exercises.check_03_5(amplification))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA* (arXiv 2106.09685v2): §7.2 and appendix H on subspace similarity, §7.3 on amplification.
# - Aghajanyan et al. 2020 (arXiv 2012.13255): low intrinsic *dimension*, which is not low rank.
# - Roy & Vetterli 2007, *The effective rank*; Rudelson & Vershynin 2007 for the stable rank.
# - Biderman et al. 2024, *LoRA Learns Less and Forgets Less*: the spectra of full tuning's ΔW in models of 7 billion
#   parameters.
