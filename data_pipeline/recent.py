"""A thread-safe cache of the values used last."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """A thread-safe cache of the `capacity` values used last."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._values: collections.OrderedDict[object, Future[Value]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> Value | None:
        """Returns the value, or None; waits if another thread is making it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            future = self._values.get(key)
        return None if future is None else future.result()

    def put(self, key: object, value: Value) -> None:
        future: Future[Value] = Future()
        future.set_result(value)
        with self._lock:
            self._keep(key, future)

    def get_or(self, key: object, make: Callable[[], Value]) -> Value:
        """Returns the value, made by `make` if absent: once, also if several threads ask at a time."""
        with self._lock:
            future = self._values.get(key)
            if absent := future is None:
                future = Future()
            self._keep(key, future)
        if absent:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._values.get(key) is future:
                        del self._values[key]
                future.set_exception(error)
        return future.result()

    def _keep(self, key: object, future: "Future[Value]") -> None:
        self._values[key] = future
        self._values.move_to_end(key)
        while len(self._values) > self.capacity:
            self._values.popitem(last=False)
