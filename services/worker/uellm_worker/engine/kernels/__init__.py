"""Kernels for steps on CPUs, compiled by Numba as they are imported, or loaded from its cache.

A kernel computes one piece of an operation: it gets the address of its block of numbers, of those
of the step, the number of the piece, and that of the thread (see ``tiles.py`` and ``team.py``).
``operations.py`` lays the blocks out. Loops whose registers matter are written as vectors of LLVM's
language, the rest is Numba's Python.
"""
