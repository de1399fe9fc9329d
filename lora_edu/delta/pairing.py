"""Which tensor of one checkpoint is which of another, where their names differ by wrappers, prefixes or ties.

Names and shapes alone: nothing is read here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from lora_edu.delta.files import Stored
from lora_edu.lora.adapter_files import PREFIX, unwrapped

# Last parts of the names of tables that count tokens, and of the heads that may share them.
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "tok_embeddings",
    "embedding",
    "embed_in",
    "embed",
)
HEADS = ("lm_head", "embed_out", "output", "head", "decoder", "proj_out", "output_projection", "score")
ROOM_FOR_TOKENS = 0.5  # a table that grew by more than that share is another table


class Names(NamedTuple):
    """pairs: name on the left → name on the right; renamed: what the two sides put before → how often."""

    pairs: dict[str, str]
    renamed: dict[tuple[str, str], int]


@cache  # each layer of an adapter is looked for among all names of the base
def canonical(name: str) -> str:
    """A tensor's name without what wrappers and adapters put into it."""
    name = unwrapped(name)[0].removeprefix(PREFIX)
    name = re.sub(r"\.(modules_to_save(\.[^.]+)?|original_module)(?=\.)", "", name)
    return name.replace(".base_layer.", ".")


def pair_names(left: Mapping[str, Stored], right: Mapping[str, Stored]) -> Names:
    """Every tensor of the left with the one of the right that is the same: by name, else by the longest common end.

    Ends are compared part by part (a part stands between dots), two parts at least, and only tensors of one shape,
    or whose rows alone differ, are paired. Two that fit equally well are as bad as none.
    """
    by_name: dict[str, list[str]] = {}
    for name in right:
        by_name.setdefault(canonical(name), []).append(name)
    pairs, open_left = {}, {}
    for name in left:
        same = by_name.get(canonical(name), [])
        if name in right:
            pairs[name] = name
        elif len(same) == 1:
            pairs[name] = same[0]
        else:
            open_left[name] = canonical(name)
    taken = set(pairs.values())
    open_right = {name: canonical(name) for name in right if name not in taken}
    found = _mutual(open_left, open_right, left, right)
    renamed: dict[tuple[str, str], int] = {}
    for name, other in found.items():
        change = _before(open_left[name], open_right[other])
        renamed[change] = renamed.get(change, 0) + 1
    return Names(pairs | found, renamed)


def _mutual(
    open_left: dict[str, str],
    open_right: dict[str, str],
    left: Mapping[str, Stored],
    right: Mapping[str, Stored],
) -> dict[str, str]:
    """Pairs in which each is the other's only best."""
    there = _best(open_left, open_right, left, right)
    back = _best(open_right, open_left, right, left)
    return {name: other for name, other in there.items() if back.get(other) == name}


def _best(mine: dict[str, str], others: dict[str, str], my: Mapping, their: Mapping) -> dict[str, str]:
    ends: dict[str, list[str]] = {}
    for other, name in others.items():
        for end in _ends(name):
            ends.setdefault(end, []).append(other)
    found = {}
    for name, whole in mine.items():
        for end in _ends(whole):  # longest first
            fitting = [o for o in ends.get(end, ()) if alike(my[name].shape, their[o].shape)]
            if fitting:
                if len(fitting) == 1:
                    found[name] = fitting[0]
                break
    return found


def _ends(name: str) -> Iterable[str]:
    """The ends of a name, longest first: two parts at least, and never without the number of its layer."""
    parts = name.split(".")
    for first in range(len(parts) - 1):
        yield ".".join(parts[first:])
        if parts[first].isdigit():
            return


def _before(left: str, right: str) -> tuple[str, str]:
    """What two names have before their common end."""
    ours, theirs = left.split("."), right.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop(), theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Of one shape, or two tables of which one has more rows."""
    return one == other or grown(one, other)


def grown(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes may be of one table before and after tokens were added."""
    if not one or not other or one == other or one[1:] != other[1:] or len(one) > 2:
        return False
    fewer, more = sorted((one[0], other[0]))
    return fewer >= 8 and more - fewer <= ROOM_FOR_TOKENS * fewer


def counts_tokens(name: str) -> bool:
    """Whether a tensor's name is that of an embedding, or of a head, whose rows are tokens."""
    return _table(name) or "embed" in module_of(name)


def module_of(name: str) -> str:
    """The part that names the layer: model.embed_tokens.weight → embed_tokens."""
    parts = canonical(name).split(".")
    return parts[-2] if len(parts) > 1 else parts[-1]


def tied_table(name: str, shape: tuple[int, ...], tensors: Mapping[str, Stored]) -> str | None:
    """The table that a head or a second embedding shares, where the checkpoint holds it once; None if unclear."""
    if not _table(name) or len(shape) != 2:
        return None
    tables = [
        other
        for other, stored in tensors.items()
        if other != name and _table(other) and tuple(stored.shape) == tuple(shape)
    ]
    shared = [other for other in tables if module_of(other) == "shared"] or tables
    return shared[0] if len(shared) == 1 else None


def _table(name: str) -> bool:
    module = module_of(name)
    return module in EMBEDDINGS or module in HEADS


def layer_weight(layer: str, sides: tuple[int, int], tensors: Mapping[str, Stored]) -> tuple[str | None, str]:
    """(the weight that an adapter's layer is for, None where there is none; "tied", or "missing" or "packed").

    Its own name, the longest common end, the name with _ for every dot (kohya's), or that of the table it shares.
    sides: of ΔW; a weight stored transposed (Conv1D) or with a kernel's axes fits, too.
    """
    whole, names = f"{layer}.weight", {canonical(name): name for name in tensors}
    if whole in names:
        return names[whole], ""
    for end in _ends(whole):
        fitting = [
            original
            for name, original in names.items()
            if (name == end or name.endswith(f".{end}")) and fits(sides, tensors[original].shape)
        ]
        if len(fitting) == 1:
            return fitting[0], ""
        if fitting:
            break
    flat = {name.removesuffix(".weight").replace(".", "_"): original for name, original in names.items()}
    ending = sorted((name for name in flat if layer == name or layer.endswith(f"_{name}")), key=len)
    if ending and fits(sides, tensors[flat[ending[-1]]].shape):
        return flat[ending[-1]], ""
    if (shared := tied_table(whole, sides, tensors)) is not None:
        return shared, "tied"
    ends = [f"{end.removesuffix('.weight')}.qweight" for end in _ends(whole)]
    packed = any(name == end or name.endswith(f".{end}") for name in names for end in ends)
    return None, "packed" if packed else "missing"


def fits(sides: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether ΔW of these sides is for a weight of this shape: as it is, transposed, or with a kernel's axes."""
    if len(shape) > 2:
        return sides == (shape[0], math.prod(shape[1:]))
    return sorted(sides) == sorted(shape)
