"""`python -m extproc.simulator`: one simulated worker without the rest of the package."""

import argparse
import sys

from extproc.simulator import cli


def main() -> int:
    parser = argparse.ArgumentParser(prog="extproc.simulator", description=cli.DESCRIPTION)
    cli.add_arguments(parser)
    return cli.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
