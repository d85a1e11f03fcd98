"""The directories of checkpoints, one a step, each with its seal (see `sealing`).  Needs neither JAX nor Orbax."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from charlstm.config import SCORE_SETTINGS
from charlstm.run.sealing import ALONE, Damaged, read_meta, verify
from data_pipeline.atomic_files import sync

FORMAT = 5
READABLE = (4, FORMAT)  # 4 has the recurrent state as Orbax writes it
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(r"(0|[1-9][0-9]*)\.(saving|removed).*")
_WHOLE, _OTHER_FORMAT, _DAMAGED, _UNREAD = range(4)  # what a process finds of a step; the worst counts for all


class OtherFormat(ValueError):
    """A checkpoint is of another version of this program, and may be whole."""


class StepDirectory:
    """A directory with a subdirectory a step, named by the step alone; any other name means something else.

    `<step>.saving...` is not finished, `<step>.removed-*` is being deleted.  Any other word after the dot says why the
    step was set aside; it is kept for inspection.
    """

    def __init__(
        self,
        path: Path,
        beat: Callable[[], None] = lambda: None,
        is_planned: Callable[[dict[str, Any]], bool] = lambda meta: False,
    ) -> None:
        """Names a directory, which need not be there.

        Args:
          beat: called again and again while files are verified, as `verify` does, and by who reads their arrays.
          is_planned: whether the step of a `meta` is among those to go back to.
        """
        self.path, self.beat, self._is_planned = path, beat, is_planned

    def require_seen(self) -> None:
        """Raises ValueError on a process of a job that does not see what another one has made."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not there: name a run_dir on a file system that all processes share")

    def step(self, step: int) -> Path:
        """Directory of `step`."""
        return self.path / str(step)

    def staging(self, step: int) -> Path:
        """Directory in which `step` is written before it is whole."""
        return self.path / f"{step}.saving"

    def steps(self) -> list[int]:
        """The steps that there are, ascending, whole or not."""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def candidates(self, wanted: int | str | None) -> list[int]:
        """The steps to try, in order: `wanted` alone; the best or the planned first; with None, the newest first.

        Raises:
          ValueError: there is none, or not that one.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"there is no checkpoint in {self.path}")
        if isinstance(wanted, int):
            if wanted not in steps:
                there = ", ".join(map(str, steps))
                raise ValueError(f"there is no checkpoint {wanted} in {self.path}: choose one of {there}")
            return [wanted]
        first = self.by_score() if wanted == "best" else self.planned() if wanted == "planned" else []
        return first + [step for step in reversed(steps) if step not in first]

    def none_whole(self, steps: list[int]) -> ValueError:
        there = ", ".join(map(str, sorted(steps)))
        return ValueError(f"no checkpoint in {self.path} is whole (there are {there}): remove it to start anew")

    def sealed(self) -> dict[int, dict[str, Any]]:
        """The `meta` of every step whose seal can be read, ascending."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                found[step] = read_meta(self.step(step))
        return found

    def by_score(self) -> list[int]:
        """The steps validated with the newest SCORE_SETTINGS, the lowest score first, the earlier of equals first."""
        return next(iter(self._ranked()), [])

    def _ranked(self) -> list[list[int]]:
        """The validated steps in groups whose scores compare, the newest group first, each as `by_score`."""
        groups: dict[str, list[int]] = {}
        sealed = self.sealed()
        for step, meta in reversed(sealed.items()):
            if meta["bits_per_symbol"] is not None:
                groups.setdefault(_score_settings(meta), []).append(step)
        return [sorted(steps, key=lambda step: (sealed[step]["bits_per_symbol"], step)) for steps in groups.values()]

    def planned(self) -> list[int]:
        """The planned steps, the newest first."""
        return [step for step, meta in reversed(self.sealed().items()) if self._is_planned(meta)]

    def read(self, step: int, items: Collection[str] | None = None, share: tuple[int, int] = ALONE) -> dict[str, Any]:
        """The `meta` of `step`; with `items`, after all files of these were verified, or a `share` (see `verify`).

        Raises:
          Damaged: the step is not what was saved.
          OtherFormat: its format is not one that this version reads.
        """
        place = self.step(step)
        meta = read_meta(place) if items is None else verify(place, items, share, self.beat)
        if meta["format"] not in READABLE:
            raise OtherFormat(
                f"checkpoint {step} in {self.path} has format {meta['format']} and this version reads "
                f"{' and '.join(map(str, READABLE))}: use the version that wrote it"
            )
        if meta["step"] != step:
            raise Damaged(f"it was saved as step {meta['step']}")
        return meta

    def read_by_all(
        self,
        step: int,
        items: Collection[str] | None,
        gather: Callable[[str], list[str]],
        share: tuple[int, int] = ALONE,
    ) -> dict[str, Any]:
        """Reads a step on all processes of a job; raises on all if not all find the same step whole.

        A process that went by its own finding would go on alone, or from other arrays than the rest.

        Args:
          gather: all-gathers one string per process, in process order.
          share: the part of the files that this process verifies, if others verify the rest.

        Raises:
          Damaged: the step is damaged on a process, or differs between processes.
          OtherFormat: all processes find another format.
          OSError, ValueError: a process cannot read the step, which may be whole; OSError on that process.
        """
        try:
            meta, error = self.read(step, items, share), None
            own = [_WHOLE, hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()]
        except (Damaged, OtherFormat, OSError) as found:
            meta, error = {}, found
            kind = _UNREAD if isinstance(error, OSError) else _DAMAGED if isinstance(error, Damaged) else _OTHER_FORMAT
            own = [kind, str(error)]
        findings = [json.loads(word) for word in gather(json.dumps(own))]
        if error is None and all(finding == own for finding in findings):
            return meta
        worst, words = max(findings, key=lambda finding: (finding[0], finding == own))
        if worst == _UNREAD and isinstance(error, OSError):
            raise error
        if worst == _WHOLE:
            words = "it is another one on another process"
        elif [worst, words] != own:
            words = f"process {findings.index([worst, words])}: {words}"
        if worst == _UNREAD:
            raise ValueError(words)
        raise OtherFormat(words) if all(kind == _OTHER_FORMAT for kind, _ in findings) else Damaged(words)

    def promote(self, sealed: Path, step: int) -> None:
        """Gives a sealed directory its name: from here on it is step `step`, in place of one that was there."""
        replaced = self._unique(step, "removed")
        if self.step(step).exists():
            os.rename(self.step(step), replaced)
        os.rename(sealed, self.step(step))
        sync(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def quarantine(self, step: int, why: str) -> str:
        """Takes the step away and keeps its files; returns their new name, `<step>.<why>-*`."""
        target = self._unique(step, why)
        os.rename(self.step(step), target)
        return target.name

    def set_aside_staging(self, step: int, why: str) -> str:
        """Quarantines what was to become the step."""
        target = self._unique(step, why)
        os.rename(self.staging(step), target)
        return target.name

    def remove(self, step: int) -> None:
        """Deletes the step; seen from outside it is there whole, or not at all."""
        target = self._unique(step, "removed")
        os.rename(self.step(step), target)
        shutil.rmtree(target, ignore_errors=True)

    def remove_old(self, keep: int) -> None:
        """Leaves the newest `keep`, the best and the newest planned.  Those without a seal are left for `read`.

        A run that was scored with several SCORE_SETTINGS keeps the best by each.
        """
        besides = [steps[0] for steps in self._ranked()] + self.planned()[:1]
        for step in list(self.sealed())[:-keep]:
            if step not in besides:
                self.remove(step)

    def clear_staging(self, step: int) -> None:
        """Deletes what a failed attempt to make `step` has written."""
        for path in self.path.glob(f"{step}.saving*"):
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Finishes or deletes what a killed or failed writer left; only for when nothing is being written."""
        for path in sorted(self.path.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if not found:
                continue
            if found[2] == "saving" and not self.step(int(found[1])).exists():
                with contextlib.suppress(Damaged):
                    verify(
                        path, beat=self.beat
                    )  # killed between the seal and the rename: it is whole, and may be the only one
                    self.promote(path, int(found[1]))
                    continue
            shutil.rmtree(path, ignore_errors=True)

    def _unique(self, step: int, why: str) -> Path:
        return self.path / f"{step}.{why}-{uuid.uuid4().hex[:12]}"  # the same step may be damaged twice


def _score_settings(meta: dict[str, Any]) -> str:
    settings = [setting for section in meta["identity"].get("config", {}).values() for setting in section.items()]
    return json.dumps([setting for setting in settings if setting[0] in SCORE_SETTINGS])
