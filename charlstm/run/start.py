"""Starts a run, new or resumed.  Refuses here, before the run writes anything, all that can be refused."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import backend, estimate, initial_checkpoint, memory, prepared, presets, run_directory, samples
from charlstm.run import corpus as corpus_lib
from charlstm.run.memory import End
from charlstm.run.run_directory import Identity, Initial
from charlstm.run.step_directory import StepDirectory
from charlstm.training import placement, schedules
from charlstm.training import step as step_lib
from charlstm.types import ModelParams
from data_pipeline.batch import Separator
from data_pipeline.loader import Windows, open_windows
from data_pipeline.progress import announced
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

_LOCAL = ("mixture", "reader_threads", "read_ahead")  # settings that each process may have its own way

ChooseMesh = Callable[[Config], Mesh]


def due(step: int, every: int, last: int = 0) -> bool:
    """True if `step` is a multiple of `every` (0 disables), or the last step."""
    return step == last or (every > 0 and step % every == 0)


class Run(NamedTuple):
    """A run ready to train: its directory, settings, text, devices and compiled update."""

    run_dir: Path
    config: Config
    identity: Identity
    corpus: Corpus
    plan: StreamPlan
    mesh: Mesh
    train_step: jax.stages.Wrapped
    resumed: bool
    params: ModelParams | None  # initial parameters taken from another run; None: drawn at random, or restored
    initial: Initial | None  # record of where `params` come from
    remarks: list[str]  # what the log is to say first

    @property
    def separator(self) -> Separator:
        """Separator that ends a document; () if documents are not told apart."""
        return run_directory.separator(self.config, self.corpus.vocabulary)

    def is_planned(self, meta: dict[str, Any]) -> bool:
        """True of a checkpoint to roll back to: one that the run makes even if nothing ever stops it."""
        settings, step, sums = self.config.training, meta["step"], meta["sums"] or {}
        if settings.on_divergence != "rollback" or sums.get("evaluation_due"):
            return False
        evaluated = "valid" in self.corpus.splits and due(step, settings.evaluate_every)
        return evaluated or due(step, settings.checkpoint_every)

    def open_windows(self, start: int) -> Windows:
        """The windows of this process's streams, from number `start` on."""
        streams = self.config.streams
        return open_windows(
            self.corpus.splits["train"],
            self.plan,
            rows=distributed.process_rows(self.mesh, streams.batch_size),
            start_step=start,
            separator=self.separator,
            threads=streams.reader_threads,
            read_ahead=streams.read_ahead,
        )


def open_corpus(config: Config, given: Sequence[str], run_dir: Path | None, mesh: Mesh) -> tuple[Corpus, Config]:
    """Opens the corpus that `config` names, prepared first if need be.  Returns it, and `config` with its vocabulary.

    Args:
      given: the flags that were given, as lines of a flagfile: a corpus that was prepared otherwise is refused.

    Raises:
      ValueError: there is no such corpus, or it does not fit the flags given, or the settings do not fit the devices.
    """
    if not (run_dir and distributed.any_process(run_directory.has_checkpoint(run_dir))):  # else `start` knows the rest
        # Before a text is prepared, which may take hours.
        placement.shards_per_device(config_lib.fill_automatic(config, mesh.size), mesh.size)
    if run_dir:
        initial_checkpoint.refuse_imported(run_dir)
        run_directory.refuse_strange(run_dir)
        corpus_lib.refuse_inside(run_dir, config.corpus, config.streams.mixture)
        if distributed.any_process(run_directory.has_checkpoint(run_dir)):  # the run's own vocabulary is compared
            given = [flag for flag in given if not flag.startswith("--vocabulary_of=")]
    return corpus_lib.open_for(config, given)


def check(config: Config, corpus: Corpus, mesh: Mesh, dry: bool = False, fixed: bool = False) -> StreamPlan:
    """Checks settings against text, devices and machine; returns the plan of the training split.

    Args:
      dry: only an estimate is wanted, so only memory that no machine has is refused.
      fixed: the run has begun, so another number of devices is the remedy, not another batch_size.

    Raises:
      ValueError: the settings do not go with this text, these devices or this machine.
    """
    placement.shards_per_device(config_lib.fill_automatic(config, mesh.size), mesh.size, fixed)
    plan = corpus_lib.plan_for(config, corpus)
    if (flag := config_lib.needs_validation(config)) and "valid" not in corpus.splits:
        raise ValueError(f"{flag} goes by validation scores, and {corpus.name} has no valid split: give one")
    run_directory.separator(config, corpus.vocabulary)
    samples.check(config, corpus.vocabulary)
    memory.require_possible(config, corpus.vocabulary.size, dry)
    corpus.require_cache(len(distributed.process_rows(mesh, config.streams.batch_size)))
    return plan


def dry_run(
    run_dir: Path | None, config: Config, corpus: Corpus, mesh: Mesh, form: str = "text", end: End = None
) -> str:
    """Estimates such a run, or what is left of the one in `run_dir`: a table, or one line of JSON.

    Raises:
      ValueError: as the run would.
    """
    done = None
    if run_dir and distributed.any_process(run_directory.has_checkpoint(run_dir)):
        _, config, _ = _settings(run_dir, config, Identity(corpus.vocabulary, corpus.fingerprint), "", lambda _: mesh)
        done = max(StepDirectory(run_dir / "checkpoints").steps(), default=0)
    plan, config = check(config, corpus, mesh, dry=True), config_lib.fill_automatic(config, mesh.size)
    corpus = corpus_lib.as_read(config, corpus)
    config, _ = backend.chosen(config, corpus, plan, mesh, end)
    table = estimate.report(config, corpus, plan, mesh, done, form, end)
    suggest = form != "json" and done is None
    suggested = presets.suggestion(config, plan.symbols, corpus.vocabulary.size, mesh) if suggest else ""
    return f"{table}\n{suggested}" if suggested else table


def start(
    run_dir: Path, config: Config, corpus: Corpus, choose_mesh: ChooseMesh, initial: str = "", end: End = None
) -> Run:
    """The run in `run_dir`, resumed, or a new one; nothing is written yet.

    Args:
      corpus: in the order of the text; a backward run turns it around.
      choose_mesh: gives the devices for a config.
      initial: what --initial_checkpoint names, or "".
      end: called where a device fails, see `memory.watched`.

    Raises:
      ValueError: this run cannot be had, in one sentence with the remedy.
    """
    initial_checkpoint.refuse_imported(run_dir)
    run_directory.refuse_strange(run_dir)
    identity = Identity(corpus.vocabulary, corpus.fingerprint)
    initial = str(run_directory.named("initial_checkpoint", initial)) if initial else ""
    resumed, config, remarks = _settings(run_dir, config, identity, initial, choose_mesh)
    _require_agreement(config, identity)
    config, mesh = corpus_lib.fix_segment(config, corpus), choose_mesh(config)
    plan, corpus = check(config, corpus, mesh, fixed=resumed), corpus_lib.as_read(config, corpus)
    config, remark = backend.chosen(config, corpus, plan, mesh, end)
    remarks += [remark] if remark else []
    suggested = "" if resumed else presets.suggestion(config, plan.symbols, corpus.vocabulary.size, mesh)
    remarks += [suggested] if suggested else []
    separator = run_directory.separator(config, corpus.vocabulary)
    remarks += ["the text is read backward"] if config.streams.reverse else []
    remarks += corpus_lib.description(plan, config.training.num_steps)
    remarks += prepared.remarks(config, corpus)
    remarks += corpus_lib.remarks_on_separator(config, corpus, separator)
    remarks += schedules.remarks(config.optimizer, config.training, plan.steps_per_epoch, resumed=resumed)
    remarks += samples.remarks(config)
    train_step = step_lib.make(config, corpus.vocabulary.size, mesh, plan.steps_per_epoch)
    newest = max(StepDirectory(run_dir / "checkpoints").steps(), default=-1)
    if not distributed.any_process(newest >= config.training.num_steps):  # else there is no update left to make
        remarks += _require_memory(config, corpus, mesh, train_step)
    params, taken = None, None
    if not distributed.any_process(newest >= 0):
        if resumed and (taken := run_directory.read_initial(run_dir)):
            params = initial_checkpoint.take_again(run_dir, taken, config, identity, mesh, remarks.append)
        elif initial:
            params, taken = initial_checkpoint.take(initial, config, identity, mesh, remarks.append)
    return Run(run_dir, config, identity, corpus, plan, mesh, train_step, resumed, params, taken, remarks)


def _settings(
    run_dir: Path, wanted: Config, identity: Identity, initial: str, choose_mesh: ChooseMesh
) -> tuple[bool, Config, list[str]]:
    """Returns (resumed, settings, remarks) of the run that is there, or of a new one.

    A run without a checkpoint, because its first try failed, is begun anew if other settings are given.
    """
    remarks: list[str] = []
    if distributed.any_process(run_directory.exists(run_dir)):
        has_checkpoint = distributed.any_process(run_directory.has_checkpoint(run_dir))
        try:
            config, remarks = distributed.run_on_all(
                lambda: run_directory.resume_config(run_dir, wanted, identity, initial)
            )
            return True, config, remarks
        except run_directory.OtherRun as refused:
            if has_checkpoint:
                raise
            remarks = [f"begun anew, as there was no checkpoint yet: {str(refused).partition(': give ')[0]}"]
    return False, config_lib.fill_automatic(wanted, choose_mesh(wanted).size), remarks


def _require_agreement(config: Config, identity: Identity) -> None:
    """Raises ValueError, on all processes, where one has other settings or another text than the first.

    Each may have the text elsewhere, and read it ahead in its own way.
    """
    own: dict[str, Any] = {"corpus_fingerprint": identity.corpus_fingerprint}
    for name, (section, field) in config_lib.flatten(config).items():
        if name not in _LOCAL and not (section == "corpus" and field.metadata["mutable"]):
            own[name] = getattr(getattr(config, section), name)
    written = json.dumps(own)
    if len(set(distributed.all_gather_str(hashlib.sha256(written.encode()).hexdigest()))) == 1:
        return
    first, *others = map(json.loads, distributed.all_gather_str(written))
    for process, other in enumerate(others, 1):
        if differing := [f"{name}: {first[name]} -> {other[name]}" for name in own if first[name] != other[name]]:
            raise ValueError(
                f"process {process} has other settings than process 0 ({'; '.join(differing)}): start all processes of "
                "a job with the same"
            )


def _require_memory(config: Config, corpus: Corpus, mesh: Mesh, train_step: jax.stages.Wrapped) -> list[str]:
    """A remark where the memory is short, before anything is made.  Raises ValueError where an update cannot run."""

    def update() -> memory.Update:
        sizes = corpus.vocabulary.size, corpus.splits["train"].dtype
        with announced("compiling the update (once)"):
            found = memory.compiled_update(train_step, config, *sizes, mesh)
        if why := memory.too_much(found, config, mesh):
            raise ValueError(why)
        return found

    remark = memory.close(distributed.run_on_all(update), mesh)
    return [remark] if remark else []
