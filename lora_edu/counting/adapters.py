"""Which matrices of a model LoRA sits on, and the numbers it holds there. No memory, no FLOPs."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lora_edu.counting.architectures import Architecture, Matrix
from lora_edu.counting.formulas import lora_parameters, share, size, spaced
from lora_edu.counting.models import architecture
from lora_edu.text import check_rank, did_you_mean

_ATTENTION = ("query_key_value", "query", "key", "value", "output")
_MLP = ("gate", "up", "down")
GROUPS = {
    "attention": _ATTENTION,
    "mlp": _MLP,
    "linear": (*_ATTENTION, *_MLP),
    "all-linear": (*_ATTENTION, *_MLP, "pooler"),
    "all": ("embedding", *_ATTENTION, *_MLP, "head"),
}


def adapted(model: str | Architecture, targets: str | Iterable[str]) -> list[Matrix]:
    """The matrices that `targets` names, in the model's order.

    A target is a role ("query", "embedding" …), a group ("attention", "mlp", "linear": both, "all": with the
    embedding and the head, "all-linear": as in PEFT every linear layer but the head) or the end of a module's
    own name ("c_attn", "mlp.c_proj"). "query", "key" and "value" of a fused matrix count apart, as in
    loralib's MergedLinear; the module itself, or a group, counts as one, as in PEFT.
    """
    model = architecture(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ValueError('targets must name at least one matrix, e.g. ("query", "value"); got none')
    chosen: dict[tuple[str, str], Matrix] = {}
    for target in targets:
        found = list(_matching(model, target))
        if not found:
            there = sorted({end for matrix in _choices(model) for end in (matrix.role, _end(matrix.name))})
            raise ValueError(
                f"{model.name} has no matrix {target!r}{did_you_mean(target, there)} There are: {', '.join(there)}; "
                f"groups: {', '.join(GROUPS)}"
            )
        chosen |= {(matrix.role, matrix.name): matrix for matrix in found}
    fused = {name for role, name in chosen if role == "query_key_value"}
    twice = [role for role, name in chosen if name in fused and role != "query_key_value"]
    if twice:
        raise ValueError(
            f"{twice[0]!r} is a part of {fused.pop()}, which is also a target: name the whole or its parts"
        )
    order = {(matrix.role, matrix.name): place for place, matrix in enumerate(_choices(model))}
    return sorted(chosen.values(), key=lambda matrix: order[matrix.role, matrix.name])


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _choices(model: Architecture) -> Iterator[Matrix]:
    """Matrices, and the parts of the fused ones."""
    fused = {entry.module: entry for entry in model.entries if entry.parts}
    for matrix in model.matrices():
        yield matrix
        if matrix.name in fused:
            for role, rows, columns in fused[matrix.name].parts:
                yield Matrix(role, matrix.name, rows, columns, matrix.copies)


def _matching(model: Architecture, target: str) -> Iterator[Matrix]:
    roles = GROUPS.get(target, (target,))
    for matrix in _choices(model):
        whole = matrix in model.matrices()
        by_role = matrix.role in roles and (whole or target == matrix.role)
        by_name = whole and f".{matrix.name}".endswith(f".{target}")
        if by_role or by_name:
            yield matrix


class Row(NamedTuple):
    """One kind of adapted matrix."""

    role: str
    name: str
    rows: int
    columns: int
    copies: int
    rank: int

    @property
    def parameters(self) -> int:
        return self.copies * lora_parameters(self.rows, self.columns, self.rank)

    @property
    def share(self) -> float:
        return share(self.rows, self.columns, self.rank)


class Count(NamedTuple):
    """What an adapter holds: a row for each kind of matrix, and the size of the model it sits on."""

    architecture: Architecture
    rank: int
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def tensors(self) -> int:
        return sum(2 * row.copies for row in self.rows)

    @property
    def share(self) -> float:
        """Of the model's own parameters."""
        return self.parameters / self.architecture.parameters

    def bytes(self, dtype: str = "float32") -> float:
        return size(self.parameters, dtype)

    def __str__(self) -> str:
        lines = [f"{'matrix':<16}{'shape':>17}{'copies':>8}{'parameters':>16}{'share of it':>13}"]
        lines += [
            f"{row.role:<16}{f'{row.rows} × {row.columns}':>17}{row.copies:>8}"
            f"{spaced(row.parameters):>16}{row.share:>13.2%}"
            for row in self.rows
        ]
        whole = self.architecture.parameters
        lines.append(f"{'adapter':<16}{f'rank {self.rank}':>17}{'':>8}{spaced(self.parameters):>16}")
        lines.append(f"{self.architecture.name:<41}{spaced(whole):>16}{self.share:>13.3%}")
        return "\n".join(lines)


def count(
    model: str | Architecture, targets: str | Iterable[str] = ("query", "value"), rank: int = 8
) -> Count:
    """Parameters of LoRA of one rank on the named matrices of a model (`adapted` says how to name them)."""
    model = architecture(model)
    rows = []
    for matrix in adapted(model, targets):
        check_rank(rank, (matrix.rows, matrix.columns), matrix.role)
        rows.append(Row(*matrix, rank))
    return Count(model, rank, tuple(rows))
