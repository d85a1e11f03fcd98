"""Trains a character-level recurrent language model.  The same command, or its --run_dir alone, resumes the run.

python -m launch.train --flagfile=configs/small.flags --corpus=my.txt --run_dir=runs/mine
python -m launch.train --run_dir=runs/mine
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.train")

from collections.abc import Sequence

from charlstm import distributed
from charlstm.run import estimate, loop, memory, run_directory
from charlstm.run import start as start_lib
from charlstm.run.metrics import Diverged
from data_pipeline.atomic_files import expand_user
from launch.support import cli, cluster, jax_setup, train_flags
from launch.support.services import STATUS


def main(argv: Sequence[str]) -> int:
    chosen, job, services, config, given = train_flags.parse_for_run(argv, doc=__doc__)
    if not chosen.run_dir and not chosen.dry_run:
        raise ValueError("--run_dir is required: name a directory for the run, such as --run_dir=runs/mine")
    run_dir = expand_user(chosen.run_dir) if chosen.run_dir else None
    if run_dir:
        run_directory.named("run_dir", run_dir)
    settings = run_directory.settings_of(run_dir, config) if run_dir else config
    memory.require_possible(settings, dry=chosen.dry_run)
    jax_setup.keep_freed_memory(estimate.estimate_temp_bytes(settings, distributed.usable_cores()))
    jax_setup.keep_compiled()
    choose_mesh = jax_setup.mesh_chooser(job)
    cluster.join(job)
    with cluster.leaving(job):
        mesh = choose_mesh(config)
        corpus, config = start_lib.open_corpus(config, given, run_dir, mesh)
        if chosen.dry_run or run_dir is None:
            print(start_lib.dry_run(run_dir, config, corpus, mesh, chosen.dry_run_format, services.end))
            return cli.DONE
        run = start_lib.start(run_dir, config, corpus, choose_mesh, chosen.initial_checkpoint, services.end)
        try:
            return STATUS[loop.train(run, services, given)]
        except Diverged:
            return cli.DIVERGED


if __name__ == "__main__":
    cli.run("launch.train", main)
