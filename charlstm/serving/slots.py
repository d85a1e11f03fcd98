"""Fixed slots of one compiled program, which texts join and leave between chunks.

A text depends on its prompt, its settings, its seed and its number alone, and has the bits of `generate`: the program
always has as many rows, rows do not see each other, and the noise of a row is that of (seed, number, position).
"""

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.inference.generate import Beginning, batch_of, first_symbols, make_chunk, noise, reading, row_keys
from charlstm.inference.sampling import Sampling, by_rows
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.serving.texts import Fetched, Group, Loaded, Prompt, Symbols, Text
from data_pipeline.batch import looks_back

CHUNK = 16  # symbols of one call of the device
WINDOWS = 8  # of prompts, read between two chunks: the texts that are being written wait for them
REMEMBERED = 64  # prompts whose state is kept
IDLE = Sampling(temperature=0)


class Full(Exception):
    """There are as many texts waiting as may."""


class Broken(Exception):
    """The device has failed, and cannot even make an empty state."""


class OtherModel(Exception):
    """The model has been replaced since the request was read."""


class _Unread(Text):
    def feed(self, symbols: Symbols) -> bool:
        return False

    def fail(self, error: Exception) -> None:
        raise error


class Slots:
    """Writes texts, as many at a time as there are slots.  Others wait.

    Attributes:
      model: that writes.
      written, read: symbols so far.
      is_broken: no text will be written any more, as the device has failed for good.
    """

    def __init__(
        self, model: Loaded, slots: int, queue: int, notify: Callable[[Sequence[Text]], None] = lambda texts: None
    ) -> None:
        """Compiles, and starts the thread.

        Args:
          slots: texts written at a time; a few more where the devices share them out.
          queue: texts that may wait.
          notify: called by the thread with all texts that have got symbols, have failed or are done, once a chunk.
        """
        self.mesh, self.slots = batch_of(model.params, slots)
        self.model, self._queue, self._notify = model, queue, notify
        self._next: Loaded | None = None
        self.written = self.read = 0
        self._changed, self._is_closed, self.is_broken = threading.Condition(), False, False
        self._waiting: collections.deque[Text] = collections.deque()
        self._texts: list[Text | None] = [None] * self.slots
        self._empty()
        self._write_to_nobody()
        self._thread = threading.Thread(target=self._work, name="slots", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> int:
        """Slots that are taken."""
        return sum(text is not None for text in self._texts)

    @property
    def waiting(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        """Texts that can be written and wait at a time."""
        return self.slots + self._queue

    def submit(self, texts: Sequence[Text]) -> None:
        """Takes texts to be written.  Raises Broken, or Full where not all of them can be written or wait."""
        with self._changed:
            if self.is_broken:
                raise Broken
            if self.busy + len(self._waiting) + len(texts) > self.capacity:
                raise Full
            self._waiting.extend(texts)
            self._changed.notify()

    def use(self, model: Loaded) -> None:
        """Writes with another model, from when the texts that were begun are done."""
        with self._changed:
            self._next = model
            self._changed.notify()

    def leave(self, texts: Sequence[Text]) -> None:
        """Drops texts: frees their slots at the next chunk."""
        with self._changed:
            for text in texts:
                text.is_left = True
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread; texts that are not done fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _write_to_nobody(self) -> None:
        """Writes a text that is thrown away: the first that is wanted then waits for no compilation."""
        self._waiting.append(_Unread(Prompt(Group(), np.zeros(2, np.int32)), Sampling(), 0, 0, 2 * CHUNK))
        self._admit()
        while self.busy:
            self._turn()
        self._empty()
        self.written = self.read = 0

    def _work(self) -> None:
        while True:
            failed = []
            try:
                with self._changed:
                    while not (self._is_closed or self._waiting or self._next or any(self._texts)):
                        self._changed.wait()
                    if self._is_closed:
                        break
                    failed = self._admit()
                touched = self._turn()
            except Exception as error:  # of the device: out of memory, say
                touched = self._fail_all(error)
            self._notify(failed + touched)
        self._notify(self._fail_all(RuntimeError("the server has ended")))

    def _fail_all(self, error: Exception) -> list[Text]:
        """Begins anew without texts, and returns those that there were; refuses all others where it cannot begin."""
        try:
            self._empty()
        except Exception:  # of the device, whatever it was: the text's own error is the one that is told
            self.is_broken = True  # before a text has failed, so none of them is asked for again
        with self._changed:
            texts = [text for text in (*self._texts, *self._waiting) if text]
            self._texts = [None] * self.slots
            self._waiting.clear()
        for text in texts:
            text.fail(error)
        return texts

    def _empty(self) -> None:
        """Makes the state of all slots anew."""
        self._remembered: collections.OrderedDict[bytes, Beginning] = collections.OrderedDict()
        model, count = self.model, self.slots
        self._state = language_model.zero_state(model.config, count, model.params.b_out.dtype)
        self._last_RK: Any = np.zeros((count, looks_back(model.separator) + 1), np.int32)
        self._keys = np.array(jax.random.key_data(row_keys(0, "sample", np.arange(count))))
        self._start_R, self._left_R = np.zeros(count, np.int32), np.zeros(count, np.int64)
        self._is_written = np.zeros(count, bool)  # its prompt is read
        self._settings = [IDLE] * count

    def _admit(self) -> list[Text]:
        """Frees the slots of texts that nobody wants, and fills free slots; returns the texts that have failed."""
        for slot, text in enumerate(self._texts):
            if text and text.is_left:
                self._free(slot)
        wanted = [text for text in self._waiting if not text.is_left]
        begun = [text for text in wanted if text.prompt.group.model]
        if self._next and not any(self._texts) and not begun:
            self.model, self._next = self._next, None
            self._empty()
        failed = [text for text in wanted if text.prompt.group.digest not in (None, self.model.digest)]
        for text in failed:
            text.fail(OtherModel())
        free = [slot for slot, text in enumerate(self._texts) if text is None]
        ready = [text for text in (begun if self._next else wanted) if text not in failed]
        for slot, text in zip(free, ready, strict=False):
            self._texts[slot], prompt = text, text.prompt
            prompt.group.model, prompt.turns = self.model, prompt.turns or self._reading(prompt)
        self._waiting = collections.deque(text for text in wanted if text not in (*self._texts, *failed))
        return failed

    def _free(self, slot: int) -> None:
        self._texts[slot], self._is_written[slot], self._settings[slot] = None, False, IDLE

    def _turn(self) -> list[Text]:
        """Reads windows of prompts and writes one chunk; returns the texts that have got something."""
        touched = self._read()
        return touched + self._write() if self._is_written.any() else touched

    def _reading(self, prompt: Prompt) -> Iterator[Beginning]:
        """Yields as `reading`, and remembers the last."""
        known = self._remembered.pop(prompt.ids.tobytes(), None) if prompt.after is None else None
        if known is None:
            model = self.model
            for beginning in reading(model.config, model.params, prompt.ids, model.separator, prompt.after):
                known = beginning
                yield known
        else:
            yield known
        if prompt.after is None and known is not None:
            self._remembered[prompt.ids.tobytes()] = known
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)

    def _read(self) -> list[Text]:
        """Reads windows of prompts, and begins the texts whose prompts are read; returns those that are done so."""
        windows, done = WINDOWS, []
        for slot, text in enumerate(self._texts):
            if text is None or self._is_written[slot]:
                continue
            prompt = text.prompt
            while not prompt.is_read and windows > 0:
                assert prompt.turns is not None
                turn = next(prompt.turns, None)
                prompt.latest, prompt.is_read = turn or prompt.latest, turn is None
                windows -= turn is not None
            if prompt.is_read:
                self._begin(slot, text)
                if not text.length:
                    self._free(slot)
                    done.append(text)
        return done

    def _begin(self, slot: int, text: Text) -> None:
        prompt, model, number = text.prompt, self.model, np.array([text.number])
        assert prompt.latest is not None
        beginning = prompt.latest
        if not len(prompt.ids) and prompt.after is None:
            V, back = model.vocabulary.size, looks_back(model.separator)
            first_RK = first_symbols(text.seed, number, V, model.unknown_id, back)
            beginning = beginning._replace(last_K=np.asarray(first_RK[0]))
        text.begin(beginning)
        self.read += len(prompt.ids)
        self._place(np.arange(self.slots) == slot, beginning)
        self._keys[slot] = jax.random.key_data(row_keys(text.seed, "sample", number))[0]
        self._start_R[slot], self._left_R[slot] = prompt.position, text.length
        self._settings[slot], self._is_written[slot] = text.sampling, True

    def _place(self, where_R: np.ndarray, beginning: Beginning) -> None:
        self._state, self._last_RK = _placed(self._state, self._last_RK, where_R, *beginning)

    def _write(self) -> list[Text]:
        """Writes a chunk of every text whose prompt is read; returns them."""
        model, before_RK = self.model, self._last_RK
        choice, keys_R = (
            by_rows(self._settings, model.params.b_out.dtype),
            jax.random.wrap_key_data(jnp.asarray(self._keys)),
        )
        gumbel_TRV = noise(keys_R, self._start_R, choice, self.mesh, CHUNK, model.vocabulary.size)
        how = self.mesh, model.config, model.unknown_id, model.separator, CHUNK
        self._state, self._last_RK, made = make_chunk(
            model.params, self._state, self._last_RK, gumbel_TRV, choice, *how, keep=True
        )
        fetched = Fetched(made, before_RK)
        touched = []
        for slot in np.flatnonzero(self._is_written).tolist():
            text, count = self._texts[slot], int(min(CHUNK, self._left_R[slot]))
            assert text is not None
            self._left_R[slot] -= count
            self.written += count
            if text.feed(Symbols(fetched, slot, count)) or not self._left_R[slot]:
                self._free(slot)
            touched.append(text)
        self._start_R += CHUNK
        return touched


@compiler.jit
def _placed(state, last_RK, where_R, beginning, last_K):
    state = jax.tree.map(lambda old, new: jnp.where(where_R[:, None], new, old), state, beginning)
    return state, jnp.where(where_R[:, None], last_K[None], last_RK)
