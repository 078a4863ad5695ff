"""When does Visual Gradient Steering win? Methods, seeds and settings on tasks that a CPU trains in a minute.

    tasks -> prepare (teacher, initial student) -> train (one method, one seed) -> runs.csv -> report

``python -m studies.vgs run`` and ``... report``; docs/evidence.md says what came out.
"""
