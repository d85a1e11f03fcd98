"""Makes a run directory of a model that another program trained.

    python -m launch.import_model --from=model.safetensors --vocabulary_file=symbols.json --run_dir=runs/theirs
    python -m launch.import_model --from=exported --run_dir=runs/theirs

Then launch.sample, launch.evaluate --text, launch.inspect and launch.export work on it, and a new run of launch.train
starts from it with --flagfile=runs/theirs/flags.txt --initial_checkpoint=runs/theirs.  What is read, and how tensors
are told apart, is in docs/interop.md.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.import_model")

import dataclasses
from collections.abc import Sequence

from charlstm import distributed
from charlstm.interop import import_run
from charlstm.interop.torch_weights import Roles
from data_pipeline import signals
from data_pipeline.settings import setting
from launch.support import cli, flags, jax_setup


@dataclasses.dataclass(frozen=True)
class ImportFlags:
    """The model, and the run that it becomes."""

    source: str = setting(
        "",
        "A PyTorch state dict (.safetensors; .pt, .pth or .bin where PyTorch is installed), a folder that "
        "launch.export wrote, or the folder of the sentiment neuron's .npy files.  Required.",
    )
    run_dir: str = setting("", "The run directory to make.  Required.")
    vocabulary_file: str = setting(
        "",
        "The symbols of a state dict: bytes; a .json, a list in the order of the ids or an object of symbol to id; or "
        "a text, whose distinct characters have ids in sorted order.",
    )


def main(argv: Sequence[str]) -> int:
    (chosen, roles), _ = flags.parse(argv, __doc__ or "", ImportFlags(), Roles(), renamed={"source": "from"})
    for name in ("source", "run_dir"):
        if not getattr(chosen, name):
            raise ValueError(f"--{name.replace('source', 'from')} is required")
    jax_setup.keep_compiled()
    distributed.use_cpu_cores()
    imported = import_run.import_model(chosen.source, chosen.run_dir, chosen.vocabulary_file, roles)
    for remark in imported.remarks:
        signals.say(remark)
    print(f"{chosen.run_dir}: {import_run.in_words(imported)}")
    return cli.DONE


if __name__ == "__main__":
    cli.run("launch.import_model", main)
