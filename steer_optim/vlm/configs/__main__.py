"""Print the path of a configuration, ``one_gpu``, ``ddp`` or ``fsdp2``; of all without a name."""

import sys
from pathlib import Path

found = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
unknown = set(sys.argv[1:]) - found.keys()
if unknown:
    sys.exit(f"there is no configuration {', '.join(sorted(unknown))}: choose from {', '.join(found)}")
print(*(found[name] for name in sys.argv[1:] or found), sep="\n")
