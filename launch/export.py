"""Writes a trained model in a format that other programs read.

    python -m launch.export --run_dir=runs/mine --format=safetensors --output=exported

The directory appears whole or not at all.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.export")

import dataclasses
from collections.abc import Sequence

from charlstm import api
from charlstm import config as config_lib
from charlstm.interop.export import FORMATS, new_folder
from charlstm.run import corpus as corpus_lib
from data_pipeline.progress import announced, say_on_stderr
from data_pipeline.settings import check_choices, setting
from data_pipeline.shards import Corpus
from launch.support import cli, flags, jax_setup


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """The run, and what is made of it."""

    run_dir: str = setting("", "The run whose model is written.  Required.")
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    format: str = setting(
        "safetensors", "; ".join(f"{name}: {what}" for name, (_, what) in FORMATS.items()) + ".", choices=tuple(FORMATS)
    )
    output: str = setting("", "The directory to write; of html also a file, NAME.html.  Required.")

    def __post_init__(self) -> None:
        check_choices(self)


SECONDS_FOR_A_SCORE = 20.0  # that a store may be silent: the text is wanted for the score alone
ROUNDED = ("html",)  # formats that round the weights, and so want a text to measure what that does


def main(argv: Sequence[str]) -> int:
    (chosen,), _ = flags.parse(argv, __doc__ or "", ExportFlags())
    for name in ("run_dir", "output"):
        if not getattr(chosen, name):
            raise ValueError(f"--{name} is required")
    new_folder(chosen.output)  # refused before the model and its text are read
    jax_setup.keep_compiled()
    model = api.load(chosen.run_dir, chosen.checkpoint)
    held_out = _held_out(model) if chosen.format in ROUNDED else None
    with announced("scoring what rounded weights cost" if held_out else f"writing {chosen.format}"):
        folder = model.export(chosen.output, chosen.format, held_out)
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        print(f"{path}  {path.stat().st_size:,} bytes")
    return cli.DONE


def _held_out(model: api.Model) -> Corpus | None:
    """Returns the corpus of the run, or its mixture; None, saying why, where it cannot be had."""
    assert model.run_dir is not None
    try:
        patience = min(model.config.corpus.remote_patience, SECONDS_FOR_A_SCORE)
        return corpus_lib.load_own(model.run_dir, config_lib.replace(model.config, remote_patience=patience))
    except (ValueError, OSError) as error:
        say_on_stderr(f"no held-out text: {error}")
        return None


if __name__ == "__main__":
    cli.run("launch.export", main)
