"""One of two processes that restore together, each from a copy of the checkpoints of its own; see test_restores.

    python -m tests.faults.restorers COORDINATOR PROCESS FOLDER FLIPS

Both go through the same cases.  In each of them the copies are damaged, one or both, both processes restore, and each
prints a line of JSON: which step it was, whether what it holds are the bits that were saved, what was said.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm import distributed
from charlstm.run import array_files, sealing
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.sealing import SEAL
from tests.run.test_checkpoint import IDENTITY, abstract_state, host_state, make_state, rewrite_seal

LAYERS = 1
STEPS = range(1, 4)
FLIPPED = range(2, 12)  # many in one case, as each costs far less than the restoring of the whole one

Damage = Callable[[Path], object]


class Case(NamedTuple):
    """What is done to the copy of which process, and the step that both are to restore then; None: to refuse."""

    name: str
    damage: dict[int, Damage]
    step: int | tuple[int, ...] | None  # a tuple: one of these


def save(folder: Path) -> None:
    """The checkpoints of which each process gets a copy."""
    for name, steps in (("few", STEPS), ("many", range(1, FLIPPED.stop))):
        with Checkpoints(folder / name, log=print, keep=len(steps)) as checkpoints:
            for step in steps:
                checkpoints.save(make_state(step, layers=LAYERS), IDENTITY, None)
    with Checkpoints(folder / "another", log=print) as checkpoints:
        # Only what every process has whole is another: of what they share, they would see that it does not fit.
        another = make_state(3, layers=LAYERS)._replace(params=make_state(1, layers=LAYERS).params)
        checkpoints.save(another, IDENTITY, None)


def flips(whole: Path, count: int) -> Iterator[Case]:
    """One bit of each of the newer checkpoints, for one of the processes; only the oldest is whole for both."""
    chance = random.Random(0)
    for first in range(0, count, len(FLIPPED)):
        damage: dict[int, list[Damage]] = {0: [], 1: []}
        for number, step in enumerate(FLIPPED, first):
            files = files_of(whole, step)
            file = files[number % len(files)]
            process = verifies(whole, file, chance.randrange(2))
            damage[process].append(flip(file, chance.randrange(8 * (whole / file).stat().st_size)))
        yield Case("flipped bits", {process: all_of(*each) for process, each in damage.items()}, 1)


def verifies(whole: Path, file: Path, otherwise: int) -> int:
    """The process in whose share a file is; `otherwise` where both read it."""
    step, name = whole / file.parts[0], Path(*file.parts[1:]).as_posix()
    sizes = {name: written["size"] for name, written in sealing._read(step)[1].items()}
    shares = [sealing.shared(sizes, process, 2) for process in (0, 1)]
    return otherwise if (name in shares[0]) == (name in shares[1]) else int(name in shares[1])


def cases(whole: Path) -> Iterator[Case]:
    for number, file in enumerate(files_of(whole, 3)):
        for name, damage in (("shortened", shortened), ("emptied", emptied), ("deleted", deleted)):
            process = verifies(whole, file, number % 2)
            yield Case(f"a file {name}", {process: damage(file)}, 2)
            # The other one notices what it reads of it, and need not notice what it does not.
            yield Case(f"verified by the other, a file {name}", {1 - process: damage(file)}, (2, 3))
    for process in (0, 1):
        for name, damage, step in ONE_SIDED:
            yield Case(f"{name} on process {process}", {process: damage}, step)
    seals = [deleted(Path(str(step), SEAL)) for step in STEPS]
    yield Case("a directory of an older step's name on both", {0: named_as_newest, 1: named_as_newest}, 3)
    yield Case("an empty directory on both", {0: left_empty, 1: left_empty}, 3)
    yield Case("a newer format on both", {0: newer_format, 1: newer_format}, None)
    yield Case("another step on each", {0: seals[2], 1: seals[1]}, 1)
    yield Case("all steps, each on one of both", {0: all_of(seals[0], seals[2]), 1: seals[1]}, None)


def files_of(whole: Path, step: int) -> list[Path]:
    return sorted(path.relative_to(whole) for path in (whole / str(step)).rglob("*") if path.is_file())


def flip(file: Path, bit: int) -> Damage:
    def damage(own: Path) -> None:
        content = bytearray((own / file).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (own / file).write_bytes(content)

    return damage


def shortened(file: Path) -> Damage:
    return lambda own: (own / file).write_bytes((own / file).read_bytes()[:-1])


def emptied(file: Path) -> Damage:
    return lambda own: (own / file).write_bytes(b"")


def deleted(file: Path) -> Damage:
    return lambda own: (own / file).unlink()


def all_of(*damages: Damage) -> Damage:
    return lambda own: [damage(own) for damage in damages]


def claimed_twice(own: Path) -> None:
    """Two directories claim to be step 2."""
    shutil.rmtree(own / "3")
    shutil.copytree(own / "2", own / "3")


def named_as_newest(own: Path) -> None:
    shutil.copytree(own / "3", own / "4")


def saved_twice(own: Path) -> None:
    """The newest step is whole, but it is another one: of a run that has gone another way."""
    shutil.rmtree(own / "3")
    shutil.copytree(own.parent / "another" / "3", own / "3")


def newer_format(own: Path) -> None:
    rewrite_seal(own / "3", lambda meta: meta.update(format=99))


def left_empty(own: Path) -> None:
    (own / "4").mkdir()


def left_unfinished(own: Path) -> None:
    shutil.copytree(own / "3", own / "4.saving")


def gone(own: Path) -> None:
    shutil.rmtree(own / "3")


def all_gone(own: Path) -> None:
    shutil.rmtree(own)


def unreadable(own: Path) -> None:
    """An error that proves nothing of the file."""
    (own / "3" / SEAL).unlink()
    (own / "3" / SEAL).symlink_to(SEAL)


def all_emptied(own: Path) -> None:
    for step in STEPS:
        emptied(Path(str(step), SEAL))(own)


def other_bits_read(own: Path) -> None:
    """The files are whole, and one bit of what this process reads of them first is not what they hold."""
    read = array_files.read

    def read_otherwise(directory: Path, trees: dict[str, Any], beat: Callable[[], None]) -> Callable[[], Any]:
        array_files.read = read
        send = read(directory, trees, beat)
        return lambda: otherwise(send())

    def otherwise(found: dict[str, Any]) -> dict[str, Any]:
        b_out = found["params"].b_out
        piece = np.array(b_out.addressable_shards[0].data)
        piece.view(np.uint8)[0] ^= 1
        pieces = [jax.device_put(piece, b_out.addressable_shards[0].device)]
        changed = jax.make_array_from_single_device_arrays(b_out.shape, b_out.sharding, pieces)
        return found | {"params": found["params"]._replace(b_out=changed)}

    array_files.read = read_otherwise


def reading_fails(own: Path) -> None:
    """The files are whole, and reading the arrays fails: out of memory, say."""

    def fail(directory: Path, trees: dict[str, Any], beat: Callable[[], None]) -> dict[str, Any]:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    array_files.read = fail


ONE_SIDED: tuple[tuple[str, Damage, int | None], ...] = (
    ("two directories of one step", claimed_twice, 2),
    ("a directory of an older step's name", named_as_newest, 3),
    ("another checkpoint of the same step", saved_twice, 2),
    ("a newer format", newer_format, 2),
    ("an empty directory", left_empty, 3),
    ("an unfinished one", left_unfinished, 3),
    ("the newest gone", gone, 2),
    ("all gone", all_gone, None),
    ("all damaged", all_emptied, None),
    ("a file that cannot be read", unreadable, None),
    ("other bits read than verified", other_bits_read, 2),
    ("an error in reading the arrays", reading_fails, None),
)


def restored(directory: Path) -> dict[str, Any]:
    said: list[str] = []
    with Checkpoints(directory, writable=False, log=said.append) as checkpoints:
        try:
            state, meta = checkpoints.restore(abstract_state(2, LAYERS))
        except (ValueError, OSError, RuntimeError) as error:
            return {"step": None, "refusal": str(error), "said": said}
    expected = jax.tree.leaves(host_state(meta["step"], LAYERS))
    holds = all(
        np.asarray(shard.data).tobytes() == np.asarray(whole[shard.index]).tobytes()
        for leaf, whole in zip(jax.tree.leaves(state), expected, strict=True)
        for shard in leaf.addressable_shards
    )
    return {"step": meta["step"], "holds": holds, "said": said}


def main() -> None:
    coordinator, process, folder, count = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    distributed.join(coordinator, 2, process, heartbeat_timeout=20)

    def judge(case: Case, directory: Path) -> None:
        case.damage.get(process, lambda own: None)(directory)
        print(json.dumps({"case": case.name, "expected": case.step} | restored(directory)), flush=True)

    for case in flips(folder / "many", count):
        judge(case, folder / "many")
        case.damage[process](folder / "many")  # a bit flipped again is as it was
    read = array_files.read
    for case in cases(folder / "few"):
        own = shutil.copytree(folder / "few", folder / "damaged")
        judge(case, own)
        array_files.read = read
        shutil.rmtree(own, ignore_errors=True)


if __name__ == "__main__":
    main()
