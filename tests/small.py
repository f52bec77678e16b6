"""A small toy world, and a script in it, in a process of its own: python tests/small.py irpo.py --model DIR ..."""
import os
import runpy
import sys

SIZES = {"train": 12, "dev": 8, "test": 8}  # questions of each split

if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # where the script is

    from data import toy

    toy.SIZES.update(SIZES)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
