"""The first minutes on a GPU: everything that only a card can tell, in the order of worth, kept as soon as it is known.

    python tools/on_a_gpu.py --out DIR [--minutes 9] [--rehearse]
    python tools/on_a_gpu.py --apply DIR
    python tools/on_a_gpu.py --compile 90

The first runs the parts of gpu_parts.py and writes a file for each into DIR after every item, so that a run that is
cut off keeps what it found; the same command again goes on behind it. An item that fails is written down with its
inputs and the rest goes on, also when it takes the process with it. --rehearse runs every line on a CPU, on Triton's
interpreter, with tiny tables, and measures nothing. --apply puts the results into the repository: the tiles into
lora_edu/lora/triton_kernels.py, the figures and their plot into benchmarks/results, where chapter 06 finds them.
--compile compiles what a run compiles, for a card of that capability that need not be here, and says how long it takes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_edu.paths import REPOSITORY, write_atomically, write_json

if __name__ == "__mp_main__":
    os.environ.pop("TRITON_INTERPRET", None)  # this is a compiler's process: see Compiler in gpu_compile.py
elif "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

COMMAND = "python tools/on_a_gpu.py"
ORDER = ("device", "correctness", "tiles", "benchmark", "step", "linear")
PATIENCE = 30.0  # seconds that an item may take beyond its part's time before its process is ended
LOST, NO_CARD = 3, 4  # how a worker says that the card's context is lost, or that there is no card
STARTS = 20


def parts():
    """gpu_parts.py, with the benchmark and the tests' kernel cases that it builds on."""
    for folder in ("tools", "benchmarks", "tests/lora"):
        if str(REPOSITORY / folder) not in sys.path:
            sys.path.insert(0, str(REPOSITORY / folder))
    import gpu_parts

    return gpu_parts


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# The run: one process works, another watches it


def supervise(command: list[str], out: Path, deadline: float, patience: float = PATIENCE) -> int:
    """Starts the worker, and again behind the item that took it down, until it is done or the time is over.

    command: starts a worker that keeps state.json in `out` (its part and item, and until when) and ends with 0.
    Returns how the last worker ended.
    """
    state = out / "state.json"
    for _ in range(STARTS):
        state.unlink(missing_ok=True)  # what it says is of the worker before
        worker = subprocess.Popen(command)
        try:
            reason = watch(worker, state, deadline, patience)
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        if reason is None or worker.returncode == NO_CARD:
            break
        if not (at := read(state)):
            print(f"no item was begun: {reason}", flush=True)
            break
        if at.get("open"):
            blame(out, at, reason)
        if time.time() > deadline:
            break
    state.unlink(missing_ok=True)
    return worker.returncode


def watch(worker: subprocess.Popen, state: Path, deadline: float, patience: float) -> str | None:
    """None when the worker is done, else why it isn't."""
    while worker.poll() is None:
        time.sleep(0.1)
        at, now = read(state), time.time()
        if at.get("open") and now > at["until"] + patience:
            return f"no answer {patience:.0f} s after its time was over"
        if now > deadline + patience:
            return "the run's time was over"
    return None if worker.returncode == 0 else f"the process ended with {worker.returncode}"


def blame(out: Path, at: dict, reason: str) -> None:
    """Write the item that was under way down as failed, so that the next worker begins behind it."""
    path = out / f"{at['part']}.json"
    record = read(path) or {"part": at["part"], "items": []}
    record["items"].append({"inputs": at["inputs"], "error": reason})
    write_json(path, record)
    print(f"{at['part']}: {reason}: {at['inputs']}", flush=True)


def work(out: Path, deadline: float, minutes: float, rehearse: bool) -> int:
    """All parts, in this process; what is in `out` already is not done again. Returns the exit status."""
    gpu_parts = parts()
    from gpu_compile import end_with_parent

    end_with_parent()
    if not rehearse and not gpu_parts.torch.cuda.is_available():
        return NO_CARD
    records = {name: read(out / f"{name}.json") for name in ORDER}
    processes = 1 if rehearse else max(1, min(15, (os.cpu_count() or 2) - 1))
    session = gpu_parts.Session(rehearse, records, capability(rehearse), processes)
    session.ask_ahead()
    try:
        for place, name in enumerate(ORDER):
            generator, most, _ = gpu_parts.PARTS[name]
            scale = minutes / 9
            reserve = sum(gpu_parts.PARTS[later][2] for later in ORDER[place + 1 :]) * scale
            until = min(time.time() + most * scale, deadline - reserve)
            if not run_part(name, generator, session, out, until):
                return LOST
        return 0
    finally:
        session.compiler.close()


def run_part(name: str, generator: Callable, session, out: Path, until: float) -> bool:
    """Runs the items that are not in the part's record yet; False if the card can't be used any more."""
    record = session.records[name] or {"part": name, "rehearsed": session.rehearse, "items": []}
    session.records[name] = record
    record.pop("left_out", None)
    session.until = until
    began, path, items, left_out = time.time(), out / f"{name}.json", record["items"], []
    done = len(items)
    for number, item in enumerate(generator(session, items)):
        if number < done:
            continue
        if time.time() > until:
            left_out.append(item.inputs)
            continue
        at = {"part": name, "inputs": item.inputs, "until": until}
        write_json(out / "state.json", at | {"open": True})
        items.append(run_item(item))
        record["seconds"] = round(record.get("seconds", 0) + time.time() - began, 2)
        began = time.time()
        write_json(path, record)
        write_json(out / "state.json", at | {"open": False})
        if "error" in items[-1]:
            print(f"{name}: {items[-1]['error'].splitlines()[0]}: {item.inputs}", flush=True)
            if not usable(session):
                return False
    write_json(path, record | {"left_out": left_out})
    record["left_out"] = left_out
    failed = sum("error" in each for each in items)
    print(
        f"{name}: {len(items)} items in {record.get('seconds', 0):.0f} s, {failed} failed, {len(left_out)} left out",
        flush=True,
    )
    return True


def run_item(item) -> dict:
    began = time.perf_counter()
    try:
        outcome = {"found": item.run()}
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"[:8000]}
    return {"inputs": item.inputs} | outcome | {"seconds": round(time.perf_counter() - began, 3)}


def usable(session) -> bool:
    """Whether the card still answers: after an illegal access it doesn't, in this process."""
    import torch

    try:
        if session.device == "cuda":
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").item()
        return True
    except RuntimeError:
        return False


def capability(rehearse: bool) -> int:
    import torch

    if rehearse:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


# Into the repository


class NotApplied(Exception):
    pass


def apply(source: Path, root: Path) -> list[str]:
    """Puts the results in `source` into the repository at `root`; returns what was done, a line each.

    Raises NotApplied, before anything is written, for a rehearsal, for results without a device or a benchmark.
    Tiles are left as they are if a correctness case failed.
    """
    gpu_parts = parts()
    records = {name: read(source / f"{name}.json") for name in ORDER}
    if any(record.get("rehearsed") for record in records.values()):
        raise NotApplied(f"{source} holds a rehearsal, which measured nothing")
    about = next(iter(found(records["device"], what="device")), None)
    rows = [row for each in found(records["benchmark"]) if isinstance(each, list) for row in each]
    if about is None or not rows:
        raise NotApplied(
            f"{source} names no device, or holds no benchmark: run `{COMMAND} --out DIR` on a card first"
        )
    failed = {name: failures(record) for name, record in records.items() if failures(record)}
    said = []
    best = (
        {}
        if "correctness" in failed or not found(records["correctness"])
        else gpu_parts.best_tiles(records["tiles"])
    )
    if best:
        file = root / "lora_edu" / "lora" / "triton_kernels.py"
        write_tiles(file, best, about)
        said.append(f"{len(best)} tiles into {file}")
    else:
        said.append("tiles are left as they are: none was faster, or not all correctness cases passed")
    result = about | {
        "command": f"{COMMAND} --out DIR",
        "copy_bytes_per_s": gpu_parts.copy_bandwidth(records),
        "correct": {"passed": len(found(records["correctness"])), "failed": failed.get("correctness", [])},
        "tiles": [[*key, list(blocks)] for key, blocks in best.items()],
        "rows": rows,
        "check_tokens": found(records["benchmark"], what="check_tokens"),
        "calls": found(records["step"], what="calls"),
        "steps": [each for each in records["step"].get("items", []) if each["inputs"]["what"] == "step"],
        "profile": found(records["step"], what="profile"),
        "linear": found(records["linear"]),
        "failed": failed,
        "left_out": {name: record["left_out"] for name, record in records.items() if record.get("left_out")},
    }
    folder = root / "benchmarks" / "results"
    write_json(folder / "gpu_embedding.json", result)
    write_atomically(folder / "gpu_embedding.png", gpu_parts.gpu_embedding.draw(result))
    return [*said, f"{len(rows)} rows and their plot into {folder}"]


def found(record: dict, **inputs: str) -> list:
    """What the part's items found, of those with these inputs."""
    items = [each for each in record.get("items", []) if "found" in each]
    return [each["found"] for each in items if each["inputs"].items() >= inputs.items()]


def failures(record: dict) -> list[dict]:
    return [each for each in record.get("items", []) if "error" in each]


def write_tiles(file: Path, best: dict, about: dict) -> None:
    """Replaces the two entries of the table in triton_kernels.py."""
    where = {key: json.dumps(about[key], ensure_ascii=False) for key in ("device", "date")}
    where |= {"command": json.dumps(f"{COMMAND} --out DIR"), "capability": str(tuple(about["capability"]))}
    lines = {
        "MEASURED_ON: dict[str, object] = ": [f'"{key}": {value}' for key, value in where.items()],
        "MEASURED: dict[tuple[str, int, int, int, int], Blocks] = ": [
            f"({', '.join(map(json.dumps, key))}): Blocks{tuple(blocks)}"
            for key, blocks in sorted(best.items())
        ],
    }
    text = file.read_text(encoding="utf-8")
    for head, entries in lines.items():
        begin = text.index(f"\n{head}") + 1
        end = text.index("}\n", begin) + 2
        text = (
            text[:begin] + head + "{\n" + "".join(f"    {each},\n" for each in entries) + "}\n" + text[end:]
        )
    write_atomically(file, text.encode())


def summary(out: Path) -> list[str]:
    """The headline's ratios and shares, and what failed or was left out."""
    records = {name: read(out / f"{name}.json") for name in ORDER}
    lines = []
    rows = [row for each in found(records["benchmark"]) if isinstance(each, list) for row in each]
    if rows and not records["benchmark"].get("rehearsed"):
        gpu_parts = parts()
        lines.append(f"copy within memory: {gpu_parts.copy_bandwidth(records) / 1e9:.0f} GB/s")
    for name, record in records.items():
        failed, left = failures(record), record.get("left_out", [])
        done = len(record.get("items", [])) - len(failed)
        lines.append(
            f"{name:12} {done:4} done, {len(failed)} failed, {len(left)} left out, {record.get('seconds', 0):.0f} s"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument(
        "--minutes", type=float, default=9, help="all parts together, starts included (default: 9)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU; measures nothing")
    parser.add_argument(
        "--apply", type=Path, metavar="DIR", help="put the results in DIR into the repository"
    )
    parser.add_argument(
        "--into", type=Path, default=REPOSITORY, help="the repository for --apply (default: this one)"
    )
    parser.add_argument(
        "--compile", type=int, metavar="CAPABILITY", help="only compile, for 90 (an H100), say"
    )
    parser.add_argument("--worker", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        gpu_parts = parts()
        said = gpu_parts.compile_all(options.compile, max(1, min(15, os.cpu_count() or 1)))
        print(json.dumps(said, indent=1))
        return 1 if said["failed"] else 0
    if options.apply:
        try:
            print("\n".join(apply(options.apply, options.into)))
        except NotApplied as refused:
            print(refused, file=sys.stderr)
            return 1
        return 0
    if options.out is None:
        parser.error("say where the results go: --out DIR (or --apply DIR)")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        return work(options.out, options.worker, options.minutes, options.rehearse)
    deadline = time.time() + 60 * options.minutes
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--out",
        str(options.out),
        "--worker",
        str(deadline),
    ]
    command += ["--minutes", str(options.minutes), *(["--rehearse"] if options.rehearse else [])]
    if supervise(command, options.out, deadline) == NO_CARD:
        print("no CUDA device here, so nothing was measured; --rehearse runs every line without one")
        return 1
    print("\n".join(summary(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
