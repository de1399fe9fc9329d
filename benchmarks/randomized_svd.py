"""Time and error of lowrank.randomized_svd beside torch's full SVD and torch.svd_lowrank, in one process.

    python benchmarks/randomized_svd.py [--size 2048] [--rank 16] [--repeats 5] [--device cpu]

Writes results/randomized_svd.json and .png (on CUDA: …_cuda). The ways take turns, medians count.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from lora_edu import lowrank, plots
from lora_edu.paths import write_atomically, write_json

RESULTS = Path(__file__).parent / "results"
FULL, SKETCH, OURS = "full SVD (torch.linalg.svd)", "torch.svd_lowrank", "lowrank.randomized_svd"


def spectra(size: int, rank: int) -> dict[str, torch.Tensor]:
    k = torch.arange(1, size + 1, dtype=torch.float64)
    signal = torch.where(k <= rank, 4.0, 1.0).double()
    return {"1/k": 1 / k, "0.9^k": 0.9**k, f"flat with a rank-{rank} signal": signal}


def ways(rank: int) -> dict:
    return {
        FULL: lambda matrix: [part[..., :rank] for part in torch.linalg.svd(matrix, full_matrices=False)[:2]],
        SKETCH: lambda matrix: torch.svd_lowrank(matrix, q=rank),
        f"{SKETCH}, q + 10": lambda matrix: torch.svd_lowrank(matrix, q=rank + 10),
        OURS: lambda matrix: lowrank.randomized_svd(matrix, rank),
    }


def seconds(call, matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    call(matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def excess(U: torch.Tensor, matrix: torch.Tensor, S: torch.Tensor, rank: int) -> float:
    """How far ‖matrix − U_r U_rᵀ matrix‖_F lies above the least that any rank-r matrix can reach."""
    U = U[:, :rank].double()
    missing = matrix.double() - U @ (U.T @ matrix.double())
    return float(torch.linalg.matrix_norm(missing) / S[rank:].square().sum().sqrt()) - 1


def measure(size: int, rank: int, repeats: int, device: str) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q.double() for _ in range(2))
    rows = []
    for name, S in spectra(size, rank).items():
        matrix = ((U * S) @ V.T).float().to(device)
        calls = ways(rank)
        times = {way: [] for way in calls}
        for way in calls:
            if way != FULL:  # a first call plans and allocates; of the slow one only the turns are run
                calls[way](matrix)
        for _ in range(repeats):
            for way, call in calls.items():
                times[way].append(seconds(call, matrix))
        full = statistics.median(times[FULL])
        for way, call in calls.items():
            median = statistics.median(times[way])
            over = excess(call(matrix)[0].cpu(), matrix.cpu(), S, rank)
            rows.append(
                {
                    "spectrum": name,
                    "way": way,
                    "median_s": median,
                    "times_faster": full / median,
                    "excess": over,
                }
            )
            print(
                f"{name:28} {way:28} {1000 * median:8.1f} ms {full / median:7.1f}× error +{100 * over:.3f} %"
            )
    return rows


@plots.style()
def draw(rows: list[dict], title: str) -> bytes:
    figure, (speed, error) = plots.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["spectrum"] for row in rows))
    for place, way in enumerate(way for way in dict.fromkeys(row["way"] for row in rows) if way != FULL):
        own = [row for row in rows if row["way"] == way]
        heights = [index + 0.25 * (place - 1) for index in range(len(names))]
        colour = plots.PALETTE[place]
        speed.barh(heights, [row["times_faster"] for row in own], 0.22, color=colour, label=way)
        error.barh(heights, [max(100 * row["excess"], 1e-4) for row in own], 0.22, color=colour)
    speed.set(yticks=range(len(names)), yticklabels=names, xlabel="times as fast as the full SVD")
    error.set(xscale="log", xlabel="error above the optimum (%)")
    error.axvline(2, color=plots.BLACK, linestyle="--", linewidth=1)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3)
    return plots.to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = measure(options.size, options.rank, options.repeats, options.device)
    where = (
        torch.cuda.get_device_name() if options.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    )
    record = {
        "command": f"python benchmarks/randomized_svd.py --size {options.size} --rank {options.rank} "
        f"--repeats {options.repeats} --device {options.device}",
        "where": f"{where}, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        "rows": rows,
    }
    stem = "randomized_svd" + ("" if options.device == "cpu" else f"_{options.device.split(':')[0]}")
    write_json(RESULTS / f"{stem}.json", record)
    title = f"Rank {options.rank} of {options.size} × {options.size}: how much faster than the full SVD, and how good"
    write_atomically(RESULTS / f"{stem}.png", draw(rows, title))


if __name__ == "__main__":
    main()
