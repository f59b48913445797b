"""Scheduling decisions as pure functions, at two levels, so that nothing is decided twice.

``dispatch(QueueView, ReplicaViews, now)`` runs in the scheduler: it orders, promises, refuses and
sends small batches to replicas late. It never preempts.
``step(EngineView, now)`` runs in a worker's engine before every step: it admits, paces prefill,
preempts and may hand waiting work back. It never refuses.

Nothing here does I/O; time is an argument. The scheduler service, the engine and the simulator
run the same code.
"""
