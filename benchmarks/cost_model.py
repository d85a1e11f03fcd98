"""What data-parallel training costs on 1 to 1,024 GPUs: `python -m benchmarks.cost_model`; docs/scaling.md explains it.

An update takes, on n GPUs of b streams each,

    compute   f + (t - u - f) b / b_1   t: measured on one GPU with b_1 streams; f: what the fewest streams take
    updating  u, or sharded u / n       clipping and the optimizer, of all parameters on every GPU, or of 1/n on each
    waiting   j sqrt(2 ln n) of both    for the slowest of n, whose times deviate by j of the mean (of normal deviates)
    reducing  fast:   one all-reduce, 2 (n-1)/n P bytes through every GPU, 2 log2(n) messages one after the other
              exact:  an all-to-all, then an all-gather, (n-1)/n P bytes and n - 1 messages each, and 4 P of memory

P is the gradient in bytes.  Inside a node all goes over its own links.  Between nodes an all-reduce and an all-gather
keep all the node's adapters busy with one and the same data, but in an all-to-all every GPU has data of its own, and
its own adapter alone.  Nothing overlaps: the gradient is reduced once, when it is whole.  A sharded update has the
same bytes on the wire, as parameters are gathered in place of gradients.  Ours is not sharded: see docs/decisions.md.
"""

import argparse
import dataclasses
import math

from benchmarks.rows import Rows

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Nodes of GPUs; rates in bytes a second, one way."""

    inside: float  # a GPU's links within its node
    between: float  # a GPU's share of its node's network adapters
    memory: float  # a GPU's own
    latency: float = 5e-6  # seconds of one message
    gpus: int = 8  # of a node


@dataclasses.dataclass(frozen=True)
class Work:
    """One update of one GPU, measured."""

    seconds: float
    streams: int
    window: int
    gradient: float  # bytes
    least: float = 0.0  # seconds of the gradient, however few the streams are
    updating: float = 0.0  # seconds of clipping and the optimizer
    jitter: float = 0.0  # deviation of its time, as a part of it


V100 = Machine(inside=130e9, between=25e9 / 8, memory=900e9)
H100 = Machine(inside=450e9, between=50e9, memory=3.35e12)
H200 = dataclasses.replace(H100, memory=4.8e12)
MACHINES = {"V100": V100, "H100": H100, "H200": H200}
# The mLSTM of 4,096 units, 85 M parameters, of Puri et al. 2018 (arXiv:1808.01371), in mixed precision: 40 GB three
# times in four hours on 128 V100s, 109 times as fast as on one, is 76,000 characters a second on one.  However few the
# streams, its weights are read at each symbol, forward and twice back.  Adam in float32 reads or writes eight numbers
# of each parameter: the gradient, once more for its norm, and the parameter and two averages, before and after.
MLSTM = Work(
    256 * 256 / 76e3, 256, 256, gradient=2 * 85e6, least=3 * 256 * 2 * 85e6 / 900e9, updating=8 * 4 * 85e6 / 900e9
)


def compute(work: Work, streams: float) -> float:
    """Seconds of the gradient of `streams` streams on one GPU."""
    return work.least + (work.seconds - work.updating - work.least) * streams / work.streams


def reducing(machine: Machine, gradient: float, n: int, reduction: str) -> float:
    """Seconds until the sum of n gradients of `gradient` bytes is on all n GPUs."""
    if n == 1:
        return 0.0
    volume, far = gradient * (n - 1) / n, n > machine.gpus
    shared = min(machine.inside, machine.between * machine.gpus) if far else machine.inside
    if reduction == "fast":
        return 2 * volume / shared + 2 * math.ceil(math.log2(n)) * machine.latency
    own = machine.between if far else machine.inside
    return volume / own + volume / shared + 2 * (n - 1) * machine.latency + 4 * gradient / machine.memory


def update(machine: Machine, work: Work, n: int, streams: float, reduction: str, sharded: bool = False) -> float:
    """Seconds of an update on n GPUs of `streams` streams each."""
    waiting = work.jitter * math.sqrt(2 * math.log(n))
    own = compute(work, streams) + work.updating / (n if sharded else 1)
    return own * (1 + waiting) + reducing(machine, work.gradient, n, reduction)


def speedup(
    machine: Machine, work: Work, n: int, reduction: str, total_streams: int = 0, sharded: bool = False
) -> float:
    """Symbols a second on n GPUs over those on one; the batch grows along, or is of `total_streams`."""
    streams = total_streams / n if total_streams else work.streams
    alone = update(machine, work, 1, total_streams or work.streams, reduction)
    return (1 if total_streams else n) * alone / update(machine, work, n, streams, reduction, sharded)


def stops_at(machine: Machine, work: Work, reduction: str, total_streams: int = 0) -> int | None:
    """The first count, of powers of two, at which half of the GPUs' time is lost; None up to 2^20."""
    counts = (2**k for k in range(1, 21))
    return next((n for n in counts if speedup(machine, work, n, reduction, total_streams) < n / 2), None)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cost_model")
    for field in dataclasses.fields(Work):
        parser.add_argument(
            f"--{field.name}", type=type(getattr(MLSTM, field.name)), default=getattr(MLSTM, field.name)
        )
    parser.add_argument("--machine", choices=MACHINES, default="V100")
    parser.add_argument("--total_streams", type=int, default=32768, help="of the batch that does not grow")
    chosen = vars(parser.parse_args())
    machine, total = MACHINES[chosen.pop("machine")], chosen.pop("total_streams")
    work, rows = Work(**chosen), Rows("cost_model", measured=False)
    for n in COUNTS:
        fields = {}
        for reduction in ("fast", "exact"):
            fields[f"{reduction}_ms"] = 1000 * reducing(machine, work.gradient, n, reduction)
            speed = n * work.streams * work.window / update(machine, work, n, work.streams, reduction)
            fields[f"{reduction}_characters_per_second"] = speed
            fields[f"{reduction}_speedup"] = speedup(machine, work, n, reduction)
            fields[f"{reduction}_speedup_of_{total}_streams"] = speedup(machine, work, n, reduction, total)
        rows.add(gpus=n, **fields)
    for n in COUNTS:
        fields = {"updating_ms": 1000 * work.updating, "sharded_updating_ms": 1000 * work.updating / n}
        for words, streams in (("", 0), (f"_of_{total}_streams", total)):
            for sharded in (False, True):
                gained = speedup(machine, work, n, "exact", streams, sharded)
                fields[f"{'sharded_' if sharded else ''}exact_speedup{words}"] = gained
        rows.add(gpus=n, **fields)
    for reduction in ("fast", "exact"):
        growing, fixed = (stops_at(machine, work, reduction, streams) for streams in (0, total))
        rows.add(reduction=reduction, half_lost_at=growing, half_lost_of_fixed_batch_at=fixed)
    rows.tables()


if __name__ == "__main__":
    main()
