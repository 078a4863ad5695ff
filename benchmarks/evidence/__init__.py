"""Evidence: a grid of methods, seeds and settings on tasks that a CPU trains in a minute, from runs to figures.

    tasks -> prepare (teacher, initial student) -> train (one method, one seed) -> results -> report

``python -m benchmarks.evidence run`` and ``... report``; docs/evidence.md says what came out.
"""
