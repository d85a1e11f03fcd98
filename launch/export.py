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
from charlstm.interop.export import FORMATS
from data_pipeline.settings import check_choices, setting
from launch import cli, flags, jax_setup


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """The run, and what is made of it."""

    run_dir: str = setting("", "The run whose model is written.  Required.")
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    format: str = setting(
        "safetensors", "; ".join(f"{name}: {what}" for name, (_, what) in FORMATS.items()) + ".", choices=tuple(FORMATS)
    )
    output: str = setting("", "The directory to write.  Required.")

    def __post_init__(self) -> None:
        check_choices(self)


def main(argv: Sequence[str]) -> int:
    (chosen,), _ = flags.parse(argv, __doc__ or "", ExportFlags())
    for name in ("run_dir", "output"):
        if not getattr(chosen, name):
            raise ValueError(f"--{name} is required")
    jax_setup.keep_compiled()
    model = api.load(chosen.run_dir, chosen.checkpoint)
    folder = model.export(chosen.output, chosen.format)
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return cli.DONE


if __name__ == "__main__":
    cli.run("launch.export", main)
