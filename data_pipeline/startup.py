"""Starts a program: its first lines, before any slow import."""

import _signal  # signal itself takes milliseconds to import


def attach(name: str, hint: str = "") -> None:
    """Calls `terminal.attach`, with Ctrl-C and SIGTERM blocked until it answers them."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
    from data_pipeline import terminal

    terminal.attach(name, hint)
