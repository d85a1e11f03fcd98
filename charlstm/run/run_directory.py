"""The run directory: what is checked when a run is resumed, evaluated or sampled.

config.json      every setting, as the run fixed it; written last, so that where it stands a run stands
identity.json    the vocabulary, and the fingerprint of the corpus
flags.txt        the flags of the command that started the run, as a flagfile
initial_checkpoint.json     which parameters the run started from, where these are another run's
log.txt  metrics.jsonl  samples.jsonl  checkpoints/<step>/
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config, arguments
from charlstm.run.checkpoint import Checkpoints, Wanted
from charlstm.run.run_lock import LOCK
from charlstm.run.sealing import SEAL
from charlstm.run.step_directory import StepDirectory
from charlstm.training import train_state
from charlstm.types import ModelParams
from data_pipeline.atomic_files import atomic_write, expand_user, remove_torn
from data_pipeline.batch import Separator
from data_pipeline.vocabulary import Vocabulary, escaped_bytes

INITIAL = "initial_checkpoint.json"
WRITTEN_FIRST = ("identity.json", "flags.txt", INITIAL, "config.json")


class OtherRun(ValueError):
    """The run in a directory is not the one that was asked for."""


class Initial(NamedTuple):
    """Record of the parameters of another run that a run started from."""

    named: str  # by --initial_checkpoint
    other: str  # the other run's directory
    step: int
    item: str  # params, or their average
    digest: str  # of these parameters, as `digest.state_digest`
    grown: str = ""  # what was done to them, where they are of a smaller model or of other symbols


@dataclasses.dataclass(frozen=True)
class Identity:
    """Vocabulary and corpus fingerprint, checked on resume, evaluation and sampling."""

    vocabulary: Vocabulary
    corpus_fingerprint: str  # "" of an imported model, whose text is not known

    def to_json(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary.to_json(), "corpus_fingerprint": self.corpus_fingerprint}


def checkpoint_identity(config: Config, identity: Identity) -> dict[str, Any]:
    """Identity stored in every checkpoint, by which another run refuses it."""
    names = ("jax", "jaxlib", "numpy", "grain", "orbax-checkpoint")
    return {
        "config": dataclasses.asdict(config),
        "vocabulary_digest": identity.vocabulary.digest,
        "corpus_fingerprint": identity.corpus_fingerprint,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def named(flag: str, value: str | os.PathLike[str]) -> Path:
    """The absolute path of the run directory that a flag or an argument names.

    Raises:
      TypeError: it is no path.
      ValueError: it is empty, or not UTF-8, and neither Orbax nor JSON could write it down.
    """
    path = expand_user(arguments.path(flag, value, "the directory of a run")).absolute()
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag}={os.fspath(path)!a} is not UTF-8: checkpoints need a name that is") from None
    return path


def name_of(run_dir: Path) -> str:
    """Returns the last name of a path, of what it leads to where it is . or ends in .. ."""
    return run_dir.name if run_dir.name not in ("", "..") else run_dir.resolve().name


def create(
    run_dir: Path, config: Config, identity: Identity, given: Sequence[str], initial: Initial | None = None
) -> None:
    """Makes a new run in a directory that is `held`, and is made if need be.

    A run that is there and has no checkpoint gives way to it; its log goes on.

    Raises:
      ValueError: there are files in it already that are no run's, or the run has got a checkpoint.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN_FIRST:
        remove_torn(run_dir / name)  # a first try was killed as it came here
    if exists(run_dir) and has_checkpoint(run_dir):
        raise ValueError(f"{run_dir} has just got a checkpoint of other settings: name another run_dir")
    refuse_strange(run_dir)
    if initial:
        _write(run_dir / INITIAL, json.dumps(initial._asdict(), indent=1) + "\n")
    else:
        (run_dir / INITIAL).unlink(missing_ok=True)
    _write(run_dir / "flags.txt", "\n".join(given) + "\n")
    _write(run_dir / "identity.json", json.dumps(identity.to_json(), indent=1) + "\n")
    write_config(run_dir, config)


def refuse_strange(run_dir: Path) -> None:
    """Raises ValueError where `run_dir` is a directory with files in it that are no run's."""
    known = (*WRITTEN_FIRST, "log.txt", "logs", "heartbeats")
    begun = (LOCK, *(f"{name}." for name in WRITTEN_FIRST))  # what a first try that was killed has left of them
    names = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    strange = [name for name in names if name not in known and not name.startswith(begun)]
    if strange and "config.json" not in names:
        raise ValueError(f"{run_dir} holds {strange[0]} but no config.json, so it is not a run: use an empty directory")


def write_config(run_dir: Path, config: Config) -> None:
    """Keeps the settings with which a run goes on."""
    _write(run_dir / "config.json", config_lib.to_json(config))


def exists(run_dir: Path) -> bool:
    return (run_dir / "config.json").is_file()


def has_checkpoint(run_dir: Path) -> bool:
    """True if a save was ever finished here, even if its checkpoint was quarantined or lacks its name."""
    checkpoints = run_dir / "checkpoints"
    return bool(StepDirectory(checkpoints).steps()) or any(checkpoints.glob(f"*/{SEAL}"))


def read_initial(run_dir: Path) -> Initial | None:
    """Reads which parameters of another run this one started from.  Raises ValueError if that is damaged."""
    path = run_dir / INITIAL
    if not path.exists():
        return None
    try:
        initial = Initial(**json.loads(path.read_text("utf-8")))
        if [type(value) for value in initial] != [str, str, int, str, str, str]:
            raise TypeError("values of other types")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return initial


def read(run_dir: Path, flag: str = "run_dir") -> tuple[Config, Identity]:
    """The config and identity of the run that `flag` names.  Raises ValueError where there is none or it is damaged."""
    if not exists(run_dir):
        raise ValueError(f"{flag}={run_dir} is not a run: it has no config.json")
    try:
        config = config_lib.from_json((run_dir / "config.json").read_text("utf-8"), str(run_dir / "config.json"))
        return config, _read_identity(run_dir / "identity.json")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"{run_dir} is not a whole run: {error}") from None


def settings_of(run_dir: Path, otherwise: Config) -> Config:
    """The settings of the run in `run_dir`, which need not all be given again; `otherwise` if there is none."""
    with contextlib.suppress(ValueError, OSError):  # told of when the run is opened
        return read(run_dir)[0]
    return otherwise


def _read_identity(path: Path) -> Identity:
    try:
        tree = json.loads(path.read_text("utf-8"))
        fingerprint = tree.get("corpus_fingerprint") if isinstance(tree, dict) else None
        if not isinstance(fingerprint, str) or not re.fullmatch("([0-9a-f]{64})?", fingerprint):
            raise ValueError("no corpus_fingerprint")
        return Identity(Vocabulary.from_json(tree.get("vocabulary")), fingerprint)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def resume_config(run_dir: Path, wanted: Config, identity: Identity, initial: str) -> tuple[Config, list[str]]:
    """The config with which the run in `run_dir` goes on, its own with the free settings of `wanted`; what changed.

    Nothing is written.

    Args:
      initial: what --initial_checkpoint names, or "".

    Raises:
      OtherRun: `wanted` would change the mathematics, the vocabulary, the text or the parameters to start from; says
        both values, and the ways on.
      ValueError: it is not a run, or damaged.
    """
    run_config, run_identity = read(run_dir)
    mixed, now = (config.streams.mixture or "none" for config in (run_config, wanted))
    check_identity(run_dir, run_identity, identity, f" (mixture: {mixed} -> {now})" if mixed != now else "")
    forbidden, free = config_lib.diff(run_config, wanted)
    started_from = read_initial(run_dir)
    before = started_from.named if started_from else ""
    if before != initial and (initial or not has_checkpoint(run_dir)):
        forbidden.append(f"initial_checkpoint: {before or 'none'} -> {initial or 'none'}")
    if forbidden:
        raise OtherRun(
            f"{run_dir} was started with other settings ({'; '.join(forbidden)}): give its own with "
            f"--flagfile={run_dir / 'flags.txt'}, or name another run_dir, which --initial_checkpoint={run_dir} starts "
            "from its parameters"
        )
    changed = {change.split(":")[0] for change in free}
    flat = config_lib.flatten(wanted)
    values = {name: getattr(getattr(wanted, flat[name][0]), name) for name in changed}
    remarks = [f"changed since the run was started or last continued: {change}" for change in free]
    return config_lib.replace(run_config, **values), remarks


def check_identity(run_dir: Path, run: Identity, now: Identity, changed: str = "", remedy: str | None = None) -> None:
    """Raises OtherRun where the vocabulary or the corpus `now` is not that of the run.

    Args:
      changed: what may be why.
      remedy: how the sentence ends, such as ": give --text"; None: with what resumes the run.
    """
    own = f": give the run's own corpus, as in {run_dir / 'flags.txt'}, or another run_dir"
    if run.vocabulary != now.vocabulary:
        raise OtherRun(
            f"{run_dir} has {run.vocabulary.in_short}, and the corpus given has {now.vocabulary.in_short}"
            f"{own if remedy is None else remedy}"
        )
    if run.corpus_fingerprint not in ("", now.corpus_fingerprint):
        own += f", which --initial_checkpoint={run_dir} starts from its parameters"
        raise OtherRun(
            f"{run_dir} was trained on the corpus with fingerprint {run.corpus_fingerprint[:12]}, and the one given "
            f"has {now.corpus_fingerprint[:12]}{changed}{own if remedy is None else remedy}"
        )


def separator(config: Config, vocabulary: Vocabulary) -> Separator:
    """Separator that ends a document, if the run resets state there; else ().

    In the order of reading: of a backward run its last symbol comes first, and the document that is read next follows.

    Raises:
      ValueError: it is no text of the vocabulary, or none at all.
    """
    if config.streams.reset_state != "document":
        return ()
    text = config.corpus.document_separator
    remedy = ""
    try:
        escaped_bytes(text)  # of an escape that is none, the message has the remedy
        remedy = "; prepare the text with one that is, name another that ends documents, or give --reset_state=stream"
        ids = vocabulary.encode_escaped(text)
    except ValueError as error:
        raise ValueError(f"document_separator={text!r}: {error}{remedy}") from None
    if not len(ids):
        raise ValueError("document_separator='' ends no document: give what does, or --reset_state=stream")
    return tuple((ids[::-1] if config.streams.reverse else ids).tolist())


def restore_params(
    run_dir: Path, config: Config, identity: Identity, mesh: Mesh, which: str, say: Callable[[str], None]
) -> tuple[ModelParams, int]:
    """Parameters of a run (their average, where it keeps one, saying so), on every device of `mesh`, and their step.

    Args:
      which: "best" on validation (the newest where none was validated), "latest", or a step in digits.  Of the first
        two, the next one that is whole is taken where one is damaged, saying so.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged, or none is whole.
    """
    if which not in ("best", "latest") and not which.isdecimal():
        raise ValueError(f"checkpoint={which!r} is neither best, nor latest, nor a step")
    abstract = train_state.abstract(config, identity.vocabulary.size, mesh).params
    with Checkpoints(run_dir / "checkpoints", writable=False, log=say) as checkpoints:
        step: Wanted = "best" if which == "best" else None if which == "latest" else int(which)
        params, meta = checkpoints.restore_params(abstract, step=step, item=config.optimizer.eval_params_field)
    check_checkpoint(meta["identity"], config, identity, run_dir)
    if config.optimizer.eval_params_field == "average" and distributed.is_first_process():
        say(f"{run_dir}: the average of the parameters (average={config.optimizer.average})")
    return params, meta["step"]


def check_checkpoint(checkpoint: dict[str, Any], config: Config, run: Identity, run_dir: Path) -> Config:
    """Settings that a checkpoint was made with.  Raises ValueError if it is not of the run in `run_dir`."""
    own = {"vocabulary_digest": run.vocabulary.digest, "corpus_fingerprint": run.corpus_fingerprint}
    others = [f"{name}: {checkpoint[name][:12]} -> {own[name][:12]}" for name in own if checkpoint[name] != own[name]]
    made_with = config_lib.from_json(
        json.dumps({"version": config_lib.VERSION, **checkpoint["config"]}), f"a checkpoint of {run_dir}"
    )
    if others := others + config_lib.diff(made_with, config)[0]:
        raise ValueError(
            f"the checkpoints of {run_dir} belong to another run ({'; '.join(others)}): take them out, or name another "
            "run_dir"
        )
    return made_with


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))
