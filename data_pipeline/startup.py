"""The first lines of a program."""

import _signal  # signal itself takes milliseconds to import


def attach(name: str, hint: str = "") -> None:
    """As `terminal.attach`, with Ctrl-C and SIGTERM held back until that answers them."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
    from data_pipeline import terminal

    terminal.attach(name, hint)
