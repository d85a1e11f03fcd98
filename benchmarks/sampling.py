"""Text made by one model, 1 sample and 64 side by side: ours beside a PyTorch loop, and beside reading the weights.

    python -m benchmarks.sampling [--quick] [--shapes=1,2,3] [--samples=1,64] [--rounds=7] [--turn=2]

Every symbol depends on the one before it, so for one sample the weights must be read once for each: what that alone
takes is measured in the same rounds, and bounds the speed of any program on this machine.
"""

from dataclasses import asdict

from benchmarks import rows as rows_lib
from benchmarks import workers as workers_lib
from benchmarks.rows import Rows
from benchmarks.shapes import QUICK, SHAPES
from benchmarks.workers import Worker, environments, fastest

PEERS = {"ours": "benchmarks.peers.ours.sampling", "PyTorch": "benchmarks.peers.pytorch.sampling"}
LENGTH, QUICK_LENGTH = 256, 32  # symbols of a sample


def run(rows: Rows, quick: bool, shapes: str, samples: str, rounds: int, turn: float) -> None:
    """Adds a row for each contestant at each shape and number of samples."""
    workers_lib.TURN = turn
    length = QUICK_LENGTH if quick else LENGTH
    for shape in [QUICK] if quick else [SHAPES[int(number) - 1] for number in shapes.split(",")]:
        for count in map(int, samples.split(",")):
            workers, settings = {}, {"the weights read": "plain"}
            for name, maker in PEERS.items():
                arguments = {"shape": asdict(shape), "samples": count, "length": length}
                settings[name], workers[name] = fastest(maker, arguments, environments(quick), wait=False)
            arguments = {"shape": asdict(shape), "length": length}
            workers["the weights read"] = Worker("benchmarks.peers.pytorch.reading", arguments, {}, wait=False)
            for worker in workers.values():
                worker.warm()
            seconds = rows_lib.alternate({n: w.seconds for n, w in workers.items()}, 2 if quick else rounds)
            for name, worker in workers.items():
                rows.add(
                    shape=str(shape),
                    samples=count,
                    contestant=name,
                    environment=settings[name],
                    device=worker.device,
                    **rows_lib.compared(count * length, seconds[name], seconds["ours"]),
                )
                worker.close()


if __name__ == "__main__":
    rows_lib.main("sampling", run, shapes="1,2,3", samples="1,64", rounds=7, turn=workers_lib.TURN)
