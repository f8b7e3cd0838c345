"""Memory of the host that nothing uses any more, given back to the system."""

import ctypes

_libc = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "malloc_trim") else None  # glibc has it, others have not


def give_back() -> None:
    """Let malloc return what was freed: the compiler and the threads that write checkpoints leave holes behind.

    Without this a run keeps what compiling took (0.6 GB for a small model), and its resident memory grows with every
    save (BENCHMARKS.md), until the job is killed for it.
    """
    if _libc is not None:
        _libc.malloc_trim(0)
