"""Evidence: a grid of methods, seeds and settings on tasks that a CPU trains in a minute, from runs to figures.

    tasks -> prepare (teacher, initial student) -> train (one method, one seed) -> results -> report

``python -m benchmarks.evidence run`` and ``... report``; docs/evidence.md says what came out.
"""

import sys
from pathlib import Path

# The digits, their problems and their models are those of the example.
_EXAMPLES = str(Path(__file__).parents[2] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.insert(0, _EXAMPLES)
