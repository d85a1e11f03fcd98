"""Serves a trained model as OpenAI's clients speak: POST /v1/completions, and a page at / to play with it.

    python -m launch.serve --run_dir=runs/mine --port=8000

A token is a symbol.  The same seed gives the same text, that of launch.sample, whatever else runs at the time.  What
requests and answers have is in docs/interop.md.  stdout has the address, as soon as there are answers.

SIGTERM ends the program when the requests that are there are answered, after two minutes at most, a second one at
once; so does Ctrl-C.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.serve")

import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from charlstm.interop import sampling_page
from charlstm.run import run_directory
from charlstm.serving import loading
from data_pipeline import signals
from data_pipeline.atomic_files import expand_user
from data_pipeline.progress import announced
from data_pipeline.settings import setting
from launch.support import cli, flags, jax_setup

if TYPE_CHECKING:
    from charlstm.serving.app import Server

LAST_ANSWERS = 120  # seconds at most after SIGTERM: one client that never reads would hold it for ever
INSTALL = "a server needs Starlette and uvicorn, not installed: pip install 'charlstm[serve]'"


@dataclasses.dataclass(frozen=True)
class ServeFlags:
    """The run, and where and how it is served."""

    run_dir: str = setting("", "The run whose model is served.  Required.")
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    host: str = setting(
        "127.0.0.1", "The address it listens on; 0.0.0.0: whoever reaches this machine may use the model."
    )
    port: int = setting(8000, "The port; 0: any that is free.")
    slots: int = setting(32, "Texts written at a time, side by side in one batch; others wait.")
    queue: int = setting(256, "Texts that may wait; more are refused with status 429.")
    max_prompt: int = setting(8192, "Symbols that a prompt may have.")
    max_tokens: int = setting(4096, "Symbols that a text may have.")
    follow: bool = setting(False, "Look for a better checkpoint every few seconds, and use it for the next requests.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be from 0 (any that is free) to 65535")
        for name, least in (("slots", 1), ("queue", 0), ("max_prompt", 1), ("max_tokens", 1)):
            if not least <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"{name}={getattr(self, name)} must be from {least} to {1 << 20}")
        if self.follow and self.checkpoint != "best":
            raise ValueError(f"follow goes with checkpoint=best, not {self.checkpoint}")


def main(argv: Sequence[str]) -> int:
    (chosen,), _ = flags.parse(argv, __doc__ or "", ServeFlags())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to serve")
    try:
        import uvicorn

        from charlstm.serving.app import Server
    except ModuleNotFoundError:
        raise ValueError(INSTALL) from None
    run_dir = expand_user(run_directory.named("run_dir", chosen.run_dir))
    config, identity = run_directory.read(run_dir)
    if config.streams.reverse:
        raise ValueError(f"{run_dir} reads backward, and a server writes from left to right: use launch.sample")
    listening = _listen(chosen.host, chosen.port)
    jax_setup.keep_compiled()
    mesh = jax_setup.sampling_mesh(chosen.slots)
    load = partial(loading.load, run_dir, config, identity, mesh, say=signals.say)
    model = load(checkpoint=chosen.checkpoint)
    signals.say(f"{run_dir}: the checkpoint of step {model.step}")
    limits = {name: getattr(chosen, name) for name in ("slots", "queue", "max_prompt", "max_tokens")}
    name = run_directory.name_of(run_dir)
    page = sampling_page.render_remote(name, sampling_page.described(config, model.params))
    with announced("compiling (once)"):
        server = Server(model, name, page, **limits)
    with contextlib.ExitStack() as running:
        running.callback(server.slots.close)
        if chosen.follow:
            best = partial(load, checkpoint="best")
            follower = loading.Follower(run_dir, best, model.step, server.slots.use, signals.say)
            running.callback(follower.stop)
        how = uvicorn.Config(server.app, log_level="error", access_log=False, lifespan="off", ws="none", http="h11")
        how.timeout_graceful_shutdown = LAST_ANSWERS
        listener = uvicorn.Server(how)
        listener.capture_signals = contextlib.nullcontext  # type: ignore  # ours are caught already
        running.enter_context(signals.reacting(partial(_signalled, server, listener)))
        host, port = listening.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        listener.run(sockets=[listening])
    return cli.DONE


def _signalled(server: "Server", listener: object, number: int) -> None:
    if number == signal.SIGINT or server.is_draining:
        signals.leave(number)
    server.is_draining = True
    listener.should_exit = True  # type: ignore[attr-defined]
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # an answer that is cut off is no error
    busy, waiting = server.slots.busy, server.slots.waiting
    signals.say(f"told to stop: ends when {busy + waiting} texts are written; a second signal ends it at once")


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.  Raises ValueError where the address or the port cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        raise ValueError(f"cannot listen on port {port} of {host} ({reason}): choose another port or host") from None


if __name__ == "__main__":
    cli.run("launch.serve", main)
