"""``python benchmarks/gpu``: puts the package and this folder where they can be imported, and runs the command."""

import sys
from pathlib import Path


def main() -> None:
    # Python put this folder itself on the path; it is a package, so its parent belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import gpu.clock  # noqa: F401  # before all others: it looks at the clock
    from gpu.importable import link_tree

    sys.path.insert(0, str(link_tree()))
    from gpu.command import app

    app()


if __name__ == "__main__":
    main()
