"""A stand-in for launch.train, for the tests of studies: no JAX, and a score that is a formula of the settings.

score of the k-th of ten evaluations = 2 + |log10(learning_rate) + 2| + 1 / k
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    given = dict(argument[2:].partition("=")[::2] for argument in arguments)
    if "dry_run" in given:
        print(json.dumps({"seconds_per_step": float(os.environ.get("STAND_IN_SECONDS", "0.25"))}))
        return 0
    rate, run_dir = float(given["learning_rate"]), Path(given["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "starts.txt").open("a") as file:
        file.write(f"{os.getpid()} {' '.join(arguments)}\n")
    (run_dir / "device.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    if status := int(os.environ.get("STAND_IN_STATUS", "0")):
        return status
    if given.get("seed") and given["seed"] == os.environ.get("STAND_IN_DIVERGES_WITH"):
        return 3
    if rate > 0.9:
        print("a mistake", file=sys.stderr)
        return 2
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    path = run_dir / "metrics.jsonl"
    done = len(path.read_text().splitlines()) // 2 if path.exists() else 0
    pause = float(os.environ.get("STAND_IN_PAUSE", "0.01"))
    spoiled = "STAND_IN_SPOILS" in os.environ and int(run_dir.name) >= 4 and given["batch_size"] == "8"
    for part in range(done + 1, 11):
        time.sleep(pause)
        deadline = time.monotonic() + 30
        while spoiled and part > 2 and not stopped:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                return 1
        if stopped:
            return 75
        if rate > 0.5:
            print(f"stopped: loss=nan at part {part}", file=sys.stderr)
            return 3
        step = part * int(given["evaluate_every"])
        score = 2 + abs(math.log10(rate) + 2) + 1 / part + 10 * spoiled
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "split": "train", "symbols_per_second": 100.0}) + "\n")
            last = {"state_digest": "of the state"} if part == 10 else {}
            file.write(json.dumps({"step": step, "split": "valid", "bits_per_symbol": score, **last}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
