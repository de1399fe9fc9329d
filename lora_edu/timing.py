"""How long things take beside one another, on a machine that does other things too.

Not for how fast one thing is: seconds belong to a machine, ratios carry over better.
"""

import statistics
import time
from collections.abc import Callable, Mapping

from lora_edu.text import whole_number


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int = 5, warm: int = 1
) -> dict[str, list[float]]:
    """Name → seconds of processor time of each of `repeats` calls, in the order of the rounds.

    Every call comes once a round, and who comes first changes from round to round, so that a machine that is busy for a
    while, or warms up, is so for all. `warm` rounds go before and don't count. Processor time is of all threads of this
    process together (set one: torch.set_num_threads(1)); other programs lengthen it far less than the clock's seconds.
    Raises ValueError without a call, and for a number of rounds that is none.
    """
    if not calls:
        raise ValueError("calls must hold at least one name and function; got none")
    warm = whole_number("warm", warm, least=0)
    order, taken = list(calls), {name: [] for name in calls}
    for turn in range(warm + whole_number("repeats", repeats)):
        for name in order:
            began = time.process_time()
            calls[name]()
            if turn >= warm:
                taken[name].append(time.process_time() - began)
        order = order[1:] + order[:1]
    return taken


def ratios(seconds: Mapping[str, list[float]], to: str) -> dict[str, float]:
    """Name → the median over rounds of its seconds over those of `to` in the same round (`in_turns`).

    Raises KeyError for a name that was not timed.
    """
    if to not in seconds:
        raise KeyError(f"{to!r} was not timed; there are: {', '.join(seconds)}")
    return {
        name: statistics.median(own / other for own, other in zip(each, seconds[to], strict=True))
        for name, each in seconds.items()
    }
