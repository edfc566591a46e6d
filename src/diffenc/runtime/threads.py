"""Tools for threads: a lock per object, and hooks that act for one thread alone."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

_LOCKS: "WeakKeyDictionary[Any, AbstractContextManager[bool]]" = WeakKeyDictionary()
_GUARD = threading.Lock()
_FILTERS = threading.Lock()


def lock_of(shared: Any) -> AbstractContextManager[bool]:
    """The lock of an object: one for all that use it, as long as the object lives.

    It belongs to the object and not to who holds it: two encoders on one U-Net take turns. A copy
    has a lock of its own, and nothing of it is pickled. The thread that holds it may take it again.
    Order: a model's lock before those of its parts, so that no two threads wait for each other.

    Args:
        shared: Module, or another object that supports weak references.
    """
    with _GUARD:
        lock = _LOCKS.get(shared)
        if lock is None:
            lock = _LOCKS[shared] = threading.RLock()
        return lock


def share_lock(shared: Any, other: Any) -> None:
    """Give an object the lock of another one, whose parts it has."""
    lock = lock_of(other)
    with _GUARD:
        _LOCKS[shared] = lock


def for_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in other threads.

    While an encoder reads a module, a program may run the same module in a thread of its own,
    which knows nothing of locks.
    """
    owner = threading.get_ident()

    def guarded(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return guarded


@contextmanager
def without_warnings(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Hide warnings of a kind; one thread at a time changes the process's filters.

    Args:
        message: Regular expression that the warning's text begins with.
        category: Class of the warnings.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


def _forget_locks() -> None:
    """Make new locks in a forked process, where the threads that held the old ones are gone."""
    global _GUARD, _FILTERS
    _GUARD, _FILTERS = threading.Lock(), threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
