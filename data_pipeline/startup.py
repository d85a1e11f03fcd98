"""Starts a program: its first lines, before any slow import."""

import _signal  # signal itself takes milliseconds to import


def attach(name: str, hint: str = "") -> None:
    """Calls `signals.attach`, with Ctrl-C and SIGTERM blocked until it answers them.

    Exits with status 2 where this Python is not the one that the project was installed into.
    """
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
    import gc
    import sys
    from importlib.util import find_spec

    gc.disable()  # what is imported stays; to look for garbage in it takes a tenth of the time (`cli.run` enables it)

    if not (find_spec("absl") and find_spec("jax")):
        print(
            f"{name}: {sys.executable} has no jax: use the environment that `make train` makes, "
            "source .venv/bin/activate, or install the project, pip install -e .",
            file=sys.stderr,
        )
        sys.exit(2)
    from data_pipeline import signals

    signals.attach(name, hint)
