"""Runs the command `convergence` as `python -m convergence`."""

from convergence.command import main

if __name__ == "__main__":
    main(prog_name="convergence")
