# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 10 · Serving adapters
#
# An adapter is trained. What can be done with it, and what does each of these things lose? Here we take an adapter out of
# a full fine-tune, look at what it makes of its rank, cut it, merge it into coarse weights, add it to another adapter and
# subtract it, and at last serve several of them in one batch.
#
# **Afterwards you can** say what lies in an adapter's file; extract an adapter from a full fine-tune, and say why 'it keeps
# most of the energy' does not decide; see which rank a trained adapter uses, and cut it; say when 'train high, then cut'
# is a good idea; merge into bfloat16 without losing a small update; add, average and negate adapters, and say where that
# breaks; serve a batch whose rows use different adapters.
#
# **You should know** chapters 03 (the gain, truncation), 05 ($A$, $B$, $s$, merging one layer) and 07 (trained against
# truncated rank). **Time:** 60 minutes to read, one to run.

# %% tags=["setup"]
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lora_edu import explore, lowrank, plots
from lora_edu.data import (
    adapter_folder,
    load_base_losses,
    load_checkpoint,
    load_corpus,
    load_mixtures,
    load_sweeps,
)
from lora_edu.exercises import chapter_10 as exercises
from lora_edu.lora import AdapterPool, choose_ranks, extract_lora, load_adapter, mix, read_adapter, resize
from lora_edu.paths import user_folder
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

# %% tags=["setup"]
base = load_checkpoint("base")
mean = lambda values: sum(values) / len(values)


def held_out(text, count=8):
    """Windows of 257 tokens of a text's test split, evenly spread: (count, 257)."""
    tokens = load_corpus(text).test
    starts = torch.linspace(0, len(tokens) - 257, count).long()
    return tokens[starts[:, None] + torch.arange(257)]


WINDOWS = {"docstrings": held_out("reference"), "manual": held_out("manual"), "code": held_out("code")}


def loss(update, text="docstrings", weights=base, count=8):
    """Nats a token on held-out windows, with ΔW (name of a weight → matrix) added to the weights."""
    model = TinyLM.from_state_dict({name: W + update.get(name, 0) for name, W in weights.items()})
    return mean([evaluate(model, window) for window in WINDOWS[text][:count]])


def updates(layers):
    """Layer → factors, as an adapter holds them, to name of the weight → ΔW."""
    return {f"{name}.weight": factors.delta_weight() for name, factors in layers.items()}


# %% [markdown]
# Losses in this chapter are on eight windows of 256 tokens, so that everything runs in a minute. That is enough to compare
# two updates *on the same windows*; do not compare these losses with those of other chapters.
#
# ## 1 · What is on disk
#
# An adapter in PEFT's format is a folder with two files: `adapter_config.json` says $r$, alpha and the names of the
# layers, `adapter_model.safetensors` holds the factors. The second begins with eight bytes, the length of a header in
# JSON; then the header, which names each tensor; then the numbers, and nothing else.

# %%
explore.predict(
    "The adapter of rank 8 on every matrix has 9 % as many numbers as the model. How large is its file, against the "
    "base's?",
    {
        "a ten-thousandth": "That is the figure in the LoRA paper, for GPT-3: width 12 288, r = 4, two matrices a layer. "
        "The share of an adapter falls with the width (chapter 04), and this model is 100 wide.",
        "about 9 %": "Yes. Both files hold half-precision numbers and a header of a few kilobytes.",
        "about 18 %": "It would be, if the adapter were stored in float32 beside a base in half precision. Look at the "
        "dtype in the header.",
    },
)

# %%
folder = adapter_folder("reference_r8")
content = (folder / "adapter_model.safetensors").read_bytes()
length = int.from_bytes(content[:8], "little")
header = json.loads(content[8 : 8 + length])
for name in [name for name in header if "embedding" in name or "blocks.0.attention.query" in name]:
    print(name, header[name]["dtype"], header[name]["shape"])
config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
print({key: config[key] for key in ("peft_type", "r", "lora_alpha", "use_rslora")})
numbers = sum(torch.Size(each["shape"]).numel() for name, each in header.items() if name != "__metadata__")
assert numbers == 248_000 and len(content) == 8 + length + 2 * numbers

# %%
of_base = 2 * sum(W.numel() for W in base.values())
print(f"base: {of_base:,} bytes of numbers")
for rank in (1, 2, 4, 8, 16):
    size = (adapter_folder(f"reference_r{rank}") / "adapter_model.safetensors").stat().st_size
    print(f"r = {rank:2}: {size:9,} bytes, {size / of_base:.1%} of that; 2 · 31 000 r = {62_000 * rank:,}")
    assert 62_000 * rank < size < 62_000 * rank + 10_000
assert 0.09 < 504_872 / of_base < 0.095

# %% [markdown]
# One direction costs $\sum (m + n)$ numbers over all matrices, here 31 000. The file holds names, shapes and numbers,
# and no code, so that any program can open it. PEFT computes the same with it:

# %% tags=["nbval-ignore-output"]
from peft import PeftModel

tokens = WINDOWS["docstrings"][:2, :-1]
with torch.no_grad():
    in_peft = PeftModel.from_pretrained(TinyLM.from_state_dict(base), folder).eval()(tokens)
    in_ours = load_adapter(TinyLM.from_state_dict(base), folder).eval()(tokens)
    without = TinyLM.from_state_dict(base).eval()(tokens)
print(f"PEFT and lora_edu: logits at most {(in_peft - in_ours).abs().max():.1e} apart")
assert (in_peft - in_ours).abs().max() < 1e-4 < 1 < (in_ours - without).abs().max()

# %% [markdown]
# ## 2 · An adapter out of a full fine-tune
#
# Somebody has tuned all weights, and you have both checkpoints. $\Delta W = W_f - W_o$ of each matrix is cut to rank $r$
# (Eckart and Young, chapter 01) and split into two factors. Each gets a root of the singular values, so that neither is
# much larger than the other:
#
# $$B = U_r \sqrt{\Sigma_r}, \qquad A = \sqrt{\Sigma_r}\, V_r^\top, \qquad \alpha = r, \text{ so that } s = 1$$


# %% tags=["nbval-ignore-output"]
def extract(before, after, rank):
    """Name of a matrix → (B, A) with B A nearest to ΔW = after − before."""
    factors = {}
    for name, W in before.items():
        if W.dim() == 2:
            U, S, Vh = lowrank.svd(after[name] - W)
            root = S[:rank].sqrt()
            factors[name] = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return factors


change = load_checkpoint("reference_seed_0")  # chapter 03's full tuning on docstrings
tuned = {name: W + change[name] for name, W in base.items()}
package = extract_lora(base, tuned, rank=8)
theirs, worse = updates(package.layers), []
for name, (B, A) in extract(base, tuned, 8).items():
    best, other = ((change[name] - product).norm() for product in (B @ A, theirs[name]))
    worse.append(float(other / best) - 1)
print(
    f"{len(worse)} matrices; the package's error is at most {max(worse):.1%} above the smallest one possible"
)
print("left out:", len(package.left), "tensors, each", *set(package.left.values()))
assert (
    len(worse) == len(theirs) == 38 and -1e-4 < min(worse) and max(worse) < 0.01 and len(package.left) == 62
)

# %% [markdown]
# The package takes a randomised SVD (chapter 01), which is fast and nearly as good. The 62 vectors, biases and norms, have no
# rank: `extract_lora` names them, and `lora-edu extract --keep-whole` stores them beside the factors.
#
# ### Which rank for which matrix?
#
# One rank everywhere is a choice, too. With the same number of parameters one could take each direction where it keeps the
# most: the next direction goes to the matrix with the largest $\sigma^2 / (m + n)$, energy for each number stored, until
# the budget is spent. No other ranks keep more of $\lVert \Delta W \rVert^2$ over all matrices together.

# %%
explore.predict(
    "Two adapters out of the same ΔW, 248 000 numbers each: rank 8 everywhere, or the budget spent where it keeps the most "
    "energy. Which one has the lower loss?",
    {
        "the one that keeps more energy": "It sounds like a theorem, and for the energy it is one. The loss does not know "
        "of the theorem. Look at the right panel below, at every budget.",
        "rank 8 everywhere": "Yes, here at every budget below 64, though it keeps less energy. Look at which matrices the "
        "other rule takes its directions from.",
        "no difference": "There is one: at r = 8 a tenth of the gain. See the solid lines below.",
    },
)

# %% tags=["nbval-ignore-output"]
spectra = {name: lowrank.svd(dW) for name, dW in change.items() if dW.dim() == 2}
sides = {name: tuple(change[name].shape) for name in spectra}
values = {name: S for name, (_, S, _) in spectra.items()}
whole = sum(float(S.square().sum()) for S in values.values())
budgets = [4, 8, 16, 32, 64]
rules = {
    "one rank": lambda r: choose_ranks(values, sides, rank=r),
    "most energy": lambda r: choose_ranks(values, sides, parameters=31_000 * r),
}
before, after = loss({}), loss({name: change[name] for name in spectra})
ranks, energy, gain = ({rule: {} for rule in rules} for _ in range(3))
for rule, choose in rules.items():
    for budget in budgets:
        chosen = choose(budget)
        cut = {n: (U[:, : chosen[n]] * S[: chosen[n]]) @ Vh[: chosen[n]] for n, (U, S, Vh) in spectra.items()}
        kinds = ranks[rule].setdefault(budget, {})
        for name, rank in chosen.items():
            kinds.setdefault(name.split(".")[-2], []).append(rank)
        energy[rule][budget] = sum(float(values[n][:r].square().sum()) for n, r in chosen.items()) / whole
        gain[rule][budget] = (before - loss(cut)) / (before - after)
assert all(energy["most energy"][r] > energy["one rank"][r] for r in budgets)
assert all(gain["most energy"][r] < gain["one rank"][r] for r in budgets[:-1])
explore.spent_by_rule(ranks, energy, gain)

# %% [markdown]
# **More energy, less gain**, at every budget but the largest. The rule takes directions from `output`, `value` and
# `down`, whose updates have small singular values, and gives them to `query` and to most of `up`. Small in norm is not
# unimportant: what a matrix does to the loss depends on what comes in and on what follows. (TinyLM, one tuning at a large
# rate; with a gentle one, below, the same with a smaller gap.) So treat energy as what it is, a figure that costs nothing, and ask a
# held-out text before you ship: `lora-edu extract … --parameters N --text held-out.txt` prints the loss beside each rank.

# %% tags=["nbval-ignore-output"]
few, many = (mean(ranks["most energy"][8][kind]) for kind in ("output", "query"))
print(f"at r = 8 the rule gives output {few:.1f} on average and query {many:.1f}")
print(f"gain kept: {gain['one rank'][8]:.0%} against {gain['most energy'][8]:.0%}")
assert few < 4 < 8 < many and gain["one rank"][8] > gain["most energy"][8] + 0.03
at_8 = updates(read_adapter(adapter_folder("reference_r8")).layers)
trained = (before - loss(at_8)) / (before - after)
print(f"an adapter trained at r = 8, with two fifths of the tokens: {trained:.0%} of the same gain")
assert trained > gain["one rank"][8] + 0.3

# %% tags=["nbval-ignore-output"]
gentle = {name: dW for name, dW in load_checkpoint("gentle").items() if dW.dim() == 2}
svds = {name: lowrank.svd(dW) for name, dW in gentle.items()}
for rule, how in {"one rank": {"rank": 8}, "most energy": {"parameters": 248_000}}.items():
    chosen = choose_ranks({name: S for name, (_, S, _) in svds.items()}, sides, **how)
    cut = {n: (U[:, : chosen[n]] * S[: chosen[n]]) @ Vh[: chosen[n]] for n, (U, S, Vh) in svds.items()}
    gain[f"{rule}, gentle"] = (before - loss(cut)) / (before - loss(gentle))
    print(f"the gentle tuning, {rule}: {gain[f'{rule}, gentle']:.1%} of its gain")
assert gain["most energy, gentle"] < gain["one rank, gentle"] - 0.005

# %% [markdown]
# Chapter 07's lesson stands beside it: an adapter trained at $r = 8$ has nearly twice the gain of the extracted one, from two fifths
# of the tokens. Extract when all you have is the two checkpoints; train when you can.
#
# ## 3 · Which rank does a trained adapter use?
#
# The spectrum of $\Delta W = s B A$ does not need $\Delta W$. With $B = Q_B R_B$ and $A^\top = Q_A R_A$ the singular values of
# $B A$ are those of $R_B R_A^\top$, which is $r \times r$: $Q_B$ and $Q_A$ only turn.


# %%
def spectrum(B, A, s):
    """Singular values of s · B A, largest first, from two thin QR decompositions and an r × r matrix."""
    return s * torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)


adapter = read_adapter(adapter_folder("reference_r16"))
factors = adapter.layers["blocks.3.mlp.up"]
B, A = factors.lora_B.double(), factors.lora_A.double()
found = spectrum(B, A, factors.scaling)
slow = torch.linalg.svdvals(factors.scaling * B @ A)
print(f"{found.numel()} values, as many as r; the other {slow.numel() - 16} of ΔW are zero")
assert torch.allclose(found, slow[:16]) and slow[16:].max() < 1e-9 * slow[0]

# %%
explore.predict(
    "An adapter trained at r = 16. In how many of its 16 directions does 90 % of its energy stand, as a rule?",
    {
        "1 or 2": "The head comes near to that, with a stable rank of 1.4. In the blocks the first direction is strong, but "
        "by far not alone.",
        "about half": "Yes: 4 to 11 in the blocks. The embedding takes 13, the head 10.",
        "all 16": "Then all directions would be about equally strong, and the adapter would be asking for a higher rank.",
    },
)

# %% tags=["nbval-ignore-output"]
from lora_edu.adapters.usage import recommendation, uses_of

uses = uses_of(adapter)
print("of r = 16:   90 % of the energy      stable rank   above noise")
kinds = {}
for name, used in uses.items():
    kinds.setdefault(name.rpartition(".")[2], []).append(used)
for kind, layers in kinds.items():
    ninety, above = ([getattr(each, key) for each in layers] for key in ("rank_90", "above"))
    stable = mean([each.stable_rank for each in layers])
    print(f"{kind:12} {str(ninety):26}{stable:7.1f}      {above}")
print("lora-edu inspect says:", *recommendation(uses))
blocks = [each.rank_90 for name, each in uses.items() if name.startswith("blocks")]
assert (
    min(blocks) >= 4
    and max(blocks) <= 11
    and uses["head"].rank_90 == 10
    and recommendation(uses)[0] == "keep"
)
assert max(each.above for each in uses.values()) <= 2 and uses["embedding"].above == 0

# %% [markdown]
# **What to make of it.** Half of the directions hold nine tenths of the energy, in every kind of matrix but the embedding
# and the head. 'Above noise' counts the directions that are stronger than any in a random product of the same shape, rank
# and norm: one or two. It does not follow that the other fourteen are noise. A random product of rank 16 is nearly flat, so
# this test only finds directions that stand out. What a direction is worth, only a cut tells: section 4.
#
# `lora-edu inspect ADAPTER` prints this for any adapter, and says 'keep' here: 99 % of the energy takes nearly all of the
# parameters.

# %% [markdown]
# ## 4 · Resize
#
# The server takes rank 8, the adapter has 16. The best rank 8 in the Frobenius norm comes from the same small matrix, whose
# SVD is $U \Sigma V^\top$: $B' = Q_B U_8 \sqrt{\Sigma_8}$ and $A' = \sqrt{\Sigma_8}\, V_8^\top Q_A^\top$. That $s$ stays is
# easy to forget: $\alpha$ has to fall with $r$.


# %%
def shrink(B, A, alpha, rank):
    """(B, A, alpha) of a lower rank with the same s = alpha / r, nearest to B A."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = S[:rank].sqrt()
    return Q_B @ U[:, :rank] * root, root[:, None] * (Vh[:rank] @ Q_A.T), alpha * rank / A.shape[0]


small_B, small_A, alpha = shrink(B, A, factors.alpha, 8)
small = alpha / 8 * small_B @ small_A
print("alpha:", factors.alpha, "→", alpha)
theirs = resize({"up": factors}, rank=8)["up"].delta_weight()
assert torch.allclose(small, lowrank.truncate(factors.scaling * B @ A, 8))
assert torch.allclose(small.float(), theirs, atol=2e-3 * float(theirs.abs().max()))

# %% tags=["nbval-ignore-output"]
full_16 = loss(updates(adapter.layers))
ways = {
    "rank 8 in each matrix": {"rank": 8},
    "90 % of the energy in each": {"energy": 0.9},
    "99 % of the energy in each": {"energy": 0.99},
    "one budget, as large as rank 8": {"parameters": 248_000},
}
kept = {}
for way, rule in ways.items():
    smaller = resize(adapter, **rule)
    numbers = sum(each.lora_A.numel() + each.lora_B.numel() for each in smaller.values())
    kept[way] = (before - loss(updates(smaller))) / (before - full_16)
    print(f"{way:32} {numbers:9,} numbers of 496,000, {kept[way]:.0%} of the gain")
assert kept["99 % of the energy in each"] > 0.98 and 0.87 < kept["90 % of the energy in each"] < 0.96
assert 0.8 < kept["rank 8 in each matrix"] < 0.92
assert kept["one budget, as large as rank 8"] < kept["rank 8 in each matrix"] - 0.08

# %% [markdown]
# Again the budget that keeps the most energy keeps less of the gain than one rank for all. And nine tenths of the energy in
# each matrix is nine tenths of the gain, here. (No rule: in the published
# fine-tune of chapter 03, 43 % of the energy carries nine decisions of ten.)
#
# ### Train high, then cut?
#
# One could train at a high rank, where training is easier, and cut afterwards. Here is each of the shipped adapters cut to half
# of its rank, beside the one that was trained there, each at the rate tuned for its rank:

# %% tags=["nbval-ignore-output"]
shipped = {rank: read_adapter(adapter_folder(f"reference_r{rank}")) for rank in (1, 2, 4, 8, 16)}
at_rank = {rank: before - loss(updates(each.layers)) for rank, each in shipped.items()}
for rank in (16, 8, 4, 2):
    in_half = before - loss(updates(resize(shipped[rank], rank=rank // 2)))
    cut, trained = in_half / at_rank[rank], at_rank[rank // 2] / at_rank[rank]
    print(f"of the gain of r = {rank:2}: cut to {rank // 2} {cut:.0%}, trained at {rank // 2} {trained:.0%}")
    assert cut < 0.9 and trained > 0.86 and cut < trained - 0.05

# %% [markdown]
# Training low wins at each halving (TinyLM, one seed). PEFT's published table (MetaMathQA, Llama-3.2-3B, one seed each) has a
# case the other way round: an rsLoRA run of $r = 64$ answers 52.9 % of the questions, 51.5 % when it is cut to 32, and a
# LoRA run trained at $r = 32$ 48.2 %.

# %%
explore.predict(
    "The published pair: rsLoRA at r = 64, cut to 32, against LoRA trained at r = 32; alpha is 64 in both. In what do the two "
    "runs differ, beside the rank?",
    {
        "in nothing": "alpha is the same, but rsLoRA divides it by √r and LoRA by r. Work out s for both.",
        "in the learning rate of B": "In effect, yes: s is 64 / √64 = 8 in one and 64 / 32 = 2 in the other, and a larger s is a "
        "larger learning rate for B (chapter 05).",
        "in the number of steps": "The runs of the benchmark have 5 000 each. Work out s for both.",
    },
)

# %% [markdown]
# So the pair does not tell the rank from the rate. (In the same table plain LoRA of $r = 64$, with $s = 2$ and nothing cut, has
# 47.4 %: no more than $r = 32$.) Recorded runs can: LoRA of $r = 64$ at several rates, each cut to every rank, beside LoRA
# trained at that rank, once at the *same* rate and once at the rate that is best for it (searched at 1, 8 and 64, and
# interpolated between, as in chapter 07). 200 steps of 8 × 256 tokens, $s = 1$, seed 0, every matrix; the losses are on the
# whole test text.

# %%
rows = [
    row
    for row in load_sweeps(method="lora", text="reference", targets="all", scale=1.0, steps=200, seed=0)
    if isinstance(row["rank"], int) and row["embedding"] < 1 and row["test"] is not None
]
untuned = load_base_losses()["reference"]["test"]
high, low, on_validation = {}, {}, {}
for row in sorted(rows, key=lambda row: (-row["rank"], row["rate"])):
    low.setdefault(row["rank"], {})[row["rate"]] = row["test"]
    on_validation.setdefault(row["rank"], {})[row["rate"]] = row["evaluations"][-1]["loss"]
    if "truncated" in row:
        cuts = {int(k): value for k, value in row["truncated"].items() if k.isdigit()}
        high[row["rank"], row["rate"]] = {k: value for k, value in cuts.items() if 0 < k <= row["rank"]}
best = {rank: min(losses, key=losses.get) for rank, losses in on_validation.items()}
explore.high_then_cut(high, low, untuned, best)

# %%
print("loss of the cut minus loss of the trained one; above 0, training low is better")
for (rank, rate), cuts in high.items():
    same = {k: cuts[k] - low[k][rate] for k in sorted(cuts) if k < rank and rate in low[k]}
    tuned = {k: cuts[k] - low[k][best[k]] for k in sorted(cuts) if k < rank}
    print(f"r = {rank:2} at {rate:g}, {low[rank][rate]:.2f} uncut")
    for name, found in {"trained at the same rate": same, "trained at its best rate": tuned}.items():
        print(
            f"    {name}:", "  ".join(f"k = {k} {nats:+.2f}" for k, nats in found.items()) or "none recorded"
        )
    assert abs(cuts[rank] - low[rank][rate]) < 0.03 and cuts[1] > cuts[8] > cuts[rank]

# %%
print("the rate of r = 64 that is best for each cut, beside training at k at its best rate")
for k in (1, 2, 4, 8, 16, 32):
    at_rate = {rate: cuts[k] for (rank, rate), cuts in high.items() if rank == 64}
    rate = min(at_rate, key=at_rate.get)
    print(f"k = {k:2}: cut {at_rate[rate]:.2f} at {rate:g}; trained {low[k][best[k]]:.2f} at {best[k]:g}")
    gap = at_rate[rate] - low[k][best[k]]
    assert gap > 0.05 if k <= 16 else abs(gap) < 0.05

# %% [markdown]
# **With each rank at its own best rate, training low wins**, by more the deeper the cut, and even against the rate that is best
# for the cut. (That one is chosen on the very text that it is judged on, a favour to the cut.) At half of the rank, from 64 to
# 32, the two are close, within 0.05 nats.
#
# **At one common rate the order turns.** At 0.003, trained at $r = 8$ is still ahead of the cut to 8, by 0.08 nats. But cut to
# 16 the run of $r = 64$ has 4.26 nats, and $r = 16$ trained at that rate 4.32; at 32 it is 4.09 against 4.17. This rate is half
# of the best for $r = 64$, and an eighth to a third of the best for the lower ranks: they have not got far, and the cut of the
# large one has. So 'train high, then cut' to a half or a quarter wins beside a low rank whose rate is too small for it, and not
# beside one with a rate of its own. The published pair shares what makes the order turn, a low rank with a smaller step; whether
# that is the reason there, these runs can't tell. Before you believe such a pair, ask at which rate each of the two was trained.
# (TinyLM, 200 steps on docstrings, one seed. For the cuts to 8 and below the smallest of the three rates is the best, so a
# gentler run may be cut a little better still.)

# %%
cuts = high[64, 0.003]
turns = {k: (cuts[k], low[k][0.003], low[k][best[k]]) for k in (8, 16, 32)}
for k, (cut, same, own) in turns.items():
    print(
        f"r = 64 at 0.003, cut to {k}: {cut:.2f}; trained at {k} at 0.003 {same:.2f}, at {best[k]:g} {own:.2f}"
    )
assert 0.06 < turns[8][0] - turns[8][1] < 0.1 and turns[8][0] > turns[8][2] + 0.27
assert all(same - cut > 0.04 for cut, same, _ in (turns[16], turns[32]))
assert best == {1: 0.048, 2: 0.038, 4: 0.03, 8: 0.024, 16: 0.015, 32: 0.0095, 64: 0.006}
for (_, rate), cuts in high.items():
    assert all(cuts[k] > low[k][rate] + 0.05 for k in (1, 2, 4, 8) if rate in low[k])
    assert all(cuts[k] > low[k][best[k]] + 0.05 for k in (1, 2, 4, 8, 16))

# %% [markdown]
# ## 5 · Merge, and what bfloat16 swallows
#
# A merged model needs no LoRA code and costs nothing more per token. Chapter 05 merged one layer exactly and back. Here is
# the whole model in bfloat16, as most models are stored: 8 significant bits, so that the next number is
# 0.4 to 0.8 % away. Rounding to the nearest number is what every merge does. The other way is to round up or down
# *by chance*, with chances such that it is right on average: **stochastic rounding**. bfloat16 is the upper half of a
# float32, so it takes one line: add random bits to the lower half, and cut it off.


# %%
def rounded(numbers, generator=None):
    """float32 → bfloat16: to the nearest, or with a generator by chance, right on average."""
    if generator is None:
        return numbers.to(torch.bfloat16)
    noise = torch.randint(0, 2**16, numbers.shape, generator=generator, dtype=torch.int32)
    return ((numbers.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


x = torch.tensor([1.0 + 0.001, -0.3, 1e-20])
draws = rounded(x.repeat(20_000, 1), torch.Generator().manual_seed(0)).double()
print("to the nearest:", rounded(x).tolist())
print("by chance, mean of 20 000:", [f"{each:.4g}" for each in draws.mean(0)])
gap = x.abs() / 128  # the distance between neighbours is no larger
assert (draws.mean(0) - x).abs().le(0.02 * gap).all() and (draws - x).abs().lt(2 * gap).all()
assert rounded(x)[0] == 1 and 0.1 < (draws[:, 0] > 1).double().mean() < 0.16

# %% [markdown]
# We merge the adapter of rank 8 times $w$, for smaller and smaller $w$, and ask two things: how large is the error of the
# merge against $\lVert \Delta W \rVert$, and how much of the gain of $w\,\Delta W$ is left.

# %%
explore.predict(
    "Stochastic rounding of a very small update makes an error larger than the update itself. How much of the update's "
    "gain is left?",
    {
        "nothing": "An error of the size of ΔW, or three times that, looks like ruin. But it points nowhere: the entries' "
        "errors have mean zero. Move the slider to the smallest size.",
        "half": "That is nearer to what rounding to the nearest leaves, whose error has a part that points against ΔW.",
        "nearly all of it": "Yes. In the sum over millions of weights the errors cancel, and ΔW does not.",
    },
)

# %%
half = {name: W.to(torch.bfloat16) for name, W in base.items()}
stored = {name: W.float() for name, W in half.items()}  # the base as bfloat16 has it


def merged(update, generator=None):
    """(what merging into bfloat16 really changes, its error in norm, as a share of ‖ΔW‖)."""
    changed = {n: rounded(stored[n] + dW, generator).float() - stored[n] for n, dW in update.items()}
    error = sum(float((changed[n] - dW).square().sum()) for n, dW in update.items())
    return changed, (error / sum(float(dW.square().sum()) for dW in update.values())) ** 0.5


# %% tags=["nbval-ignore-output"]
one = lambda update: loss(update, weights=stored, count=4)
at_start, of_W = one({}), sum(float(stored[name].square().sum()) for name in at_8) ** 0.5
swallowed, left = ({"to the nearest": {}, "by chance": {}} for _ in range(2))
for w in (1, 0.1, 0.03, 0.01, 0.003, 0.001):
    small = {name: w * dW for name, dW in at_8.items()}
    size = sum(float(dW.square().sum()) for dW in small.values()) ** 0.5 / of_W
    gained = at_start - one(small)
    for way in swallowed:
        by_chance = torch.Generator().manual_seed(0) if way == "by chance" else None
        changed, swallowed[way][size] = merged(small, by_chance)
        left[way][size] = (at_start - one(changed)) / gained
smallest, largest = min(swallowed["by chance"]), max(swallowed["by chance"])
assert swallowed["by chance"][smallest] > 1 > swallowed["to the nearest"][smallest] > 0.7
assert left["to the nearest"][smallest] < 0.6 and 0.85 < left["by chance"][smallest] < 1.15
assert swallowed["to the nearest"][largest] < 0.01 and abs(left["to the nearest"][largest] - 1) < 0.01
explore.rounded_away(swallowed, left)

# %% [markdown]
# **What came out.** Three things.
#
# - An update of the size of ours (half of $\lVert W \rVert$) merges without loss, and so does a tenth of it.
# - What is swallowed in norm is not lost in behaviour: where a quarter of $\Delta W$ is swallowed, nearly all of the gain is
#   left. Rounding that is sometimes up and sometimes down is noise, and noise in many weights averages out.
# - Below a five-hundredth it is no longer noise: most entries do not move at all, the update *shrinks*, and the gain with
#   it. By chance, nothing shrinks, though the error is larger than $\Delta W$.
#
# So the number to look at is not the error but how much of $\Delta W$ is there *along* $\Delta W$:
# $\langle \text{merged} - W, \Delta W \rangle / \lVert \Delta W \rVert^2$. `lora-edu merge BASE ADAPTER:WEIGHT OUT` measures
# both; `--stochastic` rounds by chance, and `--keep-float32` leaves the matrices that would lose more than a tenth in float32,
# at twice their bytes.

# %% tags=["nbval-ignore-output"]
small = {name: 0.001 * dW for name, dW in at_8.items()}
inner = lambda a, b: sum(float((a[name] * b[name]).sum()) for name in b)
along = {}
for way, by_chance in (("to the nearest", None), ("by chance", torch.Generator().manual_seed(0))):
    changed, error = merged(small, by_chance)
    along[way] = inner(changed, small) / inner(small, small)
    still = mean([float((dW == 0).float().mean()) for dW in changed.values()])
    print(
        f"{way:15} error {error:.2f} ‖ΔW‖, along ΔW {along[way]:.2f}, {still:.0%} of the entries do not move"
    )
    assert still > 0.6 or way == "by chance"
assert along["to the nearest"] < 0.7 and 0.95 < along["by chance"] < 1.05
(quarter,) = (size for size, error in swallowed["to the nearest"].items() if 0.2 < error < 0.35)
assert left["to the nearest"][quarter] > 0.92

# %% tags=["nbval-ignore-output"]
from lora_edu.adapters.merge import Options, merge  # what the command calls

with tempfile.TemporaryDirectory(dir=user_folder("chapter_10"), ignore_cleanup_errors=True) as place:
    file = Path(place) / "base.safetensors"
    save_file(half, file)
    for option, how in {
        "": Options(),
        "--stochastic": Options(stochastic=0),
        "--keep-float32": Options(keep_float32=0.1),
    }.items():
        report = merge(file, [(folder, 0.003)], Path(place) / f"merged{option}", how)
        error, along = (
            mean([getattr(each, key) for each in report.tensors.values()]) for key in ("swallowed", "kept")
        )
        print(
            f"reference_r8:0.003 {option:15} {report.bytes:10,} bytes, error {error:.2f}, along ΔW {along:.2f}"
        )
        assert along < 0.8 if option == "" else abs(along - 1) < 0.02

# %% [markdown]
# ### A hundred small merges
#
# One update of a thousandth is rare. A hundred of them are not: whoever keeps a model in bfloat16 and merges after every
# stretch of training, or adds an average bit by bit, merges small updates into coarse weights, again and again. We add the
# adapter of rank 8 in a hundred equal pieces.

# %% tags=["nbval-ignore-output"]
ends = {}
for way, by_chance in (("to the nearest", None), ("by chance", torch.Generator().manual_seed(0))):
    weights = dict(half)
    for _ in range(100):
        for name, dW in at_8.items():
            weights[name] = rounded(weights[name].float() + dW / 100, by_chance)
    moved = {name: weights[name].float() - stored[name] for name in at_8}
    ends[way] = (at_start - one(moved)) / (at_start - one(at_8))
    print(f"{way:15} {ends[way]:.1%} of the gain of one merge")
assert ends["by chance"] > 0.98 and 0.85 < ends["to the nearest"] < 0.95

# %% [markdown]
# Each piece is a two-hundredth of $\lVert W \rVert$. Rounded to the nearest, all of them together lose a tenth of the gain that
# one merge keeps whole; by chance, nothing is lost.
#
# ## 6 · Two adapters
#
# $W + w_1 \Delta W_1 + w_2 \Delta W_2$: with an adapter for docstrings and one for the language manual, both trained from the
# same base at $r = 8$, is the sum a model for both? Ilharco et al. (2023) call $\Delta W$ a *task vector* and found, with
# fully tuned models, that adding them adds abilities, that subtracting one makes a model unlearn, and that the weights
# matter.
#
# The sum of two products is one product, of twice the rank: both $B$ side by side, each times $w s$, and both $A$ stacked.


# %%
def mixture(parts):
    """One pair (B, A) with B A = Σ w · s · B_i A_i, from [(B_1, A_1, s_1, w_1), …]: exact, of rank Σ r_i."""
    wide = torch.cat([w * s * B for B, _, s, w in parts], dim=1)
    return wide, torch.cat([A for _, A, _, _ in parts])


docstrings, manual = (read_adapter(adapter_folder(name)) for name in ("reference_r8", "manual_r8"))
pair = [each.layers["blocks.2.mlp.up"] for each in (docstrings, manual)]
weights = 0.7, -0.2
wide_B, wide_A = mixture(
    [(f.lora_B.float(), f.lora_A.float(), f.scaling, w) for f, w in zip(pair, weights, strict=True)]
)
package = mix([(docstrings, 0.7), (manual, -0.2)])["blocks.2.mlp.up"]
by_hand = sum(w * f.delta_weight() for f, w in zip(pair, weights, strict=True))
print("A:", tuple(wide_A.shape), " B:", tuple(wide_B.shape))
assert torch.allclose(wide_B @ wide_A, by_hand, atol=1e-5)
assert torch.allclose(package.delta_weight(), by_hand, atol=1e-5)

# %%
explore.predict(
    "Both adapters at full weight, added. Compared with each adapter alone, how does the sum do on the two texts?",
    {
        "as well as each alone, on both": "It would, if the two updates did not touch. They change the same matrices, and "
        "each was trained without the other.",
        "worse on both, and the half-and-half mixture is better": "Yes. The sum changes the model by more than either "
        "training meant to. Move both sliders from 1 to 0.5.",
        "better on both": "That happens when two adapters have learnt the same thing, as two seeds of one task have, and "
        "are averaged. Added, not even those: see below.",
    },
)

# %%
recorded = load_mixtures()
losses = {
    tuple(row["weights"].values()): dict(zip(WINDOWS, row["losses"].values(), strict=True))
    for row in recorded["rows"]
}
texts = {tuple(row["weights"].values()): row["text"] for row in recorded["rows"]}
steps = (-0.5, 0.0, 0.5, 1.0, 1.5)
grid = [(one, other) for one in steps for other in steps]
explore.two_adapters(
    recorded["prompt"],
    {pair: texts[pair] for pair in grid},
    {pair: losses[pair] for pair in grid},
    ("docstrings", "manual"),
)

# %% [markdown]
# The losses and texts are recorded (a stage of `make data`, on eight windows of each text). One of them, computed here; put in
# weights of your own:

# %% tags=["nbval-ignore-output"]
here = updates(mix([(docstrings, 0.5), (manual, 0.5)]))
now = {text: loss(here, text) for text in WINDOWS}
print("0.5 and 0.5:", {text: f"{value:.2f}" for text, value in now.items()})
assert all(abs(now[text] - losses[0.5, 0.5][text]) < 0.05 for text in ("docstrings", "manual"))

# %%
own = {"docstrings": (1, 0), "manual": (0, 1)}  # text → the weights at which its own adapter is alone


def share(pair, text):
    """What weights bring on a text, as a share of what its own adapter brings alone."""
    return (losses[0, 0][text] - losses[pair][text]) / (losses[0, 0][text] - losses[own[text]][text])


print("weights         share of the own adapter's gain     nats lost on code")
for pair in ((1, 0), (0, 1), (1, 1), (0.5, 0.5), (0.5, 0), (0, 0.5), (0.25, 0.75)):
    shares = "".join(f"  {text} {share(pair, text):5.0%}" for text in own)
    print(f"{pair[0]:4g} and {pair[1]:<4g}{shares}      {losses[pair]['code'] - losses[0, 0]['code']:+.2f}")

# %% [markdown]
# **The sum is worse than its parts.** It keeps 58 % of what the docstrings' adapter brings alone, is *worse than the base* on
# the manual, loses almost two nats on code, and writes rows of colons. **Half of each** keeps three quarters of both gains and
# loses a third of a nat on code. And look at the adapters one by one: half of the docstrings' adapter has 81 % of its gain,
# for a sixth of what the whole one costs on code. Both were trained at full weight; that full weight is best for their own
# text says nothing of the others. A quarter of one and three quarters of the other even does better on the manual than the
# manual's adapter alone, which was trained on only 84 000 tokens. (TinyLM, $r = 8$, one adapter each; the docstrings' was
# trained at a rate nine times as large.)

# %%
cost = lambda pair: losses[pair]["code"] - losses[0, 0]["code"]
assert 0.5 < share((1, 1), "docstrings") < 0.65 and share((1, 1), "manual") < -0.2 and 1.8 < cost((1, 1)) < 2
assert 0.7 < share((0.5, 0.5), "docstrings") < 0.8 and 0.7 < share((0.5, 0.5), "manual") < 0.82
assert 0.3 < cost((0.5, 0.5)) < 0.35 and 5.5 < cost((1, 0)) / cost((0.5, 0)) < 7
assert abs(share((0.5, 0), "docstrings") - 0.81) < 0.01 and share((0.25, 0.75), "manual") > 1
assert 80_000 < len(load_corpus("manual").train) < 90_000

# %% [markdown]
# Is it the *size* of the other update that hurts, or what is in it? The null: the manual's $\Delta W$ with the rows and columns
# of each matrix shuffled, so that its singular values are the same and it says nothing.

# %% tags=["nbval-ignore-output"]
generator = torch.Generator().manual_seed(0)
order = lambda count: torch.randperm(count, generator=generator)
one, other = updates(docstrings.layers), updates(manual.layers)
shuffled = {name: dW[order(dW.shape[0])][:, order(dW.shape[1])] for name, dW in other.items()}
alone = loss(one)
added = loss({name: dW + other[name] for name, dW in one.items()}) - alone
of_noise = loss({name: dW + shuffled[name] for name, dW in one.items()}) - alone
print(
    f"added to the docstrings' adapter, the manual's costs {added:+.2f} nats on docstrings, shuffled {of_noise:+.2f}"
)
cosine = inner(one, other) / (inner(one, one) * inner(other, other)) ** 0.5
print(f"cosine of the two updates: {cosine:.2f}")
assert added > 0.5 and -0.05 < of_noise < 0.3 and abs(cosine) < 0.15

# %% [markdown]
# **It is what is in it.** A shuffled update of the same singular values costs 0.1 to 0.2 nats (three shuffles), the real one
# 0.66. And yet the two updates are nearly at right angles, with a cosine of 0.11. So a small cosine is no promise that two
# adapters leave each other alone; only the loss on both texts is.
#
# ### From one to the other, and further out

# %%
explore.predict(
    "The docstrings' adapter with weight −0.5: the base, minus half of what it would have learnt. What happens on code?",
    {
        "code gets better": "If the adapter has made the model forget code, its opposite might help it remember. It does not "
        "work like that: see the middle panel, left of 0.",
        "nothing": "Ilharco et al. report little loss on other tasks for negated task vectors. Here the middle panel rises to "
        "the left of 0 in all three curves.",
        "code gets worse, too": "Yes, by 0.7 nats. The way back is not the opposite direction: the base is at a minimum for "
        "code, and every way out of it leads up.",
    },
)

# %%
line = sorted(pair for pair in losses if sum(pair) == 1 and 0 <= pair[0] <= 1)
first = sorted(pair for pair in losses if pair[1] == 0)
second = sorted(pair for pair in losses if pair[0] == 0)
figure, axes = plots.subplots(1, 3, size=(7.2, 2.7), sharey=True)
for each, pairs, place, title in (
    (axes[0], line, 0, "docstrings w, manual 1 − w"),
    (axes[1], first, 0, "docstrings × w"),
    (axes[2], second, 1, "manual × w"),
):
    x = [pair[place] for pair in pairs]
    plots.curves(each, {text: (x, [losses[pair][text] for pair in pairs]) for text in WINDOWS}, xlabel="w")
    with plots.style():
        each.set(title=title, ylim=(3.5, 12))
        if each is not axes[0]:
            each.get_legend().remove()
            each.axhline(math.log(10_000), color=plots.GREY, linestyle="--", linewidth=1)
axes[0].set_ylabel("nats a token")
plots.show(
    figure,
    "Between the adapters the losses cross smoothly. Alone, each is best for its text near weight 1; beyond 2 and "
    "below 0 all three losses rise, past the dashed line of a blind guess.",
)

# %% [markdown]
# **Where it breaks.** Between the two adapters nothing breaks: all three losses go smoothly from one to the other, and code is
# lowest in between. Outwards everything does. With weight 2 the docstrings' adapter is no better than the base on its own text,
# with weight 3 it is worse than guessing blindly among 10 000 tokens ($\ln 10\,000 = 9.2$ nats, the dashed line). And
# **subtracting is not unlearning**: with weight −0.5 the loss on docstrings rises by 2 nats, but on the manual by 1.2 and on
# code by 0.7. Ilharco et al. (§3) negate what a model *has* learnt, with a weight chosen on held-out text, and lose little
# elsewhere; this base had never learnt docstrings, so that there is nothing to take away.

# %%
rises = {text: losses[-0.5, 0][text] - losses[0, 0][text] for text in WINDOWS}
print("weight −0.5:", {text: f"{nats:+.1f}" for text, nats in rises.items()})
assert 1.8 < rises["docstrings"] < 2.1 and 1 < rises["manual"] < 1.3 and 0.6 < rises["code"] < 0.8
assert abs(losses[2, 0]["docstrings"] - losses[0, 0]["docstrings"]) < 0.1
assert losses[3, 0]["docstrings"] > math.log(10_000) > losses[2.5, 0]["docstrings"]
assert min(losses[pair]["code"] for pair in line) < min(losses[1, 0]["code"], losses[0, 1]["code"])

# %% [markdown]
# ### Two seeds of one task
#
# Two adapters for docstrings, same settings, another seed. Their updates have little in common (chapter 07), and yet they do
# the same. What is their mean?

# %%
explore.predict(
    "Two adapters of r = 8 from two seeds, the same text. What does half of each, added, do on that text?",
    {
        "worse than either": "Then the way from one to the other would lead over a hill. Look at the losses below.",
        "as well as the two": "It does a little better than that.",
        "better than either": "Yes. What the two have in common stays; what each of them got wrong in its own way is "
        "halved. It is a model of rank 16, though.",
    },
)

# %% tags=["nbval-ignore-output"]
other_seed = read_adapter(adapter_folder("reference_r8_seed_1"))
half_of_each = [(docstrings, 0.5), (other_seed, 0.5)]
halved = lambda name, which: sum(getattr(a.layers[name], which).float() for a, _ in half_of_each) / 2
of_factors = {
    name: each._replace(lora_A=halved(name, "lora_A"), lora_B=halved(name, "lora_B"))
    for name, each in docstrings.layers.items()
}
results = {
    "seed 0": loss(updates(docstrings.layers)),
    "seed 1": loss(updates(other_seed.layers)),
    "mean of the updates": loss(updates(mix(half_of_each))),
    "that mean, cut to rank 8": loss(updates(mix(half_of_each, rank=8))),
    "mean of the factors": loss(updates(of_factors)),
    "sum of the updates": loss(updates(mix([(docstrings, 1.0), (other_seed, 1.0)]))),
}
print(f"base {before:.2f} nats a token")
for name, value in results.items():
    print(
        f"{name:26} {value:.2f}, {(before - value) / (before - results['seed 0']):.0%} of the gain of seed 0"
    )
assert results["mean of the updates"] < min(results["seed 0"], results["seed 1"])
assert results["mean of the factors"] > results["mean of the updates"] + 0.3
assert results["sum of the updates"] > results["mean of the updates"] + 0.7
assert results["that mean, cut to rank 8"] < results["mean of the factors"] - 0.2

# %% [markdown]
# **The mean of the updates is better than either**; the mean of the *factors* loses a third of the gain, since
# $\tfrac14 (B_1 + B_2)(A_1 + A_2)$ pairs factors that never met (chapter 05); and the *sum* takes each step twice where the two
# agree. Cut back to rank 8, the mean is a little behind the single runs: a mean has to be stored at rank 16 to be worth it.

# %% [markdown]
# ## 7 · Many adapters, one base
#
# A server with a hundred adapters has three ways. **Merge** one and keep a copy of the model for each: no cost per token, a
# whole model per adapter. **Swap**: one base, and the factors of whoever is asking; all rows of a batch must be asking for the
# same. Or **mix**: each row of the batch has an adapter of its own,
#
# $$y_i = W x_i + s_{g(i)}\, B_{g(i)} A_{g(i)}\, x_i$$
#
# with one product $W x$ for all, and two thin ones for each row. Punica and S-LoRA do this on a GPU for thousands of
# adapters. In a dozen lines, for a linear layer or an embedding:


# %%
class ManyAdapters(nn.Module):
    """A layer with n adapters in stacks: left (n, out, r) with s in it, right (n, r, in); `rows` says who uses which."""

    def __init__(self, layer, adapters):
        super().__init__()
        self.layer, self.rows = layer, None
        products = [each.products()[0] for each in adapters]
        self.left = torch.stack(
            [a.scaling * left.float() for a, (left, _) in zip(adapters, products, strict=True)]
        )
        self.right = torch.stack([right.float() for _, right in products])

    def forward(self, x):
        left, right = self.left[self.rows], self.right[self.rows]  # of each row of the batch
        if isinstance(self.layer, nn.Embedding):  # a table's left factor has a row for each token
            return self.layer(x) + left.gather(1, x[..., None].expand(*x.shape, left.shape[2])) @ right
        return self.layer(x) + x @ right.mT @ left.mT


# %%
names = ["reference_r8", "reference_r8_seed_1", "manual_r8"]
adapters = [read_adapter(adapter_folder(name)).layers for name in names]
model = TinyLM.from_state_dict(base).eval()
for name in adapters[0]:
    parent, _, last = name.rpartition(".")
    layer = ManyAdapters(model.get_submodule(name), [each[name] for each in adapters])
    setattr(model.get_submodule(parent), last, layer)
many = [module for module in model.modules() if isinstance(module, ManyAdapters)]
print(len(many), "layers with three adapters each")

tokens = WINDOWS["docstrings"][:6, :128]
rows = torch.tensor([0, 2, 1, 1, 0, 2])
for layer in many:
    layer.rows = rows
with torch.no_grad():
    together = model(tokens)
for number, name in enumerate(names):
    alone = load_adapter(TinyLM.from_state_dict(base), adapter_folder(name)).eval()
    with torch.no_grad():
        assert torch.allclose(alone(tokens)[rows == number], together[rows == number], atol=1e-3)
print("each row as from the model that has its adapter alone")

# %% [markdown]
# The package does it with `AdapterPool`: adapters of different ranks, alphas and layers, added and dropped while the server
# runs, and the base's weights never touched. So nothing has to be unmerged, and nothing is rounded on the way.

# %% tags=["nbval-ignore-output"]
pool = AdapterPool(TinyLM.from_state_dict(base).eval(), {name: adapter_folder(name) for name in names})
with torch.no_grad():
    untouched = pool.model(tokens)
with pool.use([names[number] for number in rows]) as served:
    apart = float((served(tokens) - together).abs().max())
with pool.use([None, "manual_r8", None, None, "reference_r8", None]) as served:
    some = served(tokens)
pool.add("reference_r2", adapter_folder("reference_r2"))  # another rank, while the others stay
pool.drop("reference_r8_seed_1")
with torch.no_grad():
    afterwards = pool.model(tokens)
print(
    f"mixed batch: at most {apart:.1e} from ours; the base afterwards: {torch.equal(untouched, afterwards)}"
)
assert apart < 1e-3 and torch.equal(untouched, afterwards)
assert torch.allclose(some[[0, 2, 3, 5]], untouched[[0, 2, 3, 5]], atol=1e-3)

# %% [markdown]
# ### What it costs
#
# In bytes it is a matter of counting; in time we measure, on this machine and in this minute, so only the ratios mean
# something.

# %%
explore.predict(
    "Three adapters of rank 8 in one batch, against the base alone: how much slower is a forward pass of TinyLM on a CPU?",
    {
        "three times": "That would be three passes. W x is computed once for the whole batch, and each row has one thin "
        "product more.",
        "a few percent": "In FLOPs about a tenth at this width, and less in a wide model. But each layer has two more small "
        "products to start. See the ratio below.",
        "between a tenth more and twice": "Yes, 1.3 times on the machine that this was written on. The products are thin, and "
        "starting them costs more than doing them.",
    },
)

# %%
single = load_adapter(TinyLM.from_state_dict(base), adapter_folder("reference_r8")).eval()
plain = TinyLM.from_state_dict(base).eval()


def mixed_batch():
    with pool.use(["reference_r8", "manual_r8", None, None, "reference_r8", "manual_r8"]) as served:
        served(tokens)


def seconds(run, repeats=5):
    """The fastest of some runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad():
            run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


# %% tags=["nbval-ignore-output"]
ways = {"the base": lambda: plain(tokens), "one adapter": lambda: single(tokens), "mixed rows": mixed_batch}
took = {name: seconds(run) for name, run in ways.items()}
for name, each in took.items():
    print(
        f"{name:12} {tokens.numel() / each:8,.0f} tokens a second, {each / took['the base']:.2f} times the base's time"
    )
with pool.use(["reference_r8", "manual_r8", None, None, "reference_r8", "manual_r8"]) as served:
    assert torch.allclose(served(tokens)[[0, 4]], single(tokens)[[0, 4]], atol=1e-3)

# %%
model_bytes = 4 * sum(W.numel() for W in base.values())
print(
    f"three adapters in the pool: {pool.adapter_bytes():,} bytes, {pool.adapter_bytes() / model_bytes:.0%} of the base"
)
print(f"three merged copies:        {3 * model_bytes:,} bytes")
assert pool.adapter_bytes() == 4 * 31_000 * (8 + 8 + 2)
assert pool.remove() is pool.model

# %% [markdown]
# ## What to remember
#
# - An adapter's file holds its factors and nothing else; one direction costs $\sum (m + n)$ numbers.
# - Extracting is a truncated SVD. The budget that keeps the most energy did *worse* than one rank everywhere, on a full
#   fine-tune and on a trained adapter alike. Energy is free, so look at it first; decide on a held-out text.
# - The spectrum of $s B A$ comes from an $r \times r$ matrix. Resizing keeps $s$, so alpha falls with $r$.
# - 'Train high, then cut' against 'train low' is a comparison of learning rates, too. Here training low won
#   with each rank at its own best rate; at one small rate for both, the gap nearly closed.
# - A merge into bfloat16 is harmless for an update of a hundredth of $W$ or more. Below, rounding to the nearest shrinks the
#   update; rounding by chance makes a larger error and keeps the gain. A hundred small merges lose what one does not.
# - Average updates, don't add them, and never average factors. Two adapters at half weight each keep three quarters of both
#   gains here, added at full weight they ruin each other, and half an adapter alone has four fifths of its gain.
# - Subtracting an adapter is not unlearning.
# - One product $W x$ for the whole batch and two thin ones for each row serve any mixture of adapters, exactly.

# %% [markdown]
# ## Exercises
#
# The first five answers are functions: put yours in place of `None` and run the cell. The checks try them on matrices that
# are drawn anew each time.

# %% [markdown] tags=["exercise"]
# **1.** Three colleagues have tuned the same model, and the server has room for one adapter of rank $r$. Write
# `average(parts, rank)` for a list of $(B, A, s)$, whose ranks may differ: return $(B, A)$ of that rank, with $s = 1$, such
# that $B A$ is as near as it can be to the mean of the updates $s_i B_i A_i$.

# %% tags=["exercise"]
average = None  # def average(parts, rank): ...
print(exercises.check_10_1(average))


# %% tags=["solution"]
def average(parts, rank):
    wide_B = torch.cat([s * B for B, _, s in parts], dim=1) / len(parts)
    wide_A = torch.cat([A for _, A, _ in parts])
    U, S, Vh = lowrank.svd(wide_B @ wide_A)
    return U[:, :rank] * S[:rank], Vh[:rank]


print(exercises.check_10_1(average))

# %% [markdown] tags=["exercise"]
# **2.** Write `enough(B, A, share)`: the smallest rank at which the best cut of $B A$ keeps this share of its energy. Large
# layers must not make it slow: no matrix of the size of $\Delta W$.

# %% tags=["exercise"]
enough = None  # def enough(B, A, share): ...
print(exercises.check_10_2(enough))


# %% tags=["solution"]
def enough(B, A, share):
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    shares = lowrank.energy(torch.linalg.svdvals(R_B @ R_A.T))
    return int((shares < share).sum()) + 1


print(exercises.check_10_2(enough))

# %% [markdown] tags=["exercise"]
# **3.** Write `spend(spectra, sides, budget)`: `spectra` has the singular values of each matrix, largest first, `sides` its
# $(m, n)$. Return the rank of each, so that the budget of numbers keeps the most energy: the next direction is always the
# one with the largest $\sigma^2 / (m + n)$. When a matrix's next direction does not fit any more, that matrix is done.

# %% tags=["exercise"]
spend = None  # def spend(spectra, sides, budget): ...
print(exercises.check_10_3(spend))


# %% tags=["solution"]
def spend(spectra, sides, budget):
    worth = [(float(s) ** 2 / sum(sides[name]), name) for name, S in spectra.items() for s in S]
    ranks, done = dict.fromkeys(spectra, 0), set()
    for _, name in sorted(worth, reverse=True):
        if sum(sides[name]) > budget:
            done.add(name)
        if name not in done:
            ranks[name], budget = ranks[name] + 1, budget - sum(sides[name])
    return ranks


print(exercises.check_10_3(spend))

# %% [markdown] tags=["exercise"]
# **4.** Write `kept_along(W, update)`: `update`, in float32, is merged into $W$ in the dtype of $W$, to the nearest. How much
# of it is there along itself, $\langle \text{merged} - W, \Delta W \rangle / \lVert \Delta W \rVert^2$?

# %% tags=["exercise"]
kept_along = None  # def kept_along(W, update): ...
print(exercises.check_10_4(kept_along))


# %% tags=["solution"]
def kept_along(W, update):
    changed = (W.float() + update).to(W.dtype).float() - W.float()
    return float((changed * update).sum() / update.square().sum())


print(exercises.check_10_4(kept_along))

# %% [markdown] tags=["exercise"]
# **5.** `ManyAdapters` copies the factors of each row's adapter. Write `added(x, A, B, rows)` without that: `x` is (rows,
# tokens, in), `A` ($n$, $r$, in) and `B` ($n$, out, $r$) are stacks with $s$ in `B`, `rows` is a list with the adapter of each
# row, $-1$ for none. Return what is added to the layer's output, (rows, tokens, out).

# %% tags=["exercise"]
added = None  # def added(x, A, B, rows): ...
print(exercises.check_10_5(added))


# %% tags=["solution"]
def added(x, A, B, rows):
    out = x.new_zeros(*x.shape[:2], B.shape[1])
    for number in set(rows) - {-1}:
        mine = [place for place, row in enumerate(rows) if row == number]
        out[mine] = x[mine] @ A[number].T @ B[number].T
    return out


print(exercises.check_10_5(added))

# %% [markdown] tags=["exercise"]
# **6.** A GPU has 24 GB (24 · 10⁹ bytes). It serves Llama 3.1 8B in bfloat16, 8 030 261 248 numbers, and the cache of the
# conversations takes 4 GB. How many adapters of $r = 16$ on all linear layers, 41 943 040 numbers each and in bfloat16, fit
# into what is left?

# %% tags=["exercise"]
adapters_that_fit = None
print(exercises.check_10_6(adapters_that_fit))

# %% tags=["solution"]
free = 24 * 10**9 - 4 * 10**9 - 2 * 8_030_261_248
adapters_that_fit = free // (2 * 41_943_040)
print(exercises.check_10_6(adapters_that_fit))

# %% [markdown]
# ## Where to read on
#
# - Ilharco et al. 2023, *Editing Models with Task Arithmetic* (arXiv 2212.04089): adding and negating the updates of fully
#   tuned models.
# - Chen et al. 2023, *Punica: Multi-Tenant LoRA Serving* (arXiv 2310.18547), and Sheng et al. 2023, *S-LoRA: Serving
#   Thousands of Concurrent LoRA Adapters* (arXiv 2311.03285): batches of mixed adapters on a GPU, and where to keep those
#   that wait.
# - Eckart and Young 1936, *The approximation of one matrix by another of lower rank*: chapter 01 has the proof's idea.
# - Gupta et al. 2015, *Deep Learning with Limited Numerical Precision* (arXiv 1502.02551): stochastic rounding in training.
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA* (arXiv 2312.03732): what the
#   published pair of section 4 differs in, beside the rank.
